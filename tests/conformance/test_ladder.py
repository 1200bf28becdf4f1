# SPDX-License-Identifier: Apache-2.0
"""The ladder: its rules, what bears a rung out, and what ends one."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import conform_reports

from portakv_conformance.evidence import ladder as ladders
from portakv_conformance.evidence.evidence import (
    JOBS,
    Job,
    contradictions,
    main,
    of_report,
    read,
    recorded,
    rung_of,
)
from portakv_conformance.evidence.ladder import (
    RESULTS,
    Ladder,
    Rung,
    broken_rules,
    by_pair,
    told,
    why_expired,
    written,
)
from portakv_conformance.evidence.source import SourceError, source_sha256
from portakv_conformance.evidence.verdict import judge
from portakv_conformance.report.results import keep
from portakv_conformance.vendor.standins import SIMULATION

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = "portakv.backends.reference:Reference"
EMULATION = "portakv_conformance.vendor.ascendc_emulated:AscendC"
JOB = {
    "what": "cross-compiled, not executed",
    "name": "hip",
    "backend": "portakv.backends.hip:Hip",
    "source_sha256": "a" * 64,
    "command": "bash native/cuda/check_hip.sh",
    "date": "2026-11-20",
    "right": True,
    "compiler": "hipcc 5.2",
    "targets": ["gfx906"],
    "kernels": [{"kernel": "gather", "target": "gfx906", "wrong": []}],
}
# What each kind has to show beyond that, as tests/conformance/test_ladder_contents.py forges it.
SHOWN: dict[str, dict[str, Any]] = {
    "R1": {"signatures": [{"op": "a.b", "signature": "(x)", "source": "its page"}]},
    "R2": {"schemas": [{"op": "a::b", "pinned": "()", "found": "()", "same": True}],
           "vendor": {"torch_npu-2.13.0-cp311-cp311-any.whl": "1" * 64}, "versions": "2.13.0"},
}  # fmt: skip


def same(target: str) -> str:
    return "a" * 64


def other(target: str) -> str:
    return "b" * 64


def gone(target: str) -> str:
    raise SourceError("no such module")


def rung(**values: Any) -> Rung:
    """A row that breaks no rule, with other values."""
    made = Rung(
        backend="cuda", target="portakv.backends.cuda:Cuda", device="NVIDIA H200", rung="R6",
        emulated=False, evidence=f"{RESULTS}a.json", told="314 cases", command="portakv conform",
        date="2026-11-20", versions="torch 2.13.0", source_sha256="a" * 64, suite="2026.12",
    )  # fmt: skip
    return replace(made, **values)


# -- what is committed ----------------------------------------------------------------------------


def test_every_rung_is_borne_out_by_its_file() -> None:
    """The rung, the backend, the flag, the command, the hash: each as the file itself says."""
    found = ladders.read()
    assert found.rungs
    assert contradictions(found, ROOT) == []


def test_the_file_is_as_it_would_be_written() -> None:
    assert ladders.FILE.read_text(encoding="utf-8") == written(ladders.read())


def test_the_readme_s_tables_say_what_the_ladder_says() -> None:
    checked = subprocess.run(
        [sys.executable, ".ci/readme_tables.py", "--check"], cwd=ROOT, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr


# -- rules ----------------------------------------------------------------------------------------


def test_a_row_that_breaks_no_rule() -> None:
    assert list(broken_rules(Ladder((rung(),)))) == []


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"emulated": True}, "an emulated device is never R6"),
        ({"emulated": True, "device": "npu, emulated"}, "an emulated device is never R6"),
        ({"suite": ""}, "R6 needs a report of the suite"),
        ({"rung": "R7"}, "there is no rung 'R7'"),
        ({"rung": "R3"}, "what ran on the real device is R6 or no rung"),
        ({"rung": "R3", "emulated": True}, "has to say that it is emulated"),
        ({"rung": "R5", "emulated": True, "target": EMULATION}, "emulates a vendor's backend, and"),
        ({"rung": "R4", "emulated": True, "target": EMULATION}, "emulates a vendor's backend, and"),
        ({"evidence": "docs/notes.md"}, "does not lie in conformance/results/"),
        ({"evidence": f"{RESULTS}../../README.md"}, "does not lie in conformance/results/"),
    ],
)
def test_the_rules(values: dict[str, Any], why: str) -> None:
    assert why in "\n".join(broken_rules(Ladder((rung(**values),))))


def test_no_rung_is_listed_twice() -> None:
    again = rung(evidence=f"{RESULTS}b.json")
    assert "listed twice" in "\n".join(broken_rules(Ladder((rung(), again))))


# -- what ends a rung -----------------------------------------------------------------------------


def test_a_rung_ends_with_the_source_the_suite_or_a_package_of_the_vendor() -> None:
    kept = Ladder((), {"torch-npu": "1" * 64})
    held = rung(vendor={"torch-npu": "1" * 64})
    assert why_expired(held, kept, same) == ""
    assert why_expired(held, kept, other) == why_expired(held, kept, gone) == "source changed since"
    assert why_expired(replace(held, suite="2026.05"), kept, same) == "suite 2026.05, now 2026.12"
    assert why_expired(held, Ladder(()), same) == "torch-npu changed since"
    newer = kept.with_rung(rung(device="other", vendor={"torch-npu": "2" * 64}))
    assert why_expired(held, newer, same) == "torch-npu changed since"


def test_a_third_party_s_source_is_not_looked_for() -> None:
    """It may be installed here or not; the table must not depend on that."""
    assert why_expired(rung(target="acme.backend:Acme"), Ladder(()), gone) == ""


def test_the_reference_s_own_rung_expires_here_and_now() -> None:
    """No digest is passed: the real sources are hashed."""
    (mine,) = (r for r in ladders.read().rungs if r.place == ("reference", "CPU (x86-64)", "R6"))
    assert "source changed" in why_expired(replace(mine, source_sha256="0" * 64), Ladder(()))


def test_a_list_tells_the_rung_here_else_the_highest_that_holds() -> None:
    far = rung(device="hip, emulated", rung="R3", emulated=True, emulation={"acme": "1"})
    found = Ladder((rung(source_sha256="b" * 64), far))
    assert told("cuda", "NVIDIA H200", found, same) == "expired R6"
    assert told("cuda", "CPU (x86-64)", found, same) == "R3 on hip, emulated"
    assert told("cuda", "CPU (x86-64)", Ladder((rung(),)), same) == "R6 on NVIDIA H200"
    assert told("triton", "NVIDIA H200", found, same) == ""
    assumed = replace(far, assumption="by assumption: nobody said so", note="not by us")
    assert told("cuda", "hip, emulated", Ladder((assumed,)), same) == (
        "R3, by assumption: nobody said so, not by us"
    )


# -- files ----------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / RESULTS).mkdir(parents=True)
    return tmp_path


def report_in(root: Path, **values: Any) -> Rung:
    """A report among the results, and its row."""
    run = conform_reports.passing()
    run.environment |= values
    judge(run)
    (root / "conformance.json").write_text(run.document())
    file = keep(root / "conformance.json", root / RESULTS, lambda text: [])
    return rung_of(read(file), RESULTS + file.name)


def test_a_report_bears_its_row_out(root: Path) -> None:
    made = report_in(root)
    assert (made.rung, made.emulated, made.told) == ("R6", False, "312 passed, 2 not claimed")
    assert contradictions(Ladder((made,)), root) == []
    assert contradictions(Ladder((replace(made, note="by us"),)), root) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("rung", "R3"), ("backend", "other"), ("target", "a.b:C"), ("device", "NVIDIA H100"),
     ("emulated", True), ("command", "portakv conform x"), ("date", "2026-11-19"),
     ("source_sha256", "0" * 64), ("suite", "2027.01"), ("told", "9 cases"),
     ("versions", "torch 9"), ("vendor", {"torch-npu": "0" * 64})],
)  # fmt: skip
def test_a_row_that_says_more_than_its_file_is_found(root: Path, name: str, value: Any) -> None:
    found = contradictions(Ladder((replace(report_in(root), **{name: value}),)), root)
    assert f"{name} is {value!r}, but the file says" in "\n".join(found)


def test_an_emulated_report_cannot_be_raised_to_r6(root: Path) -> None:
    made = report_in(root, emulated=True, device="simdev:mlu")
    assert (made.rung, made.device, made.emulated) == ("R3", "mlu, emulated", True)
    raised = "\n".join(contradictions(Ladder((replace(made, rung="R6"),)), root))
    assert "an emulated device is never R6" in raised
    assert "rung is 'R6', but the file says 'R3'" in raised
    hidden = replace(made, rung="R6", emulated=False)
    assert "emulated is False, but the file says True" in "\n".join(
        contradictions(Ladder((hidden,)), root)
    )


def test_files_that_are_edited_missing_misnamed_or_forgotten_are_found(root: Path) -> None:
    made = report_in(root)
    file = root / made.evidence
    text = file.read_text()
    assert "has no row in ladder.toml" in contradictions(Ladder(()), root)[0]
    file.write_text(text.replace('"profile": "full"', '"profile": "core"', 1))
    assert "its seal does not fit its contents" in contradictions(Ladder((made,)), root)[0]
    file.unlink()
    assert "cannot be read" in contradictions(Ladder((made,)), root)[0]
    moved = root / RESULTS / "best.json"
    moved.write_text(text)
    found = contradictions(Ladder((replace(made, evidence=f"{RESULTS}best.json"),)), root)
    assert "must be named after its contents" in found[0]


def test_what_is_not_conformant_is_no_rung() -> None:
    for run in (conform_reports.failing(), conform_reports.incomplete()):
        with pytest.raises(ValueError, match="bears out no rung"):
            rung_of(of_report(run), "x.json")


@pytest.mark.parametrize("what", JOBS)
def test_a_job_bears_out_the_rung_of_its_kind(root: Path, what: str) -> None:
    file = root / RESULTS / "hip.json"
    shown: dict[str, Any] = {"vendor": {"torch-npu": "1" * 64}, **SHOWN.get(JOBS[what], {})}
    file.write_text(json.dumps(JOB | {"what": what, **shown}))
    made = rung_of(read(file), f"{RESULTS}hip.json", device="gfx906, emulated")
    assert (made.backend, made.rung, made.emulated) == ("hip", JOBS[what], True)
    assert (made.versions, made.vendor) == (shown.get("versions", "hipcc 5.2"), shown["vendor"])
    assert contradictions(Ladder((made,)), root) == []
    assert "R6" not in JOBS.values()


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"right": False}, "bears out no rung: failed: cross-compiled"),
        ({"right": "yes"}, "right missing or of another type"),
        ({"what": "run on the hardware"}, "says 'run on the hardware'; expected one of"),
        ({"command": None}, "command missing or of another type"),
        ({"name": None}, "name missing or of another type"),
        ({}, "name it by --device"),
    ],
)
def test_a_job_s_record_that_is_not_whole(root: Path, values: dict[str, Any], why: str) -> None:
    (root / "job.json").write_text(json.dumps(JOB | values))
    with pytest.raises(ValueError, match=why):
        rung_of(read(root / "job.json"), "job.json")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": "other"}'])
def test_what_is_no_evidence_at_all(root: Path, text: str) -> None:
    (root / "job.json").write_text(text)
    with pytest.raises(ValueError, match=r"job\.json"):
        read(root / "job.json")


def test_a_command_is_recorded_with_what_it_printed(root: Path) -> None:
    command = [sys.executable, "-c", "print('built'); print('checked')"]
    job = Job("semantics emulated", REFERENCE, "cpu, emulated", "g++ 12", "", "", [SIMULATION])
    made = recorded(job, command)
    assert made["right"]
    assert made["printed"] == ["built", "checked"]
    assert made["emulation"] == {SIMULATION: source_sha256(SIMULATION)}
    assert not recorded(replace(job, says=r"\d+ passed"), command)["right"]
    file = root / "job.json"
    words = ["--what", "semantics emulated", "--backend", REFERENCE, "--device", "cpu, emulated",
             "--report", str(file), "--emulated-by", SIMULATION, "--", sys.executable, "-c",
             "raise SystemExit(3)"]  # fmt: skip
    assert main(words) == 1
    assert read(file).rung == ""
    assert main([*words[:-1], "print(1)"]) == 0
    assert rung_of(read(file), "job.json").rung == "R3"
    assert main([word if word != SIMULATION else "no.such" for word in words[:-1]] + ["1"]) == 1


# -- ladder.toml ----------------------------------------------------------------------------------


def test_the_file_holds_whatever_stands_in_it(tmp_path: Path) -> None:
    odd = rung(note='a "quoted" \\ path\n\ttab é \x7f', command="x --only 'a[b]'", suite="")
    whole = rung(device="x", vendor={"torch-npu": "1" * 64, "a b": "2"})
    made = Ladder((odd, whole), {"torch-npu": "1" * 64})
    file = tmp_path / "ladder.toml"
    file.write_text(written(made), encoding="utf-8")
    found = ladders.read(file)
    assert sorted(found.rungs, key=str) == sorted(made.rungs, key=str)
    assert found.vendor == made.vendor
    assert written(found) == file.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "text",
    ["[[rung]]\nbackend = 'x'", "[[rung]]\nnobody = 1", "=", "rung = 3", "[[rung]]\n"
     + "".join(f"{name} = 1\n" for name in ("backend", "target", "device", "rung", "emulated",
       "evidence", "told", "command", "date", "versions", "source_sha256"))],
)  # fmt: skip
def test_what_is_no_ladder_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "ladder.toml").write_text(text)
    with pytest.raises(ValueError, match=r"ladder\.toml"):
        ladders.read(tmp_path / "ladder.toml")


def test_pairs_stand_in_the_readme_s_order() -> None:
    names = ["zeta", "mlu", "reference", "cuda", "ascend"]
    made = Ladder(tuple(rung(backend=name) for name in names))
    assert [name for name, _ in by_pair(made)] == ["reference", "cuda", "ascend", "mlu", "zeta"]


def test_a_result_is_kept_with_its_row(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    keeper: Any = importlib.import_module("keep_result")
    tables: Any = importlib.import_module("readme_tables")
    monkeypatch.setattr(tables, "ROOT", root)
    monkeypatch.setattr(tables, "LADDER", root / "ladder.toml")
    monkeypatch.setattr(keeper, "RESULTS", root / RESULTS)
    monkeypatch.setattr(keep, "__defaults__", (lambda text: [],))  # cases that no suite has
    monkeypatch.setattr(ladders.why_expired, "__defaults__", (same,))
    (root / "ladder.toml").write_text("")
    job = root / "job.json"
    job.write_text(json.dumps(JOB | {"name": "ascendc-emulated", "backend": EMULATION}))
    with pytest.raises(ValueError, match=r"is not kept: .* emulates a vendor's backend"):
        keeper.place(job, "AMD gfx906", None)
    job.write_text(json.dumps(JOB))
    made = keeper.place(job, "AMD gfx906, gfx908", "not run")
    assert made.evidence == f"{RESULTS}hip-amd-gfx906-gfx908-r4.json"
    run = conform_reports.passing()
    (root / "conformance.json").write_text(run.document())
    keeper.place(root / "conformance.json", "", None)
    job.write_text(json.dumps(JOB | {"date": "2026-11-21"}))
    again = keeper.place(job, "AMD gfx906, gfx908", None)
    monkeypatch.setattr(ladders.why_expired, "__defaults__", (other,))
    with pytest.raises(ValueError, match="is expired: source changed since"):
        keeper.place(job, "AMD gfx906, gfx908", None)
    assert (again.date, again.note) == ("2026-11-21", "not run")
    found = ladders.read(root / "ladder.toml")
    assert {r.place for r in found.rungs} == {made.place, ("acme", "Acme XPU 900", "R6")}
    assert contradictions(found, root) == []
