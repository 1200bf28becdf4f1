# SPDX-License-Identifier: Apache-2.0
"""`portakv conform`, its exit codes and `portakv conform diff`, with workers that need no torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import support.conform_fake_worker as fake
import torch
from support.command_line import settle
from support.conform_fake_worker import CLAIM, CORE
from support.conform_runs import environment
from support.waits import LIMIT

from portakv.cli import main as portakv
from portakv_conformance import cli
from portakv_conformance.cli import main
from portakv_conformance.record import RunRecord
from portakv_conformance.report.summary import compare_runs, differences
from portakv_conformance.run.journal import MOST_EXAMPLES
from portakv_conformance.run.progress import Progress
from portakv_conformance.run.request import Options
from portakv_conformance.run.runner import run
from portakv_conformance.run.workers import worker_command

CPU = ["fake", "--device", "cpu"]


class Command:
    """`portakv conform`, whose workers behave as a test says, and its output."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._patch = monkeypatch
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, behaviours: Mapping[str, str], *words: str, call: Any = None) -> int:
        self._patch.setattr(cli, "run", partial(run, command=fake.command(behaviours)))
        code: int = call([*words]) if call else main([*CPU, *words])
        self.out, self.err = self._capsys.readouterr()
        return code


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    settle(monkeypatch)
    return Command(monkeypatch, capsys)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """Return the requested runs, each of which is interrupted immediately."""
    settle(monkeypatch)
    result: list[Options] = []

    def judge(options: Options, progress: Progress) -> RunRecord:
        result.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", judge)
    return result


A = CORE + "a"
B = CORE + "b"
C = CORE + "c"
CLAIMED = CLAIM + "d"


