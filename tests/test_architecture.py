"""Architecture: imports between packages, hooks, forbidden formats, sizes of files and functions, docstrings."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

import unsleep
from unsleep.dictionaries.architectures import KINDS, OWN_SETTINGS
from unsleep.dictionaries.config import TrainConfig
from unsleep.dictionaries.settings import Settings

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "unsleep"
MODULES = sorted(SOURCE.rglob("*.py"))
PYTHON = sorted(p for folder in ("src", "tests", "benchmarks") for p in (ROOT / folder).rglob("*.py"))
MAX_LINES, MAX_FUNCTION_LINES = 450, 70


def room_of(module: str) -> str:
    """`models/hooks` → `models`; the façade is `__init__`."""
    return module.split("/")[0]


def table() -> dict[str, set[str]]:
    """Room → what it may import, in the order of docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w/]+?)(?:\.py|/)` \|[^|]*\| ([^|]*) \|$", text, re.MULTILINE)
    return {room: {name.strip(" `") for name in names.split(",")} - {"–"} for room, names in rows}


def name_of(path: Path) -> str:
    """`src/unsleep/models/hooks.py` → `models/hooks`; a package is its folder."""
    name = path.relative_to(SOURCE).with_suffix("").as_posix()
    return name.removesuffix("/__init__")


NAMES = {name_of(path) for path in MODULES}


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules of unsleep that a file imports, at any depth of it, as paths."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            deeper = [f"{node.module}.{alias.name}" for alias in node.names]
            is_module = [d.replace(".", "/").removeprefix("unsleep/") in NAMES for d in deeper]
            found = [d if deep else str(node.module) for d, deep in zip(deeper, is_module, strict=True)]
        else:
            continue
        for name in found:
            if name == "unsleep":
                yield "__init__"
            elif name.startswith("unsleep."):
                yield name.removeprefix("unsleep.").replace(".", "/")


def allowing(module: str, rooms: set[str]) -> set[str]:
    """The entries of a row that allow a module."""
    return {room for room in rooms if module == room or module.startswith(f"{room}/")}


def trees(paths: list[Path]) -> Iterator[tuple[Path, ast.AST]]:
    for path in paths:
        yield path, ast.parse(path.read_text(encoding="utf-8"), str(path))


# The table


def test_every_module_stands_in_the_table_once_and_nothing_else_does():
    rooms = table()
    assert set(rooms) == {room_of(name) for name in NAMES}
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert len(rooms) == len([line for line in text.splitlines() if line.startswith("| `")])


def test_imports_are_those_of_the_table():
    rooms = table()
    used: dict[str, set[str]] = {room: set() for room in rooms}
    wrong: list[str] = []
    for path, tree in trees(MODULES):
        module = name_of(path)
        room = room_of(module)
        for target in imported(tree):
            if room_of(target) == room:
                continue
            used[room] |= allowing(target, rooms[room])
            if not allowing(target, rooms[room]):
                wrong.append(f"{module} imports {target}, which docs/architecture.md does not allow")
    assert wrong == [], "\n".join(wrong)
    assert {room: rooms[room] - used[room] for room in rooms if rooms[room] - used[room]} == {}, "allowed and not used"


def test_a_room_imports_only_rooms_above_it():
    above: set[str] = set()
    for room, allowed in table().items():
        assert {room_of(entry) for entry in allowed} <= above, room
        assert allowed <= NAMES | {"__init__"}, room
        above.add(room)


def test_no_package_has_another_thing_by_the_name_of_one_of_its_modules():
    hidden: list[str] = []
    for name in sorted(NAMES - {"__init__", "__main__"}):
        dotted = f"unsleep.{name.replace('/', '.')}"
        package, _, leaf = dotted.rpartition(".")
        if getattr(importlib.import_module(package), leaf, None) not in (None, importlib.import_module(dotted)):
            hidden.append(dotted)
    assert hidden == []


def test_no_two_files_import_each_other():
    edges = {(name_of(path), target) for path, tree in trees(MODULES) for target in imported(tree)}
    assert sorted(edge for edge in edges if edge[0] < edge[1] and edge[::-1] in edges) == []


