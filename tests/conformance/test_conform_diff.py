# SPDX-License-Identifier: Apache-2.0
"""What changed between two reports."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import support.conform_fake_worker as fake
from support.conform_fake_worker import CORE

from portakv_conformance.cli import main
from portakv_conformance.record import RunRecord
from portakv_conformance.report.diff import compare_runs, differences
from portakv_conformance.run.runner import Options, run

STATUSES = ("passed", "not-claimed", "waived", "failed", "error")


@pytest.fixture(scope="module")
def made() -> RunRecord:
    behaviours = {f"{CORE}{status}": "pass" for status in STATUSES}
    return run(Options("fake"), command=fake.command(behaviours))


@pytest.fixture
def record(made: RunRecord) -> RunRecord:
    return copy.deepcopy(made)


def with_statuses(record: RunRecord, *statuses: str) -> RunRecord:
    changed = copy.deepcopy(record)
    for case, status in zip(changed.cases, statuses, strict=True):
        case.status = status  # type: ignore[assignment]
        case.reason = "" if status == "passed" else "Byte 3 is wrong."
    return changed


def kinds(old: RunRecord, new: RunRecord) -> list[str]:
    return [change.kind for change in compare_runs(old, new)]


def test_nothing_changed(record: RunRecord) -> None:
    mixed = with_statuses(record, *STATUSES)
    assert compare_runs(mixed, mixed) == []
    assert differences(mixed, mixed) == []


def test_each_step_has_its_kind(record: RunRecord) -> None:
    """Both ways between every two statuses, against what each of them is worth."""
    worth = {"passed": 3, "not-claimed": 2, "waived": 1, "failed": 0, "error": 0}
    for before in STATUSES:
        for after in STATUSES:
            old = with_statuses(record, *[before] * 5)
            new = with_statuses(record, *[after] * 5)
            step = worth[after] - worth[before]
            expected = {True: "FIX", False: "REGRESSION"}[step > 0] if step else None
            assert kinds(old, new) == ([expected] * 5 if expected else [])


def test_what_came_and_what_went(record: RunRecord) -> None:
    less = copy.deepcopy(record)
    gone = less.cases.pop(2)
    assert kinds(record, less) == ["MISSING"]
    assert kinds(less, record) == ["NEW"]
    assert compare_runs(record, less)[0].id == gone.id


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        (("conformant", "R6"), ("incomplete", ""), "REGRESSION"),
        (("conformant", "R6"), ("conformant", "R3"), "REGRESSION"),
        (("conformant", "R3"), ("conformant", ""), "REGRESSION"),
        (("incomplete", ""), ("failed", ""), "REGRESSION"),
        (("failed", ""), ("conformant", "R3"), "FIX"),
    ],
)
def test_verdict_and_rung_are_compared(
    record: RunRecord, tmp_path: Path, before: tuple[str, str], after: tuple[str, str], kind: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Though no case ended in another way: one was left out, or the device is another."""
    for name, (verdict, rung) in (("old", before), ("new", after)):
        changed = replace(record, verdict=verdict, rung=rung)
        (tmp_path / name).write_text(changed.document(), encoding="utf-8")
    assert main(["diff", str(tmp_path / "old"), str(tmp_path / "new")]) == (kind == "REGRESSION")
    out = capsys.readouterr().out
    for name, old, new in zip(("verdict", "rung"), before, after, strict=True):
        line = f"{kind:<10} {name}: {old or 'none'} -> {new or 'none'}"
        assert (line in out) == (old != new)


def test_a_new_case_that_fails_ends_with_1(
    record: RunRecord, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new").write_text(
        with_statuses(record, "failed", *["passed"] * 4).document(), encoding="utf-8"
    )
    del record.cases[0]
    (tmp_path / "old").write_text(record.document(), encoding="utf-8")
    assert main(["diff", str(tmp_path / "old"), str(tmp_path / "new")]) == 1
    out = capsys.readouterr().out
    assert "NEW        cases/" in out
    assert "Byte 3 is wrong." in out


def test_other_surroundings_are_told(record: RunRecord) -> None:
    other = copy.deepcopy(record)
    other.environment["device_name"] = "H200"
    other.seed = 5
    assert differences(record, other) == [
        "The device differs: CPU and H200.", "The seed differs: 0 and 5.",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "code", "told"),
    [
        ("passed", "passed", 0, "0 FIX, 0 REGRESSION"),
        ("failed", "passed", 0, "FIX        cases/"),
        ("passed", "failed", 1, "REGRESSION cases/"),
    ],
)
def test_the_command(
    record: RunRecord, tmp_path: Path, before: str, after: str, code: int, told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name, status in (("old", before), ("new", after)):
        changed = with_statuses(record, status, *["passed"] * 4)
        (tmp_path / name).write_text(changed.document(), encoding="utf-8")
    assert main(["diff", str(tmp_path / "old"), str(tmp_path / "new")]) == code
    assert told in capsys.readouterr().out


def test_a_missing_case_ends_with_1(
    record: RunRecord, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old").write_text(record.document(), encoding="utf-8")
    del record.cases[0]
    (tmp_path / "new").write_text(record.document(), encoding="utf-8")
    assert main(["diff", str(tmp_path / "old"), str(tmp_path / "new")]) == 1
    assert f"MISSING    {CORE}passed" in capsys.readouterr().out
    assert main(["diff", str(tmp_path / "new"), str(tmp_path / "old")]) == 0


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "portakv-conformance/1"}', "\xff"])
def test_what_is_no_report_ends_with_2(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old").write_bytes(text.encode("latin-1"))
    assert main(["diff", str(tmp_path / "old"), str(tmp_path / "old")]) == 2
    assert main(["diff", str(tmp_path / "gone"), str(tmp_path / "gone")]) == 2
    assert str(tmp_path) in capsys.readouterr().err
