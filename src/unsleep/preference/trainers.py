"""Training through TRL's stable trainers, on token ids of ours: SFT, DPO, RLOO, GRPO and reward models.

TRL is imported here only (extra `unsleep[rl]`). What differs from its defaults:

- no telemetry, no model card, no look-up on the hub, no printed log, no mixed precision or gradient checkpointing;
- data are token ids under the model's own chat template (`tokens`);
- without an adapter, the reference is the model itself: neither a copy of the adapter nor a reload by name;
- states to resume from hold the trained weights alone, as safetensors, and count once they are whole;
- a reward that fails stops the training, and so does a loss that is not finite.

Afterwards the network is as before but for its trained weights.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch

from unsleep.base import store
from unsleep.base.context import progress
from unsleep.core import BadInput
from unsleep.models.load import quiet_transformers, save_plain
from unsleep.models.model import LoadedModel
from unsleep.models.students import Student
from unsleep.models.weights import copy_network, moved
from unsleep.preference.config import PreferConfig, RewardModelConfig
from unsleep.preference.record import Logged
from unsleep.preference.tokens import PairIds
from unsleep.prompts.prompt import Prompt
from unsleep.rewards.reward import Columns, Reward, name_of, scored

Trainer = Literal["SFT", "DPO", "RLOO", "GRPO", "Reward"]
"""A TRL trainer, by the beginning of its class's name."""

IGNORED = -100
"""Label of a token that is not trained."""

ROWS = 200
"""Steps in a record's history, at most."""

STATE, TRAINED = "trainer_state.json", "trained.safetensors"

KEPT = {
    "loss": "loss",
    "reward": "reward",
    "kl": "kl",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "accuracy": "accuracy",
    "margin": "margin",
    "completions/mean_length": "length",
    "entropy": "entropy",
    "grad_norm": "gradient_norm",
    "frac_reward_zero_std": "tied",
}
"""TRL's name of a logged figure → ours."""


@dataclass(frozen=True)
class Asked:
    """Prompts that replies are sampled for, and what scores them."""

    ids: Mapping[str, list[int]]
    """Token ids of each prompt by its key."""
    prompts: Mapping[str, Prompt]
    reward: Reward
    columns: Columns = field(default_factory=dict[str, Sequence[Any]])
    """Further columns that the reward takes, a value per prompt, in the order of `ids`."""


def check_trl() -> None:
    """Raise `BadInput` where TRL is not installed."""
    _classes("SFT")


def _classes(kind: Trainer) -> tuple[Any, Any]:
    """TRL's config and trainer."""
    try:
        with quiet_transformers():
            trl: Any = importlib.import_module("trl")
            return getattr(trl, f"{kind}Config"), getattr(trl, f"{kind}Trainer")  # imported when they are asked for
    except (ImportError, RuntimeError) as error:
        raise BadInput(
            f"preference training needs TRL, which cannot be imported ({error}); pip install 'unsleep[rl]'"
        ) from None


