"""The stages that read a concept in texts and steer by it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import unsleep
from unsleep import store
from unsleep.cli.shared import Model, Out, Placed, Placement
from unsleep.console import Bars, say, visible_line
from unsleep.control import RepReader, export_gguf, fit_reader, import_gguf
from unsleep.control.control import Control, Operator
from unsleep.control.passes import Named
from unsleep.control.reading import Method, Reading
from unsleep.core import BadInput, Site
from unsleep.models.sites import all_sites
from unsleep.prompts import sets
from unsleep.report import render_reading


def read(
    model: Model,
    positive: Path,
    negative: Path,
    text: Path,
    out: Out,
    sites: tuple[str, ...] = (),
    method: Method = "pca",
    plain: bool = False,
    seed: int = 0,
    placement: Placed = Placement(),
    json: bool = False,
) -> int:
    """Fit a reader on pairs of prompts and score every layer and token of texts.

    Args:
        model: Hub id, folder, adapter folder, .gguf file or alias.
        positive: File of prompts with the concept; line i makes a pair with line i of `negative`.
        negative: File of prompts without it.
        text: File of texts to read, one a line.
        out: Folder for reading.html, reading.json and vector.gguf.
        sites: Such as resid.12 or mlp.3; none for the residual stream of every layer.
        method: How pairs become directions.
        plain: Take all texts as they are, without the chat template.
        seed: Of whatever is random in the method.
        json: Print the record without the texts as JSON.
    """
    store.check_place(out, "reading.json")
    pairs, texts = _pairs(positive, negative), sets.read_prompts(text)
    places = [Site.parse(site) for site in sites]
    with Bars() as bars:
        loaded = placement.load(model)
        reader, readings = unsleep.read(
            loaded, *pairs, texts.texts, places, method, plain=plain, seed=seed, report=bars
        )
    record = {
        "schema": "unsleep.reading/1",
        **_figures(reader, len(pairs[0])),
        "texts": [_scores(reading) for reading in readings],
        "provenance": store.provenance(seed, model=loaded.fingerprint, prompts=texts.hash),
    }
    page, steers = render_reading(record), _steering(reader)
    with store.new_folder(out, replace="reading.json") as scratch:
        store.write_json(scratch / "reading.json", record)
        store.write_text(scratch / "reading.html", page)
        if steers:
            export_gguf(reader.control_vectors(loaded), scratch / "vector.gguf")
    words = [f"{s}: AUROC {reader.aurocs[s]:.3f}" for s in reader.sites]
    words += [f"Best: {reader.best}. Report: {out / 'reading.html'}"]
    if steers:
        words.append(f"Control vectors of {len(steers)} layers: {out / 'vector.gguf'}")
    say({k: v for k, v in record.items() if k != "texts"}, json, "\n".join(words))
    return 0


def control(
    model: Model,
    prompts: Path,
    out: Out,
    vector: Path | None = None,
    positive: Path | None = None,
    negative: Path | None = None,
    coefficient: tuple[float, ...] = (1.0,),
    operator: Operator = "add",
    tokens: Named = "all",
    layers: tuple[int, int] | None = None,
    keep_norm: bool = False,
    method: Method = "pca",
    reply_tokens: int = 24,
    seed: int = 0,
    placement: Placed = Placement(),
    json: bool = False,
) -> int:
    """Reply to prompts under control by a direction, and without it.

    The direction comes from a file, or from two files of prompts that make pairs.

    Args:
        model: Hub id, folder, adapter folder, .gguf file or alias.
        prompts: File of prompts, one a line.
        out: Folder for control.json, and for vector.gguf where the direction was fitted.
        vector: Control vectors in GGUF, of this command, repeng or llama.cpp.
        positive: File of prompts with the concept; line i makes a pair with line i of `negative`.
        negative: File of prompts without it.
        coefficient: One or more; of a fitted direction, 1 is as far as positive prompts are from negative ones.
        operator: What is done with the vector: see docs/control.md.
        tokens: Which tokens are controlled.
        layers: First and last layer; without it, every layer that has a vector.
        keep_norm: Give each token the norm back that it had.
        method: How pairs become directions.
        reply_tokens: Tokens of each reply.
        seed: Of whatever is random in the method.
        json: Print the replies as JSON.
    """
    _check(operator, coefficient, out)
    asked, pairs = sets.read_prompts(prompts), _chosen(vector, positive, negative)
    with Bars() as bars:
        loaded = placement.load(model)
        if vector is None:
            places = all_sites(loaded.network, ("resid",))
            reader = fit_reader(loaded, *pairs, places, method, seed=seed, report=bars)
            vectors, source = reader.control_vectors(loaded), reader.model
        else:
            vectors, source = import_gguf(vector), ""
        amounts = dict.fromkeys([0.0, *coefficient])
        controls = [Control(vectors.vectors, operator, c, tokens, layers, keep_norm, source) for c in amounts]
        said = unsleep.control(loaded, asked, controls, reply_tokens=reply_tokens, report=bars)
    replies = {f"{c:g}": each for c, each in zip(amounts, said, strict=True)}
    how = {"operator": operator, "tokens": tokens, "layers": layers, "keep_norm": keep_norm}
    record = {
        "schema": "unsleep.control/1",
        **how,
        "prompts": asked.texts,
        "replies": replies,
        "provenance": store.provenance(seed, model=loaded.fingerprint, vector=str(vector) if vector else None),
    }
    with store.new_folder(out, replace="control.json") as scratch:
        store.write_json(scratch / "control.json", record)
        if vector is None:
            export_gguf(vectors, scratch / "vector.gguf")
    words = [*_lines(asked.texts, replies), f"Saved in {out}"]
    if (own := str(loaded.network.config.model_type)) != vectors.model_type:
        words.append(f"Note: the file says that its vectors are of a {vectors.model_type}; the model is a {own}")
    say(record, json, "\n".join(words))
    return 0


def _check(operator: Operator, coefficient: Sequence[float], out: Path) -> None:
    if operator == "contrast":
        raise BadInput("--operator contrast takes a vector a prompt, which a file cannot hold; use it from Python")
    if not coefficient:
        raise BadInput("no coefficient was given; give at least one, such as --coefficient 1")
    store.check_place(out, "control.json")


def _chosen(vector: Path | None, positive: Path | None, negative: Path | None) -> tuple[list[str], list[str]]:
    """The pairs to fit a direction on, empty where it comes from a file."""
    if vector is not None and positive is None and negative is None:
        return [], []
    if vector is not None or positive is None or negative is None:
        raise BadInput("give either --vector, or --positive and --negative: what to steer by is not known")
    return _pairs(positive, negative)


def _pairs(positive: Path, negative: Path) -> tuple[list[str], list[str]]:
    return sets.read_prompts(positive).texts, sets.read_prompts(negative).texts


def _steering(reader: RepReader) -> list[Site]:
    """The Sites whose vectors a GGUF file can hold."""
    return [site for site in reader.sites if site.point == "resid" and site.layer > 0]


def _figures(reader: RepReader, pairs: int) -> dict[str, Any]:
    """What the reader is worth, a figure a Site."""
    return {
        "model": reader.model,
        "method": reader.method,
        "pairs": pairs,
        "sites": [str(s) for s in reader.sites],
        "best": str(reader.best),
        "aurocs": [reader.aurocs[s] for s in reader.sites],
        "gaps": [reader.gaps[s] for s in reader.sites],
        "signs": [reader.signs[s] for s in reader.sites],
    }


def _scores(reading: Reading) -> dict[str, Any]:
    scores: list[list[float]] = reading.scores.tolist()
    return {
        "tokens": list(reading.tokens),
        "own": list(reading.own),
        "scores": [[float(f"{s:.5g}") for s in line] for line in scores],
    }


def _lines(prompts: Sequence[str], replies: dict[str, list[str]]) -> list[str]:
    """Every prompt with its replies beneath it."""
    wide = max(len(c) for c in replies)
    lines: list[str] = []
    for i, prompt in enumerate(prompts):
        lines.append(visible_line(prompt))
        lines += [f"  {c:>{wide}}  {visible_line(said[i])}" for c, said in replies.items()]
    return lines
