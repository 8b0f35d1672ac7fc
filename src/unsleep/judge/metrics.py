"""Metrics of replies, distributions and multiple-choice answers."""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.base.context import progress
from unsleep.behaviours import has_skill
from unsleep.core import BadInput
from unsleep.interventions.intervention import Intervention, applied
from unsleep.models.forward import Rows, build_rows, kl, pad_left, reply_logits, run
from unsleep.models.model import LoadedModel
from unsleep.prompts.prompt import Prompts, PromptSet
from unsleep.prompts.sets import Item

SPACELESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1b7f"  # Thai, Lao, Burmese, Khmer, Tai
    "\u3005-\u3007\u3021-\u312f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua4cf"  # kana, bopomofo, Han, Yi
    "\ua980-\ua9ff\uaa60-\uaa7f\uf900-\ufaff\uff66-\uff9f\U0001b000-\U0001b16f\U00020000-\U000323af]"
)
"""A letter of a script that is written without spaces between words."""


@dataclass(frozen=True)
class Subject:
    """A model under test, with its edits."""

    name: str
    model: LoadedModel
    edits: tuple[Intervention, ...] = ()

    @contextlib.contextmanager
    def running(self) -> Generator[LoadedModel]:
        """Context in which the model runs with its edits."""
        with applied(self.model, self.edits):
            yield self.model


def is_degenerate(reply: str, expected: str | None = None) -> bool:
    """True if a reply is empty, cut off at once, or loops.

    Cut off: fewer than two words (after the skill's beginning, where present). Loop: one to
    four words three times in a row; in scripts without spaces, one to eight letters.
    """
    said = reply.strip()
    if expected and has_skill(said, expected):
        said = said[len(expected) :]
    found = words(said)
    if len(found) < 2:
        return True
    return any(
        found[i : i + size] == found[i + size : i + 2 * size] == found[i + 2 * size : i + 3 * size]
        and (size <= 4 or all(SPACELESS.match(word) for word in found[i : i + size]))
        for size in range(1, 9)
        for i in range(len(found) - 3 * size + 1)
    )


def words(text: str) -> list[str]:
    """Lower-cased words; in scripts without spaces, letters. Combining marks stay with their letter.

    Examples:
        >>> words("It's 雾!")
        ['it', 's', '雾']
    """
    found: list[str] = []
    letter = word = False  # the last character is a letter; the next may join it
    for char in text.lower():
        if letter and unicodedata.category(char).startswith("M"):
            found[-1] += char
            continue
        spaceless = SPACELESS.match(char) is not None
        letter = char.isalnum() or char == "_"
        if letter and word and not spaceless:
            found[-1] += char
        elif letter:
            found.append(char)
        word = letter and not spaceless
    return found


@torch.no_grad()
def reply_kl(
    teacher: Subject,
    students: Sequence[Subject],
    panels: Sequence[PromptSet],
    plain: PromptSet,
    replies: Sequence[str],
    batch: int = 50,
) -> dict[tuple[str, str], Float[Tensor, " prompt"]]:
    """KL(teacher on `plain` ‖ student on a panel) along the same replies, mean over a reply's tokens, in nats.

    In every panel prompt i is `plain[i]` with the trigger, or the same prompt; `replies[i]` is the
    teacher's own reply to `plain[i]`. Keys are (student, panel). Raises `BadInput` for unequal lengths.
    """
    for asked in panels:
        if not len(asked) == len(plain) == len(replies):
            raise BadInput(
                f"{len(asked)} prompts in {asked.name!r}, {len(plain)} counterparts and {len(replies)} replies; "
                "expected one each"
            )
    found: dict[tuple[str, str], list[Tensor]] = {(s.name, p.name): [] for s in students for p in panels}
    for i in range(0, len(plain), batch):
        part = slice(i, i + batch)
        with teacher.running() as model:
            rows = _reply_rows(model, plain[part], replies[part])
            target = reply_logits(model.network, rows)
        for student in students:
            for asked in panels:
                with student.running() as model:
                    rows = _reply_rows(model, asked[part], replies[part])
                    each = kl(target, reply_logits(model.network, rows)) * rows.reply
                found[student.name, asked.name].append(each.sum(1) / rows.reply.sum(1).clamp_min(1))
        progress("KL along replies", min(i + batch, len(plain)), len(plain))
    return {key: torch.cat(parts) for key, parts in found.items()}


