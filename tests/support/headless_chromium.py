# SPDX-License-Identifier: Apache-2.0
"""Debian's Chromium without a window, driven over a pipe: nothing is installed or downloaded.

The protocol is Chromium's own (https://chromedevtools.github.io/devtools-protocol): one JSON
message after another, each ended by a zero byte, on file descriptors 3 and 4.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
ABSENT = (
    "Headless Chromium was not found, so report.html was not opened; "
    "install it with `apt-get install --no-install-recommends chromium`."
)
_COMPLAINTS = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
_PATIENCE = 30.0  # seconds for one answer


def chromium() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One browser with one page. A context: the process ends with it."""

    def __init__(self, profile: Path) -> None:
        program = chromium()
        assert program is not None, ABSENT
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # A shell puts the pipes where the browser looks for them: 3 to read, 4 to write.
        redirect = f'exec "$@" 3<&{to_read} 4>&{to_write}'
        flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                 "--remote-debugging-pipe", "--no-first-run", "--disable-extensions",
                 "--disable-background-networking", "--disable-dev-shm-usage",
                 f"--user-data-dir={profile}")  # fmt: skip
        self._process = subprocess.Popen(
            ["bash", "-c", redirect, "bash", program, *flags], pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        self._rest, self._number, self._session = b"", 0, ""
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
            self._process.wait(10)
        except (OSError, TimeoutError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """One command; events that come meanwhile are kept in ``events``."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": arguments}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _message(self) -> dict[str, Any]:
        until = time.monotonic() + _PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(until - time.monotonic(), 0))
            if not ready:
                raise TimeoutError(f"Chromium did not answer within {_PATIENCE:.0f} s.")
            some = os.read(self._read, 1 << 16)
            if not some:
                raise OSError("Chromium ended before it answered.")
            self._rest += some
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message

    def open(self, page: Path, width: int, height: int, scheme: str) -> None:
        """Show a file in a window of that many CSS pixels, in a scheme; return once it loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
            mobile=width < 500,
        )  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media="", features=features)
        self.events.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())

    def ask(self, expression: str) -> Any:
        """The value of an expression in the page, awaited."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True,
            userGesture=True,
        )  # fmt: skip
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def complaints(self) -> list[str]:
        """Errors and warnings of the page since it was opened."""
        self.ask("0")  # what was said before this answer has arrived with it
        return [
            json.dumps(event["params"]) for event in self.events if event["method"] in _COMPLAINTS
        ]

    def requests(self) -> list[str]:
        """Every address that the page asked for since it was opened."""
        self.ask("0")
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event["method"] == "Network.requestWillBeSent"
        ]

    def shoot(self, picture: Path) -> None:
        """A PNG of the whole page."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        asked = {"optimizeForSpeed": True, "captureBeyondViewport": True, "clip": clip}
        shot = self.call("Page.captureScreenshot", **asked)["data"]
        picture.write_bytes(base64.b64decode(shot))

    def paper(self, file: Path) -> None:
        """The page as a PDF, as it would be printed on A4."""
        printed = self.call(
            "Page.printToPDF", printBackground=True, paperWidth=8.27, paperHeight=11.7
        )
        file.write_bytes(base64.b64decode(printed["data"]))
