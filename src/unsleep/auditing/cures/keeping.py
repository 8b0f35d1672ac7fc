"""Cure: keep what is good, so that only features and error directions seen on trusted data pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.activations.held import batches_held
from unsleep.auditing.cure import Cure, Patient, Variant
from unsleep.base.linear import principal
from unsleep.core import BadInput, Site
from unsleep.dictionaries.coders import Coder
from unsleep.interventions.trusted import TrustedOnly

SPANS = (0.9, 0.99, 0.999)
"""Shares of the trusted error's variance that the kept directions explain."""


class KeepList(Cure):
    """Every feature that never fires on trusted data is removed, and every error direction outside of its subspace."""

    kind = "keep_list"

    def variants(self, patient: Patient) -> Iterator[Variant]:
        """Every width of the error's subspace."""
        if not patient.dictionaries:
            raise BadInput("the repair left no dictionaries to keep features of")
        held = trusted_tokens(patient)
        for share in SPANS:
            edits = tuple(kept(dictionary, held[dictionary.site], share) for dictionary in patient.dictionaries)
            features = sum(len(each.kept) for each in edits)
            of = sum(each.dictionary.n_features for each in edits)
            rank = sum(len(each.basis) for each in edits)
            words = f"{features:,} of {of:,} features and {rank:,} error directions pass"
            yield Variant(words, patient.suspect, edits)


def trusted_tokens(patient: Patient) -> dict[Site, Float[Tensor, "token d_model"]]:
    """Activations at the dictionaries' Sites on all tokens of trusted prompts and replies, without padding."""
    model, sites = patient.suspect, [d.site for d in patient.dictionaries]
    prompts = model.encode(patient.ordinary, max(map(len, patient.replies)))
    rows = [[*row, *said] for row, said in zip(prompts, patient.replies, strict=True)]
    parts: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for index, found in batches_held(model, rows, sites):
        for site, x in found.items():
            lengths = torch.tensor([len(rows[i]) for i in index])
            parts[site].append(x[torch.arange(x.shape[1]) >= x.shape[1] - lengths[:, None]])
    return {site: torch.cat(each) for site, each in parts.items()}


@torch.no_grad()
def kept(dictionary: Coder, x: Float[Tensor, "token d_model"], share: float) -> TrustedOnly:
    """The keep-list of a dictionary from trusted tokens at its Site."""
    coder = dictionary.to(torch.float32, "cpu")
    ordinary = x[~coder.sinks(x)[:, 0]]
    codes = coder.encode(ordinary)
    error = ordinary - coder.decode(codes)
    found = principal(error)
    rank = min(len(found.share), int((found.share.cumsum(0) < share).sum()) + 1)
    passing = (codes > 0).any(0).nonzero().squeeze(1).tolist()
    return TrustedOnly(dictionary.site, dictionary, tuple(passing), found.rows[:rank], found.mean)
