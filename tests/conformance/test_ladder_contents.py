# SPDX-License-Identifier: Apache-2.0
"""What emulates ends a rung when it changes, and no record is believed for its label alone."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import conform_reports

from portakv_conformance.evidence import source
from portakv_conformance.evidence.environment import describe_environment
from portakv_conformance.evidence.evidence import (
    JOBS,
    Job,
    main,
    of_report,
    read,
    recorded,
    rung_of,
)
from portakv_conformance.evidence.ladder import Ladder, Rung, why_expired
from portakv_conformance.evidence.ladder import read as read_ladder
from portakv_conformance.evidence.record_rules import kernels_in, signatures_of
from portakv_conformance.evidence.source import source_files, source_sha256
from portakv_conformance.evidence.verdict import judge, unnamed, why_no_rung
from portakv_conformance.evidence.verify import check_report
from portakv_conformance.judge.subject import Subject, subject
from portakv_conformance.record import RunRecord
from portakv_conformance.report.words import plain
from portakv_conformance.vendor.standins import EMULATION, SIMULATION, STANDINS, emulating

ROOT = Path(__file__).resolve().parents[2]
VENDOR = "portakv_conformance.vendor"
REFERENCE = "portakv.backends.reference:Reference"
WHEEL = "torch_npu-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl"
KINDS = {rung: what for what, rung in JOBS.items()}

# -- what emulates --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "file"),
    [
        (SIMULATION, "device.cpp"),
        (SIMULATION, "operators.h"),
        (SIMULATION, "device_module.py"),
        (f"{VENDOR}.mlu_standin", f"{VENDOR}.mlu_standin.py"),
        (f"{VENDOR}.ascend_standin", f"{VENDOR}.ascend_ops.py"),
        (f"{VENDOR}.ascend_standin", f"{VENDOR}/ascend_schemas.toml"),
        (f"{VENDOR}.ascend_device", f"{VENDOR}.ascend_ops.py"),
        (f"{VENDOR}.ascend_device", f"{VENDOR}.cann_stub.py"),
        (f"{VENDOR}.ascend_device", f"{VENDOR}/cann_stub.c"),
        (f"{VENDOR}.hip_emulated", f"{VENDOR}.hip_fake.py"),
        (f"{VENDOR}.hip_emulated", f"{VENDOR}/hip_fake.cpp"),
        (f"{VENDOR}.hip_emulated", f"{VENDOR}/kernel_on_cpu.h"),
        (f"{VENDOR}.ascendc_emulated", "portakv_native.ascend/emulation/machine.h"),
        (f"{VENDOR}.ascendc_emulated", "portakv_native.ascend/rows.h"),
    ],
)
def test_each_file_of_an_emulation_counts(
    start: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of it ends every rung that this emulation carried."""
    files = source_files(start)
    before = source_sha256(start)
    changed = tmp_path / "changed"
    shutil.copyfile(files[file], changed)
    monkeypatch.setattr(source, "source_files", lambda module: files | {file: changed})
    assert source_sha256(start) == before
    changed.write_bytes(changed.read_bytes() + b"\n")
    assert source_sha256(start) != before
    held = emulated_rung(emulation={start: before})
    since = why_expired(held, Ladder(()), lambda target: "a" * 64 if target == REFERENCE
                        else source_sha256(target))  # fmt: skip
    assert since == f"{start.rpartition('.')[2]} changed since"


def emulated_rung(**values: Any) -> Rung:
    made = Rung(
        backend="reference", target=REFERENCE, device="mlu, emulated", rung="R3", emulated=True,
        evidence="conformance/results/a.json", told="9 cases", command="portakv conform",
        date="2026-11-20", versions="torch 2.13.0", source_sha256="a" * 64,
    )  # fmt: skip
    return replace(made, **values)


def same(target: str) -> str:
    return "a" * 64


@pytest.mark.parametrize("rung", ["R1", "R2", "R3"])
def test_an_emulated_rung_that_names_no_emulation_is_expired(rung: str) -> None:
    assert "does not say what emulated" in why_expired(emulated_rung(rung=rung), Ladder(()), same)
    held = emulated_rung(rung=rung, emulation={SIMULATION: "a" * 64, "triton": "3.6.0"})
    assert why_expired(held, Ladder(()), same) == ""  # of a third party's nothing is looked for
    gone = emulated_rung(emulation={f"{VENDOR}.no_such": "a" * 64})
    assert "no_such changed since" in why_expired(gone, Ladder(()), lambda t: source_sha256(t))


