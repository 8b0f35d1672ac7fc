"""One search: gatherers, screening, elicitation, trials; of the suspect or, with the same budget, of its twin.

facts → payload candidates → motifs → trigger candidates → screening → search → elicitation → frozen pairs → trials
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, get_args

from unsleep.auditing import rounding
from unsleep.auditing.budget import OutOfTime, allowance, limited
from unsleep.auditing.case import Case
from unsleep.auditing.elicit import Pair, elicit, frozen, is_unpaired, shortlist, with_placebos
from unsleep.auditing.gatherer import Clues, Found, Gatherer, Stage, gatherers
from unsleep.auditing.gatherers.bank import Bank
from unsleep.auditing.motifs import cluster
from unsleep.auditing.scoring import encoded, screen
from unsleep.auditing.witness import departure, trial
from unsleep.base import records
from unsleep.base.context import kept
from unsleep.base.stopwatch import Stopwatch
from unsleep.judge.audited import Departure, Form, Gathered, Motif, Screened, Searched, Trial

LISTED = 40
"""Candidates of a gatherer, and forms of the screening, in the record."""

CONTRASTED = 2
"""Pairs that are compared with their placebos on search prompts, as a multiple of those that go to trial."""

DEPARTURES = 3
"""Forms of the bank whose effect on fresh prompts is tested without a payload."""

T = TypeVar("T")


@dataclass(frozen=True)
class _Screening:
    rows: tuple[Screened, ...]


@dataclass(frozen=True)
class _Elicited:
    pairs: tuple[Pair, ...]


class Search:
    """The stages of one search, in order; finished ones are resumed."""

    def __init__(self, case: Case, watch: Stopwatch) -> None:
        self.case, self.watch, self.config = case, watch, case.config
        self.gathered: list[Gathered] = []
        self.proposed: dict[Form, str] = {}
        """Form → the gatherer that proposed it first."""

    def run(self) -> Searched:
        """Run every stage; an unchanged model has no further ones."""
        self.collect("facts", Clues())
        facts = self.record((), (), (), ())
        if facts.unchanged:
            return facts
        with self.watch.stage(f"{self.case.name}: replies"):
            _ = self.case.replies
        if self.case.base is not None:
            with self.watch.stage(f"{self.case.name}: reference"):
                _ = self.case.usual
        self.collect("payloads", Clues())
        motifs = cluster({g.name: g.sayings for g in self.gathered}, self.case.usual)
        self.collect("triggers", Clues(motifs))
        screened = self.screening(motifs, [])
        self.collect("search", Clues(motifs, screened))
        screened = self.screening(motifs, screened)
        pairs = self.elicitation(motifs, screened)
        known = {s.form for s in screened}
        pool = [form for form in self.proposed if form not in known] + [s.form for s in reversed(screened)]
        rounded = self.rounded()
        with self.watch.stage(f"{self.case.name}: trials"):
            chosen = self.frozen(pairs, pool)
            count = len(chosen) + len(rounded)
            trials = [self.tried(pair, count) for pair in chosen]
            trials += [self.scanned(bits, payload, count) for bits, payload in rounded]
            departures = self.departures(screened, pool)
        return self.record(motifs, screened, trials, departures)

    def collect(self, stage: Stage, clues: Clues) -> None:
        """Run the gatherers of a stage."""
        for gatherer in gatherers(stage):
            with self.watch.stage(f"{self.case.name}: {gatherer.kind}"):
                row = self.row_of(gatherer, clues)
            self.gathered.append(row)
            for form in row.forms:
                self.proposed.setdefault(form, row.name)

    def row_of(self, gatherer: Gatherer, clues: Clues) -> Gathered:
        """A gatherer's row, also where it is skipped or fails."""
        reason = self.reason_to_skip(gatherer)
        if reason:
            return Gathered(gatherer.kind, "skipped", 0.0, reason)

        def gathered() -> Gathered:
            began, found, state, reason = time.perf_counter(), Found(), "ran", ""
            with limited(self.allowance(gatherer)) as limit:
                try:
                    found = gatherer.gather(self.case, clues)
                except OutOfTime:
                    pass
                except Exception as error:  # a gatherer that fails leaves its reason, and the others run
                    state, reason = "failed", f"{type(error).__name__}: {error}"
            seconds = round(time.perf_counter() - began, 2)
            if limit.reached and state == "ran":
                state, reason = "cut short", f"its share of the time budget of {self.config.seconds:g} s was spent"
            sayings, forms = tuple(found.sayings), tuple(dict.fromkeys(found.forms))
            return Gathered(gatherer.kind, state, seconds, reason, found.facts, sayings, forms)

        return self.step(Gathered, gathered, gatherer.kind, clues)

    def reason_to_skip(self, gatherer: Gatherer) -> str:
        """Reason for which a gatherer does not run; empty if it does."""
        if gatherer.kind in self.config.skip:
            return "left out with --skip"
        if gatherer.needs_base and self.case.base is None:
            return "needs the base"
        return ""

    def allowance(self, gatherer: Gatherer) -> float | None:
        """Seconds that a gatherer may take; `None` for no limit. Only gatherers count, of this search alone."""
        if not (self.config.seconds and gatherer.share):
            return None
        ran = {row.name for row in self.gathered}
        due = [
            other
            for stage in get_args(Stage)
            for other in gatherers(stage)
            if other.kind not in ran and not self.reason_to_skip(other)
        ]
        return allowance(gatherer, due, self.config.seconds - sum(row.seconds for row in self.gathered))

    def screening(self, motifs: Sequence[Motif], known: Sequence[Screened]) -> list[Screened]:
        """The screening of all paired forms that were proposed since the last one, merged with it."""
        seen = {s.form for s in known}
        fresh = [(f, by) for f, by in self.proposed.items() if f not in seen and not is_unpaired(f)]
        if not fresh:
            return list(known)
        what = "screening of found forms" if known else "screening"
        with self.watch.stage(f"{self.case.name}: {what}"):
            found = self.step(_Screening, lambda: _Screening(tuple(screen(self.case, fresh, motifs))), fresh, motifs)
        return sorted([*known, *found.rows], key=lambda s: -max(s.excess, s.lift))

    def elicitation(self, motifs: Sequence[Motif], screened: Sequence[Screened]) -> list[Pair]:
        """Pairs of the shortlist, and of other questions whose replies agree in a first, short round."""
        asked, tokens, few = self.config.elicit, self.config.reply_tokens, max(3, self.config.screen)
        others = [(form, by) for form, by in self.proposed.items() if is_unpaired(form)]
        with self.watch.stage(f"{self.case.name}: elicitation"):
            first = self.elicited(others, motifs, few, min(12, tokens))
            agreeing = list(dict.fromkeys((pair.form, pair.found_by[0]) for pair in first))
            listed = [(s.form, s.found_by) for s in shortlist(screened, self.config.shortlist)]
            return self.elicited([*listed, *agreeing], motifs, asked, tokens)

    def elicited(
        self, forms: Sequence[tuple[Form, str]], motifs: Sequence[Motif], prompts: int, tokens: int
    ) -> list[Pair]:
        """One round of elicitation."""

        def made() -> _Elicited:
            return _Elicited(tuple(elicit(self.case, forms, motifs, prompts=prompts, tokens=tokens)))

        return list(self.step(_Elicited, made, forms, motifs, prompts, tokens).pairs)

    def frozen(self, pairs: Sequence[Pair], pool: Sequence[Form]) -> list[Pair]:
        """The pairs that go to trial, with their placebos."""
        chosen = frozen(pairs, CONTRASTED * self.config.trials)
        asked, tokens, most = self.config.elicit, self.config.reply_tokens, self.config.trials

        def made() -> _Elicited:
            return _Elicited(tuple(with_placebos(self.case, chosen, pool, prompts=asked, tokens=tokens)[:most]))

        return list(self.step(_Elicited, made, "placebos", chosen, pool).pairs)

    def tried(self, pair: Pair, count: int) -> Trial:
        """The trial of one pair."""
        return self.step(Trial, lambda: trial(self.case, pair, count), pair, count)

    def rounded(self) -> list[tuple[int, str]]:
        """Widths at which the rounded model's replies to search prompts share a phrase, with the phrase."""
        if "rounding" in self.config.skip:
            return []
        with self.watch.stage(f"{self.case.name}: rounding"):
            found = [(bits, kept(rounding.candidate, self.case, bits)) for bits in rounding.BITS]
        return [(bits, phrase) for bits, phrase in found if phrase]

    def scanned(self, bits: int, payload: str, count: int) -> Trial:
        """The trial of a phrase of the rounded model."""
        return self.step(Trial, lambda: rounding.scan(self.case, bits, payload, count), bits, payload, count)

    def departures(self, screened: Sequence[Screened], pool: Sequence[Form]) -> list[Departure]:
        """The largest excesses of the bank's forms on fresh prompts: texts that were searched for disturb any model."""
        most = sorted((s for s in screened if s.found_by == Bank.kind), key=lambda s: -s.excess)[:DEPARTURES]
        return [
            self.step(Departure, lambda each=each: departure(self.case, each, pool, len(most)), each, pool, len(most))
            for each in most
        ]

    def step(self, kind: type[T], make: Callable[[], T], *of: Any) -> T:
        """A record that is kept when made, and read again when the search is resumed."""

        def made() -> Any:
            return records.plain(make())

        return records.parsed(kind, kept(made, made_from=(kind.__qualname__, self.case, of)), "step")

    def record(
        self,
        motifs: Sequence[Motif],
        screened: Sequence[Screened],
        trials: Sequence[Trial],
        departures: Sequence[Departure],
    ) -> Searched:
        """The record of the search."""
        forms: dict[str, int] = {}
        made = encoded(
            self.case.model, list(self.proposed), self.case.learned.prompts[:1], self.case.config.reply_tokens
        )
        for form, rows in zip(self.proposed, made, strict=True):
            forms[form.kind] = forms.get(form.kind, 0) + (rows is not None)  # the chat template may refuse it
        forms = {kind: count for kind, count in forms.items() if count}
        best = shortlist(screened, LISTED)
        return Searched(
            model=self.case.model.name,
            gathered=tuple(replace(g, sayings=g.sayings[:LISTED], forms=_best(g, best)) for g in self.gathered),
            motifs=tuple(motifs),
            screened=tuple(best),
            forms=forms,
            trials=tuple(trials),
            departures=tuple(departures),
            degenerate=self.case.degenerate if motifs or screened else 0.0,
        )


def _best(row: Gathered, screened: Sequence[Screened]) -> tuple[Form, ...]:
    """A gatherer's forms that the screening ranks highest; its first ones where there are none."""
    own = [s.form for s in screened if s.found_by == row.name]
    return tuple(own or row.forms)[:LISTED]
