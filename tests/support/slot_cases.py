# SPDX-License-Identifier: Apache-2.0
"""Cases of the disk tier: blocks whose bytes follow from their key, an engine that fails on demand,
a stand-in for a graph, and children that end in any way."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from portakv.errors import StoreBusy
from portakv.storage import Disk, image
from portakv.storage.form import BlockForm
from portakv.storage.io.base import Ended, Request
from portakv.storage.tiers.disk import DiskStore
from portakv.storage.tiers.folder import Place, Slots
from support.io_calls import carry
from support.storage_cases import aligned, key_of, small_form

Bytes = npt.NDArray[np.uint8]
FORM = small_form(2, 1, widths=(8, 8))  # images of 8,192 bytes
IMAGE = FORM.image_bytes
LARGE = small_form(2, 2, widths=(8192, 8192))  # two segments of 256 KiB
KEYS = [key_of(number) for number in range(1, 100)]


def images(count: int, of: BlockForm) -> Bytes:
    """Return memory for so many images."""
    return aligned(count * of.image_bytes).reshape(count, -1)


def payload(of: BlockForm, key: bytes) -> Bytes:
    """Return the payload of the block of ``key``."""
    return np.random.default_rng([*key]).integers(0, 256, of.payload_bytes, np.uint8)


def fill(row: Bytes, of: BlockForm, key: bytes, generation: int) -> tuple[int, ...]:
    """Write the image of ``key`` into a row, and return its checksums."""
    row[image.HEADER : image.HEADER + of.payload_bytes] = payload(of, key)
    return image.seal(row, of, key, generation)


def holds(row: Bytes, of: BlockForm, key: bytes) -> bool:
    """Return True if a row has the block of ``key``."""
    data = row[image.HEADER : image.HEADER + of.payload_bytes]
    return bool(np.array_equal(data, payload(of, key)))


class Faulty:
    """An engine: ``fail(request)`` is the result of a request that it does not carry out."""

    name: str = "faulty"
    notes: tuple[str, ...] = ()

    def __init__(self, fail: Callable[[Request], int | None] = lambda request: None) -> None:
        self.fail = fail
        self.closed = False
        self.received: list[Request] = []

    def run(self, requests: Sequence[Request], ended: Ended | None = None) -> list[int]:
        self.received += requests
        failed = [self.fail(each) for each in requests]
        results = list[int]()
        for n, fault in reversed([*enumerate(failed)]):
            results.insert(0, carry(requests[n]) if fault is None else fault)
            if ended:
                ended(n, results[0])
        return results

    def close(self) -> None:
        self.closed = True


class Tally:
    """The part of a graph that a tier's store uses: queues and counts."""

    def __init__(self) -> None:
        self.queues: dict[str, Any] = {}
        self.counts: Counter[tuple[str, str]] = Counter()

    def queue(self, name: str, width: int = 1) -> Any:
        queue = SimpleNamespace(name=name, width=width, queued_bytes=0)
        return self.queues.setdefault(name, queue)

    def count(self, tier: str, op: str, result: str, blocks: int = 1, nbytes: int = 0) -> None:
        assert tier == "disk"
        self.counts[op, result] += blocks


ENGINE = Faulty()


def opened(folder: Path, slots: int | None = 8, form: BlockForm = FORM, **more: Any) -> Slots:
    return Slots(folder, form, slots and slots * form.image_bytes, ENGINE, **more)


def put(slots: Slots, key: bytes, generation: int) -> bool:
    """Write a block as `DiskStore.write` does."""
    row = images(1, slots.form)[0]
    sums = fill(row, slots.form, key, generation)
    slot = slots.take(key)
    if slot is None:
        return False
    ask = Request(slots.fd, slot * slots.form.image_bytes, row.ctypes.data, row.size, True)
    assert ENGINE.run([ask]) == [row.size]
    return slots.seal(slot, key, generation, sums)


def entries(slots: Slots) -> dict[bytes, Place]:
    """Return all entries of the index; nothing stays pinned."""
    result = {key: pinned(slots, key) for key in slots.index}
    for entry in result.values():
        slots.unpin(entry)
    return result


def pinned(slots: Slots, key: bytes) -> Place:
    (entry,) = slots.pin([key])
    assert entry is not None
    return entry


def sizes(folder: Path) -> list[int]:
    return [(folder / name).stat().st_size for name in ("slots", "table")]


def forked(work: Callable[[], object]) -> int:
    """Return the pid of a child that does ``work`` and exits with 0, with 1 if it raises, or in a
    minute."""
    if pid := os.fork():
        return pid
    signal.alarm(60)
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


def telling(work: Callable[[int], object]) -> tuple[int, int]:
    """Return a child as of `forked`, and a pipe of its output, which ends with it because no other
    process can write."""
    readable, writable = os.pipe()
    pid = forked(lambda: work(writable))
    os.close(writable)
    return pid, readable


def ended_well(pid: int) -> bool:
    """Return True if a child's work did not raise."""
    return os.waitpid(pid, 0)[1] == 0


def kill(pid: int) -> None:
    """Kill -9, and wait for the end."""
    os.kill(pid, 9)
    os.waitpid(pid, 0)


def kill_writer(work: Callable[[int], object], most: float) -> None:
    """Kill a child that writes, within ``most`` seconds after it reports its begin."""
    pid, readable = telling(work)
    assert os.read(readable, 1) == b"x"
    os.close(readable)
    time.sleep(random.random() * most)
    kill(pid)


def reopened(tier: Disk, form: BlockForm) -> DiskStore:
    """Return the store of a tier, as soon as the requests of a process that was killed have
    landed."""
    return all_reopened(tier, [form])[0]


def all_reopened(tier: Disk, forms: list[BlockForm]) -> list[DiskStore]:
    """Return the stores of several own forms, as `reopened` does."""
    graph: Any = Tally()
    until = time.monotonic() + 10
    while True:
        try:
            return tier.open(graph, SimpleNamespace(memory=()), forms, len(forms))
        except StoreBusy:
            assert time.monotonic() < until
            time.sleep(0.005)
