# SPDX-License-Identifier: Apache-2.0
"""An interrupt at any line of a store or a graph leaves no hang, no lent row and no open folder."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.core_cases import noise
from support.graph_ends import submit
from support.interrupts import by_width, files_of, orphans, reach, settles
from support.storage_cases import FakeTier, counts_of, key_of, rows_in_use, small_form
from support.waits import LIMIT

from portakv import KVView
from portakv.errors import PortaKVError, TransferError
from portakv.graph import Collector
from portakv.graph.trace import Trace
from portakv.storage import BlockForm, BlockStore, Disk, Remote, prefix_keys
from portakv.storage.eviction import Pins
from portakv.storage.lent import LentCopy
from portakv.storage.store import FormStore
from portakv.storage.tiers.base import Tier
from portakv.storage.work import Graph, Handle, Task

FILES = files_of("storage", "graph", "runtime/interrupts.py")
KEYS = [key_of(number) for number in range(6)]
FORM = small_form()
SIZE = FORM.image_bytes
Steps = Generator[Callable[[], object], None, None]


def cache(seed: int = 0) -> KVView:
    """Return a cache of eight small blocks."""
    tensors = [noise(8, 2, 4, 2, 32, dtype=torch.float16, seed=seed + i) for i in range(4)]
    return KVView(tensors, "layer | block kv token head dim")


SOURCE = cache()
TARGET = cache(50)


def judge(store: BlockStore) -> None:
    """Check that the store serves the same keys and new ones, holds nothing of ended calls, and
    closes."""
    others = [key_of(100 + number) for number in range(3)]
    saved = store.save(SOURCE, range(6), KEYS, priority="urgent", deadline=LIMIT)
    saved.synchronize(LIMIT)
    loaded = store.load(TARGET, range(6), KEYS, missing="skip")
    loaded.synchronize(LIMIT)
    store.save(SOURCE, range(3), others, priority="urgent").synchronize(LIMIT)
    store.load(TARGET, range(3), others, missing="skip").synchronize(LIMIT)
    assert settles(lambda: not store.graph.live), "a node lives"
    assert settles(lambda: counts_of(store.rows)["lent"] == 0), "a row is lent"
    assert not rows_in_use(store.rows), "a row is pinned"
    assert sum(queue.queued_bytes for queue in store.graph.queues.values()) == 0
    store.close(LIMIT)


def disk(folder: Path) -> Disk:
    return Disk(folder, capacity=20 * SIZE, io="threads", workers=2)


def opening(folder: Path) -> Steps:
    """Open a store of all tiers, and close it."""

    def act() -> None:
        form = BlockForm.of(SOURCE, "org/model@1")
        prefix_keys(range(16), form.block_size)
        remote = Remote("memory://")
        tiers: list[Any] = [disk(folder / "a"), remote]
        assert tiers[0].forms(form) == []
        assert remote.forms(form) == []
        with BlockStore(FORM, staging=6 * SIZE, host=4 * SIZE, tiers=tiers) as store:
            store.explain()
        assert remote.check()
        remote.wipe()
        repr(remote)

    yield act

    def again() -> bool:
        """Check that the folder is free, at the latest after the helper has undone all."""
        try:
            BlockStore(FORM, staging=SIZE, tiers=[disk(folder / "a")]).close()
        except PortaKVError:
            return False
        return True

    assert settles(again), "the folder is busy"


def serving(folder: Path) -> Steps:
    """Save blocks, look them up and load them, with each tier that there is."""
    tiers: list[Tier] = [disk(folder / "b"), Remote("memory://")]
    store = BlockStore(FORM, staging=8 * SIZE, host=4 * SIZE, tiers=tiers, full="wait")
    pins = list[Pins]()

    def act() -> None:
        store.finished_fd()
        store.listen_fd()
        store.save(SOURCE, range(6), KEYS, priority="urgent", deadline=LIMIT).synchronize(LIMIT)
        store.lookup([*KEYS, key_of(99)])
        store.lookup_each(KEYS)
        store.load(TARGET, range(6), KEYS, missing="skip").synchronize(LIMIT)
        hits = store.load(TARGET, range(2), KEYS[:2], missing="skip")  # most often in the host tier
        hits.synchronize(LIMIT)
        bool(hits.is_issued)
        assert hits.landed.all()
        store.has(KEYS[0])
        store.has_each(KEYS)
        store.touch(KEYS)
        hits.when_ended(bool)
        pins.append(store.pin(KEYS[:2]))
        pins[-1].release()
        layers = store.load(TARGET, range(6), KEYS, by_layer=True, missing="skip")
        for layer in layers.layers:
            layer.wait()
        while not layers.done():
            time.sleep(0.01)
        store.prefetch(KEYS[:2]).synchronize(LIMIT)
        store.delete(KEYS[4:])
        store.finished()
        store.keys()
        store.listen()
        store.statistics()
        store.trace(str(folder / "trace.json"))

    folder.mkdir(parents=True, exist_ok=True)
    yield act
    for each in pins:
        each.release()
    judge(store)


def forming(folder: Path) -> Steps:
    """Open and close a store of two forms; save and load blocks of both in another one."""
    forms = {"one": FORM, "two": small_form(notes="another group")}
    tiers: list[Tier] = [disk(folder / "d")]
    store = BlockStore(forms, staging=8 * SIZE, host=4 * SIZE, tiers=tiers, full="wait")

    def act() -> None:
        BlockStore(forms, staging=6 * SIZE, tiers=[disk(folder / "e")]).close()
        store.listen_fd()
        for name in store.forms:
            one = store.of(name)
            assert one.form == forms[name]
            one.save(SOURCE, range(3), KEYS[:3], priority="urgent").synchronize(LIMIT)
            one.load(TARGET, range(3), KEYS[:3], missing="skip").synchronize(LIMIT)
        store.statistics()
        store.explain()

    yield act
    # A full disk may drop blocks while another save writes.
    assert settles(lambda: counts_of(store.rows)["lent"] == 0), "a row is lent"
    for name in forms:
        one = store.of(name)
        one.save(SOURCE, range(6), KEYS, priority="urgent").synchronize(LIMIT)
        one.load(TARGET, range(6), KEYS, missing="skip").synchronize(LIMIT)
    assert settles(lambda: counts_of(store.rows)["lent"] == 0), "a row is lent"
    assert not rows_in_use(store.rows), "a row is pinned"
    store.close(LIMIT)

    def again() -> bool:
        """Check that the folder is free, at the latest after the helper has undone all."""
        try:
            BlockStore(FORM, staging=6 * SIZE, tiers=[disk(folder / "e")]).close()
        except PortaKVError:
            return False
        return True

    assert settles(again), "the folder is busy"


def leaving(folder: Path) -> Steps:
    """Load blocks of the host tier in a ``with`` block, which closes the store after an interrupt,
    while the frames of the load live on in the traceback."""

    def act() -> None:
        with BlockStore(FORM, staging=8 * SIZE, host=4 * SIZE, full="wait") as store:
            store.save(SOURCE, range(3), KEYS[:3], priority="urgent").synchronize(LIMIT)
            store.load(TARGET, range(3), KEYS[:3], missing="skip").synchronize(LIMIT)

    yield act


class Copies:
    """A copier that holds its copies until `end`."""

    def __init__(self) -> None:
        self.held = list[LentCopy]()

    def begin(self, copy: LentCopy) -> None:
        self.held.append(copy)

    def end(self) -> None:
        for copy in [*self.held]:
            assert not copy.cancelled
            copy.end()
            self.held.remove(copy)  # last: an interrupt before it leaves the copy here


def lending(folder: Path) -> Steps:
    """Save and load blocks whose copies others make."""
    tier = FakeTier(width=1)
    store = BlockStore(
        FORM, staging=8 * SIZE, host=2 * SIZE, tiers=[tier], full="wait", shared=True
    )
    copies = Copies()

    def act() -> None:
        saved = store.save_lent(copies, KEYS, priority="urgent")
        while not saved.done():
            copies.end()
        loaded = store.load_lent(copies, KEYS)
        while not loaded.done():
            copies.end()
        assert loaded.landed.all()
        assert store.leading(KEYS) == len(KEYS)
        borrowed = [store.borrow([key]) for key in KEYS]
        assert any(borrowed), "the host tier has no block"
        for each in borrowed:
            if each is not None:
                each.end()

    yield act
    # Copies of an interrupted call may begin late, and end as any other.
    assert settles(lambda: end_left(copies, store)), "a lent copy does not end"
    judge(store)


def end_left(copies: Copies, store: BlockStore) -> bool:
    """End the copies that are held; return True if no task lives."""
    for copy in [*copies.held]:
        copy.end()
    return not store.graph.live


def joining(folder: Path) -> Steps:
    """Join work that other calls began, wait for staging, be late, and be cancelled."""
    tier = FakeTier(width=1)
    go = threading.Event()
    store = BlockStore(FORM, staging=4 * SIZE, host=2 * SIZE, tiers=[tier], full="wait")
    store.save(SOURCE, range(6), KEYS, priority="urgent").synchronize(LIMIT)
    tier.faults = {key: [partial(go.wait, 0.02)] for key in KEYS[2:4]}

    def act() -> None:
        first = store.load(TARGET, range(6), KEYS, missing="skip")
        store.save(SOURCE, range(3), [key_of(7), *KEYS[:2]])
        joined = store.load(TARGET, range(4), KEYS[:4], deadline=0.01, missing="skip")
        store.prefetch(KEYS)
        joined.cancel()
        store.load(TARGET, range(4), KEYS[2:], deadline=0.0, missing="skip").synchronize(LIMIT)
        first.synchronize(LIMIT)

    yield act
    go.set()
    judge(store)


def closing(folder: Path) -> Steps:
    """Close a store while calls are under way."""
    tier = FakeTier(width=1)
    go = threading.Event()
    tiers: list[Tier] = [disk(folder / "c"), tier]
    store = BlockStore(FORM, staging=4 * SIZE, host=2 * SIZE, tiers=tiers, full="wait")
    store.save(SOURCE, range(6), KEYS, priority="urgent").synchronize(LIMIT)
    tier.faults = {KEYS[5]: [partial(go.wait, 0.01)]}  # longer than the lines of a call take

    def act() -> None:
        store.load(TARGET, range(6), KEYS, missing="skip")
        store.prefetch(KEYS)
        store.close(LIMIT)

    yield act
    go.set()
    store.close(LIMIT)
    BlockStore(FORM, staging=SIZE, tiers=[disk(folder / "c")]).close()


def graphs(folder: Path) -> Steps:
    """Run tasks that wait for each other, are late, and are cancelled."""
    graph = Graph()
    go = threading.Event()
    queue = graph.queue("one", 2)
    narrow = graph.queue("two", 1, max_gbps=10.0)

    def slow(task: Task, mask: Any) -> None:
        go.wait(0.02)

    def act() -> None:
        tasks = list[Task]()
        for number in range(6):
            read = Task(slow, 2, queue=queue, nbytes=10)
            stage = Task(slow, 1, queue=narrow, nbytes=10)
            submit(graph, [read, stage], priority="background" if number % 2 else "urgent")
            tasks.append(stage)
        late = Task(slow, 1, queue=narrow, nbytes=5)
        submit(graph, [late], deadline=0.001)
        tasks[4].cancel()
        graph.count("tier", "op", "hit")
        tasks[0].done()
        late.wait(0.05)
        [*Collector(graph).collect()]
        for task in tasks:
            task.wait(LIMIT)

    yield act
    go.set()
    task = Task(slow, 1, queue=narrow)
    submit(graph, [task], priority="background")
    assert settles(task.done), "it hangs"
    assert settles(lambda: not graph.live), "a node lives"
    assert (queue.queued_bytes, narrow.queued_bytes) == (0, 0)
    with_error = pytest.raises(TransferError)
    assert graph.close(LIMIT)
    with with_error:
        submit(graph, [Task(slow, 1, queue=narrow)])


def ending(folder: Path) -> Steps:
    """Close a graph while nodes wait."""
    graph = Graph()
    go = threading.Event()
    queue = graph.queue("one", 1)
    tasks = [Task(lambda *_: go.wait(0.05), 1, queue=queue, nbytes=10) for _ in range(3)]
    submit(graph, tasks)
    yield lambda: graph.close(LIMIT)
    go.set()
    assert graph.close(LIMIT), "it hangs"
    assert not graph.live


#: Public names that no scenario calls in the caller's thread, and why.
NOT_CALLED = {
    "Graph.enter": "runs in a helper",
    "Graph.forget": "runs in a helper or a worker",
    "Graph.shut": "runs in a helper",
    "Handle.add_copies": "runs in a helper",
    "Handle.add_release": "runs in a helper",
    "Handle.issued_ended": "runs in a worker",
    "Task.moved": "runs in a worker",
    "BlockStore.figures": "changes nothing",
    "Trace.add": "runs in a worker",
    "Trace.note": "one append to a bounded list",
    "Trace.statistics": "runs in a helper",
    "Disk.open": "runs in a helper",
    "Remote.open": "runs in a helper",
    "Remote.ask": "runs in a helper or a worker",
    "Remote.attempt": "runs in a helper or a worker",
    "Remote.put": "runs in a worker",
    "BlockForm.lossy": "changes nothing that is shared",
    "BlockForm.packed": "changes nothing that is shared",
    "BlockForm.json": "changes nothing that is shared",
    "BlockForm.from_json": "changes nothing that is shared",
    "BlockForm.part_of": "changes nothing that is shared",
    "BlockForm.same_cache": "changes nothing that is shared",
    "BlockForm.view": "changes nothing that is shared",
}
SCENARIOS = [opening, serving, forming, lending, leaving, joining, closing, graphs, ending]
WIDE = [opening, serving, forming, lending, joining, closing]


@pytest.mark.parametrize("scenario", by_width(SCENARIOS, WIDE))
def test_an_interrupt_at_any_line_leaves_nothing(scenario: Any, tmp_path: Path) -> None:
    leaks, count = orphans(scenario, tmp_path, FILES)
    print(f"{scenario.__name__}: {count} lines")
    assert leaks == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda x: x.__name__)
def test_an_interrupt_each_time_that_a_line_runs_leaves_nothing(
    scenario: Any, tmp_path: Path
) -> None:
    leaks, _ = orphans(scenario, tmp_path, FILES, every=True)
    assert leaks == []


@pytest.mark.parametrize("scenario", by_width([joining, graphs], [joining]))
def test_interrupts_without_helpers_leave_something(
    scenario: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: the main thread makes all changes itself."""
    monkeypatch.setattr("portakv.runtime.interrupts.interruptible", bool)
    monkeypatch.setattr("support.interrupts.LIMIT", 1.0)
    leaks, _ = orphans(scenario, tmp_path, FILES, most=1)
    assert leaks


def test_interrupts_meet_what_callers_run(tmp_path: Path) -> None:
    """Scenarios call every public function, and of the functions that they call in the caller's
    thread they run all lines but a few, which refuse arguments."""
    stores = BlockForm, BlockStore, Disk, FormStore, LentCopy, Remote
    kinds = *stores, Collector, Graph, Handle, Task, Trace
    public, called, left, of_called = reach(SCENARIOS, tmp_path, FILES, kinds)
    assert public - called == {*NOT_CALLED}
    print(f"{of_called - len(left)} of {of_called} lines; not run: {left}")
    assert len(left) <= 0.25 * of_called
