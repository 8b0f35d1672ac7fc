"""Pairs of prefixes of equal length in the field's data-file format, and circuits of single positions.

JSON lines with `clean_prefix`, `patch_prefix`, `clean_answer`, `patch_answer` and, where there is one, `case`: the form
of the data of Marks et al. 2024 (arXiv:2403.19647). Every answer is one token. The metric is

    m = logit(clean answer) − logit(patch answer)        at the last token of the prefix
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unsleep.base import records
from unsleep.core import BadInput
from unsleep.locate.circuits.align import Aligned
from unsleep.models.forward import Rows, whole_rows
from unsleep.models.model import LoadedModel
from unsleep.prompts import sets
from unsleep.prompts.prompt import Prompt, PromptSet

FORM = '{"clean_prefix": "…", "patch_prefix": "…", "clean_answer": "…", "patch_answer": "…"}'


@dataclass(frozen=True)
class PrefixPair:
    """Two prefixes of as many tokens, and the token that each is followed by."""

    clean_prefix: str
    patch_prefix: str
    clean_answer: str
    patch_answer: str
    case: str = ""
    """Kind of example, such as the number of a noun."""


def read_pairs(path: Path, case: str | None = None) -> list[PrefixPair]:
    """The pairs of a file, or those of one case; raises `BadInput` naming the line that is none."""
    found: list[PrefixPair] = []
    for number, line in sets.numbered_lines(path):
        place = f"{path} line {number}"
        try:
            value = sets.json_line(line, FORM)
        except BadInput as error:
            raise BadInput(f"{place}: {error}") from None
        found.append(records.parsed(PrefixPair, value, place))
    chosen = [pair for pair in found if case is None or pair.case == case]
    if not chosen:
        cases = sorted({pair.case for pair in found if pair.case})
        raise BadInput(f"{path} has no pair of the case {case!r}; it has {', '.join(cases) or 'no cases'}")
    return chosen


def align_pairs(model: LoadedModel, pairs: Sequence[PrefixPair], *, positions: bool = True) -> Aligned:
    """Pairs as prompts with references, aligned token by token.

    Args:
        positions: a role of its own for every position, which needs pairs that are all of the same length; otherwise
            one role for all tokens, whose effects are signed sums.

    Both answers are kept behind the prefix as the reply, where `answer_difference` finds them; no node is there.

    Raises `BadInput` for an answer that is not one token, prefixes of unequal length or that do not differ.
    """
    one, other = (model.encode(PromptSet(name, tuple(map(Prompt, texts))), plain=True) for name, texts in _texts(pairs))
    answers = [_answer(model, pair) for pair in pairs]
    lengths = sorted({len(prefix) for prefix in one})
    for i, (mine, theirs) in enumerate(zip(one, other, strict=True), 1):
        if len(mine) != len(theirs) or list(mine) == list(theirs):
            raise BadInput(
                f"the prefixes of pair {i} have {len(mine)} and {len(theirs)} tokens; expected as many, and different "
                "ones. Take a circuit by role for prompts of unequal length (--suspicious, --references)"
            )
    if positions and len(lengths) > 1:
        raise BadInput(
            f"prefixes have {lengths[0]} to {lengths[-1]} tokens; expected all of the same length to keep positions. "
            "Choose a --case, or --no-positions"
        )
    rows, reference = (_with_answers(model, each, answers) for each in (one, other))
    width = rows.ids.shape[1]
    role = torch.full(rows.ids.shape, -1)
    for i, prefix in enumerate(one):
        at = torch.arange(width - 2 - len(prefix), width - 2)
        role[i, at] = torch.arange(len(prefix)) if positions else 0
    weights = torch.eye(width).repeat(len(one), 1, 1) * (role >= 0)[..., None]
    roles = _names(model, one) if positions else ("all",)
    return Aligned(rows, reference, role.to(model.device), weights.to(model.device), roles, 0.0)


def answer_difference(logits: Float[Tensor, "row 2 vocabulary"], rows: Rows) -> Float[Tensor, " row"]:
    """logit(clean answer) − logit(patch answer) behind the prefix."""
    both = logits[:, 0].float().gather(1, rows.targets)
    return both[:, 0] - both[:, 1]


def _texts(pairs: Sequence[PrefixPair]) -> list[tuple[str, list[str]]]:
    return [("clean", [pair.clean_prefix for pair in pairs]), ("patch", [pair.patch_prefix for pair in pairs])]


def _answer(model: LoadedModel, pair: PrefixPair) -> list[int]:
    found = model.token_ids([pair.clean_answer, pair.patch_answer], special=False)
    for text, ids in zip((pair.clean_answer, pair.patch_answer), found, strict=True):
        if len(ids) != 1:
            raise BadInput(f"the answer {text!r} is {len(ids)} tokens of this model; expected 1")
    return [ids[0] for ids in found]


def _with_answers(model: LoadedModel, prefixes: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Rows:
    rows = whole_rows(model, [[*prefix, *both] for prefix, both in zip(prefixes, answers, strict=True)])
    return rows._replace(reply=torch.ones(len(answers), 2, dtype=torch.bool, device=model.device))


def _names(model: LoadedModel, prefixes: Sequence[Int[Tensor, " token"] | Sequence[int]]) -> tuple[str, ...]:
    """Names of positions: the number, with the token that all prefixes have there."""
    names: list[str] = []
    for i, tokens in enumerate(zip(*prefixes, strict=True)):
        same = len({int(token) for token in tokens}) == 1
        names.append(f"{i} {model.spell(int(tokens[0]))}" if same else str(i))
    return tuple(names)
