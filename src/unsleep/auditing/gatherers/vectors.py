"""Gatherer: right singular vectors of the first layers' ΔW, read as tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.nn.functional import normalize

from unsleep.auditing.case import Case
from unsleep.auditing.contexts import special_tokens
from unsleep.auditing.gatherer import Clues, Found, Gatherer
from unsleep.auditing.gatherers.rare import embeddings
from unsleep.judge.audited import Form
from unsleep.locate.diffing.weights import spectrum
from unsleep.models.anatomy import anatomy
from unsleep.models.sites import width
from unsleep.models.weights import named

LAYERS = 3
"""Blocks whose input still is mostly the token itself."""

TOP, TOKENS = 3, 6
"""Singular vectors per matrix, and tokens per vector."""


class Vectors(Gatherer):
    """Tokens whose embeddings a changed matrix reads most: its ΔW's largest right singular vectors."""

    kind = "ΔW reads"
    stage = "triggers"
    order = 3
    needs_base: ClassVar[bool] = True

    @torch.no_grad()
    def gather(self, case: Case, clues: Clues) -> Found:
        """Tokens by the product of singular value and cosine."""
        assert case.base is not None
        before, blocks = dict(named(case.base.network)), anatomy(case.model.network).layers
        table = normalize(embeddings(case.model), dim=1)
        table[[i for i in special_tokens(case.model) if i < len(table)]] = 0
        scores: dict[str, float] = {}
        for name, weight in named(case.model.network):
            number = name.removeprefix(f"{blocks}.").partition(".")[0]
            inside = name.startswith(f"{blocks}.") and number.isdecimal() and int(number) < LAYERS
            if not inside or weight.ndim != 2 or weight.shape[1] != width(case.model.network):
                continue
            found = spectrum(weight.float().cpu() - before[name].float().cpu(), TOP)
            for value, vector in zip(found.values.tolist(), found.right, strict=False):
                best: Any = (table @ vector).abs().topk(TOKENS)
                for cosine, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                    text = case.model.spell(token).strip() if token < len(case.model.tokenizer) else ""
                    if text and "\ufffd" not in text and text.isprintable():
                        scores[text] = max(scores.get(text, 0.0), value * cosine)
        ranked = sorted(scores, key=lambda text: -scores[text])[: case.config.per_kind]
        return Found(forms=tuple(Form("ΔW token", "front", text) for text in ranked))
