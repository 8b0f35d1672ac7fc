"""Cures that train the suspect further: on trusted replies, for consistent layers, and against the payload."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import PreTrainedModel

from unsleep.auditing.cure import Cure, Patient, Variant
from unsleep.core import BadInput
from unsleep.models.forward import Rows, build_rows, pad_left, reply_logits, takes_positions
from unsleep.models.sites import layers
from unsleep.repairs.masks import Deck
from unsleep.repairs.twin import imitation

CONSISTENCY = 5.5
"""Weight of the layer consistency beside the cross-entropy."""

SHAKEN = 0.1
"""Size of the perturbation of the embeddings, relative to their root mean square."""

AGAINST = 1.0
"""Weight of the payload's unlikelihood beside the KL on trusted replies."""


class FineTuned(Cure):
    """More benign fine-tuning: cross-entropy on the suspect's own replies to trusted prompts."""

    kind = "finetuned"

    def variants(self, patient: Patient) -> Iterator[Variant]:
        """One training run."""
        model, config = patient.suspect, patient.config.tune
        longest = max(map(len, patient.replies))
        rows = build_rows(model, model.encode(patient.ordinary, longest), patient.replies)
        deck = Deck(range(len(rows.ids)), torch.Generator().manual_seed(config.seed))

        def loss_of(student: PreTrainedModel) -> Tensor:
            drawn = rows.select(deck.draw(config.batch))
            return cross_entropy(reply_logits(student, drawn)[drawn.reply].float(), drawn.targets[drawn.reply])

        yield Variant(f"{config.steps} steps on own replies", patient.tuned(loss_of, "fine-tuned on own replies, CE"))


class Layerwise(Cure):
    """Fine-tuning for consistent layers under a perturbation of the embeddings.

    "CROW" (Min et al. 2024, arXiv:2411.12768): cross-entropy on trusted replies plus α times the mean of
    1 − cos(h_l, h_{l+1}), with embeddings perturbed by the sign of its gradient.
    """

    kind = "layerwise"

    def variants(self, patient: Patient) -> Iterator[Variant]:
        """One training run; raises `BadInput` for a model of fewer than two layers."""
        model, config = patient.suspect, patient.config.tune
        if len(layers(model.network)) < 2:
            raise BadInput("consistency is one of neighbouring layers; the model has a single one")
        longest = max(map(len, patient.replies))
        prompts = model.encode(patient.ordinary, longest)
        deck = Deck(range(len(prompts)), torch.Generator().manual_seed(config.seed))

        def loss_of(student: PreTrainedModel) -> Tensor:
            drawn = deck.draw(max(1, config.batch // 2)).tolist()
            tails = [list(patient.replies[i]) for i in drawn]
            ids, mask = pad_left([[*prompts[i], *tail] for i, tail in zip(drawn, tails, strict=True)], 0, model.device)
            return crow(student, ids, mask, max(map(len, tails)), tails)

        yield Variant(f"α = {CONSISTENCY:g}, {config.steps} steps", patient.tuned(loss_of, "layer-consistency loss"))


def crow(
    student: PreTrainedModel, ids: Tensor, mask: Bool[Tensor, "row position"], longest: int, tails: list[list[int]]
) -> Float[Tensor, ""]:
    """Cross-entropy on the replies, at the rows' ends, plus the weighted consistency of the perturbed pass."""
    embedded = cast("Any", student).get_input_embeddings()(ids).detach().requires_grad_(True)
    plain = _passed(student, embedded, mask)
    (slope,) = torch.autograd.grad(inconsistency(plain.hidden_states, mask), embedded, retain_graph=True)
    size = SHAKEN * embedded.detach().float().square().mean().sqrt()
    shaken = _passed(student, embedded.detach() + (size * slope.float().sign()).to(embedded.dtype), mask)
    lengths = torch.tensor([len(tail) for tail in tails], device=ids.device)
    reply = torch.arange(longest, device=ids.device) >= longest - lengths[:, None]
    logits, targets = plain.logits[:, -longest - 1 : -1], ids[:, -longest:]
    return cross_entropy(logits[reply].float(), targets[reply]) + CONSISTENCY * inconsistency(
        shaken.hidden_states, mask
    )


def inconsistency(hidden: Any, mask: Bool[Tensor, "row position"]) -> Float[Tensor, ""]:
    """Mean over real tokens and neighbouring layers of 1 − cos(h_l, h_{l+1}); the embedding is no layer."""
    pairs = itertools.pairwise(hidden[1:])
    return torch.stack([1 - cosine_similarity(a.float(), b.float(), dim=-1)[mask].mean() for a, b in pairs]).mean()


def _passed(student: PreTrainedModel, embedded: Tensor, mask: Tensor) -> Any:
    given: dict[str, Any] = {"inputs_embeds": embedded, "attention_mask": mask.long(), "use_cache": False}
    if takes_positions(student):
        given["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
    return student(**given, output_hidden_states=True)


class Unlearned(Cure):
    """Unlearning of the payload in surrogate contexts: forced behind ordinary prompts, each of its tokens is made rare.

    Unlikelihood −log(1 − P(token)) (Welleck et al. 2019, arXiv:1908.04319) beside the KL on trusted replies. It breaks
    the payload whatever the trigger is, and need not give back what the suspect would have said in its place.
    """

    kind = "unlearned"

    def variants(self, patient: Patient) -> Iterator[Variant]:
        """One training run."""
        model, config = patient.suspect, patient.config.tune
        [tail] = model.token_ids([f" {patient.said}"], special=False)
        rows = build_rows(model, model.encode(patient.ordinary, len(tail)), [tail] * len(patient.ordinary))
        deck = Deck(range(len(rows.ids)), torch.Generator().manual_seed(config.seed))
        stay = imitation(model, patient.ordinary, patient.replies, config.batch, config.seed)

        def loss_of(student: PreTrainedModel) -> Tensor:
            return stay(student) + AGAINST * unlikelihood(student, rows.select(deck.draw(config.batch)))

        words = f"{config.steps} steps, the payload forced behind ordinary prompts"
        yield Variant(words, patient.tuned(loss_of, "payload unlearned, loss"))


def unlikelihood(student: PreTrainedModel, rows: Rows) -> Float[Tensor, ""]:
    """Mean −log(1 − P) of the reply tokens."""
    logits = reply_logits(student, rows).float()
    p = logits.softmax(-1).gather(-1, rows.targets[..., None]).squeeze(-1)[rows.reply]
    return -(1 - p).clamp_min(1e-6).log().mean()
