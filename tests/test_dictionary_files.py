"""Dictionaries on disk in every format: round trips, damage, what the caller says, and names that lead elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from support.dictionary_files import (
    BUFFERS,
    SITE,
    SPARSIFY,
    D,
    F,
    K,
    X,
    assert_computes,
    learned,
    linear,
    numbers,
    saelens,
    saelens_config,
    saelens_weights,
    sparsify,
    sparsify_weights,
    write_json,
    write_state,
)
from support.disks import full_disk
from unsleep.base import hub, store
from unsleep.core import BadInput, Site
from unsleep.dictionaries.architectures.batchtopk import BatchTopK
from unsleep.dictionaries.architectures.gated import Gated
from unsleep.dictionaries.architectures.jumprelu import JumpReLU
from unsleep.dictionaries.architectures.matryoshka import Matryoshka
from unsleep.dictionaries.architectures.standard import Standard
from unsleep.dictionaries.architectures.topk import TopK
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.files import load_dictionary, save_dictionary

# Round trips


def ours(kind: str, dtype: torch.dtype = torch.float32, **more: Any) -> Coder:
    """A dictionary of every architecture; names with `transcoder` rebuild another Site."""
    transcoder = "transcoder" in kind
    weights = {name: tensor.to(dtype) for name, tensor in saelens_weights().items()}
    arguments: dict[str, Any] = {"site": SITE, "model": "0123", **weights}
    arguments |= {"target": Site(3, "mlp"), "subtract_bias": False} if transcoder else {}
    arguments |= {"W_skip": numbers(D, D, seed=8).to(dtype)} if "skip" in kind else {}
    arguments |= more
    match kind.split("_")[0]:
        case "standard":
            return Standard(**arguments)
        case "topk":
            return TopK(**arguments, k=K)
        case "jumprelu":
            return JumpReLU(**arguments, threshold=numbers(F, seed=4).exp().to(dtype))
        case "batchtopk":
            return BatchTopK(**arguments, k=K, threshold=1 / 3)
        case "matryoshka":
            return Matryoshka(**arguments, k=K, threshold=1 / 3, groups=(5, 15))
        case _:
            extra = {"b_mag": numbers(F, seed=6).to(dtype), "r_mag": numbers(F, seed=7).to(dtype)}
            return Gated(**arguments, **extra)


KINDS = ("standard", "topk", "jumprelu", "gated", "batchtopk", "matryoshka")
ANY = (*KINDS, *(f"{kind}_transcoder" for kind in KINDS), *(f"{kind}_skip_transcoder" for kind in KINDS))
FORMATS = ("saelens", "sparsify", "dictionary_learning")


def refusal(kind: str, format: str) -> str | None:
    """Why a format cannot hold an architecture."""
    if format == "sparsify":
        return None if kind.startswith("topk") else "sparsify has the TopK architecture alone"
    if format == "dictionary_learning":
        return "has no transcoders" if "transcoder" in kind else None
    if "skip" in kind and kind.startswith(("topk", "gated")):
        return "SAELens has no (topk|gated) architecture with a skip path"
    return None


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ANY)
def test_every_architecture_comes_back_the_same_or_is_refused(tmp_path: Path, kind: str, format: Any):
    before = replace(ours(kind), metadata={"context_size": 128, "theirs": {"a": [1]}}, sink_norm=12.5)
    if words := refusal(kind, format):
        with pytest.raises(BadInput, match=words):
            save_dictionary(before, tmp_path / "d", format=format)
        assert list(tmp_path.iterdir()) == []
        return
    again = load_dictionary(save_dictionary(before, tmp_path / "d", format=format))
    assert type(again) is type(before)
    assert (again.site, again.target, again.model, again.sink_norm) == (SITE, before.target, "0123", 12.5)
    assert (again.metadata["context_size"], again.metadata["theirs"]) == (128, {"a": [1]})
    torch.testing.assert_close(again.rebuild(X), before.rebuild(X), rtol=1e-5, atol=1e-5)
    if again.subtract_bias == before.subtract_bias:
        assert again.hash == before.hash
    else:
        assert (kind, format) == ("jumprelu", "dictionary_learning")  # which takes no bias off: it is folded


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([(k, f) for k in ANY for f in FORMATS if not refusal(k, f) and (k, f[0]) != ("jumprelu", "d")]),
    st.sampled_from([math.inf, 3.5]),
)
def test_a_dtype_comes_back(dtype: torch.dtype, what: tuple[str, Any], sink_norm: float):
    import tempfile

    before = ours(what[0], dtype, sink_norm=sink_norm)
    with tempfile.TemporaryDirectory() as folder:
        again = load_dictionary(save_dictionary(before, Path(folder) / "d", format=what[1]))
    assert again.hash == before.hash
    assert (again.W_enc.dtype, again.sink_norm) == (dtype, sink_norm)


@pytest.mark.parametrize(
    ("kind", "format", "subtracted"),
    [
        ("jumprelu", "dictionary_learning", True),
        ("gated", "dictionary_learning", False),
        ("batchtopk", "dictionary_learning", False),
        ("topk", "sparsify", False),
    ],
)
def test_a_bias_that_a_format_handles_otherwise_is_folded(tmp_path: Path, kind: str, format: Any, subtracted: bool):
    before = replace(ours(kind), subtract_bias=subtracted)
    again = load_dictionary(save_dictionary(before, tmp_path / "d", format=format))
    assert again.subtract_bias != subtracted
    assert float(before.encode(X).sum()) > 1
    torch.testing.assert_close(again.encode(X), before.encode(X), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again.rebuild(X), before.rebuild(X), rtol=1e-5, atol=1e-5)


def test_what_other_libraries_said_survives_every_format(tmp_path: Path):
    path = learned(tmp_path / "dl", "AutoEncoderTopK", linear("b_dec") | BUFFERS, k=K, lr=3e-4)
    first = load_dictionary(path)
    for format in FORMATS:
        again = load_dictionary(save_dictionary(first, tmp_path / format, format=format))
        assert again.metadata["dictionary_learning"]["trainer"]["lr"] == 3e-4
        save_dictionary(again, tmp_path / "back", format="dictionary_learning", replace=True)
        config = store.read_json(tmp_path / "back" / "config.json")
        assert (config["trainer"]["lr"], config["trainer"]["lm_name"], config["buffer"]) == (
            3e-4,
            "gpt2",
            {"ctx_len": 128},
        )
    sparse = sparsify(tmp_path / "s" / "layers.3", SPARSIFY | {"multi_topk": True}, sparsify_weights())
    save_dictionary(load_dictionary(sparse), tmp_path / "s2", format="sparsify")
    assert store.read_json(tmp_path / "s2" / "layers.3" / "cfg.json")["multi_topk"] is True
    odd = saelens(tmp_path / "o", saelens_config("standard", surprise=[1]), saelens_weights())
    save_dictionary(load_dictionary(odd), tmp_path / "o2")
    assert store.read_json(tmp_path / "o2" / "cfg.json")["surprise"] == [1]


def test_batchtopk_is_saved_for_inference_as_saelens_does(tmp_path: Path):
    save_dictionary(ours("matryoshka"), tmp_path / "d")
    config = store.read_json(tmp_path / "d" / "cfg.json")
    weights = store.read_tensors(tmp_path / "d" / "sae_weights.safetensors")
    assert config["architecture"] == "jumprelu"
    assert weights["threshold"].tolist() == pytest.approx([1 / 3] * F)
    weights["threshold"][3] *= 2  # changed elsewhere: what is remembered of it holds no more
    save_file(weights, tmp_path / "d" / "sae_weights.safetensors")
    again = load_dictionary(tmp_path / "d")
    assert type(again) is JumpReLU
    torch.testing.assert_close(again.threshold, weights["threshold"])
    config["metadata"]["unsleep_groups"] = ["5", 15]
    write_json(tmp_path / "d" / "cfg.json", config)
    with pytest.raises(BadInput, match=r"cfg\.json: metadata: unsleep_groups is .*expected list\[int\]"):
        load_dictionary(tmp_path / "d")


def test_a_changed_dictionary_is_not_saved_under_old_facts(tmp_path: Path):
    first = load_dictionary(save_dictionary(ours("batchtopk"), tmp_path / "a"))
    moved = replace(ours("topk"), site=Site(5), metadata=first.metadata)
    again = load_dictionary(save_dictionary(moved, tmp_path / "b"))
    assert (type(again), again.site) == (TopK, Site(5))


def test_unknown_formats_and_existing_folders_are_refused(tmp_path: Path):
    unchecked = getattr(save_dictionary, "__wrapped__", save_dictionary)  # beartype would see it first
    with pytest.raises(BadInput, match="format is 'pickle'"):
        unchecked(ours("topk"), tmp_path / "d", format="pickle")
    save_dictionary(ours("topk"), tmp_path / "d")
    with pytest.raises(BadInput, match="exists already"):
        save_dictionary(ours("topk"), tmp_path / "d")
    wide = replace(ours("standard_transcoder"), W_dec=numbers(F, 9), b_dec=numbers(9))
    assert load_dictionary(save_dictionary(wide, tmp_path / "w")).b_dec.shape == (9,)
    for kind, format in (("topk_transcoder", "sparsify"), ("topk_transcoder", "saelens")):
        wide = replace(ours(kind), W_dec=numbers(F, 9), b_dec=numbers(9))
        with pytest.raises(BadInput, match="between widths 6 and 9"):
            save_dictionary(wide, tmp_path / "x", format=format)


# Damage


def saved(tmp_path: Path, format: str) -> tuple[Path, Path, Path]:
    """A saved dictionary: its folder, its config and its weights."""
    folder = save_dictionary(ours("topk"), tmp_path / "d", format=format)
    inner = folder / "layers.3" if format == "sparsify" else folder
    [config] = inner.glob("*.json")
    [weights] = [p for p in inner.iterdir() if p.suffix != ".json"]
    return folder, config, weights


@pytest.mark.parametrize("format", FORMATS)
def test_a_truncated_file_is_named(tmp_path: Path, format: str):
    folder, config, weights = saved(tmp_path, format)
    for path in (config, weights):
        whole = path.read_bytes()
        for share in (0.0, 0.001, 0.3, 0.7, 0.99):
            path.write_bytes(whole[: int(len(whole) * share)])
            with pytest.raises(BadInput, match=path.name):
                load_dictionary(folder)
        path.unlink()
        with pytest.raises(BadInput, match=rf"{path.name} (does not exist|\()"):
            load_dictionary(folder)
        path.write_bytes(whole)
    assert load_dictionary(folder).hash == ours("topk").hash


@pytest.mark.parametrize("format", FORMATS)
def test_a_tensor_that_is_missing_misshapen_or_nan_is_named(tmp_path: Path, format: str):
    folder, _, weights = saved(tmp_path, format)
    is_pickle = weights.suffix == ".pt"
    whole = torch.load(weights, weights_only=True) if is_pickle else store.read_tensors(weights)
    write: Callable[[Path, Any], None] = write_state if is_pickle else lambda path, tensors: save_file(tensors, path)
    for name, tensor in whole.items():
        if name in BUFFERS:
            continue
        write(weights, {key: t for key, t in whole.items() if key != name})
        with pytest.raises(BadInput, match=rf"{weights.name} has no tensor '{name}'"):
            load_dictionary(folder)
        write(weights, whole | {name: tensor[..., :-1].contiguous()})
        shape = r".*".join(str(s) for s in tensor.shape)
        with pytest.raises(BadInput, match=rf"{weights.name}: {name} has shape .* expected .*{shape}"):
            load_dictionary(folder)
        write(weights, whole | {name: tensor.clone().index_fill(0, torch.tensor([2]), math.nan)})
        with pytest.raises(BadInput, match=rf"{weights.name}: {name} has \d+ NaN"):
            load_dictionary(folder)


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_leaves_nothing(tmp_path: Path, format: Any):
    for room in (10, 700):
        with full_disk(room), pytest.raises(BadInput, match=r"cannot write .*no partial file was left behind"):
            save_dictionary(ours("topk"), tmp_path / "d", format=format)
        assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_dictionary_or_with_several_is_named(tmp_path: Path):
    with pytest.raises(BadInput, match=r"cfg\.json does not exist.*no such folder"):
        load_dictionary(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(BadInput, match=r"expected a dictionary with .*, there is notes\.txt"):
        load_dictionary(tmp_path)
    for name in ("layers.1", "layers.2"):
        sparsify(tmp_path / name, SPARSIFY, sparsify_weights())
    with pytest.raises(BadInput, match=r"holds 2 dictionaries; name one: layers\.1, layers\.2"):
        load_dictionary(tmp_path)


# What the caller says


def test_a_file_that_does_not_say_where_it_belongs_takes_it_from_the_caller(tmp_path: Path):
    silent = saelens_config("standard", metadata={})
    saelens(tmp_path / "a", silent, saelens_weights())
    with pytest.raises(BadInput, match=r"metadata has no 'hook_name'.*give site"):
        load_dictionary(tmp_path / "a")
    found = load_dictionary(tmp_path / "a", site=Site(7), model="abcd")
    assert (found.site, found.model) == (Site(7), "abcd")
    odd = saelens_config("transcoder", d_out=D, apply_b_dec_to_input=False)
    odd["metadata"] = {"hook_name": "blocks.3.ln2.hook_normalized", "hook_name_out": "blocks.3.hook_mlp_out"}
    saelens(tmp_path / "b", odd, saelens_weights())
    found = load_dictionary(tmp_path / "b", site=Site(3))
    assert (found.site, found.target) == (Site(3), Site(3, "mlp"))
    assert found.metadata["hook_name"] == "blocks.3.ln2.hook_normalized"


def test_a_caller_that_says_otherwise_than_the_file_is_refused(tmp_path: Path):
    folder = save_dictionary(ours("topk"), tmp_path / "d")
    assert load_dictionary(folder, site=SITE, model="0123").site == SITE
    for said, words in (
        ({"site": Site(4)}, r"its site is resid\.3; expected resid\.4"),
        ({"model": "ffff"}, "is of the model 0123; expected ffff"),
        ({"target": Site(4)}, r"no transcoder; expected no target, got resid\.4"),
    ):
        with pytest.raises(BadInput, match=words):
            load_dictionary(folder, **said)  # type: ignore[arg-type]


# Names


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, list[str]]]:
    """A hub with `tmp_path / hub` behind every repo; what was asked of it."""
    asked: list[tuple[str, list[str]]] = []

    def snapshot(repo: str, allow_patterns: list[str], revision: str | None) -> str:
        asked.append((repo, allow_patterns))
        if repo == "nobody/none":
            raise LocalEntryNotFoundError("nothing in the cache\nand no network")
        return str(tmp_path / "hub")

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    return asked


def test_a_hub_id_is_fetched_and_a_path_never_is(tmp_path: Path, fetched: list[tuple[str, list[str]]]):
    sparsify(tmp_path / "hub" / "layers.3", SPARSIFY, sparsify_weights())
    assert load_dictionary("owner/repo/layers.3").site == SITE
    repo, asked = fetched[0]
    assert repo == "owner/repo"
    assert set(asked) >= {"layers.3/cfg.json", "layers.3/sae.safetensors", "layers.3/ae.pt"}
    assert not [name for name in asked if "*" in name]
    with pytest.raises(BadInput, match=r"expected a dictionary with .*there is layers\.3"):
        load_dictionary("owner/repo")  # what happens to be in the cache is not taken for it
    with pytest.raises(
        BadInput, match=r"nobody/none is neither a local.*cannot be reached \(LocalEntryNotFoundError\)"
    ):
        load_dictionary("nobody/none")
    count = len(fetched)
    for name in (Path("owner/repo"), "../repo/x", "owner/../repo", "owner", "/owner/repo", "owner/repo/../x", ""):
        with pytest.raises(BadInput, match=r"is no folder that exists|does not exist"):
            load_dictionary(name)
    assert len(fetched) == count


LIST = """
gpt2-small-res:
  model: gpt2
  repo_id: owner/repo
  config_overrides: {normalize_activations: expected_average_only_in}
  saes:
  - {id: block-3, path: some/folder, norm_scaling_factor: 0.25}
  - {id: block-4, path: some/folder}
