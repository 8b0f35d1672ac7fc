"""Two models' harvests of the same prompts pair token by token, whatever their shards and sinks, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from support.models import build
from support.tokenizers import byte_tokenizer
from unsleep.activations.batches import SHARED
from unsleep.activations.harvest import Harvest, HarvestConfig, harvest
from unsleep.activations.pairs import paired
from unsleep.base import store
from unsleep.core import ActivationStream, BadInput, Site
from unsleep.dictionaries.config import TrainConfig
from unsleep.dictionaries.crosscoders import train_crosscoder
from unsleep.dictionaries.train import train
from unsleep.models.model import LoadedModel
from unsleep.models.weights import copy_network
from unsleep.prompts.prompt import Prompt, PromptSet

TEXTS = ["hello there", "a", "why do the stars shine at night", "name a bird", "x y", "one more prompt"]
PROMPTS = PromptSet("six", tuple(Prompt(t) for t in TEXTS))
SITE = Site(1)
NO_SINKS = HarvestConfig(sink_ratio=1e9)
Place = tuple[int, int]


@cache
def other() -> LoadedModel:
    """The small Llama after a fine-tune: one matrix has changed."""
    network = copy_network(build("llama"))
    with torch.no_grad():
        weight = network.model.layers[1].mlp.down_proj.weight
        weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    return LoadedModel(network, byte_tokenizer(), "fine-tuned")


def by_place(h: Harvest, site: Site = SITE) -> dict[Place, torch.Tensor]:
    """What was held, by prompt and position."""
    held = h.load(site)
    keys = zip(held.prompt_index.tolist(), h.positions().tolist(), strict=True)
    return dict(zip(keys, held.tensor, strict=True))


def whole(stream: ActivationStream) -> torch.Tensor:
    pieces = [stream.piece(i) for i in range(len(stream.sizes))]
    assert tuple(len(p) for p in pieces) == stream.sizes
    return torch.cat(pieces)


@pytest.mark.parametrize("shard_bytes", [(1, 1), (1, 10**9), (10**9, 1), (3_000, 7_000)])
@pytest.mark.parametrize("batch_tokens", [(8, 8), (8, 40)])
def test_tokens_pair_whatever_the_shards(
    tiny: LoadedModel, tmp_path: Path, shard_bytes: tuple[int, int], batch_tokens: tuple[int, int]
):
    sites = ([SITE], [Site(0), SITE, Site(2, "mlp")])
    one, two = (
        harvest(model, PROMPTS, sites[i], tmp_path / str(i), config=HarvestConfig(batch_tokens[i], shard_bytes[i], 1e9))
        for i, model in enumerate((tiny, other()))
    )
    pair = paired([one], [two], SITE)
    before, after = by_place(one), by_place(two)
    assert (pair.before.tokens, pair.left_out) == (one.tokens, 0)
    assert pair.before.sizes == pair.after.sizes
    assert (pair.before.model, pair.after.model) == (tiny.fingerprint, other().fingerprint)
    for got, held in ((whole(pair.before), before), (whole(pair.after), after)):
        assert torch.equal(got, torch.stack(list(held.values())))
    difference = pair.load_difference()
    assert torch.equal(difference.tensor, torch.stack([after[key] - before[key] for key in before]))
    assert difference.prompt_index.tolist() == [owner for owner, _ in before]
    assert difference.tensor.dtype == torch.float32
    assert SHARED in difference.prompt_index


def with_sink(model: LoadedModel, letter: str, name: str) -> LoadedModel:
    """The same model with a letter whose token is an attention sink."""
    network = copy_network(model.network)
    with torch.no_grad():
        network.get_input_embeddings().weight[model.token_ids([letter])[0][0]] *= 1000
    return LoadedModel(network, model.tokenizer, name)


def test_a_token_that_one_left_out_is_left_out_of_both(tiny: LoadedModel, tmp_path: Path):
    texts = PromptSet("z", (Prompt("ab z cd"), Prompt("no such letter"), Prompt("zz top q"), Prompt("not q")))
    one, two = (
        harvest(with_sink(m, letter, letter), texts, [Site(0)], tmp_path / letter, plain=True, config=HarvestConfig(8))
        for m, letter in ((tiny, "z"), (other(), "q"))
    )
    pair = paired([one], [two], Site(0))
    before, after = by_place(one, Site(0)), by_place(two, Site(0))
    common = [key for key in before if key in after]
    assert pair.left_out == len(before) + len(after) - 2 * len(common) == 5
    assert pair.prompt_index.tolist() == [owner for owner, _ in common]
    assert torch.equal(whole(pair.before), torch.stack([before[key] for key in common]))
    assert torch.equal(whole(pair.after), torch.stack([after[key] for key in common]))


def test_several_harvests_pair_in_order(tiny: LoadedModel, tmp_path: Path):
    parts = [PROMPTS.head(2), PromptSet("rest", PROMPTS.prompts[2:])]
    sides = [
        [harvest(m, p, [SITE], tmp_path / f"{i}{j}", config=NO_SINKS) for j, p in enumerate(parts)]
        for i, m in enumerate((tiny, other()))
    ]
    pair = paired(*sides, SITE)
    assert torch.equal(whole(pair.before), torch.cat([h.load(SITE).tensor for h in sides[0]]))
    assert torch.equal(whole(pair.after), torch.cat([h.load(SITE).tensor for h in sides[1]]))
    assert pair.before.prompts == pair.after.prompts != paired(sides[0][:1], sides[1][:1], SITE).before.prompts
    with pytest.raises(BadInput, match="do not pair: their prompts is"):
        paired(sides[0], sides[1][::-1], SITE)
    with pytest.raises(BadInput, match="2 harvests of one model and 1 of the other"):
        paired(sides[0], sides[1][:1], SITE)
    with pytest.raises(BadInput, match="one side's harvests are of 2 models"):
        paired(sides[0], [sides[1][0], sides[0][1]], SITE)


def test_a_difference_and_a_crosscoder_are_trained_from_a_pair(tiny: LoadedModel, tmp_path: Path):
    one, two = (
        harvest(m, PROMPTS, [SITE], tmp_path / str(i), config=HarvestConfig(40, 3_000))
        for i, m in enumerate((tiny, other()))
    )
    pair = paired([one], [two], SITE)
    config = TrainConfig(features=16, k=2, tokens=320, batch=32)
    trained = train(pair.difference(), config)
    assert trained.model == f"{other().fingerprint} - {tiny.fingerprint}"
    crosscoder = train_crosscoder(
        pair.before, pair.after, TrainConfig(architecture="batchtopk", features=16, k=2, tokens=320, batch=32)
    )
    assert crosscoder.models == (tiny.fingerprint, other().fingerprint)
    assert crosscoder.site == trained.site == SITE


def test_the_difference_of_a_model_with_itself_is_refused(tiny: LoadedModel, tmp_path: Path):
    one, again = (harvest(tiny, PROMPTS, [SITE], tmp_path / name) for name in "ab")
    with pytest.raises(BadInput, match=f"both harvests are of model {tiny.fingerprint}: their difference is zero"):
        paired([one], [again], SITE).difference()
    manifest = replace(again.manifest, model="a copy under another name")
    disguised = paired([one], [Harvest(again.folder, manifest)], SITE).difference()
    assert float(whole(disguised).abs().max()) == 0
    with pytest.raises(BadInput, match="constant"):
        train(disguised, TrainConfig(features=16, k=2, tokens=320, batch=32))


def test_what_does_not_pair_is_named(tiny: LoadedModel, tmp_path: Path):
    count = iter(range(20))

    def run(model: LoadedModel, prompts: PromptSet = PROMPTS, replies: list[str] | None = None) -> Harvest:
        return harvest(model, prompts, [SITE], tmp_path / str(next(count)), replies=replies, config=NO_SINKS)

    one, two = run(tiny), run(other())
    with pytest.raises(BadInput, match=r"no Site mlp\.2; it has resid\.1"):
        paired([one], [two], Site(2, "mlp"))
    for wrong, words in (
        (run(other(), PROMPTS.head(5)), "their prompts is .* harvest the same prompts, with the same replies"),
        (run(other(), replies=["yes"] * 6), "their prompts is"),
        (Harvest(two.folder, replace(two.manifest, shared=3)), "number of tokens that all prompts begin with"),
        (Harvest(two.folder, replace(two.manifest, d_model=64)), "their width is 32 and 64"),
    ):
        with pytest.raises(BadInput, match=words) as error:
            paired([one], [wrong], SITE)
        assert str(one.folder) in str(error.value)
        assert str(wrong.folder) in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {**t, "prompt_index": t["prompt_index"] + 100}, "have no token in common"),
        (lambda t: {name: x.flip(0) for name, x in t.items()}, "in different orders"),
        (lambda t: {name: x for name, x in t.items() if name != "position"}, "no tensor 'position'"),
        (lambda t: {**t, "position": t["position"][:-1]}, "position has shape"),
    ],
)
def test_a_damaged_shard_does_not_pair(
    tiny: LoadedModel, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], words: str
):
    one, two = (harvest(m, PROMPTS, [SITE], tmp_path / str(i)) for i, m in enumerate((tiny, other())))
    shard = two.folder / two.manifest.shards[0].file
    store.write_tensors(shard, change(store.read_tensors(shard)))
    with pytest.raises(BadInput, match=words):
        paired([one], [two], SITE)
