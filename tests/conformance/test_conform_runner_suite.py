# SPDX-License-Identifier: Apache-2.0
"""The runner with the real worker and the suite's own cases: what backends do to their process."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.conform_runs import timeless

from portakv_conformance.evidence.verdict import SEAL, digest_of, judge
from portakv_conformance.evidence.verify import check_report
from portakv_conformance.record import RunRecord
from portakv_conformance.run.listing import cases_of
from portakv_conformance.run.runner import Options, SubjectUnavailable, run

Listed = dict[str, dict[str, Any]]
CASE = "cases/test_core.py::test_rows_move[gather-int64-8]"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker finds the bad backends."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]))
    for name in ("PORTAKV_BACKEND", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def listed() -> Listed:
    """The cases of the profile core on the CPU."""
    return cases_of("core", "cpu")


@pytest.fixture(scope="module")
def passed(listed: Listed) -> RunRecord:
    """A run of some cases of each area."""
    areas: dict[str, list[str]] = {}
    for id, case in listed.items():
        areas.setdefault(case["area"], []).append(id)
    assert set(areas) >= {"core", "corners", "safety", "drawn"}
    return run(Options("reference", only=tuple(id for ids in areas.values() for id in ids[::120])))


def judged(name: str, **options: Any) -> RunRecord:
    return run(Options(f"support.conform_suite_backends:{name}", only=(CASE,), **options))


def test_the_reference_passes(passed: RunRecord, listed: Listed) -> None:
    assert {case.status for case in passed.cases} <= {"passed", "not-claimed"}
    assert passed.environment["emulated"] is False
    assert passed.backend["target"] == "portakv.backends.reference:Reference"
    assert re.fullmatch("[0-9a-f]{64}", passed.backend["source_sha256"])
    assert ["pageable", "pageable"] in passed.capabilities["places"]
    assert passed.capabilities["index_dtypes"] == ["int32", "int64"]
    assert check_report(passed.document(), lambda profile, device: listed) == []


def test_two_workers_find_what_one_finds(passed: RunRecord) -> None:
    ids = tuple(case.id for case in passed.cases)
    both = run(Options("reference", only=ids, jobs=2))
    assert timeless(both) == timeless(passed)
    assert "--jobs 2 --only" in both.command
    assert "--jobs" not in passed.command


@pytest.mark.parametrize(
    ("name", "told", "where"),
    [
        ("Crashing", "killed by SIGSEGV while this case ran", "in launch"),
        ("Hanging", "longer than its limit of 2 s", "in launch_for_ever"),
        ("NoClaims", "capabilities() returned 'all of it'; expected", ""),
    ],
)
def test_a_backend_that_cannot_be_judged_has_failed(name: str, told: str, where: str) -> None:
    """The suite and its surroundings are in order."""
    record = judged(name, limit=2.0)
    (case,) = record.cases
    assert (record.verdict, case.status, case.area) == ("failed", "failed", "core")
    assert told in case.reason
    assert where in case.details
    if name == "NoClaims":
        assert case.reason.endswith("no case can be judged.")
        assert record.capabilities == {"": "all of it"}


@pytest.mark.slow
def test_a_probe_that_crashes() -> None:
    with pytest.raises(SubjectUnavailable, match="SIGSEGV while the backend was loaded"):
        judged("Deadly")


def test_the_lists_of_other_devices_are_known_here(listed: Listed) -> None:
    elsewhere = cases_of("core", "cuda:1")
    assert set(listed[CASE]) == {"area", "profile", "claim", "tags", "optional"}
    assert len(set(listed) & set(elsewhere)) > 50
    assert set(elsewhere) - set(listed), "ordering on streams makes sense on accelerators only"


def test_a_report_of_some_cases_that_claims_to_be_whole_is_refused(passed: RunRecord) -> None:
    record = copy.deepcopy(passed)
    command = record.command.partition(" --only")[0].replace("core", "full")
    whole = replace(record, missing=[], profile="full", command=command)
    judge(whole)
    assert (whole.verdict, whole.rung) == ("conformant", "R6")
    assert whole.environment[SEAL] == digest_of(whole)
    (wrong,) = check_report(whole.document())
    assert "cases of the installed suite are not in it" in wrong


@pytest.mark.slow
def test_an_interpreted_kernel_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    asked = Options("triton", only=(CASE,))
    record = run(asked)
    assert record.environment["emulated"] is True
    assert [case.status for case in record.cases] == ["passed"]
    assert record.command.startswith("TRITON_INTERPRET=1 portakv conform triton ")
    assert run(replace(asked, backend="reference")).environment["emulated"] is False
