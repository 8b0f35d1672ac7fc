"""A chat endpoint on this machine, with a judge behind it and faults in front; features with a planted rule."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from unsleep.core import Site
from unsleep.explanations.judged import HeldOut
from unsleep.explanations.record import Context, FeatureCard, TokenWeight
from unsleep.models.model import Named

KEY = "sk-test-0123456789abcdef"
WORDS = ("garlic", "comet", "harbour", "violin")
"""Feature i fires at the full stop of a sentence with the word i."""

Reply = Callable[["Handler"], None]
"""Writes a response."""


class Handler(BaseHTTPRequestHandler):
    """Records a request, and answers it by the next fault, or by the judge."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append({"path": self.path, "body": body, "key": self.headers.get("Authorization")})
            fault = self.server.faults.pop(0) if self.server.faults else None
        self.body = body
        if fault:
            fault(self)
        else:
            self.say(self.server.judge(body["messages"][-1]["content"]))

    def say(self, text: str | None, **more: Any) -> None:
        """An answer as OpenAI has it."""
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", **more}
        self.send(200, {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 10}})

    def send(self, status: int, body: Any, kind: str = "application/json", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


class Server(ThreadingHTTPServer):
    """The endpoint; a context in which it runs."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, judge: Callable[[str], str], faults: Sequence[Reply] = ()) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.judge, self.faults, self.lock = judge, list(faults), threading.Lock()
        self.asked: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a client that hangs up is part of the tests."""

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


def error(status: int, message: str = "", **headers: str) -> Reply:
    """A fault: a status with OpenAI's form of a message."""
    return lambda to: to.send(status, {"error": {"message": message}}, **headers)


def late(seconds: float) -> Reply:
    """A fault: silence."""
    return lambda to: time.sleep(seconds)


def saying(text: str | None, **more: Any) -> Reply:
    """A fault of the judge rather than the endpoint: an answer."""
    return lambda to: to.say(text, **more)


# Judges


def knowing(user: str) -> str:
    """A judge that knows the rule, and follows an explanation to the letter."""
    if '{"explanation"' in user:
        shown = user.partition("Words that")[0]
        word = max(WORDS, key=shown.count)
        return json.dumps({"explanation": f"It fires at the full stop of sentences with {word}."})
    explanation = user.partition("\n")[0]
    if "Classes:" in user:
        return json.dumps(["skill"] if "garlic" in explanation else ["unclear"])
    words = [word for word in WORDS if word in explanation] or ["."]  # the baseline names the token alone
    lines = re.findall(r"^\d+\. (.*)$", user, re.MULTILINE)
    if "Texts:" in user:
        texts = [json.loads(line) for line in lines]
        fires = [any(word in "".join(text.values()) for word in words) for text in texts]
        return json.dumps(
            [{n: 9 for n, t in text.items() if t == "." and yes} for text, yes in zip(texts, fires, strict=True)]
        )
    fires = [any(word in line for word in words) and ("⟦" not in line or "⟦.⟧" in line) for line in lines]
    return json.dumps([int(yes) for yes in fires])


def guessing(user: str) -> str:
    """A judge whose answers have the right form and no content."""
    draw = random.Random(user)
    if '{"explanation"' in user:
        return json.dumps({"explanation": f"Something like {draw.random()}."})
    lines = re.findall(r"^\d+\. (.*)$", user, re.MULTILINE)
    if "Classes:" in user:
        return '["unclear"]'
    if "Texts:" in user:
        return json.dumps([{n: draw.randrange(11) for n in json.loads(line)} for line in lines])
    return json.dumps([draw.randrange(2) for _ in lines])


# Features


def sentence(word: str, row: int, fires: bool, source: str, group: str) -> Context:
    draw = random.Random(f"{word} {row} {source} {fires}")
    tokens = [f" {draw.choice('abcdefghij')}{draw.randrange(100)}" for _ in range(8)]
    if fires:
        tokens[draw.randrange(8)] = f" {word}"
    values = (0.0,) * 8 + (draw.uniform(1, 9) if fires else 0.0,)
    return Context((*tokens, "."), values, 8, source, row, group)


class Planted:
    """Cards and held-out contexts of features with planted rules, `n` of each kind."""

    model, dictionary, site = Named("suspect", "f" * 16), "d" * 16, Site(2)

    def __init__(self, n: int = 12) -> None:
        self.n = n

    def card(self, feature: int) -> FeatureCard:
        word = WORDS[feature]
        groups = ("top", "0.5–0.75")
        contexts = tuple(sentence(word, i, True, "texts", groups[i % 2]) for i in range(8))
        return FeatureCard(feature, 0.01, 5.0, 10.0, (1, 2), contexts, (TokenWeight(" thus", 2.0),), ())

    def held_out(self, feature: int) -> HeldOut:
        firing, silent = (
            tuple(sentence(WORDS[feature], i, fires, "held", "held-out") for i in range(self.n))
            for fires in (True, False)
        )
        return HeldOut(firing, silent)
