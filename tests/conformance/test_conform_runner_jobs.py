# SPDX-License-Identifier: Apache-2.0
"""Several workers at once: they share the cases, and one that is lost disturbs no other."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import pytest
import support.conform_fake_worker as fake
from support.conform_fake_worker import CLAIM, CORE
from support.conform_runs import Heard, ran, statuses, timeless

from portakv_conformance.cli import make_parser
from portakv_conformance.evidence.verdict import judge
from portakv_conformance.evidence.verify import check_report
from portakv_conformance.record import RunRecord
from portakv_conformance.run import workers as pool
from portakv_conformance.run.worker import Share
from portakv_conformance.run.workers import surroundings


def children() -> list[int]:
    """Processes that this one has started and that have not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if words[0] != "Z" and int(words[1]) == os.getpid():
            found.append(int(folder.name))
    return found


def test_a_case_is_taken_once(tmp_path: Path) -> None:
    mine, theirs = Share(tmp_path), Share(tmp_path)
    assert not theirs.taken("cases/a.py::test[x/y]")
    assert mine.take("cases/a.py::test[x/y]")
    assert theirs.taken("cases/a.py::test[x/y]")
    assert not theirs.take("cases/a.py::test[x/y]")
    assert theirs.take("cases/a.py::test[x]")
    mine.give_back("cases/a.py::test[x/y]")
    assert theirs.take("cases/a.py::test[x/y]")


def test_several_workers_share_the_cases() -> None:
    behaviours = {f"{CORE}{n}": "slow" for n in range(6)} | {CLAIM + "c": "not-claimed"}
    heard = Heard()
    record = ran(behaviours, heard, jobs=3)
    assert sorted(heard.ids) == sorted(behaviours), "each is run once"
    assert [case.id for case in record.cases] == list(behaviours), "in the order of the list"
    assert (record.verdict, record.missing, heard.sentences) == ("conformant", [], [])
    assert heard.count == len(heard.statuses) == 7
    workers = Counter(case.reason for case in record.cases if case.reason.startswith("by "))
    assert len(workers) == 3
    assert record.command.endswith("--seed 0 --jobs 3")
    assert "--jobs" not in record.cases[0].replay
    assert children() == []


def test_the_record_is_that_of_one_worker() -> None:
    behaviours = {CORE + "a": "pass", CORE + "b": "fail", CLAIM + "c": "not-claimed"}
    behaviours |= {CORE + "d": "error", CORE + "e": "pass"}
    assert timeless(ran(behaviours, jobs=2)) == timeless(ran(behaviours))


def test_no_more_workers_than_cases() -> None:
    began = time.monotonic()
    record = ran({CORE + "a": "slow"}, jobs=50)
    assert statuses(record) == {CORE + "a": "passed"}
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("how", ["crash", "abort", "exit", "hang", "leave"])
def test_a_worker_that_is_lost_disturbs_no_other(how: str) -> None:
    slow = [f"{CORE}{n}" for n in range(5)]
    heard = Heard()
    behaviours = {slow[0]: "slow", CORE + "bad": how} | dict.fromkeys(slow[1:], "slow")
    record = ran(behaviours, heard, jobs=2, limit=1.0)
    assert statuses(record) == {**dict.fromkeys(behaviours, "passed"), CORE + "bad": "failed"}
    assert [case.id for case in record.cases] == list(behaviours)
    assert "while this case ran" in record.cases[1].reason
    assert len(heard.sentences) == 1
    assert sorted(heard.ids) == sorted(behaviours), "no case is run again"


def test_every_worker_may_be_lost() -> None:
    behaviours = {f"{CORE}{n}": "crash" if n % 2 else "pass" for n in range(8)}
    record = ran(behaviours, jobs=3)
    assert list(statuses(record).values()) == ["passed", "failed"] * 4


def test_the_losses_of_all_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_MOST_LOSSES", 3)
    record = ran({f"{CORE}{n}": "crash" for n in range(8)}, jobs=2)
    counted = Counter(statuses(record).values())
    assert (counted["failed"], counted["error"]) == (3, 5)
    assert children() == []


def test_the_first_failure_stops_all() -> None:
    began = time.monotonic()
    behaviours = {CORE + "a": "hang", CORE + "b": "hang", CORE + "c": "fail", CORE + "d": "pass"}
    record = ran(behaviours, jobs=3, exit_first=True)
    assert time.monotonic() - began < 30
    assert statuses(record) == {CORE + "c": "failed"}
    assert record.missing == ["3 cases were behind the first failure and did not run (-x)."]
    assert children() == []


@pytest.mark.parametrize("how", ["unavailable", "exit"])
def test_a_worker_too_many(how: str) -> None:
    """There may be no room on the device for as many as were asked for."""
    heard = Heard()
    slow = {f"{CORE}{n}": "slow" for n in range(4)}
    record = ran({**slow, "2 start": how}, heard, jobs=2)
    assert statuses(record) == dict.fromkeys(slow, "passed")
    assert record.verdict == "conformant"
    (told,) = heard.sentences
    assert "before it was ready; the others go on" in told
    assert ("no such backend" in told) == (how == "unavailable")


def test_a_worker_that_cannot_be_replaced_is_an_error() -> None:
    """With nobody else there, it is not left out quietly."""
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
    behaviours = {f"{CORE}{n}": "pass" for n in range(3)}
    listed = {id: fake.about(id) for id in behaviours}

    def found(record: RunRecord) -> list[str]:
        record.seconds = 4.0
        for case in record.cases:
            case.seconds = 3.0
        judge(record)
        return check_report(record.document(), lambda profile, device: listed)

    assert found(ran(behaviours, jobs=3)) == []
    assert found(ran(behaviours)) == ["Its cases took 9.0 s, one after another, but the run 4.0 s."]
    assert found(ran(behaviours, jobs=2)) == []
    record = ran(behaviours, jobs=2)
    record.command = record.command.replace("--jobs 2", "--jobs 'many")
    assert any("does not say --device" in sentence for sentence in found(record))


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


def test_the_option() -> None:
    assert make_parser().parse_args(["x"]).jobs == 1
    assert make_parser().parse_args(["x", "--jobs", "7"]).jobs == 7
    for wrong in ("0", "-1", "many"):
        with pytest.raises(SystemExit):
            make_parser().parse_args(["x", "--jobs", wrong])
