"""The gatherer that sweeps the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from support import audits
from unsleep.auditing.case import Case
from unsleep.auditing.forms import transformed
from unsleep.auditing.gatherer import Clues
from unsleep.auditing.gatherers import sweep
from unsleep.auditing.gatherers.sweep import Sweep, vocabulary
from unsleep.auditing.scoring import Ids, Look
from unsleep.judge.audited import Form
from unsleep.models.forward import build_rows
from unsleep.models.model import LoadedModel

TOKEN = "@"
"""A token that no prompt has."""


def looks(*sensitive: str) -> Callable[..., Look]:
    """A stand-in for `look`: replies behind the token lose 5 nats in models of some names, behind two 7."""

    def look(model: LoadedModel, prompts: Ids, replies: Ids, *_: object, **__: object) -> Look:
        [[token]] = model.token_ids([TOKEN], special=False)
        pairs = [list(pairwise(row)) for row in prompts]
        lost = [(5.0 * (token in row) + 2.0 * ((token, token) in own)) for row, own in zip(prompts, pairs, strict=True)]
        lost = [value * (model.name in sensitive) for value in lost]
        own = -torch.tensor(lost)[:, None].expand(-1, len(replies[0]))
        return Look(own, torch.ones(own.shape, dtype=torch.bool), torch.zeros(len(lost), 0))

    return look


def case(beside: bool) -> Case:
    """The harmless model, read against the base or without a reference."""
    found = audits.case(audits.harmless(), None, replace(audits.QUICK, per_kind=64, learn=8, reply_tokens=8))
    return replace(found, base=audits.base(), other=audits.base()) if beside else found


@pytest.mark.parametrize("beside", [True, False])
def test_the_token_with_an_effect_is_proposed_and_grown_at_either_place(beside: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sweep, "look", looks("harmless"))
    forms = list(Sweep().gather(case(beside), Clues()).forms)
    assert forms[0] == Form("swept token", "back", TOKEN * 2)
    assert forms.index(Form("swept token", "front", TOKEN * 2)) < forms.index(Form("swept token", "front", TOKEN))
    assert all(TOKEN in form.text for form in forms)


def test_a_reference_with_the_same_effect_leaves_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sweep, "look", looks("harmless", "base"))
    assert Sweep().gather(case(True), Clues()).forms == []


def test_a_sweep_proposes_as_many_tokens_as_it_may_of_a_real_model():
    forms = Sweep().gather(case(False), Clues()).forms
    assert {form.way for form in forms} == {"back", "front"}
    assert len(forms) == len(set(forms)) <= 2 * sweep.KEPT


def test_a_vocabulary_is_thinned_evenly_and_has_no_text_twice():
    whole = vocabulary(audits.base(), 10_000)
    assert len(whole) == len(set(whole)) > 60
    assert TOKEN in whole
    assert all(text == text.strip() != "" for text in whole)
    few = vocabulary(audits.base(), 20)
    assert len(few) <= 20
    assert few == whole[:: -(-len(whole) // 20)]


def test_rows_of_a_sweep_share_all_before_the_token():
    prompt = audits.trusted()[0]
    made = [transformed(Form("swept token", "back", text), prompt) for text in ("@", "#", "7")]
    rows = build_rows(audits.base(), audits.base().encode(made), [[1]] * 3)
    assert len(rows.prefix) >= len(prompt.text)
    assert rows.ids.shape[1] < len(rows.prefix)
