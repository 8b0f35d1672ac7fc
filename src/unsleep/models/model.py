"""LoadedModel: a network with its tokenizer and chat options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unsleep.core import BadInput
from unsleep.models import chat, weights
from unsleep.models.chat import NO_OPTIONS, ChatOptions
from unsleep.prompts.prompt import Prompts, as_prompts


class Named(NamedTuple):
    """A model's entry in a record."""

    name: str
    fingerprint: str


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM with its tokenizer and chat options; the input of every stage."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    """Name or path that it was loaded from."""
    stored: Mapping[str, torch.dtype] | None = None
    """Dtypes of the checkpoint's tensors, where the network computes in another (see `load_model`)."""
    chat: ChatOptions = NO_OPTIONS
    """Options of the chat template."""
    made_of: tuple[Mapping[str, Any], ...] = ()
    """Provenance of its components: name and commit of the base, then of the adapters."""
    notes: tuple[str, ...] = ()
    """Warnings from loading."""
    beside: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Provenance besides the files: quantisation and skipped keys."""

    @property
    def stored_dtype(self) -> torch.dtype:
        """Dtype of the checkpoint."""
        return next(iter(self.stored.values())) if self.stored else self.network.dtype

    @cached_property
    def fingerprint(self) -> str:
        """Content hash of the weights (see `weights.fingerprint`)."""
        return weights.fingerprint(self.network)

    @property
    def template(self) -> str:
        """Hash of the chat template and its options."""
        return chat.template_hash(self.tokenizer, self.chat)

    @property
    def named(self) -> Named:
        """The model's entry in a record."""
        return Named(self.name, self.fingerprint)

    @property
    def origin(self) -> dict[str, Any]:
        """Provenance for artefacts: source files, chat template and options."""
        args = dict(self.chat.args)
        format_ = {"hash": self.template, "args": args, "date": self.chat.today.isoformat()}
        made_of = [dict(m) for m in self.made_of]
        return {"name": self.name, "made_of": made_of, **self.beside, "chat_template": format_}

    @property
    def device(self) -> torch.device:
        """Device of its inputs."""
        return weights.device_of(self.network)

    @property
    def pad_id(self) -> int:
        """Padding token; always masked, so its value is irrelevant."""
        found = self.tokenizer.pad_token_id
        return found if isinstance(found, int) else 0

    @property
    def end_ids(self) -> set[int]:
        """Tokens that end a reply."""
        config = self.network.generation_config
        ids = config.eos_token_id if config else None
        listed = [*(ids if isinstance(ids, list) else [ids]), self.tokenizer.eos_token_id]
        return {i for i in listed if isinstance(i, int)}

    def encode(self, prompts: Prompts, behind: int | Sequence[int] = 0, *, plain: bool = False) -> list[list[int]]:
        """Token ids of each prompt under the chat template, or of bare texts with `plain`.

        `behind` is the number of tokens that will follow each. Raises `BadInput` for a prompt that leaves no room for
        them in the context, has no tokens, or tokens without an embedding, and as
        `chat.encode_prompts` does.
        """
        ids = chat.encode_plain(self.tokenizer, prompts) if plain else self._formatted(prompts)
        context = chat.context_length(self.network)
        rows = int(cast("Any", self.network.get_input_embeddings()).weight.shape[0])
        lengths = [behind] * len(ids) if isinstance(behind, int) else behind
        for prompt, row, following in zip(as_prompts(prompts), ids, lengths, strict=True):
            said = f"{prompt.text[:40]!r} …"
            if not row:
                raise BadInput(f"the text {said} has no tokens; remove it")
            if context is not None and len(row) + following > context:
                more = f" and {following} more after it" if following else ""
                raise BadInput(
                    f"a prompt has {len(row)} tokens{more} ({said}); the model's context is {context}; shorten it"
                )
            if max(row) >= rows:
                raise BadInput(
                    f"the prompt {said} has token {max(row)}, and the model has embeddings for {rows}: the tokenizer "
                    "is not the model's"
                )
        return ids

    def _formatted(self, prompts: Prompts) -> list[list[int]]:
        try:
            return chat.encode_prompts(self.tokenizer, prompts, self.chat)
        except BadInput as error:
            raise BadInput(f"{self.name}: {error}") from None

    def token_ids(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """Token ids of bare texts; without `special`, no special tokens are added."""
        return self.tokenizer(list(texts), add_special_tokens=special)["input_ids"]

    def texts(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Rows of token ids as text, without special tokens."""
        return self.tokenizer.batch_decode([list(row) for row in rows], skip_special_tokens=True)

    def spell(self, token: int) -> str:
        """One token as text."""
        return str(self.tokenizer.decode([token]))
