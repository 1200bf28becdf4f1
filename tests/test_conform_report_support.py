# SPDX-License-Identifier: Apache-2.0
"""Committed results and the README's support table made from them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import conform_reports
import pytest
from portakv_conformance.records import RunRecord
from portakv_conformance.report.results import file_name, keep, load, trimmed
from portakv_conformance.report.support import Row, changed, device, row, rows, table, versions
from portakv_conformance.source import SourceError
from portakv_conformance.verdict import SEAL, digest_of, judge

ROOT = Path(__file__).resolve().parent.parent


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


def other(target: str) -> str:
    return "b" * 64


def gone(target: str) -> str:
    raise SourceError("no such module")


def kept(record: RunRecord, folder: Path) -> Path:
    report = folder / "conformance.json"
    report.write_text(record.document())
    return keep(report, folder / "results")


def test_a_result_is_the_whole_report_with_a_line_for_each_case(tmp_path: Path) -> None:
    record = conform_reports.failing()
    file = kept(record, tmp_path)
    assert file.name == "acme-acme-xpu-900-2026.11.json"
    assert RunRecord.read(file.read_text()) == record
    assert len(file.read_text().splitlines()) < len(record.cases) + 40
    assert load(tmp_path / "results") == {file: record}


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


def test_emulated_and_cpu_results_are_named_by_the_kind_of_device() -> None:
    assert file_name(conform_reports.emulated()) == "acme-simdev-2026.11.json"
    run = ours()
    run.environment |= {"device": "cpu", "device_name": "Some CPU (R) @ 2 GHz"}
    assert file_name(run) == "cuda-cpu-2026.11.json"
    run.backend["name"] = "../../etc/Passwd"
    assert file_name(run) == "etc-passwd-cpu-2026.11.json"


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


@pytest.mark.parametrize("asked", [{"fuzz": 100}, {"seed": 7}], ids=["fuzz", "seed"])
def test_only_certification_runs_become_results(tmp_path: Path, asked: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="no --seed, no --fuzz"):
        kept(ours(**asked), tmp_path)


def test_a_result_under_another_s_name_is_refused(tmp_path: Path) -> None:
    file = kept(ours(), tmp_path)
    file.rename(file.with_name("cuda-nvidia-b200-2026.11.json"))
    with pytest.raises(ValueError, match=r"must be named cuda-nvidia-h200-2026\.11\.json"):
        load(tmp_path / "results")


def test_a_row_says_rung_versions_and_date() -> None:
    assert row(ours(), "x.json", same) == Row(
        "cuda", "NVIDIA H200", "[R6: 314 cases](x.json)",
        "torch 2.13.0, nvidia-cuda-nvrtc 13.0.88, driver 580.159, Python 3.11.7", "2026-11-20",
    )  # fmt: skip


def test_a_rung_expires_with_the_source_of_the_backend() -> None:
    assert not changed(ours(), same)
    assert changed(ours(), other)
    assert changed(ours(), gone)
    verified = row(ours(), "x.json", other).verified
    assert verified == "expired: [R6: 314 cases](x.json), source changed since"


def test_the_source_of_a_third_party_s_backend_is_not_looked_for() -> None:
    """It may be installed here or not; the table must not depend on that."""
    assert not changed(conform_reports.passing(), gone)


def test_an_older_suite_shows() -> None:
    verified = row(ours(suite="2026.05"), "x.json", same).verified
    assert verified == "expired: [R6: 314 cases](x.json), suite 2026.05, now 2026.11"


def test_what_is_not_conformant_or_has_no_rung_is_not_called_so() -> None:
    failed = conform_reports.failing()
    assert row(failed, "x", same).verified == "[failed: 12 of 314 cases](x)"
    assert row(conform_reports.incomplete(), "x", same).verified == "[incomplete: 298 cases](x)"
    core = row(ours(profile="core"), "x", same).verified
    assert core == "[conformant, no rung: core profile, 314 cases](x)"
    emulated = row(conform_reports.emulated(), "x", same)
    assert (emulated.device, emulated.verified) == ("simdev, emulated", "[R3: 314 cases](x)")


def test_the_machine_of_a_cpu_result_is_its_kind_of_processor() -> None:
    run = ours()
    run.environment |= {"device": "cpu", "device_name": "AMD EPYC", "driver": ""}
    assert device(run) == "CPU (x86-64)"
    run.environment["emulated"] = True
    assert device(run) == "CPU (x86-64), emulated"
    assert "driver" not in versions(run)


def test_of_two_suites_the_newer_result_counts() -> None:
    results = {
        Path("/r/a.json"): ours(suite="2026.05", started="2026-12-01T00:00:00+00:00"),
        Path("/r/b.json"): ours(),
    }
    made = rows(results, [], Path("/r"), same)
    assert [entry.verified for entry in made] == ["[R6: 314 cases](b.json)"]


def test_pairs_in_words_fill_up_and_must_not_repeat_a_report() -> None:
    words = {
        "backend": "cuda",
        "verified": "R4: compiled",
        "versions": "NVRTC",
        "date": "2026-11-20",
    }
    listed = [{**words, "device": "others"}, {**words, "backend": "reference", "device": "CPU"}]
    made = rows({Path("/r/a.json"): ours()}, listed, Path("/r"), same)
    assert [(r.backend, r.device) for r in made] == [
        ("reference", "CPU"), ("cuda", "NVIDIA H200"), ("cuda", "others")]  # fmt: skip
    listed = [{**words, "device": "NVIDIA H200"}]
    with pytest.raises(ValueError, match=r"take it out of support\.toml"):
        rows({Path("/r/a.json"): ours()}, listed, Path("/r"), same)


def test_the_table_holds_whatever_a_device_is_called() -> None:
    made = Row("acme", "a|b <c>\nd", "[R6](x)", "v|1", "2026-11-20")
    last = table([made]).splitlines()[-1]
    assert last == "| `acme` | a\\|b \\<c\\> d | [R6](x) | v\\|1 | 2026-11-20 |"


def test_committed_results_stand_and_the_readme_s_tables_say_what_they_say() -> None:
    """The check of CI: results unedited and well named, no source changed behind the table."""
    load(ROOT / "conformance" / "results")
    checked = subprocess.run(
        [sys.executable, ".ci/readme_tables.py", "--check"], cwd=ROOT, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr
