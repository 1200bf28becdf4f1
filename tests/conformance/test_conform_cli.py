# SPDX-License-Identifier: Apache-2.0
"""`portakv conform`, its exit codes and `portakv conform diff`, with workers that need no torch."""

from __future__ import annotations

import copy
import re
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
from support.command_line import choose_tables, settle
from support.conform_fake_worker import CLAIM, CORE
from support.conform_runs import python

from portakv.cli import main as portakv
from portakv_conformance import cli
from portakv_conformance.cli import main
from portakv_conformance.record import CaseRecord, RunRecord
from portakv_conformance.report.diff import compare_runs, differences
from portakv_conformance.run.progress import Lines, Progress
from portakv_conformance.run.request import Options
from portakv_conformance.run.runner import run
from portakv_conformance.run.workers import worker_command

CPU = ["fake", "--device", "cpu"]


class Command:
    """`portakv conform`, whose workers behave as they are told, and what it printed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._patch, self._capsys = monkeypatch, capsys
        self.out = self.err = ""

    def __call__(self, behaviours: Mapping[str, str], *words: str, call: Any = None) -> int:
        self._patch.setattr(cli, "run", partial(run, command=fake.command(behaviours)))
        code = call([*words]) if call else main([*CPU, *words])
        printed = self._capsys.readouterr()
        self.out, self.err = printed.out, printed.err
        return code


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    settle(monkeypatch)
    return Command(monkeypatch, capsys)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """What runs were asked for, each of which is interrupted at once."""
    settle(monkeypatch)
    found: list[Options] = []

    def judge(options: Options, progress: Progress) -> RunRecord:
        found.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", judge)
    return found


def test_a_conformant_run_ends_with_0(command: Command) -> None:
    words = ["conform", *CPU, "--profile", "full"]
    behaviours = {CORE + "a": "pass", CLAIM + "b": "not-claimed"}
    assert command(behaviours, *words, call=portakv) == 0
    assert "fake on cpu (CPU): conformant, R6." in command.out
    assert "1 passed, 1 not-claimed" in command.out.replace("\n", " ")
    assert "not claimed (cases): guards (1)" in command.out


def test_failures_end_with_1_and_a_line_for_each(command: Command) -> None:
    assert command({CORE + "a": "fail", CORE + "b": "pass", CORE + "c": "crash"}) == 1
    assert f"FAILED {CORE}a\n  Byte 3 is 7, expected 9.\n" in command.out
    again = f"portakv conform fake --device cpu --profile core --seed 0 --only {CORE}a"
    assert f"  again: {again}" in command.out
    assert f"FAILED {CORE}c\n  The worker process was killed by SIGSEGV" in command.out
    assert f"{CORE}b" not in command.out
    assert "fake on cpu (CPU): failed." in command.out
    assert command({CORE + "a": "pass", "finish": "crash"}) == 1  # it is incomplete
    assert "missing: The worker was killed by SIGSEGV" in command.out


def test_a_report_is_of_the_profile_that_earns_a_rung(
    tmp_path: Path, asked: list[Options], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in "", "--report out", "--report out --profile core", "--profile full":
        main([*CPU, *words.split()])
    assert [options.profile for options in asked] == ["core", "full", "core", "full"]
    assert all(f"--profile {options.profile} " in options.command() for options in asked)


DEVICES = {
    "ascend": "npu", "mlu --emulated": "mlu", "cuda": "cuda", "hip": "cuda",
    "hip --device cuda:1": "cuda:1", "ascend --device simdev:npu": "simdev:npu",
    "reference": "xpu", "triton": "xpu", "acme_kv.backend:Acme": "xpu",
}  # fmt: skip


def test_a_backend_is_judged_where_it_is_made_to_run(
    asked: list[Options], monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator = torch.device("xpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: accelerator)
    for words in DEVICES:
        main(words.split())
    assert [options.device for options in asked] == list(DEVICES.values())


def test_some_cases_alone_are_judged_by_themselves(command: Command) -> None:
    behaviours = {CORE + "a": "pass", CORE + "b": "fail"}
    for words, code in (([CORE + "a"], 0), ([CORE + "a", CORE + "b"], 1), (["nothing"], 2)):
        assert command(behaviours, "--only", *words) == code


def test_what_cannot_be_judged(command: Command) -> None:
    assert command({"start": "unavailable"}) == 3
    assert (command.out, "no such backend; known are x" in command.err) == ("", True)
    assert command({"collect": "crash"}) == 1


@pytest.mark.parametrize("words", ["reference", "--mutants", "replay x.json"])
def test_nothing_runs_under_a_forced_backend(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PORTAKV_BACKEND", "reference")
    assert main(words.split()) == 2
    assert "PORTAKV_BACKEND=reference forces every copy" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "", "a b", "fake --profile most", "fake --fuzz 0", "fake --seed -1", "fake --limit 0",
        "fake --limit inf", "fake --limit soon", "fake --only", "fake --jobs 0", "fake --jobs many",
        "diff one", "verify", "replay", "--mutants fake",
    ],
)  # fmt: skip
@pytest.mark.usefixtures("asked")
def test_what_is_not_understood_ends_with_2(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words.split())
    assert "error: " in capsys.readouterr().err


def test_waivers_are_told(command: Command, tmp_path: Path) -> None:
    behaviours = {CORE + "a": "pass", CLAIM + "b": "fail"}
    file = tmp_path / "waivers.toml"
    entry = '[[waiver]]\nid = "{}"\nreason = "Ticket."\nexpires = "3000"\n'
    words = ["--profile", "full", "--waivers", str(file)]
    file.write_text(entry.format(CLAIM + "b"))
    assert command(behaviours, *words) == 0
    out = command.out.replace("\n", " ")
    assert f"waived: {CLAIM}b: Ticket. (What it showed: Byte 3 is 7" in out
    assert "(no rung: cases are waived)" in out
    file.write_text(entry.format(CLAIM + "b") + entry.format("gone"))
    assert command(behaviours, *words) == 1
    assert "waivers: A waiver names 'gone'" in command.out
    file.write_text(entry.format("a") + 'ticket = "4711"\n')
    assert command(behaviours, *words) == 2
    assert "unknown key 'ticket'" in command.err
    # Strict too if only some cases are run: a waiver that does not hold fails them.
    words += ["--only", CORE + "a"]
    for id, expires, code in (
        (CLAIM + "b", "3000", 0),
        (CLAIM + "b", "2020", 1),
        ("gone", "3000", 2),
    ):
        file.write_text(entry.format(id).replace("3000", expires))
        assert command(behaviours, *words) == code
        told = " ".join((command.out + command.err).split())
        assert ("expired in suite 2020" in told) == (code == 1)
        assert ("A waiver names 'gone', but no case" in told) == (code == 2)


def test_fuzzing_draws_another_seed_each_time_and_tells_it(command: Command) -> None:
    seeds = []
    for _ in range(4):
        assert command({CORE + "a": "pass"}, "--fuzz", "50") == 0
        found = re.search(r"^seed (\d+)$", command.err, re.MULTILINE)
        assert found is not None
        seeds.append(found[1])
        again = f"portakv conform fake --device cpu --profile core --seed {found[1]} --fuzz 50"
        assert f"again: {again}\n" in command.out
    assert len(set(seeds)) > 1
    assert command({CORE + "a": "pass"}, "--fuzz", "50", "--seed", "9") == 0
    assert "seed 9, 50 examples" in command.out


def test_a_report_is_printed_or_written_and_stands_by_itself(
    command: Command, tmp_path: Path
) -> None:
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
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def with_example(*arguments: Any) -> RunRecord:
        record = run(*arguments, command=fake.command({CORE + "a": "fail"}))
        record.cases[0].example = "example-1.json"
        return record

    monkeypatch.setattr(cli, "run", with_example)
    main(["fake", "--device", "npu", "--emulated", "--report", str(tmp_path)])
    told = f"portakv conform replay {tmp_path}/example-1.json fake --device npu --emulated"
    assert f"its example: {told}\n" in capsys.readouterr().out


def test_no_folder_is_left_behind(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert command({CORE + "a": "fail"}) == 1
    assert command({"start": "unavailable"}) == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tables", ["rich", "plain"])
def test_a_bar_on_a_terminal(
    command: Command, tables: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ids' brackets are no markup, and a failure is told at once."""
    choose_tables(tables, monkeypatch)
    if tables == "plain":
        monkeypatch.setitem(sys.modules, "rich.progress", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert command({CORE + "a[red]": "pass", CORE + "b[/bold]": "fail"}) == 1
    assert f"failed: {CORE}b[/bold]" in command.err


def test_interrupted_runs_end_their_worker(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupting(Lines):
        def started(self, id: str) -> None:
            raise KeyboardInterrupt

        def ended(self, case: CaseRecord) -> None: ...

    monkeypatch.setattr("portakv_conformance.run.progress.Lines", Interrupting)
    assert command({CORE + "a": "hang"}) == 130
    assert "interrupted" in command.err


@pytest.mark.parametrize("missing", ["pytest", "hypothesis", "portakv_conformance.cli"])
def test_an_extra_that_is_missing_is_no_failure_of_a_backend(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settle(monkeypatch)
    monkeypatch.setitem(sys.modules, missing, None)
    assert portakv(["conform", "reference"]) == 2
    expected = missing if missing.startswith("portakv") else "portakv[conformance]"
    assert expected in capsys.readouterr().err


def test_a_file_that_is_no_example_ends_with_2(command: Command, tmp_path: Path) -> None:
    assert command({}, "replay", str(tmp_path / "gone.json"), call=main) == 2
    (tmp_path / "bad.json").write_text('{"schema": "portakv-example/1"}')
    assert command({}, "replay", str(tmp_path / "bad.json"), "reference", call=main) == 2
    assert "no saved example" in command.err


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
    done = python(*worker_command()[1:], "none", "0", "reference", "cpu", "", where=tmp_path)
    assert "The runner has gone." in done.stderr
    assert "the folder's" not in done.stdout


# -- diff -----------------------------------------------------------------------------------------

#: By what each status is worth.
WORTH = {"passed": 3, "not-claimed": 2, "waived": 1, "failed": 0, "error": 0}


@pytest.fixture(scope="module")
def record() -> RunRecord:
    return run(Options("fake"), command=fake.command({f"{CORE}{n}": "pass" for n in range(5)}))


def with_statuses(record: RunRecord, *statuses: str) -> RunRecord:
    changed = copy.deepcopy(record)
    for case, status in zip(changed.cases, statuses, strict=False):
        case.status = status  # type: ignore[assignment]
        case.reason = "" if status == "passed" else "Byte 3 is wrong."
    return changed


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
        changes = compare_runs(
            with_statuses(record, *[before] * 5), with_statuses(record, *[after] * 5)
        )
        step = WORTH[after] - WORTH[before]
        expected = ["FIX" if step > 0 else "REGRESSION"] * 5 if step else []
        assert [change.kind for change in changes] == expected
    assert differences(record, record) == []


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        ("conformant R6", "incomplete none", "REGRESSION"),
        ("conformant R6", "conformant R3", "REGRESSION"),
        ("conformant R3", "conformant none", "REGRESSION"),
        ("incomplete none", "failed none", "REGRESSION"),
        ("failed none", "conformant R3", "FIX"),
    ],
)
def test_verdict_and_rung_are_compared(
    record: RunRecord, diff: Any, before: str, after: str, kind: str
) -> None:
    """Though no case ended in another way: one was left out, or the device is another."""
    was, now = (dict(zip(("verdict", "rung"), t.split(), strict=True)) for t in (before, after))
    records = [replace(record, verdict=t["verdict"], rung=t["rung"].removeprefix("none"))
               for t in (was, now)]  # fmt: skip
    code, out = diff(*records)
    assert code == (kind == "REGRESSION")
    for name in was:
        changed = f"{kind:<10} {name}: {was[name]} -> {now[name]}" in out
        assert changed == (was[name] != now[name])


def test_cases_that_came_went_and_changed(record: RunRecord, diff: Any) -> None:
    failed, less = with_statuses(record, "failed"), replace(record, cases=record.cases[1:])
    assert diff(record, record) == (0, "0 FIX, 0 REGRESSION, 0 NEW, 0 MISSING\n")
    for old, new, ended, told in (
        (failed, record, 0, "FIX        cases/"),
        (record, failed, 1, "REGRESSION cases/"),
        (record, less, 1, f"MISSING    {CORE}0"),
        (less, record, 0, "NEW        cases/"),
        (less, failed, 1, "Byte 3 is wrong."),  # a new case that is wrong
    ):
        code, out = diff(old, new)
        assert (code, told in out) == (ended, True)


def test_other_surroundings_are_told(record: RunRecord) -> None:
    other = replace(record, environment={**record.environment, "device_name": "H200"}, seed=5)
    told = ["The device differs: CPU and H200.", "The seed differs: 0 and 5."]
    assert differences(record, other) == told


def test_what_is_no_report_ends_with_2(command: Command, tmp_path: Path) -> None:
    for text in (b"{}", b'{"schema": "portakv-conformance/1"}', b"\xff", b""):
        (tmp_path / "old").write_bytes(text)
        for name in "old", "gone":
            file = str(tmp_path / name)
            assert command({}, "diff", file, file, call=main) == 2
            assert file in command.err
