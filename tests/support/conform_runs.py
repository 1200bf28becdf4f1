# SPDX-License-Identifier: Apache-2.0
"""Runs of the suite with workers that need no torch, and their events; new Python processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import support.conform_fake_worker as fake
from portakv_conformance.record import CaseRecord, RunRecord
from portakv_conformance.run.progress import Progress
from portakv_conformance.run.runner import Options, run
from support import ready

ROOT = Path(__file__).resolve().parents[2]


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a Python that finds the tests' modules, with more variables."""
    path = os.pathsep.join([str(ROOT / "tests"), *filter(None, sys.path)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def python(*words: str, where: Path = ROOT, **more: str) -> subprocess.CompletedProcess[str]:
    """Run Python in that environment and return its result."""
    return ready.run(*words, cwd=where, env=environment(**more))


class RecordingProgress(Progress):
    """A `Progress` that keeps every report."""

    def __init__(self) -> None:
        self.count = 0
        self.ids: list[str] = []
        self.statuses: list[str] = []
        self.sentences: list[str] = []

    def listed(self, count: int) -> None:
        self.count = count

    def started(self, id: str) -> None:
        self.ids.append(id)

    def ended(self, case: CaseRecord) -> None:
        self.statuses.append(case.status)

    def say(self, sentence: str) -> None:
        self.sentences.append(sentence)


def ran(
    behaviours: Mapping[str, str], progress: RecordingProgress | None = None, **options: object
) -> RunRecord:
    wanted = Options("fake", **options)  # type: ignore[arg-type]
    return run(wanted, progress or RecordingProgress(), command=fake.command(behaviours))


def statuses(record: RunRecord) -> dict[str, str]:
    return {case.id: case.status for case in record.cases}
