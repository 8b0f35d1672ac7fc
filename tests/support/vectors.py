"""Control vectors for the small Llama, and texts that fit them."""

from __future__ import annotations

from typing import Any

import torch

from unsleep.core import Site
from unsleep.interventions.steering import Steering
from unsleep.models.model import LoadedModel

D = 32
THINGS = ["sun", "moon", "star", "bird", "tree", "lake", "song", "hill"]
POSITIVE = [f"the {t} is good!" for t in THINGS]
NEGATIVE = [f"the {t} is bad?" for t in THINGS]


def vector(seed: int = 0, size: float = 3.0) -> torch.Tensor:
    return size * torch.nn.functional.normalize(torch.randn(D, generator=torch.Generator().manual_seed(seed)), dim=0)


def at(v: torch.Tensor, operator: Any = "add", c: float = 1.0, **more: Any) -> Steering:
    return Steering({Site(1): v}, operator, c, **more)


def logits(model: LoadedModel, text: str = "the quick brown fox") -> torch.Tensor:
    return model.network(torch.tensor(model.token_ids([text]))).logits
