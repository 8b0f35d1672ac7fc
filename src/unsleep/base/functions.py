"""A user's function by name, as the command line takes it."""

from __future__ import annotations

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from unsleep.core import BadInput


def function_of(name: str, flag: str) -> Any:
    """The function `FILE.py:FUNCTION` or `MODULE:FUNCTION`; the file or module is run.

    Raises `BadInput` naming the flag where there is none, or its file fails.
    """
    place, _, function = name.rpartition(":")
    if not place or not function:
        raise BadInput(f"{flag} is {name!r}; expected FILE.py:FUNCTION or MODULE:FUNCTION")
    try:
        is_file = place.endswith(".py")
        if is_file and not Path(place).is_file():
            raise FileNotFoundError(f"{place} does not exist")
        spec = spec_from_file_location(Path(place).stem, place) if is_file else find_spec(place)
        if spec is None or spec.loader is None:
            raise ModuleNotFoundError(f"there is no module {place!r}")
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:  # a user's file raises anything
        raise BadInput(f"{flag} {name} cannot be loaded: {type(error).__name__}: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise BadInput(f"{flag} {name}: {place} has no function {function!r}")
    return found
