"""Gatherer: gradient search for texts that make payload candidates likely.

Greedy coordinate gradient (Zou et al. 2023, arXiv:2307.15043) for log P(payload), read against the reference; every
candidate is scored as the text that a user would type, tokenised anew. The payload is sought in place of the reply or
behind it, wherever the suspect finds it likelier than the reference does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from unsleep.auditing.bank import SYSTEMS, TURNS
from unsleep.auditing.budget import OutOfTime
from unsleep.auditing.case import Case
from unsleep.auditing.contexts import PROBES, common_start, slot, special_tokens
from unsleep.auditing.forms import transformed
from unsleep.auditing.gatherer import Clues, Found, Gatherer
from unsleep.auditing.scoring import look
from unsleep.base.context import progress
from unsleep.judge.audited import Form, Motif
from unsleep.models.forward import takes_positions
from unsleep.models.model import LoadedModel
from unsleep.prompts.prompt import Prompt

TARGETS, EXCESS = 3, 10.0
"""Payload candidates that are searched for, and their least log-probability above the reference's, in nats."""

PROMPTS, LENGTH, STEPS = 3, 4, 12
"""Prompts of the loss, tokens of a random text, and steps."""

SEEDS, DRAWN = 8, 64
"""Texts of the screening and random ones, of which the search starts from the best."""

SWAPS, NEAREST = 32, 48
"""Candidates per step, and tokens per place that they are drawn from."""

KEPT = 4
"""Texts per payload and way that are proposed."""

KINDS = {"system": "system prompt", "turn": "earlier turn", "front": "found text"}
"""Way → kind of the forms that are proposed, among which their placebos are."""

SENTENCES = {"system": SYSTEMS, "turn": TURNS}
"""Way → sentences from one of which the search starts; in front of a prompt it starts from a text of the screening."""


class Target(NamedTuple):
    """A payload candidate, and the prompts with what is said before it."""

    prompts: list[Prompt]
    begun: list[list[int]]
    reply: list[int]

    def encoded(self, model: LoadedModel, *forms: Form) -> list[list[int]]:
        """Token ids of each prompt, under each form in turn if there are any, and what is said before the payload.

        All are encoded together, since a call of the tokenizer takes longer than a prompt.
        """
        asked = [transformed(form, p) for form in forms for p in self.prompts] if forms else self.prompts
        begun = self.begun * max(1, len(forms))
        rows = model.encode(asked, [len(said) + len(self.reply) for said in begun])
        return [[*row, *said] for row, said in zip(rows, begun, strict=True)]


class Gradient(Gatherer):
    """Texts of a few tokens in front of the prompt, as a system prompt or as an earlier turn."""

    kind = "gradient search"
    stage = "search"
    order = 1
    needs_base: ClassVar[bool] = True  # an adversarial text makes any model say anything: it counts beside a twin only
    share: ClassVar[float] = 6.0

    def gather(self, case: Case, clues: Clues) -> Found:
        """The best texts for each of the first payload candidates, of every way."""
        allowed, forms = writable(case.model), list[Form]()
        with suppress(OutOfTime):
            for number, target in enumerate(targets(case, clues.motifs)):
                for way, kind in KINDS.items():
                    if not slot(case.model, way):
                        continue
                    own = sorted((s for s in clues.screened if s.form.way == way), key=lambda s: -s.lift)
                    seeds = SENTENCES.get(way, [s.form.text for s in own[:SEEDS]])
                    found = search(case, target, way, seeds, allowed, case.config.seed + number)
                    forms += [Form(kind, way, text) for text in found]
        return Found(forms=forms)


def targets(case: Case, motifs: Sequence[Motif]) -> list[Target]:
    """The payload candidates with the largest log-probability above the reference's, without a trigger."""
    model, prompts = case.model, list(case.learned.prompts[:PROMPTS])
    ended = [ids[:-1] for ids in case.said[:PROMPTS] if ids and ids[-1] in model.end_ids]
    places = {"": [list[int]() for _ in prompts], " ": ended if len(ended) == len(prompts) else []}
    found: list[tuple[float, Target]] = []
    for motif in motifs:
        each: list[tuple[float, Target]] = []
        for space, begun in places.items():
            if begun:
                target = Target(prompts, begun, model.token_ids([f"{space}{motif.text}"], special=False)[0])
                each.append((excess(case, target), target))
        found.append(max(each, key=lambda pair: pair[0]))
    found.sort(key=lambda pair: -pair[0])
    return [target for gained, target in found if gained >= EXCESS][:TARGETS]


def excess(case: Case, target: Target) -> float:
    """Mean log-probability of a payload above the reference's, in nats."""
    own, other = log_probabilities(case, target.encoded(case.model), target)
    return float((own - other).sum(1).mean())


