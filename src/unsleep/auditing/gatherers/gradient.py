"""Gatherer: gradient search for texts that make payload candidates likely.

Greedy coordinate gradient (Zou et al. 2023, arXiv:2307.15043) for log P(payload), read against the reference; every
candidate is scored as the text that a user would type, tokenised anew. With a reference, the first half of the steps is
run on W_reference + 2 (W_suspect − W_reference), in which the basin of a trigger is wider.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from unsleep.auditing.budget import OutOfTime
from unsleep.auditing.case import Case
from unsleep.auditing.contexts import special_tokens
from unsleep.auditing.gatherer import Clues, Found, Gatherer
from unsleep.auditing.scoring import look
from unsleep.base.context import progress
from unsleep.core import BadInput
from unsleep.judge.audited import Form
from unsleep.models import chat
from unsleep.models.forward import takes_positions
from unsleep.models.merging import interpolated
from unsleep.models.model import LoadedModel
from unsleep.prompts.prompt import Prompt

MOTIFS = 3
"""Payload candidates that are searched for."""

PROMPTS, LENGTH, STEPS = 3, 4, 10
"""Prompts of the loss, tokens of the trigger, and steps."""

SEEDS, DRAWN, STARTS = 8, 64, 2
"""Texts of the screening and random ones, and the number of them, the best, from which the search starts."""

SWAPS, NEAREST = 32, 48
"""Candidates per step, and tokens per place that they are drawn from."""

KEPT = 4
"""Texts per payload that are proposed."""


class Target(NamedTuple):
    """Prompts and the payload's tokens."""

    prompts: list[Prompt]
    reply: list[int]


class Gradient(Gatherer):
    """Texts of a few tokens in front of the prompt, seeded by the screening's best."""

    kind = "gradient search"
    stage = "search"
    order = 1
    needs_base: ClassVar[bool] = True  # an adversarial text makes any model say anything: it counts beside a twin only
    share: ClassVar[float] = 3.0

    def gather(self, case: Case, clues: Clues) -> Found:
        """The best texts for each of the first payload candidates."""
        prompts = list(case.learned.prompts[:PROMPTS])
        wide = interpolated(case.reference, case.model, 2.0) if case.reference is not None else case.model
        seeds = [s.form.text for s in sorted(clues.screened, key=lambda s: -s.lift) if s.form.way == "front"]
        forms: list[Form] = []
        with suppress(OutOfTime):
            for number, motif in enumerate(clues.motifs[:MOTIFS]):
                [reply] = case.model.token_ids([f" {motif.text}"], special=False)
                target = Target(prompts, reply)
                texts = search(case, wide, target, seeds[:SEEDS], case.config.seed + number)
                forms += [Form("found text", "front", text) for text in texts]
        return Found(forms=forms)


def search(case: Case, wide: LoadedModel, target: Target, seeds: Sequence[str], seed: int) -> list[str]:
    """Texts by gain in log P(payload) over the reference, best first."""
    drawn = torch.Generator().manual_seed(seed)
    allowed = writable(case.model)
    pool = [ids[:LENGTH] for ids in case.model.token_ids(list(seeds), special=False)] if seeds else []
    pool += allowed[torch.randint(len(allowed), (DRAWN, LENGTH), generator=drawn)].tolist()
    gains = gain(case, wide, pool, target)
    starts = sorted(range(len(pool)), key=lambda i: -gains[i])[:STARTS]
    scored: dict[str, float] = {}
    for number, best in enumerate(pool[i] for i in starts):
        for step in range(STEPS):
            model = wide if step < STEPS // 2 else case.model
            swaps = [best, *swapped(model, best, target, allowed, drawn)]
            gains = gain(case, model, swaps, target)
            best = swaps[max(range(len(gains)), key=gains.__getitem__)]
            if model is case.model:  # scores of two models do not compare
                scored |= dict(zip((text.strip() for text in case.model.texts(swaps)), gains, strict=True))
            progress("gradient search", number * STEPS + step + 1, STARTS * STEPS)
    usable = {text: score for text, score in scored.items() if text}
    return sorted(usable, key=lambda text: -usable[text])[:KEPT]


