"""GGUF files: whole, or refused by name; what is read is held against the tensors that were written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from support.gguf_files import LAYERS, write_gguf
from unsleep.core import BadInput
from unsleep.models.load import LoadConfig, load_model


def rewritten(source: Path, target: Path, change: Callable[[gguf.GGUFWriter, dict[str, Any]], None]) -> Path:
    """A GGUF file again, its tensors and settings changed on the way."""
    reader = gguf.GGUFReader(source)
    tensors: dict[str, Any] = {t.name: np.array(t.data) for t in reader.tensors}
    settings = {k: (f.contents(), f.types) for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    held: dict[str, Any] = {"tensors": tensors, "settings": settings}
    writer = gguf.GGUFWriter(target, "llama")
    change(writer, held)
    for key, (value, types) in settings.items():
        if key != "general.architecture":
            array = types[-1] if types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, value, types[0], array)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "whole.gguf")
    return tmp_path / "whole.gguf"


def drop(*names: str) -> Callable[[gguf.GGUFWriter, dict[str, Any]], None]:
    return lambda _, held: [held["tensors"].pop(n) for n in names] and None


def put(**values: Any) -> Callable[[gguf.GGUFWriter, dict[str, Any]], None]:
    def change(_: gguf.GGUFWriter, held: dict[str, Any]) -> None:
        for name, value in values.items():
            key = "llama." + name.replace("__", ".")
            _, types = held["settings"].get(key, (None, [gguf.GGUFValueType.UINT32]))
            held["settings"][key] = (value, types if isinstance(value, int) else [gguf.GGUFValueType.FLOAT32])

    return change


def test_weights_that_a_file_lacks_are_named(whole: Path, tmp_path: Path):
    part = rewritten(whole, tmp_path / "part.gguf", drop("blk.1.ffn_down.weight", "output_norm.weight"))
    with pytest.raises(BadInput, match=r"part\.gguf lacks 2 of the model's weights \(model\.layers\.1\.mlp\.down_proj"):
        load_model(part)


def test_tensors_that_are_not_read_are_named(whole: Path, tmp_path: Path):
    def factors(value: float) -> Callable[[gguf.GGUFWriter, dict[str, Any]], None]:
        return lambda _, held: held["tensors"].update({"rope_freqs.weight": np.full(4, value, np.float32)})

    scaled = rewritten(whole, tmp_path / "scaled.gguf", factors(2.0))
    with pytest.raises(BadInput, match=r"has rope_freqs\.weight, which transformers does not read.*--ignore-keys"):
        load_model(scaled)
    wanted = load_model(whole).fingerprint
    assert load_model(scaled, LoadConfig(ignore_keys=("rope_freqs",))).fingerprint == wanted
    assert load_model(rewritten(whole, tmp_path / "ones.gguf", factors(1.0))).fingerprint == wanted


def test_layers_beyond_those_that_the_file_counts_are_named(whole: Path, tmp_path: Path):
    fewer = rewritten(whole, tmp_path / "fewer.gguf", put(block_count=LAYERS - 1))
    with pytest.raises(BadInput, match=r"has blk\.1\.\w+\.weight and \d+ more, which transformers does not read"):
        load_model(fewer)
    more = rewritten(whole, tmp_path / "more.gguf", put(block_count=LAYERS + 1))
    with pytest.raises(BadInput, match=r"lacks 9 of the model's weights \(model\.layers\.2"):
        load_model(more)


@pytest.mark.parametrize("setting", [{"rope__scaling__factor": 4.0}, {"attention__sliding_window": 16}])
def test_settings_that_are_not_read_are_named(whole: Path, tmp_path: Path, setting: dict[str, Any]):
    file = rewritten(whole, tmp_path / "set.gguf", put(**setting))
    name = next(iter(setting)).replace("__", r"\.")
    with pytest.raises(BadInput, match=rf"has llama\.{name}, which transformers does not read"):
        load_model(file)
    load_model(file, LoadConfig(ignore_keys=(name,)))


@pytest.mark.parametrize(
    "change",
    [
        put(embedding_length=64),
        put(feed_forward_length=40),
        put(attention__head_count=3),
        put(attention__head_count=0),
        put(attention__head_count_kv=3),
        put(block_count=0),
        put(vocab_size=9),
    ],
)
def test_shapes_that_do_not_fit_are_errors(whole: Path, tmp_path: Path, change: Any):
    with pytest.raises(BadInput, match=r"cannot read bad\.gguf as a GGUF model|bad\.gguf (lacks|has)|bad\.gguf"):
        load_model(rewritten(whole, tmp_path / "bad.gguf", change))


def test_an_architecture_that_is_not_read_is_named(whole: Path, tmp_path: Path):
    data = whole.read_bytes().replace(b"llama", b"lllll")
    (tmp_path / "other.gguf").write_bytes(data)
    with pytest.raises(BadInput, match=r"cannot read other\.gguf as a GGUF model: .*lllll"):
        load_model(tmp_path / "other.gguf")


@pytest.mark.parametrize("keep", [0, 3, 40, 4000])
def test_a_file_that_was_cut_off_is_named(whole: Path, tmp_path: Path, keep: int):
    (tmp_path / "cut.gguf").write_bytes(whole.read_bytes()[:keep])
    with pytest.raises(BadInput, match=r"cut\.gguf"):
        load_model(tmp_path / "cut.gguf")


# Split files


def split(whole: Path, folder: Path, parts: int = 3) -> list[Path]:
    """A file as llama.cpp's gguf-split cuts it: all settings in the first part, tensors in each."""
    reader = gguf.GGUFReader(whole)
    names = [t.name for t in reader.tensors]
    folder.mkdir()
    files: list[Path] = []
    for part in range(parts):
        file = folder / f"model-{part + 1:05d}-of-{parts:05d}.gguf"
        own = set(names[part::parts])

        def cut(writer: gguf.GGUFWriter, held: dict[str, Any], part: int = part, own: set[str] = own) -> None:
            for name in names:
                if name not in own:
                    held["tensors"].pop(name)
            if part:
                held["settings"].clear()
            writer.add_uint16("split.no", part)
            writer.add_uint16("split.count", parts)
            writer.add_int32("split.tensors.count", len(names))

        files.append(rewritten(whole, file, cut))
    return files


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_split_file_is_joined_whichever_part_is_named(whole: Path, tmp_path: Path, which: int):
    files = split(whole, tmp_path / "parts")
    one, other = load_model(whole), load_model(files[which])
    assert one.fingerprint == other.fingerprint
    assert one.network.config.to_dict() | {"_name_or_path": ""} == other.network.config.to_dict() | {
        "_name_or_path": ""
    }
    assert one.encode(["hello"]) == other.encode(["hello"])
    ids = torch.tensor(one.encode(["hello"]))
    assert torch.equal(one.network(ids).logits, other.network(ids).logits)


def test_a_part_that_is_missing_is_named(whole: Path, tmp_path: Path):
    files = split(whole, tmp_path / "parts")
    files[2].unlink()
    told = r"model-00001-of-00003\.gguf is one of 3 parts of a split file, and model-00003-of-00003\.gguf is missing"
    with pytest.raises(BadInput, match=told):
        load_model(files[0])
    shutil.copy(files[0], tmp_path / "renamed.gguf")
    with pytest.raises(BadInput, match=r"renamed\.gguf is one of 3 parts of a split file, and the others"):
        load_model(tmp_path / "renamed.gguf")


def test_parts_of_another_file_are_refused(whole: Path, tmp_path: Path):
    files = split(whole, tmp_path / "parts")
    shutil.copy(files[1], files[2])
    with pytest.raises(BadInput, match=r"model-00001-of-00003\.gguf"):
        load_model(files[0])
