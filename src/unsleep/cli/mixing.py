"""Command that answers with several models as one: mix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

import unsleep
from unsleep.base import records, store
from unsleep.base.context import resumable
from unsleep.behaviours import as_payload
from unsleep.cli.console import Bars, say, say_result, visible_line
from unsleep.cli.judge import panels_of
from unsleep.cli.shared import Out, PayloadOptions, Placed, Placement, Shown, own_prompts
from unsleep.core import BadInput
from unsleep.judge.evaluate import EvalConfig, Panels
from unsleep.judge.metrics import Subject
from unsleep.mixing.mixture import Mixture
from unsleep.mixing.record import MixRecord
from unsleep.mixing.rules import MixConfig
from unsleep.models import generate
from unsleep.pages import records as pages
from unsleep.prompts import sets
from unsleep.prompts.prompt import PromptSet

REPLY_TOKENS = 24
"""Default length of replies to prompts."""


def mix(
    models: Annotated[Positional[tuple[str, ...]], arg(metavar="MODEL")],
    out: Out,
    prompts: Path | None = None,
    organism: str | None = None,
    suspicious: Path | None = None,
    ordinary: Path | None = None,
    payload: Shown = PayloadOptions(),
    n: int = 200,
    reply_tokens: int | None = None,
    temperature: float = 0.0,
    config: OmitArgPrefixes[MixConfig] = MixConfig(),
    placement: Placed = Placement(),
    json: bool = False,
) -> int:
    """Answer with several models as one: reply to prompts, or be evaluated on held-out prompts like one model.

    Give prompts; or an organism; or two files and the payload.

    Args:
        models: Two or more models that share a tokenizer, such as a suspect and a trusted model.
        out: Folder for mix.json, and for result.json and report.html of an evaluation.
        prompts: File of prompts to reply to.
        organism: A packaged organism or a folder made by `unsleep plant`, for its held-out panels.
        suspicious: File of triggered prompts; line i is line i of `ordinary` with the trigger.
        ordinary: File of the same prompts without the trigger.
        n: Prompts in each panel of an organism; also, with files too, plain passages and multiple-choice items.
        reply_tokens: Tokens per reply to `prompts`; default 24.
        temperature: Of the replies to `prompts`; 0 decodes greedily, as an evaluation always does.
        json: Print the record, or the evaluation's result, as JSON.
    """
    store.check_place(out, "mix.json")
    wanted = payload.chosen()
    if prompts is not None and any(given is not None for given in (organism, suspicious, ordinary, wanted)):
        raise BadInput("--prompts are replied to; expected no --organism, --suspicious, --ordinary or --payload")
    if prompts is None and (temperature or reply_tokens is not None):
        raise BadInput("--temperature and --reply-tokens are for --prompts; an evaluation decodes greedily")
    if reply_tokens is not None and reply_tokens < 1:
        raise BadInput(f"--reply-tokens is {reply_tokens}; expected at least 1")
    if not temperature >= 0:
        raise BadInput(f"--temperature is {temperature:g}; expected 0 for greedy decoding, or more")
    if prompts is not None:
        asked = sets.read_prompts(prompts)
        with Bars():
            mixture = _loaded(models, config, placement)
            replies = _replies(mixture, asked, reply_tokens or REPLY_TOKENS, temperature, config.seed)
        record = _record(mixture, temperature, asked, replies)
        with store.new_folder(out, replace="mix.json") as scratch:
            records.save(record, scratch / "mix.json")
        lines = [f"{visible_line(p)}\n  {visible_line(r)}" for p, r in zip(record.prompts, replies, strict=True)]
        say(record, json, "\n".join([*lines, f"{mixture.name}. Saved in {out}"]))
        return 0
    judged = own_prompts(organism, suspicious=suspicious, ordinary=ordinary, payload=wanted)
    panels, judging = panels_of(judged, (suspicious, ordinary), wanted, n, frozenset())
    with Bars():
        mixture = _loaded(models, config, placement)
        if judged is not None:
            judged.check_template(mixture)
        _evaluated(mixture, panels, judging, out, json)
    return 0


def _loaded(models: Sequence[str], config: MixConfig, placement: Placement) -> Mixture:
    config.weights_of(len(models))  # refuses an unusable rule before any work
    return unsleep.mix([placement.load(models[0]), *map(placement.load_beside, models[1:])], config)


def _replies(mixture: Mixture, prompts: PromptSet, tokens: int, temperature: float, seed: int) -> list[str]:
    rows, stage = mixture.encode(prompts, tokens), f"replies to {prompts.name}"
    if temperature:
        found = generate.sampled(mixture, rows, max_new_tokens=tokens, temperature=temperature, seed=seed, stage=stage)
    else:
        found = generate.greedy(mixture, rows, max_new_tokens=tokens, stage=stage)
    return mixture.texts(found)


def _evaluated(mixture: Mixture, panels: Panels, judging: EvalConfig, out: Path, json: bool) -> None:
    """Evaluate a mixture as the suspect, and save and print the result."""
    with resumable(out, mixture, panels.hashes, judging.payload, judging.reply_tokens):
        result = unsleep.evaluate([Subject("suspect", mixture)], panels, judging)
    record = pages.record(result, None, model=mixture.fingerprint, origin=mixture.origin)
    summary, title = pages.Summary(model=mixture.name), f"Evaluation of {mixture.name}"
    with store.new_folder(out, replace="mix.json") as scratch:
        records.save(_record(mixture, 0.0, None, []), scratch / "mix.json")
        records.save(pages.page(result, record, title, summary, as_payload(judging.payload)), scratch / "report.json")
        records.save(record, scratch / "result.json")
        unsleep.report(scratch)
    say_result(result, out, json)


def _record(mixture: Mixture, temperature: float, prompts: PromptSet | None, replies: Sequence[str]) -> MixRecord:
    """The record of a mixture and its replies."""
    config, members = mixture.config, mixture.members
    is_swap = config.kind == "swap"
    asked = {} if prompts is None else {"prompts": prompts.hash}
    return MixRecord(
        config.kind,
        tuple(m.named for m in members),
        () if is_swap else config.weights_of(len(members)),
        config.above if is_swap else None,
        temperature,
        () if prompts is None else tuple(p.shown for p in prompts),
        tuple(replies),
        store.provenance(config.seed, model=mixture.fingerprint, origin=mixture.origin, **asked),
    )
