# SPDX-License-Identifier: Apache-2.0
"""A worker's side over a block store, in the model of an engine and step by step."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from threading import Timer
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from support.device_cases import LONG, current, delay
from support.model_worker import LAYOUT, caches
from support.serving_model import NOTHING, Engine
from support.store_engine import RealStore, StoreWorker
from support.waits import LIMIT

from portakv import KVView
from portakv.copy import count_copies
from portakv.errors import StoreError
from portakv.runtime import resources
from portakv.runtime.streams import StreamFence
from portakv.serving import Group, GroupCache, Job, Plan, Report, SchedulerSide, WorkerSide
from portakv.serving.local import LocalIndex
from portakv.storage import BlockForm, BlockStore, Disk, prefix_keys
from portakv.storage.store import FormStore


@pytest.mark.parametrize("part", range(8))
def test_walks_of_an_engine_over_a_block_store(part: int) -> None:
    """Rows of real caches, which a real store saves, evicts and loads."""
    for seed in range(part * 10, part * 10 + 10):
        engine = Engine(SchedulerSide, seed, RealStore, StoreWorker)
        try:
            engine.run(12)
        finally:
            engine.store.close()


# --- step by step


@pytest.fixture
def store() -> Iterator[BlockStore]:
    form = BlockForm.of(caches(2, 8)[1], "model", block_size=8)
    with BlockStore(form, staging=1 << 18, host=1 << 16) as made:
        yield made


def reported(worker_side: WorkerSide) -> Report:
    """Return what a worker side reports until it has nothing to do."""
    made = Report()
    while worker_side.busy:
        made = made.merged(worker_side.report())
    return made


def test_what_is_lacking_is_reported_with_the_engines_blocks(store: BlockStore) -> None:
    """Stored blocks of 8 in the engine's blocks of 4, of which the first is not to be written."""
    keys = prefix_keys(range(16), 8)
    _, view = caches(4, 8)
    store.save(view, [2], keys[:1]).synchronize(LIMIT)
    _, target = caches(8, 4)
    worker_side = WorkerSide([GroupCache(target, store)])
    load = Job(7, "a", tuple(keys), 0, None, ((-1, 3, 4),))
    worker_side.load(Plan(loads=[load]))
    report = reported(worker_side)
    assert report.missing == {7: frozenset([1])}
    assert report.ends == {7: 1}
    ended = worker_side.ended()
    assert ended.loaded == {"a"}
    assert ended.failed == [{4}]
    assert ended.incomplete == {"a"}
    assert worker_side.ended() == (set(), [set()], set(), set())


@pytest.mark.parametrize("host", [0, 1 << 16])
@pytest.mark.parametrize("fault", ["full", "full after a slot", "lost"])
def test_blocks_that_a_disk_does_not_store_are_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: int, fault: str
) -> None:
    """Also with a host tier, from which they can be loaded for a while."""
    _, view = caches(4, 8)
    form = BlockForm.of(view, "model", block_size=8)
    keys = tuple(prefix_keys(range(32), 8))
    index = LocalIndex()
    room = 1 if fault == "full after a slot" else 0
    allocate = resources.fallocate

    def refuse(fd: int, offset: int, nbytes: int) -> None:
        if offset + nbytes > room * form.image_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(fd, offset, nbytes)

    tier = Disk(tmp_path / "kv", capacity=16 * form.image_bytes)
    with BlockStore(form, staging=1 << 18, host=host, tiers=[tier]) as store:
        worker_side = WorkerSide([GroupCache(view, store)])

        def stored_by(scheduler_side: SchedulerSide, name: str) -> int:
            """Save a prompt as an engine does; return how many blocks the scheduler side counts."""
            before = scheduler_side.statistics().get("stored_blocks", 0)
            scheduler_side.add(name, [*range(32)])
            scheduler_side.leading(name, 0)
            scheduler_side.allocated(name, 0, 0, ((0, 1, 2, 3),))
            scheduler_side.scheduled(name, 0, 32)
            worker_side.save(scheduler_side.plan())
            scheduler_side.take(reported(worker_side))
            return scheduler_side.statistics().get("stored_blocks", 0) - before

        if fault == "lost":
            shutil.rmtree(tmp_path / "kv")
            assert stored_by(SchedulerSide(8, [Group(8)], 1, index), "a") == 0
            return
        monkeypatch.setattr(resources, "fallocate", refuse)
        assert stored_by(SchedulerSide(8, [Group(8)], 1, index), "a") == room
        monkeypatch.undo()
        assert stored_by(SchedulerSide(8, [Group(8)], 1, index), "b") == len(keys)


