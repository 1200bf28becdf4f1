# SPDX-License-Identifier: Apache-2.0
"""The mutants: each is a backend with one bug, and their base has none. The score: which are
caught, which survive, and what the exit code says of it."""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from support.conform_reports import passing
from support.waits import LIMIT

from portakv import KVView
from portakv_conformance.cases import Bench, test_claims, test_lies
from portakv_conformance.draw.arrangement import Case
from portakv_conformance.draw.strategies import all_cases
from portakv_conformance.judge.device_support import Facility
from portakv_conformance.judge.judging import Judge
from portakv_conformance.judge.subject import subject
from portakv_conformance.mutants import CONTROLS, MUTANTS, Mutant, score
from portakv_conformance.mutants.base import IllegalAddress, load, store
from portakv_conformance.mutants.score import Trial, try_control, try_mutant
from portakv_conformance.record import CaseRecord, RunRecord
from portakv_conformance.run.runner import Options, SubjectUnavailable
from portakv_conformance.run.workers import INTERRUPTED

FIRST, SECOND = MUTANTS[:2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_a_small_backend_with_a_sentence(mutant: Mutant) -> None:
    assert getattr(import_module(mutant.__module__), mutant.__name__) is mutant
    assert re.fullmatch(r"[A-Z].*\.", mutant.bug())
    # Of the function, if `mutate` has made a class of one: Python 3.13 has no source of the class.
    written = vars(mutant).get("__wrapped__", mutant)
    assert len(inspect.getsource(written).splitlines()) <= 30
    assert mutant.profile in ("core", "full")
    decision = mutant.probe(torch.device("meta"))
    assert not decision.accepted
    assert mutant.device_type in ("cpu", "simdev")
    assert mutant.device_type in decision.reason


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(all_cases())
@pytest.mark.usefixtures("own_registry")
def test_the_unmutated_base_is_right(case: Case) -> None:
    """The bug of a mutant is the one that its class adds; the suite catches each of them."""
    base = subject("portakv_conformance.mutants.base:HostRows", "cpu")
    assert Judge(base, Facility(torch.device("cpu")), 7).copy(case)


THREADS = {
    "claims": lambda bench: test_claims.test_threads(bench),
    "lies": lambda bench: test_lies.test_each_thread_gets_its_own_copy(bench, "gather"),
}


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize("case", THREADS.values(), ids=THREADS)
def test_launches_that_share_their_arguments_fail_each_case_of_threads(
    case: Callable[[Bench], None],
) -> None:
    """A call whose rows another thread moved in its place is not made good by a later call."""

    def bench(target: str) -> Bench:
        judged = subject(f"portakv_conformance.mutants.{target}", "cpu")
        return Bench("cpu", 5, judge=Judge(judged, Facility(torch.device("cpu")), 5))

    case(bench("base:HostRows"))
    with pytest.raises(AssertionError, match="4 threads together"):
        case(bench("claims:ClaimsThreads"))


def test_the_self_check_turns_some_down() -> None:
    by_name = {mutant.name: mutant for mutant in MUTANTS}
    assert not score.fails_self_check(CONTROLS[0])
    for name in ("off-by-one-slot", "swapped-layers", "tail-overrun"):
        assert score.fails_self_check(by_name[name]), name


def test_memory_ends_where_the_buffers_end() -> None:
    tensor = torch.arange(64, dtype=torch.uint8)
    view = KVView(tensor.view(4, 16), "token dim")
    base = np.array([tensor.data_ptr()], dtype=np.int64)
    assert load(view, base + 48, 16, 16).tobytes() == bytes(range(48, 64))
    store(view, base + 2, np.array([[7, 8]], dtype=np.uint8))
    assert tensor[:5].tolist() == [0, 1, 7, 8, 4]
    # Where accesses are 8 bytes wide the low bits of an address are lost.
    assert load(view, base + 21, 8, 8).tobytes() == bytes(range(16, 24))
    for at in (-1, 57, 2**40):
        with pytest.raises(IllegalAddress, match="Expected runs inside the buffers"):
            load(view, base + at, 8, 1)


def test_the_list_has_every_mutant_with_its_own_bug(capsys: pytest.CaptureFixture[str]) -> None:
    assert score.main(["--list"]) == 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("- ")]
    assert lines == [f"- {mutant.name}: {mutant.bug()}" for mutant in MUTANTS]
    for unlike in ({mutant.name for mutant in MUTANTS}, {mutant.bug() for mutant in MUTANTS}):
        assert len(unlike) == len(MUTANTS) >= 117
    assert FIRST.target() in printed


# -- the score -------------------------------------------------------------------------------------


def runner(ends: str, seen: list[Options], verdict: str = "failed") -> Callable[..., RunRecord]:
    """Return a run of the suite, whose cases a, b, ... end with the statuses in `ends`."""

    def run(options: Options, progress: object = None) -> RunRecord:
        seen.append(options)
        cases = [
            CaseRecord(id, "core", "core", status=status, reason=f"{id} is {status}")  # type: ignore[arg-type]
            for id, status in zip("abcd", ends.split(), strict=False)
        ]
        return replace(passing(), cases=cases, verdict=verdict, missing=["why"])

    return run


def stopped(options: Options, progress: Any) -> RunRecord:
    progress.started("a")
    raise AssertionError("it went on")


