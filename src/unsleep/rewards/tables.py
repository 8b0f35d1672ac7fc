"""rewarded.safetensors: correlations and p-values of all features, and the linear reward."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from unsleep.base import store
from unsleep.core import BadInput, Site
from unsleep.rewards.correlated import Correlated
from unsleep.rewards.pooling import POOLINGS
from unsleep.rewards.probes import LinearReward
from unsleep.rewards.record import Of

FILE = "rewarded.safetensors"


def tensors_of(tables: Mapping[tuple[Of, Site], Correlated], reward: LinearReward) -> dict[str, Tensor]:
    """Content of the file."""
    found = {"reward.bias": torch.tensor([reward.bias], dtype=torch.float64)}
    found |= {f"reward.{site}": weights for site, weights in reward.weights.items()}
    for (of, site), each in tables.items():
        found |= {f"{of}.{site}.{name}": tensor for name, tensor in each._asdict().items()}
    return found


def load_tables(folder: str | Path, of: Of = "model") -> dict[Site, Correlated]:
    """Correlations of all features by Site, of the tuned model or its base.

    Raises `BadInput` naming a file that is missing or damaged.
    """
    path = Path(folder) / FILE
    found = store.read_tensors(path)
    own = (name.removeprefix(f"{of}.") for name in found if name.startswith(f"{of}."))
    sites = [name.removesuffix(".r") for name in own if name.endswith(".r")]
    with store.reading(path):
        tables: dict[Site, Correlated] = {}
        for site in sites:
            size = found[f"{of}.{site}.r"].shape[-1]
            shapes = dict.fromkeys(Correlated._fields, (size,))
            shapes |= {"r": (3, len(POOLINGS), size), "scored": (size, 3)}
            store.check_shapes(found, {f"{of}.{site}.{name}": shape for name, shape in shapes.items()}, path)
            tables[Site.parse(site)] = Correlated(*(found[f"{of}.{site}.{name}"] for name in Correlated._fields))
    return tables


def load_reward(folder: str | Path) -> LinearReward:
    """The linear reward of pooled features; raises `BadInput` naming a file that is missing or damaged."""
    path = Path(folder) / FILE
    found = store.read_tensors(path, {"reward.bias": (1,)})
    names = [name for name in found if name.startswith("reward.") and name != "reward.bias"]
    store.check_shapes(found, {name: (len(POOLINGS), None) for name in names}, path)
    if not names:
        raise BadInput(f"{path} has no weights of a linear reward; make it again")
    with store.reading(path):
        weights = {Site.parse(name.removeprefix("reward.")): found[name] for name in names}
    return LinearReward(weights, float(found["reward.bias"][0]))
