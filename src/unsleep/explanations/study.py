"""Ablation study of classes of features: what ablating a class does, beside everything that it could be mistaken for.

    intact           nothing is changed
    reconstruction   x' = x̂ at the Sites of the class: what the dictionaries alone cost
    class            x' = x − Σ_{j∈S} f_j W_dec_j: the class is ablated, the error kept
    random           the same for as many other features, matched in firing rate and strength, drawn 20 times
    pca              the component in the first principal components is replaced by its mean, rank equal to the class's

Every arm answers the same held-out prompts, so that each change against the intact model is paired. Changes of rates
have Newcombe's interval for paired rates, those of means a bootstrap interval over prompts; of the random arm, over
draws and prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.activations.collect import collect, sink_norm, without_sinks
from unsleep.base import store
from unsleep.base.context import kept, progress
from unsleep.base.linear import orthonormal
from unsleep.base.linear import principal as components
from unsleep.base.stats import bootstrap_both, wilson
from unsleep.behaviours import as_payload
from unsleep.core import BadInput, Site, check_least
from unsleep.dictionaries.coders import Coder
from unsleep.explanations.classified import Arm, Metric, StudiedClass, StudyRecord, StudyRow
from unsleep.explanations.lexicons import sentiment
from unsleep.interventions.features import Edit, edits_for
from unsleep.interventions.intervention import Intervention
from unsleep.interventions.subspaces import Projection
from unsleep.judge.controls import firing, matched_random
from unsleep.judge.evaluate import EvalConfig, Panels, refuse_used, reply_all
from unsleep.judge.metrics import Subject
from unsleep.judge.outcomes import RATES, Outcomes, Reference, Scorer, change, outcomes, value
from unsleep.locate.subspaces.disentangle import told_apart
from unsleep.models.model import LoadedModel
from unsleep.prompts import sets
from unsleep.prompts.prompt import PromptSet

SHARES = (*RATES, "sentiment")
"""Metrics that are shares."""


@dataclass(frozen=True)
class StudyConfig:
    """Sizes of an ablation study."""

    draws: int = 20
    """Random sets of features per class."""
    reviews: int = 60
    """Pairs of reviews, on which sentiment is measured; 0 for none."""
    pca: bool = True
    """Ablate principal components too."""
    seed: int = 0
    """Of the random draws."""

    def __post_init__(self) -> None:
        check_least(self, "ablation study", 1, "draws")
        check_least(self, "ablation study", 0, "reviews")


def ablation_study(
    model: LoadedModel,
    dictionaries: Sequence[Coder],
    classes: Mapping[str, Sequence[tuple[Site, int]]],
    panels: Panels,
    judging: EvalConfig,
    config: StudyConfig = StudyConfig(),
    *,
    scorer: Scorer = sentiment,
) -> StudyRecord:
    """Ablate each class of features, and its controls, on held-out prompts.

    Args:
        dictionaries: one a Site.
        classes: name → features, such as `classes.members` gives them.
        panels: held-out prompts, clean and triggered, and plain passages.
        judging: payload and lengths; panels with a prompt of `chosen_on` are refused.
        scorer: the reward: score of a reply, higher being better.

    Returns rows of `payload` and `restored` (skill) on triggered prompts; of `skill`, `degenerate`, `reward` and `kl`
    (nats per token along the intact model's replies) on clean ones; of `sentiment` (pairs of reviews told apart) and
    `ce` on text.

    Raises:
        BadInput: no class, an empty one or one of over half of a dictionary's features, or a feature without a
            dictionary.
        Refused: a panel contains a prompt that the classes were chosen on.
    """
    by_site = {d.site: d for d in dictionaries}
    check(classes, by_site, panels, judging)
    replies = kept(reply_all, Subject("intact", model), panels.clean, judging)
    study = _Study(model, by_site, replace(panels, items=()), judging, config, scorer, replies)
    intact = study.outcomes("intact", ())
    rows = study.rows("", "intact", intact, intact)
    studied: list[StudiedClass] = []
    for name, features in classes.items():
        found, more = study.of_class(name, list(features), intact)
        studied.append(found)
        rows += more
    return StudyRecord(
        model=model.named,
        payload=as_payload(judging.payload).words,
        scorer=getattr(scorer, "__name__", type(scorer).__name__),
        classes=tuple(studied),
        rows=tuple(rows),
        dictionaries={d.site: d.hash for d in dictionaries},
        provenance=store.provenance(config.seed, config=asdict(config), panels=panels.hashes, origin=model.origin),
    )


def check(
    classes: Mapping[str, Sequence[tuple[Site, int]]],
    by_site: Mapping[Site, Coder],
    panels: Panels,
    judging: EvalConfig,
) -> None:
    """Raise for classes that cannot be ablated or controlled, and for prompts that chose them."""
    refuse_used(panels.prompts(), judging.chosen_on)
    if not classes:
        raise BadInput("no class was given; expected at least one, with its features")
    for name, features in classes.items():
        if not features:
            raise BadInput(f"class {name!r} has no features; leave it out, or accept features with a lower score")
        if lacking := [str(site) for site, _ in features if site not in by_site]:
            raise BadInput(f"class {name!r} has a feature at {lacking[0]}, of which there is no dictionary")
        for site in {site for site, _ in features}:
            own, whole = sum(s == site for s, _ in features), by_site[site].n_features
            if 2 * own > whole:
                raise BadInput(
                    f"class {name!r} has {own} of {whole} features at {site}; a matched control needs as many that "
                    "are not in it"
                )


@dataclass(frozen=True, eq=False)
class _Study:
    """The arms of a study."""

    model: LoadedModel
    by_site: Mapping[Site, Coder]
    panels: Panels
    judging: EvalConfig
    config: StudyConfig
    scorer: Scorer
    replies: Sequence[str]
    """The intact model's, to the clean prompts."""

    def of_class(
        self, name: str, features: list[tuple[Site, int]], intact: Outcomes
    ) -> tuple[StudiedClass, list[StudyRow]]:
        """The arms of one class."""
        edits = edits_for(features, list(self.by_site.values()), len(features))
        tokens = self.tokens([edit.site for edit in edits])
        random: list[Outcomes] = []
        fires = {site: firing(self.by_site[site], x) for site, x in tokens.items()}
        for seed in range(self.config.draws):
            drawn = tuple(matched_random(edit, fires[edit.site], self.config.seed + seed) for edit in edits)
            random.append(self.outcomes(f"{name}, random {seed + 1}", drawn))
            progress(f"random controls of {name}", seed + 1, self.config.draws)
        rebuilt = tuple(Edit(edit.site, edit.dictionary, (), "drop") for edit in edits)
        own = self.outcomes(name, edits)
        rows = self.rows(name, "reconstruction", self.outcomes(f"{name}, reconstruction", rebuilt), intact)
        rows += _with_p(self.rows(name, "class", own, intact), random, intact)
        rows += self.random_rows(name, random, intact)
        ranks: dict[Site, int] = {}
        if self.config.pca:
            cut = tuple(principal(edit, tokens[edit.site]) for edit in edits)
            ranks = {each.site: len(each.basis) for each in cut}
            rows += self.rows(name, "pca", self.outcomes(f"{name}, PCA", cut), intact)
        return StudiedClass(name, {edit.site: tuple(sorted(edit.removed)) for edit in edits}, ranks), rows

    def tokens(self, sites: Sequence[Site]) -> dict[Site, Float[Tensor, "token d_model"]]:
        """Activations on all tokens of triggered and clean prompts, without attention sinks."""
        both = PromptSet("both", (*self.panels.triggered, *self.panels.clean))
        found = collect(self.model, both, sites, position="all")
        return {site: without_sinks(each.tensor) for site, each in found.items()}

    def outcomes(self, name: str, changes: Sequence[Intervention]) -> Outcomes:
        """Every metric on every prompt, with interventions in place; a resumable step."""
        panels, config = self.panels, self.config
        judged_on = (panels.hashes, store.hash_value(panels.texts), self.judging.payload, self.judging.reply_tokens)
        made_from = (self.model, judged_on, config.reviews, getattr(self.scorer, "__name__", ""))
        return kept(self._outcomes, name, tuple(changes), made_from=made_from)

    def _outcomes(self, name: str, changes: Sequence[Intervention]) -> dict[str, Tensor]:
        subject = Subject(name, self.model, tuple(changes))
        reference = Reference(Subject("intact", self.model), self.replies) if changes else None
        found = outcomes(subject, self.panels, self.judging, rewards=self._rewards, reference=reference)
        if self.config.reviews:
            sides = (side.head(self.config.reviews) for side in sets.reviews("held_out"))
            found["sentiment"] = torch.tensor(told_apart(subject, sets.Reviews(*sides)), dtype=torch.float64)
        return found

    def _rewards(self, _: PromptSet, replies: Sequence[str]) -> list[float]:
        return [float(self.scorer(reply)) for reply in replies]

    def rows(self, of: str, arm: Arm, own: Outcomes, intact: Outcomes) -> list[StudyRow]:
        """Rows of one arm, paired with the intact model prompt by prompt."""
        found: list[StudyRow] = []
        for metric in _metrics(own):
            x, before = own[metric], intact.get(metric, torch.zeros_like(own[metric]))
            rate = metric in SHARES
            found.append(StudyRow(of, arm, metric, *value(x, rate=rate), *change(before, x, rate=rate), len(x)))
        return found

    def random_rows(self, of: str, random: Sequence[Outcomes], intact: Outcomes) -> list[StudyRow]:
        """Rows of the random draws together."""
        found: list[StudyRow] = []
        for metric in _metrics(random[0]):
            x = torch.stack([each[metric] for each in random])
            changes = x - intact.get(metric, torch.zeros_like(x[0]))
            own, changed = bootstrap_both(x), bootstrap_both(changes)
            if metric in SHARES:
                own, changed = _at_least_wilson(own, x.shape[1], 0.0), _at_least_wilson(changed, x.shape[1], -1.0)
            draws = tuple(changes.mean(1).tolist())
            found.append(StudyRow(of, "random", metric, *own, *changed, x.shape[1], draws))
        return found


def principal(edit: Edit, x: Float[Tensor, "token d_model"]) -> Projection:
    """Ablation of the first principal components of activations, as many as the edit's decoder rows span.

    At least one dimension is left. The ablated component is replaced by its mean; attention sinks are unchanged.
    """
    rank = min(len(orthonormal(edit.dictionary.decoder[list(edit.removed)].float())), x.shape[1] - 1)
    found = components(x)
    return Projection(edit.site, found.rows[:rank], found.mean, edit.made_on, sink_norm=sink_norm(x))


def _metrics(own: Outcomes) -> list[Metric]:
    order: tuple[Metric, ...] = ("payload", "restored", "skill", "degenerate", "reward", "sentiment", "kl", "ce")
    return [metric for metric in order if metric in own]


def _at_least_wilson(figure: tuple[float, float, float], n: int, least: float) -> tuple[float, float, float]:
    """A rate of `n` prompts, or a change of one, with Wilson's bound for none where a bootstrap has no width.

    `least` is the smallest possible value.
    """
    value, low, high = figure
    if low < high:
        return figure
    bound = wilson(0, n)[1]
    return value, max(least, value - bound), min(1.0, value + bound)


def _with_p(rows: Sequence[StudyRow], random: Sequence[Outcomes], intact: Outcomes) -> list[StudyRow]:
    """A class's rows with the rank of its change among the random draws'."""
    found: list[StudyRow] = []
    for row in rows:
        before = intact.get(row.metric, torch.zeros(()))
        drawn = [abs(float((each[row.metric] - before).mean())) for each in random]
        beaten = sum(each >= abs(row.change) - 1e-12 for each in drawn)
        found.append(replace(row, p=(1 + beaten) / (1 + len(drawn))))
    return found
