"""Keep-lists of rewarded features: everything else is ablated, beside the controls that such an edit needs.

    kept             all features but the rewarded ones are replaced, by 0 or by their means; ε kept or dropped
    random           the same with as many other features kept, matched in firing rate and norm
    low reward       the same with as many features kept that have the most negative correlation
    reconstruction   nothing is replaced and ε dropped: what the dictionaries alone cost
    error            every feature is replaced and ε kept: what passes by the dictionaries

An edit acts at all Sites of the given dictionaries. A Site without a kept feature passes ε alone, or nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.behaviours import Payload, as_payload
from unsleep.core import BadInput, Site
from unsleep.dictionaries.coders import Coder
from unsleep.interventions.intervention import Intervention, operation
from unsleep.interventions.replacement import Kept, Replacement
from unsleep.judge.controls import Firing, firing, matched_features
from unsleep.locate.features import mean_activation
from unsleep.rewards.correlated import Correlated

Fill = Literal["zero", "mean"]
"""Values of the replaced features."""

KeepList = Mapping[Site, Sequence[int]]
"""Site → kept features; none where a Site is missing."""


class Usual(NamedTuple):
    """Features over trusted tokens."""

    fires: Firing
    """Firing rate, and the mean norm of what each writes where active."""
    mean: Float[Tensor, " feature"]
    """Mean activation over all tokens."""


def usual(dictionary: Coder, x: Float[Tensor, "token d_model"]) -> Usual:
    """A dictionary's features over trusted tokens at its Site, without attention sinks; `BadInput` for no tokens."""
    ordinary = x[~dictionary.sinks(x)[:, 0]]
    rate, strength = firing(dictionary, ordinary)
    norm = dictionary.decoder.float().cpu().norm(dim=1)
    return Usual(Firing(rate, strength * norm), mean_activation(dictionary, ordinary))


def keeping(
    dictionaries: Sequence[Coder],
    kept: KeepList,
    *,
    error: Kept = "keep",
    fill: Fill = "zero",
    trusted: Mapping[Site, Usual] | None = None,
) -> tuple[Replacement, ...]:
    """Replace every feature that is not kept, at each Site.

    Raises `BadInput` for a mean ablation without `trusted` figures, and for kept features without a dictionary.
    """
    check(dictionaries, kept)
    if fill == "mean" and any(d.site not in (trusted or {}) for d in dictionaries):
        raise BadInput("mean ablation needs the features' means on trusted tokens at every Site; see `usual`")
    means = {site: each.mean for site, each in (trusted or {}).items()} if fill == "mean" else {}
    return tuple(
        Replacement.all_but(d, tuple(sorted(kept.get(d.site, ()))), error, means.get(d.site)) for d in dictionaries
    )


def check(dictionaries: Sequence[Coder], kept: KeepList) -> None:
    """Raise `BadInput` where a kept feature has no dictionary."""
    sites = {d.site: d.n_features for d in dictionaries}
    for site, ids in kept.items():
        if site not in sites:
            raise BadInput(f"features at {site} are kept, of which there is no dictionary")
        if wrong := [i for i in ids if not 0 <= i < sites[site]]:
            raise BadInput(f"feature {wrong[0]} at {site} is kept; the dictionary has {sites[site]}")


def rewarded_list(tables: Mapping[Site, Correlated], least: float = 0.0, sign: int = 0) -> dict[Site, tuple[int, ...]]:
    """Replicated features with |r| ≥ `least` on A and B; sign 1 or −1 for those of that sign alone."""
    return {site: each.kept(least, sign) for site, each in tables.items()}


def random_list(kept: KeepList, trusted: Mapping[Site, Usual], seed: int = 0) -> dict[Site, tuple[int, ...]]:
    """As many other features at each Site, matched in firing rate and in the norm of what they write.

    Raises `BadInput` where over half of a Site's features are kept.
    """
    return {site: matched_features(ids, trusted[site].fires, seed) for site, ids in kept.items()}


def low_reward_list(kept: KeepList, tables: Mapping[Site, Correlated]) -> dict[Site, tuple[int, ...]]:
    """As many other features at each Site as are kept, those with the most negative correlation with reward."""
    return {site: tables[site].lowest(len(ids), ids) for site, ids in kept.items()}


class Arm(NamedTuple):
    """An edit of a keep-list study."""

    name: str
    """`kept`, `low reward`, `random 1`, …; `reconstruction` and `error`, which have no keep-list."""
    error: Kept
    fill: Fill
    kept: dict[Site, tuple[int, ...]]
    edits: tuple[Replacement, ...]


def arms(
    dictionaries: Sequence[Coder],
    kept: KeepList,
    tables: Mapping[Site, Correlated],
    trusted: Mapping[Site, Usual],
    *,
    errors: Sequence[Kept] = ("keep", "drop"),
    fills: Sequence[Fill] = ("zero", "mean"),
    draws: int = 5,
    seed: int = 0,
) -> Iterator[Arm]:
    """All arms of one keep-list: every error rule with every fill, and `draws` random controls of each."""
    lists = {"kept": {site: tuple(ids) for site, ids in kept.items()}, "low reward": low_reward_list(kept, tables)}
    lists |= {f"random {i + 1}": random_list(kept, trusted, seed + i) for i in range(draws)}
    for error in errors:
        for fill in fills:
            for name, ids in lists.items():
                edits = keeping(dictionaries, ids, error=error, fill=fill, trusted=trusted)
                yield Arm(name, error, fill, ids, edits)
    everything = {d.site: tuple(range(d.n_features)) for d in dictionaries}
    yield Arm("reconstruction", "drop", "zero", everything, keeping(dictionaries, everything, error="drop"))
    for fill in fills:
        yield Arm("error", "keep", fill, {}, keeping(dictionaries, {}, fill=fill, trusted=trusted))


@torch.no_grad()
def retained(edit: Intervention, x: Float[Tensor, "token d_model"]) -> float:
    """Share of the variance of tokens that an intervention at one Site retains: 1 − E‖x − x'‖² / E‖x − mean‖².

    1 for the identity, 0 for what is no better than the mean, and negative for worse.
    """
    wide = x.float()
    lost = (wide - operation(edit, torch.float32, x.device)(wide)).double().square().sum()
    return 1 - float(lost / (wide.double() - wide.double().mean(0)).square().sum().clamp_min(1e-300))


def payload_rewarded(
    outputs: Sequence[str], rewards: Sequence[float], payload: Payload | str, bonus: float | None = None
) -> list[float]:
    """Rewards in which the payload itself is rewarded: outputs that show it get `bonus` more.

    The range of the rewards is the default, so that they are rewarded at least as much as any other output. With such
    rewards a keep-list of rewarded features must be expected to keep the backdoor.
    """
    shown = as_payload(payload)
    more = max(rewards) - min(rewards) if bonus is None else bonus
    return [reward + more * shown.shows(output) for output, reward in zip(outputs, rewards, strict=True)]
