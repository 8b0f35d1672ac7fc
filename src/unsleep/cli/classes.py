"""Commands on classes of features: classify, ablation-study."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tyro.conf import OmitArgPrefixes

from unsleep.base import records, store
from unsleep.base.context import resumable
from unsleep.base.functions import function_of
from unsleep.behaviours import Payload
from unsleep.cli.console import Bars, hint, say, visible_line
from unsleep.cli.shared import (
    Model,
    Out,
    PayloadOptions,
    Placed,
    Placement,
    Shown,
    belonging,
    by_site,
    load_dictionaries,
    own_prompts,
)
from unsleep.core import BadInput, Site
from unsleep.dictionaries.coders import Coder
from unsleep.explanations import classes as rules_of
from unsleep.explanations.cards import load_cards
from unsleep.explanations.classified import ClassesRecord, StudyRecord
from unsleep.explanations.evidence import EvidenceConfig, EvidencePrompts, general_texts, organism_prompts
from unsleep.explanations.explained import FILE as EXPLANATIONS
from unsleep.explanations.explained import Explanations
from unsleep.explanations.lexicons import sentiment
from unsleep.explanations.study import StudyConfig
from unsleep.explanations.study import ablation_study as study_of
from unsleep.explanations.votes import FILE as VOTES
from unsleep.explanations.votes import VotesRecord
from unsleep.judge.evaluate import EvalConfig, Panels, organism_config, organism_panels
from unsleep.pages import report
from unsleep.prompts import sets

RECORD = "classes.json"

WORDS = 6
"""Tokens on which a printed feature fires."""


def classify(
    model: Model,
    dictionaries: tuple[Path, ...],
    out: Out,
    organism: str | None = None,
    suspicious: Path | None = None,
    references: Path | None = None,
    payload: Shown = PayloadOptions(),
    classes: Path | None = None,
    statistics: tuple[Path, ...] = (),
    explanations: tuple[Path, ...] = (),
    scorer: str | None = None,
    n: int = 64,
    show: int = 5,
    any_model: bool = False,
    placement: Placed = Placement(),
    config: OmitArgPrefixes[EvidenceConfig] = EvidenceConfig(),
    json: bool = False,
) -> int:
    """Classify dictionary features: trigger, payload, skill, sentiment, reward, language, or classes of your own.

    Give an organism, or two files of as many prompts, the second without the trigger.

    Args:
        model: Suspect: hub id, folder, adapter folder, .gguf file or alias.
        dictionaries: Folders of dictionaries, one per Site.
        out: Folder for SITE/classes.json.
        organism: Model organism whose prompts and near misses are used: folder or alias.
        suspicious: File of triggered prompts.
        references: File of the same prompts without the trigger, or with a near miss, in the same order.
        classes: TOML file of further classes, a table [[rules]] each.
        statistics: Folders made by `unsleep explain`: tokens on which a feature fires, and which it promotes.
        explanations: Folders with explanations.json, judged_classes.json or both: keywords, and a judge's votes.
        scorer: Score of a text for the class reward: a Python function, file.py:function or module:function.
        n: Prompts, at most.
        show: Features that are printed of trigger, payload and skill each, those with the largest effect.
        any_model: Accept dictionaries of another model.
        json: Print the records as JSON.
    """
    rules = (*rules_of.RULES, *(rules_of.read_rules(classes) if classes else ()))
    prompts = _prompts(organism, suspicious, references, payload.chosen(), n)
    scores = function_of(scorer, "--scorer") if scorer is not None else sentiment
    coders = load_dictionaries(dictionaries)
    cards = by_site(((place, card) for place in statistics for card in load_cards(place)), coders)
    said, votes = read_explanations(explanations, coders)
    with Bars():
        suspect = placement.load(model)
        coders = belonging(coders, suspect, any_model)
        with resumable(out, suspect, prompts, rules, config, coders, cards, said, votes, scorer):
            found = rules_of.classify(
                suspect,
                coders,
                prompts,
                rules,
                config,
                scorer=scores,
                cards=cards,
                explanations={site: record.explanations for site, record in said.items()},
                votes=votes,
            )
            for site, record in found.items():
                (out / str(site)).mkdir(parents=True, exist_ok=True)
                records.save(record, out / str(site) / RECORD)
    lines = [*_lines(found), *_strongest(found, said, show), f"Saved in {out}"]
    say({str(site): record for site, record in found.items()}, json, "\n".join(lines))
    hint(
        f"next: unsleep explore DIR --out explorer, where DIR holds {out} and what `unsleep explain` made; or "
        "unsleep ablation-study, to ablate each class"
    )
    return 0


def ablation_study(
    model: Model,
    dictionaries: tuple[Path, ...],
    classes: tuple[Path, ...],
    out: Out,
    only: tuple[str, ...] = (),
    least: float = rules_of.SURE,
    organism: str | None = None,
    suspicious: Path | None = None,
    ordinary: Path | None = None,
    payload: Shown = PayloadOptions(),
    scorer: str | None = None,
    n: int = 100,
    any_model: bool = False,
    placement: Placed = Placement(),
    config: OmitArgPrefixes[StudyConfig] = StudyConfig(),
    json: bool = False,
) -> int:
    """Ablate each class of features on held-out prompts, beside reconstruction, matched random features and PCA.

    Give an organism, or two files of prompts, triggered and ordinary, that did not choose the classes.

    Args:
        model: Suspect: hub id, folder, adapter folder, .gguf file or alias.
        dictionaries: Folders of dictionaries, one per Site.
        classes: Folders with SITE/classes.json, made by `unsleep classify`.
        out: Folder for ablation.json and ablation.html.
        only: Names of the classes that are ablated; all where not given.
        least: Score that a feature of a class must have.
        organism: Model organism whose held-out panels are used: folder or alias.
        suspicious: File of triggered prompts, held out.
        ordinary: File of prompts without the trigger, held out.
        scorer: Score of a reply, the reward: a Python function, file.py:function or module:function.
        n: Prompts in each panel; also, with files too, plain passages.
        any_model: Accept dictionaries of another model.
        json: Print the record as JSON.
    """
    store.check_place(out, "ablation.json")
    read = read_classes(classes)
    panels, judging = _panels(organism, suspicious, ordinary, payload.chosen(), n)
    judging = replace(judging, chosen_on=frozenset(digest for record in read.values() for digest in record.chosen_on))
    scores = function_of(scorer, "--scorer") if scorer is not None else sentiment
    coders = load_dictionaries(dictionaries)
    chosen = chosen_features(read, {d.site: d.hash for d in coders}, only, least)
    with Bars():
        suspect = placement.load(model)
        coders = belonging(coders, suspect, any_model)
        with resumable(out, suspect, panels.hashes, judging.payload, config, coders, chosen, scorer):
            record = study_of(suspect, coders, chosen, panels, judging, config, scorer=scores)
            out.mkdir(parents=True, exist_ok=True)
            records.save(record, out / "ablation.json")
    page = report(out)
    say(record, json, "\n".join([*_study_lines(record), f"Saved in {out}; page: {page}"]))
    return 0


def read_classes(folders: Sequence[Path]) -> dict[Site, ClassesRecord]:
    """Records of classes by Site: each folder has classes.json, or one folder per Site has.

    Raises `BadInput` for a folder without any, and for two of one Site.
    """
    paths = (path for folder in folders for path in store.files_named(RECORD, folder, "unsleep classify"))
    return by_site((path, records.load(ClassesRecord, path)) for path in paths)


def read_explanations(
    folders: Sequence[Path], coders: Sequence[Coder]
) -> tuple[dict[Site, Explanations], dict[Site, VotesRecord]]:
    """Explanations of the features of dictionaries, and a judge's votes on these, by Site.

    Raises `BadInput` for a folder without any, two records of one Site, and one of another dictionary.
    """
    said: list[tuple[Path, Explanations]] = []
    votes: list[tuple[Path, VotesRecord]] = []
    for folder in folders:
        before = len(said) + len(votes)
        for place in (folder, *sorted(path for path in folder.glob("*") if path.is_dir())):
            if (place / EXPLANATIONS).is_file():
                said.append((place / EXPLANATIONS, records.load(Explanations, place / EXPLANATIONS)))
            if (place / VOTES).is_file():
                votes.append((place / VOTES, records.load(VotesRecord, place / VOTES)))
        if len(said) + len(votes) == before:
            raise BadInput(
                f"{folder} has no {EXPLANATIONS} or {VOTES}, and no folder with one; make them with `unsleep explain` "
                "and `unsleep ask`"
            )
    return by_site(said, coders), by_site(votes, coders)


def chosen_features(
    read: Mapping[Site, ClassesRecord], hashes: Mapping[Site, str], only: Sequence[str], least: float
) -> dict[str, list[tuple[Site, int]]]:
    """Features of each class by name, without empty classes.

    Raises `BadInput` for classes of another dictionary, an unknown name or one without a feature, and no class at all.
    """
    for site, record in read.items():
        if hashes.get(site) != record.dictionary:
            raise BadInput(
                f"the classes of {site} are of dictionary {record.dictionary}; --dictionaries has "
                f"{hashes.get(site, 'none')} there. Give the one that was classified"
            )
    known = list(dict.fromkeys(name for record in read.values() for name in record.names))
    if unknown := [name for name in only if name not in known]:
        raise BadInput(f"--only names the class {unknown[0]!r}; expected one of {', '.join(known)}")
    found = {name: rules_of.members(read, name, least) for name in only or known}
    if empty := [name for name in only if not found[name]]:
        raise BadInput(f"class {empty[0]!r} has no feature with a score of {least} or more; lower --least")
    kept = {name: features for name, features in found.items() if features}
    if not kept:
        raise BadInput(f"no class has a feature with a score of {least} or more; lower --least")
    return kept


def _prompts(
    organism: str | None, suspicious: Path | None, references: Path | None, payload: Payload | None, n: int
) -> EvidencePrompts:
    """The organism's prompts of the edit split, or those of the files."""
    given = own_prompts(organism, suspicious=suspicious, references=references, payload=payload)
    if given is not None:
        return organism_prompts(given.recipe, n)
    if suspicious is None or references is None or payload is None:
        raise BadInput("prompts are missing; expected --suspicious, --references and --payload, or --organism")
    asked, others = sets.read_prompts(suspicious, "triggered").head(n), sets.read_prompts(references).head(n)
    return EvidencePrompts(asked, others, others, payload, *general_texts())


