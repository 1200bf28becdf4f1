# SPDX-License-Identifier: Apache-2.0
"""The runner against workers that crash, hang, print and leave, one or several at a time: the run
goes on and says so. A device that fails for good is not reported as a failed case."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import support.conform_fake_worker as fake
import torch
from support import conform_reports
from support.conform_fake_worker import CLAIM, CORE
from support.conform_reports import changed, refusals
from support.conform_runs import RecordingProgress, environment, ran, statuses
from support.waits import LIMIT

from portakv_conformance.evidence.verdict import case_list_sha256
from portakv_conformance.judge.device_support import Facility
from portakv_conformance.judge.subject import Subject, subject
from portakv_conformance.run import workers
from portakv_conformance.run.plugin import DeviceAlive
from portakv_conformance.run.request import chosen
from portakv_conformance.run.runner import BadRequest, Options, SubjectUnavailable, SuiteBroken
from portakv_conformance.run.worker import append
from portakv_conformance.run.workers import surroundings


def children(process: int | str = "self") -> set[int]:
    """Return the running children of a process, by default this one."""
    threads = Path(f"/proc/{process}/task").glob("*/children")
    return {int(child) for thread in threads for child in thread.read_text().split()}


@pytest.fixture
def no_worker_stays() -> Iterator[None]:
    """After the test, no child runs that this process did not have before. Other tests of this
    process may have left one, such as the tracker of multiprocessing's shared memory."""
    before = children()
    yield
    assert children() <= before


# -- what is requested ----------------------------------------------------------------------------

IDS = [
    "cases/test_core.py::test_one_row[gather-1]",
    "cases/test_core.py::test_one_row[scatter-1]",
    "cases/test_core.py::test_one_row_more",
    "cases/test_corners.py::test_row_width[3]",
]


@pytest.mark.parametrize(("words", "result"), [
    (IDS[1], IDS[1:2]),
    ("test_core.py::test_one_row[scatter-1]", IDS[1:2]),
    ("cases/test_core.py::test_one_row", IDS[:2]),
    ("test_core::test_one_row", IDS[:2]),
    ("test_core.py", IDS[:3]),
    ("test_corners", IDS[3:]),
    ("test_core.py::test_one_row_m", IDS[2:3]),
    ("cases/test_core.py::test_one_row[sc", IDS[1:2]),
    ("test_core::test_one", IDS[:3]),
    ("test_cor", IDS),
    *((word, []) for word in ("", "core", "test_one_row", "test_core[1]")),
    (f"{IDS[3]} test_core {IDS[0]}", IDS),  # in the list's order, and nothing twice
])  # fmt: skip
def test_a_beginning_names_all_that_begin_so(words: str, result: list[str]) -> None:
    parts = words.split(" ")
    assert chosen(IDS, parts) == (result, [] if result else parts)


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


# -- one worker -----------------------------------------------------------------------------------


