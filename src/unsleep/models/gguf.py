"""GGUF files: read completely or refused.

transformers dequantises them. What it skips silently is refused here by name: tensors and settings of
the file that it does not read, weights of the model that the file lacks. A split file is joined first.
"""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from unsleep.core import BadInput
from unsleep.models.ignored import IgnoredKeys

SPLIT = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
"""File names of a split GGUF."""

HARMLESS = ("vocab_size", "attention.key_length", "attention.value_length", "rope.dimension_count")
"""Architecture settings that are redundant with others or with the shapes of weights."""


def load_gguf(
    path: Path, dtype: torch.dtype | str = "auto", ignored: IgnoredKeys | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a GGUF file, dequantised; `auto` is bfloat16.

    Args:
        ignored: tensors and settings that may be skipped.

    Raises:
        BadInput: the file is damaged, of an architecture that transformers does not read, lacks parts or weights, or
            contains something that is not read.
    """
    with _joined(path) as whole, _reading(path), contextlib.redirect_stderr(io.StringIO()):  # silences tqdm
        reader = GGUFReader(whole)
        where = {"gguf_file": whole.name}
        network, info = cast("Any", AutoModelForCausalLM).from_pretrained(
            whole.parent,
            dtype=torch.bfloat16 if dtype == "auto" else dtype,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            **where,
        )
        tokenizer = AutoTokenizer.from_pretrained(whole.parent, **where)
    if missing := sorted(info["missing_keys"]):
        raise BadInput(f"{path} lacks {len(missing)} of the model's weights ({missing[0]} …); expected a whole file")
    unread = [*_unread_tensors(reader, network), *_unread_settings(reader, network.config)]
    ignored = ignored or IgnoredKeys()
    if unread := ignored.left(unread, path.name):
        raise BadInput(
            f"{path} has {unread[0]}{f' and {len(unread) - 1} more' if unread[1:] else ''}, which transformers does "
            f"not read. Pass {ignored.flag(unread)} if it does not matter"
        )
    # save_pretrained refuses while the quantizer that read the file is still attached
    network.hf_quantizer = None
    if hasattr(network.config, "quantization_config"):
        del network.config.quantization_config
    return network, tokenizer


@contextlib.contextmanager
def _reading(path: Path) -> Generator[None]:
    """Raise `BadInput` naming the file for any error that a damaged one causes."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:  # tokenizers and gguf raise bare and arbitrary types
        why = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise BadInput(f"cannot read {path.name} as a GGUF model: {why}") from error


def _unread_tensors(reader: GGUFReader, network: PreTrainedModel) -> list[str]:
    """Tensors of the file that have no place in the model; empty where both have equally many parameters."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    tensors = [t for t in reader.tensors if not (t.name == "rope_freqs.weight" and bool((t.data == 1).all()))]
    if sum(int(t.n_elements) for t in tensors) == sum(w.numel() for w in network.parameters()):
        return []
    architecture = str(_value(reader, "general.architecture"))
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=network.config.to_dict())
    known = get_gguf_hf_weights_map(network, processor)
    return [t.name for t in tensors if t.name not in known]


def _unread_settings(reader: GGUFReader, config: Any) -> list[str]:
    """Architecture settings that are neither read nor at the value in the config."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING

    architecture = str(_value(reader, "general.architecture"))
    table = cast("dict[str, dict[str, str | None]]", GGUF_TO_TRANSFORMERS_MAPPING["config"])
    read = table.get(str(config.model_type).removesuffix("_text"), {}) | table.get(architecture, {})
    held = config.to_dict()
    unread: list[str] = []
    for key in reader.fields:
        inner = key.removeprefix(f"{architecture}.")
        if inner == key or inner in HARMLESS or read.get(inner) is not None:
            continue
        value = _value(reader, key)
        if held.get(inner.replace(".", "_")) != value and value not in (0, False, "", "none"):
            unread.append(key)
    return unread


def _value(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise BadInput(f"it has no {key}; expected a model")
    return field.contents()


@contextlib.contextmanager
def _joined(path: Path) -> Generator[Path]:
    """The file itself, or a temporary file that joins all parts of a split one."""
    named = SPLIT.match(path.name)
    with _reading(path):
        count = GGUFReader(path).get_field("split.count")
        parts = int(count.contents()) if count is not None else 1
    if parts < 2:
        yield path
        return
    files = (
        [path.with_name(f"{named['stem']}-{i:05d}-of-{parts:05d}.gguf") for i in range(1, parts + 1)] if named else []
    )
    if absent := [f.name for f in files if not f.is_file()] or ([] if files else ["the others"]):
        raise BadInput(f"{path} is one of {parts} parts of a split file, and {absent[0]} is missing from its folder")
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / f"{cast('re.Match[str]', named)['stem']}.gguf"
        with _reading(path):
            _join(files, whole)
        yield whole


def _join(files: Sequence[Path], whole: Path) -> None:
    """Write the settings of the first part and the tensors of all parts into one file."""
    readers = [GGUFReader(file) for file in files]
    architecture = str(_value(readers[0], "general.architecture"))
    writer = GGUFWriter(whole, architecture)
    for key, field in readers[0].fields.items():
        if key.startswith(("GGUF.", "split.")) or key == "general.architecture":
            continue
        kind, *inner = field.types
        writer.add_key_value(key, field.contents(), kind, inner[-1] if kind == GGUFValueType.ARRAY else None)
    total = readers[0].get_field("split.tensors.count")
    tensors = [t for reader in readers for t in reader.tensors]
    if total is not None and int(total.contents()) != len(tensors):
        raise BadInput(f"the parts of {files[0]} have {len(tensors)} tensors; expected {int(total.contents())}")
    for t in tensors:
        writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
