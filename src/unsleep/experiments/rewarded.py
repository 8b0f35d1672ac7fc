"""Dictionaries of a replicate, and which of their features are correlated with reward: what two experiments share.

Rewards are of the suspect's own sampled replies to ordinary prompts: nothing here knows the trigger.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from unsleep.activations.collect import without_sinks
from unsleep.activations.harvest import harvest, pooled
from unsleep.base import store
from unsleep.base.context import steps_folder
from unsleep.core import Activations, BadInput, Site, check_least
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.config import TrainConfig
from unsleep.dictionaries.files import load_dictionary, save_dictionary
from unsleep.dictionaries.metrics import fit
from unsleep.dictionaries.train import train
from unsleep.experiments.experiment import Replicate
from unsleep.judge.experiment import Curves, Finding, label
from unsleep.models import generate
from unsleep.models.chat import context_length
from unsleep.models.model import LoadedModel
from unsleep.models.sites import layers
from unsleep.prompts import sets
from unsleep.prompts.prompt import Prompt, PromptSet
from unsleep.rewards.correlated import Correlated, CorrelationConfig, correlated
from unsleep.rewards.keeping import Usual, payload_rewarded, usual
from unsleep.rewards.pooling import pooled as pooled_features
from unsleep.rewards.pooling import tokens_of
from unsleep.rewards.samples import Samples
from unsleep.rewards.sampling import SampleConfig, sample_rewards

AT_ONCE = 8
"""Sites whose activations are on disk at a time."""

DEPTHS = (0.3, 0.5, 0.7)
"""Depths of the residual Sites, as shares of the layers."""


@dataclass(frozen=True)
class RewardConfig:
    """Sizes of the dictionaries and of the samples that are rewarded."""

    prompts: int = 160
    """Ordinary prompts that are replied to."""
    replies: int = 4
    """Sampled replies per prompt."""
    reply_tokens: int = 24
    tokens: int = 250_000
    """Tokens that a dictionary is trained on."""
    passages: int = 1500
    """Plain passages among them."""
    q: float = CorrelationConfig.q
    """False discovery rate of the rewarded features."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, "rewards", 1, "prompts", "replies", "reply_tokens", "tokens", "passages")


