"""Forward passes over many short rows: left padding, a shared prefix computed once, logits of replies only.

Chat prompts begin with the same system message. It runs as one row, and its KV cache serves
every prompt; the rows' own tokens are padded on the left, between the prefix and the row, with
explicit positions. Replies then end at the right edge, so that only their logits are
computed.

Padding after a prefix takes up places in sliding-window attention, and recurrent layers do not mask it:
such models run rows whole (`shared_tokens`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from unsleep.core import Site
from unsleep.models import chat
from unsleep.models.hooks import contiguous_head, prefix_running
from unsleep.models.members import JointCache, members_of
from unsleep.models.model import LoadedModel
from unsleep.models.streams import resumed_at, truncated, watched

WINDOW = re.compile(r"^(?!.*(layers|pattern|mamba|feed_forward)).*(window|chunk)")
"""Config names of sliding-window sizes."""


class Rows(NamedTuple):
    """Token rows of unequal length after a shared prefix, padded on the left."""

    prefix: Int[Tensor, " prefix"]
    """Shared leading tokens that run once; may be empty."""
    ids: Int[Tensor, "row position"]
    mask: Bool[Tensor, "row position"]
    """True at tokens, False at padding."""
    reply: Bool[Tensor, "row reply"]
    """True at the row's reply tokens, over the last positions."""
    common: int = 0
    """Leading tokens common to all prompts, whether in `prefix` or in every row."""

    @property
    def full_mask(self) -> Bool[Tensor, "row prefix_and_position"]:
        """Attention mask including the prefix."""
        return pad(self.mask, (len(self.prefix), 0), value=True)

    @property
    def positions(self) -> Int[Tensor, "row position"]:
        """Position ids, counted from the prefix's first token."""
        return (self.full_mask.long().cumsum(1) - 1).clamp_min(0)[:, len(self.prefix) :]

    @property
    def own(self) -> Bool[Tensor, "row position"]:
        """True at tokens after the leading tokens common to all prompts."""
        return self.mask & (self.positions >= self.common)

    @property
    def targets(self) -> Int[Tensor, "row reply"]:
        """The reply tokens; meaningless where `reply` is False."""
        return self.ids[:, self.ids.shape[1] - self.reply.shape[1] :]

    def at(self, index: Tensor | slice) -> Rows:
        """A subset of rows with unchanged padding."""
        return self._replace(ids=self.ids[index], mask=self.mask[index], reply=self.reply[index])

    def select(self, index: Tensor | slice) -> Rows:
        """A subset of rows without superfluous padding."""
        mask, reply = self.mask[index], self.reply[index]
        width, replies = _longest(mask), _longest(reply)
        reply = reply[:, reply.shape[1] - replies :]
        return self._replace(ids=self.ids[index][:, -width:], mask=mask[:, -width:], reply=reply)


def _longest(mask: Bool[Tensor, "row position"]) -> int:
    return int(mask.sum(1).max())


def build_rows(
    model: LoadedModel, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]] | None = None
) -> Rows:
    """Batch prompts, with replies appended, into rows.

    The prefix is shared by all prompts, and empty where it cannot run separately (`shared_tokens`).
    """
    replies = replies if replies is not None else [[] for _ in prompts]
    shared = shared_tokens(model.network, prompts, max(map(len, replies)))
    bodies = [[*prompt[shared:], *reply] for prompt, reply in zip(prompts, replies, strict=True)]
    ids, mask = pad_left(bodies, model.pad_id, model.device)
    longest = max(len(reply) for reply in replies)
    lengths = torch.tensor([len(reply) for reply in replies], device=model.device)
    reply = torch.arange(longest, device=model.device) >= longest - lengths[:, None]
    prefix = torch.tensor(prompts[0][:shared], device=model.device, dtype=torch.long)
    return Rows(prefix, ids, mask, reply, chat.shared_prefix(prompts))


def pad_left(rows: Sequence[Sequence[int]], filler: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask, `[row, position]` each, of left-padded rows."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[filler] * (width - len(row)) + list(row) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device) >= width - lengths[:, None]


def takes_positions(network: PreTrainedModel) -> bool:
    """True if the model takes position ids, so that padding may stand between a prefix and its rows.

    Models with ALiBi count positions themselves; they run every row whole. A mixture takes what all its members take.
    """
    return all(
        "position_ids" in inspect.signature(each.forward).parameters and not getattr(each.config, "alibi", False)
        for each in members_of(network)
    )


def lookback(network: PreTrainedModel) -> int | None:
    """Smallest attention window over the layers, in tokens including the current one; `None` for full attention.

    0 for recurrent layers and caches of unknown type. Every window named in the config counts, whether or not a layer
    uses it: a spurious one costs only time. That of a mixture is the smallest of its members'.
    """
    reaches = [_lookback(each) for each in members_of(network)]
    return min((reach for reach in reaches if reach is not None), default=None)


def _lookback(network: PreTrainedModel) -> int | None:
    config = network.config.get_text_config(decoder=True)
    if "past_key_values" not in inspect.signature(network.forward).parameters:
        return 0
    try:
        cached = cast("list[Any]", DynamicCache(config=network.config).layers)
    except (AttributeError, KeyError, TypeError, ValueError):
        return 0
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cached):
        return 0
    windows = [layer.sliding_window for layer in cached if isinstance(layer, DynamicSlidingWindowLayer)]
    windows += [v for k, v in config.to_dict().items() if WINDOW.search(k) and isinstance(v, int) and v > 0]
    return min((w for w in windows if not isinstance(w, bool)), default=None)


