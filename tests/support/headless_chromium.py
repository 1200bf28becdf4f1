# SPDX-License-Identifier: Apache-2.0
"""Debian's Chromium without a window, driven over a pipe: nothing is installed or downloaded.

The protocol is Chromium's own (https://chromedevtools.github.io/devtools-protocol): one JSON
message after another, each ended by a zero byte, on file descriptors 3 and 4.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from support.waits import LIMIT

ABSENT = (
    "Headless Chromium was not found, so report.html was not opened; "
    "install it with `apt-get install --no-install-recommends chromium`."
)


def chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


class Browser:
    """One browser with one page. A context: the process ends with it."""

    def __init__(self, profile: Path) -> None:
        program = chromium()
        assert program is not None, ABSENT
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # A shell puts the pipes where the browser looks for them: 3 to read, 4 to write.
        redirect = f'exec "$@" 3<&{to_read} 4>&{to_write}'
        flags = (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--remote-debugging-pipe",
            "--no-first-run",
            "--disable-extensions",
            "--disable-background-networking",
            "--disable-dev-shm-usage",
            f"--user-data-dir={profile}",
        )
        self._process = subprocess.Popen(
            ["bash", "-c", redirect, "bash", program, *flags],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_read)
        os.close(to_write)
        self._rest = b""
        self._number = 0
        self._session = ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._session = ""
        try:
            self.call("Browser.close")
            self._process.wait(LIMIT)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Send one command; events that come meanwhile are kept in ``events``."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": arguments}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]  # type: ignore[no-any-return]
            self.events.append(answer)

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            some = os.read(self._read, 1 << 16)
            if not some:
                raise OSError("Chromium ended before it answered.")
            self._rest += some
        text, _, self._rest = self._rest.partition(b"\0")
        return json.loads(text)  # type: ignore[no-any-return]

    def open(self, page: Path, width: int, height: int, scheme: str) -> None:
        """Show a file in a window of that many CSS pixels, in a scheme; return once it loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media="", features=features)
        self.events.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())

    def ask(self, expression: str) -> Any:
        """Return the value of an expression in the page, awaited."""
        answer = self.call(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def params_of(self, *methods: str) -> list[dict[str, Any]]:
        """Return the parameters of the events of these methods since the page was opened."""
        self.ask("0")  # events from before this answer have arrived with it
        return [event["params"] for event in self.events if event["method"] in methods]

    def complaints(self) -> list[dict[str, Any]]:
        """Return errors and warnings of the page since it was opened."""
        return self.params_of(
            "Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"
        )

    def shoot(self, picture: Path) -> bytes:
        """Return a PNG of the whole page, also kept as a file."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        options = {"optimizeForSpeed": True, "captureBeyondViewport": True, "clip": clip}
        shot = base64.b64decode(self.call("Page.captureScreenshot", **options)["data"])
        picture.write_bytes(shot)
        return shot

    def paper(self) -> bytes:
        """Return the page as a PDF, as it would be printed on A4."""
        options = {"printBackground": True, "paperWidth": 8.27, "paperHeight": 11.7}
        return base64.b64decode(self.call("Page.printToPDF", **options)["data"])
