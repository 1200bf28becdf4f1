# SPDX-License-Identifier: Apache-2.0
"""The matrix: its rules, what bears a level out, what ends one, and what always accompanies it.
Records of jobs and old reports: none is believed for its label alone, each names its backend and
what it is about, and none holds a place of the machine that made it."""

from __future__ import annotations

import hashlib
import html
import importlib
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.conform_reports import changed, emulated, passing, saved_report
from support.conform_runs import ROOT

from portakv.cli import main as portakv
from portakv_conformance.evidence import evidence, support_matrix
from portakv_conformance.evidence.environment import assumed, describe_environment
from portakv_conformance.evidence.evidence import JOBS, contradictions, level_of, read
from portakv_conformance.evidence.record_rules import kernels_in, signatures_of
from portakv_conformance.evidence.source import SourceError, source_sha256
from portakv_conformance.evidence.support_matrix import (
    RESULTS,
    SupportLevel,
    SupportMatrix,
    summary,
    why_expired,
)
from portakv_conformance.judge.subject import subject
from portakv_conformance.record import RunRecord
from portakv_conformance.report.page import markdown, page
from portakv_conformance.report.results import keep, reached, verified
from portakv_conformance.report.summary import print_summary
from portakv_conformance.report.words import plain
from portakv_conformance.run.request import Options
from portakv_conformance.vendor.standins import EMULATION, SIMULATION, STANDINS, emulating

VENDOR = "portakv_conformance.vendor"
ASCENDC = f"{VENDOR}.ascendc_emulated:AscendC"
ASSUMED = "by assumption: the vendor has not confirmed the ops' signatures"


def other(target: str) -> str:
    return "b" * 64


def same(target: str) -> str:
    return "a" * 64


def gone(target: str) -> str:
    raise SourceError("no such module")


def level(**values: Any) -> SupportLevel:
    made = SupportLevel(
        backend="cuda",
        target="portakv.backends.cuda:Cuda",
        device="NVIDIA H200",
        level="R6",
        emulated=False,
        evidence=f"{RESULTS}a.json",
        summary="314 cases",
        command="portakv conform",
        date="2026-11-20",
        versions="torch 2.13.0",
        source_sha256="a" * 64,
        suite="2026.12",
    )
    return replace(made, **values)


@pytest.mark.parametrize(("values", "why"), [
    ({"emulated": True}, "an emulated device is never R6"),
    ({"suite": ""}, "R6 needs a report of the suite"),
    ({"level": "R7"}, "there is no level 'R7'"),
    ({"level": "R3"}, "what ran on the real device is R6 or no level"),
    ({"level": "R3", "emulated": True}, "has to say that it is emulated"),
    ({"level": "R4", "emulated": True, "target": ASCENDC}, "emulates a vendor's backend, and"),
    ({"evidence": "docs/notes.md"}, "does not lie in conformance/results/"),
    ({"evidence": f"{RESULTS}../../README.md"}, "does not lie in conformance/results/"),
    ({"evidence": f"{RESULTS}b.json"}, "listed twice"),
])  # fmt: skip
def test_the_rules(values: dict[str, Any], why: str) -> None:
    assert list(support_matrix.broken_rules(SupportMatrix((level(),)))) == []
    rows = (level(**values), *[level()] * (why == "listed twice"))
    assert why in "\n".join(support_matrix.broken_rules(SupportMatrix(rows)))


# -- what ends a level -----------------------------------------------------------------------------


def test_a_rung_ends_with_the_source_the_suite_or_a_package_of_the_vendor() -> None:
    base = SupportMatrix((), {"torch-npu": "1" * 64})
    retained = level(vendor={"torch-npu": "1" * 64})
    assert why_expired(retained, base, same) == ""
    assert (
        why_expired(retained, base, other)
        == why_expired(retained, base, gone)
        == "source changed since"
    )
    assert (
        why_expired(replace(retained, suite="2026.05"), base, same) == "suite 2026.05, now 2026.12"
    )
    assert why_expired(retained, SupportMatrix(()), same) == "torch-npu changed since"
    newer = base.with_level(level(device="other", vendor={"torch-npu": "2" * 64}))
    assert why_expired(retained, newer, same) == "torch-npu changed since"
    # A third party's may be installed here or not; the table must not depend on that.
    assert why_expired(level(target="acme.backend:Acme"), SupportMatrix(()), gone) == ""
    # Without a digest the real sources are hashed.
    own = level(target="portakv.backends.reference:Reference")
    assert why_expired(own, SupportMatrix(())) == "source changed since"
    assert (
        why_expired(replace(own, source_sha256=source_sha256(own.target)), SupportMatrix(())) == ""
    )


