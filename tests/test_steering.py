"""Control of a running model: exact algebra, token rules under caches, padding and batches, hooks that vanish."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from support.checks import as_in_use
from support.prompts import PROMPTS
from support.vectors import D, at, logits, vector
from unsleep.core import BadInput, Refused, Site
from unsleep.interventions.intervention import applied
from unsleep.interventions.passes import Passes
from unsleep.interventions.steering import Steering, contrast_vectors, operate
from unsleep.models import chat, generate
from unsleep.models.forward import build_rows, pad_left, run
from unsleep.models.hooks import Call
from unsleep.models.model import LoadedModel
from unsleep.models.streams import capture


def stream(seed: int = 9) -> torch.Tensor:
    return torch.randn(2, 5, D, generator=torch.Generator().manual_seed(seed))


# Operators


@given(st.integers(0, 10**6), st.floats(-8, 8))
def test_adding_and_subtracting_is_the_identity(seed: int, c: float):
    x, v = stream(seed).double(), vector(seed + 1).double()
    there = operate(x, v, at(v, "add", c))
    torch.testing.assert_close(there, x + c * v)
    torch.testing.assert_close(operate(there, v, at(v, "add", -c)), x, rtol=1e-12, atol=1e-12)


@given(st.integers(0, 10**6), st.floats(-8, 8))
def test_piecewise_follows_the_sign_of_the_projection(seed: int, c: float):
    x, v = stream(seed), vector(seed + 1)
    out = operate(x, v, at(v, "piecewise", c))
    for row, new in zip(x.flatten(0, 1), out.flatten(0, 1), strict=True):
        sign = math.copysign(1.0, sum(a * b for a, b in zip(row.tolist(), v.tolist(), strict=True)))
        torch.testing.assert_close(new, row + c * sign * v)
    across = torch.zeros(1, 1, D)
    assert torch.equal(operate(across, v, at(v, "piecewise", c)), across)


@given(st.integers(0, 10**6), st.integers(1, 5))
def test_projection_removes_the_span_and_nothing_else_and_a_second_changes_nothing(seed: int, rank: int):
    rows = torch.randn(rank, D, generator=torch.Generator().manual_seed(seed))
    basis = torch.linalg.qr(rows.T).Q.T
    x = stream(seed + 1)
    out = operate(x, basis, at(rows, "projection"))
    assert float((out @ rows.T).abs().max()) < 1e-4
    assert float(((x - out) - (x - out) @ basis.T @ basis).abs().max()) < 1e-5
    torch.testing.assert_close(operate(out, basis, at(rows, "projection")), out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("operator", ["add", "piecewise", "projection", "contrast"])
def test_the_norm_is_kept_to_a_millionth(operator: Any):
    v = torch.stack([vector(1), vector(2)]) if operator == "contrast" else vector()
    used = v / v.norm() if operator == "projection" else v
    x = stream()
    out = operate(x, used[None] if operator == "projection" else used, at(v, operator, 0.7, keep_norm=True))
    free = operate(x, used[None] if operator == "projection" else used, at(v, operator, 0.7))
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cosine_similarity(out, free, dim=-1), torch.ones(2, 5), rtol=0, atol=1e-6)
    assert float((out - x).abs().max()) > 0.01


def test_arithmetic_is_in_float32_and_comes_back_in_the_models_dtype():
    x, v = stream().bfloat16(), vector()
    out = operate(x, v, at(v, "add", 0.001))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, (x.float() + 0.001 * v).bfloat16())


# On a model


def hooks(model: LoadedModel) -> int:
    modules = model.network.modules()
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def test_a_control_adds_to_the_stream_of_every_family(any_family: LoadedModel):
    ids = torch.tensor(any_family.token_ids(["the quick brown fox"]))
    with capture(any_family.network, [Site(1)]) as bare:
        any_family.network(ids)
    v = vector()
    with applied(any_family, at(v, c=2.0)) as network, capture(network, [Site(1)]) as seen:
        network(ids)
    torch.testing.assert_close(seen[Site(1)], bare[Site(1)] + 2.0 * v, rtol=1e-4, atol=1e-4)


def test_coefficient_zero_is_bit_exact_and_registers_nothing(any_family: LoadedModel):
    bare, before = logits(any_family), hooks(any_family)
    for operator in ("add", "piecewise", "projection"):
        with applied(any_family, at(vector(), operator, 0.0, keep_norm=True)):  # type: ignore[arg-type]
            assert hooks(any_family) == before
            assert torch.equal(logits(any_family), bare)


def test_adding_and_subtracting_at_one_site_gives_the_bare_logits(tiny: LoadedModel):
    v, bare = vector(), logits(tiny)
    with applied(tiny, [at(v, c=4.0), at(v, c=-4.0)]):
        torch.testing.assert_close(logits(tiny), bare, rtol=1e-4, atol=1e-4)
    with applied(tiny, [at(v, c=4.0), at(v, c=-3.9)]):
        assert float((logits(tiny) - bare).abs().max()) > 1e-3


@pytest.mark.parametrize("where", ["block", "transform", "setup"])
def test_hooks_vanish_after_exceptions(tiny: LoadedModel, where: str):
    bare, before = logits(tiny), hooks(tiny)

    def fail() -> None:
        wrong = {Site(1): vector(), Site(99): vector()} if where == "setup" else {Site(1): vector()}
        with applied(tiny, Steering(wrong, tokens="prompt")) as network:
            assert hooks(tiny) > before
            if where == "transform":
                network(torch.tensor([[5, 6]]), attention_mask=torch.ones(1, 1, 2, 2, dtype=torch.bool))
            raise RuntimeError("in the block")

    with pytest.raises(RuntimeError if where == "block" else BadInput):
        fail()
    assert hooks(tiny) == before
    assert torch.equal(logits(tiny), bare)


def test_only_layers_in_the_range_are_controlled(tiny: LoadedModel):
    vectors = {Site(i): vector(i) for i in range(3)} | {Site(1, "mlp"): vector(7)}
    ranged = Steering(vectors, layers=(1, 1))
    assert ranged.sites == [Site(1, "mlp"), Site(1)]
    picked = Steering({s: vectors[s] for s in ranged.sites})
    with applied(tiny, ranged):
        first = logits(tiny)
    with applied(tiny, picked):
        assert torch.equal(logits(tiny), first)


# Token rules


def touched(model: LoadedModel, control: Steering, **call: Any) -> torch.Tensor:
    """Where a pass is changed at Site 1: [row, position]."""
    with torch.no_grad(), capture(model.network, [Site(1)]) as bare:
        model.network(**call)
    with torch.no_grad(), applied(model, control) as network, capture(network, [Site(1)]) as seen:
        network(**call)
    return (seen[Site(1)] - bare[Site(1)]).abs().amax(-1) > 1e-6


def test_rules_pass_over_padding_and_count_places_in_each_row(tiny: LoadedModel):
    rows = [[5, 6, 7], [8, 9, 10, 11, 12]]
    ids, mask = pad_left(rows, 1, torch.device("cpu"))
    given = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": (mask.long().cumsum(1) - 1).clamp_min(0)}
    places: Any
    for rule, places in {
        "prompt": [[2, 3, 4], [0, 1, 2, 3, 4]],
        "reply": [[], []],
        "last": [[4], [4]],
        (0, 2): [[2, 3], [0, 1]],
        (2, 9): [[4], [2, 3, 4]],
        (4, 5): [[], [4]],
    }.items():
        found = touched(tiny, at(vector(), tokens=rule), **given)
        assert [row.nonzero().flatten().tolist() for row in found] == places, rule
    right = {"input_ids": ids.flip(1), "attention_mask": mask.flip(1).long()}
    found = touched(tiny, at(vector(), tokens="last"), **right)
    assert [row.nonzero().flatten().tolist() for row in found] == [[2], [4]]


def test_prompt_and_reply_in_one_pass_are_told_apart_by_the_marks(tiny: LoadedModel):
    rows = build_rows(tiny, [[5, 6, 7, 8], [5, 9]], [[20, 21], [22, 23, 24]])
    assert len(rows.prefix) == 1
    seen: dict[str, torch.Tensor] = {}
    for rule in ("prompt", "reply", "last"):
        with capture(tiny.network, [Site(1)]) as bare:
            run(tiny.network, rows)
        control = at(vector(), tokens=rule)  # type: ignore[arg-type]
        with applied(tiny, control, replies=rows.reply) as network, capture(network, [Site(1)]) as found:
            run(network, rows)
        seen[rule] = (found[Site(1)] - bare[Site(1)]).abs().amax(-1) > 1e-6
    # columns of both rows behind the shared first token: [6 7 8 20 21] and [_ 9 22 23 24]
    assert seen["prompt"].tolist() == [[True, True, True, False, False], [False, True, False, False, False]]
    assert seen["last"].tolist() == [[False, False, True, False, False], [False, True, False, False, False]]
    assert (seen["reply"] & torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]).bool()).tolist() == seen["reply"].tolist()
    assert seen["reply"].sum() == 5


RULES: list[Any] = ["all", "prompt", "reply", "last", (0, 4), (20, 60)]


def steered(model: LoadedModel, rows: list[list[int]], control: Steering) -> list[list[int]]:
    """Greedy continuations by transformers' own generate, left padded, in one batch."""
    ids, mask = pad_left(rows, model.pad_id, model.device)
    with applied(model, control) as network:
        out = network.generate(ids, attention_mask=mask.long(), max_new_tokens=6, do_sample=False, pad_token_id=1)
    new = out[:, ids.shape[1] :].tolist()
    return [row[: row.index(1) + 1] if 1 in row else row for row in new]


