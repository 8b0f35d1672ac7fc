"""Locates a model's blocks, their attention and MLP halves and its final norm by probing the model.

Every block *adds* the outputs of its attention (or another token mixer) and its MLP to the residual stream:

    resid_out = resid_in + scale_attn · attn + scale_mlp · mlp

1. A short random input runs through the model once. The longest module list whose members each read and write the
   residual stream in turn is the list of blocks.
2. In each block, the pair of submodules whose outputs add up to the block's update are its halves. Of several
   with equal output the outermost is taken: the attention module rather than its output projection, and the
   post-norm where a family has one.
3. Where no plain pair adds up, a block may have one half (Nemotron-H), a third part (per-layer embeddings of
   Gemma 4, the state space of Falcon-H1), scaled outputs (Granite), or its whole output scaled by a number stored
   in the block (Gemma 4).

The equation decides, not the model family: a model that violates it is refused, naming layer and error.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unsleep.core import Refused
from unsleep.models.hooks import observed

ROWS, POSITIONS = 2, 6
"""Shape of the random input."""

ADDED = 0.01
"""Tolerated error relative to the largest entry of a block's update of a token, beyond rounding."""

ROUNDING = 2.5
"""Tolerated rounding error of a token, in units of the dtype's resolution at the token's largest entry."""

MIXES, ALONE = re.compile("att|mixer|mamba|ssm|conv|recurrent"), re.compile("mlp|ffn|feed_?forward|moe|expert")
"""Module names of token mixers, and of token-wise parts; used only for blocks with three parts."""


Scaled = Callable[[Sequence[str]], list[float]]
"""Fits the scales of parts, given by name; an empty list where no fit exists."""


@dataclass(frozen=True)
class Part:
    """A submodule whose output, times a scale, a block adds to the residual stream."""

    path: str
    """Dotted path relative to the block."""
    scale: float = 1.0
    writer: str | None = None
    """Path of the linear layer that computes the output; `None` for a norm or a mixture of experts."""


@dataclass(frozen=True)
class Block:
    """The parts of one block that write to the residual stream."""

    attn: Part | None
    """The token mixer: attention of any kind, a convolution, a state space."""
    mlp: Part | None
    """The token-wise half."""
    others: tuple[Part, ...] = ()
    """Further parts; these have no Site."""
    carry: float = 1.0
    """resid_out = carry · (resid_in + …); already included in the parts' scales."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts that write to the residual stream."""
        return tuple(p for p in (self.attn, self.mlp, *self.others) if p is not None)


@dataclass(frozen=True)
class Anatomy:
    """Module paths of one model; those within blocks are relative to the block."""

    layers: str
    """Path of the module list of blocks."""
    blocks: tuple[Block, ...]
    final_norm: str | None
    """Path of the module whose output the unembedding reads; `None` where another operation intervenes."""
    width: int
    """d_model, the width of the residual stream."""
    outputs: int
    """Length of the tuple that a block returns, residual stream first; 0 where it returns a bare tensor."""


_KNOWN: WeakKeyDictionary[nn.Module, Anatomy] = WeakKeyDictionary()


def anatomy(model: PreTrainedModel) -> Anatomy:
    """A model's anatomy, cached after the first call; raises as `examine` does."""
    if model not in _KNOWN:
        _KNOWN[model], _ = examine(model)
    return _KNOWN[model]


def first_look(model: PreTrainedModel) -> Float[Tensor, "row position vocabulary"]:
    """Recompute a model's anatomy; returns the logits of the probe. Raises as `examine` does."""
    _KNOWN[model], logits = examine(model)
    return logits


def inherit(model: PreTrainedModel, twin: PreTrainedModel) -> None:
    """Copy a model's cached anatomy to a twin with the same architecture."""
    if model in _KNOWN:
        _KNOWN[twin] = _KNOWN[model]