def test_a_list_tells_the_rung_here_else_the_highest_that_holds() -> None:
    far = level(device="hip, emulated", level="R3", emulated=True, emulation={"acme": "1"})
    result = SupportMatrix((level(source_sha256="b" * 64), far))
    assert summary("cuda", "NVIDIA H200", result, same) == "expired R6"
    assert summary("cuda", "CPU (x86-64)", result, same) == "R3 on hip, emulated"
    assert summary("cuda", "CPU (x86-64)", SupportMatrix((level(),)), same) == "R6 on NVIDIA H200"
    assert summary("triton", "NVIDIA H200", result, same) == ""
    assumed = replace(far, assumption="by assumption: not measured", note="not by us")
    assert summary("cuda", "hip, emulated", SupportMatrix((assumed,)), same) == (
        "R3, by assumption: not measured, not by us"
    )


@pytest.mark.parametrize("name", ["R1", "R2", "R3"])
def test_an_emulated_rung_ends_with_what_emulated_it(name: str) -> None:
    retained = level(level=name, emulated=True, suite="")
    assert "does not say what emulated" in why_expired(retained, SupportMatrix(()), same)
    retained = replace(retained, emulation={SIMULATION: "a" * 64, "triton": "3.6.0"})
    assert (
        why_expired(retained, SupportMatrix(()), same) == ""
    )  # of a third party's nothing is looked for
    ended = why_expired(
        retained, SupportMatrix(()), lambda t: same(t) if t == retained.target else other(t)
    )
    assert ended == "simdev changed since"
    lost = replace(retained, emulation={f"{VENDOR}.no_such": "a" * 64})
    assert "no_such changed since" in why_expired(lost, SupportMatrix(()))
    assert why_expired(level(level="R4", emulated=True, suite=""), SupportMatrix(()), same) == ""


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
    assert evidence.of_report(run).emulation == {SIMULATION: "5" * 64}
    run.environment |= {"device": "cpu"}
    assert evidence.of_report(run).emulation == {"portakv_acme": run.backend["source_sha256"]}
    run.environment |= {"TRITON_INTERPRET": "1", "triton": "3.6.0"}
    assert evidence.of_report(run).emulation == {"triton": "3.6.0"}
    assert evidence.of_report(passing()).emulation == {}


# -- files ----------------------------------------------------------------------------------------


def row(run: RunRecord, root: Path) -> SupportLevel:
    """The row of a run whose report was put among the results."""
    file = saved_report(run, root)
    return level_of(read(file), RESULTS + file.name)


def test_a_row_says_what_its_file_says(tmp_path: Path) -> None:
    """It has a note too, which a person wrote."""
    made = row(passing(), tmp_path)
    assert (made.level, made.emulated, made.summary) == ("R6", False, "312 passed, 2 not claimed")
    assert contradictions(SupportMatrix((replace(made, note="by us"),)), tmp_path) == []
    values = {
        "level": "R3",
        "backend": "other",
        "target": "a.b:C",
        "device": "NVIDIA H100",
        "emulated": True,
        "command": "portakv conform x",
        "date": "2026-11-19",
        "source_sha256": "0" * 64,
        "suite": "2027.01",
        "summary": "9 cases",
        "versions": "torch 9",
        "vendor": {"torch-npu": "0" * 64},
        "emulation": {"acme": "1"},
        "assumption": "by luck",
    }
    result = contradictions(SupportMatrix((replace(made, **values),)), tmp_path)  # type: ignore[arg-type]
    for name, value in values.items():
        assert f"{name} is {value!r}, but the file says" in "\n".join(result)


