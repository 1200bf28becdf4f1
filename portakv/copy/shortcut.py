# SPDX-License-Identifier: Apache-2.0
"""Shortcuts: repeat a transfer of registered caches with other addresses and counts.

`settle` makes every decision about a transfer. The next one with a chunk and ids of the
same kind has the same decisions, so a shortcut only checks what an address or a count can change.
What does not fit goes through `settle` again, which also words the error.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

import torch

from portakv.backends.base import Again
from portakv.registry.prepared import prepared
from portakv.registry.registry import Choice
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import capture_question, capturing
from portakv.runtime.transfer import Completion, Owner, Transfer, acquire_word, event_pool, hold
from portakv.view.index import Ids, Index
from portakv.view.view import KVView

_current_device = torch.accelerator.current_device_index
_MOST = 256  # a chunk length that occurs once must not stay for ever


class Shortcuts:
    """The shortcuts of one registration.

    Attributes:
        cache: the registered caches.
        unchanged: returns True if each of their tensors still lies at its address.
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
        self._known: Bounded[tuple[object, ...], _Shortcut] = Bounded("shortcuts", _MOST)
        self._repeatable = device.type != "cpu"  # until a launch shows the opposite

    def transfer(
        self, store: bool, memory_obj: object, slot_mapping: object, start: object, end: object
    ) -> Transfer | None:
        """Issue the transfer by a shortcut, on the current stream; None: `settle` has to look
        at it."""
        ids = slot_mapping
        if type(ids) is not torch.Tensor:
            ids = self._ids_of(ids, store, start, end)
            if ids is None:
                return None
        chunk = memory_obj
        if type(chunk) is not torch.Tensor:
            chunk = getattr(memory_obj, "tensor", None)
            if type(chunk) is not torch.Tensor:
                return None
        try:
            address = chunk.data_ptr()
            first_id = ids.data_ptr()
            # The last bits of the address are its alignment, which the vectors of a plan rely on.
            key = (store, chunk.shape, chunk.stride(), chunk.dtype, address & 15, ids.dtype)
            shortcut = self._known.get(key)
        except RuntimeError:  # a tensor without strides or without memory
            return None
        if shortcut is None or not (address and first_id) or not shortcut.fits(chunk, ids):
            return None
        length = ids.numel()
        if end is None:
            end = length
        if type(start) is not int or type(end) is not int or not 0 <= start < end <= length:
            return None
        count = end - start
        if count > shortcut.slots or shortcut.overlaps(address):
            return None
        if not self._unchanged():
            return None
        # The capture check and the event are about the current device.
        if _current_device() != self._index or self._capturing():
            return None
        word = acquire_word()
        event = self._events.acquire()
        sides = (first_id, address) if store else (address, first_id)
        shortcut.again(*sides, start, count, word.address)
        event.record()
        completion = Completion(event, (), ((word, 0),), None, None, self._events)
        hold(completion, self._owner)
        return Transfer((completion,), (chunk, ids, self._cache), shortcut.carried)

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
        """Make a shortcut of a transfer that was just made, if one is possible."""
        if not self._repeatable:
            return
        tensor = chunk.tensors
        if type(tensor) is not torch.Tensor or chunk.device != self._choice.backend.device:
            return
        index = Index.of(slot_mapping)
        if type(slot_mapping) is Index and index.on_host and index.plan_step == 1:
            index = index.placed(chunk.device, self._choice.can.index_dtypes)
        if index.ids is None or index.plan_step != 1 or index.ids.device != chunk.device:
            return
        alignment = tensor.data_ptr() & 15
        key = (store, tensor.shape, tensor.stride(), tensor.dtype, alignment, index.ids.dtype)
        if key in self._known or len(chunk.spans) != 1 or capturing(chunk.device):
            return
        forms = (self._cache.form, chunk.form) if store else (chunk.form, self._cache.form)
        ready = prepared(*forms, int(store), int(not store), None, self._choice)
        again = getattr(ready.launch, "again", None)
        if again is None or not (ready.can.guards and ready.can.skips_negative):
            self._repeatable = False
            return
        placed = index.placed(ready.ids_device, ready.can.index_dtypes)
        if placed is index and index.length:
            cache = self._cache
            whole = Index()
            sides = (cache, chunk, index, whole) if store else (chunk, cache, whole, index)
            repeat = again(*sides)
            if repeat is not None:
                self._known[key] = _Shortcut(cache, chunk, repeat, ready.carried)


class _Shortcut:
    """One kind of transfer: a chunk of one form, ids of one dtype, one direction."""

    __slots__ = ("_firsts", "_index", "_pasts", "_reach", "again", "carried", "slots")

    def __init__(
        self, cache: KVView, chunk: KVView, again: Again, carried: tuple[str, str]
    ) -> None:
        self.again = again
        self.carried = carried
        self.slots = min(chunk.slots, again.most)
        self._index = chunk.device.index
        ((first, past),) = chunk.spans
        self._reach = past - first
        self._firsts, self._pasts = zip(*cache.spans, strict=True)

    def fits(self, chunk: torch.Tensor, ids: torch.Tensor) -> bool:
        """Return True if tensors have the shapes and dtypes for which it was made."""
        index = self._index
        return (
            chunk.get_device() == index
            and ids.get_device() == index
            and ids.dim() == 1
            and ids.is_contiguous()
            and not chunk.requires_grad
            and not chunk.is_neg()
        )

    def overlaps(self, address: int) -> bool:
        """Return True if a chunk at this address would share memory with the caches."""
        past = address + self._reach
        at = bisect_right(self._firsts, past - 1)
        return at > 0 and self._pasts[at - 1] > address