def test_a_run_in_which_all_is_well(capfd: pytest.CaptureFixture[str]) -> None:
    """Output of workers, with lines that look like events, disturbs nothing."""
    progress = RecordingProgress()
    record = ran({CORE + "a": "pass", CORE + "b": "pass", CLAIM + "c": "not-claimed"}, progress)
    assert (record.verdict, record.rung, record.missing) == ("conformant", "", [])
    assert (
        [case.id for case in record.cases] == progress.ids == [CORE + "a", CORE + "b", CLAIM + "c"]
    )
    assert record.case_list_sha256 == case_list_sha256([CLAIM + "c", CORE + "b", CORE + "a"])
    assert (progress.count, progress.sentences) == (3, [])
    assert progress.statuses == ["passed", "passed", "not-claimed"]
    assert record.backend == fake.SUBJECT["backend"]
    assert record.command == "portakv conform fake --device cpu --profile core --seed 0"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("how", "expected"), [
    ("crash", "SIGSEGV while this case ran; another worker went on with the rest"),
    ("abort", "SIGABRT while this case ran"),
    ("exit", "exit code 7 while this case ran"),
    ("half a line", "SIGKILL (perhaps by the system, for want of memory) while this case ran"),
    ("crash later", "SIGSEGV right after this case"),
    ("leave", "exit code 0 while this case ran"),
    ("retire", "It faulted."),  # the device, and the worker says so
])  # fmt: skip
def test_a_case_that_takes_the_process_with_it_has_failed(how: str, expected: str) -> None:
    progress = RecordingProgress()
    record = ran({CORE + "a": "pass", CORE + "b": how, CORE + "c": "pass"}, progress)
    assert statuses(record) == {CORE + "a": "passed", CORE + "b": "failed", CORE + "c": "passed"}
    lost = record.cases[1]
    assert expected in lost.reason
    assert (record.verdict, record.rung, record.totals["failed"]) == ("failed", "", 1)
    (sentence,) = progress.sentences
    assert CORE + "b" in sentence
    assert ("The device failed after" in sentence) == (how == "retire")
    assert lost.replay.endswith(f" --only {CORE}b")


@pytest.mark.parametrize(
    ("how", "expected"),
    [("crash", "killed by SIGSEGV after the last case"), ("hang", "did not end")],
)
def test_a_worker_that_does_not_end_well_is_no_certificate(
    how: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "ENDING", 0.2)
    record = ran({CORE + "a": "pass", "finish": how})
    assert statuses(record) == {CORE + "a": "passed"}
    assert (record.verdict, record.rung) == ("incomplete", "")
    assert expected in record.missing[0]


@pytest.mark.usefixtures("no_worker_stays")
@pytest.mark.parametrize("jobs", [1, 2])
def test_one_that_always_crashes_is_given_up(jobs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "MOST_LOSSES", 3)
    record = ran({f"{CORE}{n}": "crash" for n in range(6)}, jobs=jobs)
    ended = [*statuses(record).values()]
    assert {*ended} == {"error", "failed"}
    # Each other worker may lose a case in the moment in which the run is given up.
    assert 3 <= ended.count("failed") < 3 + jobs
    assert record.cases[-1].reason == "It was not run: the worker had been lost 3 times in a row."
    assert record.verdict == "failed"


@pytest.mark.parametrize("jobs", [1, 3])
def test_losses_not_in_a_row_cost_their_cases(jobs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "MOST_LOSSES", 2 * jobs)
    behaviours = {f"{CORE}{n}": "crash" if n % 3 == 0 else "pass" for n in range(12)}
    result = statuses(ran(behaviours, jobs=jobs))
    assert list(result.values()) == ["failed", "passed", "passed"] * 4


def test_losses_that_cost_too_much_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "MOST_SECONDS", 0.5)
    behaviours = {f"{CORE}{n}": "pass" if n % 3 else "hang" for n in range(9)}
    record = ran(behaviours, limit=0.3)
    assert record.totals["failed"] <= 2
    assert "lost workers had cost more than" in record.cases[-1].reason
    assert record.cases[-1].status == "error"


def test_children_of_a_worker_end_with_it() -> None:
    (case,) = ran({CORE + "a": "child"}, exit_first=True).cases
    assert fake.gone(int(case.reason.split()[-1]))


@pytest.mark.parametrize("how", ["fail", "crash", "hang"])
def test_the_first_failure_can_be_the_end(how: str) -> None:
    behaviours = {CORE + "a": how, CORE + "b": "hang", CORE + "c": "pass"}
    record = ran(behaviours, exit_first=True, limit=0.3)
    assert (record.verdict, statuses(record)) == ("failed", {CORE + "a": "failed"})
    assert record.missing == ["2 cases were after the first failure and did not run (-x)."]


