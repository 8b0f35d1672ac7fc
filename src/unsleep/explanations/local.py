"""A local Hugging Face model as judge: greedy replies under its chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from unsleep.core import BadInput
from unsleep.explanations.judges import Declined, Judge, Question, Reply
from unsleep.models import chat
from unsleep.models.generate import greedy
from unsleep.models.model import LoadedModel
from unsleep.prompts.prompt import Message, Prompt


@dataclass
class LocalJudge(Judge):
    """A loaded model; it costs nothing, and nothing leaves the machine."""

    model: LoadedModel
    batch: int = 8
    """Questions per batch."""

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model.name

    @property
    def identity(self) -> dict[str, Any]:
        """Weights and chat template."""
        return {"fingerprint": self.model.fingerprint, "chat_template": self.model.template}

    def count(self, question: Question[Any]) -> int:
        """Length of a question in tokens, template included."""
        return len(self._row(question))

    def reply(self, questions: Sequence[Question[Any]]) -> list[Reply | Declined]:
        """Greedy answers; a question that leaves no room for its answer in the context is declined."""
        rows = [self._row(question) for question in questions]
        limit = chat.context_length(self.model.network)
        fits = [limit is None or len(r) + q.tokens <= limit for r, q in zip(rows, questions, strict=True)]
        said: dict[int, list[int]] = {}
        if kept := [i for i, fit in enumerate(fits) if fit]:
            longest = max(questions[i].tokens for i in kept)
            out = greedy(self.model, [rows[i] for i in kept], max_new_tokens=longest, batch_size=self.batch)
            said = {i: reply[: questions[i].tokens] for i, reply in zip(kept, out, strict=True)}
        return [self._reply(row, said.get(i)) for i, row in enumerate(rows)]

    def _reply(self, row: Sequence[int], said: Sequence[int] | None) -> Reply | Declined:
        if said is None:
            return Declined("too long for the judge's context; lower --shown or --per-call")
        [text] = self.model.texts([said])
        cut = not said or said[-1] not in self.model.end_ids
        return Reply(text.encode("utf-8", "replace").decode(), len(row), len(said), cut)

    def _row(self, question: Question[Any]) -> list[int]:
        asked = Prompt(question.user, before=(Message("system", question.system),))
        if not self._takes_system:
            asked = Prompt(f"{question.system}\n\n{question.user}")
        [row] = chat.encode_prompts(self.model.tokenizer, [asked], self.model.chat)
        return row

    @cached_property
    def _takes_system(self) -> bool:
        """False for a chat template without system messages, such as Gemma's: instructions then precede the data."""
        try:
            chat.encode_prompts(
                self.model.tokenizer, [Prompt("Why?", before=(Message("system", "Be brief."),))], self.model.chat
            )
        except BadInput:
            chat.encode_prompts(self.model.tokenizer, ["Why?"], self.model.chat)  # raises where neither is taken
            return False
        return True
