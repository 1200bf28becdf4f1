# SPDX-License-Identifier: Apache-2.0
"""Records of jobs and old reports: none is believed for its label alone, each names its backend and
what it is about, and none holds a place of the machine that made it."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.conform_reports import changed, passing
from support.conform_runs import ROOT

from portakv_conformance.evidence import ladder as ladders
from portakv_conformance.evidence.evidence import (
    JOBS,
    Job,
    contradictions,
    main,
    name_of,
    read,
    recorded,
    rung_of,
    without_places,
)
from portakv_conformance.evidence.ladder import RESULTS, Ladder, broken_rules
from portakv_conformance.evidence.record_rules import kernels_in, signatures_of
from portakv_conformance.evidence.source import SourceError, source_sha256
from portakv_conformance.report.results import keep
from portakv_conformance.vendor.standins import SIMULATION, STANDINS

REFERENCE = "portakv.backends.reference:Reference"
ASCENDC = "portakv_conformance.vendor.ascendc_emulated:AscendC"
ASSUMED = "by assumption: the vendor has not confirmed the ops' signatures"
WHEEL = "torch_npu-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl"
KINDS = {rung: what for what, rung in JOBS.items()}

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
    ("R4", {"right": False}, "bears out no rung: failed: cross-compiled"),
    ("R4", {"right": "yes"}, "right missing or of another type"),
    ("R4", {"what": "run on the hardware"}, "says 'run on the hardware'; expected one of"),
    ("R4", {"command": None}, "command missing or of another type"),
    ("R4", {"name": None}, "name missing or of another type"),
    ("R4", {"device": ""}, "name it by --device"),
]  # fmt: skip


def record_in(folder: Path, rung: str, **values: Any) -> Path:
    file = folder / "job.json"
    file.write_text(json.dumps(RECORD | {"what": KINDS[rung]} | WHOLE[rung] | values))
    return file


@pytest.mark.parametrize("rung", WHOLE)
def test_a_record_that_shows_all_is_read(tmp_path: Path, rung: str) -> None:
    made = rung_of(read(record_in(tmp_path, rung)), "job.json")
    assert (made.backend, made.rung, made.emulated) == ("reference", rung, True)
    assert made.versions == WHOLE[rung].get("versions", WHOLE[rung].get("compiler", ""))
    assert made.vendor == WHOLE[rung].get("vendor", {})
    assert "R6" not in JOBS.values()
    failed = record_in(tmp_path, rung, right=False, schemas=[], kernels=[])
    assert read(failed).rung == ""


@pytest.mark.parametrize(("rung", "values", "why"), FORGED)
def test_a_forged_record_is_refused(
    tmp_path: Path, rung: str, values: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(why)) as refused:
        rung_of(read(record_in(tmp_path, rung, **values)), "job.json")
    assert "job.json" in str(refused.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": "other"}'])
def test_what_is_no_evidence_at_all(tmp_path: Path, text: str) -> None:
    (tmp_path / "job.json").write_text(text)
    with pytest.raises(ValueError, match=r"job\.json"):
        read(tmp_path / "job.json")


@pytest.fixture
def keeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """.ci/keep_result.py with an empty ladder and folder of results."""
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    found: Any = importlib.import_module("keep_result")
    tables: Any = importlib.import_module("readme_tables")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "LADDER", tmp_path / "ladder.toml")
    monkeypatch.setattr(found, "RESULTS", tmp_path / RESULTS)
    (tmp_path / RESULTS).mkdir(parents=True)
    (tmp_path / "ladder.toml").write_text("")
    return found


def test_a_stand_in_s_signatures_and_their_sources() -> None:
    found = {
        row["op"]: row
        for row in signatures_of([SIMULATION, "portakv_conformance.vendor.mlu_standin"])
    }
    assert set(found) == {f"torch_mlu_ops.{n}" for n in ("reshape_paged_cache",
                                                         "multi_layer_kv_transfer")}  # fmt: skip
    scatter = found["torch_mlu_ops.reshape_paged_cache"]
    assert "direction: 'bool' = False" in scatter["signature"]
    assert "vllm-mlu@8fa99fd" in scatter["source"]


def test_a_result_is_kept_with_its_row(
    tmp_path: Path, keeper: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keep, "__defaults__", (lambda text: [],))  # cases that no suite has
    monkeypatch.setattr(ladders.why_expired, "__defaults__", (lambda target: "a" * 64,))
    job = record_in(tmp_path, "R4", name="ascendc-emulated", backend=ASCENDC)
    with pytest.raises(ValueError, match=r"is not kept: .* emulates a vendor's backend"):
        keeper.place(job, "", None)
    record_in(tmp_path, "R4", name="hip", device="AMD gfx906, gfx908")
    made = keeper.place(job, "AMD gfx906, gfx908", "not run")
    assert made.evidence == f"{RESULTS}hip-amd-gfx906-gfx908-r4.json"
    run = passing()
    (tmp_path / "conformance.json").write_text(run.document())
    keeper.place(tmp_path / "conformance.json", "", None)
    record_in(tmp_path, "R4", name="hip", device="AMD gfx906, gfx908", date="2026-11-21")
    again = keeper.place(job, "AMD gfx906, gfx908", None)
    monkeypatch.setattr(ladders.why_expired, "__defaults__", (lambda target: "b" * 64,))
    with pytest.raises(ValueError, match="is expired: source changed since"):
        keeper.place(job, "AMD gfx906, gfx908", None)
    assert (again.date, again.note) == ("2026-11-21", "not run")
    found = ladders.read(tmp_path / "ladder.toml")
    assert {r.place for r in found.rungs} == {made.place, ("acme", "Acme XPU 900", "R6")}
    assert contradictions(found, tmp_path) == []


PRINTED = """version 24.04 in /somewhere/c/bin
rootdir: /somewhere/x
t.py::test_width[gfx906] PASSED
t.py::test_width[gfx90a] PASSED"""


def test_a_job_shows_what_was_built_and_read() -> None:
    """And no place of the machine."""
    job = Job("cross-compiled, not executed", REFERENCE, "AMD", "hipcc 5.2",
              targets=["gfx906", "gfx90a"], kernels=r"::(?P<kernel>\w+)\[(?P<target>\w+)\] PASSED",
              compiler=r"^version \d.*")  # fmt: skip
    made = recorded(job, ["printf", PRINTED])
    assert made["right"]
    assert made["compiler"] == made["printed"][0] == "version 24.04 in bin"
    assert len(made["printed"]) == 3
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


EMULATED = Job("semantics emulated", REFERENCE, "cpu, emulated", emulated_by=[SIMULATION])


def test_a_command_is_recorded_with_what_it_printed(tmp_path: Path) -> None:
    made = recorded(EMULATED, ["printf", "built\nchecked"])
    assert made["right"]
    assert made["printed"] == ["built", "checked"]
    assert made["emulation"] == {SIMULATION: source_sha256(SIMULATION)}
    assert not recorded(replace(EMULATED, says=r"\d+ passed"), ["printf", "built"])["right"]
    file = tmp_path / "job.json"
    words = ["--what", "semantics emulated", "--backend", REFERENCE, "--device", "cpu, emulated",
             "--report", str(file), "--emulated-by"]  # fmt: skip
    assert main([*words, SIMULATION, "--", "false"]) == 1
    assert read(file).rung == ""
    assert main([*words, SIMULATION, "--", "true"]) == 0
    assert rung_of(read(file), "job.json").rung == "R3"
    assert main([*words, "no.such", "--", "true"]) == 1


def test_a_row_says_what_a_record_says_of_itself(tmp_path: Path) -> None:
    """The class's own name, as a report has it: a module's last word may be another. What it tells,
    and what its stand-in takes for true."""
    job = replace(EMULATED, target=ASCENDC, emulated_by=[SIMULATION, STANDINS["mlu"]],
                  tells=r"profile\s+\w+,\s+seed\s+\d+:\s+\d[^.]*?(?=\s+in\s)")  # fmt: skip
    command = ["printf", "on cpu: profile full, seed 0: 1721 passed in 9.1 s"]
    record, file = recorded(job, command), tmp_path / "job.json"
    file.write_text(json.dumps(record))
    row = rung_of(read(file), "job.json")
    assert (row.backend, row.assumption) == ("ascendc-emulated", ASSUMED)
    assert row.told == "semantics emulated, profile full, seed 0: 1721 passed"
    assert not recorded(replace(job, tells=r"\d+ failed"), command)["right"]
    file.write_text(json.dumps(record | {"told": "profile full: 9999 passed"}))
    with pytest.raises(ValueError, match="'profile full: 9999 passed' was not printed"):
        read(file)
    for target in ("portakv.backends.hip:Nobody", "portakv.backends.hip:Launch"):
        with pytest.raises(SourceError, match="says no name"):
            name_of(target)


def test_the_recipe_of_the_page_is_about_the_real_kernel(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
    recipe = text.partition('--what "built by the vendor\'s toolchain"')[2].partition("```")[0]
    target = recipe.partition("--backend ")[2].split()[0]
    device = recipe.partition('--device "')[2].partition('"')[0]
    assert target == "portakv.backends.ascend:Ascend"
    built = rung_of(read(record_in(tmp_path, "R5", backend=target, device=device)), f"{RESULTS}a")
    assert list(broken_rules(Ladder((built,)))) == []


# -- places of the machine ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("printed", "kept"),
    [
        ("rootdir: /somewhere/x\ncachedir: .c\nconfigfile: a.toml\n1 passed\n", "1 passed\n"),
        ("Python 3.11.7 -- /somewhere/bin/python", "Python 3.11.7 -- python"),
        ("in '/somewhere/else/a.py':3, see", "in 'a.py':3, see"),
        ("-I/somewhere/include/x -L/somewhere/l", "-Ix -Ll"),
        ("tests/a.py::t[1] PASSED", "tests/a.py::t[1] PASSED"),
        (
            "https://a.b/c/d and/or 3 / 4, ../a/b, ~/a/b",
            "https://a.b/c/d and/or 3 / 4, ../a/b, ~/a/b",
        ),
        ("/a/b/:/c/d", ":d"),
    ],
)
def test_places_are_left_out(printed: str, kept: str) -> None:
    assert without_places(printed) == kept


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
    facts, backend = values.get("environment"), values.get("backend")
    run = passing()
    run = changed(run, environment=facts or run.environment, backend=backend or run.backend)
    told = json.loads(run.document()) | ({} if facts or backend else values)
    file = tmp_path / "old.json"
    file.write_text(json.dumps({name: value for name, value in told.items() if value is not ...}))
    with pytest.raises(ValueError, match=re.escape(why)) as refused:
        read(file)
    assert "old.json" in str(refused.value)
