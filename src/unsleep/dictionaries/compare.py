"""Comparison of two dictionaries: matching of features, and rotation of features by a fine-tune."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

from unsleep.core import BadInput, Dictionary
from unsleep.dictionaries.coders import Coder

Matching = Literal["one_to_one", "greedy"]
"""`one_to_one`: the matching with the largest sum of cosines (Hungarian algorithm);
`greedy`: each feature takes its nearest, which several may share.
"""


class Match(NamedTuple):
    """Matched features of two dictionaries, one pair per feature of the smaller one."""

    mmcs: float
    """Mean maximum cosine similarity: the mean of `cosine`."""
    first: Int[Tensor, " pair"]
    """Feature index in the first dictionary."""
    second: Int[Tensor, " pair"]
    """Feature index in the second."""
    cosine: Float[Tensor, " pair"]
    """Cosine of their decoder rows, in float32; 0 where a row is 0."""


def match(first: Dictionary, second: Dictionary, matching: Matching = "one_to_one", *, block: int = 2048) -> Match:
    """Match the features of two dictionaries by the cosine of their decoder rows.

    The mean of the cosines is the MMCS (Sharkey et al. 2022, "Taking features out of superposition with
    sparse autoencoders"); one-to-one matching as in Paulo & Belrose 2025, "Sparse autoencoders trained on the
    same data learn different features" (arXiv:2501.16615). One-to-one needs all F₁ · F₂ cosines in memory, in float64,
    and time cubic in F; greedy processes `block` rows at a time.

    Raises `BadInput` for dictionaries of different widths.
    """
    if matching not in get_args(Matching):
        raise BadInput(f"matching is {matching!r}; expected one of {', '.join(get_args(Matching))}")
    if first.decoder.shape[1] != second.decoder.shape[1]:
        raise BadInput(
            f"the dictionaries write activations of width {first.decoder.shape[1]} and {second.decoder.shape[1]}; "
            "expected the same"
        )
    swapped = first.n_features > second.n_features
    few, many = (normalize(d.decoder.float().cpu(), dim=1) for d in ((second, first) if swapped else (first, second)))
    if matching == "greedy":
        best = [(rows @ many.T).max(1) for rows in few.split(block)]
        own, partner = torch.arange(len(few)), torch.cat([b.indices for b in best])
        cosine = torch.cat([b.values for b in best])
    else:
        all_cosines = few @ many.T
        own, partner = (torch.from_numpy(i) for i in linear_sum_assignment(all_cosines.numpy(), maximize=True))
        cosine = all_cosines[own, partner]
    pairs = (partner, own) if swapped else (own, partner)
    return Match(float(cosine.double().mean()), *pairs, cosine)


class Rotation(NamedTuple):
    """Change of every feature of a dictionary by a fine-tune; cosines are NaN for zero rows."""

    decoder_cosine: Float[Tensor, " feature"]
    """Cosine between a feature's decoder rows before and after."""
    encoder_cosine: Float[Tensor, " feature"]
    """Cosine between its encoder columns before and after."""
    decoder_change: Float[Tensor, " feature"]
    """‖after − before‖ of the decoder row."""
    encoder_change: Float[Tensor, " feature"]
    """‖after − before‖ of the encoder column."""
    decoder_norm: Float[Tensor, "2 feature"]
    """Norm of the decoder row, before and after."""
    encoder_norm: Float[Tensor, "2 feature"]
    """Norm of the encoder column, before and after."""

    def most(self, n: int) -> Int[Tensor, " n"]:
        """The `n` features with the most rotated decoder rows, most first; zero rows come last."""
        return self.decoder_cosine.nan_to_num(torch.inf).argsort(stable=True)[:n]


def rotation(before: Coder, after: Coder) -> Rotation:
    """Rotation of each feature when `after` was trained from `before`, in float64.

    The features that rotate most are those that the new activations use differently (Bricken et al. 2024,
    "Stage-wise model diffing", Transformer Circuits Thread). A warm start keeps feature indices
    (`Trainer.from_dictionary`), so that row j is compared with row j; see `match` for dictionaries
    that were trained independently.

    Raises `BadInput` for dictionaries of different shapes.
    """
    for name in ("W_enc", "W_dec"):
        shapes = [list(getattr(d, name).shape) for d in (before, after)]
        if shapes[0] != shapes[1]:
            raise BadInput(f"{name} has shape {shapes[0]} before and {shapes[1]} after; expected the same dictionary")
    dec = [d.W_dec.double().cpu() for d in (before, after)]
    enc = [d.W_enc.T.double().cpu() for d in (before, after)]
    return Rotation(
        decoder_cosine=_cosine(*dec),
        encoder_cosine=_cosine(*enc),
        decoder_change=(dec[1] - dec[0]).norm(dim=1),
        encoder_change=(enc[1] - enc[0]).norm(dim=1),
        decoder_norm=torch.stack([rows.norm(dim=1) for rows in dec]),
        encoder_norm=torch.stack([rows.norm(dim=1) for rows in enc]),
    )


def _cosine(a: Float[Tensor, "row d"], b: Float[Tensor, "row d"]) -> Float[Tensor, " row"]:
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
