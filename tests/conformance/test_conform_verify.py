# SPDX-License-Identifier: Apache-2.0
"""A report that was edited is refused, sealed anew or not. Waivers are strict: their form, an
expiry, CORE never, and never for what passes."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import support.conform_fake_worker as fake
from support import conform_reports
from support.conform_fake_worker import CLAIM, CORE
from support.conform_reports import changed
from support.conform_runs import ran

from portakv_conformance import SUITE_VERSION, cli
from portakv_conformance.cli import main
from portakv_conformance.evidence.evidence import of_report
from portakv_conformance.evidence.support_matrix import RESULTS
from portakv_conformance.evidence.verdict import (
    LEFT_OUT,
    SEAL,
    case_list_sha256,
    digest_of,
    judge,
    unnamed,
    why_no_level,
)
from portakv_conformance.evidence.verify import check_report
from portakv_conformance.judge.waivers import Waiver, WaiverError, judged, problems, read_waivers
from portakv_conformance.record import CaseRecord, RunRecord
from portakv_conformance.report.page import markdown
from portakv_conformance.vendor.standins import SIMULATION, STANDINS

BEHAVIOURS = {CORE + "a": "pass", CORE + "b": "pass", CLAIM + "c": "not-claimed"}


def listing(profile: str, device: str) -> dict[str, dict[str, Any]]:
    return {id: fake.about(id) for id in BEHAVIOURS}


@pytest.fixture(scope="module")
def made() -> RunRecord:
    return ran(BEHAVIOURS, profile="full")


@pytest.fixture
def record(made: RunRecord) -> RunRecord:
    return copy.deepcopy(made)


def refusals(record: RunRecord) -> str:
    return "\n".join(check_report(record.document(), listing))


@pytest.mark.parametrize(("options", "behaviours", "verdict", "missing"), [
    ({}, {CORE + "a": "fail", CORE + "b": "crash"}, "failed", ""),
    ({"waivers": (Waiver(CLAIM + "c", "Ticket.", "2999.01"),)}, {CLAIM + "c": "fail"},
     "conformant", ""),
    ({"only": (CORE + "b",)}, {CORE + "a": "fail"}, "incomplete", "--only"),
    ({"exit_first": True}, {CORE + "a": "fail"}, "failed", "after the first failure"),
])  # fmt: skip
def test_one_that_failed_one_with_waivers_and_partial_ones_stand(
    options: dict[str, Any], behaviours: dict[str, str], verdict: str, missing: str
) -> None:
    record = ran(BEHAVIOURS | behaviours, **options)
    assert (record.verdict, refusals(record)) == (verdict, "")
    assert missing in "".join(record.missing)
    assert bool(missing) == bool(record.missing)


def set_to(name: str, value: object) -> Callable[[RunRecord], None]:
    return lambda record: setattr(record, name, value)


def case_to(name: str, value: object, at: int = 0) -> Callable[[RunRecord], None]:
    return lambda record: setattr(record.cases[at], name, value)


def fact_to(name: str, value: object) -> Callable[[RunRecord], None]:
    return lambda record: record.environment.__setitem__(name, value)


# -- a report that was edited, and sealed again by somebody who has read the source ----------------


def cut(record: RunRecord) -> None:
    record.cases.pop()
    record.case_list_sha256 = case_list_sha256(case.id for case in record.cases)
    judge(record)


def waive(record: RunRecord, at: int) -> None:
    record.cases[at].status = "waived"
    record.cases[at].reason = "Ticket."
    record.waivers = [asdict(Waiver(record.cases[at].id, "Ticket.", "2999.01"))]


def command(old: str, new: str) -> Callable[[RunRecord], None]:
    def edit(record: RunRecord) -> None:
        record.command = record.command.replace(old, new, 1)

    return edit


def each_to(name: str, value: object) -> Callable[[RunRecord], object]:
    return lambda record: [vars(case).update({name: value}) for case in record.cases]


def interpreted(record: RunRecord) -> None:
    record.backend |= {"name": "triton", "target": "portakv.backends.triton:Triton"}
    command("portakv conform fake", "TRITON_INTERPRET=1 portakv conform triton")(record)


EDITS: list[tuple[Any, ...]] = [
    # What no rule but the seal finds.
    (lambda record: record.environment.pop(SEAL),),
    (set_to("started", "2020-01-01T00:00:00+00:00"),),
    (case_to("reason", "Nothing."),),
    (case_to("examples", 1000),),
    (fact_to("driver", "999"),),
    (lambda record: record.backend.__setitem__("source_sha256", "1" * 64),),
    (command("conform fake", "conform fakes:Fake"),),
    (command("conform fake", "conform elsewhere:Fake"),),
    # What contradicts the rest of the report.
    (set_to("verdict", "failed"), "'conformant' follows from its cases"),
    (set_to("totals", {"passed": 3}), "its cases count"),
    (set_to("rung", ""), "'R6' is what it proves"),
    (fact_to("emulated", True), "R6 needs the real one"),
    (fact_to("emulated", "no"), "true or false"),
    (fact_to("device", "simdev:1"), "always emulated"),
    (lambda record: record.environment.pop("torch"), "does not say torch"),
    (set_to("profile", "core"), "R6 needs the full profile"),
    (set_to("profile", "most"), "is not core or full"),
    (set_to("seed", 7), "seed 0", "does not say --seed 7"),
    (set_to("fuzz", 9), "no fuzzing", "does not say --fuzz 9"),
    (set_to("missing", ["A thing."]), "'incomplete' follows"),
    (set_to("suite", "1999.01"), "verify it with the release"),
    (set_to("case_list_sha256", "0" * 64), "not that of its cases"),
    (cut, "1 cases of the installed suite are not in it"),
    (lambda record: record.cases.append(CaseRecord("x", "core", "core")), "not in the installed"),
    (lambda record: record.cases.append(record.cases[0]), "is there 2 times"),
    (case_to("status", "failed"), "failed without a reason", "'failed' follows from its cases"),
    (case_to("status", "not-claimed"), "CORE can be neither waived nor unclaimed"),
    (lambda record: waive(record, 0), "CORE can be neither waived nor", "CORE cannot be waived"),
    (lambda record: waive(record, 2), "every case passed or not claimed"),
    (case_to("status", "waived", 2), "does not fit the report's waivers"),
    (case_to("area", "drawn", 2), "but the suite says"),
    (case_to("claim", "threads", 2), "the backend claims 'threads'"),
    (case_to("seconds", 1e6), "one after another"),
    (case_to("seconds", -1.0), "took -1.0 s"),
    (set_to("started", "yesterday"), "not a time with a zone"),
    (set_to("started", "2026-01-01T00:00:00"), "not a time with a zone"),
    (set_to("started", "2999-01-01T00:00:00+00:00"), "yet to come"),
    (lambda record: record.backend.pop("source_sha256"), "hash of the backend's source"),
    (lambda record: record.backend.pop("target"), "the target of the backend"),
    (set_to("totals", []), "got `array` - at `$.totals`"),
    (set_to("seconds", "1"), "at `$.seconds`"),
    (set_to("rung", None), "got `null` - at `$.rung`"),
    (set_to("waivers", [{"id": "x"}]), "does not have the keys"),
    (set_to("waivers", [{"id": "x", "reason": "y", "expires": "soon"}]), "not a version"),
    (case_to("examples", True), "got `bool` - at `$.examples`"),
    (each_to("examples", 0), "judged no copy"),
    (case_to("declined", 99), "passed, with half or more of its copies declined"),
    (case_to("declined", -1), "took"),
    (each_to("seconds", 0.0), "no time at all"),
    (case_to("seconds", float("nan")), "took nan s"),
    (set_to("seconds", float("inf")), "The run took inf s"),
    (set_to("capabilities", {}), "not the fields of a backend's claims: alignment, "),
    (set_to("trace", []), "what the registry answered"),
    (command("fake", "other"), "does not judge 'fake' (fakes:Fake)"),
    (command("portakv", "echo"), "does not judge"),
    (command("fake", "other:Class"), "does not judge"),
    (command("--seed 0", "--seed 0 --only x"), "has --only, which"),
    (command("--seed 0", "--seed 0 --waivers f"), "has --waivers, which"),
    (command("--seed 0", "--seed 0 --fuzz 9"), "has --fuzz, which"),
    (command("--seed 0", "--seed 0 --emulated"), "has --emulated, which"),
    (fact_to("TRITON_INTERPRET", "1"), "An interpreter ran its kernels"),
    (interpreted, "An interpreter ran its kernels"),
    (case_to("claim", "max_loops", 2), "the backend claims 'max_loops'"),
    (case_to("claim", "alignment", 2), "the backend claims 'alignment'"),
]


@pytest.mark.parametrize(
    ("edit", "expected"),
    [(edit, expected) for edit, *expected in EDITS],
    ids=[edit[-1] if edit[1:] else "seal" for edit in EDITS],
)
def test_an_edit_is_found_by_the_seal_and_a_contradiction_behind_a_new_one(
    record: RunRecord, edit: Callable[[RunRecord], object], expected: list[str]
) -> None:
    assert refusals(record) == ""
    edit(record)
    before = refusals(record)
    assert ("no seal" in before) == (SEAL not in record.environment)
    assert any(word in before for word in ("changed after the run", "no seal", *expected))
    record.environment[SEAL] = digest_of(record)
    result = refusals(record)
    assert all(word in result for word in expected)
    assert bool(result) == bool(expected)
    assert "changed after the run" not in result


# -- what emulated, what carried plans out, and R6 on an accelerator -------------------------------

ASSUMED = "by assumption: the vendor has not confirmed the ops' signatures"
MLU = {"device": "simdev:mlu:1", "emulation": {SIMULATION: "5" * 64, STANDINS["mlu"]: "6" * 64}}
KERNEL = {"carried out by": "the AscendC kernel", "library": {"libportakv_ascend.so": "7" * 64}}


@pytest.mark.parametrize(("facts", "why"), [
    *((whole, "") for whole in ({}, MLU | {"assumption": ASSUMED}, KERNEL)),
    *(({"emulation": value}, "does not say by what") for value in (..., None, [SIMULATION])),
    ({"emulation": {}}, "does not say by what"),
    ({"emulation": {"acme": "1" * 64}}, f"does not say the hash of {SIMULATION}"),
    ({"emulation": {SIMULATION: "unknown: x"}}, f"the hash of {SIMULATION}, which emulated"),
    ({"device": "simdev:mlu:1"}, f"does not say the hash of {STANDINS['mlu']}"),
    (MLU, f"does not say what it holds by: {ASSUMED}"),
    (KERNEL | {"library": {"a.so": "1" * 63}}, "hash of a.so, which carried"),
    (KERNEL | {"library": "a.so"}, "Its library is 'a.so'"),
])  # fmt: skip
def test_a_report_says_what_emulated_and_what_carried(facts: dict[str, Any], why: str) -> None:
    refusals = conform_reports.refusals(changed(conform_reports.emulated(), facts))
    assert why in refusals
    assert bool(why) == bool(re.search("emulat|librar|hash|holds by", refusals))


PACKAGE = "a version of the vendor's package"
OURS = {"target": "portakv.backends.ascend:Ascend"}


@pytest.mark.parametrize(("facts", "backend", "lacking"), [
    ({}, {}, []),
    ({"device": "cpu", "driver": ""}, {}, []),
    *(({"driver": driver}, {}, ["the driver's version"]) for driver in ("", " ", None, ...)),
    *(({"device": kind, "torch_acme": ...}, OURS, [PACKAGE])
      for kind in ("npu", "mlu:1", "cuda")),
    ({"device": "npu", "torch_acme": ..., "torch-npu": ""}, OURS, [PACKAGE]),
    ({"device": "npu", "torch_acme": ..., "torch-npu": "2.13.0"}, OURS, []),
])  # fmt: skip
def test_r6_on_an_accelerator_says_its_driver_and_the_vendor_s_package(
    facts: dict[str, Any], backend: dict[str, str], lacking: list[str]
) -> None:
    run = conform_reports.passing()
    run = changed(run, facts, backend=run.backend | backend)
    assert (run.rung, unnamed(run)) == ("" if lacking else "R6", lacking)
    if lacking:
        assert f"R6 needs {lacking[0]}" in why_no_level(run)
        run.rung = "R6"
        assert "It claims level 'R6', but '' is what it proves: R6 on an accelerator needs" in (
            conform_reports.refusals(run)
        )


def test_cases_on_two_devices_are_left_out_in_words_only(record: RunRecord) -> None:
    """They stand between a real machine and nothing, but the report has to say so."""

    def pairs(profile: str, device: str) -> dict[str, dict[str, Any]]:
        alone = {id: {**about, "optional": False} for id, about in listing("", "").items()}
        return {**alone, "cases/test_devices.py::test_two": {**fake.about("x"), "optional": True}}

    assert check_report(record.document(), pairs) == [
        "It does not say that 1 cases on two devices were left out."
    ]
    record.environment[LEFT_OUT] = "1 case was left out, since one device was found"
    judge(record)
    assert (record.rung, check_report(record.document(), pairs)) == ("R6", [])
    assert "Two devices: 1 case was left out, since one device was found." in markdown(record)
    assert of_report(record).summary == "2 passed, 1 not claimed, on one device"
    alone = ran(BEHAVIOURS | {"lone": "9"})
    assert alone.environment[LEFT_OUT] == "9 cases were left out, since one device was found"
    assert alone.verdict == "conformant"


def test_what_was_missing_explains_a_shorter_list(record: RunRecord) -> None:
    gone = record.cases.pop(1)
    record.missing = [f"{gone.id}: it needs two devices of type x, found 1."]
    record.case_list_sha256 = case_list_sha256(case.id for case in record.cases)
    judge(record)
    assert (record.verdict, record.rung, refusals(record)) == ("incomplete", "", "")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "{}", '{"schema": "portakv-conformance/1"}', "null", '"portakv-conformance/1"'],
)
def test_what_is_no_report_is_refused(text: str) -> None:
    assert len(check_report(text, listing)) == 1


def test_the_command(
    record: RunRecord,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "check_report", partial(check_report, listing=listing))
    file = tmp_path / "conformance.json"
    file.write_text(record.document(), encoding="utf-8")
    assert main(["verify", str(file)]) == 0
    out = capsys.readouterr().out
    assert f"{file} stands: fake on cpu (CPU): conformant, R6. Suite 2026.12, profile full," in out
    file.write_text(record.document().replace('"passed": 2', '"passed": 3'), encoding="utf-8")
    assert main(["verify", str(file)]) == 1
    assert "2 contradictions" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "nothing.json")]) == 2
    shown = capsys.readouterr().err
    assert "nothing.json cannot be read: No such file or directory. Pass a report" in shown


@pytest.mark.parametrize(("change", "code", "expected"), [
    ({}, 0, "the record of a job, not a report: hip, cross-compiled, not executed."),
    ({}, 0, "The record is complete. Level: R4. Again: bash native/cuda/check_hip.sh gfx906"),
    ({"right": False}, 1, "Level: none."),
    ({"kernels": []}, 1, "but it is incomplete."),
    ({"what": 3}, 1, "a record of a job, got a file with what missing or of"),
    (None, 1, "is not JSON: Expecting value"),
])  # fmt: skip
def test_a_record_of_a_job_is_told_apart(
    change: dict[str, Any] | None,
    code: int,
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (retained,) = (Path(__file__).parents[2] / RESULTS).glob("hip-amd-*-r4.json")
    file = tmp_path / "job.json"
    changed = "" if change is None else json.dumps(json.loads(retained.read_text()) | change)
    file.write_text(changed)
    assert main(["verify", str(file)]) == code
    assert expected in capsys.readouterr().out


# -- waivers ---------------------------------------------------------------------------------------

LATER = "2999.01"
NOW = SUITE_VERSION
GOOD = f"""
[[waiver]]
id = "{CLAIM}a"
reason = "Ticket 4711."
expires = "{LATER}"
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "waivers.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_file_is_read_in_its_order(tmp_path: Path) -> None:
    both = GOOD + GOOD.replace(CLAIM + "a", CLAIM + "b").replace(LATER, "3000")
    assert read_waivers(written(tmp_path, both)) == (
        Waiver(CLAIM + "a", "Ticket 4711.", LATER),
        Waiver(CLAIM + "b", "Ticket 4711.", "3000"),
    )
    assert read_waivers(written(tmp_path, "")) == ()


