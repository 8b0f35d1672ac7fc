"""A heat map says its numbers in tooltips and in a table, whatever the labels are."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.pages import HOSTILE, Page
from unsleep.core import BadInput
from unsleep.pages import text
from unsleep.pages.heatmap import STEPS, heatmap
from unsleep.pages.page import source

FIGURES = st.floats(-1e6, 1e6).map(lambda x: round(x, 3))


@given(
    st.integers(1, 5).flatmap(
        lambda n: st.lists(st.lists(FIGURES | st.none(), min_size=n, max_size=n), min_size=1, max_size=4)
    ),
    st.booleans(),
)
def test_every_number_is_in_a_tooltip_and_in_the_table(values: list[list[float | None]], diverging: bool):
    rows, columns = [f"row {i}" for i in range(len(values))], [f"c{j}" for j in range(len(values[0]))]
    if all(v is None for line in values for v in line):
        with pytest.raises(BadInput, match="has no values"):
            heatmap(rows, columns, values, title="T", name="n", middle=0.0 if diverging else None)
        return
    drawn = str(heatmap(rows, columns, values, title="T", name="n", unit="nats", middle=0.0 if diverging else None))
    Page(drawn)
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            said = "not measured" if value is None else f"{text.number(value)} nats"
            assert f"<title>row {i}, c{j}: {said}</title>" in drawn
    cells = re.findall(r'<td class="num">([^<]*)</td>', drawn)
    assert cells == ["–" if v is None else text.number(v) for line in values for v in line]
    shades = re.findall(r'class="(heat-[\w-]+)"', drawn)
    assert {"heat-up-0", f"heat-up-{STEPS}"} <= set(shades)  # in the legend at least
    assert ("heat-down-1" in shades) or not diverging


def test_shades_follow_the_numbers():
    def shades(values: list[float], **scale: Any) -> list[str]:
        drawn = heatmap(["r"], [f"c{i}" for i in range(len(values))], [values], title="T", name="n", **scale)
        return re.findall(r'<rect [^>]*class="(heat-[\w-]+)"', str(drawn).split('class="heat-legend"')[0])

    assert shades([0.0, 5.0, 10.0]) == ["heat-up-0", "heat-up-5", "heat-up-10"]
    assert shades([3.0, 3.0]) == ["heat-up-5", "heat-up-5"]
    assert shades([-2.0, 0.0, 1.0, 2.0], middle=0.0) == ["heat-down-10", "heat-up-0", "heat-up-5", "heat-up-10"]
    assert shades([0.0, 0.0], middle=0.0) == ["heat-up-0", "heat-up-0"]
    assert (
        shades([0.96, 0.98, 1.0], ends=(0.0, 1.0)) == ["heat-up-10"] * 3
    )  # of a share, little is not made to look much
    assert shades([0.0, 0.5, 0.75, 1.0], ends=(0.0, 1.0), middle=0.5) == [
        *("heat-down-10", "heat-up-0", "heat-up-5", "heat-up-10")
    ]
    assert shades([-3.0, 3.0], ends=(0.0, 1.0)) == ["heat-up-0", "heat-up-10"]


def test_notes_stand_behind_their_numbers():
    drawn = str(heatmap(["r"], ["a", "b"], [[0.5, None]], title="T", name="n", unit="%", notes=[["[0.2, 0.8]", "x"]]))
    assert "<title>r, a: 0.5 % [0.2, 0.8]</title>" in drawn
    assert '<td class="num">0.5 [0.2, 0.8]</td><td class="num">–</td>' in drawn


def test_every_shade_has_a_colour_and_no_style_is_inline():
    css = source("heatmap.css")
    for hue in ("up", "down"):
        for step in range(STEPS + 1):
            assert f".heat-{hue}-{step} {{" in css
    drawn = str(heatmap(["a"], ["b"], [[1.0]], title="T", name="n"))
    assert "style=" not in drawn
    assert 'tabindex="0"' in drawn  # the table can be reached and scrolled by keyboard
    assert 'role="img"' in drawn


def test_counts_have_no_decimals_and_shares_do():
    def written(values: list[float], **scale: Any) -> list[str]:
        drawn = str(heatmap(["r"], ["a", "b"], [values], title="T", name="n", **scale))
        return re.findall(r'<text [^>]*class="on-\w+">([^<]*)</text>', drawn)

    assert written([0.0, 2.0], ends=(0.0, 4.0)) == ["0", "2"]
    assert written([0.0, 1.0], ends=(0.0, 1.0)) == ["0.00", "1.00"]
    assert written([0.5, 2.0]) == ["0.50", "2.00"]
    assert written([0.00073, 0.5]) == ["0.00", "0.50"]


def test_hostile_labels_are_only_text():
    drawn = str(heatmap([HOSTILE.replace("\ud800", "")], ["<b>"], [[1.0]], title="<script>", name="n"))
    page = Page(drawn)
    assert {tag for tag, _ in page.elements} <= {
        *("figure", "figcaption", "b", "svg", "title", "desc", "text", "g", "rect", "p", "details", "summary"),
        *("div", "table", "thead", "tbody", "tr", "th", "td"),
    }


@pytest.mark.parametrize("values", [[[1.0]], [[1.0, 2.0], [1.0]], []])
def test_a_matrix_of_another_shape_is_refused(values: list[list[float | None]]):
    with pytest.raises(BadInput, match="expected 2 of 2"):
        heatmap(["a", "b"], ["c", "d"], values, title="T", name="n")


def test_many_columns_stay_within_the_drawing():
    columns = [f"resid.{i}" for i in range(60)]
    drawn = str(heatmap(["a", "b"], columns, [[float(i) for i in range(60)]] * 2, title="T", name="n"))
    found = re.search(r'viewBox="0 0 (\d+) (\d+)"', drawn)
    assert found
    assert int(found[1]) <= 960
    assert max(float(x) for x in re.findall(r'<rect x="([\d.]+)"', drawn)) < int(found[1])
