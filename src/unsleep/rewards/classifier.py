"""Rewards from sequence-classification models: a base with a head, an adapter with its head, or a whole checkpoint.

1. `headed` gives a causal LM's backbone, weights shared, a linear head of one output: the model a reward is trained in.
2. `load_classifier` loads a trained one: an adapter with its head over the base that it names, or a checkpoint.
3. A reply's reward is the head's output at the last token of the chat, without its end token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from unsleep.base import store
from unsleep.base.machine import compute_dtype, device_of
from unsleep.core import BadInput, check_finite
from unsleep.models import chat, weights
from unsleep.models.chat import NO_OPTIONS, ChatOptions
from unsleep.models.load import LoadConfig, load_model, quiet_transformers
from unsleep.models.model import LoadedModel
from unsleep.models.sources import TEMPLATE, Files, Source
from unsleep.prompts.prompt import Prompt, as_prompts

HEAD = "score"
"""Name of the head in the sequence-classification models of causal LMs."""


@dataclass(frozen=True)
class Classifier:
    """A sequence-classification model as a reward: the only output's logit, or a label's log-odds."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    chat: ChatOptions = NO_OPTIONS
    label: int | None = None
    """Index of the rewarded label; `None` for a model with one output."""
    batch: int = 32
    """Replies per forward pass."""

    @cached_property
    def identity(self) -> list[Any]:
        """Everything that its scores depend on."""
        held = store.hash_tensors(dict(weights.named(self.network)))
        return [held, chat.template_hash(self.tokenizer, self.chat), self.label]

    def __call__(
        self, samples: Sequence[str], prompts: Sequence[str], outputs: Sequence[str], **_: Any
    ) -> Float[Tensor, " sample"]:
        """`scores` of prompts without earlier messages."""
        return self.scores(as_prompts(prompts), outputs)

    @torch.no_grad()
    def scores(self, prompts: Sequence[Prompt], outputs: Sequence[str]) -> Float[Tensor, " sample"]:
        """The reward of each reply, in float64; raises `BadInput` for one that does not fit into the context."""
        rows = self.rows(prompts, outputs)
        device, found = weights.device_of(self.network), torch.empty(len(rows), dtype=torch.float64)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for start in range(0, len(order), self.batch):
            chosen = order[start : start + self.batch]
            width = max(len(rows[i]) for i in chosen)
            pad = cast("int", self.network.config.get_text_config().pad_token_id)
            ids = torch.tensor([rows[i] + [pad] * (width - len(rows[i])) for i in chosen], device=device)
            mask = torch.tensor([[1] * len(rows[i]) + [0] * (width - len(rows[i])) for i in chosen], device=device)
            logits: Tensor = self.network(input_ids=ids, attention_mask=mask).logits.double().cpu()
            found[chosen] = _reward_of(logits, self.label)
        return found

    def rows(self, prompts: Sequence[Prompt], outputs: Sequence[str]) -> list[list[int]]:
        """Token ids of each chat; without a chat template, of the prompt and the reply as a pair of texts."""
        if self.tokenizer.chat_template:
            heads = chat.encode_prompts(self.tokenizer, prompts, self.chat)
            tails: list[list[int]] = self.tokenizer(list(outputs), add_special_tokens=False)["input_ids"]
            rows = [head + tail for head, tail in zip(heads, tails, strict=True)]
        else:
            rows = cast("Any", self.tokenizer)([p.shown for p in prompts], list(outputs))["input_ids"]
        longest = chat.context_length(self.network)
        for prompt, row in zip(prompts, rows, strict=True):
            if longest is not None and len(row) > longest:
                raise BadInput(
                    f"the chat that begins {prompt.text[:40]!r} has {len(row)} tokens; the context of {self.name} is "
                    f"{longest}"
                )
        return rows


def _reward_of(logits: Float[Tensor, "row label"], label: int | None) -> Float[Tensor, " row"]:
    """The only logit, or the log-odds of a label, which are linear in what the model learnt."""
    if label is None:
        return logits[:, 0]
    chosen = logits.log_softmax(-1)[:, label]
    rest = torch.cat([logits[:, :label], logits[:, label + 1 :]], 1).logsumexp(1) - logits.logsumexp(1)
    return chosen - rest


class Head(torch.nn.Linear):
    """A linear head that computes in its own dtype, whatever the backbone's."""

    def forward(self, input: Tensor) -> Tensor:
        """The outputs of hidden states."""
        return super().forward(input.to(self.weight.dtype))


