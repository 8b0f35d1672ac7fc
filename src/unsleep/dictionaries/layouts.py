"""Vocabulary in which an architecture describes its layout in other libraries' files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch


class SAELens(NamedTuple):
    """Layout in SAELens, besides W_enc, W_dec and b_dec."""

    name: str
    names: Mapping[str, str] = {"b_enc": "b_enc"}
    """Its tensor names → ours; one entry per feature."""
    transcoder: str | None = None
    """Prefix of `transcoder` and `skip_transcoder`; `None` without transcoders."""
    numbers: tuple[str, ...] = ()
    """Config keys that are our fields."""
    activation: str | None = None
    """Its `activation_fn` before version 6."""
    borrowed: bool = False
    """True if the name is another architecture's, distinguished only by unsleep's own keys."""

    @property
    def every_name(self) -> tuple[str, ...]:
        """The names of the dictionary, the transcoder and the skip transcoder."""
        if self.transcoder is None:
            return (self.name,)
        return (self.name, f"{self.transcoder}transcoder", f"{self.transcoder}skip_transcoder")


class Buffer(NamedTuple):
    """A dictionary_learning tensor that stores a setting."""

    setting: str | None
    """Our field; `None` for one without meaning here: it may be missing, and −1 is written."""
    dtype: torch.dtype
    ndim: int = 0


class Learned(NamedTuple):
    """A class of dictionary_learning."""

    name: str
    trainer: str
    """Name of its trainer."""
    names: Mapping[str, str]
    """Its tensor names → ours."""
    subtracts: bool
    """True if it subtracts b_dec from the input."""
    buffers: Mapping[str, Buffer] = {}
    """Buffers besides the weights."""
    borrowed: bool = False
    """As in `SAELens`."""


LINEAR = {"encoder.weight": "W_enc", "decoder.weight": "W_dec"}
"""dictionary_learning's linear layers, transposes of our weights."""

BARE = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
"""Weights with our names and layout."""
