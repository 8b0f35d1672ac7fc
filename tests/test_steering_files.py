"""Control vectors in GGUF, LoRRA adapters, and the commands that read and steer."""

from __future__ import annotations

import dataclasses
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter

from support.checks import as_in_use
from support.disks import full_disk
from support.models import build
from support.tokenizers import byte_tokenizer
from support.vectors import NEGATIVE, POSITIVE, D, logits, vector
from unsleep import cli
from unsleep.core import BadInput, Site
from unsleep.interventions.files import load_edit, save_edit
from unsleep.interventions.gguf_files import ControlVectors, export_gguf, import_gguf
from unsleep.interventions.intervention import applied
from unsleep.interventions.steering import Steering
from unsleep.models.generate import replies
from unsleep.models.load import load_model
from unsleep.models.model import LoadedModel
from unsleep.models.streams import capture
from unsleep.pages import report
from unsleep.repairs.lorra import LorraConfig, lorra

TextFile = Callable[[str, str], Path]
Capture = pytest.CaptureFixture[str]

# GGUF


def vectors(layers: tuple[int, ...] = (1, 2)) -> ControlVectors:
    return ControlVectors("llama", {Site(i): vector(i) for i in layers})


def test_vectors_come_back_as_they_went(tmp_path: Path):
    written = vectors((2, 1, 17))
    again = import_gguf(export_gguf(written, tmp_path / "deep" / "v.gguf"))
    assert again.model_type == "llama"
    assert sorted(again.vectors) == [Site(1), Site(2), Site(17)]
    assert all(torch.equal(again.vectors[site], written.vectors[site]) for site in written.vectors)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["v.gguf"]


def test_the_file_is_what_llama_cpp_reads(tmp_path: Path):
    reader = GGUFReader(export_gguf(vectors(), tmp_path / "v.gguf"))
    keys = {"general.architecture": "controlvector", "controlvector.model_hint": "llama"}
    assert {key: reader.get_field(key).contents() for key in keys} == keys  # type: ignore[union-attr]
    assert reader.get_field("controlvector.layer_count").contents() == 2  # type: ignore[union-attr]
    assert [(t.name, t.tensor_type.name, t.shape.tolist()) for t in reader.tensors] == [
        ("direction.1", "F32", [D]),
        ("direction.2", "F32", [D]),
    ]


def test_direction_n_is_added_to_the_output_of_block_n(tiny: LoadedModel, tmp_path: Path):
    control = import_gguf(export_gguf(vectors((2,)), tmp_path / "v.gguf")).steering(2.0)
    ids = torch.tensor([[5, 6, 7]])
    blocks = [Site(i) for i in range(3)]
    with capture(tiny.network, blocks) as bare:
        tiny.network(ids)
    with applied(tiny, control) as network, capture(network, blocks) as seen:
        network(ids)
    assert [bool((seen[s] != bare[s]).any()) for s in blocks] == [False, False, True]
    torch.testing.assert_close(seen[Site(2)], bare[Site(2)] + 2 * vector(2), rtol=1e-4, atol=1e-4)


def write(path: Path, tensors: dict[str, Any], architecture: str = "controlvector", **texts: Any) -> Path:
    writer = GGUFWriter(path, architecture)
    for key, value in {"model_hint": "llama", **texts}.items():
        if isinstance(value, str):
            writer.add_string(f"controlvector.{key}", value)
        elif value is not None:
            writer.add_uint32(f"controlvector.{key}", value)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


ROW = np.ones(D, np.float32)