def test_what_was_compiled_only_was_emulated_by_nothing() -> None:
    assert why_expired(emulated_rung(rung="R4", device="gfx906"), Ladder(()), same) == ""


def test_a_device_is_emulated_by_what_carries_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(EMULATION, raising=False)
    assert emulating("simdev") == emulating("acme") == (SIMULATION,)
    for name, standin in STANDINS.items():
        assert emulating(name) == (SIMULATION, standin)
    monkeypatch.setenv(EMULATION, f"{VENDOR}.ascend_device:enter")
    assert emulating("npu") == (f"{VENDOR}.ascend_device",)


def test_a_report_says_what_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(EMULATION, raising=False)
    real: Subject = subject("reference", "cpu")
    assert "emulation" not in describe_environment(real, "cpu")
    facts = describe_environment(replace(real, emulated=True), "simdev")
    assert facts["emulation"] == {SIMULATION: source_sha256(SIMULATION)}
    assert plain(facts["emulation"]) == f"{SIMULATION} {source_sha256(SIMULATION)}"


def test_a_row_has_the_emulation_of_its_report() -> None:
    run = conform_reports.emulated()
    assert of_report(run).emulation == {SIMULATION: "5" * 64}
    run.environment |= {"device": "cpu"}
    assert of_report(run).emulation == {"portakv_acme": run.backend["source_sha256"]}
    run.environment |= {"TRITON_INTERPRET": "1", "triton": "3.6.0"}
    assert of_report(run).emulation == {"triton": "3.6.0"}
    assert of_report(conform_reports.passing()).emulation == {}


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (None, "does not say by what"),
        ({}, "does not say by what"),
        ([SIMULATION], "does not say by what"),
        ({"acme": "1" * 64}, f"does not say the hash of {SIMULATION}"),
        ({SIMULATION: "unknown: x"}, f"does not say the hash of {SIMULATION}, which emulated"),
    ],
)
def test_verify_refuses_an_emulated_report_without_its_emulation(told: Any, why: str) -> None:
    run = conform_reports.emulated()
    assert "emulat" not in "".join(refusals(run))
    run.environment["emulation"] = told
    assert why in "\n".join(refusals(run))


def test_a_stand_in_is_named_beside_the_simulated_device() -> None:
    run = conform_reports.emulated()
    run.environment["device"] = "simdev:mlu:1"
    assert f"does not say the hash of {STANDINS['mlu']}" in "\n".join(refusals(run))
    run.environment["emulation"][STANDINS["mlu"]] = "6" * 64
    assert "does not say the hash" not in "\n".join(refusals(run))


def refusals(run: RunRecord) -> list[str]:
    judge(run)
    return check_report(run.document(), lambda profile, device: {})


def test_every_committed_rung_of_an_emulation_names_it_or_is_expired() -> None:
    found = read_ladder()
    for rung in found.rungs:
        if rung.rung in ("R1", "R2", "R3"):
            assert rung.emulation or "what emulated" in why_expired(rung, found), rung.place


