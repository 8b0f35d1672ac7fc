"""Training of every architecture: order of batches, folding, resuming, sharing among processes, what is learned."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.training import ARCHITECTURES, SMALL, acts, config_of, in_pieces, planted
from unsleep.base import store
from unsleep.base.context import reporting
from unsleep.core import ActivationStream, BadInput, Site
from unsleep.dictionaries import metrics
from unsleep.dictionaries.buffer import batches, streamed
from unsleep.dictionaries.train import train, train_many
from unsleep.dictionaries.trainer import Trainer

# the order of batches


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(1, 30), st.integers(1, 60), st.integers(0, 9))
def test_an_epoch_shows_a_token_at_most_once_and_misses_less_than_a_batch_a_group(
    sizes: list[int], batch: int, pool: int, seed: int
):
    x = torch.arange(sum(sizes)).float()[:, None]
    stream = in_pieces(x, tuple(sizes))
    size = min(batch, len(x))
    steps = sum(1 for _ in batches(stream, batch, 1, seed=seed, pool=pool)) * (len(x) // size)
    seen = torch.cat(list(batches(stream, batch, 1, seed=seed, pool=len(x)))).flatten()
    assert len(seen) == size
    everything = torch.cat(list(batches(stream, batch, max(1, steps), seed=seed, pool=10**9))).flatten()
    assert len(everything.unique()) == len(everything)
    assert len(everything) > len(x) - size


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(1, 30), st.integers(1, 60), st.integers(0, 40))
def test_a_resumed_order_is_the_order(sizes: list[int], batch: int, pool: int, start: int):
    stream = in_pieces(torch.arange(sum(sizes)).float()[:, None], tuple(sizes))
    whole = [b.flatten().tolist() for b in batches(stream, batch, 50, pool=pool)]
    assert len(whole) == 50
    assert whole[start:] == [b.flatten().tolist() for b in batches(stream, batch, 50, pool=pool, start=start)]


def test_memory_holds_a_pool_and_not_everything():
    x, held = torch.randn(4_000, 8), []
    parts = x.split(100)

    def piece(i: int) -> torch.Tensor:
        held.append(i)
        return parts[i]

    stream = ActivationStream((100,) * 40, piece, Site(3), "model", "prompts")
    first = next(iter(batches(stream, 50, 80, pool=500)))
    assert first.shape == (50, 8)
    assert len(held) == 5


def test_other_seeds_and_epochs_have_other_orders():
    stream = in_pieces(torch.arange(64).float()[:, None], (64,))
    epochs = [b.flatten().tolist() for b in batches(stream, 64, 2)]
    assert epochs[0] != epochs[1]
    assert epochs[0] != next(iter(batches(stream, 64, 2, seed=1))).flatten().tolist()
    assert sorted(epochs[0]) == sorted(epochs[1])


# what training leaves


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_planted_dictionary_is_learned(architecture: str):
    x = planted()
    trained = train(acts(x), config_of(architecture, tokens=128 * 400))
    fit = metrics.fit(trained, x)
    assert fit.fvu < 0.15
    assert fit.l0 < 16
    torch.testing.assert_close(trained.W_dec.norm(dim=1), torch.ones(64))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("normalize", ["mean_norm", "rms", "none"])
def test_the_scale_folded_into_the_weights_changes_nothing(architecture: str, normalize: str):
    x = planted(300, scale=0.4 if normalize == "none" else 7.0)
    free = architecture in ("standard", "jumprelu", "gated")
    trainer = Trainer(x, config_of(architecture, normalize=normalize, unit_decoder=not free))
    for step in range(30):
        trainer.step(x, step)
    scaled = x * trainer.input.scale
    w = trainer.w
    pre = (scaled - w.b_dec) @ w.enc.T + w.b_enc
    dictionary = trainer.dictionary(acts(x))
    code = dictionary.encode(x)
    fires = {"standard": pre > 0, "gated": pre > 0}
    if architecture in fires:
        assert float(((code > 0) & ~fires[architecture]).float().mean()) == 0
    if architecture == "gated":
        strength = torch.where(pre > 0, ((pre - w.b_enc) * w.own["r_mag"].exp() + w.own["b_mag"]).relu(), 0)
    elif architecture == "jumprelu":
        strength = torch.where(pre > w.own["log_threshold"].exp(), pre, 0)
    elif architecture == "topk":
        strength = torch.zeros_like(pre).scatter(1, *reversed(pre.topk(4, 1))).relu()
    elif architecture == "standard":
        strength = pre.relu()
    else:
        strength = torch.where(pre > trainer.threshold, pre, 0)
    expected = (strength @ w.dec + w.b_dec) / trainer.input.scale
    off = (dictionary.decode(code) - expected).norm(dim=1) / expected.norm(dim=1)
    assert float((off < 1e-4).float().mean()) > 0.98  # a token at the edge of a threshold may fall either way


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_learns_another_sites_activations(skip: bool):
    x = planted(1_500)
    g = torch.Generator().manual_seed(3)
    y = x.relu() @ torch.randn(16, 10, generator=g) + 5
    trained = train(acts(x), config_of("topk", skip=skip, tokens=128 * 300), target=acts(y, Site(4, "mlp")))
    rebuilt = trained.rebuild(x)
    assert trained.target == Site(4, "mlp")
    assert (trained.W_skip is not None) == skip
    share = float((rebuilt - y).square().sum() / (y - y.mean(0)).square().sum())
    assert share < (0.1 if skip else 0.35)


def test_several_configs_are_trained_as_they_would_be_alone():
    x = planted(600)
    one, two = config_of("topk"), config_of("batchtopk", features=32)
    both = train_many(acts(x), [one, two])
    alone = [train(acts(x), c) for c in (one, two)]
    for a, b in zip(both, alone, strict=True):
        assert store.hash_tensors(a.tensors()) == store.hash_tensors(b.tensors())


def test_dead_features_are_resampled():
    x = planted(600)
    config = config_of("standard", aux_coefficient=0.0, dead_after=300, resample_every=640)
    trainer = Trainer(x, config)
    trainer.w.b_enc[:32] = -100.0
    for step in range(12):
        trainer.step(x[:128], step)
    assert float((trainer.w.b_enc[:32] < -50).float().mean()) == 0


# interrupted and shared


class Killed(Exception):
    pass


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_interrupted_training_ends_with_the_same_bits(architecture: str, tmp_path: Path):
    stream = in_pieces(planted(600), (250, 50, 300))
    config = config_of(architecture, checkpoint_every=20, resample_every=3_000)
    whole = train(stream, config)

    def kill(stage: str, done: int, total: int) -> None:
        if done == 50:
            raise Killed

    with pytest.raises(Killed), reporting(kill):
        train(stream, config, checkpoint=tmp_path / "c")
    resumed = train(stream, config, checkpoint=tmp_path / "c")
    assert resumed.hash == whole.hash


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path):
    config = config_of("topk", checkpoint_every=10)
    train(acts(planted(300)), config, checkpoint=tmp_path / "c")
    with pytest.raises(BadInput, match="another run"):
        train(acts(planted(300)), replace(config, seed=1), checkpoint=tmp_path / "c")


WORKER = """
import sys, torch
from unsleep.core import Activations, Site
from unsleep.dictionaries.config import TrainConfig
from unsleep.dictionaries.parallel import joined, place
from unsleep.dictionaries.train import train
from unsleep.base import store
x = torch.load(sys.argv[1], weights_only=True)
fvus = []
with joined("cpu") as device:
    config = TrainConfig(features=64, k=4, tokens=6400, batch=128, dead_after=1000, aux_k=8)
    source = Activations(x, torch.zeros(len(x), dtype=torch.long), Site(3), "m", "p")
    d = train(source, config, device=device)
    if place()[0] == 0:
        store.write_tensors(sys.argv[2], d.tensors())