def test_files_that_are_edited_missing_misnamed_or_forgotten_are_found(tmp_path: Path) -> None:
    made = row(passing(), tmp_path)
    file = tmp_path / made.evidence
    text = file.read_text()
    assert "has no row in support_matrix.toml" in contradictions(SupportMatrix(()), tmp_path)[0]
    file.write_text(text.replace('"profile": "full"', '"profile": "core"', 1))
    assert (
        "its seal does not fit its contents" in contradictions(SupportMatrix((made,)), tmp_path)[0]
    )
    file.unlink()
    assert "cannot be read" in contradictions(SupportMatrix((made,)), tmp_path)[0]
    (tmp_path / RESULTS / "best.json").write_text(text)
    moved = SupportMatrix((replace(made, evidence=f"{RESULTS}best.json"),))
    assert "must be named after its contents" in contradictions(moved, tmp_path)[0]


# -- support_matrix.toml ------------------------------------------------------------------------


def test_the_file_holds_whatever_stands_in_it(tmp_path: Path) -> None:
    odd = level(note='a "quoted" \\ path\n\ttab é \x7f', command="x --only 'a[b]'", suite="")
    whole = level(device="x", vendor={"torch-npu": "1" * 64, "a b": "2"})
    made = SupportMatrix((odd, whole), {"torch-npu": "1" * 64})
    file = tmp_path / "support_matrix.toml"
    file.write_text(support_matrix.written(made), encoding="utf-8")
    result = support_matrix.read(file)
    assert (result.vendor, set(map(str, result.levels))) == (
        made.vendor,
        set(map(str, made.levels)),
    )
    assert support_matrix.written(result) == file.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "text",
    [
        "[[level]]\nbackend = 'x'",
        "[[level]]\nnobody = 1",
        "=",
        "level = 3",
        "[[level]]\n"
        + "".join(
            f"{name} = 1\n"
            for name in (
                "backend",
                "target",
                "device",
                "level",
                "emulated",
                "evidence",
                "summary",
                "command",
                "date",
                "versions",
                "source_sha256",
            )
        ),
    ],
)
def test_what_is_no_ladder_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "support_matrix.toml").write_text(text)
    with pytest.raises(ValueError, match=r"matrix\.toml"):
        support_matrix.read(tmp_path / "support_matrix.toml")


def test_pairs_stand_in_the_readme_s_order() -> None:
    made = SupportMatrix(
        tuple(level(backend=x) for x in ["zeta", "mlu", "reference", "cuda", "ascend"])
    )
    names = [name for name, _ in support_matrix.by_pair(made)]
    assert " ".join(names) == "reference cuda ascend mlu zeta"


# -- what never stands apart from a result ---------------------------------------------------------


def test_what_a_stand_in_assumes_stands_in_every_form(capsys: pytest.CaptureFixture[str]) -> None:
    """The report, its printed form, the matrix's row and list, and `portakv backends` have it."""
    assert assumed(emulating("mlu")) == ASSUMED
    assert assumed(emulating("npu")) == assumed(emulating("simdev")) == ""
    run = changed(emulated(), {"device": "simdev:mlu", "assumption": ASSUMED})
    sentence = f"It holds {ASSUMED}."
    assert sentence in html.unescape(page(run))
    assert sentence in markdown(run)
    print_summary(run, Options(backend="mlu", device="simdev:mlu"))
    assert sentence in " ".join(capsys.readouterr().out.split())
    own = level_of(evidence.of_report(run), "a.json")
    assert own.assumption == ASSUMED
    assert ASSUMED in reached(own, SupportMatrix((own,)))
    assert ASSUMED in verified(own, SupportMatrix((own,)))
    assert summary(own.backend, "acme", SupportMatrix((own,))).endswith(
        f" on mlu, emulated, {ASSUMED}"
    )
    assert portakv(["backends", "--device", "mlu", "--json"]) == 1
    (device,) = json.loads(capsys.readouterr().out)["devices"]
    (shown,) = (each for each in device["candidates"] if each["name"] == "mlu")
    assert shown["verified"].endswith(f"R3 on mlu, emulated, {ASSUMED}")
    portakv(["backends", "--device", "mlu"])
    assert "assumption" in capsys.readouterr().out  # in a column of words, wherever they fold