# -- records of jobs ------------------------------------------------------------------------------

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
    ("R1", {"signatures": None}, "no signatures"),
    ("R1", {"signatures": []}, "no signatures"),
    ("R1", {"signatures": ["a.b(x)"]}, "needs op, signature, source"),
    ("R1", {"signatures": [{"op": "a.b", "signature": "(x)", "source": " "}]}, "needs op"),
    ("R1", {"signatures": [{"op": "a.b", "signature": "x", "source": "y"}]}, "signature of a.b"),
    ("R1", {"emulation": {SIMULATION: "new"}}, "is no sha256"),
    ("R1", {"source_sha256": "new"}, "is no sha256"),
    ("R2", {"schemas": None}, "no schemas"),
    ("R2", {"schemas": "all the same"}, "no schemas"),
    ("R2", {"schemas": [{"op": "a::b", "same": True}]}, "needs op, pinned, found"),
    ("R2", {"schemas": [{"op": "a::b", "pinned": "()", "found": "(int x)", "same": True}]},
     "a::b is pinned as (), but was found as (int x)"),
    ("R2", {"schemas": [{"op": "a::b", "pinned": "()", "found": "()", "same": False}]}, "a::b is"),
    ("R2", {"vendor": {}}, "names no wheel"),
    ("R2", {"vendor": {"torch_npu": "b" * 64}}, "names no wheel"),
    ("R2", {"vendor": {WHEEL: "b" * 63}}, "is no sha256"),
    ("R2", {"vendor": [WHEEL]}, "is no sha256"),
    ("R2", {"versions": "torch-npu 2.12.0"}, "do not name 2.13.0"),
    ("R2", {"emulation": {SIMULATION: ""}}, "is no sha256"),
    ("R2", {"source_sha256": "A" * 64}, "is no sha256"),
    ("R3", {"emulation": {SIMULATION: None}}, "is no sha256"),
    ("R4", {"targets": []}, "for which targets"),
    ("R4", {"kernels": None}, "no kernels"),
    ("R4", {"kernels": [{"kernel": "gather"}]}, "needs kernel, target"),
    ("R4", {"kernels": [{"kernel": "g", "target": "gfx906", "wrong": ["narrow"]}]}, "is wrong"),
    ("R4", {"targets": ["gfx906", "gfx90a"]}, "but code was read of ['gfx906']"),
    ("R4", {"compiler": ""}, "which compiler built it"),
    ("R4", {"source_sha256": ""}, "is no sha256"),
    ("R5", {"targets": None}, "for which targets"),
    ("R5", {"targets": [""]}, "for which targets"),
    ("R5", {"compiler": None}, "toolchain's line"),
    ("R5", {"compiler": "the vendor's"}, "toolchain's line"),
    ("R5", {"printed": ["DTK 23"]}, "is not in what was printed"),
    ("R4", {"printed": ["scatter for gfx906"]}, "Nothing was printed of gather"),
    ("R1", {"emulation": {STANDINS["mlu"]: source_sha256(STANDINS["mlu"])}},
     f"are not those of {STANDINS['mlu']}"),
    ("R5", {"source_sha256": "0" * 65}, "is no sha256"),
]  # fmt: skip


def record_in(folder: Path, rung: str, **values: Any) -> Path:
    file = folder / "job.json"
    file.write_text(json.dumps(RECORD | {"what": KINDS[rung]} | WHOLE[rung] | values))
    return file


@pytest.mark.parametrize("rung", WHOLE)
def test_a_record_that_shows_all_is_read(tmp_path: Path, rung: str) -> None:
    assert rung_of(read(record_in(tmp_path, rung)), "job.json").rung == rung
    failed = record_in(tmp_path, rung, right=False, schemas=[], kernels=[])
    assert read(failed).rung == ""


@pytest.mark.parametrize(("rung", "values", "why"), FORGED)
def test_a_forged_record_is_refused(
    tmp_path: Path, rung: str, values: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(why)) as refused:
        read(record_in(tmp_path, rung, **values))
    assert "job.json" in str(refused.value)


