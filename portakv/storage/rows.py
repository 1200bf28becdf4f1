# SPDX-License-Identifier: Apache-2.0
"""`Rows` is the host memory of a block store: rows that hold a block's image each, lent as staging
or kept under a key as the host tier, so that nothing is copied between these. `Crossing` copies
blocks between them and a view."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Mapping, Sequence
from math import gcd
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from portakv.arguments import naming, shown
from portakv.copy.rows import copy_rows
from portakv.errors import InvalidTerms, LayoutError, SlotError
from portakv.host import pinned
from portakv.runtime.devices import capturing, refuse_capture
from portakv.runtime.streams import StreamFence
from portakv.storage.chains import FIRST, UNKNOWN, Chains, mark_of
from portakv.view import Index, KVView
from portakv.view.index import IdList

_PAGE = 4096
# groups of cached rows
_USED = "used"
_UNUSED = "prefetched and not used"


class Rows:
    """Rows of host memory: staging buffers, and the host tier.

    At most ``staging`` rows are lent at a time and at most ``host`` rows are cached, so no transfer
    waits for cached rows. No call blocks, and any thread may call.

    Attributes:
        tensor: uint8 ``[staging + host, row_bytes]``, at a multiple of 4,096 bytes.
        array: the same, of numpy.
        memory: its address and bytes, for an I/O engine to register; pinned: False if pageable.
        most: rows that one lease may have. evicted: rows that lost their key to another key.
    """

    def __init__(self, row_bytes: int, staging: int, host: int, pin: bool = True) -> None:
        self.row_bytes = row_bytes
        self.staging = int(staging)
        self.host = int(host)
        self.most = max(1, self.staging // 2)
        self.evicted = 0
        nbytes = (self.staging + self.host) * row_bytes
        self.pinned = pin and pinned.why_not() is None
        with torch.inference_mode(False):  # transfers write it in any mode
            if self.pinned:
                buffer = pinned.allocate(nbytes + _PAGE, unit=row_bytes)
                self.pinned = buffer.pinned
                space = buffer.tensor
            else:  # numpy asks for large pages, which make the requests of a disk fewer
                space = torch.from_numpy(np.empty(nbytes + _PAGE, np.uint8))
            first = -space.data_ptr() % _PAGE
            self.tensor = space[first : first + nbytes].view(-1, row_bytes)
        self.memory = ((self.tensor.data_ptr(), nbytes),)
        self.array: npt.NDArray[np.uint8] = self.tensor.numpy()
        self._chains = Chains[bytes]()  # the keys that have a row, in two groups
        self._lock = self._chains.lock  # no call is made while it is locked
        self._free = deque(range(self.staging + self.host))
        self._lent: dict[int, bool] = {}  # True if it is lent to a save
        self._cached = dict[bytes, int]()
        self._unused = set[bytes]()  # prefetched, and not used since
        self._pins: Counter[int] = Counter()
        self._names = dict[int, bytes]()  # names of pinned rows

    def take(self, count: int, store: bool) -> list[int] | None:
        """Return rows for a transfer, all or none; saves have at most `most` of them together."""
        with self._lock:
            stores = sum(self._lent.values()) + count if store else 0
            if stores > self.most or len(self._lent) + count > self.staging:
                return None
            items = [self._free.popleft() for _ in range(count)]
            self._lent.update(dict.fromkeys(items, store))
            return items

    def give(self, items: Sequence[int]) -> None:
        """End a transfer: its rows that it did not `keep` become free."""
        with self._lock:
            self._free.extend(item for item in items if self._lent.pop(item, None) is not None)

    def keep(
        self,
        item: int,
        key: bytes,
        prefetched: bool = False,
        own: Mapping[bytes, int] | None = None,
        follows: int = FIRST,
        evict: bool = True,
    ) -> bool:
        """Cache a lent row under a key that follows a mark, in place of the next row to evict.

        Returns False if the key has a row, or no row may be evicted. Without ``evict`` none may. A
        row whose key is earlier in the same call may not: ``own`` maps the last 32 bytes of the
        call's keys to positions. At most half of the rows are ``prefetched`` and not used yet.
        """
        with self._lock:
            if not self.host or key in self._cached:
                return False
            crowded = prefetched and len(self._unused) >= max(1, self.host // 2)
            if crowded or len(self._cached) >= self.host:
                victim = self._chains.next(_UNUSED if crowded else None)
                if victim is None or not evict:
                    return False
                if own and own.get(victim[-32:], len(own)) <= own[key[-32:]]:
                    return False
                self._drop(victim)
            del self._lent[item]
            self._cached[key] = item
            if prefetched:
                self._unused.add(key)
            group = _UNUSED if prefetched else _USED
            self._chains.add(key, _mark(key, mark_of(key[-32:])), _mark(key, follows), group)
            return True

    def _drop(self, key: bytes) -> None:
        """Evict the row of a key."""
        self._chains.remove(key)
        self._unused.discard(key)
        self._free.append(self._cached.pop(key))
        self.evicted += 1

    def find(self, key: bytes) -> int | None:
        """Return the row of a key, which stays until `unpin`; None if it has none."""
        with self._lock:
            item = self._cached.get(key)
            if item is None:
                return None
            if key in self._unused:
                self._unused.remove(key)
                self._chains.move(key, _USED)
            self._pins[item] += 1
            self._names[item] = key
            self._chains.pin(key)
            return item

    def unpin(self, items: Sequence[int]) -> None:
        """Release the pin of `find`."""
        with self._lock:
            for item in items:
                self._pins[item] -= 1
                if not self._pins[item]:
                    del self._pins[item]
                    self._chains.unpin(self._names.pop(item))

    def touch(self, keys: Sequence[bytes], follows: Sequence[int] = ()) -> None:
        """Record the use of keys, the first key last, so that a prefix outlives its suffix.

        ``follows``: the predecessor of each key, for keys whose predecessor is not known yet.
        """
        with self._lock:
            for key in reversed(keys):
                if key in self._cached:
                    self._chains.touch(key)
            for key, mark in zip(keys, follows, strict=False):
                if key in self._cached:
                    self._chains.learn(key, _mark(key, mark))

    def by_use(self) -> list[bytes]:
        """Return the keys that have a row, the least recently used first."""
        with self._lock:
            return self._chains.by_use()

    def crowded(self, own: Mapping[bytes, int]) -> bool:
        """Return True if the next row to evict belongs to a call (see `keep`)."""
        with self._lock:
            return (self._chains.next() or b"")[-32:] in own

    def has(self, key: bytes) -> bool:
        """Return True if a key has a row."""
        return key in self._cached

    def counts(self) -> dict[str, int]:
        """Return the number of rows by their state."""
        return {"free": len(self._free), "lent": len(self._lent), "kept": len(self._cached)}


def _mark(key: bytes, mark: int) -> Hashable:
    """Return the mark of a block among those of all forms.

    A block without a predecessor begins a prompt: rows exist only in releases that note
    predecessors.
    """
    return FIRST if mark in (FIRST, UNKNOWN) else (key[:-32], mark)


def _ids(blocks: IdList) -> Any:
    """Return ids of blocks as an array on the host."""
    with naming("blocks", "ids of the view's blocks"):
        return Index([] if blocks is None else blocks).host_ids()


class Crossing:
    """Copies between rows, seen as ``inner``, and ``blocks`` of a view.

    ``many`` stored blocks of ``size`` tokens name the view's tokens. Rejects impossible copies
    immediately.
    """

    def __init__(
        self, inner: KVView, view: KVView, blocks: IdList, many: int, size: int, store: bool = False
    ) -> None:
        if not isinstance(view, KVView) or not view.block_size:
            got = repr(view) if isinstance(view, KVView) else shown(view)
            raise LayoutError(
                f"Expected view to be a paged view, got {got}. Name a block axis in its layout."
            )
        if capturing(view.device):
            why = "workers on the host move blocks; save and load outside of it"
            raise refuse_capture("A transfer of a block store", why)
        whole = view.block_size
        ids = _ids(blocks)
        needed = -(-many * size // whole)
        if len(ids) != needed:
            raise InvalidTerms(
                f"Expected blocks to be {needed} ids, of the view's blocks of {whole} tokens "
                f"for {many} keys of {size}, got {len(ids)}. Pass the blocks that the keys name."
            )
        with naming("blocks", "ids of the view's blocks"):
            index = Index(ids, step=whole)
            if index.check(len(ids) * whole, view.slots, "view", distinct=not store):
                raise SlotError("A block is negative.")
        self._size = size
        self._store = store
        self._step = gcd(whole, size)
        split = (ids[:, None] * (whole // self._step) + np.arange(whole // self._step)).reshape(-1)
        self._fine = split[: many * size // self._step].reshape(many, size // self._step)
        self._after = StreamFence(view.device)
        self.copy(inner, view, [], [])

    def copy(self, inner: KVView, outer: KVView, items: Any, at: Any) -> None:
        """Copy blocks between rows ``items`` and places ``at`` of the view, and wait for the end.

        Each side has its own view. On a device the copy uses a private stream of this thread, after
        the work that the maker's stream had.
        """
        dst = Index(np.array(items, np.int64), step=self._size)
        src = Index(self._fine[np.array(at, np.int64)].reshape(-1), step=self._step)
        sides = (outer, inner, src, dst) if self._store else (inner, outer, dst, src)
        with torch.inference_mode(False), self._after.inside():
            copy_rows(*sides).synchronize()
