# SPDX-License-Identifier: Apache-2.0
"""Saves, loads and evictions of a block store in a schedule, with a slow tier that fails.

The bytes of a block follow from its key: what has landed is right or wrong. A block that a save has
released has other bytes immediately.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

from portakv import KVView
from portakv.errors import (
    PortaKVError,
    StoreError,
    TransferCancelled,
    TransferError,
    TransferTimeout,
)
from portakv.storage import BlockForm
from portakv.storage.store import BlockStore
from support.schedules import Schedule, current
from support.storage_cases import FakeStore, FakeTier, rows_in_use

LAYOUT = "layer | block kv token head dim"
SIZE = 2
BLOCKS = 3
GARBAGE = -1
#: Seconds in which each call ends.
PATIENCE = 60.0
KEYS = [bytes([number]) * 32 for number in range(6)]


class SlowTier(FakeTier):
    """A tier whose calls take time, and of which some fail.

    Attributes:
        stored: the keys of all blocks that were stored, also of those that were lost since.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stored = set[bytes]()

    def open(self, graph: Any, rows: Any, forms: Any, own: int = 1) -> list[FakeStore]:
        queue = graph.queue(f"{self.tier}:x", width=self.width)
        return [SlowStore(self, form, queue, form in forms[:own]) for form in forms]


class SlowStore(FakeStore):
    """The store of a `SlowTier`."""

    def __init__(self, owner: SlowTier, *terms: Any) -> None:
        super().__init__(owner, *terms)
        self._stored = owner.stored

    def read(self, keys: Any, *arguments: Any, **named: Any) -> list[bool]:
        schedule = current()
        self.suffer(schedule)
        if schedule.random.random() < 0.1:
            self._owner.faults[keys[0]] = ["flip"]
        return super().read(keys, *arguments, **named)

    def write(self, _: Any, keys: Any, *arguments: Any, **named: Any) -> list[bool]:
        self.suffer(current())
        written = super().write(_, keys, *arguments, **named)
        self._stored |= {*keys}
        return written

    def suffer(self, schedule: Schedule) -> None:
        """Take some time, and fail now and then."""
        schedule.sleep(schedule.random.choice((0.0, 0.0, 1e-3, 0.3)))
        if schedule.random.random() < 0.1:
            raise OSError(5, "Input/output error")


