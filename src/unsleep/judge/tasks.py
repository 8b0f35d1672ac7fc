"""Standard benchmarks: tasks of lm-evaluation-harness on a suspect and its repairs.

The harness runs the network that unsleep holds, with the edit's hooks active. Requires the extra
`unsleep[lm-eval]`.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from unsleep.base.context import progress
from unsleep.core import BadInput
from unsleep.judge.metrics import Subject
from unsleep.judge.results import TaskRow
from unsleep.models.load import quiet_transformers

BOOT = 200
"""Bootstrap resamples for standard errors without a closed form."""

FILES = (".yaml",)
"""Extension of a user's task file."""


def run_tasks(
    subjects: Sequence[Subject], tasks: Sequence[str], *, limit: int | None = None, batch: int = 16
) -> list[TaskRow]:
    """Run tasks on every subject.

    Args:
        tasks: names of the harness's tasks or groups, or YAML files of custom tasks.
        limit: items per task; all where `None`.

    Raises:
        BadInput: lm-evaluation-harness is not installed, a task does not exist, or its data is unavailable.
    """
    harness, manager, names = _prepared(tasks)
    rows: list[TaskRow] = []
    for done, subject in enumerate(subjects, 1):
        with subject.running() as model, _quiet():
            wrapped = harness.HFLM(
                pretrained=model.network, tokenizer=model.tokenizer, backend="causal", device=str(model.device),
                batch_size=batch,
            )  # fmt: skip
            try:
                found = harness.simple_evaluate(
                    model=wrapped,
                    tasks=names,
                    task_manager=manager,
                    limit=limit,
                    log_samples=False,
                    bootstrap_iters=BOOT,
                )
            except (OSError, ValueError, KeyError, ConnectionError, RuntimeError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise BadInput(
                    f"--tasks {' '.join(tasks)} could not be run on the {subject.name}: {reason}. Without network "
                    "access, its data must be in the cache or on disk"
                ) from error
        assert found is not None
        rows += _rows(subject.name, cast("dict[str, Any]", found))
        progress("tasks of lm-evaluation-harness", done, len(subjects))
    return rows


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise `BadInput` before any work where tasks cannot run (see `run_tasks`)."""
    if tasks:
        _prepared(tasks)


@dataclass(frozen=True)
class _Harness:
    HFLM: Any
    simple_evaluate: Any


def _prepared(tasks: Sequence[str]) -> tuple[_Harness, Any, list[str]]:
    """The harness, its task manager, and the tasks' names."""
    try:
        with quiet_transformers(), _quiet():
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
    except ImportError:
        raise BadInput(
            "--tasks needs lm-evaluation-harness, which is not installed; pip install 'unsleep[lm-eval]'"
        ) from None
    paths = [Path(task) for task in tasks if task.endswith(FILES)]
    own = {str(path): _name_in(path) for path in paths}
    with _quiet():
        manager = TaskManager(include_path=sorted({str(path.resolve().parent) for path in paths}) or None)
    names = [own.get(task, task) for task in tasks]
    known = set(manager.all_tasks)
    if missing := [name for name in names if name not in known]:
        raise BadInput(
            f"--tasks {missing[0]!r} is no task of lm-evaluation-harness; expected one of those that "
            "`lm-eval ls tasks` lists, or a YAML file"
        )
    return _Harness(HFLM, simple_evaluate), manager, names


def _name_in(path: Path) -> str:
    """Name of the task or group in a YAML file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--tasks {path} cannot be read ({error}); expected a task of lm-evaluation-harness") from None
    try:
        found = yaml.load(text, _Lenient)
    except yaml.YAMLError as error:
        raise BadInput(f"--tasks {path} is not valid YAML: {str(error).splitlines()[0]}") from None
    name = (found.get("task") or found.get("group")) if isinstance(found, dict) else None
    if not isinstance(name, str):
        raise BadInput(f"--tasks {path} names no task; expected a key 'task' or 'group'")
    return name


class _Lenient(yaml.SafeLoader):
    """YAML loader that ignores `!function` tags instead of running them."""


_Lenient.add_multi_constructor("!", lambda loader, suffix, node: None)


def _rows(subject: str, found: dict[str, Any]) -> list[TaskRow]:
    rows: list[TaskRow] = []
    for task, figures in found["results"].items():
        n = int(found.get("n-samples", {}).get(task, {}).get("effective", 0)) or int(figures.get("sample_len", 0) or 0)
        for key, value in figures.items():
            metric, _, filter_ = key.partition(",")
            if not isinstance(value, float) or metric.endswith("_stderr") or not math.isfinite(value):
                continue
            error = figures.get(f"{metric}_stderr,{filter_}")
            stderr = float(error) if isinstance(error, float) and math.isfinite(error) else None
            rows.append(TaskRow(subject, task, key, value, stderr, n))
    return rows


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Silence the harness's log."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