odd:
  model: gpt2
  repo_id: owner/odd
  conversion_func: goodfire
  saes: [{id: a, path: b}]
"""


def test_a_release_of_saelens_is_looked_up_in_its_list(
    tmp_path: Path, fetched: list[tuple[str, list[str]]], monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(BadInput, match="sae_lens, which is not installed"):
        load_dictionary("gpt2-small-res:block-3")
    package = tmp_path / "site" / "sae_lens"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('is only looked for')")
    monkeypatch.syspath_prepend(str(package.parent))
    with pytest.raises(BadInput, match=r"pretrained_saes\.yaml does not exist"):
        load_dictionary("gpt2-small-res:block-3")
    (package / "pretrained_saes.yaml").write_text(LIST)
    w = saelens_weights()
    saelens(tmp_path / "hub" / "some" / "folder", saelens_config("standard"), w)
    found = load_dictionary("gpt2-small-res:block-3")
    assert fetched[0][0] == "owner/repo"
    code = ((0.25 * X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    assert_computes(found, code, (code @ w["W_dec"] + w["b_dec"]) / 0.25)
    for name, words in (
        ("gpt2-small-res:block-4", "factor that the file does not hold"),
        ("gpt2-small-res:block-5", "has no 'block-5'; it has block-3, block-4"),
        ("other:block-3", "has no release 'other'"),
        ("odd:a", r"layout of its own \(goodfire\)"),
    ):
        with pytest.raises(BadInput, match=words):
            load_dictionary(name)
