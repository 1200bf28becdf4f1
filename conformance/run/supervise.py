# SPDX-License-Identifier: Apache-2.0
"""One worker process seen from its parent: start it, read its events, ask for stacks, end it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from portakv_conformance.run.worker import STACKS_PLEASE, Orders

#: What pytest must not take from the surroundings: options and plugins that are not the suite's.
_LEFT_OUT = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS")
_POLL = 0.02  # seconds between two looks for events
_STACKS_WAIT = 3.0  # seconds that a process may take to write its stacks
_TAIL = 6000  # characters of what a worker printed that a report keeps


class Worker:
    """A running worker.

    Args:
        command: what runs the worker, to which the file of orders is added.
        folder: an empty folder of its own, for its files.
        backend, device, emulated, options: its orders; see `worker.Orders`.
        surroundings: environment variables to set for it.
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        backend: str,
        device: str,
        emulated: bool,
        options: Sequence[str],
        surroundings: Mapping[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True)
        self._events = folder / "events.jsonl"
        self._stacks = folder / "stacks.txt"
        self._printed = folder / "printed.txt"
        empty = folder / "pytest.ini"
        for file in (self._events, self._stacks, empty):
            file.touch()
        self._read = 0
        events = ["--portakv-events", str(self._events)]
        Orders(
            backend, device, emulated, str(self._events), str(self._stacks),
            [*options, *events], str(empty), os.getpid(),
        ).write(folder / "orders.json")  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if k not in _LEFT_OUT}
        environment |= surroundings or {}
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        # Else hypothesis leaves a folder wherever the user happens to be.
        environment["HYPOTHESIS_STORAGE_DIRECTORY"] = str(folder / "hypothesis")
        with self._printed.open("wb") as printed:
            self._process = subprocess.Popen(
                [*command, str(folder / "orders.json")],
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is ours to handle, and its children end with it
            )

    def events(self, seconds: float) -> list[dict[str, Any]]:
        """The next events; empty where none came within ``seconds`` or the process has ended."""
        until = time.monotonic() + seconds
        while True:
            ended = self.ended  # asked before reading: what it wrote last must not be missed
            found = self._new_events()
            if found or ended or time.monotonic() >= until:
                return found
            time.sleep(_POLL)

    def _new_events(self) -> list[dict[str, Any]]:
        with self._events.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]  # a process that dies may leave half a line
        self._read += len(whole)
        return [json.loads(line) for line in whole.splitlines() if line.strip()]

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    @property
    def code(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    @property
    def how(self) -> str:
        """How it ended, as the end of a sentence."""
        code = self.code
        if code is None:
            return "is still running"
        if code >= 0:
            return f"ended with exit code {code}"
        name = signal.Signals(-code).name
        hint = " (perhaps by the system, for want of memory)" if name == "SIGKILL" else ""
        return f"was killed by {name}{hint}"

    def ask_stacks(self) -> str:
        """The stacks of all of its threads, as it runs; or what it wrote when it crashed."""
        before = self._stacks.stat().st_size
        if not self.ended:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(STACKS_PLEASE)
            until = time.monotonic() + _STACKS_WAIT
            while not self.ended and time.monotonic() < until:
                size = self._stacks.stat().st_size
                if size > before:
                    time.sleep(10 * _POLL)  # until the rest of it is written
                    break
                time.sleep(_POLL)
        text = self._stacks.read_text(encoding="utf-8", errors="replace")
        return text.partition("\nExtension modules:")[0][-_TAIL:].strip()

    def printed(self) -> str:
        """The end of what it wrote to standard output and error."""
        with self._printed.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            return file.read().decode(errors="replace").strip()

    def stop(self) -> None:
        """Kill it and the processes that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
