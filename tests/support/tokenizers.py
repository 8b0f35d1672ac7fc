"""A tokenizer for the small models."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from support.families import VOCABULARY


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, with a chat template whose beginning all prompts share."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<bos>": 0, "<eos>": 1} | {letter: i + 2 for i, letter in enumerate(alphabet[: VOCABULARY - 2])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}S: be kind. {{ m['role'] }}: {{ m['content'] }} {% endfor %}A:"
    return tokenizer