def naive(model: LoadedModel, row: list[int], rule: Any, v: torch.Tensor, c: float) -> list[int]:
    """The same one token at a time, without cache, padding or hooks of ours."""
    block = model.network.model.layers[1]
    ids, out = list(row), []
    for _ in range(6):
        n = len(ids)
        keep = {
            "all": torch.ones(n),
            "prompt": (torch.arange(n) < len(row)).float(),
            "reply": (torch.arange(n) >= len(row)).float(),
            "last": (torch.arange(n) == len(row) - 1).float(),
        }.get(rule if isinstance(rule, str) else "")
        if keep is None:
            keep = ((torch.arange(n) >= rule[0]) & (torch.arange(n) < rule[1])).float()
        handle = block.register_forward_hook(lambda m, a, o, keep=keep: o + c * keep[:, None] * v)
        try:
            with torch.no_grad():
                out.append(int(model.network(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        finally:
            handle.remove()
        ids.append(out[-1])
        if out[-1] == 1:
            break
    return out


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_generation_with_cache_padding_and_batches_equals_one_token_at_a_time(tiny: LoadedModel, rule: Any):
    rows = chat.encode_prompts(tiny.tokenizer, PROMPTS)
    v, c = vector(3), 6.0
    expected = [naive(tiny, row, rule, v, c) for row in rows]
    control = at(v, c=c, tokens=rule)
    assert steered(tiny, rows, control) == expected
    for options in ({}, {"batch_size": 3}, {"share": False}):
        with applied(tiny, control):
            assert generate.greedy(tiny, rows, max_new_tokens=6, **options) == expected, options
    if rule != (20, 60):
        assert expected != [naive(tiny, row, "all", v, 0.0) for row in rows]


def test_prompts_that_are_all_the_same_are_still_prompts(tiny: LoadedModel):
    rows = chat.encode_prompts(tiny.tokenizer, ["name a bird"] * 3)
    expected = [naive(tiny, rows[0], "reply", vector(3), 9.0)] * 3
    for batch in (3, 2, 1):
        with applied(tiny, at(vector(3), c=9.0, tokens="reply")):
            assert generate.greedy(tiny, rows, max_new_tokens=6, batch_size=batch) == expected


def cache(length: int) -> DynamicCache:
    found = DynamicCache()
    found.update(torch.zeros(1, 1, length, 4), torch.zeros(1, 1, length, 4), 0)
    return found


def test_a_pass_of_one_column_is_a_reply_only_where_it_goes_on_from_the_last():
    passes = Passes()
    found: list[bool] = []
    for rows, length, past in ((1, 5, 0), (2, 1, 5), (2, 1, 6), (1, 1, 7), (1, 1, 5), (1, 2, 6), (1, 1, 8)):
        passes.note(Call(rows, length, None, cache(past) if past else DynamicCache(), is_prefix=False))
        found.append(passes.goes_on)
    assert found == [False, False, True, True, False, False, True]


# Contrast vectors


def test_contrast_vectors_are_the_differences_of_the_copies_last_tokens(tiny: LoadedModel):
    positive, negative = [f"kindly: {p}" for p in PROMPTS], [f"rudely: {p}" for p in PROMPTS]
    found = contrast_vectors(tiny, positive, negative, [Site(0), Site(2)])
    for i, (high, low) in enumerate(zip(positive, negative, strict=True)):
        held = []
        for text in (high, low):
            with capture(tiny.network, [Site(2)]) as seen:
                tiny.network(torch.tensor(chat.encode_prompts(tiny.tokenizer, [text])))
            held.append(seen[Site(2)][0, -1])
        torch.testing.assert_close(found[Site(2)][i], held[0] - held[1], rtol=1e-3, atol=1e-4)


def test_a_contrast_control_gives_each_row_its_own_vector(tiny: LoadedModel):
    rows = chat.encode_prompts(tiny.tokenizer, PROMPTS)
    vectors = torch.stack([vector(i) for i in range(4)])
    expected = [naive(tiny, row, "all", v, 6.0) for row, v in zip(rows, vectors, strict=True)]
    control = Steering({Site(1): vectors}, "contrast", 6.0)
    assert steered(tiny, rows, control) == expected
    with applied(tiny, control), pytest.raises(BadInput, match="contrast vectors of 4 prompts meet a batch of 1"):
        logits(tiny)
    with applied(tiny, control), pytest.raises(Refused, match="share=False"):
        generate.greedy(tiny, rows)


# Bad input


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"operator": "multiply"}, "operator is 'multiply'; expected one of"),
        ({"coefficient": math.nan}, "coefficient is nan; expected a finite number"),
        ({"coefficient": math.inf}, "coefficient is inf"),
        ({"tokens": "first"}, "token rule is 'first'; expected all, prompt, reply, last or a pair"),
        ({"tokens": (3, 3)}, r"token range is \(3, 3\)"),
        ({"tokens": (-1, 3)}, r"token range is \(-1, 3\)"),
        ({"tokens": (1, 2, 3)}, "token range is"),
        ({"layers": (3, 2)}, r"layer range is \(3, 2\)"),
        ({"layers": (-1, 2)}, "layer range is"),
        ({"layers": (5, 9)}, r"there is no vector in layers \(5, 9\); there are vectors at resid\.1"),
        ({"vectors": {}}, "a control has no vector"),
        ({"vectors": {Site(1): torch.full((D,), math.nan)}}, r"control vector at resid\.1 has 32 NaN"),
        ({"vectors": {Site(1): torch.ones(2, D)}}, r"add vector at resid\.1 has shape \[2, 32\]; expected \[d_model\]"),
        ({"vectors": {Site(1): torch.zeros(D)}, "operator": "projection"}, "is zero; it has no direction"),
        ({"vectors": {Site(1): torch.zeros(D)}, "operator": "piecewise"}, "is zero; it has no direction"),
        ({"vectors": {Site(1): torch.ones(D)}, "operator": "contrast"}, r"shape \[32\]; expected \[row, d_model\]"),
        ({"vectors": {Site(1): torch.ones(1, 1, D)}, "operator": "projection"}, r"\[d_model\] or \[row, d_model\]"),
    ],
    ids=str,
)
def test_a_control_that_means_nothing_is_refused(change: dict[str, Any], told: str):
    with as_in_use(), pytest.raises(BadInput, match=told):
        dataclasses.replace(at(vector()), **change)


