# SPDX-License-Identifier: Apache-2.0
"""What never stands apart from a result: what a stand-in takes for true without the vendor's word,
and which library carried plans out."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest
from support import conform_reports

from portakv.cli import main as portakv
from portakv_conformance.evidence.environment import assumed
from portakv_conformance.evidence.evidence import Job, of_report, read, recorded, rung_of
from portakv_conformance.evidence.ladder import Ladder, told
from portakv_conformance.evidence.verdict import judge
from portakv_conformance.evidence.verify import check_report
from portakv_conformance.record import RunRecord
from portakv_conformance.report.markdown import markdown
from portakv_conformance.report.page import page
from portakv_conformance.report.results import keep
from portakv_conformance.report.summary import print_summary
from portakv_conformance.report.support import reached, verified
from portakv_conformance.run.request import Options
from portakv_conformance.vendor.standins import SIMULATION, STANDINS, emulating

REFERENCE = "portakv.backends.reference:Reference"
STANDIN = STANDINS["mlu"]
ASSUMED = "by assumption: the vendor has not confirmed the ops' signatures"


def test_what_a_stand_in_takes_for_true_stands_in_every_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the report, what is printed of it, and the ladder's row and list."""
    assert assumed(emulating("mlu")) == ASSUMED
    assert assumed(emulating("npu")) == assumed(emulating("simdev")) == ""
    run = conform_reports.emulated()
    run.environment |= {"device": "simdev:mlu", "assumption": ASSUMED}
    judge(run)
    said = f"It holds {ASSUMED}."
    assert said in html.unescape(page(run))
    assert said in markdown(run)
    print_summary(run, Options(backend="mlu", device="simdev:mlu"))
    assert said in " ".join(capsys.readouterr().out.split())
    row = rung_of(of_report(run), "a.json")
    assert row.assumption == ASSUMED
    assert ASSUMED in reached(row, Ladder((row,)))
    assert ASSUMED in verified(row, Ladder((row,)))
    assert told(row.backend, "acme", Ladder((row,))).endswith(f" on mlu, emulated, {ASSUMED}")


def test_verify_refuses_a_report_that_does_not_say_what_it_takes_for_true() -> None:
    run = conform_reports.emulated()
    run.environment["device"] = "simdev:mlu"
    run.environment["emulation"][STANDIN] = "6" * 64
    assert f"does not say what it holds by: {ASSUMED}" in "\n".join(refusals(run))
    run.environment["assumption"] = ASSUMED
    assert "holds by" not in "\n".join(refusals(run))


def test_a_record_says_what_its_stand_in_takes_for_true(tmp_path: Path) -> None:
    job = Job("call shapes against a stand-in", REFERENCE, "mlu, emulated", "1",
              emulated_by=[SIMULATION, STANDIN])  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(recorded(job, ["true"])))
    assert rung_of(read(tmp_path / "job.json"), "job.json").assumption == ASSUMED


def test_the_list_of_backends_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert portakv(["backends", "--device", "mlu", "--json"]) == 1
    (device,) = json.loads(capsys.readouterr().out)["devices"]
    (mine,) = (row for row in device["candidates"] if row["name"] == "mlu")
    assert mine["verified"].endswith(f"R3 on mlu, emulated, {ASSUMED}")
    portakv(["backends", "--device", "mlu"])
    assert "by assumption:" in capsys.readouterr().out


# -- a library that was built beforehand ----------------------------------------------------------

KERNEL = {"carried out by": "the AscendC kernel", "library": {"libportakv_ascend.so": "7" * 64}}


def test_what_a_built_library_carried_out_has_a_row_and_a_file_of_its_own(tmp_path: Path) -> None:
    ops, kernel = conform_reports.passing(), conform_reports.passing()
    ops.environment |= {"carried out by": "the ops of torch_npu"}
    kernel.environment |= KERNEL
    for run in (ops, kernel):
        judge(run)
    rows = [rung_of(of_report(run), "a.json") for run in (ops, kernel)]
    assert [row.device for row in rows] == [
        "Acme XPU 900",
        "Acme XPU 900, by the AscendC kernel"
    ]  # fmt: skip
    assert [row.rung for row in rows] == ["R6", "R6"]
    assert len(Ladder(()).with_rung(rows[0]).with_rung(rows[1]).rungs) == 2
    for run in (ops, kernel):
        (tmp_path / "conformance.json").write_text(run.document())
        keep(tmp_path / "conformance.json", tmp_path / "kept", lambda text: [])
    assert {file.name for file in (tmp_path / "kept").iterdir()} == {
        f"acme-acme-xpu-900-{ops.suite}.json",
        f"acme-acme-xpu-900-by-the-ascendc-kernel-{ops.suite}.json",
    }


@pytest.mark.parametrize(
    ("library", "why"),
    [({"a.so": "1" * 63}, "hash of a.so, which carried"), ("a.so", "Its library is 'a.so'")],
)
def test_verify_refuses_a_library_without_its_hash(library: Any, why: str) -> None:
    run = conform_reports.passing()
    run.environment |= KERNEL
    assert "librar" not in "\n".join(refusals(run))
    run.environment["library"] = library
    assert why in "\n".join(refusals(run))


def refusals(run: RunRecord) -> list[str]:
    judge(run)
    return check_report(run.document(), lambda profile, device: {})
