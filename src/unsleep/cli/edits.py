"""Commands that rank features, build an edit, and bake it into weights: find, edit, bake."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tyro.conf import OmitArgPrefixes

import unsleep
from unsleep.activations.harvest import Harvest, token_rows
from unsleep.base import records, store
from unsleep.cli.console import Bars, say, visible_line
from unsleep.cli.shared import Model, Out, Placed, Placement, belonging, check_format, load_dictionaries, own_replies
from unsleep.core import BadInput, Features, Site
from unsleep.dictionaries.coders import Coder
from unsleep.interventions.features import merged
from unsleep.interventions.files import MARK as EDIT
from unsleep.interventions.files import load_edit, save_edit
from unsleep.judge.evaluate import prompt_digests
from unsleep.locate.features import FeaturesRecord, FindConfig, Found, Listed, with_evidence
from unsleep.models.model import LoadedModel
from unsleep.prompts import pairs, sets
from unsleep.prompts.prompt import PromptSet
from unsleep.repairs.bake import MARK as CHECKPOINT
from unsleep.repairs.bake import BakeConfig, check_bakeable
from unsleep.repairs.edit import EditConfig
from unsleep.repairs.export import export
from unsleep.repairs.masks import Lesson, prepare_lesson

BEGIN = 3
"""Words by which two replies are compared."""


def find(
    model: Model,
    dictionaries: tuple[Path, ...],
    suspicious: Path,
    ordinary: Path,
    out: Out,
    show: int = 12,
    any_model: bool = False,
    placement: Placed = Placement(),
    config: OmitArgPrefixes[FindConfig] = FindConfig(),
    json: bool = False,
) -> int:
    """Rank the features behind the response to suspicious prompts, with evidence for each.

    Args:
        model: Hub id, folder, adapter folder, .gguf file or alias.
        dictionaries: Folders of dictionaries, one per Site, or the folder that contains them.
        suspicious: File of prompts on which the behaviour shows, one per line.
        ordinary: File of prompts on which it does not.
        out: Folder for features.json and its harvests.
        show: Features shown with evidence.
        any_model: Accept dictionaries of another model, such as the suspect's base.
        json: Print the rankings as JSON.
    """
    groups = sets.read_prompts(suspicious, "triggered"), sets.read_prompts(ordinary)
    with Bars():
        loose, loaded = load_dictionaries(dictionaries), placement.load(model)
        loaded_dictionaries = belonging(loose, loaded, any_model)
        found, harvests, rows, _ = _find(loaded, loaded_dictionaries, groups, out, config)
        best = merged({s: f.attribution for s, f in found.items()})[:show]
        entries: list[Listed] = []
        for d in loaded_dictionaries:
            ids = tuple(i for site, i in best if site == d.site)
            scores = dict(zip(found[d.site].attribution.ids, found[d.site].attribution.scores, strict=True))
            features = Features(d.site, d.hash, ids, tuple(scores[i] for i in ids), "attribution")
            shown = with_evidence(loaded, d, features, (harvests[0], rows), harvests[1], config)
            entries += [Listed(d.site, i, scores[i], **vars(shown.evidence[i])) for i in ids]
    entries.sort(key=lambda e: -e.attribution)
    record = FeaturesRecord(tuple(entries), store.provenance(model=loaded.fingerprint, origin=loaded.origin))
    records.save(record, out / "features.json")
    lines = ["site       feature  attribution  suspicious  trusted  promotes"]
    for e in entries:
        rates = f"{e.suspicious_rate:>9.0%}  {e.trusted_rate:>7.2%}"
        promotes = " ".join(repr(visible_line(t)) for t in e.promotes[:4])
        lines.append(f"{e.site!s:<10} {e.id:>7}  {e.attribution:>11.4f}  {rates}  {promotes}")
    say(record, json, "\n".join(lines))
    return 0


def edit(
    model: Model,
    dictionaries: tuple[Path, ...],
    suspicious: Path,
    ordinary: Path,
    out: Out,
    counterparts: Path | None = None,
    part: str | None = None,
    any_model: bool = False,
    placement: Placed = Placement(),
    config: OmitArgPrefixes[EditConfig] = EditConfig(),
    json: bool = False,
) -> int:
    """Choose the features to remove, so that the model shows its skill again on suspicious prompts.

    Args:
        model: Hub id, folder, adapter folder, .gguf file or alias.
        dictionaries: Folders of dictionaries, one per Site, or the folder that contains them.
        suspicious: File of prompts on which the behaviour shows, one per line.
        ordinary: File of prompts on which it does not.
        out: Folder for the edit, complete with the dictionaries it needs.
        counterparts: File with each suspicious prompt without its trigger, line by line.
        part: Trigger text; the suspicious prompts without it are the counterparts. Default: the ordinary prompt of the
            same line if each suspicious one only adds words to it, else the suspicious prompts without the longest text
            that only they share.
        any_model: Accept dictionaries of another model, such as the suspect's base.
        json: Print the edit as JSON.
    """
    store.check_place(out, EDIT)
    groups = sets.read_prompts(suspicious, "triggered"), sets.read_prompts(ordinary)
    given = sets.read_prompts(counterparts) if counterparts else None
    trusted = pairs.counterparts(*groups, given, part).prompts
    with Bars(), store.scratch_folder(out) as scratch:
        loose, loaded = load_dictionaries(dictionaries), placement.load(model)
        loaded_dictionaries = belonging(loose, loaded, any_model)
        found, _, _, said = _find(loaded, loaded_dictionaries, groups, scratch, FindConfig(ablate=0))
        lesson = prepare_lesson(loaded, groups[0], trusted, sets.plain_text("train")[-100:], config.mask)
        ranking = {site: f.attribution for site, f in found.items()}
        edits = unsleep.edit(loaded, loaded_dictionaries, ranking, lesson, config)
    chosen_on = prompt_digests(*groups, trusted)
    save_edit(
        edits,
        out,
        chosen_on=chosen_on,
        provenance=store.provenance(config.mask.seed, model=loaded.fingerprint, origin=loaded.origin),
    )
    removed = {str(e.site): list(e.removed) for e in edits}
    words = [
        f"{site}: {len(ids)} feature{'s' * (len(ids) != 1)} removed ({', '.join(map(str, ids)) or 'none'})"
        for site, ids in removed.items()
    ]
    say({"removed": removed}, json, "\n".join([*words, *_alike(loaded, lesson, said), f"Saved in {out}"]))
    return 0


def bake(
    model: Model,
    edit: Path,
    suspicious: Path,
    ordinary: Path,
    out: Out,
    counterparts: Path | None = None,
    part: str | None = None,
    placement: Placed = Placement(),
    config: OmitArgPrefixes[BakeConfig] = BakeConfig(),
    json: bool = False,
) -> int:
    """Bake an edit into plain weights: a checkpoint that loads without unsleep.

    Args:
        model: The model that the edit was made for.
        edit: Folder made by `unsleep edit`.
        suspicious: File of suspicious prompts, on which the baked model must match the edited one.
        ordinary: File of ordinary prompts; likewise.
        out: Folder for the checkpoint.
        counterparts: As in `unsleep edit`.
        part: As in `unsleep edit`.
        json: Print the measurements as JSON.
    """
    store.check_place(out, CHECKPOINT)
    if Path(model).exists() and Path(model).resolve() == out.resolve():
        raise BadInput(f"{out} is the model itself; choose another folder")
    groups = sets.read_prompts(suspicious, "triggered"), sets.read_prompts(ordinary)
    given = sets.read_prompts(counterparts) if counterparts else None
    trusted = pairs.counterparts(*groups, given, part).prompts
    with Bars():
        edits, _ = load_edit(edit)
        check_bakeable(edits)
        loaded = placement.load(model)
        check_format(edit / EDIT, loaded)
        lesson = prepare_lesson(loaded, groups[0], trusted, sets.plain_text("train")[-100:])
        baked = unsleep.bake(loaded, edits, (lesson.rows, lesson.text), config)
    record = export(baked, loaded, edits, out, base=model)
    say(record, json, f"Baked by {baked.method}; KL to the edited model {baked.kl:.4f} nats per token; saved in {out}")
    return 0


def _find(
    model: LoadedModel,
    dictionaries: Sequence[Coder],
    groups: tuple[PromptSet, PromptSet],
    out: Path,
    config: FindConfig,
) -> tuple[dict[Site, Found], tuple[Harvest, Harvest], list[list[int]], list[str]]:
    """Harvest both groups at the dictionaries' Sites and rank; also returns the suspicious token rows and replies."""
    places = [d.site for d in dictionaries]
    harvests: list[Harvest] = []
    rows: list[list[list[int]]] = []
    said: list[list[str]] = []
    for group, name in zip(groups, ("suspicious", "ordinary"), strict=True):
        replies = own_replies(model, group, config.reply_tokens)
        harvests.append(unsleep.harvest(model, group, places, out / name, replies=replies))
        rows.append(token_rows(model, group, replies))
        said.append(replies)
    pair = harvests[0], harvests[1]
    running = [d.to(model.network.dtype, model.device) for d in dictionaries]
    return unsleep.find(model, running, groups[0], pair, config), pair, rows[0], said[0]


def _alike(model: LoadedModel, lesson: Lesson, said: Sequence[str]) -> list[str]:
    """A warning where counterparts, the training targets, get the same replies as suspicious prompts (`said`)."""
    taught = lesson.rows.at(slice(lesson.n))
    replies = model.texts([ids[kept].tolist() for ids, kept in zip(taught.targets, taught.reply, strict=True)])
    begin = [(one.split()[:BEGIN], other.split()[:BEGIN]) for one, other in zip(replies, said, strict=True)]
    same = [i for i, (one, other) in enumerate(begin) if one == other]
    if not same:
        return []
    return [
        f"Warning: {len(same)} of {lesson.n} counterparts get the same reply as their suspicious prompts "
        f"({visible_line(replies[same[0]])!r}), and the edit was trained on it. If it is the payload, give "
        "other counterparts"
    ]
