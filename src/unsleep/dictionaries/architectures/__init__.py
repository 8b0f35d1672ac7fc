"""Registry of architectures, one file each: the dictionary, its passes, its settings and its names in files.

A file of this folder defines one `Coder`, whose lower-case class name is the architecture's name. It overrides
only what differs; no other code needs to change.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.settings import Settings


def _kinds() -> dict[str, type[Coder]]:
    found: dict[str, type[Coder]] = {}
    for file in pkgutil.iter_modules(__path__, f"{__name__}."):
        defined = [v for v in vars(import_module(file.name)).values() if getattr(v, "__module__", "") == file.name]
        kinds = [v for v in defined if isinstance(v, type) and issubclass(v, Coder)]
        if len(kinds) != 1 or not hasattr(kinds[0], "in_saelens"):
            raise TypeError(f"{file.name} defines {len(kinds)} dictionaries; expected one, with `in_saelens`")
        found[kinds[0].name()] = kinds[0]
    return found


KINDS = _kinds()
"""Architecture name → class."""


def _own_settings() -> tuple[type[Settings], ...]:
    every = dict.fromkeys([Settings, *(kind.training for kind in KINDS.values())])
    return tuple(s for s in every if not any(other is not s and issubclass(other, s) for other in every))


OWN_SETTINGS = _own_settings()
"""Settings that architectures add to `Settings`; combined they are `TrainConfig`."""
