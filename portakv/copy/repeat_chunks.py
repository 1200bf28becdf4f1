# SPDX-License-Identifier: Apache-2.0
"""Repeat a copy between registered caches and a chunk, with another chunk and other ids.

A connector makes no view of such a chunk, since a view would cost the host more than the copy. So
a repeat checks the tensor itself: its shape, dtype, alignment and place. A chunk that does not fit
goes through a view and `settle`, which also words the error.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

import torch
from torch.autograd.graph import increment_version

from portakv.backends.base import Again
from portakv.copy.counting import TOGETHER, CopyCounts, Counted
from portakv.registry.prepared import prepared
from portakv.registry.registry import Choice
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import capture_question
from portakv.runtime.transfer import (
    Owner,
    StatusWord,
    Transfer,
    acquire_word,
    completion_of,
    end_of_launch,
    event_pool,
)
from portakv.view.destination import note_written
from portakv.view.index import Ids, Index, index_of
from portakv.view.view import KVView

_current_device = torch.accelerator.current_device_index
_MOST = 256  # a chunk length that occurs once must not stay for ever


class ChunkRepeats:
    """The repeats of one registration: copies between its caches and chunks of one kind.

    Attributes:
        cache: the registered caches.
        unchanged: returns True if each of their tensors still has its address and memory.
        owner: the connector, which reports errors later.
    """

    def __init__(
        self, cache: KVView, unchanged: Callable[[], bool], choice: Choice, owner: Owner
    ) -> None:
        self._cache = cache
        self._choice = choice
        self._owner = owner
        device = choice.backend.device
        self._events = event_pool(device)
        self._index = device.index
        self._capturing = capture_question(device)
        self._unchanged = unchanged
        self._known: Bounded[tuple[object, ...], _ChunkRepeat] = Bounded("repeats of chunks", _MOST)
        self._repeatable = device.type != "cpu"  # until a launch shows the opposite

    def transfer(
        self, store: bool, memory_obj: object, slot_mapping: object, start: object, end: object
    ) -> Transfer | None:
        """Issue a copy on the current stream if one like it was remembered; else return None."""
        ids = slot_mapping
        if type(ids) is not torch.Tensor:
            ids = self._ids_of(ids, store, start, end)
        chunk = memory_obj
        if type(chunk) is not torch.Tensor:
            chunk = getattr(memory_obj, "tensor", None)
        if type(chunk) is not torch.Tensor or type(ids) is not torch.Tensor:
            return None
        try:
            address = chunk.data_ptr()
            first_id = ids.data_ptr()
            repeat = self._known.get(_kind(store, chunk, address, ids))
        except RuntimeError:  # a tensor without strides or without memory
            return None
        if (
            repeat is None
            or type(start) is not int
            or not (address and first_id)
            or not repeat.fits(chunk, address, ids, first_id)
        ):
            return None
        count = repeat.tokens(start, end, ids.numel())
        if not count or repeat.overlaps(address) or not self._unchanged():
            return None
        # The capture check and the event are about the current device.
        if _current_device() != self._index or self._capturing():
            return None
        word = _word_for(slot_mapping)
        event = self._events.acquire()
        sides = (first_id, address) if store else (address, first_id)
        repeat.again(*sides, start, count, 0 if word is None else word.address)
        event.record()
        _note_written(store, chunk, self._cache)
        retained = chunk, ids, self._cache
        counts = Counted.counts
        if counts is not None:
            _count(counts, repeat, self._cache, count)
        completion = completion_of(event, self._events, word, ids)
        return end_of_launch(completion, retained, repeat.carried, owner=self._owner)

    def _ids_of(
        self, index: object, store: bool, start: object, end: object
    ) -> torch.Tensor | None:
        """Return the copy, on the device, of host ids that were checked for this range before."""
        if type(index) is not Index or index.plan_step != 1 or index.offset:
            return None
        if not index.on_host:
            return index.ids
        if type(start) is not int or (end is not None and type(end) is not int):
            return None
        length = index.length or 0
        count = (length if end is None else end) - start
        return index.checked_copy(start, count, self._cache.slots, not store)

    def remember(self, store: bool, chunk: KVView, slot_mapping: Ids | None) -> None:
        """Remember a copy that was just made outside of graph capture, if it can be repeated."""
        if not self._repeatable:
            return
        tensor = chunk.tensors
        index = self._index_on_device(slot_mapping)
        ids = index.ids
        if type(tensor) is not torch.Tensor or ids is None or len(chunk.spans) != 1:
            return
        if not (chunk.device == ids.device == self._choice.backend.device):
            return
        key = _kind(store, tensor, tensor.data_ptr(), ids)
        if key in self._known:
            return
        forms = (self._cache.form, chunk.form) if store else (chunk.form, self._cache.form)
        ready = prepared(*forms, int(store), int(not store), None, self._choice)
        again = getattr(ready.launch, "again", None)
        if again is None or not (ready.can.guards and ready.can.skips_negative):
            self._repeatable = False
        elif index.length and index.placed(ready.ids_device, ready.can.index_dtypes) is index:
            cache = self._cache
            sides = (cache, chunk, index, Index()) if store else (chunk, cache, Index(), index)
            packed = again(*sides)
            if packed is not None:
                self._known[key] = _ChunkRepeat(cache, chunk, packed, ready.carried)

    def _index_on_device(self, slot_mapping: Ids | None) -> Index:
        """Return a slot mapping with its ids where the device reads them; without ids if it is
        none."""
        index = index_of(slot_mapping)
        if index.plan_step != 1:
            return Index()
        if type(slot_mapping) is Index and index.on_host:
            return index.placed(self._choice.backend.device, self._choice.can.index_dtypes)
        return index


def _count(counts: CopyCounts, repeat: _ChunkRepeat, cache: KVView, tokens: int) -> None:
    """Count a copy of a chunk on its device."""
    counts.new.append((repeat.carried[0], "device", cache.form, tokens))
    if len(counts.new) >= TOGETHER:
        counts.sum_up()


def _note_written(store: bool, chunk: torch.Tensor, cache: KVView) -> None:
    """Raise the versions of a copy's destination."""
    if store:
        increment_version(chunk)
    else:
        note_written(cache)


