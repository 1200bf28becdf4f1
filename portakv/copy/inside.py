# SPDX-License-Identifier: Apache-2.0
"""Make whole copies by one call of the core, from the objects that a caller passes.

The core reads the tensors and the ids, checks them, plans and launches (`native/core/call.cpp`). On
a CPU it checks and plans, and the launch of a backend follows. A call that it does not make, or
that is wrong, returns None here: the caller of these functions then goes the general way of `copy`,
which makes the copy or words the error.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.autograd.graph import increment_version

from portakv.backends.row_kernels import FIRST_WORK, RowKernels, after_tables
from portakv.backends.rows_kernel import MAX_ENTRIES
from portakv.backends.strided import Rows, StridedLaunch, Units
from portakv.copy.call import Context, Piece, Settled, launch, memory_of_host
from portakv.copy.counting import TOGETHER, Counted
from portakv.copy.handle import BlockTransfer, skipped_tokens
from portakv.copy.options import CopyOptions
from portakv.core.call import (
    OTHERWISE,
    SKIPS,
    TO_THE_END,
    TOKENS,
    OpenedChunks,
    OpenedView,
    Watch,
    calls,
)
from portakv.core.link import COUNT
from portakv.core.view import words_of_dtypes
from portakv.errors import LayoutError, PortaKVError, SlotError
from portakv.interconnect.choose import HostLaunch, across
from portakv.interconnect.link import CheckedCopy
from portakv.interconnect.strategy import PINNED, Strategy, StrategyLaunch
from portakv.interconnect.zero_copy import ZeroCopy
from portakv.plan.move import Move
from portakv.registry.prepared import PREPARED, prepared
from portakv.registry.registry import Choice, choose
from portakv.runtime.ends import LISTED
from portakv.runtime.streams import completion
from portakv.runtime.transfer import Owner, Transfer, word_batches
from portakv.view.bound import BoundLayout
from portakv.view.destination import check_writable, with_versions
from portakv.view.form import Form, form_of, plain_reader
from portakv.view.index import PAST_ANY_VIEW, Ids, Index, as_ids, index_of
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
        memory = None if view.raw else Watch(view.owners)
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
    words = words_of_dtypes()
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
        with_versions(view),
        (view.entries, view.entry_bytes if view.entries > 1 else 0),
        (form, view.addresses, view.table if looked_up else None),
    )


class ChunkCopies:
    """The copies between registered caches and chunks.

    Args:
        cache: the caches.
        memory: that of their tensors, which must be as it was.
        choice: what executes the copies.
        owner: the connector, which reports errors later.
    """

    def __init__(self, cache: KVView, memory: Watch, choice: Choice, owner: Owner) -> None:
        self._cache = cache
        self._owner = owner
        self._choice = choice
        self._kernels = kernels = choice.backend.row_kernels
        self._layouts = dict[int, BoundLayout]()
        self._opened = OpenedChunks()
        self._address = 0
        reader = plain_reader()
        if reader is None or (kernels is None and cache.device.type != "cpu"):
            return
        self._caches = open_view(cache, memory)
        self._opened.caches = self._caches.address
        self._opened.torch = reader.address
        self._opened.words = word_batches.address
        self._address = ctypes.addressof(self._opened)
        if kernels is None:
            return
        self._opened.kernels = kernels.address
        self._opened.current = kernels.current
        self._copy: Callable[..., int] = calls().copy_chunk
        if self._caches.tabled:
            self._copy = partial(after_tables, [cache], cache.device, self._copy)

    def add_layout(self, layout: BoundLayout, itemsize: int) -> None:
        """Take the layout of chunks whose elements have so many bytes."""
        power = itemsize.bit_length() - 1
        if power < len(self._opened.layouts):
            self._layouts[itemsize] = layout
            self._opened.layouts[power] = layout.address

    def transfer(
        self, store: bool, memory_obj: object, slot_mapping: object, start: object, end: object
    ) -> Transfer | None:
        """Issue a copy on the current stream; None: the core does not make such a copy.

        Raises:
            TransferError: the driver's error.
        """
        address = self._address
        if not address:
            return None
        chunk = memory_obj
        if type(chunk) is not torch.Tensor:
            chunk = getattr(memory_obj, "tensor", None)
        ids = slot_mapping
        if type(ids) is not torch.Tensor and type(ids) is not list:
            side = _side(ids, 1)
            if side.step != 1 or side.number is None or type(start) is not int or start < 0:
                return None
            ids = side.ids
            start += side.offset
            end = end + side.offset if type(end) is int else end
        kernels = self._kernels
        if kernels is None:
            return self._launched(store, chunk, ids, start, end)

        retained = chunk, ids, self._cache
        transfer = None
        ends = kernels.ends
        if ends is not None and not kernels.process.forked:
            free = ends.listed if type(ids) is list else ends.plain
            try:
                at = free.pop()
            except IndexError:
                used = ends.acquire_after_ends(free)
                if used is None:
                    return None
                at = used
            result = self._copy(address, store, chunk, ids, start, end, at.address, None)
            if result >= 0:
                transfer = at.transfer(result, ids, retained, kernels.carried, self._owner)
            else:
                kernels.give_back(at, OTHERWISE if result == FIRST_WORK else result)
                if result == OTHERWISE:
                    return None
        if transfer is None:
            issued = self._issue((address, store, chunk, ids, start, end), ids, retained)
            if issued is None:
                return None
            transfer, result = issued
        counts = Counted.counts
        if counts is not None:
            counts.new.append((kernels.carried[0], "device", self._cache.form, result >> TOKENS))
            if len(counts.new) >= TOGETHER:
                counts.sum_up()
        return transfer

    def _issue(
        self, arguments: tuple[object, ...], ids: Any, retained: object
    ) -> tuple[Transfer, int] | None:
        """Make a copy on the stream that torch names, with memory for ids of the host."""
        assert self._kernels is not None
        on_host = type(ids) is list or ids.is_cpu
        return self._kernels.issue(self._copy, arguments, on_host, retained, ids, self._owner)

    def _launched(
        self, store: bool, chunk: Any, ids: Any, start: object, end: object
    ) -> Transfer | None:
        """Make a copy on the host by the launch of a backend, as `_launched` does.

        Args:
            ids: a list or a tensor.
        """
        most = len(ids)  # copied tokens are no more
        numbers = np.empty(2 * most, dtype=np.int64)
        room = torch.from_numpy(numbers).data_ptr(), most
        checked = calls().check_chunk(self._address, store, chunk, ids, start, end, *room)
        if isinstance(checked, int):
            return None
        tokens, unit, units, described = checked
        rows = ChunkRows(self._layouts[chunk.itemsize], chunk, described)
        cache = self._cache
        skips = tokens > unit * units  # then both sides have numbers
        read = torch.from_numpy(numbers[:units]) if store or skips else None
        written = torch.from_numpy(numbers[most : most + units]) if skips or not store else None
        source = Units(cache if store else rows, read, 0)
        target = Units(rows if store else cache, written, 0)
        transfer = _by_units(self._choice, source, target, unit, units)
        if transfer is None:
            return None
        increment_version(chunk if store else self._caches.versions)
        counts = Counted.counts
        if counts is not None:
            forms = (cache.form, rows.form) if store else (rows.form, cache.form)
            counts.new.append((transfer.carried[0], forms[0].place, forms[1], tokens))
            if len(counts.new) >= TOGETHER:
                counts.sum_up()
        return transfer


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
    began = perf_counter()
    read = _side(src_ids, src_step)
    written = _side(dst_ids, dst_step)
    tokens = _tokens(read, written, src) if count is None else count
    if type(tokens) is not int or not 0 < tokens < PAST_ANY_VIEW:
        return None
    if not (read.step and written.step):
        return None
    by = None
    if src.device == dst.device:
        choice = _inside(src, dst, options)
        if choice is None:
            return None
        kernels = choice.backend.row_kernels
        if kernels is None:
            return _launched(src, dst, read, written, count, tokens, choice, began)
        by = _Executor(kernels, kernels.carried)
    if True in (read.on_host, written.on_host) and tokens > LISTED * min(read.step, written.step):
        return None  # more ids than kernels read from pinned memory
    if by is None and False not in (read.on_host, written.on_host):  # the number of runs is known
        new = any(not (ids is None or isinstance(ids, Index)) for ids in (src_ids, dst_ids))
        steps = read.plan_step, written.plan_step
        by = _across_link(src, dst, steps, tokens, new, options)
    if by is None:
        return None
    # The core compares the tokens of both sides.
    made = _issue(src, dst, read, written, TO_THE_END if count is None else tokens, by)
    if made is None:
        return None
    transfer, result = made
    tokens = result >> TOKENS
    skipped = 0
    if result & SKIPS:
        indices = index_of(src_ids, src_step), index_of(dst_ids, dst_step)
        skipped = skipped_tokens(Move(src, dst, *indices, tokens))
    step = read.plan_step or written.plan_step
    return BlockTransfer.of_views(transfer, src, dst, step, tokens, skipped, began)


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
    if type(ids) is tuple or type(ids) is range:
        ids = list(ids)
    return _Side(ids, step, offset, True, len(ids)) if type(ids) is list else _Side(ids, 0)


def _tokens(read: _Side, written: _Side, src: KVView) -> int:
    """Return the tokens of the source's ids, else of the destination's, else of the source."""
    for side in (read, written):
        if side.number is not None:
            return side.number * side.step - side.offset
    return src.slots - read.offset


def _issue(
    src: KVView,
    dst: KVView,
    read: _Side,
    written: _Side,
    tokens: int,
    by: _Executor,
) -> tuple[Transfer, int] | None:
    """Make a copy by the core, and return its end and the core's result; None: the core does not
    make it."""
    reader = plain_reader()
    if reader is None:
        return None
    from_view = src.derived.get(_OPENED) or opened(src)
    to_view = dst.derived.get(_OPENED) or opened(dst)
    if from_view is None or to_view is None:
        return None
    device = dst.device if src.device.type == "cpu" else src.device
    tabled = []
    if from_view.tabled or to_view.tabled:
        tabled = [view for view, each in ((src, from_view), (dst, to_view)) if each.tabled]
        if not has_tables(device, tabled):  # the general way sends them there
            return None
    kernels, carried, launch, _ = by
    crossing = None
    copy: Callable[..., int] = calls().copy_views
    views: tuple[int, ...] = reader.address, from_view.address, to_view.address
    if launch is None:
        views = kernels.address, *views
    else:
        crossing = _Crossing(launch, by, src, dst)
        copy = crossing.copy
    if tabled:
        copy = partial(after_tables, tabled, device, copy)
    from_ids, from_step, from_offset, on_host, _ = read
    to_ids, to_step, to_offset, to_host, _ = written

    ids = from_ids, to_ids
    numbers = from_step, to_step, from_offset, to_offset, tokens
    memory = () if src.device == dst.device else memory_of_host(src, dst)
    try:
        made = kernels.issue(
            copy,
            (*views, *ids, *numbers),
            bool(on_host or to_host),
            (src, dst, ids),
            ids,
            memory=memory,
            carried=carried,
        )
    except BaseException:  # also an interrupt; what was launched may still run
        if memory:
            completion(device, None, *memory)
        raise
    if made is not None and crossing is not None:
        increment_version(to_view.versions)
        made[0].carried = crossing.carried
    return made


class _Crossing:
    """A copy between a device and pinned memory by a strategy that orders copies of the driver.

    Attributes:
        carried: the strategy, and why; known once the core has read the ids.
    """

    def __init__(
        self,
        launch: StrategyLaunch,
        by: _Executor,
        src: KVView,
        dst: KVView,
    ) -> None:
        self.carried = by.carried
        self._launch = launch
        self._new = by.new
        self._down = src.form.place == "device"
        self._views = (src, dst) if self._down else (dst, src)  # of the device, and of the host

    def copy(self, *arguments: Any) -> int:
        """Make the copy, as `Calls.copy_views` does; the kernels are left out of the arguments."""
        *sides, end, stream = arguments
        launch = self._launch
        checked = CheckedCopy(*self._views, self._down, stream, end)
        result = calls().read_copy(*sides, *launch.counted, checked.address, end, stream)
        if result < 0 or not isinstance(launch, HostLaunch):
            return result if result < 0 else launch.cross(checked)
        number, groups, host_groups = checked.words[COUNT : COUNT + 3]
        found = launch.pick_counted(number, groups, host_groups, self._views[1], self._new)
        if found is None:
            return OTHERWISE
        _, picked = found
        means = launch.prepared(picked.strategy)
        if not isinstance(means, StrategyLaunch):
            return OTHERWISE
        self.carried = picked
        launch.log(picked)
        return means.cross(checked)


def has_tables(device: torch.device, views: Sequence[KVView]) -> bool:
    """Return True if the tables of addresses of views lie on a device. That of pinned memory is on
    the host, which kernels do not reach by its address."""
    return all(view.table.device == device for view in views)


def _inside(src: KVView, dst: KVView, options: CopyOptions) -> Choice | None:
    """Return what copies inside a device, or on the host; None: it is not a backend's launch."""
    if options.terms is not None or src.form.place in _AWAY or dst.form.place in _AWAY:
        return None
    try:
        choice = choose(src.device, options.backend)
    except PortaKVError:  # the general way says it after it has looked at the ids
        return None
    return choice


