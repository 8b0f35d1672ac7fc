"""Directions from labelled activations, by every method that needs no forward pass (Tigges et al. 2023,
arXiv:2310.15154, section 2.2).

| method | direction |
|---|---|
| `mean_difference` | μ₊ − μ₋ (Marks & Tegmark 2023, arXiv:2310.06824) |
| `kmeans` | difference of two centroids (k-means, 10 starts) |
| `logistic` | coefficients of a logistic regression; for rank k, repeated on the residual |
| `pca` | top principal components of all tokens |
| `lat` | top components of differences of random pairs, centred (LAT, Zou et al. 2023, arXiv:2310.01405) |
| `cluster_mean` | the positive class's centred mean (Zou et al. 2023), parallel to the mean difference |
| `positive_side`, `negative_side` | μ₊ − μ of neutral tokens, μ of neutral tokens − μ₋ |
| `leace` | the least-squares eraser's read direction (Belrose et al. 2023, arXiv:2306.03819; see `leace`) |
| `random` | unit Gaussian |

DAS, which trains on the model's answer, is in `das`. All methods apply to the residual stream and to feature
activations; a direction in feature space is mapped to the residual stream by the decoder (`decoded`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unsleep.core import BadInput, Dictionary, Site, check_classes, check_finite
from unsleep.locate.directions import leace

Space = Literal["residual", "features"]


@dataclass(frozen=True, eq=False)
class Labelled:
    """Labelled tokens of two classes at one Site."""

    x: Float[Tensor, "token d"]
    """Activations, or feature activations; converted to float32."""
    y: Bool[Tensor, " token"]
    """True in the positive class."""
    neutral: Float[Tensor, "neutral d"] | None = None
    """Tokens of neither class, for the one-sided methods."""

    def __post_init__(self) -> None:
        if self.x.ndim != 2 or self.y.shape != self.x.shape[:1]:
            raise BadInput(
                f"labelled activations have shape {list(self.x.shape)} with labels {list(self.y.shape)}; "
                "expected [token, d] and one label per token"
            )
        check_classes(self.y)
        check_finite(self.x, "labelled activations")
        object.__setattr__(self, "x", self.x.float())
        if self.neutral is not None:
            if self.neutral.ndim != 2 or self.neutral.shape[1] != self.x.shape[1] or not len(self.neutral):
                raise BadInput(
                    f"neutral activations have shape {list(self.neutral.shape)}; expected [token, {self.x.shape[1]}]"
                )
            check_finite(self.neutral, "neutral activations")
            object.__setattr__(self, "neutral", self.neutral.float())

    @classmethod
    def of(
        cls,
        positive: Float[Tensor, "positive d"],
        negative: Float[Tensor, "negative d"],
        neutral: Float[Tensor, "neutral d"] | None = None,
    ) -> Labelled:
        """Concatenate the tokens of each class; raises `BadInput` for different widths."""
        if positive.shape[1] != negative.shape[1]:
            raise BadInput(f"classes of width {positive.shape[1]} and {negative.shape[1]}; expected one width")
        y = torch.arange(len(positive) + len(negative)) < len(positive)
        return cls(torch.cat([positive, negative]), y, neutral)

    @property
    def gap(self) -> Float[Tensor, " d"]:
        """μ₊ − μ₋."""
        return self.x[self.y].mean(0) - self.x[~self.y].mean(0)


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction or subspace at one Site."""

    vector: Float[Tensor, "rank d"]
    """Orthonormal rows; the first points along the projected mean difference, towards the positive class."""
    site: Site
    method: str
    model: str
    """Fingerprint of the model."""
    space: Space
    """`residual`: d is d_model; `features`: the number of features."""
    center: Float[Tensor, " d"]
    """Mean of the tokens that it was fitted on."""

    def __post_init__(self) -> None:
        if self.vector.ndim != 2 or not 1 <= len(self.vector) <= self.vector.shape[1]:
            raise BadInput(f"direction at {self.site} has shape {list(self.vector.shape)}; expected [rank, d]")
        if self.center.shape != self.vector.shape[1:]:
            raise BadInput(
                f"direction at {self.site}: center has shape {list(self.center.shape)}; "
                f"expected [{self.vector.shape[1]}]"
            )
        check_finite(self.vector, f"direction at {self.site}")
        check_finite(self.center, f"direction at {self.site}: center")
        rows = self.vector.double()
        if float((rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype)).abs().max()) > 1e-3:
            raise BadInput(f"direction at {self.site} has rows that are not orthonormal; expected V Vᵀ = I")

    @property
    def rank(self) -> int:
        """Dimensions of the subspace."""
        return len(self.vector)


