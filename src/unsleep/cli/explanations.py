"""Command that explains features: explain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, arg

import unsleep
from unsleep.base import records, store
from unsleep.cli.console import Bars, hint, say, visible_line
from unsleep.cli.shared import Model, Out, Placed, Placement, belonging, by_site, load_dictionaries, own_replies
from unsleep.core import BadInput, Site
from unsleep.dictionaries.coders import Coder
from unsleep.explanations.cards import load_cards
from unsleep.explanations.explained import Compared, ExplainConfig, Explanations
from unsleep.explanations.record import Context, FeatureCard
from unsleep.explanations.run import MARK, ExplainedSite, ExplainRecord
from unsleep.explanations.scoring import METRICS
from unsleep.explanations.statistics import FeatureStatistics
from unsleep.explanations.streaming import StatisticsConfig
from unsleep.explanations.text import Source
from unsleep.locate.circuits.record import CircuitRecord, NodeRow
from unsleep.prompts import sets

CONTEXTS, LINE = 2, 60
"""Contexts of a printed feature, and their characters on either side of the token."""


def explain(
    model: Model,
    dictionaries: tuple[Path, ...],
    out: Out,
    prompts: tuple[Path, ...] = (),
    passages: tuple[Path, ...] = (),
    reply_tokens: int = 0,
    sites: Annotated[tuple[str, ...], arg(aliases=["--site"])] = (),
    any_model: bool = False,
    features: tuple[str, ...] = (),
    circuit: Path | None = None,
    show: int = 5,
    placement: Placed = Placement(),
    statistics: OmitArgPrefixes[StatisticsConfig] = StatisticsConfig(),
    config: OmitArgPrefixes[ExplainConfig] = ExplainConfig(),
    json: bool = False,
) -> int:
    """Explain every feature of dictionaries: statistics over text, a predicate learned on half of it, its scores.

    With --features or --circuit and no text, what an earlier run left in --out is printed.

    Args:
        model: Hub id, folder, adapter folder, .gguf file or alias.
        dictionaries: Folders of dictionaries, one per Site.
        out: Folder for explain.json and a folder per Site; an interrupted run in it is resumed.
        prompts: Files of prompts, taken under the chat template.
        passages: Files of plain text, a passage per line.
        reply_tokens: Length of the model's own replies to the prompts, which are read too; 0 for none.
        sites: Sites whose features are explained; all of the dictionaries' by default.
        any_model: Accept dictionaries of another model.
        features: Features that are printed, such as mlp.29/167.
        circuit: Folder made by `unsleep circuit`, whose features with the largest |effect| are printed.
        show: Explanations that are printed: per Site the best by detection, or so many of the circuit's features.
        json: Print explain.json.
    """
    store.check_place(out, MARK)
    if reply_tokens < 0 or (reply_tokens and not prompts):
        raise BadInput(f"--reply-tokens is {reply_tokens} with {len(prompts)} files of prompts; expected at least one")
    asked, read = [sets.read_prompts(p) for p in prompts], [sets.read_prompts(p) for p in passages]
    if not asked and not read and (features or circuit) and (out / MARK).is_file():
        record = records.load(ExplainRecord, out / MARK)
        wanted = _wanted(features, circuit, show, {row.site: row.features for row in record.sites})
        say(record, json, "\n".join(_told(out, wanted, load_dictionaries(dictionaries))))
        _next(out)
        return 0
    if not asked and not read:
        raise BadInput("there is no text; give --prompts, --passages or both")
    coders = _at(load_dictionaries(dictionaries), sites)
    wanted = _wanted(features, circuit, show, {d.site: d.n_features for d in coders})
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
    lines: list[str] = []
    for row in record.sites:
        lines += _figures(row, record.tokens)
        lines += [] if wanted else _best(out, row.site, show)
    say(record, json, "\n".join([*lines, *_told(out, wanted, coders), f"Saved in {out}"]))
    _next(out)
    return 0


def _wanted(
    features: tuple[str, ...], circuit: Path | None, show: int, sizes: Mapping[Site, int]
) -> dict[tuple[Site, int], str]:
    """The features to print, each with what the circuit says of it, whose Sites are among those of `sizes`.

    Raises `BadInput` for a name that is none, and for a feature that does not exist.
    """
    found: dict[tuple[Site, int], str] = {}
    for name in features:
        place, _, number = name.rpartition("/")
        if not place or not number.isdecimal():
            raise BadInput(f"--features names {name!r}; expected features such as mlp.29/167")
        found[Site.parse(place), int(number)] = ""
    _check(found, sizes)
    if circuit is not None:
        nodes = records.load(CircuitRecord, circuit / "circuit.json").nodes
        own: dict[tuple[Site, int], list[NodeRow]] = {}
        for node in sorted(nodes, key=lambda node: -abs(node.effect)):
            if node.kind == "feature" and node.feature is not None and Site.parse(node.place) in sizes:
                own.setdefault((Site.parse(node.place), node.feature), []).append(node)
        for feature, rows in list(own.items())[:show]:
            found[feature] = ", ".join(f"{node.effect:+.2f} nats at {node.role}" for node in rows)
        if not own:
            raise BadInput(f"{circuit} has no feature at {', '.join(map(str, sizes))}, the Sites that are explained")
        _check(found, sizes)
    return found


def _check(wanted: Mapping[tuple[Site, int], str], sizes: Mapping[Site, int]) -> None:
    """Raise `BadInput` for a feature of no dictionary."""
    for site, feature in wanted:
        if site not in sizes:
            raise BadInput(
                f"there is no dictionary at {site} for {site}/{feature}; those given are at "
                f"{', '.join(map(str, sizes))}"
            )
        if feature >= sizes[site]:
            raise BadInput(f"feature {site}/{feature} does not exist; {site} has 0 to {sizes[site] - 1}")


def _told(out: Path, wanted: Mapping[tuple[Site, int], str], dictionaries: Sequence[Coder]) -> list[str]:
    """Lines on some features: explanation, scores, tokens that it writes, strongest contexts."""
    places = [out / str(site) for site in dict.fromkeys(site for site, _ in wanted)]
    cards = by_site(((place, card) for place in places for card in load_cards(place)), dictionaries)
    lines: list[str] = []
    for (site, feature), effect in wanted.items():
        card = cards[site].card(feature)
        lines.append(f"{site}/{feature}: " + "; ".join(part for part in (effect, *_facts(card)) if part))
        for each in card.explanations:
            scores = ", ".join(f"{name} {score.value:.2f}" for name, score in each.scores.items())
            lines.append(f"  {visible_line(each.text)}" + f"  ({scores})" * bool(scores))
        lines += [f"  {_context(each)}" for each in card.contexts[:CONTEXTS]]
    return lines


def _facts(card: FeatureCard) -> Iterator[str]:
    """Density of a feature, and what it writes."""
    yield f"fires at {card.density:.3%} of the tokens" if card.density else "never fires in this text"
    if card.written is not None:
        yield f"{card.written.verb} {' '.join(repr(visible_line(token)) for token in card.written.tokens)}"


def _context(context: Context) -> str:
    """A context in one line, the token in brackets."""
    tokens = [*context.tokens]
    before, token, behind = tokens[: context.at], tokens[context.at], tokens[context.at + 1 :]
    words = f"{''.join(before)[-LINE:]}⟦{token}⟧{''.join(behind)[:LINE]}"
    return f"{context.values[context.at]:.2f} at {visible_line(words)}"


def _next(out: Path) -> None:
    hint(f"next: unsleep explore {out} --out explorer, to look at every feature")


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
