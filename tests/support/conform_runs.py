# SPDX-License-Identifier: Apache-2.0
"""Runs of the suite with workers that need no torch, and what they tell; Python run anew."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import support.conform_fake_worker as fake
from portakv_conformance.evidence.verdict import SEAL
from portakv_conformance.record import CaseRecord, RunRecord
from portakv_conformance.run.progress import Progress
from portakv_conformance.run.runner import Options, run

ROOT = Path(__file__).resolve().parents[2]


def python(*words: str, where: Path = ROOT, **more: str) -> subprocess.CompletedProcess[str]:
    """What Python did that finds the tests' modules, with some variables of environment more."""
    path = os.pathsep.join([str(ROOT / "tests"), *filter(None, sys.path)])
    given = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}
    return subprocess.run(
        [sys.executable, *words], cwd=where, env=given, capture_output=True, text=True, timeout=600
    )


class Heard(Progress):
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


class Telling(Heard):
    def started(self, id: str) -> None:
        print(id, flush=True)


def ran(behaviours: Mapping[str, str], heard: Heard | None = None, **options: object) -> RunRecord:
    wanted = Options("fake", **options)  # type: ignore[arg-type]
    return run(wanted, heard or Heard(), command=fake.command(behaviours))


def statuses(record: RunRecord) -> dict[str, str]:
    return {case.id: case.status for case in record.cases}


def timeless(record: RunRecord) -> dict[str, Any]:
    """All of a record but its times, its command and the seal over them."""
    values = asdict(record)
    for name in ("started", "seconds", "command"):
        del values[name]
    del values["environment"][SEAL]
    for case in values["cases"]:
        del case["seconds"]
    return values
