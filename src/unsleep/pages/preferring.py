"""Pages of preference training and of a reward model.

preference.json, reward_model.json -> check -> make text visible -> view of each section -> HTML
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unsleep.pages import text
from unsleep.pages.blocks import Block, Table
from unsleep.pages.comparing import drawn, interval, paper_of, short, whole_page
from unsleep.pages.curves import Curve, Dot, whole_axis
from unsleep.pages.dictionaries import SHAPES, shade
from unsleep.pages.page import LABEL_LIMIT, tree
from unsleep.pages.registry import Page
from unsleep.pages.verdict import Tile
from unsleep.preference.record import PreferenceRecord, RewardModelRecord

DRAWN = {
    "loss": "Loss",
    "reward": "Mean reward of the samples",
    "tied": "Share of prompts whose samples earn the same",
    "accuracy": "Share of pairs ranked as labelled",
    "kl": "KL to the model before, nats",
    "length": "Tokens of a sample",
}
"""Logged figure → its chart's title."""

TEXT_LIMIT = 400
"""Longest text of an example, in characters."""


def preference_view(record: Mapping[str, Any]) -> dict[str, Any]:
    """The template's view of a preference training."""
    config, measured, data = record["config"], record.get("measured"), record["data"]
    tiles: list[Tile] = []
    blocks: list[Block] = []
    if measured is not None:
        judged = [*measured["rewards"], *measured["metrics"]]
        for each in measured["rewards"]:
            note = f"gain {text.decimals(each['gain']['value'])} ({interval(each['gain'])})"
            tiles.append(Tile(short(each["name"]), text.decimals(each["before"]["value"]), _value(each["after"]), note))
        note = f"nats per token, {interval(measured['kl'])}"
        tiles.append(Tile("KL to the model before", "", _value(measured["kl"]), note))
        tiles.append(
            Tile("Words of a reply, after over before", "", _value(measured["words"]), interval(measured["words"]))
        )
        lead = f"Greedy replies to {measured['n']:,} prompts that were not trained on, before and after."
        blocks = [Block("judged", "Before and after", lead, tables=[_judged(judged)])]
        shown = [[text.clip(part, TEXT_LIMIT) for part in each] for each in measured["examples"]]
        table = Table("Examples", ["Prompt", "Before", "After"], 3, shown)
        blocks.append(Block("examples", "Examples", "Replies before and after.", tables=[table]))
    blocks.append(Block("training", "Training", "Figures of the training's own batches.", _charts(record["history"])))
    prompts = f"{data['train'] - data.get('tied', 0):,} prompts"
    trained_on = f"{record['reward']} on {prompts}" if record.get("reward") else f"{data['train']:,} pairs"
    return {
        "eyebrow": "Preference training",
        "title": f"{config['method']} on {trained_on}",
        "lead": "What a preference training changed, on prompts that it did not see.",
        "tiles": tiles,
        "facts": [("Data", text.clip(data["name"], LABEL_LIMIT)), ("Base", record["base"]["fingerprint"])],
        "blocks": blocks,
        "provenance": tree(record["provenance"]),
    }


def reward_view(record: Mapping[str, Any]) -> dict[str, Any]:
    """The template's view of a reward model."""
    found, data = record["held_out"], record["data"]
    note = f"{interval(found['accuracy'])}, {found['n']:,} pairs"
    return {
        "eyebrow": "Reward model",
        "title": f"A reward model on {data['train']:,} pairs",
        "lead": "Its accuracy is the share of pairs, of prompts it did not see, that it ranks as they are labelled.",
        "tiles": [
            Tile("Held-out accuracy", "", _value(found["accuracy"]), note),
            Tile("Mean margin", "", text.decimals(found["margin"]), "chosen minus rejected"),
        ],
        "facts": [("Data", text.clip(data["name"], LABEL_LIMIT)), ("Base", record["base"]["fingerprint"])],
        "blocks": [
            Block(
                "held-out",
                "Held-out pairs",
                "Pairs with other prompts than those trained on.",
                tables=[_ranking(found)],
            ),
            Block("training", "Training", "Figures of the training's own batches.", _charts(record["history"])),
        ],
        "provenance": tree(record["provenance"]),
    }


def _judged(judged: Sequence[Mapping[str, Any]]) -> Table:
    """Table of rewards and metrics."""
    rows = [
        [
            short(each["name"]),
            "judged by" if each["judging"] else "trained on or named",
            *(f"{_value(each[when])} ({interval(each[when])})" for when in ("before", "after", "gain")),
        ]
        for each in judged
    ]
    return Table("Rewards and metrics", ["Reward", "Role", "Before", "After", "Gain"], 2, rows)


def _ranking(found: Mapping[str, Any]) -> Table:
    """Table of a reward model's held-out figures."""
    accuracy = found["accuracy"]
    rows = [
        ["Pairs ranked as labelled", f"{_value(accuracy)} ({interval(accuracy)})"],
        ["Mean margin", text.decimals(found["margin"])],
        ["Ties", text.percent(found["ties"])],
        ["Pairs", f"{found['n']:,}"],
    ]
    return Table("Held-out pairs", ["Figure", "Value"], 1, rows)


def _value(estimate: Mapping[str, Any]) -> str:
    return text.decimals(estimate["value"])


def _charts(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any]]:
    """A chart of each logged figure by step."""
    found: list[tuple[str, Any]] = []
    for number, (key, title) in enumerate(DRAWN.items()):
        points = [(row["step"], row["figures"][key]) for row in history if key in row["figures"]]
        if len(points) > 1:
            dots = tuple(Dot(x, y, f"step {x}: {text.decimals(y)}", SHAPES[0]) for x, y in points)
            curve = Curve("", shade(number, 0, len(DRAWN) - 1), dots, dots)
            found += drawn([curve], whole_axis([x for x, _ in points], "step"), key, title, f"history-{key}")
    return found


render_preference = Page(
    "preference",
    "Preference training",
    PreferenceRecord,
    lambda record: whole_page(preference_view(record)),
    paper=lambda record: paper_of(preference_view(record)),
)
render_reward_model = Page(
    "reward_model",
    "Reward model",
    RewardModelRecord,
    lambda record: whole_page(reward_view(record)),
    paper=lambda record: paper_of(reward_view(record)),
)