def test_the_table_would_be_enforced():
    source = "import torch\nfrom unsleep.models import chat, load_model\ndef f():\n  import unsleep.base.store\n"
    source += "from unsleep import pages\nfrom unsleep.pages.text import visible\nimport unsleep\n"
    found = list(imported(ast.parse(source)))
    assert sorted(found) == ["__init__", "base/store", "models", "models/chat", "pages", "pages/text"]
    assert allowing("organisms/planting", {"organisms/recipe", "models"}) == set()
    assert allowing("organisms/recipe", {"organisms/recipe", "models"}) == {"organisms/recipe"}
    assert allowing("models/chat", {"models", "base"}) == {"models"}


# Tests


def borrowed(source: str) -> set[str]:
    """Test files and conftest that a source imports, also in the text of a program that it runs."""
    name = r"(?:tests\.)?(?:test_\w+|conftest)"
    return set(re.findall(rf"^\s*(?:from|import) ({name})\b", source, re.MULTILINE))


def test_no_test_file_imports_another():
    tests = [path for path in PYTHON if path.is_relative_to(ROOT / "tests")]
    assert {path.parent.name for path in tests} == {"tests", "support"}
    found = {path.name: borrowed(path.read_text(encoding="utf-8")) for path in tests}
    assert {name: others for name, others in found.items() if others} == {}


@pytest.mark.parametrize(
    "source",
    [
        "from {} import build",
        "import {}",
        "def f():\n    from {} import build",
        'CODE = """\nfrom {} import build\n"""',
    ],
)
@pytest.mark.parametrize("name", ["test_core", "conftest", "tests.test_core"])
def test_an_import_of_a_test_file_would_be_seen(source: str, name: str):
    assert borrowed(source.format(name)) == {name}
    assert not borrowed(source.format("support.models"))


# What is written nowhere


