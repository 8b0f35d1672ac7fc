"""Training configuration: the common `Settings` and those that architectures add."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from unsleep.core import BadInput
from unsleep.dictionaries.architectures import KINDS, OWN_SETTINGS
from unsleep.dictionaries.settings import Settings

if TYPE_CHECKING:
    Architecture = str
else:
    Architecture = Literal[tuple(KINDS)]
"""Names of the architectures, the choices on the command line."""


@dataclass(frozen=True)
class TrainConfig(*OWN_SETTINGS):  # pyright: ignore[reportUntypedBaseClass]
    """Training configuration of a dictionary."""

    architecture: Architecture = Settings.architecture

    def __post_init__(self) -> None:
        if self.architecture not in KINDS:
            raise BadInput.of("architecture", self.architecture, f"one of {', '.join(KINDS)}", "training")
        super().__post_init__()
        kind = KINDS[self.architecture]
        if not self.unit_decoder and kind.has_k:
            raise BadInput(f"training unit_decoder is off for {self.architecture}, which compares features by strength")
        if self.skip and not kind.takes_skip:
            raise BadInput(
                f"training skip is set for {self.architecture}; expected another architecture for a skip transcoder"
            )
