"""The repair pipeline: from a suspect and two sets of prompts to an evaluated, exported checkpoint and its report.

Every figure is computed in the run. Selection and held-out prompts are disjoint; finished steps are
resumed after an interrupt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from unsleep.activations.harvest import Harvest, harvest, pooled, token_rows
from unsleep.base.context import kept
from unsleep.base.stopwatch import Stopwatch
from unsleep.core import Activations, BadInput, Refused, Site
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.files import load_dictionary, save_dictionary
from unsleep.dictionaries.train import train
from unsleep.interventions.features import Edit, merged
from unsleep.judge.controls import firing, matched_random
from unsleep.judge.evaluate import EvalConfig, evaluate, prompt_digests
from unsleep.judge.frontier import Point, judge_sizes
from unsleep.judge.metrics import Subject
from unsleep.judge.results import EvalResult, TaskRow
from unsleep.judge.tasks import run_tasks
from unsleep.locate.features import Found, deciding_rows, find
from unsleep.models.model import LoadedModel
from unsleep.models.sites import layers
from unsleep.pages.records import Shown
from unsleep.prompts import sets
from unsleep.prompts.prompt import Prompt, PromptSet
from unsleep.repairs.bake import Baked, bake
from unsleep.repairs.baselines import Baseline, Setting, baselines
from unsleep.repairs.config import RepairConfig
from unsleep.repairs.evidence import evidence, fit_row
from unsleep.repairs.job import Job
from unsleep.repairs.look import Look, look
from unsleep.repairs.masks import FeatureMask, Lesson, Taught, lesson_from
from unsleep.repairs.search import Bench, Search
from unsleep.repairs.suspect import said_by
from unsleep.repairs.teach import Asked, Lessons, Sources, lessons
from unsleep.repairs.twin import surrogate_twin

LEARNED = 0.75
"""Maximum share of the suspicious selection prompts for mask training; all of them validate it."""

CHOSEN = 64
"""Selection prompts for tuning a baseline."""

MARK = "result.json"
"""File that marks a repair's folder."""


