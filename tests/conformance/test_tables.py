# SPDX-License-Identifier: Apache-2.0
"""Committed results, the matrix that they bear out, and the README's and docs/hardware.md's tables
made from it. Each known pitfall names tests that exist."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from support.conform_reports import changed, emulated, failing, passing, saved_report
from support.conform_runs import ROOT

from portakv_conformance.cli import main as conform
from portakv_conformance.evidence import support_matrix
from portakv_conformance.evidence.evidence import level_of, name_of, of_report
from portakv_conformance.evidence.support_matrix import RESULTS, SupportLevel, SupportMatrix
from portakv_conformance.evidence.verdict import SEAL, digest_of
from portakv_conformance.evidence.verify import check_report, newer_cases
from portakv_conformance.record import RunRecord
from portakv_conformance.report.results import device, file_name, keep, read, table, versions
from portakv_conformance.run.runner import cases_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

COMMITTED = {
    file.name: json.loads(file.read_text(encoding="utf-8"))
    for file in sorted((ROOT / RESULTS).glob("*.json"))
}


@pytest.fixture(scope="module")
def tables() -> Iterator[Any]:
    """.ci/readme_tables.py, which reads the committed results once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / ".ci"))
        result: Any = importlib.import_module("readme_tables")
        patch.setattr(result, "borne_out", cache(result.borne_out))
        yield result


# -- what is committed ----------------------------------------------------------------------------


def test_the_pages_say_what_the_ladder_says(tables: Any) -> None:
    tables.check()


def test_every_rung_is_borne_out_by_its_file(tables: Any) -> None:
    """The level, the backend, the flag, the command, the hash: each as the file itself says."""
    result = support_matrix.read()
    assert result.levels
    assert support_matrix.FILE.read_text(encoding="utf-8") == support_matrix.written(result)
    about_devices = {row[2] for row in tables.HARDWARE} - {"triton"}
    assert about_devices | {"reference", "compiled", "triton"} >= {r.backend for r in result.levels}
    shown = tables.hardware()  # ends the program if a row is not borne out
    for level in result.levels:
        line = re.escape(f"{level.level}: {level.summary} ({level.device})")
        row = rf"\| `{level.backend}` \| [^|]*{line}"
        assert level.backend not in about_devices or re.search(row, shown)


@cache
def listed(profile: str, device: str) -> dict[str, dict[str, Any]]:
    return cases_of(profile, device)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in COMMITTED if "schema" in COMMITTED[n]])
def test_committed_reports_stand(name: str) -> None:
    """A report from before the suite got its latest cases stands for the others, and the README
    says how many it lacks."""
    file = ROOT / RESULTS / name
    wrong = check_report(file.read_text(encoding="utf-8"), listed)
    newer = newer_cases(read(file), listed)
    if newer:
        shown = (ROOT / "README.md").read_text(encoding="utf-8")
        lacks = rf"{re.escape(name)}\)(, source changed since)?, {len(newer)} newer cases not run"
        assert re.search(lacks, shown)
        wrong = [why for why in wrong if "of the installed suite are not in it" not in why]
    assert wrong == []


@pytest.mark.parametrize("name", COMMITTED)
def test_a_result_holds_no_place_of_the_machine_and_the_backend_s_own_name(name: str) -> None:
    """Nothing in a committed file says where on which machine it was made."""
    roots = "bin|build|data|home|mnt|opt|private|root|srv|tmp|usr|var|work|workspace|Users"
    text = (ROOT / RESULTS / name).read_text(encoding="utf-8")
    assert re.findall(rf"(?<![\w./~])/(?:{roots})\b[^\s\"]*", text) == []
    assert not re.search(r"\brootdir\b", text)
    if "what" in COMMITTED[name]:
        assert COMMITTED[name]["name"] == name_of(COMMITTED[name]["backend"])