def outside(tree: ast.AST) -> set[str]:
    """Top names of what a file imports that is not unsleep's."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).split(".")[0])
    return found


def hooks(tree: ast.AST) -> list[int]:
    """Lines that register a hook or put another `forward` into a module."""
    lines: list[int] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.fullmatch(r"register_\w*hook", node.attr):
            lines.append(node.lineno)
        if isinstance(node, ast.Attribute) and node.attr == "forward" and isinstance(node.ctx, ast.Store | ast.Del):
            lines.append(node.lineno)
        if isinstance(node, ast.Constant) and re.fullmatch(r"register_\w*hook", str(node.value)):
            lines.append(node.lineno)
    return lines


PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def unsafe(tree: ast.AST) -> list[str]:
    """Pickles, `torch.load` that may read one, `torch.save`, text that is run, remote code that is forced."""
    found = sorted(outside(tree) & PICKLES)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name == "torch.save" or (name == "torch.load" and given.get("weights_only") != "True"):
            found.append(name)
        if name in ("eval", "exec", "os.system"):
            found.append(name)
        for flag in ("allow_pickle", "trust_remote_code", "shell"):
            if given.get(flag) == "True":
                found.append(f"{flag}=True")
    return found


def test_hooks_are_registered_in_one_module_only():
    where = {path.relative_to(SOURCE).as_posix() for path, tree in trees(MODULES) if hooks(tree)}
    assert where == {"models/hooks.py"}


STATE_DICTS = "src/unsleep/dictionaries/files/pickled.py"
"""The one place for the files of dictionary_learning."""


def test_nothing_reads_or_writes_a_pickle_or_runs_text():
    found = {str(path.relative_to(ROOT)): set(unsafe(tree)) for path, tree in trees(PYTHON)}
    for path, calls in found.items():
        fixtures = {"torch.save", "pickle"} if path.startswith("tests/") else set[str]()  # files that must be refused
        snippets = {"exec"} if path == "tests/test_docs.py" else set[str]()
        state_dicts = {"torch.save", "pickle"} if path == STATE_DICTS else set[str]()  # "pickle" for its error alone
        assert calls <= fixtures | snippets | state_dicts, path
    assert "exec" in found["tests/test_docs.py"]
    assert found[STATE_DICTS] == {"torch.save", "pickle"}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "torch.load('a.pt')",
        "torch.load('a.pt', weights_only=False)",
        "torch.save(x, 'a.pt')",
        "np.load('a.npy', allow_pickle=True)",
        "load_model('a', trust_remote_code=True)",
        "eval(text)",
    ],
)
def test_an_unsafe_line_would_be_seen(source: str):
    assert unsafe(ast.parse(source))
    assert not unsafe(ast.parse("torch.load('a.pt', weights_only=True)\nload_model('a', trust_remote_code=False)"))


@pytest.mark.parametrize(
    "source",
    [
        "m.register_forward_hook(f)",
        "m.register_forward_pre_hook(f)",
        "x.register_hook(f)",
        "torch.nn.modules.module.register_module_forward_hook(f)",
        "getattr(m, 'register_full_backward_hook')(f)",
        "block.forward = f",
    ],
)
def test_a_hook_elsewhere_would_be_seen(source: str):
    assert hooks(ast.parse(source))
    assert not hooks(ast.parse("y = block.forward(x)"))


def test_dictionaries_never_see_a_language_model():
    models = {"transformers", "peft", "huggingface_hub", "tokenizers", "gguf"}
    seen = {name_of(path): outside(tree) & models for path, tree in trees(MODULES)}
    assert {name for name, found in seen.items() if found and room_of(name) == "dictionaries"} == set()
    assert {room_of(name) for name, found in seen.items() if found} >= {"models"}


ARCHITECTURES = "dictionaries/architectures"


def architectures_named(path: Path, tree: ast.AST) -> set[str]:
    """Architectures of dictionaries that a file imports or has as a text."""
    texts = {str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)} & KINDS.keys()
    return texts | {target.rpartition("/")[2] for target in imported(tree) if target.startswith(f"{ARCHITECTURES}/")}


def test_an_architecture_of_dictionaries_is_named_in_its_own_files_and_where_one_is_chosen():
    names = {name_of(path): architectures_named(path, tree) for path, tree in trees(MODULES)}
    assert {name: found for name, found in names.items() if found and not name.startswith(ARCHITECTURES)} == {
        "dictionaries/settings": {"topk"},  # the default
        "dictionaries/crosscoders": {"batchtopk"},  # what a crosscoder is
        "explanations/controls": {"jumprelu"},  # a threshold for each feature
        "locate/diffing/detectors": {"batchtopk"},
        "locate/diffing/run": {"batchtopk"},
    }
    assert {f"{ARCHITECTURES}/{name}" for name in KINDS} == {n for n in NAMES if n.startswith(f"{ARCHITECTURES}/")}


def test_no_two_architectures_have_a_setting_of_one_name():
    own = [fields(s) for s in OWN_SETTINGS]
    shared = {f.name for f in fields(Settings)}
    names = [f.name for each in own for f in each if f.name not in shared]
    assert len(set(names)) == len(names) == len(fields(TrainConfig)) - len(shared)


# Size and words


def test_no_source_file_is_too_long():
    code = [p for p in SOURCE.rglob("*") if p.suffix in (".py", ".html", ".css", ".js")]
    lines = {p.relative_to(SOURCE).as_posix(): len(p.read_text(encoding="utf-8").splitlines()) for p in code}
    assert len(lines) > len(MODULES)
    assert {path: n for path, n in lines.items() if n > MAX_LINES} == {}


def test_no_function_is_too_long():
    lengths = {
        f"{name_of(path)}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path, tree in trees(MODULES)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert len(lengths) > 200
    assert {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES} == {}


@pytest.mark.parametrize("name", unsleep.__all__)
def test_every_name_of_the_facade_has_a_docstring_of_its_own(name: str):
    value = getattr(unsleep, name)
    assert inspect.isfunction(value) or inspect.isclass(value)
    doc = value.__doc__ or ""
    assert re.match(r"[A-Z`]\w*[\s`].*[.:`?]", doc.strip().splitlines()[0]), doc
    assert not doc.startswith(f"{name}(")  # what a dataclass writes where nobody did
    if inspect.isclass(value):
        assert all(doc != parent.__doc__ for parent in value.__mro__[1:])


def test_every_module_says_what_it_is():
    for path, tree in trees(MODULES):
        assert isinstance(tree, ast.Module)
        doc = ast.get_docstring(tree) or ""
        assert len(doc.splitlines()[0]) > 20, path


def test_docstrings_name_what_they_describe():
    opening = re.compile(r"(What|Where|Which|How|Whether|Who|Whom|When|Why)\b")
    found = {
        f"{name_of(path)}:{node.lineno}": node.value.value.splitlines()[0]
        for path, tree in trees(MODULES)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if opening.match(node.value.value)
    }
    assert found == {}


def test_every_file_of_the_package_is_installed():
    package = ROOT / "src" / "unsleep"
    given = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["unsleep"]
    installed = {path for pattern in given for path in package.glob(pattern)}
    missed = [p for p in package.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc") and p not in installed]
    assert missed == []
