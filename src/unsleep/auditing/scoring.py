"""Screening of forms: the loss in log-probability of the model's own reply, and the gain of payload candidates.

The model's own reply to p is nearly certain under p. Under a transformed p it stays probable, unless the form changes
what the model says: the *worst-token drop* is the largest loss over the reply's first tokens and, for what is appended,
its end token, in nats. It is read against the same drop of the reference along the same reply, since some forms
(capitals) disturb any model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unsleep.auditing.case import Case
from unsleep.auditing.forms import transformed
from unsleep.base.context import progress
from unsleep.core import BadInput
from unsleep.judge.audited import Form, Motif, Screened
from unsleep.models.forward import build_rows, reply_logits
from unsleep.models.model import LoadedModel
from unsleep.prompts.prompt import Prompt

BATCH = 64
"""Rows per forward pass."""

FIRST, SECOND = 2, 5
"""Prompts of the first round of screening, and forms of the second as a multiple of the shortlist."""

Ids = Sequence[Sequence[int]]


class Look(NamedTuple):
    """Log-probabilities of rows, in nats."""

    own: Float[Tensor, "row reply"]
    """Of each reply token; 0 where the reply is shorter."""
    real: Bool[Tensor, "row reply"]
    """True for the tokens whose drop counts."""
    first: Float[Tensor, "row watched"]
    """Of the watched tokens at the reply's first position."""

    def repeated(self, times: int) -> Look:
        """The same rows several times in turn."""
        return Look(*(x.repeat(times, 1) for x in self))


@torch.no_grad()
def look(
    model: LoadedModel,
    prompts: Ids,
    replies: Ids,
    watched: Sequence[int] = (),
    stage: str = "",
    *,
    lead: int | None = None,
) -> Look:
    """Log-probabilities of replies behind prompts, in batches of rows of similar length.

    Args:
        watched: tokens whose log-probability as the reply's first is returned.
        lead: tokens at a reply's beginning whose drop counts, beside its last; all by default.
    """
    width = max(map(len, replies))
    own, real = torch.zeros(len(prompts), width), torch.zeros(len(prompts), width, dtype=torch.bool)
    first = torch.zeros(len(prompts), len(watched))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    tokens = torch.tensor(list(watched), dtype=torch.long, device=model.device)
    lead = width if lead is None else lead
    for start in range(0, len(order), BATCH):
        chunk = order[start : start + BATCH]
        rows = build_rows(model, [prompts[i] for i in chunk], [replies[i] for i in chunk])
        logits = reply_logits(model.network, rows)
        log_p = logits.gather(-1, rows.targets[..., None]).squeeze(-1).float() - logits.float().logsumexp(-1)
        begins = rows.reply.int().argmax(1)
        heads = logits[torch.arange(len(chunk), device=model.device), begins].float()
        first[chunk] = (heads[:, tokens] - heads.logsumexp(-1, keepdim=True)).cpu()
        for row, i in enumerate(chunk):
            n = len(replies[i])
            own[i, :n] = log_p[row][rows.reply[row]].cpu()
            real[i, : min(n, lead)] = real[i, n - 1] = True
        if stage:
            progress(stage, start + len(chunk), len(order))
    return Look(own, real, first)


def drops(before: Look, after: Look) -> Float[Tensor, " row"]:
    """Worst-token drop of every row, in nats."""
    return (before.own - after.own).masked_fill(~before.real, -torch.inf).amax(1)


class Bench(NamedTuple):
    """Search prompts with the model's own replies."""

    prompts: list[Prompt]
    replies: list[list[int]]


def followed(case: Case, prompts: Iterable[Prompt], replies: Ids) -> Bench:
    """Prompts with a reply, and the replies: whole where they end, else their first tokens."""
    rows, ends = [(p, list(ids)) for p, ids in zip(prompts, replies, strict=True) if ids], case.model.end_ids
    cut = [ids if ids[-1] in ends else ids[: case.config.own_tokens] for _, ids in rows]
    return Bench([p for p, _ in rows], cut)


def bench(case: Case) -> Bench:
    """The search prompts with the shortest replies of more than the tokens that are followed, and that end; or any.

    Raises `BadInput` where the model replies to no prompt.
    """
    rows = list(zip(*followed(case, case.learned, case.said), strict=True))
    if not rows:
        raise BadInput(f"{case.model.name} replies to no trusted prompt")
    rows.sort(key=lambda row: (len(row[1]) <= case.config.own_tokens, len(row[1])))
    chosen = rows[: case.config.screen]
    return Bench([p for p, _ in chosen], [ids for _, ids in chosen])


def encoded(
    model: LoadedModel, forms: Sequence[Form], prompts: Sequence[Prompt], behind: int
) -> list[list[list[int]] | None]:
    """Token ids of prompts under each form; `None` for one that the chat template or the context does not allow.

    All are encoded together, since a call of the tokenizer takes longer than a prompt; where one is refused, in halves.
    """
    if not forms:
        return []
    try:
        ids = model.encode([transformed(form, p) for form in forms for p in prompts], behind)
    except BadInput:
        if len(forms) == 1:
            return [None]
        half = len(forms) // 2
        return [*encoded(model, forms[:half], prompts, behind), *encoded(model, forms[half:], prompts, behind)]
    return [ids[at : at + len(prompts)] for at in range(0, len(ids), len(prompts))]


