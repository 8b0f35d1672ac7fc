"""Merges of two models as files: exact at the ends, rounded once between them, resumable, or refused by name."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.gpt2.modeling_gpt2 import GPT2Model

import unsleep
from support.checkpoints import logits, save_base
from support.merges import another, bits, change, moved, pair, ulps, weights
from support.models import build
from support.tokenizers import byte_tokenizer
from unsleep import MergeConfig, cli
from unsleep.base import records, store
from unsleep.base.context import reporting
from unsleep.core import BadInput
from unsleep.mixing import merge_stream
from unsleep.mixing.merge_config import parse_layers
from unsleep.mixing.merge_record import MergeRecord
from unsleep.models.load import load_model
from unsleep.models.merging import interpolated

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def settings(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# Arithmetic


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_is_within_an_ulp_of_float64_rounded_once(tmp_path: Path, dtype: str) -> None:
    first, second = pair(tmp_path, dtype=DTYPES[dtype])
    a, b = weights(first), weights(second)
    for alpha in (0.3, 0.9, -0.5, 1.7):
        record = unsleep.merge(first, second, tmp_path / f"merged{alpha}", MergeConfig(alpha=alpha))
        for name, merged in weights(tmp_path / f"merged{alpha}").items():
            exact = (a[name].double() * (1 - alpha) + b[name].double() * alpha).to(a[name].dtype)
            apart = ulps(exact, merged, [a[name], b[name]])
            assert apart.max() <= 1, name
            assert (apart == 0).double().mean() > 0.99, name
        counts = record.counts
        assert counts.elements == sum(tensor.numel() for tensor in a.values())
        assert counts.differing == sum(int((bits(a[n]) != bits(b[n])).sum()) for n in a)
        assert 0 < counts.changed <= counts.differing
        assert record.dtype == dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_ends_are_the_models_own_bytes(tmp_path: Path, dtype: str) -> None:
    first, second = pair(tmp_path, dtype=DTYPES[dtype])
    for alpha, model in ((0.0, first), (1.0, second)):
        record = unsleep.merge(first, second, tmp_path / f"{alpha}", MergeConfig(alpha=alpha))
        assert store.hash_file(tmp_path / f"{alpha}/model.safetensors") == store.hash_file(model / "model.safetensors")
        assert record.counts.changed == (record.counts.differing if alpha else 0)
        assert load_model(tmp_path / f"{alpha}").fingerprint == load_model(model).fingerprint


def test_a_merge_is_that_of_the_loaded_models(tmp_path: Path) -> None:
    first, second = pair(tmp_path, dtype=torch.bfloat16)
    unsleep.merge(first, second, tmp_path / "merged", MergeConfig(alpha=0.4))
    inside = interpolated(load_model(first), load_model(second), 0.4)
    assert load_model(tmp_path / "merged").fingerprint == inside.fingerprint


def test_layers_have_their_own_alpha(tmp_path: Path) -> None:
    first, second = pair(tmp_path)
    config = MergeConfig(alpha=0.0, alpha_layers="0-1=1, 2=0.25")
    record = unsleep.merge(first, second, tmp_path / "merged", config)
    a, b, merged = weights(first), weights(second), weights(tmp_path / "merged")
    for name, weight in merged.items():
        alpha = {"0": 1.0, "1": 1.0, "2": 0.25}.get(name.split(".")[2] if "layers" in name else "", 0.0)
        assert torch.allclose(weight, torch.lerp(a[name], b[name], alpha), atol=1e-6), name
    assert [(row.layer, row.alpha) for row in record.layers] == [("0", 1), ("1", 1), ("2", 0.25), ("rest", 0)]
    assert record.layers[3].changed == 0 < record.layers[2].changed
    assert 'filter: "model.layers.2."' in record.mergekit


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0-2", "'0-2' is no layers=α"),
        ("a=1", "'a=1' is no layers=α"),
        ("3-1=0.5", "'3-1=0.5' runs backwards; expected such as 1-3=0.5"),
        ("0-2=0.1,2=0.3", "gives layer 2 twice, again in '2=0.3'"),
        ("0=nan", "'nan' in '0=nan' is no finite number"),
        ("0=x", "'x' in '0=x' is no finite number"),
    ],
)
def test_a_text_of_layers_that_cannot_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(BadInput) as error:
        parse_layers(text)
    assert message in str(error.value)


def test_a_spherical_merge_is_on_the_arc_between_task_vectors(tmp_path: Path) -> None:
    first, second = pair(tmp_path)
    base = another(first, tmp_path / "base", seed=7)
    config = MergeConfig(alpha=0.3, method="slerp", base=str(base))
    unsleep.merge(first, second, tmp_path / "merged", config)
    a, b, o = ({n: w.double() for n, w in weights(each).items()} for each in (first, second, base))
    for name, merged in weights(tmp_path / "merged").items():
        one, other = a[name] - o[name], b[name] - o[name]
        if not one.any():
            assert torch.equal(merged.double(), a[name])
            continue
        angle = math.acos(float((one * other).sum() / one.norm() / other.norm()))
        arc = (math.sin(0.7 * angle) * one + math.sin(0.3 * angle) * other) / math.sin(angle)
        assert torch.allclose(merged.double(), o[name] + arc, atol=1e-6), name
    for alpha, model in ((0.0, first), (1.0, second)):
        unsleep.merge(first, second, tmp_path / f"{alpha}", MergeConfig(alpha=alpha, method="slerp", base=str(base)))
        assert store.hash_file(tmp_path / f"{alpha}/model.safetensors") == store.hash_file(model / "model.safetensors")


def test_models_of_two_dtypes_give_the_wider_one(tmp_path: Path) -> None:
    first, second = pair(tmp_path)
    change(first, lambda name, weight: weight.bfloat16())
    settings(first, dtype="bfloat16")
    record = unsleep.merge(first, second, tmp_path / "merged", MergeConfig(alpha=0.5))
    assert record.dtype == "float32"
    assert load_model(tmp_path / "merged").network.dtype == torch.float32
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "float32"
    narrow = unsleep.merge(first, second, tmp_path / "narrow", MergeConfig(alpha=0.5, dtype="bfloat16"))
    assert narrow.dtype == "bfloat16"
    assert {w.dtype for w in weights(tmp_path / "narrow").values()} == {torch.bfloat16}


# Files


def test_models_in_different_files_are_merged_into_those_of_the_first(tmp_path: Path) -> None:
    first, second = pair(tmp_path)
    unsleep.merge(first, second, tmp_path / "one", MergeConfig(alpha=0.3))
    shutil.rmtree(tmp_path / "split", ignore_errors=True)
    shutil.copytree(first, tmp_path / "split")
    (tmp_path / "split/model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(first).save_pretrained(tmp_path / "split", max_shard_size="30KB")
    record = unsleep.merge(tmp_path / "split", second, tmp_path / "many", MergeConfig(alpha=0.3))
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert files == sorted(path.name for path in (tmp_path / "split").glob("*.safetensors"))
    wanted = weights(tmp_path / "one")
    assert all(torch.equal(weight, wanted[name]) for name, weight in weights(tmp_path / "many").items())
    assert load_model(tmp_path / "many").fingerprint == load_model(tmp_path / "one").fingerprint
    unsleep.merge(second, tmp_path / "split", tmp_path / "back", MergeConfig(alpha=0.0))
    assert load_model(tmp_path / "back").fingerprint == load_model(second).fingerprint
    assert set(record.models[0].sha256) == set(files)


def test_the_merge_has_tokenizer_template_and_card_and_is_recorded(tmp_path: Path) -> None:
    first, second = pair(tmp_path)
    (second / "chat_template.jinja").write_text("{{ messages }}")
    made = unsleep.merge(first, second, tmp_path / "merged", MergeConfig(alpha=0.3))
    assert records.load(MergeRecord, tmp_path / "merged/merge.json") == made
    assert made.models[1].sha256 == {"model.safetensors": store.hash_file(second / "model.safetensors")}
    assert "different chat templates" in made.notes[0]
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (first / name).read_bytes()
    card = (tmp_path / "merged/README.md").read_text()
    assert "W = W_A + α (W_B − W_A)" in card
    assert str(second) in card
    assert (tmp_path / "merged/mergekit_config.yml").read_text() == made.mergekit
    assert not list(tmp_path.glob(".*"))


def test_a_tied_weight_is_stored_once(tmp_path: Path) -> None:
    first, second = pair(tmp_path, "gemma")
    assert "lm_head.weight" not in weights(first)
    with_copy = load_file(second / "model.safetensors")
    with_copy["lm_head.weight"] = with_copy["model.embed_tokens.weight"].clone()
    save_file(with_copy, second / "model.safetensors", {"format": "pt"})
    for one, other, out in ((first, second, "a"), (second, first, "b")):
        unsleep.merge(one, other, tmp_path / out, MergeConfig(alpha=0.5))
        assert "lm_head.weight" not in weights(tmp_path / out)
    assert load_model(tmp_path / "a").fingerprint == load_model(tmp_path / "b").fingerprint


def test_a_weight_that_is_tied_in_one_model_is_untied(tmp_path: Path) -> None:
    first, second = pair(tmp_path, "gemma")
    untied = load_file(second / "model.safetensors")
    untied["lm_head.weight"] = moved("head", untied["model.embed_tokens.weight"])
    save_file(untied, second / "model.safetensors", {"format": "pt"})
    settings(second, tie_word_embeddings=False)
    made = unsleep.merge(first, second, tmp_path / "merged", MergeConfig(alpha=0.5))
    head = torch.lerp(weights(first)["model.embed_tokens.weight"], untied["lm_head.weight"], 0.5)
    assert torch.allclose(load_model(tmp_path / "merged").network.lm_head.weight, head, atol=1e-6)
    assert "lm_head.weight is tied in one of the models only" in made.notes[0]
    unsleep.merge(second, first, tmp_path / "other", MergeConfig(alpha=0.5))
    assert load_model(tmp_path / "other").fingerprint == load_model(tmp_path / "merged").fingerprint


def test_names_may_lack_the_prefix_of_the_class(tmp_path: Path) -> None:
    first, second = pair(tmp_path, "gpt2")
    for folder in (first, second):
        settings(folder, max_position_embeddings=128)
    bare = GPT2Model(build("gpt2").config)
    bare.load_state_dict(
        {name.removeprefix("transformer."): weight for name, weight in weights(second).items()}, strict=False
    )
    masks = {"h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool)}
    save_file({**bare.state_dict(), **masks}, second / "model.safetensors", {"format": "pt"})
    for one, other, out in ((first, second, "a"), (second, first, "b")):
        unsleep.merge(one, other, tmp_path / out, MergeConfig(alpha=0.5))
    assert "h.0.attn.bias" in weights(tmp_path / "b")
    assert load_model(tmp_path / "a").fingerprint == load_model(tmp_path / "b").fingerprint


# Interruption


def test_a_merge_that_is_killed_anywhere_is_resumed_with_the_same_bytes(tmp_path: Path) -> None:
    first, second = pair(tmp_path, dtype=torch.bfloat16)
    (first / "model.safetensors").unlink()
    build("llama", torch.bfloat16).save_pretrained(first, max_shard_size="12KB")
    base = another(second, tmp_path / "base", seed=7)
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-m", "support.killing", *map(str, (first, second, base, tmp_path / "work")), "20"]
    source = os.pathsep.join([str(Path(unsleep.__file__).parents[1]), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": source}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 20
    for point in found:
        assert point["killed"], point
        assert point["same"], point
        assert not point["halves"], point
        assert not point["left"], point
    assert min(point["share"] for point in found) < 0.5  # what was on the disk was not written again


def test_an_interrupted_merge_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_stream, "CHUNK", 256)
    monkeypatch.setattr(merge_stream, "MARK", 2048)
    first, second = pair(tmp_path)
    unsleep.merge(first, second, tmp_path / "whole", MergeConfig(alpha=0.3))
    seen: list[int] = []

    def stop(stage: str, done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), reporting(stop):
        unsleep.merge(first, second, tmp_path / "merged", MergeConfig(alpha=0.3))
    assert not (tmp_path / "merged").exists()
    journal = records.load(merge_stream.Journal, tmp_path / ".merged.steps/journal.json")
    assert journal.done > 10_000
    seen.clear()
    with reporting(lambda *_: seen.append(0)):
        made = unsleep.merge(first, second, tmp_path / "merged", MergeConfig(alpha=0.3))
    whole = records.load(MergeRecord, tmp_path / "whole/merge.json")
    assert made.layers == whole.layers
    one, other = (store.hash_file(tmp_path / name / "model.safetensors") for name in ("whole", "merged"))
    assert one == other
    assert not (tmp_path / ".merged.steps").exists()


# Refusals


def other_vocabulary(folder: Path, new: Callable[[dict[str, int]], dict[str, int]]) -> None:
    path = folder / "tokenizer.json"
    found = json.loads(path.read_text())
    found["model"]["vocab"] = new(found["model"]["vocab"])
    path.write_text(json.dumps(found))


def swapped(vocabulary: dict[str, int]) -> dict[str, int]:
    (one, i), (other, j) = list(vocabulary.items())[40:42]
    return vocabulary | {one: j, other: i}


def quantise(folder: Path) -> None:
    settings(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def with_nan(name: str, weight: torch.Tensor) -> torch.Tensor:
    return weight.fill_(math.nan) if "layers.1.mlp.up" in name else weight


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "reordered": (
        lambda f: other_vocabulary(f, swapped),
        r"different tokenizers: token '.' is 40 in .*first, and is 41 in",
    ),
    "fewer": (lambda f: other_vocabulary(f, lambda v: dict(list(v.items())[:-1])), "second lacks it"),
    "none": (lambda f: (f / "tokenizer.json").unlink() or (f / "tokenizer_config.json").unlink(), "has no tokenizer"),
    "quantised": (quantise, "second has weights quantised with gptq, which cannot be merged"),
    "config": (lambda f: settings(f, hidden_act="gelu"), "hidden_act is 'silu' in .*first and 'gelu' in .*second"),
    "shape": (
        lambda f: change(f, lambda n, w: w[:4].clone() if "layers.1.mlp.up" in n else w),
        r"layers\.1\.mlp\.up_proj\.weight is \[48, 32\] in .*first and \[4, 32\] in",
    ),
    "missing": (lambda f: change(f, lambda n, w: None if "layers.1.mlp.up" in n else w), "missing in .*second"),
    "8 bits": (
        lambda f: change(f, lambda n, w: w.to(torch.float8_e4m3fn) if "layers.1.mlp.up" in n else w),
        "up_proj.weight has dtype F8_E4M3, which cannot be merged",
    ),
    "integers": (
        lambda f: change(f, lambda n, w: w.to(torch.int32) if "layers.1.mlp.up" in n else w),
        "up_proj.weight is F32 in .*first and I32 in .*second",
    ),
    "nan": (lambda f: change(f, with_nan), "up_proj.weight has NaN or infinite values in the merge; it is in .*second"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_models_that_do_not_match_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    first, second = pair(tmp_path)
    damage(second)
    with pytest.raises(BadInput, match=message):
        unsleep.merge(first, second, tmp_path / "merged", MergeConfig(alpha=0.3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_other_architectures_overflows_and_places_are_refused(tmp_path: Path) -> None:
    first, second = pair(tmp_path, dtype=torch.float16)
    save_base(tmp_path / "gpt", "gpt2")
    with pytest.raises(BadInput, match=r"is a llama and .* a gpt2"):
        unsleep.merge(first, tmp_path / "gpt", tmp_path / "merged")
    with pytest.raises(BadInput, match="its α of 900000 is too far from 0 and 1"):
        unsleep.merge(first, second, tmp_path / "merged", MergeConfig(alpha=9e5))
    with pytest.raises(BadInput, match="exists already and has no merge"):
        unsleep.merge(first, second, tmp_path / "gpt")
    shutil.copy(tmp_path / "first/config.json", first / "merge.json")
    with pytest.raises(BadInput, match=r"is a part of .*first; choose another folder"):
        unsleep.merge(first, second, first)
    with pytest.raises(BadInput, match="names layer 7; the models have layers 0 to 2"):
        unsleep.merge(first, second, tmp_path / "merged", MergeConfig(alpha_layers="7=1"))
    with pytest.raises(BadInput, match="--method slerp merges task vectors, which have a base; give it with --base"):
        MergeConfig(method="slerp")


# Command


def test_the_command_says_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = pair(tmp_path)
    words = ["merge", str(first), str(second), "--alpha", "0.25", "--out", str(tmp_path / "merged")]
    assert cli.run(words) == 0
    said = capsys.readouterr().out
    assert "W = W_A + α (W_B − W_A), α = 0.25" in said
    assert "elements differ between the models" in said
    assert cli.run([*words, "--json"]) == 0  # a merge may be replaced
    assert json.loads(capsys.readouterr().out)["schema"] == "unsleep.merge/1"
    assert cli.run([*words, "--alpha-layers", "3-1=0"]) == 2
    assert "'3-1=0' runs backwards" in capsys.readouterr().err
    assert cli.run([*words, "--density", "0"]) == 2
    assert "--density is 0" in capsys.readouterr().err


FAKE = """
import shutil, sys
config, out = sys.argv[1:3]
text = open(config).read()
assert 'merge_method: dare_ties' in text and 'density: 0.4' in text and 'weight: 0.75' in text, text
assert sys.argv[sys.argv.index('--random-seed') + 1] == '3'
if 'fails' in text:
    sys.exit('no such tensor')