@pytest.mark.parametrize("rung", WHOLE)
def test_a_record_with_another_hash_than_what_is_here_is_not_kept(
    tmp_path: Path, rung: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every hash has the right form, and is that of nothing in this repository."""
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    keeper: Any = importlib.import_module("keep_result")
    tables: Any = importlib.import_module("readme_tables")
    monkeypatch.setattr(tables, "LADDER", tmp_path / "ladder.toml")
    monkeypatch.setattr(keeper, "RESULTS", tmp_path)
    (tmp_path / "ladder.toml").write_text("")
    with pytest.raises(ValueError, match="is expired: source changed since"):
        keeper.place(record_in(tmp_path, rung), "", None)
    right = source_sha256(REFERENCE)
    if rung in ("R1", "R2", "R3"):
        with pytest.raises(ValueError, match="is expired: simdev changed since"):
            keeper.place(record_in(tmp_path, rung, source_sha256=right), "", None)
        with pytest.raises(ValueError, match="does not say what emulated it"):
            keeper.place(record_in(tmp_path, rung, source_sha256=right, emulation={}), "", None)
    else:
        assert keeper.place(record_in(tmp_path, rung, source_sha256=right), "", None).rung == rung


def test_a_stand_in_s_signatures_and_their_sources() -> None:
    found = {row["op"]: row for row in signatures_of([SIMULATION, f"{VENDOR}.mlu_standin"])}
    assert set(found) == {f"torch_mlu_ops.{n}" for n in ("reshape_paged_cache",
                                                         "multi_layer_kv_transfer")}  # fmt: skip
    scatter = found["torch_mlu_ops.reshape_paged_cache"]
    assert "direction: 'bool' = False" in scatter["signature"]
    assert "vllm-mlu@8fa99fd" in scatter["source"]


PRINTED = "version 24.04\nt.py::test_width[gfx906] PASSED\nt.py::test_width[gfx90a] PASSED"


def test_a_job_shows_what_was_built_and_read() -> None:
    job = Job("cross-compiled, not executed", REFERENCE, "AMD", "hipcc 5.2",
              targets=["gfx906", "gfx90a"], kernels=r"::(?P<kernel>\w+)\[(?P<target>\w+)\] PASSED",
              compiler=r"^version \S+")  # fmt: skip
    made = recorded(job, ["printf", PRINTED])
    assert made["right"]
    assert made["compiler"] == "version 24.04"
    assert [row["target"] for row in made["kernels"]] == ["gfx906", "gfx90a"]
    assert made["kernels"] == kernels_in(PRINTED, job.kernels)
    lesser: list[dict[str, Any]] = [
        {"targets": []}, {"kernels": ""}, {"targets": ["gfx906"]}, {"versions": "", "compiler": ""}
    ]  # fmt: skip
    for less in lesser:
        assert not recorded(replace(job, **less), ["printf", PRINTED])["right"]


def test_the_command_says_what_a_record_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "job.json"
    words = ["--backend", REFERENCE, "--device", "x, emulated", "--report", str(file)]
    assert main(["--what", KINDS["R1"], *words, "--", "true"]) == 1
    told = capsys.readouterr().err
    assert "It holds no signatures." in told
    assert "It does not say what emulated (--emulated-by)." in told
    assert main(["--what", KINDS["R5"], *words, "--", "true"]) == 1
    assert "the toolchain's line with its version" in capsys.readouterr().err
    assert read(file).rung == ""
    with pytest.raises(SystemExit):  # its own job writes that record
        main(["--what", KINDS["R2"], *words, "--", "true"])


# -- old and foreign reports ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"suite": "2025.01", "seed": ...}, "of suite '2025.01' (installed is"),
        ({"seed": ...}, "fields ['seed'] missing or unknown"),
        ({"note": "x"}, "fields ['note'] missing or unknown"),
        ({"cases": [3]}, "A case record is 3, expected an object"),
        ({"cases": [{}]}, "A case record has fields"),
        ({"cases": 7}, "'cases' is 7, not list"),
        ({"environment": None}, "'environment' is null, not dict"),
        ({"backend": []}, "'backend' is [], not dict"),
        ({"backend": {"name": "acme"}}, "unreadable: it does not say the backend's target"),
        ({"environment": {"python": " "}}, "is unreadable"),
        ({"started": None}, "'started' is null"),
    ],
)
def test_an_old_or_foreign_report_is_refused_in_words(
    tmp_path: Path, values: dict[str, Any], why: str
) -> None:
    run, values = conform_reports.passing(), dict(values)
    if values.get("environment"):
        run.environment = values.pop("environment")
    if isinstance(values.get("backend"), dict):
        run.backend = values.pop("backend")
    judge(run)
    told = json.loads(run.document()) | values
    file = tmp_path / "old.json"
    file.write_text(json.dumps({name: value for name, value in told.items() if value is not ...}))
    with pytest.raises(ValueError, match=re.escape(why)) as refused:
        read(file)
    assert "old.json" in str(refused.value)


# -- R6 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["", " ", None, ...])
def test_r6_on_an_accelerator_says_its_driver(driver: Any) -> None:
    run = conform_reports.passing()
    assert (run.rung, unnamed(run)) == ("R6", [])
    run.environment["driver"] = driver
    if driver is ...:
        del run.environment["driver"]
    judge(run)
    assert run.rung == ""
    assert "R6 needs the driver's version" in why_no_rung(run)
    run.rung = "R6"
    forged = "\n".join(check_report(run.document(), lambda profile, device: {}))
    assert "It claims rung 'R6', but '' is what it proves: R6 on an accelerator needs" in forged


@pytest.mark.parametrize("device", ["npu", "mlu:1", "cuda"])
def test_r6_on_an_accelerator_says_the_vendor_s_package(device: str) -> None:
    run = conform_reports.passing()
    run.backend |= {"target": "portakv.backends.ascend:Ascend"}
    del run.environment["torch_acme"]
    run.environment["device"] = device
    judge(run)
    assert (run.rung, unnamed(run)) == ("", ["a version of the vendor's package"])
    run.environment["torch-npu"] = ""
    assert unnamed(run)
    run.environment["torch-npu"] = "2.13.0"
    judge(run)
    assert run.rung == "R6"


def test_a_cpu_needs_no_driver() -> None:
    run = conform_reports.passing()
    run.environment |= {"device": "cpu", "driver": ""}
    judge(run)
    assert run.rung == "R6"
