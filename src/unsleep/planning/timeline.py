"""Memory over one pass of the whole model, composed from the marks of a pass through its first blocks.

    forward    embeddings · block 0 … block L−1 · head, loss
    backward   loss, head · block L−1 … block 0 · embeddings

Before block n, what blocks 0 … n−1 keep is alive; in its backward pass, what blocks 0 … n keep, and the gradients of
blocks n+1 … L−1. The peak is the largest of these sums, each with the working memory of its own moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from unsleep.planning.ledger import Mark

Phase = Literal["forward", "loss", "backward", "optimizer step", "training step", "collection", "generation"]


class Peak(NamedTuple):
    """Most bytes alive, and when."""

    bytes: int
    phase: Phase


class Kind(NamedTuple):
    """Figures of one kind of block, in bytes and FLOPs."""

    kept: int
    """Alive after its forward pass, beyond what was before."""
    saved: int
    """Saved by autograd during it."""
    forward: int
    """Working memory of its forward pass."""
    backward: int
    """Working memory of its backward pass."""
    gradients: int
    flops: int


class Timeline(NamedTuple):
    """A pass of the whole model."""

    kinds: tuple[Kind, ...]
    order: tuple[int, ...]
    """Kind of every block."""
    start: int
    """Bytes alive before the first block."""
    head: int
    """Most bytes of unembedding and loss, and of their backward passes."""
    behind: int
    """Bytes alive when the backward pass of the blocks begins, beyond what the blocks keep."""
    tail: int
    """Working memory of the embeddings' backward pass."""
    outer_flops: int

    @property
    def blocks(self) -> tuple[Kind, ...]:
        """Figures of every block."""
        return tuple(self.kinds[kind] for kind in self.order)

    @property
    def kept(self) -> int:
        """Bytes that all blocks keep."""
        return sum(block.kept for block in self.blocks)

    @property
    def saved(self) -> int:
        """Bytes that autograd saves in all blocks."""
        return sum(block.saved for block in self.blocks)

    @property
    def flops(self) -> int:
        """Floating-point operations of the pass."""
        return self.outer_flops + sum(block.flops for block in self.blocks)

    def peak(self, *, held: bool = False) -> Peak:
        """The peak; with `held`, gradients are held throughout and not counted here."""
        live, peaks = self.start, list[Peak]()
        before: list[int] = []
        for block in self.blocks:
            peaks.append(Peak(live + block.forward, "forward"))
            live += block.kept
            before.append(live)
        peaks.append(Peak(live + self.head, "loss"))
        gradients = 0
        for alive, block in zip(reversed(before), reversed(self.blocks), strict=True):
            own = block.gradients if held else 0
            peaks.append(Peak(alive + self.behind + gradients + block.backward + own, "backward"))
            gradients += 0 if held else block.gradients
        peaks.append(Peak(self.start + self.behind + gradients + self.tail, "backward"))
        return max(peaks)


def composed(marks: Sequence[Mark], order: Sequence[int], gradients: Sequence[int]) -> Timeline:
    """The timeline of a model from the marks of a pass through its first blocks.

    Args:
        marks: "enter" and "leave" of every block, "loss", and after a backward pass "back", "done" and "end".
        order: kind of every block of the whole model, the first ones as in `marks`.
        gradients: bytes of the gradients of each block that ran.
    """
    at = next(i for i, mark in enumerate(marks) if mark.what == "loss")
    forward, loss, backward = marks[:at], marks[at], marks[at + 1 :]
    ran = len(gradients)
    enter = [next(m for m in forward if (m.what, m.block) == ("enter", i)) for i in range(ran)]
    leave = [next(m for m in forward if (m.what, m.block) == ("leave", i)) for i in range(ran)]
    live = [*(m.live for m in enter), leave[-1].live]
    highs, starts, ends = _backward(backward, ran)
    behind = starts[ran - 1].live - live[-1] if ran - 1 in starts else 0
    whole = loss.flops if not backward else backward[-1].flops
    found: list[Kind] = []
    inner_flops = 0
    for i in range(ran):
        flops = leave[i].flops - enter[i].flops
        working = 0
        if i in starts:
            flops += ends[i].flops - starts[i].flops
            working = highs[i] - (live[i + 1] + behind + sum(gradients[i + 1 :]))
        saved = (leave[i] if i + 1 == ran else enter[i + 1]).saved - enter[i].saved
        found.append(Kind(live[i + 1] - live[i], saved, leave[i].high - live[i], working, gradients[i], flops))
        inner_flops += flops
    kinds = [_typical([(i, found[i]) for i in range(ran) if order[i] == kind], ran) for kind in range(max(order) + 1)]
    tail = highs.get(-1, 0) - (live[0] + behind + sum(gradients)) if backward else 0
    head = max(loss.high, highs.get(ran, 0)) - live[-1]
    return Timeline(tuple(kinds), tuple(order), live[0], head, behind, max(0, tail), whole - inner_flops)


def _backward(marks: Sequence[Mark], ran: int) -> tuple[dict[int, int], dict[int, Mark], dict[int, Mark]]:
    """Most bytes alive in the backward pass of each block, of the head (`ran`) and the embeddings (−1); their ends."""
    highs: dict[int, int] = {}
    starts: dict[int, Mark] = {}
    ends: dict[int, Mark] = {}
    current = ran
    for mark in marks:
        highs[current] = max(highs.get(current, 0), mark.high)
        ends[current] = mark
        if mark.what == "back" and mark.block < current:
            current = mark.block
            starts[current] = ends[current] = mark
        elif mark.what == "done" and mark.block == 0 == current:
            current = -1
    return highs, starts, ends


def _typical(found: Sequence[tuple[int, Kind]], ran: int) -> Kind:
    """The figures of equal blocks, from those between the first and the last, which differ, where there are any."""
    inner = [kind for i, kind in found if 0 < i < ran - 1] or [kind for _, kind in found]
    return Kind(*(max(column) for column in zip(*inner, strict=True)))
