# SPDX-License-Identifier: Apache-2.0
"""Lanes: transfers of registered caches that were made before, but for addresses and counts.

The long way (`copy.carry`) answers every question about a transfer: which plan, which backend,
where its ids must be. The next transfer with a chunk and ids of the same kind has the same
answers, so it only checks what an address or a count can change and launches. Whatever does not
fit goes the long way again, which also finds the words for an error.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import torch

from . import events, words
from .backends.base import Again
from .index import Index
from .ordering import capture_question, capturing
from .registry import Choice
from .routes import Route, route
from .transfer import Completion, Transfer
from .view import KVView
from .watch import watch

_MOST = 256  # lanes; a chunk length that comes once must not stay for ever


class Lanes:
    """The lanes of one registration.

    Args:
        cache: the registered caches.
        choice: the backend that the connector chose.
        owner: a weak reference to the connector, for errors that nobody asks for.
    """

    def __init__(self, cache: KVView, choice: Choice, owner: Any) -> None:
        self._cache, self._choice, self._owner = cache, choice, owner
        self._known: dict[Any, _Lane] = {}

    def transfer(
        self, store: bool, memory_obj: Any, slot_mapping: Any, start: Any, end: Any
    ) -> Transfer | None:
        """The transfer through a lane, on the current stream; None: it has to go the long way."""
        if type(slot_mapping) is not torch.Tensor:
            return None
        chunk = memory_obj
        if type(chunk) is not torch.Tensor:
            chunk = getattr(memory_obj, "tensor", None)
            if type(chunk) is not torch.Tensor:
                return None
        try:
            lane = self._known.get(
                (store, chunk.shape, chunk.stride(), chunk.dtype, slot_mapping.dtype)
            )
        except RuntimeError:  # a tensor that has no strides
            return None
        return None if lane is None else lane.transfer(chunk, slot_mapping, start, end)

    def learn(self, store: bool, chunk: KVView, slot_mapping: Any) -> None:
        """Make a lane of a transfer that just went the long way, where one is possible."""
        tensor = chunk.tensors
        if type(slot_mapping) is not torch.Tensor or type(tensor) is not torch.Tensor:
            return
        if chunk.device != self._choice.backend.device or slot_mapping.device != chunk.device:
            return
        key = (store, tensor.shape, tensor.stride(), tensor.dtype, slot_mapping.dtype)
        if key in self._known or len(chunk.spans) != 1 or capturing(chunk.device):
            return
        forms = (self._cache.form, chunk.form) if store else (chunk.form, self._cache.form)
        way = route(*forms, int(store), int(not store), None, self._choice)
        index = Index(slot_mapping)
        again = getattr(way.launch, "again", None)
        if again is None or not (way.can.guards and way.can.skips_negative):
            return
        if way.place(index) is index and index.length:
            sides = (self._cache, chunk, index, Index()) if store else (
                chunk, self._cache, Index(), index
            )  # fmt: skip
            repeat = again(*sides)
            if repeat is not None:
                if len(self._known) >= _MOST:
                    self._known.clear()
                self._known[key] = _Lane(self._cache, chunk, way, repeat, self._owner)


class _Lane:
    """One kind of transfer: a chunk of one form, ids of one dtype, one direction."""

    __slots__ = (
        "_again", "_alignment", "_cache", "_capturing", "_events", "_firsts", "_index", "_owner",
        "_pasts", "_reach", "_slots",
    )  # fmt: skip

    def __init__(self, cache: KVView, chunk: KVView, way: Route, again: Again, owner: Any) -> None:
        self._cache, self._again, self._owner = cache, again, owner
        device = way.choice.backend.device
        self._index, self._events = device.index, events.pool(device)
        self._capturing = capture_question(device)
        self._slots = min(chunk.slots, again.most)
        # The plan's vectors rest on the alignment of the chunk that it was made with.
        self._alignment = chunk.form.alignment
        (first, past) = chunk.spans[0]
        self._reach = past - first
        self._firsts = [span[0] for span in cache.spans]
        self._pasts = [span[1] for span in cache.spans]

    def transfer(
        self, chunk: torch.Tensor, ids: torch.Tensor, start: Any, end: Any
    ) -> Transfer | None:
        index = self._index
        if (
            chunk.get_device() != index
            or ids.get_device() != index
            or chunk.requires_grad
            or chunk.is_neg()
            or ids.dim() != 1
            or not ids.is_contiguous()
            or type(start) is not int
        ):
            return None
        length = ids.numel()
        if end is None:
            end = length
        elif type(end) is not int:
            return None
        address = chunk.data_ptr()
        if not 0 <= start < end <= length or end - start > self._slots:
            return None
        if address % self._alignment or self._overlaps(address) or self._capturing():
            return None
        word = words.acquire()
        self._again(address, ids.data_ptr(), start, end - start, word.address)
        pool = self._events
        event = pool.acquire()
        event.record()
        completion = Completion(event, (), ((word, 0),), None, None, pool)
        watch(completion, self._owner)
        return Transfer((completion,), (chunk, ids, self._cache))

    def _overlaps(self, address: int) -> bool:
        """True where a chunk at this address would share memory with the caches."""
        past = address + self._reach
        at = bisect_right(self._firsts, past - 1)
        return at > 0 and self._pasts[at - 1] > address
