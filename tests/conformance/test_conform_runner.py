# SPDX-License-Identifier: Apache-2.0
"""The runner against workers that crash, hang, print and leave: the run goes on and says so."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import support.conform_fake_worker as fake
from support.conform_fake_worker import CLAIM, CORE
from support.conform_runs import Heard, ran, statuses

from portakv_conformance.evidence.verdict import case_list_sha256
from portakv_conformance.run import workers
from portakv_conformance.run.runner import BadRequest, Options, SubjectUnavailable, SuiteBroken


def test_a_run_in_which_all_is_well() -> None:
    heard = Heard()
    record = ran({CORE + "a": "pass", CORE + "b": "pass", CLAIM + "c": "not-claimed"}, heard)
    assert (record.verdict, record.rung, record.missing) == ("conformant", "", [])
    assert record.totals == {
        "error": 0, "failed": 0, "waived": 0, "not-claimed": 1, "passed": 2,
    }  # fmt: skip
    assert [case.id for case in record.cases] == heard.ids == [CORE + "a", CORE + "b", CLAIM + "c"]
    assert record.case_list_sha256 == case_list_sha256([CLAIM + "c", CORE + "b", CORE + "a"])
    assert (heard.count, heard.sentences) == (3, [])
    assert heard.statuses == ["passed", "passed", "not-claimed"]
    assert record.backend == fake.SUBJECT["backend"]
    assert record.command == "portakv conform fake --device cpu --profile core --seed 0"


def test_what_is_printed_disturbs_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """`pass` prints lines that look like events."""
    assert statuses(ran({CORE + "a": "pass"})) == {CORE + "a": "passed"}
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("crash", "SIGSEGV"),
        ("abort", "SIGABRT"),
        ("exit", "exit code 7"),
        ("half a line", "SIGKILL"),
    ],
)
def test_a_case_that_takes_the_process_with_it_has_failed(how: str, told: str) -> None:
    heard = Heard()
    record = ran({CORE + "a": "pass", CORE + "b": how, CORE + "c": "pass"}, heard)
    assert statuses(record) == {CORE + "a": "passed", CORE + "b": "failed", CORE + "c": "passed"}
    lost = record.cases[1]
    assert told in lost.reason
    assert "while this case ran; another worker went on with the rest" in lost.reason
    assert (record.verdict, record.rung, record.totals["failed"]) == ("failed", "", 1)
    assert len(heard.sentences) == 1
    assert CORE + "b" in heard.sentences[0]
    assert lost.replay.endswith(f" --only {CORE}b")


def test_a_crash_leaves_its_stack() -> None:
    (case,) = ran({CORE + "a": "crash"}).cases
    assert "Fatal Python error: Segmentation fault" in case.details
    assert "in act" in case.details
    assert "another worker" not in case.reason


def test_what_a_lost_case_is_about_is_known() -> None:
    (case,) = ran({CLAIM + "a": "crash"}).cases
    assert (case.area, case.claim, case.profile) == ("claims", "guards", "core")


def test_a_crash_right_after_a_case_is_that_cases() -> None:
    record = ran({CORE + "a": "pass", CORE + "b": "crash later", CORE + "c": "pass"})
    assert statuses(record) == {CORE + "a": "passed", CORE + "b": "failed", CORE + "c": "passed"}
    assert "right after this case" in record.cases[1].reason


def test_a_case_that_hangs_is_ended_with_its_stacks() -> None:
    began = time.monotonic()
    record = ran({CORE + "a": "hang", CORE + "b": "pass"}, limit=0.3)
    assert time.monotonic() - began < 10
    assert statuses(record) == {CORE + "a": "failed", CORE + "b": "passed"}
    hung = record.cases[0]
    assert "longer than its limit of 0.3 s" in hung.reason
    assert "spin_for_ever" in hung.details


def test_a_session_that_ends_early_is_not_taken_for_the_end() -> None:
    record = ran({CORE + "a": "pass", CORE + "b": "leave", CORE + "c": "pass"})
    assert statuses(record) == {CORE + "a": "passed", CORE + "b": "failed", CORE + "c": "passed"}


def test_a_crash_behind_the_last_case_is_no_certificate() -> None:
    record = ran({CORE + "a": "pass", "finish": "crash"})
    assert statuses(record) == {CORE + "a": "passed"}
    assert (record.verdict, record.rung) == ("incomplete", "")
    assert "killed by SIGSEGV after the last case" in record.missing[0]


def test_a_worker_that_never_ends_is_no_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_ENDING", 0.2)
    record = ran({CORE + "a": "pass", "finish": "hang"})
    assert record.verdict == "incomplete"
    assert "did not end" in record.missing[0]


def test_a_backend_that_always_crashes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_MOST_LOSSES", 3)
    record = ran({f"{CORE}{n}": "crash" for n in range(6)})
    assert list(statuses(record).values()) == ["failed"] * 3 + ["error"] * 3
    assert record.cases[-1].reason == "It was not run: the worker had been lost 3 times in a row."
    assert record.verdict == "failed"


def test_losses_that_are_not_in_a_row_cost_their_cases_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers, "_MOST_LOSSES", 2)
    behaviours = {f"{CORE}{n}": "crash" if n % 3 == 0 else "pass" for n in range(12)}
    record = ran(behaviours)
    assert list(statuses(record).values()) == ["failed", "passed", "passed"] * 4


def test_losses_that_cost_too_much_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_MOST_SECONDS", 0.5)
    behaviours = {f"{CORE}{n}": "pass" if n % 3 else "hang" for n in range(9)}
    record = ran(behaviours, limit=0.3)
    assert record.totals["failed"] <= 2
    assert "lost workers had cost more than" in record.cases[-1].reason
    assert record.cases[-1].status == "error"


def test_a_worker_that_retires_costs_one_case() -> None:
    heard = Heard()
    record = ran({CORE + "a": "pass", CORE + "b": "retire", CORE + "c": "pass"}, heard)
    assert statuses(record) == {CORE + "a": "passed", CORE + "b": "failed", CORE + "c": "passed"}
    assert record.cases[1].reason == "It faulted."
    assert heard.sentences == [f"The device failed behind {CORE}b (an illegal access)."]


def test_children_of_a_worker_end_with_it() -> None:
    (case,) = ran({CORE + "a": "child"}, exit_first=True).cases
    assert fake.gone(int(case.reason.split()[-1]))


def test_the_first_failure_can_be_the_end() -> None:
    heard = Heard()
    record = ran(
        {CORE + "a": "fail", CORE + "b": "hang", CORE + "c": "pass"}, heard, exit_first=True
    )
    assert statuses(record) == {CORE + "a": "failed"}
    assert record.verdict == "failed"
    assert record.missing == ["2 cases were behind the first failure and did not run (-x)."]


@pytest.mark.parametrize("how", ["crash", "hang"])
def test_a_lost_case_is_a_first_failure_too(how: str) -> None:
    record = ran({CORE + "a": how, CORE + "b": "pass"}, exit_first=True, limit=0.3)
    assert statuses(record) == {CORE + "a": "failed"}


def test_only_some_cases_are_no_profile() -> None:
    behaviours = {CORE + "a": "pass", CORE + "b": "fail"}
    record = ran(behaviours, only=(CORE + "a",))
    assert statuses(record) == {CORE + "a": "passed"}
    assert record.verdict == "incomplete"
    assert "--only" in record.missing[0]


def test_an_id_that_no_case_has_is_a_bad_request() -> None:
    with pytest.raises(BadRequest, match="'nothing'"):
        ran({CORE + "a": "pass"}, only=("nothing",))
    with pytest.raises(BadRequest, match="are not in profile"):  # as pytest's own usage error
        ran({"collect": "usage"}, only=("nothing",))


def test_a_backend_that_is_not_available_is_an_error_with_the_reason() -> None:
    with pytest.raises(SubjectUnavailable, match="no such backend; known are x"):
        ran({"start": "unavailable"})


def test_a_probe_that_crashes_is_a_backend_that_is_not_available() -> None:
    with pytest.raises(SubjectUnavailable, match="SIGSEGV while the backend was loaded"):
        ran({"start": "crash"})


def test_a_suite_that_cannot_be_loaded_is_broken() -> None:
    """The backend is not to blame for an installation without torch."""
    with pytest.raises(SuiteBroken, match="exit code 7 before it loaded anything"):
        ran({"load": "exit"})


def test_a_suite_that_cannot_be_collected_is_broken() -> None:
    with pytest.raises(SuiteBroken, match="SIGSEGV before the cases were collected"):
        ran({"collect": "crash"})


def test_a_fuzzed_case_may_take_longer() -> None:
    assert Options("x").seconds == 120
    assert Options("x", fuzz=10_000).seconds > 1000
    assert Options("x", fuzz=10_000, limit=5).seconds == 5


def test_the_command_tells_how_the_kernel_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    options = Options("triton", fuzz=7, seed=3, emulated=True, device="npu")
    assert options.command("cases/test_core.py::test_a[x y]") == (
        "TRITON_INTERPRET=1 portakv conform triton --device npu --profile core --seed 3 --fuzz 7 "
        "--emulated --only 'cases/test_core.py::test_a[x y]'"
    )


def test_a_worker_ends_when_its_runner_is_killed() -> None:
    """A device must not stay occupied by the worker of a runner that is gone."""
    code = (
        "import sys, support.conform_fake_worker as fake\n"
        "from portakv_conformance.run.runner import Options, run\n"
        "from support.conform_runs import Telling\n"
        "run(Options('fake'), Telling(), command=(sys.executable, '-c', "
        "'import os, sys, time; from pathlib import Path; "
        "from portakv_conformance.run import worker; "
        "orders = worker.Orders.read(Path(sys.argv[1])); worker._end_with(orders.runner); "
        "import support.conform_fake_worker as fake; fake.tell(orders, fake.SUBJECT); "
        'fake.tell(orders, dict(event="list", ids=["a"])); '
        'fake.tell(orders, dict(event="start", id=str(os.getpid()))); time.sleep(600)\'))\n'
    )
    here = os.path.dirname(os.path.dirname(__file__))
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=here,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([here, *filter(None, sys.path)])},
    )  # fmt: skip
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    assert fake.gone(worker)


def test_a_run_of_another_thread_can_be_interrupted() -> None:
    workers.INTERRUPTED.set()
    try:
        with pytest.raises(KeyboardInterrupt):
            ran({CORE + "a": "hang"})
    finally:
        workers.INTERRUPTED.clear()
