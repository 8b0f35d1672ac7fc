"""Faithfulness of a dictionary: how well the model predicts text with the reconstruction spliced in.

    CE score = (CE_zero − CE_spliced) / (CE_zero − CE_clean)
    KL score = (KL_zero − KL_spliced) / KL_zero

`spliced` replaces the activation x at the dictionary's Site by the reconstruction x̂, `zero` by 0
(zero ablation); a transcoder reads its own Site and replaces its target. Each CE is
the mean over all predicted tokens of all rows, each KL(clean ‖ edited) over all tokens, not a mean of
batch means. 1: no effect on the model; 0: no better than zero ablation. The CE score is
also called loss recovered (Bricken et al. 2023, "Towards Monosemanticity"); SAELens calls the two `ce_loss_score`
and `kl_div_score`.

Attention sinks, on which no feature is active, keep x in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from unsleep.base.context import progress
from unsleep.core import BadInput, Refused
from unsleep.dictionaries.coders import Coder
from unsleep.interventions.intervention import applied
from unsleep.interventions.splices import Splice
from unsleep.models.forward import Rows, kl, run, whole_rows
from unsleep.models.model import LoadedModel

Stream = Float[Tensor, "*token d_model"]

CHUNK = 256
"""Tokens whose logits are held in float32 at a time."""


class SpliceScore(NamedTuple):
    """The quantities behind the CE and the KL score, in nats per token."""

    clean: float
    """Cross-entropy of the unmodified model."""
    spliced: float
    """Cross-entropy with the reconstruction at the Site."""
    zero: float
    """Cross-entropy with zero ablation at the Site."""
    kl_spliced: float
    """KL(unmodified ‖ reconstruction)."""
    kl_zero: float
    """KL(unmodified ‖ zero ablation)."""
    tokens: int
    """Predicted tokens."""

    @property
    def score(self) -> float:
        """Share of the loss that the reconstruction recovers: 1 is best, below 0 is worse than zero ablation."""
        return (self.zero - self.spliced) / (self.zero - self.clean)

    @property
    def kl_score(self) -> float:
        """Share of the zero-ablation KL that the reconstruction avoids: 1 is best, below 0 worse than zero ablation."""
        return (self.kl_zero - self.kl_spliced) / self.kl_zero


def splice_score(
    model: LoadedModel, dictionary: Coder, rows: Sequence[Sequence[int]], *, batch_tokens: int = 1024
) -> SpliceScore:
    """CE loss score and KL score of a dictionary on rows of token ids.

    Args:
        dictionary: an autoencoder, or a transcoder whose target the model computes after its own Site.
        rows: such as `model.token_ids(texts)` or `harvest.token_rows(…)`. The first token of a row
            is not predicted.
        batch_tokens: padded tokens per forward pass.

    Raises:
        BadInput: no rows, a row of one token, a dictionary of another width, or a transcoder whose
            target is computed before its Site.
        Refused: zero ablation changes neither loss nor logits, so that there is nothing to recover.
    """
    shortest = min((len(row) for row in rows), default=0)
    if shortest < 2:
        raise BadInput(f"the shortest of {len(rows)} rows has {shortest} tokens; expected rows of at least 2")
    names = ("clean", "spliced", "zero", "kl_spliced", "kl_zero")
    sums: dict[str, float] = dict.fromkeys(names, 0.0)
    done = 0
    for batch in _batches(rows, batch_tokens):
        padded = whole_rows(model, batch)
        clean = _logits(model, padded)
        sums["clean"] += _loss(clean, padded)
        for name, zero in (("spliced", False), ("zero", True)):
            with applied(model, Splice(dictionary, zero)):
                logits = _logits(model, padded)
            sums[name] += _loss(logits, padded)
            sums[f"kl_{name}"] += _divergence(clean, logits, padded)
        done += len(batch)
        progress(f"splice score at {dictionary.site}", done, len(rows))
    held = sum(len(row) for row in rows)
    predicted = held - len(rows)
    over = {name: held if name.startswith("kl") else predicted for name in names}
    found = SpliceScore(**{name: sums[name] / over[name] for name in names}, tokens=predicted)
    if found.zero == found.clean or not found.kl_zero > 0:
        where = dictionary.target or dictionary.site
        raise Refused(f"with 0 at {where} the loss does not change; the score is undefined")
    return found


def _batches(rows: Sequence[Sequence[int]], batch_tokens: int) -> list[list[Sequence[int]]]:
    """Batches of rows of similar length, shortest first, each within `batch_tokens` padded tokens."""
    batches: list[list[Sequence[int]]] = [[]]
    for row in sorted(rows, key=len):
        if batches[-1] and len(row) * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


@torch.no_grad()
def _logits(model: LoadedModel, rows: Rows) -> Float[Tensor, "row position vocabulary"]:
    return run(model.network, rows)


def _loss(logits: Float[Tensor, "row position vocabulary"], rows: Rows) -> float:
    """Σ −log p of every token after a row's first, in nats."""
    predicts = rows.mask[:, :-1]
    pieces = zip(logits[:, :-1][predicts].split(CHUNK), rows.ids[:, 1:][predicts].split(CHUNK), strict=True)
    return sum(float(cross_entropy(found.float(), aims, reduction="sum")) for found, aims in pieces)


def _divergence(
    clean: Float[Tensor, "row position vocabulary"], edited: Float[Tensor, "row position vocabulary"], rows: Rows
) -> float:
    """Σ KL(clean ‖ edited) over every token, in nats."""
    pieces = zip(clean[rows.mask].split(CHUNK), edited[rows.mask].split(CHUNK), strict=True)
    return sum(float(kl(p, q).sum()) for p, q in pieces)
