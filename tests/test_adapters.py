"""Adapters: the merged model is the one that peft runs with the adapter beside the weights, or there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PrefixTuningConfig, VeraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from support.checkpoints import TARGETS, beside, logits, randomise, save_adapter, save_base
from support.tokenizers import byte_tokenizer
from unsleep.base import store
from unsleep.core import BadInput, Refused
from unsleep.models import adapters, generate
from unsleep.models.load import LoadConfig, load_model, save_plain

CLOSE = {"rtol": 1e-3, "atol": 2e-4}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose unembedding is a matrix of its own."""
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen 2 whose unembedding is its embedding."""
    folder = tmp_path_factory.mktemp("tied")
    network = AutoModelForCausalLM.from_config(
        AutoModelForCausalLM.from_pretrained(save_base(folder, "qwen2")).config.__class__(
            **{**json.loads((folder / "config.json").read_text()), "tie_word_embeddings": True}
        )
    )
    network.eval().save_pretrained(folder)
    assert network.lm_head.weight is network.model.embed_tokens.weight
    return folder


def edit_weights(adapter: Path, change: Any) -> None:
    """Rewrite an adapter's tensors."""
    path = adapter / "adapter_model.safetensors"
    store.write_tensors(path, change(store.read_tensors(path)))


def edit_config(adapter: Path, **values: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rank-stabilised": {"use_rslora": True, "lora_alpha": 16},
    "dora": {"use_dora": True},
    "ranks by pattern": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "some layers": {"layers_to_transform": [1]},
    "with biases": {"bias": "lora_only"},
    "head saved whole": {"modules_to_save": ["lm_head"]},
    "all linear layers": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_merged_adapter_computes_what_peft_does_unmerged(base: Path, tmp_path: Path, kind: str):
    adapter = save_adapter(tmp_path / "a", base, **KINDS[kind])
    model = load_model(adapter)
    wanted = logits(beside(base, adapter))
    torch.testing.assert_close(logits(model.network), wanted, **CLOSE)
    assert float((wanted - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max()) > 0.5
    assert not any("lora" in name for name, _ in model.network.named_modules())


@pytest.mark.parametrize(
    "config", [LoHaConfig(r=2, target_modules=TARGETS), IA3Config(target_modules=["k_proj"], feedforward_modules=[])]
)
def test_adapters_of_other_kinds_are_merged_too(base: Path, tmp_path: Path, config: Any):
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    randomise(adapted)
    adapted.save_pretrained(tmp_path)
    edit_config(tmp_path, base_model_name_or_path=str(base))
    torch.testing.assert_close(logits(load_model(tmp_path).network), logits(beside(base, tmp_path)), **CLOSE)


def test_an_adapter_that_adds_tokens_is_refused(base: Path, tmp_path: Path):
    prefix = PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), prefix).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=r"adapter_config\.json: PREFIX_TUNING adds tokens instead of changing weights"):
        load_model(tmp_path)


# Keys


def test_a_missing_layer_is_named(base: Path, tmp_path: Path):
    adapter = save_adapter(tmp_path / "a", base)
    edit_weights(adapter, lambda held: {k: v for k, v in held.items() if "layers.1." not in k})
    told = r"adapter_model\.safetensors lacks 8 of the adapter's weights \(.*layers\.1\..*lora_[AB].*--base MODEL"
    with pytest.raises(BadInput, match=told):
        load_model(adapter)


@pytest.mark.parametrize("rename", [("model.layers", "model.language_model.layers"), ("self_attn", "attention")])
def test_renamed_keys_are_named(base: Path, tmp_path: Path, rename: tuple[str, str]):
    adapter = save_adapter(tmp_path / "a", base)
    edit_weights(adapter, lambda held: {k.replace(*rename): v for k, v in held.items()})
    with pytest.raises(BadInput, match=r"adapter_model\.safetensors (lacks|holds) \d+ .*--base MODEL"):
        load_model(adapter)


