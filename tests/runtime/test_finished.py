# SPDX-License-Identifier: Apache-2.0
"""The queue of what has ended, and its descriptor."""

import os
import select
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from support.threads import run_threads

from portakv.errors import HostMemoryError
from portakv.runtime import transfer
from portakv.runtime.transfer import Finished


@pytest.fixture
def queue() -> Iterator[Finished[int]]:
    made: Finished[int] = Finished(limit=4)
    yield made
    made.close()


def readable(queue: Finished[int]) -> bool:
    return bool(select.select([queue.fileno()], [], [], 0)[0])


def test_nothing_is_kept_before_the_first_call(queue: Finished[int]) -> None:
    queue.add(1)
    assert not queue.started
    assert queue.take() == []
    assert queue.started
    queue.add(2)
    assert queue.take() == [2]


def test_the_descriptor_is_readable_while_items_wait(queue: Finished[int]) -> None:
    assert not readable(queue)
    queue.add(1)
    queue.add(2)
    assert readable(queue)
    assert queue.take() == [1, 2]
    assert not readable(queue)
    assert queue.take() == []
    queue.add(3)
    assert readable(queue)


def test_a_queue_is_idle_if_a_call_would_change_nothing(queue: Finished[int]) -> None:
    assert not queue.is_idle  # nothing is kept yet
    queue.start()
    assert queue.is_idle
    queue.add(1)
    assert not queue.is_idle
    assert queue.take() == [1]
    assert queue.is_idle
    assert not readable(queue)
    assert not queue.is_idle  # `take` also reads the descriptor
    queue.close()
    assert not queue.is_idle


def test_the_oldest_items_are_dropped_and_counted(queue: Finished[int]) -> None:
    queue.start()
    for item in range(6):
        queue.add(item)
    assert queue.dropped == 2
    assert queue.take() == [2, 3, 4, 5]