@pytest.mark.parametrize(
    ("tensors", "more", "told"),
    [
        ({}, {}, "no control vector was given"),
        ({"direction.1": ROW}, {"architecture": "llama"}, "general.architecture is 'llama'; expected 'controlvector'"),
        ({"direction.1": ROW}, {"model_hint": None}, "has no 'controlvector.model_hint'"),
        ({"direction.1": ROW}, {"model_hint": 7}, "model_hint is 7; expected text"),
        ({"direction.x": ROW}, {}, "holds a tensor 'direction.x'; expected direction.1"),
        ({"direction.-1": ROW}, {}, "holds a tensor 'direction.-1'"),
        ({"direction.01": ROW}, {}, "holds a tensor 'direction.01'"),
        ({"direction.1": ROW, "weight": ROW}, {}, "holds a tensor 'weight'"),
        ({"direction.1": ROW.astype(np.float16)}, {}, "direction.1 is F16 [32]; expected F32 of one dimension"),
        ({"direction.1": ROW.reshape(2, -1)}, {}, "direction.1 is F32 [16, 2]; expected F32 of one dimension"),
        ({"direction.1": ROW, "direction.2": ROW[:8]}, {}, "control vectors have widths [8, 32]"),
        ({"direction.1": ROW * np.nan}, {}, "control vector at resid.1 has 32 NaN"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_malformed_file_is_refused_and_named(tmp_path: Path, tensors: Any, more: Any, told: str):
    path = write(tmp_path / "v.gguf", tensors, **more)
    with as_in_use(), pytest.raises(BadInput, match=re.escape(told)) as error:
        import_gguf(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_cut_short_is_refused_wherever_it_ends(tmp_path: Path):
    whole = export_gguf(vectors(), tmp_path / "v.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for end in range(0, len(whole), 7):
        cut.write_bytes(whole[:end])
        with pytest.raises(BadInput, match=r"cut\.gguf"):
            import_gguf(cut)


def test_what_is_no_gguf_file_is_refused(tmp_path: Path):
    path = tmp_path / "v.gguf"
    with pytest.raises(BadInput, match="does not exist or is no file"):
        import_gguf(path)
    with pytest.raises(BadInput, match="does not exist or is no file"):
        import_gguf(tmp_path)
    for content in (b"", b"GG", b"hello" * 50, b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60), b"GGUF" + b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(BadInput, match="is not a whole GGUF file"):
            import_gguf(path)


def test_layer_zero_is_read_but_not_written(tmp_path: Path):
    with pytest.raises(BadInput, match=r"llama\.cpp has no direction for layer 0"):
        export_gguf(vectors((0, 1)), tmp_path / "v.gguf")
    assert not (tmp_path / "v.gguf").exists()
    assert list(import_gguf(write(tmp_path / "w.gguf", {"direction.0": ROW})).vectors) == [Site(0)]


def test_vectors_that_the_format_cannot_hold_are_refused():
    with pytest.raises(BadInput, match=r"control vector at mlp\.1; the format has residual Sites only"):
        ControlVectors("llama", {Site(1, "mlp"): vector()})
    with as_in_use(), pytest.raises(BadInput, match=r"has shape \[2, 32\]; expected \[d_model\]"):
        ControlVectors("llama", {Site(1): torch.ones(2, D)})


def test_a_full_disk_leaves_nothing(tmp_path: Path):
    big = ControlVectors("llama", {Site(1): torch.ones(100_000)})
    with full_disk(10_000), pytest.raises(BadInput, match="cannot write"):
        export_gguf(big, tmp_path / "v.gguf")
    assert list(tmp_path.iterdir()) == []


# LoRRA


ASKED = ["name a bird", "what is a lake", "why is it so"]
SAID = [" a small one", " deep water", " it just is"]
QUICK = LorraConfig(alpha=2.0, rank=4, steps=30, batch=3, learning_rate=1e-2, reply_tokens=8)


@pytest.fixture
def own(tmp_path: Path) -> LoadedModel:
    """A model of its own on disk, which an adapter can name as its base."""
    build("llama").save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return load_model(str(tmp_path / "base"))


def train(model: LoadedModel, out: Path, config: LorraConfig = QUICK, **change: Any) -> list[float]:
    given: dict[str, Any] = {
        "prompts": ASKED,
        "positive": [f"kindly, {a}" for a in ASKED],
        "negative": [f"rudely, {a}" for a in ASKED],
        "replies": SAID,
        "sites": [Site(1), Site(2)],
    }
    return lorra(model, **{**given, **change}, out=out, config=config)


def test_lorra_lowers_its_loss_and_leaves_the_model_as_it_was(own: LoadedModel, tmp_path: Path):
    before = logits(own)
    losses = train(own, tmp_path / "adapter")
    assert len(losses) == 30
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(logits(own), before)
    assert not any(w.requires_grad for w in own.network.parameters())
    assert not any("lora" in name for name, _ in own.network.named_parameters())


def test_lorra_saves_an_adapter_that_loads_and_is_the_same_under_one_seed(own: LoadedModel, tmp_path: Path):
    train(own, tmp_path / "adapter")
    files = {p.name for p in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"}
    adapted = load_model(str(tmp_path / "adapter"))
    assert adapted.fingerprint != own.fingerprint
    assert adapted.name == str(tmp_path / "adapter")
    train(own, tmp_path / "again")
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "adapter" / "adapter_model.safetensors"
    ).read_bytes()


def test_lorra_aims_at_the_shifted_states(own: LoadedModel, tmp_path: Path):
    """The first loss, while the adapter does nothing yet, is the mean length of α(h⁺ − h⁻) on reply tokens."""
    lengths: list[torch.Tensor] = []
    for asked, said in zip(ASKED, SAID, strict=True):
        held: list[torch.Tensor] = []
        for manner in ("kindly", "rudely"):
            [ids] = own.token_ids([f"S: be kind. user: {manner}, {asked} A:{said}"])
            with torch.no_grad(), capture(own.network, [Site(1)]) as seen:
                own.network(torch.tensor([ids]))
            held.append(seen[Site(1)][0, -len(said) :])
        lengths.append((2.0 * (held[0] - held[1])).norm(dim=-1))
    [loss] = train(own, tmp_path / "a", dataclasses.replace(QUICK, steps=1, reply_tokens=99), sites=[Site(1)])
    assert loss == pytest.approx(float(torch.cat(lengths).mean()), rel=1e-3)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"replies": SAID[:2]}, "3 prompts, 3 positive and 3 negative copies, 2 replies; expected one each"),
        ({"positive": ASKED[:1]}, "3 prompts, 1 positive"),
        ({"sites": []}, "no Site was given"),
        ({"sites": [Site(9)]}, r"resid\.9 is not in the model"),
        ({"replies": ["", *SAID[1:]]}, "the reply '' has no tokens"),
    ],
    ids=str,
)
def test_lorra_refuses_what_cannot_be_trained_on(own: LoadedModel, tmp_path: Path, change: Any, told: str):
    with pytest.raises(BadInput, match=told):
        train(own, tmp_path / "adapter", **change)
    assert not (tmp_path / "adapter").exists()


def test_lorra_refuses_modules_and_folders_that_do_not_fit(own: LoadedModel, tmp_path: Path):
    with pytest.raises(BadInput, match="cannot add LoRA matrices to"):
        train(own, tmp_path / "a", dataclasses.replace(QUICK, modules=("nothing_like_it",)))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(BadInput, match="exists already"):
        train(own, tmp_path / "full")
    assert not any("lora" in name for name, _ in own.network.named_parameters())


@pytest.mark.parametrize("key", ["rank", "steps", "batch", "reply_tokens", "learning_rate"])
def test_lorra_settings_have_to_be_positive(key: str):
    zero = 0.0 if key == "learning_rate" else 0
    with pytest.raises(BadInput, match=f"lorra {key} is 0"):
        dataclasses.replace(LorraConfig(), **{key: zero})


# Commands


@pytest.fixture
def files(own: LoadedModel, tmp_path: Path, text_file: TextFile) -> list[str]:
    """A checkpoint and a file for each class."""
    paths = [text_file("positive.txt", "\n".join(POSITIVE)), text_file("negative.txt", "\n".join(NEGATIVE))]
    return [own.name, "--positive", str(paths[0]), "--negative", str(paths[1])]


def test_read_leaves_a_page_a_record_and_vectors(
    files: list[str], tmp_path: Path, text_file: TextFile, capsys: Capture
):
    texts = text_file("texts.txt", "the sun is good!\nthe hill is <b>bad?")
    out = tmp_path / "out"
    assert cli.run(["read", *files, "--text", str(texts), "--out", str(out), "--plain", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    record = json.loads((out / "reading.json").read_text())
    assert said == {k: v for k, v in record.items() if k != "texts"}
    assert record["sites"] == ["resid.0", "resid.1", "resid.2"]
    assert ["".join(t["tokens"]) for t in record["texts"]] == ["the sun is good!", "the hill is <b>bad?"]
    assert sorted(import_gguf(out / "vector.gguf").vectors) == [Site(1), Site(2)]
    page = (out / "reading.html").read_bytes()
    assert b"<b>bad" not in page
    (out / "reading.html").unlink()
    assert report(out).read_bytes() == page


def test_control_may_act_on_prompts_of_one_kind_alone(
    files: list[str], own: LoadedModel, tmp_path: Path, text_file: TextFile, capsys: Capture
):
    prompts = text_file("prompts.txt", "\n".join([POSITIVE[0], NEGATIVE[0], POSITIVE[1], NEGATIVE[1]]))
    when = ["--when-like", files[2], "--when-unlike", files[4]]
    more = ["--prompts", str(prompts), "--coefficient", "40", "--reply-tokens", "5"]
    assert cli.run(["steer", *files, *more, *when, "--out", str(tmp_path / "some")]) == 0
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "some" / "steer.json").read_text())
    acts = record["acts"]
    assert (acts[0], acts[1]) == (True, False)
    assert f"* {POSITIVE[0]}\n" in said
    assert f"  {NEGATIVE[0]}\n" in said
    assert f"Steered: {sum(acts)} of 4 prompts" in said
    assert f"F1 {record['condition']['f1']:.3f} on 4 held-out prompts" in " ".join(said.split())
    assert "Note: added at 2 layers, this coefficient moves the residual stream by 80 times" in said
    bare, steered = record["replies"]["0"], record["replies"]["40"]
    assert [a != b for a, b in zip(bare, steered, strict=True)] == acts
    assert cli.run(["steer", *files, *more, *when[:2], "--out", str(tmp_path / "half")]) == 2
    assert "only one of --when-like and --when-unlike was given" in capsys.readouterr().err
    few = text_file("few.txt", "a\nb\nc")
    assert cli.run(["steer", *files, *more, *when[:3], str(few), "--out", str(tmp_path / "few")]) == 2
    assert "8 and 3 prompts for the condition; expected at least 4 of each" in capsys.readouterr().err


def test_read_takes_sites_that_no_gguf_file_can_hold(files: list[str], tmp_path: Path, text_file: TextFile):
    texts = text_file("texts.txt", "one\ntwo")
    out = tmp_path / "out"
    sites = ["--sites", "mlp.1", "resid.0", "--method", "mean"]
    assert cli.run(["read", *files, "--text", str(texts), "--out", str(out), *sites]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["reading.html", "reading.json"]


def test_control_replies_with_and_without_a_vector(
    files: list[str], own: LoadedModel, tmp_path: Path, text_file: TextFile, capsys: Capture
):
    prompts = text_file("prompts.txt", "name a bird\nwhat is a lake")
    first, second = tmp_path / "first", tmp_path / "second"
    more = ["--prompts", str(prompts), "--coefficient", "0", "4", "--reply-tokens", "5"]
    assert cli.run(["steer", *files, *more, "--out", str(first)]) == 0
    assert "name a bird" in capsys.readouterr().out
    fitted = json.loads((first / "steer.json").read_text())
    assert list(fitted["replies"]) == ["0", "4"]
    assert fitted["replies"]["0"] != fitted["replies"]["4"]
    vector_file = ["--vector", str(first / "vector.gguf")]
    assert cli.run(["steer", own.name, *vector_file, *more, "--out", str(second)]) == 0
    assert json.loads((second / "steer.json").read_text())["replies"] == fitted["replies"]
    with applied(own, Steering(import_gguf(first / "vector.gguf").vectors, coefficient=4.0)):
        assert replies(own, ["name a bird", "what is a lake"], max_new_tokens=5) == fitted["replies"]["4"]


def test_control_says_where_the_vectors_are_of_another_type(
    own: LoadedModel, tmp_path: Path, text_file: TextFile, capsys: Capture
):
    path = export_gguf(dataclasses.replace(vectors(), model_type="mis\x1btral"), tmp_path / "v.gguf")
    prompts = text_file("prompts.txt", "one\ntwo")
    words = ["steer", own.name, "--vector", str(path), "--prompts", str(prompts), "--out", str(tmp_path / "o")]
    assert cli.run([*words, "--reply-tokens", "2"]) == 0
    assert "the file names the model type mis␛tral; the model is a llama" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "give either --vector, or --positive and --negative"),
        (["--positive", "P"], "give either --vector"),
        (["--vector", "V", "--positive", "P"], "give either --vector"),
        (["--vector", "missing.gguf"], "missing.gguf does not exist"),
        (["--vector", "V", "--layers", "2", "1"], "layer range is (2, 1)"),
        (["--vector", "V", "--layers", "9", "12"], "there is no vector in layers (9, 12)"),
        (["--vector", "W"], "has width 8; the model's is 32"),
        (["--vector", "V", "--coefficient", "nan"], "coefficient is nan"),
    ],
    ids=str,
)
def test_commands_that_cannot_work_say_why(
    own: LoadedModel, tmp_path: Path, text_file: TextFile, capsys: Capture, words: list[str], told: str
):
    places = {
        "P": text_file("p.txt", "\n".join(POSITIVE)),
        "V": export_gguf(vectors(), tmp_path / "v.gguf"),
        "W": export_gguf(ControlVectors("llama", {Site(1): torch.ones(8)}), tmp_path / "w.gguf"),
    }
    prompts = text_file("prompts.txt", "one\ntwo")
    given = [str(places.get(word, word)) for word in words]
    assert cli.run(["steer", own.name, "--prompts", str(prompts), "--out", str(tmp_path / "o"), *given]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "o" / "steer.json").exists()


