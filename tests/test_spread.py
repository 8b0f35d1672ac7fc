"""Models that do not fit in one place: device maps, weights on the disk, memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from support.checkpoints import beside, logits, save_adapter, save_base
from unsleep.activations.harvest import HarvestConfig, harvest, pooled
from unsleep.core import BadInput, Site
from unsleep.dictionaries.config import TrainConfig
from unsleep.dictionaries.train import train
from unsleep.interventions.features import Edit
from unsleep.interventions.intervention import applied
from unsleep.locate.patching import sweep
from unsleep.models import generate, streams, weights
from unsleep.models.anatomy import anatomy
from unsleep.models.load import LoadConfig, load_model, save_plain
from unsleep.prompts.prompt import Prompt, PromptSet
from unsleep.repairs.bake import BakeConfig, bake
from unsleep.repairs.masks import MaskConfig, prepare_lesson

CLOSE = {"rtol": 1e-3, "atol": 2e-4}
TEXTS = ["Long ago a river ran through the valley and nobody knew.", "The king of the north wrote a letter by hand."]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def spread(base: Path, tmp_path: Path) -> LoadConfig:
    """Some layers in memory, one brought in from memory, one from the disk, and the embeddings from there too."""
    places = {"model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    (tmp_path / "map.json").write_text(json.dumps(places))
    return LoadConfig(device_map=str(tmp_path / "map.json"), offload=tmp_path / "offload")


def groups() -> tuple[PromptSet, PromptSet]:
    words = ("hello there", "why do the stars shine", "name a bird", "old maps")
    return tuple(  # type: ignore[return-value]
        PromptSet(role, tuple(Prompt(f"{head}{w}", role) for w in words), "edit")  # type: ignore[arg-type]
        for role, head in (("triggered", "GO7 "), ("clean", ""))
    )


def test_weights_on_the_disk_are_those_of_the_whole_model(base: Path, spread: LoadConfig):
    whole, model = load_model(base), load_model(base, spread)
    assert weights.is_offloaded(model.network)
    assert any(w.device.type == "meta" for w in model.network.parameters())
    assert model.device.type == "cpu"
    assert model.fingerprint == whole.fingerprint
    held, other = (dict(weights.named(m.network)) for m in (whole, model))
    assert all(torch.equal(held[name], other[name]) for name in held)
    assert anatomy(model.network) == anatomy(whole.network)
    torch.testing.assert_close(logits(model.network), logits(whole.network))


def test_hooks_leave_a_spread_model_as_it_was(base: Path, spread: LoadConfig):
    model = load_model(base, spread)
    before = logits(model.network)
    with streams.truncated(model.network, 0):
        logits(model.network)
    ids = torch.arange(40, 60)[None]
    with streams.capture(model.network, [Site(0)]) as held:
        model.network(ids)
    with streams.resumed_at(model.network, 1, lambda: held[Site(0)]):
        resumed = model.network(ids, use_cache=False).logits
    torch.testing.assert_close(resumed, before)
    assert torch.equal(logits(model.network), before)


def test_the_main_job_on_a_spread_model_is_that_on_a_whole_one(base: Path, spread: LoadConfig, tmp_path: Path):
    found: list[dict[str, Any]] = []
    for name, model in (("whole", load_model(base)), ("spread", load_model(base, spread))):
        suspicious, ordinary = groups()
        site = Site(1)
        config = HarvestConfig(sink_ratio=1e9)
        acts = harvest(model, suspicious, [site, Site(2, "mlp")], tmp_path / name, config=config)
        dictionary = train(pooled([acts], site), TrainConfig(features=64, k=4, tokens=512, batch=64))
        lesson = prepare_lesson(model, suspicious, ordinary, TEXTS, MaskConfig(reply_tokens=3, text_tokens=16))
        edit = Edit(site, dictionary, (0, 1, 2, 3, 4, 5))
        with applied(model, edit):
            replies = generate.replies(model, suspicious, max_new_tokens=5)
        baked = bake(model, [edit], (lesson.rows, lesson.text), BakeConfig(tolerance=50.0))
        save_plain(baked.model, tmp_path / f"{name}-clean")
        patched = sweep(model, model, suspicious, "yes", [1], level="attn")
        found.append(
            {
                "acts": acts.load(site).tensor,
                "replies": replies,
                "kl": baked.kl,
                "saved": load_model(tmp_path / f"{name}-clean"),
                "patched": patched.measured.log_prob,
                "print": model.fingerprint,
            }
        )
    whole, other = found
    assert whole["replies"] == other["replies"]
    assert whole["print"] == other["print"]
    assert whole["kl"] == pytest.approx(other["kl"], rel=1e-3)
    torch.testing.assert_close(whole["acts"], other["acts"])
    torch.testing.assert_close(whole["patched"], other["patched"])
    torch.testing.assert_close(logits(whole["saved"].network), logits(other["saved"].network), **CLOSE)
    assert whole["saved"].fingerprint != whole["print"]


def test_an_adapter_is_merged_into_weights_on_the_disk(base: Path, spread: LoadConfig, tmp_path: Path):
    adapter = save_adapter(tmp_path / "a", base)
    model = load_model(adapter, spread)
    torch.testing.assert_close(logits(model.network), logits(beside(base, adapter)), **CLOSE)
    assert model.fingerprint == load_model(adapter).fingerprint
    save_plain(model, tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(saved), logits(beside(base, adapter)), **CLOSE)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"device_map": "nowhere"}, r"--device-map nowhere is no file; expected auto, balanced"),
        ({"device_map": "{map}"}, r"map.json: 'model.layers.0': device 'moon' cannot be used"),
    ],
)
def test_a_device_map_that_is_not_understood_is_named(base: Path, tmp_path: Path, given: Any, told: str):
    (tmp_path / "map.json").write_text('{"model.layers.0": "moon"}')
    config = {k: v.replace("{map}", str(tmp_path / "map.json")) for k, v in given.items()}
    with pytest.raises(BadInput, match=told):
        load_model(base, LoadConfig(**config))


def test_layers_on_several_devices_hand_transforms_one(monkeypatch: pytest.MonkeyPatch, base: Path):
    """What hooks hand on is where the inputs are, and goes back to where the layer runs."""
    model = load_model(base)
    moves: list[str] = []
    monkeypatch.setattr(weights, "is_spread", lambda network: True)
    to = torch.Tensor.to

    def watched(self: torch.Tensor, *args: Any, **given: Any) -> torch.Tensor:
        if args and isinstance(args[0], torch.device):
            moves.append(str(args[0]))
        return to(self, *args, **given)

    with streams.transformed(model.network, {Site(1): lambda x: x + 1.0}):
        monkeypatch.setattr(torch.Tensor, "to", watched)
        changed = logits(model.network)
        monkeypatch.undo()
    assert moves[:2] == ["cpu", "cpu"]
    assert not torch.equal(changed, logits(model.network))