def test_groups_land_all_or_none(store: BlockStore) -> None:
    keys = prefix_keys(range(16), 8)
    _, view = caches(4, 8)
    form = BlockForm.of(view, "other", block_size=8)
    with BlockStore(form, staging=1 << 16, host=1 << 15) as other:
        store.save(view, [0, 1], keys).synchronize(LIMIT)
        other.save(view, [0], keys[:1]).synchronize(LIMIT)
        worker_side = WorkerSide([GroupCache(view, store), GroupCache(view, other)])
        load = Job(7, "a", tuple(keys), 0, None, ((0, 1), (2, 3)))
        worker_side.load(Plan(loads=[load]))
        assert reported(worker_side).missing == {7: frozenset([1])}
        assert worker_side.ended().failed == [{1}, {3}]


@pytest.mark.parametrize(
    ("memory", "there", "copies"), [("one", 2, 1), ("one", 1, 2), ("several", 2, 2)]
)
def test_groups_in_one_memory_are_loaded_by_one_copy(memory: str, there: int, copies: int) -> None:
    """Also where one lacks a block, both have what is there, and the load is reported."""
    keys = prefix_keys(range(16), 8)
    view = caches(8, 8)[1]
    views = [view, view if memory == "one" else caches(8, 8)[1]]
    forms = {f"group {n}": BlockForm.of(view, "model", notes=f"{n}") for n in range(2)}
    with BlockStore(forms, staging=1 << 16, host=1 << 16) as store:
        parts = [store.of(name) for name in forms]
        views[0].tensors[0][:2] = 5
        parts[0].save(views[0], [0, 1], keys).synchronize(LIMIT)
        views[1].tensors[0][2:4] = 6
        parts[1].save(views[1], [2, 3][:there], keys[:there]).synchronize(LIMIT)
        for each in views:
            each.tensors[0][:] = NOTHING
        worker_side = WorkerSide([GroupCache(*both) for both in zip(views, parts, strict=True)])
        counts = count_copies()
        worker_side.load(Plan(loads=[Job(7, "a", tuple(keys), 0, None, ((4, 5), (6, 7)))]))
        missing = reported(worker_side).missing
        made = sum(float(each["value"]) for each in counts.figures()["copies_total"])
        counts.close()
    assert missing == {7: frozenset(range(there, 2))}
    assert made == copies
    rows = [view.tensors[0].flatten(1).amax(1).tolist() for view in views]
    assert rows[0][4:6] == [5, 5]
    assert rows[1][6:8] == [6, 6][:there] + [NOTHING] * (2 - there)


def test_a_store_that_is_closed_is_a_miss_and_no_error() -> None:
    _, view = caches(4, 8)
    form = BlockForm.of(view, "model", block_size=8)
    closed = BlockStore(form, staging=1 << 16, host=1 << 15)
    closed.close()
    keys = tuple(prefix_keys(range(16), 8))
    worker_side = WorkerSide([GroupCache(view, closed)])
    job = Job(1, "a", keys, 0, None, ((0, 1),))
    worker_side.load(Plan(loads=[job]))
    worker_side.save(Plan(saves=[Job(2, "b", keys, 0, None, ((0, 1),))], retained=["b"]))
    report = worker_side.report()
    assert report.missing == {1: frozenset([0, 1]), 2: frozenset([0, 1])}
    assert report.released == {2: 1}
    ended = worker_side.ended()
    assert ended.failed == [{0, 1}]
    assert ended.freed == {"b"}


