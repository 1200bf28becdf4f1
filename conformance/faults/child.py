# SPDX-License-Identifier: Apache-2.0
"""The process of the tier: a template that has imported it, and a fork of it for each trial.

    python -m portakv_conformance.faults.child SOCKET

Engines take many seconds to import. The template does so once, opens nothing and starts no thread;
each fork then opens the tier, and does what the judging process asks for over a socket.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module, metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from portakv_conformance.faults.driver import SLOTS, Driver, NoSuchCall
from portakv_conformance.faults.families import (
    Unknown,
    family_of,
    filled,
    usual_terms,
)
from portakv_conformance.faults.payload import key_of, payload
from portakv_conformance.faults.syscalls import NotSupported, install_filter

#: The bytes of memory that no load has written, of a source after its store, and of memory that the
#: engine uses for something else.
UNREAD = 0x5A
STORED = 0xEE
REUSED = 0x77
#: Bytes of the largest request for a fork.
REQUEST = 1 << 16
#: The clock that Python's own modules and most tiers read.
_NOW = time.time


class Served:
    """The calls that the judging process makes, by name.

    Args:
        driver: of the tier.
        model: whose blocks are stored and expected, unless a call names another one.
    """

    def __init__(self, driver: Driver, model: str) -> None:
        self.driver = driver
        self.model = model
        self.clock_reads = 0

    def open(self) -> None:
        """Open the tier."""
        self.driver.open(self.model)

    def close(self) -> None:
        """Close the tier."""
        self.driver.close()

    def release_memory(self) -> None:
        """End the calls in flight, in a thread; `released` reports the end."""
        self._ending = threading.Thread(target=self._end, daemon=True)
        self._error = ""
        self._ending.start()

    def _end(self) -> None:
        try:
            self.driver.release_memory()
        except Exception as error:  # reported by `released`
            self._error = described(error)

    def released(self, patience: float) -> str | None:
        """Return how `release_memory` has ended: an error, or nothing; None: it goes on."""
        self._ending.join(patience)
        return None if self._ending.is_alive() else self._error

    def put(self, numbers: Sequence[int]) -> list[bool]:
        """Store blocks, and use the memory for something else as soon as the tier reports them."""
        slots = [*range(len(numbers))]
        self._fill(numbers)
        stored = self.driver.store([key_of(number) for number in numbers], slots)
        self.driver.memory[slots] = STORED
        return [*map(bool, stored)]

    def get(self, numbers: Sequence[int], blind: bool = False) -> tuple[list[bytes | None], bool]:
        """Load blocks that the tier reports as there; return their bytes.

        Args:
            blind: load all of them, whatever a lookup returns.

        Returns for each block its bytes, or None; and whether memory of no block has changed.
        """
        driver = self.driver
        keys = [key_of(number) for number in numbers]
        there = [True] * len(keys) if blind else driver.look(keys)
        chosen = [at for at, found in enumerate(there) if found]
        return self._load(keys, chosen)

    def load(self, numbers: Sequence[int]) -> tuple[list[bytes | None], bool]:
        """Load blocks without a lookup."""
        return self.get(numbers, blind=True)

    def _load(self, keys: list[bytes], chosen: list[int]) -> tuple[list[bytes | None], bool]:
        driver = self.driver
        driver.memory[:] = UNREAD
        landed = driver.load([keys[at] for at in chosen], chosen) if chosen else []
        came: list[bytes | None] = [None] * len(keys)
        for at, good in zip(chosen, landed, strict=True):
            if good:
                came[at] = driver.memory[at].tobytes()
        others = [at for at in range(SLOTS) if at not in chosen]
        return came, bool((driver.memory[others] == UNREAD).all())

    def exists(self, numbers: Sequence[int]) -> list[bool]:
        """Return which blocks a lookup reports."""
        return [*map(bool, self.driver.look([key_of(number) for number in numbers]))]

    def lease(self, numbers: Sequence[int]) -> list[bool]:
        """Look blocks up and pin them."""
        return self.driver.lease([key_of(number) for number in numbers])

    def delete(self, numbers: Sequence[int]) -> None:
        """Remove blocks."""
        self.driver.delete([key_of(number) for number in numbers])

    def begin(self, loads: bool, numbers: Sequence[int]) -> None:
        """Begin a load or a store, and do not wait for it."""
        if loads:
            self.driver.memory[:] = UNREAD
        else:
            self._fill(numbers)
        keys = [key_of(number) for number in numbers]
        self.driver.begin(loads, keys, [*range(len(keys))])

    def reuse(self) -> None:
        """Use all memory for something else."""
        self.driver.memory[:] = REUSED

    def reused(self) -> bool:
        """Return whether all memory holds what `reuse` wrote."""
        return bool((self.driver.memory == REUSED).all())

    def jump(self, seconds: float) -> None:
        """Let Python's clock jump; count how often it is read from now on."""
        self.clock_reads = 0

        def jumped() -> float:
            self.clock_reads += 1
            return _NOW() + seconds

        time.time = jumped

    def jumps(self) -> int:
        """Return how often the clock was read since it jumped."""
        return self.clock_reads

    def _fill(self, numbers: Sequence[int]) -> None:
        nbytes = self.driver.nbytes
        for at, number in enumerate(numbers):
            self.driver.buffer[at * nbytes : (at + 1) * nbytes] = payload(
                number, nbytes, self.model
            )