@pytest.mark.parametrize(("behaviours", "error", "why"), [
    ({CORE + "a": "pass"}, BadRequest, "'nothing'"),
    ({"start": "unavailable"}, SubjectUnavailable, "no such backend; known are x"),
    ({"start": "crash"}, SubjectUnavailable, "SIGSEGV while the backend was loaded"),
    # The backend is not to blame for an installation without torch.
    ({"load": "exit"}, SuiteBroken, "exit code 7 before it loaded anything"),
    ({"collect": "crash"}, SuiteBroken, "SIGSEGV before the cases were collected"),
])  # fmt: skip
def test_nothing_to_be_judged(behaviours: dict[str, str], error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        ran(behaviours, only=("nothing",))


def test_a_worker_ends_when_its_runner_is_killed() -> None:
    """A device must not stay occupied by the worker of a runner that is gone."""
    code = (
        "from support.conform_runs import RecordingProgress, ran\n"
        "RecordingProgress.started = lambda self, id: print(id, flush=True)\n"
        "ran({'a': 'hang'}, RecordingProgress())"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        (worker,) = children(parent.pid)
        parent.kill()
    assert fake.gone(worker)


def test_a_run_of_another_thread_can_be_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted = threading.Event()
    interrupted.set()
    monkeypatch.setattr(workers, "INTERRUPTED", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ran({CORE + "a": "hang"})


# -- several workers ------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_worker_stays")
def test_several_workers_share_the_cases(tmp_path: Path) -> None:
    """Each of three workers runs a case, since none ends before three have begun one."""
    behaviours = {f"{CORE}{n}": f"meet 3 {tmp_path}" for n in range(6)}
    behaviours[CLAIM + "c"] = "not-claimed"
    progress = RecordingProgress()
    record = ran(behaviours, progress, jobs=3)
    assert sorted(progress.ids) == sorted(behaviours), "each is run once"
    assert [case.id for case in record.cases] == list(behaviours), "in the order of the list"
    assert (record.verdict, record.missing, progress.sentences) == ("conformant", [], [])
    assert progress.count == len(progress.statuses) == 7
    assert len(Counter(c.reason for c in record.cases if c.reason.startswith("by "))) == 3
    assert record.command.endswith("--seed 0 --jobs 3")
    assert "--jobs" not in record.cases[0].replay


@pytest.mark.parametrize("how", ["crash", "hang", "leave"])
def test_a_worker_that_is_lost_disturbs_no_other(how: str) -> None:
    others = [f"{CORE}{n}" for n in range(5)]
    progress = RecordingProgress()
    behaviours = {others[0]: "pass", CORE + "bad": how} | dict.fromkeys(others[1:], "pass")
    limit = 10.0 if how == "hang" else LIMIT  # of a case; one that passes takes no second
    record = ran(behaviours, progress, jobs=2, limit=limit)
    wanted = {**dict.fromkeys(behaviours, "passed"), CORE + "bad": "failed"}
    assert list(statuses(record).items()) == list(wanted.items())
    assert "while this case ran" in record.cases[1].reason
    assert len(progress.sentences) == 1
    assert sorted(progress.ids) == sorted(behaviours), "no case is run again"


@pytest.mark.usefixtures("no_worker_stays")
def test_the_first_failure_stops_all() -> None:
    behaviours = {CORE + "a": "hang", CORE + "b": "hang", CORE + "c": "fail", CORE + "d": "pass"}
    assert statuses(ran(behaviours, jobs=3, exit_first=True)) == {CORE + "c": "failed"}


@pytest.mark.parametrize("how", ["unavailable", "exit"])
def test_a_worker_too_many(how: str, tmp_path: Path) -> None:
    """The cases of the first worker end after the run has said what became of the second."""
    said = tmp_path / "said"

    class Said(RecordingProgress):
        def say(self, sentence: str) -> None:
            super().say(sentence)
            said.touch()

    progress = Said()
    cases = {f"{CORE}{n}": f"await {said}" for n in range(4)}
    record = ran({**cases, "2 start": how}, progress, jobs=2, limit=LIMIT)
    assert statuses(record) == dict.fromkeys(cases, "passed")
    assert record.verdict == "conformant"
    (sentence,) = progress.sentences
    assert "before it was ready; the others go on" in sentence
    assert ("no such backend" in sentence) == (how == "unavailable")


def test_a_worker_that_cannot_be_replaced_is_an_error() -> None:
    """The only worker is not left out quietly."""
    cases = {CORE + "a": "crash", CORE + "b": "pass", CORE + "c": "pass"}
    record = ran({**cases, "2 start": "unavailable"})
    assert list(statuses(record).values()) == ["failed", "error", "passed"]
    assert "which others could (no such backend" in record.cases[1].reason
    assert record.verdict == "failed"


def test_a_case_that_was_taken_and_never_begun_is_run() -> None:
    """A worker may die between the two."""
    record = ran({CORE + "a": "pass", "take": CORE + "b", CORE + "b": "pass"})
    assert statuses(record) == {CORE + "a": "passed", CORE + "b": "passed"}


def test_a_report_of_several_workers_stands() -> None:
    """Its cases take longer, one after another, than the run did."""
    run = conform_reports.passing()
    run = changed(run, seconds=sum(case.seconds for case in run.cases) / 2)
    assert "s, one after another, but the run" in refusals(run)
    assert "but the run" not in refusals(changed(run, command=f"{run.command} --jobs 3"))
    assert "does not say --device" in refusals(changed(run, command=f"{run.command} --jobs 'many"))


def test_several_workers_do_not_fight_for_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(16))
    assert surroundings(1) == {}
    assert surroundings(4)["OMP_NUM_THREADS"] == "4"
    assert surroundings(16)["OMP_NUM_THREADS"] == "2"
    assert surroundings(2)["TORCHINDUCTOR_COMPILE_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    assert "OMP_NUM_THREADS" not in surroundings(4), "what the user set stands"


# -- a device that fails for good ---------------------------------------------------------------


class Card(Facility):
    """A CPU with streams, whose faults come when somebody waits."""

    streams = True
    faults = 0

    def synchronize(self) -> None:
        if self.faults:
            self.faults -= 1
            raise RuntimeError("an illegal memory access was encountered\nand more")


FAULT = "RuntimeError: an illegal memory access was encountered"


@pytest.mark.parametrize(("faults", "expected"), [(0, ""), (1, ""), (1000, FAULT)])
def test_a_fault_that_is_delivered_once_is_the_case_s(faults: int, expected: str) -> None:
    card = Card(torch.device("cpu"))
    card.faults = faults
    assert DeviceAlive(subject("reference"), card).lost() == expected


@pytest.mark.parametrize("worked", [True, False])
def test_a_backend_that_raises_for_good(worked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend's driver has lost its context, though torch has not. A backend that never worked
    is judged on: else each of its failures would cost a process."""

    def copy(*arguments: object, **named: object) -> None:
        raise RuntimeError("no more")

    alive = DeviceAlive(subject("reference"), Card(torch.device("cpu")))
    if worked:
        alive.learn()
    monkeypatch.setattr(Subject, "copy", copy)
    alive.learn()
    assert alive.lost() == ("RuntimeError: no more" if worked else "")
    on_host = DeviceAlive(subject("reference"), Facility(torch.device("cpu")))
    on_host.learn()
    assert on_host.lost() == ""


def test_an_event_holds_any_text(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    append(str(file), {"reason": "driver reported \udcff", "cases": [{"a\ud800": ("x", 1, None)}]})
    event = json.loads(file.read_text(encoding="utf-8"))
    assert event == {
        "reason": "driver reported \\udcff",
        "cases": [{"a\\ud800": ["x", 1, None]}],
    }
    json.dumps(event, ensure_ascii=False).encode("utf-8")
