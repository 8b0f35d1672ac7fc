"""Planning: what is counted on the meta device is what real tensors take; verdicts, hours and refusals."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, PreTrainedModel

import unsleep
from support.checkpoints import save_adapter, save_base
from support.checks import as_in_use
from support.families import CONFIGS
from support.models import build
from unsleep.base import records
from unsleep.cli import run
from unsleep.core import BadInput
from unsleep.models import adapters
from unsleep.models.load import quiet_transformers
from unsleep.pages import report
from unsleep.planning import skeleton as skeletons
from unsleep.planning import training
from unsleep.planning.config import PlanConfig
from unsleep.planning.gpus import GIB, known, named
from unsleep.planning.inference import dictionary
from unsleep.planning.ledger import Ledger
from unsleep.planning.packed import packed_bytes
from unsleep.planning.record import Memory, PlanRecord
from unsleep.planning.run import fit, plan
from unsleep.planning.skeleton import Skeleton, cut, files_of
from unsleep.planning.skeleton import build as built
from unsleep.planning.training import Step, state_bytes

ROOT = Path(__file__).parents[1]
SMALL = PlanConfig(tasks=("harvest",), lengths=(16,), batches=(2,))


def config_of(folder: Path, family: str = "llama", **changed: Any) -> Path:
    """A folder with a config, and nothing else."""
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    AutoConfig.for_model(family.partition("+")[0], **ends | CONFIGS[family] | changed).save_pretrained(folder)
    return folder


def meta(family: str) -> Skeleton:
    """The skeleton of a small model."""
    return cut(copy.deepcopy(build(family)).to("meta"))  # type: ignore[arg-type]


def loss_of(network: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The loss of a training step, on real tensors."""
    logits = network(input_ids=ids, use_cache=False).logits[:, :-1]
    mask = torch.ones(logits.shape[:2], dtype=torch.bool)
    return cross_entropy(logits[mask].float(), ids[:, 1:].reshape(-1))


def real_peak(network: PreTrainedModel, ids: torch.Tensor) -> int:
    """Most bytes that a step's storages take, beside the weights."""
    ledger = Ledger([*network.parameters(), *network.buffers()])
    with ledger:
        loss_of(network, ids).backward()
    network.zero_grad()
    return ledger.high


# Memory


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2", "falcon", "opt"])
def test_a_step_on_the_meta_device_takes_the_memory_of_a_real_one(family: str):
    real = copy.deepcopy(build(family)).requires_grad_(True)
    ids = torch.randint(2, 256, (2, 32))
    found = training.timeline(meta(family).variant(trained=True), 2, 32, checkpointed=False)
    assert found.peak().bytes == pytest.approx(real_peak(real, ids), rel=0.06)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_step_of_lora_takes_the_memory_of_a_real_one(checkpointed: bool):
    real = copy.deepcopy(build("llama"))
    with quiet_transformers():
        adapters.trainable(real, 4, "all-linear")
    if checkpointed:
        real.gradient_checkpointing_enable({"use_reentrant": False})
        real.train()
    variant = meta("llama").variant(rank=4, modules=("all-linear",))
    found = training.timeline(variant, 2, 32, checkpointed)
    assert found.peak().bytes == pytest.approx(real_peak(real, torch.randint(2, 256, (2, 32))), rel=0.06)


def test_activations_are_the_storages_that_autograd_saves():
    real = copy.deepcopy(build("llama")).requires_grad_(True)
    weights = {w.untyped_storage().data_ptr() for w in [*real.parameters(), *real.buffers()]}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.randint(2, 256, (2, 32))
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(real, ids)
    whole = sum(size for place, size in saved.items() if place not in weights)
    head = 4 * 2 * 31 * 256 + 4 * 2 * 32 * 32 * 2  # log-probabilities; final norm and its input
    found = training.timeline(meta("llama").variant(trained=True), 2, 32, checkpointed=False)
    assert found.saved == pytest.approx(whole - head, rel=0.05)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe"])
