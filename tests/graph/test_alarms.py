# SPDX-License-Identifier: Apache-2.0
"""Warnings of faults that last: when they come, what they say, and when they do not come."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from portakv.graph.alarms import AGAIN, LEASE, LOOK, RULES, WAIT, Alarms
from portakv.graph.meter import METRICS


class Process:
    """A process with figures, a clock, and what looks at both."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.time = 0.0
        self.values = dict[str, list[dict[str, Any]]]()
        self._caplog = caplog
        self.alarms = Alarms(self, clock=lambda: self.time)
        caplog.set_level(logging.WARNING, "portakv.graph.alarms")

    def figures(self) -> dict[str, list[dict[str, Any]]]:
        return self.values

    def warnings(self, seconds: float = LOOK) -> list[str]:
        """Return what a look after some seconds has logged."""
        self.time += seconds
        self._caplog.clear()
        self.alarms.look()
        return [record.getMessage() for record in self._caplog.records]


@pytest.fixture
def process(caplog: pytest.LogCaptureFixture) -> Process:
    return Process(caplog)


SLOT = {"form": "f", "folder": "/nvme/kv", "state": "broken"}
#: For each rule: labels, a value that is well, one that is a fault, and a word of what to do.
FAULTS: dict[str, tuple[dict[str, str], float, float, str]] = {
    "a dying disk": (SLOT, 0, 3, "smartctl"),
    "a full disk": ({"form": "f", "folder": "/nvme/kv"}, 0, 7, "lower the capacity"),
    "a lost folder": ({"form": "f", "folder": "/nvme/kv"}, 0, 1, "Restore the folder"),
    "a refused bucket": ({"form": "f", "url": "s3://bucket"}, 0, 1, "credentials"),
    "a sick link": ({"queue": "disk:/nvme/kv"}, 0, 1, "iostat"),
    "a link that is too slow": ({"queue": "disk:/nvme/kv"}, WAIT, WAIT + 1, "deadline"),
    "a lease that does not end": ({}, LEASE, LEASE + 1, "py-spy"),
    "leases that are never renewed": ({"state": "expired"}, 0, 4, "tickets reach readers"),
}


def test_each_rule_is_about_a_metric_and_its_labels() -> None:
    assert {rule.name for rule in RULES} == {*FAULTS}
    for rule in RULES:
        metric = METRICS[rule.metric]
        assert {*rule.labels, *rule.unless} <= {*metric.labels}
        assert (metric.kind == "counter") == rule.grows
        assert rule.text.format(value=1, **dict.fromkeys(metric.labels, "x")).endswith(".")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_fault_is_logged_once_with_what_to_do(process: Process, rule: Any) -> None:
    labels, well, ill, what = FAULTS[rule.name]
    process.values = {rule.metric: [{**labels, "value": well}]}
    assert process.warnings() == []
    process.values = {rule.metric: [{**labels, "value": ill}]}
    (text,) = process.warnings()
    assert what in text
    assert all(
        value in text for name, value in labels.items() if name in ("folder", "url", "queue")
    )
    assert process.warnings() == []


def test_a_look_before_its_time_reads_nothing(process: Process) -> None:
    process.values = {"queue_slow": [{"queue": "a", "value": 1}]}
    assert len(process.warnings(0)) == 1
    process.values = {"queue_slow": [{"queue": "b", "value": 1}]}
    assert process.warnings(LOOK / 2) == []
    assert len(process.warnings(LOOK / 2)) == 1


def test_a_fault_that_lasts_is_logged_again_each_hour(process: Process) -> None:
    process.values = {"queue_slow": [{"queue": "a", "value": 1}]}
    assert len(process.warnings()) == 1
    assert process.warnings(AGAIN - 1) == []
    assert len(process.warnings(LOOK)) == 1


def test_a_fault_that_comes_back_is_logged_again(process: Process) -> None:
    """At most once a minute, whatever it does."""
    ill = {"queue_slow": [{"queue": "a", "value": 1}]}
    process.values = ill
    assert len(process.warnings()) == 1
    process.values = {"queue_slow": [{"queue": "a", "value": 0}]}
    assert process.warnings() == []
    process.values = ill
    assert process.warnings() == []  # within the minute
    process.values = {}
    assert process.warnings(60.0) == []
    process.values = ill
    assert len(process.warnings()) == 1


def test_a_disk_that_gets_worse_is_logged_again(process: Process) -> None:
    process.values = {"disk_slots": [{**SLOT, "value": 1}]}
    assert len(process.warnings()) == 1
    process.values = {"disk_slots": [{**SLOT, "value": 2}]}
    assert "2 slots" in process.warnings(61.0)[0]
    process.values = {"disk_slots": [{**SLOT, "state": "used", "value": 9}]}
    assert process.warnings(61.0) == []


def test_what_was_counted_before_the_first_look_is_no_news(process: Process) -> None:
    process.values = {"offers_ended_total": [{"state": "expired", "value": 7}]}
    assert process.warnings() == []
    process.values = {"offers_ended_total": [{"state": "expired", "value": 8}]}
    assert "1 offers have expired" in process.warnings()[0]


def test_offers_that_expire_next_to_others_that_are_taken_are_no_fault(process: Process) -> None:
    def counts(expired: int, taken: int) -> dict[str, list[dict[str, Any]]]:
        ends = {"expired": expired, "taken": taken}
        return {"offers_ended_total": [{"state": x, "value": n} for x, n in ends.items()]}

    process.values = counts(0, 0)
    assert process.warnings() == []
    process.values = counts(5, 5)
    assert process.warnings() == []
    process.values = counts(5, 9)
    assert process.warnings() == []
    process.values = counts(7, 9)
    assert "2 offers have expired" in process.warnings()[0]
