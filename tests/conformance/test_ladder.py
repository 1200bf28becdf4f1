# SPDX-License-Identifier: Apache-2.0
"""The ladder: its rules, what bears a rung out, what ends one, and what stands beside it always."""

from __future__ import annotations

import html
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.conform_reports import changed, emulated, failing, incomplete, kept, passing

from portakv.cli import main as portakv
from portakv_conformance.evidence import ladder as ladders
from portakv_conformance.evidence.environment import assumed, describe_environment
from portakv_conformance.evidence.evidence import contradictions, of_report, read, rung_of
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
from portakv_conformance.evidence.source import SourceError, source_files, source_sha256
from portakv_conformance.judge.subject import subject
from portakv_conformance.record import RunRecord
from portakv_conformance.report.page import markdown, page
from portakv_conformance.report.summary import print_summary
from portakv_conformance.report.support import reached, verified
from portakv_conformance.report.words import plain
from portakv_conformance.run.request import Options
from portakv_conformance.vendor.standins import EMULATION, SIMULATION, STANDINS, emulating

VENDOR = "portakv_conformance.vendor"
ASCENDC = f"{VENDOR}.ascendc_emulated:AscendC"
ASSUMED = "by assumption: the vendor has not confirmed the ops' signatures"


def same(target: str) -> str:
    return "a" * 64


def other(target: str) -> str:
    return "b" * 64


def gone(target: str) -> str:
    raise SourceError("no such module")


def rung(**values: Any) -> Rung:
    made = Rung(
        backend="cuda", target="portakv.backends.cuda:Cuda", device="NVIDIA H200", rung="R6",
        emulated=False, evidence=f"{RESULTS}a.json", told="314 cases", command="portakv conform",
        date="2026-11-20", versions="torch 2.13.0", source_sha256="a" * 64, suite="2026.12",
    )  # fmt: skip
    return replace(made, **values)


def emulated_rung(**values: Any) -> Rung:
    made = {"device": "mlu, emulated", "rung": "R3", "emulated": True, "suite": ""}
    return rung(**{**made, **values})


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"emulated": True}, "an emulated device is never R6"),
        ({"emulated": True, "device": "npu, emulated"}, "an emulated device is never R6"),
        ({"suite": ""}, "R6 needs a report of the suite"),
        ({"rung": "R7"}, "there is no rung 'R7'"),
        ({"rung": "R3"}, "what ran on the real device is R6 or no rung"),
        ({"rung": "R3", "emulated": True}, "has to say that it is emulated"),
        ({"rung": "R5", "emulated": True, "target": ASCENDC}, "emulates a vendor's backend, and"),
        ({"rung": "R4", "emulated": True, "target": ASCENDC}, "emulates a vendor's backend, and"),
        ({"evidence": "docs/notes.md"}, "does not lie in conformance/results/"),
        ({"evidence": f"{RESULTS}../../README.md"}, "does not lie in conformance/results/"),
        ({"evidence": f"{RESULTS}b.json"}, "listed twice"),
    ],
)
def test_the_rules(values: dict[str, Any], why: str) -> None:
    assert list(broken_rules(Ladder((rung(),)))) == []
    rows = (rung(**values), *[rung()] * (why == "listed twice"))
    assert why in "\n".join(broken_rules(Ladder(rows)))


# -- what ends a rung -----------------------------------------------------------------------------


def test_a_rung_ends_with_the_source_the_suite_or_a_package_of_the_vendor() -> None:
    base = Ladder((), {"torch-npu": "1" * 64})
    held = rung(vendor={"torch-npu": "1" * 64})
    assert why_expired(held, base, same) == ""
    assert why_expired(held, base, other) == why_expired(held, base, gone) == "source changed since"
    assert why_expired(replace(held, suite="2026.05"), base, same) == "suite 2026.05, now 2026.12"
    assert why_expired(held, Ladder(()), same) == "torch-npu changed since"
    newer = base.with_rung(rung(device="other", vendor={"torch-npu": "2" * 64}))
    assert why_expired(held, newer, same) == "torch-npu changed since"
    # A third party's may be installed here or not; the table must not depend on that.
    assert why_expired(rung(target="acme.backend:Acme"), Ladder(()), gone) == ""
    # Without a digest the real sources are hashed.
    mine = rung(target="portakv.backends.reference:Reference")
    assert why_expired(mine, Ladder(())) == "source changed since"
    assert why_expired(replace(mine, source_sha256=source_sha256(mine.target)), Ladder(())) == ""


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


