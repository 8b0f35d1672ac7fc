"""Checks of types while tests run, and fixtures that many tests ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from hypothesis import settings
from jaxtyping import install_import_hook

# Shapes in signatures are checked by beartype while tests run.
install_import_hook("unsleep", "beartype.beartype")
pytest.register_assert_rewrite("support")

from support import device  # noqa: E402
from support.browser import Browser, Tab, chromium  # noqa: E402
from support.checkpoints import Hub  # noqa: E402
from support.explorer import explorer_page  # noqa: E402
from support.families import ATTENTION, CONFIGS  # noqa: E402
from support.models import build  # noqa: E402
from support.tokenizers import byte_tokenizer  # noqa: E402
from unsleep.models.load import LoadedModel  # noqa: E402

device.load_for_tests()
torch.set_num_threads(1)  # small models: a second thread costs more than it gives
settings.register_profile("ci", max_examples=20, deadline=None, derandomize=True)
settings.load_profile("ci")


LONGEST = ("test_repair_real.py", "test_audit.py", "test_docs.py", "test_device.py")
"""Files that take minutes: they begin first, so that no process waits for one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(params=sorted(CONFIGS))
def any_family(request: pytest.FixtureRequest) -> LoadedModel:
    return LoadedModel(build(request.param), byte_tokenizer(), request.param)


@pytest.fixture(params=ATTENTION)
def family_with_heads(request: pytest.FixtureRequest) -> LoadedModel:
    return LoadedModel(build(request.param), byte_tokenizer(), request.param)


@pytest.fixture
def tiny() -> LoadedModel:
    """A small Llama."""
    return LoadedModel(build("llama"), byte_tokenizer(), "tiny-llama")


@pytest.fixture
def text_file(tmp_path: Path) -> Callable[[str, str], Path]:
    """Write a text file and give its path."""

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """An empty cache of a hub that cannot be reached."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return Hub(tmp_path / "hub")


@pytest.fixture(scope="module")
def explorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An explorer folder."""
    return explorer_page(tmp_path_factory.mktemp("explorer"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    """A tab in which nothing may have gone wrong at the end."""
    found = browser.tab()
    yield found
    assert found.troubles == []
