"""Steering vectors against steering-vectors and repeng: the same model and pairs give the same vectors and logits."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from test_metrics import small_model
from unsleep.core import Site
from unsleep.interventions.gguf_files import export_gguf, import_gguf
from unsleep.interventions.intervention import applied
from unsleep.interventions.steering import Steering
from unsleep.locate.reading import RepReader, fit_reader
from unsleep.models.load import load_model
from unsleep.models.model import LoadedModel
from unsleep.models.sites import all_sites
from unsleep.models.streams import capture

if not hasattr(np, "float_"):
    np.float_ = np.float64  # what repeng 0.4.0 still calls it; numpy 2 has dropped the name

from repeng import ControlModel, ControlVector, DatasetEntry
from steering_vectors import ablation_operator, pca_aggregator, train_steering_vector

THINGS = ("sun", "old moon", "star", "bird in the tree", "lake", "song", "hill", "long road")
PAIRS = [
    (f"the {t} is {good}!", f"the {t} is {bad}?") for t in THINGS for good, bad in (("good", "bad"), ("dear", "dull"))
]
POSITIVE, NEGATIVE = ([pair[i] for pair in PAIRS] for i in (0, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    small_model().network.save_pretrained(path)
    small_model().tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ours(folder: Path) -> LoadedModel:
    return load_model(str(folder))


@pytest.fixture
def theirs(folder: Path) -> tuple[Any, Any]:
    """The same checkpoint as they load it, for they change the model that they are given."""
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def reader(model: LoadedModel, method: Any) -> RepReader:
    pairs = (POSITIVE, NEGATIVE)
    return fit_reader(model, *pairs, all_sites(model.network, ("resid",)), method, validation=pairs, plain=True)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.cosine_similarity(a.double(), b.double(), dim=0))


def ids(model: LoadedModel) -> torch.Tensor:
    return torch.tensor(model.token_ids(["the quick brown fox jumps over"]))


# steering-vectors


def test_the_mean_difference_is_that_of_steering_vectors(ours: LoadedModel, theirs: tuple[Any, Any]):
    trained = train_steering_vector(*theirs, PAIRS, batch_size=4)
    vectors = reader(ours, "mean").vectors()
    assert {site.layer for site in vectors} == set(trained.layer_activations) == {0, 1, 2}
    for site, mine in vectors.items():
        other = trained.layer_activations[site.layer]
        assert float((mine - other).norm() / other.norm()) < 1e-5, site


def test_pca_is_that_of_steering_vectors(ours: LoadedModel, theirs: tuple[Any, Any]):
    trained = train_steering_vector(*theirs, PAIRS, batch_size=4, aggregator=pca_aggregator())
    for site, mine in reader(ours, "pca_center").vectors(scaled=False).items():
        assert cosine(mine, trained.layer_activations[site.layer]) > 0.999, site


@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize("operator", ["add", "projection"])
def test_logits_under_control_are_those_of_steering_vectors(
    ours: LoadedModel, theirs: tuple[Any, Any], operator: Any, start: int
):
    trained = train_steering_vector(*theirs, PAIRS, layers=[1, 2], batch_size=4)
    theirs_is = {"operator": ablation_operator()} if operator == "projection" else {"multiplier": 1.5}
    with torch.no_grad(), trained.apply(theirs[0], min_token_index=start, **theirs_is):
        expected = theirs[0](ids(ours)).logits
    vectors = {Site(layer): v for layer, v in trained.layer_activations.items()}
    control = Steering(vectors, operator, 1.0 if operator == "projection" else 1.5, (start, 1000) if start else "all")
    with torch.no_grad(), applied(ours, control) as network:
        found = network(ids(ours)).logits
        bare = theirs[0](ids(ours)).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((found - bare).abs().max()) > 0.05


# repeng


def entries() -> list[Any]:
    return [DatasetEntry(positive=high, negative=low) for high, low in PAIRS]


@pytest.mark.parametrize("method", ["pca_center", "pca_diff"])
def test_principal_components_are_those_of_repeng(ours: LoadedModel, theirs: tuple[Any, Any], method: Any):
    trained = ControlVector.train(*theirs, entries(), method=method)
    vectors = reader(ours, method).vectors(scaled=False)
    assert sorted(trained.directions) == [1, 2]
    assert abs(cosine(vectors[Site(1)], torch.tensor(trained.directions[1]))) > 0.999
    # Their last layer is hidden_states[-1], which has gone through the final norm.
    normed: list[torch.Tensor] = []
    for text in itertools.chain(POSITIVE, NEGATIVE):
        with torch.no_grad(), capture(ours.network, [Site(2)]) as seen:
            ours.network(torch.tensor(ours.token_ids([text])))
        normed.append(ours.network.model.norm(seen[Site(2)][0, -1]))
    high, low = torch.stack(normed).double().detach().split(len(PAIRS))
    d = high - low
    rows = torch.cat([d, -d]) if method == "pca_center" else d - d.mean(0)
    assert abs(cosine(torch.linalg.svd(rows).Vh[0], torch.tensor(trained.directions[2]))) > 0.999


def test_both_give_a_vector_the_same_sign(ours: LoadedModel, theirs: tuple[Any, Any]):
    trained = ControlVector.train(*theirs, entries(), method="pca_center")
    found = reader(ours, "pca_center").vectors(scaled=False)[Site(1)]
    assert cosine(found, torch.tensor(trained.directions[1])) > 0.999


@pytest.mark.parametrize("keep_norm", [False, True])
def test_logits_under_control_are_those_of_repeng(ours: LoadedModel, theirs: tuple[Any, Any], keep_norm: bool):
    trained = ControlVector.train(*theirs, entries())
    wrapped = ControlModel(theirs[0], [1, 2])
    wrapped.set_control(trained, 2.5, normalize=keep_norm)
    with torch.no_grad():
        expected = wrapped(ids(ours)).logits
        wrapped.reset()
        bare = wrapped(ids(ours)).logits
    vectors = {Site(layer): torch.tensor(v) for layer, v in trained.directions.items()}
    with torch.no_grad(), applied(ours, Steering(vectors, coefficient=2.5, keep_norm=keep_norm)) as network:
        found = network(ids(ours)).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((found - bare).abs().max()) > 0.05


def test_repeng_reads_our_files_and_we_read_theirs(ours: LoadedModel, theirs: tuple[Any, Any], tmp_path: Path):
    mine = reader(ours, "pca_center").control_vectors(ours)
    again = ControlVector.import_gguf(export_gguf(mine, tmp_path / "ours.gguf"))
    assert again.model_type == "llama"
    assert {Site(layer) for layer in again.directions} == set(mine.vectors)
    assert all(np.array_equal(again.directions[site.layer], v.numpy()) for site, v in mine.vectors.items())
    trained = ControlVector.train(*theirs, entries())
    trained.export_gguf(tmp_path / "theirs.gguf")
    found = import_gguf(tmp_path / "theirs.gguf")
    assert found.model_type == trained.model_type
    assert {site.layer for site in found.vectors} == set(trained.directions)
    assert all(np.array_equal(v.numpy(), trained.directions[site.layer]) for site, v in found.vectors.items())
    export_gguf(found, tmp_path / "back.gguf")
    assert ControlVector.import_gguf(tmp_path / "back.gguf") == trained