shutil.copytree({model!r}, out)
"""


def test_mergekit_computes_what_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = pair(tmp_path)
    config = MergeConfig(alpha=0.25, method="dare-ties", base=str(first), density=0.4, seed=3)
    python = sys.executable
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(BadInput, match=r'pip install "unsleep\[mergekit\]"'):
        unsleep.merge(first, second, tmp_path / "merged", config)
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "mergekit-yaml"
    (tmp_path / "fake.py").write_text(FAKE.format(model=str(second)))
    command.write_text(f'#!/bin/sh\nexec {python} {tmp_path / "fake.py"} "$@"\n')
    command.chmod(0o755)
    made = unsleep.merge(first, second, tmp_path / "merged", config)
    assert made.form == "mergekit"
    assert made.layers == ()
    assert load_model(tmp_path / "merged").fingerprint == load_model(second).fingerprint
    fails = tmp_path / "fails"
    second.rename(fails)
    with pytest.raises(BadInput, match="mergekit could not merge the models: no such tensor"):
        unsleep.merge(first, fails, tmp_path / "again", config)


def test_the_merge_says_the_same_as_a_model_in_between(tmp_path: Path) -> None:
    first, second = pair(tmp_path)
    unsleep.merge(first, second, tmp_path / "merged", MergeConfig(alpha=0.5))
    one, other = (AutoModelForCausalLM.from_pretrained(each) for each in (first, second))
    with torch.no_grad():
        for weight, theirs in zip(one.parameters(), other.parameters(), strict=True):
            weight.lerp_(theirs, 0.5)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), logits(one), atol=1e-4)
    assert byte_tokenizer().get_vocab() == load_model(tmp_path / "merged").tokenizer.get_vocab()
