"""Access to the server: for its own page in the browser that opened the launch link, and nothing else.

Every request passes the same checks, in this order: the exact Host (421), the launch token or the cookie (401), the
site that it comes from (403). Every response has the security headers.
"""

from __future__ import annotations

import secrets
from http import HTTPStatus

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unsleep.explorer.served import POLICY

HOST = "127.0.0.1"
"""The only address that the server listens on."""

NAMES = (HOST, "localhost")

HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
"""Headers of every response that has none of that name."""


class Guard:
    """An ASGI application that lets through only what the launched browser sends from the page."""

    def __init__(self, app: ASGIApp, port: int) -> None:
        self.app, self.port = app, port
        self.hosts = frozenset(f"{name}:{port}" for name in NAMES)
        self.cookie_name = f"unsleep-{port}"  # browsers send a cookie to every port of a host
        self._token: str | None = secrets.token_urlsafe(32)
        self._cookie = secrets.token_urlsafe(32)

    @property
    def address(self) -> str:
        """The launch link; its token opens the page once."""
        return f"http://{HOST}:{self.port}/?token={self._token or 'spent'}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            answer = self._answer(Request(scope))
            await (answer or self.app)(scope, receive, _with_headers(send))
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _answer(self, request: Request) -> Response | None:
        """The response to a request that is not passed on."""
        hosts = request.headers.getlist("host")
        if len(hosts) != 1 or hosts[0] not in self.hosts:
            return _refusal(HTTPStatus.MISDIRECTED_REQUEST, "unknown host")
        is_known, token = self._is_known(request), request.query_params.get("token")
        if token is not None and request.method == "GET" and request.url.path == "/":
            if is_known:
                return RedirectResponse("/", HTTPStatus.SEE_OTHER)
            return self._launched() if self._spend(token) else _refusal(HTTPStatus.UNAUTHORIZED, UNKNOWN)
        if not is_known:
            return _refusal(HTTPStatus.UNAUTHORIZED, UNKNOWN)
        if not _is_own(request, hosts[0]):
            return _refusal(HTTPStatus.FORBIDDEN, "the request does not come from the page")
        return None

    def _is_known(self, request: Request) -> bool:
        given = request.cookies.get(self.cookie_name, "")
        return secrets.compare_digest(given.encode(), self._cookie.encode())

    def _spend(self, token: str) -> bool:
        """True for the launch token, the first time."""
        if self._token is None or not secrets.compare_digest(token.encode(), self._token.encode()):
            return False
        self._token = None
        return True

    def _launched(self) -> Response:
        response = RedirectResponse("/", HTTPStatus.SEE_OTHER)
        response.set_cookie(self.cookie_name, self._cookie, httponly=True, samesite="strict", path="/")
        return response


UNKNOWN = "Open the link that `unsleep serve` printed; it works once. If this is its browser, reload the page."


def _is_own(request: Request, host: str) -> bool:
    """True for a request of the page itself, or one that opens it.

    A POST has to name its origin. A page on another port of the same host is another site here, although browsers
    send it the cookie.
    """
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
    if origin is None:
        if request.method not in ("GET", "HEAD"):
            return False
    elif origin != f"http://{host}":
        return False
    opens = request.method == "GET" and request.headers.get("sec-fetch-mode") == "navigate"
    return opens or site in (None, "same-origin", "none")


def _refusal(status: HTTPStatus, words: str) -> Response:
    return PlainTextResponse(f"{words}\n", status)


def _with_headers(send: Send) -> Send:
    async def sealed(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return sealed
