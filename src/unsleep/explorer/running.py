"""The running server: its socket, its signals and its end."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Generator
from types import FrameType

import uvicorn

from unsleep.core import BadInput
from unsleep.explorer.guard import HOST, Guard
from unsleep.explorer.served import Explorer
from unsleep.explorer.server import application
from unsleep.explorer.session import Session
from unsleep.explorer.work import Worker

PORTS = range(1024, 65536)

GRACE = 5
"""Seconds that open connections are given when the server stops."""


@contextlib.contextmanager
def listening(port: int | None) -> Generator[socket.socket]:
    """A socket that listens on 127.0.0.1 at a port, or at a free one; raises `BadInput` for a port in use."""
    if port is not None and port not in PORTS:
        raise BadInput(f"--port is {port}; expected {PORTS[0]} to {PORTS[-1]}")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        if os.name == "posix":  # elsewhere the option lets two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port or 0))
            listener.listen()
        except OSError as error:
            raise BadInput(
                f"--port is {port}, which is not free ({error.strerror}); leave it out for any port"
            ) from None
        yield listener


class _Server(uvicorn.Server):
    """A server that cancels the running work when a signal tells it to stop, so that streams end at once."""

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self.worker = worker

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop; the second signal does not wait for open connections."""
        self.worker.stop()
        self.force_exit, self.should_exit = self.should_exit, True


def run(found: Explorer, session: Session | None, listener: socket.socket, opened: Callable[[str], None]) -> None:
    """Serve until a signal, with the guard before everything; `opened` is called with the launch link."""
    worker = Worker()
    guard = Guard(application(found, session, worker), listener.getsockname()[1])
    config = uvicorn.Config(
        guard,
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=GRACE,
    )
    opened(guard.address)
    asyncio_log = logging.getLogger("asyncio")
    level = asyncio_log.level
    asyncio_log.setLevel(logging.ERROR)  # it warns of every browser that leaves while a reply is sent
    try:
        with contextlib.suppress(KeyboardInterrupt):
            _Server(config, worker).run(sockets=[listener])
    finally:
        worker.close()
        asyncio_log.setLevel(level)