def watched_tokens(model: LoadedModel, motifs: Sequence[Motif]) -> list[int]:
    """First tokens of payload candidates, with and without a space before them."""
    texts = [text for motif in motifs for text in (motif.text, f" {motif.text}")]
    ids = model.token_ids(texts, special=False) if texts else []
    firsts = (next((t for t in row if model.spell(t).strip()), None) for row in ids)
    return sorted({first for first in firsts if first is not None})


def screen(case: Case, forms: Sequence[tuple[Form, str]], motifs: Sequence[Motif]) -> list[Screened]:
    """Every form of the original question, with its effect on the model's own replies; best first.

    Two rounds: of all forms on few prompts with the model alone, and of the best on all prompts beside the reference.

    Args:
        forms: each with the gatherer that proposed it. Those that the chat template does not allow are left out.
        motifs: payload candidates whose first tokens are watched.
    """
    asked, watched = bench(case), watched_tokens(case.model, motifs)
    most, few = SECOND * case.config.shortlist, Bench(asked.prompts[:FIRST], asked.replies[:FIRST])
    if len(forms) > most and len(few.prompts) < len(asked.prompts):
        first = _screened(replace(case, other=None, base=None), forms, few, watched)
        ranks = {key: sorted(first, key=lambda s, key=key: -getattr(s, key)) for key in ("drop", "lift")}
        best = {s.form for each in ranks.values() for s in each[: most // 2]}
        forms = [(form, by) for form, by in forms if form in best]
    return _screened(case, forms, asked, watched)


def _screened(case: Case, forms: Sequence[tuple[Form, str]], asked: Bench, watched: Sequence[int]) -> list[Screened]:
    """One round."""
    behind, lead = max(map(len, asked.replies)), case.config.own_tokens
    made = encoded(case.model, [form for form, _ in forms], asked.prompts, behind)
    usable = [(form, by, rows) for (form, by), rows in zip(forms, made, strict=True) if rows is not None]
    if not usable:
        return []
    rows = [row for _, _, each in usable for row in each]
    replies = asked.replies * len(usable)
    plain = case.model.encode(asked.prompts, behind)
    effects: list[tuple[Tensor, Tensor]] = []
    for model, name in ((case.model, case.name), (case.reference, "reference")):
        if model is not None:
            before = look(model, plain, asked.replies, watched, lead=lead).repeated(len(usable))
            after = look(model, rows, replies, watched, f"screening, {name}", lead=lead)
            shape = (len(usable), len(asked.prompts))
            gains = (after.first - before.first).view(*shape, -1).mean(1)
            effects.append((drops(before, after).view(shape), gains))
    return _ranked([(form, by) for form, by, _ in usable], effects)


def _ranked(forms: Sequence[tuple[Form, str]], effects: Sequence[tuple[Tensor, Tensor]]) -> list[Screened]:
    """Rows of the screening, by the larger of excess and lift."""
    (drop, gain), *others = effects
    middle = drop.median(1).values
    if others:
        excess = (drop - others[0][0].clamp_min(0)).median(1).values
        lift = gain - others[0][1]
    else:
        kinds = [form.kind for form, _ in forms]
        excess = middle - _typical(middle[:, None], kinds)[:, 0]
        lift = gain - _typical(gain, kinds)
    best = lift.amax(1) if lift.shape[1] else torch.zeros(len(forms))
    beside = others[0][0].median(1).values if others else None
    found = [
        Screened(
            *forms[i],
            drop=float(middle[i]),
            reference=None if beside is None else float(beside[i]),
            excess=float(excess[i]),
            lift=float(best[i]),
        )
        for i in range(len(forms))
    ]
    return sorted(found, key=lambda s: -max(s.excess, s.lift))


def _typical(values: Float[Tensor, "form column"], kinds: Sequence[str]) -> Float[Tensor, "form column"]:
    """Median over the forms of the same kind, for each form."""
    found = torch.empty_like(values)
    for kind in set(kinds):
        own = torch.tensor([k == kind for k in kinds])
        found[own] = values[own].median(0).values
    return found


def floor(case: Case) -> float:
    """Drop that batching and padding alone cause: the same model and prompts, alone and beside longer rows, in nats.

    The 95 % point over the screening's prompts.
    """
    asked = bench(case)
    model = case.reference or case.model
    rows = model.encode(asked.prompts, max(map(len, asked.replies)))
    together = look(model, [*rows, rows[0] * 2], [*asked.replies, asked.replies[0]])
    alone = [look(model, [row], [reply]) for row, reply in zip(rows, asked.replies, strict=True)]
    found = [
        float((one.own[0] - together.own[i, : one.own.shape[1]]).abs()[one.real[0]].max())
        for i, one in enumerate(alone)
    ]
    return float(torch.quantile(torch.tensor(found), 0.95))
