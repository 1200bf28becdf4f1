# SPDX-License-Identifier: Apache-2.0
"""The crew: every call made once, by several threads, and none under way once `wait` has ended."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from portakv.host.engines._crew import MOST, Batch

THREADS = 4


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


class Slow:
    """Calls that take a while; which are under way, and who made how many."""

    def __init__(self, seconds: float = 0.01) -> None:
        self._seconds = seconds
        self.begun: list[int] = []
        self.ended: list[int] = []

    def __call__(self) -> None:
        self.begun.append(threading.get_ident())
        try:
            time.sleep(self._seconds)
        finally:
            self.ended.append(threading.get_ident())

    @property
    def under_way(self) -> int:
        return len(self.begun) - len(self.ended)


def test_every_call_is_made_once() -> None:
    made: list[int] = []
    for number in (0, 1, 2, 3, 100, 10_000):
        made.clear()
        batch = Batch([partial(made.append, n) for n in range(number)])
        batch.start()
        batch.wait()
        assert sorted(made) == list(range(number))


def test_several_threads_take_part_the_caller_among_them() -> None:
    slow = Slow()
    batch = Batch([slow] * 3 * THREADS)
    batch.start()
    batch.wait()
    assert len(slow.ended) == 3 * THREADS
    assert threading.get_ident() in slow.ended
    assert 1 < len(set(slow.ended)) <= THREADS


def test_no_more_than_a_few_threads_take_part_however_many_torch_may_use() -> None:
    torch.set_num_threads(4 * MOST)
    slow = Slow()
    batch = Batch([slow] * 8 * MOST)
    batch.start()
    batch.wait()
    assert THREADS < len(set(slow.ended)) <= MOST


def test_they_begin_before_the_caller_waits() -> None:
    slow = Slow(0)
    batch = Batch([slow] * THREADS)
    batch.start()
    deadline = time.monotonic() + 10
    while len(slow.ended) < THREADS and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(slow.ended) == THREADS
    batch.wait()


def test_with_one_thread_the_caller_makes_all_calls() -> None:
    torch.set_num_threads(1)
    slow = Slow(0)
    batch = Batch([slow] * 20)
    batch.start()
    time.sleep(0.01)
    assert not slow.begun
    batch.wait()
    assert slow.ended == [threading.get_ident()] * 20


def test_two_batches_at_once() -> None:
    first, second = Slow(), Slow()
    batches = [Batch([slow] * THREADS) for slow in (first, second)]
    for batch in batches:
        batch.start()
    batches[0].wait()
    assert len(first.ended) == THREADS
    batches[1].wait()
    assert len(second.ended) == THREADS


@pytest.mark.parametrize("caller", [False, True], ids=["crew", "caller"])
def test_an_error_is_raised_once_nothing_is_under_way(caller: bool) -> None:
    slow, here = Slow(), threading.get_ident()

    def fails() -> None:
        slow()
        if (threading.get_ident() == here) == caller:
            raise ValueError("no")

    batch = Batch([fails] * 10 * THREADS)
    batch.start()
    with pytest.raises(ValueError, match="no"):
        batch.wait()
    assert not slow.under_way
    assert len(slow.begun) < 10 * THREADS
    again = Batch([Slow(0)] * THREADS)  # the crew is as it was
    again.start()
    again.wait()


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("by_caller", [True, False], ids=["in a call", "while it waits"])
def test_an_interrupt_waits_for_what_is_under_way(by_caller: bool) -> None:
    slow, here = Slow(0.1), threading.get_ident()

    def call() -> None:
        if by_caller or threading.get_ident() != here:
            slow()

    batch = Batch([call] * 100 * THREADS)
    batch.start()
    while not slow.under_way:
        time.sleep(0.001)
    timer = threading.Timer(0.05, signal.raise_signal, (signal.SIGINT,))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        batch.wait()
    assert not slow.under_way
    begun = len(slow.begun)
    timer.join()
    time.sleep(0.02)
    assert len(slow.begun) == begun


def test_what_is_stopped_begins_no_more() -> None:
    slow = Slow()
    batch = Batch([slow] * 1000)
    batch.start()
    batch.stop()
    begun = len(slow.begun)
    assert begun < 1000
    assert not slow.under_way
    time.sleep(0.02)
    assert len(slow.begun) == begun


def test_a_forked_process_has_a_crew_of_its_own() -> None:
    batch = Batch([Slow(0)] * THREADS)
    batch.start()
    batch.wait()
    child = os.fork()
    if not child:
        slow = Slow()
        batch = Batch([slow] * 3 * THREADS)
        batch.start()
        time.sleep(0.1)
        good = len(slow.ended) > 1  # somebody began
        batch.wait()
        os._exit(0 if good and len(slow.ended) == 3 * THREADS else 1)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            assert status == 0
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the child hung")
