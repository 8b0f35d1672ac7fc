"""Artefacts are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

import unsleep
from unsleep.base import store
from unsleep.core import BadInput

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool]
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape, dtype = draw(SHAPES), draw(st.sampled_from(DTYPES))
    noise = torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return noise.to(dtype)


NAMED = st.dictionaries(st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=6), tensors())


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_a_folder_appears_whole_when_the_block_ends(tmp_path: Path):
    target = tmp_path / "deep" / "artefact"
    with store.new_folder(target) as folder:
        (folder / "part").write_text("one")
        assert not target.exists()
        assert folder.parent == target.parent
    assert listing(tmp_path) == ["deep", "deep/artefact", "deep/artefact/part"]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_artefacts_are_as_open_as_other_new_files(tmp_path: Path, mask: int):
    before = os.umask(mask)
    try:
        with store.new_folder(tmp_path / "artefact") as scratch:
            (scratch / "inner").mkdir(0o700)
            save_file({"x": torch.ones(2)}, scratch / "inner" / "by_another_library.safetensors")
            store.write_json(scratch / "record.json", {})
        store.write_tensors(tmp_path / "alone.safetensors", {"x": torch.ones(2)})
    finally:
        os.umask(before)
    found = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert {mode for name, mode in found.items() if "." not in name} == {0o777 & ~mask}
    assert {mode for name, mode in found.items() if "." in name} == {0o666 & ~mask}
    assert len(found) == 5


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_an_exception(tmp_path: Path, error: type[BaseException]):
    def write() -> None:
        with store.new_folder(tmp_path / "artefact") as folder:
            (folder / "part").write_text("one")
            raise error

    with pytest.raises(error):
        write()
    assert listing(tmp_path) == []


def test_an_existing_folder_is_refused_before_any_work(tmp_path: Path):
    (tmp_path / "artefact").mkdir()
    (tmp_path / "artefact" / "mine").write_text("precious")
    (tmp_path / "file").write_text("precious")
    worked = []
    for name in ("artefact", "file"):
        with pytest.raises(BadInput, match=f"{name} exists already"), store.new_folder(tmp_path / name):
            worked.append(name)
    assert worked == []
    assert listing(tmp_path) == ["artefact", "artefact/mine", "file"]


def test_an_empty_folder_is_filled(tmp_path: Path):
    (tmp_path / "artefact").mkdir()
    with store.new_folder(tmp_path / "artefact") as folder:
        (folder / "part").write_text("one")
    assert listing(tmp_path) == ["artefact", "artefact/part"]


def test_replace_swaps_the_whole_folder(tmp_path: Path):
    old = tmp_path / "artefact"
    (old / "nested").mkdir(parents=True)
    (old / "nested" / "stale").write_text("old")
    with store.new_folder(old, replace=True) as folder:
        (folder / "part").write_text("new")
        assert (old / "nested" / "stale").read_text() == "old"
    assert listing(tmp_path) == ["artefact", "artefact/part"]


def test_replace_keeps_the_old_folder_where_the_new_one_fails(tmp_path: Path):
    old = tmp_path / "artefact"
    old.mkdir()
    (old / "part").write_text("old")
    with pytest.raises(ZeroDivisionError), store.new_folder(old, replace=True) as folder:
        (folder / "part").write_text(str(1 / 0))
    assert listing(tmp_path) == ["artefact", "artefact/part"]
    assert (old / "part").read_text() == "old"


def test_of_two_blocks_that_overlap_the_last_one_stands_whole(tmp_path: Path):
    target = tmp_path / "artefact"
    with store.new_folder(target) as slow:
        (slow / "slow").write_text("slow")
        with store.new_folder(target) as fast:
            (fast / "fast").write_text("fast")
        assert listing(target) == ["fast"]
    assert listing(tmp_path) == ["artefact", "artefact/slow"]


WRITER = """
import sys, types
package = types.ModuleType("unsleep")  # without its __init__: this worker needs store alone
package.__path__ = [sys.argv[1]]
sys.modules["unsleep"] = package
from pathlib import Path
from unsleep.base import store
print("ready", flush=True)
sys.stdin.readline()
for _ in range(40):
    with store.new_folder(sys.argv[2], replace=True) as folder:
        for part in "abc":
            (folder / part).write_text(sys.argv[3])
            store.write_json(folder / f"{part}.json", sys.argv[3])
