# SPDX-License-Identifier: Apache-2.0
"""Work that an interrupt does not cut in two: its result, its error, and how it is undone."""

from __future__ import annotations

import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from support import ready
from support.interrupts import settles
from support.waits import LIMIT

from portakv.runtime import interrupts
from portakv.runtime.interrupts import Condition, abandoned, uninterrupted

LINES = 40  # of the module, at most, that a caller runs


def test_uninterrupted_work_runs_in_a_helper_and_returns() -> None:
    main = threading.get_ident()
    assert uninterrupted(threading.get_ident) != main
    assert uninterrupted(abandoned) is False
    with pytest.raises(ZeroDivisionError):
        uninterrupted(lambda: 1 // 0)


def test_another_thread_that_no_signal_interrupts_runs_work_itself() -> None:
    results = list[bool]()
    thread = threading.Thread(
        target=lambda: results.append(uninterrupted(threading.get_ident) == threading.get_ident())
    )
    thread.start()
    thread.join()
    assert results == [True]


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_undoes_the_result_and_ends_long_work() -> None:
    undone = list[int]()
    main = threading.main_thread().ident or 0

    def work() -> int:
        signal.pthread_kill(main, signal.SIGINT)
        assert settles(abandoned)
        return 7

    with pytest.raises(KeyboardInterrupt):
        uninterrupted(work, undone.append)
    assert undone == [7], "the caller waits for it"
    assert uninterrupted(lambda: 8) == 8


def test_an_interrupt_at_any_line_of_the_caller_undoes_or_never_begins() -> None:
    """Whatever line it is, as many results were undone as there were, and nothing retains the work:
    neither does a helper that is never woken."""
    file = str(Path(interrupts.__file__))
    raised = 0
    for at in range(LINES):
        made = list[int]()
        undone = list[int]()
        left = at

        def work() -> int:
            made.append(at)  # noqa: B023
            return at  # noqa: B023

        def line(frame: FrameType, event: str, arg: Any) -> Any:
            nonlocal left
            if event == "line":
                left -= 1
                if left == -1:
                    raise KeyboardInterrupt
            return line

        def call(frame: FrameType, event: str, arg: Any) -> Any:
            return line if frame.f_code.co_filename == file else None

        before = sys.gettrace()
        sys.settrace(call)
        try:
            uninterrupted(work, undone.append)
        except KeyboardInterrupt:
            raised += 1
            assert settles(lambda: len(undone) == len(made)), at  # noqa: B023
        finally:
            sys.settrace(before)
        held = weakref.ref(work)
        del work
        assert settles(lambda: held() is None), at  # noqa: B023
    assert 0 < raised < LINES


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_interrupt_ends_the_wait_for_long_work() -> None:
    go = threading.Event()
    undone = list[bool]()
    main = threading.main_thread().ident or 0

    def work() -> bool:
        signal.pthread_kill(main, signal.SIGINT)
        assert settles(abandoned)
        return go.wait(LIMIT)

    with pytest.raises(KeyboardInterrupt):
        uninterrupted(work, undone.append)
    assert undone == []
    assert uninterrupted(lambda: 5) == 5, "another helper serves"
    go.set()
    assert settles(lambda: undone == [True])


def in_child(work: Callable[[], bool]) -> bool:
    """Return ``work()``, run in a forked process."""
    child = os.fork()
    if not child:
        code = 1
        try:
            code = int(not work())
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_interrupts_in_a_forked_process_have_helpers_of_their_own() -> None:
    uninterrupted(int)
    assert in_child(lambda: uninterrupted(lambda: 3) == 3)


def test_uninterrupted_work_runs_here_if_the_system_gives_no_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    # A forked process has no helper yet.
    assert in_child(lambda: uninterrupted(threading.get_ident) == threading.get_ident())


_HAMMER = """
import random, signal, sys, threading, time
from portakv.runtime.interrupts import Condition
change = {"ours": Condition, "python's": threading.Condition}[sys.argv[1]](threading.Lock())
armed = False
def interrupt(*_):
    if armed:
        raise KeyboardInterrupt
signal.signal(signal.SIGALRM, interrupt)
random.seed(1)
came = locked = 0
end = time.monotonic() + 20
while came < 2000 and time.monotonic() < end:
    try:
        armed = True
        signal.setitimer(signal.ITIMER_REAL, 1e-5 + 2e-4 * random.random())
        while True:
            with change:
                pass
    except KeyboardInterrupt:
        armed = False
        came += 1
    locked += not change.acquire(blocking=False)
    change.release()
assert came > 100, came
print(locked)
"""


@pytest.mark.parametrize("whose", ["ours", "python's"])
def test_an_interrupt_leaves_no_condition_locked(whose: str) -> None:
    """Python's own is the negative control."""
    done = ready.run("-c", _HAMMER, whose)
    assert done.returncode == 0, done.stderr
    assert (int(done.stdout) == 0) is (whose == "ours")


def test_a_condition_wakes_who_waits() -> None:
    change = Condition()
    seen = list[bool]()

    def wait() -> None:
        with change:
            seen.append(change.wait(LIMIT))

    thread = threading.Thread(target=wait)
    thread.start()
    while thread.is_alive():
        with change:
            change.notify_all()
        thread.join(1e-3)
    assert seen == [True]
