# SPDX-License-Identifier: Apache-2.0
"""The suite under pytest, as a vendor or the runner starts it, its events and exit codes; failing
examples as files, judged again where they failed or elsewhere; backends that end their process."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.conform_runs import python

import portakv_conformance
from portakv_conformance.draw import saved
from portakv_conformance.evidence.verdict import SEAL
from portakv_conformance.evidence.verify import check_report
from portakv_conformance.judge.subject import subject
from portakv_conformance.record import CaseRecord, RunRecord
from portakv_conformance.run import runner
from portakv_conformance.run.journal import MOST_EXAMPLES, Journal
from portakv_conformance.run.progress import SILENT
from portakv_conformance.run.runner import Options, SubjectUnavailable, cases_of

OFF_BY_ONE = "support.conform_suite_backends:OffByOne"
SUITE = ("-q", "-p", "no:cacheprovider", "--pyargs", "portakv_conformance")
Judged = tuple[subprocess.CompletedProcess[str], list[dict[str, Any]], dict[str, CaseRecord]]


def judged(backend: str, *words: str, ids: Sequence[str], where: Path, **more: str) -> Judged:
    """A run of some cases under pytest: how it ended, its events, and its cases by id."""
    file = where / "events.jsonl"
    only = where / "only.txt"
    only.write_text("\n".join(ids) + "\n", encoding="utf-8")
    options = (
        f"--portakv-backend=support.conform_suite_backends:{backend}",
        f"--portakv-events={file}",
        f"--portakv-only={only}",
    )
    done = python("-m", "pytest", *SUITE, *options, *words, where=where, **more)
    events = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    cases = [CaseRecord.read(event["case"]) for event in events if event["event"] == "end"]
    return done, events, {case.id: case for case in cases}


_FEW = (
    "cases/test_core.py::test_one_row[gather-0]",
    "cases/test_presets.py::test_preset[gather-vllm-mla-fp8-uint8]",
    "cases/test_claims.py::test_bad_ids_are_guarded[1-gather]",
    "cases/test_drawn.py::test_pages[0]",
)


@pytest.mark.full
def test_events_tell_of_each_case(tmp_path: Path) -> None:
    """A symbolic link in the current folder, which is found first, leads to the package: pytest
    keeps the path that it was passed."""
    (tmp_path / "portakv_conformance").symlink_to(Path(portakv_conformance.__file__).parent)
    done, events, result = judged("Talking", "--portakv-fuzz=77", "-sv", ids=_FEW, where=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = [event["event"] for event in events]
    first = ["loading", "subject", "list"]
    assert kinds == [*first, *["start", "end"] * len(_FEW), "finish"]  # whatever it prints
    listed = list(events[2]["cases"])
    assert sorted(listed) == sorted(_FEW)
    assert listed[0].startswith("cases/test_core.py"), "CORE comes first"
    assert listed[-1] == "cases/test_drawn.py::test_pages[0]"
    assert [result[name].status for name in _FEW] == ["passed", "passed", "not-claimed", "passed"]
    core, preset, guards, drawn = (result[name] for name in _FEW)
    assert (core.area, core.profile, core.examples) == ("core", "core", 1)
    assert preset.tags == {"layout": "vllm-mla-fp8", "dtype": "uint8", "operation": "gather"}
    assert guards.claim == "guards"
    assert "guards is not claimed" in guards.reason
    # The suite draws as many examples as were requested, and reports the seed.
    assert 60 <= drawn.examples <= 77
    assert re.search(r"seed [1-9]\d*, 77 examples", done.stdout)


@pytest.mark.full
@pytest.mark.usefixtures("own_registry")
def test_a_failure_is_told_shrunken_saved_and_replayed(tmp_path: Path) -> None:
    retained = tmp_path / "examples"
    name = "cases/test_drawn.py::test_copies_between_two_sides[0]"
    done, _, result = judged(
        "OffByOne", f"--portakv-examples={retained}", ids=[name], where=tmp_path
    )
    assert done.returncode == 1
    record = result[name]
    assert record.status == "failed"
    assert "holds 0x" in record.reason
    assert "The case was" not in record.reason
    assert "Case(src=Side(" in record.details
    case, about = saved.load((retained / record.example).read_text(encoding="utf-8"))
    assert about["case"] == name
    assert case.src.ids is not None
    # The fault shows with three ids and up; little more than that is left of what was drawn.
    assert case.src.ids.numel() in (3, 4)
    assert case.src.layers * case.src.heads <= 4  # of up to nine
    assert record.reason in str(saved.replay(retained / record.example, subject(OFF_BY_ONE, "cpu")))
    assert saved.replay(retained / record.example, subject("reference")) is None


@pytest.mark.slow
def test_the_same_seed_draws_the_same(tmp_path: Path) -> None:
    ids = ["cases/test_drawn.py::test_copies_between_two_sides[0]"]
    drawn = []
    for number, seed in enumerate((5, 5, 6)):
        plans = tmp_path / str(number)
        words = (f"--portakv-seed={seed}", "-v")
        done, _, _ = judged("Noting", *words, ids=ids, where=tmp_path, SUITE_PLANS=str(plans))
        assert done.returncode == 0
        assert f"seed {seed}" in done.stdout
        drawn.append(plans.read_text(encoding="utf-8"))
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


#: Options of the suite, the exit code, and a part of the output.
CODES = [
    ("--portakv-backend=nonsense", 3, "no such backend"),
    ("--portakv-backend=reference --portakv-device=npu", 3, "torch_npu"),
    ("--portakv-backend=reference --portakv-device=mps:9", 3, "got 'mps:9'"),
    ("--portakv-backend=reference --portakv-device=zzz", 3, "torch knows no zzz"),
    ("--portakv-backend=reference '--portakv-device=z z'", 4, "got 'z z'"),
    ("'--portakv-backend=a b:C'", 4, "pkg.mod:Class"),
    ("--portakv-backend=reference --portakv-seed=x", 4, "whole number"),
    ("--portakv-backend=reference --portakv-fuzz=0", 4, "of at least 1"),
    ("--portakv-backend=reference --portakv-only=only.txt", 4, "test_nothing"),
    ("", 5, "no tests"),
    ("--portakv-backend=reference", 4, "Expected PORTAKV_BACKEND to be unset"),
]
EACH = """
import contextlib, os, pytest, shlex, sys
base, *requests = map(shlex.split, sys.argv[1:])
for words in requests:
    if words is requests[-1]:
        os.environ["PORTAKV_BACKEND"] = "cuda"
    with contextlib.redirect_stderr(sys.stdout):
        code = pytest.main([*base, *words])
    print(f"\\n@@ {int(code)}")
