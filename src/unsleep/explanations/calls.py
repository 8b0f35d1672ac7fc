"""Calls to a judge: from a cache on disk, within limits, several in flight, each tried a few times.

A call's place in the cache is the hash of the judge and the question, so that an interrupted run, and a run with more
features, asks only what was not answered yet. Cached calls are free.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from unsleep.base import records, store
from unsleep.base.context import progress
from unsleep.base.records import Count
from unsleep.core import BadInput
from unsleep.explanations.budget import Budget, Limits, OverLimit, Size
from unsleep.explanations.judges import Declined, Judge, Nonsense, Question, Reply, Unavailable

T = TypeVar("T")

MAX_WAIT = 300.0
"""Longest wait for an endpoint, in seconds; one that asks for more ends the run, which can be resumed."""

FAILURES = 3
"""Calls in a row whose tries all failed, after which the endpoint is taken to be down."""


@dataclass(frozen=True)
class Call:
    """A cached call."""

    SCHEMA: ClassVar = "unsleep.call/1"

    judge: dict[str, Any]
    system: str
    user: str
    max_tokens: Count
    reply: Reply


@dataclass(frozen=True)
class Answer(Generic[T]):
    """Outcome of a question."""

    value: T | None = None
    why: str = ""
    """Reason for no answer; empty for an answer."""
    asked: bool = True
    """False if a limit or a failing endpoint stopped the run before the call."""


class Tally(NamedTuple):
    """Account of a run, or its estimate."""

    calls: Count
    cached: Count
    """Calls found in the cache."""
    input_tokens: Count
    output_tokens: Count
    """Tokens of the answers; in an estimate, their maximum."""
    cost: float | None
    """In the currency of the prices."""
    unanswered: dict[str, Count]
    """Reason for no answer → questions."""


class Asker:
    """Asks a judge questions and reads the answers, each nonsensical one asked for once more.

    With `dry`, no call is made: cached answers are used, and examples stand for the others.
    """

    def __init__(self, judge: Judge, cache: str | Path, limits: Limits = Limits(), *, dry: bool = False) -> None:
        self.judge, self.limits, self.dry = judge, limits, dry
        self.stopped = ""
        """The reason why calls were left out; empty where none was."""
        self.cache, self._budget = Path(cache), Budget(limits)
        self._cached, self._unanswered = 0, Counter[str]()
        self._halt, self._lock = threading.Event(), threading.Lock()
        self._not_before, self._failures = 0.0, 0

    @property
    def tally(self) -> Tally:
        """Account of the calls so far."""
        spent = self._budget.spent
        return Tally(spent.calls, self._cached, *spent[1:], self.limits.cost(spent), dict(self._unanswered))

    def ask(self, questions: Sequence[Question[T]], stage: str) -> list[Answer[T]]:
        """Answers in the order of the questions; progress counts calls that are not cached.

        Raises `BadInput` for a request that the endpoint refuses, such as a wrong key. A limit, or an endpoint that
        fails for too long, sets `stopped` instead, and leaves the other questions unasked.
        """
        answers = [_read(q, r) for q, r in zip(questions, self._replies(questions, stage), strict=True)]
        again = [i for i, a in enumerate(answers) if a.why.startswith(NONSENSE)]
        repeated = [questions[i].again(answers[i].why.removeprefix(NONSENSE)) for i in again]
        for i, question, reply in zip(again, repeated, self._replies(repeated, f"{stage} again"), strict=True):
            answers[i] = _read(question, reply)
        self._unanswered.update(a.why.partition(": ")[0] for a in answers if a.why)
        return answers

    def _replies(self, questions: Sequence[Question[Any]], stage: str) -> list[Reply | Declined | None]:
        """One per question: a reply, the reason why there is none, or `None` where the question was not asked."""
        keys = [self._key(question) for question in questions]
        found: dict[str, Reply | Declined] = {}
        missing: dict[str, Question[Any]] = {}
        for key, question in zip(keys, questions, strict=True):
            if key in found or key in missing:
                continue
            if kept := self._kept(key, question):
                found[key] = kept
                self._cached += 1
            else:
                missing[key] = question
        found |= self._estimated(missing) if self.dry else self._fetched(missing, stage)
        return [found.get(key) for key in keys]

    # The cache

    def _key(self, question: Question[Any]) -> str:
        return store.hash_value([self.judge.identity, question.messages, question.tokens])

    def _place(self, key: str) -> Path:
        return self.cache / key[:2] / f"{key}.json"

    def _kept(self, key: str, question: Question[Any]) -> Reply | None:
        place = self._place(key)
        if not place.exists():
            return None
        call = records.load(Call, place)
        if (call.system, call.user) != (question.system, question.user):
            raise BadInput(f"{place} is of another question; remove it")
        return call.reply

    def _keep(self, key: str, question: Question[Any], reply: Reply) -> None:
        call = Call(self.judge.identity, question.system, question.user, question.tokens, reply)
        records.save(call, self._place(key))

    # Calls

    def _estimated(self, missing: Mapping[str, Question[Any]]) -> dict[str, Reply | Declined]:
        for question in missing.values():
            self._budget.settle(Size(), self._size([question]))
        return {key: Reply(question.example, 0, 0, False) for key, question in missing.items()}

    def _size(self, questions: Sequence[Question[Any]]) -> Size:
        """Upper bound of calls: their questions, and answers of maximum length."""
        read = sum(self.judge.count(question) for question in questions)
        return Size(len(questions), read, sum(question.tokens for question in questions))

    def _fetched(self, missing: Mapping[str, Question[Any]], stage: str) -> dict[str, Reply | Declined]:
        """Call the judge for each question; an interrupt lets calls in flight end, so that they are cached."""
        todo, size = list(missing.items()), self.judge.batch
        found: dict[str, Reply | Declined] = {}
        if not todo or self._halt.is_set():
            return found
        progress(stage, 0, len(todo))
        pool = ThreadPoolExecutor(self.judge.parallel)
        try:
            for done in as_completed([pool.submit(self._fetch, todo[i : i + size]) for i in range(0, len(todo), size)]):
                found |= done.result()
                progress(stage, len(found), len(todo))
        except BaseException:
            self._halt.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return found

    def _fetch(self, chunk: Sequence[tuple[str, Question[Any]]]) -> dict[str, Reply | Declined]:
        """One call with its tries; empty where the run has stopped."""
        questions = [question for _, question in chunk]
        size, why = self._size(questions), ""
        for attempt in range(self.limits.tries):
            if self._halt.wait(max(0.0, self._not_before - time.monotonic())):
                return {}
            try:
                self._budget.hold(size)
            except OverLimit as error:
                self._stop(str(error))
                return {}
            try:
                replies = self.judge.reply(questions)
            except Unavailable as error:
                self._budget.settle(size, size if error.billed else Size())
                why = str(error)
                if not self._back_off(attempt, error):
                    return {}
                continue
            except BaseException:
                self._halt.set()
                self._budget.settle(size, Size())
                raise
            return self._settled(chunk, replies, size)
        with self._lock:
            self._failures += 1
            down = self._failures >= FAILURES
        if down:
            self._stop(f"{self.judge.name} failed {FAILURES} calls in a row, each {self.limits.tries} times: {why}")
            return {}
        return {key: Declined(f"failed: {why}") for key, _ in chunk}

    def _settled(
        self, chunk: Sequence[tuple[str, Question[Any]]], replies: Sequence[Reply | Declined], size: Size
    ) -> dict[str, Reply | Declined]:
        """Account for replies and cache them."""
        answered = [r for r in replies if isinstance(r, Reply)]
        used = Size(len(answered), sum(r.input_tokens for r in answered), sum(r.output_tokens for r in answered))
        self._budget.settle(size, used)
        found: dict[str, Reply | Declined] = {}
        for (key, question), reply in zip(chunk, replies, strict=True):
            found[key] = reply
            if isinstance(reply, Reply):
                self._keep(key, question, reply)
        with self._lock:
            self._failures = 0
        return found

    def _back_off(self, attempt: int, error: Unavailable) -> bool:
        """Wait before the next try, as long as the endpoint asks or twice as long each time; false to stop.

        All calls wait where the endpoint asks for it.
        """
        if error.wait is not None and error.wait > MAX_WAIT:
            self._stop(f"{self.judge.name} asks to wait {error.wait:.0f} s: {error}")
            return False
        if attempt + 1 == self.limits.tries:
            return True
        if error.wait is not None:
            with self._lock:
                self._not_before = max(self._not_before, time.monotonic() + error.wait)
            return True
        seconds = min(MAX_WAIT, self.limits.wait * 2**attempt)
        return not self._halt.wait(seconds * random.uniform(0.75, 1.25))

    def _stop(self, reason: str) -> None:
        with self._lock:
            self.stopped = self.stopped or reason
        self._halt.set()


NONSENSE = "nonsense: "
"""Beginning of the reason for no answer where the judge gave one that cannot be read."""


def _read(question: Question[T], reply: Reply | Declined | None) -> Answer[T]:
    if reply is None:
        return Answer(asked=False)
    if isinstance(reply, Declined):
        return Answer(why=reply.reason)
    try:
        return Answer(question.parse(reply.text))
    except Nonsense as error:
        cut = f"it was cut off at {question.tokens} tokens" if reply.cut else str(error)
        return Answer(why=f"{NONSENSE}{cut}")
