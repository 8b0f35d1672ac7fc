"""Chat endpoints with OpenAI's interface as judges: one POST per question, by the standard library.

The key is read from an environment variable. It is sent to the endpoint's own host and nowhere else (redirects are not
followed, and without TLS only this machine is asked), and removed from whatever the endpoint says.
"""

from __future__ import annotations

import email.utils
import http.client
import ipaddress
import json
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

from unsleep.base.store import fields_of
from unsleep.core import BadInput, check_least
from unsleep.explanations.judges import Declined, Judge, Question, Reply, Unavailable

MAX_BODY = 4 << 20
"""Maximum size of a response, in bytes."""

SECRET = 8
"""Characters from which on a key is taken for a secret and removed from texts; shorter ones are placeholders."""

BYTES_PER_TOKEN = 3
"""Of UTF-8, for an estimate on the high side: English has about 4, code and other scripts fewer."""

NO_CONNECTION = "no connection"
"""Beginning of the reason for no answer where the endpoint could not be reached."""

AROUND = 8
"""Tokens that a chat template puts around a message, in an estimate."""

BUSY = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses after which another try may succeed."""

TOO_LONG = re.compile(
    r"context.{0,20}(length|window|size)|maximum.{0,20}tokens|too (long|many tokens)|max_model_len", re.I
)

OWN = ("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "stream", "n")
"""Fields of a request that `--body` cannot set."""


@dataclass(frozen=True)
class EndpointConfig:
    """A chat endpoint and the parameters of its requests."""

    endpoint: str | None = None
    """Base URL of an OpenAI-compatible endpoint, such as https://api.openai.com/v1 or http://localhost:8000/v1."""
    key_env: str | None = None
    """Name of the environment variable that holds the endpoint's key; without it, no key is sent."""
    timeout: float = 120.0
    """Seconds for one call."""
    parallel: int = 8
    """Calls in flight at a time."""
    temperature: float = 0.0
    """Sampling temperature; an endpoint that takes none uses its own."""
    body: str | None = None
    """Further fields of a request, as a JSON object, such as '{"reasoning_effort": "low"}'."""

    def __post_init__(self) -> None:
        check_least(self, "", 0, "temperature")
        check_least(self, "", 1, "parallel")
        if not self.timeout > 0:
            raise BadInput.of("timeout", self.timeout, "more than 0 seconds")
        if self.endpoint is not None:
            _checked(self.endpoint)
        _ = self.fields

    @property
    def fields(self) -> dict[str, Any]:
        """The further fields of a request; raises `BadInput` where they are none."""
        try:
            found: Any = json.loads(self.body or "{}")
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise BadInput.of("body", self.body, 'a JSON object, such as {"reasoning_effort": "low"}')
        if taken := [name for name in OWN if name in found]:
            raise BadInput(f"--body sets {taken[0]}, which unsleep sets itself; leave it out")
        return found


class _Form(NamedTuple):
    """Parameters that endpoints differ in."""

    limit: str = "max_tokens"
    temperature: bool = True


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which would carry the key to another host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """No new request: the redirect is an error."""