def test_a_retained_request_is_reported_once(store: BlockStore) -> None:
    """vLLM calls the hook of saves after that of reports if drafts are computed between them."""
    _, view = caches(4, 8)
    worker_side = WorkerSide([GroupCache(view, store)])
    plan = Plan(retained=["a"])
    worker_side.load(plan)
    assert worker_side.ended().freed == {"a"}
    worker_side.save(plan)
    assert worker_side.ended().freed == set()


def test_one_group_that_cannot_begin_makes_the_job_fail(store: BlockStore) -> None:
    class Closed:
        form = store.form

        def load(self, *_: Any, **__: Any) -> Any:
            raise StoreError("it is closed")

    keys = tuple(prefix_keys(range(16), 8))
    _, view = caches(4, 8)
    store.save(view, [0, 1], [*keys]).synchronize(LIMIT)
    worker_side = WorkerSide([GroupCache(view, store), GroupCache(view, Closed())])  # type: ignore[arg-type]
    worker_side.load(Plan(loads=[Job(1, "a", keys, 0, None, ((0, 1), (2, 3)))]))
    assert reported(worker_side).missing == {1: frozenset([0, 1])}


def test_a_retained_request_is_freed_after_its_saves_are_released() -> None:
    """And a stopped save is waited for."""
    waits = list[str]()
    released = SimpleNamespace(done=lambda: bool(waits), wait=lambda: waits.append("wait"))

    class Slow:
        form = SimpleNamespace(block_size=8)

        def save(self, *_: Any, **__: Any) -> Any:
            return SimpleNamespace(
                released=released,
                cancel=lambda: waits.append("cancel"),
                done=lambda: bool(waits),
                landed=torch.zeros(1, dtype=torch.bool).numpy(),
            )

    _, view = caches(4, 8)
    worker_side = WorkerSide([GroupCache(view, Slow())])  # type: ignore[arg-type]
    save = Job(1, "a", (bytes(32),), 0, None, ((0,),))
    worker_side.save(Plan(saves=[save], retained=["a"]))
    assert worker_side.report() == Report()
    assert worker_side.ended().freed == set()
    worker_side.stop(Plan(stop=[1]))
    assert waits == ["cancel", "wait"]
    assert worker_side.report().released == {1: 1}
    assert worker_side.ended().freed == {"a"}


class Counting:
    """A store that counts saves, which end when `end` is called."""

    def __init__(self, store: BlockStore) -> None:
        self.form = store.form
        self.calls = list[tuple[list[bytes], Any]]()
        self.cancelled = 0
        self.ended = False
        self.fails = False
        self._store = store

    def save(self, view: KVView, blocks: Any, keys: Any, *, after: Any = None) -> Any:
        self.calls.append((keys, after))
        made = self._store.save(view, blocks, keys, after=after)
        made.synchronize(LIMIT)
        return SimpleNamespace(
            released=SimpleNamespace(done=self.done, wait=self.end),
            cancel=self.cancel,
            done=lambda: self.ended,
            landed=made.landed,
        )

    def done(self) -> bool:
        if self.fails:
            raise StoreError("The copy failed.")
        return self.ended

    def end(self) -> None:
        self.ended = True

    def cancel(self) -> None:
        self.cancelled += 1


