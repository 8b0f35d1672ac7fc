"""Quality of fit of a dictionary: streamed sums over all tokens, in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unsleep.core import Activations, ActivationStream, BadInput, check_finite
from unsleep.dictionaries.buffer import streamed
from unsleep.dictionaries.coders import Coder

Source = Float[Tensor, "_ _"] | Activations | ActivationStream
"""Activations as a tensor `[token, d]`, with their provenance, or in shards."""

DENSE_OVER = 0.1
"""Firing rate above which a feature counts as dense."""

EDGES = tuple(i / 2 - 6 for i in range(13))
"""Bin edges of the firing-rate histogram, in log10: half a decade each, from a token in a million to all."""


class Fit(NamedTuple):
    """Quality of fit of a dictionary on a set of activations."""

    fvu: float
    """Fraction of variance unexplained: E‖y − ŷ‖² / (E‖y‖² − ‖E y‖²), over all tokens."""
    l0: float
    """Mean number of active features per token."""
    dead: float
    """Share of features that are never active on the set."""
    dense: float
    """Share of features that are active on more than a tenth of the tokens."""
    density: tuple[int, ...]
    """Histogram of the active features' log10 firing rates over `EDGES`; the first bin includes all rarer ones."""
    tokens: int

    @property
    def explained_variance(self) -> float:
        """1 − FVU: 1 is best, 0 is the mean's."""
        return 1 - self.fvu


@torch.no_grad()
def fit(dictionary: Coder, source: Source, target: Source | None = None, *, batch: int = 4096) -> Fit:
    """FVU, L0 and firing rates over all tokens of `source`, not averaged over batches.

    Args:
        source: activations to encode, `[token, d_in]`.
        target: for a transcoder, its reconstruction target on the same tokens, `[token, d_out]`.
        batch: tokens encoded at a time.

    Raises:
        BadInput: no tokens, a width other than the dictionary's, constant activations, a transcoder
            without a target or an autoencoder with one, or a target of other tokens.
    """
    if (target is None) != (dictionary.target is None):
        raise BadInput(
            f"the dictionary at {dictionary.site} rebuilds {dictionary.target or 'its own Site'}; expected "
            f"{'no target' if dictionary.target is None else 'the activations there as the target'}"
        )
    stream, aims = _stream(source, dictionary), None if target is None else _stream(target, dictionary)
    if aims is not None and aims.sizes != stream.sizes:
        raise BadInput(
            f"{stream.tokens} tokens in {len(stream.sizes)} pieces with a target of {aims.tokens} in "
            f"{len(aims.sizes)}; expected the same tokens in the same pieces"
        )
    d_out, n = dictionary.decoder.shape[1], stream.tokens
    error = square = 0.0
    total = torch.zeros(d_out, dtype=torch.float64)
    fired = torch.zeros(dictionary.n_features, dtype=torch.long)
    for i in range(len(stream.sizes)):
        x = stream.piece(i)
        y = x if aims is None else aims.piece(i)
        for what, piece, width in (("activations", x, dictionary.d_model), ("target", y, d_out)):
            check_finite(piece, f"the {what}")
            if piece.shape[1] != width:
                raise BadInput(f"the {what} have width {piece.shape[1]}; the dictionary expects {width}")
        for start in range(0, len(x), batch):
            part = x[start : start + batch].to(dictionary.decoder)
            code = dictionary.encode_sparse(part)
            rebuilt = dictionary.decode_sparse(code)
            if dictionary.W_skip is not None:
                rebuilt = rebuilt + part @ dictionary.W_skip.T
            aim = y[start : start + batch].double().cpu()
            error += float((aim - rebuilt.double().cpu()).square().sum())
            square += float(aim.square().sum())
            total += aim.sum(0)
            fired += torch.bincount(code.ids[code.values > 0], minlength=len(fired)).cpu()
    variance = square / n - float((total / n).square().sum()) if n else 0.0
    if not variance * n > 1e-12 * square:
        raise BadInput(f"{n} tokens of constant activations; expected some that vary, for a share of their variance")
    rates = fired.double() / n
    return Fit(
        fvu=error / n / variance,
        l0=int(fired.sum()) / n,
        dead=float((fired == 0).double().mean()),
        dense=float((rates > DENSE_OVER).double().mean()),
        density=_histogram(rates),
        tokens=n,
    )


def _histogram(rates: Float[Tensor, " feature"]) -> tuple[int, ...]:
    """Histogram of the active features' log10 firing rates over `EDGES`."""
    place: Int[Tensor, " feature"] = torch.bucketize(rates[rates > 0].log10(), torch.tensor(EDGES[1:-1]).to(rates))
    return tuple(torch.bincount(place, minlength=len(EDGES) - 1).tolist())


def _stream(source: Source, dictionary: Coder) -> ActivationStream:
    """Activations as a stream; a bare tensor is assumed to be of the dictionary's model and Site."""
    if isinstance(source, Tensor):
        return ActivationStream((len(source),), lambda _: source, dictionary.site, dictionary.model, "")
    return streamed(source)
