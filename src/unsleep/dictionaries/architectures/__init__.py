"""One file for each architecture: its dictionary, its passes, its settings and its names in files; found here.

A file of this folder defines one `Coder`, whose class name in lower case is the architecture's name. It overrides
what it does differently; nothing outside the folder has to know of it.
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
        [kind] = [v for v in defined if isinstance(v, type) and issubclass(v, Coder)]
        found[kind.name()] = kind
    return found


KINDS = _kinds()
"""Every architecture by its name."""


def _own_settings() -> tuple[type[Settings], ...]:
    every = dict.fromkeys([Settings, *(kind.training for kind in KINDS.values())])
    return tuple(s for s in every if not any(other is not s and issubclass(other, s) for other in every))


OWN_SETTINGS = _own_settings()
"""The settings that architectures add to `Settings`; together they are `TrainConfig`."""
