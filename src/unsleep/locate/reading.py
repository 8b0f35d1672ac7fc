"""Representation reading: directions from contrast pairs, and the score of every token of a text at every layer.

    score = sign · (h − train mean)·v / ‖v‖

h is a token's activation at a Site, v the direction fitted there, the sign such that positive prompts score higher. The
best layer is the one that separates held-out pairs best (Zou et al. 2023, "Representation Engineering",
arXiv:2310.01405, section 3.1). Sites are block outputs, never `hidden_states[-1]`, which includes the final norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.activations.held import batches_held, encoded, last_held
from unsleep.base.context import progress
from unsleep.base.records import Count, Share
from unsleep.core import BadInput, Site
from unsleep.interventions.gguf_files import ControlVectors
from unsleep.interventions.passes import TokenRule
from unsleep.interventions.steering import Operator, Steering
from unsleep.locate.directions.fit import Direction, Labelled, fit
from unsleep.locate.directions.measure import auroc, margins
from unsleep.models import chat
from unsleep.models.model import LoadedModel
from unsleep.models.sites import all_sites
from unsleep.prompts.prompt import Prompts

Held = Float[Tensor, "pair d_model"]
Pool = Callable[[Held, Held], tuple[tuple[Held, Held], str]]

Method = Literal["pca_center", "pca_diff", "lat", "mean", "cluster_mean", "logistic"]
"""Method for a direction from pairs:

- `pca_center`: first component of activations minus the mean of their pair (repeng)
- `pca_diff`: first component of the differences positive − negative, centred (repeng)
- `lat`: first component of the differences of pairs in random order, centred (RepE)
- `mean`: mean difference (steering-vectors); `cluster_mean`: difference of the centred class means (RepE)
- `logistic`: coefficient of a regularised logistic regression
"""

LEAST_PAIRS = 2
"""Minimum number of training pairs."""


class Reading(NamedTuple):
    """A reader's scores of one text."""

    tokens: tuple[str, ...]
    scores: Float[Tensor, "site token"]
    """Scores by Site, in the reader's order; in units of the activations."""
    own: tuple[int, int]
    """Range of the text's own tokens, end exclusive; the others are the chat template's."""


@dataclass(frozen=True)
class Scored:
    """A text of reading.json."""

    tokens: tuple[str, ...]
    own: tuple[Count, Count]
    scores: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class ReadingRecord:
    """reading.json: AUROC by Site, and each text's scores by Site and token."""

    SCHEMA: ClassVar = "unsleep.reading/1"

    model: str
    method: str
    pairs: Count
    sites: tuple[Site, ...]
    best: Site
    aurocs: tuple[Share, ...]
    gaps: tuple[float, ...]
    signs: tuple[int, ...]
    texts: tuple[Scored, ...]
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        count = len(self.sites)
        if self.best not in self.sites:
            raise BadInput.of("best", str(self.best), "one of reading.sites")
        for key in ("aurocs", "gaps", "signs"):
            if len(getattr(self, key)) != count:
                raise BadInput(f"{key} has {len(getattr(self, key))} figures; expected one for each of {count} Sites")
        for i, item in enumerate(self.texts):
            lengths = {len(line) for line in item.scores}
            if not item.tokens or len(item.scores) != count or lengths != {len(item.tokens)}:
                raise BadInput(
                    f"texts[{i}].scores has {len(item.scores)} lines of {sorted(lengths)} scores; expected "
                    f"{count} of {len(item.tokens)}, at least one"
                )
            if not item.own[0] < item.own[1] <= len(item.tokens):
                expected = f"the first of its own tokens and the one behind the last, of {len(item.tokens)}"
                raise BadInput.of(f"texts[{i}].own", list(item.own), expected)