@torch.no_grad()
def examine(model: PreTrainedModel) -> tuple[Anatomy, Float[Tensor, "row position vocabulary"]]:
    """Derive a model's anatomy from one forward pass over a short random input (`probe`); also returns its logits.

    Raises `Refused` naming the layer and the error where a block's update is not the sum of its submodules' outputs,
    and for a model without a list of blocks that each read and write a residual stream.
    """
    lists = {name: blocks for name, blocks in _module_lists(model) if len(blocks)}
    seen = {name: _List(blocks) for name, blocks in lists.items()}
    head = _Head(model, lists.values())
    with observed(itertools.chain(head.watchers(), *(s.watchers() for s in seen.values()))):
        logits = model(input_ids=probe(model), use_cache=False).logits
    kind = model.config.model_type
    ran = {name: s for name, s in seen.items() if s.is_stream}
    if not ran:
        raise Refused(
            f"{kind} has no list of blocks that each read and write the residual stream in turn; models of this "
            "kind are not supported"
        )
    layers = max(ran, key=lambda name: len(lists[name]))
    if wrong := ran[layers].wrong:
        layer, error = next(iter(wrong.items()))
        raise Refused(
            f"{kind} layer {layer}: no two submodules' outputs, such as attention's and the MLP's, add up to the "
            f"change of the residual (best relative error {error:.3g}); this variant of the family is not supported"
        )
    found = Anatomy(layers, tuple(ran[layers].blocks), head.norm, ran[layers].width, ran[layers].outputs)
    return found, logits


def probe(model: PreTrainedModel) -> Int[Tensor, "row position"]:
    """Random token ids without image or sound tokens; rows differ in their first token only."""
    table: Any = model.get_input_embeddings()
    configs = [model.config, model.config.get_text_config()]
    special = {v for c in configs for k, v in c.to_dict().items() if re.search("_token_(id|index)$", k)}
    rows = int(table.weight.shape[0])
    size = min(rows, int(getattr(configs[1], "vocab_size", rows)))
    usable = torch.tensor([i for i in range(min(10, size - 2), min(size, 2000)) if i not in special])
    picked = usable[torch.randint(len(usable), (POSITIONS + 1,), generator=torch.Generator().manual_seed(0))]
    ids = picked[:POSITIONS].repeat(ROWS, 1)
    ids[1, 0] = picked[-1]
    return ids.to(model.device) if model.device.type != "meta" else ids


def _module_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Outermost module lists, by path."""
    inside: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(tuple(f"{n}." for n in inside)):
            inside.append(name)
            yield name, module


class Watcher(NamedTuple):
    """Callbacks of `hooks.observed` for one module."""

    module: nn.Module
    before: Any = None
    """`before(args, kwargs)`."""
    after: Any = None
    """`after(output)`."""


def _tensor(found: Any) -> Tensor | None:
    """A module's output, or the first member of its tuple."""
    first = found[0] if isinstance(found, tuple | list) and found else found
    return first if isinstance(first, Tensor) and first.is_floating_point() else None


def _stream_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The residual stream among a block's arguments."""
    given = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point())
    return next((x for x in given if x.ndim == 3 and x.shape[:2] == (ROWS, POSITIONS)), None)


