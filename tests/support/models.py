"""Small models of every family, built from their configs: no download, a second each."""

from __future__ import annotations

import copy
import os
from functools import cache

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from support.families import CONFIGS

DEVICE = os.environ.get("UNSLEEP_TEST_DEVICE", "cpu")
"""Device of the models; with `cuda`, the tests exercise the library's GPU paths."""


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
    return model.to(DEVICE)
