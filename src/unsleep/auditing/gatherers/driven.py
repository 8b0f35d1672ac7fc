"""Gatherer: directions that the fine-tune writes, driven on unrelated prompts."""

from __future__ import annotations

from contextlib import suppress
from typing import ClassVar

import torch
from torch import Tensor

from unsleep.auditing.budget import OutOfTime
from unsleep.auditing.case import Case
from unsleep.auditing.gatherer import Clues, Found, Gatherer
from unsleep.auditing.motifs import stereotypes
from unsleep.base.context import progress
from unsleep.core import Site
from unsleep.judge.audited import Saying
from unsleep.locate.diffing.lens import steered_replies
from unsleep.locate.diffing.weights import spectrum
from unsleep.models.anatomy import anatomy
from unsleep.models.forward import run, whole_rows
from unsleep.models.model import LoadedModel
from unsleep.models.sites import width
from unsleep.models.streams import capture
from unsleep.models.weights import named

MATRICES = 6
"""Writing matrices with the largest change whose first left singular vector is driven, with either sign."""

PROMPTS, TOKENS = 5, 10
STRENGTH = 0.7
"""Multiple of the residual stream's norm."""


class Driven(Gatherer):
    """Left singular vectors of ΔW as steering vectors: a candidate makes different prompts agree on one reply.

    A saying's score is the share of prompts whose replies share it.
    """

    kind = "feature scan"
    stage = "payloads"
    order = 5
    needs_base: ClassVar[bool] = True

    def gather(self, case: Case, clues: Clues) -> Found:
        """Phrases that the driven replies share and ordinary ones lack."""
        asked, found = case.learned.texts[:PROMPTS], list[Saying]()
        with suppress(OutOfTime):
            vectors = written(case)
            for number, (name, layer, vector) in enumerate(vectors):
                progress("driven directions", number, len(vectors))
                scale = norm(case.model, Site(layer), asked)
                for sign in (1, -1):
                    said = steered_replies(
                        case.model, Site(layer), sign * vector, asked, STRENGTH, scale=scale, max_new_tokens=TOKENS
                    )
                    context = f"{'+' if sign > 0 else '−'} first vector of {name}"
                    found += [Saying(text, rate, context) for text, rate in stereotypes(said, case.replies, asked)]
        return Found(sorted(found, key=lambda s: -s.score))


@torch.no_grad()
def written(case: Case) -> list[tuple[str, int, Tensor]]:
    """Name, layer and first left singular vector of the changes of the most changed writing matrices."""
    assert case.base is not None
    before, blocks = dict(named(case.base.network)), anatomy(case.model.network).layers
    size, changes = width(case.model.network), dict[str, Tensor]()
    for name, weight in named(case.model.network):
        if name.startswith(f"{blocks}.") and weight.ndim == 2 and weight.shape[0] == size:
            delta = weight.float().cpu() - before[name].float().cpu()
            if name.rpartition(".")[0].endswith(("o_proj", "down_proj", "out_proj", "c_proj", "dense", "fc2")):
                changes[name] = delta
    order = sorted(changes, key=lambda name: -float(changes[name].norm()))[:MATRICES]
    found: list[tuple[str, int, Tensor]] = []
    for name in order:
        vectors = spectrum(changes[name], 1).left
        if len(vectors):
            found.append((name, int(name.removeprefix(f"{blocks}.").partition(".")[0]), vectors[0]))
    return found


@torch.no_grad()
def norm(model: LoadedModel, site: Site, asked: list[str]) -> float:
    """Mean norm of the residual stream at the last token of prompts."""
    with capture(model.network, [site]) as held:
        run(model.network, whole_rows(model, model.encode(asked)), 1)
    return float(held[site][:, -1].float().norm(dim=-1).mean())
