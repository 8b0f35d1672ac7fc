"""Arguments of the façade's functions: a path in place of a loaded model, or the reverse, is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import ParamSpec, TypeVar

from unsleep.core import BadInput
from unsleep.models.model import LoadedModel

P = ParamSpec("P")
R = TypeVar("R")


def checked(name: str, function: Callable[P, R]) -> Callable[P, R]:
    """The façade's function `name`: it refuses paths and names for loaded models, and loaded models for paths.

    Parameters are told apart by their annotations; one that is annotated with both takes either. Calls raise `BadInput`
    before the function runs, and what Python refuses (a missing argument, an unknown one) is left to Python.
    """
    parameters = signature(function)
    annotations = {each.name: str(each.annotation) for each in parameters.parameters.values()}
    models, paths = (
        {each for each, said in annotations.items() if re.search(rf"\b{kind}\b", said)}
        for kind in ("LoadedModel", "Path")
    )

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = parameters.bind_partial(*args, **kwargs).arguments
        except TypeError:
            return function(*args, **kwargs)
        for parameter, value in given.items():
            if (parameter in models) == (parameter in paths):
                continue
            for each in value if isinstance(value, list | tuple) else (value,):
                _check(name, parameter, each, loaded=parameter in models)
        return function(*args, **kwargs)

    return call


def _check(function: str, parameter: str, value: object, *, loaded: bool) -> None:
    if loaded and isinstance(value, str | Path):
        path = str(value)
        raise BadInput.of(parameter, path, f"a loaded model, as unsleep.load_model({path[:60]!r}) gives it", function)
    if not loaded and isinstance(value, LoadedModel):
        raise BadInput(f"{function} {parameter} is a loaded model; expected a path or name, such as {value.name!r}")
