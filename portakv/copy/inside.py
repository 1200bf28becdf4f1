# SPDX-License-Identifier: Apache-2.0
"""Copy inside a device by one call of the core, from the objects that a caller passes.

The core reads the tensors and the ids, checks them, plans and launches (`native/core/call.cpp`). A
call that it does not make, or that is wrong, returns None here: the caller of these functions then
goes the general way of `copy`, which makes the copy or words the error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch.autograd.graph import increment_version

from portakv.backends.row_kernels import Launched, RowKernels
from portakv.backends.rows_kernel import MAX_ENTRIES
from portakv.copy.call import memory_of_host
from portakv.copy.counting import TOGETHER, Counted
from portakv.copy.handle import BlockTransfer
from portakv.copy.options import CopyOptions
from portakv.core.call import OTHERWISE, SKIPS, TO_THE_END, OpenedView, Watch, calls
from portakv.core.link import COUNT
from portakv.core.view import dtype_words, name_of
from portakv.errors import LayoutError, PortaKVError, SlotError
from portakv.interconnect.choose import HostLaunch, across
from portakv.interconnect.link import CheckedCopy
from portakv.interconnect.strategy import PINNED, Strategy, StrategyLaunch
from portakv.interconnect.zero_copy import ZeroCopy
from portakv.registry.prepared import prepared
from portakv.registry.registry import Choice, choose
from portakv.runtime.pinned_ids import PinnedIds
from portakv.runtime.streams import completion
from portakv.runtime.transfer import Owner, Transfer
from portakv.view.bound import BoundLayout
from portakv.view.destination import check_writable, note_written
from portakv.view.form import plain_reader
from portakv.view.index import PAST_ANY_VIEW, Ids, Index, as_ids
from portakv.view.view import KVView

_AWAY = {"peer", "remote"}
#: The most ids of the host of a copy.
_LISTED = 2 * PinnedIds.MOST
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
        (view.entries, view.entry_bytes if view.entries > 1 else 0),
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
        ids, step, offset, on_host, number = _side(slot_mapping, 1)
        chunk = memory_obj
        if type(chunk) is not torch.Tensor:
            chunk = getattr(memory_obj, "tensor", None)
        if (
            own is None
            or self._copy is None
            or self._caches is None
            or type(chunk) is not torch.Tensor
            or type(start) is not int
            or step != 1
            or number is None
        ):
            return None
        if end is None:
            past = TO_THE_END
        elif type(end) is int and end > start >= 0:
            past = end
        else:
            return None
        bound = self._bound(chunk.itemsize)
        used = number if end is None or type(ids) is list else past - start
        if bound is None or (on_host and used > _LISTED):
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

        launched = own.launch(call, bool(on_host))
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
    if src.device == dst.device and src.device.type == "cpu" and options.backend is None:
        return None
    began = perf_counter()
    read = _side(src_ids, src_step)
    written = _side(dst_ids, dst_step)
    tokens = _tokens(read, written) if count is None else count
    if type(tokens) is not int or not 0 < tokens < PAST_ANY_VIEW:
        return None
    if not (read.step and written.step):
        return None
    if True in (read.on_host, written.on_host) and tokens > _LISTED * min(read.step, written.step):
        return None  # more ids than kernels read from pinned memory
    new = any(not (ids is None or isinstance(ids, Index)) for ids in (src_ids, dst_ids))
    by = _executor(src, dst, read, written, tokens, new, options)
    if by is None:
        return None
    # The core compares the tokens of both sides.
    made = _issue(src, dst, read, written, TO_THE_END if count is None else tokens, by)
    if made is None:
        return None
    transfer, launched = made
    skips = bool(launched.result & SKIPS)
    indices = (src_ids, src_step), (dst_ids, dst_step)
    return BlockTransfer.of_views(transfer, src, dst, indices, launched.tokens, began, skips)


class _Executor(NamedTuple):
    """What makes a copy.

    Attributes:
        kernels: the row kernels that make it, or whose device orders it.
        carried: what executes it, and why.
        launch: of a strategy that makes it by other means, or of all strategies, one of which is
            picked by the ids.
        new: ids are a caller's for one call.
    """

    kernels: RowKernels
    carried: tuple[str, str]
    launch: StrategyLaunch | None = None
    new: bool = False


class _Side(NamedTuple):
    """The ids of a side as the core takes them.

    Attributes:
        ids: a list or a tensor; None: consecutive tokens.
        step: tokens of an id; 0: the core does not read the ids.
        offset: tokens that are passed over.
        on_host: the ids lie on the host; None without ids.
        number: of ids; None without ids.
    """

    ids: object
    step: int
    offset: int = 0
    on_host: bool | None = None
    number: int | None = None

    @property
    def plan_step(self) -> int:
        """Return the step that a plan is made for; 0 without ids."""
        return 0 if self.ids is None else self.step


def _side(ids: object, step: int) -> _Side:
    """Return the ids of a side; ``step``: tokens of an id that is no `Index`."""
    offset = 0
    if type(ids) is Index:
        step = ids.step
        offset = ids.offset
        ids = ids.ids
    elif type(ids) is np.ndarray:
        try:
            ids = as_ids(ids)
        except SlotError:
            return _Side(ids, 0)
    if ids is None:
        return _Side(None, step or 1, offset)
    if type(ids) is torch.Tensor:
        return _Side(ids, step, offset, ids.is_cpu, ids.numel())
    return _Side(ids, step, offset, True, len(ids)) if type(ids) is list else _Side(ids, 0)


def _tokens(read: _Side, written: _Side) -> int | None:
    """Return the tokens of the source's ids, else of the destination's; None without ids."""
    for side in (read, written):
        if side.number is not None:
            return side.number * side.step - side.offset
    return None


def _executor(
    src: KVView,
    dst: KVView,
    read: _Side,
    written: _Side,
    tokens: int,
    new: bool,
    options: CopyOptions,
) -> _Executor | None:
    """Return what makes a copy. ``new``: ids are a caller's for one call."""
    if src.device == dst.device:
        return _inside(src, dst, options)
    if False in (read.on_host, written.on_host):  # their number of runs is not known
        return None
    steps = read.plan_step, written.plan_step
    return _across_link(src, dst, steps, tokens, new, options)