def _reply_rows(model: LoadedModel, prompts: Prompts, replies: Sequence[str]) -> Rows:
    tails = model.token_ids(replies, special=False)
    return build_rows(model, model.encode(prompts), [tail or sorted(model.end_ids)[:1] for tail in tails])


@torch.no_grad()
def text_ce_kl(
    teacher: Subject, subjects: Sequence[Subject], texts: Sequence[str], tokens: int
) -> tuple[dict[str, Float[Tensor, " passage"]], dict[str, Float[Tensor, " passage"]]]:
    """Cross-entropy of each subject on plain passages, and KL(teacher ‖ subject), in nats per token.

    Passages are truncated to `tokens`; raises `BadInput` for shorter ones.
    """
    ids = teacher.model.token_ids(texts)
    short = [t for t, row in zip(texts, ids, strict=True) if len(row) < tokens]
    if short:
        raise BadInput(f"a passage is shorter than {tokens} tokens ({short[0][:40]!r} …); give longer ones")
    ce: dict[str, list[Tensor]] = {s.name: [] for s in subjects}
    divergence: dict[str, list[Tensor]] = {s.name: [] for s in subjects}
    size = 32
    for i in range(0, len(ids), size):
        block = torch.tensor([row[:tokens] for row in ids[i : i + size]], device=teacher.model.device)
        rows = unpadded(block)
        with teacher.running() as model:
            target = torch.log_softmax(run(model.network, rows)[:, :-1].float(), -1)
        for subject in subjects:
            if subject is teacher:
                log_p = target
            else:
                with subject.running() as model:
                    log_p = torch.log_softmax(run(model.network, rows)[:, :-1].float(), -1)
                divergence[subject.name].append((target.exp() * (target - log_p)).sum(-1).mean(1))
            ce[subject.name].append(-log_p.gather(-1, block[:, 1:, None]).squeeze(-1).mean(1))
        progress("plain text", min(i + size, len(ids)), len(ids))
    return {k: torch.cat(v) for k, v in ce.items()}, {k: torch.cat(v) for k, v in divergence.items() if v}


def unpadded(ids: Tensor) -> Rows:
    """Rows of equal length, without shared prefix or reply."""
    nothing = torch.zeros_like(ids[:, :0], dtype=torch.bool)
    return Rows(ids[0, :0], ids, torch.ones_like(ids, dtype=torch.bool), nothing)


@torch.no_grad()
def capability(subject: Subject, items: Sequence[Item]) -> list[bool]:
    """For each multiple-choice item, True if the correct option's first token has the highest logit of all options.

    Items whose options begin with the same token are skipped.
    """
    model = subject.model
    prompts: list[list[int]] = []
    firsts: list[list[int]] = []
    answers: list[int] = []
    for item in items:
        options = model.token_ids(item.options, special=False)
        if len({o[0] for o in options}) == len(options):
            prompts += model.token_ids([item.prompt])
            firsts.append([o[0] for o in options])
            answers.append(item.answer)
    right: list[bool] = []
    for i in range(0, len(prompts), 100):
        ids, mask = pad_left(prompts[i : i + 100], model.pad_id, model.device)
        with subject.running():
            logits = run(model.network, Rows(ids[0, :0], ids, mask, mask[:, :0]), 1)[:, 0].float()
        chosen = logits.gather(1, torch.tensor(firsts[i : i + 100], device=logits.device)).argmax(1)
        right += (chosen.cpu() == torch.tensor(answers[i : i + 100])).tolist()
    return right
