"""Commands that score texts along a direction and steer by it: read, steer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import OmitArgPrefixes

import unsleep
from unsleep.base import records, store
from unsleep.cli.console import Bars, say, visible_line
from unsleep.cli.shared import Model, Out, Placed, Placement
from unsleep.core import BadInput, Site
from unsleep.interventions.conditions import Condition
from unsleep.interventions.gguf_files import ControlVectors, export_gguf, import_gguf
from unsleep.interventions.passes import Named
from unsleep.interventions.steering import Steering
from unsleep.locate import conditional
from unsleep.locate.conditional import LEAST, Gate, SteerRecord, condition_on
from unsleep.locate.reading import Method, Reading, ReadingRecord, RepReader, Scored, fit_reader
from unsleep.models.model import LoadedModel
from unsleep.models.sites import all_sites
from unsleep.pages.reading import render_reading
from unsleep.prompts import sets
from unsleep.prompts.prompt import Prompts, PromptSet


def read(
    model: Model,
    positive: Path,
    negative: Path,
    text: Path,
    out: Out,
    sites: tuple[str, ...] = (),
    method: Method = "pca_center",
    plain: bool = False,
    seed: int = 0,
    placement: Placed = Placement(),
    json: bool = False,
) -> int:
    """Fit a reader on pairs of prompts and score every token of texts at every layer.

    Args:
        model: Hub id, folder, adapter folder, .gguf file or alias.
        positive: File of prompts with the concept, paired by line with `negative`.
        negative: File of prompts without it.
        text: File of texts to score, one per line.
        out: Folder for reading.html, reading.json and vector.gguf.
        sites: Such as resid.12 or mlp.3; default the residual stream after every layer.
        method: Method for a direction from pairs.
        plain: Take all texts without the chat template.
        seed: Random seed.
        json: Print the record without the texts as JSON.
    """
    store.check_place(out, "reading.json")
    pairs, texts = _pairs(positive, negative), sets.read_prompts(text)
    places = [Site.parse(site) for site in sites]
    with Bars():
        loaded = placement.load(model)
        reader, readings = unsleep.read(loaded, *pairs, texts, places, method, plain=plain, seed=seed)
    provenance = store.provenance(seed, model=loaded.fingerprint, origin=loaded.origin, prompts=texts.hash)
    record = _record(reader, len(pairs[0]), readings, provenance)
    page, steers = render_reading(record), _steering(reader)
    with store.new_folder(out, replace="reading.json") as scratch:
        records.save(record, scratch / "reading.json")
        store.write_text(scratch / "reading.html", page)
        if steers:
            export_gguf(reader.control_vectors(loaded), scratch / "vector.gguf")
    words = [f"{s}: AUROC {reader.aurocs[s]:.3f}" for s in reader.sites]
    words += [f"Best: {reader.best}. Report: {out / 'reading.html'}"]
    if steers:
        words.append(f"Control vectors of {len(steers)} layers: {out / 'vector.gguf'}")
    say({k: v for k, v in records.plain(record).items() if k != "texts"}, json, "\n".join(words))
    return 0


STRONG = 4.0
"""Total shift, in gaps between positive and negative prompts, above which a note is printed."""


@dataclass(frozen=True)
class SteeringOptions:
    """Options of steering."""

    coefficient: tuple[float, ...] = (1.0,)
    """One or more; for a fitted direction, 1 is the mean gap between positive and negative prompts."""
    operator: Literal["add", "piecewise", "projection"] = "add"
    """Steering operator (see docs/steering.md)."""
    tokens: Named = "all"
    """Steered tokens."""
    layers: tuple[int, int] | None = None
    """First and last steered layer; default every layer with a vector."""
    keep_norm: bool = False
    """Rescale each token to its norm before steering."""

    def __post_init__(self) -> None:
        if not self.coefficient:
            raise BadInput.of("coefficient", self.coefficient, "at least one, such as 1")

    def controls(self, vectors: ControlVectors, model: str) -> list[Steering]:
        """A `Steering` per coefficient, preceded by coefficient 0, the bare model."""
        return [
            Steering(vectors.vectors, self.operator, c, self.tokens, self.layers, self.keep_norm, model)
            for c in dict.fromkeys([0.0, *self.coefficient])
        ]


def steer(
    model: Model,
    prompts: Path,
    out: Out,
    vector: Path | None = None,
    positive: Path | None = None,
    negative: Path | None = None,
    steering: OmitArgPrefixes[SteeringOptions] = SteeringOptions(),
    when_like: Path | None = None,
    when_unlike: Path | None = None,
    method: Method = "pca_center",
    reply_tokens: int = 24,
    seed: int = 0,
    placement: Placed = Placement(),
    json: bool = False,
) -> int:
    """Reply to prompts with and without steering along a direction.

    The direction comes from a file, or from two files of paired prompts.

    Args:
        model: Hub id, folder, adapter folder, .gguf file or alias.
        prompts: File of prompts, one per line.
        out: Folder for steer.json, and for vector.gguf where the direction was fitted.
        vector: Control vectors in GGUF, of this command, repeng or llama.cpp.
        positive: File of prompts with the concept, paired by line with `negative`.
        negative: File of prompts without it.
        when_like: Steer only prompts that are more like those of this file, such as suspicious ones,
        when_unlike: than like those of this one, at the layer and threshold that separate them best.
        method: Method for a direction from pairs.
        reply_tokens: Tokens per reply.
        seed: Random seed.
        json: Print the replies as JSON.
    """
    if (when_like is None) != (when_unlike is None):
        raise BadInput("only one of --when-like and --when-unlike was given; give both or neither")
    store.check_place(out, "steer.json")
    asked, pairs = sets.read_prompts(prompts), _chosen(vector, positive, negative)
    kinds = [sets.read_prompts(path) for path in (when_like, when_unlike) if path is not None]
    with Bars():
        loaded = placement.load(model)
        places = all_sites(loaded.network, ("resid",))
        if vector is not None:
            vectors = import_gguf(vector)
        else:
            vectors = fit_reader(loaded, *pairs, places, method, seed=seed).control_vectors(loaded)
        source = loaded.fingerprint if vector is None else ""
        controls = steering.controls(vectors, source)
        condition = condition_on(loaded, kinds[0], kinds[1], places) if kinds else None
        said, acts = _replies(loaded, asked, controls, condition, reply_tokens)
    replies = {f"{c.coefficient:g}": tuple(each) for c, each in zip(controls, said, strict=True)}
    c, made_from = condition, {"origin": loaded.origin, "vector": str(vector) if vector else None}
    how = (steering.operator, steering.tokens, steering.layers, steering.keep_norm)
    record = SteerRecord(
        *how,
        condition=c and Gate(c.site, c.comparator, c.threshold, c.pool, c.f1),
        acts=tuple(acts) if c else (),
        prompts=tuple(p.shown for p in asked),
        replies=replies,
        provenance=store.provenance(seed, model=loaded.fingerprint, **made_from),
    )
    with store.new_folder(out, replace="steer.json") as scratch:
        records.save(record, scratch / "steer.json")
        if vector is None:
            export_gguf(vectors, scratch / "vector.gguf")
    words = [*_lines(record.prompts, replies, acts), *_told(condition, acts, kinds), f"Saved in {out}"]
    words += [*_of(vectors, loaded), *(_strong(controls) if vector is None else ())]
    say(record, json, "\n".join(words))
    return 0


def _replies(
    model: LoadedModel, prompts: PromptSet, controls: Sequence[Steering], condition: Condition | None, tokens: int
) -> tuple[list[list[str]], list[bool]]:
    """Replies under each control, and the prompts that it acts on."""
    if condition is None:
        said = unsleep.steer(model, prompts, controls, reply_tokens=tokens)
        return said, [True] * len(prompts)
    found = [conditional.replies(model, prompts, each, condition, max_new_tokens=tokens) for each in controls]
    return [replies for replies, _ in found], found[0][1].tolist()


def _of(vectors: ControlVectors, model: LoadedModel) -> list[str]:
    """A note where vectors name another model type."""
    own = str(model.network.config.model_type)
    if own == vectors.model_type:
        return []
    return [f"Note: the file names the model type {vectors.model_type}; the model is a {own}"]


def _strong(controls: Sequence[Steering]) -> list[str]:
    """A note where fitted vectors add up, over layers, to far more than the gap that they were fitted on."""
    most = max(((abs(c.coefficient) * len(c.sites), len(c.sites)) for c in controls), key=lambda pair: pair[0])
    if most[0] <= STRONG or controls[0].operator == "projection":
        return []
    return [
        f"Note: added at {most[1]} layers, this coefficient moves the residual stream by {most[0]:.0f} times the gap "
        f"between positive and negative prompts; start near {1 / most[1]:.2f}, or give fewer --layers"
    ]


def _told(condition: Condition | None, acts: Sequence[bool], kinds: Sequence[Prompts]) -> list[str]:
    if condition is None:
        return []
    kept = sum(len(texts) // LEAST for texts in kinds)
    return [
        f"Steered: {sum(acts)} of {len(acts)} prompts (marked *), whose similarity at {condition.site} is "
        f"{condition.comparator} than {condition.threshold:.3f}; F1 {condition.f1:.3f} on {kept} held-out prompts"
    ]


def _chosen(vector: Path | None, positive: Path | None, negative: Path | None) -> tuple[Prompts, Prompts]:
    """The pairs to fit a direction on, empty where it comes from a file."""
    if vector is not None and positive is None and negative is None:
        return [], []
    if vector is not None or positive is None or negative is None:
        raise BadInput("there is no direction to steer along; give either --vector, or --positive and --negative")
    return _pairs(positive, negative)


def _pairs(positive: Path, negative: Path) -> tuple[PromptSet, PromptSet]:
    return sets.read_prompts(positive), sets.read_prompts(negative)


def _steering(reader: RepReader) -> list[Site]:
    """The Sites whose vectors a GGUF file can hold."""
    return [site for site in reader.sites if site.point == "resid" and site.layer > 0]


def _record(reader: RepReader, pairs: int, readings: Sequence[Reading], provenance: dict[str, Any]) -> ReadingRecord:
    """The reader's AUROC by Site, and its scores of the texts, to five digits."""
    aurocs, gaps = (tuple(held[s] for s in reader.sites) for held in (reader.aurocs, reader.gaps))
    signs = tuple(reader.signs[s] for s in reader.sites)
    texts = tuple(
        Scored(r.tokens, r.own, tuple(tuple(map(_short, line)) for line in r.scores.tolist())) for r in readings
    )
    return ReadingRecord(
        reader.model, reader.method, pairs, tuple(reader.sites), reader.best, aurocs, gaps, signs, texts, provenance
    )


def _short(score: float) -> float:
    return float(f"{score:.5g}")


def _lines(prompts: Sequence[str], replies: Mapping[str, Sequence[str]], acts: Sequence[bool]) -> list[str]:
    """Every prompt with its replies; steered prompts are marked where only some are."""
    wide = max(len(c) for c in replies)
    lines: list[str] = []
    for i, prompt in enumerate(prompts):
        mark = "" if all(acts) else "* " if acts[i] else "  "
        lines.append(mark + visible_line(prompt))
        lines += [f"  {c:>{wide}}  {visible_line(said[i])}" for c, said in replies.items()]
    return lines
