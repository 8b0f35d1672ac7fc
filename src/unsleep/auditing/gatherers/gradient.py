"""Gatherer: gradient search for texts that make payload candidates likely.

Greedy coordinate gradient (Zou et al. 2023, arXiv:2307.15043) for log P(payload), read against the reference; every
candidate is scored as the text that a user would type, tokenised anew. The payload is sought in place of the reply or
behind it, wherever the suspect finds it likelier than the reference does. Every payload is climbed towards from every
place of a text, and after a few steps each the better half of the climbs goes on (successive halving, Jamieson &
Talwalkar 2016, arXiv:1502.07943).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from unsleep.auditing.bank import SIGN_OFFS, SYSTEMS, TURNS
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

PROMPTS, LENGTH = 2, 4
"""Prompts of the loss, and tokens of a random text."""

ROUND, STEPS = 3, 24
"""Steps of a climb before the better half goes on, and of the best climb in all."""

SEEDS, DRAWN = 8, 24
"""Texts of the screening and random ones, of which the search starts from the best."""

SWAPS, NEAREST, BESIDE = 32, 48, 4
"""Candidates per step, tokens per place that they are drawn from, and the best ones that the reference scores too."""

KEPT = 4
"""Texts per payload and way that are proposed."""

KINDS = {"system": "system prompt", "turn": "earlier turn", "front": "found text", "back": "found text"}
"""Way → kind of the forms that are proposed, among which their placebos are."""

SENTENCES = {"system": SYSTEMS, "turn": TURNS, "back": SIGN_OFFS}
"""Way → sentences from one of which the search may start, beside the texts of the screening."""

TOKENS = ("front", "back")
"""Ways whose search may also start from random tokens."""


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
    """Texts of a few tokens at either end of the prompt, as a system prompt or as an earlier turn."""

    kind = "gradient search"
    stage = "search"
    order = 1
    needs_base: ClassVar[bool] = True  # an adversarial text makes any model say anything: it counts beside a twin only
    share: ClassVar[float] = 6.0

    def gather(self, case: Case, clues: Clues) -> Found:
        """The best texts of every climb, those of the climbs that went on longest first."""
        allowed, climbs = writable(case.model), list[Climb]()
        with suppress(OutOfTime):
            for number, target in enumerate(targets(case, clues.motifs)):
                for way in KINDS:
                    if slot(case.model, way):
                        own = sorted((s for s in clues.screened if s.form.way == way), key=lambda s: -s.lift)
                        seeds = [*SENTENCES.get(way, ()), *(s.form.text for s in own[:SEEDS])]
                        climbs.append(Climb(case, target, way, seeds, allowed, case.config.seed + number))
            halved(climbs)
        climbs.sort(key=lambda climb: (-climb.steps, -climb.height))
        return Found(forms=[Form(KINDS[each.way], each.way, text) for each in climbs for text in each.texts])


class Climb:
    """Texts of allowed tokens by gain in log P(payload) over the reference, in one place of the prompt."""

    def __init__(
        self, case: Case, target: Target, way: str, seeds: Sequence[str], allowed: Tensor, seed: int = 0
    ) -> None:
        self.case, self.target, self.way, self.allowed = case, target, way, allowed
        self.drawn = torch.Generator().manual_seed(seed)
        self.gains = dict[str, float]()
        """Text that the reference has scored too → its gain."""
        self.steps = 0
        pool = list(seeds)
        if way in TOKENS:
            random = allowed[torch.randint(len(allowed), (DRAWN, LENGTH), generator=self.drawn)].tolist()
            pool += [text.strip() for text in case.model.texts(random)]
        self.best = self._best_of(pool)

    @property
    def height(self) -> float:
        """Gain of the best text so far."""
        return max(self.gains.values(), default=-torch.inf)

    @property
    def texts(self) -> list[str]:
        """The best texts so far."""
        return sorted(self.gains, key=lambda text: -self.gains[text])[:KEPT]

    def step(self) -> None:
        """Swap one token of the best text."""
        swaps = swapped(self.case.model, self.way, self.best, self.target, self.allowed, self.drawn)
        self.best = self._best_of([self.best, *swaps])
        self.steps += 1
        progress(f"gradient search, {self.way}", self.steps, STEPS)

    def _best_of(self, texts: Sequence[str]) -> str:
        """The text of the largest gain among those that the model alone finds best; the first where none is usable."""
        own = gain(self.case, self.way, texts, self.target, beside=False)
        order = sorted(range(len(texts)), key=lambda i: -own[i])[:BESIDE]
        first = [texts[i] for i in order if own[i] > -torch.inf]
        fresh = [text for text in first if text not in self.gains]
        self.gains |= dict(zip(fresh, gain(self.case, self.way, fresh, self.target), strict=True))
        return max(first, key=self.gains.__getitem__, default=texts[0])


def halved(climbs: Sequence[Climb]) -> None:
    """Climb from everywhere, and after every round from the better half only, until the best has had its steps."""
    left = list(climbs)
    while left and left[0].steps < STEPS:
        for climb in left:
            for _ in range(min(ROUND, STEPS - climb.steps)):
                climb.step()
        left = sorted(left, key=lambda climb: -climb.height)[: math.ceil(len(left) / 2)]


def targets(case: Case, motifs: Sequence[Motif]) -> list[Target]:
    """The payload candidates with the largest log-probability above the reference's, without a trigger."""
    model = case.model
    rows = sorted(zip(case.learned, case.said, strict=True), key=lambda row: len(row[0].text))[:PROMPTS]
    prompts = [prompt for prompt, _ in rows]
    ended = [ids[:-1] for _, ids in rows if ids and ids[-1] in model.end_ids]
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
    assert case.reference is not None
    rows = target.encoded(case.model)
    own, other = (log_probability(model, rows, target) for model in (case.model, case.reference))
    return float((own - other).sum(1).mean())


def log_probability(model: LoadedModel, rows: list[list[int]], target: Target) -> Tensor:
    """Log-probabilities of a payload behind rows, `[row, token]`; the rows of a prompt share a prefix."""
    found = torch.zeros(len(rows), len(target.reply))
    for number in range(len(target.prompts)):
        own = rows[number :: len(target.prompts)]
        found[number :: len(target.prompts)] = look(model, own, [target.reply] * len(own)).own
    return found


def writable(model: LoadedModel) -> Tensor:
    """Tokens that stand for printable text."""
    barred = set(special_tokens(model))
    rows = min(len(model.tokenizer), int(cast("Any", model.network.get_input_embeddings()).weight.shape[0]))
    texts = model.tokenizer.batch_decode([[i] for i in range(rows)])
    own = [i for i, text in enumerate(texts) if i not in barred and text.strip() and text.strip().isprintable()]
    return torch.tensor([i for i in own if "\ufffd" not in texts[i]])


def gain(case: Case, way: str, texts: Sequence[str], target: Target, *, beside: bool = True) -> list[float]:
    """Mean log P(payload) per token over the prompts, minus half the reference's; −∞ for what cannot be typed.

    Every candidate is tokenised anew. Without `beside`, nothing of the reference's is taken off.
    """
    usable = [i for i, text in enumerate(texts) if text]
    found = [-torch.inf] * len(texts)
    if usable:
        rows = target.encoded(case.model, *(Form(KINDS[way], way, texts[i]) for i in usable))
        score = log_probability(case.model, rows, target)
        if beside and case.reference is not None:
            score = score - 0.5 * log_probability(case.reference, rows, target)
        for i, value in zip(usable, score.mean(1).view(len(usable), -1).mean(1).tolist(), strict=True):
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