def _issue(
    src: KVView,
    dst: KVView,
    read: _Side,
    written: _Side,
    tokens: int,
    by: _Executor,
) -> tuple[Transfer, Launched] | None:
    """Make a copy by the core, and return its end; None: the core does not make it."""
    reader = plain_reader()
    from_view = opened(src)
    to_view = opened(dst)
    if reader is None or from_view is None or to_view is None:
        return None
    device = dst.device if src.device.type == "cpu" else src.device
    tabled = [view for view, each in ((src, from_view), (dst, to_view)) if each.tabled]
    if tabled and not has_tables(device, tabled):  # the general way sends them there
        return None
    kernels, carried, launch, new = by
    copy = calls().copy_views
    views = reader.address, from_view.address, to_view.address
    from_ids, from_step, from_offset, on_host, _ = read
    to_ids, to_step, to_offset, to_host, _ = written

    def call(listed: int, room: int, status: int, stream: int) -> int:
        for view in tabled:
            view.follow_table(device)
        sides = (*views, from_ids, to_ids, from_step, to_step, from_offset, to_offset, tokens)
        if launch is None:
            return copy(kernels.address, *sides, listed, room, status, stream)
        nonlocal carried
        down = src.form.place == "device"
        rows, host = (src, dst) if down else (dst, src)
        checked = CheckedCopy(from_view, to_view, rows, host, down, stream)
        result = calls().read_copy(*sides, *launch.counted, listed, room, checked.address)
        if result < 0 or not isinstance(launch, HostLaunch):
            return result if result < 0 else launch.cross(checked)
        number, groups, host_groups = checked.words[COUNT:]
        picked = launch.pick_counted(number, groups, host_groups, host, new)
        if picked is None:
            return OTHERWISE
        means, carried = picked
        return means.cross(checked) if isinstance(means, StrategyLaunch) else OTHERWISE

    memory = () if src.device == dst.device else memory_of_host(src, dst)
    try:
        launched = kernels.launch(call, bool(on_host or to_host))
    except BaseException:  # also an interrupt; what was launched may still run
        if memory:
            completion(device, None, *memory)
        raise
    if launched is None:
        return None
    ids = from_ids, to_ids
    end = kernels.end(launched, (src, dst, ids), ids, memory=memory, carried=carried)
    return end, launched


def has_tables(device: torch.device, views: Sequence[KVView]) -> bool:
    """Return True if the tables of addresses of views lie on a device. That of pinned memory is on
    the host, which kernels do not reach by its address."""
    return all(view.table.device == device for view in views)


def _inside(src: KVView, dst: KVView, options: CopyOptions) -> _Executor | None:
    """Return the kernels that copy inside a device, and their name with the reason."""
    if options.terms is not None:
        return None
    try:
        choice = choose(src.device, options.backend)
    except PortaKVError:  # the general way says it after it has looked at the ids
        return None
    kernels = choice.backend.row_kernels
    if kernels is None or {src.form.place, dst.form.place} & _AWAY:
        return None
    return _Executor(kernels, kernels.carried)


def _across_link(
    src: KVView,
    dst: KVView,
    steps: tuple[int, int],
    count: int,
    new: bool,
    options: CopyOptions,
) -> _Executor | None:
    """Return what copies between a device and pinned memory."""
    places = src.form.place, dst.form.place
    if places not in PINNED or src.temporary or dst.temporary:
        return None
    down = places[0] == "device"
    try:
        choice = choose((src if down else dst).device, options.backend)
        strategy = isinstance(choice.backend, Strategy)
        if not strategy and places in choice.can.places:
            return None
        if not strategy or options.terms is not None:
            choice = across(choice, options.terms)
        ready = prepared(src.form, dst.form, *steps, None, choice)
        host = dst if down else src
        launch = ready.launch
        if isinstance(launch, HostLaunch):
            by_kernels = launch.kernels_for(count, host, new)
            if by_kernels is not None:
                return _Executor(*by_kernels)
        by = ready.choice.backend
        if not isinstance(by, Strategy) or not isinstance(launch, StrategyLaunch):
            return None
        if by.refuses(host):
            return None
        if isinstance(by, ZeroCopy):
            return _Executor(by.kernels[src.form.place], ready.carried)
        kernels = by.half.backend.row_kernels
    except PortaKVError:  # the general way says it in its turn
        return None
    return None if kernels is None else _Executor(kernels, ready.carried, launch, new)