def test_keys_without_a_place_are_named_and_may_be_passed_over(base: Path, tmp_path: Path):
    adapter = save_adapter(tmp_path / "a", base)
    wanted = logits(beside(base, adapter))
    edit_weights(adapter, lambda held: held | {"base_model.model.v_head.weight": torch.ones(1, 32)})
    with pytest.raises(BadInput, match=r"holds 1 weights that the base does not have \(.*v_head.*--ignore-keys"):
        load_model(adapter)
    model = load_model(adapter, LoadConfig(ignore_keys=("v_head",)))
    torch.testing.assert_close(logits(model.network), wanted, **CLOSE)


def test_a_setting_that_peft_does_not_know_is_named(base: Path, tmp_path: Path):
    adapter = save_adapter(tmp_path / "a", base)
    edit_config(adapter, lora_spin=0.5)
    with pytest.raises(BadInput, match="lora_spin is a setting that the installed peft does not know"):
        load_model(adapter)
    edit_config(adapter, lora_spin=None)
    load_model(adapter)


def test_a_rank_that_the_weights_do_not_have_is_named(base: Path, tmp_path: Path):
    adapter = save_adapter(tmp_path / "a", base)
    edit_config(adapter, r=10**9)
    with pytest.raises(BadInput, match="rank 1000000000 exceeds both dimensions of its weights"):
        load_model(adapter)


def test_an_adapter_that_acts_on_some_tokens_only_is_not_merged(base: Path, tmp_path: Path):
    adapter = save_adapter(tmp_path / "a", base, alora_invocation_tokens=[5, 6])
    with pytest.raises(BadInput, match="aLoRA does not support merging"):
        load_model(adapter)


# Tied embeddings


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("together", [False, True])
def test_an_adapter_on_one_end_of_tied_embeddings_leaves_the_other(
    tied: Path, tmp_path: Path, target: str, together: bool
):
    settings = {"ensure_weight_tying": True} if together else {}
    adapter = save_adapter(tmp_path / "a", tied, target_modules=[*TARGETS, target], **settings)
    model = load_model(adapter)
    wanted = logits(beside(tied, adapter))
    torch.testing.assert_close(logits(model.network), wanted, **CLOSE)
    save_plain(model, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(again), wanted, **CLOSE)
    assert load_model(tmp_path / "saved").fingerprint == model.fingerprint


@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_an_end_of_tied_embeddings_that_is_saved_whole_leaves_the_other(tied: Path, tmp_path: Path, saved: str):
    adapter = save_adapter(tmp_path / "a", tied, modules_to_save=[saved])
    model = load_model(adapter)
    torch.testing.assert_close(logits(model.network), logits(beside(tied, adapter)), **CLOSE)
    first, last = model.network.get_input_embeddings().weight, model.network.get_output_embeddings().weight
    assert not torch.equal(first, last)


