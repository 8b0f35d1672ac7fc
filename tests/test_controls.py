"""The control of an edit is like it in all but the features that it removes."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.dictionaries import small_dictionary
from unsleep.core import BadInput, Site
from unsleep.interventions.features import Edit, ErrorRule
from unsleep.interventions.intervention import operation
from unsleep.judge.controls import Firing, firing, matched_random

N = 60


def random_fires(seed: int, n: int = N) -> Firing:
    make = torch.Generator().manual_seed(seed)
    rate = 10 ** (-4 * torch.rand(n, generator=make))
    return Firing(rate, torch.rand(n, generator=make) + 0.1)


def edit_of(removed: list[int]) -> Edit:
    return Edit(Site(1), small_dictionary(N), tuple(removed), "drop")


REMOVED = st.lists(st.integers(0, N - 1), min_size=1, max_size=N // 2, unique=True)


@given(REMOVED, st.integers(0, 99))
def test_a_control_removes_as_many_other_features_each_once(removed: list[int], seed: int):
    edit = edit_of(removed)
    control = matched_random(edit, random_fires(seed), seed)
    assert len(control.removed) == len(set(control.removed)) == len(removed)
    assert set(control.removed).isdisjoint(removed)
    assert dataclasses.replace(control, removed=edit.removed) == edit


@given(REMOVED, st.integers(0, 99))
def test_a_control_is_the_same_for_a_seed(removed: list[int], seed: int):
    one, again = (matched_random(edit_of(removed), random_fires(0), seed).removed for _ in range(2))
    assert one == again
    assert len({matched_random(edit_of(removed), random_fires(0), s).removed for s in range(8)}) > 1


def test_a_control_fires_more_alike_than_features_taken_at_random():
    fires = random_fires(1)
    rates, strengths = fires.rate.log(), fires.strength.log()
    edit = edit_of(list(range(0, 24, 2)))
    make = torch.Generator().manual_seed(0)
    kept = torch.tensor([i for i in range(N) if i not in edit.removed])
    removed = torch.tensor(edit.removed)
    for measure in (rates, strengths):
        matched, anyhow = [], []
        for seed in range(30):
            control = torch.tensor(matched_random(edit, fires, seed).removed)
            drawn = kept[torch.randperm(len(kept), generator=make)[: len(removed)]]
            matched.append(float((measure[removed] - measure[control]).abs().mean()))
            anyhow.append(float((measure[removed] - measure[drawn]).abs().mean()))
        assert sum(matched) < 0.6 * sum(anyhow)


def test_a_feature_with_a_double_is_matched_by_it_as_often_as_it_stands_to_choice():
    """Feature 1 fires exactly as feature 0 does, and half of the kept features stand to choice each time."""
    fires = random_fires(2)
    rate, strength = fires.rate.clone(), fires.strength.clone()
    rate[1], strength[1] = rate[0], strength[0]
    hits = sum(matched_random(edit_of([0]), Firing(rate, strength), s).removed == (1,) for s in range(200))
    assert 70 <= hits <= 130


def test_features_that_never_fire_are_matched_by_others_that_never_fire():
    rate, strength = random_fires(3)
    rate[:20], strength[:20] = 0.0, 0.0
    control = matched_random(edit_of([0, 1, 2]), Firing(rate, strength))
    assert all(3 <= i < 20 for i in control.removed)


def test_as_many_as_are_kept_can_be_matched_and_no_more():
    control = matched_random(edit_of(list(range(N // 2))), random_fires(0))
    assert sorted(control.removed) == list(range(N // 2, N))
    with pytest.raises(BadInput, match=f"31 of {N} features are removed"):
        matched_random(edit_of(list(range(31))), random_fires(0))


@pytest.mark.parametrize("rule", get_args(ErrorRule))
def test_an_empty_edit_is_its_own_control(rule: ErrorRule):
    """Where no feature is removed, what the rule does to the error is all that a control can share."""
    empty = dataclasses.replace(edit_of([]), error=rule)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    wanted = empty.dictionary.rebuild(x) if rule == "drop" else x
    for seed in range(4):
        control = matched_random(empty, random_fires(seed), seed)
        assert control == empty
        torch.testing.assert_close(operation(control, torch.float32, "cpu")(x), wanted)
    assert not torch.allclose(empty.dictionary.rebuild(x), x, atol=0.1)


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_codes_in_pieces_are_those_of_all_tokens_at_once(size: int):
    dictionary, x = small_dictionary(20, 6, 5), torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    pieces = list(dictionary.encode_in_pieces(x, size))
    assert [i for part, _ in pieces for i in range(50)[part]] == list(range(50))
    rebuilt = torch.cat([dictionary.decode_sparse(code) for _, code in pieces])
    torch.testing.assert_close(rebuilt, dictionary.decode_sparse(dictionary.encode_sparse(x)))


def test_firing_equals_a_dense_count():
    dictionary = small_dictionary(20, 6, 5)
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    pre = (x - dictionary.b_dec) @ dictionary.W_enc + dictionary.b_enc
    dense = torch.zeros(50, 20)
    for row, values in zip(dense, pre, strict=True):
        for i in sorted(range(20), key=lambda i, values=values: -float(values[i]))[:5]:
            row[i] = max(0.0, float(values[i]))
    got = firing(dictionary, x)
    torch.testing.assert_close(got.rate, (dense > 0).float().mean(0))
    for i in range(20):
        fired = dense[:, i][dense[:, i] > 0]
        torch.testing.assert_close(got.strength[i], fired.mean() if len(fired) else torch.tensor(0.0))
    assert float(got.rate.sum()) <= 5


def test_firing_on_no_token_is_refused():
    with pytest.raises(BadInput, match=r"0 tokens at resid\.1; expected at least 1"):
        firing(small_dictionary(), torch.zeros(0, 4))


def test_features_that_never_fire_have_no_strength():
    dictionary = small_dictionary(6, 4, 6)
    silent = dataclasses.replace(dictionary, b_enc=torch.full((6,), -1e6))
    got = firing(silent, torch.ones(3, 4))
    assert got.rate.tolist() == got.strength.tolist() == [0.0] * 6
