"""How other libraries' files name what an architecture holds: the terms in which an architecture says it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch


class SAELens(NamedTuple):
    """An architecture of SAELens, beside W_enc, W_dec and b_dec."""

    name: str
    names: Mapping[str, str] = {"b_enc": "b_enc"}
    """Its name of a tensor → ours; of the feature's size."""
    transcoder: str | None = None
    """What stands before `transcoder` and `skip_transcoder`; `None` where it has none."""
    numbers: tuple[str, ...] = ()
    """Keys of its config that are fields of ours."""
    activation: str | None = None
    """Its `activation_fn` before version 6."""
    borrowed: bool = False
    """Whether the name is another architecture's, so that unsleep's own keys alone tell them apart."""

    @property
    def every_name(self) -> tuple[str, ...]:
        """The names of the dictionary, the transcoder and the skip transcoder."""
        if self.transcoder is None:
            return (self.name,)
        return (self.name, f"{self.transcoder}transcoder", f"{self.transcoder}skip_transcoder")


class Buffer(NamedTuple):
    """A tensor of dictionary_learning that holds a setting."""

    setting: str | None
    """Ours; `None` for one that has no meaning here: it may be missing, and −1 is written."""
    dtype: torch.dtype
    ndim: int = 0


class Learned(NamedTuple):
    """A class of dictionary_learning."""

    name: str
    trainer: str
    """The trainer that makes it."""
    names: Mapping[str, str]
    """Its name of a tensor → ours."""
    subtracts: bool
    """Whether it takes b_dec off the input."""
    buffers: Mapping[str, Buffer] = {}
    """Beside the weights."""
    borrowed: bool = False
    """As in `SAELens`."""


LINEAR = {"encoder.weight": "W_enc", "decoder.weight": "W_dec"}
"""Weights of linear layers in dictionary_learning, which are ours transposed."""

BARE = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
"""Weights that it names and lays out as we do."""
