"""Networks that run several others: their members, and the joint KV cache of these."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache


def members_of(network: PreTrainedModel) -> list[PreTrainedModel]:
    """The networks that a forward pass runs: a mixture's members, or the network itself."""
    return list(getattr(network, "members", ())) or [network]


class JointCache(DynamicCache):
    """The KV caches of several networks, one each.

    Its layers are those of all of them: whatever reorders, repeats or crops a cache does so in each.
    """

    def __init__(self, parts: Sequence[Cache], serving: Int[Tensor, " row"] | None = None) -> None:
        Cache.__init__(self, layers=[layer for part in parts for layer in part.layers])
        self.parts = tuple(parts)
        self.serving = serving
        """The member that serves each row of a per-sequence mixture."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows, in that order."""
        super().reorder_cache(beam_idx)  # pyright: ignore[reportArgumentType]
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select rows, in that order."""
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        if self.serving is not None:
            self.serving = self.serving.repeat_interleave(repeats)

    def _select(self, index: Tensor) -> None:
        if self.serving is not None:
            self.serving = self.serving[index.to(self.serving.device)]
