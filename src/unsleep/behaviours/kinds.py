"""Classes that are found by the name of their kind, in the files of a folder."""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module
from typing import Any, ClassVar, TypeVar, cast

from unsleep.core import BadInput

T = TypeVar("T", bound="Kind")


class Kind:
    """What comes in kinds. A base gives its `noun`; each class below it names its `kind`, by which it is found.

    The kinds of a base are the classes in the files of `behaviours/<noun>s/`, and whatever classes else were made.
    """

    kind: ClassVar[str]
    noun: ClassVar[str]
    _classes: ClassVar[dict[str, type[Any]]]

    def __init_subclass__(cls, noun: str | None = None, **named: Any) -> None:
        """Start a family of kinds, or join one; raises `BadInput` for a kind that another class has."""
        super().__init_subclass__(**named)
        if noun is not None:
            cls.noun, cls._classes = noun, {}
        elif "kind" in vars(cls):
            other = cls._classes.setdefault(cls.kind, cls)
            if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                raise BadInput(f"{cls.__name__} is of {cls.noun}_kind {cls.kind!r}; expected a name that no other has")

    @classmethod
    def kinds(cls: type[T]) -> dict[str, type[T]]:
        """Every kind and its class, in the order of the names."""
        _import_all(f"{__package__}.{cls.noun}s")
        return dict(sorted(cast("dict[str, type[T]]", cls._classes).items()))

    @classmethod
    def of_kind(cls: type[T], kind: str) -> type[T]:
        """The class of a kind; raises `BadInput` with those that there are where there is none of the name."""
        if kind not in cls.kinds():
            raise BadInput.of(f"{cls.noun}_kind", kind, f"one of {', '.join(cls.kinds())}")
        return cls.kinds()[kind]

    @classmethod
    def of(cls: type[T], kind: str, text: str) -> T:
        """One of a kind, made from its text; raises `BadInput` for a kind or a text that there cannot be."""
        found: Any = cls.of_kind(kind)
        return found(text)


@cache
def _import_all(package: str) -> None:
    for module in pkgutil.iter_modules(import_module(package).__path__):
        import_module(f"{package}.{module.name}")
