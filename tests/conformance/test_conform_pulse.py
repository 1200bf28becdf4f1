# SPDX-License-Identifier: Apache-2.0
"""A device that fails for good is told from a case that failed, and text that no file can hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from portakv_conformance.judge.device_support import Facility
from portakv_conformance.judge.subject import Subject, subject
from portakv_conformance.run.device_alive import DeviceAlive
from portakv_conformance.run.worker import append


class Card(Facility):
    """A CPU with streams, whose faults come when somebody waits."""

    streams = True
    faults = 0

    def synchronize(self) -> None:
        if self.faults:
            self.faults -= 1
            raise RuntimeError("an illegal memory access was encountered\nand more")


FAULT = "RuntimeError: an illegal memory access was encountered"


@pytest.mark.parametrize(("faults", "told"), [(0, ""), (1, ""), (1000, FAULT)])
def test_a_fault_that_is_delivered_once_is_the_case_s(faults: int, told: str) -> None:
    card = Card(torch.device("cpu"))
    card.faults = faults
    assert DeviceAlive(subject("reference"), card).lost() == told


@pytest.mark.parametrize("worked", [True, False])
def test_a_backend_that_raises_for_good(worked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one whose driver's context is lost, though torch's is not. One that has never worked is
    judged on: else each of its failures would cost a process."""

    def copy(*given: object, **named: object) -> None:
        raise RuntimeError("no more")

    alive = DeviceAlive(subject("reference"), Card(torch.device("cpu")))
    on_host = DeviceAlive(subject("reference"), Facility(torch.device("cpu")))
    if worked:
        alive.learn()
    monkeypatch.setattr(Subject, "copy", copy)
    alive.learn()
    on_host.learn()
    assert alive.lost() == ("RuntimeError: no more" if worked else "")
    assert on_host.lost() == ""


def test_an_event_holds_any_text(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    append(str(file), {"reason": "driver said \udcff", "cases": [{"a\ud800": ("x", 1, None)}]})
    told = json.loads(file.read_text(encoding="utf-8"))
    assert told == {"reason": "driver said \\udcff", "cases": [{"a\\ud800": ["x", 1, None]}]}
    json.dumps(told, ensure_ascii=False).encode("utf-8")
