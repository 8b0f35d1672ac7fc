"""Gatherer: a sparse dictionary of activation differences, whose rare and strong features are driven.

A dictionary of Δh is a diff-SAE; the norm of Δh has a long tail, which may carry the behaviour (`Pair.difference`).
"""

from __future__ import annotations

from contextlib import suppress
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.activations.collect import collect
from unsleep.activations.held import prompt_set
from unsleep.auditing.budget import OutOfTime
from unsleep.auditing.case import Case
from unsleep.auditing.gatherer import Clues, Found, Gatherer
from unsleep.auditing.motifs import stereotypes
from unsleep.base.context import progress
from unsleep.core import Activations, Site
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.config import TrainConfig
from unsleep.dictionaries.train import train
from unsleep.judge.audited import Saying
from unsleep.locate.diffing.lens import steered_replies
from unsleep.models.sites import layers
from unsleep.prompts import sets

DEPTH = 0.6
"""Layer at which it is read, as a share of the depth."""

TEXTS, LENGTH = 160, 200
"""Unrelated passages that the dictionary is trained on, and the characters that are read of each."""

TRAINING = TrainConfig(features=1024, k=8, tokens=100_000, batch=1024, sink_ratio=1e9)
"""No token counts as an attention sink: the long tail of Δh may carry the behaviour."""

RARE = 0.02
"""Largest share of tokens on which a rare feature is active."""

FEATURES, PROMPTS, TOKENS = 6, 5, 10
STRENGTH = 0.7
"""Multiple of the residual stream's norm."""


class Differences(Gatherer):
    """Features of Δh to the reference that are active on few tokens and write much there, as steering vectors.

    A saying's score is the share of prompts whose replies share it.
    """

    kind = "difference dictionary"
    stage = "payloads"
    order = 6
    needs_base: ClassVar[bool] = True
    share: ClassVar[float] = 2.0

    def gather(self, case: Case, clues: Clues) -> Found:
        """Phrases that the driven replies share and ordinary ones lack; the features' densities as facts."""
        own, delta = differences(case)
        if not delta.tensor.any():
            return Found()
        coder = train(delta, TRAINING, device=case.model.device)
        asked, found = case.learned.texts[:PROMPTS], list[Saying]()
        scale, chosen = float(own.tensor.float().norm(dim=1).mean()), rare(coder, delta.tensor)
        with suppress(OutOfTime):
            for number, (feature, density) in enumerate(chosen):
                progress("features of the difference", number, len(chosen))
                vector = coder.decoder[feature].float()
                said = steered_replies(
                    case.model, delta.site, vector, asked, STRENGTH, scale=scale, max_new_tokens=TOKENS
                )
                context = f"feature {feature} of Δh at {delta.site}, active on {density:.2%} of tokens"
                found += [Saying(text, rate, context) for text, rate in stereotypes(said, case.replies, asked)]
        facts = {"site": str(delta.site), "rare features": len(chosen)}
        return Found(sorted(found, key=lambda s: -s.score), facts=facts)


def differences(case: Case) -> tuple[Activations, Activations]:
    """The model's activations on unrelated passages, and their difference to the reference's; no first tokens."""
    assert case.reference is not None
    depth = len(layers(case.model.network))
    site = Site(min(depth - 1, round(DEPTH * depth)))
    passages = prompt_set([text[:LENGTH] for text in sets.plain_text("edit")[:TEXTS]])
    held = [
        collect(model, passages, [site], position="all", plain=True)[site] for model in (case.model, case.reference)
    ]
    index = held[0].prompt_index
    later = torch.cat([torch.zeros(1, dtype=torch.bool), index[1:] == index[:-1]])
    own, other = (each.tensor.float()[later] for each in held)
    where = (index[later], site, case.model.fingerprint, passages.hash)
    return Activations(own, *where), Activations(own - other, *where)


@torch.no_grad()
def rare(coder: Coder, x: Float[Tensor, "token d_model"]) -> list[tuple[int, float]]:
    """Rare features with their density, by the mean norm of what they write where they are active."""
    active = torch.cat([coder.encode(part) for part in x.split(1024)])
    density = (active > 0).float().mean(0)
    push = active.sum(0) / (active > 0).sum(0).clamp_min(1) * coder.decoder.float().norm(dim=1)
    push[(density == 0) | (density > RARE)] = 0
    best: list[int] = push.topk(min(FEATURES, len(push))).indices.tolist()
    return [(i, float(density[i])) for i in best if push[i] > 0]
