"""Mixtures: several models that answer as one, token by token or sequence by sequence.

A `Mixture` is a `LoadedModel`: it generates, scores and is judged like any other, with a KV cache for each member. Its
network is a transformers model, so that `network.generate(…)` works too. Rules and sources: see `mixing.rules`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from unsleep.base import store
from unsleep.core import BadInput
from unsleep.mixing.rules import MixConfig, combined
from unsleep.models import chat
from unsleep.models.alike import check_tokens
from unsleep.models.forward import keeps_logits, takes_positions
from unsleep.models.hooks import contiguous_head
from unsleep.models.members import JointCache
from unsleep.models.model import LoadedModel
from unsleep.models.weights import device_of


@dataclass(frozen=True)
class Mixture(LoadedModel):
    """Several models as one; made by `mix`."""

    members: tuple[LoadedModel, ...] = ()
    """The models, in the order of the weights."""
    config: MixConfig = MixConfig()

    @cached_property
    def fingerprint(self) -> str:
        """Content hash of the members' weights and the rule."""
        return store.hash_value([[m.fingerprint for m in self.members], rule_of(self.config, len(self.members))])


def mix(models: Sequence[LoadedModel], config: MixConfig = MixConfig()) -> Mixture:
    """Make a mixture of models that share a tokenizer and a chat template.

    A reply ends at an end token of any member. A model of weight 0 is checked but never runs, so that weights (1, 0)
    give the first model's own logits, bit by bit. The models are not copied: interventions on one act in the mixture.

    Raises `BadInput` for fewer than two models, weights of another number, different tokenizers or chat templates, and
    a mixture among the models.
    """
    weights = config.weights_of(len(models))
    if mixed := [m.name for m in models if isinstance(m, Mixture)]:
        raise BadInput(f"{mixed[0]} is a mixture itself; expected its members, with the weights that they have in all")
    for other in models[1:]:
        check_tokens(models[0], other)
        if other.template != models[0].template:
            raise BadInput(
                f"{models[0].name} and {other.name} have different chat templates; give both the same one with "
                "--chat-template"
            )
    active = [(m, w) for m, w in zip(models, weights, strict=True) if w != 0]
    first = active[0][0]
    lengths = [n for m, _ in active if (n := chat.context_length(m.network)) is not None]
    network = MixtureNetwork([m.network for m, _ in active], [w for _, w in active], config, min(lengths, default=None))
    ends = sorted({end for m, _ in active for end in m.end_ids})
    network.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=first.pad_id)
    rule = rule_of(config, len(models))
    parts = [{"name": m.name, "fingerprint": m.fingerprint, "made_of": [dict(p) for p in m.made_of]} for m in models]
    return Mixture(
        network.eval(),
        first.tokenizer,
        _name(models, weights, config),
        chat=first.chat,
        beside={"mixture": {**rule, "members": parts}},
        members=tuple(models),
        config=config,
    )


def rule_of(config: MixConfig, models: int) -> dict[str, Any]:
    """The rule in JSON: all that identifies a mixture besides its members."""
    if config.kind == "swap":
        return {"kind": "swap", "threshold": config.above}
    rule: dict[str, Any] = {"kind": config.kind, "weights": list(config.weights_of(models))}
    return {**rule, "seed": config.seed} if config.kind == "sequence" else rule


def _name(models: Sequence[LoadedModel], weights: Sequence[float], config: MixConfig) -> str:
    """Such as `0.9 · A + 0.1 · B (arithmetic)`."""
    if config.kind == "swap":
        return f"{models[0].name} with tokens swapped for {models[1].name}'s from ratio {config.above:g}"
    parts = [f"{w:g} · {m.name}" for m, w in zip(models, weights, strict=True)]
    return f"{' + '.join(parts)} ({config.kind})"


