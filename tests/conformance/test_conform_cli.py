# SPDX-License-Identifier: Apache-2.0
"""`portakv conform` and its exit codes, with workers that need no torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import support.conform_fake_worker as fake
import torch
from support.command_line import choose_tables, settle
from support.conform_fake_worker import CLAIM, CORE

from portakv.cli import main as portakv
from portakv_conformance import cli
from portakv_conformance.cli import main
from portakv_conformance.record import CaseRecord, RunRecord
from portakv_conformance.run.progress import Lines, Progress
from portakv_conformance.run.request import Options
from portakv_conformance.run.runner import run
from portakv_conformance.run.workers import worker_command

Behave = Callable[[Mapping[str, str]], None]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch)


@pytest.fixture
def behave(monkeypatch: pytest.MonkeyPatch) -> Behave:
    """Let runs start workers that behave like this."""

    def start(behaviours: Mapping[str, str]) -> None:
        monkeypatch.setattr(cli, "run", partial(run, command=fake.command(behaviours)))

    return start


def test_a_conformant_run_ends_with_0(behave: Behave, capsys: pytest.CaptureFixture[str]) -> None:
    behave({CORE + "a": "pass", CLAIM + "b": "not-claimed"})
    assert portakv(["conform", "fake", "--device", "cpu", "--profile", "full"]) == 0
    out = capsys.readouterr().out
    assert "fake on cpu (CPU): conformant, R6." in out
    assert "1 passed, 1 not-claimed" in out.replace("\n", " ")
    assert "not claimed (cases): guards (1)" in out


def test_failures_end_with_1_and_a_line_for_each(
    behave: Behave, capsys: pytest.CaptureFixture[str]
) -> None:
    behave({CORE + "a": "fail", CORE + "b": "pass", CORE + "c": "crash"})
    assert main(["fake", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert f"FAILED {CORE}a\n  Byte 3 is 7, expected 9.\n" in out
    assert (
        f"  again: portakv conform fake --device cpu --profile core --seed 0 --only {CORE}a" in out
    )
    assert f"FAILED {CORE}c\n  The worker process was killed by SIGSEGV" in out
    assert f"{CORE}b" not in out
    assert "fake on cpu (CPU): failed." in out


def test_an_incomplete_run_is_not_conformant(
    behave: Behave, capsys: pytest.CaptureFixture[str]
) -> None:
    behave({CORE + "a": "pass", "finish": "crash"})
    assert main(["fake", "--device", "cpu"]) == 1
    assert "missing: The worker was killed by SIGSEGV" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "profile"),
    [
        ([], "core"),
        (["--report", "out"], "full"),
        (["--report", "out", "--profile", "core"], "core"),
        (["--profile", "full"], "full"),
    ],
)
def test_a_report_is_of_the_profile_that_earns_a_rung(
    words: list[str], profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Options] = []

    def judge(options: Options, progress: Progress) -> RunRecord:
        asked.append(options)
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "run", judge)
    main(["fake", "--device", "cpu", *words])
    assert asked[0].profile == profile
    assert f"--profile {profile} " in asked[0].command()


@pytest.mark.parametrize(
    ("words", "device"),
    [
        (["ascend"], "npu"),
        (["mlu", "--emulated"], "mlu"),
        (["cuda"], "cuda"),
        (["hip"], "cuda"),
        (["hip", "--device", "cuda:1"], "cuda:1"),
        (["ascend", "--device", "simdev:npu"], "simdev:npu"),
        (["reference"], "xpu"),
        (["triton"], "xpu"),
        (["acme_kv.backend:Acme"], "xpu"),
    ],
)
def test_a_backend_is_judged_where_it_is_made_to_run(
    words: list[str], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Options] = []

    def judge(options: Options, progress: Progress) -> RunRecord:
        asked.append(options)
        raise KeyboardInterrupt

    accelerator = torch.device("xpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: accelerator)
    monkeypatch.setattr(cli, "run", judge)
    main(words)
    assert asked[0].device == device


def test_some_cases_alone_are_judged_by_themselves(behave: Behave) -> None:
    behave({CORE + "a": "pass", CORE + "b": "fail"})
    assert main(["fake", "--device", "cpu", "--only", CORE + "a"]) == 0
    assert main(["fake", "--device", "cpu", "--only", CORE + "a", CORE + "b"]) == 1
    assert main(["fake", "--device", "cpu", "--only", "nothing"]) == 2


def test_a_backend_that_is_not_available_ends_with_3(
    behave: Behave, capsys: pytest.CaptureFixture[str]
) -> None:
    behave({"start": "unavailable"})
    assert main(["nonsense", "--device", "cpu"]) == 3
    captured = capsys.readouterr()
    assert (captured.out, "no such backend; known are x" in captured.err) == ("", True)


def test_a_suite_that_cannot_be_collected_ends_with_1(behave: Behave) -> None:
    behave({"collect": "crash"})
    assert main(["fake", "--device", "cpu"]) == 1


@pytest.mark.parametrize("words", [["reference"], ["--mutants"], ["replay", "x.json"]])
def test_nothing_runs_under_a_forced_backend(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PORTAKV_BACKEND", "reference")
    assert main(words) == 2
    assert "PORTAKV_BACKEND=reference forces every copy" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["a", "b"],
        ["fake", "--profile", "most"],
        ["fake", "--fuzz", "0"],
        ["fake", "--seed", "-1"],
        ["fake", "--limit", "0"],
        ["fake", "--limit", "inf"],
        ["fake", "--limit", "soon"],
        ["fake", "--only"],
        ["diff", "one"],
        ["verify"],
        ["replay"],
        ["--mutants", "fake"],
    ],
)
def test_what_is_not_understood_ends_with_2(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_a_waiver_file_that_is_not_understood_ends_with_2(
    behave: Behave, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    behave({CORE + "a": "pass"})
    file = tmp_path / "waivers.toml"
    file.write_text('[[waiver]]\nid = "a"\nreason = "b"\nexpires = "3000"\nticket = "4711"\n')
    assert main(["fake", "--device", "cpu", "--waivers", str(file)]) == 2
    assert "unknown key 'ticket'" in capsys.readouterr().err


def test_waivers_are_told(
    behave: Behave, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    behave({CORE + "a": "pass", CLAIM + "b": "fail"})
    file = tmp_path / "waivers.toml"
    entry = '[[waiver]]\nid = "{}"\nreason = "Ticket."\nexpires = "3000"\n'
    file.write_text(entry.format(CLAIM + "b"))
    words = ["fake", "--device", "cpu", "--profile", "full", "--waivers", str(file)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert f"waived: {CLAIM}b: Ticket. (What it showed: Byte 3 is 7" in out.replace("\n", " ")
    assert "(no rung: cases are waived)" in out.replace("\n", " ")
    file.write_text(entry.format(CLAIM + "b") + entry.format("gone"))
    assert main(words) == 1
    assert "waivers: A waiver names 'gone'" in capsys.readouterr().out


def test_fuzzing_tells_its_seed(behave: Behave, capsys: pytest.CaptureFixture[str]) -> None:
    behave({CORE + "a": "pass"})
    assert main(["fake", "--device", "cpu", "--fuzz", "50"]) == 0
    captured = capsys.readouterr()
    found = re.search(r"^seed (\d+)$", captured.err, re.MULTILINE)
    assert found is not None
    again = f"portakv conform fake --device cpu --profile core --seed {found[1]} --fuzz 50"
    assert f"again: {again}\n" in captured.out
    assert main(["fake", "--device", "cpu", "--fuzz", "50", "--seed", "9"]) == 0
    assert "seed 9, 50 examples" in capsys.readouterr().out


def test_fuzzing_draws_another_seed_each_time(behave: Behave) -> None:
    def seeds(words: list[str]) -> int:
        return cli._options(cli.make_parser().parse_args(["fake", *words])).seed

    assert len({seeds(["--fuzz", "5"]) for _ in range(8)}) > 1
    assert {seeds([]) for _ in range(8)} == {0}


def test_a_report_is_written_and_stands_by_itself(behave: Behave, tmp_path: Path) -> None:
    behave({CORE + "a": "pass"})
    folder = tmp_path / "deep" / "out"
    assert main(["fake", "--device", "cpu", "--report", str(folder)]) == 0
    record = RunRecord.read((folder / "conformance.json").read_text(encoding="utf-8"))
    assert (record.verdict, [case.id for case in record.cases]) == ("conformant", [CORE + "a"])
    assert str(folder) not in record.command
    assert {file.name for file in folder.iterdir()} == {
        "conformance.json", "junit.xml", "report.md", "badge.svg", "report.html",
    }  # fmt: skip


def test_a_report_that_has_no_place_ends_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["fake", "--device", "cpu", "--report", str(tmp_path / "file" / "out")]) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_an_example_is_told_with_its_replay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str],
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
    behave: Behave, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for behaviours, code in (({CORE + "a": "fail"}, 1), ({"start": "unavailable"}, 3)):
        behave(behaviours)
        assert main(["fake", "--device", "cpu"]) == code
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tables", ["rich", "plain"])
def test_a_bar_on_a_terminal(
    behave: Behave, tables: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ids' brackets are no markup, and a failure is told at once."""
    choose_tables(tables, monkeypatch)
    for name in ("rich.progress",) if tables == "plain" else ():
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    behave({CORE + "a[red]": "pass", CORE + "b[/bold]": "fail"})
    assert main(["fake", "--device", "cpu"]) == 1
    err = capsys.readouterr().err
    assert f"failed: {CORE}b[/bold]" in err


