"""A headless Chromium over the DevTools protocol, by pipes: no port, and no package besides the browser."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import queue
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--remote-debugging-pipe",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--force-color-profile=srgb",
)

KEYS = {
    "ArrowDown": 40,
    "ArrowUp": 38,
    "ArrowLeft": 37,
    "ArrowRight": 39,
    "Enter": 13,
    "Escape": 27,
    "Tab": 9,
    "Home": 36,
    "End": 35,
    "PageDown": 34,
    "PageUp": 33,
}


class Tab:
    """A page in the browser."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session
        self.troubles: list[str] = []
        """Errors and warnings of its console, exceptions, and requests that failed or were blocked."""

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **params)

    def open(self, url: str, ready: str) -> None:
        """Go to an address and wait until an expression is true."""
        self.call("Page.navigate", url="about:blank")  # an address that differs in its hash alone loads nothing
        self.call("Page.navigate", url=url)
        self.until(ready)

    def run(self, expression: str) -> Any:
        """The value of an expression, awaited."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise AssertionError(found["exceptionDetails"].get("exception", {}).get("description", found))
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 20) -> Any:
        """Wait for an expression to be true; its value."""
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(AssertionError):
                if found := self.run(f"!!({expression})"):
                    return found
            if time.monotonic() > end:
                raise AssertionError(f"never true: {expression}\n{self.text()[:2000]}\n{self.troubles}")
            time.sleep(0.03)

    def text(self, selector: str = "body") -> str:
        """Visible text of an element; empty where there is none."""
        return self.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")

    def count(self, selector: str) -> int:
        return self.run(f"document.querySelectorAll({json.dumps(selector)}).length")

    def place(self, selector: str) -> tuple[float, float]:
        """Middle of an element that is brought into view."""
        found = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); if (!e) return null;"
            "e.scrollIntoView({block: 'nearest'}); const r = e.getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        assert found, f"nothing matches {selector}"
        return found[0], found[1]

    def mouse(self, kind: str, x: float, y: float, **params: Any) -> None:
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **params)

    def click(self, selector: str, modifiers: int = 0) -> None:
        self.click_at(*self.place(selector), modifiers=modifiers)

    def click_at(self, x: float, y: float, modifiers: int = 0, times: int = 1) -> None:
        self.mouse("mouseMoved", x, y)
        for n in range(1, times + 1):
            for kind in ("mousePressed", "mouseReleased"):
                self.mouse(kind, x, y, button="left", clickCount=n, modifiers=modifiers)

    def press(self, key: str, modifiers: int = 0) -> None:
        code = KEYS.get(key, ord(key.upper()) if len(key) == 1 else 0)
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        same = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **same, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **same)

    def write(self, selector: str, text: str) -> None:
        """Replace the text of a field, as typing would."""
        self.run(f"document.querySelector({json.dumps(selector)}).select()")
        self.call("Input.insertText", text=text)

    def set(self, selector: str, value: str) -> None:
        """Set a slider or a choice, as a reader would."""
        self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            f"Object.getOwnPropertyDescriptor(Object.getPrototypeOf(e), 'value').set.call(e, {json.dumps(value)});"
            "for (const kind of ['input', 'change']) e.dispatchEvent(new Event(kind, {bubbles: true})); })()"
        )

    def picture(self, path: Path) -> None:
        """A screenshot as PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def size(self, width: int, height: int, *, dark: bool = False, scale: float = 1) -> None:
        """Size of the window, and the colours that the system prefers."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])


class Browser:
    """A running browser."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        mine_in, theirs_out = os.pipe()
        theirs_in, mine_out = os.pipe()

        def place() -> None:  # the browser reads from 3 and writes to 4
            os.dup2(theirs_in, 200)
            os.dup2(theirs_out, 201)
            os.dup2(200, 3)
            os.dup2(201, 4)

        words = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        fds = (3, 4, theirs_in, theirs_out)
        self.process = subprocess.Popen(
            words, preexec_fn=place, pass_fds=fds, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._out = mine_out
        self._numbers = itertools.count(1)
        self._answers: dict[int, queue.Queue[dict[str, Any]]] = {}
        self._tabs: dict[str, Tab] = {}
        threading.Thread(target=self._read, args=(mine_in,), daemon=True).start()

    def _read(self, source: int) -> None:
        rest = b""
        with os.fdopen(source, "rb", buffering=0) as pipe:
            while piece := pipe.read(1 << 16):
                *messages, rest = (rest + piece).split(b"\0")
                for message in messages:
                    self._take(json.loads(message))

    def _take(self, message: dict[str, Any]) -> None:
        if "id" in message:
            self._answers[message["id"]].put(message)
        elif tab := self._tabs.get(message.get("sessionId", "")):
            _note(tab, message["method"], message["params"])

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._answers[number] = queue.Queue()
        message = {"id": number, "method": method, "params": params, **({"sessionId": session} if session else {})}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        found = self._answers[number].get(timeout=60)
        del self._answers[number]
        if "error" in found:
            raise AssertionError(f"{method}: {found['error']}")
        return found["result"]

    def tab(self, width: int = 1440, height: int = 900, *, dark: bool = False, scale: float = 1) -> Tab:
        """A new page."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = self._tabs[session] = Tab(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        tab.size(width, height, dark=dark, scale=scale)
        return tab

    def close(self) -> None:
        with contextlib.suppress(AssertionError, OSError, queue.Empty):
            self.call("Browser.close")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=10)
        self.process.kill()


def _note(tab: Tab, method: str, params: dict[str, Any]) -> None:
    if method == "Runtime.exceptionThrown":
        details = params["exceptionDetails"]
        tab.troubles.append(details.get("exception", {}).get("description", details["text"]))
    elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
        tab.troubles.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
    elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
        tab.troubles.append(str([a.get("value", a.get("description")) for a in params["args"]]))
    elif method == "Page.javascriptDialogOpening":
        tab.troubles.append(f"dialog: {params['message']}")


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser with a profile of its own."""
    browser = Browser(profile)
    try:
        yield browser
    finally:
        browser.close()
