# SPDX-License-Identifier: Apache-2.0
"""Runs of the suite with workers that need no torch, and what they tell; Python run anew."""

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

ROOT = Path(__file__).resolve().parents[2]


def environment(**more: str) -> dict[str, str]:
    """That of a Python which finds the tests' modules, with some variables more."""
    path = os.pathsep.join([str(ROOT / "tests"), *filter(None, sys.path)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def python(*words: str, where: Path = ROOT, **more: str) -> subprocess.CompletedProcess[str]:
    """What Python did in that environment."""
    return subprocess.run(
        [sys.executable, *words], cwd=where, env=environment(**more), capture_output=True, text=True
    )


class RecordingProgress(Progress):
    """A `Progress` that keeps what it is told."""

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
    behaviours: Mapping[str, str], heard: RecordingProgress | None = None, **options: object
) -> RunRecord:
    wanted = Options("fake", **options)  # type: ignore[arg-type]
    return run(wanted, heard or RecordingProgress(), command=fake.command(behaviours))


def statuses(record: RunRecord) -> dict[str, str]:
    return {case.id: case.status for case in record.cases}