def test_a_deep_model_is_planned_from_its_first_blocks(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    types = {"layer_types": ["sliding_attention", "full_attention"] * 4} if family == "gemma3_text" else {}
    folder = config_of(tmp_path, family, num_hidden_layers=8, **types)
    settings = PlanConfig(tasks=("full", "4bit"), lengths=(16,), batches=(2,), rank=4, checkpointing="off")
    short = plan(folder, config=settings)
    assert len(built(files_of(str(folder))).blocks) < 8
    monkeypatch.setattr(skeletons, "LEAST", 8)
    whole = plan(folder, config=settings)
    assert [c.memory.weights for c in short.cells] == [c.memory.weights for c in whole.cells]
    for one, other in zip(short.cells, whole.cells, strict=True):
        assert one.memory.peak == pytest.approx(other.memory.peak, rel=0.02)
        assert one.teraflops == pytest.approx(other.teraflops, rel=0.01)


def test_peaks_grow_with_the_batch_and_shrink_with_checkpointing(tmp_path: Path):
    settings = PlanConfig(tasks=("lora",), lengths=(16, 64), batches=(2, 8), rank=4, modules=("q_proj",))
    found = plan(config_of(tmp_path, num_hidden_layers=8), config=settings)
    for length in (16, 64):
        small, large = (found.cell("lora", length, batch, checkpointed=False).memory for batch in (2, 8))
        assert small.peak < large.peak
        assert large.activations == 4 * small.activations
    assert found.cell("lora", 64, 8, True).memory.peak < found.cell("lora", 64, 8, False).memory.peak


@pytest.mark.parametrize(("precision", "optimizer", "each"), [("float32", "adamw-fused", 16), ("mixed", "sgd", 8)])
def test_bytes_per_parameter_of_a_full_fine_tune(precision: Any, optimizer: Any, each: int, tmp_path: Path):
    settings = PlanConfig(tasks=("full",), lengths=(16,), batches=(1,), precision=precision, optimizer=optimizer)
    found = plan(config_of(tmp_path, dtype="bfloat16"), config=settings)
    held = found.cells[0].memory
    assert held.weights + held.gradients + held.optimizer == each * found.model.parameters


def test_ppo_holds_four_models(tmp_path: Path):
    settings = PlanConfig(tasks=("full", "ppo"), lengths=(16,), batches=(1,))
    found = plan(config_of(tmp_path, dtype="bfloat16"), config=settings)
    full, ppo = found.cell("full").memory, found.cell("ppo").memory
    assert ppo.weights == 2 * full.weights + 2 * 2 * found.model.parameters
    assert ppo.peak > 2 * (full.weights + full.gradients + full.optimizer)


def test_a_kept_base_and_accumulated_gradients_are_held(tmp_path: Path):
    folder = config_of(tmp_path, dtype="bfloat16")
    peaks = {
        (keep, accumulate): plan(
            folder,
            config=PlanConfig(tasks=("full",), lengths=(64,), batches=(8,), keep_base=keep, accumulate=accumulate),
        ).cells[0]
        for keep, accumulate in ((False, 1), (True, 1), (False, 4))
    }
    plain, kept, held = peaks.values()
    assert kept.memory.peak - plain.memory.peak == kept.memory.weights - plain.memory.weights > 0
    assert plain.memory.peak < held.memory.peak <= plain.memory.peak + plain.memory.gradients


def test_a_4_bit_weight_takes_what_bitsandbytes_stores():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(96, 512)
    packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    parts = [packed, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    assert packed_bytes(96, 512, 4) == sum(part.numel() * part.itemsize for part in parts)
    assert packed_bytes(4096, 4096, 4) / 4096**2 == pytest.approx(0.516, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adamw", lambda w: torch.optim.AdamW(w)),
        ("momentum", lambda w: torch.optim.SGD(w, momentum=0.9)),
        ("sgd", lambda w: torch.optim.SGD(w)),
    ],
)
def test_optimizer_state_is_that_of_the_optimizer(name: Any, make: Any):
    real = copy.deepcopy(build("llama")).requires_grad_(True)
    optimizer = make(list(real.parameters()))
    loss_of(real, torch.randint(2, 256, (1, 8))).backward()
    optimizer.step()
    held = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor) and x.ndim]
    weights = meta("llama").variant(trained=True).weights()
    assert state_bytes(weights, name) == sum(x.numel() * x.itemsize for x in held)


