"""Merges as configurations of mergekit (Goddard et al. 2024, arXiv:2403.13257), and those that mergekit computes.

mergekit runs in a process of its own: it may be installed in another environment, as long as its command is found.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from unsleep.base import store
from unsleep.core import BadInput
from unsleep.mixing.merge_config import BY_MERGEKIT, MergeConfig
from unsleep.models.sources import Files

COMMAND = "mergekit-yaml"
METHODS: Mapping[str, str] = {"linear": "linear", "slerp": "nuslerp", **BY_MERGEKIT}


def as_yaml(names: Sequence[str], config: MergeConfig, home: str | None, dtype: str) -> str:
    """A merge as mergekit's configuration: names of the two models and of the base, list of the layers, dtype."""
    lines = [f"merge_method: {METHODS[config.method]}"]
    if config.method != "linear":
        lines.append(f"base_model: {json.dumps(names[2])}")
    lines.append("models:")
    for number, name in enumerate(names[:2]):
        lines += [f"  - model: {json.dumps(name)}", "    parameters:", *_weight(config, home, bool(number))]
        if config.method in BY_MERGEKIT:
            lines.append(f"      density: {config.density!r}")
    if config.method == "linear":
        lines += ["parameters:", "  normalize: false"]
    return "\n".join([*lines, "dtype: float32", f"out_dtype: {dtype}", ""])


def _weight(config: MergeConfig, home: str | None, second: bool) -> list[str]:
    """A model's weight: one number, or one per layer and one for the rest."""

    def of(alpha: float) -> str:
        return repr(alpha if second else 1 - alpha)

    if not config.by_layer:
        return [f"      weight: {of(config.alpha)}"]
    lines = ["      weight:"]
    for layer, alpha in config.by_layer.items():
        lines += [f"        - filter: {json.dumps(f'{home}.{layer}.')}", f"          value: {of(alpha)}"]
    return [*lines, f"        - value: {of(config.alpha)}"]


def name_in_mergekit(parts: Sequence[Files]) -> str:
    """A model in mergekit's notation: a folder, or a hub repository at its commit; adapters behind a plus."""
    return "+".join(_one_name(each) for each in parts)


def _one_name(files: Files) -> str:
    repo = files.name.partition("@")[0]
    if files.commit is None or repo.count("/") != 1:
        return str(files.place.resolve())
    return f"{repo}@{files.commit}"


def check_installed(method: str) -> str:
    """The path of mergekit's command; raises `BadInput` where it is not installed."""
    beside = Path(sys.executable).with_name(COMMAND)
    found = str(beside) if beside.is_file() else shutil.which(COMMAND)
    if found is None:
        raise BadInput(
            f"--method {method} is computed by mergekit, whose command {COMMAND} is not found; install it with "
            'pip install "unsleep[mergekit]", or in another environment that is on the PATH'
        )
    return found


def run_mergekit(text: str, folder: Path, config: MergeConfig) -> None:
    """Merge by mergekit into a folder; raises `BadInput` with mergekit's own last words where it fails."""
    command = check_installed(config.method)
    written = folder.with_name(f"{folder.name}.yml")
    store.write_text(written, text)
    store.remove(folder)
    options = ["--quiet", "--no-trust-remote-code", "--no-write-model-card", "--random-seed", str(config.seed)]
    done = subprocess.run([command, str(written), str(folder), *options], capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise BadInput(f"mergekit could not merge the models: {said[:300]}")
    Files("the result of mergekit", folder).checked()