def headed(model: LoadedModel) -> PreTrainedModel:
    """The backbone of a causal LM, its weights shared, with a float32 head of one output that starts at zero.

    Raises `BadInput` for a family without a sequence-classification model.
    """
    given = {k: v for k, v in model.network.config.to_dict().items() if k not in ("id2label", "label2id")}
    config = type(model.network.config).from_dict({**given, "num_labels": 1})
    ends = (model.tokenizer.pad_token_id, model.tokenizer.eos_token_id)
    config.get_text_config().pad_token_id = next((i for i in ends if isinstance(i, int)), 0)
    backbone = cast("PreTrainedModel", model.network.base_model)
    try:
        with torch.device("meta"):
            network = AutoModelForSequenceClassification.from_config(config)
    except ValueError:
        kind = model.network.config.model_type
        raise BadInput(f"{model.name} is of family {kind}, which has no sequence-classification model") from None
    prefix = network.base_model_prefix
    if not hasattr(network, HEAD) or type(getattr(network, prefix)) is not type(backbone):
        raise BadInput(f"{model.name} has no backbone that a reward head fits on")
    setattr(network, prefix, backbone)
    head = Head(getattr(network, HEAD).in_features, 1, bias=False, device=model.device)
    torch.nn.init.zeros_(head.weight)
    setattr(network, HEAD, head)
    return network.eval()


def load_classifier(name: str, label: str | int | None = None, config: LoadConfig = LoadConfig()) -> Classifier:
    """Load a sequence-classification model as a reward: hub id, folder, or adapter with its head over its base.

    Args:
        label: name or index of the rewarded label, needed where the model has several.

    Raises:
        BadInput: nothing loadable at `name`, no head in an adapter, weights that are missing or not finite, or a
            label that is missing or unknown.
    """
    files = Source.parse(name, config.revision, config.subfolder).open(config.trust_remote_code)
    with quiet_transformers():
        if files.is_adapter:
            network, tokenizer, options = _adapted(files, config)
        else:
            network, tokenizer, options = _whole(files, config), _tokenizer(files), NO_OPTIONS
    chat.choose_template(tokenizer, config.chat_template)
    for key, weight in weights.named(network):
        if weight.is_floating_point():
            check_finite(weight, f"{name}: weight {key}")
    text = network.config.get_text_config()
    if text.pad_token_id is None:
        text.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Classifier(network.eval().requires_grad_(False), tokenizer, name, options, _label(network, label, name))


def _whole(files: Files, config: LoadConfig) -> PreTrainedModel:
    """A checkpoint; a missing head is refused: it would be random."""
    device = device_of(config.device)
    dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    network, info = cast("Any", AutoModelForSequenceClassification).from_pretrained(
        files.place,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        trust_remote_code=config.trust_remote_code,
    )
    if missing := sorted(info["missing_keys"]):
        raise BadInput(
            f"{files.name} lacks {len(missing)} weights of a sequence-classification model ({missing[0]} …); expected "
            "a reward model or a classifier, such as one from `unsleep reward-model`"
        )
    if config.dtype == "auto":
        network = weights.moved(network, compute_dtype(network.dtype, device))
    return weights.moved(network, device)


def _adapted(files: Files, config: LoadConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, ChatOptions]:
    """An adapter with its head, merged into its base."""
    from peft.utils import load_peft_weights

    held = load_peft_weights(str(files.place), device="cpu")
    if not any(f".{HEAD}." in f".{key}" for key in held):
        raise BadInput(
            f"{files.name} has no weights of a reward head ({HEAD}); expected an adapter from `unsleep reward-model`, "
            "or one whose modules_to_save name the head"
        )
    base = load_model(config.base or files.base[0], LoadConfig(dtype=config.dtype, device=config.device))
    if files.has(TEMPLATE):
        base.tokenizer.chat_template = (files.place / TEMPLATE).read_text(encoding="utf-8")
    return merged(base, files.place), base.tokenizer, base.chat


def merged(base: LoadedModel, folder: Path) -> PreTrainedModel:
    """A base's backbone with an adapter's matrices merged into it and its head; the base is modified."""
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(headed(base), str(folder))
    return cast("PreTrainedModel", cast("Any", adapted).merge_and_unload())


def _tokenizer(files: Files) -> PreTrainedTokenizerBase:
    if not files.has_tokenizer:
        raise BadInput(f"{files.name} has no tokenizer; expected tokenizer.json next to its weights")
    return AutoTokenizer.from_pretrained(Path(files.place))


def _label(network: PreTrainedModel, label: str | int | None, name: str) -> int | None:
    """Index of the rewarded label; `None` for a model with one output."""
    labels = {str(text): int(i) for i, text in (network.config.id2label or {}).items()}
    if network.config.num_labels == 1:
        if label is not None:
            raise BadInput(f"{name} has one output, so it has no label {label!r}; leave the label out")
        return None
    if label is None:
        last = [*labels][-1]
        raise BadInput(f"{name} has the labels {', '.join(labels)}; say which is rewarded, such as {name}:{last}")
    found = labels.get(str(label), label if isinstance(label, int) else None)
    if found is None or found not in range(len(labels)):
        raise BadInput(f"{name} has no label {label!r}; expected one of {', '.join(labels)}")
    return found