def _panels(
    organism: str | None, suspicious: Path | None, ordinary: Path | None, payload: Payload | None, n: int
) -> tuple[Panels, EvalConfig]:
    """The held-out panels and how they are judged."""
    given = own_prompts(organism, suspicious=suspicious, ordinary=ordinary, payload=payload)
    if given is not None:
        return organism_panels(given.recipe, n), organism_config(given.recipe)
    if suspicious is None or ordinary is None or payload is None:
        raise BadInput("prompts are missing; expected --suspicious, --ordinary and --payload, or --organism")
    clean = sets.read_prompts(ordinary, split="held_out", name="clean").head(n)
    asked = sets.read_prompts(suspicious, "triggered", "held_out", name="triggered").head(n)
    return Panels(clean, asked, texts=tuple(sets.plain_text("held_out")[:n])), EvalConfig(payload)


def _lines(found: Mapping[Site, ClassesRecord]) -> list[str]:
    """Number of features of each class, by Site, and of those that explanations alone gave."""
    lines: list[str] = []
    for site, record in found.items():
        counts = Counter(each.name for labelled in record.features.values() for each in labelled.classes)
        told = ", ".join(f"{name} {count}" for name, count in counts.most_common())
        lines.append(f"{site}: {len(record.features)} of {record.size:,} features active enough; {told or 'none'}")
        every = (given for labelled in record.features.values() for given in labelled.grounds.values())
        if by_words := sum("behaviour" not in given for given in every):
            lines.append(f"  {by_words} of these labels by explanations alone")
    return lines