def train_pairs(
    student: Student, ids: Sequence[PairIds], config: PreferConfig | RewardModelConfig, place: Path
) -> list[Logged]:
    """Train on pairs: DPO, SFT on the chosen replies, or a reward model, by the config; returns its history.

    `place` is the folder of the states from which an interrupted training resumes.
    """
    if isinstance(config, RewardModelConfig):
        rows = [{"chosen_ids": p.prompt + p.chosen, "rejected_ids": p.prompt + p.rejected} for p in ids]
        own = {"max_length": None, "center_rewards_coefficient": config.centre or None}
        return _trained(student, "Reward", rows, config, place, "reward model", own)
    if config.method == "dpo":
        rows = [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in ids]
        losses: dict[str, Any] = {"loss_type": ["sigmoid"]}
        if config.nll:
            losses = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, config.nll]}
        return _trained(student, "DPO", rows, config, place, "dpo", {"max_length": None, "beta": config.pull, **losses})
    rows = [{"input_ids": p.prompt + p.chosen, "labels": [IGNORED] * len(p.prompt) + p.chosen} for p in ids]
    own = {"max_length": None, "packing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    return _trained(student, "SFT", rows, config, place, config.method, own)


def train_online(student: Student, asked: Asked, config: PreferConfig, place: Path) -> list[Logged]:
    """Train by RLOO or GRPO on sampled replies that a reward scores; returns the training's history.

    Raises `BadInput` for a reward that tells the samples of no prompt apart, from which nothing is learned.
    """
    keys = list(asked.ids)
    rows = [{"prompt": key} for key in keys]
    own = {
        "num_generations": config.generations,
        "per_device_train_batch_size": config.batch * config.generations,
        "max_completion_length": config.reply_tokens,
        "temperature": config.temperature,
        "beta": config.pull,
        "max_steps": config.steps or max(1, math.ceil(config.epochs * len(keys) / (config.batch * config.accumulate))),
    }
    kind = "RLOO" if config.method == "rloo" else "GRPO"
    history = _trained(student, kind, rows, config, place, config.method, own, asked)
    if history and all(row.figures.get("tied") == 1 for row in history):
        raise BadInput(
            f"reward {name_of(asked.reward)} gives the same to all {config.generations} samples of each prompt, and "
            "nothing is learned; give another, more --generations, or a higher --temperature"
        )
    return history


def _trained(
    student: Student,
    kind: Trainer,
    rows: Sequence[Mapping[str, Any]],
    config: PreferConfig | RewardModelConfig,
    place: Path,
    stage: str,
    own: Mapping[str, Any],
    asked: Asked | None = None,
) -> list[Logged]:
    """Train a student by one of TRL's trainers."""
    config_of, trainer_of = _classes(kind)
    device = student.base.device
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        raise BadInput(
            f"{torch.cuda.device_count()} GPUs are visible, and preference training uses one; set CUDA_VISIBLE_DEVICES "
            "to it"
        )
    steps = config.steps or max(1, math.ceil(config.epochs * len(rows) / (config.batch * config.accumulate)))
    place.mkdir(parents=True, exist_ok=True)
    with _as_before(student.base), _silent():
        import datasets
        import transformers

        arguments = _arguments(config, device, steps, place) | dict(own)
        extra = _reference(student, kind, config, place)
        if asked is not None:
            extra["reward_funcs"] = _reward(asked)
        trainer = _ours(trainer_of, student, asked)(
            model=student.adapted if student.adapted is not None else student.network,
            args=config_of(**arguments),
            train_dataset=datasets.Dataset.from_list([dict(row) for row in rows]),
            processing_class=copy.deepcopy(student.base.tokenizer),
            callbacks=[_callback(stage)],
            **extra,
        )
        if student.adapted is not None and "ref" in student.adapted.peft_config:
            student.adapted.delete_adapter("ref")  # a copy of the new adapter: without it, the reference is the base
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train(resume_from_checkpoint=_last_state(place))
    if trainer.state.global_step < trainer.args.max_steps:
        raise BadInput(f"{stage} stopped after {trainer.state.global_step} of {trainer.args.max_steps} steps")
    return _history(trainer.state.log_history)


def _arguments(
    config: PreferConfig | RewardModelConfig, device: torch.device, steps: int, place: Path
) -> dict[str, Any]:
    """Arguments of every trainer."""
    return {
        "output_dir": str(place),
        "per_device_train_batch_size": config.batch,
        "max_steps": steps,
        "learning_rate": config.rate("reward" if isinstance(config, RewardModelConfig) else config.method),
        "lr_scheduler_type": "linear",
        "warmup_steps": max(1, steps // 10),
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": config.seed,
        "use_cpu": device.type == "cpu",
        "bf16": False,
        "fp16": False,
        "gradient_accumulation_steps": config.accumulate,
        "gradient_checkpointing": config.checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "dataloader_pin_memory": False,
        "report_to": "none",
        "push_to_hub": False,
        "disable_tqdm": True,
        "logging_steps": max(1, math.ceil(steps / ROWS)),
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": config.keep_every,
        "save_total_limit": 1,
    }


def _reference(
    student: Student, kind: Trainer, config: PreferConfig | RewardModelConfig, place: Path
) -> dict[str, Any]:
    """The reference of a full fine-tune: TRL would load the model again, by a name that need not be its own."""
    if student.adapted is not None or isinstance(config, RewardModelConfig):
        return {}
    if kind == "DPO":
        return {"ref_model": moved(copy_network(student.base.network), student.network.dtype)}
    if kind in ("RLOO", "GRPO") and config.pull:
        folder = place / "reference"
        save_plain(student.base, folder)
        cast("Any", student.network.config)._name_or_path = str(folder)
    return {}


def _reward(asked: Asked) -> Callable[..., list[float]]:
    """The reward as TRL calls it."""

    place = {key: i for i, key in enumerate(asked.ids)}

    def call(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        columns = {name: [values[place[key]] for key in prompts] for name, values in asked.columns.items()}
        return scored(asked.reward, [asked.prompts[key] for key in prompts], completions, columns).tolist()

    call.__name__ = name_of(asked.reward)
    return call


def _ours(trainer: Any, student: Student, asked: Asked | None) -> Any:
    """A TRL trainer on token ids that neither sends nor looks anything up."""

    def save_model(self: Any, output_dir: str, _internal_call: bool = False) -> None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {str(i): w for i, w in enumerate(student.weights)}
        store.write_tensors(folder / TRAINED, weights)

    def load(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        held = store.read_tensors(Path(resume_from_checkpoint) / TRAINED)
        with torch.no_grad():
            for i, weight in enumerate(student.weights):
                weight.copy_(held[str(i)])

    def tokenize_prompts(self: Any, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        assert asked is not None
        return [asked.ids[key] for key in prompts], None, {}

    methods: dict[str, Any] = {
        "_send_telemetry": lambda self: None,
        "create_model_card": lambda self, *_, **__: None,
        "_prepare_dataset": lambda self, dataset, *_, **__: dataset,
        "save_model": save_model,
        "_load_from_checkpoint": load,
    }
    if asked is not None:
        methods["_tokenize_prompts"] = tokenize_prompts
    return type(trainer.__name__, (trainer,), methods)


def _callback(stage: str) -> Any:
    """Passes a trainer's progress on, and stops it at a loss that is not finite."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress(f"{stage}: training", state.global_step, state.max_steps)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            loss = (logs or {}).get("loss")
            if isinstance(loss, float) and not math.isfinite(loss):
                raise BadInput(f"the loss of {stage} is {loss} at step {state.global_step}; lower --learning-rate")

    return Progress()


def _last_state(place: Path) -> str | None:
    """The newest whole state of a training; states that were not finished are removed."""
    found: dict[int, Path] = {}
    for folder in place.glob("checkpoint-*"):
        number = folder.name.rpartition("-")[2]
        try:
            store.read_json(folder / STATE)  # written last
        except BadInput:
            store.remove(folder)
            continue
        found[int(number)] = folder
    return str(found[max(found)]) if found else None


def _history(logs: Sequence[Mapping[str, Any]]) -> list[Logged]:
    """The logged figures by step."""
    found: list[Logged] = []
    for row in logs:
        if "loss" in row and "step" in row:
            figures = {KEPT[key]: float(value) for key, value in row.items() if key in KEPT and value is not None}
            found.append(Logged(int(row["step"]), {k: v for k, v in figures.items() if math.isfinite(v)}))
    return found


@contextlib.contextmanager
def _as_before(model: LoadedModel) -> Generator[None]:
    """Undo afterwards what trainers do to a network: its forward, hooks, configs, mode and dropout."""
    network = model.network
    configs: list[Any] = [network.config, network.config.get_text_config(), network.generation_config]
    held = [(config, copy.deepcopy(vars(config))) for config in configs if config is not None]
    dropouts = [(m, m.p) for m in network.modules() if isinstance(m, torch.nn.Dropout)]
    forward = vars(network).get("forward")
    hooks: dict[int, Any] = vars(network.get_input_embeddings())["_forward_hooks"]
    own = set(hooks)
    try:
        yield
    finally:
        network.gradient_checkpointing_disable()
        for added in set(hooks) - own:  # with checkpointing, so that inputs have gradients
            del hooks[added]
        for name in ("_require_grads_hook", "_require_grads_hooks"):
            vars(network).pop(name, None)
        vars(network).pop("forward", None)
        if forward is not None:
            vars(network)["forward"] = forward
        for config, before in held:
            vars(config).clear()
            vars(config).update(before)
        for module, p in dropouts:
            module.p = p
        network.eval()


@contextlib.contextmanager
def _silent() -> Generator[None]:
    """Silence the logs and warnings of TRL and transformers."""
    logger = logging.getLogger("trl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quiet_transformers():
            yield
    finally:
        logger.setLevel(before)