@pytest.mark.parametrize(("text", "expected"), [
    (GOOD + 'ticket = "4711"\n', "unknown key 'ticket'"),
    ('title = "own"\n' + GOOD, "unknown key 'title'"),
    ("[waivers]\n", "unknown key 'waivers'"),
    (GOOD.replace("[[waiver]]", "[waiver]"), "Expected a list of tables"),
    (GOOD.replace('reason = "Ticket 4711."\n', ""), "'reason' .*, got nothing"),
    (GOOD.replace("Ticket 4711.", " "), "'reason' .*, got ' '"),
    (GOOD.replace(f'id = "{CLAIM}a"\n', ""), "'id' .*, got nothing"),
    (GOOD.replace(f'expires = "{LATER}"\n', ""), "'expires' .*, got nothing"),
    (GOOD.replace(f'"{LATER}"', "2999.01"), "'expires' .*, got 2999.01"),
    (GOOD.replace(LATER, "next year"), "a version of the suite, got 'next year'"),
    (GOOD + GOOD, "Expected one waiver .*, got 2"),
    ("[[waiver]\n", "Expected a TOML file"),
])  # fmt: skip
def test_a_file_of_another_form_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(WaiverError, match=expected):
        read_waivers(written(tmp_path, text))
    (tmp_path / "latin.toml").write_bytes(b"# \xe9\n")
    for name in "nothing", "latin":
        with pytest.raises(WaiverError, match=r"cannot be read: .*Pass a waiver file, in TOML"):
            read_waivers(tmp_path / f"{name}.toml")