def test_a_closed_queue_keeps_nothing(queue: Finished[int]) -> None:
    fd = queue.fileno()
    queue.add(1)
    queue.close()
    queue.add(2)
    queue.start()
    assert (queue.take(), queue.fileno(), queue.started) == ([], -1, False)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def test_a_forked_process_has_its_own_queue(queue: Finished[int]) -> None:
    queue.add(0)
    assert queue.fileno() >= 0
    queue.add(1)
    child = os.fork()
    if child == 0:
        # Neither an item nor the descriptor of the parent is taken here.
        queue.add(7)
        own = queue.take() == [] and not readable(queue)
        queue.add(2)
        own = own and queue.take() == [2]
        os._exit(0 if own else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert readable(queue)
    assert queue.take() == [1]


def test_no_item_of_several_threads_is_lost() -> None:
    queue: Finished[int] = Finished()
    queue.start()
    taken = list[int]()

    def add(first: int) -> None:
        for item in range(first, first + 500):
            queue.add(item)

    def consume(_: int) -> None:
        while len(taken) < 2000:
            assert select.select([queue.fileno()], [], [], 20)[0]
            taken.extend(queue.take())

    run_threads(lambda first: consume(0) if first < 0 else add(first), [-1, *range(0, 2000, 500)])
    assert sorted(taken) == list(range(2000))
    queue.close()


def test_without_a_request_for_the_descriptor_there_is_none(
    queue: Finished[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An item costs no system call, which would release the interpreter in a worker."""
    calls = list[str]()
    for name in ("eventfd", "eventfd_write", "eventfd_read"):
        counted = partial(_counted, calls, name, getattr(os, name))
        monkeypatch.setattr(os, name, counted)
    queue.start()
    queue.add(1)
    queue.add(2)
    queue.add(3)
    assert queue.take() == [1, 2, 3]
    assert calls == []
    queue.add(4)
    assert readable(queue)  # negative control: with a descriptor there are calls
    assert calls == ["eventfd", "eventfd_write"]


def _counted(calls: list[str], name: str, call: Callable[..., Any], *args: Any) -> Any:
    calls.append(name)
    return call(*args)


def test_items_that_wait_make_a_new_descriptor_readable(queue: Finished[int]) -> None:
    queue.start()
    queue.add(1)
    queue.add(2)
    assert readable(queue)
    assert queue.take() == [1, 2]
    assert not readable(queue)


def test_many_items_write_the_descriptor_once(
    queue: Finished[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[str]()
    monkeypatch.setattr(os, "eventfd_write", partial(_counted, calls, "write", os.eventfd_write))
    assert not readable(queue)
    for first in (1, 3):
        queue.add(first)
        queue.add(first + 1)
        assert readable(queue)
        assert queue.take() == [first, first + 1]
        assert not readable(queue)
    assert calls == ["write", "write"]


#: The steps of a consumer and of an adder between which another thread may run.
STEPS = [("eventfd_read", True), ("eventfd_read", False), ("eventfd_write", True)]


def interleave(monkeypatch: pytest.MonkeyPatch, name: str, before: bool, last: str) -> bool:
    """Run adds and takes inside a step of a take or of an add; return True if a wake-up was lost.

    ``before``: they run before the system call, else after it. ``last``: what runs last.
    """
    queue: Finished[int] = Finished()
    assert not readable(queue)
    queue.add(0)
    taken = queue.take()
    call = getattr(os, name)
    inside = [name]

    def others(*args: int) -> Any:
        if not inside:
            return call(*args)
        inside.clear()
        if not before:
            call(*args)
        queue.add(2)
        if last == "take":
            taken.extend(queue.take())
        elif last == "add after take":
            taken.extend(queue.take())
            queue.add(3)
        if before:
            return call(*args)
        return None

    with monkeypatch.context() as patched:
        patched.setattr(os, name, others)
        queue.add(1)
        if name == "eventfd_read":
            taken += queue.take()
    assert not inside, "the step did not come"
    queue.add(4)
    lost = bool(not readable(queue))
    taken += queue.take()
    assert sorted(taken) == [0, 1, 2, 4] or sorted(taken) == [0, 1, 2, 3, 4]
    queue.close()
    return lost


@pytest.mark.parametrize("last", ["add", "take", "add after take"])
@pytest.mark.parametrize(("name", "before"), STEPS)
def test_no_wake_up_is_lost_in_any_order(
    monkeypatch: pytest.MonkeyPatch, name: str, before: bool, last: str
) -> None:
    assert not interleave(monkeypatch, name, before, last)


def test_a_flag_that_is_cleared_before_the_read_loses_a_wake_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Negative control of the test above."""

    def clear(self: Any) -> None:
        self.written = False
        with suppress(BlockingIOError):
            os.eventfd_read(self.fd)

    monkeypatch.setattr(transfer._Waiting, "clear", clear)
    assert any(interleave(monkeypatch, *step, last="add") for step in STEPS)


def test_an_interrupt_before_the_write_does_not_silence_the_descriptor(
    queue: Finished[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: int) -> None:
        raise KeyboardInterrupt

    assert not readable(queue)
    with monkeypatch.context() as patched:
        patched.setattr(os, "eventfd_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            queue.add(1)
    queue.add(2)
    assert readable(queue)
    assert queue.take() == [1, 2]


def test_an_item_that_comes_while_the_descriptor_is_made_is_seen(
    queue: Finished[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The item finds no descriptor yet, so its add writes nothing."""
    made = os.eventfd

    def add_first(*args: int) -> int:
        queue.add(1)
        return made(*args)

    queue.start()
    monkeypatch.setattr(os, "eventfd", add_first)
    assert readable(queue)


def test_closing_wakes_who_sleeps_on_a_descriptor_that_was_written(
    queue: Finished[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[str]()
    queue.fileno()
    queue.add(1)
    monkeypatch.setattr(os, "eventfd_write", partial(_counted, calls, "write", os.eventfd_write))
    queue.close()
    assert calls == ["write"]


def test_no_free_descriptor_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(24, "Too many open files")

    queue: Finished[int] = Finished()
    with monkeypatch.context() as patched:
        patched.setattr(os, "eventfd", fail)
        queue.start()  # needs none
        queue.add(1)
        with pytest.raises(HostMemoryError, match="descriptor to be free"):
            queue.fileno()
    assert readable(queue)
    assert queue.take() == [1]
    queue.close()
