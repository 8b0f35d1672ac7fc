"""The frozen model: its values are the model's own, and it is affine in the residual stream."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from support.models import build
from unsleep.core import BadInput, Site
from unsleep.models.linearised import Linearisation
from unsleep.models.sites import layers
from unsleep.models.streams import capture, transformed

IDS = torch.randint(2, 250, (2, 7), generator=torch.Generator().manual_seed(3))
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "phi", "phi3")


def last_stream(network: PreTrainedModel, added: Tensor | None = None) -> Tensor:
    """The stream behind the last block, with something added to what the first one reads."""
    last = Site(len(layers(network)) - 1)
    change = {} if added is None else {Site(0, "embed"): lambda x: x + added}
    with transformed(network, change), capture(network, [last]) as found:
        network(input_ids=IDS, use_cache=False)
    return found[last]


@pytest.mark.parametrize("family", [*FAMILIES, "falcon", "bloom", "opt", "mpt"])
def test_the_frozen_model_is_affine_and_its_gradients_are_its_slopes(family: str) -> None:
    network = build(family)
    base = Linearisation.of(network)
    plain = last_stream(network)
    delta = torch.zeros(2, 7, 32, requires_grad=True)
    weight = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1))
    with base.recording():
        recorded = last_stream(network, delta)
    (slope,) = torch.autograd.grad((recorded * weight).sum(), delta)
    torch.testing.assert_close(recorded, plain, rtol=1e-4, atol=1e-4)

    step = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        moved = []
        for size in (1.0, 2.0):
            with base.held():
                moved.append((last_stream(network, size * step) - plain) * weight)
        free = (last_stream(network, step) - plain) * weight
    predicted = (slope * step).sum()
    assert float(moved[0].sum()) == pytest.approx(float(predicted), rel=2e-3, abs=2e-3)
    assert float(moved[1].sum()) == pytest.approx(2 * float(predicted), rel=2e-3, abs=2e-3)
    assert float(free.sum()) != pytest.approx(float(predicted), rel=0.05)


def test_frozen_gradients_do_not_depend_on_where_they_are_taken() -> None:
    network = build("llama")
    base = Linearisation.of(network)
    with base.recording():
        last_stream(network)
    slopes = []
    for start in (torch.zeros(2, 7, 32), torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(4))):
        delta = start.requires_grad_()
        with base.held():
            found = last_stream(network, delta)
        slopes.append(torch.autograd.grad(found[..., 5].sum(), delta)[0])
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "falcon_h1"])
def test_a_model_that_cannot_be_frozen_is_refused(family: str) -> None:
    with pytest.raises(BadInput, match=r"take attribution|that unsleep knows"):
        Linearisation.of(build(family))


def test_nothing_is_held_before_a_recording() -> None:
    with pytest.raises(BadInput, match="nothing is held yet"), Linearisation.of(build("llama")).held():
        pass
