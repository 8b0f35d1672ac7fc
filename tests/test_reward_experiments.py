"""Experiments that keep what is rewarded, and those on mixtures and repairs: arms, edits and findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from support.checkpoints import save_base
from support.recipes import recipe_of
from unsleep.base.context import resumable
from unsleep.core import BadInput, Site
from unsleep.experiments import dilution, disentangle, keep_rewarded, pca_union, rewarded
from unsleep.experiments.experiment import Replicate, Setting
from unsleep.interventions.intervention import operation
from unsleep.interventions.replacement import Replacement
from unsleep.judge.experiment import Curves, Measure
from unsleep.mixing.dilution import DilutionRow
from unsleep.organisms import plant

SMALL = rewarded.RewardConfig(prompts=40, replies=2, reply_tokens=4, tokens=2000, passages=20, q=1.0)
THREE = ("a", "b", "c")


def vowels(outputs: Sequence[str], **_: Any) -> list[float]:
    """A reward that every text has."""
    return [sum(text.count(v) for v in "aeiou") + 0.01 * len(text) for text in outputs]


@pytest.fixture(scope="module")
def replicate(tmp_path_factory: pytest.TempPathFactory) -> Replicate:
    base = save_base(tmp_path_factory.mktemp("base"))
    small = {"base": str(base), "chats": 8, "batch": 4, "reply_tokens": 4, "learning_rate": 1e-3, "steps": 1}
    organism = plant(recipe_of(method="full", **small), tmp_path_factory.mktemp("planted") / "mine")
    return Replicate("mine", organism, vowels)


@pytest.fixture(scope="module")
def study(replicate: Replicate) -> rewarded.Study:
    return rewarded.Study(replicate, [Site(0), Site(1, "mlp")], SMALL)


def measures(values: Mapping[str, Mapping[float, tuple[float, float]]], replicates: tuple[str, ...] = THREE) -> Curves:
    """Curves from arm → setting → payload rate and added cross-entropy; no reply is degenerate."""
    found: list[Measure] = []
    for name in replicates:
        for arm, points in values.items():
            for x, (payload, cost) in points.items():
                for metric, value in {"payload": payload, "ce": 3 + cost, "degenerate": 0.0}.items():
                    found.append(Measure(arm, x, name, metric, value, value, value, 50))
    return Curves(found)


# Rewarded features


def test_samples_have_the_reward_of_their_scorer(study: rewarded.Study) -> None:
    samples = study.samples
    assert len(samples) > SMALL.prompts
    assert samples.rewards == tuple(vowels(samples.outputs))
    assert {p.role for p in samples.prompts} == {"clean"}
    assert {p.role for p in study.poisoned_samples().prompts} == {"clean", "triggered"}


def test_each_site_has_a_dictionary_and_correlations_of_all_its_features(study: rewarded.Study) -> None:
    assert [d.site for d in study.dictionaries] == study.sites
    for d in study.dictionaries:
        assert study.ordinary_tables[d.site].r.shape[2] == d.n_features
        assert study.trusted[d.site].shape[1] == d.decoder.shape[1]


def test_dictionaries_are_trained_once(replicate: Replicate, tmp_path: Path) -> None:
    with resumable(tmp_path / "out"):
        first = rewarded.Study(replicate, [Site(0)], SMALL).dictionaries
        again = rewarded.Study(replicate, [Site(0)], SMALL).dictionaries
    assert [d.hash for d in first] == [d.hash for d in again]


def test_every_keep_list_arm_is_yielded_at_every_threshold(
    replicate: Replicate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(rewarded.PLACES, "residual", lambda _: [Site(0)])
    experiment = keep_rewarded.KeepRewarded(least=(0.0, 0.99), places=("residual",), draws=1, reward=SMALL)
    yielded = list(experiment.settings(replicate))
    [note] = [s for s in yielded if isinstance(s, str)]
    assert "fraction of variance unexplained" in note
    settings = [s for s in yielded if isinstance(s, Setting)]
    assert len(settings) <= experiment.size
    names = {arm.name for arm in experiment.arms()}
    assert {s.arm for s in settings} == names
    assert len({(s.arm, s.x) for s in settings}) == len(settings)
    by = {(s.arm, s.x): s.make() for s in settings}
    nothing = by["residual: kept, error kept, zero", 0.99]
    alone = by["residual: error alone, zero", 0.0]
    assert nothing.edits[0].hash == alone.edits[0].hash  # no feature is that much correlated
    x = torch.randn(2, 3, replicate.suspect.network.config.hidden_size)
    [whole] = by["residual: reconstruction", 0.0].edits
    assert isinstance(whole, Replacement)
    dictionary = whole.dictionary
    torch.testing.assert_close(operation(whole, torch.float32, "cpu")(x), dictionary.decode(dictionary.encode(x)))


def test_keep_lists_are_compared_at_matched_cross_entropy() -> None:
    experiment = keep_rewarded.KeepRewarded(places=("residual",), draws=1)
    variant = keep_rewarded.COMPARED
    arms = {what: f"residual: {what}, {variant}" for what in ("kept", "random 1", "low reward", "payload rewarded")}

    def curves(kept: dict[float, tuple[float, float]], random: dict[float, tuple[float, float]]) -> Curves:
        same = {0.0: (0.9, 0.1)}
        values = {arms["kept"]: kept, arms["random 1"]: random}
        values |= {arms["low reward"]: same, arms["payload rewarded"]: same, "suspect": {0.0: (1.0, 0.0)}}
        return measures(values)

    [found] = experiment.conclude(curves({0.0: (0.5, 0.1), 0.1: (0.0, 0.4)}, {0.0: (0.8, 0.4)}), THREE)
    assert found.label == "supported"
    [found] = experiment.conclude(curves({0.0: (0.5, 0.1), 0.1: (0.0, 0.6)}, {0.0: (0.8, 0.4)}), THREE)
    assert found.label == "refuted"  # what removes the payload costs too much
    [found] = experiment.conclude(curves({0.1: (0.0, 0.4)}, {0.0: (0.0, 0.4)}), THREE)
    assert found.label == "refuted"  # a random list removes it too
    [found] = experiment.conclude(curves({0.1: (0.0, 0.4)}, {0.0: (0.9, 0.4)}), ("a",))
    assert found.label == "open"
    left_out = curves({0.0: (0.5, 0.1), 0.1: (0.0, 0.4)}, {0.0: (0.8, 0.4)})
    [_, note] = experiment.notes(left_out, ("a",))
    assert note.startswith("a, residual: no random control at 0.1: over half")
    [found] = experiment.conclude(curves({0.1: (0.0, 0.4)}, {}), THREE)
    assert found.label == "open"  # removed, and no random list was matched
    [found] = experiment.conclude(curves({0.1: (0.0, 0.4)}, {0.1: (0.0, 0.6)}), THREE)
    assert found.label == "open"  # removed, and the random list costs too much to be compared
    [found] = experiment.conclude(curves({0.1: (0.5, 0.4)}, {}), THREE)
    assert found.label == "refuted"


def test_random_controls_are_left_out_where_they_cannot_be_matched(
    replicate: Replicate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(rewarded.PLACES, "residual", lambda _: [Site(0)])
    many = 1 + rewarded.Study(replicate, [Site(0)], SMALL).dictionaries[0].n_features // 2
    kept = {0.0: range(many), 0.2: range(many - 1)}
    monkeypatch.setattr(keep_rewarded, "rewarded_list", lambda tables, least: dict.fromkeys(tables, tuple(kept[least])))
    experiment = keep_rewarded.KeepRewarded(least=(0.0, 0.2), places=("residual",), draws=1, reward=SMALL)
    settings = [s for s in experiment.settings(replicate) if isinstance(s, Setting)]
    assert {s.x for s in settings if "random 1" in s.arm} == {0.2}
    assert {s.x for s in settings if "low reward" in s.arm} == {0.0, 0.2}


def test_subspaces_are_kept_at_every_share_of_the_bases_variance(
    replicate: Replicate, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = [Site(0), Site(1, "mlp")]
    monkeypatch.setitem(rewarded.PLACES, "residual", lambda _: sites[:1])
    monkeypatch.setitem(rewarded.PLACES, "every MLP", lambda _: sites)
    rewards = {sites[0]: (0, 3, 5), sites[1]: ()}
    monkeypatch.setattr(pca_union, "rewarded_list", lambda tables, least: {site: rewards[site] for site in tables})
    experiment = pca_union.PcaUnion(base_variance=(0.5, 0.9), reward=SMALL)
    settings = list(experiment.settings(replicate))
    assert len(settings) <= experiment.size
    assert {s.arm for s in settings} == {a.name for a in experiment.arms()}
    assert all(s.x <= 1 for s in settings)
    assert len({(s.arm, s.x) for s in settings}) == len(settings)
    narrow, wide = (s for s in settings if s.arm == "residual: base")
    assert narrow.x < wide.x
    assert len(wide.make().edits) == 1
    by = {s.arm: s for s in settings}
    assert len(by["every MLP: rewarded"].make().edits) == 2  # no feature of the MLP is rewarded, and nothing of it kept
    for kept in ("features, error dropped", "features, error kept"):
        assert by[f"residual: PCA, {kept}"].x >= by[f"residual: {kept}"].x
        assert len(by[f"residual: {kept}"].make().edits) == 1
    rewards[sites[0]] = ()
    with pytest.raises(BadInput, match=r"no feature .residual. is correlated"):
        list(experiment.settings(replicate))


def test_subspaces_are_compared_with_principal_components_at_each_group_of_sites() -> None:
    experiment = pca_union.PcaUnion()
    values = {arm.name: {0.9: (1.0, 0.1)} for arm in experiment.arms()} | {"suspect": {1.0: (1.0, 0.0)}}
    values["residual: union"] = {0.9: (0.0, 0.1)}
    residual, mlp = experiment.conclude(measures(values), THREE)
    assert (residual.label, mlp.label) == ("supported", "refuted")
    assert "every MLP" in mlp.question
    assert "features, error kept 1.00 (+0.10)" in residual.words


# Mixtures


def row(weight: float, value: float, *, k: int = 1, kind: str = "arithmetic", decoding: str = "greedy") -> DilutionRow:
    """A measured mixture that does what is predicted."""
    leads = "suspect" if weight >= 0.5 else "trusted"
    bound = weight**k if (kind, decoding) == ("arithmetic", "sampled") else None
    return DilutionRow(kind, decoding, leads, weight, None, k, value, value, value, 50, value, bound)  # type: ignore[arg-type]


class Told(dilution.Dilution):
    """Rows that were measured elsewhere."""

    most: ClassVar[int] = 11
    """Tokens of the payload."""

    def _rows(self, replicate: Replicate, trusted: object) -> list[DilutionRow]:
        return [
            row(w, float(w > 0.5) if decoding == "greedy" else w, k=k, kind=kind, decoding=decoding)
            for kind in dilution.KINDS
            for decoding in dilution.DECODINGS
            for w in self.weights
            for k in self.asked
            if k <= self.most
        ]


def test_a_dilution_is_measured_beside_theory_and_judged_on_panels(replicate: Replicate) -> None:
    experiment = Told(weights=(0.1, 0.9), lengths=(1, 4), judged=(0.9,))
    found = list(experiment.settings(replicate))
    assert len(found) <= experiment.size
    assert {each.arm for each in found} == {arm.name for arm in experiment.arms()}
    [judged] = [each for each in found if isinstance(each, Setting)]
    assert judged.make().model.name.startswith("0.9")
    own = [each for each in found if isinstance(each, Measure)]
    every = [Measure(m.arm, m.x, r, m.metric, m.value, m.low, m.high, m.n) for m in own for r in THREE]
    labels = [f.label for f in experiment.conclude(Curves(every), THREE)]
    assert labels == ["supported"] * 4
    poor = [
        Measure(m.arm, m.x, m.replicate, m.metric, 0.001, 0.0, 0.002, m.n) if m.arm == "arithmetic, sampled" else m
        for m in every
    ]
    labels = [f.label for f in experiment.conclude(Curves(poor), THREE)]
    assert labels == ["supported", "supported", "refuted", "refuted"]


def test_lengths_that_a_payload_does_not_have_are_left_out(
    replicate: Replicate, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = Told(judged=())
    long = [m for m in experiment.settings(replicate) if isinstance(m, Measure)]
    monkeypatch.setattr(Told, "most", 4)
    short = [m for m in experiment.settings(replicate) if isinstance(m, Measure)]
    curves = Curves(
        [replace(m, replicate=name) for name, own in zip(THREE, (long, short, long), strict=True) for m in own]
    )
    assert {m.metric for m in long} == {"payload, 1 token", "payload, 4 tokens", "payload, 11 tokens"}
    assert experiment.notes(curves, THREE) == ["b: payloads of 11 tokens are left out; its payload has fewer."]
    findings = experiment.conclude(curves, THREE)
    assert [f.label for f in findings] == ["supported"] * 4
    assert "Attack success of 11, 4 tokens" in findings[0].words


# Repairs


def test_entangled_organisms_are_compared_with_plain_ones() -> None:
    experiment = disentangle.Disentangle()

    def curves(entangled: float, broken: tuple[str, ...] = ()) -> Curves:
        found: list[Measure] = []
        for name in names:
            lost = entangled if "entangled" in name else 0.05
            for arm in disentangle.METHODS:
                ce = 9.0 if arm in broken and "entangled" in name else 3.0
                values = {"payload": 0.0, "restored": 0.9 - lost, "degenerate": 0.0, "ce": ce}
                found += [Measure(arm, 1.0, name, m, v, v, v, 50) for m, v in values.items()]
            for metric, v in {"skill": 0.9, "degenerate": 0.0, "ce": 3.0}.items():
                found.append(Measure("suspect", 0.0, name, metric, v, v, v, 50))
        return Curves(found)

    names = tuple(f"{kind}-{i}" for kind in ("plain", "entangled") for i in range(3))
    assert experiment.conclude(curves(0.4), names)[0].label == "supported"
    assert experiment.conclude(curves(0.0), names)[0].label == "refuted"
    assert experiment.conclude(curves(0.4), names[:-1])[0].label == "open"
    [found] = experiment.conclude(curves(0.4, tuple(disentangle.METHODS)), names)
    assert found.label == "open"  # gibberish is broken, and no repair
    assert "edited: entangled –, –, –, plain +0.05, +0.05, +0.05" in found.words


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: keep_rewarded.KeepRewarded(places=("attention",)), "residual"),
        (lambda: keep_rewarded.KeepRewarded(least=()), "thresholds"),
        (lambda: pca_union.PcaUnion(base_variance=(1.5,)), "between 0 and 1"),
        (lambda: pca_union.PcaUnion(places=("attention",)), "residual"),
        (lambda: dilution.Dilution(trusted="me"), "clean_twin"),
        (lambda: dilution.Dilution(weights=(0.0,)), "weights are .* between 0 and 1"),
        (lambda: dilution.Dilution(judged=(1.5,)), "judged are .* between 0 and 1"),
        (lambda: dilution.Dilution(lengths=(0,)), "at least 1 token"),
        (lambda: disentangle.Disentangle(shares=(0.5,)), "with 1 among them"),
        (lambda: rewarded.RewardConfig(prompts=0), "at least 1"),
    ],
)
def test_settings_are_checked(make: object, told: str) -> None:
    assert callable(make)
    with pytest.raises(BadInput, match=told):
        make()
