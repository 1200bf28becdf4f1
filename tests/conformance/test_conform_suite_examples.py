# SPDX-License-Identifier: Apache-2.0
"""Failing examples as files: as many as help, and judged again where they failed or elsewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from portakv_conformance.record import CaseRecord, RunRecord
from portakv_conformance.run.journal import MOST_EXAMPLES, Journal, Page
from portakv_conformance.run.progress import SILENT
from portakv_conformance.run.request import Options
from portakv_conformance.simdev import build

HERE = Path(__file__).resolve().parent
COMMAND = "import sys; from portakv_conformance.cli import main; sys.exit(main())"
CASE = "cases/test_core.py::test_rows_move[gather-int64-8]"
why_not = build.missing()
simulated = pytest.mark.skipif(why_not is not None, reason=why_not or "")


def conform(*words: str) -> subprocess.CompletedProcess[str]:
    """`portakv conform` in a process of its own, which may load the simulated device."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "COLUMNS": "500"}
    environment.pop("PORTAKV_BACKEND", None)
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *words],
        env=environment, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip


@simulated
def test_an_example_of_the_simulated_device_is_replayed(tmp_path: Path) -> None:
    words = [
        "support.conform_suite_backends:OffByOne",
        "--device",
        "simdev",
        "--report",
        str(tmp_path),
    ]
    done = conform(*words, "--only", CASE)
    assert done.returncode == 1, done.stderr
    (file,) = tmp_path.glob("example-*.json")
    about = json.loads(file.read_text(encoding="utf-8"))["about"]
    assert (about["device"], about["emulated"], about["direct"]) == ("simdev:0", True, False)
    for device in ([], ["--device", "cpu"]):
        again = conform("replay", str(file), *device)
        assert again.returncode == 1, again.stdout + again.stderr
        assert about["reason"] in again.stdout
    right = conform("replay", str(file), "reference")
    assert (right.returncode, right.stderr) == (0, "")
    assert "passes on reference, simdev:0." in right.stdout


def test_an_example_of_a_device_that_is_not_here(tmp_path: Path) -> None:
    file = tmp_path / "example.json"
    about = {"backend": "reference", "device": "npu:0"}
    file.write_text(json.dumps({"schema": "portakv-example/1", "about": about}))
    done = conform("replay", str(file))
    assert done.returncode in (2, 3)
    assert "'npu:0' was asked for" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("more", [0, 5])
def test_the_first_examples_are_kept(tmp_path: Path, more: int) -> None:
    ids = [f"cases/test_core.py::test_{n}" for n in range(MOST_EXAMPLES + more)]
    journal, page = Journal(Options("fake", examples=tmp_path), SILENT), Page()
    journal.take({"event": "list", "ids": ids}, page)
    for n, id in enumerate(ids):
        (tmp_path / f"example-{n}.json").write_text("{}")
        case = CaseRecord(id, "core", "core", status="failed", reason="Wrong.")
        case.example = f"example-{n}.json"
        journal.take({"event": "end", "case": json.loads(case.line())}, page)
    kept = [case.example for case in journal.cases.values() if case.example]
    assert kept == [f"example-{n}.json" for n in range(MOST_EXAMPLES)]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(kept)


def test_drawn_examples_are_counted_apart(tmp_path: Path) -> None:
    """Fixed cases come first, and would leave no room for what --fuzz finds."""
    journal, page = Journal(Options("fake", examples=tmp_path), SILENT), Page()
    areas = ["corners"] * (MOST_EXAMPLES + 3) + ["drawn"] * 3 + ["metamorphic"] * 3
    ids = [f"cases/test_x.py::test_{n}" for n in range(len(areas))]
    journal.take({"event": "list", "ids": ids}, page)
    for n, (id, area) in enumerate(zip(ids, areas, strict=True)):
        case = CaseRecord(id, area, "core", status="failed", reason="Wrong.", example=f"{n}.json")
        journal.take({"event": "end", "case": json.loads(case.line())}, page)
    kept = [bool(case.example) for case in journal.cases.values()]
    assert kept == [True] * MOST_EXAMPLES + [False] * 3 + [True] * 6


def test_an_example_keeps_how_its_end_was_waited_for(tmp_path: Path) -> None:
    words = ["portakv_conformance.mutants.state:DoneTooEarly", "--device", "cpu"]
    case = "test_a_transfer_that_ended_has_landed"
    done = conform(*words, "--report", str(tmp_path), "--only", f"test_core::{case}")
    assert done.returncode == 1, done.stdout + done.stderr
    files = [*tmp_path.glob("example-*.json")]
    assert files
    for file in files:
        assert json.loads(file.read_text(encoding="utf-8"))["about"]["end"] != "synchronize"
        assert conform("replay", str(file)).returncode == 1
    file = files[0]
    file.write_text(file.read_text(encoding="utf-8").replace('"end": "', '"end": "never '))
    assert "no way to wait for a copy" in conform("replay", str(file)).stderr


@pytest.mark.slow
def test_a_backend_that_is_wrong_everywhere_says_so_once(tmp_path: Path) -> None:
    words = [
        "support.conform_suite_backends:OffByOne",
        "--device",
        "cpu",
        "--report",
        str(tmp_path),
    ]
    done = conform(*words, "--jobs", "2")
    assert done.returncode == 1, done.stderr
    kept = {file.name for file in tmp_path.glob("example-*.json")}
    assert MOST_EXAMPLES < len(kept) <= 2 * MOST_EXAMPLES
    record = RunRecord.read((tmp_path / "conformance.json").read_text(encoding="utf-8"))
    examples = {case.id: Path(case.example).name for case in record.cases if case.example}
    assert set(examples.values()) == kept
    assert len(examples) == len(kept)
    # A test is shown by one case, which has an example if any case of the test has one.
    shown = re.findall(r"^FAILED (\S+)$", done.stdout, re.MULTILINE)
    tests = {id.partition("[")[0] for id in examples}
    told = [id for id in shown if id.partition("[")[0] in tests]
    assert told
    assert re.findall(r"its example: .*?(example-\w+\.json)", done.stdout) == [
        examples[id] for id in told
    ]
    assert f"Of the failing examples at most {MOST_EXAMPLES} of drawn cases" in done.stdout
