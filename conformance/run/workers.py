# SPDX-License-Identifier: Apache-2.0
"""The workers of a run: processes that share one case list, replaced when they are lost.

A worker is lost when it crashes, and when it is silent for too long. The case that it ran has
failed then, with the stacks, and another worker goes on with the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from portakv_conformance.record import JsonObject, Status
from portakv_conformance.run.journal import BadRequest, Journal, SubjectUnavailable, SuiteBroken
from portakv_conformance.run.request import Options
from portakv_conformance.run.worker import CONFIGURATION, EVENTS, STACKS, STACKS_PLEASE, Share

#: Set to end every run of this process: each then raises KeyboardInterrupt where it stands.
INTERRUPTED = threading.Event()

# A backend that crashes or hangs everywhere is not worth hours: so many losses in a row, without a
# case between them that came to its end, or so many seconds lost in all.
MOST_LOSSES = 20
MOST_SECONDS = 1800.0
_PROGRESS = 2  # cases that have to end between two losses, so that they are not in a row
_POLL = 0.02  # seconds between two looks at the workers
# Threads of each of several concurrent workers: two, so that kernels with threads still run so.
_LEAST_THREADS = 2
# Seconds before the first case: torch and the backend load, and the simulated device may be built,
# which takes many times as long on a busy machine.
_STARTING = 3600.0
ENDING = 60.0  # seconds that a worker may take to end after its last case
_STACKS_WAIT = 3.0  # seconds that a process may take to write its stacks
_TAIL = 6000  # characters of what a worker printed that a report keeps
#: What pytest must not take from the surroundings: options and plugins that are not the suite's.
_LEFT_OUT = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS")
# A worker finds modules where this process finds them. What lies in the current folder comes last,
# so that it can be judged and yet hides nothing that is installed.
_START = (
    "import json, os, sys; sys.path[:] = [*json.loads(sys.argv.pop(1)), os.getcwd()]; "
    "from portakv_conformance.run.worker import main; sys.exit(main(sys.argv[1:]))"
)


def worker_command() -> tuple[str, ...]:
    """Return the command that runs a worker, without the worker's arguments."""
    return (sys.executable, "-I", "-c", _START, json.dumps(sys.path))


