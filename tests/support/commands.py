"""What the help of a command must name."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable

import tyro

from unsleep.cli.grid import Grid
from unsleep.dictionaries.config import TrainConfig


def flags_of(function: Callable[..., int]) -> list[str]:
    """Every parameter as it must stand in the help: flags, and names of positional ones."""
    hints = typing.get_type_hints(function, include_extras=True)
    flags: list[str] = []
    for name, parameter in inspect.signature(function).parameters.items():
        marks = getattr(hints[name], "__metadata__", ())
        if dataclasses.is_dataclass(parameter.default):
            config = TrainConfig() if isinstance(parameter.default, Grid) else parameter.default
            bare = tyro.conf.OmitArgPrefixes in marks
            own = bare or any(getattr(mark, "name", None) == "" for mark in marks)
            flags += fields_of(config, "" if bare else ".", "" if own else f"{name.replace('_', '-')}.")
        elif tyro.conf.Positional in marks:
            flags += [mark.metavar for mark in marks if hasattr(mark, "metavar")]
        else:
            flags.append(f"--{name.replace('_', '-')}")
            if parameter.default is True:
                flags.append(f"--no-{name.replace('_', '-')}")
    return flags


def fields_of(config: object, separator: str, prefix: str = "") -> list[str]:
    found: list[str] = []
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value, name = getattr(config, field.name), field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            found += fields_of(value, separator, f"{prefix}{name}{separator}" if separator else "")
        else:
            found.append(f"--{prefix}{name}")
            if value is True:
                found.append(f"--{prefix}no-{name}")
    return found