@dataclass
class Endpoint(Judge):
    """An OpenAI-compatible chat endpoint."""

    model: str
    url: str
    config: EndpointConfig = EndpointConfig()
    key: str = field(default="", repr=False)
    tokenize: Callable[[str], int] | None = field(default=None, repr=False)
    """Length of a text in tokens; `None` estimates it from its bytes."""

    def __post_init__(self) -> None:
        parts = _checked(self.url)
        self.url = self.url.rstrip("/").removesuffix("/chat/completions")
        own = _is_this_machine(parts.hostname or "")
        if self.key and parts.scheme == "http" and not own:
            raise BadInput(f"{self.url} is not encrypted, and would see the key in transit; use https, or no --key-env")
        proxies = [urllib.request.ProxyHandler({})] if own else []
        self._opener = urllib.request.build_opener(_NoRedirects(), *proxies)
        self._form = _Form()
        self.parallel, self.notes = self.config.parallel, []

    @classmethod
    def of(cls, model: str, config: EndpointConfig, tokenize: Callable[[str], int] | None = None) -> Endpoint:
        """The endpoint of a configuration, with the key from its environment variable.

        Raises `BadInput` where the variable is not set or holds no key.
        """
        if config.endpoint is None:
            raise BadInput("--endpoint is missing; expected a base URL such as https://api.openai.com/v1")
        return cls(model, config.endpoint, config, _key(config.key_env), tokenize)

    @property
    def name(self) -> str:
        """The model's name at the endpoint."""
        return self.model

    @property
    def identity(self) -> dict[str, Any]:
        """URL, model and parameters."""
        body = {"body": self.config.fields} if self.config.body else {}
        return {"endpoint": self.url, "model": self.model, "temperature": self.config.temperature, **body}

    def count(self, question: Question[Any]) -> int:
        """Length of a question in tokens: exact up to the template with `tokenize`, else a high estimate."""
        return sum(self._length(message["content"]) + AROUND for message in question.messages)

    def _length(self, text: str) -> int:
        return self.tokenize(text) if self.tokenize else -(-len(text.encode("utf-8", "replace")) // BYTES_PER_TOKEN)

    def reply(self, questions: Sequence[Question[Any]]) -> list[Reply | Declined]:
        """The answer to one question.

        Raises `Unavailable` for a busy or failing endpoint, `BadInput` for a request that it refuses.
        """
        [question], form = questions, self._form
        try:
            with self._opener.open(self._request(question, form), timeout=self.config.timeout) as response:
                return [self._answer(self._body(response), str(response.headers.get_content_type()), question)]
        except urllib.error.HTTPError as error:
            with error:
                return [self._refusal(error, form)]
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error) from None

    def _request(self, question: Question[Any], form: _Form) -> urllib.request.Request:
        warmth = {"temperature": self.config.temperature} if form.temperature else {}
        own = {"model": self.model, "messages": question.messages, form.limit: question.tokens, **warmth}
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "unsleep"}
        request = urllib.request.Request(
            f"{self.url}/chat/completions",
            json.dumps({**own, **self.config.fields, "stream": False}).encode(),
            headers,
            method="POST",
        )
        if self.key:
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        return request

    def _body(self, response: Any) -> bytes:
        """The response without the key, read within the timeout; raises `Unavailable` for one that is too long."""
        body, deadline = b"", time.monotonic() + self.config.timeout
        while piece := response.read1(1 << 16):
            body += piece
            if len(body) > MAX_BODY:
                raise Unavailable(f"the response is longer than {MAX_BODY >> 20} MiB", billed=True)
            if time.monotonic() > deadline:
                raise TimeoutError
        return body.replace(self.key.encode(), b"[key]") if len(self.key) >= SECRET else body

    def _answer(self, body: bytes, kind: str, question: Question[Any]) -> Reply:
        """The reply in a response; raises `Unavailable` where there is none."""
        if not kind.endswith("json"):
            raise Unavailable(f"the response is {_clip(kind)}, not JSON; is {self.url} the base URL?", billed=True)
        try:
            found = fields_of(json.loads(body), {"choices": list}, "the response")
            choice = fields_of(next(iter(found["choices"]), None), {"message": dict}, "its first choice")
            text = fields_of(choice["message"], {"content": str | None}, "its message")["content"] or ""
        except (ValueError, RecursionError) as error:
            words = str(error) if isinstance(error, BadInput) else "it is not valid JSON"
            raise Unavailable(f"the response has no answer: {self._clean(words)}", billed=True) from None
        usage = found.get("usage")
        return Reply(
            self._clean(text, clip=None),
            _tokens(usage, "prompt_tokens", self.count(question)),
            _tokens(usage, "completion_tokens", min(self._length(text), question.tokens)),
            choice.get("finish_reason") == "length",
        )

    def _refusal(self, error: urllib.error.HTTPError, form: _Form) -> Declined:
        """A question that is too long; raises `Unavailable` or `BadInput` for any other status."""
        status, where = error.code, f"{self.url} answered {error.code}"
        if status in (401, 403):  # its words may hold a part of the key
            env = self.config.key_env
            key = f"the key in ${env}" if env else "whether it needs a key: --key-env names its environment variable"
            raise BadInput(f"{where}; check {key}")
        if 300 <= status < 400:
            raise BadInput(f"{where}, a redirect, which is not followed; give the URL that it leads to")
        words = self._words(error)
        if status in (400, 413, 422) and TOO_LONG.search(words):
            return Declined("too long for the judge's context; lower --shown or --per-call")
        if status == 400 and self._adapted(words, form):
            raise Unavailable(words, wait=0.0)
        if status in BUSY:
            raise Unavailable(
                f"status {status}{words and f', {words}'}", _retry_after(error.headers.get("Retry-After"))
            )
        raise BadInput(f"{where}: {words or error.reason}; check --judge and --endpoint")

    def _adapted(self, words: str, form: _Form) -> bool:
        """True if the request is to be sent again without a parameter that the model does not take."""
        if "max_completion_tokens" in words and form.limit == "max_tokens":
            self._form = self._form._replace(limit="max_completion_tokens")
        elif "temperature" in words and form.temperature:
            self._form = self._form._replace(temperature=False)
            self.notes = [f"{self.model} takes no temperature; its own is used"]
        else:
            return False
        return True

    def _words(self, error: urllib.error.HTTPError) -> str:
        """The endpoint's message about an error, in one line."""
        try:
            found = json.loads(self._body(error))
            said = found.get("error", found.get("message", found.get("detail", "")))
            text = said.get("message", "") if isinstance(said, dict) else said
        except (ValueError, AttributeError, RecursionError, OSError, http.client.HTTPException, Unavailable):
            return ""
        return self._clean(text) if isinstance(text, str) else ""

    def _broken(self, error: Exception) -> Unavailable | BadInput:
        """The error for a connection that failed."""
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, ssl.SSLCertVerificationError):
            return BadInput(f"{self.url} has no valid certificate ({cause.verify_message}); check --endpoint")
        if isinstance(cause, TimeoutError):
            sent = cause is error  # urllib wraps errors of the connection, before the request
            return Unavailable(f"no answer within --timeout {self.config.timeout:g} s", billed=sent)
        return Unavailable(f"{NO_CONNECTION} ({self._clean(str(cause)) or type(cause).__name__})")

    def _clean(self, text: str, clip: int | None = 200) -> str:
        """A text of the endpoint without the key, as valid Unicode; messages in one short line."""
        if len(self.key) >= SECRET:
            text = text.replace(self.key, "[key]")
        text = text.encode("utf-8", "replace").decode()
        return text if clip is None else _clip(" ".join(text.split()), clip)