@pytest.mark.parametrize(("start", "files"), [
    (SIMULATION, "device.cpp operators.h device_module.py"),
    (f"{VENDOR}.mlu_standin", f"{VENDOR}.mlu_standin.py"),
    (f"{VENDOR}.ascend_standin", f"{VENDOR}.ascend_ops.py {VENDOR}/ascend_schemas.toml"),
    (f"{VENDOR}.ascend_device",
     f"{VENDOR}.ascend_ops.py {VENDOR}.cann_stub.py {VENDOR}/cann_stub.c"),
    (f"{VENDOR}.hip_emulated",
     f"{VENDOR}.cpp.py {VENDOR}/hip_fake.cpp {VENDOR}/kernel_on_cpu.h"),
    (f"{VENDOR}.ascendc_emulated",
     "portakv_native.ascend/emulation/machine.h portakv_native.ascend/rows.h"),
])  # fmt: skip
def test_each_file_of_an_emulation_counts(start: str, files: str) -> None:
    """A change of one ends every rung that this emulation carried."""
    assert set(files.split()) <= set(source_files(start))
    held = emulated_rung(emulation={start: "c" * 64})
    since = why_expired(held, Ladder(()), lambda t: "a" * 64 if t == held.target else "d" * 64)
    assert since == f"{start.rpartition('.')[2]} changed since"


@pytest.mark.parametrize("rung", ["R1", "R2", "R3"])
def test_an_emulated_rung_that_names_no_emulation_is_expired(rung: str) -> None:
    assert "does not say what emulated" in why_expired(emulated_rung(rung=rung), Ladder(()), same)
    held = emulated_rung(rung=rung, emulation={SIMULATION: "a" * 64, "triton": "3.6.0"})
    assert why_expired(held, Ladder(()), same) == ""  # of a third party's nothing is looked for
    lost = emulated_rung(emulation={f"{VENDOR}.no_such": "a" * 64})
    assert "no_such changed since" in why_expired(lost, Ladder(()), source_sha256)
    assert why_expired(emulated_rung(rung="R4", device="gfx906"), Ladder(()), same) == ""


def test_a_device_is_emulated_by_what_carries_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report says it, with the hash of its source."""
    monkeypatch.delenv(EMULATION, raising=False)
    assert emulating("simdev") == emulating("acme") == (SIMULATION,)
    for name, standin in STANDINS.items():
        assert emulating(name) == (SIMULATION, standin)
    real = subject("reference", "cpu")
    assert "emulation" not in describe_environment(real, "cpu")
    facts = describe_environment(replace(real, emulated=True), "simdev")
    assert facts["emulation"] == {SIMULATION: source_sha256(SIMULATION)}
    assert plain(facts["emulation"]) == f"{SIMULATION} {source_sha256(SIMULATION)}"
    monkeypatch.setenv(EMULATION, f"{VENDOR}.ascend_device:enter")
    assert emulating("npu") == (f"{VENDOR}.ascend_device",)


def test_a_row_has_the_emulation_of_its_report() -> None:
    run = emulated()
    assert of_report(run).emulation == {SIMULATION: "5" * 64}
    run.environment |= {"device": "cpu"}
    assert of_report(run).emulation == {"portakv_acme": run.backend["source_sha256"]}
    run.environment |= {"TRITON_INTERPRET": "1", "triton": "3.6.0"}
    assert of_report(run).emulation == {"triton": "3.6.0"}
    assert of_report(passing()).emulation == {}


# -- files ----------------------------------------------------------------------------------------


def row(run: RunRecord, root: Path) -> Rung:
    """The row of a run whose report was put among the results."""
    file = kept(run, root)
    return rung_of(read(file), RESULTS + file.name)


@pytest.mark.parametrize(
    ("name", "value"),
    [("note", "by us"), ("rung", "R3"), ("backend", "other"), ("target", "a.b:C"),
     ("device", "NVIDIA H100"), ("emulated", True), ("command", "portakv conform x"),
     ("date", "2026-11-19"), ("source_sha256", "0" * 64), ("suite", "2027.01"),
     ("told", "9 cases"), ("versions", "torch 9"), ("vendor", {"torch-npu": "0" * 64})],
)  # fmt: skip
def test_a_row_says_what_its_file_says(tmp_path: Path, name: str, value: Any) -> None:
    """And a note, which is a person's."""
    made = row(passing(), tmp_path)
    assert (made.rung, made.emulated, made.told) == ("R6", False, "312 passed, 2 not claimed")
    assert contradictions(Ladder((made,)), tmp_path) == []
    found = contradictions(Ladder((replace(made, **{name: value}),)), tmp_path)
    more = f"{name} is {value!r}, but the file says"
    assert (found == []) if name == "note" else (more in "\n".join(found))


