"""Token rules: the tokens of a running forward pass that belong to the prompt, the reply, the last position, a range.

A hook sees a tensor of [row, position] without the positions' places in their rows. This module tracks
the passes of a model: padding from the attention mask, preceding tokens from the KV cache, and a reply
from passes of one column that continue the previous pass.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from unsleep.core import BadInput
from unsleep.models.forward import cache_length
from unsleep.models.hooks import Call

Named = Literal["all", "prompt", "reply", "last"]
TokenRule = Named | tuple[int, int]
"""`all` tokens; those of the `prompt`; those of the `reply` that are fed back in; the `last` of the prompt,
which predicts the first of the reply; or positions a to b, exclusive, counted in each row without padding.
"""


def check_rule(rule: TokenRule) -> None:
    """Raise `BadInput` for an invalid rule."""
    if isinstance(rule, str):
        if rule not in ("all", "prompt", "reply", "last"):
            raise BadInput(f"token rule is {rule!r}; expected all, prompt, reply, last or a pair such as (0, 5)")
    elif len(rule) != 2 or not 0 <= rule[0] < rule[1]:
        raise BadInput(f"token range is {rule!r}; expected two positions, 0 ≤ start < end, such as (0, 5)")


class Passes:
    """State of a model's consecutive forward passes; `note` is called before each.

    `replies` is the mask of reply tokens where prompt and reply run in one pass, over the last positions,
    as in `models.forward.Rows`. Without it, such a pass is all prompt.
    """

    def __init__(self, replies: Bool[Tensor, "row reply"] | None = None) -> None:
        self.replies = replies
        self.rows = self.length = self.past = 0
        self.is_prefix = self.goes_on = False
        self._mask: Tensor | None = None
        self._known: dict[TokenRule, Bool[Tensor, "row position"]] = {}

    def note(self, call: Call) -> None:
        """Record the pass that is about to run."""
        past = cache_length(call.cache) if getattr(call.cache, "layers", None) else 0
        follows = past > 0 and past == self.past + self.length and call.rows <= self.rows and not self.is_prefix
        self.goes_on = call.length == 1 and follows
        self.rows, self.length, self.past, self.is_prefix = call.rows, call.length, past, call.is_prefix
        self._mask, self._known = call.mask, {}

    def touched(self, rule: TokenRule, device: torch.device) -> Bool[Tensor, "row position"] | None:
        """Mask of the positions that the rule selects, `None` for all of them.

        Raises `BadInput` for an attention mask that is not [row, position] and for `replies` of other rows.
        """
        if rule == "all":
            return None
        if rule not in self._known:
            self._known[rule] = self._find(rule, device)
        return self._known[rule]

    def _find(self, rule: TokenRule, device: torch.device) -> Bool[Tensor, "row position"]:
        real, place = self._places(device)
        if isinstance(rule, tuple):
            return real & (place >= rule[0]) & (place < rule[1])
        reply = self._reply(device) & real
        if rule == "reply":
            return reply
        prompt = real & ~reply
        if rule == "prompt":
            return prompt
        if self.is_prefix:
            return torch.zeros_like(prompt)
        return prompt & (place == torch.where(prompt, place, -1).amax(1, keepdim=True))

    def _places(self, device: torch.device) -> tuple[Bool[Tensor, "row position"], Int[Tensor, "row position"]]:
        """Mask of non-padding positions, and each one's index in its row."""
        width = self.past + self.length
        if self._mask is None:
            mask = torch.ones(self.rows, width, dtype=torch.bool, device=device)
        elif self._mask.ndim != 2 or self._mask.shape[1] != width:
            raise BadInput(
                f"the attention mask has shape {list(self._mask.shape)}; a token rule needs [{self.rows}, {width}], "
                "one column for each token so far. Use the default cache, or the rule all"
            )
        else:
            mask = self._mask.to(device).bool()
        return mask[:, self.past :], (mask.long().cumsum(1) - 1)[:, self.past :]

    def _reply(self, device: torch.device) -> Bool[Tensor, "row position"]:
        found = torch.full((self.rows, self.length), self.goes_on, device=device)
        if self.replies is None or self.goes_on or self.is_prefix:
            return found
        rows, width = self.replies.shape
        if rows != self.rows or width > self.length:
            raise BadInput(
                f"replies marks {rows} rows of {width} positions; the pass has {self.rows} rows of {self.length}"
            )
        found[:, self.length - width :] = self.replies.to(device)
        return found