def _launched(
    src: KVView,
    dst: KVView,
    read: _Side,
    written: _Side,
    count: object,
    tokens: int,
    choice: Choice,
    began: float,
) -> BlockTransfer | None:
    """Make a copy on the host by the launch of a backend, once the core has checked it; None: the
    core does not take such a copy."""
    reader = plain_reader()
    if src.device.type != "cpu" or reader is None:
        return None
    from_view = opened(src)
    to_view = opened(dst)
    if from_view is None or to_view is None:
        return None
    from_ids, from_step, from_offset, _, _ = read
    to_ids, to_step, to_offset, _, _ = written
    numbers = np.empty(2 * tokens, dtype=np.int64)
    # fmt: off
    checked = calls().check_views(reader.address, from_view.address, to_view.address,
                                  from_ids, to_ids, from_step, to_step, from_offset, to_offset,
                                  TO_THE_END if count is None else tokens,
                                  torch.from_numpy(numbers).data_ptr(), tokens)
    # fmt: on
    if isinstance(checked, int):
        return None
    most = tokens
    tokens, unit, units = checked
    skipped = tokens - unit * units
    source = target = None
    if from_ids is not None or skipped:
        source = torch.from_numpy(numbers[:units])
    if to_ids is not None or skipped:
        target = torch.from_numpy(numbers[most : most + units])
    src_units = Units(src, source, from_offset)
    dst_units = Units(dst, target, to_offset)
    transfer = _by_units(choice, src_units, dst_units, unit, units)
    if transfer is None:
        return None
    torch._C._increment_version(to_view.versions)
    step = read.plan_step or written.plan_step
    return BlockTransfer.of_views(transfer, src, dst, step, tokens, skipped, began)