def described(error: BaseException) -> str:
    """Return an error in a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400].rstrip(": ")


def resolved(target: str) -> Callable[..., Any]:
    """Return what makes the tier that a text names.

    Raises ImportError or AttributeError for an object that does not load, and `PortaKVError` for a
    name that no tier of a block store has.
    """
    module, _, path = target.partition(":")
    if path:
        found: Any = import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
        return found  # type: ignore[no-any-return]
    from portakv.storage.tiers.base import TIERS

    if target == "remote":
        return remote_tier
    return TIERS.load(TIERS.check("NAME", target))


def remote_tier(folder: Path) -> Any:
    """Return PortaKV's tier of an object store, over the files of a folder."""
    from portakv.storage import Remote

    return Remote(f"file://{folder}")


def main() -> None:
    """Import the tier, report what it is, and fork for each request until the socket closes."""
    control = socket.socket(fileno=int(sys.argv[1]))
    request = json.loads(control.recv(REQUEST))
    if "" not in sys.path:
        sys.path.insert(0, "")  # a class of the current folder
    try:
        make = resolved(request["target"])
        kind = family_of(make)
    except Unknown as error:
        control.send(json.dumps({"error": str(error)}).encode())
        return
    except Exception as error:  # an engine may fail to import in any way
        control.send(json.dumps({"error": described(error)}).encode())
        return
    terms = usual_terms(make, kind) if request["terms"] is None else request["terms"]
    facts = {"family": kind.family, "versions": versions_of(make, kind), "terms": terms}
    control.send(json.dumps(facts).encode())
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no fork is waited for
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, REQUEST, 2)
        if not message:
            return
        if os.fork():
            for fd in descriptors:
                os.close(fd)
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        control.close()
        trial = json.loads(message)
        driver = kind(make, filled(terms, trial["folder"]), request["nbytes"])
        run_fork(driver, trial, descriptors)


def versions_of(make: Callable[..., Any], kind: type[Driver]) -> dict[str, str]:
    """Return the versions of the packages that a tier consists of."""
    own = str(getattr(make, "__module__", "")).partition(".")[0]
    library = sys.modules.get("portakv")
    found = {} if library is None else {"portakv": str(library.__version__)}
    for name in dict.fromkeys((*kind.packages, own)):
        if name in found:
            continue
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def run_fork(driver: Driver, trial: dict[str, Any], descriptors: list[int]) -> None:
    """Serve the calls of one trial, then end the process; nothing of the template is cleaned up."""
    connection, log = descriptors
    os.dup2(log, 1)
    os.dup2(log, 2)
    with socket.socket(fileno=os.dup(connection)) as channel:
        greet(channel, trial["kinds"])
    try:
        answers = Answers(Connection(connection))
        threading.excepthook = answers.note_thread
        serve(answers, Served(driver, trial["model"]))
    except (EOFError, ConnectionError):  # the judging process has closed it
        pass
    except BaseException:  # also SystemExit of a tier: no thread is waited for
        traceback.print_exc()
    os._exit(1)


def greet(channel: socket.socket, kinds: Sequence[str]) -> None:
    """Send the number of this process, and what answers its system calls, if any are watched."""
    about: dict[str, Any] = {"process": os.getpid(), "refused": ""}
    listener: list[int] = []
    if kinds:
        try:
            listener = [install_filter(kinds)]
        except NotSupported as error:
            about["refused"] = str(error)
    socket.send_fds(channel, [json.dumps(about).encode()], listener)
    for fd in listener:
        os.close(fd)


class Answers:
    """The answers to the judging process, from any thread."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._lock = threading.Lock()

    def send(self, kind: str, value: object) -> None:
        """Send an answer."""
        with self._lock:
            self.connection.send((kind, value))

    def note_thread(self, ended: threading.ExceptHookArgs) -> None:
        """Report a thread of the tier that ended by an error, such as an assertion: a call that
        waits for it does not return."""
        threading.__excepthook__(ended)  # into the log
        if ended.exc_value is not None and not isinstance(ended.exc_value, SystemExit):
            with suppress(OSError):
                self.send("thread", described(ended.exc_value))


def serve(answers: Answers, served: Served) -> None:
    """Answer calls until the connection ends."""
    while True:
        name, args = answers.connection.recv()
        try:
            answer = ("value", getattr(served, name)(*args))
        except NoSuchCall as error:
            answer = ("none", str(error))
        except Exception as error:  # a tier may raise anything; the judge records it
            answer = ("error", described(error))
        answers.send(*answer)


if __name__ == "__main__":
    main()
