"""Their loaders read our files, ours reads theirs, and both compute the same (`make interop`).

Needs the libraries of requirements.txt, which unsleep itself does not: tests/ holds the same facts without them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from dictionary_learning.dictionary import AutoEncoderNew
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.p_anneal import PAnnealTrainer
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import load_dictionary as their_load_dictionary
from sae_lens.saes.sae import SAEMetadata
from sparsify import SparseCoder, SparseCoderConfig

from unsleep.core import Site
from unsleep.dictionaries.architectures.batchtopk import BatchTopK
from unsleep.dictionaries.architectures.gated import Gated
from unsleep.dictionaries.architectures.jumprelu import JumpReLU
from unsleep.dictionaries.architectures.matryoshka import Matryoshka
from unsleep.dictionaries.architectures.standard import Standard
from unsleep.dictionaries.architectures.topk import TopK
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.files import load_dictionary, save_dictionary

D, OUT, F, K = 16, 24, 64, 5
SITE, TARGET = Site.parse("resid.3"), Site.parse("mlp.3")
X = torch.randn(50, D, generator=torch.Generator().manual_seed(1)) * 2

NAMES = ("standard", "topk", "jumprelu", "gated", "batchtopk", "matryoshka")


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Of a size at which activations are about 1, so that 1e-5 is above float32's rounding."""
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ours(name: str, *, subtract: bool = True, out: int = D, target: Site | None = None, skip: bool = False) -> Coder:
    """A random dictionary with decoder rows of norm 1."""
    rows = torch.nn.functional.normalize(numbers(F, out, seed=2), dim=1)
    arguments: dict[str, Any] = {"site": SITE, "model": "0123", "W_enc": numbers(D, F), "b_enc": numbers(F, seed=1)}
    arguments |= {"W_dec": rows, "b_dec": numbers(out, seed=3), "target": target}
    arguments |= {"subtract_bias": subtract and target is None, "W_skip": numbers(out, D, seed=8) if skip else None}
    match name:
        case "standard":
            return Standard(**arguments)
        case "topk":
            return TopK(**arguments, k=K)
        case "jumprelu":
            return JumpReLU(**arguments, threshold=numbers(F, seed=4).exp())
        case "gated":
            return Gated(**arguments, b_mag=numbers(F, seed=6), r_mag=numbers(F, seed=7))
        case "batchtopk":
            return BatchTopK(**arguments, k=K, threshold=0.7)
        case _:
            return Matryoshka(**arguments, k=K, threshold=0.7, groups=(16, 48))


@torch.no_grad()
def randomised(module: torch.nn.Module) -> Any:
    """Random parameters, thresholds over 0."""
    for seed, (name, weight) in enumerate(module.named_parameters()):
        weight.copy_(numbers(*weight.shape, seed=seed))
        if name == "threshold":
            weight.exp_()
    return module


def assert_same(found: Coder, code: torch.Tensor, rebuilt: torch.Tensor) -> None:
    assert 0 < float((code != 0).float().mean()) < 0.9
    torch.testing.assert_close(found.encode(X), code.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.rebuild(X), rebuilt.detach(), rtol=1e-5, atol=1e-5)


# SAELens


def saelens(name: str, **more: Any) -> Any:
    """A random SAE or transcoder of SAELens."""
    kind = getattr(sae_lens, name)
    metadata = SAEMetadata(hook_name=SITE.hook_name, hook_name_out=TARGET.hook_name, model_name="gpt2", surprise=[1])
    config = getattr(sae_lens, f"{name}Config")(d_in=D, d_sae=F, metadata=metadata, **more)
    return randomised(kind(config))


TRANSCODER = {"d_out": OUT, "apply_b_dec_to_input": False}


@pytest.mark.parametrize(
    ("name", "more", "kind"),
    [
        ("StandardSAE", {}, Standard),
        ("StandardSAE", {"apply_b_dec_to_input": False}, Standard),
        ("TopKSAE", {"k": K}, TopK),
        ("TopKSAE", {"k": K, "rescale_acts_by_decoder_norm": True}, TopK),
        ("JumpReLUSAE", {}, JumpReLU),
        ("GatedSAE", {}, Gated),
        ("Transcoder", TRANSCODER, Standard),
        ("SkipTranscoder", TRANSCODER, Standard),
        ("JumpReLUTranscoder", TRANSCODER, JumpReLU),
        ("JumpReLUSkipTranscoder", TRANSCODER, JumpReLU),
    ],
)
def test_we_read_what_saelens_writes(tmp_path: Path, name: str, more: dict[str, Any], kind: type[Coder]):
    theirs = saelens(name, **more)
    theirs.save_model(tmp_path)
    found = load_dictionary(tmp_path)
    assert type(found) is kind
    assert (found.site, found.target) == (SITE, TARGET if "Transcoder" in name else None)
    assert found.metadata["surprise"] == [1]
    assert_same(found, theirs.encode(X), theirs(X))


