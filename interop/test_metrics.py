"""Explained variance, L0, density, CE and KL scores equal those of SAELens' `evals` on the same model and text."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.evals import get_downstream_reconstruction_metrics, get_sparsity_and_variance_metrics
from sae_lens.load_model import HookedProxyLM
from sae_lens.training.activation_scaler import ActivationScaler
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from unsleep.core import Activations, Site
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.config import TrainConfig
from unsleep.dictionaries.files import save_dictionary
from unsleep.dictionaries.metrics import EDGES, fit
from unsleep.dictionaries.train import train
from unsleep.judge.splice import splice_score
from unsleep.models.model import LoadedModel
from unsleep.models.streams import capture

SITES = {Site(1): "model.layers.1", Site(1, "mlp"): "model.layers.1.mlp", Site(2, "attn"): "model.layers.2.self_attn"}
"""Site → the name of its module, by which SAELens hooks a Hugging Face model."""

ROWS, LENGTH, BATCH = 48, 40, 8


@cache
def small_model() -> LoadedModel:
    """A random Llama of three layers over bytes, weights enlarged so that inputs differ in what they do."""
    size: dict[str, Any] = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    more: dict[str, Any] = {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = AutoConfig.for_model("llama", **size, **more, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim > 1:
                weight.mul_(4.0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:254]
    raw = Tokenizer(models.BPE(vocab={"<bos>": 0, "<eos>": 1} | {c: i + 2 for i, c in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")
    return LoadedModel(network, tokenizer, "small")


@cache
def rows() -> torch.Tensor:
    """Token ids that the model wrote itself, so that its loss on them is far below what it is without a Site."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 256, (ROWS, 1), generator=g)
    for _ in range(LENGTH - 1):
        odds = small_model().network(ids).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(odds, 1, generator=g)], dim=1)
    return ids


@cache
def activations(site: Site) -> Activations:
    """What the model holds on those rows, one row a token."""
    with capture(small_model().network, [site]) as seen:
        small_model().network(rows())
    owners = torch.arange(ROWS).repeat_interleave(LENGTH)
    return Activations(seen[site].flatten(0, 1), owners, site, small_model().fingerprint, "rows")


class Batches:
    """What SAELens takes for its store of activations: batches of the same rows, from the first."""

    def __init__(self) -> None:
        self.batches = iter(rows().split(BATCH))

    def get_batch_tokens(self, size: int) -> torch.Tensor:
        batch = next(self.batches)
        assert len(batch) == size
        return batch


def of_sae_lens(dictionary: Coder, folder: Path) -> tuple[dict[str, float], list[float]]:
    """SAELens' figures of a dictionary that it has read from disk, and how often each feature fires."""
    sae = SAE.load_from_disk(save_dictionary(dictionary, folder))
    sae.cfg.metadata.hook_name = SITES[dictionary.site]
    model = HookedProxyLM(small_model().network, small_model().tokenizer)
    count = {"n_batches": ROWS // BATCH, "eval_batch_size_prompts": BATCH}
    scores = get_downstream_reconstruction_metrics(
        sae, model, Batches(), ActivationScaler(), compute_kl=True, compute_ce_loss=True, **count
    )
    flags = ("compute_l2_norms", "compute_sparsity_metrics", "compute_variance_metrics")
    flags += ("compute_featurewise_density_statistics",)
    sums, by_feature = get_sparsity_and_variance_metrics(
        sae, model, Batches(), ActivationScaler(), **dict.fromkeys(flags, True), **count, model_kwargs={}
    )
    return {**scores, **sums}, by_feature["feature_density"]


@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "standard", "jumprelu", "gated"])
def test_metrics_equal_those_of_sae_lens(architecture: Any, site: Site, tmp_path: Path):
    config = TrainConfig(architecture, features=96, k=6, tokens=128 * 150, batch=128, learning_rate=3e-3, bandwidth=0.3)
    dictionary = replace(train(activations(site), config), sink_norm=math.inf)
    theirs, density = of_sae_lens(dictionary, tmp_path / "d")
    tokens = ROWS * LENGTH
    density = [round(rate * tokens) / tokens for rate in density]  # theirs are float32: 0.1 is then over 0.1
    ours = fit(dictionary, activations(site))
    assert ours.explained_variance == pytest.approx(theirs["explained_variance"], abs=1e-4)
    assert ours.l0 == pytest.approx(theirs["l0"], abs=1e-4)
    assert ours.dead == pytest.approx(density.count(0.0) / len(density))
    assert ours.dense == pytest.approx(sum(rate > 0.1 for rate in density) / len(density))
    logs = [math.log10(rate) for rate in density if rate]
    assert ours.density == tuple(sum(low < x <= high for x in logs) for low, high in itertools.pairwise(EDGES))
    found = splice_score(small_model(), dictionary, rows().tolist(), batch_tokens=300)
    gap = found.zero - found.clean  # their losses are float32: of a small gap, the score has fewer digits
    assert found.score == pytest.approx(theirs["ce_loss_score"], abs=max(1e-4, 2e-6 / gap))
    assert found.kl_score == pytest.approx(theirs["kl_div_score"], abs=1e-4)
    for name, value in (
        ("ce_loss_without_sae", found.clean),
        ("ce_loss_with_sae", found.spliced),
        ("ce_loss_with_ablation", found.zero),
        ("kl_div_with_sae", found.kl_spliced),
        ("kl_div_with_ablation", found.kl_zero),
    ):
        assert value == pytest.approx(theirs[name], abs=1e-4), name
    assert 0.01 < found.kl_score < 0.999  # neither perfect nor worthless, so that a wrong formula would show
