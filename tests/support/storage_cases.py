# SPDX-License-Identifier: Apache-2.0
"""Small forms, images and caches for the tests of block stores."""

from __future__ import annotations

import mmap
import threading
from typing import Any

import numpy as np
import torch

from portakv.runtime.interrupts import uninterrupted
from portakv.storage import image
from portakv.storage.form import BlockForm
from portakv.storage.memory import Rows
from support.core_cases import noise
from support.waits import LIMIT


def small_form(layers: int = 4, heads: int = 2, block_size: int = 4, **other: Any) -> BlockForm:
    """Return a form in the canonical layout; ``other`` replaces any field of it."""
    fields: dict[str, Any] = {
        "model": "org/model@1",
        "dtype": "float16",
        "kv": 2,
        "widths": (32, 32),
        "block_size": block_size,
        "layers": (0, layers, layers),
        "heads": (0, heads, heads),
        "layout": "block layer head kv token dim",
    }
    return BlockForm(**{**fields, **other})


def key_of(number: int) -> bytes:
    """Return a key of 32 bytes that contains its number."""
    return number.to_bytes(4, "little") * 8


def rows_in_use(rows: Rows) -> int:
    """Return the number of cached rows that transfers read."""

    def count() -> int:
        rows.forget_loans()
        with rows.chains.lock:
            loans = [*rows.begun, *rows.counted]
        return len({row for loan in loans for row in loan.rows if row is not None})

    return uninterrupted(count)


def counts_of(rows: Rows) -> dict[str, int]:
    """Return the number of rows by their state, of rows of one size."""
    return {state: n // rows.row_bytes for state, n in rows.nbytes_by_state().items()}


def sealed(form: BlockForm, keys: list[bytes], generation: int = 1, seed: int = 0) -> torch.Tensor:
    """Return images of random rows, uint8 ``[keys, image bytes]``."""
    rows = noise(len(keys), form.image_bytes, dtype=torch.uint8, seed=seed)
    for row, key in zip(rows.numpy(), keys, strict=True):
        image.seal(row, form, key, generation)
    return rows


def payloads(rows: torch.Tensor, form: BlockForm) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the payloads of images, uint8 ``[images, payload bytes]``."""
    return rows.numpy()[:, image.HEADER : image.HEADER + form.payload_bytes]


def aligned(nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return zeroed bytes that begin with a page."""
    return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)


class FakeTier:
    """A tier whose blocks are bytes in a dict by form and key, and that fails on demand.

    ``faults`` maps a key to the faults of its next reads: "flip", "error", or a callable.
    """

    def __init__(self, tier: str = "fake", writable: bool = True, width: int = 2) -> None:
        self.tier = tier
        self.writable = writable
        self.width = width
        self.blocks: dict[tuple[BlockForm, bytes], bytes] = {}
        self.faults: dict[bytes, list[Any]] = {}
        self.reads: list[tuple[bytes, Any]] = []
        self.requested: list[bytes] = []  # by `has`, over what would be a network
        self.hold: Any = None  # an event that writes wait for
        self.began = threading.Event()  # set when a write begins
        self.refuse = False
        self.writes = 0
        self.closed = 0

    def forms(self, form: BlockForm) -> list[BlockForm]:
        return [x for x in dict.fromkeys(x for x, _ in self.blocks) if form.same_cache(x)]

    def open(self, graph: Any, rows: Any, forms: Any, own: int = 1) -> list[FakeStore]:
        queue = graph.queue(f"{self.tier}:x", width=self.width)
        return [FakeStore(self, form, queue, form in forms[:own]) for form in forms]

    def put(self, form: BlockForm, keys: list[bytes], rows: torch.Tensor) -> None:
        """Store blocks as sealed images."""
        for key, row in zip(keys, rows.numpy(), strict=True):
            self.blocks[form, key] = row[: form.image_bytes].tobytes()


class FakeStore:
    """The part of a `FakeTier` that a `BlockStore` uses."""

    def __init__(self, owner: FakeTier, form: BlockForm, queue: Any, own: bool) -> None:
        self.tier = owner.tier
        self.form = form
        self.notes = ["a dict of bytes"]
        self.where = queue.name
        self.writable = own and owner.writable
        self.generation = 0
        self._owner = owner
        self._queue = queue

    def has(self, keys: Any, timeout: float | None = None) -> list[bool]:
        self._owner.requested += keys
        return self._there(keys)

    def known(self, keys: Any) -> list[bool]:
        near = self.tier != "remote"
        there = zip(keys, self._there(keys), strict=True)
        return [x and (near or key in self._owner.requested) for key, x in there]

    def wants(self, keys: Any) -> list[bool]:
        return [not known for known in self.known(keys)]

    def _there(self, keys: Any) -> list[bool]:
        return [(self.form, key) in self._owner.blocks for key in keys]

    def queue(self, key: bytes) -> Any:
        return self._queue

    def queue_for_write(self, nbytes: int) -> Any:
        return self._queue

    def read(
        self, keys: Any, rows: Any, segments: Any = None, stop: Any = None, report: Any = None
    ) -> list[bool]:
        return [self._read(key, row, segments) for key, row in zip(keys, rows, strict=True)]

    def _read(self, key: bytes, row: Any, segments: Any) -> bool:
        self._owner.reads.append((key, segments))
        stored = self._owner.blocks.get((self.form, key))
        fault = self._owner.faults[key].pop(0) if self._owner.faults.get(key) else None
        if callable(fault):
            fault()
        if fault == "error":
            raise OSError(5, "Input/output error")
        if stored is None:
            return False
        data = np.frombuffer(stored, np.uint8).copy()
        if fault == "flip":
            data[image.HEADER + 7] ^= 4
        head = image.header(data, self.form)
        assert not isinstance(head, str)
        assert head.key == key
        spans = [(0, len(data))]
        if segments is not None:
            cut = [self.form.segments[i] for i in segments]
            spans = [(image.HEADER + x.offset, image.HEADER + x.offset + x.nbytes) for x in cut]
        for a, b in spans:
            row[a:b] = data[a:b]
        right = image.verify(row, self.form, head.checksums, head.generation, segments)
        if not right:
            self._owner.blocks.pop((self.form, key), None)
        return right

    def write(self, _: Any, keys: Any, rows: Any, *known: Any, report: Any = None) -> list[bool]:
        generations, sums, *_ = known
        self._owner.began.set()
        if self._owner.hold is not None:
            assert self._owner.hold.wait(LIMIT)
        if self._owner.refuse:
            return [False] * len(keys)
        self._owner.writes += len(keys)
        for key, row, generation, checks in zip(keys, rows, generations, sums, strict=True):
            head = image.header(row, self.form)
            assert head == (key, generation, checks)
            self._owner.blocks[self.form, key] = row[: self.form.image_bytes].tobytes()
        return [True] * len(keys)

    def touch(self, keys: Any, follows: Any = ()) -> None:
        pass

    def statistics(self) -> dict[str, Any]:
        return {"blocks": len(self._owner.blocks)}

    def close(self) -> None:
        self._owner.closed += 1