def test_the_saves_of_a_step_are_one_call(store: BlockStore) -> None:
    """Each job has its own end, and a block that is not stored is missing in its own job."""
    keys = prefix_keys(range(48), 8)
    other = prefix_keys(range(100, 116), 8)
    _, view = caches(12, 8)
    counting = Counting(store)
    worker_side = WorkerSide([GroupCache(view, counting)])  # type: ignore[arg-type]
    saves = [
        Job(1, "a", tuple(keys[1:3]), 1, keys[0], ((1, 2),)),
        Job(2, "b", tuple(other), 0, None, ((5, 6),)),
        Job(3, "c", (bytes(32),), 0, None, ((9,),)),
    ]
    worker_side.save(Plan(saves=saves))
    together = [*keys[1:3], *other, bytes(32)]
    assert counting.calls == [(together, [keys[0], keys[1], None, other[0], None])]
    counting.end()
    assert reported(worker_side).missing == {1: frozenset(), 2: frozenset(), 3: frozenset()}
    assert [store.has(key) for key in together] == [True] * 5


def test_a_key_of_two_saves_of_a_step_is_once_in_each_call(store: BlockStore) -> None:
    """Two prompts that begin alike, in blocks of the engine that are larger than stored ones."""
    _, view = caches(12, 16)
    counting = Counting(store)
    worker_side = WorkerSide([GroupCache(view, counting)])  # type: ignore[arg-type]
    keys = prefix_keys(range(32), 8)
    jobs = [
        Job(1, "a", tuple(keys), 0, None, ((1, 2),)),
        Job(2, "b", tuple(keys[2:]), 2, keys[1], ((3,),)),
        Job(3, "c", (bytes(32), bytes(31) + b"1"), 0, None, ((4,),)),
    ]
    worker_side.save(Plan(saves=jobs))
    assert [len(names) for names, _ in counting.calls] == [6, 2]
    counting.end()
    assert reported(worker_side).missing == {1: frozenset(), 2: frozenset(), 3: frozenset()}


def test_a_request_is_freed_in_a_step_that_computes_nothing(store: BlockStore) -> None:
    """vLLM then calls `load`, and leaves out `save`."""
    _, view = caches(4, 8)
    counting = Counting(store)
    worker_side = WorkerSide([GroupCache(view, counting)])  # type: ignore[arg-type]
    worker_side.save(Plan(saves=[Job(1, "a", (bytes(32),), 0, None, ((0,),))]))
    worker_side.load(Plan(retained=["a"]))
    worker_side.report()
    assert worker_side.ended().freed == set()
    counting.end()
    worker_side.load(Plan())
    worker_side.report()
    assert worker_side.ended().freed == {"a"}


def test_a_block_that_is_not_stored_is_missing_in_its_own_save(store: BlockStore) -> None:
    class Some(Counting):
        def save(self, *args: Any, **terms: Any) -> Any:
            made = super().save(*args, **terms)
            made.landed = made.landed.copy()
            made.landed[2] = False
            return made

    _, view = caches(12, 8)
    some = Some(store)
    worker_side = WorkerSide([GroupCache(view, some)])  # type: ignore[arg-type]
    keys = prefix_keys(range(32), 8)
    saves = [
        Job(1, "a", tuple(keys[:2]), 0, None, ((1, 2),)),
        Job(2, "b", tuple(keys[2:]), 2, keys[1], ((5, 6),)),
    ]
    worker_side.save(Plan(saves=saves))
    some.end()
    assert reported(worker_side).missing == {1: frozenset(), 2: frozenset([0])}