@pytest.mark.parametrize(("how", "id", "expires", "status", "expected"), [
    ("fail", CLAIM + "a", LATER, "waived", "Ticket 4711. (What it showed: Byte 3 is 7"),
    ("crash", CLAIM + "a", LATER, "waived", "SIGSEGV"),
    ("pass", CLAIM + "a", LATER, "failed", "remove the waiver"),
    ("not-claimed", CLAIM + "a", LATER, "failed", "remove the waiver"),
    ("error", CLAIM + "a", LATER, "error", ""),
    ("fail", CORE + "a", LATER, "failed", "CORE cannot be waived"),
    *(("fail", CLAIM + "a", expires, "failed", f"expired in suite {expires}")
      for expires in (NOW, f"{NOW}.0", "2020.01", "1")),
])  # fmt: skip
def test_a_waived_case(how: str, id: str, expires: str, status: str, expected: str) -> None:
    """A failure or a crash is waived, of no CORE case and until its waiver expires; it proves no
    level. What passes, or is not claimed, fails."""
    waiver = Waiver(id, "Ticket 4711.", expires)
    record = ran({id: how, CLAIM + "b": "pass"}, waivers=(waiver,), profile="full")
    assert [case.status for case in record.cases] == [status, "passed"]
    assert expected in record.cases[0].reason
    conformant = "conformant" if status == "waived" else "failed"
    assert (record.verdict, record.rung) == (conformant, "")
    assert ("cases are waived" in why_no_level(record)) == (status == "waived")
    assert record.waivers == [asdict(waiver)]


def test_an_expiry_is_compared_as_numbers() -> None:
    case = CaseRecord("a", "claims", "core", status="failed", reason="Wrong.")
    assert judged(case, Waiver("a", "why", "2026.9"), "2026.11").status == "failed"
    assert judged(case, Waiver("a", "why", "2026.12"), "2026.11").status == "waived"
    # A waiver that expired and that names no case is reported twice.
    assert len(problems([asdict(Waiver("x", "why", "1"))], [], NOW, whole=True)) == 2


def test_a_waived_failure_is_no_first_failure() -> None:
    behaviours = {CLAIM + "a": "fail", CLAIM + "b": "fail", CLAIM + "c": "pass"}
    record = ran(behaviours, waivers=(Waiver(CLAIM + "a", "why", LATER),), exit_first=True)
    assert [case.status for case in record.cases] == ["waived", "failed"]
