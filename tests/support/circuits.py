"""A model small enough for every node of its circuit to be held and changed."""

from __future__ import annotations

import torch
from torch import Tensor

from support.suspects import ORDINARY, SUSPICIOUS, base
from unsleep.core import Site
from unsleep.dictionaries.architectures.jumprelu import JumpReLU
from unsleep.dictionaries.coders import Coder
from unsleep.locate.circuits.align import Said, align
from unsleep.locate.circuits.contrast import Contrast, Metric
from unsleep.locate.circuits.edges import Node
from unsleep.locate.circuits.faithful import Patcher
from unsleep.locate.circuits.spaces import ERROR, FeatureSpace, Space, WholeSpace
from unsleep.models.forward import Rows
from unsleep.models.model import LoadedModel
from unsleep.models.sites import all_sites
from unsleep.prompts.prompt import Prompt, PromptSet

D, F = 32, 12
NEAR = PromptSet("near", tuple(Prompt(f"QQX {p.text}") for p in ORDINARY))


def forced(n: int, *tokens: int) -> Said:
    return Said([[] for _ in range(n)], [list(tokens)] * n)


def coder(model: LoadedModel, site: Site) -> Coder:
    g = torch.Generator().manual_seed(hash(str(site)) % 1000)
    rows = torch.nn.functional.normalize(torch.randn(F, D, generator=g), dim=1)
    bias = 0.1 * torch.randn(D, generator=g)
    threshold = torch.full((F,), 0.05)
    return JumpReLU(site, model.fingerprint, rows.T.contiguous(), torch.zeros(F), rows, bias, threshold=threshold)


def spaces_of(model: LoadedModel) -> list[Space]:
    sites = all_sites(model.network)
    return [WholeSpace(Site(0, "embed"), D), *(FeatureSpace(coder(model, site)) for site in sites)]


def difference(logits: Tensor, rows: Rows) -> Tensor:
    """A metric that is linear in the logits."""
    return logits[..., 5].sum(-1) - logits[..., 9].sum(-1)


def small(
    family: str = "llama", n: int = 2, metric: Metric = difference, batch: int = 16
) -> tuple[Contrast, list[Space]]:
    model = base(family)
    aligned = align(model, SUSPICIOUS.head(n), NEAR.head(n), forced(n, *model.token_ids(["ok"], special=False)[0]))
    return Contrast(model, aligned, metric, batch=batch), spaces_of(model)


def every_node(contrast: Contrast, spaces: list[Space]) -> list[Node]:
    ids = {space.place: [*range(space.size), *([ERROR] if space.has_error else [])] for space in spaces}
    return [Node(p, r, i) for p, features in ids.items() for r in range(len(contrast.aligned.roles)) for i in features]


def metric_of(contrast: Contrast, spaces: list[Space], nodes: list[Node], *, complement: bool = False) -> Tensor:
    return Patcher(contrast, spaces).run(nodes, complement=complement)
