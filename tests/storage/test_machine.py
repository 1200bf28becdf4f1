# SPDX-License-Identifier: Apache-2.0
"""A block store against a dict of bytes: saves, loads, prefetches, lookups, cancels, deadlines and
restarts in any order, over a real disk tier whose bytes rot, whose requests fail or end short, and
a far tier that fails."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.core_cases import noise
from support.slot_cases import Faulty
from support.storage_cases import FakeTier, key_of

from portakv import KVView
from portakv.storage.disk import Disk
from portakv.storage.engine import Request
from portakv.storage.form import BlockForm
from portakv.storage.store import BlockStore
from portakv.storage.threads import carry

LIMIT = 20.0  # seconds after which it counts as a deadlock
LAYOUT = "layer | block kv token head dim"
COUNT = 40  # keys; key i names what block i of the source holds
SHAPES: dict[str, Any] = {
    "one segment": {"layers": 3, "tail": (2, 4, 2, 24)},
    "four segments": {"layers": 4, "tail": (2, 64, 8, 128)},
}


class Machine:
    """A store, what it must hold, and what is under way."""

    def __init__(self, folder: Path, seed: int, shape: str) -> None:
        self.random, self.folder = random.Random(seed), folder
        layers, tail = SHAPES[shape]["layers"], SHAPES[shape]["tail"]
        self.source = self.cache(COUNT, layers, tail, seed)
        self.target = self.cache(COUNT, layers, tail, seed + 1000)
        self.truth, self.held = self.bytes_of(self.source), self.bytes_of(self.target)
        self.form = BlockForm.of(self.source, "org/model@1")
        self.far = FakeTier("remote")
        self.free = list(range(COUNT))  # blocks of the target that no load has
        self.open: list[tuple[Any, list[int], list[int], bool]] = []
        self.landed = self.steps = self.failed = 0
        self.chance = random.Random(seed)  # of workers
        self.reopen()

    def cache(self, blocks: int, layers: int, tail: tuple[int, ...], seed: int) -> KVView:
        dtype = torch.float16
        return KVView(
            [noise(blocks, *tail, dtype=dtype, seed=seed + i) for i in range(layers)], LAYOUT
        )

    def bytes_of(self, view: KVView) -> list[Any]:
        """For each layer all bytes of each block, ``[blocks, bytes]``; no copy."""
        return [x.view(torch.uint8).numpy().reshape(len(x), -1) for x in view.tensors]

    def reopen(self) -> None:
        size, draw = self.form.image_bytes, self.random
        io = draw.choice(("threads", None, Faulty(self.fail), Faulty(self.fail)))
        disk = Disk(self.folder, capacity=draw.choice((8, 20)) * size, io=io)
        self.store = BlockStore(
            self.form,
            staging=draw.choice((1, 3, 9)) * size,
            host=draw.choice((0, 1, 6)) * size,
            tiers=draw.choice(([disk], [disk, self.far], [self.far])),
            full=draw.choice(("drop", "wait")),
        )

    def fail(self, request: Request) -> int | None:
        """Now and then a request of the disk fails, or ends short."""
        kind = self.chance.random()
        self.failed += kind < 0.03
        if kind < 0.01:
            return -errno.EIO
        return carry(request._replace(nbytes=request.nbytes // 2)) if kind < 0.03 else None

    def keys(self) -> list[int]:
        first, many = self.random.randrange(COUNT), self.random.choice((1, 2, 5, 12))
        some = [(first + i) % COUNT for i in range(many)]
        return some if self.random.random() < 0.7 else self.random.sample(range(COUNT), many)

    def step(self) -> None:
        self.steps += 1
        draw = self.random
        what = draw.choices(
            ("save", "load", "prefetch", "lookup", "end", "cancel", "fault", "rot", "reopen"),
            (20, 30, 4, 10, 25, 4, 6, 2, 0.7),
        )[0]
        getattr(self, what)()
        while len(self.open) > 12:
            self.end()

    def terms(self) -> dict[str, Any]:
        draw = self.random
        deadline = draw.choice((None, None, None, 0.0, -1.0, 0.002, LIMIT))
        return {"priority": draw.choice(("urgent", "normal", "background")), "deadline": deadline}

    def save(self) -> None:
        some = self.keys()
        handle = self.store.save(self.source, some, [key_of(i) for i in some], **self.terms())
        self.open.append((handle, some, [], False))

    def load(self) -> None:
        some = self.keys()[: len(self.free)]
        blocks = [self.free.pop(self.random.randrange(len(self.free))) for _ in some]
        by_layer = self.random.random() < 0.4
        handle = self.store.load(
            self.target,
            blocks,
            [key_of(i) for i in some],
            by_layer=by_layer,
            missing=self.random.choice(("raise", "skip")),
            **self.terms(),
        )
        self.open.append((handle, some, blocks, by_layer))

    def prefetch(self) -> None:
        if self.store.rows.host:
            some = self.keys()
            self.open.append((self.store.prefetch([key_of(i) for i in some]), some, [], False))

    def lookup(self) -> None:
        some = self.keys()
        assert 0 <= self.store.lookup([key_of(i) for i in some]) <= len(some)

    def end(self) -> None:
        """Wait for a transfer: what landed is right, and where nothing landed nothing changed."""
        if not self.open:
            return
        handle, some, blocks, by_layer = self.open.pop(self.random.randrange(len(self.open)))
        gate = handle._gates[-1]
        assert gate.wait(LIMIT), "a deadlock"
        for number, block in enumerate(blocks):
            landed = bool(handle.landed[number])
            self.landed += landed
            for truth, held, was in zip(
                self.truth, self.bytes_of(self.target), self.before, strict=True
            ):
                if landed:
                    assert (held[block] == truth[some[number]]).all(), "a wrong byte"
                elif not (by_layer and (held[block] == truth[some[number]]).all()):
                    assert (held[block] == was[block]).all(), "a block that did not land changed"
                was[block] = held[block]
        self.free += blocks

    @property
    def before(self) -> list[Any]:
        """What the target held when each of its blocks became free the last time."""
        if not hasattr(self, "_before"):
            self._before = [x.copy() for x in self.held]
        return self._before

    def cancel(self) -> None:
        if self.open:
            self.random.choice(self.open)[0].cancel()

    def fault(self) -> None:
        key = key_of(self.random.randrange(COUNT))
        kind = self.random.choice(("flip", "error", "gone", "refuse"))
        if kind == "gone":
            self.far.blocks.pop((self.form, key), None)
        elif kind == "refuse":
            self.far.refuse = not self.far.refuse
        else:
            self.far.faults.setdefault(key, []).append(kind)

    def rot(self) -> None:
        """Some bytes of the disk tier change below the store."""
        for path in self.folder.glob("*/slots"):
            with path.open("r+b") as file:
                file.seek(self.random.randrange(path.stat().st_size - 8))
                file.write(self.random.randbytes(8))

    def reopen_(self) -> None:
        while self.open and self.random.random() < 0.8:
            self.end()
        self.store.close(LIMIT)
        while self.open:
            self.end()
        counts = self.store.rows.counts()
        assert counts["lent"] == 0, "a leaked row"
        assert counts["free"] + counts["kept"] == self.store.rows.tensor.shape[0]


def run(folder: Path, seed: int, shape: str, steps: int) -> None:
    machine = Machine(folder, seed, shape)
    opened, machine.reopen = machine.reopen, lambda: (machine.reopen_(), opened())[0]  # type: ignore[method-assign, func-returns-value]
    for _ in range(steps):
        machine.step()
    machine.reopen_()
    assert machine.landed > steps / 50
    assert machine.failed or steps < 1000
    assert all(
        np.array_equal(a, b)
        for a, b in zip(machine.truth, machine.bytes_of(machine.source), strict=True)
    )


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_calls(tmp_path: Path, seed: int) -> None:
    run(tmp_path / "kv", seed, "one segment", 400)


def test_any_order_of_calls_by_segments(tmp_path: Path) -> None:
    run(tmp_path / "kv", 11, "four segments", 150)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_hundred_thousand_calls(tmp_path: Path, seed: int) -> None:
    run(tmp_path / "kv", 100 + seed, "one segment" if seed else "four segments", 10_000)