def fit(
    labelled: Labelled,
    method: str,
    *,
    site: Site,
    model: str,
    rank: int = 1,
    seed: int = 0,
    space: Space = "residual",
) -> Direction:
    """Fit a direction to labelled tokens.

    Args:
        method: one of `METHODS`; sources in the module's table.
        model: fingerprint of the model that the tokens come from.
        rank: dimension of the subspace; above 1 only for the methods of `ANY_RANK`.
        seed: random seed.

    Raises:
        BadInput: an unknown method, an unsupported rank, fewer tokens or pairs than the rank needs, no neutral
            tokens for a one-sided method, or classes without a direction between them.
    """
    if method not in FITTERS:
        raise BadInput(f"method {method!r} is unknown; expected one of {', '.join(METHODS)}")
    d = labelled.x.shape[1]
    if not 1 <= rank <= d or (rank > 1 and method not in ANY_RANK):
        most = d if method in ANY_RANK else 1
        raise BadInput(f"method {method!r} was asked for rank {rank}; expected 1{f' to {most}' if most > 1 else ''}")
    rows = FITTERS[method](labelled, rank, seed)
    return Direction(oriented(rows, labelled), site, method, model, space, labelled.x.mean(0))


def oriented(rows: Float[Tensor, "rank d"], labelled: Labelled) -> Float[Tensor, "rank d"]:
    """Orthonormal rows of the same span, the first along the projected mean difference of the classes.

    Raises `BadInput` for linearly dependent rows.
    """
    wide = rows.double()
    q, r = torch.linalg.qr(wide.T)
    size = wide.norm(dim=1).max()
    if not bool((r.diagonal().abs() > 1e-8 * size).all()):
        raise BadInput(
            "no direction was found: the classes have the same mean, or tokens vary in fewer dimensions than the rank"
        )
    basis = q.T
    seen = basis @ labelled.gap.double()
    if len(basis) == 1:
        return (basis if seen[0] >= 0 else -basis).float()
    if float(seen.norm()) > 0:  # rotate within the span: first row along the mean difference
        turn = torch.linalg.qr(torch.cat([seen[:, None], torch.eye(len(basis), dtype=seen.dtype)], dim=1)).Q
        turn = turn * torch.where(turn[:, 0] @ seen < 0, -1.0, 1.0)
        basis = turn.T @ basis
    return basis.float()


def decoded(direction: Direction, dictionary: Dictionary) -> Direction:
    """A direction in feature space mapped to the residual stream by the decoder.

    Raises `BadInput` where the direction does not match the dictionary's Site and number of features.
    """
    if direction.space != "features" or direction.vector.shape[1] != dictionary.n_features:
        raise BadInput(
            f"a direction of width {direction.vector.shape[1]} in space {direction.space!r} does not decode through a "
            f"dictionary of {dictionary.n_features} features"
        )
    if direction.site != dictionary.site:
        raise BadInput(f"a direction at {direction.site} does not decode through a dictionary of {dictionary.site}")
    decoder = dictionary.decoder.float()
    q, r = torch.linalg.qr((direction.vector @ decoder).double().T)
    basis = (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).T.float()
    center = dictionary.decode(direction.center.to(decoder)[None])[0].float()
    return Direction(basis, direction.site, direction.method, direction.model, "residual", center)


def components(x: Float[Tensor, "token d"], rank: int) -> Float[Tensor, "rank d"]:
    """Top uncentred principal components of rows, from the smaller Gram matrix in float64."""
    wide = x.double()
    if len(wide) <= wide.shape[1]:
        _, vectors = torch.linalg.eigh(wide @ wide.T)
        return torch.nn.functional.normalize(vectors[:, -rank:].flip(1).T @ wide, dim=1)
    _, vectors = torch.linalg.eigh(wide.T @ wide)
    return vectors[:, -rank:].flip(1).T


