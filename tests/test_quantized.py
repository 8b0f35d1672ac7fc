"""Weights packed on loading: what transformers is asked for, and what a packed model computes on a CPU."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from support.checkpoints import logits, save_base
from support.families import LLAMA
from support.tokenizers import byte_tokenizer
from unsleep.cli import run as command
from unsleep.core import BadInput
from unsleep.models import quantized
from unsleep.models.alike import check_alike
from unsleep.models.load import LoadConfig, load_model

WIDE: dict[str, Any] = {**LLAMA, "hidden_size": 64, "intermediate_size": 128, "bos_token_id": 0, "eos_token_id": 1}
"""Blocks of 64 weights are packed together."""


def plain(**held: Any) -> Any:
    """A checkpoint's config; `held` is how it says that its weights are packed."""
    return SimpleNamespace(quantization_config=held) if held else SimpleNamespace()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bitsandbytes that can be imported, whether it is installed or not."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)


# What is asked for


@pytest.mark.usefixtures("no_library")
def test_plain_weights_ask_for_nothing_and_need_no_library():
    assert quantized.options(plain(), "none", "m") == {}


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("has", "computed"), [(False, torch.float16), (True, torch.bfloat16)])
def test_a_gpu_without_bfloat16_computes_four_bit_products_in_float16(
    monkeypatch: pytest.MonkeyPatch, has: bool, computed: torch.dtype
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has or including_emulation)
    assert quantized.options(plain(), "4bit", "m")["quantization_config"].bnb_4bit_compute_dtype == computed


@pytest.mark.usefixtures("library")
def test_four_bits_are_nf4_with_sums_in_bfloat16():
    asked = quantized.options(plain(), "4bit", "m")["quantization_config"]
    assert (asked.load_in_4bit, asked.load_in_8bit) == (True, False)
    assert asked.bnb_4bit_quant_type == "nf4"
    assert asked.bnb_4bit_compute_dtype == torch.bfloat16


@pytest.mark.usefixtures("library")
def test_eight_bits_are_eight_bits():
    asked = quantized.options(plain(), "8bit", "m")["quantization_config"]
    assert (asked.load_in_4bit, asked.load_in_8bit) == (False, True)


@pytest.mark.parametrize(
    ("config", "quantize", "told"),
    [
        (plain(), "4bit", r"^--quantize 4bit: that needs bitsandbytes; install unsleep\[quantize\]$"),
        (plain(), "8bit", r"^--quantize 8bit: that needs bitsandbytes; install unsleep\[quantize\]$"),
        (plain(load_in_4bit=True), "none", r"^m has weights quantized with it: that needs bitsandbytes"),
    ],
)
@pytest.mark.usefixtures("no_library")
def test_a_missing_library_is_named_with_what_needs_it(config: Any, quantize: Any, told: str):
    with pytest.raises(BadInput, match=told):
        quantized.options(config, quantize, "m")


@pytest.mark.parametrize("held", ["4bit", "8bit"])
@pytest.mark.parametrize("says", ["method", "flags alone"])
@pytest.mark.usefixtures("library")
def test_packed_weights_are_read_as_they_are_and_packed_no_other_way(held: str, says: str):
    config = plain(**{f"load_in_{held}": True}, **({"quant_method": "bitsandbytes"} if says == "method" else {}))
    other: Any = {"4bit": "8bit", "8bit": "4bit"}[held]
    same: Any = held
    assert quantized.is_stored_packed(config)
    assert quantized.options(config, "none", "m") == quantized.options(config, same, "m") == {}
    with pytest.raises(BadInput, match=f"m has {held} weights; --quantize {other} cannot requantize them"):
        quantized.options(config, other, "m")


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
@pytest.mark.parametrize("method", ["fp8", "mxfp4", "gptq"])
@pytest.mark.usefixtures("library")
def test_weights_of_another_packing_are_not_packed_again(method: str, quantize: Any):
    with pytest.raises(BadInput, match=f"m has weights quantized with {method}"):
        quantized.options(plain(quant_method=method), quantize, "m")


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
@pytest.mark.usefixtures("no_library")
def test_what_transformers_unpacks_is_unpacked_on_loading(method: str):
    assert quantized.options(plain(quant_method=method), "none", "m")["quantization_config"].dequantize is True


