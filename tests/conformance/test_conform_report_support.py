# SPDX-License-Identifier: Apache-2.0
"""Committed results and the README's support table made from them."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from support import conform_reports

from portakv_conformance.evidence.evidence import of_report, rung_of
from portakv_conformance.evidence.ladder import Ladder, Rung
from portakv_conformance.evidence.verdict import SEAL, digest_of, judge
from portakv_conformance.evidence.verify import check_report
from portakv_conformance.record import SCHEMA, RunRecord
from portakv_conformance.report.results import file_name, keep, read, trimmed
from portakv_conformance.report.support import device, table, versions
from portakv_conformance.run.listing import cases_of

RESULTS = Path(__file__).resolve().parents[2] / "conformance" / "results"
REPORTS = [
    file
    for file in sorted(RESULTS.rglob("*.json"))
    if json.loads(file.read_text(encoding="utf-8")).get("schema") == SCHEMA
]


def ours(**values: object) -> RunRecord:
    """A run of a backend of this repository on a GPU."""
    run = conform_reports.passing()
    run.backend = {"name": "cuda", "target": "portakv.backends.cuda:Cuda", "version": "0.1",
                   "source_sha256": "a" * 64}  # fmt: skip
    run.environment |= {"device": "cuda:0", "device_name": "NVIDIA H200", "driver": "580.159",
                        "triton": "3.6.0", "nvidia-cuda-nvrtc": "13.0.88"}  # fmt: skip
    run.environment.pop("torch_acme")
    run = replace(run, **values)  # type: ignore[arg-type]
    judge(run)
    return run


def same(target: str) -> str:
    return "a" * 64


def kept(record: RunRecord, folder: Path) -> Path:
    """Of cases that no suite has; what `verify` says of them is not asked."""
    report = folder / "conformance.json"
    report.write_text(record.document())
    return keep(report, folder / "results", lambda text: [])


def test_a_result_is_the_whole_report_with_a_line_for_each_case(tmp_path: Path) -> None:
    record = conform_reports.failing()
    file = kept(record, tmp_path)
    assert file.name == "acme-acme-xpu-900-2026.12.json"
    assert RunRecord.read(file.read_text()) == record
    assert len(file.read_text().splitlines()) < len(record.cases) + 40
    assert read(file) == record


def test_details_of_passed_cases_are_left_out_and_the_seal_still_fits(tmp_path: Path) -> None:
    record = conform_reports.failing()
    for case in record.cases:
        case.details = case.details or "much that was printed"
    judge(record)
    short = RunRecord.read(kept(record, tmp_path).read_text())
    assert {bool(c.details) for c in short.cases if c.status == "passed"} == {False}
    assert {bool(c.details) for c in short.cases if c.status != "passed"} == {True}
    assert short.environment[SEAL] == digest_of(short)
    assert trimmed(short) is short
    assert all(case.details for case in record.cases)  # what was handed in is as it was


def test_cpu_results_are_named_by_the_kind_of_processor() -> None:
    run = ours()
    run.environment |= {"device": "cpu", "device_name": "Some CPU (R) @ 2 GHz", "driver": ""}
    assert (device(run), file_name(run)) == ("CPU (x86-64)", "cuda-cpu-2026.12.json")
    assert "driver" not in versions(run)
    run.environment["emulated"] = True
    assert device(run) == "CPU (x86-64), emulated"
    run.backend["name"] = "../../etc/Passwd"
    assert file_name(run) == "etc-passwd-cpu-2026.12.json"


def test_an_edited_report_is_no_result(tmp_path: Path) -> None:
    record = conform_reports.failing()
    edited = replace(record, verdict="conformant", rung="R6")
    with pytest.raises(ValueError, match="its seal does not fit its contents"):
        kept(edited, tmp_path)
    (tmp_path / "other.json").write_text(json.dumps({"schema": "other"}))
    with pytest.raises(ValueError, match="no report of schema"):
        keep(tmp_path / "other.json", tmp_path)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json"):
        keep(tmp_path / "broken.json", tmp_path)


def test_what_verify_refuses_is_no_result(tmp_path: Path) -> None:
    run = conform_reports.emulated()
    run.rung = "R6"
    run.environment[SEAL] = digest_of(run)
    report = tmp_path / "conformance.json"
    report.write_text(run.document())
    with pytest.raises(ValueError, match="R6 needs the real one"):
        keep(report, tmp_path, partial(check_report, listing=lambda profile, device: {}))
    assert [*tmp_path.glob("*.json")] == [report]


@cache
def listed(profile: str, device: str) -> dict[str, dict[str, Any]]:
    return cases_of(profile, device)


@pytest.mark.slow
@pytest.mark.parametrize("file", REPORTS, ids=[file.name for file in REPORTS])
def test_committed_reports_stand(file: Path) -> None:
    assert check_report(file.read_text(encoding="utf-8"), listed) == []


@pytest.mark.parametrize("asked", [{"fuzz": 100}, {"seed": 7}], ids=["fuzz", "seed"])
def test_only_certification_runs_become_results(tmp_path: Path, asked: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="no --seed, no --fuzz"):
        kept(ours(**asked), tmp_path)


@pytest.mark.parametrize(
    ("asked", "shown", "file"),
    [
        ("simdev", "simdev, emulated", "cuda-simdev-2026.12.json"),
        ("simdev:1", "simdev, emulated", "cuda-simdev-2026.12.json"),
        ("simdev:mlu", "mlu, emulated", "cuda-simdev-mlu-2026.12.json"),
        ("simdev:mlu:1", "mlu, emulated", "cuda-simdev-mlu-2026.12.json"),
        ("mlu", "mlu, emulated", "cuda-mlu-2026.12.json"),
    ],
)
def test_a_simulated_device_goes_by_the_name_that_it_carries(
    asked: str, shown: str, file: str
) -> None:
    run = ours()
    run.environment |= {"device": asked, "emulated": True}
    assert (device(run), file_name(run)) == (shown, file)


def test_a_result_says_what_it_holds_for() -> None:
    assert versions(ours()) == (
        "torch 2.13.0, nvidia-cuda-nvrtc 13.0.88, driver 580.159, Python 3.11.7"
    )


def rung(**values: Any) -> Rung:
    made = rung_of(of_report(ours()), "conformance/results/a.json")
    return replace(made, **values)


def test_a_line_of_the_table_says_rung_versions_and_date() -> None:
    assert table(Ladder((rung(),)), same).splitlines()[2:] == [
        "| `cuda` | NVIDIA H200 | [R6: 312 passed, 2 not claimed](conformance/results/a.json) | "
        "torch 2.13.0, nvidia-cuda-nvrtc 13.0.88, driver 580.159, Python 3.11.7 | 2026-11-20 |"
    ]


def test_a_line_of_the_table_says_what_has_changed() -> None:
    shown = table(Ladder((rung(suite="2026.05", note="by us"),)), lambda target: "b" * 64)
    link = "[R6: 312 passed, 2 not claimed](conformance/results/a.json)"
    assert f"| expired: {link}, source changed since, suite 2026.05, now 2026.12, by us |" in shown


def test_a_pair_is_one_line_its_highest_rung_first() -> None:
    mlu = {"backend": "mlu", "device": "mlu, emulated", "emulated": True, "emulation": {"a": "1"}}
    rungs = [rung(**mlu, rung=name, told=f"by {name}") for name in ("R1", "R3")]
    lines = table(Ladder((*rungs, rung())), same).splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == ["`cuda`", "`mlu`"]
    file = "conformance/results/a.json"
    assert f"| mlu, emulated | [R3: by R3]({file}); [R1: by R1]({file}) |" in lines[1]


def test_the_table_holds_whatever_a_device_is_called() -> None:
    made = rung(device="a|b <c>\nd", versions="v|1")
    last = table(Ladder((made,)), same).splitlines()[-1]
    assert "| a\\|b \\<c\\> d | [R6: 312 passed, 2 not claimed]" in last
    assert last.endswith("| v\\|1 | 2026-11-20 |")