# Steering that is saved as an edit


def steerings() -> list[Steering]:
    return [
        Steering({Site(1): vector(1), Site(2): vector(2)}, "add", 2.0, "reply", (1, 2), True, "m"),
        Steering({Site(1): vector(3)}, "piecewise", -0.5, (3, 9)),
    ]


def test_saved_steering_comes_back_as_it_was(tmp_path: Path):
    loaded, chosen_on = load_edit(save_edit(steerings(), tmp_path / "edit", chosen_on=["a"]))
    assert chosen_on == {"a"}
    assert [each.hash for each in loaded] == [each.hash for each in steerings()]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tokens": 5}, r"edits\[0\]\.tokens is 5; expected a list"),
        ({"layers": "all"}, r"edits\[0\]\.layers is 'all'; expected a list"),
        ({"operator": "push"}, r"edits\[0\]\.operator is 'push'; expected one of add"),
        ({"coefficient": "2"}, r"edits\[0\]\.coefficient is '2'; expected a finite number"),
        ({"strength": 2}, "strength"),
        ({"vectors": "../vectors.safetensors"}, "vectors"),
    ],
)
def test_steering_of_another_form_is_refused(change: dict[str, Any], told: str, tmp_path: Path):
    path = save_edit(steerings(), tmp_path / "edit") / "edit.json"
    card = json.loads(path.read_text())
    card["edits"][0] |= change
    path.write_text(json.dumps(card))
    with pytest.raises(BadInput, match=told):
        load_edit(path.parent)
