# SPDX-License-Identifier: Apache-2.0
"""Run the suite on one backend: one long-lived worker or several, replaced when lost, and a record.

A worker is lost when it crashes, and when a case takes longer than its limit. The case at fault
has failed then, with the stacks; another worker goes on with the rest.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

from portakv_conformance import SPEC_VERSION, SUITE_VERSION
from portakv_conformance.evidence.verdict import LEFT_OUT, case_list_sha256, judge
from portakv_conformance.record import SCHEMA, JsonObject, RunRecord
from portakv_conformance.run.journal import BadRequest, Journal, SubjectUnavailable, SuiteBroken
from portakv_conformance.run.progress import SILENT, Progress
from portakv_conformance.run.request import Options, counted
from portakv_conformance.run.workers import WorkerProcess, Workers, worker_command

__all__ = ["BadRequest", "Options", "SubjectUnavailable", "SuiteBroken", "cases_of", "run"]
_LISTING = 300.0  # seconds that a worker may take to collect the suite


def run(
    options: Options, progress: Progress = SILENT, *, command: Sequence[str] | None = None
) -> RunRecord:
    """Run the suite and judge the result. ``command`` runs each worker, with its arguments
    is added. Raises `SubjectUnavailable`, with the probe's reason, if the backend cannot run there,
    `BadRequest` for a malformed name or an id that no case has, and `SuiteBroken` if the suite
    cannot be collected."""
    started = datetime.now(timezone.utc)
    began = time.monotonic()
    journal = Journal(options, progress)
    with tempfile.TemporaryDirectory(prefix="portakv-conform-") as folder:
        Workers(journal, options, Path(folder), command or worker_command()).work()
    if options.only:
        journal.miss(f"Only {counted(len(journal.ids))} requested (--only), not the profile.")
    if journal.stopped and (left := journal.left()):
        journal.miss(f"{counted(len(left))} after the first failure and did not run (-x).")
    subject = journal.subject
    environment = journal.subject["environment"]
    if journal.lone:
        environment[LEFT_OUT] = f"{counted(journal.lone)} left out, since one device was found"
    record = RunRecord(
        schema=SCHEMA,
        suite=SUITE_VERSION,
        spec=SPEC_VERSION,
        backend=subject["backend"],
        environment=environment,
        capabilities=subject["capabilities"],
        trace=subject["trace"],
        profile=options.profile,
        seed=options.seed,
        fuzz=options.fuzz,
        case_list_sha256=case_list_sha256(journal.ids),
        cases=[journal.cases[id] for id in journal.ids if id in journal.cases],
        totals={},
        rung="",
        verdict="",
        missing=journal.missing,
        started=started.isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - began, 2),
        command=options.command(),
        waivers=[asdict(waiver) for waiver in options.waivers],
    )
    judge(record)
    return record


def cases_of(profile: str, device: str) -> dict[str, JsonObject]:
    """Return ``area``, ``profile``, ``claim`` and ``tags`` of each case of a profile, by id, and
    whether it is ``optional``: a real machine with one device is judged without it.

    The device is as a report names it, ``cuda`` or ``simdev:1``; it need not be here, and two of
    its kind are assumed. Raises `SuiteBroken` if the suite cannot be collected here.
    """
    listing = ["--collect-only", "--portakv-listed", device.partition(":")[0]]
    options = Options("reference", profile=profile)
    with tempfile.TemporaryDirectory(prefix="portakv-conform-") as folder:
        worker = WorkerProcess(worker_command(), Path(folder, "listing"), options, listing)
        try:
            while events := worker.events(_LISTING):
                for event in events:
                    if event["event"] == "list":
                        pairs = event["two devices"]
                        cases = event["cases"].items()
                        return {id: {**about, "optional": id in pairs} for id, about in cases}
        finally:
            worker.stop()
        raise SuiteBroken(f"The suite cannot be collected here.\n{worker.printed()}")
