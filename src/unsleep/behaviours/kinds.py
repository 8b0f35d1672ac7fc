"""Registry of classes by the name of their kind, discovered in the files of a folder."""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module
from typing import Any, ClassVar, TypeVar, cast

from unsleep.core import BadInput

T = TypeVar("T", bound="Kind")


class Kind:
    """Base of a registry. A base class gives its `noun`; each subclass names its `kind`, by which it is found.

    The registry holds the classes in the files of the folder `<noun>s/` beside the base class, such as
    `behaviours/triggers/`, and any other subclass that was defined.
    """

    kind: ClassVar[str]
    noun: ClassVar[str]
    _folder: ClassVar[str]
    _classes: ClassVar[dict[str, type[Any]]]

    def __init_subclass__(cls, noun: str | None = None, **named: Any) -> None:
        """Start a registry, or register a subclass; raises `BadInput` for a kind that another class has."""
        super().__init_subclass__(**named)
        if noun is not None:
            cls.noun, cls._classes = noun, {}
            cls._folder = f"{cls.__module__.rpartition('.')[0]}.{noun}s"
        elif "kind" in vars(cls):
            other = cls._classes.setdefault(cls.kind, cls)
            if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                raise BadInput(f"{cls.__name__} is of {cls.noun}_kind {cls.kind!r}; expected a name that no other has")

    @classmethod
    def kinds(cls: type[T]) -> dict[str, type[T]]:
        """Kind → class, sorted by name."""
        _import_all(cls._folder)
        return dict(sorted(cast("dict[str, type[T]]", cls._classes).items()))

    @classmethod
    def of_kind(cls: type[T], kind: str) -> type[T]:
        """The class of a kind; raises `BadInput` listing the known kinds for an unknown one."""
        if kind not in cls.kinds():
            raise BadInput.of(f"{cls.noun}_kind", kind, f"one of {', '.join(cls.kinds())}")
        return cls.kinds()[kind]

    @classmethod
    def of(cls: type[T], kind: str, text: str) -> T:
        """An instance of a kind from its text; raises `BadInput` for an unknown kind or an invalid text."""
        found: Any = cls.of_kind(kind)
        return found(text)


@cache
def _import_all(package: str) -> None:
    for module in pkgutil.iter_modules(import_module(package).__path__):
        import_module(f"{package}.{module.name}")
