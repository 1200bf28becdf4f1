# SPDX-License-Identifier: Apache-2.0
"""The queue of what has ended, and its descriptor."""

import os
import select
from collections.abc import Iterator

import pytest
from support.threads import run_threads

from portakv.errors import HostMemoryError
from portakv.runtime.finished import Finished


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


def test_no_free_descriptor_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(24, "Too many open files")

    queue: Finished[int] = Finished()
    with monkeypatch.context() as patched:
        patched.setattr(os, "eventfd", fail)
        with pytest.raises(HostMemoryError, match="descriptor to be free"):
            queue.start()
    queue.add(1)
    assert queue.take() == []