@pytest.mark.parametrize(("behaviours", "words", "code", "expected"), [
    ({A: "pass", CLAIMED: "not-claimed"}, "--profile full", 0,
     ["fake on cpu (CPU): conformant, R6.", "1 passed, 1 not-claimed",
      "not claimed (cases): guards (1)"]),
    ({A: "fail", B: "pass", C: "crash"}, "", 1,
     [f"FAILED {A} Byte 3 is 7, expected 9.",
      f"again: portakv conform fake --device cpu --profile core --seed 0 --only {A}",
      f"FAILED {C} The worker process was killed by SIGSEGV", "fake on cpu (CPU): failed."]),
    ({A: "pass", "finish": "crash"}, "", 1, ["missing: The worker was killed by SIGSEGV"]),
    ({A: "pass", B: "fail"}, f"--only {A}", 0, []),
    ({A: "pass", B: "fail"}, f"--only {A} {B}", 1, []),
    ({A: "pass", B: "fail"}, "--only nothing", 2, ["'nothing'"]),
    ({"start": "unavailable"}, "", 3, ["no such backend; known are x"]),
    ({"collect": "crash"}, "", 1, []),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_how_a_run_ends(
    behaviours: dict[str, str],
    words: str,
    code: int,
    expected: list[str],
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its exit code and its words, what cannot be judged to standard error; no folder stays."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert command(behaviours, *words.split()) == code
    statement = " ".join((command.err if code > 1 else command.out + command.err).split())
    assert [text for text in expected if text not in statement] == []
    assert not any(f"FAILED {id}" in statement for id, how in behaviours.items() if how == "pass")
    assert (command.out == "") or code < 2
    assert list(tmp_path.iterdir()) == []


def test_a_report_is_of_the_profile_that_earns_a_rung(
    tmp_path: Path, requests: list[Options], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in "", "--report out", "--report out --profile core", "--profile full":
        main([*CPU, *words.split()])
    assert [options.profile for options in requests] == ["core", "full", "core", "full"]
    assert all(f"--profile {options.profile} " in options.command() for options in requests)


DEVICES = {
    "ascend": "npu",
    "mlu --emulated": "mlu",
    "cuda": "cuda",
    "hip": "cuda",
    "hip --device cuda:1": "cuda:1",
    "ascend --device simdev:npu": "simdev:npu",
    "reference": "xpu",
    "triton": "xpu",
    "acme_kv.backend:Acme": "xpu",
}


def test_one_is_judged_elsewhere(requests: list[Options], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    for words in DEVICES:
        main(words.split())
    assert [options.device for options in requests] == list(DEVICES.values())


@pytest.mark.parametrize("words", ["reference", "--mutants", "replay x.json"])
def test_nothing_runs_under_a_forced_backend(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PORTAKV_BACKEND", "reference")
    assert main(words.split()) == 2
    assert "Expected PORTAKV_BACKEND to be unset, got 'reference'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "",
        "a b",
        "fake --profile most",
        "fake --fuzz 0",
        "fake --seed -1",
        "fake --limit 0",
        "fake --limit inf",
        "fake --limit soon",
        "fake --only",
        "fake --jobs 0",
        "fake --jobs many",
        "diff one",
        "verify",
        "replay",
        "--mutants fake",
        "--list bogus",
        "--list --only a",
    ],
)
@pytest.mark.usefixtures("requests")
def test_what_is_not_understood_ends_with_2(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words.split())
    assert "error: " in capsys.readouterr().err


WAIVER = '[[waiver]]\nid = "{}"\nreason = "Ticket."\nexpires = "3000"\n'
B_AND_GONE = WAIVER.format(CLAIM + "b") + WAIVER.format("gone")


# Strict too if only some cases are run: a waiver that does not hold fails them.
@pytest.mark.parametrize(("text", "words", "code", "expected"), [
    (WAIVER.format(CLAIM + "b"), [], 0, f"waived: {CLAIM}b: Ticket. (What it showed: Byte 3 is 7"),
    (WAIVER.format(CLAIM + "b"), [], 0, "(no level: cases are waived)"),
    (B_AND_GONE, [], 1, "waivers: A waiver names 'gone'"),
    (WAIVER.format("a") + 'ticket = "4711"', [], 2, "unknown key 'ticket'"),
    (WAIVER.format(CLAIM + "b"), ["--only", CORE + "a"], 0, "1 passed"),
    (WAIVER.format(CLAIM + "b").replace("3000", "2020"), ["--only", CORE + "a"], 1,
     "expired in suite 2020"),
    (B_AND_GONE, ["--only", CORE + "a"], 2, "got a waiver of 'gone'. Remove it"),
], ids=lambda value: None if isinstance(value, str) else str(value))  # fmt: skip
def test_waivers_are_told(
    text: str, words: list[str], code: int, expected: str, command: Command, tmp_path: Path
) -> None:
    file = tmp_path / "waivers.toml"
    file.write_text(text)
    arguments = ["--profile", "full", "--waivers", str(file), *words]
    assert command({CORE + "a": "pass", CLAIM + "b": "fail"}, *arguments) == code
    assert expected in " ".join((command.out + command.err).split())


def test_fuzzing_draws_another_seed_each_time_and_tells_it(command: Command) -> None:
    seeds = set()
    for _ in range(2):
        assert command({CORE + "a": "pass"}, "--fuzz", "50") == 0
        (seed,) = re.findall(r"^seed (\d+)$", command.err, re.MULTILINE)
        seeds.add(seed)
        again = f"portakv conform fake --device cpu --profile core --seed {seed} --fuzz 50"
        assert f"again: {again}\n" in command.out
    assert len(seeds) == 2
    assert command({CORE + "a": "pass"}, "--fuzz", "50", "--seed", "9") == 0
    assert "seed 9, 50 examples" in command.out


def test_a_report_is_printed_or_written_and_stands(command: Command, tmp_path: Path) -> None:
    assert command({CORE + "a": "pass", CORE + "b": "fail"}, "--json") == 1
    printed = RunRecord.read(command.out)
    assert [case.status for case in printed.cases] == ["passed", "failed"]
    folder = tmp_path / "deep" / "out"
    assert command({CORE + "a": "pass"}, "--report", str(folder)) == 0
    record = RunRecord.read((folder / "conformance.json").read_text(encoding="utf-8"))
    assert (record.verdict, [case.id for case in record.cases]) == ("conformant", [CORE + "a"])
    assert str(folder) not in record.command
    (tmp_path / "file").touch()
    assert command({}, "--report", str(tmp_path / "file" / "out")) == 2
    assert "cannot be made" in command.err


def test_an_example_is_told_with_its_replay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A test is shown by a case that has one, if any case of the test has."""

    def with_examples(*arguments: Any) -> RunRecord:
        ids = [f"{CORE}a[{n}]" for n in range(MOST_EXAMPLES + 1)]
        record = run(*arguments, command=fake.command(dict.fromkeys(ids, "fail")))
        for case in record.cases[1:]:
            case.example = f"{case.id[-2:-1]}.json"
        return record

    monkeypatch.setattr(cli, "run", with_examples)
    main(["fake", "--device", "npu", "--emulated", "--report", str(tmp_path)])
    out = capsys.readouterr().out
    again = f"portakv conform replay {tmp_path}/1.json fake --device npu --emulated"
    assert re.findall("^FAILED (.*)$", out, re.MULTILINE) == [f"{CORE}a[1]"]
    assert f"its example: {again}\n" in out
    assert f"Of the failing examples at most {MOST_EXAMPLES} of drawn cases" in out


@pytest.mark.parametrize("has_rich", [True, False])
def test_a_terminal_s_bar(
    command: Command, has_rich: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ids' brackets are not markup, and a failure is reported immediately."""
    if has_rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert command({CORE + "a[red]": "pass", CORE + "b[/bold]": "fail"}) == 1
    assert f"failed: {CORE}b[/bold]" in command.err


def test_interrupted_runs_end_workers(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(self: Progress, id: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("portakv_conformance.run.progress.Lines.started", started)
    assert command({CORE + "a": "hang"}) == 130
    assert "interrupted" in command.err


@pytest.mark.parametrize("missing", ["pytest", "hypothesis", "portakv_conformance.cli", "jinja2"])
def test_an_extra_that_is_missing_is_no_failure_of_a_backend(
    missing: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    requests: list[Options],
) -> None:
    """The command reports it before any case is run."""
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    if missing != "jinja2":
        monkeypatch.setitem(sys.modules, missing, None)
    assert portakv(["conform", "reference", "--report", "out"]) == 2
    package = missing.partition(".")[0]
    expected = package if package.startswith("portakv") else "pip install -e '.[conformance]'"
    assert expected in capsys.readouterr().err
    assert not requests


def test_a_file_that_is_no_example_ends_with_2(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "example.json"
    assert command({}, "replay", str(file), call=main) == 2
    file.write_text('{"schema": "portakv-example/1"}')
    assert command({}, "replay", str(file), "reference", call=main) == 2
    assert "Expected a saved example" in command.err
    about = {"backend": "reference", "device": "npu:0"}  # which is not here
    file.write_text(json.dumps({"schema": "portakv-example/1", "about": about}))
    assert command({}, "replay", str(file), call=main) in (2, 3)
    assert "got 'npu:0': " in command.err


def test_one_bug_is_told_once(command: Command) -> None:
    """Failures of one test are a group, and a run shows a few of many while it goes on."""
    assert command({f"{CORE}a[{n:02}]": "fail" for n in range(30)}) == 1
    assert command.out.count("FAILED") == 1
    assert "FAILED cases/test_core.py::test_a[00]" in command.out
    assert "and 29 more cases of this test" in command.out
    assert command.err.count("failed: cases") == 20
    assert "More failures are shown at the end." in command.err
    assert command({f"{CORE}{n:02}": "fail" for n in range(11)}) == 1
    assert command.out.count("FAILED") == 8
    assert "3 cases of 3 other tests failed too; --report lists all of them." in command.out


def test_what_lies_in_the_current_folder_hides_nothing(tmp_path: Path) -> None:
    """A worker loads what `portakv backends` loads, wherever the user is."""
    hidden = tmp_path / "portakv_conformance" / "run"
    hidden.mkdir(parents=True)
    for folder in (hidden, hidden.parent):
        (folder / "__init__.py").touch()
    (hidden / "worker.py").write_text("main = lambda words: print('the folder\\'s')")
    command = [*worker_command(), "none", "0"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=LIMIT
    )
    assert "The runner has gone." in done.stderr
    assert "the folder's" not in done.stdout


# -- diff -----------------------------------------------------------------------------------------

#: By what each status is worth.
WORTH = {"passed": 3, "not-claimed": 2, "waived": 1, "failed": 0, "error": 0}


@pytest.fixture(scope="module")
def record() -> RunRecord:
    return run(Options("fake"), command=fake.command({f"{CORE}{n}": "pass" for n in range(5)}))


def ended(record: RunRecord, status: Any) -> RunRecord:
    """The record, in which the first case ended so."""
    reason = "" if status == "passed" else "Byte 3 is wrong."
    first, *others = record.cases
    return replace(record, cases=[replace(first, status=status, reason=reason), *others])


@pytest.fixture
def diff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs the command on two records: its exit code, and what it printed."""

    def compare(*records: RunRecord) -> tuple[int, str]:
        for name, each in zip(("old", "new"), records, strict=True):
            (tmp_path / name).write_text(each.document(), encoding="utf-8")
        code = main(["diff", str(tmp_path / "old"), str(tmp_path / "new")])
        return code, capsys.readouterr().out

    return compare


def test_each_step_has_its_kind(record: RunRecord) -> None:
    for before, after in product(WORTH, WORTH):
        changes = compare_runs(ended(record, before), ended(record, after))
        step = WORTH[after] - WORTH[before]
        expected = ["FIX" if step > 0 else "REGRESSION"] if step else []
        assert [change.kind for change in changes] == expected


@pytest.mark.parametrize(("before", "after", "kind"), [
    ("conformant R6", "incomplete none", "REGRESSION"),
    ("conformant R6", "conformant R3", "REGRESSION"),
    ("conformant R3", "conformant none", "REGRESSION"),
    ("incomplete none", "failed none", "REGRESSION"),
    ("failed none", "conformant R3", "FIX"),
])  # fmt: skip
def test_verdicts_compare(record: RunRecord, diff: Any, before: str, after: str, kind: str) -> None:
    """Though no case ended in another way: one was left out, or the device is another."""
    was = before.split()
    now = after.split()
    code, out = diff(
        *(
            replace(record, verdict=verdict, rung=level.removeprefix("none"))
            for verdict, level in (was, now)
        )
    )
    assert code == (kind == "REGRESSION")
    for name, old, new in zip(("verdict", "level"), was, now, strict=True):
        assert (f"{kind:<10} {name}: {old} -> {new}" in out) == (old != new)


def test_cases_that_came_went_and_changed(record: RunRecord, diff: Any) -> None:
    failed = ended(record, "failed")
    less = replace(record, cases=record.cases[1:])
    assert diff(record, record) == (0, "0 FIX, 0 REGRESSION, 0 NEW, 0 MISSING\n")
    for old, new, wanted, line in (
        (failed, record, 0, "FIX        cases/"),
        (record, failed, 1, "REGRESSION cases/"),
        (record, less, 1, f"MISSING    {CORE}0"),
        (less, record, 0, "NEW        cases/"),
        (less, failed, 1, "Byte 3 is wrong."),  # a new case that is wrong
    ):
        code, out = diff(old, new)
        assert (code, line in out) == (wanted, True)


def test_other_surroundings_are_told(record: RunRecord) -> None:
    other = replace(record, environment={**record.environment, "device_name": "H200"}, seed=5)
    sentences = ["The device differs: CPU and H200.", "The seed differs: 0 and 5."]
    assert differences(record, other) == sentences
    assert differences(record, record) == []


def test_what_is_no_report_ends_with_2(command: Command, tmp_path: Path) -> None:
    for text in (b"{}", b'{"schema": "portakv-conformance/1"}', b"\xff", b""):
        (tmp_path / "old").write_bytes(text)
        for name in "old", "gone":
            file = str(tmp_path / name)
            assert command({}, "diff", file, file, call=main) == 2
            assert file in command.err