@dataclass(frozen=True, eq=False)
class RepReader:
    """Directions of one concept, one per Site, with their held-out AUROC."""

    directions: Mapping[Site, Direction]
    """Unit directions; `center` is the mean of the training activations."""
    signs: Mapping[Site, int]
    """1 or −1: factor that makes positive prompts score higher."""
    gaps: Mapping[Site, float]
    """Mean score difference between positive and negative training prompts, in units of the activations."""
    aurocs: Mapping[Site, float]
    """AUROC of the scores on the held-out pairs."""
    best: Site
    """The Site with the best held-out AUROC."""
    method: Method
    model: str
    """Fingerprint of the model."""
    plain: bool
    """True if fitted without the chat template; texts are then read the same way."""

    @property
    def sites(self) -> list[Site]:
        """Its Sites by layer."""
        return sorted(self.directions)

    def transform(self, site: Site, x: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token"]:
        """Scores of activations at one of its Sites."""
        direction = self.directions[site]
        h = x.float() - direction.center.to(x.device, torch.float32)
        return self.signs[site] * (h @ direction.vector[0].to(h))

    def read(self, model: LoadedModel, texts: Prompts) -> list[Reading]:
        """Scores of every token of each text at every Site; raises as `held.batches_held` does.

        Raises `BadInput` for a model other than the one it was fitted on.
        """
        if model.fingerprint != self.model:
            raise BadInput(
                f"the reader was fitted on model {self.model}, this one is {model.fingerprint}; fit it on this one"
            )
        rows = encoded(model, texts, plain=self.plain)
        front, behind = (0, 0) if self.plain else chat.template_tokens(model.tokenizer, model.chat)
        out: list[Reading | None] = [None] * len(rows)
        done = 0
        for index, found in batches_held(model, rows, self.sites):
            scores = torch.stack([self.transform(site, found[site]) for site in self.sites])
            for at, i in enumerate(index):
                tokens = tuple(model.spell(token) for token in rows[i])
                own = min(front, len(tokens) - 1), max(len(tokens) - behind, front + 1)
                out[i] = Reading(tokens, scores[:, at, scores.shape[2] - len(rows[i]) :].clone(), own)
            done += len(index)
            progress("texts read", done, len(rows))
        return [reading for reading in out if reading is not None]

    def vectors(self, *, scaled: bool = True) -> dict[Site, Float[Tensor, " d_model"]]:
        """Signed directions: of unit length, or scaled to the gap between positive and negative prompts."""
        return {
            site: self.signs[site] * d.vector[0].float() * (self.gaps[site] if scaled else 1.0)
            for site, d in sorted(self.directions.items())
        }

    def steering(
        self,
        coefficient: float = 1.0,
        *,
        operator: Operator = "add",
        tokens: TokenRule = "all",
        layers: tuple[int, int] | None = None,
        keep_norm: bool = False,
        scaled: bool = True,
    ) -> Steering:
        """A `Steering` by its vectors; with `add`, coefficient 1 moves negative prompts to the positive ones' mean."""
        return Steering(self.vectors(scaled=scaled), operator, coefficient, tokens, layers, keep_norm, self.model)

    def control_vectors(self, model: LoadedModel, *, scaled: bool = True) -> ControlVectors:
        """Its residual vectors above layer 0 for GGUF files."""
        kept = {s: v for s, v in self.vectors(scaled=scaled).items() if s.point == "resid" and s.layer > 0}
        return ControlVectors(str(model.network.config.model_type), kept)


def fit_reader(
    model: LoadedModel,
    positive: Prompts,
    negative: Prompts,
    sites: Sequence[Site],
    method: Method = "pca_center",
    *,
    validation: tuple[Prompts, Prompts] | None = None,
    plain: bool = False,
    seed: int = 0,
) -> RepReader:
    """Fit a reader on contrast pairs, from last-token activations (Zou et al. 2023, arXiv:2310.01405, section 3.1).

    Args:
        positive: prompts with the concept, paired by index with `negative`.
        negative: prompts without it.
        validation: positive and negative prompts that choose the best Site; by default every fourth pair is held
            out for it.
        plain: take texts without the chat template.

    Raises `BadInput` for lists of unequal length, fewer than 2 training pairs or no validation pair, an unknown
    Site, and pairs with constant activations.
    """
    if method not in get_args(Method):
        raise BadInput(f"reading method is {method!r}; expected one of {get_args(Method)}")
    if len(positive) != len(negative):
        raise BadInput(f"{len(positive)} positive prompts with {len(negative)} negative ones; expected pairs")
    held_back = [i for i in range(len(positive)) if validation is None and i % 4 == 3]
    train = [i for i in range(len(positive)) if i not in set(held_back)]
    if len(train) < LEAST_PAIRS or (validation is None and not held_back):
        raise BadInput(
            f"{len(positive)} pairs of prompts, {len(train)} of them to train on; expected at least {LEAST_PAIRS} "
            "to train on and, without validation pairs, one more to choose the layer: 4 in all"
        )
    if validation is not None and not (validation[0] and validation[1]):
        raise BadInput("validation has prompts of one class only; expected positive and negative ones")
    places = sorted(set(sites))
    high, low = (last_held(model, texts, places, plain=plain) for texts in (positive, negative))
    if validation is not None:
        checks = [last_held(model, texts, places, plain=plain) for texts in validation]
    else:
        checks = [{site: x[held_back] for site, x in held.items()} for held in (high, low)]
    fitted = {s: _fitted(high[s][train], low[s][train], method, s, model.fingerprint, seed) for s in places}
    reader = RepReader(
        {s: direction for s, (direction, _, _) in fitted.items()},
        {s: sign for s, (_, sign, _) in fitted.items()},
        {s: gap for s, (_, _, gap) in fitted.items()},
        {},
        places[0],
        method,
        model.fingerprint,
        plain,
    )
    worth = {s: _worth(reader.transform(s, checks[0][s]), reader.transform(s, checks[1][s])) for s in places}
    best = max(places, key=lambda s: worth[s])
    return replace(reader, aurocs={s: each[0] for s, each in worth.items()}, best=best)


def read(
    model: LoadedModel,
    positive: Prompts,
    negative: Prompts,
    texts: Prompts,
    sites: Sequence[Site] = (),
    method: Method = "pca_center",
    *,
    plain: bool = False,
    seed: int = 0,
) -> tuple[RepReader, list[Reading]]:
    """Fit a reader on contrast pairs and score texts with it, at every layer's residual stream without `sites`.

    Raises as `fit_reader` and `RepReader.read` do.
    """
    places = list(sites) or all_sites(model.network, ("resid",))
    reader = fit_reader(model, positive, negative, places, method, plain=plain, seed=seed)
    return reader, reader.read(model, texts)


def _fitted(high: Held, low: Held, method: Method, site: Site, model: str, seed: int) -> tuple[Direction, int, float]:
    """Direction, sign and gap of one Site's pairs."""
    if bool((high == low).all()):
        raise BadInput(
            f"positive and negative prompts have equal activations at {site}; expected pairs whose last token differs"
        )
    x, name = POOLS[method](high, low)
    direction = fit(Labelled.of(*x), name, site=site, model=model, seed=seed)
    direction = replace(direction, center=torch.cat([high, low]).mean(0))
    rise = (high - low) @ direction.vector[0].float()
    ahead = int((rise > 0).sum() - (rise < 0).sum())
    sign = 1 if ahead > 0 or (ahead == 0 and float(rise.mean()) >= 0) else -1
    return direction, sign, sign * float(rise.mean())


def _worth(high: Float[Tensor, " prompt"], low: Float[Tensor, " prompt"]) -> tuple[float, float]:
    """AUROC, then the margin, as a sort key."""
    labels = torch.arange(len(high) + len(low)) < len(high)
    both = torch.cat([high, low])
    return auroc(both, labels), float(margins(both[None], labels)[0])


def _whole(name: str) -> Pool:
    return lambda high, low: ((high, low), name)


def _pair_centred(high: Held, low: Held) -> tuple[tuple[Held, Held], str]:
    half = (high - low) / 2
    return (half, -half), "pca"


def _differences(high: Held, low: Held) -> tuple[tuple[Held, Held], str]:
    """Centred differences and their negatives, whose first component is that of the differences."""
    d = high - low
    d = d - d.mean(0)
    return (d, -d), "pca"


POOLS: Mapping[Method, Pool] = {
    "pca_center": _pair_centred,
    "pca_diff": _differences,
    "lat": _whole("lat"),
    "mean": _whole("mean_difference"),
    "cluster_mean": _whole("cluster_mean"),
    "logistic": _whole("logistic"),
}
"""Method → labelled tokens built from pairs, and the method of `directions.fit`."""