@pytest.mark.parametrize("name", ["BatchTopKTrainingSAE", "MatryoshkaBatchTopKTrainingSAE"])
@pytest.mark.parametrize("rescale", [True, False])
def test_we_read_batchtopk_as_saelens_saves_it_for_inference(tmp_path: Path, name: str, rescale: bool):
    more = {"matryoshka_widths": [16, F]} if "Matryoshka" in name else {}
    theirs = saelens(name, k=K, rescale_acts_by_decoder_norm=rescale, **more)
    theirs.topk_threshold = torch.tensor(0.7, dtype=torch.float64)
    theirs.save_inference_model(tmp_path)
    found, again = load_dictionary(tmp_path), sae_lens.SAE.load_from_disk(tmp_path)
    assert type(found) is JumpReLU
    assert_same(found, again.encode(X), again(X))


def test_we_fold_the_scale_that_saelens_folds(tmp_path: Path):
    theirs = saelens("TopKSAE", k=K, rescale_acts_by_decoder_norm=True)
    theirs.cfg.normalize_activations = "expected_average_only_in"
    theirs.save_model(tmp_path)
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 0.25, "has_whitening": false}')
    theirs.fold_activation_norm_scaling_factor(0.25)
    assert_same(load_dictionary(tmp_path), theirs.encode(X), theirs(X))


@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_we_read_flat_configs_as_saelens_does(tmp_path: Path, activation: str):
    saelens("StandardSAE").save_model(tmp_path)
    flat = {"hook_point": SITE.hook_name, "d_in": D, "d_sae": F, "dtype": "torch.float32", "model_name": "gpt2"}
    flat |= {"activation_fn_str": activation, "activation_fn_kwargs": {"k": K} if activation == "topk" else {}}
    (tmp_path / "cfg.json").write_text(json.dumps(flat))
    theirs, found = sae_lens.SAE.load_from_disk(tmp_path), load_dictionary(tmp_path)
    assert (theirs.cfg.architecture(), type(found)) in (("standard", Standard), ("topk", TopK))
    assert_same(found, theirs.encode(X), theirs(X))


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_saelens_reads_what_we_write(tmp_path: Path, name: str, subtract: bool):
    before = ours(name, subtract=subtract)
    theirs = sae_lens.SAE.load_from_disk(save_dictionary(before, tmp_path / "d"))
    assert (theirs.cfg.metadata.hook_name, theirs.cfg.apply_b_dec_to_input) == (SITE.hook_name, subtract)
    assert_same(before, theirs.encode(X), theirs(X))
    theirs.save_model(tmp_path / "again")  # and gives it back as it was
    assert load_dictionary(tmp_path / "again").hash == before.hash


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_saelens_reads_our_transcoders(tmp_path: Path, name: str, skip: bool):
    one_width = name in ("topk", "gated")  # which SAELens has for one Site alone
    before = ours(name, out=D if one_width else OUT, target=TARGET, skip=skip and not one_width)
    theirs = sae_lens.SAE.load_from_disk(save_dictionary(before, tmp_path / "d"))
    assert_same(before, theirs.encode(X), theirs(X))
    theirs.save_model(tmp_path / "again")
    assert load_dictionary(tmp_path / "again").hash == before.hash


# sparsify