def _mean_difference(labelled: Labelled, rank: int, seed: int) -> Tensor:
    return labelled.gap[None]


def _kmeans(labelled: Labelled, rank: int, seed: int) -> Tensor:
    from sklearn.cluster import KMeans  # slow import

    kmeans: Any = KMeans  # its stub knows no number of starts
    found = kmeans(2, n_init=10, random_state=seed).fit(labelled.x.numpy())
    first, second = torch.from_numpy(found.cluster_centers_)
    return (first - second)[None]


def _logistic(labelled: Labelled, rank: int, seed: int) -> Tensor:
    from sklearn.linear_model import LogisticRegression

    x = labelled.x - labelled.x.mean(0)
    x = x * (x.shape[1] ** 0.5 / x.norm(dim=1).mean().clamp_min(1e-12))  # one scale for all: directions stay
    rows: list[Tensor] = []
    for _ in range(rank):
        found = LogisticRegression(solver="liblinear", max_iter=1000, random_state=seed).fit(
            x.double().numpy(), labelled.y.numpy()
        )
        row = torch.nn.functional.normalize(torch.from_numpy(found.coef_).float(), dim=1)
        rows.append(row)
        x = x - (x @ row.T) @ row
    return torch.cat(rows)


def _pca(labelled: Labelled, rank: int, seed: int) -> Tensor:
    if len(labelled.x) <= rank:
        raise BadInput(f"{len(labelled.x)} tokens for {rank} principal components; expected at least {rank + 1}")
    return components(labelled.x - labelled.x.mean(0), rank)


def _lat(labelled: Labelled, rank: int, seed: int) -> Tensor:
    positive, negative = labelled.x[labelled.y], labelled.x[~labelled.y]
    pairs = min(len(positive), len(negative))
    if pairs <= rank:
        raise BadInput(f"{pairs} pairs for {rank} directions of LAT; expected at least {rank + 1} pairs")
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (pairs, 1), generator=generator) * 2.0 - 1
    differences = (positive[:pairs] - negative[:pairs]) * signs
    return components(differences - differences.mean(0), rank)


def _cluster_mean(labelled: Labelled, rank: int, seed: int) -> Tensor:
    return (labelled.x[labelled.y].mean(0) - labelled.x.mean(0))[None]


def _neutral(labelled: Labelled) -> Tensor:
    if labelled.neutral is None:
        raise BadInput("a one-sided direction needs neutral tokens, and none were given; give some or another method")
    return labelled.neutral.mean(0)


def _positive_side(labelled: Labelled, rank: int, seed: int) -> Tensor:
    return (labelled.x[labelled.y].mean(0) - _neutral(labelled))[None]


def _negative_side(labelled: Labelled, rank: int, seed: int) -> Tensor:
    return (_neutral(labelled) - labelled.x[~labelled.y].mean(0))[None]


def _leace(labelled: Labelled, rank: int, seed: int) -> Tensor:
    return leace.fit_eraser(labelled.x, labelled.y).reads[None]


def _random(labelled: Labelled, rank: int, seed: int) -> Tensor:
    return torch.randn(rank, labelled.x.shape[1], generator=torch.Generator().manual_seed(seed))


FITTERS: dict[str, Callable[[Labelled, int, int], Tensor]] = {
    "mean_difference": _mean_difference,
    "kmeans": _kmeans,
    "logistic": _logistic,
    "pca": _pca,
    "lat": _lat,
    "cluster_mean": _cluster_mean,
    "positive_side": _positive_side,
    "negative_side": _negative_side,
    "leace": _leace,
    "random": _random,
}
"""Method → function from labelled tokens, rank and seed to rows."""

METHODS = tuple(FITTERS)
"""Methods of `fit`."""

ONE_SIDED = ("positive_side", "negative_side")
"""Methods that need neutral tokens."""

ANY_RANK = ("logistic", "pca", "lat", "random")
"""Methods that support ranks above 1."""