def test_a_control_has_to_fit_the_model(tiny: LoadedModel):
    with (
        pytest.raises(BadInput, match=r"resid\.7 is not in the model: it has layers 0 to 2"),
        applied(tiny, Steering({Site(7): vector()})),
    ):
        pass
    with (
        pytest.raises(BadInput, match=r"steering at resid\.1 has width 8; the model's is 32"),
        applied(tiny, at(torch.ones(8))),
    ):
        pass
    other = at(vector(), model="0123456789abcdef")
    with pytest.raises(Refused, match="steering belongs to model 0123456789abcdef, this one is"), applied(tiny, other):
        pass
    with applied(tiny, other, any_model=True), applied(tiny, at(vector(), model=tiny.fingerprint)):
        pass


def test_masks_and_marks_of_another_shape_are_refused(tiny: LoadedModel):
    ids = torch.tensor([[5, 6, 7]])
    with applied(tiny, at(vector(), tokens="prompt")) as network, pytest.raises(BadInput, match="attention mask"):
        network(ids, attention_mask=torch.ones(1, 1, 3, 3, dtype=torch.bool))
    marks = torch.ones(2, 2, dtype=torch.bool)
    told = "marks 2 rows of 2 positions; the pass has 1 rows of 3"
    with applied(tiny, at(vector(), tokens="reply"), replies=marks) as network, pytest.raises(BadInput, match=told):
        network(ids)


def test_copies_of_prompts_come_in_pairs(tiny: LoadedModel):
    with pytest.raises(BadInput, match="2 positive copies with 1 negative ones"):
        contrast_vectors(tiny, ["a", "b"], ["c"], [Site(1)])
    with pytest.raises(BadInput, match="no Site was given"):
        contrast_vectors(tiny, ["a"], ["c"], [])
    with pytest.raises(BadInput, match="is empty"):
        contrast_vectors(tiny, [], [], [Site(1)])
