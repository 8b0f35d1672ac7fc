"""TokenChange: the tokens whose logits rise most with a feature driven high on random texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.base.context import kept, progress
from unsleep.dictionaries.coders import Coder
from unsleep.explanations.statistics import FeatureStatistics
from unsleep.models.forward import run, whole_rows
from unsleep.models.lens import Ends
from unsleep.models.model import LoadedModel
from unsleep.models.streams import transformed

CHUNK = 8
"""Features per forward pass."""

BLOCK = 256
"""Features per resumable step."""


@torch.no_grad()
def token_change(
    model: LoadedModel,
    dictionary: Coder,
    features: Sequence[int],
    high: Sequence[float],
    rows: Sequence[Sequence[int]],
    count: int = 10,
) -> Ends:
    """The tokens whose mean logits rise most with each feature set to `high` at all tokens, largest increase first.

    Args:
        rows: token ids of texts.
        high: the activation that each feature is set to; a transcoder's is added to what its target has.

    Source: Gur-Arieh et al. 2025, arXiv:2501.08319, section 3.
    """
    coder = dictionary.to(dictionary.decoder.dtype, model.device)
    bare = whole_rows(model, rows)
    base = _mean(run(model.network, bare), bare.mask[..., None])
    ids, changes = list[Tensor](), list[Tensor]()
    for first in range(0, len(features), CHUNK):
        some = torch.tensor(features[first : first + CHUNK], device=model.device)
        level = torch.tensor(high[first : first + CHUNK], device=model.device)
        each, levels = (x.repeat_interleave(len(rows)) for x in (some, level))
        stacked = whole_rows(model, [*rows] * len(some))
        with transformed(model.network, {dictionary.target or dictionary.site: _driven(coder, each, levels)}):
            logits = run(model.network, stacked).unflatten(0, (len(some), -1))
        change = torch.stack([_mean(x, bare.mask[..., None]) - base for x in logits])
        best = change.topk(min(count, change.shape[1]))
        ids.append(best.indices.cpu())
        changes.append(best.values.cpu())
    return Ends(torch.cat(ids), torch.cat(changes))


def _mean(logits: Float[Tensor, "row position vocabulary"], mask: Tensor) -> Float[Tensor, " vocabulary"]:
    """Mean over all tokens."""
    return (logits.float() * mask).sum((0, 1)) / mask.sum()


def _driven(coder: Coder, feature: Tensor, level: Tensor) -> Callable[[Tensor], Tensor]:
    """The activation with one feature of each row set to a level."""
    directions = coder.decoder[feature][:, None]

    def transform(x: Tensor) -> Tensor:
        missing = level[:, None].expand(x.shape[:2])
        if coder.target is None:
            index = feature[:, None, None].expand(*x.shape[:2], 1)
            missing = missing - coder.encode(x.to(coder.decoder)).gather(-1, index)[..., 0]
        return x + (missing[..., None] * directions).to(x.dtype)

    return transform


def with_changes(
    model: LoadedModel,
    dictionary: Coder,
    statistics: FeatureStatistics,
    rows: Sequence[Sequence[int]],
    features: Sequence[int],
    count: int = 10,
) -> FeatureStatistics:
    """Statistics with the `token_change` of some features, each driven to its largest activation.

    Raises `Refused` for statistics of another model or dictionary.
    """
    statistics.check(model=model.fingerprint, dictionary=dictionary.hash)
    largest = statistics.figures.largest
    size = (statistics.size, min(count, len(model.tokenizer)))
    changed, logits = torch.full(size, -1), torch.zeros(size)
    for first in range(0, len(features), BLOCK):
        some = list(features[first : first + BLOCK])

        def block(some: list[int] = some) -> dict[str, Tensor]:
            found = token_change(model, dictionary, some, largest[some].tolist(), rows, size[1])
            return {"ids": found.ids, "logits": found.logits}

        found = kept(block, made_from=[statistics, some, [list(row) for row in rows], count])
        changed[some], logits[some] = found["ids"], found["logits"]
        progress(f"token changes at {statistics.site}", first + len(some), len(features))
    used = changed.unique()
    used = used[used >= 0]
    words = statistics.record.outputs
    place = torch.full((int(used.max()) + 1 if len(used) else 1,), -1)
    place[used] = torch.arange(len(used)) + len(words)
    record = replace(statistics.record, outputs=(*words, *(model.spell(int(i)) for i in used)))
    index = torch.where(changed >= 0, place[changed.clamp_min(0)], -1)
    figures = statistics.figures._replace(changed=index, changed_logit=logits)
    return FeatureStatistics(record, figures, statistics.text)