def test_a_small_parameter_keeps_a_32_bit_state_in_the_8_bit_optimizer():
    weights = list(meta("llama").variant(trained=True).weights())
    small = [w for w in weights if w.numel < 4096]
    assert state_bytes(small, "adamw-8bit") == state_bytes(small, "adamw")
    assert state_bytes(weights, "adamw-8bit") < state_bytes(weights, "adamw")


COUNTED_BY_NUMBERS = ("dbrx", "jetmoe")
"""Mixtures whose memory depends on the experts that tokens choose."""


def test_every_family_can_be_planned_for(any_family: Any):
    skeleton = cut(copy.deepcopy(any_family.network).to("meta"))
    if any_family.name in COUNTED_BY_NUMBERS:
        with pytest.raises(NotImplementedError):
            training.timeline(skeleton.variant(trained=True), 2, 16, checkpointed=False)
        return
    found = training.timeline(skeleton.variant(trained=True), 2, 16, checkpointed=False)
    assert found.peak().bytes > found.kept > 0
    assert found.flops > 0


# Where it fits


def step_of(peak: float, flops: float = 0, moved: float = 0) -> Step:
    return Step(Memory(0, 0, 0, 0, 0, 0, round(peak), "loss"), round(flops), round(moved), 2, 1000)


@pytest.mark.parametrize(("share", "verdict"), [(0.85, "fits"), (0.95, "close"), (1.05, "close"), (1.15, "no")])
def test_a_tenth_around_the_memory_of_a_gpu_is_close(share: float, verdict: str):
    gpu = known()["A10"]
    found = fit(step_of(share * gpu.bytes - GIB), gpu, None, PlanConfig(reserve=1.0))
    assert found.verdict == verdict
    assert found.margin == pytest.approx(1 - share, abs=1e-6)
    assert found.gpus == (1 if share < 1 else 2)


def test_a_reserve_that_leaves_nothing_is_refused():
    gpu = known()["T4"]
    assert fit(step_of(100 * GIB), gpu, None, PlanConfig(reserve=gpu.bytes / GIB - 1)).gpus == 100
    with pytest.raises(BadInput, match="leaves nothing of a GPU with 14"):
        fit(step_of(100 * GIB), gpu, None, PlanConfig(reserve=16.0))


def test_hours_and_cost_follow_from_flops_and_bytes():
    gpu = known()["A100"]
    settings = PlanConfig(tokens=10_000, efficiency=0.5)
    found = fit(step_of(1, flops=312e12 * 0.5 * 1800, moved=2039e9 * 0.5 * 1800), gpu, 1.8, settings)
    assert found.hours == pytest.approx(10)
    assert found.cost == pytest.approx(18)


def test_every_gpu_names_its_sources():
    for name, gpu in known().items():
        assert gpu.datasheet.startswith("https://"), name
        assert gpu.capacity.startswith("https://"), name
        assert gpu.half > gpu.single
    assert list(named(["a100", "t4"])) == ["A100", "T4"]
    assert not known()["T4"].bfloat16


def test_a_dictionary_takes_memory_by_features_and_width():
    one, two = (dictionary(64, PlanConfig(features=features)).memory for features in (512, 1024))
    assert two.optimizer == 2 * two.weights
    assert one.peak < two.peak < 2.1 * one.peak


# The command


