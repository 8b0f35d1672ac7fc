"""Training flags that take several values: `--k 16 32 64 --seed 0 1`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

from unsleep.cli.settings import REGISTRY
from unsleep.dictionaries.config import TrainConfig
from unsleep.dictionaries.sweep import LETTERS, variants


@dataclass(frozen=True)
class Grid:
    """Training settings, those of `LETTERS` with a sequence of values."""

    settings: dict[str, Any]

    @property
    def configs(self) -> dict[str, TrainConfig]:
        """Variant → config, all trained in one pass over the activations; raises as `variants` does."""
        return variants(self.settings)


ONE = Grid({})
"""Default settings."""


@REGISTRY.struct_rule
def flags(info: StructTypeInfo) -> StructConstructorSpec | None:
    """A flag per field of `TrainConfig`; those of `LETTERS` take one or more values."""
    if info.type is not Grid:
        return None
    found = ConstructorRegistry.get_struct_spec(StructTypeInfo.make(TrainConfig, TrainConfig(), in_union_context=False))
    settings = [
        replace(field, type=cast("Any", tuple[field.type, ...]), default=(field.default,))
        if field.name in LETTERS
        else field
        for field in cast("StructConstructorSpec", found).fields
    ]
    return StructConstructorSpec(lambda **given: Grid(given), tuple(settings))