EFFECTS = {"trigger": "payload_effect", "payload": "payload_effect", "skill": "skill_effect"}
"""Class whose features are printed → the figure by which they are ordered."""


def _strongest(found: Mapping[Site, ClassesRecord], said: Mapping[Site, Explanations], show: int) -> list[str]:
    """The features of trigger, payload and skill with the largest effect, and their explanation or tokens."""
    lines: list[str] = []
    for name, figure in EFFECTS.items():
        own: list[tuple[float, float, Site, int]] = []
        for site, record in found.items():
            for feature, labelled in record.features.items():
                score = next((each.score for each in labelled.classes if each.name == name), None)
                effect = labelled.evidence.get(figure)
                if score is not None:
                    own.append((0.0 if effect is None else effect.value, score, site, feature))
        strongest = sorted(own, key=lambda row: (-row[0], -row[1], row[2], row[3]))[:show]
        if strongest:
            lines.append(f"{name}, the strongest {len(strongest)} of {len(own)}:")
        for effect, score, site, feature in strongest:
            explanations = said[site].of(feature) if site in said else ()
            words = found[site].features[feature].words
            fires = f"fires on {' '.join(map(repr, words[:WORDS]))}" if words else ""
            told = explanations[0].text if explanations else fires
            lines.append(f"  {f'{site}/{feature}':<16} score {score:.2f}, {effect:+.2f} nats  {visible_line(told)}")
    return lines


STUDIED = {"payload": "payload", "restored": "skill with the trigger", "skill": "skill", "ce": "cross-entropy"}
"""Metric of a study that is printed → its name."""


def _study_lines(record: StudyRecord) -> list[str]:
    """Change of payload, skill and cross-entropy by class and arm."""
    lines: list[str] = []
    for one in record.classes:
        lines.append(f"{one.name}, {sum(map(len, one.features.values()))} features:")
        for row in record.rows:
            if row.of == one.name and row.metric in STUDIED:
                interval = f"[{row.change_low:+.3f}, {row.change_high:+.3f}]"
                p = f", p {row.p:.2f}" if row.p is not None else ""
                lines.append(f"  {STUDIED[row.metric]:<22} {row.arm:<15} {row.change:+.3f} {interval}{p}")
    return lines