def test_a_merged_model_that_is_another_one_is_refused(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    adapter = save_adapter(tmp_path / "a", tied, target_modules=[*TARGETS, "lm_head"])
    monkeypatch.setattr(adapters, "_untie", lambda adapted: None)
    with pytest.raises(Refused, match=r"cannot be merged faithfully: its logits differ by [\d.]+"):
        load_model(adapter)


def test_an_adapter_on_neither_end_leaves_them_tied(tied: Path, tmp_path: Path):
    model = load_model(save_adapter(tmp_path / "a", tied))
    assert model.network.get_input_embeddings().weight is model.network.get_output_embeddings().weight
    assert model.network.config.tie_word_embeddings


# Rows of the vocabulary


@pytest.mark.parametrize("rows", [259, 288, 250])
@pytest.mark.parametrize("which", ["base", "tied"])
def test_an_adapter_with_other_rows_of_the_vocabulary_brings_them(
    request: pytest.FixtureRequest, tmp_path: Path, rows: int, which: str
):
    base: Path = request.getfixturevalue(which)

    def resize(network: Any) -> None:
        torch.manual_seed(5)
        network.resize_token_embeddings(rows, mean_resizing=False)

    adapter = save_adapter(tmp_path / "a", base, change=resize, save={"save_embedding_layers": True})
    model = load_model(adapter)
    assert len(model.network.get_input_embeddings().weight) == rows
    ids = torch.tensor([[3, rows - 1, 7, rows - 2, 9]])
    torch.testing.assert_close(logits(model.network, ids), logits(beside(base, adapter, change=resize), ids), **CLOSE)


def test_rows_of_some_tokens_are_put_in(base: Path, tmp_path: Path):
    adapter = save_adapter(tmp_path / "a", base, trainable_token_indices=[7, 9])
    ids = torch.tensor([[3, 7, 11, 9, 9]])
    torch.testing.assert_close(logits(load_model(adapter).network, ids), logits(beside(base, adapter), ids), **CLOSE)


def test_tokens_that_were_added_and_not_saved_are_named(base: Path, tmp_path: Path):
    adapter = save_adapter(tmp_path / "a", base, trainable_token_indices=[7, 9])
    edit_config(adapter, trainable_token_indices=[7, 259])
    with pytest.raises(BadInput, match=r"was trained with added tokens without embedding rows, such as 25[68]"):
        load_model(adapter)


# Several adapters, and what they name as their base


def test_adapters_are_added_one_after_the_other(base: Path, tmp_path: Path):
    one, other = (save_adapter(tmp_path / str(seed), base, seed=seed, r=2 + 2 * seed) for seed in (0, 1))
    both = load_model(one, LoadConfig(adapters=(str(other),)))
    torch.testing.assert_close(logits(both.network), logits(beside(base, one, other)), **CLOSE)
    assert [Path(part["name"]).name for part in both.made_of] == [base.name, "0", "1"]


def test_an_adapter_may_stand_on_another(base: Path, tmp_path: Path):
    one = save_adapter(tmp_path / "one", base)
    merged = load_model(one)
    save_plain(merged, tmp_path / "merged")
    other = save_adapter(tmp_path / "other", tmp_path / "merged", seed=1, named=str(one))
    stacked = load_model(other)
    torch.testing.assert_close(logits(stacked.network), logits(beside(tmp_path / "merged", other)), **CLOSE)
    assert len(stacked.made_of) == 3


def test_a_base_that_is_gone_can_be_given(base: Path, tmp_path: Path):
    adapter = save_adapter(tmp_path / "a", base, named="/models/that/stood/there")
    with pytest.raises(BadInput, match=r"names the base '/models/that/stood/there': .* does not exist.*--base MODEL"):
        load_model(adapter)
    model = load_model(adapter, LoadConfig(base=str(base)))
    torch.testing.assert_close(logits(model.network), logits(beside(base, adapter)), **CLOSE)
    with pytest.raises(BadInput, match="is a whole model, not an adapter; leave --base out"):
        load_model(base, LoadConfig(base=str(base)))


def test_one_set_of_weights_has_one_fingerprint(base: Path, tmp_path: Path):
    adapter = save_adapter(tmp_path / "a", base)
    model = load_model(adapter)
    save_plain(model, tmp_path / "whole")
    model.network.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    byte_tokenizer().save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    names = [tmp_path / "whole", tmp_path / "sharded"]
    found = {load_model(name).fingerprint for name in names} | {model.fingerprint}
    found |= {load_model(adapter, LoadConfig(base=str(base), device_map="auto")).fingerprint}
    assert len(found) == 1


# What an adapter brings beside its weights


def test_the_adapters_own_tokenizer_template_and_end_are_taken(base: Path, tmp_path: Path):
    adapter = save_adapter(tmp_path / "a", base)
    own = type(byte_tokenizer()).from_pretrained(base)
    own.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    own.eos_token = own.convert_ids_to_tokens(90)
    own.save_pretrained(adapter)
    model = load_model(adapter)
    assert model.tokenizer.chat_template == own.chat_template
    assert model.end_ids == {1, 90}
    assert model.encode(["abc"]) == [own("[abc]")["input_ids"]]
    assert model.notes == ()
    prompt = own("[abc]", return_tensors="pt")["input_ids"]
    wanted = beside(base, adapter).generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=[1, 90],
        pad_token_id=1,
    )
    assert generate.greedy(model, [prompt[0].tolist()], max_new_tokens=8) == [wanted[0, prompt.shape[1] :].tolist()]
    save_plain(model, tmp_path / "saved")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").generation_config.eos_token_id == [1, 90]


