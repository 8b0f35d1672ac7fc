"""Samples: outputs to prompts with a reward each, read from JSON lines, and divided by prompt into three parts.

    A   selects features
    B   replicates their sign
    C   scores what is left

All samples of a prompt are in one part.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Int
from torch import Tensor

from unsleep.base import store
from unsleep.core import BadInput, digest
from unsleep.prompts import sets
from unsleep.prompts.prompt import Prompt, Prompts, PromptSet, as_prompts

FEWEST = 8
"""Prompts that each part must have."""

KEYS = ("prompt", "output", "reward", "topic")
"""Keys of a JSON line; a topic may be missing."""

SAMPLES = "samples.jsonl"
"""File of sampled replies with their rewards."""

FORM = '{"prompt": "…", "output": "…", "reward": 0.5}'


class Parts(NamedTuple):
    """Places of the samples of each part."""

    A: Int[Tensor, " sample"]
    B: Int[Tensor, " sample"]
    C: Int[Tensor, " sample"]


@dataclass(frozen=True)
class Samples:
    """Outputs to prompts, with a reward each; a prompt may have several outputs."""

    prompts: tuple[Prompt, ...]
    """One per output."""
    outputs: tuple[str, ...]
    rewards: tuple[float, ...]
    topics: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        sizes = [len(self.prompts), len(self.outputs), len(self.rewards)]
        sizes += [] if self.topics is None else [len(self.topics)]
        if len(set(sizes)) > 1 or not sizes[0]:
            raise BadInput(
                f"there are {', '.join(map(str, sizes))} prompts, outputs, rewards (and topics); give one each"
            )
        for prompt, output, reward in zip(self.prompts, self.outputs, self.rewards, strict=True):
            if not output:
                raise BadInput(f"the output to {prompt.text[:40]!r} is empty; leave the sample out")
            if not math.isfinite(reward):
                raise BadInput(f"the reward of an output to {prompt.text[:40]!r} is {reward}; expected a finite number")

    @classmethod
    def of(
        cls, prompts: Prompts, outputs: Sequence[str], rewards: Sequence[float], topics: Sequence[str] | None = None
    ) -> Samples:
        """Samples from as many prompts, outputs and rewards, and topics where there are any."""
        scored = tuple(float(reward) for reward in rewards)
        return cls(tuple(as_prompts(prompts)), tuple(outputs), scored, None if topics is None else tuple(topics))

    def __len__(self) -> int:
        return len(self.outputs)

    @cached_property
    def hash(self) -> str:
        """Content hash of everything in order."""
        return store.hash_value([[p.key for p in self.prompts], self.outputs, self.rewards, self.topics])

    @cached_property
    def owner(self) -> Int[Tensor, " sample"]:
        """Number of each sample's prompt, from 0 in order of appearance."""
        number = {key: i for i, key in enumerate(dict.fromkeys(p.key for p in self.prompts))}
        return torch.tensor([number[p.key] for p in self.prompts])

    def prompt_set(self, places: Sequence[int] | None = None) -> PromptSet:
        """The prompts of all samples, or of some."""
        chosen = self.prompts if places is None else tuple(self.prompts[i] for i in places)
        return PromptSet("rewarded", chosen, "edit")

    def parts(self, shares: tuple[float, float, float], seed: int = 0) -> Parts:
        """Places of the samples of each part; the prompts are divided by their content and the seed.

        Raises `BadInput` where a part would have fewer than `FEWEST` prompts.
        """
        keys = sorted({p.key for p in self.prompts}, key=digest)
        order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed)).tolist()
        first, second = (round(len(keys) * sum(shares[:n]) / sum(shares)) for n in (1, 2))
        groups = [{keys[i] for i in order[a:b]} for a, b in ((0, first), (first, second), (second, len(keys)))]
        for name, group in zip(Parts._fields, groups, strict=True):
            if len(group) < FEWEST:
                raise BadInput(
                    f"part {name} has {len(group)} of {len(keys)} different prompts; expected at least {FEWEST}. Give "
                    "more samples, or other --shares"
                )
        places = [[i for i, p in enumerate(self.prompts) if p.key in group] for group in groups]
        return Parts(*map(torch.tensor, places))


def read_samples(path: str | Path) -> Samples:
    """Samples from JSON lines, such as `{"prompt": "…", "output": "…", "reward": 0.5, "topic": "…"}`.

    A prompt is a text, or a list of messages of which the last is the user's. All lines have a topic, or none has.
    Raises `BadInput` naming the file and the line for anything else.
    """
    path = Path(path)
    rows: list[tuple[Prompt, str, float, str | None]] = []
    for number, line in sets.numbered_lines(path):
        try:
            rows.append(_sample(sets.json_line(line, FORM)))
            if (rows[-1][3] is None) != (rows[0][3] is None):
                raise BadInput("some lines have a topic and others have none; give all of them one, or none")
        except BadInput as error:
            raise BadInput(f"{path} line {number}: {error}") from None
    if not rows:
        raise BadInput(f"{path} has no samples; expected a JSON object per line, such as {FORM}")
    prompts, outputs, rewards, topics = zip(*rows, strict=True)
    with store.reading(path):
        return Samples.of(prompts, outputs, rewards, topics if topics[0] is not None else None)


def write_samples(samples: Samples, path: str | Path) -> None:
    """Write samples as `read_samples` reads them."""
    rows = [
        {"prompt": prompt.messages if prompt.before else prompt.text, "output": output, "reward": reward}
        for prompt, output, reward in zip(samples.prompts, samples.outputs, samples.rewards, strict=True)
    ]
    if samples.topics is not None:
        rows = [row | {"topic": topic} for row, topic in zip(rows, samples.topics, strict=True)]
    store.write_text(Path(path), "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))


def _sample(row: Any) -> tuple[Prompt, str, float, str | None]:
    """Prompt, output, reward and topic of a JSON line's value."""
    if not isinstance(row, dict):
        raise BadInput(f"it is not a sample; expected {FORM}")
    found = cast("dict[str, Any]", row)
    if unknown := [key for key in found if key not in KEYS]:
        raise BadInput(f"key {unknown[0][:40]!r} is unknown; expected {', '.join(KEYS)}")
    if lacking := [key for key in KEYS[:3] if key not in found]:
        raise BadInput(f"it has no {lacking[0]!r}; expected {FORM}")
    prompt, output, reward, topic = (found.get(key) for key in KEYS)
    if not isinstance(output, str) or not output:
        raise BadInput(f"output is {str(output)[:40]!r}; expected a text with at least one character")
    if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
        raise BadInput(f"reward is {str(reward)[:40]!r}; expected a finite number")
    if topic is not None and not isinstance(topic, str):
        raise BadInput(f"topic is {str(topic)[:40]!r}; expected a text")
    return sets.prompt_of({"messages" if isinstance(prompt, list) else "text": prompt}), output, float(reward), topic
