"""Control vectors as GGUF, the format of llama.cpp and repeng.

    general.architecture       "controlvector"
    controlvector.model_hint   the model's type, such as "llama"
    controlvector.layer_count  number of directions
    direction.N                float32 [d_model], added to the output of block N

Blocks count from 0, so `direction.N` belongs to the Site `resid.N`: llama.cpp's loader puts it at row N − 1 of its
buffer (`common_control_vector_load_one`), and block `il` reads row il − 1 (`llama_adapter_cvec::apply`) and adds it
after the block's last addition. The first row is block 1's: llama.cpp cannot steer block 0 and refuses
`direction.0`, so it is not written here either; it is read, because repeng can write it. llama.cpp reads
only the tensors, one-dimensional float32 of equal length, and sums several files with a strength each.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from jaxtyping import Float
from torch import Tensor

from unsleep.base import store
from unsleep.core import BadInput, Site, check_finite
from unsleep.interventions.passes import TokenRule
from unsleep.interventions.steering import Steering

ARCHITECTURE = "controlvector"


@dataclass(frozen=True, eq=False)
class ControlVectors:
    """One vector per layer, and the type of their model."""

    model_type: str
    """Model type of the config, such as `llama`; a hint, not a fingerprint."""
    vectors: Mapping[Site, Float[Tensor, " d_model"]]
    """Site → vector, residual Sites only."""

    def __post_init__(self) -> None:
        if not self.vectors:
            raise BadInput("no control vector was given; give one for at least one layer")
        widths = {v.shape[-1] for v in self.vectors.values()}
        if len(widths) > 1:
            raise BadInput(f"control vectors have widths {sorted(widths)}; expected one width")
        for site, vector in self.vectors.items():
            if site.point != "resid":
                raise BadInput(f"there is a control vector at {site}; the format has residual Sites only")
            if vector.ndim != 1 or not vector.numel():
                raise BadInput(f"the control vector at {site} has shape {list(vector.shape)}; expected [d_model]")
            check_finite(vector, f"the control vector at {site}")

    def steering(
        self, coefficient: float = 1.0, *, tokens: TokenRule = "all", layers: tuple[int, int] | None = None
    ) -> Steering:
        """The vectors times a coefficient, added as llama.cpp does."""
        return Steering(self.vectors, "add", coefficient, tokens, layers)


def export_gguf(vectors: ControlVectors, path: str | Path) -> Path:
    """Write control vectors atomically; raises `BadInput` for layer 0, which the format cannot hold."""
    path = Path(path)
    if Site(0) in vectors.vectors:
        raise BadInput("llama.cpp has no direction for layer 0 (its first is that of layer 1); leave resid.0 out")
    with store.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.writing")
        writer = GGUFWriter(scratch, ARCHITECTURE)
        try:
            writer.add_string(f"{ARCHITECTURE}.model_hint", vectors.model_type)
            writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(vectors.vectors))
            for site in sorted(vectors.vectors):
                numbers: Any = vectors.vectors[site].detach().cpu().float().contiguous().numpy()
                writer.add_tensor(f"direction.{site.layer}", numbers)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            scratch.replace(path)
        finally:
            with contextlib.suppress(OSError):
                writer.close()  # also after a failed write
            scratch.unlink(missing_ok=True)
    return path


def import_gguf(path: str | Path) -> ControlVectors:
    """Read control vectors written by llama.cpp, repeng or `export_gguf`.

    Raises `BadInput` naming the file where it is missing, not GGUF, truncated, of another architecture, or contains
    anything but finite float32 vectors of equal width.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path} does not exist or is no file; expected a control vector in GGUF")
    try:
        reader: Any = GGUFReader(path)
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError, OSError) as error:
        raise BadInput(f"{path} is not a whole GGUF file ({error}); make it again") from error
    with store.reading(path):
        architecture = _text(reader, "general.architecture")
        if architecture != ARCHITECTURE:
            raise BadInput(f"general.architecture is {architecture!r}; expected {ARCHITECTURE!r}")
        found: dict[Site, Tensor] = {}
        for tensor in reader.tensors:
            name = str(tensor.name)
            if not re.fullmatch(r"direction\.(0|[1-9]\d{0,5})", name):
                raise BadInput(f"holds a tensor {name[:60]!r}; expected direction.1, direction.2 and so on")
            if tensor.tensor_type != GGMLQuantizationType.F32 or len(tensor.shape) != 1:
                kind = f"{tensor.tensor_type.name} {tensor.shape.tolist()}"
                raise BadInput(f"{name} is {kind}; expected F32 of one dimension")
            found[Site(int(name.removeprefix("direction.")))] = torch.from_numpy(np.array(tensor.data, np.float32))
        return ControlVectors(_text(reader, f"{ARCHITECTURE}.model_hint"), found)


def _text(reader: Any, key: str) -> str:
    field = reader.get_field(key)
    if field is None:
        raise BadInput(f"has no {key!r}; expected a control vector")
    value = field.contents()
    if not isinstance(value, str):
        raise BadInput(f"{key} is {value!r}; expected text")
    return value