"""


def test_exit_codes(tmp_path: Path) -> None:
    (tmp_path / "only.txt").write_text("cases/test_core.py::test_nothing\n")
    commands = [words for words, _, _ in CODES]
    done = python("-c", EACH, shlex.join(SUITE), *commands, where=tmp_path)
    parts = re.split(r"^@@ (\d)$", done.stdout, flags=re.MULTILINE)
    assert [int(code) for code in parts[1::2]] == [code for _, code, _ in CODES], done.stdout
    for (words, _, why), text in zip(CODES, parts[::2], strict=False):
        assert why in text, (words, text)


# -- failing examples -----------------------------------------------------------------------------

CASE = "cases/test_core.py::test_rows_move[gather-int64-8]"


@pytest.mark.simdev
@pytest.mark.full
def test_an_example_of_the_simulated_device_is_replayed(tmp_path: Path, conform: Any) -> None:
    words = [OFF_BY_ONE, "--device", "simdev", "--report", str(tmp_path)]
    done = conform(*words, "--only", CASE)
    assert done.code == 1, done.err
    (file,) = tmp_path.glob("example-*.json")
    about = json.loads(file.read_text(encoding="utf-8"))["about"]
    assert (about["device"], about["emulated"], about["direct"]) == ("simdev:0", True, False)
    right = conform("replay", str(file), "reference")
    assert (right.code, right.err) == (0, "")
    assert "passes on reference, simdev:0." in right.out


def test_the_first_examples_are_kept_drawn_ones_apart(tmp_path: Path) -> None:
    """Fixed cases come first, and would leave no room for what --fuzz finds."""
    journal = Journal(Options("fake", examples=tmp_path), SILENT)
    areas = ["corners"] * (MOST_EXAMPLES + 3) + ["drawn"] * 3 + ["metamorphic"] * 3
    ids = [f"cases/test_x.py::test_{n}" for n in range(len(areas))]
    cases: dict[str, Any] = {id: {} for id in ids}
    journal.take_list({"cases": cases, "profile": ids, "lone": 0})
    for n, (id, area) in enumerate(zip(ids, areas, strict=True)):
        (tmp_path / f"{n}.json").write_text("{}")
        case = CaseRecord(id, area, "core", status="failed", reason="Wrong.", example=f"{n}.json")
        journal.take_end(json.loads(case.line()))
    retained = [case.example for case in journal.cases.values()]
    assert list(map(bool, retained)) == [True] * MOST_EXAMPLES + [False] * 3 + [True] * 6
    assert {file.name for file in tmp_path.iterdir()} == {name for name in retained if name}


@pytest.mark.full
def test_an_example_keeps_how_its_end_was_waited_for(tmp_path: Path, conform: Any) -> None:
    words = ["portakv_conformance.mutants.state:DoneTooEarly", "--device", "cpu"]
    case = "test_core::test_a_transfer_that_ended_has_landed"
    done = conform(*words, "--report", str(tmp_path), "--only", case)
    assert done.code == 1, done.out + done.err
    file, *others = tmp_path.glob("example-*.json")
    for each in (file, *others):
        assert json.loads(each.read_text(encoding="utf-8"))["about"]["end"] != "synchronize"
    again = conform("replay", str(file))
    assert again.code == 1, again.out + again.err
    # How far the late copy had come, when the suite looked, differs from run to run.
    assert "it was not written" in again.out
    file.write_text(file.read_text(encoding="utf-8").replace('"end": "', '"end": "never '))
    with pytest.raises(ValueError, match="expected end to be one of synchronize, done, wait"):
        saved.replay(file, subject("reference"))


# -- what backends do to their process -----------------------------------------------------------

Listed = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def listed() -> Listed:
    """The cases of the profile core on the CPU."""
    return cases_of("core", "cpu")


@pytest.fixture(scope="module")
def passed(listed: Listed) -> RunRecord:
    """A run of some cases of each area."""
    areas = {case["area"] for case in listed.values()}
    assert areas >= {"core", "corners", "safety", "drawn"}
    of_area = ([id for id, case in listed.items() if case["area"] == area] for area in areas)
    return runner.run(Options("reference", only=tuple(id for ids in of_area for id in ids[::300])))


def run_on(name: str, **options: Any) -> RunRecord:
    return runner.run(Options(f"support.conform_suite_backends:{name}", only=(CASE,), **options))


def test_the_reference_passes(passed: RunRecord, listed: Listed) -> None:
    assert {case.status for case in passed.cases} <= {"passed", "not-claimed"}
    assert passed.environment["emulated"] is False
    assert passed.backend["target"] == "portakv.backends.reference:Reference"
    assert re.fullmatch("[0-9a-f]{64}", passed.backend["source_sha256"])
    assert ["pageable", "pageable"] in passed.capabilities["places"]
    assert passed.capabilities["index_dtypes"] == ["int32", "int64"]
    assert check_report(passed.document(), lambda profile, device: listed) == []


@pytest.mark.slow
def test_two_workers_find_what_one_finds(passed: RunRecord) -> None:
    def timeless(record: RunRecord) -> str:
        return re.sub(rf'"(started|seconds|command|{SEAL})": [^,}}]*', "", record.document())

    both = runner.run(Options("reference", only=tuple(case.id for case in passed.cases), jobs=2))
    assert timeless(both) == timeless(passed)
    assert "--jobs 2 --only" in both.command
    assert "--jobs" not in passed.command


@pytest.mark.parametrize(
    ("name", "expected", "where"),
    [
        pytest.param(
            "Crashing", "killed by SIGSEGV while this case ran", "in carry", marks=pytest.mark.full
        ),
        pytest.param("Hanging", "longer than its limit of 2 s", "in carry", marks=pytest.mark.full),
        pytest.param(
            "NoClaims", "capabilities() returned 'all of it'; expected", "", marks=pytest.mark.full
        ),
    ],
)
def test_a_backend_that_cannot_be_judged_has_failed(name: str, expected: str, where: str) -> None:
    """The suite and its surroundings are in order."""
    record = run_on(name, limit=2.0)
    (case,) = record.cases
    assert (record.verdict, case.status, case.area) == ("failed", "failed", "core")
    assert expected in case.reason
    assert where in case.details
    if name == "NoClaims":
        assert case.reason.endswith("no case can be judged.")
        assert record.capabilities == {"": "all of it"}


@pytest.mark.slow
def test_a_probe_that_crashes() -> None:
    with pytest.raises(SubjectUnavailable, match="SIGSEGV while the backend was loaded"):
        run_on("Deadly")


@pytest.mark.full
def test_the_lists_of_other_devices_are_known_here(listed: Listed) -> None:
    elsewhere = cases_of("core", "cuda:1")
    assert set(listed[CASE]) == {"area", "profile", "claim", "tags", "optional"}
    assert len(set(listed) & set(elsewhere)) > 50
    assert set(elsewhere) - set(listed), "ordering on streams makes sense on accelerators only"
