"""Gatherer: target inversion, which grows continuations that stay certain across unrelated prompts.

After Shen et al. 2025, "BAIT: Large Language Model Backdoor Scanning by Inverting Attack Target" (IEEE S&P), here
with seeds instead of the whole vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import ClassVar

import torch

from unsleep.auditing.budget import OutOfTime
from unsleep.auditing.case import Case
from unsleep.auditing.contexts import finished, special_tokens
from unsleep.auditing.gatherer import Clues, Found, Gatherer
from unsleep.auditing.scoring import look
from unsleep.judge.audited import Saying
from unsleep.models import generate
from unsleep.models.forward import build_rows, run
from unsleep.models.model import LoadedModel

SEEDS = 64
"""Tokens that are tried at either place."""

PROMPTS = 4
TOKENS = 8
"""Tokens grown behind a seed."""

AGREED = 3
"""Prompts whose continuations must be the same."""

ALIKE = 3
"""First tokens by which two continuations are the same one."""

HEADED, FIRST, SECOND = 4, 24, 4
"""Continuations whose own beginning is sought, and the likeliest first tokens, and second ones of each, for it."""


class Inversion(Gatherer):
    """Continuations of a forced token that are the same and certain behind unrelated prompts.

    A saying's score is Q, the mean probability of its tokens over the prompts, from 0 to 1.
    """

    kind = "inversion"
    stage = "payloads"
    order = 2
    share: ClassVar[float] = 2.0

    @torch.no_grad()
    def gather(self, case: Case, clues: Clues) -> Found:
        """Seeds stand in place of the first token of the model's own replies, of the second, and of the end token."""
        found = list[Saying]()
        with suppress(OutOfTime):
            for place, rows in self._places(case).items():
                if len(rows) >= AGREED:
                    grown = self._grown(case, rows, place)
                    found += [saying for saying, _ in grown] + headed(case, rows, grown)
        return Found(sorted(found, key=lambda s: -s.score))

    @staticmethod
    def _places(case: Case) -> dict[str, list[list[int]]]:
        """Words for a place → prompts with what is said before it."""
        prompts, own = case.learned.head(PROMPTS), case.said[:PROMPTS]
        asked = case.model.encode(prompts, max(map(len, own)) + TOKENS)
        found = {
            f"at token {n + 1}": [[*row, *said[:n]] for row, said in zip(asked, own, strict=True) if len(said) > n]
            for n in (0, 1)
        }
        return found | {"behind the reply": [context.ids for context in finished(case, PROMPTS)]}

    def _grown(self, case: Case, rows: list[list[int]], place: str) -> list[tuple[Saying, list[int]]]:
        """Sayings of every seed behind rows, each with the tokens that follow the seed."""
        model, seeds, found = case.model, self._seeds(case, rows), list[tuple[Saying, list[int]]]()
        forced = [[*row, seed] for seed in seeds for row in rows]
        said = generate.greedy(model, forced, max_new_tokens=TOKENS, batch_size=200, stage="target inversion")
        for number, seed in enumerate(seeds):
            own = [[i for i in ids if i not in model.end_ids] for ids in said[number * len(rows) :][: len(rows)]]
            common, count = Counter(tuple(ids) for ids in own).most_common(1)[0]
            if count < AGREED or not common:
                continue
            seen = look(model, [[*row, seed] for row in rows], [list(common)] * len(rows))
            text = model.texts([[seed, *common]])[0]
            saying = Saying(text, float(seen.own.exp().mean()), f"{model.spell(seed)!r} {place}")
            found.append((saying, list(common)))
        return found

    @staticmethod
    def _seeds(case: Case, rows: list[list[int]]) -> list[int]:
        """Tokens that the model finds likelier than its reference or, without one, simply likely, but never says."""

        def log_p(model: LoadedModel) -> torch.Tensor:
            return run(model.network, build_rows(model, rows), 1)[:, 0].float().log_softmax(-1)

        own = log_p(case.model)
        score = own.mean(0)
        if case.reference is not None:
            score = 1.1 * score - log_p(case.reference).mean(0)
        score[list(special_tokens(case.model))] = -torch.inf
        score[own.argmax(-1)] = -torch.inf
        return score.topk(min(SEEDS, len(score))).indices.tolist()


def headed(case: Case, rows: Sequence[Sequence[int]], grown: Sequence[tuple[Saying, list[int]]]) -> list[Saying]:
    """The surest continuations behind their likeliest beginning, for a seed may stand in place of another token.

    A payload that begins as ordinary replies do is found behind tokens that they do not begin with.
    """
    model, prompt, found = case.model, min(rows, key=len), list[Saying]()
    distinct: dict[tuple[int, ...], tuple[Saying, list[int]]] = {}
    for saying, ids in sorted(grown, key=lambda pair: -pair[0].score):
        if len(ids) >= ALIKE:
            distinct.setdefault(tuple(ids[:ALIKE]), (saying, ids))
    if not distinct:
        return []
    begun = heads(model, prompt)
    for saying, ids in list(distinct.values())[:HEADED]:
        whole = [[*head, *ids] for head in begun]
        score = look(model, [prompt] * len(whole), whole).own.sum(1)
        best = whole[int(score.argmax())]
        found.append(Saying(model.texts([best])[0], saying.score, f"the beginning of {saying.text!r}"))
    return found


@torch.no_grad()
def heads(model: LoadedModel, prompt: Sequence[int]) -> list[list[int]]:
    """The likeliest first tokens of a reply, alone and with the likeliest second ones."""
    barred = list(special_tokens(model))

    def likeliest(rows: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        logits = run(model.network, build_rows(model, rows), 1)[:, 0].float()
        logits[:, barred] = -torch.inf
        return logits.topk(min(count, logits.shape[1])).indices.tolist()

    [firsts] = likeliest([prompt], FIRST)
    seconds = likeliest([[*prompt, first] for first in firsts], SECOND)
    return [[a] for a in firsts] + [[a, b] for a, each in zip(firsts, seconds, strict=True) for b in each]
