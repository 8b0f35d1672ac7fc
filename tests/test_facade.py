"""The façade: a path in place of a loaded model, or the reverse, is refused before anything runs."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import unsleep
from unsleep.core import BadInput
from unsleep.models.model import LoadedModel

TAKE_MODELS = [
    (name, parameter.name)
    for name in unsleep.__all__
    if inspect.isfunction(function := getattr(unsleep, name))
    for parameter in inspect.signature(function).parameters.values()
    if "LoadedModel" in str(parameter.annotation) and "Callable" not in str(parameter.annotation)
]


@pytest.mark.parametrize(("name", "parameter"), TAKE_MODELS)
def test_a_path_is_no_model(name: str, parameter: str) -> None:
    for given in ("models/mine", Path("models/mine")):
        told = rf"{name} {parameter} is 'models/mine'; .* unsleep.load_model\('models/mine'\)"
        with pytest.raises(BadInput, match=told):
            getattr(unsleep, name)(**{parameter: given})


def test_models_of_a_list_are_checked_each(tiny: LoadedModel) -> None:
    assert len(TAKE_MODELS) > 20
    with pytest.raises(BadInput, match="mix models is 'models/mine'"):
        unsleep.mix([tiny, "models/mine"])  # type: ignore[list-item]


def test_a_model_is_no_path(tiny: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="merge first is a loaded model; expected a path or name, such as 'tiny-llama'"):
        unsleep.merge(tiny, tiny, out=tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="plan model is a loaded model"):
        unsleep.plan(tiny)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_what_python_refuses_is_left_to_python(tiny: LoadedModel) -> None:
    with pytest.raises(TypeError, match="colour"):
        unsleep.replies(tiny, ["hi"], colour="red")  # type: ignore[call-arg]


def test_replies_to_no_prompts_are_refused_as_such(tiny: LoadedModel) -> None:
    assert unsleep.replies(tiny, ["hi"], max_new_tokens=1)
    with pytest.raises(BadInput, match="there are no prompts"):
        unsleep.replies(tiny, [])
