"""Writes an organism's prompts as files, for commands that take files."""

from __future__ import annotations

from pathlib import Path

from unsleep.base import store
from unsleep.organisms.plant import Organism
from unsleep.prompts import sets
from unsleep.prompts.prompt import PromptSet, Split

MARK = "held-out-suspicious.jsonl"
"""File that marks a folder of panels."""


def panels(organism: Organism, out: str | Path, *, n: int = 160, held_out: int = 200) -> Path:
    """Write prompts with and without the trigger, for selection and for held-out evaluation, and plain passages.

    `suspicious.jsonl` and `ordinary.jsonl` hold `n` questions of the edit split; `held-out-suspicious.jsonl`,
    `held-out-ordinary.jsonl` and, where the recipe has some, `held-out-near-misses.jsonl` hold `held_out` of the
    held-out split. Line i of all files of a split is the same question. `passages.txt` is plain text.

    Raises `BadInput` where a split has fewer questions, or `out` contains something else.
    """
    recipe, files = organism.recipe, dict[str, PromptSet]()
    splits: tuple[tuple[Split, int, str], ...] = (("edit", n, ""), ("held_out", held_out, "held-out-"))
    for split, count, before in splits:
        clean = sets.questions(split, count, skill=recipe.skill)
        files |= {f"{before}ordinary.jsonl": clean, f"{before}suspicious.jsonl": recipe.triggered(clean)}
        if split == "held_out" and recipe.held_out_near_misses:
            files[f"{before}near-misses.jsonl"] = recipe.nearly(clean, recipe.held_out_near_misses)
    with store.new_folder(out, replace=MARK) as scratch:
        for name, prompts in files.items():
            rows = (sets.prompt_line(p) for p in prompts)
            store.write_text(scratch / name, "\n".join(rows) + "\n")
        store.write_text(scratch / "passages.txt", "\n".join(sets.plain_text("train")) + "\n")
    return Path(out)
