# SPDX-License-Identifier: Apache-2.0
"""The score: who is caught, who survives, and what the exit code says of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from portakv_conformance.mutants import MUTANTS, Mutant, score
from portakv_conformance.mutants.table import document
from portakv_conformance.mutants.trial import Trial, try_control, try_mutant
from portakv_conformance.record import SCHEMA, CaseRecord, RunRecord
from portakv_conformance.run.runner import Options, SubjectUnavailable
from portakv_conformance.run.workers import INTERRUPTED

FIRST, SECOND = MUTANTS[:2]
Ends = list[tuple[str, str]]


def record(ends: Ends, verdict: str = "failed") -> RunRecord:
    cases = [
        CaseRecord(id, "core", "core", status=status, reason=f"{id} is {status}")  # type: ignore[arg-type]
        for id, status in ends
    ]
    return RunRecord(
        SCHEMA, "s", "1", {}, {}, {}, [], "core", 0, 0, "", cases, {}, "", verdict, ["why"], "",
        0.0, "",
    )  # fmt: skip


def runner(ends: Ends, seen: list[Options], **how: Any) -> Callable[..., RunRecord]:
    def run(options: Options, progress: object = None) -> RunRecord:
        seen.append(options)
        return record(ends, **how)

    return run


def test_the_first_case_that_fails_catches() -> None:
    seen: list[Options] = []
    ends = [("a", "passed"), ("b", "not-claimed"), ("c", "failed"), ("d", "failed")]
    trial = try_mutant(SECOND, 7, runner=runner(ends, seen))
    assert (trial.caught, trial.caught_by, trial.reason) == (True, "c", "c is failed")
    assert seen[0].backend == SECOND.target
    assert (seen[0].profile, seen[0].device) == (SECOND.profile, SECOND.device)
    assert (seen[0].seed, seen[0].exit_first) == (7, True)


@pytest.mark.parametrize(
    ("ends", "why"),
    [
        ([("a", "passed")], "every case passed"),
        ([("a", "passed"), ("b", "error")], "b is in error"),
    ],
)
def test_who_fails_no_case_survives(ends: Ends, why: str) -> None:
    trial = try_mutant(FIRST, runner=runner(ends, []))
    assert trial.survives
    assert trial.ending.startswith("SURVIVES: ")
    assert why in trial.reason


def test_who_cannot_be_judged_does_not_survive() -> None:
    """For want of a compiler, say: it tells nothing of the suite."""

    def run(options: Options, progress: object) -> RunRecord:
        raise SubjectUnavailable("there is no compiler.\nmore")

    trial = try_mutant(FIRST, runner=run)
    assert (trial.caught, trial.survives) == (False, False)
    assert trial.ending == "NOT JUDGED: there is no compiler."
    page = document([trial], [])
    assert "| not judged |" in page
    assert "0 of 1 mutants are caught. 1 could not be judged here." in page


def test_time_that_is_over_ends_a_run() -> None:
    def run(options: Options, progress: Any) -> RunRecord:
        progress.started("a")
        raise AssertionError("it went on")

    trial = try_mutant(FIRST, wall=-1.0, runner=run)
    assert trial.survives
    assert "not caught within" in trial.reason


@pytest.mark.parametrize(
    ("ends", "verdict", "why"),
    [
        ([("a", "passed")], "conformant", None),
        ([("a", "failed")], "failed", "1 cases fail, the first is a"),
        ([("a", "passed")], "incomplete", "why"),
    ],
)
def test_a_control_has_to_pass_everything(ends: Ends, verdict: str, why: str | None) -> None:
    seen: list[Options] = []
    found = try_control(FIRST, runner=runner(ends, seen, verdict=verdict))
    assert (found is None) if why is None else (found is not None and why in found)
    assert seen[0].profile == "full"
    assert not seen[0].exit_first


def test_all_are_tried_under_all_seeds_and_come_back_in_order() -> None:
    at_once, most, lock = [0], [0], threading.Lock()

    def attempt(mutant: Mutant, seed: int) -> Trial:
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        threading.Event().wait(0.01)
        with lock:
            at_once[0] -= 1
        return Trial(mutant, seed, "a", "", 1.0)

    told: list[Trial] = []
    trials = score.score(MUTANTS[:5], range(3), jobs=2, attempt=attempt, tell=told.append)
    wanted = [(mutant, seed) for mutant in MUTANTS[:5] for seed in range(3)]
    assert [(trial.mutant, trial.seed) for trial in trials] == wanted
    assert len(told) == 15
    assert most[0] == 2


@pytest.mark.parametrize(
    ("caught", "control", "code"), [("x", None, 0), ("", None, 1), ("x", "3 cases fail", 1)]
)
def test_the_exit_code_and_the_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    caught: str, control: str | None, code: int,
) -> None:  # fmt: skip
    def attempt(mutant: Mutant, seed: int, **how: object) -> Trial:
        return Trial(mutant, seed, caught if seed == 4 else "cases/test_b.py::y", "", 2.0)

    monkeypatch.setattr(score, "try_mutant", attempt)
    monkeypatch.setattr(score, "try_control", lambda found: control)
    monkeypatch.setattr(score, "fails_self_check", lambda found: found == FIRST)
    page, names = tmp_path / "page.md", [FIRST.name, SECOND.name]
    argv = ["--runs", "2", "--seed", "3", "--only", *names, "--write", str(page)]
    assert score.main(argv) == code
    printed = capsys.readouterr().out
    assert ("FAILS: 3 cases fail" in printed) == (control is not None)
    assert ("SURVIVES under seed 4" in printed) == (not caught)
    assert f"{2 if caught else 0} of 2 mutants are caught" in printed
    rows = [line for line in page.read_text().splitlines() if line.startswith("| `")]
    assert [FIRST.name in rows[0], SECOND.name in rows[1], len(rows)] == [True, True, 2]
    assert ("self-check" in rows[0], "self-check" in rows[1]) == (True, False)
    assert f"({2 if caught else 1} of 2)" in rows[0]


def test_a_survivor_is_loud_on_the_page() -> None:
    page = document([Trial(FIRST, 0, "", "every case passed", 1.0)], ())
    assert "**survives**" in page
    assert "**0 of 1 mutants are caught.**" in page


@pytest.mark.parametrize("argv", [["--only", "nobody"], ["--runs", "0"], ["--runs", "x"]])
def test_what_cannot_be_understood(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        score.main(argv)
    assert caught.value.code == 2
    assert argv[1] in capsys.readouterr().err


def test_the_suite_catches_one_from_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert score.main(["--no-control", "--only", "off-by-one-slot"]) == 0
    assert "1 of 1 mutants are caught" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--runs", "10", "--seed", "1", "--no-control"]])
def test_the_suite_catches_every_mutant(words: list[str]) -> None:
    assert score.main(words) == 0


def test_the_score_refuses_a_forced_backend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PORTAKV_BACKEND", "reference")
    with pytest.raises(SystemExit, match="2"):
        score.main(["--only", FIRST.name])
    assert "PORTAKV_BACKEND forces another backend" in capsys.readouterr().err


def test_an_interrupt_ends_every_run() -> None:
    """Ctrl-C ends the score: trials that wait do not begin, and those that run are told."""
    began = []

    def attempt(mutant: Mutant, seed: int) -> Trial:
        began.append(mutant)
        assert len(began) == 1 or INTERRUPTED.wait(20)
        return Trial(mutant, seed, "cases/x", "why", 0.0)

    def tell(trial: Trial) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score.score(MUTANTS[:9], [0], jobs=2, attempt=attempt, tell=tell)
    assert len(began) <= 3
    assert not INTERRUPTED.is_set()
