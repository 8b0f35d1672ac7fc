"""The routes of the served page: its files, and the live API.

Requests are JSON objects by POST; chats, proofs and baking answer with server-sent events. Nothing is looked up by a
path from a request: a file is served only if it was found at the start.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from unsleep.base import records
from unsleep.core import BadInput, Refused
from unsleep.explorer.asked import ActivationsRequest, BakeRequest, CancelRequest, ChatRequest, ProofRequest
from unsleep.explorer.records import BAKED, PAGE
from unsleep.explorer.served import Explorer
from unsleep.explorer.session import Session
from unsleep.explorer.work import Busy, Cancelled, Event, Work, Worker

T = TypeVar("T")

LARGEST = 1 << 20
"""Most bytes of a request's body."""

NO_MODEL = {"live": False, "model": None, "sites": [], "dictionaries": [], "edit": None, "can_prove": False}


STATUS: dict[type[Exception], int] = {BadInput: 400, Busy: 409, Cancelled: 409, Refused: 422}
"""Status of the answer to an error."""


class Events(Response):
    """Server-sent events of a piece of work, which is cancelled when the browser goes away."""

    media_type = "text/event-stream"

    def __init__(self, work: Work) -> None:
        super().__init__()
        del self.headers["content-length"]
        self.work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send every event until the work ends or the connection does."""
        sending, gone = asyncio.create_task(self._send(send)), asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            self.work.cancel()
            sending.cancel()
            gone.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        with contextlib.suppress(OSError):  # the connection has ended
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for event in self.work.events():
                await send({"type": "http.response.body", "body": _encoded(event), "more_body": True})
            await send({"type": "http.response.body", "body": b""})


def _encoded(event: Event) -> bytes:
    return f"event: {event.name}\ndata: {json.dumps(event.data, allow_nan=False)}\n\n".encode()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Handlers:
    """The handlers of all routes."""

    def __init__(self, found: Explorer, session: Session | None, worker: Worker) -> None:
        self.found, self.live, self.worker = found, session, worker

    @property
    def session(self) -> Session:
        """The live model; raises `BadInput` without one."""
        if self.live is None:
            raise BadInput("the server has no model; start it with --model")
        return self.live

    async def file(self, request: Request) -> Response:
        """A file of the folder."""
        found = self.found.files.get(request.path_params["name"] or PAGE)
        if found is None:
            raise HTTPException(404)
        headers = {"content-security-policy": found.policy, "cache-control": "no-cache"}
        if found.body is not None:
            return Response(found.body, headers=headers, media_type=found.kind)
        return FileResponse(found.path, headers=headers, media_type=found.kind)

    async def about(self, request: Request) -> Response:
        """The live model, dictionaries and edit."""
        return JSONResponse(NO_MODEL if self.live is None else self.live.described())

    async def chat(self, request: Request) -> Response:
        """Replies, token by token."""
        asked, session = await body(request, ChatRequest), self.session
        return Events(await self.worker.start("a chat", lambda work: session.chat(asked, work)))

    async def features(self, request: Request) -> Response:
        """Activations of a text."""
        asked, session = await body(request, ActivationsRequest), self.session
        return JSONResponse(
            await self.worker.answer("a measurement on a text", lambda work: session.activations(asked, work))
        )

    async def proof(self, request: Request) -> Response:
        """Measurements on held-out prompts."""
        asked, session = await body(request, ProofRequest), self.session
        return Events(await self.worker.start("a proof", lambda work: session.prove(asked, work)))

    async def bake(self, request: Request) -> Response:
        """A checkpoint with the edit in its weights."""
        asked, session, folder = await body(request, BakeRequest), self.session, self.found.folder / BAKED
        return Events(await self.worker.start("a bake", lambda work: session.bake(asked, work, folder)))

    async def cancel(self, request: Request) -> Response:
        """Cancel what is running; the answer comes when it has stopped."""
        await body(request, CancelRequest)
        return JSONResponse({"cancelled": await self.worker.cancel()})

    @property
    def routes(self) -> list[Route]:
        """Every route."""
        posts: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "chat": self.chat,
            "features": self.features,
            "proof": self.proof,
            "bake": self.bake,
            "cancel": self.cancel,
        }
        return [
            Route("/api/session", self.about, methods=["GET"]),
            *(Route(f"/api/{name}", handler, methods=["POST"]) for name, handler in posts.items()),
            Route("/{name:path}", self.file, methods=["GET"]),
        ]


async def body(request: Request, kind: type[T]) -> T:
    """A request's JSON body.

    Raises `HTTPException` for another media type or too many bytes, and `BadInput` as `records.parsed` does.
    """
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != "application/json":
        raise HTTPException(415, "expected application/json")
    held = bytearray()
    async for piece in request.stream():
        held += piece
        if len(held) > LARGEST:
            raise HTTPException(413, f"expected at most {LARGEST} bytes")
    try:
        value: Any = json.loads(held)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"the request is not valid JSON: {error}") from None
    return records.parsed(kind, value, "request")


async def _told(request: Request, error: Exception) -> Response:
    """An error as JSON: {error}."""
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)
    return JSONResponse({"error": str(error) or "cancelled"}, STATUS[type(error)])


def application(found: Explorer, session: Session | None, worker: Worker) -> Starlette:
    """The application behind the guard."""
    handlers = Handlers(found, session, worker)
    told = dict.fromkeys((HTTPException, *STATUS), _told)
    return Starlette(routes=handlers.routes, exception_handlers=told)