def dense(top_acts: torch.Tensor, top_indices: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.zeros(len(top_acts), F).scatter(1, top_indices, top_acts)


@pytest.mark.parametrize("transcode", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_we_read_what_sparsify_writes(tmp_path: Path, transcode: bool, skip: bool):
    config = SparseCoderConfig(num_latents=F, k=K, transcode=transcode, skip_connection=skip)
    theirs = randomised(SparseCoder(D, config))
    theirs.save_to_disk(tmp_path / "layers.3.mlp")
    found = load_dictionary(tmp_path / "layers.3.mlp", site=Site(3) if transcode else None)
    assert (found.site, found.target) == ((Site(3), TARGET) if transcode else (TARGET, None))
    assert_same(found, dense(*theirs.encode(X)), theirs(X).sae_out)


@pytest.mark.parametrize("target", [None, TARGET])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("subtract", [True, False])
def test_sparsify_reads_what_we_write(tmp_path: Path, target: Site | None, skip: bool, subtract: bool):
    before = ours("topk", target=target, skip=skip, subtract=subtract)
    folder = save_dictionary(before, tmp_path / "d", format="sparsify")
    [theirs] = SparseCoder.load_many(str(folder), local=True).values()
    assert_same(before, dense(*theirs.encode(X)), theirs(X).sae_out)
    theirs.save_to_disk(tmp_path / "again" / ("layers.3.mlp" if target else "layers.3"))  # they keep no metadata
    again = load_dictionary(tmp_path / "again", site=SITE)
    assert_same(again, before.encode(X), before.rebuild(X))


# dictionary_learning


TRAINERS: list[tuple[Any, dict[str, Any], type[Coder]]] = [
    (StandardTrainer, {}, Standard),
    (StandardTrainerAprilUpdate, {}, Standard),
    (PAnnealTrainer, {}, Standard),
    (GatedSAETrainer, {}, Gated),
    (JumpReluTrainer, {"target_l0": 10}, JumpReLU),
    (TopKTrainer, {"k": K, "threshold_start_step": 0}, TopK),
    (BatchTopKTrainer, {"k": K, "threshold_start_step": 0}, BatchTopK),
    (MatryoshkaBatchTopKTrainer, {"k": K, "threshold_start_step": 0, "group_fractions": [0.25, 0.75]}, Matryoshka),
]


def trained(folder: Path, trainer: Any, *, normalize: bool, **more: Any) -> Path:
    """A few steps of their training, saved by it."""
    config = {"trainer": trainer, "steps": 6, "activation_dim": D, "dict_size": F, "layer": 3, "lm_name": "gpt2"}
    config |= {"submodule_name": "resid_post_layer_3", "device": "cpu", "warmup_steps": 1, **more}
    if trainer in (StandardTrainer, StandardTrainerAprilUpdate, GatedSAETrainer, JumpReluTrainer, PAnnealTrainer):
        config["sparsity_warmup_steps"] = 2
    batches = [numbers(64, D, seed=seed) * 6 + 0.5 for seed in range(120)]
    trainSAE(iter(batches), [config], steps=6, save_dir=str(folder), normalize_activations=normalize, device="cpu")
    return folder / "trainer_0"


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("trainer", "more", "kind"), TRAINERS, ids=lambda value: getattr(value, "__name__", ""))
def test_we_read_what_dictionary_learning_trains(
    tmp_path: Path, trainer: Any, more: dict[str, Any], kind: type[Coder], normalize: bool
):
    folder = trained(tmp_path, trainer, normalize=normalize, **more)
    theirs, _ = their_load_dictionary(str(folder), "cpu")
    found = load_dictionary(folder)
    assert type(found) is kind
    assert found.site == SITE
    code = theirs.encode(X)
    if kind is Standard:  # their loader scales decoder rows to norm 1, and activations with them
        code = code / found.W_dec.norm(dim=1)
    assert_same(found, code, theirs(X))


def test_we_read_what_dictionary_learning_trains_under_a_wrong_name(tmp_path: Path):
    folder = trained(tmp_path, StandardTrainerAprilUpdate, normalize=False, dict_class=AutoEncoderNew)
    assert json.loads((folder / "config.json").read_text())["trainer"]["dict_class"] == "AutoEncoder"
    with pytest.raises(RuntimeError, match=r"decoder\.bias"):
        their_load_dictionary(str(folder), "cpu")
    theirs = AutoEncoderNew.from_pretrained(str(folder / "ae.pt"))
    assert_same(load_dictionary(folder), theirs.encode(X), theirs(X))


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_dictionary_learning_reads_what_we_write(tmp_path: Path, name: str, subtract: bool):
    before = ours(name, subtract=subtract)
    folder = save_dictionary(before, tmp_path / "d", format="dictionary_learning")
    theirs, config = their_load_dictionary(str(folder), "cpu")
    assert config["trainer"]["submodule_name"] == "resid_post_layer_3"
    assert_same(before, theirs.encode(X), theirs(X))