def test_an_emulated_report_cannot_be_raised_to_r6(tmp_path: Path) -> None:
    run = changed(passing(), {"emulated": True, "device": "simdev:mlu"})
    made = row(run, tmp_path)
    assert (made.rung, made.device, made.emulated) == ("R3", "mlu, emulated", True)
    for values, why in (
        ({"rung": "R6"}, "rung is 'R6', but the file says 'R3'"),
        ({"rung": "R6", "emulated": False}, "emulated is False, but the file says True"),
    ):
        assert why in "\n".join(contradictions(Ladder((replace(made, **values),)), tmp_path))


def test_files_that_are_edited_missing_misnamed_or_forgotten_are_found(tmp_path: Path) -> None:
    made = row(passing(), tmp_path)
    file = tmp_path / made.evidence
    text = file.read_text()
    assert "has no row in ladder.toml" in contradictions(Ladder(()), tmp_path)[0]
    file.write_text(text.replace('"profile": "full"', '"profile": "core"', 1))
    assert "its seal does not fit its contents" in contradictions(Ladder((made,)), tmp_path)[0]
    file.unlink()
    assert "cannot be read" in contradictions(Ladder((made,)), tmp_path)[0]
    (tmp_path / RESULTS / "best.json").write_text(text)
    moved = Ladder((replace(made, evidence=f"{RESULTS}best.json"),))
    assert "must be named after its contents" in contradictions(moved, tmp_path)[0]


def test_what_is_not_conformant_is_no_rung() -> None:
    for run in (failing(), incomplete()):
        with pytest.raises(ValueError, match="bears out no rung"):
            rung_of(of_report(run), "x.json")


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


# -- what never stands apart from a result ---------------------------------------------------------


def test_what_a_stand_in_takes_for_true_stands_in_every_form(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the report, what is printed of it, the ladder's row and list, and `portakv backends`."""
    assert assumed(emulating("mlu")) == ASSUMED
    assert assumed(emulating("npu")) == assumed(emulating("simdev")) == ""
    run = changed(emulated(), {"device": "simdev:mlu", "assumption": ASSUMED})
    said = f"It holds {ASSUMED}."
    assert said in html.unescape(page(run))
    assert said in markdown(run)
    print_summary(run, Options(backend="mlu", device="simdev:mlu"))
    assert said in " ".join(capsys.readouterr().out.split())
    mine = rung_of(of_report(run), "a.json")
    assert mine.assumption == ASSUMED
    assert ASSUMED in reached(mine, Ladder((mine,)))
    assert ASSUMED in verified(mine, Ladder((mine,)))
    assert told(mine.backend, "acme", Ladder((mine,))).endswith(f" on mlu, emulated, {ASSUMED}")
    assert portakv(["backends", "--device", "mlu", "--json"]) == 1
    (device,) = json.loads(capsys.readouterr().out)["devices"]
    (shown,) = (each for each in device["candidates"] if each["name"] == "mlu")
    assert shown["verified"].endswith(f"R3 on mlu, emulated, {ASSUMED}")
    portakv(["backends", "--device", "mlu"])
    assert "by assumption:" in capsys.readouterr().out


def test_what_a_built_library_carried_out_has_a_row_and_a_file_of_its_own(tmp_path: Path) -> None:
    rows = [
        row(changed(passing(), {"carried out by": what, "library": library}), tmp_path)
        for what, library in (
            ("the ops of torch_npu", ...),
            ("the AscendC kernel", {"libportakv_ascend.so": "7" * 64}),
        )
    ]
    assert [(row.device, row.rung, Path(row.evidence).name) for row in rows] == [
        ("Acme XPU 900", "R6", "acme-acme-xpu-900-2026.12.json"),
        ("Acme XPU 900, by the AscendC kernel", "R6",
         "acme-acme-xpu-900-by-the-ascendc-kernel-2026.12.json"),
    ]  # fmt: skip
    assert len(Ladder(()).with_rung(rows[0]).with_rung(rows[1]).rungs) == 2
