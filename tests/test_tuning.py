"""Training loops: a loss that is no number ends a training by name."""

from __future__ import annotations

import pytest
import torch

from unsleep.core import BadInput
from unsleep.models.tuning import descend


def test_a_training_ends_at_a_loss_that_is_no_number() -> None:
    weight = torch.zeros(2, requires_grad=True)
    with pytest.raises(BadInput, match=r"fine-tune: the loss is nan at step 3 of 5; .* lower learning rate than 0\.01"):
        descend(
            [weight], lambda step: weight.sum() * (1.0 if step != 2 else float("nan")), 5, 0.01, lambda _: "fine-tune"
        )
    assert weight.isfinite().all()
