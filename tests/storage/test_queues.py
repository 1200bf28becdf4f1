# SPDX-License-Identifier: Apache-2.0
"""Test errors, limits and threads of the transfer graph; `test_model.py` tests its states."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from support.graph_ends import end_of, run_in_turn, submit
from support.seeded_loop import SetLoop
from support.waits import until

from portakv.errors import InvalidTerms, TransferError
from portakv.runtime import interrupts
from portakv.storage.work import End, Graph, Task

WAIT = 30.0  # seconds, for what takes none


class Blocked:
    """Work that starts, and runs until a test ends it."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.end = threading.Event()

    def __call__(self, task: Task, mask: Any) -> None:
        self.began.set()
        assert self.end.wait(WAIT)


def blocks_of(graph: Graph, result: str) -> int:
    """Return the blocks of reads from the disk that ended so."""
    return graph.counts.blocks["disk", "read", result]


def nothing(task: Task, mask: Any) -> None:
    """Do no work."""


@pytest.fixture
def clock() -> Iterator[SetLoop]:
    """Return a clock that stands still until a test sets it."""
    loop = SetLoop()
    yield loop
    loop.end()


@pytest.fixture
def graph(clock: SetLoop) -> Iterator[Graph]:
    """Return a graph with that clock."""
    graph = Graph(runtime=clock.runtime)
    yield graph
    assert graph.close(WAIT)


@pytest.fixture
def busy(graph: Graph) -> Iterator[Blocked]:
    """Occupy the one worker of queue "one"."""
    work = Blocked()
    submit(graph, [Task(work, 1, queue=graph.queue("one"))], priority="urgent")
    assert work.began.wait(WAIT)
    yield work
    work.end.set()


def test_a_mask_that_does_not_fit_fails_its_task_alone(graph: Graph) -> None:
    queue = graph.queue("any")
    wrong = Task(lambda task, mask: [True], 2, queue=queue)
    right = Task(lambda task, mask: [True, False], 2, queue=queue)
    submit(graph, [wrong, right])
    assert wrong.wait(WAIT)
    assert right.wait(WAIT)
    assert (wrong.state, *wrong.landed) == ("failed", False, False)
    assert isinstance(wrong.error, ValueError)
    assert (right.state, *right.landed) == ("landed", True, False)


def test_a_link_keeps_its_terms(graph: Graph) -> None:
    queue = graph.queue("disk:a", width=3, max_gbps=2.0)
    assert graph.queue("disk:a") is graph.queue("disk:a", width=3, max_gbps=2.0) is queue
    for terms in ({"width": 2}, {"max_gbps": 1.0}, {"stall_seconds": 3.0}, {"width": True}):
        with pytest.raises(InvalidTerms, match=f"Expected {next(iter(terms))} to be"):
            graph.queue("disk:a", **terms)
    assert graph.queue("disk:b").width == 1


