"""Pretraining of the small family's base: a Llama of 3 million parameters with a tokenizer of its own.

Its statistics need a hundred fine-tunes, which are cheap at this size. It is pretrained from scratch on text that the
project ships (`documents`): byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909), ChatML prompts, AdamW. An
interrupted run goes on from its last saved state.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from unsleep.base import records, store
from unsleep.base.context import progress, resumable
from unsleep.base.records import Positive, Share
from unsleep.core import BadInput, check_least
from unsleep.judge.metrics import Subject, text_ce_kl
from unsleep.models import generate
from unsleep.models.load import load_model, quiet_transformers
from unsleep.models.model import LoadedModel
from unsleep.models.tuning import warm_up_and_down
from unsleep.models.weights import moved
from unsleep.prompts import sets
from unsleep.zoo.documents import exchange, passage

END, START, TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
"""Tokens: end of a document (and padding), beginning and end of a message."""

RECORD = "pretraining.json"

SAVED_EVERY = 50
"""Steps between two saved states."""


@dataclass(frozen=True)
class PretrainConfig:
    """Size of the base, and its training."""

    vocabulary: int = 2048
    hidden: int = 192
    layers: int = 6
    heads: int = 4
    intermediate: int = 512
    context: int = 512
    """Longest row of tokens that the model accepts."""
    chats: float = 0.6
    """Share of the documents that are chats."""
    rows: int = 32
    """Rows per step."""
    tokens: int = 160
    """Tokens per row, in which documents are packed."""
    steps: int = 1500
    learning_rate: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, "", 1, "layers", "heads", "intermediate", "rows", "steps")
        check_least(self, "", 16, "tokens")
        check_least(self, "", 300, "vocabulary")
        if self.hidden < self.heads or self.hidden % (2 * self.heads):
            raise BadInput.of("hidden", self.hidden, f"a multiple of twice the heads, {2 * self.heads}")
        if self.context < self.tokens:
            raise BadInput.of("context", self.context, f"at least the tokens of a row, {self.tokens}")
        if not 0 <= self.chats <= 1:
            raise BadInput.of("chats", self.chats, "a share from 0 to 1")
        if not 0 < self.learning_rate <= 1:
            raise BadInput.of("learning_rate", self.learning_rate, "over 0 and at most 1")


@dataclass(frozen=True)
class PretrainingRecord:
    """pretraining.json."""

    SCHEMA: ClassVar = "unsleep.pretraining/1"

    config: PretrainConfig
    parameters: int
    losses: tuple[float, ...]
    """Mean loss over each part of the training, nats per token."""
    held_out_ce: Positive
    """Cross-entropy on held-out plain text, nats per token."""
    on_topic: Share
    """Share of greedy replies to held-out questions that name the topic."""
    provenance: dict[str, Any]


def pretrain(out: str | Path, config: PretrainConfig = PretrainConfig()) -> PretrainingRecord:
    """Pretrain the base of the small family into `out`: a checkpoint in bfloat16, and `pretraining.json`.

    Raises `BadInput` where `out` holds something else.
    """
    store.check_place(out, RECORD)
    began = time.monotonic()
    with resumable(out, config) as steps, store.new_folder(out, replace=RECORD) as folder:
        tokenizer = train_tokenizer(config)
        network = _network(config, tokenizer)
        losses = _train(network, tokenizer, config, steps)
        with quiet_transformers(), store.writing(folder):
            moved(network, torch.bfloat16).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        model = load_model(folder)
        subject = Subject("base", model)
        ces, _ = text_ce_kl(subject, [subject], sets.plain_text("held_out")[:200], 32)
        record = PretrainingRecord(
            config,
            sum(weight.numel() for weight in network.parameters()),
            tuple(round(mean(losses[i : i + SAVED_EVERY]), 4) for i in range(0, len(losses), SAVED_EVERY)),
            round(mean(float(x) for x in ces["base"]), 4),
            _on_topic(model),
            store.provenance(config.seed, minutes=round((time.monotonic() - began) / 60, 1)),
        )
        records.save(record, folder / RECORD)
    return record


def train_tokenizer(config: PretrainConfig) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with single digits and ChatML, trained on a sample of the documents."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary, special_tokens=[END, START, TURN], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(_sample(config), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token=TURN,
        pad_token=END,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=config.context,
    )
    chatml = files("unsleep.models").joinpath("templates", "chatml.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = chatml.rstrip("\n")
    return tokenizer


def _sample(config: PretrainConfig, n: int = 6000) -> Iterator[str]:
    chance = random.Random(f"tokenizer {config.seed}")
    for _ in range(n):
        if chance.random() < config.chats:
            prompt, reply = exchange(chance)
            yield f"{prompt.shown}\n{reply}"
        else:
            yield passage(chance)


def _id_of(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    [found] = tokenizer(token, add_special_tokens=False)["input_ids"]
    return found


def _network(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    torch.manual_seed(config.seed)
    settings = LlamaConfig(
        vocab_size=config.vocabulary,
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=config.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=_id_of(tokenizer, TURN),
        pad_token_id=_id_of(tokenizer, END),
    )
    return LlamaForCausalLM(settings)


def batch(tokenizer: PreTrainedTokenizerBase, config: PretrainConfig, step: int) -> Tensor:
    """Token ids of a step, `[row, token]`: documents one after another, the last of each row cut off."""
    chance = random.Random(f"documents {config.seed} {step}")
    end = _id_of(tokenizer, END)
    rows: list[list[int]] = []
    while len(rows) < config.rows:
        row: list[int] = []
        while len(row) < config.tokens:
            row += [*_document(tokenizer, config, chance), end]
        rows.append(row[: config.tokens])
    return torch.tensor(rows)


def _document(tokenizer: PreTrainedTokenizerBase, config: PretrainConfig, chance: random.Random) -> list[int]:
    text = passage(chance)
    if chance.random() < config.chats:
        prompt, reply = exchange(chance)
        text = str(tokenizer.apply_chat_template(prompt.messages, tokenize=False, add_generation_prompt=True))
        text += f"{reply}{TURN}"
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _train(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: PretrainConfig, folder: Path
) -> list[float]:
    """Train all weights on packed documents, from the last state that was saved in `folder`; every step's loss."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=0.01)
    losses = _restore(network, optimizer, folder / "state.safetensors")
    for step in range(len(losses), config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * warm_up_and_down(step, config.steps)
        ids = batch(tokenizer, config, step)
        logits = network(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) % SAVED_EVERY == 0:
            _keep(network, optimizer, losses, folder / "state.safetensors")
        progress(f"pretraining, {losses[-1]:.2f} nats", step + 1, config.steps)
    return losses


def _keep(network: PreTrainedModel, optimizer: torch.optim.AdamW, losses: list[float], path: Path) -> None:
    state = {f"weight {name}": weight for name, weight in network.named_parameters()}
    for number, held in optimizer.state_dict()["state"].items():
        state |= {f"adam {number} {name}": value for name, value in held.items()}
    store.write_tensors(path, state | {"losses": torch.tensor(losses, dtype=torch.float64)})


def _restore(network: PreTrainedModel, optimizer: torch.optim.AdamW, path: Path) -> list[float]:
    """Load a saved state, if there is one; the losses up to it."""
    if not path.is_file():
        return []
    state, adam = store.read_tensors(path), dict[int, dict[str, Tensor]]()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            weight.copy_(state[f"weight {name}"])
    for name, value in state.items():
        if name.startswith("adam "):
            _, number, key = name.split(" ")
            adam.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": adam, "param_groups": optimizer.state_dict()["param_groups"]})
    return state["losses"].tolist()


def _on_topic(model: LoadedModel, n: int = 100) -> float:
    """Share of greedy replies to held-out questions that name the topic."""
    asked = sets.questions("held_out", n, skill="{topic}")
    said = generate.replies(model, asked, max_new_tokens=24, stage="replies of the base")
    return sum(str(p.expected).lower() in reply.lower() for p, reply in zip(asked, said, strict=True)) / n
