# SPDX-License-Identifier: Apache-2.0
"""Copy inside a device by one call of the core, from the objects that a caller passes.

The core reads the tensors and the ids, checks them, plans and launches (`native/core/call.cpp`). A
call that it does not make, or that is wrong, returns None here: the caller of these functions then
goes the general way of `copy`, which makes the copy or words the error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd.graph import increment_version

from portakv.backends.base import TAKES
from portakv.backends.rows_kernel import MAX_ENTRIES
from portakv.backends.rows_launch import NO_CONTEXT
from portakv.copy.counting import TOGETHER, Counted
from portakv.core.call import DRIVER, GUARDED, TO_THE_END, OpenedView, Watch, calls
from portakv.core.view import dtype_words, name_of
from portakv.errors import LayoutError
from portakv.registry.registry import REGISTRY, Choice
from portakv.runtime.devices import capture_question
from portakv.runtime.pinned_ids import PinnedIds
from portakv.runtime.streams import ignoring_captures
from portakv.runtime.transfer import (
    Owner,
    StatusWord,
    Transfer,
    acquire_after_ends,
    acquire_word,
    completion_of,
    end_of_launch,
    event_pool,
    free_words,
)
from portakv.view.bound import BoundLayout
from portakv.view.destination import check_writable, note_written
from portakv.view.index import Index
from portakv.view.view import KVView

_OPENED = "opened"  # of a view, for the core


class Launched(NamedTuple):
    """What the core launched: its result, and the status word and the ids that the kernels use."""

    result: int
    word: StatusWord | None
    listed: PinnedIds | None

    @property
    def tokens(self) -> int:
        """Return the tokens that are copied, those of skipped positions included."""
        return self.result >> 2


class Inside:
    """A device whose backend launches row kernels through the core.

    Args:
        choice: what executes the copies.

    Attributes:
        carried: the executor and the reason for it.
        kernels: the address of the core's table of its kernels.
    """

    def __init__(self, choice: Choice) -> None:
        backend = choice.backend
        device = backend.device
        assert backend.row_kernels is not None
        self._table, self._driver = backend.row_kernels
        self.kernels = self._table.address
        self.carried = choice.name, TAKES
        self._capturing = capture_question(device)
        # The free events of the device. None: work of the host has ended when a call returns.
        self._events = None if device.type == "cpu" else event_pool(device)
        if self._events is not None:
            with ignoring_captures(device):  # of other threads
                PinnedIds.reserve()

    @classmethod
    def of(cls, choice: Choice) -> Inside | None:
        """Return the device of a choice; None: its backend has no such kernels, or tensors there
        may be in a format of their vendor."""
        backend = choice.backend
        if backend.row_kernels is None or REGISTRY.format_checks(backend.device):
            return None
        return cls(choice)

    def launch(self, call: Callable[[int, int, int, int], int], on_host: bool) -> Launched | None:
        """Make a call of the core on the current stream; None: it launched nothing.

        Args:
            call: takes memory for ids, its room, the address of a status word, and a stream.
            on_host: ids lie on the host.

        Raises:
            TransferError: the driver's error.
        """
        driver = self._driver
        stream = driver.number(None)
        # None: another device is current, of which the next question would be answered.
        if stream is None or self._capturing():
            return None
        word = None
        listed = None
        status = 0
        room = (0, 0)
        if self._events is not None:
            word = acquire_word()
            status = driver.word(word.address)
            listed = (PinnedIds.acquire() or acquire_after_ends()) if on_host else None
            if listed is not None:
                room = listed.address, PinnedIds.MOST
        result = call(*room, status, stream)
        if result == DRIVER - NO_CONTEXT:  # the first work of a thread
            with driver.current():
                result = call(*room, status, stream)
        if result <= DRIVER:  # what was launched may use the word and the list, which are given up
            driver.refuse(DRIVER - result, "The launch")
        if word is not None and (result < 0 or not result & GUARDED):
            free_words.append(word)
            word = None
        if result < 0 and listed is not None:
            listed.release()
        return None if result < 0 else Launched(result, word, listed)

    def end(
        self, launched: Launched, retained: object, ids: object, owner: Owner | None = None
    ) -> Transfer:
        """Return the end of a launch, after which the device's present work runs.

        Args:
            retained: what the handle keeps until the end.
            ids: memory that is kept until the end also if the handle is dropped.
            owner: it reports an error if the handle does not.
        """
        events = self._events
        if events is None:
            return Transfer((), None, self.carried)
        event = events.acquire()
        event.record()
        _, word, listed = launched
        completion = completion_of(event, events, word, ids, listed)
        return end_of_launch(completion, retained, self.carried, listed is not None, owner)


def opened(view: KVView) -> OpenedView | None:
    """Return a view for the core; None: it is made for one call, or the host lacks its addresses.

    It waits for a table of addresses that is sent to the device.
    """
    known: OpenedView | None = view.derived.get(_OPENED)
    if known is not None or view.temporary or not view.known or view.form.encoding:
        return known
    memory = None if view.raw else Watch(view.owners, view.storages)
    return view.derived.setdefault(_OPENED, open_view(view, memory))  # type: ignore[no-any-return]


def open_view(view: KVView, memory: Watch | None) -> OpenedView:
    """Return a view for the core, with its memory as it is watched; None: raw memory."""
    form = view.form
    looked_up = form.lists or form.table_on_device or view.entries > MAX_ENTRIES
    try:
        check_writable(view)
        writable = True
    except LayoutError:
        writable = False
    words = _dtype_words()
    return OpenedView(
        form.address,
        [words[dtype] for dtype in form.dtypes],
        form.kv,
        view.addresses_at,
        view.table.data_ptr() if looked_up else 0,
        view.slots,
        view.spans,
        view.owners[0].__dlpack_device__(),
        writable,
        form.table_on_device,
        memory,
        (form, view.addresses, view.table if looked_up else None),
    )


def _dtype_words() -> dict[str, int]:
    """Return the word of each dtype by its name; that of bytes is 0."""
    return {"": 0, **{name_of(dtype): word for dtype, word in dtype_words().items()}}


class ChunkCopies:
    """The copies between registered caches and chunks.

    Args:
        cache: the caches.
        memory: that of their tensors, which must be as it was.
        choice: what executes the copies.
        owner: the connector, which reports errors later.
        bound: returns the layout of chunks with elements of so many bytes, once it is known.
    """

    def __init__(
        self,
        cache: KVView,
        memory: Watch,
        choice: Choice,
        owner: Owner,
        bound: Callable[[int], BoundLayout | None],
    ) -> None:
        self._cache = cache
        self._owner = owner
        self._bound = bound
        self._inside = Inside.of(choice)
        self._caches = open_view(cache, memory) if self._inside is not None else None
        self._copy = calls().copy_chunk

    def transfer(
        self, store: bool, memory_obj: object, slot_mapping: object, start: object, end: object
    ) -> Transfer | None:
        """Issue a copy on the current stream; None: the core does not make such a copy.

        Raises:
            TransferError: the driver's error.
        """
        inside = self._inside
        ids = slot_mapping
        offset = 0
        if type(ids) is Index:
            if ids.plan_step != 1:
                return None
            offset = ids.offset
            ids = ids.ids
        chunk = memory_obj
        if type(chunk) is not torch.Tensor:
            chunk = getattr(memory_obj, "tensor", None)
        if (
            inside is None
            or self._caches is None
            or type(chunk) is not torch.Tensor
            or type(start) is not int
        ):
            return None
        if end is None:
            past = TO_THE_END
        elif type(end) is int and end > start >= 0:
            past = end
        else:
            return None
        bound = self._bound(chunk.itemsize)
        if bound is None:
            return None
        copy = self._copy
        kernels = inside.kernels
        caches = self._caches.address
        layout = bound.address

        def call(listed: int, room: int, status: int, stream: int) -> int:
            # fmt: off
            return copy(kernels, caches, store, layout, chunk, ids, offset, start, past,
                        listed, room, status, stream)
            # fmt: on

        launched = inside.launch(call, type(ids) is not torch.Tensor or ids.is_cpu)
        if launched is None:
            return None
        if store:
            increment_version(chunk)
        else:
            note_written(self._cache)
        counts = Counted.counts
        if counts is not None:
            counts.new.append((inside.carried[0], "device", self._cache.form, launched.tokens))
            if len(counts.new) >= TOGETHER:
                counts.sum_up()
        return inside.end(launched, (chunk, ids, self._cache), ids, self._owner)
