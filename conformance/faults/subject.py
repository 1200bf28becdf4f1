# SPDX-License-Identifier: Apache-2.0
"""The tier as the judging process sees it: a template, its forks, and calls with a deadline."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from portakv_conformance.faults.child import REQUEST
from portakv_conformance.faults.intercept import Interceptor

#: Seconds in which a tier has to be imported.
IMPORT = 300.0
#: Seconds in which a fork has to greet.
GREETING = 60.0
#: Seconds that a call has left when a thread of the tier ends by an error: whoever waits for that
#: thread waits for ever.
BEREAVED = 10.0
_LAST = 300


class Unavailable(Exception):
    """The tier cannot be imported or opened here; the text says why."""


class BadRequest(Exception):
    """The request is not valid; the text says why."""


class Hung(Exception):
    """A call did not return before the deadline."""


class Died(Exception):
    """The tier's process ended in a call."""


class Raised(Exception):
    """A call of the tier raised an error; the text describes it."""


class NotInjected(Exception):
    """A fault cannot be put into this tier; the text says why."""


class Template:
    """A process that has imported the tier, of which each trial gets a fork.

    Args:
        target: ``module:Class``, or the name of a tier of a block store.
        terms: of its constructor; None: the usual ones of its family.
        nbytes: of a block.

    Raises `Unavailable` with the reason.

    Attributes:
        family: of the tier.
        versions: of its packages.
        terms: those that hold.
    """

    def __init__(self, target: str, terms: Mapping[str, Any] | None, nbytes: int) -> None:
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "portakv_conformance.faults.child", str(theirs.fileno())]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        with theirs:
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        request = {"target": target, "terms": terms, "nbytes": nbytes}
        self._control.send(json.dumps(request).encode())
        self._control.settimeout(IMPORT)
        try:
            facts = json.loads(self._control.recv(REQUEST) or '{"error": "its import crashed"}')
        except TimeoutError:
            facts = {"error": f"its import took more than {IMPORT:g} s"}
        if "error" in facts:
            self.close()
            raise Unavailable(
                f"Expected {target!r} to name a tier, got {facts['error'].rstrip('.')}. Correct "
                f"the name, or install its package."
            )
        self.family: str = facts["family"]
        self.versions: dict[str, str] = facts["versions"]
        self.terms: dict[str, Any] = facts["terms"]

    def __enter__(self) -> Template:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fork(
        self, folder: Path, log: Path, model: str, kinds: Collection[str], deadline: float
    ) -> Child:
        """Return a new process that has the tier, not open.

        Args:
            folder: of the tier.
            log: a file for its output.
            kinds: of the system calls that are answered here.
            deadline: seconds for each call.
        """
        ours, theirs = socket.socketpair()
        request = {"folder": str(folder), "model": model, "kinds": [*kinds]}
        with theirs, log.open("ab") as output, self._lock:
            descriptors = [theirs.fileno(), output.fileno()]
            socket.send_fds(self._control, [json.dumps(request).encode()], descriptors)
        return Child(ours, folder, log, deadline)

    def close(self) -> None:
        """End the template."""
        self._control.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._process.kill()
        self._process.wait()


class Child:
    """One process that has the tier.

    Raises `NotInjected` if system calls are to be watched and the machine refuses that.

    Attributes:
        calls: answers its system calls; None: they are not watched.
    """

    def __init__(self, ours: socket.socket, folder: Path, log: Path, deadline: float) -> None:
        self._log = log
        self._deadline = deadline
        self._bereaved = ""  # why a thread of the tier has ended
        self.calls: Interceptor | None = None
        ours.settimeout(GREETING)
        with ours:
            greeting, listener, _, _ = socket.recv_fds(ours, REQUEST, 1)
            if not greeting:
                raise Unavailable(f"The tier's process ended at once: {self._last_line()}")
            about = json.loads(greeting)
            self._process: int = about["process"]
            ours.settimeout(None)
            self._connection = Connection(os.dup(ours.fileno()))
        if about["refused"]:
            self.end()
            raise NotInjected(about["refused"])
        if listener:
            self.calls = Interceptor(listener[0], self._process, folder)

    def call(self, name: str, *args: object, deadline: float | None = None) -> Any:
        """Return the result of a call.

        Raises `Hung`, `Died`, `Raised`, and `NotInjected` for a call that the family lacks.
        """
        limit = self._deadline if deadline is None else deadline
        try:
            self._connection.send((name, args))
            kind, value = self._answer(name, limit)
        except (EOFError, ConnectionError) as error:
            raise Died(f"the process ended in {name}{self._last_line()}") from error
        if kind == "error":
            raise Raised(f"{name} raised {value}")
        if kind == "none":
            raise NotInjected(value)
        return value

    def _answer(self, name: str, limit: float) -> tuple[str, Any]:
        """Return the answer to a call; raise `Hung` without one in ``limit`` seconds, or soon after
        a thread of the tier has ended by an error."""
        began = time.monotonic()
        while True:
            left = limit - (time.monotonic() - began)
            if not self._connection.poll(max(0.0, left)):
                raise Hung(f"{name} did not return in {limit:.3g} s{self._bereaved}")
            kind, value = self._connection.recv()
            if kind != "thread":
                return kind, value
            self._bereaved = f"; a thread of the tier ended: {value}"
            limit = min(limit, time.monotonic() - began + BEREAVED)

    def end(self) -> None:
        """Kill the process, whatever it does."""
        with suppress(ProcessLookupError):
            os.kill(self._process, signal.SIGKILL)
        self._connection.close()
        if self.calls is not None:
            self.calls.close()
            self.calls = None

    def _last_line(self) -> str:
        """Return the last line that the process printed, after a colon; empty if none."""
        with suppress(OSError):
            lines = self._log.read_text("utf-8", "replace").split("\n")
            last = [line.strip() for line in lines if line.strip()][-1:]
            return "".join(f": {line[:_LAST]}" for line in last)
        return ""