# -- records of jobs -----------------------------------------------------------------------------

REFERENCE = "portakv.backends.reference:Reference"
WHEEL = "torch_npu-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl"
KINDS = {level: what for what, level in JOBS.items()}

RECORD = {
    "name": "reference",
    "backend": REFERENCE,
    "source_sha256": "a" * 64,
    "command": "bash it.sh",
    "date": "2026-11-20",
    "device": "npu, emulated",
    "right": True,
}
WHOLE: dict[str, dict[str, Any]] = {
    "R1": {"signatures": [{"op": "a.b", "signature": "(x) -> int", "source": "its page"}],
           "emulation": {SIMULATION: "a" * 64}},
    "R2": {"schemas": [{"op": "a::b", "pinned": "(int x)", "found": "(int x)", "same": True}],
           "vendor": {WHEEL: "b" * 64}, "versions": "torch-npu 2.13.0",
           "emulation": {SIMULATION: "a" * 64}},
    "R3": {"emulation": {SIMULATION: "a" * 64}},
    "R4": {"targets": ["gfx906"], "kernels": [{"kernel": "gather", "target": "gfx906"}],
           "compiler": "HIP version: 5.2"},
    "R5": {"targets": ["gfx936"], "compiler": "DTK 24.04"},
}  # fmt: skip
# Forged: the right label, and something else, which has to be refused in words.
FORGED: list[tuple[str, dict[str, Any], str]] = [
    ("R1", {"signatures": []}, "no signatures"),
    ("R1", {"signatures": ["a.b(x)"]}, "needs op, signature, source"),
    ("R1", {"signatures": [{"op": "a.b", "signature": "(x)", "source": " "}]}, "needs op"),
    ("R1", {"signatures": [{"op": "a.b", "signature": "x", "source": "y"}]}, "signature of a.b"),
    ("R2", {"schemas": "all the same"}, "no schemas"),
    ("R2", {"schemas": [{"op": "a::b", "same": True}]}, "needs op, pinned, found"),
    ("R2", {"schemas": [{"op": "a::b", "pinned": "()", "found": "(int x)", "same": True}]},
     "a::b is pinned as (), but was found as (int x)"),
    ("R2", {"schemas": [{"op": "a::b", "pinned": "()", "found": "()", "same": False}]}, "a::b is"),
    ("R2", {"vendor": {"torch_npu": "b" * 64}}, "names no wheel"),
    ("R2", {"vendor": {WHEEL: "b" * 63}}, "is not a sha256"),
    ("R2", {"vendor": [WHEEL]}, "is not a sha256"),
    ("R2", {"versions": "torch-npu 2.12.0"}, "do not name 2.13.0"),
    ("R2", {"source_sha256": "A" * 64}, "is not a sha256"),
    ("R3", {"emulation": {SIMULATION: None}}, "is not a sha256"),
    ("R4", {"targets": []}, "for which targets"),
    ("R4", {"kernels": [{"kernel": "gather"}]}, "needs kernel, target"),
    ("R4", {"kernels": [{"kernel": "g", "target": "gfx906", "wrong": ["narrow"]}]}, "is wrong"),
    ("R4", {"targets": ["gfx906", "gfx90a"]}, "but code was read of ['gfx906']"),
    ("R4", {"compiler": ""}, "which compiler built it"),
    ("R5", {"targets": None}, "for which targets"),
    ("R5", {"targets": [""]}, "for which targets"),
    ("R5", {"compiler": None}, "toolchain's line"),
    ("R5", {"compiler": "the vendor's"}, "toolchain's line"),
    ("R5", {"printed": ["DTK 23"]}, "is not in what was printed"),
    ("R4", {"printed": ["scatter for gfx906"]}, "Nothing was printed of gather"),
    ("R1", {"emulation": {STANDINS["mlu"]: source_sha256(STANDINS["mlu"])}},
     f"are not those of {STANDINS['mlu']}"),
    ("R5", {"source_sha256": "0" * 65}, "is not a sha256"),
    ("R4", {"right": False}, "to prove a support level, got: failed: cross-compiled"),
    ("R4", {"right": "yes"}, "right missing or of another type"),
    ("R4", {"what": "run on the hardware"}, "got 'run on the hardware'"),
    ("R4", {"command": None}, "command missing or of another type"),
    ("R4", {"name": None}, "name missing or of another type"),
    ("R4", {"device": ""}, "Pass --device"),
]  # fmt: skip