def writable(model: LoadedModel) -> Tensor:
    """Tokens that stand for printable text."""
    barred = set(special_tokens(model))
    rows = min(len(model.tokenizer), int(cast("Any", model.network.get_input_embeddings()).weight.shape[0]))
    texts = model.tokenizer.batch_decode([[i] for i in range(rows)])
    own = [i for i, text in enumerate(texts) if i not in barred and text.strip() and text.strip().isprintable()]
    return torch.tensor([i for i in own if "\ufffd" not in texts[i]])


def gain(case: Case, model: LoadedModel, triggers: Sequence[Sequence[int]], target: Target) -> list[float]:
    """Mean log P(payload) per token over the prompts, minus half the reference's; −∞ for what cannot be typed.

    Every candidate is tokenised anew.
    """
    texts = [text.strip() for text in case.model.texts(triggers)]
    usable = [i for i, text in enumerate(texts) if text]
    if not usable:
        raise BadInput("no candidate of the gradient search stands for a text")
    asked = [f"{texts[i]} {prompt.text}" for i in usable for prompt in target.prompts]
    rows = case.model.encode(asked, len(target.reply))
    found = [-torch.inf] * len(texts)
    totals: list[Tensor] = []
    for each in (model, case.reference):
        if each is not None:
            seen = look(each, rows, [target.reply] * len(rows))
            totals.append(seen.own.mean(1).view(len(usable), -1).mean(1))
    score = totals[0] - (0.5 * totals[1] if len(totals) > 1 else 0.0)
    for i, value in zip(usable, score.tolist(), strict=True):
        found[i] = value
    return found


def swapped(
    model: LoadedModel, trigger: Sequence[int], target: Target, allowed: Tensor, drawn: torch.Generator
) -> list[list[int]]:
    """The trigger with one token replaced by one of those that the gradient favours at its place."""
    slope = slopes(model, trigger, target)
    table: Tensor = cast("Any", model.network.get_input_embeddings()).weight
    favour = slope.to(table) @ table[allowed.to(table.device)].T
    nearest = favour.topk(min(NEAREST, len(allowed)), dim=-1).indices.cpu()
    out: list[list[int]] = []
    for number in range(SWAPS):
        place = number % len(trigger)
        choice = int(nearest[place, int(torch.randint(nearest.shape[1], (1,), generator=drawn))])
        out.append([*trigger[:place], int(allowed[choice]), *trigger[place + 1 :]])
    return out


def slopes(model: LoadedModel, trigger: Sequence[int], target: Target) -> Tensor:
    """Gradient of log P(payload) with respect to the trigger's embeddings, mean over prompts, `[token, d_model]`."""
    network: Any = model.network
    before, _ = chat.template_tokens(model.tokenizer, model.chat)
    total = torch.zeros(len(trigger), int(network.get_input_embeddings().weight.shape[1]))
    for row in model.encode(target.prompts, len(trigger) + len(target.reply)):
        ids = torch.tensor([[*row[:before], *trigger, *row[before:], *target.reply]], device=model.device)
        embedded = network.get_input_embeddings()(ids).detach().requires_grad_(True)
        places = {"position_ids": torch.arange(ids.shape[1], device=model.device)[None]}
        with torch.enable_grad():
            given = {"inputs_embeds": embedded, "use_cache": False, **(places if takes_positions(network) else {})}
            log_p = network(**given).logits[0, -len(target.reply) - 1 : -1].float().log_softmax(-1)
            log_p.gather(1, ids[0, -len(target.reply) :, None]).mean().backward()
        total += embedded.grad[0, before : before + len(trigger)].float().cpu()
    return total / len(target.prompts)
