# SPDX-License-Identifier: Apache-2.0
"""Copy inside a device by one call of the core, from the objects that a caller passes.

The core reads the tensors and the ids, checks them, plans and launches (`native/core/call.cpp`). A
call that it does not make, or that is wrong, returns None here: the caller of these functions then
goes the general way of `copy`, which makes the copy or words the error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np
import torch
from torch.autograd.graph import increment_version

from portakv.backends.row_kernels import RowKernels
from portakv.backends.rows_kernel import MAX_ENTRIES
from portakv.copy.counting import TOGETHER, Counted
from portakv.copy.handle import BlockTransfer
from portakv.copy.options import CopyOptions
from portakv.core.call import SKIPS, TO_THE_END, OpenedView, Watch, calls
from portakv.core.view import dtype_words, name_of
from portakv.errors import LayoutError, PortaKVError, SlotError
from portakv.interconnect.choose import across
from portakv.interconnect.strategy import PINNED, Strategy
from portakv.registry.prepared import prepared
from portakv.registry.registry import Choice, choose
from portakv.runtime.streams import completion
from portakv.runtime.transfer import Owner, Transfer
from portakv.view.bound import BoundLayout
from portakv.view.destination import check_writable, note_written
from portakv.view.form import plain_reader
from portakv.view.index import PAST_ANY_VIEW, Ids, Index, as_ids
from portakv.view.view import KVView

_AWAY = {"peer", "remote"}
_OPENED = "opened"  # of a view, for the core


def opened(view: KVView) -> OpenedView | None:
    """Return a view for the core; None: it is made for one call, the host lacks its addresses, its
    memory was replaced, or a graph is captured before its table was sent.

    It waits for a table of addresses that is sent to the device.
    """
    known: OpenedView | None = view.derived.get(_OPENED)
    if known is not None or view.temporary or not view.known or view.form.encoding:
        return known
    try:
        view.check_memory()  # what is watched from now on is what was read
        memory = None if view.raw else Watch(view.owners, view.storages)
        made = open_view(view, memory)
    except PortaKVError:  # the general way says it in its turn
        return None
    return view.derived.setdefault(_OPENED, made)  # type: ignore[no-any-return]


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
        self._kernels = None if plain_reader() is None else choice.backend.row_kernels
        self._caches = open_view(cache, memory) if self._kernels is not None else None
        self._copy = None if self._kernels is None else calls().copy_chunk

    def transfer(
        self, store: bool, memory_obj: object, slot_mapping: object, start: object, end: object
    ) -> Transfer | None:
        """Issue a copy on the current stream; None: the core does not make such a copy.

        Raises:
            TransferError: the driver's error.
        """
        own = self._kernels
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
            own is None
            or self._copy is None
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
        kernels = own.address
        caches = self._caches.address
        tabled = self._caches.tabled
        layout = bound.address

        def call(listed: int, room: int, status: int, stream: int) -> int:
            if tabled:
                self._cache.follow_table(self._cache.device)
            # fmt: off
            return copy(kernels, caches, store, layout, chunk, ids, offset, start, past,
                        listed, room, status, stream)
            # fmt: on

        launched = own.launch(call, type(ids) is not torch.Tensor or ids.is_cpu)
        if launched is None:
            return None
        if store:
            increment_version(chunk)
        else:
            note_written(self._cache)
        counts = Counted.counts
        if counts is not None:
            counts.new.append((own.carried[0], "device", self._cache.form, launched.tokens))
            if len(counts.new) >= TOGETHER:
                counts.sum_up()
        return own.end(launched, (chunk, ids, self._cache), ids, self._owner)


def copied(
    src: KVView,
    dst: KVView,
    src_ids: Ids | None,
    dst_ids: Ids | None,
    src_step: int,
    dst_step: int,
    count: object,
    options: CopyOptions,
) -> BlockTransfer | None:
    """Copy between two views of one device on the current stream; None: the core does not make
    such a copy.

    Args:
        src_ids, dst_ids: as `copy_rows` takes them.
        src_step, dst_step: tokens of an id that is no `Index`.
        count: tokens; None: those of the ids.

    Raises:
        TransferError: the driver's error.
    """
    if not isinstance(src, KVView) or not isinstance(dst, KVView):
        return None
    within = src.device == dst.device
    if within and src.device.type == "cpu" and options.backend is None:
        return None
    began = perf_counter()
    reader = plain_reader()
    from_ids, from_step, from_offset = _side(src_ids, src_step)
    to_ids, to_step, to_offset = _side(dst_ids, dst_step)
    tokens = _tokens(from_ids, from_step, from_offset) if count is None else count
    if tokens is None:
        tokens = _tokens(to_ids, to_step, to_offset)
    if type(tokens) is not int or not 0 < tokens < PAST_ANY_VIEW:
        return None
    if not (from_step and to_step) or reader is None:
        return None
    on_host = _on_host(from_ids), _on_host(to_ids)
    if within:
        by = _inside(src, dst, options)
    elif False in on_host:
        by = None
    else:
        steps = (
            0 if from_ids is None else from_step,
            0 if to_ids is None else to_step,
        )
        new = any(not (ids is None or isinstance(ids, Index)) for ids in (src_ids, dst_ids))
        by = _across_link(src, dst, steps, tokens, new, options)
    if by is None:
        return None
    kernels, carried = by
    read = opened(src)
    written = opened(dst)
    if read is None or written is None:
        return None
    copy = calls().copy_views
    table = kernels.address
    torch_objects = reader.address
    src_at = read.address
    dst_at = written.address
    # The core compares the tokens of both sides.
    wanted = TO_THE_END if count is None else tokens
    device = dst.device if src.device.type == "cpu" else src.device
    tabled = [view for view, each in ((src, read), (dst, written)) if each.tabled]
    if tabled and not has_tables(device, tabled):  # the general way sends them there
        return None

    def call(listed: int, room: int, status: int, stream: int) -> int:
        for view in tabled:
            view.follow_table(device)
        # fmt: off
        return copy(table, torch_objects, src_at, dst_at, from_ids, to_ids, from_step, to_step,
                    from_offset, to_offset, wanted, listed, room, status, stream)
        # fmt: on

    memory = [*_memory_of_host(src), *_memory_of_host(dst)] if not within else ()
    try:
        launched = kernels.launch(call, True in on_host)
    except BaseException:  # also an interrupt; what was launched may still run
        if memory:
            completion(device, None, *memory)
        raise
    if launched is None:
        return None
    ids = from_ids, to_ids
    made = kernels.end(launched, (src, dst, ids), ids, memory=memory, carried=carried)
    skips = bool(launched.result & SKIPS)
    indices = (src_ids, src_step), (dst_ids, dst_step)
    return BlockTransfer.of_views(made, src, dst, indices, launched.tokens, began, skips)


def has_tables(device: torch.device, views: Sequence[KVView]) -> bool:
    """Return True if the tables of addresses of views lie on a device. That of pinned memory is on
    the host, which kernels do not reach by its address."""
    return all(view.table.device == device for view in views)


def _inside(
    src: KVView, dst: KVView, options: CopyOptions
) -> tuple[RowKernels, tuple[str, str]] | None:
    """Return the kernels that copy inside a device, and their name with the reason."""
    try:
        choice = choose(src.device, options.backend)
    except PortaKVError:  # the general way says it after it has looked at the ids
        return None
    kernels = choice.backend.row_kernels
    if kernels is None or {src.form.place, dst.form.place} & _AWAY:
        return None
    return kernels, kernels.carried


def _across_link(
    src: KVView,
    dst: KVView,
    steps: tuple[int, int],
    count: int,
    new: bool,
    options: CopyOptions,
) -> tuple[RowKernels, tuple[str, str]] | None:
    """Return the kernels that copy between a device and pinned memory, and the strategy with the
    reason for it."""
    places = src.form.place, dst.form.place
    if places not in PINNED or src.temporary or dst.temporary:
        return None
    down = places[0] == "device"
    try:
        choice = choose((src if down else dst).device, options.backend)
        if isinstance(choice.backend, Strategy) or places in choice.can.places:
            return None
        launch = prepared(src.form, dst.form, *steps, None, across(choice)).picks
        return None if launch is None else launch.kernels_for(count, dst if down else src, new)
    except PortaKVError:  # the general way says it in its turn
        return None


def _memory_of_host(view: KVView) -> tuple[torch.Tensor, ...]:
    """Return what retains the memory of a view that is not on a device."""
    return () if view.form.place == "device" else view.retained


def _tokens(ids: object, step: int, offset: int) -> int | None:
    """Return the tokens of ids; None without ids, or for ids that the core does not read."""
    if type(ids) is list:
        return len(ids) * step - offset
    return ids.numel() * step - offset if type(ids) is torch.Tensor else None


def _side(ids: object, step: int) -> tuple[object, int, int]:
    """Return the ids of a side as the core takes them, the tokens of an id, and those that are
    passed over. A step of 0: the core does not read them."""
    if type(ids) is Index:
        return ids.ids, ids.step, ids.offset
    if type(ids) is np.ndarray:
        try:
            return as_ids(ids), step, 0
        except SlotError:
            return ids, 0, 0
    return ids, step if ids is not None else 1, 0


def _on_host(ids: object) -> bool | None:
    """Return True if ids lie on the host; None without ids."""
    if ids is None:
        return None
    return type(ids) is not torch.Tensor or ids.is_cpu