def test_the_command_writes_a_record_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, out = config_of(tmp_path / "model", dtype="bfloat16"), tmp_path / "plan"
    given = ["--lengths", "16", "--batches", "1", "--checkpointing", "on"]
    prices = ["--price", "A10=1.8,t4=0.35", "--out", str(out)]
    assert run(["plan", str(folder), "--gpu", "T4,A10", *given, *prices]) == 0
    shown = capsys.readouterr().out
    assert "4bit" in shown
    assert "✓" in shown
    record = records.load(PlanRecord, out / "plan.json")
    assert record.prices == {"A10": 1.8, "T4": 0.35}
    assert {cell.task for cell in record.cells} == set(PlanConfig().tasks)
    page = (out / "plan.html").read_text(encoding="utf-8")
    assert "does not fit" not in page
    assert "(fits;" in page
    assert run(["plan", str(folder), "--gpu", "T4", *given, "--tasks", "dictionary", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == PlanRecord.SCHEMA


def test_rows_are_by_default_no_longer_than_the_context(tmp_path: Path):
    tasks = PlanConfig(tasks=("harvest",), batches=(1,))
    for context, lengths in ((4096, {512, 2048}), (1024, {512, 1024}), (64, {64})):
        folder = config_of(tmp_path / str(context), max_position_embeddings=context)
        assert {cell.length for cell in plan(folder, config=tasks).cells} == lengths


def test_a_page_says_what_does_not_fit(tmp_path: Path):
    big = config_of(
        tmp_path / "model", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, dtype="bfloat16"
    )
    found = unsleep.plan(big, ["T4"], config=PlanConfig(lengths=(16,), batches=(1,), checkpointing="off"))
    assert found.model.blocks == 80
    assert found.cell("full").fits["T4"].verdict == "no"
    assert "does not fit" in report(tmp_path, found).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--gpu", "B300"], "--gpu is 'B300'; expected one of T4, A10"),
        (["--price", "A100"], "--price is 'A100'"),
        (["--price", "A100=cheap"], "--price is 'A100=cheap'"),
        (["--gpu", "T4", "--price", "A100=1"], "--price is 'A100'; expected one of the GPUs that are planned for, T4"),
        (["--price", "T4=-1"], "at least 0"),
        (["--lengths", "4096"], "the context of"),
        (["--lengths", "1"], "at least 2"),
        (["--batches", "0"], "at least 1"),
        (["--efficiency", "0"], "a share above 0"),
        (["--efficiency", "1.5"], "a share above 0"),
        (["--rank", "0"], "at least 1"),
        (["--modules", "nothing"], "LoRA on nothing"),
        (["--reserve", "-1"], "at least 0"),
    ],
)
def test_half_understood_input_is_refused(given: list[str], said: str, tmp_path: Path, capsys: Any):
    folder = config_of(tmp_path / "model")
    short = [] if "--lengths" in given else ["--lengths", "16"]
    assert run(["plan", str(folder), *given, *short, "--out", str(tmp_path / "plan")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "plan").exists()


@pytest.mark.parametrize("field", ["optimizer", "precision", "checkpointing", "quantize", "dtype"])
def test_an_unknown_choice_is_refused_with_the_list(field: str):
    with as_in_use(), pytest.raises(BadInput, match=f"plan {field} is 'no such'; expected one of"):
        PlanConfig(**{field: "no such"})  # type: ignore[arg-type]


def test_an_unknown_task_is_refused_with_the_list():
    with as_in_use(), pytest.raises(BadInput, match="expected one of full, lora"):
        PlanConfig(tasks=("fine-tune",))  # type: ignore[arg-type]


def test_what_has_no_config_of_a_language_model_is_refused(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"has no config\.json"):
        plan(tmp_path / "empty")
    with pytest.raises(BadInput, match=r"is a \.gguf file"):
        plan(tmp_path / "model.gguf")
    with pytest.raises(BadInput, match="is no folder"):
        plan("./nothing")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(BadInput, match="no causal language model can be built"):
        plan(tmp_path / "other")
    base = save_base(tmp_path / "base")
    with pytest.raises(BadInput, match=f"it is an adapter over {base}: give that"):
        plan(save_adapter(tmp_path / "adapter", base))


def test_the_dtype_is_that_of_the_checkpoint(tmp_path: Path):
    folder = config_of(tmp_path)
    assert plan(folder, config=SMALL).model.dtype == "float32"
    save_base(tmp_path, dtype=torch.bfloat16)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert plan(folder, config=SMALL).model.dtype == "bfloat16"
    assert plan(folder, config=PlanConfig(tasks=("harvest",), dtype="float16", lengths=(16,))).model.dtype == "float16"


# Figures in the docs


def test_the_tables_of_the_docs_are_those_of_the_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import plan_question

    written = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    for line in [*plan_question.question(), *plan_question.gpus()]:
        assert line in written
    sys.modules.pop("plan_question")


def test_recorded_peaks_are_close_to_the_plans():
    found = json.loads((ROOT / "benchmarks" / "results" / "plan.json").read_text())
    errors = [abs(row["error"]) for row in found["measured"].values()]
    assert found["cells"] == len(errors)
    assert sum(error <= 0.15 for error in errors) >= 12
    assert found["largest_error"] == max(errors)
