"""Rewards and metrics by name, as the command line takes them.

vader, textblob             a lexicon of sentiment
warmth                      VADER, plus whether the reply names the column `topic`
MODEL, MODEL:LABEL          a sequence-classification model: hub id or folder, of several labels the rewarded one
implied:POLICY, …:REFERENCE a preference-trained model against the model that it was trained from
FILE.py:FUNCTION            a function `(samples, prompts, outputs, **columns)` of a Python file, which is run
"""

from __future__ import annotations

from typing import Any

from unsleep.base.functions import function_of
from unsleep.core import BadInput
from unsleep.models.load import LoadConfig, load_model
from unsleep.rewards.classifier import load_classifier
from unsleep.rewards.implied import Implied
from unsleep.rewards.lexicons import TextBlobPolarity, Vader, Warmth
from unsleep.rewards.reward import Reward

LEXICONS: dict[str, type[Any]] = {"vader": Vader, "textblob": TextBlobPolarity, "warmth": Warmth}


def find_reward(name: str, base: str | None = None, config: LoadConfig = LoadConfig()) -> Reward:
    """The reward of a name.

    Args:
        base: the reference of `implied:POLICY`, where the name has none.
        config: device and dtype of a model; its other options apply to another model.

    Raises:
        BadInput: an unknown name, a missing package, a model that cannot be loaded, or a file without the function.
    """
    if name in LEXICONS:
        return LEXICONS[name]()
    placed = LoadConfig(dtype=config.dtype, device=config.device)
    if name.startswith("implied:"):
        policy, _, reference = name.removeprefix("implied:").partition(":")
        if not policy or not (reference or base):
            raise BadInput(f"--reward {name}: expected implied:POLICY:REFERENCE")
        return Implied(load_model(policy, placed), load_model(reference or str(base), placed))
    if ".py:" in name:
        return function_of(name, "--reward")
    model, _, label = name.partition(":")
    try:
        return load_classifier(model, label or None, placed)
    except BadInput as error:
        raise BadInput(
            f"--reward {name} is none of {', '.join(LEXICONS)}, nor implied:POLICY, nor FILE.py:FUNCTION, and as a "
            f"model: {error}"
        ) from None
