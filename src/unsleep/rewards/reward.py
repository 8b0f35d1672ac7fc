"""Rewards: any callable `(samples, prompts, outputs, **columns) -> rewards`, a number per sample, higher is better.

The signature is that of trlx (Havrilla et al. 2023), so that its users' one line works:

    unsleep.prefer(model, pairs, "out", reward=lambda samples, **_: [float(len(s)) for s in samples])
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import is_dataclass
from numbers import Real
from types import CellType, CodeType
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.core import BadInput
from unsleep.prompts.prompt import Prompt, Prompts, as_prompts

Columns = Mapping[str, Sequence[Any]]
"""Further columns of the data by name, a value per sample."""


Reward = Callable[..., Any]
"""A score of replies: `(samples, prompts, outputs, **columns)` → a finite number per sample.

    samples     prompts with their outputs behind them
    prompts     the messages before each output, as text
    outputs     the replies alone
    columns     further columns of the data, a list of a value per sample each

`scored` passes them by keyword, so that a callable may name those that it needs and `**_`. An object with a method
`scores(prompts: Sequence[Prompt], outputs: Sequence[str])` is asked for that instead: it sees chats as they are.
"""

ARGUMENTS = ("samples", "prompts", "outputs")
"""Arguments of every reward; all others are columns of the data."""

Metric = Callable[..., Any]
"""A callable of a reward's arguments that gives named metrics, `{name: a number per sample}`, as trlx's `metric_fn`."""


def name_of(reward: object) -> str:
    """The name under which a reward is reported: its `name`, else that of the function or class."""
    if isinstance(reward, functools.partial):
        return name_of(reward.func)
    for name in (getattr(reward, "name", None), getattr(reward, "__name__", None)):
        if isinstance(name, str) and name:
            return name
    return type(reward).__name__


def identity_of(reward: object) -> Any:
    """A JSON value that identifies a reward or metric among the inputs of resumable work: its `identity`, or its code.

    A function that is edited is another one, and so is one with other defaults, bound arguments or enclosed values;
    what it reads from elsewhere, and what may change while it runs, such as a list, does not count.
    """
    if isinstance(reward, functools.partial):
        return ["partial", identity_of(reward.func), _plain((*reward.args, *reward.keywords.items()))]
    own = getattr(reward, "identity", None)
    code = getattr(reward, "__code__", None) or getattr(type(reward).__call__, "__code__", None)
    if own is not None or code is None:
        return [name_of(reward), type(reward).__qualname__, own, []]
    return [name_of(reward), type(reward).__qualname__, _beside(reward), _written(code)]


def _beside(reward: Any) -> Any:
    """Defaults and enclosed values of a function; fields of a frozen dataclass."""
    if not hasattr(reward, "__code__"):
        frozen = is_dataclass(reward) and getattr(reward, "__dataclass_params__").frozen  # noqa: B009
        return _plain(tuple(vars(reward).items())) if frozen else None
    cells = tuple(cell.cell_contents for cell in reward.__closure__ or () if _is_filled(cell))
    return _plain((reward.__defaults__, tuple((reward.__kwdefaults__ or {}).items()), cells))


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name that is not bound yet, such as that of a function within itself
        return False


def _plain(value: Any) -> Any:
    """An immutable value in JSON; of any other, its type alone."""
    if isinstance(value, tuple):
        return [_plain(each) for each in cast("tuple[Any, ...]", value)]
    return repr(value) if value is None or isinstance(value, str | int | float) else type(value).__qualname__


def _written(code: CodeType) -> list[Any]:
    """Content of a function's code, without its places in memory and in its file."""
    return [code.co_code.hex(), list(code.co_names), [_constant(each) for each in code.co_consts]]


def _constant(value: Any) -> Any:
    """A constant of a function's code in JSON; the items of a set in an order that every process agrees on."""
    if isinstance(value, CodeType):
        return _written(value)
    if isinstance(value, tuple):
        return [_constant(each) for each in cast("tuple[Any, ...]", value)]
    return sorted(map(repr, cast("frozenset[Any]", value))) if isinstance(value, frozenset) else repr(value)


