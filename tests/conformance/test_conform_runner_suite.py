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

HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker finds the bad backends."""
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent))
    monkeypatch.delenv("PORTAKV_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(scope="module")
def listed() -> dict[str, dict[str, Any]]:
    """The cases of the profile core on the CPU."""
    return cases_of("core", "cpu")


@pytest.fixture(scope="module")
def ids(listed: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    """Two core cases."""
    return tuple([id for id in listed if id.startswith("cases/test_core.py::")][:2])


@pytest.fixture(scope="module")
def passed(ids: tuple[str, ...]) -> RunRecord:
    return run(Options("reference", only=ids))


def judged(name: str, ids: tuple[str, ...], **options: object) -> RunRecord:
    asked = Options(f"support.conform_suite_backends:{name}", only=ids, **options)  # type: ignore[arg-type]
    return run(asked)


def test_the_reference_passes(passed: RunRecord, listed: dict[str, dict[str, Any]]) -> None:
    record = passed
    assert [case.status for case in record.cases] == ["passed"] * 2
    assert record.environment["emulated"] is False
    assert record.backend["target"] == "portakv.backends.reference:Reference"
    assert re.fullmatch("[0-9a-f]{64}", record.backend["source_sha256"])
    assert ["pageable", "pageable"] in record.capabilities["places"]
    assert record.capabilities["index_dtypes"] == ["int32", "int64"]
    assert check_report(record.document(), lambda profile, device: listed) == []


def test_a_backend_that_crashes(ids: tuple[str, ...]) -> None:
    record = judged("Crashing", ids)
    assert [case.status for case in record.cases] == ["failed"] * 2
    assert "killed by SIGSEGV while this case ran; another worker" in record.cases[0].reason
    assert "in launch" in record.cases[0].details
    assert record.cases[0].area == "core"


def test_a_backend_that_hangs(ids: tuple[str, ...]) -> None:
    record = judged("Hanging", ids[:1], limit=1.0)
    assert "longer than its limit of 1 s" in record.cases[0].reason
    assert "in launch_for_ever" in record.cases[0].details


@pytest.mark.parametrize(
    ("name", "told", "noted"),
    [
        ("NoClaims", "capabilities() returned 'all of it'; expected", {"": "all of it"}),
        ("Secretive", "capabilities() raised OSError: the licence server is asleep;", None),
    ],
)
def test_a_backend_that_does_not_say_what_it_claims(
    ids: tuple[str, ...], name: str, told: str, noted: dict[str, str] | None
) -> None:
    """It has failed: the suite and its surroundings are in order."""
    record = judged(name, ids)
    assert [case.status for case in record.cases] == ["failed"] * 2
    assert all(case.reason.startswith(told) for case in record.cases)
    assert all(case.reason.endswith("no case can be judged.") for case in record.cases)
    assert (record.verdict, record.totals["error"]) == ("failed", 0)
    assert noted in (None, record.capabilities)


def test_two_workers_find_what_one_finds(listed: dict[str, dict[str, Any]]) -> None:
    areas: dict[str, list[str]] = {}
    for id, case in listed.items():
        areas.setdefault(case["area"], []).append(id)
    some = tuple(id for ids in areas.values() for id in ids[::120])
    assert set(areas) >= {"core", "corners", "safety", "drawn"}
    alone = run(Options("reference", only=some))
    both = run(Options("reference", only=some, jobs=2))
    assert len(both.cases) == len(some)
    assert timeless(both) == timeless(alone)
    assert "--jobs 2 --only" in both.command
    assert "--jobs" not in alone.command


@pytest.mark.slow
def test_a_probe_that_crashes(ids: tuple[str, ...]) -> None:
    with pytest.raises(SubjectUnavailable, match="SIGSEGV while the backend was loaded"):
        judged("Deadly", ids)


def test_the_lists_of_other_devices_are_known_here(listed: dict[str, dict[str, Any]]) -> None:
    here, elsewhere = listed, cases_of("core", "cuda:1")
    assert set(next(iter(here.values()))) == {"area", "profile", "claim", "tags", "optional"}
    shared = set(here) & set(elsewhere)
    assert len(shared) > 50
    assert set(elsewhere) - set(here), "ordering on streams makes sense on accelerators only"


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
def test_an_interpreted_kernel_is_emulated(
    ids: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    asked = Options("triton", only=ids)
    record = run(asked)
    assert record.environment["emulated"] is True
    assert [case.status for case in record.cases] == ["passed"] * 2
    assert record.command.startswith("TRITON_INTERPRET=1 portakv conform triton ")
    assert run(replace(asked, backend="reference")).environment["emulated"] is False
