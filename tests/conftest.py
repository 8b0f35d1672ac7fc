"""Small models of every family, built from their configs: no download, a second each."""

from __future__ import annotations

import contextlib
import copy
import resource
from collections.abc import Callable, Generator
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

# Shapes in signatures are checked by beartype while tests run.
install_import_hook("unsleep", "beartype.beartype")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast  # noqa: E402

from families import ATTENTION, CONFIGS, VOCABULARY  # noqa: E402
from unsleep.models.load import LoadedModel  # noqa: E402

torch.set_num_threads(1)  # small models: a second thread costs more than it gives
settings.register_profile("ci", max_examples=20, deadline=None, derandomize=True)
settings.load_profile("ci")


@cache
def build(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of a family, the same one every time."""
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = AutoConfig.for_model(family.partition("+")[0], **copy.deepcopy(ends | CONFIGS[family]))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    with torch.no_grad():  # default initialisations are so small that any two inputs look alike
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(4.0)
        kept = model.state_dict()
        for name, held in model.named_buffers():
            if name in kept and held.numel() == 1 and held.is_floating_point():  # a scale that is 1 before a training
                held.mul_(0.7)
    return model


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


@pytest.fixture(params=sorted(CONFIGS))
def any_family(request: pytest.FixtureRequest) -> LoadedModel:
    return LoadedModel(build(request.param), byte_tokenizer(), request.param)


@pytest.fixture(params=ATTENTION)
def family_with_heads(request: pytest.FixtureRequest) -> LoadedModel:
    return LoadedModel(build(request.param), byte_tokenizer(), request.param)


@pytest.fixture
def tiny() -> LoadedModel:
    """A small Llama."""
    return LoadedModel(build("llama"), byte_tokenizer(), "tiny-llama")


@pytest.fixture
def text_file(tmp_path: Path) -> Callable[[str, str], Path]:
    """Write a text file and give its path."""

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


@contextlib.contextmanager
def full_disk(room: int) -> Generator[None]:
    """Every file that would grow over `room` bytes fails in the middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
