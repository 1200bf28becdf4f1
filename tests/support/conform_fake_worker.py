# SPDX-License-Identifier: Apache-2.0
"""A worker without torch, pytest and cases: it writes the events of the requested behaviours,
crashes, hangs and prints.

As a script: ``conform_fake_worker.py BEHAVIOURS`` and the arguments of a worker. As a module: the
command that starts it, and helpers.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from portakv_conformance.run.worker import EVENTS, STACKS, STACKS_PLEASE, Share, end_with

CORE = "cases/test_core.py::test_"
CLAIM = "cases/test_claims.py::test_"
SUBJECT = {
    "event": "subject",
    "backend": {
        "name": "fake", "target": "fakes:Fake", "version": "1", "source_sha256": "0" * 64,
    },
    "environment": {
        "torch": "2.13", "python": "3.11", "os": "Linux", "device": "cpu", "device_name": "CPU",
        "driver": "", "emulated": False,
    },
    "capabilities": {
        "places": [["pageable", "pageable"]], "index_on": "host", "index_dtypes": ["int64"],
        "skips_negative": False, "guards": False, "alignment": 1, "max_loops": None,
        "tables": True, "capturable": False, "threads": True, "encodings": [],
    },
    "trace": ["fake: accepted, always"],
}  # fmt: skip


def command(behaviours: Mapping[str, str]) -> tuple[str, ...]:
    """Return the command for `runner.run`: cases by id, each with its behaviour, in this order.

    Before the cases come ``load``, ``start`` and ``collect``, after them ``finish``. The prefix ``2
    `` marks a behaviour of the second worker. The first worker takes the case ``take``, and never
    begins it.
    """
    return (sys.executable, __file__, json.dumps(dict(behaviours)))


def gone(process: int) -> bool:
    """Return True if a process ends within a few seconds; an ended process that still has a record
    counts too."""
    for _ in range(200):
        try:
            reported = Path(f"/proc/{process}/stat").read_text()
        except OSError:
            return True
        if reported.rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


def main(argv: Sequence[str]) -> None:
    behaviours: dict[str, str] = json.loads(argv[0])
    folder = Path(argv[1])
    end_with(int(argv[2]))
    number = folder.name
    of_second = {key: behaviours.pop(key) for key in list(behaviours) if key.startswith("2 ")}
    if number == "2":
        behaviours |= {key.removeprefix("2 "): what for key, what in of_second.items()}
    faulthandler.enable(file=open(folder / STACKS, "a"))  # noqa: SIM115
    faulthandler.register(STACKS_PLEASE, file=open(folder / STACKS, "a"))  # noqa: SIM115
    if "load" in behaviours:
        act(behaviours.pop("load"), folder, "")
    tell(folder, {"event": "loading"})
    alone = behaviours.pop("start", "")
    if alone:
        act(alone, folder, "")
        return
    tell(folder, SUBJECT)
    act(behaviours.pop("collect", "pass"), folder, "")
    finish = behaviours.pop("finish", "pass")
    taken = behaviours.pop("take", "")
    lone = int(behaviours.pop("lone", 0))
    only = option(argv, "--portakv-only")
    ids = Path(only).read_text().splitlines() if only else list(behaviours)
    if unknown := set(ids) - set(behaviours):
        tell(folder, {"event": "usage", "reason": f"Case {unknown.pop()!r} is none."})
        return
    ids = [id for id in behaviours if id in ids]
    cases = {id: about(id) for id in ids}
    tell(folder, {"event": "list", "cases": cases, "profile": list(behaviours), "lone": lone})
    share = Share(Path(option(argv, "--portakv-share")))
    if number == "1" and taken:
        share.take(taken)  # and never begins it
    for id in ids:
        if not share.take(id):
            continue
        tell(folder, {"event": "start", "id": id})
        act(behaviours[id], folder, id)
    tell(folder, {"event": "finish"})
    act(finish, folder, "")


def option(words: Sequence[str], name: str) -> str:
    return words[words.index(name) + 1] if name in words else ""


def about(id: str) -> dict[str, Any]:
    area = id.partition("test_")[2].partition(".py")[0]
    claim = "guards" if area == "claims" else ""
    return {"area": area, "profile": "core", "claim": claim, "tags": {}}


def tell(folder: Path, event: Mapping[str, Any]) -> None:
    with open(folder / EVENTS, "a", encoding="utf-8") as events:
        events.write(json.dumps(event) + "\n")


def end(folder: Path, id: str, status: str, reason: str = "") -> None:
    record = {
        "id": id,
        **about(id),
        "status": status,
        "seconds": 0.001,
        "examples": 1,
        "declined": 0,
        "reason": reason,
        "details": "",
        "replay": "",
        "example": "",
    }
    tell(folder, {"event": "end", "case": record})


def act(what: str, folder: Path, id: str) -> None:
    if what == "fail":
        end(folder, id, "failed", "Byte 3 is 7, expected 9.")
    elif what in ("error", "not-claimed"):
        end(folder, id, what, "It is so.")
    elif what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif what == "crash later":
        end(folder, id, "passed")
        os.kill(os.getpid(), signal.SIGSEGV)
    elif what == "abort":
        os.abort()
    elif what == "exit":
        os._exit(7)
    elif what == "unavailable":
        tell(folder, {"event": "unavailable", "reason": "no such backend; known are x"})
    elif what == "hang":
        time.sleep(600)
    elif what == "leave":  # the session ends without this case
        tell(folder, {"event": "finish"})
        sys.exit(0)
    elif what == "retire":  # the device works no more in this process
        end(folder, id, "failed", "It faulted.")
        tell(folder, {"event": "retired", "reason": "an illegal access"})
        os._exit(1)
    elif what == "half a line":
        with open(folder / EVENTS, "a", encoding="utf-8") as events:
            events.write('{"event": "en')
        os.kill(os.getpid(), signal.SIGKILL)
    elif what.startswith("meet "):  # and end after so many workers have begun a case
        _, many, place = what.split(" ", 2)
        Path(place, str(os.getpid())).touch()
        while len(os.listdir(place)) < int(many):
            time.sleep(0.01)
        end(folder, id, "passed", f"by {os.getpid()}")
    elif what.startswith("await "):  # and end after a file is there
        while not Path(what.removeprefix("await ")).exists():
            time.sleep(0.01)
        end(folder, id, "passed")
    elif what == "child":
        child = os.fork()
        if child == 0:
            time.sleep(600)
        end(folder, id, "failed", f"child {child}")
    else:
        print('{"event": "end", "case": "what a backend prints"}\n' * 100)
        print("and to standard error", file=sys.stderr)
        if id:
            end(folder, id, "passed")


if __name__ == "__main__":
    main(sys.argv[1:])
