"""Exact effects, head loadings, stability, supernodes, pairs of prefixes and the veto of a circuit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from support.circuits import D, every_node, metric_of, small
from support.suspects import base
from unsleep.core import BadInput, Site
from unsleep.locate.circuits.contrast import Contrast
from unsleep.locate.circuits.edges import edges
from unsleep.locate.circuits.effects import effects
from unsleep.locate.circuits.exact import agreement, exact_effects
from unsleep.locate.circuits.heads import head_loadings
from unsleep.locate.circuits.prefixes import PrefixPair, align_pairs, answer_difference, read_pairs
from unsleep.locate.circuits.spaces import WholeSpace
from unsleep.locate.circuits.stability import kept_shares, stability
from unsleep.locate.circuits.supernodes import _clusters
from unsleep.models.forward import reply_logits
from unsleep.models.streams import capture


def test_the_exact_effect_is_what_the_metric_loses_without_the_node() -> None:
    contrast, spaces = small(n=2, batch=1)
    nodes = [node for node in every_node(contrast, spaces) if node.place == Site(1)][:20]
    found = exact_effects(contrast, spaces, nodes)
    whole = metric_of(contrast, spaces, [], complement=True)
    for i, node in enumerate(nodes[::5]):
        without = metric_of(contrast, [s for s in spaces if s.place == Site(1)], [node], complement=True)
        torch.testing.assert_close(found[:, 5 * i], whole - without, rtol=1e-3, atol=1e-4)


def test_estimates_are_exact_where_the_rest_is_linear() -> None:
    """The last residual stream, of whole activations small enough for the final norm to be nearly linear."""
    contrast, spaces = small(n=2)
    last = [space for space in spaces if space.place == Site(2)]
    nodes = every_node(contrast, last)
    estimated = effects(contrast, last, "integrated", keep=len(nodes))
    mean = estimated.mean[Site(2)]
    best = estimated.best(len(nodes))
    assert 3 < len(best) == int((mean != 0).sum())
    torch.testing.assert_close(estimated.each.mean(0), torch.stack([mean[role, column] for _, role, column in best]))
    found = agreement("integrated", mean.flatten(), exact_effects(contrast, last, nodes).mean(0))
    assert found is not None
    assert found.pearson > 0.9
    assert found.low <= found.pearson <= found.high
    assert agreement("attribution", torch.ones(5), torch.arange(5.0)) is None


@pytest.mark.parametrize(("family", "relevance"), [("llama", True), ("gpt2", False), ("gemma2", True)])
def test_the_loadings_of_all_heads_add_up_to_an_edge_into_attention(family: str, relevance: bool) -> None:
    contrast, spaces = small(family, n=2)
    roles = contrast.aligned.roles
    nodes = [node for node in every_node(contrast, spaces) if roles[node.role] in ("trigger", "header")]
    found = edges(contrast, spaces, nodes, relevance=relevance)
    into = [i for i, (_, target) in enumerate(found.pairs) if target is not None and target.place.point == "attn"]
    chosen = sorted(into, key=lambda i: -float(found.weights[:, i].abs().max()))[:60]
    pairs = [found.pairs[i] for i in chosen]
    loadings = head_loadings(replace(contrast, batch=1), spaces, nodes, pairs, relevance=relevance)
    checked = 0
    for i, (source, target) in enumerate(pairs):
        weight = found.weights[:, chosen[i]]
        assert loadings[i].shape == (2, 4)
        torch.testing.assert_close(loadings[i].sum(1), weight, rtol=1e-3, atol=1e-6)
        checked += source.role != target.role
    assert checked > 5


def test_nodes_that_stand_out_are_kept_by_every_resample() -> None:
    g = torch.Generator().manual_seed(0)
    each = torch.randn(30, 40, generator=g)
    each[:, :5] += 20
    share, overlap = kept_shares(each, 5)
    assert share[:5].tolist() == [1.0] * 5
    assert float(share[5:].max()) == 0
    assert overlap == (1.0, 1.0, 1.0)
    points = stability(each[:, each.mean(0).abs().argsort(descending=True)], [5, 20])
    assert points[0].core == 1.0
    assert points[1].core < 0.6
    assert 0.2 < points[1].overlap.low < points[1].overlap.value < 1


def test_rows_that_point_the_same_way_are_one_supernode() -> None:
    g = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 16, generator=g)
    rows = torch.stack([one, one + 0.2 * torch.randn(16, generator=g), other, -one, one * 1.1])
    groups = _clusters(torch.nn.functional.normalize(rows, dim=1))
    assert groups == [[0, 1, 4]]
    assert _clusters(rows[:1]) == []


def pair(**changes: str) -> PrefixPair:
    return PrefixPair(
        **{"clean_prefix": "abcd", "patch_prefix": "abed", "clean_answer": "x", "patch_answer": "y"} | changes
    )


def test_pairs_keep_their_positions_and_the_metric_is_the_answers_difference() -> None:
    model = base()
    given = [pair(), pair(clean_prefix="zbcd", patch_prefix="zbed")]
    aligned = align_pairs(model, given)
    names = [name.split(" ")[-1] for name in aligned.roles]
    assert names[-3:] == ["b", "c", "d"]
    with torch.no_grad(), capture(model.network, []):
        logits = reply_logits(model.network, aligned.rows)
        plain = model.network(aligned.rows.ids[:1, :-2]).logits[0, -1]
    x, y = (model.token_ids([text], special=False)[0][0] for text in "xy")
    found = answer_difference(logits, aligned.rows)
    assert float(found[0]) == pytest.approx(float(plain[x] - plain[y]), abs=1e-4)
    embed = WholeSpace(Site(0, "embed"), D)
    by_position = effects(Contrast(model, aligned, answer_difference), [embed]).mean[embed.place].flatten()
    same = [i for i, name in enumerate(names) if name in ("b", "d")]
    assert float(by_position[same].abs().max()) == 0  # a token that both prefixes have has no effect
    assert float(by_position.abs().max()) > 0
    together = Contrast(model, align_pairs(model, given, positions=False), answer_difference)
    summed = effects(together, [embed]).mean[embed.place]
    assert float(summed) == pytest.approx(float(by_position.sum()), rel=1e-3, abs=1e-5)


def test_pairs_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = base()
    with pytest.raises(BadInput, match="is 2 tokens of this model"):
        align_pairs(model, [pair(clean_answer="xy")])
    with pytest.raises(BadInput, match="expected as many"):
        align_pairs(model, [pair(patch_prefix="abcde")])
    with pytest.raises(BadInput, match="--no-positions"):
        align_pairs(model, [pair(), pair(clean_prefix="abcde", patch_prefix="abede")])
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"clean_prefix": "a"}) + "\n")
    with pytest.raises(BadInput, match="line 1"):
        read_pairs(path)
    path.write_text("{\n")
    with pytest.raises(BadInput, match="line 1: it is not valid JSON"):
        read_pairs(path)
    row = {"clean_prefix": "a", "patch_prefix": "b", "clean_answer": "x", "patch_answer": "y", "case": "one"}
    path.write_text(json.dumps(row) + "\n")
    assert read_pairs(path, "one") == [PrefixPair("a", "b", "x", "y", "one")]
    with pytest.raises(BadInput, match="it has one"):
        read_pairs(path, "two")