@pytest.mark.parametrize("hangs", [False, True], ids=["ends soon", "hangs"])
def test_a_stopped_save_cancels_others_of_its_call_only_if_it_hangs(
    store: BlockStore, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    """All of them are stopped in the next step."""
    monkeypatch.setattr("portakv.serving.worker.MOMENT", 0.05 if hangs else LIMIT)
    _, view = caches(12, 8)
    counting = Counting(store)
    worker_side = WorkerSide([GroupCache(view, counting)])  # type: ignore[arg-type]
    keys = prefix_keys(range(16), 8)
    jobs = [
        Job(1, "a", (keys[0],), 0, None, ((1,),)),
        Job(2, "b", (keys[1],), 0, None, ((2,),)),
    ]
    worker_side.save(Plan(saves=jobs))
    if not hangs:
        Timer(0.05, counting.end).start()
    worker_side.stop(Plan(stop=[1]))
    assert (counting.cancelled > 0, counting.ended) == (hangs, True)  # it is waited for
    before = counting.cancelled
    worker_side.stop(Plan(stop=[1, 2]))
    assert counting.cancelled > before


class Hanging:
    """A save that releases its blocks only once it is cancelled."""

    def __init__(self, log: list[object] | None = None) -> None:
        self.cancelled = False
        self.released = SimpleNamespace(done=self.done, wait=self.wait)
        self._log = [] if log is None else log

    def done(self) -> bool:
        self._log.append(self)
        return self.cancelled

    def wait(self) -> None:
        assert self.cancelled

    def cancel(self) -> None:
        self.cancelled = True
        self._log.append("cancelled")


def test_saves_that_hang_are_waited_for_together(store: BlockStore) -> None:
    """They share one moment: after the first, no other is polled for as long."""
    _, view = caches(12, 8)
    made = list[Hanging]()
    log = list[object]()

    def save(*_: object, **terms: object) -> Hanging:
        made.append(Hanging(log))
        return made[-1]

    worker_side = WorkerSide([GroupCache(view, SimpleNamespace(form=store.form, save=save))])
    keys = prefix_keys(range(16), 8)
    for step in range(0, 40, 2):
        jobs = [
            Job(step, "a", (keys[0],), 0, None, ((1,),)),
            Job(step + 1, "b", (keys[1],), 0, None, ((2,),)),
        ]
        worker_side.save(Plan(saves=jobs))
    worker_side.stop(Plan(stop=[*range(0, 40, 2)]))
    assert len(made) == 20
    assert all(each.cancelled for each in made)
    assert max(map(log.count, made[1:])) <= 2


def test_a_save_that_fails_while_it_is_stopped_raises_nothing(store: BlockStore) -> None:
    _, view = caches(12, 8)
    counting = Counting(store)
    counting.fails = True
    worker_side = WorkerSide([GroupCache(view, counting)])  # type: ignore[arg-type]
    keys = prefix_keys(range(16), 8)
    jobs = [Job(number, "a", (keys[number],), 0, None, ((number + 1,),)) for number in range(2)]
    worker_side.save(Plan(saves=jobs))
    worker_side.stop(Plan(stop=[1]))


def test_saves_that_begin_inside_a_block_of_the_engine_are_calls_of_their_own(
    store: BlockStore,
) -> None:
    """Stored blocks of 8 in the engine's blocks of 16: one call cannot name where each begins."""
    _, view = caches(12, 16)
    counting = Counting(store)
    worker_side = WorkerSide([GroupCache(view, counting)])  # type: ignore[arg-type]
    keys = prefix_keys(range(24), 8)
    jobs = [
        Job(1, "a", (keys[0],), 0, None, ((1,),)),
        Job(2, "b", tuple(keys[1:]), 0, None, ((2,),)),
    ]
    worker_side.save(Plan(saves=jobs))
    assert [len(call[0]) for call in counting.calls] == [2, 1]
    counting.end()
    assert reported(worker_side).missing == {1: frozenset(), 2: frozenset()}


def test_blocks_before_a_window_are_not_read(store: BlockStore) -> None:
    """The first group has both blocks, the second one the last block alone."""
    keys = prefix_keys(range(16), 8)
    rows, view = caches(4, 8)
    rows.copy_(torch.arange(4, device="cpu").view(4, 1, 1, 1, 1).expand_as(rows))
    form = BlockForm.of(view, "other", block_size=8)
    with BlockStore(form, staging=1 << 16, host=1 << 15) as window:
        store.save(view, [0, 1], keys).synchronize(LIMIT)
        window.save(view, [3], keys[1:], after=keys[0]).synchronize(LIMIT)
        memory, target = caches(4, 8)
        worker_side = WorkerSide([GroupCache(target, store), GroupCache(target, window)])
        worker_side.load(Plan(loads=[Job(7, "a", tuple(keys), 0, None, ((0, 1), (-1, 2)))]))
        assert reported(worker_side).missing == {7: frozenset()}
        assert memory[:, 0, 0, 0, 0].tolist() == [0, 1, 3, NOTHING]
        none = Job(8, "b", tuple(keys), 0, None, ((2, 3), (-1, -1)))
        worker_side.load(Plan(loads=[none]))
        assert reported(worker_side).missing == {8: frozenset()}


@pytest.mark.parametrize("size", [4, 8, 16])
def test_what_a_window_has_given_up_is_not_saved(size: int) -> None:
    """Stored blocks shorter and longer than the engine's: the others have the right rows."""
    rows, view = caches(4, 8)
    rows.copy_(torch.arange(32, device="cpu").view(4, 8)[:, None, :, None, None].expand_as(rows))
    form = BlockForm.of(view, "window", block_size=size)
    keys = tuple(prefix_keys(range(32), size))
    with BlockStore(form, staging=1 << 16, host=1 << 15) as window:
        worker_side = WorkerSide([GroupCache(view, window)])
        worker_side.save(Plan(saves=[Job(7, "a", keys, 0, None, ((-1, -1, 2, 3),))]))
        assert reported(worker_side).missing == {7: frozenset()}
        gone = 16 // size
        assert window.lookup_each(keys) == [False] * gone + [True] * (len(keys) - gone)
        memory, target = caches(4, 8)
        window.load(target, [0, 1], keys[gone:]).synchronize(LIMIT)
        assert memory[:2].equal(rows[2:])


def test_a_step_waits_for_the_layers_of_its_loads(store: BlockStore) -> None:
    """What it computed after rows that did not land is not saved."""
    keys = tuple(prefix_keys(range(32), 8))
    rows, view = caches(8, 8)
    rows.fill_(7)
    store.save(view, [0, 1], [*keys[:2]]).synchronize(LIMIT)
    memory, target = caches(8, 8)
    worker_side = WorkerSide([GroupCache(target, store)], by_layer=True)
    whole = Job(1, "a", keys[:2], 0, None, ((0, 1),))
    lacking = Job(2, "b", keys[:3], 0, None, ((2, 3, 4),))
    saves = [
        Job(3, "a", keys[2:3], 2, keys[1], ((5,),)),
        Job(4, "b", keys[3:], 3, keys[2], ((6,),)),
    ]
    plan = Plan(loads=[whole, lacking], saves=saves)
    worker_side.load(plan)
    worker_side.layer(0)
    assert (memory[:4] == 7).all()
    worker_side.save(plan)
    report = reported(worker_side)
    missing = {1: frozenset[int](), 2: frozenset([2]), 3: frozenset[int](), 4: frozenset([0])}
    assert report.missing == missing
    assert report.released == {3: 1, 4: 1}
    ended = worker_side.ended()
    assert ended.loaded == set()  # no request has waited outside of a step
    assert ended.failed == [{4}]
    assert worker_side.quiet


# --- on a device


def known_rows() -> tuple[torch.Tensor, KVView]:
    """Return two blocks of rows that differ, and their view."""
    rows, view = caches(2, 8)
    rows.copy_(torch.arange(16, device="cpu").view(2, 1, 8, 1, 1).expand_as(rows))
    return rows, view


def empty_caches(device: torch.device, blocks: int) -> tuple[torch.Tensor, KVView]:
    """Return caches on a device, for blocks like those of `known_rows`."""
    memory = caches(blocks, 8)[0].to(device)
    torch.accelerator.synchronize(device)  # the memory was filled on another stream
    return memory, KVView([memory], LAYOUT)


def loads_in_turn(device: torch.device) -> tuple[bool, bool]:
    """Write blocks on the model's stream, which is busy, and load them.

    Returns whether the load left the model's stream alone, and whether it came after the writes.
    """
    keys = prefix_keys(range(16), 8)
    rows, view = known_rows()
    memory, target = empty_caches(device, 2)
    form = BlockForm.of(view, "model")
    model = torch.Stream(device)
    streams = list[torch.Stream]()
    with BlockStore(form, staging=1 << 16, host=1 << 15) as store, model:
        store.save(view, [0, 1], keys).synchronize(LIMIT)
        store.load(target, [0, 1], keys).synchronize(LIMIT)  # builds what the copy needs

        class Watched:
            form = store.form

            @staticmethod
            def load(*args: Any, **terms: Any) -> Any:
                streams.append(current(device))
                return store.load(*args, **terms)

        worker_side = WorkerSide([GroupCache(target, cast(FormStore, Watched))])
        delay(model)
        memory.fill_(NOTHING)
        worker_side.load(Plan(loads=[Job(1, "a", tuple(keys), 0, None, ((0, 1),))]))
        reported(worker_side)
        torch.accelerator.synchronize(device)
    return streams != [model], torch.equal(memory.cpu(), rows)


def test_a_load_follows_the_model_and_the_model_does_not_wait(accelerator: torch.device) -> None:
    assert loads_in_turn(accelerator) == (True, True)


def test_without_a_fence_a_load_comes_too_early(
    accelerator: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StreamFence, "on", lambda _, stream: stream)  # a stream is a context
    assert loads_in_turn(accelerator) == (True, False)


def rows_of_the_next_step(device: torch.device, idle: bool, loads: int = 1) -> tuple[bool, bool]:
    """Load blocks whose copy is late, and read them on the model's stream as the next step does.

    Returns whether the load counts as ended before that, and whether its rows were read.
    """
    keys = prefix_keys(range(16), 8)
    rows, view = known_rows()
    memory, target = empty_caches(device, 4)
    form = BlockForm.of(view, "model")
    model = torch.Stream(device)
    with BlockStore(form, staging=1 << 16, host=1 << 15) as store, model:
        store.save(view, [0, 1], keys).synchronize(LIMIT)
        store.load(target, [0, 1], keys).synchronize(LIMIT)  # builds what the copy needs

        class Late:
            form = store.form

            @staticmethod
            def load(*args: Any, **terms: Any) -> Any:
                delay(current(device), 4 * LONG)  # longer than a busy host takes to look
                return store.load(*args, **terms)

        worker_side = WorkerSide([GroupCache(target, cast(FormStore, Late))])
        memory.fill_(NOTHING)
        jobs = [
            Job(1, "a", tuple(keys), 0, None, ((0, 1),)),
            Job(2, "b", tuple(keys), 0, None, ((2, 3),)),
        ]
        worker_side.load(Plan(loads=jobs[:loads], idle=idle))
        ended = worker_side.report().missing == {1: frozenset()}
        read = memory[:2].clone()
        torch.accelerator.synchronize(device)
        reported(worker_side)
    return ended, torch.equal(read.cpu(), rows)


def test_in_an_idle_engine_the_models_stream_waits_for_a_load(accelerator: torch.device) -> None:
    """So the load has ended for all that the engine issues from now on."""
    assert rows_of_the_next_step(accelerator, idle=True) == (True, True)


def test_the_model_of_a_busy_engine_waits_for_no_load(accelerator: torch.device) -> None:
    """The control: the rows are not there yet, and the load has not ended."""
    assert rows_of_the_next_step(accelerator, idle=False) == (False, False)


def test_the_model_does_not_wait_for_several_loads(accelerator: torch.device) -> None:
    """The first request would wait for the last one's."""
    assert rows_of_the_next_step(accelerator, idle=True, loads=2) == (False, False)


def test_the_model_does_not_wait_for_a_long_load(
    accelerator: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("portakv.serving.worker.ORDERED", 1)
    assert rows_of_the_next_step(accelerator, idle=True) == (False, False)
