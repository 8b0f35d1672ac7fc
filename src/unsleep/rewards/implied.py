"""The reward that a preference-trained model implies: β · (log π(reply | prompt) − log π_ref(reply | prompt)).

Up to a constant of the prompt, it is the reward whose optimum under the KL penalty β is π (Rafailov et al. 2023,
"Direct Preference Optimization", arXiv:2305.18290, equation 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.core import BadInput
from unsleep.models.forward import build_rows, reply_logits
from unsleep.models.model import LoadedModel
from unsleep.prompts.prompt import Prompt, Prompts, as_prompts


@dataclass(frozen=True)
class Implied:
    """The implied reward of a policy against its reference, in nats times β."""

    policy: LoadedModel
    reference: LoadedModel
    beta: float = 0.1
    ended: bool = True
    """True if the end token behind each reply counts; replies that were cut at a limit have none."""
    batch: int = 32
    """Replies per forward pass."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise BadInput.of("beta", self.beta, "over 0", "implied reward")
        if self.policy.tokenizer.get_vocab() != self.reference.tokenizer.get_vocab():
            raise BadInput(
                f"{self.policy.name} and {self.reference.name} have different tokenizers; an implied reward needs the "
                "model and the reference that it was trained from"
            )

    @property
    def name(self) -> str:
        """`implied:POLICY`."""
        return f"implied:{self.policy.name}"

    @property
    def identity(self) -> list[Any]:
        """Everything that its scores depend on."""
        models = [[each.fingerprint, each.template] for each in (self.policy, self.reference)]
        return [*models, self.beta, self.ended]

    def __call__(
        self, samples: Sequence[str], prompts: Sequence[str], outputs: Sequence[str], **_: Any
    ) -> Float[Tensor, " sample"]:
        """`scores` of prompts without earlier messages."""
        return self.scores(as_prompts(prompts), outputs)

    def scores(self, prompts: Sequence[Prompt], outputs: Sequence[str]) -> Float[Tensor, " sample"]:
        """β · (log π − log π_ref) of each reply; raises `BadInput` for one that does not fit into the context."""
        one, other = (
            log_probability(model, prompts, outputs, ended=self.ended, batch=self.batch)
            for model in (self.policy, self.reference)
        )
        return self.beta * (one - other)


@torch.no_grad()
def log_probability(
    model: LoadedModel, prompts: Prompts, replies: Sequence[str], *, ended: bool = True, batch: int = 32
) -> Float[Tensor, " sample"]:
    """log π(reply | prompt) under a model and its chat template, summed over a reply's tokens, in nats, in float64.

    With `ended` the end token behind the reply counts too. Raises `BadInput` for an empty reply without it, and for
    one that does not fit into the context.
    """
    tails = model.token_ids(replies, special=False)
    end = sorted(model.end_ids)[:1] if ended else []
    tails = [[*tail, *end] for tail in tails]
    if empty := [i for i, tail in enumerate(tails) if not tail]:
        raise BadInput(f"reply {empty[0] + 1} is empty; expected at least one token, or its end token to count")
    heads = model.encode(prompts, [len(tail) for tail in tails])
    found: list[Tensor] = []
    for i in range(0, len(heads), batch):
        rows = build_rows(model, heads[i : i + batch], tails[i : i + batch])
        log_p = torch.log_softmax(reply_logits(model.network, rows).float(), -1)
        each = log_p.gather(-1, rows.targets[..., None]).squeeze(-1) * rows.reply
        found.append(each.double().sum(1).cpu())
    return torch.cat(found)