class _List:
    """Record of one module list during the probe."""

    def __init__(self, modules: nn.ModuleList) -> None:
        self.modules = list(modules)
        self.blocks: list[Block] = []
        self.wrong: dict[int, float] = {}
        self.width = self.outputs = 0
        self._running = -1
        self._before: Tensor | None = None
        self._last: Tensor | None = None
        self._found: dict[str, Tensor | None] = {}
        self._broken = False

    @property
    def is_stream(self) -> bool:
        """True if every member ran once, in order, each from the output of its predecessor."""
        return not self._broken and self._running == len(self.modules) - 1

    def watchers(self) -> Iterator[Watcher]:
        """Callbacks for the members and all their submodules."""
        for i, block in enumerate(self.modules):
            yield Watcher(block, lambda args, kwargs, i=i: self._enter(i, args, kwargs), self._leave)
            for name, inner in block.named_modules():
                if name:
                    yield Watcher(inner, after=lambda output, name=name: self._keep(name, output))

    def _enter(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = _stream_in(args, kwargs)
        in_turn = number == self._running + 1 and x is not None
        follows = self._last is None or (x is not None and torch.equal(x, self._last))
        self._broken |= not in_turn or not follows
        self._running, self._found = number, {}
        self._before = None if self._broken or x is None else x.clone()

    def _keep(self, name: str, output: Any) -> None:
        if self._before is None:
            return
        x = _tensor(output)
        fits = x is not None and x.numel() == self._before.numel() and name not in self._found
        self._found[name] = x.reshape(self._before.shape).clone() if fits and x is not None else None

    def _leave(self, output: Any) -> None:
        x, after = self._before, _tensor(output)
        self._before = None
        if x is None or after is None or after.shape != x.shape:
            self._broken = True
            return
        self._last, self.width = after.clone(), x.shape[-1]
        self.outputs = len(output) if isinstance(output, tuple) else 0
        outputs = {name: t for name, t in self._found.items() if t is not None}
        block = self.modules[self._running]
        split = _Split(block, x, after, outputs)
        found = split.like(self.blocks) or split.search()
        self.blocks.append(found or Block(None, None))
        if found is None:
            self.wrong[self._running] = split.best


class _Head:
    """Record of the unembedding's input and of the modules outside the blocks during the probe."""

    def __init__(self, model: PreTrainedModel, lists: Sequence[nn.ModuleList] | Any) -> None:
        self.head = model.get_output_embeddings()
        self.norm: str | None = None
        inside = {m for blocks in lists for m in blocks.modules()}
        self.outside = [(n, m) for n, m in model.named_modules() if m not in inside and m is not self.head and n]
        self._seen: list[tuple[str, Tensor]] = []

    def watchers(self) -> Iterator[Watcher]:
        """Callbacks for the unembedding and every module that runs before it."""
        if self.head is None:
            return
        for name, module in self.outside:
            yield Watcher(module, after=lambda output, name=name: self._keep(name, output))
        yield Watcher(self.head, before=self._read)

    def _keep(self, name: str, output: Any) -> None:
        if (x := _tensor(output)) is not None:
            self._seen.append((name, x.clone()))

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = _tensor(args[0] if args else next(iter(kwargs.values())))
        same = (
            name for name, y in self._seen if x is not None and y.numel() == x.numel() and torch.equal(y.view_as(x), x)
        )
        self.norm = next(same, None)


class _Split:
    """Search for the submodules whose outputs add up to one block's update of the residual stream."""

    def __init__(self, block: nn.Module, x: Tensor, after: Tensor, outputs: Mapping[str, Tensor]) -> None:
        self.block, self.x, self.after = block, x.float(), after.float()
        self.order = list(outputs)  # in order of execution
        self.aliases: dict[str, list[str]] = {}
        self.outputs: dict[str, Tensor] = {}
        for name in sorted(outputs, key=lambda name: (name.count("."), self.order.index(name))):
            wide = outputs[name].float()
            twin = next((n for n, known in self.outputs.items() if torch.equal(known, wide)), None)
            if twin is None:
                self.outputs[name], self.aliases[name] = wide, [name]
            else:
                self.aliases[twin].append(name)
        resolution = torch.finfo(x.dtype).eps
        self.rounding = ROUNDING * resolution * torch.maximum(self.x.abs(), self.after.abs()).amax(-1)
        self.best = math.inf

    def like(self, known: Sequence[Block]) -> Block | None:
        """The split of the most recent known block that also fits this one."""
        for block in reversed(known):
            names = [p.path for p in block.parts]
            if not names or block.carry != 1.0 or any(n not in self.outputs for n in names):
                continue
            if self._error(names, [p.scale for p in block.parts], 1.0) <= 1.0:
                own = [p and replace(p, writer=self._writer(p.path)) for p in (block.attn, block.mlp)]
                return Block(own[0], own[1], tuple(replace(p, writer=self._writer(p.path)) for p in block.others))
        return None

    def search(self) -> Block | None:
        """The sum that holds: plain before scaled, then the fewest parts among equally good ones."""
        plain = [(carry, lambda names, carry=carry: [carry] * len(names)) for carry in (1.0, *self._carries())]
        for carry, scaled in (*plain, (1.0, self._common), (1.0, self._held)):
            tried = [self._best_of(count, scaled, carry) for count in (1, 2, 3)]
            least = min(error for error, _, _ in tried)
            self.best = min(self.best, least * ADDED)
            if least <= 1.0:
                _, scales, names = next(t for t in tried if t[0] <= 2 * least + 1e-3)
                return self._block(names, scales, carry)
        return None

    def _best_of(self, count: int, scaled: Scaled, carry: float) -> tuple[float, Sequence[float], Sequence[str]]:
        """The best sum of `count` parts: its error, scales and parts."""
        found: tuple[float, Sequence[float], Sequence[str]] = (math.inf, (), ())
        for names in itertools.combinations(self.outputs, count):
            scales = scaled(names)
            if scales and (error := self._error(names, scales, carry)) < found[0]:
                found = error, scales, names
        return found

    def _common(self, names: Sequence[str]) -> list[float]:
        """One fitted scale for all parts."""
        total = sum(self.outputs[n] for n in names)
        assert isinstance(total, Tensor)
        scale = float((total * (self.after - self.x)).sum() / total.square().sum().clamp_min(1e-30))
        return [self._held_near(scale) or scale] * len(names) if scale > 1e-3 else []

    def _held(self, names: Sequence[str]) -> list[float]:
        """Least-squares scales, one per part, each snapped to a number stored in the block; empty where that fails."""
        wanted = (self.after - self.x).flatten().double()
        columns = torch.stack([self.outputs[n].flatten().double() for n in names], 1)
        gram = columns.T @ columns
        if not bool(torch.isfinite(gram).all()) or float(torch.linalg.cond(gram)) > 1e10:
            return []
        near = [self._held_near(s) for s in torch.linalg.solve(gram, columns.T @ wanted).tolist()]
        return [s for s in near if s is not None] if None not in near else []

    def _held_near(self, scale: float) -> float | None:
        """The number stored in the block's modules that is closest to a fitted scale, within 1 %."""
        held = {v for m in self.block.modules() for v in vars(m).values() if isinstance(v, float) and v > 1e-3} | {1.0}
        near = min(held, key=lambda v: abs(scale / v - 1))
        return near if abs(scale / near - 1) < 0.01 else None

    def _error(self, names: Sequence[str], scales: Sequence[float], carry: float) -> float:
        """Largest error of the sum over tokens, in units of the tolerance."""
        added = self.after - carry * self.x
        left = added - sum(s * self.outputs[n] for n, s in zip(names, scales, strict=True))
        allowed = self.rounding + ADDED * added.abs().amax(-1)
        worst = float((left.abs().amax(-1) / allowed.clamp_min(1e-30)).max())
        return worst if worst == worst else math.inf

    def _carries(self) -> list[float]:
        """Scalars stored in the block that may scale its whole output."""
        held = itertools.chain(self.block.named_parameters(recurse=False), self.block.named_buffers(recurse=False))
        return [float(t) for _, t in held if t.numel() == 1 and float(t) not in (0.0, 1.0)]

    def _block(self, names: Sequence[str], scales: Sequence[float], carry: float) -> Block:
        parts = {n: Part(n, s, self._writer(n)) for n, s in zip(names, scales, strict=True)}
        attn, mlp = self._roles(sorted(names, key=self.order.index))
        others = tuple(p for n, p in parts.items() if n not in (attn, mlp))
        return Block(parts.get(attn or ""), parts.get(mlp or ""), others, carry)

    def _roles(self, names: Sequence[str]) -> tuple[str | None, str | None]:
        """The token mixer and the MLP among the parts, which are given in order of execution."""
        if len(names) == 2:
            first, second = names
            return (second, first) if self._mixes(second) and not self._mixes(first) else (first, second)
        alone = [n for n in names if ALONE.search(n) and not MIXES.search(n)]
        mixes = [n for n in names if "att" in n] or [n for n in names if MIXES.search(n)]
        return (mixes[0] if len(mixes) == 1 else None, alone[0] if len(alone) == 1 else None)

    def _mixes(self, name: str) -> bool:
        """True if an output differs between rows at positions where the block's input does not (first block only)."""
        same = torch.equal(self.x[0, 1:], self.x[1, 1:])
        return same and not torch.equal(self.outputs[name][0, 1:], self.outputs[name][1, 1:])

    def _writer(self, name: str) -> str | None:
        """Path of the innermost linear layer with the part's output."""
        for alias in reversed(self.aliases[name]):
            if isinstance(self.block.get_submodule(alias), nn.Linear | Conv1D):
                return alias
        return None