def record_in(folder: Path, level: str, **values: Any) -> Path:
    file = folder / "job.json"
    file.write_text(json.dumps(RECORD | {"what": KINDS[level]} | WHOLE[level] | values))
    return file


@pytest.mark.parametrize("level", WHOLE)
def test_a_record_that_shows_all_is_read(tmp_path: Path, level: str) -> None:
    made = level_of(read(record_in(tmp_path, level)), "job.json")
    assert (made.backend, made.level, made.emulated) == ("reference", level, True)
    assert made.versions == WHOLE[level].get("versions", WHOLE[level].get("compiler", ""))
    assert made.vendor == WHOLE[level].get("vendor", {})
    assert "R6" not in JOBS.values()
    failed = record_in(tmp_path, level, right=False, schemas=[], kernels=[])
    assert read(failed).level == ""


@pytest.mark.parametrize(("level", "values", "why"), FORGED)
def test_forgeries_are_refused(
    tmp_path: Path, level: str, values: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(why)) as refused:
        level_of(read(record_in(tmp_path, level, **values)), "job.json")
    assert "job.json" in str(refused.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": "other"}'])
def test_what_is_no_evidence_at_all(tmp_path: Path, text: str) -> None:
    (tmp_path / "job.json").write_text(text)
    with pytest.raises(ValueError, match=r"job\.json"):
        read(tmp_path / "job.json")


@pytest.fixture
def store_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """.ci/keep_result.py with an empty matrix and folder of results."""
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    result: Any = importlib.import_module("keep_result")
    tables: Any = importlib.import_module("readme_tables")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "MATRIX", tmp_path / "support_matrix.toml")
    monkeypatch.setattr(result, "RESULTS", tmp_path / RESULTS)
    (tmp_path / RESULTS).mkdir(parents=True)
    (tmp_path / "support_matrix.toml").write_text("")
    return result


def test_a_stand_in_s_signatures_and_their_sources() -> None:
    rows = signatures_of([SIMULATION, STANDINS["mlu"]])
    transfer, scatter = sorted(rows, key=lambda row: row["op"])
    assert transfer["op"] == "torch_mlu_ops.multi_layer_kv_transfer"
    assert scatter["op"] == "torch_mlu_ops.reshape_paged_cache"
    assert "direction: 'bool' = False" in scatter["signature"]
    assert "vllm-mlu@8fa99fd" in scatter["source"]


def test_results_are_kept(
    tmp_path: Path, store_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        store_server, "keep", partial(keep, check=lambda text: [])
    )  # no suite has them
    expired = partial(why_expired, digest=lambda _: "a" * 64)
    monkeypatch.setattr(support_matrix, "why_expired", expired)
    job = record_in(tmp_path, "R4", name="ascendc-emulated", backend=ASCENDC)
    with pytest.raises(ValueError, match=r"is not kept: .* emulates a vendor's backend"):
        store_server.place(job, "", None)
    record_in(tmp_path, "R4", name="hip", device="AMD gfx906, gfx908")
    made = store_server.place(job, "AMD gfx906, gfx908", "not run")
    assert made.evidence == f"{RESULTS}hip-amd-gfx906-gfx908-r4.json"
    run = passing()
    (tmp_path / "conformance.json").write_text(run.document())
    store_server.place(tmp_path / "conformance.json", "", None)
    record_in(tmp_path, "R4", name="hip", device="AMD gfx906, gfx908", date="2026-11-21")
    again = store_server.place(job, "AMD gfx906, gfx908", None)
    expired = partial(why_expired, digest=lambda _: "b" * 64)
    monkeypatch.setattr(support_matrix, "why_expired", expired)
    with pytest.raises(ValueError, match="is expired: source changed since"):
        store_server.place(job, "AMD gfx906, gfx908", None)
    assert (again.date, again.note) == ("2026-11-21", "not run")
    result = support_matrix.read(tmp_path / "support_matrix.toml")
    assert {r.place for r in result.levels} == {made.place, ("acme", "Acme XPU 900", "R6")}
    assert contradictions(result, tmp_path) == []


