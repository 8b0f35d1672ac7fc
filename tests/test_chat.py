"""Prompts become tokens as the model was trained: chat templates, their arguments, dates, system messages."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from support.checkpoints import save_base
from support.models import build
from support.tokenizers import byte_tokenizer
from unsleep.activations.harvest import harvest
from unsleep.core import BadInput, Site
from unsleep.models import chat
from unsleep.models.chat import ChatOptions
from unsleep.models.load import LoadConfig, load_model, save_plain
from unsleep.models.model import LoadedModel
from unsleep.prompts.prompt import Message, Prompt, PromptSet

SYSTEM = Prompt("Q", before=(Message("system", "S"),))
TURNS = Prompt("R", before=(Message("user", "Q"), Message("assistant", "A")))
DATED = "{% if strftime_now is defined %}{% set d = strftime_now('%d %b %Y') %}{% else %}{% set d = 'x' %}{% endif %}"
DATED += "{{ d }}|{{ strftime_now(\"%Y-%m-%d\") }}|{{ messages[-1]['content'] }}"


def tokenizer_with(template: Any, **tokens: str) -> Any:
    made = type(byte_tokenizer()).from_pretrained(str(saved()))
    made.chat_template = template
    for name, token in tokens.items():
        setattr(made, name, token)
    return made


def saved(place: dict[str, Path] = {}) -> Path:  # noqa: B006 - made once
    if "at" not in place:
        import tempfile

        place["at"] = Path(tempfile.mkdtemp())
        byte_tokenizer().save_pretrained(place["at"])
    return place["at"]


def text_of(tokenizer: Any, prompt: Prompt | str, options: ChatOptions = chat.NO_OPTIONS) -> str:
    [row] = chat.encode_prompts(tokenizer, [prompt], options)
    return tokenizer.decode(row)


# The templates that come with the package, as their authors write them


PACKAGED = {
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nQ\n\n### Response:\n"
    ),
    "stanford-alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nQ\n\n### Response:"
    ),
    "vicuna": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: Q ASSISTANT:"
    ),
    "llama-2": "<bos>[INST] Q [/INST]",
    "chatml": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
    "safe-rlhf": "BEGINNING OF CONVERSATION: USER: Q ASSISTANT:",
    "plain": "User: Q\nAssistant:",
    "raw": "Q",
}
WITH_SYSTEM = {
    "alpaca": "S\n\n### Instruction:\nQ\n\n### Response:\n",
    "vicuna": "S USER: Q ASSISTANT:",
    "llama-2": "<bos>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST]",
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
}
WITH_TURNS = {
    "llama-2": "<bos>[INST] Q [/INST] A <eos><bos>[INST] R [/INST]",
    "vicuna": PACKAGED["vicuna"] + " A<eos>USER: R ASSISTANT:",
    "chatml": PACKAGED["chatml"] + "A<|im_end|>\n<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n",
}


def test_every_packaged_template_is_known():
    assert set(chat.names()) == set(PACKAGED)


@pytest.mark.parametrize(
    ("name", "prompt", "expected"),
    [
        *((name, Prompt("Q"), text) for name, text in PACKAGED.items()),
        *((name, SYSTEM, text) for name, text in WITH_SYSTEM.items()),
        *((name, TURNS, text) for name, text in WITH_TURNS.items()),
    ],
)
def test_packaged_templates_write_what_their_authors_do(name: str, prompt: Prompt, expected: str):
    tokenizer = tokenizer_with(None)
    chat.choose_template(tokenizer, name)
    assert text_of(tokenizer, prompt) == expected


def test_a_packaged_template_begins_as_the_tokenizer_does():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_with(None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    assert tokenizer("a")["input_ids"][0] == 0
    for name in ("alpaca", "vicuna", "llama-2", "raw"):
        chat.choose_template(tokenizer, name)
        [row] = chat.encode_prompts(tokenizer, ["Q"])
        assert row[0] == 0, name
        assert 0 not in row[1:], name


# Which template


def test_a_tokenizer_with_several_templates_takes_its_default_or_the_one_that_is_named():
    several = {"default": "D{{ messages[0]['content'] }}", "rag": "R{{ messages[0]['content'] }}"}
    for wanted, expected in ((None, "Dx"), ("rag", "Rx"), ("raw", "x")):
        tokenizer = tokenizer_with(several)
        chat.choose_template(tokenizer, wanted)
        assert text_of(tokenizer, "x") == expected
    del several["default"]
    with pytest.raises(BadInput, match="has the chat templates rag and none is the default; name one with --chat-temp"):
        chat.choose_template(tokenizer_with(several), None)


def test_a_template_from_a_file(tmp_path: Path):
    (tmp_path / "own.jinja").write_text("<{{ messages[0]['content'] }}>")
    tokenizer = tokenizer_with(None)
    chat.choose_template(tokenizer, str(tmp_path / "own.jinja"))
    assert text_of(tokenizer, "x") == "<x>"
    for wrong in ("alpacca", str(tmp_path), "x\0y"):
        with pytest.raises(BadInput, match=r"is neither a readable file nor one of alpaca, chatml"):
            chat.choose_template(tokenizer_with(None), wrong)


def test_a_model_without_a_template_says_so(tmp_path: Path):
    folder = save_base(tmp_path)
    (folder / "chat_template.jinja").unlink()
    model = load_model(folder)
    with pytest.raises(BadInput, match=r"has no chat template; say how the model was trained.*plain"):
        model.encode(["x"])
    assert model.encode(["x"], plain=True) == [byte_tokenizer()("x")["input_ids"]]
    assert load_model(folder, LoadConfig(chat_template="plain")).encode(["x"])
    done = harvest(model, PromptSet("p", (Prompt("x"), Prompt("yy"))), [Site(1)], tmp_path / "acts", plain=True)
    assert done.tokens == 3


def test_an_exported_checkpoint_keeps_the_template_that_was_chosen(tmp_path: Path):
    model = load_model(save_base(tmp_path / "base"), LoadConfig(chat_template="vicuna"))
    save_plain(model, tmp_path / "saved")
    assert load_model(tmp_path / "saved").template == model.template


# Templates that cannot be used


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ messages[0]['content'] + nothing }}", "UndefinedError"),
        ("{{ raise_exception('system first') }}", "system first"),
        ("{{ messages.pop() }}", "SecurityError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% set f = '%Y' %}{{ strftime_now(f) }}", "writes today's date in a way that cannot be fixed"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_when_the_model_is_loaded(tmp_path: Path, template: str, told: str):
    folder = save_base(tmp_path / "base")
    (tmp_path / "t.jinja").write_text(template)
    with pytest.raises(BadInput, match=rf"the chat template .*{told}"):
        load_model(folder, LoadConfig(chat_template=str(tmp_path / "t.jinja")))


def test_messages_that_a_template_does_not_take_are_refused():
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    with pytest.raises(BadInput, match="chat template cannot be used: TemplateError: no system"):
        text_of(tokenizer_with(template), SYSTEM)


# Arguments


THINKING = "{% if enable_thinking is defined and not enable_thinking %}<off>{% endif %}{{ messages[-1]['content'] }}"


def test_arguments_reach_the_template_and_its_hash(tmp_path: Path):
    folder = save_base(tmp_path / "base")
    (tmp_path / "t.jinja").write_text(THINKING)
    config = LoadConfig(chat_template=str(tmp_path / "t.jinja"))
    bare = load_model(folder, config)
    off = load_model(folder, LoadConfig(chat_template=config.chat_template, template_args='{"enable_thinking": false}'))
    assert bare.texts(bare.encode(["x"])) == ["x"]
    assert off.texts(off.encode(["x"])) == ["<off>x"]
    assert bare.template != off.template
    assert off.origin["chat_template"]["args"] == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            '{"enable_thinkng": false}',
            "enable_thinkng: the chat template has no such argument; it has enable_thinking",
        ),
        ("[1]", "is no JSON object"),
        ("{", "is no JSON object"),
    ],
)
def test_arguments_that_are_not_understood_are_refused(tmp_path: Path, given: str, told: str):
    folder = save_base(tmp_path / "base")
    (tmp_path / "t.jinja").write_text(THINKING)
    with pytest.raises(BadInput, match=told):
        load_model(folder, LoadConfig(chat_template=str(tmp_path / "t.jinja"), template_args=given))


# Dates


def test_a_template_that_writes_todays_date_writes_the_one_that_is_set(tmp_path: Path):
    tokenizer = tokenizer_with(DATED)
    assert text_of(tokenizer, "x") == "26 Jul 2024|2024-07-26|x"
    on = ChatOptions(date=datetime.date(2023, 2, 1))
    assert text_of(tokenizer, "x", on) == "01 Feb 2023|2023-02-01|x"
    assert chat.template_hash(tokenizer, on) != chat.template_hash(tokenizer)
    undated = tokenizer_with("{{ messages[-1]['content'] }}")
    assert chat.template_hash(undated, on) == chat.template_hash(undated)
    folder = save_base(tmp_path / "base")
    (tmp_path / "t.jinja").write_text(DATED)
    model = load_model(folder, LoadConfig(chat_template=str(tmp_path / "t.jinja"), date="2023-02-01"))
    assert model.texts(model.encode(["x"])) == ["01 Feb 2023|2023-02-01|x"]
    assert model.origin["chat_template"]["date"] == "2023-02-01"
    assert "strftime_now" in model.tokenizer.chat_template  # an export goes on writing the day's own
    with pytest.raises(BadInput, match="--date '1 Feb' is no date; expected such as 2024-07-26"):
        load_model(folder, LoadConfig(date="1 Feb"))


# What was said before


def test_what_was_said_before_reaches_the_model_and_plain_text_refuses_it():
    model = LoadedModel(build("llama"), byte_tokenizer(), "tiny")
    assert model.texts(model.encode([SYSTEM])) == ["S: be kind. system: S S: be kind. user: Q A:"]
    with pytest.raises(BadInput, match=r"'Q' … has messages before it; plain text has none"):
        model.encode([SYSTEM], plain=True)


def test_a_token_without_an_embedding_is_named(tmp_path: Path):
    folder = save_base(tmp_path / "base")
    own = type(byte_tokenizer()).from_pretrained(folder)
    own.add_tokens(["<far>"])
    own.save_pretrained(folder)
    model = load_model(folder)
    assert model.encode(["near"])
    with pytest.raises(BadInput, match=r"has token 256, and the model has embeddings for 256: the tokenizer is not"):
        model.encode(["<far>"])


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_are_scaled_anew_end_where_the_model_was_first_trained_to(tmp_path: Path, kind: str):
    folder = save_base(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    scaling = {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
    scaling |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else {}
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": scaling}))
    model = load_model(folder)
    assert chat.context_length(model.network) == 128
    with pytest.raises(BadInput, match="the model's context is 128"):
        model.encode(["x" * 120])


@pytest.mark.parametrize(
    ("template", "role"),
    [
        ("{{ messages[-1]['content'] }}", "system"),
        ("{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}{% endif %}{% endfor %}", "system"),
        ("always the same", "system"),
        ('{"model_type": "llama"}', "system"),
    ],
)
def test_a_template_that_leaves_a_message_out_is_refused(template: str, role: str):
    with pytest.raises(BadInput, match=f"the chat template leaves out the {role} message"):
        text_of(tokenizer_with(template), SYSTEM)


def test_thoughts_of_an_assistant_may_be_left_out():
    said = Prompt("Q", before=(Message("user", "P"), Message("assistant", "<think>hm</think> A")))
    template = "{% for m in messages %}{{ m['content'].split('</think>')[-1] }}|{% endfor %}"
    assert text_of(tokenizer_with(template), said) == "P| A|Q|"


WRITTEN = "{%- if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}{{ date_string }}|x" + (
    "{{ messages[-1]['content'] }}"
)


def test_a_date_reaches_templates_that_take_it_as_written_and_is_refused_by_those_without():
    on = ChatOptions(date=datetime.date(2023, 2, 1))
    tokenizer = tokenizer_with(WRITTEN)
    assert text_of(tokenizer, "y") == "26 Jul 2024|xy"
    assert text_of(tokenizer, "y", on) == "01 Feb 2023|xy"
    assert chat.template_hash(tokenizer, on) != chat.template_hash(tokenizer)
    chat.check_template(tokenizer, on)
    with pytest.raises(BadInput, match="--date 2023-02-01: the chat template writes no date"):
        chat.check_template(tokenizer_with("{{ messages[-1]['content'] }}"), on)
    with pytest.raises(BadInput, match="--date 2023-02-01: there is no chat template that writes it"):
        chat.check_template(tokenizer_with(None), on)