class MixtureNetwork(PreTrainedModel, GenerationMixin):
    """The members' networks as one causal LM."""

    _supports_sdpa = True

    def __init__(
        self,
        networks: Sequence[PreTrainedModel],
        weights: Sequence[float],
        config: MixConfig,
        context: int | None,
    ) -> None:
        sizes = [int(cast("Any", network.get_output_embeddings()).weight.shape[0]) for network in networks]
        described: Any = PretrainedConfig()
        described.model_type, described.max_position_embeddings, described.vocab_size = "mixture", context, min(sizes)
        super().__init__(described)
        self.members = nn.ModuleList(networks)
        """The networks of members with a weight other than 0."""
        self.weights, self.mixing = tuple(weights), config
        self.vocabulary = min(sizes)
        """Number of tokens that every member has a logit for."""
        self._draws = torch.Generator().manual_seed(config.seed)

    def forward(
        self,
        input_ids: Int[Tensor, "row position"],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the mixture at the last `logits_to_keep` positions, all for 0, and the members' caches as one."""
        networks = cast("list[PreTrainedModel]", list(self.members))
        joint = past_key_values if isinstance(past_key_values, JointCache) else None
        if past_key_values is not None and joint is None:
            kind = type(past_key_values).__name__
            raise BadInput(f"a mixture was given a {kind}; expected a cache that it returned, or none")
        if position_ids is None and attention_mask is not None and len({takes_positions(n) for n in networks}) > 1:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp_min(0)[:, -input_ids.shape[1] :]
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        found: list[Tensor] = []
        caches: list[Cache | None] = []
        for i, network in enumerate(networks):
            past = joint.parts[i] if joint is not None else None
            logits, cache = _passed(network, given, past, use_cache is not False, logits_to_keep)
            found.append(logits[..., : self.vocabulary].to(input_ids.device))
            caches.append(cache)
        kept = [cache for cache in caches if isinstance(cache, Cache)]
        after = JointCache(kept) if len(kept) == len(networks) else None
        if self.mixing.kind == "sequence":
            if use_cache and after is None:
                raise BadInput("a mixture of kind sequence has a member without a KV cache; expected none")
            serving = joint.serving if joint is not None else None
            serving = self._drawn(len(input_ids)) if serving is None else serving
            logits = _served(found, serving)
            if after is not None:
                after.serving = serving
        else:
            logits = combined(self.mixing, self.weights, found)
        return CausalLMOutputWithPast(logits=cast("Any", logits), past_key_values=after)

    def _drawn(self, rows: int) -> Int[Tensor, " row"]:
        """The member that serves each of so many new sequences."""
        shares = torch.tensor(self.weights, dtype=torch.float64)
        return torch.multinomial(shares, rows, replacement=True, generator=self._draws)

    def get_input_embeddings(self) -> nn.Module:
        """The members' smallest token embedding: a token without a row in it is of no use to the mixture."""
        tables = [cast("Any", network).get_input_embeddings() for network in self.members]
        return min(tables, key=lambda table: len(table.weight))

    def get_output_embeddings(self) -> nn.Module:
        """Unembedding of the first member."""
        return cast("Any", self.members[0]).get_output_embeddings()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """False, so that `generate` leaves the cache to the first forward pass."""
        return False

    def tie_weights(self, *_: Any, **__: Any) -> None:
        """Leave the members' weights as they are."""

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """Raise `BadInput`: a mixture has no checkpoint."""
        raise BadInput("a mixture has no checkpoint of its own; save its members, or merge their weights")


def _passed(
    network: PreTrainedModel, given: dict[str, Tensor | None], past: Cache | None, caching: bool, last: int
) -> tuple[Float[Tensor, "row kept vocabulary"], Cache | None]:
    """A member's logits at the last positions, all for 0, and its cache."""
    device = device_of(network)
    arguments: dict[str, Any] = {name: x.to(device) for name, x in given.items() if x is not None}
    if not takes_positions(network):
        arguments.pop("position_ids", None)
    if past is not None:
        arguments["past_key_values"] = past
    with contiguous_head(network):
        out = network(**arguments, use_cache=caching, **(keeps_logits(network, last) if last else {}))
    return out.logits[:, -last:] if last else out.logits, getattr(out, "past_key_values", None)


def _served(logits: Sequence[Tensor], serving: Int[Tensor, " row"]) -> Float[Tensor, "row kept vocabulary"]:
    """Each row's logits from the member that serves it."""
    out = logits[0].clone()
    for i, each in enumerate(logits):
        rows = (serving == i).to(out.device)
        out[rows] = each[rows].to(out.dtype)
    return out
