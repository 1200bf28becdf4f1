# SPDX-License-Identifier: Apache-2.0
"""Test the handle, by which a caller learns the fate of its blocks."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from support.graph_ends import end_of, submit
from support.waits import LIMIT

from portakv.errors import TransferCancelled, TransferError, TransferTimeout
from portakv.storage.work import Graph, Handle, Task


@pytest.fixture
def graph() -> Iterator[Graph]:
    """Return a graph, and close it after the test."""
    graph = Graph()
    yield graph
    assert graph.close(30.0)


def submitted(graph: Graph, work: Any, blocks: int = 3, **terms: Any) -> Handle:
    """Return the handle of one task."""
    task = Task(work, blocks, queue=graph.queue("disk"))
    submit(graph, [task], priority="urgent")
    return Handle(end_of(graph, [task], blocks), **terms)


def test_all_landed(graph: Graph) -> None:
    handle = submitted(graph, lambda task, mask: None, retained=object())
    handle.wait()
    handle.synchronize()
    assert handle.done()
    assert handle.landed.tolist() == [True] * 3
    assert handle.completions[0].retained is None


@pytest.mark.parametrize("call", ["synchronize", "wait", "done"])
def test_blocks_that_are_missing_raise_unless_they_may(graph: Graph, call: str) -> None:
    """Fault 55, in the graph's sense: it says exactly which."""
    for mask in ([False, True, True], [True, False, True], [True, True, False]):
        raises = submitted(graph, lambda task, left, mask=mask: mask)
        skips = submitted(graph, lambda task, left, mask=mask: mask, missing="skip")
        skips.synchronize()  # and by then the other has ended as well
        with pytest.raises(TransferError, match=r"^2 of 3 blocks landed\. No tier has"):
            getattr(raises, call)()
        assert skips.landed.tolist() == raises.landed.tolist() == mask


def test_the_first_cause_is_named(graph: Graph) -> None:
    handle = submitted(graph, lambda task, mask: 1 // 0)
    with pytest.raises(TransferError, match=r"0 of 3 .*ZeroDivisionError\(.*division") as caught:
        handle.synchronize()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_save_names_the_first_tier_that_did_not_take_all(graph: Graph) -> None:
    """The error gives no advice about loads."""
    takes, half, none = (
        Task(partial(lambda n, _, mask: mask & (np.arange(3) < n), n), 3, queue=graph.queue(name))
        for name, n in (("disk:/a", 3), ("disk:/b", 2), ("remote", 0))
    )
    submit(graph, [takes, half, none])
    end = end_of(graph, [takes, half, none], 3, "save")
    with pytest.raises(TransferError, match=r"^0 of 3 blocks landed\. disk:/b did not") as error:
        Handle(end).synchronize()
    assert "skip" not in str(error.value)


def test_a_save_that_fails_names_its_cause(graph: Graph) -> None:
    work = Task(lambda task, mask: 1 // 0, 3, queue=graph.queue("disk"))
    submit(graph, [work])
    with pytest.raises(TransferError, match=r"^0 of 3 blocks landed\. ZeroDivisionError"):
        Handle(end_of(graph, [work], 3, "save")).synchronize()


def test_blocks_that_cannot_be_told_do_not_land(graph: Graph) -> None:
    work = Task(lambda task, mask: None, 3, queue=graph.queue("disk"))
    submit(graph, [work])
    end = end_of(graph, [work], 3, eligible=lambda: 1 // 0)
    with pytest.raises(TransferError, match=r"^0 of 3 blocks landed\. ZeroDivisionError"):
        Handle(end).synchronize()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("missing", ["raise", "skip"])
def test_a_forked_child_learns_what_ended_before(graph: Graph, missing: str) -> None:
    """It learns that the rest goes on in the parent, also if blocks may be missing."""
    go = threading.Event()
    landed = submitted(graph, lambda task, mask: None, missing=missing)
    landed.synchronize()
    runs = submitted(graph, lambda task, mask: go.wait(LIMIT) and None, missing=missing)
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # ends it if it waits
        code = 1
        try:
            landed.synchronize()
            code = 2 if runs.done() else 3
        except TransferError as error:
            code = 0 if "forked from" in str(error) and landed.landed.all() else 4
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    go.set()
    runs.synchronize()


@pytest.mark.parametrize("missing", ["raise", "skip"])
def test_cancel_is_told(graph: Graph, missing: str) -> None:
    begun = threading.Event()
    go = threading.Event()

    def blocks(*_: object) -> None:
        begun.set()
        go.wait(LIMIT)

    running = submitted(graph, blocks)
    queued = submitted(graph, lambda task, mask: None, missing=missing)
    assert begun.wait(LIMIT)
    assert not running.cancel()
    assert (queued.cancel(), queued.cancelled, queued.cancel()) == (True, True, False)
    with pytest.raises(TransferCancelled, match=r"had not started and are cancelled\.$"):
        queued.synchronize()
    go.set()


def test_layers_end_one_by_one_and_are_cancelled_together(graph: Graph) -> None:
    go = threading.Event()
    disk = graph.queue("disk")
    first = Task(lambda task, mask: None, 2, queue=disk)
    second = Task(lambda task, mask: go.wait(LIMIT) and None, 2, queue=disk)
    third = Task(lambda task, mask: None, 2, queue=disk)
    parts = [[first], [first, second], [second, third]]  # segments that layers share
    submit(graph, [first, second, third])
    layers = [end_of(graph, part, 2) for part in parts]
    for layer in layers:
        layer.stop_work = None
    handle = Handle(end_of(graph, [first, second, third], 2), layers)
    handle.layers[0].synchronize(LIMIT)
    with pytest.raises(TransferTimeout):
        handle.layers[1].synchronize(0.01)
    assert handle.cancel()
    go.set()
    handle.layers[1].synchronize()
    with pytest.raises(TransferCancelled):
        handle.layers[2].synchronize()
    with pytest.raises(TransferCancelled):
        handle.synchronize()


class Counting:
    """A task as a pending that counts how often it is asked for its end."""

    def __init__(self, task: Any) -> None:
        self.task = task
        self.polls = 0
        self.on_end = task.on_end
        self.off_end = task.off_end

    def done(self) -> bool:
        """Return whether the task has ended."""
        self.polls += 1
        return bool(self.task.done())

    def wait(self) -> None:
        """Wait for the end."""
        self.task.wait()


def test_a_wait_with_a_limit_sleeps(graph: Graph) -> None:
    """Polls would take the interpreter from the workers."""
    handle = submitted(graph, lambda task, mask: time.sleep(0.2))
    completion = handle.completions[0]
    counting = Counting(completion.pendings[0])
    completion.pendings = (counting,)
    handle.synchronize(LIMIT)
    assert 0 < counting.polls < 5


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_in_synchronize_leaves_the_handle_usable(graph: Graph) -> None:
    """Fault 16."""
    go = threading.Event()
    main = threading.main_thread().ident or 0
    submits = threading.Event()

    def work(task: Task, mask: Any) -> None:
        submits.wait(LIMIT)  # an interrupt of `submit` would cancel the task
        time.sleep(0.1)
        for _ in range(30):  # one that comes just before a wait begins does not end it
            signal.pthread_kill(main, signal.SIGINT)  # as the terminal's Ctrl-C comes
            if go.wait(1):
                return
        raise AssertionError("no one noticed Ctrl-C")

    handle = submitted(graph, work)
    submits.set()
    with pytest.raises(KeyboardInterrupt):
        handle.synchronize()
    go.set()
    handle.synchronize()
    assert handle.landed.all()
