# SPDX-License-Identifier: Apache-2.0
"""Runs of the suite with workers that need no torch, and what they tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import support.conform_fake_worker as fake
from portakv_conformance.evidence.verdict import SEAL
from portakv_conformance.record import CaseRecord, RunRecord
from portakv_conformance.run.progress import Progress
from portakv_conformance.run.runner import Options, run


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