def test_a_system_without_threads_runs_tasks_in_the_callers(
    graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    work = Blocked()
    most = 1 + sum(each.name == interrupts.NAME for each in threading.enumerate())
    queue = graph.queue("wide", most)
    running = [Task(work, 1, queue=queue) for _ in range(most)]
    submit(graph, running)
    assert until(lambda: len(queue.running) == most, WAIT)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        tasks = [Task(nothing, 1, queue=graph.queue("any")) for _ in range(3)]
        submit(graph, tasks)
    assert [task.state for task in tasks] == ["landed"] * 3
    work.end.set()
    assert all(task.wait(WAIT) for task in running)


def test_one_helper_runs_tasks_one_after_the_other(graph: Graph) -> None:
    """A change of threads costs more than a task."""
    idents = set[int]()
    queue = graph.queue("one")

    def note(task: Task, mask: Any) -> None:
        idents.add(threading.get_ident())

    submit(graph, [Task(note, 1, queue=queue) for _ in range(50)])
    assert until(lambda: not graph.live, WAIT)
    assert len(idents) == 1
    assert threading.get_ident() not in idents


def test_a_queue_runs_as_many_tasks_together_as_its_width(graph: Graph) -> None:
    queue = graph.queue("wide", 3)
    begun = threading.Barrier(3)
    tasks = [Task(lambda *_: begun.wait(WAIT) and None, 1, queue=queue) for _ in range(6)]
    submit(graph, tasks)
    assert all(task.wait(WAIT) for task in tasks)
    assert {ran.worker for ran in graph.trace.ran} == {1, 2, 3}


# --- order ----------------------------------------------------------------------------------------


def test_what_an_urgent_one_waits_for_is_as_urgent(graph: Graph, busy: Blocked) -> None:
    """A load hastens the read of a prefetch."""
    ran = list[str]()
    queue = graph.queue("one")
    work = lambda task, mask: ran.append(task.name)  # noqa: E731
    tasks = [Task(work, 1, queue=queue, name=name) for name in "abc"]
    submit(graph, tasks, priority="background")
    with graph.lock:
        tasks[-1].hasten(0.0)
    busy.end.set()
    assert all(task.wait(WAIT) for task in tasks)
    assert ran == ["c", "a", "b"]


def test_background_for_ever_and_urgent_for_ever_both_go_on(graph: Graph, clock: SetLoop) -> None:
    """Fault 51. Each task submits the next of its kind, and each takes a tenth of a second."""
    ran = Counter[str]()
    queue = graph.queue("one")

    def work(task: Task, mask: Any) -> None:
        clock.set(clock.time() + 0.1)
        ran[task.name] += 1
        if ran.total() < 400:
            begin(task.name)

    def begin(*kinds: Any) -> None:
        for kind in kinds:
            submit(graph, [Task(work, 1, queue=queue, name=kind)], priority=kind)

    with graph.lock:  # the first may not end before the others are there
        begin("background", "urgent", "urgent", "urgent")
    while graph.live:
        time.sleep(0.001)
    assert ran["background"] > 10
    assert ran["urgent"] > 200


def test_links_keep_a_pace() -> None:
    """Three pieces of 1 MB at 100 MB/s start 10 ms apart, by the graph's clock and trace."""
    graph = Graph()
    queue = graph.queue("paced", 2, max_gbps=0.1)
    tasks = [Task(nothing, 1, queue=queue, nbytes=10**6) for _ in range(3)]
    submit(graph, tasks)
    assert all(task.wait(WAIT) for task in tasks)
    begun = sorted(ran.start for ran in graph.trace.ran)
    assert begun[2] - begun[0] >= 0.0199
    assert graph.close(WAIT)


def test_what_waits_for_its_pace_can_be_overtaken_and_cancelled(
    graph: Graph, clock: SetLoop
) -> None:
    """The queue is not slow meanwhile."""
    queue = graph.queue("paced", 4, max_gbps=0.1, stall_seconds=0.05)
    tasks = [Task(nothing, 1, queue=queue, nbytes=10**7, name=name) for name in "abcd"]
    submit(graph, tasks, priority="normal")
    assert tasks[0].wait(WAIT)
    urgent = Task(nothing, 1, queue=queue, nbytes=10**7, name="urgent")
    submit(graph, [urgent], priority="urgent")
    assert tasks[1].cancel()
    clock.set(0.09)
    assert not queue.slow
    for at, task in [(0.101, urgent), (0.202, tasks[2]), (0.303, tasks[3])]:
        clock.set(at)
        assert task.wait(WAIT)
    began = {ran.name: ran.start for ran in graph.trace.ran}
    assert began == {"a": 0.0, "urgent": 0.101, "c": 0.202, "d": 0.303}


def test_what_ended_is_forgotten(graph: Graph) -> None:
    """Tasks hold views, and what they use is all of a store's memory; a graph may outlive them."""
    uses = Counter[str]()
    task = Task(work := Blocked(), 1, queue=graph.queue("any"), uses=uses)
    other = Task(nothing, 1, queue=graph.queue("any"), uses=uses)
    refs = [weakref.ref(x) for x in (uses, work, task, other)]
    submit(graph, [task, other], deadline=99.0)
    end = end_of(graph, [task, other])
    work.end.set()
    assert end.wait(WAIT)
    del uses, work, task, other, end
    until = time.monotonic() + WAIT
    while any(ref() for ref in refs) and time.monotonic() < until:
        gc.collect()
    assert [ref() for ref in refs] == [None] * 4


def test_ends_of_one_task_come_in_the_order_in_which_they_were_made(graph: Graph) -> None:
    """Whoever sees the end of a load, which is made last, sees the ends of its layers."""
    work = Blocked()
    read = Task(work, 1, queue=graph.queue("disk"))
    submit(graph, [read])
    ends = [end_of(graph, [read]) for _ in range(4)]
    order = list[int]()
    for number, end in enumerate(ends):
        end.on_end(partial(order.append, number))
    work.end.set()
    assert all(end.wait(WAIT) for end in ends)
    with graph.lock:  # all of them end under it
        assert order == [0, 1, 2, 3]


def test_who_waits_learns_of_a_time_that_was_set_since() -> None:
    """No other thread looks at the clock after that."""
    real = Graph()
    work = Blocked()
    queue = real.queue("disk")
    running = Task(work, 1, queue=queue)
    late = Task(nothing, 1, queue=queue)
    submit(real, [running, late])
    until = real.clock() + 0.2
    timer = threading.Timer(0.05, lambda: real.runtime.change(partial(late.cancel_at, until)))
    timer.start()
    assert late.wait(WAIT)
    assert real.clock() - until < WAIT / 3
    assert late.state == "late"
    work.end.set()
    assert real.close(WAIT)


def test_nothing_grows_with_what_ended(graph: Graph) -> None:
    """Neither distant deadlines nor tasks that were cancelled accumulate."""
    queue = graph.queue("any")
    work = Blocked()
    submit(graph, [Task(work, 1, queue=queue)], deadline=1e8)
    for _ in range(2000):
        waits = Task(nothing, 1, queue=graph.queue("other"))
        submit(graph, [waits], deadline=1e9)
        end = end_of(graph, [waits])
        end.cancel()
        assert end.wait(WAIT)
    work.end.set()
    sizes = [len(graph.live), *map(len, queue._heaps)]
    assert max(sizes) < 300


# --- ends -----------------------------------------------------------------------------------------


def test_a_deadline_in_the_past_begins_nothing(graph: Graph) -> None:
    """Fault 53."""
    ran = list[str]()
    task = Task(lambda task, mask: ran.append("ran"), 1, queue=graph.queue("disk"), name="read")
    submit(graph, [task], priority="urgent", deadline=0.0)
    assert (ran, task.state, task.landed.tolist()) == ([], "late", [False])
    assert task.done()
    assert blocks_of(graph, "late") == 1


def test_a_worker_begins_nothing_that_is_late(graph: Graph, busy: Blocked, clock: SetLoop) -> None:
    """No caller waits for the task, and its turn comes."""
    ran = list[str]()
    late = Task(lambda task, mask: ran.append("late"), 1, queue=graph.queue("one"))
    good = Task(lambda task, mask: ran.append("good"), 1, queue=graph.queue("one"))
    submit(graph, [late], deadline=1.0)
    submit(graph, [good])
    clock.set(2.0)
    busy.end.set()
    assert good.wait(WAIT)
    assert (ran, late.state) == (["good"], "late")


def test_a_stalled_disk_holds_up_nobody_else(graph: Graph, clock: SetLoop) -> None:
    """Fault 26."""
    work = Blocked()
    disk = graph.queue("disk", 2, stall_seconds=10.0)
    read = Task(work, 2, queue=disk)
    submit(graph, [read], priority="urgent")
    assert work.began.wait(WAIT)
    other = Task(nothing, 1, queue=disk)
    submit(graph, [other])
    assert other.wait(WAIT)
    assert not disk.slow
    clock.set(11.0)
    assert disk.slow
    store = Task(nothing, 1, queue=disk, name="write")
    load = Task(nothing, 1, queue=disk)
    submit(graph, [store], priority="background")
    submit(graph, [load], priority="urgent")
    assert store.done()
    assert load.wait(WAIT)
    assert (store.state, load.state) == ("dropped", "landed")
    work.end.set()
    assert read.wait(WAIT)
    assert not disk.slow


@pytest.mark.parametrize("error", [OSError("EIO"), KeyboardInterrupt(), SystemExit(), ValueError()])
def test_work_that_raises_fails_its_node_alone(graph: Graph, error: BaseException) -> None:
    """Fault 54."""

    def work(task: Task, mask: Any) -> None:
        raise error

    queue = graph.queue("disk")
    read = Task(work, 2, queue=queue, name="read")
    other = Task(nothing, 1, queue=queue)
    submit(graph, [read, other])
    end = end_of(graph, [read], 2)
    assert end.wait(WAIT)
    assert other.wait(WAIT)
    assert (read.state, end.error is error, *other.landed) == ("failed", True, True)
    assert end.landed.tolist() == [False, False]
    assert blocks_of(graph, "failed") == 2


def test_a_chain_of_any_length_ends_at_once(graph: Graph) -> None:
    """Coroutines go on one after the other, and not one within the other."""

    async def follow(before: End, end: End) -> None:
        await before
        end.finish(None)

    ends = [End(graph.runtime, 1) for _ in range(5000)]
    with graph.lock:
        for before, end in pairwise(ends):
            graph.runtime.start(follow(before, end))
    graph.runtime.change(lambda: ends[0].finish(None))
    assert ends[-1].done()


def test_coroutines_run_tasks_for_the_blocks_that_are_left(graph: Graph) -> None:
    """A task without blocks does not run, and has the errors of what it follows."""
    ran = list[list[bool]]()
    error = OSError("EIO")

    def half(task: Task, mask: Any) -> list[bool]:
        ran.append(mask.tolist())
        return [True, False]

    def fails(task: Task, mask: Any) -> None:
        ran.append(mask.tolist())
        raise error

    queue = graph.queue("any")
    tasks = [Task(work, 2, queue=queue) for work in (nothing, half, fails, half)]
    run_in_turn(graph, tasks)
    assert tasks[-1].wait(WAIT)
    assert ran == [[True, True], [True, False]]
    assert [task.state for task in tasks] == ["landed", "landed", "failed", "landed"]
    assert tasks[-1].error is error
    assert not tasks[-1].landed.any()
    ended = [Task(half, 2, queue=queue) for _ in range(2)]
    with graph.lock:
        run_in_turn(graph, ended)
        assert ended[1].cancel()
    assert ended[0].wait(WAIT)
    assert [task.state for task in ended] == ["landed", "cancelled"]


def test_nothing_asks_a_clock_that_may_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 28."""

    def back() -> float:
        raise AssertionError("time.time() was called")

    monkeypatch.setattr(time, "time", back)
    graph = Graph()
    tasks = [Task(nothing, 1, queue=graph.queue("any"), nbytes=9) for _ in range(9)]
    submit(graph, tasks, deadline=WAIT)
    assert all(task.wait(WAIT) for task in tasks)
    assert graph.close(WAIT)


def test_close_cancels_what_waits_and_waits_for_what_runs() -> None:
    """Fault 15, in the graph's sense; a graph that is closed takes nothing more."""
    graph = Graph()
    work = Blocked()
    tasks = [Task(work, 1, queue=graph.queue("any")) for _ in range(3)]
    submit(graph, tasks)
    gate = end_of(graph, tasks)
    assert work.began.wait(WAIT)
    assert not gate.wait(0.01)
    assert not graph.close(0.01)
    assert [task.state for task in tasks] == ["running", "cancelled", "cancelled"]
    work.end.set()
    assert graph.close(WAIT)
    assert gate.done()
    with pytest.raises(TransferError, match="got one that is closed"):
        submit(graph, [Task(nothing, 1, queue=graph.queue("any"))])


def test_what_comes_while_a_graph_closes_is_refused() -> None:
    graph = Graph()
    reported = list[BaseException]()
    task = Task(nothing, 1, queue=graph.queue("any"))
    submit(graph, [task])
    assert task.wait(WAIT)

    def begin() -> None:
        try:
            submit(graph, [Task(nothing, 1, queue=task.queue)])
        except TransferError as error:
            reported.append(error)

    with graph.lock:
        late = threading.Thread(target=begin)
        late.start()
        time.sleep(0.05)  # the thread waits for the lock
        graph.close(0.0)
    late.join(WAIT)
    assert len(reported) == 1
    assert graph.close(WAIT)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_refused() -> None:
    """Fault 13, in the graph's sense. The child does not wait for the parent's full queue."""
    graph = Graph()
    work = Blocked()
    task, follower = (Task(work, 1, queue=graph.queue("any")) for _ in range(2))
    submit(graph, [task, follower])
    assert work.began.wait(WAIT)
    locked = threading.Event()
    free = threading.Event()

    def lock() -> None:
        with graph.lock:
            locked.set()
            free.wait(WAIT)

    threading.Thread(target=lock).start()
    assert locked.wait(WAIT)
    child = os.fork()
    if child == 0:
        signal.alarm(5)  # ends it if it waits for the lock
        code = 1
        try:
            submit(graph, [Task(nothing, 1, queue=task.queue)])
        except TransferError:
            ended = task.wait() and graph.close() and not follower.cancel()
            code = 0 if ended and graph.statistics() == {} else 2
        os._exit(code)
    free.set()
    assert os.waitpid(child, 0)[1] == 0
    work.end.set()
    assert follower.wait(WAIT)
    assert graph.close(WAIT)
