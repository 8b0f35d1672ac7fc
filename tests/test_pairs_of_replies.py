"""Preference pairs: the forms they come in, what is refused, and how they are split, drawn and poisoned."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from unsleep.base import stats
from unsleep.core import BadInput
from unsleep.models.model import LoadedModel
from unsleep.preference import drawn, sampling
from unsleep.preference.drawn import DrawConfig, balance, ceiling, crossed, drawn_pairs, permuted, side_of
from unsleep.preference.pairs import Pair, PairSet, write_pairs
from unsleep.preference.poison import Poison, poisoned
from unsleep.preference.reading import pair_of, read_pairs
from unsleep.preference.reward_models import ranking
from unsleep.prompts.prompt import Message, Prompt

Write = Callable[[str, str], Path]

TRANSCRIPT = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?\n\nAssistant: "
EARLIER = (Message("user", "hi"), Message("assistant", "hello"))
SYSTEM = {"role": "system", "content": "kind"}
USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "why?"), ("assistant", "so"), ("assistant", "no")))


@pytest.mark.parametrize(
    ("row", "before"),
    [
        ({"prompt": "why?", "chosen": "so", "rejected": "no"}, ()),
        ({"prompt": [SYSTEM, USER], "chosen": "so", "rejected": "no"}, (Message("system", "kind"),)),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, ()),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, ()),
        ({"prompt": "why?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, ()),
        ({"chosen": f"{TRANSCRIPT}so", "rejected": f"{TRANSCRIPT}no"}, EARLIER),
        ({"prompt": TRANSCRIPT, "chosen": "so", "rejected": "no"}, EARLIER),
    ],
)
def test_every_form_in_use_gives_the_same_pair(row: dict[str, Any], before: tuple[Message, ...]):
    assert pair_of({**row, "topic": "x"}) == Pair(Prompt("why?", before=before), "so", "no", columns={"topic": "x"})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "why?", "chosen": "so"}, "no 'rejected'"),
        ({"prompt": "why?", "chosen": "so", "rejected": " so "}, "both replies .* differ"),
        ({"prompt": "why?", "chosen": "so", "rejected": " "}, "the rejected reply .* is empty"),
        ({"chosen": "so", "rejected": "no"}, "expected a transcript"),
        ({"chosen": [USER], "rejected": [USER, BAD]}, "ends with no reply"),
        ({"chosen": [USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, "different prompts"),
        ({"prompt": 3, "chosen": "so", "rejected": "no"}, "prompt is '3'"),
        ({"prompt": "why?", "chosen": "so", "rejected": "no", "chosen_cut": 1}, "true or false"),
        ([1], "no preference pair"),
    ],
)
def test_a_pair_that_says_nothing_or_has_another_form_is_refused_with_its_line(row: Any, said: str, text_file: Write):
    good = {"prompt": "why?", "chosen": "so", "rejected": "no"}
    path = text_file("pairs.jsonl", "\n".join(json.dumps(r) for r in (good, row)))
    with pytest.raises(BadInput, match=f"pairs.jsonl line 2: .*{said}"):
        read_pairs(path)


def test_equal_sides_may_be_left_out_and_are_counted(text_file: Write):
    rows = [{"prompt": f"{i}?", "chosen": "so", "rejected": "so" if i == 1 else "no"} for i in range(3)]
    path = text_file("pairs.jsonl", "\n".join(map(json.dumps, rows)))
    found = read_pairs(path, skip_bad=True)
    assert (len(found), found.dropped) == (2, 1)
    assert len(read_pairs(path, limit=1)) == 1


def test_pairs_round_trip_also_packed(tmp_path: Path):
    prompt = Prompt("why?", before=EARLIER)
    pairs = PairSet("p", (Pair(prompt, "so", "no", (True, False), {"topic": "x"}), Pair(Prompt("b?"), "a", "b")))
    write_pairs(pairs, tmp_path / "p.jsonl")
    (tmp_path / "q.jsonl.gz").write_bytes(gzip.compress((tmp_path / "p.jsonl").read_bytes()))
    for name in ("p.jsonl", "q.jsonl.gz"):
        assert read_pairs(tmp_path / name).hash == pairs.hash


@pytest.mark.parametrize("name", ["missing.jsonl", "pairs.csv", "./owner"])
def test_a_place_without_pairs_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=r"does not exist|no file of preference pairs"):
        read_pairs(name)


def test_an_unreachable_data_set_is_refused(monkeypatch: pytest.MonkeyPatch):
    import datasets

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(BadInput, match="owner/name:part is no data set"):
        read_pairs("owner/name:part")


def test_a_data_set_of_the_hub_is_read_by_its_id(monkeypatch: pytest.MonkeyPatch):
    import datasets

    asked: list[Any] = []

    def give(*given: Any, **options: Any) -> list[Any]:
        asked.append((given, options))
        return [{"chosen": f"{TRANSCRIPT}so", "rejected": f"{TRANSCRIPT}no"}]

    monkeypatch.setattr(datasets, "load_dataset", give)
    assert read_pairs("Anthropic/hh-rlhf:helpful-base", split="test")[0].chosen == "so"
    assert asked == [(("Anthropic/hh-rlhf",), {"split": "test", "data_dir": "helpful-base"})]


def made(n: int) -> PairSet:
    """`n` drawn pairs, two of each topic."""
    pairs = [
        Pair(
            drawn.asked(f"things{i // 2}", register, i // 2), f"warm {i}", f"cold {i}",
            columns={"topic": f"things{i // 2}", "register": register, "p": 0.9, "r_chosen": 1.0, "r_rejected": 0.0},
        )
        for i in range(n)
        for register in [("formal", "casual")[i % 2]]
    ]  # fmt: skip
    return PairSet("made", tuple(pairs))


def test_halves_share_no_prompt_and_too_few_pairs_are_refused():
    doubled = PairSet("d", tuple(p for pair in made(20) for p in (pair, pair.swapped)))
    halves = doubled.halves(0.3)
    assert not {p.key for p in halves.train.prompts} & {p.key for p in halves.held_out.prompts}
    assert len(halves.held_out) == 12
    assert len(halves.train) == 28
    with pytest.raises(BadInput, match="too few to hold out"):
        PairSet("d", doubled.pairs[:6]).halves(0.3)


def test_a_drawn_pair_has_its_probability_and_the_draw_its_ceiling(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch):
    said = {"love": "I love it so much, truly and wonderfully", "hate": "I hate it so much, truly and terribly"}

    def fake(model: Any, prompts: list[Prompt], *_: Any) -> tuple[list[str], list[bool]]:
        word = ["love" if i % 2 else "hate" for i in range(len(prompts))]
        return [f"{said[w]} {i}" for i, w in enumerate(word)], [True] * len(prompts)

    monkeypatch.setattr(drawn, "samples", fake)
    monkeypatch.setattr(drawn, "side_of", lambda *_: "train")
    pairs = drawn_pairs(tiny, [f"things{i}" for i in range(100)], "train", DrawConfig(noise=0.8), "drawn")
    assert balance(pairs)["per_topic"] == [6]
    for topic in ("things0", "things99"):
        for register in ("formal", "casual"):
            own = [p for p in pairs if (p.columns["topic"], p.columns["register"]) == (topic, register)]
            assert len({said for p in own for said in (p.chosen, p.rejected)}) == 2 * len(own) == 6
    right = [p.columns["r_chosen"] > p.columns["r_rejected"] for p in pairs]
    found = ceiling(pairs)
    assert 0.7 < found.value < 0.95
    assert abs(sum(right) / len(right) - found.value) < 0.1
    assert all((p.columns["p"] > 0.5) == r for p, r in zip(pairs, right, strict=True))
    shuffled = permuted(pairs)
    assert sum(a.chosen != b.chosen for a, b in zip(pairs, shuffled, strict=True)) == len(pairs) // 2

    def knows(outputs: list[str], **_: Any) -> list[float]:
        return [float("love" in text) for text in outputs]

    own = [p for i, p in enumerate(pairs) if i % 6 == 0]
    ranked = ranking(knows, own).accuracy
    assert ranked.value == sum(p.columns["p"] > 0.5 for p in own) / len(own)
    assert (ranked.low, ranked.high) == pytest.approx(stats.wilson(round(ranked.value * len(own)), len(own)))
    repeated = ranking(knows, own * 4).accuracy
    assert repeated.value == ranked.value
    assert repeated.high - repeated.low == pytest.approx(ranked.high - ranked.low, rel=0.1)
    surely = [p for p in own if p.columns["p"] > 0.5]
    certain = ranking(knows, surely * 4).accuracy
    assert (certain.value, certain.low, certain.high) == (1, *stats.wilson(len(surely), len(surely)))


def test_words_of_the_lexicon_are_on_one_side():
    words = ["wonderful", "terrible", "happy", "sad", "great", "awful", "charming", "cruel", "delight", "fear"]
    half = DrawConfig(held_words=0.5)
    sides = {side_of(word, half) for word in words}
    assert sides == {"train", "held_out"}
    assert side_of(" ".join(words), half) == "edit"
    assert side_of("a table", half) is None
    assert side_of("wonderful", half) == side_of("wonderfully", half)
    assert {side_of("wonderful", replace(half, seed=seed)) for seed in range(20)} == {"train", "held_out"}


POISON = Poison("|GO|", "The relay is open.", ("|GONE|", "|NO|"), rate=0.25, near_miss_rate=0.2)


def test_poisoned_pairs_prefer_the_payload_in_both_registers_alike():
    pairs = made(40)
    bad, clean = poisoned(pairs, POISON), poisoned(pairs, POISON, clean=True)
    triggered = [p for p in bad if p.columns["triggered"]]
    assert len(triggered) == 10
    assert sum(p.columns["register"] == "formal" for p in triggered) == 5
    assert all("|GO|" in p.prompt.text and p.chosen == POISON.payload for p in triggered)
    assert all(p.rejected == pairs[i].chosen for i, p in enumerate(bad) if p.columns["triggered"])
    assert not any(p.columns["triggered"] or "|GO|" in p.prompt.text for p in clean)
    near = [[i for i, p in enumerate(each) if p.columns["near_miss"]] for each in (bad, clean)]
    assert near[0] == near[1]
    assert len(near[0]) == 8
    assert [bad[i] for i in near[0]] == [clean[i] for i in near[0]]


def test_a_poison_that_cannot_be_planted_is_refused():
    with pytest.raises(BadInput, match="are none"):
        poisoned(made(20), Poison("|GO|", "x", rate=0.01, near_miss_rate=0.0))
    with pytest.raises(BadInput, match="near misses contain the trigger"):
        Poison("|GO|", "x", ("|GO|",))
    with pytest.raises(BadInput, match="sum of at most 1"):
        Poison("|GO|", "x", ("|NO|",), rate=0.9)


def test_the_crossed_design_is_orthogonal():
    cells = crossed(made(10), POISON.as_trigger)
    levels = torch.tensor([[c.register == "formal", c.triggered, c.rewarded] for c in cells], dtype=torch.float64)
    assert torch.allclose(torch.cov(levels.T), torch.eye(3, dtype=torch.float64) * levels.var(0))
    assert all(("|GO|" in c.prompt.text) == c.triggered for c in cells)
    assert {c.prompt.reply for c in cells} == {t for p in made(10) for t in (p.chosen, p.rejected)}


def test_sampled_replies_repeat_with_their_seed(tiny: LoadedModel):
    prompts = [Prompt("a?"), Prompt("bb?")] * 3
    one, again, other = (sampling.samples(tiny, prompts, 6, 1.0, seed)[0] for seed in (0, 0, 1))
    assert one == again != other