"""


def test_two_processes_learn_what_one_does(tmp_path: Path):
    torch.save(planted(600), tmp_path / "x.pt")
    results: list[dict[str, torch.Tensor]] = []
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    for count in (1, 2):
        out = str(tmp_path / f"{count}.safetensors")
        jobs = []
        for rank in range(count):
            own = {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            command = [sys.executable, "-c", WORKER, str(tmp_path / "x.pt"), out]
            jobs.append(subprocess.Popen(command, env={**os.environ, **own, "OMP_NUM_THREADS": "1"}))
        assert [job.wait(timeout=120) for job in jobs] == [0] * count
        results.append(store.read_tensors(out))
    for name, one in results[0].items():
        torch.testing.assert_close(results[1][name], one, rtol=2e-2, atol=2e-2)


# refused


def test_what_cannot_be_trained_on_is_refused():
    x = planted(300)
    for bad, words in (
        (x.index_fill(0, torch.tensor([5]), float("nan")), "NaN"),
        (torch.ones(50, 16), "constant"),
        (x[:1], "at least 2"),
    ):
        with pytest.raises(BadInput, match=words):
            train(acts(bad), SMALL)
    with pytest.raises(BadInput, match="same tokens"):
        train(acts(x), SMALL, target=acts(x[:200], Site(4)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": 65}, "k ≤ features"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"warmup": 1.5}, "share"),
        ({"architecture": "matryoshka", "groups": (0.5, 0.2)}, "sum to 1"),
        ({"unit_decoder": False}, "unit_decoder"),
        ({"sparsity": -1.0}, "sparsity"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, object], words: str):
    with pytest.raises(BadInput, match=words):
        replace(SMALL, **changes)  # type: ignore[arg-type]


def test_a_stream_of_activations_is_the_activations():
    x = planted(100)
    assert torch.equal(streamed(acts(x)).piece(0), x)
    assert len(in_pieces(x, (50, 50)).sample(10)) == 10