class ChunkRows:
    """The rows of a chunk on the host during one call, as launches of `StridedLaunch` use a view.

    Args:
        bound: the layout of the chunk.
        tensor: the chunk.
        described: what the core read of it.
    """

    raw = True  # nothing is made of it that later calls use

    def __init__(
        self, bound: BoundLayout, tensor: torch.Tensor, described: tuple[Any, ...]
    ) -> None:
        form, self._addresses, _, _, self.slots, _ = described
        self.form: Form = form_of(form) if isinstance(form, bytes) else form
        self.device = tensor.device
        self.derived: dict[Hashable, Any] = {}
        self._bound = bound
        self._tensor = tensor
        self._storage = tensor.untyped_storage()

    def view(self) -> KVView:
        """Return the chunk as a view."""
        return KVView.through(self._bound, self._tensor)

    def strided(
        self,
        entry: int,
        offset: int,
        dtype: torch.dtype,
        size: Sequence[int],
        stride: Sequence[int],
    ) -> torch.Tensor:
        """Return a tensor as `KVView.strided`, inside the storage, which the core has looked at."""
        start = self._addresses[entry] + offset - self._storage.data_ptr()
        empty = torch.empty(0, dtype=dtype, device=self.device)
        return empty.set_(self._storage, start // dtype.itemsize, size, stride)


def _by_units(choice: Choice, src: Units, dst: Units, unit: int, units: int) -> Transfer | None:
    """Launch a copy on the host of so many units of ``unit`` tokens, which the core has checked;
    None: no backend takes its plan."""
    src_step = 0 if src.numbers is None else unit
    dst_step = 0 if dst.numbers is None else unit
    src_form = src.rows.form
    dst_form = dst.rows.form
    ready = PREPARED.get((src_form.address, dst_form.address, src_step, dst_step, None, choice))
    if ready is None:
        try:
            ready = prepared(src_form, dst_form, src_step, dst_step, None, choice)
        except PortaKVError:  # the general way says it in its turn
            return None
    if ready.picks is not None or ready.plan.unit != unit:
        return None
    if type(ready.launch) is StridedLaunch:
        ready.launch.copy(src, dst, units)
        return Transfer((), None, ready.carried)
    sides = _view(src.rows), _view(dst.rows), _index(src, unit), _index(dst, unit)
    move = Move(*sides, unit * units)
    piece = Piece(ready, ready.carried, 0, move, None)
    return launch(Settled(move, (piece,), None, False), Context(dst.rows.device, None, False))


def _view(rows: Rows) -> KVView:
    """Return rows as a view."""
    if isinstance(rows, ChunkRows):
        return rows.view()
    assert isinstance(rows, KVView)
    return rows


def _index(side: Units, unit: int) -> Index:
    """Return units as an index."""
    return Index(offset=side.offset) if side.numbers is None else Index(side.numbers, unit)


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
        named = isinstance(choice.backend, Strategy)
        if not named and places in choice.can.places:
            return None
        if not named or options.terms is not None:
            choice = across(choice, options.terms)
        ready = prepared(src.form, dst.form, *steps, None, choice)
        host = dst if down else src
        launch = ready.launch
        if isinstance(launch, HostLaunch):
            found = launch.pick_counted(count, 1, 1, host, new)
            if found is not None:
                strategy, picked = found
                if isinstance(strategy, ZeroCopy) and launch.has_prepared(picked.strategy):
                    launch.log(picked)
                    return _Executor(strategy.kernels[src.form.place], picked)
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
