# SPDX-License-Identifier: Apache-2.0
"""Workers: a rate, few slices in flight, an end that is told; slices that know no view."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from portakv.errors import TransferCancelled, TransferError
from portakv.runtime.transfer import Completion, Transfer
from portakv.runtime.worker import WINDOW, Landing, RateLimit, Slice, Worker

PATIENCE = 30.0


class Watch:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def test_when_slices_may_start() -> None:
    watch = Watch()
    limit = RateLimit(2.0, watch)  # 2 bytes in a nanosecond
    assert limit.left(limit.start_of(2_000_000)) == 0.0
    start = limit.start_of(2_000_000)
    assert limit.left(start) == pytest.approx(1e-3)
    watch.time += 1.5e-3  # it overslept
    assert limit.left(start) == 0.0
    assert limit.left(limit.start_of(4_000_000)) == pytest.approx(0.5e-3)
    watch.time += 0.5e-3
    assert limit.left(limit.start_of(2_000_000)) == pytest.approx(2e-3)
    watch.time += 1.0  # the link was busy for long: not all of it may be made up for
    pauses = [limit.left(limit.start_of(2_000_000)) for _ in range(3)]
    assert pauses == [0.0, 0.0, pytest.approx(1e-3)]


def test_over_many_slices_the_rate_is_kept_whatever_sleeps_too_long() -> None:
    watch, total = Watch(), 0
    limit = RateLimit(1.0, watch)
    for nth in range(1000):
        watch.time += limit.left(limit.start_of(100_000)) + (nth % 7) * 1e-5
        total += 100_000
    assert total / (watch.time - 100.0) / 1e9 == pytest.approx(1.0, rel=0.05)


class Landed:
    """A slice's end, which a test sets."""

    def __init__(self) -> None:
        self.end = threading.Event()
        self.error: Exception | None = None

    def done(self) -> bool:
        return self.end.is_set()

    def wait(self) -> None:
        assert self.end.wait(PATIENCE)
        if self.error is not None:
            raise self.error


class Scene:
    """A worker whose slices land when they are let."""

    def __init__(self, slices: int, limit: RateLimit | None = None) -> None:
        self.ends = [Landed() for _ in range(slices)]
        self.issued, self.entered, self.left = list[int](), False, False
        self.fails_at = slices
        parts = [Slice(None, n, 1, 1000) for n in range(slices)]
        self.worker = Worker(parts, self.issue, self.inside, limit)

    def issue(self, one: Slice) -> Transfer:
        if one.first == self.fails_at:
            raise MemoryError("no more")
        self.issued.append(one.first)
        return Transfer([Completion(pendings=[self.ends[one.first]])])

    @contextmanager
    def inside(self) -> Iterator[None]:
        self.entered = True
        yield
        self.left = True

    def handle(self, slices: int) -> Transfer:
        return Transfer([Landing(self.worker, slices)])

    def land(self, *numbers: int) -> None:
        for number in numbers:
            self.ends[number].end.set()


def until(ready: Callable[[], bool]) -> None:
    done = threading.Event()
    for _ in range(int(PATIENCE / 0.002)):
        if ready():
            return
        done.wait(0.002)
    raise AssertionError("it did not come to that")


def test_slices_are_issued_in_turn_and_few_are_in_flight() -> None:
    scene = Scene(6)
    half, whole = scene.handle(3), scene.handle(6)
    scene.worker.start()
    until(lambda: scene.worker.issued == WINDOW)
    assert not half.done()
    scene.land(0)
    until(lambda: scene.worker.issued == WINDOW + 1)
    scene.land(1, 2)
    half.synchronize(timeout=PATIENCE)
    assert not whole.done()
    scene.land(3, 4, 5)
    whole.synchronize(timeout=PATIENCE)
    assert scene.issued == list(range(6))
    assert (scene.worker.landed, scene.worker.ended) == (6, True)
    assert scene.entered
    assert scene.left
    assert scene.worker.ended_at is not None


def test_a_limit_pauses_between_slices_and_a_cancel_ends_the_pause() -> None:
    scene = Scene(3, RateLimit(1e-9))  # a slice in a quarter of an hour
    whole = scene.handle(3)
    scene.land(0, 1, 2)
    scene.worker.start()
    until(lambda: scene.worker.landed == 1)
    assert not whole.done()
    assert scene.worker.cancel()
    with pytest.raises(TransferCancelled):
        whole.synchronize(timeout=PATIENCE)
    assert scene.issued == [0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_of_the_process_is_told_that_the_parent_goes_on() -> None:
    scene = Scene(2)
    whole = scene.handle(2)
    scene.worker.start()
    until(lambda: scene.worker.issued == 2)
    child = os.fork()
    if not child:
        code = 1
        with suppress(BaseException):
            for ask in (whole.done, whole.synchronize, whole.wait):
                with pytest.raises(TransferError, match="goes on in the parent"):
                    ask()
            code = 0
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    scene.land(0, 1)
    whole.synchronize(timeout=PATIENCE)