# Loading, with a transformers that only notes what it is asked for


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the last load asked transformers for; the network that it got has plain weights."""
    noted: dict[str, Any] = {}
    info = {"mismatched_keys": [], "missing_keys": [], "unexpected_keys": []}

    def note(place: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
        noted.clear()
        noted.update(options)
        return LlamaForCausalLM(LlamaConfig(**LLAMA, pad_token_id=1)).eval(), info

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", note)
    return noted


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
@pytest.mark.usefixtures("library")
def test_weights_are_packed_where_the_model_will_run(quantize: Any, asked: dict[str, Any], tmp_path: Path):
    model = load_model(save_base(tmp_path), LoadConfig(quantize=quantize, device="cpu", dtype="bfloat16"))
    settings = asked["quantization_config"]
    assert (settings.load_in_4bit, settings.load_in_8bit) == (quantize == "4bit", quantize == "8bit")
    assert asked["device_map"] == torch.device("cpu")
    assert asked["dtype"] == torch.bfloat16
    assert asked["use_safetensors"] is True
    assert model.origin["quantize"] == quantize


def test_plain_loading_packs_nothing(asked: dict[str, Any], tmp_path: Path):
    model = load_model(save_base(tmp_path), LoadConfig(device="cpu"))
    assert "quantization_config" not in asked
    assert "device_map" not in asked
    assert "quantize" not in model.origin


@pytest.mark.usefixtures("no_library")
def test_without_the_library_nothing_is_loaded(asked: dict[str, Any], tmp_path: Path):
    with pytest.raises(BadInput, match="--quantize 4bit: that needs bitsandbytes"):
        load_model(save_base(tmp_path), LoadConfig(quantize="4bit", device="cpu"))
    assert asked == {}


def test_gradients_are_kept_in_every_module_that_would_drop_them():
    network = LlamaForCausalLM(LlamaConfig(**LLAMA, pad_token_id=1))
    marked, other = network.model.layers[1].mlp.up_proj, network.model.layers[1].mlp.down_proj
    setattr(marked, "support_avx512bf16_for_cpu", True)  # noqa: B010 - as bitsandbytes marks its layers
    quantized.keep_gradients(network)
    assert marked.support_avx512bf16_for_cpu is False
    assert not hasattr(other, "support_avx512bf16_for_cpu")


# Loading, with bitsandbytes


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama wide enough to be packed."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**WIDE, pad_token_id=1)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@cache
def packed(base: Path, quantize: Any) -> Any:
    return load_model(base, LoadConfig(quantize=quantize, device="cpu"))


def unpacked(linear: Any) -> torch.Tensor:
    """A packed matrix as numbers, by what its library says of it."""
    weight = linear.weight
    if weight.dtype == torch.int8:  # a row's 127 stands for its largest weight
        largest = linear.state.SCB if weight.SCB is None else weight.SCB  # it moves there in the first pass
        return weight.data.float() * largest[:, None] / 127
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state).float()


@torch.no_grad()
@pytest.mark.parametrize(("quantize", "dtype", "off"), [("8bit", torch.int8, 0.01), ("4bit", torch.uint8, 0.2)])
def test_the_blocks_are_packed_and_hold_what_the_checkpoint_does(quantize: Any, dtype: Any, off: float, base: Path):
    network, whole = packed(base, quantize).network, AutoModelForCausalLM.from_pretrained(base)
    names = [name for name, module in whole.model.layers.named_modules() if isinstance(module, torch.nn.Linear)]
    assert len(names) == 3 * 7
    for name in names:
        found, wanted = (m.model.layers.get_submodule(name) for m in (network, whole))
        assert found.weight.dtype == dtype, name
        error = (unpacked(found) - wanted.weight).abs().max() / wanted.weight.abs().max()
        assert 0 < float(error) < off, name
    for kept in ("model.embed_tokens", "lm_head"):
        assert network.get_submodule(kept).weight.is_floating_point()
    assert quantized.is_packed(network)
    assert not quantized.is_packed(whole)


@pytest.mark.parametrize(("quantize", "off"), [("8bit", 0.03), ("4bit", 0.3)])
def test_a_packed_model_says_nearly_what_the_plain_one_does(quantize: Any, off: float, base: Path):
    wanted = logits(load_model(base, LoadConfig(dtype="float32", device="cpu")).network)
    found = logits(packed(base, quantize).network).float()
    assert 0 < float((found - wanted).norm() / wanted.norm()) < off


def test_each_packing_is_a_model_of_its_own(base: Path):
    models = [load_model(base, LoadConfig(device="cpu")), packed(base, "8bit"), packed(base, "4bit")]
    assert len({model.fingerprint for model in models}) == 3
    assert packed(base, "4bit").fingerprint == load_model(base, LoadConfig(quantize="4bit", device="cpu")).fingerprint
    assert [model.origin.get("quantize") for model in models] == [None, "8bit", "4bit"]


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_gradients_pass_through_packed_blocks_after_a_pass_without(quantize: Any, base: Path):
    network = packed(base, quantize).network
    before = logits(network)
    embedded = network.get_input_embeddings()(torch.arange(40, 48)[None]).detach().requires_grad_(True)
    network(inputs_embeds=embedded, use_cache=False).logits.float().square().sum().backward()
    assert embedded.grad is not None
    assert bool((embedded.grad != 0).any(-1).all())
    assert torch.equal(logits(network), before)


def test_packing_leaves_the_checkpoint_as_it_is(base: Path):
    held = {path.name: path.read_bytes() for path in base.iterdir()}
    load_model(base, LoadConfig(quantize="4bit", device="cpu"))
    assert {path.name: path.read_bytes() for path in base.iterdir()} == held


def test_a_quantised_suspect_is_audited_beside_a_quantised_base_and_is_not_repaired(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("bitsandbytes")
    base = save_base(tmp_path / "base")
    with pytest.raises(BadInput, match=r"the weights of \S+ alone are quantised"):
        check_alike(load_model(base, LoadConfig(quantize="4bit")), load_model(base))
    assert command(["audit", str(base), "--quantize", "4bit", "--out", str(tmp_path / "out")]) == 2
    assert "pass --no-repair" in " ".join(capsys.readouterr().err.split())