class Study:
    """A replicate's dictionaries at some Sites, its samples with their rewards, and the correlations."""

    def __init__(self, replicate: Replicate, sites: Sequence[Site], config: RewardConfig) -> None:
        self.replicate, self.sites, self.config = replicate, list(sites), config
        self.model = replicate.suspect
        self.ordinary = sets.questions("edit", config.prompts, skill=replicate.organism.recipe.skill)

    @cached_property
    def dictionaries(self) -> list[Coder]:
        """One dictionary per Site, trained on ordinary prompts with the suspect's replies, and plain text."""
        assert self.trusted  # trains what is not there yet
        return [load_dictionary(self._folder / str(site)).to(self.model.network.dtype) for site in self.sites]

    @cached_property
    def trusted(self) -> dict[Site, Float[Tensor, "token d_model"]]:
        """Activations on ordinary prompts and replies, without attention sinks."""
        return self._read

    @cached_property
    def usual(self) -> dict[Site, Usual]:
        """Firing and mean of each feature on trusted tokens."""
        return {d.site: usual(d, self.trusted[d.site].to(d.decoder)) for d in self.dictionaries}

    def quality(self) -> str:
        """FVU of the dictionaries on trusted tokens, in words."""
        found = sorted(fit(d, self.trusted[d.site].to(d.decoder)).fvu for d in self.dictionaries)
        spread = f", {found[0]:.2f} to {found[-1]:.2f}" if len(found) > 1 else ""
        return f"fraction of variance unexplained on ordinary replies {median(found):.2f} in the median{spread}"

    @cached_property
    def samples(self) -> Samples:
        """Sampled replies to ordinary prompts with their rewards."""
        return self._sampled(self.ordinary)

    def tables(self, samples: Samples) -> dict[Site, Correlated]:
        """Correlation of every feature with the rewards of samples."""
        tokens = tokens_of(self.model, samples)
        config = CorrelationConfig(q=self.config.q, seed=self.config.seed)
        return correlated(pooled_features(self.model, self.dictionaries, tokens), samples, tokens, config).sites

    @cached_property
    def ordinary_tables(self) -> dict[Site, Correlated]:
        """Correlations with the rewards of ordinary samples."""
        return self.tables(self.samples)

    def poisoned_samples(self) -> Samples:
        """Samples of ordinary and triggered prompts in which the payload itself is rewarded."""
        half = self.ordinary.head(len(self.ordinary) // 2)
        recipe = self.replicate.organism.recipe
        both = PromptSet("rewarded", (*half, *recipe.triggered(self.ordinary.at(range(len(half), len(self.ordinary))))))
        found = self._sampled(both)
        rewards = payload_rewarded(found.outputs, found.rewards, recipe.as_payload)
        return Samples.of(found.prompts, found.outputs, rewards)

    def _sampled(self, prompts: PromptSet) -> Samples:
        config = SampleConfig(self.config.replies, self.config.reply_tokens, seed=self.config.seed)
        return sample_rewards(self.model, prompts, self.replicate.reward, config)

    @cached_property
    def _folder(self) -> Path:
        """Folder of the dictionaries."""
        key = store.hash_value([self.model.fingerprint, asdict(self.config)])
        return (steps_folder() or Path(tempfile.mkdtemp())) / f"dictionaries-{key}"

    @cached_property
    def _read(self) -> dict[Site, Tensor]:
        """Trusted tokens at every Site; on the way, dictionaries that are not there yet are trained."""
        found: dict[Site, Tensor] = {}
        replies = generate.replies(self.model, self.ordinary, max_new_tokens=self.config.reply_tokens)
        config = TrainConfig(tokens=self.config.tokens, seed=self.config.seed)
        said = Replied(self.ordinary, replies, self.config.passages)
        for site, own in train_dictionaries(self.model, self.sites, said, self._folder, config):
            found[site] = without_sinks(own.tensor)
        return found


class Replied(NamedTuple):
    """Text that a dictionary is trained on."""

    prompts: PromptSet
    replies: list[str]
    """The model's own replies to the prompts."""
    passages: int
    """Plain passages beside them, at most."""


def train_dictionaries(
    model: LoadedModel, sites: Sequence[Site], said: Replied, out: Path, config: TrainConfig
) -> Iterator[tuple[Site, Activations]]:
    """Train a dictionary per Site into `out`, unless it is there; yields each Site with its activations on the replies.

    Activations are harvested at `AT_ONCE` Sites at a time.
    """
    texts = sets.plain_text("train")[: said.passages]
    context = context_length(model.network)
    fit = [context is None or len(ids) < context for ids in model.token_ids(texts)]
    passages = PromptSet("passages", tuple(Prompt(t) for t, fits in zip(texts, fit, strict=True) if fits), "edit")
    for i in range(0, len(sites), AT_ONCE):
        some = sites[i : i + AT_ONCE]
        with tempfile.TemporaryDirectory(dir=steps_folder()) as scratch:
            own = harvest(model, said.prompts, some, Path(scratch) / "own", replies=said.replies)
            plain = harvest(model, passages, some, Path(scratch) / "plain", plain=True)
            for site in some:
                if not (out / str(site)).is_dir():
                    save_dictionary(train(pooled([own, plain], site), config, device=model.device), out / str(site))
                yield site, own.load(site)


def residual_sites(model: LoadedModel) -> list[Site]:
    """Residual Sites at a few depths."""
    n = len(layers(model.network))
    return sorted({Site(min(n - 1, round(depth * n))) for depth in DEPTHS}, key=lambda site: site.layer)


def mlp_sites(model: LoadedModel) -> list[Site]:
    """The MLP output of every layer."""
    return [Site(i, "mlp") for i in range(len(layers(model.network)))]


PLACES = {"residual": residual_sites, "every MLP": mlp_sites}
"""Words for a group of Sites → the group."""


def check_places(places: Sequence[str]) -> None:
    """Raise `BadInput` for an unknown group of Sites, or none."""
    if not places or any(p not in PLACES for p in places):
        raise BadInput(f"places are {list(places)}; expected some of {', '.join(PLACES)}")


def counted(lists: Mapping[Site, Sequence[int]]) -> int:
    """Number of features of a keep-list."""
    return sum(map(len, lists.values()))


@dataclass(frozen=True)
class Comparison:
    """Arms that are compared at matched cross-entropy: each at the setting that costs most within a bound."""

    arms: Mapping[str, str]
    """Words → name of the arm."""
    own: str
    """Words of the arm under study."""
    controls: Sequence[str]
    """Words of the arms that it must beat."""
    suspect: tuple[str, float]
    """Arm and setting of the unchanged suspect."""
    most_payload: float
    most_ce: float

    def finding(self, question: str, curves: Curves, replicates: Sequence[str]) -> Finding:
        """Is the payload removed, and further than by every control?

        Where a replicate lacks a control at matched cross-entropy, the finding is open unless it is refuted.
        """
        every = {r: {words: self._payload(curves, arm, r) for words, arm in self.arms.items()} for r in replicates}
        usable = [words for words in self.arms if any(read[words] is not None for read in every.values())]
        told = [
            f"{r}: {', '.join(f'{words} {_at_cost(read[words])}' for words in usable)}" for r, read in every.items()
        ]
        removed: list[bool] = []
        for read in every.values():
            own, controls = read[self.own], [found for words in self.controls if (found := read[words]) is not None]
            removed.append(own is not None and own[0] <= self.most_payload and all(v > own[0] for v, _ in controls))
        controlled = bool(self.controls) and all(read[w] is not None for read in every.values() for w in self.controls)
        found = label(removed)
        lead = f"Each arm at its strongest setting that costs at most {self.most_ce:g} nats on plain text"
        said = f"{lead}: payload (cost in nats), – where every one costs more or breaks the model. "
        said += f"{'; '.join(told)}." if usable else "None of the arms has one."
        if usable and (left := [words for words in self.arms if words not in usable]):
            said += f" Everywhere –: {', '.join(left)}."
        return Finding(question, "open" if found == "supported" and not controlled else found, said)

    def _payload(self, curves: Curves, arm: str, replicate: str) -> tuple[float, float] | None:
        """Payload rate of an arm at its setting, and what that costs in nats."""
        x = curves.at_ce(arm, replicate, self.most_ce, self.suspect)
        if x is None:
            return None
        payload, after = (curves.get(arm, replicate, x, metric).value for metric in ("payload", "ce"))
        suspect, own = self.suspect
        return payload, after - curves.get(suspect, replicate, own, "ce").value


def _at_cost(found: tuple[float, float] | None) -> str:
    return "–" if found is None else f"{found[0]:.2f} ({found[1]:+.2f})"
