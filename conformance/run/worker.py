# SPDX-License-Identifier: Apache-2.0
"""The process that a backend is judged in: it introduces what is judged, then runs pytest.

All that the runner learns comes through two files: events, and the stacks that faulthandler leaves
when the process crashes or gets a signal for them. What a backend prints disturbs neither.
"""

from __future__ import annotations

import ctypes
import faulthandler
import hashlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from portakv_conformance.record import JsonObject

#: Asks a worker for the stacks of all of its threads. Answered by faulthandler's own handler, in
#: C, so that a worker answers that hangs in native code.
STACKS_PLEASE = signal.SIGUSR1
#: The files that a worker answers in, in a private folder.
EVENTS = "events.jsonl"
STACKS = "stacks.txt"
#: An empty file there: no configuration of the folder that a run happens to be started in.
CONFIGURATION = "pytest.ini"
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
# Of the user's own plugins none is loaded: one that reorders or repeats would change the verdict.
_PLUGINS = ("-p", "portakv_conformance.run.options", "-p", "_hypothesis_pytestplugin")
_QUIET = ("-p", "no:cacheprovider", "-p", "no:faulthandler", "--no-header", "-q", "--tb=short")


def append(file: str, event: JsonObject) -> None:
    """Append an event to a file, flushed immediately, since a crashing process loses buffered
    lines. Any bytes of a driver's messages can be written."""
    with open(file, "a", encoding="ascii") as events:
        events.write(json.dumps(_writable(event)) + "\n")


def _writable(value: object) -> object:
    """Return a value with each lone surrogate written as ``\\udcff``: UTF-8 has no bytes for it."""
    if isinstance(value, dict):
        return {_writable(str(key)): _writable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_writable(entry) for entry in value]
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


class Share:
    """The cases that were taken, an empty file each in a folder that all workers read: a worker
    that dies leaves no lock."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def take(self, id: str) -> bool:
        """Take a case; return False if another worker has it."""
        try:
            self._file(id).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def taken(self, id: str) -> bool:
        """Return True if a worker has a case."""
        return self._file(id).exists()

    def give_back(self, id: str) -> None:
        """Give back a case that its worker will not run."""
        self._file(id).unlink(missing_ok=True)

    def _file(self, id: str) -> Path:
        return self._folder / hashlib.sha256(id.encode()).hexdigest()[:32]


def main(argv: Sequence[str]) -> int:
    """Judge a backend; return pytest's exit code. Arguments: the worker's folder, the process id of
    the runner, whose end is the worker's, and options of the suite."""
    private, runner, *options = argv
    end_with(int(runner))
    stacks = open(Path(private, STACKS), "a", encoding="utf-8")  # noqa: SIM115 (open until the end)
    faulthandler.enable(file=stacks, all_threads=True)
    faulthandler.register(STACKS_PLEASE, file=stacks, all_threads=True)
    import pytest

    from portakv_conformance.run.options import PACKAGE

    folder = str(PACKAGE)
    where = ["-c", str(Path(private, CONFIGURATION)), "--rootdir", folder, "--confcutdir", folder]
    options += ["--portakv-events", str(Path(private, EVENTS)), folder]
    return int(pytest.main([*where, *_PLUGINS, *_QUIET, *options]))


def end_with(runner: int) -> None:
    """End when the runner ends, however it ends: nothing must go on occupying a device."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != runner:
            raise SystemExit("The runner has gone.")
