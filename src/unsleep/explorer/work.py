"""The worker thread: one piece of work at a time, its events, and its cancellation."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from unsleep.core import BadInput, Refused

T = TypeVar("T")

POLL = 0.01
"""Seconds between two looks at work that is being cancelled."""

PATIENCE = 30.0
"""Seconds that cancelled work is waited for."""

log = logging.getLogger("unsleep.explorer")


class Busy(RuntimeError):
    """Other work is running."""


class Cancelled(Exception):
    """The work was cancelled."""


class Event(NamedTuple):
    """A server-sent event."""

    name: str
    data: dict[str, Any]


class Work:
    """A piece of work: its events for the event loop that started it, and the request to stop."""

    def __init__(self, kind: str) -> None:
        """`kind` names it with its article, such as "a bake"."""
        self.kind = kind
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._stop, self._done = threading.Event(), threading.Event()

    def say(self, name: str, /, **data: Any) -> None:
        """Send an event; from the worker thread."""
        self._put(Event(name, data))

    def progress(self, stage: str, done: int, total: int) -> None:
        """A progress callback that sends events, and raises `Cancelled` as `check` does."""
        self.check()
        self.say("progress", stage=stage, done=done, total=total)

    def check(self) -> None:
        """Raise `Cancelled` where the work is cancelled."""
        if self._stop.is_set():
            raise Cancelled

    def cancel(self) -> None:
        """Ask the work to stop at its next check."""
        self._stop.set()

    @property
    def is_cancelled(self) -> bool:
        """True if the work was asked to stop."""
        return self._stop.is_set()

    @property
    def is_done(self) -> bool:
        """True if the worker thread has left it."""
        return self._done.is_set()

    def end(self) -> None:
        """Mark the end of the events; from the worker thread."""
        self._done.set()
        self._put(None)

    async def events(self) -> AsyncIterator[Event]:
        """The events, until the work ends."""
        while (event := await self._events.get()) is not None:
            yield event

    def _put(self, event: Event | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


class Worker:
    """A thread that does one piece of work at a time, so that no two use the model's hooks at once."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="unsleep-serve")
        self._work: Work | None = None

    async def start(self, kind: str, do: Callable[[Work], None]) -> Work:
        """Start work that sends events; an error becomes one. Raises `Busy`, naming the work that is running."""
        work = await self._begin(kind)
        self._pool.submit(_run, work, do)
        return work

    async def answer(self, kind: str, do: Callable[[Work], T]) -> T:
        """Do work and return its result; raises what it raises, and `Busy` as `start` does."""
        work = await self._begin(kind)

        def run() -> T:
            try:
                return do(work)
            finally:
                work.end()

        return await asyncio.wrap_future(self._pool.submit(run))

    async def cancel(self) -> bool:
        """Cancel the running work and wait until it has stopped; False where there is none."""
        if self._work is None or self._work.is_done:
            return False
        self._work.cancel()
        await _stopped(self._work)
        return True

    def stop(self) -> None:
        """Ask the running work to stop, without waiting; from any thread and from signal handlers."""
        if self._work is not None:
            self._work.cancel()

    def close(self) -> None:
        """Stop the running work and end the thread."""
        self.stop()
        self._pool.shutdown(cancel_futures=True)

    async def _begin(self, kind: str) -> Work:
        if self._work is not None and self._work.is_cancelled:
            await _stopped(self._work)
        if self._work is not None and not self._work.is_done:
            raise Busy(f"{self._work.kind} is running; wait for it, or cancel it")
        self._work = Work(kind)
        return self._work


async def _stopped(work: Work) -> None:
    for _ in range(round(PATIENCE / POLL)):
        if work.is_done:
            return
        await asyncio.sleep(POLL)


def _run(work: Work, do: Callable[[Work], None]) -> None:
    """Do work in the worker thread; its error is its last event."""
    try:
        do(work)
    except Cancelled:
        work.say("error", message="cancelled")
    except (BadInput, Refused) as error:
        work.say("error", message=str(error))
    except Exception as error:
        log.exception("the work failed")
        work.say("error", message=f"{type(error).__name__}: {error}")
    finally:
        work.end()