def scored(
    reward: Reward, prompts: Prompts, outputs: Sequence[str], columns: Columns | None = None
) -> Float[Tensor, " sample"]:
    """The rewards of replies, in float64.

    Raises `BadInput` naming the reward where it raises, or gives another number of rewards than of replies, or one that
    is no finite number: trainers in use average over those that are missing.
    """
    asked, name = as_prompts(prompts), name_of(reward)
    _check_lengths(name, len(asked), outputs, columns or {})
    check_columns(reward, columns or {})
    given = getattr(reward, "scores", None)
    if not callable(given) and not callable(reward):
        raise BadInput(
            f"reward {reward!r:.60} is no function of replies; `rewards.named.find_reward` gives the reward of a name"
        )
    try:
        if callable(given):
            found: Any = given(asked, list(outputs))
        else:
            found = reward(**_arguments(asked, outputs), **(columns or {}))
    except BadInput as error:
        raise error if name in str(error) else BadInput(f"reward {name}: {error}") from error
    except Exception as error:  # a user's function raises anything
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadInput(f"reward {name} failed on {len(asked)} samples: {said[:300]}") from error
    return _checked(name, found, [p.shown for p in asked], outputs)


def metrics(
    metric: Metric, prompts: Prompts, outputs: Sequence[str], columns: Columns | None = None
) -> dict[str, Float[Tensor, " sample"]]:
    """The metrics of replies by name; raises `BadInput` naming the metric as `scored` does the reward."""
    asked, name = as_prompts(prompts), name_of(metric)
    check_columns(metric, columns or {})
    try:
        found: Any = metric(**_arguments(asked, outputs), **(columns or {}))
    except Exception as error:  # a user's function raises anything
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadInput(f"metric {name} failed on {len(asked)} samples: {said[:300]}") from error
    if not isinstance(found, Mapping):
        raise BadInput(f"metric {name} gave {type(found).__name__}; expected {{name: a number per sample}}")
    shown = [p.shown for p in asked]
    return {str(k): _checked(f"{name}: {k}", v, shown, outputs) for k, v in cast("Mapping[Any, Any]", found).items()}


def check_columns(reward: object, columns: Collection[str]) -> None:
    """Raise `BadInput` where a reward or metric has an argument without a default that is no column of the data."""
    if callable(getattr(reward, "scores", None)) or not callable(reward):
        return
    try:
        arguments = inspect.signature(reward).parameters.values()
    except ValueError:  # a function that is not written in Python
        return
    given = {*ARGUMENTS, *columns}
    named = [a.name for a in arguments if a.kind in (a.POSITIONAL_OR_KEYWORD, a.KEYWORD_ONLY) and a.default is a.empty]
    if missing := [name for name in named if name not in given]:
        raise BadInput(
            f"{name_of(reward)} needs the column {missing[0]!r}, and the data has "
            f"{', '.join(map(repr, columns)) or 'no columns'}; give each pair, or each prompt, one"
        )


def _arguments(prompts: Sequence[Prompt], outputs: Sequence[str]) -> dict[str, list[str]]:
    shown = [p.shown for p in prompts]
    samples = [f"{prompt}\n{output}" for prompt, output in zip(shown, outputs, strict=True)]
    return {"samples": samples, "prompts": shown, "outputs": list(outputs)}


def _check_lengths(name: str, n: int, outputs: Sequence[str], columns: Columns) -> None:
    if not n or len(outputs) != n:
        raise BadInput(f"reward {name}: {n} prompts and {len(outputs)} replies; expected as many, at least 1")
    for column, values in columns.items():
        if column in ARGUMENTS:
            raise BadInput(f"reward {name}: a column is called {column!r}, as an argument is; rename it")
        if len(values) != n:
            raise BadInput(f"reward {name}: column {column!r} has {len(values)} values for {n} samples")


def _checked(name: str, found: Any, prompts: Sequence[str], outputs: Sequence[str]) -> Float[Tensor, " sample"]:
    """The rewards as a tensor; raises `BadInput` for anything but a finite number per sample."""
    if isinstance(found, Tensor):
        found = found.detach().cpu().flatten().tolist()
    elif hasattr(found, "tolist"):
        found = found.tolist()  # an array of numpy
    if isinstance(found, str) or not isinstance(found, Sequence):
        raise BadInput(f"reward {name} gave {type(found).__name__}; expected a list of a number per sample")
    given = cast("Sequence[Any]", found)
    if len(given) != len(outputs):
        raise BadInput(f"reward {name} gave {len(given)} rewards for {len(outputs)} samples; expected one each")
    for i, value in enumerate(given):
        number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if not isinstance(number, Real) or not math.isfinite(number):
            raise BadInput(
                f"reward {name} gave {number!r} for the reply {outputs[i][:40]!r} to {prompts[i][:40]!r}; expected a "
                "finite number"
            )
    return torch.tensor([float(value) for value in given], dtype=torch.float64)