def _clip(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[:limit]}…"


def _checked(url: str) -> SplitResult:
    """The parts of a base URL; raises `BadInput` for any other, without quoting a password in it."""
    try:
        parts = urlsplit(url)
        named = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        parts, named = SplitResult("", "", "", "", ""), None
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise BadInput("--endpoint holds a password or parameters; give the base URL alone, and the key by --key-env")
    if not named or not url.isascii() or not url.isprintable() or " " in url:
        raise BadInput.of("endpoint", url, "a base URL such as https://api.openai.com/v1")
    return parts


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _key(variable: str | None) -> str:
    """The key in an environment variable; raises `BadInput`, never quoting it, where there is none."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise BadInput(f"--key-env names ${variable}, which is not set; expected a variable that holds the key")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise BadInput(f"${variable} holds characters that no key has; expected printable ASCII without spaces")
    return key


def _retry_after(text: str | None) -> float | None:
    """Seconds of a Retry-After header, a number or a date (RFC 9110, section 10.2.3); `None` for any other text."""
    if text is None:
        return None
    try:
        seconds = float(text) if re.fullmatch(r"\d+(\.\d+)?", text.strip()) else None
        return seconds if seconds is not None else email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None


def _tokens(usage: Any, name: str, estimate: int) -> int:
    """A count of the response's usage, or the estimate where it says none."""
    found: Any = usage.get(name) if isinstance(usage, dict) else None
    return found if type(found) is int and 0 <= found < 10**9 else estimate
