# SPDX-License-Identifier: Apache-2.0
"""Run the suite on one backend: one long-lived worker, restarted when it is lost, and a record.

A worker is lost when it crashes, and when a case takes longer than its limit. The case at fault
has failed then, with the stacks; the next worker goes on behind it.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from . import SPEC_VERSION, SUITE_VERSION
from .journal import BadRequest, Journal, SubjectUnavailable, SuiteBroken
from .progress import SILENT, Progress
from .records import SCHEMA, RunRecord, Status
from .request import Options
from .supervise import Worker
from .verdict import case_list_sha256, in_list_order, judge

__all__ = ["BadRequest", "Options", "SubjectUnavailable", "SuiteBroken", "run"]

# Seconds before the first case: torch and the backend load, the simulated device may be built.
_STARTING = 600.0
# Seconds that a worker may take to end after its last case.
_ENDING = 60.0
# A backend that crashes or hangs everywhere is not worth hours.
_MOST_LOSSES = 20
_WAIT = 0.5
_PYTEST_USAGE = 4  # pytest's exit code where an option, such as an id, makes no sense

_WORKER = (sys.executable, "-m", "portakv_conformance.worker")


def run(
    options: Options, progress: Progress = SILENT, *, command: Sequence[str] = _WORKER
) -> RunRecord:
    """Run the suite and judge what came of it.

    Args:
        options: what to run.
        progress: who is told as it goes on.
        command: what runs a worker, to which the file of its orders is added.

    Raises:
        SubjectUnavailable: the backend cannot run there, with the probe's reason.
        BadRequest: a malformed name, or an id that no case has.
        SuiteBroken: the suite could not be collected.
    """
    started, began = datetime.now(timezone.utc), time.monotonic()
    journal = Journal(options, progress)
    workers = losses = 0
    with tempfile.TemporaryDirectory(prefix="portakv-conform-") as name:
        folder = Path(name)
        while not journal.stopped and (not journal.ids or journal.left()):
            if losses == _MOST_LOSSES:
                _give_up(journal, progress)
                break
            workers += 1
            why = _one_worker(journal, options, folder / str(workers), command)
            if why:
                losses += 1
                progress.say(why)
    _note_what_was_left_out(journal, options)
    return _record(journal, options, started, time.monotonic() - began)


def _one_worker(journal: Journal, options: Options, folder: Path, command: Sequence[str]) -> str:
    """Run one worker to its end; a sentence where it was lost, else empty."""
    told = options.suite_options()
    wanted = journal.left() or options.only
    if wanted:
        only = folder.with_suffix(".only")
        only.write_text("".join(f"{id}\n" for id in wanted), encoding="utf-8")
        told += ["--portakv-only", str(only)]
    journal.turn_the_page()
    worker = Worker(command, folder, options.backend, options.device, options.emulated, told)
    try:
        return _follow(worker, journal, options)
    finally:
        worker.stop()


def _follow(worker: Worker, journal: Journal, options: Options) -> str:
    """Take a worker's events until it ends or has to be ended."""
    since = time.monotonic()
    while True:
        events = worker.events(_WAIT)
        if not events and worker.ended:
            events = worker.events(0)  # written between the look for events and the end
            if not events:
                return _ended(worker, journal)
        for event in events:
            journal.take(event)
            if journal.stopped:
                return ""
        if events:
            since = time.monotonic()
        elif time.monotonic() - since > _allowed(journal, options):
            return _too_long(worker, journal, options)


def _allowed(journal: Journal, options: Options) -> float:
    """Seconds that may pass before the next event."""
    if not journal.listed:
        return _STARTING
    return _ENDING if journal.finished else options.seconds


def _ended(worker: Worker, journal: Journal) -> str:
    """A worker has ended by itself: well, or with a case."""
    if journal.over:
        if worker.how.startswith("was killed"):
            sentence = (
                f"The worker {worker.how} after the last case; memory may have been corrupted "
                f"before."
            )
            journal.miss(sentence)
        return ""
    return _lost(worker, journal, f"The worker process {worker.how}", worker.ask_stacks())


def _too_long(worker: Worker, journal: Journal, options: Options) -> str:
    """Nothing has been heard of a worker for too long: take its stacks, and end it."""
    if journal.over:
        journal.miss(f"The worker did not end within {_ENDING:g} s of its last case.")
        return ""
    stacks = worker.ask_stacks()
    worker.stop()
    limit = _allowed(journal, options)
    what = f"It took longer than its limit of {limit:g} s; the worker process was killed"
    return _lost(worker, journal, what, stacks)


def _lost(worker: Worker, journal: Journal, what: str, stacks: str) -> str:
    """Name the case that a worker was lost with; returns a sentence for the user."""
    details = "\n\n".join(part for part in (stacks, worker.printed()) if part)
    if not journal.loading:
        raise SuiteBroken(f"{what} before it loaded anything.\n{details}")
    if not journal.subject:
        raise SubjectUnavailable(f"{what} while the backend was loaded and probed.\n{details}")
    if not journal.listed:
        if worker.code == _PYTEST_USAGE:
            raise BadRequest(worker.printed().rpartition("ERROR: ")[2])
        if not journal.ids:
            raise SuiteBroken(f"{what} before the cases were collected.\n{details}")
        when = "before it could be started again"
        id = journal.left()[0]
    elif journal.running:
        when, id = "while this case ran", journal.running
    elif journal.latest:
        when, id = "right after this case", journal.latest
    else:
        when, id = "before this case began", journal.left()[0]
    status: Status = "failed" if id in (journal.running, journal.latest) else "error"
    went_on = "; another worker went on with the rest" if len(journal.left()) > 1 else ""
    journal.lose(id, status, f"{what} {when}{went_on}.", details)
    return f"{what} {when}: {id}"


def _give_up(journal: Journal, progress: Progress) -> None:
    reason = f"It was not run: the worker had been lost {_MOST_LOSSES} times."
    progress.say(f"The worker was lost {_MOST_LOSSES} times; the other cases are not run.")
    for id in journal.left():
        journal.lose(id, "error", reason, "")


def _note_what_was_left_out(journal: Journal, options: Options) -> None:
    if options.only:
        journal.miss(f"Only {len(options.only)} cases were asked for (--only), not the profile.")
    if journal.stopped and journal.left():
        journal.miss(f"{len(journal.left())} cases behind the first failure were not run (-x).")


def _record(journal: Journal, options: Options, started: datetime, seconds: float) -> RunRecord:
    subject = journal.subject
    record = RunRecord(
        schema=SCHEMA,
        suite=SUITE_VERSION,
        spec=SPEC_VERSION,
        backend=subject["backend"],
        environment=dict(subject["environment"]),
        capabilities=subject["capabilities"],
        trace=subject["trace"],
        profile=options.profile,
        seed=options.seed,
        fuzz=options.fuzz,
        case_list_sha256=case_list_sha256(journal.ids),
        cases=in_list_order(journal.cases, journal.ids),
        totals={},
        rung="",
        verdict="",
        missing=journal.missing,
        started=started.isoformat(timespec="seconds"),
        seconds=round(seconds, 2),
        command=options.command(),
        waivers=[waiver.plain() for waiver in options.waivers],
    )
    judge(record)
    return record