def test_two_results_of_one_run_are_kept_together(tmp_path: Path, store_server: Any) -> None:
    folder = tmp_path / RESULTS
    suite = folder / "suite.json"
    suite.write_text("{}")
    about = {"file": suite.name, "sha256": hashlib.sha256(b"{}").hexdigest()}
    (folder / "job.json").write_text(json.dumps({"conformance": about}))
    assert store_server.separated() == []
    suite.write_text('{"later": true}')
    (wrong,) = store_server.separated()
    assert wrong.startswith("Expected suite.json from the same run as job.json")


PRINTED = """version 24.04 in /somewhere/c/bin
rootdir: /somewhere/x
t.py::test_width[gfx906] PASSED
t.py::test_width[gfx90a] PASSED"""


def recorded(level: str, printed: str, tmp_path: Path, **options: Any) -> dict[str, Any]:
    """The record of a job that prints something."""
    file = tmp_path / "job.json"
    words = ["--what", KINDS[level], "--report", str(file)]
    for name, value in options.items():
        for each in value if isinstance(value, tuple) else [value]:
            words += [f"--{name.replace('_', '-')}", each]
    code = evidence.main([*words, "--", "printf", printed])
    made: dict[str, Any] = json.loads(file.read_text())
    assert code == (not made["right"])
    return made


def test_a_job_shows_what_was_built_and_read(tmp_path: Path) -> None:
    """And no place of the machine."""
    job: dict[str, Any] = {
        "backend": REFERENCE,
        "device": "AMD",
        "versions": "hipcc 5.2",
        "target": ("gfx906", "gfx90a"),
        "compiler": r"^version \d.*",
        "kernels": r"::(?P<kernel>\w+)\[(?P<target>\w+)\] PASSED",
    }
    made = recorded("R4", PRINTED, tmp_path, **job)
    assert made["right"]
    assert made["compiler"] == made["printed"][0] == "version 24.04 in bin"
    assert len(made["printed"]) == 3
    assert [row["target"] for row in made["kernels"]] == ["gfx906", "gfx90a"]
    assert made["kernels"] == kernels_in(PRINTED, job["kernels"])
    for less in (
        {"target": ()},
        {"target": "gfx906"},
        {"kernels": ""},
        {"versions": "", "compiler": ""},
    ):
        assert not recorded("R4", PRINTED, tmp_path, **job | less)["right"]


