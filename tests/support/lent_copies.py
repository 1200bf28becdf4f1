# SPDX-License-Identifier: Apache-2.0
"""Caches, stores and copiers for the tests of lent copies: this process makes the copies, or holds
them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from portakv import KVView, copy_blocks
from portakv.storage import BlockStore
from portakv.storage.lent import Borrowed, LentCopy
from support.core_cases import noise
from support.storage_cases import counts_of, key_of, small_form
from support.waits import LIMIT

FORM = small_form()
SIZE = FORM.image_bytes
KEYS = [key_of(i) for i in range(8)]
OTHERS = [key_of(i) for i in range(40, 48)]
LAYOUT = "layer | block kv token head dim"


def cache(seed: int = 0, blocks: int = 12, heads: int = 2, layers: int = 4) -> KVView:
    shape = (blocks, 2, 4, heads, 32)
    tensors = [noise(*shape, dtype=torch.float16, seed=seed + i) for i in range(layers)]
    return KVView(tensors, LAYOUT)


def same(one: KVView, blocks: Any, other: KVView, other_blocks: Any) -> bool:
    """Return True if blocks of two caches have the same bytes."""
    pairs = zip(one.tensors, other.tensors, strict=True)
    views = [
        (a[[*blocks]].view(torch.int16), b[[*other_blocks]].view(torch.int16)) for a, b in pairs
    ]
    return all(torch.equal(*pair) for pair in views)


SOURCE = cache()


def opened(staging: int = 16, host: int = 0, **terms: Any) -> BlockStore:
    terms = {"staging": staging * SIZE, "host": host * SIZE, "shared": True, **terms}
    return BlockStore(FORM, **terms)


def make(rows: torch.Tensor, view: KVView, blocks: Any, copy: LentCopy | Borrowed) -> None:
    """Make a copy between rows and a view, whose ``blocks[i]`` is block i of the call."""
    inner = copy.form.view(rows).slice(**copy.inner)
    outer = view.slice(**copy.outer)
    own = [blocks[i] for i in copy.blocks]
    if copy.kind == "save":
        copy_blocks(outer, inner, own, copy.rows).synchronize()
    else:
        copy_blocks(inner, outer, copy.rows, own).synchronize()


class Hands:
    """Makes the copies of one call between a store's rows and a view.

    Attributes:
        copies: the copies that began, in order.
        now: makes and ends each copy as it begins; False: holds it until `finish`.
    """

    def __init__(self, store: BlockStore, view: KVView, blocks: Any, now: bool = True) -> None:
        self.copies = list[LentCopy]()
        self.now = now
        self._ended = 0  # of the copies, the first ones
        self._rows = store.rows.tensor
        self._view = view
        self._blocks = blocks

    def begin(self, copy: LentCopy) -> None:
        self.copies.append(copy)
        if self.now:
            self.finish()

    def make(self, copy: LentCopy) -> None:
        """Make a copy, and do not end it."""
        make(self._rows, self._view, self._blocks, copy)

    def finish(self, landed: Callable[[LentCopy], Any] = lambda copy: None) -> None:
        """Make and end the copies that are held; ``landed`` returns the mask of each."""
        while self._ended < len(self.copies):
            copy = self.copies[self._ended]
            self._ended += 1
            self.make(copy)
            copy.end(landed(copy))

    def rows(self) -> list[int]:
        """Return the rows of all copies."""
        return [row for copy in self.copies for row in copy.rows]


def held(store: BlockStore, view: KVView = SOURCE, blocks: Any = range(8)) -> Hands:
    """Return a copier that holds its copies."""
    return Hands(store, view, blocks, now=False)


def loaded(store: BlockStore, keys: list[bytes] = KEYS) -> KVView:
    """Return a cache with the blocks that a store has under keys."""
    target = cache(50)
    store.load(target, range(len(keys)), keys).synchronize(LIMIT)
    return target


def lent_rows(store: BlockStore) -> int:
    return counts_of(store.rows)["lent"]
