"""Command that explains features: explain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, arg

import unsleep
from unsleep.base import store
from unsleep.cli.console import Bars, hint, say
from unsleep.cli.shared import Model, Out, Placed, Placement, belonging, load_dictionaries, own_replies
from unsleep.core import BadInput, Site
from unsleep.dictionaries.coders import Coder
from unsleep.explanations.explained import Compared, ExplainConfig, Explanations
from unsleep.explanations.run import MARK, ExplainedSite
from unsleep.explanations.scoring import METRICS
from unsleep.explanations.statistics import FeatureStatistics
from unsleep.explanations.streaming import StatisticsConfig
from unsleep.explanations.text import Source
from unsleep.prompts import sets


def explain(
    model: Model,
    dictionaries: tuple[Path, ...],
    out: Out,
    prompts: tuple[Path, ...] = (),
    passages: tuple[Path, ...] = (),
    reply_tokens: int = 0,
    sites: Annotated[tuple[str, ...], arg(aliases=["--site"])] = (),
    any_model: bool = False,
    show: int = 5,
    placement: Placed = Placement(),
    statistics: OmitArgPrefixes[StatisticsConfig] = StatisticsConfig(),
    config: OmitArgPrefixes[ExplainConfig] = ExplainConfig(),
    json: bool = False,
) -> int:
    """Explain every feature of dictionaries: statistics over text, a predicate learned on half of it, its scores.

    Args:
        model: Hub id, folder, adapter folder, .gguf file or alias.
        dictionaries: Folders of dictionaries, one per Site.
        out: Folder for explain.json and a folder per Site; an interrupted run in it is resumed.
        prompts: Files of prompts, taken under the chat template.
        passages: Files of plain text, a passage per line.
        reply_tokens: Length of the model's own replies to the prompts, which are read too; 0 for none.
        sites: Sites whose features are explained; all of the dictionaries' by default.
        any_model: Accept dictionaries of another model.
        show: Explanations that are printed per Site, the best by detection.
        json: Print explain.json.
    """
    store.check_place(out, MARK)
    if reply_tokens < 0 or (reply_tokens and not prompts):
        raise BadInput(f"--reply-tokens is {reply_tokens} with {len(prompts)} files of prompts; expected at least one")
    asked, read = [sets.read_prompts(p) for p in prompts], [sets.read_prompts(p) for p in passages]
    if not asked and not read:
        raise BadInput("there is no text; give --prompts, --passages or both")
    coders = _at(load_dictionaries(dictionaries), sites)
    with Bars():
        loaded = placement.load(model, plain=not asked)
        coders = belonging(coders, loaded, any_model)
        texts = [
            Source(p, replies=tuple(own_replies(loaded, p, reply_tokens)) if reply_tokens else None) for p in asked
        ]
        texts += [Source(p, plain=True) for p in read]
        record = unsleep.explain(loaded, coders, texts, out, statistics, config)
    for row in record.sites:
        for note in row.notes:
            hint(f"{row.site}: {note}")
    lines = [line for row in record.sites for line in (*_figures(row, record.tokens), *_best(out, row.site, show))]
    say(record, json, "\n".join([*lines, f"Saved in {out}"]))
    return 0


def _at(dictionaries: list[Coder], sites: tuple[str, ...]) -> list[Coder]:
    """The dictionaries of some Sites."""
    wanted = [Site.parse(s) for s in sites]
    have = {d.site: d for d in dictionaries}
    lacking = [site for site in wanted if site not in have]
    if lacking:
        raise BadInput(
            f"there is no dictionary at {lacking[0]}; those given are at {', '.join(map(str, have)) or 'no Site'}"
        )
    return [have[site] for site in dict.fromkeys(wanted)] or dictionaries


def _figures(row: ExplainedSite, tokens: int) -> list[str]:
    """Mean scores, a column for each method."""
    lines = [
        f"{row.site}: {row.features:,} features over {tokens:,} tokens, {row.dead:,} dead, {row.explained:,} explained"
    ]
    methods = list(dict.fromkeys(each.method for each in row.compared))
    if methods:
        lines.append(f"  {'mean of':<11}" + "".join(f"{method:>24}" for method in methods))
    found = {(each.metric, each.method): each for each in row.compared}
    for metric in METRICS:
        cells = [_cell(found.get((metric, method))) for method in methods]
        if any(cells):
            lines.append(f"  {metric:<11}" + "".join(f"{cell or '–':>24}" for cell in cells))
    return lines


def _cell(each: Compared | None) -> str:
    return "" if each is None else f"{each.value.value:.2f} [{each.value.low:.2f}, {each.value.high:.2f}]"


def _best(out: Path, site: Site, show: int) -> list[str]:
    """The explanations that detect best."""
    folder = out / str(site)
    every = Explanations.load(folder, FeatureStatistics.load(folder)).explanations
    scored = [(found[0].scores.get("detection"), feature, found[0].text) for feature, found in every.items()]
    ranked = sorted(((s.value, f, text) for s, f, text in scored if s), key=lambda row: (-row[0], row[1]))
    return [f"  feature {f}, detection {value:.2f}: {text}" for value, f, text in ranked[:show]]
