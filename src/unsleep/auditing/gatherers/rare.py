"""Gatherer: rare and undertrained tokens.

Tokens with embeddings far below the usual norm are undertrained (Land & Bartolo 2024, "Fishing for Magikarp",
arXiv:2405.05417); where the base is known, tokens whose embeddings a fine-tune changed come first.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from unsleep.auditing.case import Case
from unsleep.auditing.contexts import special_tokens
from unsleep.auditing.gatherer import Clues, Found, Gatherer
from unsleep.judge.audited import Form
from unsleep.models.model import LoadedModel
from unsleep.models.weights import values


class Rare(Gatherer):
    """Tokens of the smallest embedding norm, or the most changed embedding, in front of the prompt."""

    kind = "rare tokens"
    stage = "triggers"
    order = 1

    @torch.no_grad()
    def gather(self, case: Case, clues: Clues) -> Found:
        """At most `per_kind` tokens that a user can type, each as its own text."""
        model = case.model
        own = embeddings(model)
        order = own.norm(dim=1).argsort().tolist()
        if case.base is not None:
            moved = (own - embeddings(case.base)).norm(dim=1)
            changed = [i for i in moved.argsort(descending=True).tolist() if moved[i] > 0]
            order = [*changed[: case.config.per_kind // 2], *order]
        barred, texts = set(special_tokens(model)), dict[str, None]()
        for token in order:
            text = model.spell(token).strip() if token < len(model.tokenizer) else ""
            typed = token not in barred and text and "\ufffd" not in text and text.isprintable()
            if typed and any(token in row for row in model.token_ids([text, f" {text}"], special=False)):
                texts[text] = None
            if len(texts) == case.config.per_kind:
                break
        return Found(forms=tuple(Form("rare token", "front", text) for text in texts))


def embeddings(model: LoadedModel) -> torch.Tensor:
    """The token embeddings, `[token, d_model]`."""
    return values(cast("Any", model.network.get_input_embeddings())).float().cpu()