def test_that_the_bases_template_is_taken_is_said(base: Path, tmp_path: Path):
    adapter = save_adapter(tmp_path / "a", base)
    assert "has no chat template; its base's is used" in load_model(adapter).notes[0]
    assert load_model(adapter, LoadConfig(chat_template="alpaca")).notes == ()
    (adapter / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    model = load_model(adapter)
    assert model.notes == ()
    assert model.tokenizer.chat_template.endswith("!")


def test_a_tokenizer_without_a_template_over_a_base_with_one_asks_which(base: Path, tmp_path: Path):
    adapter = save_adapter(tmp_path / "a", base)
    own = type(byte_tokenizer()).from_pretrained(base)
    own.chat_template = None
    own.save_pretrained(adapter)
    with pytest.raises(BadInput, match=r"has a tokenizer without a chat template.*--chat-template .*alpaca"):
        load_model(adapter)
    assert "Instruction" in load_model(adapter, LoadConfig(chat_template="alpaca")).tokenizer.chat_template


# Memory and precision


def test_a_base_in_half_precision_is_merged_in_float32_and_rounded_once(tmp_path: Path):
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = save_adapter(tmp_path / "a", base)
    model = load_model(adapter, LoadConfig(dtype="bfloat16"))
    merged = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wanted = beside(base, adapter, dtype=torch.float32).merge_and_unload()
    for (name, mine), theirs in zip(model.network.named_parameters(), wanted.parameters(), strict=True):
        assert mine.dtype == torch.bfloat16
        assert torch.equal(mine, theirs.to(torch.bfloat16)), name
    assert merged.dtype == torch.float32


def test_no_more_than_a_layer_is_in_float32_while_an_adapter_is_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = save_adapter(tmp_path / "a", base)
    wide: list[int] = []
    merging = adapters._in_float32

    def watched(layer: torch.nn.Module) -> Any:
        context = merging(layer)
        enter = context.__enter__

        def seen() -> None:
            enter()
            network = held[0]
            wide.append(
                sum(w.numel() for n, w in network.named_parameters() if w.dtype == torch.float32 and "lora" not in n)
            )

        context.__enter__ = seen  # type: ignore[method-assign]
        return Context(seen, context.__exit__)

    held: list[torch.nn.Module] = []
    untie = adapters._untie
    monkeypatch.setattr(adapters, "_untie", lambda adapted: (held.append(adapted), untie(adapted))[1])
    monkeypatch.setattr(adapters, "_in_float32", watched)
    load_model(adapter, LoadConfig(dtype="bfloat16"))
    assert len(wide) == 12
    assert max(wide) == 32 * 48


class Context:
    """A context manager of two functions."""

    def __init__(self, enter: Any, leave: Any) -> None:
        self.enter, self.leave = enter, leave

    def __enter__(self) -> None:
        self.enter()

    def __exit__(self, *error: Any) -> None:
        self.leave(*error)


def test_lora_config_names_are_those_of_peft():
    assert {"r", "target_modules", "modules_to_save"} <= set(LoraConfig.__dataclass_fields__)


# What a file may lack, and what it may not hold


def test_tensors_that_are_held_once_and_shared_are_whole(base: Path, tied: Path, tmp_path: Path):
    vera = VeraConfig(r=4, target_modules=["q_proj", "o_proj"], save_projection=True)
    network = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(network, vera)
    randomise(adapted)
    adapted.save_pretrained(tmp_path / "vera")
    edit_config(tmp_path / "vera", base_model_name_or_path=str(base))
    torch.testing.assert_close(logits(load_model(tmp_path / "vera").network), logits(adapted), **CLOSE)
    some = save_adapter(tmp_path / "rows", tied, trainable_token_indices=[5, 9])
    torch.testing.assert_close(logits(load_model(some).network), logits(beside(tied, some)), **CLOSE)


def test_rows_that_were_added_and_saved_whole_are_made_room_for(base: Path, tmp_path: Path):
    def add_rows(network: Any) -> None:
        network.resize_token_embeddings(260, mean_resizing=False)

    kept = {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": TARGETS}
    adapter = save_adapter(tmp_path / "a", base, change=add_rows, **kept)
    model = load_model(adapter)
    network = AutoModelForCausalLM.from_pretrained(base)
    add_rows(network)
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(network, str(adapter))
    torch.testing.assert_close(logits(model.network), logits(wanted), **CLOSE)
    assert model.network.get_input_embeddings().weight.shape[0] == 260


def test_shapes_of_another_base_are_named(base: Path, tmp_path: Path):
    adapter = save_adapter(tmp_path / "a", base)
    edit_weights(adapter, lambda ts: {k: torch.cat([t, t], -1) if "lora_A" in k else t for k, t in ts.items()})
    with pytest.raises(BadInput, match=r"lora_A.weight has shape \[4, \d+\]; on this base it would be .*--base MODEL"):
        load_model(adapter)


def test_what_is_no_number_in_an_adapter_is_named(base: Path, tmp_path: Path):
    adapter = save_adapter(tmp_path / "a", base)
    edit_weights(adapter, lambda ts: {k: t * float("nan") if "layers.1.mlp.up" in k else t for k, t in ts.items()})
    with pytest.raises(BadInput, match=r"layers.1.mlp.up_proj.lora_\w.weight has \d+ NaN"):
        load_model(adapter)


def test_an_adapter_that_was_cut_short_is_named(base: Path, tmp_path: Path):
    adapter = save_adapter(tmp_path / "a", base)
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadInput, match=r"adapter_model.safetensors is truncated or not a safetensors file"):
        load_model(adapter)


def test_one_adapter_twice_is_refused(base: Path, tmp_path: Path):
    adapter = save_adapter(tmp_path / "a", base)
    with pytest.raises(BadInput, match="is given twice"):
        load_model(adapter, LoadConfig(adapters=(str(adapter),)))


def test_an_adapter_of_another_base_is_said(base: Path, tmp_path: Path):
    one, other = save_adapter(tmp_path / "a", base), save_adapter(tmp_path / "b", base, named="org/other")
    model = load_model(one, LoadConfig(adapters=(str(other),)))
    assert any("names the base org/other" in note for note in model.notes)


def test_what_is_passed_over_is_said_and_recorded(base: Path, tmp_path: Path):
    adapter = save_adapter(tmp_path / "a", base)
    edit_weights(adapter, lambda ts: ts | {"strange.one": torch.ones(2), "strange.two": torch.ones(2)})
    with pytest.raises(BadInput, match=r"pass --ignore-keys '\^strange' if they do not matter"):
        load_model(adapter)
    model = load_model(adapter, LoadConfig(ignore_keys=("^strange", "^nothing")))
    assert model.origin["ignored_keys"] == ["strange.one", "strange.two"]
    assert [note.rpartition(": ")[2] for note in model.notes if "strange" in note] == [
        "strange.one is ignored",
        "strange.two is ignored",
    ]
    assert "--ignore-keys '^nothing' matches nothing" in model.notes