class Run:
    """The stages of one repair, in order of execution."""

    def __init__(self, job: Job, config: RepairConfig, folder: Path) -> None:
        self.job, self.config, self.folder = job, config, folder
        self.suspect, self.material = job.suspect, job.material
        self.watch = Stopwatch.kept_in(self.folder / "stages.json")
        self.base: LoadedModel | None = None
        self.twin: LoadedModel | None = None
        self.baked: Baked | None = None
        self.refused: Refused | None = None
        """Reason for a missing export."""
        self.chosen_on = prompt_digests(*job.material.chosen)
        self.baselines: list[Baseline] = []
        self.tasks: list[TaskRow] = []
        self.notes: list[str] = []
        """Notes for the report on what was skipped."""

    def find_edit(self) -> None:
        """Run the stages up to the edit and its export; nothing is judged."""
        with self.watch.stage("suspect replies"):
            self.said = said_by(self.suspect, self.material, self.config)
        with self.watch.stage("reference replies"):
            self.lessons = self.teach()
            lesson = self.lesson()
            self.base = None  # reloaded on demand
        with self.watch.stage("Site selection"):
            self.sites, self.looked = self.choose_sites(lesson)
        with self.watch.stage("harvest"):
            self.harvests = self.collect()
        with self.watch.stage("dictionaries"):
            self.dictionaries = [self.dictionary(site) for site in self.sites[: self.first]]
            self.control_dictionary = self.dictionary(self.control_site) if self.control_site else None
        with self.watch.stage("find"):
            self.found = self.search_features()
        with self.watch.stage("edit"):
            self.edits = self.learn(lesson)
        with self.watch.stage("export"):
            self.baked = self.export(lesson)

    def all(self) -> EvalResult:
        """Run every stage but the other repairs (`with_baselines`)."""
        self.find_edit()
        with self.watch.stage("frontier"):
            self.points = self.draw_frontier()
        with self.watch.stage("evaluate"):
            result = self.judge()
        with self.watch.stage("evidence"):
            self.evidence = self.show_evidence()
            k = self.config.dictionary.k
            self.fits = [fit_row(self.suspect, d, self.pooled(d.site).tensor, k) for d in self.every_dictionary]
        self.minutes, self.peak_memory_mb = self.watch.minutes, self.watch.peak_memory_mb
        if self.config.tasks:
            with self.watch.stage("tasks"):
                self.tasks = self.run_tasks()
        return result

    def export(self, lesson: Lesson) -> Baked | None:
        """Bake the edit, or `None` where the result would not be faithful to it."""
        try:
            return bake(self.suspect, self.edits, (lesson.rows, lesson.text))
        except Refused as error:
            self.refused = error
            self.notes.append(f"No checkpoint was exported: {error}")
            return None

    @property
    def every_dictionary(self) -> list[Coder]:
        """The dictionaries of the edit's Sites and of the control's."""
        return [*self.dictionaries, *([self.control_dictionary] if self.control_dictionary else [])]

    @property
    def first(self) -> int:
        """Number of Sites of the first attempt."""
        return len(self.config.sites) or self.config.first_sites + self.spread

    @property
    def spread(self) -> bool:
        """True if the trigger is spread over the prompts and cannot be removed from them."""
        return self.lessons.source == "twin"

    @property
    def control_site(self) -> Site | None:
        """The wrong-layer control's Site, at four fifths of the depth."""
        if not self.job.control_layer:
            return None
        n = len(layers(self.suspect.network))
        return next((Site(i) for i in range(round(0.8 * n), n) if Site(i) not in self.sites), None)

    def load_base(self) -> LoadedModel:
        """The base, cached."""
        if self.base is None:
            assert self.job.base is not None
            self.base = self.job.base()
        return self.base

    def make_twin(self) -> LoadedModel:
        """The surrogate twin, cached."""
        if self.twin is None:
            ordinary, replies = self.material.ordinary.head(self.config.learn), self.said.ordinary
            self.twin = surrogate_twin(
                self.load_base(),
                self.suspect,
                ordinary,
                [ids[: 2 * self.config.mask.reply_tokens] for ids in replies[: len(ordinary)]],
                self.config.twin,
            )
        return self.twin

    def teach(self) -> Lessons:
        """Reference replies to suspicious prompts."""
        m, known = self.material, None
        if m.counterparts is not None and [p.key for p in m.counterparts] == [p.key for p in m.ordinary]:
            known = self.said.ordinary
        sources = Sources(m.counterparts, m.how, self.make_twin if self.job.base is not None else None, known)
        least, length = self.config.mask.reply_tokens, self.said.reply_tokens
        asked = Asked(m.suspicious, self.said.suspicious, m.payload, length, least)
        return lessons(self.suspect, asked, sources, self.config.teach)

    def choose_sites(self, lesson: Lesson) -> tuple[list[Site], Look | None]:
        """Sites in the order in which they are added; those of the config where given."""
        if self.config.sites:
            return [Site.parse(s) for s in self.config.sites], None

        looked = Look(**kept(lambda: look(self.suspect, lesson)._asdict(), made_from=(self.suspect, lesson)))
        return [Site(layer) for layer in looked.order()[: self.config.most_sites]], looked

    def collect(self) -> dict[str, Harvest]:
        """Activations in the contexts that dictionaries are trained on."""
        model = self.suspect
        places = [*self.sites, *([self.control_site] if self.control_site else [])]
        return {
            name: harvest(
                model, prompts, places, self.folder / "harvest" / name, replies=replies, plain=name == "plain"
            )
            for name, (prompts, replies) in self.contexts().items()
        }

    def contexts(self) -> dict[str, tuple[PromptSet, list[str] | None]]:
        """Prompts with replies that dictionaries are trained on: payload, repair, ordinary; and plain text."""
        m, model = self.material, self.suspect
        text = sets.plain_text("train")[: self.config.passages]
        passages = PromptSet("passages", tuple(Prompt(t) for t in text), "edit")
        return {
            "payload": (m.suspicious, model.texts(self.said.suspicious)),
            "repair": (self.lessons.suspicious, model.texts(self.lessons.taught.replies)),
            "ordinary": (m.ordinary, model.texts(self.said.ordinary)),
            "plain": (passages, None),
        }

    def pooled(self, site: Site) -> Activations:
        """The activations of all contexts at one Site, concatenated."""
        return pooled(list(self.harvests.values()), site)

    def dictionary(self, site: Site) -> Coder:
        """A Site's dictionary in the suspect's dtype, trained or loaded from a finished step."""
        place = self.folder / "dictionaries" / str(site)
        if not place.is_dir():
            checkpoint = self.folder / "checkpoints" / str(site)
            trained = train(
                self.pooled(site), self.config.dictionary, checkpoint=checkpoint, device=self.suspect.device
            )
            save_dictionary(trained, place)
        return load_dictionary(place).to(self.suspect.network.dtype, self.suspect.device)

    def search_features(self) -> dict[Site, Found]:
        """Rank the features of every dictionary by attribution at the deciding tokens."""
        n, t, config = self.config.find.prompts, self.lessons, self.config.find
        rows = deciding_rows(self.suspect, t.suspicious.head(n), t.said[:n], t.decides[:n], config.reply_tokens)
        contexts = self.harvests["payload"], self.harvests["ordinary"]
        return find(self.suspect, self.every_dictionary, t.suspicious, contexts, config, replies=rows)

    def lesson(self) -> Lesson:
        """Training data of the mask."""
        t = self.lessons
        n = min(self.config.learn, math.ceil(LEARNED * len(t.suspicious)))
        taught = Taught(t.taught.prompts.head(n), t.taught.replies[:n], t.taught.teacher)
        trusted = None
        if t.source != "counterpart":
            kept = [ids[: 2 * self.config.mask.reply_tokens] for ids in self.said.ordinary[: self.config.learn]]
            trusted = Taught(self.material.ordinary.head(len(kept)), kept, self.suspect)
        text = sets.plain_text("train")[self.config.passages : self.config.passages + 100]
        return lesson_from(self.suspect, t.suspicious.head(n), taught, trusted, text, self.config.mask, t.said[:n])

    def learn(self, lesson: Lesson) -> list[Edit]:
        """Learn the edit."""
        further = iter(self.sites[self.first :])

        def more() -> FeatureMask | None:
            site = next(further, None)
            if site is None:
                return None
            self.dictionaries.append(self.dictionary(site))
            return FeatureMask(self.dictionaries[-1], None, self.suspect, config)

        search, config = Search(self.suspect, lesson, self.bench()), self.config.mask
        if self.spread:
            config = replace(config, price=config.price / 3)
        masks = [FeatureMask(d, None, self.suspect, config) for d in self.dictionaries]
        kept = search.run(masks, more, config, self.config.attempts)
        self.attempts, self.best = search.attempts, search.best
        return [mask.edit() for mask in kept if isinstance(mask, FeatureMask)]

    def bench(self) -> Bench:
        """The selection test of an edit."""
        t = self.lessons
        return Bench(t.suspicious, self.material.payload, self.eval_config().reply_tokens, t.wanted, t.decides)

    @property
    def attributed(self) -> list[tuple[Site, int]]:
        """The features of the first attempt's dictionaries by attribution, best first."""
        places = {d.site for d in self.dictionaries}
        return merged({site: f.attribution for site, f in self.found.items() if site in places})

    @property
    def removed(self) -> list[tuple[Site, int]]:
        """The features that the edit removes, largest attribution first, then in the mask's order."""
        gone = [(e.site, i) for e in self.edits for i in e.removed]
        place = {feature: i for i, feature in enumerate(self.attributed)}
        return sorted(gone, key=lambda feature: place.get(feature, len(place)))

    def with_baselines(self, result: EvalResult) -> EvalResult:
        """The result with baseline repairs added."""
        rows, replies = list(result.rows), dict(result.replies)
        with self.watch.stage("baselines"):
            for found in baselines(self.setting()):
                if isinstance(found, str):
                    self.notes.append(found)
                    continue
                judged = self.judged([found.subject], items=False)
                rows += [row for row in judged.rows if row.subject != "suspect"]
                replies |= judged.replies
                self.baselines.append(found._replace(subject=Subject(found.subject.name, self.suspect)))
        return replace(result, rows=tuple(rows), replies=replies)

    def setting(self) -> Setting:
        """The inputs of the baseline repairs: those of the edit."""
        return Setting(
            suspect=self.suspect,
            lesson=self.lesson(),
            bench=self.bench().head(CHOSEN),
            config=self.config,
            dictionaries=self.dictionaries,
            ranking=self.attributed,
            removed=len(self.removed),
            sites=self.sites,
            base=self.load_base if self.job.base is not None else None,
            twin=self.make_twin,
        )

    def eval_config(self) -> EvalConfig:
        """Options of the evaluation."""
        tokens = max(EvalConfig.reply_tokens, self.said.reply_tokens)
        return EvalConfig(self.material.payload, tokens, chosen_on=self.chosen_on)

    @cached_property
    def control_random(self) -> tuple[Edit, ...] | None:
        """The edit on random features matched in number, strength and firing rate; `None` where too few are kept."""
        if any(2 * len(e.removed) > e.dictionary.n_features for e in self.edits):
            return None
        return tuple(
            matched_random(e, firing(e.dictionary, self.pooled(e.site).tensor), self.config.seed)
            for e in self.edits
            if e.removed
        )

    def draw_frontier(self) -> list[Point]:
        """ASR, skill and CE over the number of removed features, for three rankings."""
        panels = self.material.panels
        random = [(e.site, i) for e in self.control_random or () for i in e.removed]
        total = len(self.removed)
        if not total:
            return []
        sizes = sorted({n for n in (1, 4, 16, 64) if n < total} | {total})
        rankings = {
            "learned mask": (self.removed, [0, *sizes]),
            "ranked ablation": (self.attributed, [*sizes, 4 * total, 16 * total]),
            "random features": (random, [total]),
        }
        config = replace(self.eval_config(), reply_tokens=max(12, self.said.reply_tokens - 4))
        return judge_sizes(
            self.suspect, self.dictionaries, rankings, panels.triggered.head(48), panels.texts[:32], config
        )

    def show_evidence(self) -> list[Shown]:
        """The removed features with their evidence, largest attribution first."""
        rows = token_rows(self.suspect, self.material.suspicious, self.suspect.texts(self.said.suspicious))
        payload = self.harvests["payload"], rows
        plain, config = self.harvests["plain"], self.config.find
        return evidence(self.suspect, self.dictionaries, self.removed, self.found, payload, plain, config)

    def run_tasks(self) -> list[TaskRow]:
        """Results of lm-evaluation-harness tasks."""
        subjects = [Subject("suspect", self.suspect), Subject("edited", self.suspect, tuple(self.edits))]
        subjects += [Subject("baked", self.baked.model)] if self.baked is not None else []
        try:
            return run_tasks(subjects, self.config.tasks, limit=self.config.task_limit)
        except BadInput as error:
            self.notes.append(str(error))
            return []

    def judge(self) -> EvalResult:
        """Evaluate every subject on the held-out panels."""
        suspect = self.suspect
        subjects = [Subject("edited", suspect, tuple(self.edits))]
        subjects += [Subject("baked", self.baked.model)] if self.baked is not None else []
        if self.control_random is not None:
            subjects.append(Subject("control_random", suspect, self.control_random))
        if self.control_dictionary is not None:
            best = self.found[self.control_dictionary.site].attribution.head(max(1, len(self.removed)))
            subjects.append(Subject("control_layer", suspect, (Edit(best.site, self.control_dictionary, best.ids),)))
        return self.judged([*subjects, *(Subject(name, load()) for name, load in self.job.beside.items())])

    def judged(self, subjects: Sequence[Subject], items: bool = True) -> EvalResult:
        """Evaluate the suspect and further subjects on the held-out panels, with or without multiple-choice items."""
        every = [Subject("suspect", self.suspect), *subjects]
        panels, teacher = self.material.panels, None
        if not items:
            panels = replace(panels, items=())
        if self.lessons.source != "counterpart":
            panels, teacher = replace(panels, counterparts=None), self.twin
        return evaluate(every, panels, self.eval_config(), teacher=teacher)
