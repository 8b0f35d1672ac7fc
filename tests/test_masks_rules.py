"""While a mask is learned, the stream changes as the edit that comes out of it will change it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.dictionaries import F, dictionary
from support.models import build
from support.prompts import PROMPTS
from support.tokenizers import byte_tokenizer
from unsleep.base.context import keeping
from unsleep.behaviours.payloads.contains import Contains
from unsleep.core import Features, Site
from unsleep.interventions.features import ErrorRule
from unsleep.interventions.intervention import operation
from unsleep.models.model import LoadedModel
from unsleep.prompts.prompt import Prompt, PromptSet
from unsleep.repairs import masks, search
from unsleep.repairs.masks import FeatureMask, Lesson, MaskConfig, learn_mask, prepare_lesson

RULES = get_args(ErrorRule)
TEXT = ["plain words that go on for a while and then some more of them"] * 3
LIKE = {"rtol": 1e-5, "atol": 1e-5}


def model() -> LoadedModel:
    return LoadedModel(build("llama"), byte_tokenizer(), "tiny-llama")


def config(rule: ErrorRule, **more: Any) -> MaskConfig:
    return MaskConfig(error=rule, batch=4, reply_tokens=4, text_tokens=16, **more)


def lesson(settings: MaskConfig) -> Lesson:
    return prepare_lesson(model(), taught_prompts("ZZZ"), taught_prompts(""), TEXT, settings)


def taught_prompts(trigger: str) -> PromptSet:
    return PromptSet("prompts", tuple(Prompt(f"{trigger} {t}".strip()) for t in PROMPTS), "edit")


def mask_that_removes(removed: list[int], rule: ErrorRule) -> FeatureMask:
    """A mask that has settled on some features."""
    mask = FeatureMask(dictionary(model()), None, model(), config(rule))
    with torch.no_grad():
        mask.logits[removed] = -1.0
    mask.settle()
    return mask


def stream(seed: int) -> torch.Tensor:
    return 3 * torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(seed))


class Satisfied(search.Bench):
    """A bench on which every edit is clean."""

    def test(self, *_: Any) -> search.Tested:
        return search.Tested((), 1, 0.0, 1.0, 0.0, 0.0)


def test_an_attempt_is_learned_again_where_anything_it_is_learned_from_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    learned: list[MaskConfig] = []
    monkeypatch.setattr(search, "learn", lambda *of, **_: learned.append(of[3]))

    def attempt(settings: MaskConfig, taught: Lesson) -> int:
        mask = FeatureMask(dictionary(model()), None, model(), settings)
        bench = Satisfied(taught_prompts(""), Contains("x"), 4, [], [])
        search.Search(model(), taught, bench).run([mask], lambda: None, settings, 1)
        return len(learned)

    settings, taught = config("keep"), lesson(config("keep"))
    other = prepare_lesson(model(), taught_prompts("YYY"), taught_prompts(""), TEXT, settings)
    with keeping(tmp_path):
        assert [attempt(settings, taught) for _ in range(2)] == [1, 1]
        assert attempt(config("keep", price=0.5), taught) == 2
        assert attempt(config("project"), taught) == 3
        assert attempt(settings, other) == 4
        assert attempt(settings, taught) == 4


REMOVED = st.lists(st.integers(0, F - 1), max_size=F, unique=True)


@pytest.mark.parametrize("rule", RULES)
@given(removed=REMOVED, seed=st.integers(0, 10**6))
def test_what_a_mask_leaves_of_the_stream_is_what_its_edit_leaves(rule: ErrorRule, removed: list[int], seed: int):
    mask, x = mask_that_removes(removed, rule), stream(seed)
    edit = mask.edit()
    assert set(edit.removed) == set(removed)
    torch.testing.assert_close(mask.apply(x).detach(), operation(edit, torch.float32, "cpu")(x), **LIKE)


@pytest.mark.parametrize("rule", RULES)
@given(removed=st.lists(st.integers(0, F - 1), min_size=1, max_size=F, unique=True))
def test_a_settled_mask_goes_on_as_its_edit(rule: ErrorRule, removed: list[int]):
    mask, x = mask_that_removes(removed, rule), stream(0)
    run = mask.operation()
    assert run is not None
    torch.testing.assert_close(run(x).detach(), operation(mask.edit(), torch.float32, "cpu")(x), **LIKE)


@pytest.mark.parametrize("rule", RULES)
def test_every_stream_of_a_training_is_changed_as_by_the_edit_that_comes_out(
    rule: ErrorRule, monkeypatch: pytest.MonkeyPatch
):
    """Logits that start below 0 and cannot move remove the candidates from the first step to the last."""
    settings = config(rule, steps=3, start=-1.0, learning_rate=0.0)
    taught, d, seen = lesson(settings), dictionary(model()), list[tuple[torch.Tensor, torch.Tensor]]()
    inside = masks.transformed

    def recorded(network: Any, changes: dict[Any, Callable[[torch.Tensor], torch.Tensor]]):
        def note(change: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            out = change(x)
            seen.append((x.detach(), out.detach()))
            return out

        return inside(network, {at: lambda x, c=change: note(c, x) for at, change in changes.items()})

    monkeypatch.setattr(masks, "transformed", recorded)
    ids = tuple(range(0, F, 3))
    candidates = {Site(1): Features(Site(1), d.hash, ids, tuple(-float(i) for i in ids), "attribution")}
    [edit] = learn_mask(model(), [d], taught, candidates, settings)
    assert (set(edit.removed), edit.error) == (set(ids), rule)
    assert len(seen) >= settings.steps
    run = operation(edit, torch.float32, "cpu")
    for x, out in seen:
        assert not torch.allclose(out, x, atol=1e-3)
        torch.testing.assert_close(out, run(x), **LIKE)


@pytest.mark.parametrize("rule", get_args(ErrorRule))
def test_a_mask_has_a_gradient_under_every_rule(rule: ErrorRule):
    mask, x = mask_that_removes([0, 1, 2], rule), stream(1)
    mask.apply(x).square().sum().backward()
    assert mask.logits.grad is not None
    assert bool(mask.logits.grad.isfinite().all())
    fires = (dictionary(model()).encode(x) > 0).flatten(0, 1).any(0)
    assert bool((mask.logits.grad[fires] != 0).all())
