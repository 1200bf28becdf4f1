# SPDX-License-Identifier: Apache-2.0
"""The process that a backend is judged in: it introduces what is judged, then runs pytest.

All that the runner learns comes through two files: events, and the stacks that faulthandler leaves
when the process crashes or is asked for them by a signal. What a backend prints disturbs neither.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

#: Asks a worker for the stacks of all of its threads. Answered by faulthandler's own handler, in
#: C, so that a worker answers that hangs in native code.
STACKS_PLEASE = signal.SIGUSR1
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
# Of the user's own plugins none is loaded: one that reorders or repeats would change the verdict.
_PLUGINS = ("-p", "portakv_conformance.run.options", "-p", "_hypothesis_pytestplugin")
_QUIET = ("-p", "no:cacheprovider", "-p", "no:faulthandler", "--no-header", "-q", "--tb=short")


@dataclass(frozen=True)
class Orders:
    """What a worker is told, as a file of JSON.

    Attributes:
        backend, device, emulated: what is judged, and where.
        events, stacks: the files that it answers in.
        pytest: the options of the suite.
        configuration: an empty file: no configuration of the folder that we happen to be in.
        runner: the process that gave the orders; its end is the worker's.
    """

    backend: str
    device: str
    emulated: bool
    events: str
    stacks: str
    pytest: list[str]
    configuration: str
    runner: int

    def write(self, path: Path) -> None:
        """Write the file."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Orders:
        """Read the file."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def writable(text: str) -> str:
    """The text with lone surrogates, which UTF-8 has no bytes for, written as ``\\udcff``."""
    return text.encode("utf-8", "backslashreplace").decode()


def append(file: str, event: dict[str, Any]) -> None:
    """Append an event to a file, flushed at once: a crashing process takes no buffered line along.

    Every report can hold what was told, whatever bytes a vendor's driver puts into its messages.
    """
    line = json.dumps(_writable(event)) + "\n"
    with open(file, "a", encoding="ascii") as events:
        events.write(line)


def _writable(value: Any) -> Any:
    if isinstance(value, str):
        return writable(value)
    if isinstance(value, dict):
        return {writable(str(key)): _writable(kept) for key, kept in value.items()}
    return [_writable(entry) for entry in value] if isinstance(value, list | tuple) else value


class Share:
    """The cases that were taken, an empty file each: a worker that dies leaves no lock behind.

    Args:
        folder: an existing folder that all workers look at.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def take(self, id: str) -> bool:
        """Take a case; False where another has it."""
        try:
            self._file(id).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def taken(self, id: str) -> bool:
        """Whether a worker has a case."""
        return self._file(id).exists()

    def give_back(self, id: str) -> None:
        """The worker that had a case will not run it."""
        self._file(id).unlink(missing_ok=True)

    def _file(self, id: str) -> Path:
        return self._folder / hashlib.sha256(id.encode()).hexdigest()[:32]


def main(argv: Sequence[str]) -> int:
    """Carry out the orders in the file that is named; returns pytest's exit code."""
    orders = Orders.read(Path(argv[0]))
    _end_with(orders.runner)
    stacks = open(orders.stacks, "a", encoding="utf-8")  # noqa: SIM115 (open until the end)
    faulthandler.enable(file=stacks, all_threads=True)
    faulthandler.register(STACKS_PLEASE, file=stacks, all_threads=True)
    # What fails before this is an installation that is broken; what fails behind it is the backend.
    from portakv_conformance.evidence import environment  # noqa: F401
    from portakv_conformance.judge import subject  # noqa: F401

    append(orders.events, {"event": "loading"})
    told = introduce(orders)
    append(orders.events, told)
    if told["event"] != "subject":
        return 0
    import pytest

    from portakv_conformance.run.options import PACKAGE

    folder = str(PACKAGE)
    where = ["-c", orders.configuration, "--rootdir", folder, "--confcutdir", folder]
    words = [*where, *_PLUGINS, *_QUIET, *orders.pytest, folder]
    return int(pytest.main(words, plugins=[Descriptions(orders)]))


class Descriptions:
    """Tells what each case is about before it runs: of one that takes the process with it nobody
    could tell afterwards."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Write the event ``described``: by id, the fields of `CaseRecord` that are marks."""
        from portakv_conformance.run.options import case_id, mark_of, tags_of

        told = {
            case_id(item): {
                "area": mark_of(item, "area"),
                "profile": mark_of(item, "profile"),
                "claim": mark_of(item, "claim", ""),
                "tags": tags_of(item),
            }
            for item in session.items
        }
        pairs = [
            case_id(item)
            for item in session.items
            if any(mark.args[0] == "two devices" for mark in item.iter_markers("needs"))
        ]
        append(self._orders.events, {"event": "described", "cases": told, "two devices": pairs})


def introduce(orders: Orders) -> dict[str, Any]:
    """The event that tells who is judged, or why nobody is.

    ``{"event": "subject", "backend", "environment", "capabilities", "trace"}``, or ``unavailable``
    or ``usage`` with a ``reason``.
    """
    from portakv.errors import PortaKVError
    from portakv_conformance.evidence.environment import (
        describe_backend,
        describe_environment,
        plain,
    )
    from portakv_conformance.judge.subject import subject

    try:
        judged = subject(orders.backend, orders.device, emulated=orders.emulated)
        capabilities = plain(judged.can)
        return {
            "event": "subject",
            "backend": describe_backend(judged),
            "environment": describe_environment(judged, orders.device),
            "capabilities": capabilities if isinstance(capabilities, dict) else {"": capabilities},
            "trace": [str(decision) for decision in judged.trace],
        }
    except PortaKVError as error:
        return {"event": "unavailable", "reason": str(error)}
    except ValueError as error:
        return {"event": "usage", "reason": str(error)}
    except Exception as error:  # a backend fails in any way while it is asked what it claims
        return {"event": "unavailable", "reason": f"It failed: {type(error).__name__}: {error}"}


def _end_with(runner: int) -> None:
    """End when the runner ends, however it ends: nothing must go on occupying a device."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != runner:
            raise SystemExit("The runner has gone.")
