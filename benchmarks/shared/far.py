# SPDX-License-Identifier: Apache-2.0
"""Calls of an object in a separate process: a line of JSON for each call and for each answer."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

PATIENCE = 60.0  # seconds for an answer


class Far:
    """An object in a separate process.

    Args:
        words: of the module that serves it, as ``python -m`` takes them.
        environment: variables of the process, besides those of this one.
        name: of the process, for errors.
        log: a file to which the process's errors are added; None: those of this process.
        patience: seconds for an answer.
    """

    def __init__(
        self,
        words: Sequence[str],
        environment: Mapping[str, str] | None = None,
        name: str = "",
        log: Path | None = None,
        patience: float = PATIENCE,
    ) -> None:
        paths = os.pathsep.join(path for path in sys.path if path)
        more = {"PYTHONPATH": paths, **(environment or {})}
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        if log is not None:
            pipes["stderr"] = log.open("a")
        self.name = name
        self._patience = patience
        self.process: Any = subprocess.Popen(
            [sys.executable, "-m", *words], env={**os.environ, **more}, **pipes
        )
        if log is not None:
            pipes["stderr"].close()
        self._pending = False

    def begin(self, name: str, *arguments: object, **named: object) -> None:
        """Start a call in the process without waiting for its answer."""
        if self._pending:  # a step that failed here did not wait for its answer
            with suppress(RuntimeError):
                self.end()
        self._pending = True
        self.process.stdin.write(json.dumps([name, arguments, named]) + "\n")
        self.process.stdin.flush()

    def ready(self, timeout: float = 0.0) -> bool:
        """Return whether the process answers."""
        return bool(select.select([self.process.stdout], [], [], timeout)[0])

    def end(self, timeout: float | None = None) -> Any:
        """Return the answer; raises `RuntimeError` for what failed there, or if it hangs."""
        self._pending = False
        timeout = self._patience if timeout is None else timeout
        if not self.ready(timeout):
            self.close()
            raise RuntimeError(f"the process {self.name} did not answer in {timeout:g} s")
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"the process {self.name} ended: {self.process.wait(5)}")
        answer, refused = json.loads(line)
        if refused:
            raise RuntimeError(f"the process {self.name}: {refused}")
        return answer

    def do(self, name: str, *arguments: object, **named: object) -> Any:
        """Return the answer to a call."""
        self.begin(name, *arguments, **named)
        return self.end()

    def close(self) -> None:
        """Kill the process."""
        with suppress(OSError):
            self.process.kill()
        self.process.communicate()


def answers() -> TextIO:
    """Return the file of this process's answers. What libraries print goes to its errors."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out


def serve(side: object, out: TextIO, idle: Callable[[], float] | None = None) -> None:
    """Answer calls until the pipe ends.

    Args:
        out: from `answers`.
        idle: is called while no call waits; returns the seconds until it is to be called again.
    """
    while True:
        while idle is not None and not select.select([sys.stdin], [], [], idle())[0]:
            continue
        line = sys.stdin.readline()
        if not line:
            return
        name, arguments, named = json.loads(line)
        try:
            answer = [getattr(side, name)(*arguments, **named), ""]
        except Exception as error:  # any error of PortaKV, of a peer's library or of the device
            answer = [None, f"{type(error).__name__}: {error}".partition("\n")[0]]
        out.write(json.dumps(answer) + "\n")
        out.flush()
