"""Dictionaries in the files of SAELens and sparsify: what they compute, and configs that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support.dictionary_files import (
    SITE,
    SPARSIFY,
    D,
    F,
    K,
    X,
    assert_computes,
    numbers,
    saelens,
    saelens_config,
    saelens_weights,
    sparsify,
    sparsify_weights,
    top,
    write_json,
)
from unsleep.base import store
from unsleep.core import BadInput, Site
from unsleep.dictionaries.architectures.jumprelu import JumpReLU
from unsleep.dictionaries.architectures.standard import Standard
from unsleep.dictionaries.architectures.topk import TopK
from unsleep.dictionaries.files import facts, load_dictionary, save_dictionary

# SAELens


@pytest.mark.parametrize("subtract", [True, False])
def test_a_standard_dictionary_of_saelens(tmp_path: Path, subtract: bool):
    w = saelens_weights()
    found = load_dictionary(saelens(tmp_path, saelens_config("standard", apply_b_dec_to_input=subtract), w))
    code = ((X - subtract * w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    assert isinstance(found, Standard)
    assert (found.site, found.model, found.metadata["model_name"]) == (SITE, "unknown", "gpt2")
    assert_computes(found, code, code @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize("rescale", [True, False])
def test_a_topk_dictionary_of_saelens(tmp_path: Path, rescale: bool):
    w = saelens_weights()
    found = load_dictionary(saelens(tmp_path, saelens_config("topk", k=K, rescale_acts_by_decoder_norm=rescale), w))
    norms = w["W_dec"].norm(dim=1) if rescale else torch.ones(F)
    code = top(((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norms, K)
    assert isinstance(found, TopK)
    assert_computes(found, code, (code / norms) @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize("logarithm", [True, False])
def test_a_jumprelu_dictionary_of_saelens(tmp_path: Path, logarithm: bool):
    threshold = numbers(F, seed=4).exp()
    stored = {"log_threshold": threshold.log()} if logarithm else {"threshold": threshold}
    w = saelens_weights(**stored)
    found = load_dictionary(saelens(tmp_path, saelens_config("jumprelu"), w))
    pre = (X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    code = pre.relu() * (pre > threshold)
    assert type(found) is JumpReLU
    assert_computes(found, code, code @ w["W_dec"] + w["b_dec"])


def test_a_gated_dictionary_of_saelens(tmp_path: Path):
    w = saelens_weights(b_gate=numbers(F, seed=5), b_mag=numbers(F, seed=6), r_mag=numbers(F, seed=7))
    del w["b_enc"]
    found = load_dictionary(saelens(tmp_path, saelens_config("gated"), w))
    x = X - w["b_dec"]
    magnitude = (x @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu()
    code = magnitude * (x @ w["W_enc"] + w["b_gate"] > 0)
    assert_computes(found, code, code @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("jump", [True, False])
def test_transcoders_of_saelens(tmp_path: Path, skip: bool, jump: bool):
    out = D + 2
    w = saelens_weights(out, **({"W_skip": numbers(out, D, seed=8)} if skip else {}))
    w |= {"threshold": numbers(F, seed=4).exp()} if jump else {}
    name = ("jumprelu_" if jump else "") + ("skip_" if skip else "") + "transcoder"
    config = saelens_config(name, d_out=out, apply_b_dec_to_input=False)
    config["metadata"]["hook_name_out"] = "blocks.3.hook_mlp_out"
    found = load_dictionary(saelens(tmp_path, config, w))
    pre = X @ w["W_enc"] + w["b_enc"]
    code = pre.relu() * (pre > w["threshold"]) if jump else pre.relu()
    assert (found.site, found.target) == (SITE, Site(3, "mlp"))
    assert_computes(found, code, code @ w["W_dec"] + w["b_dec"] + (X @ w["W_skip"].T if skip else 0))


def test_a_constant_normalisation_is_folded(tmp_path: Path):
    w, scale = saelens_weights(), 0.25
    config = saelens_config("topk", k=K, normalize_activations="expected_average_only_in")
    config["rescale_acts_by_decoder_norm"] = True
    saelens(tmp_path, config, w)
    with pytest.raises(BadInput, match="normalised by a factor that the file does not hold"):
        load_dictionary(tmp_path)
    write_json(tmp_path / "activation_scaler.json", {"scaling_factor": scale, "has_whitening": False})
    norms = w["W_dec"].norm(dim=1)
    code = top(((scale * X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norms, K)
    rebuilt = ((code / norms) @ w["W_dec"] + w["b_dec"]) / scale
    found = load_dictionary(tmp_path)
    torch.testing.assert_close(found.rebuild(X), rebuilt, rtol=1e-4, atol=1e-4)
    write_json(tmp_path / "activation_scaler.json", {"scaling_factor": "big"})
    with pytest.raises(BadInput, match=r"activation_scaler\.json: scaling_factor is 'big'"):
        load_dictionary(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"normalize_activations": "layer_norm"}, r"is 'layer_norm'.*differs between tokens"),
        ({"normalize_activations": "constant_norm_rescale"}, r"cfg\.json: .*differs between tokens"),
        ({"normalize_activations": "covariance_whitening"}, r"matrix that the file does not hold"),
        ({"reshape_activations": "hook_z"}, r"cfg\.json: reshape_activations is 'hook_z'"),
        ({"architecture": "temporal"}, r"cfg\.json: architecture is 'temporal'; expected one of .*standard, .*topk"),
        ({"architecture": ["topk"]}, r"cfg\.json: architecture is \['topk'\]; expected str"),
        ({"architecture": "jumprelu"}, r"has no tensor 'threshold'.*architecture is 'jumprelu'"),
        ({"architecture": "gated"}, r"has no tensor 'b_gate'.*architecture is 'gated'"),
        ({"architecture": "transcoder"}, r"cfg\.json has no 'd_out'"),
        ({"architecture": "transcoder", "d_out": D}, r"no 'hook_name_out'.*give target"),
        ({"apply_b_dec_to_input": "yes"}, r"apply_b_dec_to_input is 'yes'"),
        ({"metadata": {"hook_name": "blocks.3.ln2.hook_normalized"}}, r"cfg\.json: hook name 'blocks\.3\.ln2"),
    ],
)
def test_configs_of_saelens_that_cannot_be_read_say_why(tmp_path: Path, change: dict[str, Any], words: str):
    saelens(tmp_path, saelens_config("standard") | change, saelens_weights())
    with pytest.raises(BadInput, match=words):
        load_dictionary(tmp_path)


def test_tensors_that_the_architecture_has_not_are_refused(tmp_path: Path):
    saelens(tmp_path, saelens_config("standard"), saelens_weights(threshold=torch.ones(F)))
    with pytest.raises(BadInput, match=r"sae_weights\.safetensors has the tensor 'threshold'.*is 'standard'"):
        load_dictionary(tmp_path)
    saelens(tmp_path, saelens_config("standard"), saelens_weights(scaling_factor=torch.full((F,), 2.0)))
    with pytest.raises(BadInput, match="scaling_factor is not 1"):
        load_dictionary(tmp_path)
    saelens(tmp_path, saelens_config("standard"), saelens_weights(scaling_factor=torch.ones(F)))
    assert isinstance(load_dictionary(tmp_path), Standard)


def test_flat_configs_from_before_version_6(tmp_path: Path):
    flat = {"hook_point": "blocks.4.hook_resid_pre", "d_in": D, "d_sae": F, "dtype": "torch.float32", "lr": 1e-3}
    w = saelens_weights()
    standard = load_dictionary(saelens(tmp_path / "a", {**flat, "normalize_activations": False}, w))
    assert isinstance(standard, Standard)
    assert standard.site == Site(3)  # what enters block 4
    assert (standard.metadata["lr"], standard.metadata["hook_name"]) == (1e-3, "blocks.4.hook_resid_pre")
    topk = {**flat, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    found = load_dictionary(saelens(tmp_path / "b", topk, w))
    assert isinstance(found, TopK)
    assert found.k == K
    for change, words in (
        ({"activation_fn_str": "tanh-relu"}, "activation_fn is 'tanh-relu'"),
        ({"normalize_activations": True}, "is 'expected_average_only_in'"),
        ({"hook_point": "blocks.4.attn.hook_z"}, "reshape_activations is 'hook_z'"),
        ({"activation_fn_kwargs": {"k": "4"}, "activation_fn": "topk"}, "activation_fn_kwargs: k is '4'"),
    ):
        with pytest.raises(BadInput, match=words):
            load_dictionary(saelens(tmp_path / "c", {**flat, **change}, w))
    again = load_dictionary(save_dictionary(standard, tmp_path / "again"))
    assert (again.hash, again.metadata["lr"]) == (standard.hash, 1e-3)
    assert store.read_json(tmp_path / "again" / "cfg.json")["metadata"]["sae_lens_version"] == "6.0.0"


def test_what_enters_the_first_block_is_the_embedding(tmp_path: Path):
    config = saelens_config("standard", metadata={"hook_name": "blocks.0.hook_resid_pre"})
    assert load_dictionary(saelens(tmp_path, config, saelens_weights())).site == Site(0, "embed")


# sparsify


def test_a_dictionary_of_sparsify(tmp_path: Path):
    w = sparsify_weights()
    found = load_dictionary(sparsify(tmp_path / "layers.3", SPARSIFY, w))
    code = top((X - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"], K)
    assert isinstance(found, TopK)
    assert (found.site, found.k) == (SITE, K)
    assert_computes(found, code, code @ w["W_dec"] + w["b_dec"])
    assert load_dictionary(tmp_path).hash == found.hash  # the only one in the folder


def test_a_skip_transcoder_of_sparsify(tmp_path: Path):
    w = sparsify_weights(W_skip=numbers(D, D, seed=8))
    sparsify(tmp_path / "layers.3.mlp", SPARSIFY | {"skip_connection": True, "transcode": True}, w)
    with pytest.raises(BadInput, match="give site"):
        load_dictionary(tmp_path / "layers.3.mlp")  # what enters an MLP is no Site
    found = load_dictionary(tmp_path / "layers.3.mlp", site=Site(2))
    code = top(X @ w["encoder.weight"].T + w["encoder.bias"], K)
    assert (found.site, found.target) == (Site(2), Site(3, "mlp"))
    assert_computes(found, code, code @ w["W_dec"] + w["b_dec"] + X @ w["W_skip"].T)


def test_early_configs_of_sparsify(tmp_path: Path):
    features = 2 * D
    w = {name: t[:features] if name != "b_dec" else t for name, t in sparsify_weights().items()}
    early = {"expansion_factor": 2, "normalize_decoder": True, "num_latents": 0, "k": K, "d_in": D}
    found = load_dictionary(sparsify(tmp_path / "layers.3" / "seed1", early, w))
    assert (found.n_features, found.site) == (features, SITE)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation": "groupmax"}, "activation 'groupmax'"),
        ({"signed": True}, "the code is signed"),
        ({"skip_connection": True}, r"sae\.safetensors has no tensor 'W_skip'"),
        ({"skip_connection": "no"}, r"cfg\.json: skip_connection is 'no'"),
        ({"num_latents": 21}, r"encoder\.weight has shape \[20, 6\]; expected \[21, 6\]"),
        ({"d_in": None}, r"cfg\.json: d_in is None"),
        ({"k": 21}, "k = 21"),
        ({"metadata": 3}, "metadata is 3"),
    ],
)
def test_configs_of_sparsify_that_do_not_fit_say_why(tmp_path: Path, change: dict[str, Any], words: str):
    with pytest.raises(BadInput, match=words):
        load_dictionary(sparsify(tmp_path / "layers.3", SPARSIFY | change, sparsify_weights()))


@pytest.mark.parametrize(
    ("module", "site"),
    [
        ("layers.12", "resid.12"),
        ("model.layers.3.mlp", "mlp.3"),
        ("gpt_neox.layers.0.attention", "attn.0"),
        ("transformer.h.5.attn", "attn.5"),
        ("embed_tokens", "embed"),
        ("layers_7", "resid.7"),
        ("layers.7.mlp.down_proj", None),
        ("layers.7.input_layernorm", None),
        ("layers.12345678", None),
        ("norm", None),
    ],
)
def test_sites_of_modules(module: str, site: str | None):
    found = facts.site_of_module(module)
    assert found == (Site.parse(site) if site else None)
    if found:
        assert facts.site_of_module(facts.module_of_site(found)) == found