class Stores:
    """A store of one schedule, and threads that call it."""

    def __init__(self, schedule: Schedule, tier: bool) -> None:
        self.schedule = schedule
        self.random = schedule.random
        self.process = schedule.process("stores")
        self.tier = SlowTier() if tier else None
        self.rows = self.random.choice((0, 2, 4)) if tier else self.random.choice((2, 3, 4))
        self.closed = False
        self.deletes = not tier and self.random.random() < 0.5
        self.deleted = set[int]()

    def open(self) -> None:
        """Open the store."""
        view = self.view()[0]
        form = BlockForm.of(view, "model")
        self.store = BlockStore(
            form,
            host=self.rows * form.image_bytes,
            staging=2 * form.image_bytes,
            tiers=[] if self.tier is None else [self.tier],
            pin=False,
        )

    @staticmethod
    def view() -> tuple[KVView, list[torch.Tensor]]:
        """Return a view of blocks without a key."""
        tensors = [torch.full((BLOCKS, 2, SIZE, 2, 8), GARBAGE, dtype=torch.int32) for _ in "01"]
        return KVView(tensors, LAYOUT), tensors

    def moment(self) -> float:
        """Draw some seconds."""
        return self.random.choice((0.0, 0.0, 1e-3, 0.02, 0.3))

    def act(self) -> None:
        """Make some calls, one after the other."""
        acts = [self.save, self.save, self.load, self.load]
        if self.tier is None:
            acts.append(self.pin)
        if self.deletes:
            acts.append(self.delete)
        for _ in range(self.random.randint(2, 5)):
            self.schedule.sleep(self.moment())
            try:
                self.random.choice(acts)(self.random.sample(range(len(KEYS)), BLOCKS))
            except StoreError:
                assert self.closed, "a store that is open refuses a call"

    def end(self, handle: Any, may_fail: bool) -> None:
        """Cancel a transfer perhaps, and wait for its end."""
        cancelled = self.random.random() < 0.2
        if cancelled:
            self.schedule.sleep(self.moment())
            handle.cancel()
        try:
            handle.synchronize(PATIENCE)
        except TransferTimeout:
            raise AssertionError("a handle does not end") from None
        except TransferCancelled:
            assert cancelled or self.closed, "another call was cancelled"
        except TransferError:
            if not (may_fail or self.closed):
                raise

    def save(self, keys: list[int]) -> None:
        """Save blocks, and use them again as soon as they are released."""
        view, tensors = self.view()
        for layer, tensor in enumerate(tensors):
            for block, key in enumerate(keys):
                tensor[block] = 100 * (key + 1) + layer
        self.deleted -= {*keys}
        full: Any = self.random.choice(("drop", "wait"))
        deadline = self.random.choice((None, None, 0.05))
        names = [KEYS[key] for key in keys]
        saved = self.store.save(view, [0, 1, 2], names, full=full, deadline=deadline)
        assert saved.released is not None
        with suppress(PortaKVError):
            saved.released.wait()
        assert saved.released.done(), "the blocks of a save were not released"
        for tensor in tensors:
            tensor[:] = GARBAGE
        self.end(saved, may_fail=True)
        if self.tier is not None and not self.rows:
            landed = {name for name, good in zip(names, saved.landed, strict=True) if good}
            assert landed <= self.tier.stored, "a save has ended whose blocks are not stored"

    def load(self, keys: list[int]) -> list[bool]:
        """Load blocks, compare those that have landed, and return which have."""
        view, tensors = self.view()
        names = [KEYS[key] for key in keys]
        deadline = self.random.choice((None, None, 0.05))
        blocks = range(len(keys))
        loaded = self.store.load(view, blocks, names, deadline=deadline, missing="skip")
        self.end(loaded, may_fail=self.tier is not None or deadline is not None)
        landed: list[bool] = loaded.landed.tolist()
        for layer, tensor in enumerate(tensors):
            for block, key in enumerate(keys):
                right = 100 * (key + 1) + layer if landed[block] else GARBAGE
                assert (tensor[block] == right).all(), "a block has wrong bytes after a load"
        return landed

    def pin(self, keys: list[int]) -> None:
        """Pin blocks, which stay until they are released."""
        pins = self.store.pin([KEYS[key] for key in keys])
        held = [key for key, stays in zip(keys, pins.held, strict=True) if stays]
        for _ in range(2):
            self.schedule.sleep(self.moment())
            for key in held:
                there = self.store.has(KEYS[key])
                assert there or self.deletes or self.closed, "a pinned block was evicted"
        pins.release()

    def delete(self, keys: list[int]) -> None:
        """Delete a block."""
        self.store.delete([KEYS[keys[0]]])

    def run(self) -> None:
        """Have threads call the store, which closes meanwhile perhaps, and judge what is left."""
        schedule = self.schedule
        schedule.call(self.process, self.open)
        threads = [schedule.begin(self.process, self.act) for _ in range(3)]
        if self.random.random() < 0.2:
            schedule.sleep(self.moment() + self.moment())
            self.closed = True
            schedule.call(self.process, self.store.close)
        for thread in threads:
            thread.join(20 * PATIENCE)
            assert thread.over, "a call hangs"
        if not self.closed:
            schedule.call(self.process, self.judge)
            self.closed = True
            schedule.call(self.process, self.store.close)

    def judge(self) -> None:
        """Judge that no row is in use, and that a store without blocks has space for new ones."""
        assert rows_in_use(self.store.rows) == 0, "rows are in use"
        self.store.delete(KEYS)
        if self.tier is None:
            keys = [*range(min(self.rows, BLOCKS))]
            view, tensors = self.view()
            for layer, tensor in enumerate(tensors):
                for block, key in enumerate(keys):
                    tensor[block] = 100 * (key + 1) + layer
            names = [KEYS[key] for key in keys]
            self.store.save(view, keys, names, full="wait").synchronize(PATIENCE)
            landed = sum(self.store.has(name) for name in names)
            assert landed == len(keys), f"rows were lost: {landed} of {len(keys)} blocks fit"


def saves(schedule: Schedule) -> None:
    """Save and load blocks through a tier that is slow and fails."""
    Stores(schedule, tier=True).run()


def evictions(schedule: Schedule) -> None:
    """Save, load, pin and delete more blocks than the host tier has rows."""
    Stores(schedule, tier=False).run()
