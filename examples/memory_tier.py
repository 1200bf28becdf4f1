# SPDX-License-Identifier: Apache-2.0
"""A tier of a block store in memory of this process: the smallest tier that keeps the contract.

    portakv conform --contract tier portakv_examples.memory_tier:make

The command needs the extras conformance, storage and migrate.

A real tier writes the images to its medium where this one writes them to a dict. Nothing stays
after the process has ended, so the tier has no other forms to find.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from portakv.ext import BlockForm, Graph, Queue, Reason, Report, Rows, image, reasons


class MemoryTier:
    """Images of blocks in memory, at most ``capacity`` bytes of them for each form."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity

    def forms(self, form: BlockForm) -> list[BlockForm]:
        """Return no forms: nothing was stored before this process started."""
        return []

    def open(
        self, graph: Graph, rows: Rows, forms: Sequence[BlockForm], own: int = 1
    ) -> list[MemoryStore]:
        """Return an empty tier store for each of the block store's own forms, which come first."""
        return [MemoryStore(graph, form, self.capacity) for form in forms[:own]]


class MemoryStore:
    """The blocks of one form. A lock guards the images, because workers call together."""

    tier = "memory"
    where = "memory of this process"
    writable = True
    generation = 0

    def __init__(self, graph: Graph, form: BlockForm, capacity: int) -> None:
        self.form = form
        self.notes = [f"up to {capacity:,} bytes"]
        self._most = capacity // form.image_bytes
        self._images: dict[bytes, bytes] = {}
        self._lock = threading.Lock()
        self._queue = graph.queue("memory", width=2)

    def known(self, keys: Sequence[bytes]) -> list[bool]:
        """Return which blocks are stored."""
        return [key in self._images for key in keys]

    def has(self, keys: Sequence[bytes], timeout: float | None = None) -> list[bool]:
        """Return which blocks are stored. A remote tier asks its server here."""
        return self.known(keys)

    def wants(self, keys: Sequence[bytes]) -> list[bool]:
        """Return which blocks a save has to bring."""
        return [not there for there in self.known(keys)]

    def queue(self, key: bytes) -> Queue:
        """Return the queue whose workers read a block."""
        return self._queue

    def queue_for_write(self, nbytes: int) -> Queue:
        """Return the queue whose workers write blocks."""
        return self._queue

    def read(
        self,
        keys: Sequence[bytes],
        rows: Sequence[image.Row],
        segments: Sequence[int] | None,
        stop: Callable[[], bool],
        report: Report,
    ) -> list[bool]:
        """Read whole images into rows, and verify the requested segments."""
        return [
            self._read_one(key, row, segments, report) for key, row in zip(keys, rows, strict=True)
        ]

    def _read_one(
        self, key: bytes, row: image.Row, segments: Sequence[int] | None, report: Report
    ) -> bool:
        stored = self._images.get(key)
        if stored is None:
            report(key, Reason(reasons.MISSING, self.where))
            return False
        row[: self.form.image_bytes] = np.frombuffer(stored, np.uint8)
        head = image.header(row, self.form)
        if (
            isinstance(head, str)
            or head.key != key
            or not image.verify(row, self.form, head.checksums, head.generation, segments)
        ):
            with self._lock:
                self._images.pop(key, None)
            report(key, Reason(reasons.DAMAGED, self.where))
            return False
        return True

    def write(
        self,
        queue: Queue,
        keys: Sequence[bytes],
        rows: Sequence[image.Row],
        generations: Sequence[int],
        checksums: Sequence[Sequence[int]],
        own: Mapping[bytes, int] | None = None,
        evict: bool = True,
        *,
        report: Report,
    ) -> list[bool]:
        """Store sealed images. A full store drops new blocks, and evicts none."""
        landed = []
        for key, row in zip(keys, rows, strict=True):
            with self._lock:
                there = key in self._images
                if not there and len(self._images) < self._most:
                    self._images[key] = row[: self.form.image_bytes].tobytes()
                    there = True
            if not there:
                report(key, Reason(reasons.DROPPED, self.where))
            landed.append(there)
        return landed

    def touch(self, keys: Sequence[bytes], follows: Sequence[int] = ()) -> None:
        """Do nothing: this tier evicts no block, so it needs no order of use."""

    def statistics(self) -> dict[str, Any]:
        """Return figures that fit into JSON."""
        return {"blocks": len(self._images)}

    def close(self) -> None:
        """Forget all blocks."""
        self._images.clear()


def make(folder: Path) -> MemoryTier:
    """Return the tier for the contract suite, which passes an empty folder to each tier."""
    return MemoryTier(capacity=8 << 20)
