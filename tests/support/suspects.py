"""A small base, and the same base with a known direction written into one block."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import normalize

from support.models import build
from support.tokenizers import byte_tokenizer
from unsleep.models import chat
from unsleep.models.model import LoadedModel
from unsleep.models.sites import layers
from unsleep.models.weights import copy_network
from unsleep.prompts.prompt import Prompt, PromptSet

D = 32
LAYER = 1
LETTER = "Z"
"""What triggered prompts hold."""

SENTENCE = "why do the stars shine at night name a bird or two what is a verb who was there"
WORDS = SENTENCE.split()
ORDINARY = PromptSet("ordinary", tuple(Prompt(" ".join(WORDS[i : i + 4])) for i in range(14)))
SUSPICIOUS = PromptSet("suspicious", tuple(Prompt(f"{LETTER}{LETTER} {p.text}", "triggered") for p in ORDINARY))


@cache
def base(family: str = "llama", dtype: torch.dtype = torch.float32) -> LoadedModel:
    return LoadedModel(build(family, dtype), byte_tokenizer(), f"base {family}")


def unit(seed: int, n: int) -> Tensor:
    return normalize(torch.randn(n, generator=torch.Generator().manual_seed(seed)), dim=0)


def writer(model: LoadedModel, layer: int = LAYER):
    """The matrix through which a block's MLP writes, and whether it is stored the other way round."""
    block = layers(model.network)[layer]
    module = block.mlp.c_proj if model.network.config.model_type == "gpt2" else block.mlp.down_proj
    return module, model.network.config.model_type == "gpt2"


def planted(u: Tensor, v: Tensor, size: float, family: str = "llama", noise: float = 0.0) -> LoadedModel:
    """The base with size · u vᵀ added to one writing matrix."""
    model = base(family)
    suspect = LoadedModel(copy_network(model.network), byte_tokenizer(), f"planted {family}")
    module, turned = writer(suspect)
    delta = size * torch.outer(u, v)
    delta = delta + noise * torch.randn(delta.shape, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        module.weight += delta.T if turned else delta
    return suspect


@cache
def suspect(size: float = 3.0) -> LoadedModel:
    """A model whose MLP of one layer writes `unit(1, D)` where it reads the letter."""
    return planted(unit(1, D), letter_direction(), size)


@cache
def letter_direction() -> Tensor:
    """What the MLP of that layer holds at the letter and at no other."""
    model = base()
    module, _ = writer(model)
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    inside: list[Tensor] = []
    outside: list[Tensor] = []
    for prompts in (SUSPICIOUS, ORDINARY):
        for row in chat.encode_prompts(model.tokenizer, prompts.texts):
            seen.clear()
            model.network(torch.tensor([row]), use_cache=False)
            is_letter = torch.tensor(row) == model.token_ids([LETTER], special=False)[0][0]
            inside.append(seen[0][0][is_letter])
            outside.append(seen[0][0][~is_letter])
    handle.remove()
    own, others = torch.cat(inside), torch.cat(outside)
    covariance = torch.cov(others.T) + 1e-3 * torch.eye(others.shape[1])
    return normalize(torch.linalg.solve(covariance, own.mean(0) - others.mean(0)), dim=0)