def _word_for(slot_mapping: object) -> StatusWord | None:
    """Return a status word for ids that a device judges; None for ids that the host has checked."""
    return None if type(slot_mapping) is Index and slot_mapping.on_host else acquire_word()


def _kind(store: bool, chunk: torch.Tensor, address: int, ids: torch.Tensor) -> tuple[object, ...]:
    """Return the key under which copies of chunks have all decisions in common.

    The last bits of the address are its alignment, which the vectors of a plan rely on.
    """
    return store, chunk.shape, chunk.stride(), chunk.dtype, address & 15, ids.dtype


class _ChunkRepeat:
    """One kind of copy: a chunk of one form, ids of one dtype, one direction."""

    __slots__ = (
        "_block",
        "_firsts",
        "_index",
        "_pasts",
        "_reach",
        "_slots",
        "_tokens",
        "again",
        "carried",
    )

    def __init__(
        self, cache: KVView, chunk: KVView, again: Again, carried: tuple[str, str]
    ) -> None:
        self.again = again
        self.carried = carried
        self._tokens = chunk.slots
        self._block = chunk.form.block_size or 1
        self._slots = min(chunk.slots, again.most)
        self._index = chunk.device.index
        ((first, past),) = chunk.spans
        self._reach = past - first
        self._firsts, self._pasts = zip(*cache.spans, strict=True)

    def fits(self, chunk: torch.Tensor, address: int, ids: torch.Tensor, first_id: int) -> bool:
        """Return True if tensors at these addresses have the shapes and dtypes for which it was
        made, and all of their memory: a storage can be resized."""
        index = self._index
        rows = chunk.untyped_storage()
        numbers = ids.untyped_storage()
        return (
            chunk.get_device() == index
            and ids.get_device() == index
            and ids.dim() == 1
            and ids.is_contiguous()
            and not ids.is_neg()
            and not chunk.requires_grad
            and not chunk.is_neg()
            and not chunk.is_conj()
            and address + self._reach <= rows.data_ptr() + rows.nbytes()
            and first_id + ids.nbytes <= numbers.data_ptr() + numbers.nbytes()
        )

    def tokens(self, start: int, end: object, length: int) -> int:
        """Return the tokens of a range of the ids; 0 if the range is wrong, or if a chunk does not
        hold them, or if it holds more and the range has no end."""
        if end is None and 0 <= self._tokens - (length - start) < self._block:
            end = length
        if type(end) is not int or not 0 <= start < end <= length:
            return 0
        count = end - start
        return count if count <= self._slots else 0

    def overlaps(self, address: int) -> bool:
        """Return True if a chunk at this address would share memory with the caches."""
        past = address + self._reach
        at = bisect_right(self._firsts, past - 1)
        return at > 0 and self._pasts[at - 1] > address
