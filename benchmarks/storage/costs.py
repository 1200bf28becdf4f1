# SPDX-License-Identifier: Apache-2.0
"""Measure the host cost of a block store without its bytes: a task of the graph, the start over a
full table, and the first and last blocks of a long chain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from statistics import median

import numpy as np
import torch

from portakv.storage.eviction import FIRST, mark_of
from portakv.storage.form import BlockForm
from portakv.storage.io.choose import choose
from portakv.storage.store import BlockStore
from portakv.storage.tiers.disk import Disk
from portakv.storage.tiers.folder import Slots
from portakv.storage.work import Graph, Task
from portakv.view import KVView
from portakv_benchmarks.host.suite import KB
from portakv_benchmarks.shared.harness import Row, Rows, Step, short
from portakv_benchmarks.shared.trials import Sample, timed
from portakv_benchmarks.storage.suite import StorageBench
from portakv_benchmarks.storage.tiers import caches

ROUNDS = 5
CHAIN = 4
CPU = torch.device("cpu")
CALL = 50  # blocks of a save into a chain
EDGE = 1000  # blocks at each end of a chain


def cost_steps(bench: StorageBench) -> Iterator[Step]:
    """Yield a step for each cost, in the median of five, and once for a long chain."""
    yield "nodes", partial(_nodes, bench.sizes.nodes)
    yield "start", partial(_start, bench)
    for disk in (False, True):
        yield f"chain{' on a disk' if disk else ''}", partial(_long_chain, bench, disk)


def cost_row(shape: str, samples: list[Sample], each: int, right: bool) -> Rows:
    """Return the median of samples, each of so many things."""
    us, cpu = (short(median(results) * 1e6 / each) for results in [*zip(*samples, strict=True)][:2])
    fields: Row = {"kind": "storage_cost", "shape": shape, "backend": "portakv", "verified": right}
    return [{**fields, "us": us, "cpu_us": cpu, "rounds": len(samples)}]


def _nodes(count: int) -> Rows:
    """Run chains of four tasks without work by two workers, submitted together as in a load."""
    samples = [timed(partial(_chains, count)) for _ in range(ROUNDS)]
    return cost_row("a node of the graph, in chains of 4", samples, count, True)


def _chains(count: int) -> None:
    graph = Graph()
    queue = graph.queue("bench", width=2)
    tasks = [Task(lambda task, mask: None, 1, queue=queue) for _ in range(count // CHAIN * CHAIN)]

    async def chain(some: list[Task]) -> None:
        landed = np.ones(1, np.bool_)
        for task in some:
            landed = await task.move(landed)

    def begin() -> None:
        graph.enter(tasks, "normal")
        for first in range(0, len(tasks), CHAIN):
            graph.runtime.start(chain(tasks[first : first + CHAIN]))

    graph.runtime.change(begin)
    if not all(task.wait(60) and task.landed.all() for task in tasks):
        raise RuntimeError("a task did not land")
    graph.close()


def _start(bench: StorageBench) -> Rows:
    """Open a folder whose table is full, again and again."""
    form = BlockForm.of(caches(1, 4 * KB, CPU, 1), "bench")
    count = bench.sizes.slots
    engine, _ = choose()
    arguments = bench.folder / "start", form, count * form.image_bytes, engine
    slots = Slots(*arguments)
    follows = FIRST
    for n in range(count):
        key = n.to_bytes(32, "big")
        slots.seal(slots.take(key, None, follows) or 0, key, n + 1, (n,))
        follows = mark_of(key)
    slots.close()
    samples = []
    right = True
    for _ in range(ROUNDS):
        made: list[Slots] = []
        samples.append(timed(lambda made=made: made.append(Slots(*arguments))))  # type: ignore[misc]
        right &= len(made[0].index) == made[0].generation == count
        made[0].close()
    engine.close()
    return cost_row(f"start with {count:,} slots", samples, 1, right)


def _long_chain(bench: StorageBench, disk: bool) -> Rows:
    """Save one chain of blocks into host memory, also on a disk, and load it from host memory."""
    view = caches(CALL, 4 * KB, CPU, 1)
    form = BlockForm.of(view, "bench")
    many = bench.sizes.slots * 2 // 5 // CALL * CALL
    edge = min(EDGE, many // 2)
    nbytes = 2 * many * form.image_bytes
    tiers = [Disk(bench.folder / "chain", capacity=nbytes)] if disk else []
    keys = [number.to_bytes(32, "big") for number in range(many)]
    with BlockStore(form, host=nbytes, tiers=tiers, full="wait", pin=False) as store:
        save = partial(_save_chain, store, view, keys)
        first = timed(partial(save, 0, edge))
        save(edge, many - edge)
        last = timed(partial(save, many - edge, many))
        right = store.lookup(keys) == many
        load = timed(partial(_load_chain, store, view, keys))
    of = f"of a chain of {many:,}, in host memory{' and on a disk' if disk else ''}"
    return [
        *cost_row(f"save of a block, the first {edge:,} {of}", [first], edge, right),
        *cost_row(f"save of a block, the last {edge:,} {of}", [last], edge, right),
        *cost_row(f"load of a block {of}", [load], many, right),
    ]


def _save_chain(
    store: BlockStore, view: KVView, keys: Sequence[bytes], first: int, past: int
) -> None:
    """Save blocks of a chain, each call after the end of the call before it."""
    for at in range(first, past, CALL):
        after = keys[at - 1] if at else None
        some = keys[at : min(at + CALL, past)]
        saved = store.save(view, range(len(some)), some, after=after)
        saved.synchronize(60)
        if not saved.landed.all():
            raise RuntimeError(f"{int((~saved.landed).sum())} blocks from {at} on were not saved")


def _load_chain(store: BlockStore, view: KVView, keys: Sequence[bytes]) -> None:
    """Load a whole chain; a block that does not land raises."""
    for at in range(0, len(keys), CALL):
        some = keys[at : at + CALL]
        store.load(view, range(len(some)), some).synchronize(60)
