"""Checkpoint keys that the user declares irrelevant (`--ignore-keys`)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence


class IgnoredKeys:
    """Patterns of checkpoint keys that may be skipped, and the keys that were."""

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        self.patterns = [re.compile(pattern) for pattern in patterns]
        self.taken: dict[str, str] = {}
        """Key → the file that holds it."""

    def left(self, keys: Iterable[str], where: str) -> list[str]:
        """The keys that no pattern matches, sorted; the others are recorded as skipped."""
        every = sorted(keys)
        self.taken |= {key: where for key in every if any(p.search(key) for p in self.patterns)}
        return [key for key in every if key not in self.taken]

    def notes(self) -> list[str]:
        """Messages: skipped keys, and patterns without a match."""
        found = [f"{where}: {key} is ignored" for key, where in self.taken.items()]
        if len(found) > 3:
            found = [*found[:2], f"{len(found) - 2} more weights are ignored"]
        idle = [p.pattern for p in self.patterns if not any(p.search(key) for key in self.taken)]
        return [*found, *(f"--ignore-keys {pattern!r} matches nothing" for pattern in idle)]

    @staticmethod
    def flag(keys: Sequence[str], kept: Iterable[str] = ()) -> str:
        """The `--ignore-keys` option that matches all of `keys` and none of `kept`."""
        first = f"--ignore-keys '^{re.escape(keys[0])}$'"
        if len(keys) == 1:
            return first
        levels = zip(*(key.split(".") for key in keys), strict=False)
        common = ".".join(level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels))
        if common and not any(key.startswith(common) for key in kept):
            return f"--ignore-keys '^{re.escape(common)}'"
        return f"patterns for all of them, such as {first},"