@pytest.mark.parametrize(("level", "more", "command", "expected"), [
    ("R1", [], "true", "It holds no signatures."),
    ("R3", [], "true", "It does not say what emulated (--emulated-by)."),
    ("R5", [], "true", "the toolchain's line with its version"),
    ("R3", ["--emulated-by", "no.such"], "true", "Nothing was recorded"),
    ("R3", ["--emulated-by", SIMULATION], "false", "The command ended with 1"),
    ("R3", ["--emulated-by", SIMULATION, "--says", r"\d+ passed"], "true", "did not say what it"),
    ("R3", ["--emulated-by", SIMULATION], "true", ""),
])  # fmt: skip
def test_the_command_says_what_a_record_lacks(
    level: str,
    more: list[str],
    command: str,
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "job.json"
    words = ["--backend", REFERENCE, "--device", "x, emulated", "--report", str(file), *more]
    assert evidence.main(["--what", KINDS[level], *words, "--", command]) == (1 if expected else 0)
    assert expected in capsys.readouterr().err
    assert not file.exists() or read(file).level == ("" if expected else level)
    with pytest.raises(SystemExit):  # its own job writes that record
        evidence.main(["--what", KINDS["R2"], *words, "--", "true"])


def test_a_row_says_what_a_record_says_of_itself(tmp_path: Path) -> None:
    """The class's own name, as a report has it: a module's last word may be another. The row has
    its printed summary, and the assumption of its stand-in."""
    sources = (SIMULATION, STANDINS["mlu"])
    job: dict[str, Any] = {
        "backend": ASCENDC,
        "device": "cpu, emulated",
        "emulated_by": sources,
        "tells": r"profile\s+\w+,\s+seed\s+\d+:\s+\d[^.]*?(?=\s+in\s)",
    }
    printed = "on cpu: profile full, seed 0: 1721 passed, 2 not-claimed in 9.1 s"
    file = tmp_path / "job.json"
    assert not recorded("R3", printed, tmp_path, **job | {"tells": r"\d+ failed"})["right"]
    record = recorded("R3", printed, tmp_path, **job)
    row = level_of(read(file), "job.json")
    assert (row.backend, row.assumption) == ("ascendc-emulated", ASSUMED)
    assert row.emulation == {module: source_sha256(module) for module in sources}
    assert row.summary == "semantics emulated, profile full, seed 0: 1,721 passed, 2 not claimed"
    file.write_text(json.dumps(record | {"told": "profile full, seed 0: 1721 passed"}))
    assert read(file).summary == row.summary, "the rest of the sentence belongs to it"
    file.write_text(json.dumps(record | {"told": "profile full: 9999 passed"}))
    with pytest.raises(ValueError, match="'profile full: 9999 passed' was not printed"):
        read(file)
    for target in ("portakv.backends.hip:Unknown", "portakv.backends.hip:Launch"):
        with pytest.raises(SourceError, match="a backend class with a name"):
            evidence.name_of(target)


def test_the_recipe_of_the_page_is_about_the_real_kernel(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
    recipe = text.partition('--what "built by the vendor\'s toolchain"')[2].partition("```")[0]
    target = recipe.partition("--backend ")[2].split()[0]
    device = recipe.partition('--device "')[2].partition('"')[0]
    assert target == "portakv.backends.ascend:Ascend"
    built = level_of(read(record_in(tmp_path, "R5", backend=target, device=device)), f"{RESULTS}a")
    assert list(support_matrix.broken_rules(SupportMatrix((built,)))) == []


# -- places of the machine ------------------------------------------------------------------------


@pytest.mark.parametrize(("printed", "retained"), [
    ("rootdir: /somewhere/x\ncachedir: .c\nconfigfile: a.toml\n1 passed\n", "1 passed\n"),
    ("Python 3.11.7 -- /somewhere/bin/python", "Python 3.11.7 -- python"),
    ("in '/somewhere/else/a.py':3, see", "in 'a.py':3, see"),
    ("-I/somewhere/include/x -L/somewhere/l", "-Ix -Ll"),
    ("/a/b/:/c/d", ":d"),
    *((same, same) for same in (
        "tests/a.py::t[1] PASSED", "https://a.b/c/d and/or 3 / 4, ../a/b, ~/a/b")),
])  # fmt: skip
def test_places_are_left_out(printed: str, retained: str) -> None:
    assert evidence.without_places(printed) == retained


# -- old and foreign reports ----------------------------------------------------------------------


@pytest.mark.parametrize(("values", "why"), [
    ({"suite": "2025.01", "seed": ...}, "got a report of suite '2025.01'"),
    ({"seed": ...}, "fields ['seed'] missing or unknown"),
    ({"note": "x"}, "fields ['note'] missing or unknown"),
    ({"cases": [3]}, "Expected an object as case record, got 3"),
    ({"cases": [{}]}, "Expected the fields of a case record"),
    ({"environment": None}, "Expected `object`, got `null` - at `$.environment`"),
    ({"backend": {"name": "acme"}}, "unreadable: expected a text as the backend's target"),
    ({"environment": {"python": " "}}, "is unreadable"),
])  # fmt: skip
def test_old_or_foreign_reports_refused(tmp_path: Path, values: dict[str, Any], why: str) -> None:
    known = {name: values[name] for name in ("environment", "backend") if values.get(name)}
    run = changed(passing(), **known)  # sealed anew
    document = json.loads(run.document()) | ({} if known else values)
    file = tmp_path / "old.json"
    file.write_text(
        json.dumps({name: value for name, value in document.items() if value is not ...})
    )
    with pytest.raises(ValueError, match=re.escape(why)) as refused:
        read(file)
    assert "old.json" in str(refused.value)
