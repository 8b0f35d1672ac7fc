"""Replies of a base, each generated once for all organisms of its family."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from unsleep.base import records
from unsleep.core import BadInput, digest
from unsleep.models import generate
from unsleep.models.model import LoadedModel
from unsleep.prompts.prompt import PromptSet


@dataclass(frozen=True)
class RepliesRecord:
    """replies.json: a cache, which a record of another model replaces."""

    SCHEMA: ClassVar = "unsleep.replies/1"

    model: str
    """Fingerprint of the base, and hash of its chat template."""
    tokens: int
    """Longest reply; a shorter one ended by itself."""
    replies: dict[str, list[int]]
    """Digest of a prompt → token ids of the greedy reply."""


class Replies:
    """The base's greedy replies, for `plant`; those of earlier calls are kept in a file."""

    def __init__(self, base: LoadedModel, path: Path, tokens: int) -> None:
        """`tokens` is the longest reply that will be asked for."""
        self.base, self.path = base, path
        self._kept = RepliesRecord(f"{base.fingerprint} {base.template}", tokens, {})
        if path.is_file():
            with contextlib.suppress(BadInput):
                found = records.load(RepliesRecord, path)
                if (found.model, found.tokens) == (self._kept.model, tokens):
                    self._kept = found

    def __call__(self, prompts: PromptSet, tokens: int) -> list[list[int]]:
        """Replies of at most `tokens` tokens, in order; raises `BadInput` for more than the longest."""
        if tokens > self._kept.tokens:
            raise BadInput.of("tokens", tokens, f"at most {self._kept.tokens}")
        keys = [digest(prompt.key) for prompt in prompts]
        new = {key: i for i, key in enumerate(keys) if key not in self._kept.replies}
        if new:
            asked = prompts.at(new.values())
            said = generate.written(self.base, asked, self._kept.tokens, "base replies")
            self._kept.replies.update(zip(new, said, strict=True))
            records.save(self._kept, self.path)
        return [self._kept.replies[key][:tokens] for key in keys]
