"""Serves an explorer folder on this machine, with a live model or without."""

from __future__ import annotations

import contextlib
import threading
import webbrowser
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from unsleep.base import store
from unsleep.core import BadInput
from unsleep.explorer.served import Explorer, explorer
from unsleep.explorer.session import Live, Session


def open_browser(address: str) -> None:
    """Open an address in the browser, without waiting for it."""
    threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()


def serve(
    folder: str | Path,
    live: Live | None = None,
    *,
    port: int | None = None,
    opened: Callable[[str], None] = open_browser,
) -> None:
    """Serve an explorer folder on 127.0.0.1 until Ctrl-C.

    Args:
        folder: made by `unsleep explore`.
        live: model, dictionaries and prompts; without it, the page is as it opens from disk.
        port: 1024 to 65535; default one that is free.
        opened: called with the launch link once the server listens; the link opens the page once.

    Raises:
        BadInput: the extra `serve` is not installed, the folder is none of the explorer's, it shows features of other
            dictionaries than the live ones, or the port is in use.
    """
    check(folder, port)
    from unsleep.explorer import running  # needs the extra

    found = explorer(Path(folder), live=live is not None)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(running.listening(port))
        session = None
        if live is not None:
            steps = stack.enter_context(store.scratch_folder(found.folder / "proofs"))
            session = Session(named(live, found), found.circuits, steps)
        running.run(found, session, listener, opened)


def check(folder: str | Path, port: int | None) -> None:
    """Raise `BadInput` as `serve` does for what can be known before a model is loaded."""
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise BadInput(f"the server needs {missing[0]}, which is not installed; pip install 'unsleep[serve]'")
    from unsleep.explorer import running

    explorer(Path(folder), live=False)
    with running.listening(port):
        pass


def named(live: Live, found: Explorer) -> Live:
    """The live model, with the keys that its dictionaries have on the page.

    Raises `BadInput` where the page shows features of another dictionary of a Site.
    """
    own = {d.site: d.hash for d in live.dictionaries}
    for shown in found.dictionaries:
        if own.get(shown.site, shown.hash) != shown.hash:
            raise BadInput(
                f"the page shows features of dictionary {shown.hash} at {shown.site}, and --dictionaries has "
                f"{own[shown.site]}; give the one that its statistics were made with"
            )
    return replace(live, names={shown.hash: shown.key for shown in found.dictionaries})