def test_hardware_follows_the_ladder(tables: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (own,) = (r for r in support_matrix.read().levels if (r.backend, r.level) == ("mlu", "R3"))
    real = replace(own, device="MLU590", level="R6", emulated=False, summary="9 cases", note="")
    gone = replace(own, source_sha256="0" * 64)
    monkeypatch.setattr(tables, "borne_out", lambda: SupportMatrix((gone, real)))
    shown = {line.split("|")[3].strip(): line for line in tables.hardware().splitlines()}
    assert re.search(r"\| (expired: )?R6: 9 cases \(MLU590\)", shown["`mlu`"])
    assert f"expired: R3: {own.summary} (mlu, emulated), source changed since" in shown["`mlu`"]
    assert shown["`hip`"].endswith("| R0: described |")


@pytest.mark.parametrize(
    ("was", "now"), [("R3", "R6"), ("| mlu | R3 |\n", ""), ("<!-- end -->", "")]
)
def test_a_stale_page_is_found(
    tables: Any, was: str, now: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "hardware.md"
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "PAGES", {page: {"hardware": lambda: "| mlu | R3 |"}})
    page.write_text("a <!-- table: hardware -->\n<!-- end --> z\n")
    tables.write()
    text = page.read_text()
    assert text == "a <!-- table: hardware -->\n| mlu | R3 |\n<!-- end --> z\n"
    tables.check()
    page.write_text(text.replace(was, now))
    with pytest.raises(SystemExit, match=r"hardware\.md"):
        tables.check()


# -- results --------------------------------------------------------------------------------------


def ours(*facts: dict[str, Any], **values: Any) -> RunRecord:
    """A run of a backend of this repository on a GPU."""
    gpu = {
        "device": "cuda:0",
        "device_name": "NVIDIA H200",
        "driver": "580.159",
        "triton": "3.6.0",
        "nvidia-cuda-nvrtc": "13.0.88",
        "torch_acme": ...,
    }
    backend = {
        "name": "cuda",
        "target": "portakv.backends.cuda:Cuda",
        "version": "0.1",
        "source_sha256": "a" * 64,
    }
    return changed(passing(), gpu, *facts, **{"backend": backend, **values})


def test_a_result_is_the_whole_report_with_a_line_for_each_case(tmp_path: Path) -> None:
    record = failing()
    file = saved_report(record, tmp_path)
    assert file.name == "acme-acme-xpu-900-2026.12.json"
    assert RunRecord.read(file.read_text()) == read(file) == record
    assert len(file.read_text().splitlines()) < len(record.cases) + 40


@pytest.mark.parametrize(("facts", "name", "shown", "file"), [
    ({"device": "cpu", "device_name": "Some CPU (R) @ 2 GHz", "driver": "", "emulated": False},
     "cuda", "CPU (x86-64)", "cuda-cpu"),
    ({"device": "cpu"}, "cuda", "CPU (x86-64), emulated", "cuda-cpu"),
    ({"device": "cpu"}, "../../etc/Passwd", "CPU (x86-64), emulated", "etc-passwd-cpu"),
    ({"device": "simdev"}, "cuda", "simdev, emulated", "cuda-simdev"),
    ({"device": "simdev:1"}, "cuda", "simdev, emulated", "cuda-simdev"),
    ({"device": "simdev:mlu"}, "cuda", "mlu, emulated", "cuda-simdev-mlu"),
    ({"device": "simdev:mlu:1"}, "cuda", "mlu, emulated", "cuda-simdev-mlu"),
    ({"device": "mlu"}, "cuda", "mlu, emulated", "cuda-mlu"),
    # Results of a built library have a separate row and file, those of ops have not.
    ({"emulated": False, "carried out by": "the ops"}, "cuda", "NVIDIA H200", "cuda-nvidia-h200"),
    ({"emulated": False, "carried out by": "the AscendC kernel", "library": {"a.so": "7" * 64}},
     "cuda", "NVIDIA H200, by the AscendC kernel", "cuda-nvidia-h200-by-the-ascendc-kernel"),
])  # fmt: skip
def test_a_result_is_named_by_the_processor_s_kind_or_the_name_that_a_device_carries(
    facts: dict[str, Any], name: str, shown: str, file: str
) -> None:
    run = ours({"emulated": True} | facts)
    run.backend["name"] = name
    assert (device(run), file_name(run)) == (shown, f"{file}-2026.12.json")


def test_what_is_edited_no_report_or_no_certification_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its seal does not fit its contents"):
        saved_report(replace(failing(), verdict="conformant", rung="R6"), tmp_path)
    for options in {"fuzz": 100}, {"seed": 7}:
        with pytest.raises(ValueError, match="Run it without --seed and --fuzz"):
            saved_report(ours(**options), tmp_path)
    for text, why in (('{"schema": "other"}', "Expected a report of schema"), ("{", r"odd\.json")):
        (tmp_path / "odd.json").write_text(text)
        with pytest.raises(ValueError, match=why):
            keep(tmp_path / "odd.json", tmp_path)
    forged = emulated()
    forged.rung = "R6"
    forged.environment[SEAL] = digest_of(forged)
    (tmp_path / "odd.json").write_text(forged.document())
    with pytest.raises(ValueError, match="R6 needs the real one"):
        keep(
            tmp_path / "odd.json",
            tmp_path / RESULTS,
            partial(check_report, listing=lambda profile, device: {}),
        )
    assert not (tmp_path / RESULTS).exists()


# -- the README's table ---------------------------------------------------------------------------

LINK = "[R6: 312 passed, 2 not claimed](conformance/results/a.json)"


def level(**values: Any) -> SupportLevel:
    return replace(level_of(of_report(ours()), "conformance/results/a.json"), **values)


def lines(*levels: SupportLevel, sha256: str = "a" * 64) -> list[str]:
    return table(SupportMatrix(levels), lambda target: sha256).splitlines()[2:]


def test_a_line_of_the_table_says_rung_date_and_what_has_changed() -> None:
    assert "driver" not in versions(ours({"driver": ""}))
    assert lines(level()) == [f"| `cuda` | NVIDIA H200 | {LINK} | 2026-11-20 |"]
    (shown,) = lines(level(suite="2026.05", note="by us"), sha256="b" * 64)
    assert f"| expired: {LINK}, source changed since, suite 2026.05, now 2026.12, by us |" in shown
    matrix = SupportMatrix((level(),))
    (shown,) = table(matrix, lambda target: "a" * 64, lambda level: 3).splitlines()[2:]
    assert f"| {LINK}, 3 newer cases not run |" in shown
    (shown,) = lines(level(device="a|b <c>\nd"))
    assert f"| a\\|b \\<c\\> d | {LINK}" in shown


def test_a_pair_is_one_line_its_highest_rung_first() -> None:
    mlu = {"backend": "mlu", "device": "mlu, emulated", "emulated": True, "emulation": {"a": "1"}}
    levels = [level(**mlu, level=name, summary=f"by {name}") for name in ("R1", "R3")]
    first, second = lines(*levels, level())
    assert first.startswith("| `cuda` |")
    file = "conformance/results/a.json"
    assert f"| `mlu` | mlu, emulated | [R3: by R3]({file}); [R1: by R1]({file}) |" in second


# -- pitfalls -----------------------------------------------------------------------------------

SOURCE = ROOT / "conformance" / "pitfalls.toml"
TABLE: dict[str, Any] = tomllib.loads(SOURCE.read_text(encoding="utf-8"))
PITFALLS: list[dict[str, Any]] = TABLE["pitfall"]
#: How many are known in each area; a pitfall may be split in two, none may be lost.
KNOWN = {
    "addressing": 22,
    "indices": 14,
    "ordering": 10,
    "host memory": 7,
    "copy engine": 11,
    "honesty": 3,
}


def test_each_named_test_exists() -> None:
    for test in {test for pitfall in PITFALLS for test in pitfall.get("tests", ())}:
        assert test.startswith(("cases/test_", "tests/"))
        file, *names = test.split("::")
        path = (ROOT / "conformance" if file.startswith("cases/") else ROOT) / file
        assert path.is_file(), f"{test} is named in {SOURCE.name}, but there is no {path}."
        text = path.read_text(encoding="utf-8")
        for name in names:
            result = re.search(rf"^ *(def|class) {name}\b", text, re.M)
            assert result, f"{test} is named in {SOURCE.name} and does not exist."


def test_each_pitfall_has_tests_or_says_what_is_not_built() -> None:
    for pitfall in PITFALLS:
        what = pitfall["what"]
        tests = pitfall.get("tests", ())
        assert set(pitfall) <= {"area", "what", "tests", "later"}, what
        assert tests or pitfall.get("later"), f"Nothing tests: {what}"
        assert len(set(tests)) == len(tests), what
        for sentence in (what, pitfall.get("later", "A sentence.")):
            assert re.fullmatch(r"[A-Z][^|\n]+\.", sentence), sentence
    assert len({pitfall["what"] for pitfall in PITFALLS}) == len(PITFALLS)
    assert set(TABLE) == {"pitfall"}


def test_no_pitfall_was_lost() -> None:
    result = Counter(pitfall["area"] for pitfall in PITFALLS)
    assert set(result) == set(KNOWN)
    assert result >= Counter(KNOWN)
    # Only engines and transports that do not exist can be left for later.
    late = {pitfall["area"] for pitfall in PITFALLS if "later" in pitfall}
    assert late <= {"host memory", "copy engine", "honesty"}


def test_the_command_prints_each_pitfall_with_its_tests(capsys: pytest.CaptureFixture[str]) -> None:
    assert conform(["--pitfalls"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert [line[2:] for line in lines if line.startswith("- ")] == [
        pitfall["what"] for pitfall in PITFALLS
    ]
    tests = [test for pitfall in PITFALLS for test in pitfall.get("tests", ())]
    assert {test.removeprefix("cases/") for test in tests} <= {line.strip() for line in lines}
