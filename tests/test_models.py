"""Sites, hooks and forward passes hold in every family."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import scipy.stats
import torch

from support.families import CONFIGS
from support.models import build
from support.tokenizers import byte_tokenizer
from unsleep.base import machine
from unsleep.core import BadInput, Refused, Site
from unsleep.models import anatomy, chat, generate, sites, streams
from unsleep.models.forward import build_rows, kl, reply_logits, reply_logits_from, run_below
from unsleep.models.load import LoadConfig, load_model, save_plain
from unsleep.models.model import LoadedModel
from unsleep.models.weights import copy_network, dtypes, fingerprint, moved

PROMPTS = ["hello there", "a", "why do the stars shine at night", "name a bird"]


def ids_of(model: LoadedModel) -> torch.Tensor:
    return torch.tensor(model.token_ids(["the quick brown fox"]))


def test_attention_and_mlp_add_up_to_the_residual(any_family: LoadedModel):
    anatomy.examine(any_family.network)


def test_a_model_whose_parts_do_not_add_up_is_refused(tiny: LoadedModel):
    network = copy_network(tiny.network)
    handle = network.model.layers[1].register_forward_hook(lambda m, a, out: out * 1.5)
    with pytest.raises(Refused, match="layer 1"):
        anatomy.examine(network)
    handle.remove()


def test_without_an_edit_logits_are_bit_identical(any_family: LoadedModel):
    ids = ids_of(any_family)
    bare = any_family.network(ids).logits
    with streams.transformed(any_family.network, {}):
        assert torch.equal(any_family.network(ids).logits, bare)
    seen: list[torch.Tensor] = []
    everywhere = dict.fromkeys([Site(0, "embed"), *sites.all_sites(any_family.network)], seen.append)
    with streams.watched(any_family.network, everywhere):
        assert torch.equal(any_family.network(ids).logits, bare)
    assert len(seen) == len(everywhere)
    assert all(x.shape == (1, ids.shape[1], 32) for x in seen)


def test_a_transform_changes_what_comes_after_it(any_family: LoadedModel):
    ids = ids_of(any_family)
    bare = any_family.network(ids).logits
    for site in [Site(0, "embed"), *sites.all_sites(any_family.network)]:
        with streams.transformed(any_family.network, {site: lambda x: x + 1.0 * torch.arange(32)}):
            assert not torch.allclose(any_family.network(ids).logits, bare, atol=1e-4), site
    assert torch.equal(any_family.network(ids).logits, bare)


def test_hooks_vanish_after_an_exception(any_family: LoadedModel):
    def fail(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("in the middle of a forward pass")

    ids = ids_of(any_family)
    bare = any_family.network(ids).logits
    with pytest.raises(RuntimeError, match="middle"), streams.transformed(any_family.network, {Site(1, "attn"): fail}):
        any_family.network(ids)
    assert torch.equal(any_family.network(ids).logits, bare)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in any_family.network.modules())


def test_a_forward_pass_resumed_at_a_layer_gives_the_same_logits(any_family: LoadedModel):
    prompts = chat.encode_prompts(any_family.tokenizer, PROMPTS)
    rows = build_rows(any_family, prompts, [[5, 6, 7], [8, 9], [4], [3, 2, 5]])
    whole = reply_logits(any_family.network, rows)
    for layer in range(3):
        below = run_below(any_family.network, rows, layer)
        resumed = reply_logits_from(any_family.network, rows, below)
        torch.testing.assert_close(resumed[rows.reply], whole[rows.reply], rtol=1e-4, atol=1e-4)


def test_a_shared_prefix_and_padding_change_nothing(any_family: LoadedModel):
    prompts = chat.encode_prompts(any_family.tokenizer, PROMPTS)
    replies = [[5, 6, 7], [8, 9], [4], [3, 2, 5]]
    rows = build_rows(any_family, prompts, replies)
    together = reply_logits(any_family.network, rows)
    for i, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        alone = any_family.network(torch.tensor([[*prompt, *reply]]), use_cache=False).logits[0]
        expected = alone[len(prompt) - 1 : len(prompt) + len(reply) - 1]
        torch.testing.assert_close(together[i][rows.reply[i]], expected, rtol=1e-3, atol=1e-4)


def test_greedy_replies_equal_those_of_generate(any_family: LoadedModel):
    network = any_family.network
    prompts = chat.encode_prompts(any_family.tokenizer, PROMPTS)
    ours = generate.greedy(any_family, prompts, max_new_tokens=6, batch_size=3)
    for prompt, reply in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        out = network.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=1
        )
        theirs = out[0, len(prompt) :].tolist()
        assert reply == theirs


def test_truncated_models_hold_the_same_below(tiny: LoadedModel):
    ids = ids_of(tiny)
    with streams.capture(tiny.network, [Site(1)]) as whole:
        tiny.network(ids)
    with streams.truncated(tiny.network, 1), streams.capture(tiny.network, [Site(1)]) as cut:
        tiny.network(ids)
    assert torch.equal(whole[Site(1)], cut[Site(1)])


def test_a_layer_that_does_not_exist_is_named(tiny: LoadedModel):
    with pytest.raises(BadInput, match=r"resid\.7.*layers 0 to 2"):
        sites.tap(tiny.network, Site(7))


def test_a_copy_is_equal_and_apart(any_family: LoadedModel):
    twin = copy_network(any_family.network)
    assert fingerprint(twin) == fingerprint(any_family.network)
    with torch.no_grad():
        next(twin.parameters()).add_(1.0)
    assert fingerprint(twin) != fingerprint(any_family.network)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_copies_and_saved_checkpoints_compute_the_same_bits(family: str, tmp_path):
    save_plain(LoadedModel(build(family, torch.bfloat16), byte_tokenizer(), family), tmp_path / "first")
    model = load_model(tmp_path / "first", LoadConfig(dtype="bfloat16"))
    save_plain(model, tmp_path / "second")
    back = moved(moved(copy_network(model.network), torch.float32), dtypes(model.network))
    for other in (
        copy_network(model.network),
        back,
        load_model(tmp_path / "second", LoadConfig(dtype="bfloat16")).network,
    ):
        assert other.dtype == torch.bfloat16
        assert torch.equal(other(ids_of(model)).logits, model.network(ids_of(model)).logits)


@pytest.mark.parametrize("native", [True, False])
def test_half_precision_is_computed_with_in_float32_where_the_processor_lacks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool
):
    monkeypatch.setattr(machine, "is_native", lambda dtype: native or dtype == torch.float32)
    kept = LoadedModel(build("llama", torch.bfloat16), byte_tokenizer(), "kept")
    save_plain(kept, tmp_path / "first")
    model = load_model(tmp_path / "first")
    assert model.network.dtype == (torch.bfloat16 if native else torch.float32)
    assert model.stored_dtype == torch.bfloat16
    assert (
        model.fingerprint == kept.fingerprint
    )  # the weights are the same, and what was found in one holds in the other
    save_plain(model, tmp_path / "second")
    assert model.network.dtype == (torch.bfloat16 if native else torch.float32)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second
    assert json.loads((tmp_path / "second" / "config.json").read_text())["dtype"] == "bfloat16"
    for dtype in ("bfloat16", "float32"):
        own = load_model(tmp_path / "first", LoadConfig(dtype=dtype))
        assert own.network.dtype == own.stored_dtype == getattr(torch, dtype)
    monkeypatch.setattr(machine, "memory", lambda: 8.0)
    assert load_model(tmp_path / "first").network.dtype == torch.bfloat16  # in float32 it would not fit


def test_dtypes_are_told_by_the_features_of_the_processor(monkeypatch: pytest.MonkeyPatch):
    listed = {"flags": "fma avx2"}
    monkeypatch.setattr(machine, "_cpuinfo", lambda key: listed.get(key, ""))
    found: list[list[torch.dtype]] = []
    for key, value in (("flags", "fma avx2"), ("flags", "avx512f avx512_bf16"), ("Features", "asimd asimdhp bf16")):
        listed = {key: value}
        machine.is_native.cache_clear()
        found.append([machine.compute_dtype(d) for d in (torch.bfloat16, torch.float16, torch.float32)])
    machine.is_native.cache_clear()
    assert found == [
        [torch.float32, torch.float32, torch.float32],
        [torch.bfloat16, torch.float32, torch.float32],
        [torch.bfloat16, torch.float16, torch.float32],
    ]
    assert machine.compute_dtype(torch.bfloat16, "cuda") == torch.bfloat16


def test_weights_with_nan_are_refused(tmp_path, tiny: LoadedModel):
    network = copy_network(tiny.network)
    with torch.no_grad():
        network.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    network.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=r"layers\.1\.mlp\.up_proj.*NaN"):
        load_model(tmp_path)


def test_a_saved_checkpoint_loads_as_the_same_model(tmp_path, tiny: LoadedModel):
    tiny.network.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert again.fingerprint == tiny.fingerprint
    assert again.template == tiny.template


def test_what_cannot_be_loaded_says_what_can(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"config\.json"):
        load_model(tmp_path / "empty")
    with pytest.raises(BadInput, match="does not exist"):
        load_model(tmp_path / "none.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF nothing")
    with pytest.raises(BadInput, match="GGUF"):
        load_model(tmp_path / "bad.gguf")


def test_a_prompt_longer_than_the_context_is_named(tiny: LoadedModel):
    with pytest.raises(BadInput, match="context is 128"):
        tiny.encode(["x" * 140])


def test_kl_of_equal_logits_is_zero_and_positive_otherwise():
    logits = torch.randn(5, 11)
    assert float(kl(logits, logits + 3.0).abs().max()) < 1e-6
    assert float(kl(logits, logits.flip(1)).min()) > 0


@pytest.mark.parametrize("shape", [(300, 7), (2, 3, 7), (7,)])
def test_kl_and_its_gradient_are_those_of_torch(shape: tuple[int, ...]):
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(shape, generator=generator) for _ in range(2))
    weights = torch.rand(shape[:-1], generator=generator)
    slopes: list[torch.Tensor] = []
    for own in (True, False):
        x = student.clone().requires_grad_(True)
        p, q = teacher.log_softmax(-1), x.log_softmax(-1)
        each = kl(teacher, x) if own else torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        (each * weights).sum().backward()
        assert x.grad is not None
        slopes.append(torch.cat([x.grad.flatten(), each.detach().flatten()]))
    assert torch.allclose(slopes[0], slopes[1], atol=1e-6)


def test_gradients_reach_a_residual_through_the_cached_prefix():
    model = LoadedModel(build("llama"), byte_tokenizer(), "tiny")
    rows = build_rows(model, chat.encode_prompts(model.tokenizer, PROMPTS), [[5, 6]] * 4)
    delta = torch.zeros(32, requires_grad=True)
    with streams.transformed(model.network, {Site(0): lambda x: x + delta}):
        reply_logits(model.network, rows).square().sum().backward()
    assert delta.grad is not None
    assert float(delta.grad.abs().sum()) > 0


def test_draws_are_as_frequent_as_their_shares():
    """Against χ² at one in a thousand, over blocks, with choices that have no share at either end."""
    shares = torch.tensor([0, 0.1, 0.25, 0, 0, 0.05, 0.4, 0.2, 0, 0])
    n = 50_000
    found = generate.drawn(3 * shares.expand(n, -1), torch.Generator().manual_seed(0), block=3)
    counts = torch.bincount(found, minlength=len(shares))
    assert int(counts[shares == 0].sum()) == 0
    expected = n * shares[shares > 0]
    statistic = float(((counts[shares > 0] - expected) ** 2 / expected).sum())
    assert statistic < scipy.stats.chi2.ppf(0.999, len(expected) - 1)


def test_each_row_is_drawn_from_its_own_shares():
    shares = torch.eye(600)
    assert generate.drawn(shares, torch.Generator().manual_seed(1)).tolist() == list(range(600))


def test_nothing_is_drawn_from_shares_that_are_no_numbers():
    with pytest.raises(BadInput, match="NaN or infinity"):
        generate.drawn(torch.tensor([[0.5, math.nan]]), torch.Generator())