def test_interrupted_runs_end_their_worker(
    behave: Behave, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupting(Lines):
        def started(self, id: str) -> None:
            raise KeyboardInterrupt

        def ended(self, case: CaseRecord) -> None: ...

    monkeypatch.setattr("portakv_conformance.run.progress.Lines", Interrupting)
    behave({CORE + "a": "hang"})
    assert main(["fake", "--device", "cpu"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["pytest", "hypothesis", "portakv_conformance.cli"])
def test_an_extra_that_is_missing_is_no_failure_of_a_backend(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert portakv(["conform", "reference"]) == 2
    err = capsys.readouterr().err
    expected = missing if missing.startswith("portakv") else "portakv[conformance]"
    assert expected in err


def test_a_file_that_is_no_example_ends_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(tmp_path / "gone.json")]) == 2
    for text in ("", "{}", json.dumps({"schema": "portakv-example/1"})):
        (tmp_path / "bad.json").write_text(text)
        assert main(["replay", str(tmp_path / "bad.json"), "reference"]) == 2
    assert "no saved example" in capsys.readouterr().err


def test_the_report_itself_is_printed(behave: Behave, capsys: pytest.CaptureFixture[str]) -> None:
    behave({CORE + "a": "pass", CORE + "b": "fail"})
    assert main(["fake", "--device", "cpu", "--json"]) == 1
    record = RunRecord.read(capsys.readouterr().out)
    assert [case.status for case in record.cases] == ["passed", "failed"]


def test_one_bug_is_told_once(behave: Behave, capsys: pytest.CaptureFixture[str]) -> None:
    """Failures of one test are a group, and a run shows a few of many while it goes on."""
    behave({f"{CORE}a[{n:02}]": "fail" for n in range(30)})
    assert main(["fake", "--device", "cpu"]) == 1
    shown = capsys.readouterr()
    assert shown.out.count("FAILED") == 1
    assert "FAILED cases/test_core.py::test_a[00]" in shown.out
    assert "and 29 more cases of this test" in shown.out
    assert shown.err.count("failed: cases") == 20
    assert "More failures are shown at the end." in shown.err


def test_of_many_tests_that_fail_the_first_are_told(
    behave: Behave, capsys: pytest.CaptureFixture[str]
) -> None:
    behave({f"{CORE}{n:02}": "fail" for n in range(11)})
    assert main(["fake", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert out.count("FAILED") == 8
    assert "3 cases of 3 other tests failed too; --report lists all of them." in out


def test_what_lies_in_the_current_folder_hides_nothing(tmp_path: Path) -> None:
    """A worker loads what `portakv backends` loads, wherever the user is."""
    hidden = tmp_path / "portakv_conformance" / "run"
    hidden.mkdir(parents=True)
    for folder in (hidden, hidden.parent):
        (folder / "__init__.py").touch()
    (hidden / "worker.py").write_text("main = lambda words: print('the folder\\'s')")
    done = subprocess.run(
        [*worker_command(), "none.json"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "none.json" in done.stderr
    assert "the folder's" not in done.stdout