class WorkerProcess:
    """A worker's process: its events, its stacks, its output. ``command`` runs it, with a private
    folder, which is made, and with options of the suite, of which only this worker gets ``more``.
    """

    def __init__(
        self, command: Sequence[str], folder: Path, options: Options, more: Sequence[str]
    ) -> None:
        folder.mkdir(parents=True)
        self._events = folder / EVENTS
        self._stacks = folder / STACKS
        self._printed = folder / "printed.txt"
        for file in (self._events, self._stacks, folder / CONFIGURATION):
            file.touch()
        self._read = 0
        arguments = [str(folder), str(os.getpid()), *options.suite_options(), *more]
        environment = {k: v for k, v in os.environ.items() if k not in _LEFT_OUT}
        environment |= surroundings(options.jobs)
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        # Else hypothesis leaves a folder in the user's current one.
        environment["HYPOTHESIS_STORAGE_DIRECTORY"] = str(folder / "hypothesis")
        with self._printed.open("wb") as printed:
            self._process = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is ours to handle, and its children end with it
            )

    def events(self, seconds: float = 0.0) -> list[JsonObject]:
        """Return the next events; empty if none came in ``seconds`` or the process has ended."""
        until = time.monotonic() + seconds
        while True:
            ended = self.code is not None  # read first, so that its last events are not missed
            with self._events.open("rb") as file:
                file.seek(self._read)
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]  # a process that dies may leave half a line
            self._read += len(whole)
            if whole or ended or time.monotonic() >= until:
                return [json.loads(line) for line in whole.splitlines() if line.strip()]
            time.sleep(_POLL)

    @property
    def code(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    def how(self) -> str:
        """Return how it ended, as the end of a sentence."""
        code = self._process.wait()
        if code >= 0:
            return f"ended with exit code {code}"
        name = signal.Signals(-code).name
        hint = " (perhaps by the system, for want of memory)" if name == "SIGKILL" else ""
        return f"was killed by {name}{hint}"

    def stacks(self) -> str:
        """Return the stacks of all of its threads, or the text that it wrote when it crashed."""
        before = self._stacks.stat().st_size
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(STACKS_PLEASE)
            until = time.monotonic() + _STACKS_WAIT
            while self.code is None and time.monotonic() < until:
                time.sleep(_POLL)
                if self._stacks.stat().st_size > before:
                    until = min(until, time.monotonic() + 10 * _POLL)  # the rest is being written
        text = self._stacks.read_text(encoding="utf-8", errors="replace")
        return text.partition("\nExtension modules:")[0][-_TAIL:].strip()

    def printed(self) -> str:
        """Return the end of its standard output and error."""
        return self._printed.read_bytes()[-_TAIL:].decode(errors="replace").strip()

    def stop(self) -> None:
        """Kill it and the processes that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Worker:
    """A worker of a run, and its events until it ends, crashes, or is silent for too long."""

    def __init__(
        self, process: WorkerProcess, journal: Journal, share: Share, limit: float
    ) -> None:
        self.process = process
        self._journal = journal
        self._share = share
        self._limit = limit
        self.listed = False  # it has collected its cases
        self._finished = False  # it has run its cases
        self._running = ""  # the case that runs
        self._latest = ""  # the case that ended last
        self._refusal = ""  # why it could not load what others have loaded
        self._retired = ""  # why it ended itself after a failed case
        self._began = time.monotonic()
        self.last_event = self._began
        self.ready = 0.0  # seconds until it had its case list

    def look(self, *, alone: bool) -> str | None:
        """Take the worker's events since the last call. Return None while it goes on, else a
        sentence on how it was lost, empty if it ended well. If it is ``alone``, no other worker
        runs its remaining cases. Raises as `Workers.work`."""
        ended = self.process.code is not None  # read first, as above
        for event in (events := self.process.events()):
            self._take(event)
            if self._journal.stopped:
                return ""
        limit = self._limit
        if not self.listed or self._finished:
            limit = ENDING if self._finished else _STARTING
        if events:
            self.last_event = time.monotonic()
            self.ready = self.ready or (self.last_event - self._began if self.listed else 0.0)
        elif ended:
            return self._lost(f"The worker process {self.process.how()}", alone)
        elif time.monotonic() - self.last_event > limit:
            late = f"It took longer than its limit of {limit:g} s; the worker process was killed"
            return self._lost(late, alone)
        return None

    def _take(self, event: JsonObject) -> None:
        kind = event.get("event")
        journal = self._journal
        if kind == "loading":
            journal.loading = True
        elif kind == "subject":
            journal.subject = journal.subject or event
        elif kind in ("unavailable", "usage"):
            if not journal.ids:  # else others found it, and only this worker is lost
                raise (BadRequest if kind == "usage" else SubjectUnavailable)(event["reason"])
            self._refusal = event["reason"]
        elif kind == "list":
            self.listed = True
            journal.take_list(event)
        elif kind == "missing":
            journal.miss(event["reason"])
        elif kind == "start":
            self._running = event["id"]
            journal.progress.started(self._running)
        elif kind == "end":
            self._running = ""
            self._latest = journal.take_end(event["case"])
        elif kind == "finish":
            self._finished = True
        elif kind == "retired":
            self._retired = event["reason"]
        else:
            raise SuiteBroken(f"Expected an event of this suite's version, got {event!r}.")

    def _lost(self, what: str, alone: bool) -> str:
        """Name the case that it was lost with; returns a sentence for the user, or an empty one
        if it was after its last case."""
        code = self.process.code
        journal = self._journal
        ended = self._finished and not self._running and journal.ids
        if ended and not journal.waiting(self._share):
            if code is None:
                journal.miss(f"The worker did not end within {ENDING:g} s of its last case.")
            elif code < 0:
                how = f"{self.process.how()} after the last case"
                journal.miss(f"The worker {how}; memory may have been corrupted before.")
            return ""
        stacks = self.process.stacks()
        self.process.stop()
        if self._retired:
            return f"The device failed after {self._latest} ({self._retired})."
        if self._refusal:
            what = f"A worker could not load the backend, which others could ({self._refusal}),"
        details = "\n\n".join(part for part in (stacks, self.process.printed()) if part)
        if not journal.loading:
            raise SuiteBroken(f"{what} before it loaded anything.\n{details}")
        if not journal.subject:
            raise SubjectUnavailable(f"{what} while the backend was loaded and probed.\n{details}")
        if not journal.ids:
            raise SuiteBroken(f"{what} before the cases were collected.\n{details}")
        if not (self.listed or alone):
            return f"{what} before it was ready; the others go on."
        id, status, when = self._at_fault()
        if not id:
            return f"{what} {when}."
        went_on = "; another worker went on with the rest" if {*journal.left()} - {id} else ""
        journal.lose(id, status, f"{what} {when}{went_on}.", details)
        return f"{what} {when}: {id}"

    def _at_fault(self) -> tuple[str, Status, str]:
        """Return the case that the worker was lost with, its status, and the time as a clause."""
        if self._running:
            return self._running, "failed", "while this case ran"
        if self._latest:
            return self._latest, "failed", "right after this case"
        # None is to blame; one is named, so that a worker that never begins is not a loop.
        next_one = next((id for id in self._journal.left() if self._share.take(id)), "")
        return next_one, "error", f"before {'this case began' if self.listed else 'it was ready'}"


class Workers:
    """The workers of a run, as many at a time as requested, over one case list.

    Their files lie in an empty folder. ``command`` runs each, with its arguments added.
    """

    def __init__(
        self, journal: Journal, options: Options, folder: Path, command: Sequence[str]
    ) -> None:
        self._journal = journal
        self._options = options
        self._folder = folder
        self._command = command
        self._jobs = options.jobs
        taken = folder / "taken"
        only = folder / "only"
        taken.mkdir()
        only.write_text("\n".join(options.only), encoding="utf-8")
        self._share = Share(taken)
        self._arguments = ["--portakv-share", str(taken)]
        self._arguments += ["--portakv-only", str(only)] if options.only else []
        self._running: list[Worker] = []
        self._started = 0  # workers so far
        self._losses = 0  # in a row
        self._ran = 0  # cases that had ended at the last loss
        self._seconds = 0.0  # that losses have cost: workers that began, cases that hung

    def work(self) -> None:
        """Run every case of the list, or up to the first failure if that is enough. Raises
        `SubjectUnavailable`, `BadRequest` or `SuiteBroken` if nothing can be judged, and
        KeyboardInterrupt if `INTERRUPTED` was set."""
        try:
            while not self._journal.stopped and self._go_on():
                if INTERRUPTED.is_set():
                    raise KeyboardInterrupt
                if not self._look():
                    time.sleep(_POLL)
        finally:
            for worker in self._running:
                worker.process.stop()

    def _go_on(self) -> bool:
        """Start the missing workers; return False if there is nothing left to do."""
        why = ""
        if self._losses >= MOST_LOSSES:
            why = f"the worker had been lost {MOST_LOSSES} times in a row"
        elif self._losses and self._seconds > MOST_SECONDS:
            why = f"lost workers had cost more than {MOST_SECONDS / 60:g} minutes"
        if why:
            self._journal.progress.say(f"The other cases are not run: {why}.")
            for id in self._journal.left():
                self._journal.lose(id, "error", f"It was not run: {why}.", "")
            return False
        if not self._running:
            for id in self._journal.left():  # taken by a worker that was lost before it began
                self._share.give_back(id)
        while len(self._running) < self._jobs:
            # Only if it would find a case to run. The first one lists them, alone.
            starting = sum(not worker.listed for worker in self._running)
            waiting = len(self._journal.waiting(self._share)) if self._journal.ids else 1
            if waiting <= starting:
                break
            self._started += 1
            folder = self._folder / str(self._started)
            seconds = self._options.seconds
            process = WorkerProcess(self._command, folder, self._options, self._arguments)
            self._running.append(Worker(process, self._journal, self._share, seconds))
        return bool(self._running)

    def _look(self) -> bool:
        """Return True if a worker, or the run, has ended."""
        before = len(self._running)
        for worker in list(self._running):
            lost = worker.look(alone=len(self._running) == 1)
            if self._journal.stopped:
                return True
            if lost is not None:
                worker.process.stop()
                self._running.remove(worker)
            if lost:
                self._count(worker, lost)
        return len(self._running) < before

    def _count(self, worker: Worker, lost: str) -> None:
        self._journal.progress.say(lost)
        if self._running and not worker.listed:
            self._jobs -= 1  # there is no room for so many, on the device or in memory
            return
        # A worker that ended with the first case that it took has got the run no further.
        between = self._journal.ran - self._ran
        self._losses = self._losses + 1 if between < _PROGRESS else 1
        self._ran = self._journal.ran
        # Its start, and how long it was silent at its end.
        self._seconds += worker.ready + time.monotonic() - worker.last_event


def surroundings(jobs: int) -> dict[str, str]:
    """Return variables that keep several workers from competing for the cores.

    Variables that the user set stay.
    """
    if jobs == 1:
        return {}
    threads = max(_LEAST_THREADS, len(os.sched_getaffinity(0)) // jobs)
    wanted = {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return {name: value for name, value in wanted.items() if name not in os.environ}