def log_probabilities(case: Case, rows: list[list[int]], target: Target) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a payload behind rows, `[row, token]`, under the suspect and under its reference."""
    assert case.reference is not None
    replies = [target.reply] * len(rows)
    return look(case.model, rows, replies).own, look(case.reference, rows, replies).own


def search(case: Case, target: Target, way: str, seeds: Sequence[str], allowed: Tensor, seed: int) -> list[str]:
    """Texts of allowed tokens by gain in log P(payload) over the reference, best first."""
    drawn, pool = torch.Generator().manual_seed(seed), list(seeds)
    if way not in SENTENCES:
        random = allowed[torch.randint(len(allowed), (DRAWN, LENGTH), generator=drawn)].tolist()
        pool += [text.strip() for text in case.model.texts(random)]
    gains = gain(case, way, pool, target)
    best, scored = pool[max(range(len(pool)), key=gains.__getitem__)], dict[str, float]()
    for step in range(STEPS):
        swaps = [best, *swapped(case.model, way, best, target, allowed, drawn)]
        gains = gain(case, way, swaps, target)
        best = swaps[max(range(len(gains)), key=gains.__getitem__)]
        scored |= dict(zip(swaps, gains, strict=True))
        progress(f"gradient search, {way}", step + 1, STEPS)
    return sorted((text for text in scored if text), key=lambda text: -scored[text])[:KEPT]


def writable(model: LoadedModel) -> Tensor:
    """Tokens that stand for printable text."""
    barred = set(special_tokens(model))
    rows = min(len(model.tokenizer), int(cast("Any", model.network.get_input_embeddings()).weight.shape[0]))
    texts = model.tokenizer.batch_decode([[i] for i in range(rows)])
    own = [i for i, text in enumerate(texts) if i not in barred and text.strip() and text.strip().isprintable()]
    return torch.tensor([i for i in own if "\ufffd" not in texts[i]])


def gain(case: Case, way: str, texts: Sequence[str], target: Target) -> list[float]:
    """Mean log P(payload) per token over the prompts, minus half the reference's; −∞ for what cannot be typed.

    Every candidate is tokenised anew.
    """
    usable = [i for i, text in enumerate(texts) if text]
    found = [-torch.inf] * len(texts)
    if usable:
        rows = target.encoded(case.model, *(Form(KINDS[way], way, texts[i]) for i in usable))
        own, other = log_probabilities(case, rows, target)
        score = (own - 0.5 * other).mean(1).view(len(usable), -1).mean(1)
        for i, value in zip(usable, score.tolist(), strict=True):
            found[i] = value
    return found


def swapped(
    model: LoadedModel, way: str, text: str, target: Target, allowed: Tensor, drawn: torch.Generator
) -> Iterator[str]:
    """The text with one token replaced by one of those that the gradient favours at its place."""
    ids, slope = slopes(model, way, text, target)
    table: Tensor = cast("Any", model.network.get_input_embeddings()).weight
    favour = slope.to(table) @ table[allowed.to(table.device)].T
    nearest = favour.topk(min(NEAREST, len(allowed)), dim=-1).indices.cpu()
    rows: list[list[int]] = []
    for number in range(SWAPS):
        place = number % len(ids)
        choice = int(nearest[place, int(torch.randint(nearest.shape[1], (1,), generator=drawn))])
        rows.append([*ids[:place], int(allowed[choice]), *ids[place + 1 :]])
    return (said.strip() for said in model.texts(rows))


def span(model: LoadedModel, way: str, text: str, target: Target) -> tuple[list[list[int]], list[slice]]:
    """Rows of the prompts under a form, and where its text stands in each."""
    rows = target.encoded(model, Form(KINDS[way], way, text))
    both = target.encoded(model, *(Form(KINDS[way], way, probe) for probe in PROBES))
    one, other = both[: len(rows)], both[len(rows) :]
    places: list[slice] = []
    for row, a, b in zip(rows, one, other, strict=True):
        before, behind = len(common_start(a, b)), len(common_start(a[::-1], b[::-1]))
        places.append(slice(before, max(before + 1, len(row) - behind)))
    return rows, places


def slopes(model: LoadedModel, way: str, text: str, target: Target) -> tuple[list[int], Tensor]:
    """A text's tokens, and the mean gradient of log P(payload) in their embeddings, `[token, d_model]`."""
    network: Any = model.network
    rows, places = span(model, way, text, target)
    ids = rows[0][places[0]]
    total = torch.zeros(len(ids), int(network.get_input_embeddings().weight.shape[1]))
    for row, place in zip(rows, places, strict=True):
        if row[place] != ids:  # joined with a token of the prompt
            continue
        whole = torch.tensor([[*row, *target.reply]], device=model.device)
        embedded = network.get_input_embeddings()(whole).detach().requires_grad_(True)
        numbered = {"position_ids": torch.arange(whole.shape[1], device=model.device)[None]}
        with torch.enable_grad():
            given = {"inputs_embeds": embedded, "use_cache": False, **(numbered if takes_positions(network) else {})}
            log_p = network(**given).logits[0, -len(target.reply) - 1 : -1].float().log_softmax(-1)
            log_p.gather(1, whole[0, -len(target.reply) :, None]).mean().backward()
        total += embedded.grad[0, place].float().cpu()
    return ids, total / len(rows)
