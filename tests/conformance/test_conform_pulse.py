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


@pytest.fixture
def card() -> Card:
    return Card(torch.device("cpu"))


def test_a_device_that_works_is_not_lost(card: Card) -> None:
    assert DeviceAlive(subject("reference"), card).lost() == ""


def test_a_fault_that_is_delivered_once_is_the_case_s(card: Card) -> None:
    card.faults = 1
    assert DeviceAlive(subject("reference"), card).lost() == ""


def test_a_fault_that_stays(card: Card) -> None:
    card.faults = 1000
    assert DeviceAlive(subject("reference"), card).lost() == (
        "RuntimeError: an illegal memory access was encountered"
    )


def _refuses_for_good(found: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(*given: object, **named: object) -> None:
        raise RuntimeError("no more")

    monkeypatch.setattr(Subject, "copy", copy)


def test_a_backend_that_raises_for_good_after_it_has_worked(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose driver's context is lost, though torch's is not."""
    alive = DeviceAlive(subject("reference"), card)
    alive.learn()
    _refuses_for_good(subject("reference"), monkeypatch)
    assert alive.lost() == "RuntimeError: no more"


def test_a_backend_that_has_never_worked_is_judged_on(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each of its failures would cost a process."""
    alive = DeviceAlive(subject("reference"), card)
    _refuses_for_good(subject("reference"), monkeypatch)
    alive.learn()
    assert alive.lost() == ""


def test_on_the_host_nothing_is_felt() -> None:
    alive = DeviceAlive(subject("reference"), Facility(torch.device("cpu")))
    alive.learn()
    assert alive.lost() == ""


def test_an_event_holds_any_text(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    append(str(file), {"reason": "driver said \udcff", "cases": [{"a\ud800": ("x", 1, None)}]})
    told = json.loads(file.read_text(encoding="utf-8"))
    assert told == {"reason": "driver said \\udcff", "cases": [{"a\\ud800": ["x", 1, None]}]}
    json.dumps(told, ensure_ascii=False).encode("utf-8")
