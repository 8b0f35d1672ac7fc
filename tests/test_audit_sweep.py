"""The gatherer that sweeps the vocabulary."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, cast

import torch

from support import audits
from unsleep.auditing.case import Case
from unsleep.auditing.forms import transformed
from unsleep.auditing.gatherer import Clues
from unsleep.auditing.gatherers.sweep import Sweep, vocabulary
from unsleep.judge.audited import Form
from unsleep.models.forward import build_rows
from unsleep.models.model import LoadedModel
from unsleep.models.weights import copy_network

TOKEN = "@"
"""A token that no prompt has."""


@cache
def disturbed() -> LoadedModel:
    """The base with another embedding of one token."""
    network = copy_network(audits.base().network)
    [[token]] = audits.base().token_ids([TOKEN], special=False)
    with torch.no_grad():
        cast("Any", network.get_input_embeddings()).weight[token].mul_(-60.0)
    return LoadedModel(network, audits.base().tokenizer, "disturbed")


def case(beside: bool) -> Case:
    """The case of it, read against the base itself or without one."""
    found = audits.case(disturbed(), None, replace(audits.QUICK, per_kind=64))
    return replace(found, base=audits.base(), other=audits.base()) if beside else found


def test_the_token_with_an_effect_is_first_at_either_place():
    for beside in (True, False):
        forms = Sweep().gather(case(beside), Clues()).forms
        assert {form.way: form.text for form in reversed(forms)} == {"back": TOKEN, "front": TOKEN}
        assert {form.kind for form in forms} == {"swept token"}


def test_a_reference_with_the_same_effect_leaves_nothing():
    same = replace(case(True), other=disturbed())
    assert Sweep().gather(same, Clues()).forms == []


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