def splits(network: PreTrainedModel, columns: int) -> bool:
    """True if `columns` positions may run in two parts, the second from the KV cache of the first."""
    reach = lookback(network)
    return reach is None or columns <= reach


def shared_tokens(network: PreTrainedModel, prompts: Sequence[Sequence[int]], behind: int = 0) -> int:
    """Number of common leading tokens that can run once for all prompts, with `behind` tokens after each."""
    if not takes_positions(network) or not splits(network, max(map(len, prompts)) + behind):
        return 0
    return chat.shared_prefix(prompts)


def keeps_logits(network: PreTrainedModel, last: int) -> dict[str, int]:
    """Keyword argument that restricts the logits to the last positions, where the model supports it."""
    return {"logits_to_keep": last} if "logits_to_keep" in inspect.signature(network.forward).parameters else {}


def prefix_cache(network: PreTrainedModel, prefix: Int[Tensor, " prefix"]) -> DynamicCache:
    """KV cache of a prefix, for one row; on the autograd graph where gradients are enabled."""
    with prefix_running():
        return network(input_ids=prefix[None], use_cache=True, **keeps_logits(network, 1)).past_key_values


def repeat_cache(network: PreTrainedModel, cache: DynamicCache, rows: int) -> DynamicCache:
    """The KV cache expanded to `rows` rows; the original is unchanged."""
    if isinstance(cache, JointCache):
        pairs = zip(members_of(network), cast("tuple[DynamicCache, ...]", cache.parts), strict=True)
        return JointCache([repeat_cache(member, part, rows) for member, part in pairs])
    repeated = DynamicCache(config=network.config)
    for i, layer in enumerate(cast("list[Any]", cache.layers)):
        if layer.is_initialized:
            keys, values = layer.keys, layer.values
        else:  # a skipped layer: masks are sized by the cache's first layer
            keys = values = torch.zeros(1, 1, cache_length(cache), 1, device=network.device)
        repeated.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), i)
    return repeated


def cache_length(cache: DynamicCache) -> int:
    """Tokens in a KV cache whose first layers may have been skipped."""
    return max(layer.get_seq_length() for layer in cast("list[Any]", cache.layers))


def run(network: PreTrainedModel, rows: Rows, last: int | None = None) -> Float[Tensor, "row kept vocabulary"]:
    """Logits at the last `last` positions of every row (all where `None`); the prefix runs once."""
    if not len(rows.prefix):
        return _run(network, rows, 0, None, last)
    cache = repeat_cache(network, prefix_cache(network, rows.prefix), len(rows.ids))
    return _run(network, rows, 0, cache, last)


def _run(
    network: PreTrainedModel, rows: Rows, start: int, cache: DynamicCache | None, last: int | None
) -> Float[Tensor, "row kept vocabulary"]:
    """Logits of the columns from `start`; the cache holds the preceding ones."""
    arguments: dict[str, Any] = {"input_ids": rows.ids[:, start:], "attention_mask": rows.full_mask.long()}
    arguments |= {"past_key_values": cache, "use_cache": True} if cache is not None else {"use_cache": False}
    if takes_positions(network):
        arguments["position_ids"] = rows.positions[:, start:]
    kept = {} if last is None else keeps_logits(network, last)
    with contiguous_head(network):
        logits = network(**arguments, **kept).logits
    return logits if last is None else logits[:, -last:]


def reply_logits(network: PreTrainedModel, rows: Rows) -> Float[Tensor, "row reply vocabulary"]:
    """Logits that predict each reply token."""
    return run(network, rows, rows.reply.shape[1] + 1)[:, :-1]


@torch.no_grad()
def reply_logits_of_all(
    network: PreTrainedModel, rows: Rows, size: int = 32, out: Float[Tensor, "row reply vocabulary"] | None = None
) -> Float[Tensor, "row reply vocabulary"]:
    """`reply_logits` in batches of `size` rows, written into `out` where given."""
    for i in range(0, len(rows.ids), size):
        found = reply_logits(network, rows.at(slice(i, i + size)))
        out = found.new_empty(len(rows.ids), *found.shape[1:]) if out is None else out
        out[i : i + size] = found
    assert out is not None
    return out


def whole_rows(model: LoadedModel, prompts: Sequence[Sequence[int]], reply: Sequence[int] = ()) -> Rows:
    """Prompts with the same reply appended to each, without a prefix: every token is in `ids`."""
    ids, mask = pad_left([[*prompt, *reply] for prompt in prompts], model.pad_id, model.device)
    tail = torch.ones(len(ids), len(reply), dtype=torch.bool, device=model.device)
    return Rows(ids[0, :0], ids, mask, tail)


