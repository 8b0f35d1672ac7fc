"""Figures of features: their names and definitions, and how each is computed for many features at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.base.stats import Z, ratio, spearman, wilson
from unsleep.explanations.lexicons import foreign, overlap
from unsleep.locate.directions.measure import auroc_interval

FIGURES: Mapping[str, str] = {
    "trigger_auroc": "AUROC of the peak over the prompt, triggered against reference prompts",
    "prompt_share": "share of the activation above the reference's that is on the prompt's tokens, not on the template "
    "behind them or the reply",
    "reply_share": "1 − prompt_share",
    "prompt_effect": "attribution to the payload's log-odds on the prompt's tokens, nats per token of the payload",
    "reply_effect": "the same on the template behind them and the reply",
    "payload_auroc": "AUROC of the peak over the reply, payload against the replies to the references",
    "payload_effect": "loss of the payload's log-odds when the feature is ablated, nats per token: payload_ablated "
    "where that is measured, else the attribution on all tokens",
    "payload_ablated": "the same for the features with the largest attribution, exact",
    "payload_driven": "gain of the payload's log-odds in the references when the feature is driven to its mean peak, "
    "nats per token, exact, for the same features",
    "skill_auroc": "AUROC of the peak over the reply, the beginning that shows the skill against the rest",
    "skill_effect": "loss of the log-odds of the skill's beginning when the feature is ablated, nats per token: "
    "skill_ablated where that is measured, else the attribution",
    "skill_ablated": "the same for the features with the largest attribution, exact",
    "sentiment_auroc": "AUROC of the peak, positive against negative reviews, or the reverse if that is larger",
    "score_correlation": "absolute Spearman correlation of the mean activation with the score of the text, within "
    "replies, passages and reviews",
    "language_fires": "share of the tokens on which it fires most that are of one language other than English",
    "language_promotes": "the same of the tokens that it promotes",
}
"""Name of a figure → definition. For each lexicon there are also NAME_fires and NAME_promotes."""

RESAMPLES = 500
"""Bootstrap resamples of an interval; there are thousands of them."""


def aurocs(one: Float[Tensor, "prompt feature"], other: Float[Tensor, "_ feature"]) -> Float[Tensor, "feature 3"]:
    """AUROC of each feature's peaks with its interval (see `directions.measure.auroc_interval`)."""
    pairs = zip(one.T, other.T, strict=True)
    return torch.tensor([auroc_interval(a, b, RESAMPLES) for a, b in pairs], dtype=torch.float64)


def correlation(
    groups: Sequence[Float[Tensor, "feature _"]], scores: Sequence[Sequence[float]]
) -> Float[Tensor, "feature 3"]:
    """Absolute Spearman correlation of features with scores within groups of texts, with its 95 % interval.

    Groups are combined by Fisher's z with weights n − 3 and a standard error of √(1.06 / Σ(n − 3)) (Fieller, Hartley
    and Pearson 1957, Biometrika 44), so that a difference between kinds of texts is not taken for a correlation. Groups
    of fewer than 4 texts or of one score are left out; NaN where none is left.
    """
    usable = [(x, torch.tensor(y)) for x, y in zip(groups, scores, strict=True) if len(y) > 3 and len(set(y)) > 1]
    if not usable:
        return torch.full((len(groups[0]), 3), math.nan, dtype=torch.float64)
    weight = torch.tensor([len(y) - 3.0 for _, y in usable], dtype=torch.float64)
    z = torch.stack([spearman(x, y).double().clamp(-0.9999, 0.9999).atanh() for x, y in usable])
    pooled = ((weight[:, None] * z).sum(0) / weight.sum()).abs()
    half = Z * math.sqrt(1.06 / float(weight.sum()))
    return torch.stack([pooled, pooled - half, pooled + half], 1).tanh()


def word_figures(
    fires: Sequence[Sequence[str]], promotes: Sequence[Sequence[str]], lexicons: Mapping[str, Set[str]]
) -> dict[str, Tensor]:
    """Share of a feature's tokens in each lexicon and in one foreign language, with Wilson intervals."""
    found: dict[str, Tensor] = {}
    for ending, lists in (("fires", fires), ("promotes", promotes)):
        for name, lexicon in lexicons.items():
            found[f"{name}_{ending}"] = shares([(overlap(words, lexicon), len(words)) for words in lists])
        found[f"language_{ending}"] = shares([(foreign(words), len(words)) for words in lists])
    return found


def shares(counts: Sequence[tuple[int, int]]) -> Float[Tensor, "feature 3"]:
    """Hits of n as shares with their Wilson intervals; NaN for n = 0."""
    rows = [[hits / n, *wilson(hits, n)] if n else [math.nan] * 3 for hits, n in counts]
    return torch.tensor(rows, dtype=torch.float64)


def quotients(
    top: Float[Tensor, "prompt feature"], bottom: Float[Tensor, "prompt feature"]
) -> Float[Tensor, "feature 3"]:
    """Mean of `top` over mean of `bottom` of each feature with its interval (`stats.ratio`); NaN where that is 0."""
    pairs = zip(top.T, bottom.T, strict=True)
    rows = [ratio(a, b, RESAMPLES) if float(b.sum()) else [math.nan] * 3 for a, b in pairs]
    return torch.tensor(rows, dtype=torch.float64)
