"""Headless Chromium over its debugging pipe (Chrome DevTools Protocol), with nothing but the standard library."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import F_DUPFD, fcntl
from pathlib import Path
from select import select
from signal import SIGTERM
from time import monotonic
from typing import Any

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
    "--autoplay-policy=no-user-gesture-required",
)


def executable() -> str | None:
    """The path of the browser; None if there is none."""
    return next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )


class Page:
    """One open page. `errors` collects console errors and exceptions, `requests` every requested URL."""

    def __init__(self, read: int, write: int, timeout: float) -> None:
        self._read, self._write, self._timeout = read, write, timeout
        self._buffer, self._last, self._session = b"", 0, ""
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _message(self) -> dict[str, Any]:
        end = monotonic() + self._timeout
        while b"\0" not in self._buffer:
            if not select([self._read], [], [], max(0.0, end - monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            arrived = os.read(self._read, 1 << 20)
            if not arrived:
                raise EOFError("the browser has gone")
            self._buffer += arrived
        text, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(text)
        detail = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(detail["exceptionDetails"].get("text")))
        elif message.get("method") == "Log.entryAdded" and detail["entry"]["level"] in ("error", "warning"):
            self.errors.append(detail["entry"]["text"])
        elif message.get("method") == "Runtime.consoleAPICalled":
            self.errors.append(f"console.{detail['type']}")
        elif message.get("method") == "Network.requestWillBeSent":
            self.requests.append(detail["request"]["url"])
        return message

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last += 1
        request: dict[str, Any] = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            request["sessionId"] = self._session
        os.write(self._write, json.dumps(request).encode() + b"\0")
        while True:
            message = self._message()
            if message.get("id") == self._last:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                result: dict[str, Any] = message["result"]
                return result

    def open(self, path: Path, *, width: int = 1280, dark: bool = False) -> None:
        """Load a file at a viewport's width in px, and wait until it is there."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Page.navigate", url=path.resolve().as_uri())
        while self._message().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        answer = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description", "script failed"))
        return answer["result"].get("value")

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))


@contextmanager
def browsing(profile: Path, *, timeout: float = 60) -> Iterator[Page]:
    """A page in a fresh browser with an empty profile folder; the browser ends with the block."""
    program = executable()
    if program is None:
        raise RuntimeError("no chromium")
    (child_read, write), (read, child_write) = os.pipe(), os.pipe()
    # Chromium reads commands from descriptor 3 and answers on 4; both ends are first moved away from those two.
    ends = [fcntl(end, F_DUPFD, 20) for end in (child_read, child_write)]
    actions: list[Any] = [(os.POSIX_SPAWN_DUP2, end, number) for end, number in zip(ends, (3, 4), strict=True)]
    actions += [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_WRONLY, 0) for number in (1, 2)]
    arguments = [program, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
    process = os.posix_spawn(program, arguments, os.environ, file_actions=actions)
    for end in (child_read, child_write, *ends):
        os.close(end)
    try:
        yield Page(read, write, timeout)
    finally:
        os.kill(process, SIGTERM)
        os.waitpid(process, 0)
        os.close(read)
        os.close(write)
