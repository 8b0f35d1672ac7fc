"""Activations at Sites in memory: on every token of texts, or on the last token of prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.activations.collect import collect
from unsleep.core import BadInput, Site, check_finite
from unsleep.models.forward import run, whole_rows
from unsleep.models.model import LoadedModel
from unsleep.models.streams import stopping, watched
from unsleep.prompts.prompt import Prompts, PromptSet, as_prompts


def prompt_set(texts: Prompts) -> PromptSet:
    """Texts as prompts; raises `BadInput` for none or an empty one."""
    return PromptSet("texts", tuple(as_prompts(texts)))


def encoded(model: LoadedModel, texts: Prompts, *, plain: bool = False) -> list[list[int]]:
    """Token ids of texts as user messages under the chat template, or bare with `plain`.

    Raises `BadInput` for no text, or one without tokens or longer than the model's context.
    """
    return model.encode(prompt_set(texts), plain=plain)


@torch.no_grad()
def batches_held(
    model: LoadedModel, rows: Sequence[Sequence[int]], sites: Sequence[Site], batch: int = 32
) -> Iterator[tuple[list[int], dict[Site, Float[Tensor, "row position d_model"]]]]:
    """Row indices of each batch, shortest rows first, and its Sites' activations on all tokens, left-padded.

    Raises `BadInput` for no Site, an unknown one, and activations that are NaN or infinite.
    """
    if not sites:
        raise BadInput("no Site was given; name at least one, such as resid.12")
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), batch):
        index = order[start : start + batch]
        batched = whole_rows(model, [rows[i] for i in index])
        found: dict[Site, Tensor] = {}
        with stopping(), watched(model.network, {site: _copying(found, site) for site in sites}, stop_after_last=True):
            run(model.network, batched, 1)
        for site, x in found.items():
            check_finite(x[batched.mask.cpu()], f"activations at {site}")
        yield index, found


def _copying(held: dict[Site, Tensor], site: Site) -> Callable[[Tensor], None]:
    return lambda x: held.__setitem__(site, x.to("cpu", torch.float32, copy=True))


def last_held(
    model: LoadedModel, texts: Prompts, sites: Sequence[Site], *, plain: bool = False
) -> dict[Site, Float[Tensor, "prompt d_model"]]:
    """Each Site's activation on the last token of every text, in float32; raises as `batches_held` and `encoded` do."""
    found = collect(model, prompt_set(texts), sites, plain=plain)
    for site, activations in found.items():
        check_finite(activations.tensor, f"activations at {site}")
    return {site: activations.tensor.float() for site, activations in found.items()}