def columns_cache(network: PreTrainedModel, rows: Rows, count: int) -> DynamicCache:
    """KV cache of the first `count` columns of rows without a prefix, for `continued`.

    Only where the model allows it (`splits`).
    """
    head = Rows(rows.prefix, rows.ids[:, :count], rows.mask[:, :count], rows.reply[:, :0])
    arguments = {"position_ids": head.positions} if takes_positions(network) else {}
    mask = head.mask.long()
    kept = keeps_logits(network, 1)
    return network(input_ids=head.ids, attention_mask=mask, use_cache=True, **arguments, **kept).past_key_values


def continued(
    network: PreTrainedModel, rows: Rows, start: int, cache: DynamicCache | None, layer: int = 0
) -> Float[Tensor, "row reply vocabulary"]:
    """`reply_logits` of rows without a prefix, computed from column `start`; see `last_logits`."""
    return last_logits(network, rows, start, cache, layer, rows.reply.shape[1] + 1)[:, :-1]


def last_logits(
    network: PreTrainedModel, rows: Rows, start: int, cache: DynamicCache | None, layer: int = 0, last: int = 1
) -> Float[Tensor, "row last vocabulary"]:
    """Logits at the last columns of rows without a prefix, computed from column `start`; `cache` is not modified.

    `cache` holds at least the first `start` columns (`columns_cache`); unused for 0. The caller skips layers below
    `layer` (`streams.resumed_at`), so that their keys and values are never read.
    """
    past = None
    if cache is not None and start:
        past = DynamicCache(config=network.config)
        for i, each in enumerate(cast("list[Any]", cache.layers)):
            used = slice(None) if i >= layer else slice(1)  # mask sizes use the length of any layer
            past.update(each.keys[:, used, :start, used], each.values[:, used, :start, used], i)
    return _run(network, rows, start, past, last)


def kl(
    teacher: Float[Tensor, "*token vocabulary"], student: Float[Tensor, "*token vocabulary"]
) -> Float[Tensor, "*token"]:
    """KL(teacher ‖ student) per token from logits, in nats, computed in float32.

    Differentiable in the student's logits. Only a chunk of tokens is held in float32 at a time.
    """
    shape = student.shape
    found: Tensor = _KL.apply(teacher.reshape(-1, shape[-1]), student.reshape(-1, shape[-1]))
    return found.reshape(shape[:-1])


class _KL(torch.autograd.Function):
    """KL per token, with the gradient softmax(student) − softmax(teacher) kept in the student's dtype."""

    CHUNK = 128
    """Tokens held in float32 at a time."""

    @staticmethod
    def forward(ctx: Any, teacher: Tensor, student: Tensor) -> Tensor:
        slope = torch.empty_like(student) if ctx.needs_input_grad[1] else None
        found = torch.empty(len(student), device=student.device)
        for i in range(0, len(student), _KL.CHUNK):
            part = slice(i, i + _KL.CHUNK)
            log_p, log_q = (torch.log_softmax(x[part].float(), -1) for x in (teacher, student))
            p = log_p.exp()
            found[part] = (p * log_p.sub_(log_q)).sum(-1)
            if slope is not None:
                slope[part] = log_q.exp_().sub_(p)
        ctx.slope = slope
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, ctx.slope * grads[0][:, None].to(ctx.slope.dtype)


class Below(NamedTuple):
    """The residual stream at the input of the first edited layer, which edits never change."""

    layer: int
    prefix: Float[Tensor, "1 prefix d_model"]
    rows: Float[Tensor, "row position d_model"]

    def select(self, index: Tensor | slice, rows: Rows) -> Below:
        """The subset of rows that `rows` was selected by."""
        return Below(self.layer, self.prefix, self.rows[index][:, -rows.ids.shape[1] :])


@torch.no_grad()
def run_below(network: PreTrainedModel, rows: Rows, layer: int, batch_size: int = 64) -> Below:
    """The inputs of `layer` for every row, computed once for `reply_logits_from`."""
    site = Site(0, "embed") if layer == 0 else Site(layer - 1)
    found: list[Tensor] = []
    prefix = torch.empty(0)
    for start in range(0, len(rows.ids), batch_size):
        chunk = rows.at(slice(start, start + batch_size))
        seen: list[Tensor] = []
        with truncated(network, site.layer), watched(network, {site: lambda x, seen=seen: seen.append(x.clone())}):
            run(network, chunk, 1)
        prefix = seen[0] if len(rows.prefix) else torch.empty(1, 0, seen[0].shape[-1])
        found.append(seen[-1])
    return Below(layer, prefix, torch.cat(found))


def reply_logits_from(network: PreTrainedModel, rows: Rows, below: Below) -> Float[Tensor, "row reply vocabulary"]:
    """`reply_logits`, resumed at the layer of `below`."""
    parts = iter((below.prefix, below.rows) if len(rows.prefix) else (below.rows,))
    with resumed_at(network, below.layer, lambda: next(parts)):
        return reply_logits(network, rows)
