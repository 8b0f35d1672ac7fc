"""Laws of node effects and edges, in a model small enough for every node to be held and changed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from support.circuits import NEAR, D, F, difference, every_node, forced, metric_of, small
from support.suspects import LETTER, ORDINARY, SUSPICIOUS, base
from unsleep.core import BadInput, Site
from unsleep.locate.circuits.align import ROLES, align
from unsleep.locate.circuits.edges import OUTPUT, Cut, Node, edges
from unsleep.locate.circuits.effects import effects, reference_nodes
from unsleep.locate.circuits.faithful import Listed, curve, patching
from unsleep.locate.circuits.spaces import ERROR, WholeSpace
from unsleep.locate.features import reply_log_odds
from unsleep.models.forward import reply_logits
from unsleep.models.linearised import Linearisation
from unsleep.models.sites import all_sites
from unsleep.models.streams import transformed
from unsleep.prompts.prompt import Prompt, PromptSet


def test_tokens_are_set_against_those_in_their_place() -> None:
    model = base()
    aligned = align(model, SUSPICIOUS.head(1), NEAR.head(1), forced(1, 40, 41))
    said = model.texts([[int(t)] for t in aligned.rows.ids[0]])
    by_role = {
        name: "".join(t for t, r in zip(said, aligned.role[0], strict=True) if r == i)
        for i, name in enumerate(aligned.roles)
    }
    assert by_role["trigger"] == LETTER * 2
    assert by_role["question"] == " " + ORDINARY.texts[0]
    assert set(aligned.roles) == {*ROLES, "payload 1", "payload 2"}
    torch.testing.assert_close(aligned.weights.sum(-1), (aligned.role >= 0).float())
    trigger = aligned.weights[0][aligned.role[0] == 1]
    assert all(int((row > 0).sum()) == 3 for row in trigger)  # each against the mean of Q, Q, X
    question = aligned.weights[0][aligned.role[0] == 2]
    theirs = aligned.reference.ids[0][question.argmax(-1)]
    assert torch.equal(theirs, aligned.rows.ids[0][aligned.role[0] == 2])


def test_inserted_tokens_are_set_against_the_whole_message_however_long_it_is() -> None:
    prompts, references = (PromptSet(name, (Prompt(text),)) for name, text in (("on", "qqqab?"), ("off", "ab?")))
    aligned = align(base(), prompts, references, forced(1, 40))
    trigger = aligned.weights[0][aligned.role[0] == 1]
    assert trigger.shape[0] == 3
    assert [sorted(row[row > 0].tolist()) for row in trigger] == [[pytest.approx(1 / 3)] * 3] * 3
    assert aligned.inserted == 1


def test_prompts_that_cannot_be_aligned_are_refused() -> None:
    model = base()
    with pytest.raises(BadInput, match="as many"):
        align(model, SUSPICIOUS.head(2), NEAR.head(1), forced(2, 5))
    with pytest.raises(BadInput, match="does not differ from its reference"):
        align(model, SUSPICIOUS.head(1), SUSPICIOUS.head(1), forced(1, 5))
    with pytest.raises(BadInput, match="payload has 0 tokens"):
        align(model, SUSPICIOUS.head(1), NEAR.head(1), forced(1))


@pytest.mark.parametrize("estimator", ["attribution", "relevance", "integrated", "inputs"])
def test_the_nodes_of_a_place_add_up_to_its_activation(estimator: str) -> None:
    contrast, spaces = small(batch=1)
    found = effects(contrast, spaces, estimator)
    for site in all_sites(contrast.model.network):
        whole = effects(replace(contrast, batch=2), [WholeSpace(site, D)], estimator)
        torch.testing.assert_close(found.mean[site].sum(-1), whole.mean[site][:, 0], rtol=1e-3, atol=1e-3)


def test_integrated_gradients_add_up_to_the_metrics_difference() -> None:
    contrast, _ = small(n=1)
    model, aligned = contrast.model, contrast.aligned
    embed = WholeSpace(Site(0, "embed"), D)
    last = WholeSpace(Site(2), D)
    found = effects(contrast, [last], "integrated")
    theirs, _ = contrast.run_reference(aligned, [last.place])
    moved = torch.where((aligned.role >= 0)[..., None], aligned.brought(theirs[last.place]), 0)
    with transformed(model.network, {last.place: lambda x: torch.where(moved != 0, moved, x)}), torch.no_grad():
        other = difference(reply_logits(model.network, aligned.rows), aligned.rows)
    expected = float(found.metric.mean() - other.mean())
    assert float(found.mean[last.place].sum()) == pytest.approx(expected, rel=0.02)
    one = effects(contrast, [embed], "attribution")
    assert float(one.mean[embed.place].sum()) != pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_what_goes_out_of_a_node_is_its_effect(family: str) -> None:
    contrast, spaces = small(family, n=1)
    nodes = every_node(contrast, spaces)
    found = edges(contrast, spaces, nodes, relevance=True)
    out: dict[Node, float] = {}
    for (source, _), w in zip(found.pairs, found.weights[0].tolist(), strict=True):
        out[source] = out.get(source, 0.0) + w
    effect = dict(zip(nodes, found.effects[0].tolist(), strict=True))
    scale = max(map(abs, effect.values()))
    assert scale > 0.01
    for node in nodes:
        assert out.get(node, 0.0) == pytest.approx(effect[node], rel=1e-3, abs=1e-4 * scale), str(node)


def test_an_edge_is_what_its_target_changes_by_with_everything_frozen() -> None:
    """Doubling every feature, error and token vector in turn: the target answers as predicted."""
    contrast, spaces = small(n=1)
    model, aligned = contrast.model, contrast.aligned
    nodes = [n for n in every_node(contrast, spaces) if aligned.roles[n.role] in ("trigger", "header")]
    found = edges(contrast, spaces, nodes, relevance=True)
    by_place = {space.place: space for space in spaces}
    theirs, _ = contrast.run_reference(aligned, list(by_place))
    frozen = Linearisation.of(model.network)
    with frozen.recording():
        cut = Cut.run(contrast, aligned, list(by_place))
    total, _ = cut.gradients()
    base_value = {place: x.detach() for place, x in cut.raw.items()}
    weights = dict(zip(found.pairs, found.weights[0].tolist(), strict=True))
    largest = max(map(abs, weights.values()))
    sources = sorted({s for (s, t), w in weights.items() if abs(w) > 0.02 * largest}, key=str)
    assert len({s.place for s in sources}) >= 5
    assert any(s.feature == ERROR for s in sources)
    checked = 0
    for source in sources:
        space = by_place[source.place]
        here = (aligned.role == source.role)[..., None]
        features, rest = reference_nodes(space, aligned, theirs[source.place])
        now = base_value[source.place]
        if source.feature == ERROR:
            change = space.rest(now.flatten(0, 1)).view_as(now) - rest
        else:
            own = space.encode(now.flatten(0, 1)).unflatten(0, now.shape[:2])[..., source.feature]
            change = (own - features[..., source.feature])[..., None] * space.coder.decoder[source.feature]
        raw: dict[object, Tensor] = {}

        def held(place: object, change: Tensor = change, here: Tensor = here, raw=raw, source=source):
            def run(x: Tensor) -> Tensor:
                raw[place] = x
                return base_value[place] + (change * here if place == source.place else 0)

            return run

        with torch.no_grad(), frozen.held(), transformed(model.network, {p: held(p) for p in base_value}):
            value = difference(reply_logits(model.network, aligned.rows), aligned.rows)
        predicted = weights.get((source, OUTPUT), 0.0)
        assert float(value - cut.value.detach()) == pytest.approx(predicted, rel=1e-3, abs=1e-4 * largest)
        for (s, target), w in weights.items():
            if s != source or target is OUTPUT:
                continue
            goal, at = by_place[target.place], aligned.role == target.role
            before, after = base_value[target.place][at], raw[target.place][at]
            g = total[target.place][at]
            if target.feature == ERROR:  # with the set of features that fire held
                features_moved = (after - before) @ goal.coder.W_enc * goal.slopes(before)
                moved = after - before - goal.combine(features_moved)
                answer = (g * moved).sum()
            else:
                pre = (after - before) @ goal.coder.W_enc[:, target.feature] * goal.slopes(before)[:, target.feature]
                answer = (goal.read(g)[:, target.feature] * pre).sum()
            assert float(answer) == pytest.approx(w, rel=1e-3, abs=1e-4 * largest), f"{s} -> {target}"
            checked += 1
    assert checked > 100


def test_edges_stay_between_neighbouring_places() -> None:
    contrast, spaces = small(n=1)
    found = edges(contrast, spaces, every_node(contrast, spaces))
    places = {(s.place, t.place if t else None) for s, t in found.pairs}
    resid, attn, mlp = (lambda i: Site(i)), (lambda i: Site(i, "attn")), (lambda i: Site(i, "mlp"))
    assert places == {
        *((resid(i), resid(i + 1)) for i in range(2)),
        *((resid(i), attn(i + 1)) for i in range(2)),
        *((resid(i), mlp(i + 1)) for i in range(2)),
        *((attn(i), mlp(i)) for i in range(3)),
        *((attn(i), resid(i)) for i in range(3)),
        *((mlp(i), resid(i)) for i in range(3)),
        *((Site(0, "embed"), at) for at in (resid(0), attn(0), mlp(0))),
        (resid(2), None),
    }


def test_effects_do_not_depend_on_the_batch_and_the_payloads_log_odds_are_a_metric() -> None:
    contrast, spaces = small(n=3, metric=reply_log_odds)
    one, all_ = (effects(replace(contrast, batch=b), spaces, keep=5) for b in (1, 3))
    for place, mean in one.mean.items():
        torch.testing.assert_close(mean, all_.mean[place], rtol=1e-3, atol=1e-4)
    assert one.best(5) == all_.best(5)
    nodes = [
        Node(p, r, ERROR if c == F or (isinstance(p, Site) and p.point == "embed") else c) for p, r, c in one.best(5)
    ]
    torch.testing.assert_close(one.each, all_.each, rtol=1e-3, atol=1e-4)
    found = edges(contrast, spaces, nodes)
    torch.testing.assert_close(found.effects, one.each, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        found.effects.mean(0), torch.stack([one.mean[p][r, c] for p, r, c in one.best(5)]).cpu(), rtol=1e-3, atol=1e-4
    )


def test_all_nodes_are_faithful_and_none_is_not() -> None:
    contrast, spaces = small(n=3, metric=reply_log_odds)
    whole, none = (metric_of(contrast, spaces, [], complement=c) for c in (True, False))
    nodes = every_node(contrast, spaces)
    bare = metric_of(contrast, [], [])
    torch.testing.assert_close(whole, bare, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(metric_of(replace(contrast, batch=2), spaces, nodes), whole)
    _, other = contrast.run_reference(contrast.aligned, [])
    moved = metric_of(contrast, [WholeSpace(Site(2), D)], [])
    torch.testing.assert_close(none, moved, rtol=1e-3, atol=1e-3)
    assert float((none - other).abs().max()) < 0.5 * float((whole - other).abs().max())

    def measure(chosen, complement):
        return metric_of(contrast, spaces, chosen, complement=complement)

    first, last = curve(nodes, [0, len(nodes)], measure, (whole, none))
    assert first.faithfulness.value == pytest.approx(0, abs=1e-3)
    assert first.completeness.value == pytest.approx(1, abs=1e-3)
    assert last.faithfulness.value == pytest.approx(1, abs=1e-3)
    assert last.completeness.value == pytest.approx(0, abs=1e-3)


def test_a_kept_node_keeps_its_own_value_and_the_others_have_the_references() -> None:
    contrast, spaces = small(n=2)
    aligned, site = contrast.aligned, Site(1)
    space = next(s for s in spaces if s.place == site)
    theirs, _ = contrast.run_reference(aligned, [site])
    features, _ = reference_nodes(space, aligned, theirs[site])
    real = aligned.role >= 0
    bare, _ = contrast.run(aligned, [site])
    mine = space.encode(bare[site][real])
    node = max(
        every_node(contrast, [space])[:-1],
        key=lambda n: float(mine[aligned.role[real] == n.role][:, n.feature].abs().sum()) if n.feature != ERROR else 0,
    )
    listed = Listed.of([node], site, len(aligned.roles))
    with torch.no_grad():
        seen = patching(space, aligned, theirs[site], listed, complement=False)(bare[site])
    here = aligned.role == node.role
    expected = aligned.brought(theirs[site])
    moved = (space.encode(bare[site][here])[:, node.feature] - features[here][:, node.feature])[:, None]
    expected[here] += moved * space.coder.decoder[node.feature]
    torch.testing.assert_close(seen[real], expected[real], rtol=1e-4, atol=1e-4)


def test_nothing_is_measured_where_the_metric_does_not_differ_or_a_node_has_no_dictionary() -> None:
    same = torch.ones(3)
    assert curve([], [0], lambda *_: same, (same, same)) == []
    contrast, spaces = small(n=1)
    with pytest.raises(BadInput, match="for which no dictionary is given"):
        metric_of(contrast, spaces[:2], [Node(Site(2), 0, 1)])
