# SPDX-License-Identifier: Apache-2.0
"""Store servers and ranks of engines, each a simulated process of a schedule, and their judge.

The ranks save and load blocks, whose bytes follow from their keys: what has landed is right or
wrong. A block that a save has released has other bytes immediately.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from portakv import KVView
from portakv.serving import StoreClient, StoreServer, StoreTerms
from portakv.serving.server.client import MappedRows
from portakv.serving.server.server import place_of
from portakv.storage import BlockForm
from support.schedules import Process, Schedule, current

LAYOUT = "layer | block kv token head dim"
SIZE = 2
HEADS = 4
BLOCKS = 4
GARBAGE = -1
#: Seconds in which each call ends, and in which a server serves all ranks.
PATIENCE = 30.0

KEYS = [bytes([number]) * 32 for number in range(6)]


@dataclass
class Step:
    """A save or a load that each rank of an engine makes.

    Attributes:
        pause: seconds before it.
        cancel: seconds after which one of the ranks cancels it; None: no rank does.
    """

    saves: bool
    keys: list[int]
    pause: float
    cancel: float | None
    deadline: float | None


class Rank:
    """A rank of an engine, with half of the heads or all."""

    def __init__(self, servers: Servers, name: str, engine: str, heads: tuple[int, int]) -> None:
        self.servers = servers
        self.engine = engine
        self.process = servers.schedule.process(name)
        self.heads = heads
        shape = BLOCKS, 2, SIZE, heads[1] - heads[0], 8
        self.tensors = [torch.full(shape, GARBAGE, dtype=torch.int32) for _ in range(2)]
        self.view = KVView(self.tensors, LAYOUT)
        self.landed = 0
        self.client: StoreClient | None = None

    def join(self) -> None:
        """Make the client of the rank."""
        form = BlockForm.of(self.view, "model", heads=(*self.heads, HEADS))
        place = place_of(self.servers.terms, self.servers.engine)
        self.client = StoreClient(place, [form], self.engine)

    def expected(self, layer: int, key: int) -> torch.Tensor:
        """Return the bytes of a block of a key, by head."""
        heads = torch.arange(*self.heads)
        return (1000 * (key + 1) + 100 * layer + heads)[None, None, :, None]

    def run(self) -> None:
        """Take all steps of the engine."""
        assert self.client is not None
        if not self.client.wait(PATIENCE):
            return  # no server was there
        for step in self.servers.steps[self.engine]:
            self.servers.schedule.sleep(step.pause)
            if step.saves:
                self.save(step)
            else:
                self.load(step)
        half = len(KEYS) // 2
        for keys in (range(half), range(half, len(KEYS))):  # nothing wrong is stored
            self.load(Step(False, [*keys], 0.0, None, None))

    def save(self, step: Step) -> None:
        """Save blocks, and use them again as soon as they are released."""
        assert self.client is not None
        blocks = [*range(len(step.keys))]
        for block, key in zip(blocks, step.keys, strict=True):
            for layer, tensor in enumerate(self.tensors):
                tensor[block] = self.expected(layer, key)
        keys = [KEYS[key] for key in step.keys]
        saved = self.client.blocks[0].save(self.view, blocks, keys, deadline=step.deadline)
        self.cancel(step, saved)
        released = saved.released
        assert released is not None
        released.wait()
        assert released.done(), "the blocks of a save were not released"
        for tensor in self.tensors:
            tensor[blocks] = GARBAGE
        saved.synchronize(PATIENCE)

    def load(self, step: Step) -> None:
        """Load blocks, and compare those that have landed."""
        assert self.client is not None
        blocks = [*range(len(step.keys))]
        for tensor in self.tensors:
            tensor[:] = GARBAGE
        keys = [KEYS[key] for key in step.keys]
        loaded = self.client.blocks[0].load(self.view, blocks, keys, deadline=step.deadline)
        self.cancel(step, loaded)
        loaded.wait()
        loaded.synchronize(PATIENCE)
        for block, key in zip(blocks, step.keys, strict=True):
            if not loaded.landed[block]:
                continue
            self.landed += 1
            for layer, tensor in enumerate(self.tensors):
                right = tensor[block] == self.expected(layer, key)
                assert right.all(), "a block has landed with wrong bytes"
        for tensor in self.tensors:
            assert (tensor[len(blocks) :] == GARBAGE).all(), "another block was modified"

    def cancel(self, step: Step, transfer: Any) -> None:
        """Cancel a transfer, if the step says so for this rank."""
        if step.cancel is not None and self is self.servers.ranks[0]:
            self.servers.schedule.sleep(step.cancel)
            transfer.cancel()

    def close(self) -> None:
        """End the client."""
        assert self.client is not None
        self.client.close()


class Servers:
    """The servers and ranks of one schedule.

    Args:
        many: of servers, which take over from each other.
    """

    def __init__(self, schedule: Schedule, many: int) -> None:
        self.schedule = schedule
        self.random = schedule.random
        self.engine = f"schedules of {os.getpid()}"
        whole = (0, HEADS)
        splits = [
            [("a", whole)],
            [("a", (0, 2)), ("a", (2, HEADS))],
            [("a", whole), ("b", whole)],
        ]
        self.ranks = [
            Rank(self, f"rank {number}", *split)
            for number, split in enumerate(self.random.choice(splits))
        ]
        view = KVView([torch.empty(1, 2, SIZE, HEADS, 8, dtype=torch.int32)] * 2, LAYOUT)
        image = BlockForm.of(view, "model").image_bytes
        rows = self.random.choice((2, 2, 4))
        self.terms = StoreTerms(host=rows * image, staging=rows * image)
        self.steps = {
            engine: [self.step() for _ in range(self.random.randint(2, 4))] for engine in "ab"
        }
        self.processes = [schedule.process(f"server {number}") for number in range(many)]
        self.servers = dict[Process, StoreServer]()

    def moment(self) -> float:
        """Draw some seconds."""
        return self.random.choice((0.0, 0.0, 1e-3, 0.02, 0.3, 1.0))

    def step(self) -> Step:
        """Draw a save or a load of some blocks."""
        random = self.random
        return Step(
            saves=random.random() < 0.7,
            keys=random.sample(range(len(KEYS)), random.randint(1, BLOCKS - 1)),
            pause=self.moment(),
            cancel=self.moment() if random.random() < 0.15 else None,
            deadline=random.choice((None, None, None, 0.05, 2.0)),
        )

    def serve(self, process: Process) -> None:
        """Begin to serve, or to stand by."""
        self.servers[process] = StoreServer(self.terms, self.engine, patience=5.0)

    def serving(self) -> list[Process]:
        """Return the processes that live and serve."""
        return [
            process
            for process, server in self.servers.items()
            if not process.dead and server.serves
        ]

    def run(self, faults: list[str]) -> None:
        """Have the ranks take their steps, with some faults meanwhile."""
        schedule = self.schedule
        for process in self.processes:
            schedule.call(process, self.serve, process)
        threads = dict[Rank, Any]()
        for rank in self.ranks:
            schedule.call(rank.process, rank.join)
            threads[rank] = schedule.begin(rank.process, rank.run)
        for fault in faults:
            schedule.sleep(self.moment() + self.moment())
            self.fail(fault)
        for rank, thread in threads.items():
            if not rank.process.dead:
                thread.join(20 * PATIENCE)
                assert thread.over, "a rank hangs"
        self.judge()
        self.close()

    def fail(self, fault: str) -> None:
        """Make a fault happen."""
        rank = self.random.choice(self.ranks)
        assert len(self.serving()) <= 1, "two servers serve"
        if fault == "rank dies" and not rank.process.dead:
            self.schedule.kill(rank.process)
        elif fault == "connections end" and not rank.process.dead:
            self.schedule.cut(rank.process)
        elif fault == "server dies":
            for process in self.serving():
                self.schedule.kill(process)
        elif fault == "server closes":
            for process in self.serving():
                self.schedule.call(process, self.servers.pop(process).close)

    def judge(self) -> None:
        """Judge that one server serves, that ranks reach it, and that nothing is left in hand."""
        schedule = self.schedule
        living = [process for process in self.servers if not process.dead]
        if not living:
            return
        schedule.wait(lambda: len(self.serving()) == 1, PATIENCE)
        assert len(self.serving()) == 1, f"{len(self.serving())} servers serve"
        server = self.servers[self.serving()[0]]
        for rank in self.ranks:
            if not rank.process.dead:
                assert rank.client is not None
                joined = schedule.call(rank.process, rank.client.wait, PATIENCE)
                assert joined, "a rank finds no server"

        def is_idle() -> bool:
            counts = schedule.call(self.serving()[0], server.statistics)
            return counts.get("leases", 0) == counts.get("requests", 0) == 0

        for _ in range(100):
            if is_idle():
                return
            schedule.sleep(1.0)
        raise AssertionError(f"rows are still lent: {server.statistics()}")

    def close(self) -> None:
        """End all that live."""
        for rank in self.ranks:
            if not rank.process.dead:
                self.schedule.call(rank.process, rank.close)
        for process, server in self.servers.items():
            if not process.dead:
                self.schedule.call(process, server.close)


_copy = MappedRows.copy


def _slow_copy(rows: MappedRows, *arguments: Any) -> Any:
    """Copy blocks late now and then."""
    schedule = current()
    schedule.sleep(schedule.random.choice((0.0, 0.0, 1e-3, 0.3)))
    return _copy(rows, *arguments)


def hands(schedule: Schedule) -> None:
    """Run ranks that save and load through one server, and lose their sessions or die."""
    faults = ["rank dies", "connections end", "connections end"]
    with patch.object(MappedRows, "copy", _slow_copy):
        Servers(schedule, 1).run(schedule.random.sample(faults, schedule.random.randint(0, 3)))


def takeovers(schedule: Schedule) -> None:
    """Run ranks whose servers die or close, and others take over."""
    faults = ["server dies", "server dies", "server closes"]
    many = schedule.random.randint(2, 3)
    Servers(schedule, many).run(schedule.random.sample(faults, schedule.random.randint(1, 2)))
