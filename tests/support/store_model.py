# SPDX-License-Identifier: Apache-2.0
"""Parts of the model-based test of block stores: caches in several layouts that show the bytes of
any block, and an engine that waits, fails and dies on demand."""

from __future__ import annotations

import ctypes
import errno
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from portakv import KVView
from portakv.errors import TransferCancelled, TransferError, TransferTimeout
from portakv.storage.form import BlockForm
from portakv.storage.io.base import Ended, Engine, Request
from portakv.storage.tiers.disk import Disk, DiskStore
from portakv.storage.tiers.folder import Slots
from support.io_calls import carry
from support.waits import LIMIT

ORDER = ("block", "kv", "head", "token", "dim")
#: Of blocks of the size of the form's, of half of it and of twice as many tokens.
LAYOUTS = {
    "layer | block kv token head dim": 1.0,
    "layer | block head kv token dim": 0.5,
    "block layer token kv head dim": 2.0,
}


class Cache:
    """A paged cache. ``planes``: the elements of each layer, int16 ``[block, kv, head, token,
    dim]``, which are no copy; ``was``: what they are to be; ``free``: blocks that no load has."""

    def __init__(self, layout: str, **extents: int) -> None:
        names = layout.rpartition("|")[2].split()
        many = extents["layer"] if "|" in layout else 1
        shape = [extents[name] for name in names]
        left = [x for x in names if x != "layer"]
        tensors = [torch.zeros(shape, dtype=torch.float16) for _ in range(many)]
        self.view = KVView(tensors if "|" in layout else tensors[0], layout)
        parts = tensors if "|" in layout else tensors[0].unbind(names.index("layer"))
        axes = [left.index(name) for name in ORDER]
        self.planes: Any = [x.view(torch.int16).permute(axes).numpy() for x in parts]
        self.size = extents["token"]
        self.blocks = extents["block"]
        self.forget()

    def forget(self) -> None:
        """Expect the present content from now on; no load has any block of it."""
        self.was = [plane.copy() for plane in self.planes]
        self.free = list(range(self.blocks))

    def holds(self) -> bool:
        """Return True if it holds the expected elements."""
        return all(map(np.array_equal, self.planes, self.was))

    def lend(self, tokens: int, value: int) -> list[int]:
        """Return blocks for so many tokens, in no order, all of whose elements are ``value``."""
        many = -(-tokens // self.size)
        blocks = [self.free.pop(7 * many % len(self.free)) for _ in range(many)]
        for array in (*self.planes, *self.was):
            array[blocks] = value
        return blocks


def tokens_of(plane: Any, blocks: Sequence[int]) -> Any:
    """Return a copy of the tokens of blocks in order, ``[kv, head, token, dim]``."""
    some = np.moveaxis(plane[blocks], 0, 2)
    return some.reshape(*some.shape[:2], -1, some.shape[-1])


class World:
    """Keys and what they name, ``truth``: ``[layer, kv, head, token, dim]``; caches that have it,
    others to load it into; ``ranks``: the whole model, halves of its heads and of its layers, and
    two quarters of its heads."""

    def __init__(self, folder: Path, keys: int, size: int, layers: int, heads: int, dim: int):
        self.folder = folder
        self.keys = keys
        self.size = size
        self.steps = 0
        random = np.random.default_rng(keys)
        shape = (layers, 2, heads, keys * size, dim)
        self.truth = random.integers(-(1 << 15), 1 << 15, shape, np.int16)
        extents = {"layer": layers, "kv": 2, "head": heads, "dim": dim}
        cut = [(layout, int(size * times)) for layout, times in LAYOUTS.items()]
        made = [Cache(x, block=keys * size // n, token=n, **extents) for x, n in 2 * cut]
        self.sources = made[:3]
        self.targets = made[3:]
        for cache in self.sources:
            for plane, tokens in zip(cache.planes, self.truth, strict=True):
                apart = tokens.reshape(2, heads, cache.blocks, cache.size, dim)
                plane[...] = np.moveaxis(apart, 2, 0)
            cache.forget()
        spans = [(0, layers, 0, heads), (0, layers, 0, heads // 2), (0, layers, heads // 2, heads)]
        spans += [(0, layers // 2, 0, heads), (layers // 2, layers, 0, heads)]
        spans += [(0, layers, 0, heads // 4), (0, layers, heads // 4, heads // 2)]
        self.ranks: Any = [{"layers": slice(a, b), "heads": slice(c, d)} for a, b, c, d in spans]

    def form(self, rank: int) -> BlockForm:
        """Return the form of a rank's part."""
        part = self.ranks[rank]
        of = {"layers": len(self.truth), "heads": self.truth.shape[2]}
        ranges: Any = {name: (cut.start, cut.stop, of[name]) for name, cut in part.items()}
        view = self.sources[0].view.slice(**part)
        return BlockForm.of(view, "org/model@1", block_size=self.size, **ranges)

    def spread(self, run: tuple[int, int, bool], times: int = 1) -> list[int]:
        """Return keys: the first, how many, and whether they stand apart; ``times`` to a block."""
        first = run[0] * times
        step = 5 if run[2] and times == 1 else 1
        return [(first + i * step) % self.keys for i in range(min(run[1], self.keys))]


@dataclass(eq=False)
class Call:
    """A call under way: its target, the blocks of it, and the part of the model."""

    handle: Any
    keys: list[int]
    part: dict[str, slice]
    skip: bool = True
    cancelled = False
    loose: bool = False  # of a block that does not land, layers or parts may be written
    target: Cache | None = None
    blocks: list[int] = field(default_factory=list)

    def cancel(self) -> None:
        self.cancelled = True
        self.handle.cancel()

    def check(self, world: World, closing: bool) -> None:
        """Wait for the end, and check that landed blocks are right and no other byte changed."""
        try:
            self.handle.synchronize(LIMIT)
        except TransferTimeout:
            raise AssertionError("a deadlock") from None
        except TransferCancelled:
            assert self.cancelled or closing, "another's cancel ended it"
        except TransferError:
            assert not self.handle.landed.all()
        else:
            assert self.skip or self.handle.landed.all()
        if self.target is not None:
            for layer in range(len(world.truth)):
                self.check_layer(self.target, layer, world)
            self.target.free += self.blocks

    def check_layer(self, cache: Cache, layer: int, world: World) -> None:
        actual, due = (tokens_of(x[layer], self.blocks) for x in (cache.planes, cache.was))
        layers = self.part["layers"]
        heads = self.part["heads"]
        by = self.handle.layers
        in_part = layers.start <= layer < layers.stop
        whole = self.handle.landed
        landed = whole | by[layer - layers.start].landed if by and in_part else whole
        for i, key in enumerate(self.keys if in_part else ()):
            to, at = (slice(n * world.size, (n + 1) * world.size) for n in (i, key))
            for head in range(heads.start, heads.stop):
                right = world.truth[layer][:, head, at]
                if landed[i] or (self.loose and np.array_equal(actual[:, head, to], right)):
                    due[:, head, to] = right
        assert np.array_equal(actual, due), "a wrong byte, or one of a block that did not land"
        cache.was[layer][self.blocks] = cache.planes[layer][self.blocks]


class Troubled:
    """An engine that fails: ``faults`` maps the number of a request to its fault ("EIO", "short",
    "flip"). It carries out nothing while ``go`` is not set. After it died, a request has moved
    ``share`` of its bytes, and never ends well."""

    name: str = "troubled"
    notes: tuple[str, ...] = ()

    def __init__(self, inner: Engine) -> None:
        self.inner = inner
        self.go = threading.Event()
        self.faults = dict[int, str]()
        self.count = 0
        self.fired = 0
        self.dead = False
        self.share = 0.0
        self._lock = threading.Lock()
        self.go.set()

    def run(self, requests: Sequence[Request], ended: Ended | None = None) -> list[int]:
        assert self.go.wait(LIMIT)
        with self._lock:
            numbers = range(self.count, self.count + len(requests))
            self.count += len(requests)
            kinds = [self.faults.pop(number, "") for number in numbers]
            self.fired += sum(self.dead or bool(kind) for kind in kinds)
        if self.dead:
            for each in requests:
                carry(each._replace(nbytes=int(each.nbytes * self.share)))
            return [-errno.ECANCELED] * len(requests)
        fails = [kind not in ("", "flip") for kind in kinds]
        order = sorted(range(len(fails)), key=fails.__getitem__)
        many = fails.count(False)
        results = [0] * len(fails)

        def end(n: int, moved: int) -> None:
            i = order[n]
            results[i] = self._end(numbers[i], requests[i], kinds[i], moved)
            if ended:
                ended(i, results[i])

        moved = self.inner.run([requests[i] for i in order[:many]], end if ended else None)
        for n in range(many if ended else 0, len(fails)):
            end(n, moved[n] if n < many else 0)
        return results

    def _end(self, number: int, request: Request, kind: str, moved: int) -> int:
        if kind == "short":
            return carry(request._replace(nbytes=request.nbytes // 2))
        if kind == "flip" and not request.write:
            at = number * 97 % 2048 + (number % 5 and 4096)  # of the payload, or the header
            ctypes.c_ubyte.from_address(request.address + at % request.nbytes).value ^= 16
        return -errno.EIO if kind == "EIO" else moved

    def close(self) -> None:
        self.inner.close()


class WatchedDisk(Disk):
    """A disk tier that records its stores of a tier."""

    tier_stores: Sequence[DiskStore] = ()

    def open(self, *arguments: Any) -> list[DiskStore]:
        self.tier_stores = super().open(*arguments)
        return [*self.tier_stores]

    def slots(self) -> list[Slots]:
        """Return the slots of each folder, those of the first form first."""
        return [slots for tier_store in self.tier_stores for slots in tier_store.parts]

    def contents(self) -> dict[Path, tuple[set[bytes], int]]:
        """Return the keys and the number of slots of each folder."""
        return {slots.folder: ({*slots.index}, slots.count) for slots in self.slots()}

    def die(self) -> None:
        """Release the folders as a process that is killed does; nothing may be under way."""
        for slots in self.slots():
            slots.close(sync=False)
