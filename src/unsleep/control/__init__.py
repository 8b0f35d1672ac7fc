"""Representation reading and control: directions from contrast pairs, what they read and what they steer."""

from unsleep.control.conditional import Condition, condition_on, conditioned, fit_condition
from unsleep.control.control import Control, contrast_vectors, controlled
from unsleep.control.gguf_files import ControlVectors, export_gguf, import_gguf
from unsleep.control.lorra import LorraConfig, lorra
from unsleep.control.reading import Reading, RepReader, fit_reader

__all__ = [
    "Condition",
    "Control",
    "ControlVectors",
    "LorraConfig",
    "Reading",
    "RepReader",
    "condition_on",
    "conditioned",
    "contrast_vectors",
    "controlled",
    "export_gguf",
    "fit_condition",
    "fit_reader",
    "import_gguf",
    "lorra",
]