"""


def test_two_processes_that_write_one_folder_leave_one_whole_artefact(tmp_path: Path):
    target = tmp_path / "artefact"
    command = [sys.executable, "-c", WRITER, str(Path(unsleep.__file__).parent), str(target)]
    pipe = subprocess.PIPE
    writers = [
        subprocess.Popen([*command, name], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        for name in ("first", "second")
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    errors = [writer.communicate()[1][-300:] for writer in writers]
    assert [w.returncode for w in writers] == [0, 0], errors
    assert listing(tmp_path) == ["artefact", *(f"artefact/{p}{end}" for p in "abc" for end in ("", ".json"))]
    assert len({(target / part).read_text() for part in "abc"}) == 1


def test_threads_that_write_one_file_leave_one_whole_file(tmp_path: Path):
    path, start, errors = tmp_path / "value.json", threading.Barrier(4), []

    def write(value: int) -> None:
        start.wait()
        for _ in range(30):
            try:
                store.write_json(path, [value] * 2000)
            except OSError as error:
                errors.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert listing(tmp_path) == ["value.json"]
    assert len(set(store.read_json(path))) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_json_reads_back_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, value: object):
    path = tmp_path_factory.mktemp("json") / "deep" / "value.json"
    store.write_json(path, value)
    assert store.read_json(path) == value
    assert listing(path.parent) == ["value.json"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, {"a": [1.0, -math.inf]}])
def test_json_without_finite_numbers_is_refused_and_the_old_file_stays(tmp_path: Path, bad: object):
    store.write_json(tmp_path / "kept.json", "old")
    for name in ("kept.json", "new.json"):
        with pytest.raises(ValueError, match="NaN or infinity"):
            store.write_json(tmp_path / name, bad)
    assert listing(tmp_path) == ["kept.json"]
    assert store.read_json(tmp_path / "kept.json") == "old"


DAMAGED_JSON = {
    "cut": b'{"a": [1, 2',
    "empty": b"",
    "bytes": b'"\xff\xfe"',
    "words": b"hello",
    "digits": b"9" * 5000,
    "nested": b"[" * 100_000,
}


def test_what_is_not_json_names_the_file(tmp_path: Path):
    with pytest.raises(BadInput, match=r"none\.json does not exist"):
        store.read_json(tmp_path / "none.json")
    for name, content in DAMAGED_JSON.items():
        (tmp_path / f"{name}.json").write_bytes(content)
        with pytest.raises(BadInput, match=rf"{name}\.json is not valid JSON"):
            store.read_json(tmp_path / f"{name}.json")
    with pytest.raises(BadInput, match=r"words\.json/inside\.json does not exist"):
        store.read_json(tmp_path / "words.json" / "inside.json")
    with pytest.raises(BadInput, match=str(tmp_path)):
        store.read_json(tmp_path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([1], r"a\.json is \[1\]; expected an object"),
        ({}, "a\\.json has no 'n'; it has nothing"),
        ({"n": 1}, "a\\.json has no 'names'; it has 'n'"),
        ({"n": True, "names": []}, r"a\.json: n is True; expected int"),
        ({"n": 1.0, "names": []}, r"a\.json: n is 1\.0; expected int"),
        ({"n": 1, "names": "ab"}, r"a\.json: names is 'ab'; expected list\[str\]"),
        ({"n": 1, "names": ["a", 2]}, r"a\.json: names is .*; expected list\[str\]"),
    ],
)
def test_an_object_that_does_not_fit_names_file_key_and_type(tmp_path: Path, content: object, told: str):
    store.write_json(tmp_path / "a.json", content)
    with pytest.raises(BadInput, match=told):
        store.fields_of(store.read_json(tmp_path / "a.json"), {"n": int, "names": list[str]}, tmp_path / "a.json")


def test_an_object_that_fits_is_read_whole(tmp_path: Path):
    record = {"n": 1, "names": ["a"], "more": None}
    store.write_json(tmp_path / "a.json", record)
    assert (
        store.fields_of(store.read_json(tmp_path / "a.json"), {"n": int, "names": list[str]}, tmp_path / "a.json")
        == record
    )


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "/etc", "a/b", "a\0b"])
def test_a_name_that_leads_out_of_its_folder_is_refused(tmp_path: Path, name: str):
    assert store.inside(tmp_path, "a..b", "part") == tmp_path / "a..b"
    with pytest.raises(BadInput, match=r"names the part '.*'; expected a name inside"):
        store.inside(tmp_path, name, "part")


def test_errors_of_a_file_name_it_once(tmp_path: Path):
    for said, told in (("k is 0", "a.json: k is 0"), ("a.json: k is 0", "a.json: k is 0")):
        with pytest.raises(BadInput, match=f"^{re.escape(told)}$"), store.reading("a.json"):
            raise BadInput(said)


@given(NAMED)
@example({})
@example({"scalar": torch.tensor(3.0), "none": torch.zeros(0, 4, dtype=torch.bfloat16)})
def test_tensors_read_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, named: dict[str, torch.Tensor]
):
    path = tmp_path_factory.mktemp("tensors") / "t.safetensors"
    store.write_tensors(path, named)
    again = store.read_tensors(path, {name: tuple(t.shape) for name, t in named.items()})
    assert again.keys() == named.keys()
    assert all(same(again[name], t) for name, t in named.items())
    assert listing(path.parent) == ["t.safetensors"]


def test_views_and_weights_with_gradients_are_written_by_value(tmp_path: Path):
    whole = torch.arange(12.0).reshape(3, 4).requires_grad_()
    store.write_tensors(tmp_path / "t", {"turned": whole.T, "column": whole[:, 1]})
    again = store.read_tensors(tmp_path / "t")
    assert same(again["turned"], whole.detach().T)
    assert same(again["column"], torch.tensor([1.0, 5.0, 9.0]))


def test_tied_and_overlapping_weights_are_written_by_value(tmp_path: Path):
    whole = torch.arange(12.0).reshape(3, 4)
    tied = torch.nn.Linear(4, 3, bias=False)
    tied.weight = torch.nn.Parameter(whole)
    named = {"embed": whole, "head": tied.weight, "flat": whole.view(-1), "row": whole[1], "turned": whole.T}
    store.write_tensors(tmp_path / "t", {**named, "wide": whole[:1].expand(5, 4), "none": whole[:0]})
    again = store.read_tensors(tmp_path / "t")
    assert all(same(again[name], t.detach()) for name, t in named.items())
    assert same(again["wide"], whole[:1].repeat(5, 1))
    assert again["none"].shape == (0, 4)
    assert torch.equal(whole, torch.arange(12.0).reshape(3, 4))


@pytest.fixture
def two_tensors(tmp_path: Path) -> Path:
    path = tmp_path / "two.safetensors"
    store.write_tensors(path, {"W": torch.zeros(3, 4), "b": torch.zeros(4)})
    return path


def test_only_the_named_tensors_are_read(two_tensors: Path):
    assert store.read_tensors(two_tensors, only={"b"}).keys() == {"b"}
    assert store.read_tensors(two_tensors, {"b": (4,)}, only={"b"}).keys() == {"b"}


@pytest.mark.parametrize(
    ("key", "shape", "told"),
    [
        ("W", (4, 3), "W has shape [3, 4]; expected [4, 3]"),
        ("W", (None, 5), "W has shape [3, 4]; expected [*, 5]"),
        ("W", (3,), "W has shape [3, 4]; expected [3]"),
        ("b", (3,), "b has shape [4]; expected [3]"),
        ("b", (4, 1), "b has shape [4]; expected [4, 1]"),
        ("W_dec", (3, 4), "no tensor 'W_dec'; it has ['W', 'b']"),
    ],
)
def test_tensors_of_another_shape_name_file_key_and_shape(two_tensors: Path, key: str, shape: tuple, told: str):
    with pytest.raises(BadInput, match=re.escape(told)) as error:
        store.read_tensors(two_tensors, {key: shape})
    assert str(two_tensors) in str(error.value)


def test_any_length_fits_where_none_is_asked(two_tensors: Path):
    assert store.read_tensors(two_tensors, {"W": (None, 4), "b": (None,)})["W"].shape == (3, 4)


@pytest.mark.parametrize("kept", [0, 4, 20, -1])
def test_a_truncated_tensor_file_is_named(two_tensors: Path, kept: int):
    two_tensors.write_bytes(two_tensors.read_bytes()[:kept])
    with pytest.raises(BadInput, match=r"two\.safetensors is not a whole safetensors file"):
        store.read_tensors(two_tensors)


def test_a_missing_tensor_file_is_named(tmp_path: Path):
    with pytest.raises(BadInput, match=r"none\.safetensors does not exist"):
        store.read_tensors(tmp_path / "none.safetensors")


def test_a_full_disk_leaves_nothing_and_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def save_half(_: object, path: Path) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    store.write_tensors(tmp_path / "kept", {"a": torch.ones(2)})
    monkeypatch.setattr(store, "save_file", save_half)
    for name in ("kept", "new"):
        with pytest.raises(BadInput, match=f"cannot write .*{name}.*No space left.*no partial file was left behind"):
            store.write_tensors(tmp_path / name, {"a": torch.zeros(2)})
    with pytest.raises(BadInput, match="No space left"), store.new_folder(tmp_path / "folder") as folder:
        store.write_tensors(folder / "t", {"a": torch.zeros(2)})
    assert listing(tmp_path) == ["kept"]
    assert torch.equal(store.read_tensors(tmp_path / "kept")["a"], torch.ones(2))


@given(tensors())
@example(torch.tensor(2.0))
def test_the_hash_of_tensors_does_not_depend_on_layout_or_order(x: torch.Tensor):
    y = torch.ones(2)
    strided = torch.stack([x, x], dim=-1)[..., 0]
    assert store.hash_tensors({"x": strided, "y": y}) == store.hash_tensors({"y": y, "x": x.clone()})


@pytest.mark.parametrize(
    "changed",
    [
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(6)},
        {"a": torch.zeros(2, 3, dtype=torch.int32)},
        {"a": torch.zeros(2, 3).index_fill(0, torch.tensor([1]), -0.0)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(0)},
        {},
    ],
    ids=["name", "shape", "dimensions", "dtype", "bytes", "one_more", "none"],
)
def test_the_hash_of_tensors_changes_with_name_shape_dtype_and_bytes(changed: dict[str, torch.Tensor]):
    assert store.hash_tensors(changed) != store.hash_tensors({"a": torch.zeros(2, 3)})


def test_hashes_of_files_are_those_of_sha_256(tmp_path: Path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert store.hash_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_hash_of_a_value_ignores_the_order_of_keys_alone():
    assert store.hash_value({"a": 1, "b": [1, 2]}) == store.hash_value({"b": [1, 2], "a": 1})
    assert store.hash_value({"a": 1, "b": [1, 2]}) != store.hash_value({"a": 1, "b": [2, 1]})


def test_removing_takes_folders_files_and_nothing(tmp_path: Path):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    for name in ("folder", "file", "none"):
        store.remove(tmp_path / name)
    assert listing(tmp_path) == []


def test_provenance_says_when_by_what_where_and_from_what(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/unsleep", "train", "h", "--site", "resid.1"])
    found = store.provenance(7, model="abc", panels={"clean": "def"})
    assert found.keys() == {"created", "wall_seconds", "command", "seed", "versions", "machine", "model", "panels"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", found["created"])
    assert 0 < found["wall_seconds"] <= time.monotonic() - store.STARTED + 0.1
    assert found["command"] == ["unsleep", "train", "h", "--site", "resid.1"]
    assert (found["seed"], found["model"], found["panels"]) == (7, "abc", {"clean": "def"})
    assert found["versions"].keys() == {
        "python",
        "unsleep",
        "torch",
        "transformers",
        "peft",
        "safetensors",
        "tokenizers",
    }
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"].keys() == {"system", "processor", "bfloat16", "threads", "accelerator"}
    assert isinstance(found["machine"]["bfloat16"], bool)
    assert all(value for key, value in found["machine"].items() if key != "bfloat16")
    assert json.loads(json.dumps(found)) == found