def without_a_compiler(options: Options, progress: Any) -> RunRecord:
    """Raise the error of a run that never began, which says nothing about the suite."""
    raise SubjectUnavailable("there is no compiler.\nmore")


@pytest.mark.parametrize(("ends", "ending", "row"), [
    ("passed not-claimed failed failed", "caught by c", "`c`"),
    ("passed", "SURVIVES: every case passed", "**survives**"),
    ("passed error", "SURVIVES: b is in error: b is error", "**survives**"),
    (stopped, "SURVIVES: it was not caught within -1 s", "**survives**"),
    (without_a_compiler, "NOT JUDGED: there is no compiler.", "not judged"),
])  # fmt: skip
def test_the_first_case_that_fails_catches(
    ends: Any, ending: str, row: str, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Options] = []
    run = runner(ends, seen) if isinstance(ends, str) else ends
    trial = try_mutant(SECOND, 7, most_seconds=-1.0 if ends is stopped else 60.0, runner=run)
    assert trial.ending == ending
    score.print_score([trial], (), {})
    printed = capsys.readouterr().out
    assert row in printed
    unjudged = " 1 could not be judged here." if row == "not judged" else ""
    assert f"{int(bool(trial.caught_by))} of 1 mutants are caught.{unjudged}\n" in printed
    for options in seen:
        assert (options.backend, options.device) == (SECOND.target(), SECOND.device_type)
        assert (options.profile, options.seed, options.exit_first) == (
            SECOND.profile,
            7,
            True,
        )


@pytest.mark.parametrize(
    ("ends", "verdict", "why"),
    [
        ("passed", "conformant", None),
        ("failed", "failed", "1 cases fail, the first is a"),
        ("passed", "incomplete", "why"),
    ],
)
def test_a_control_has_to_pass_everything(ends: str, verdict: str, why: str | None) -> None:
    seen: list[Options] = []
    result = try_control(FIRST, runner=runner(ends, seen, verdict))
    assert (why or "None") in str(result)
    assert (seen[0].profile, seen[0].exit_first) == ("full", False)


def test_all_are_tried_under_all_seeds_and_come_back_in_order() -> None:
    two = threading.Barrier(2)

    def attempt(mutant: Mutant, seed: int) -> Trial:
        two.wait(LIMIT)
        return Trial(mutant, seed, "a", "", 1.0)

    reports: list[Trial] = []
    trials = score.score(MUTANTS[:2], range(3), jobs=2, attempt=attempt, tell=reports.append)
    wanted = [(mutant, seed) for mutant in MUTANTS[:2] for seed in range(3)]
    assert [(trial.mutant, trial.seed) for trial in trials] == wanted
    assert len(reports) == len(trials)


@pytest.mark.parametrize(
    ("caught", "control", "code"), [("x", None, 0), ("", None, 1), ("x", "3 cases fail", 1)]
)
def test_the_exit_code_and_the_table(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caught: str,
    control: str | None,
    code: int,
) -> None:
    def attempt(mutant: Mutant, seed: int, **how: object) -> Trial:
        return Trial(mutant, seed, caught if seed == 4 else "cases/test_b.py::y", "", 2.0)

    monkeypatch.setattr(score, "try_mutant", attempt)
    monkeypatch.setattr(score, "try_control", lambda result: control)
    monkeypatch.setattr(score, "fails_self_check", lambda result: result == FIRST)
    words = f"--runs 2 --seed 3 --only {FIRST.name} {SECOND.name}"
    assert score.main(words.split()) == code
    printed = capsys.readouterr().out
    assert ("FAILS: 3 cases fail" in printed) == (control is not None)
    assert ("SURVIVES under seed 4" in printed) == (not caught)
    assert f"{2 if caught else 0} of 2 mutants are caught" in printed
    flat = " ".join(printed.split())
    assert flat.index(FIRST.name) < flat.index(SECOND.name)
    assert flat.count("self-check too") == 1
    assert f"({2 if caught else 1} of 2)" in flat


@pytest.mark.parametrize(("words", "forced", "expected"), [
    ("--only unknown", "", "unknown"), ("--runs 0", "", "0"), ("--runs x", "", "x"),
    (f"--only {FIRST.name}", "reference", "PORTAKV_BACKEND forces another backend"),
])  # fmt: skip
def test_what_cannot_be_understood(
    words: str,
    forced: str,
    expected: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PORTAKV_BACKEND", forced)
    with pytest.raises(SystemExit, match="2"):
        score.main(words.split())
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "--no-control --only off-by-one-slot",
        pytest.param("", marks=pytest.mark.slow),
        pytest.param("--runs 2 --seed 1 --no-control", marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(3600)  # each mutant takes 8 s of a core
def test_the_suite_catches_mutants(words: str) -> None:
    assert score.main(words.split()) == 0


def test_an_interrupt_ends_every_run() -> None:
    """Ctrl-C ends the score: trials that wait do not begin, and those that run are stopped."""
    began = []

    def attempt(mutant: Mutant, seed: int) -> Trial:
        began.append(mutant)
        assert mutant is MUTANTS[0] or INTERRUPTED.wait(LIMIT)
        return Trial(mutant, seed, "cases/x", "why", 0.0)

    def tell(trial: Trial) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score.score(MUTANTS[:9], [0], jobs=2, attempt=attempt, tell=tell)
    assert len(began) <= 3
    assert not INTERRUPTED.is_set()
