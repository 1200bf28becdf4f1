# SPDX-License-Identifier: Apache-2.0
"""Make whole copies by one call of the core, from the objects that a caller passes.

The core reads the tensors and the ids, checks them, plans and launches (`native/core/call.cpp`). If
the backend has no kernels for the core, the core checks and plans, and a launch of the backend
follows. A call that the core does not make, or that is wrong, returns None here: the caller of
these functions then goes the general way of `copy`, which makes the copy or words the error.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from time import perf_counter
from types import NoneType
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch.autograd.graph import increment_version
from torch.utils.dlpack import DLDeviceType

from portakv.backends.row_kernels import RowKernels
from portakv.backends.rows_kernel import MAX_ENTRIES
from portakv.backends.strided import ChunkRows, StridedLaunch, Units
from portakv.copy.call import memory_of_host
from portakv.copy.counting import Counted
from portakv.copy.handle import BlockTransfer, skipped_tokens
from portakv.copy.options import USUAL, CopyOptions
from portakv.copy.submit import submit
from portakv.core.call import (
    ANSWER,
    PICKED,
    SKIPS,
    TO_THE_END,
    TOKENS,
    Executor,
    OpenedChunks,
    OpenedView,
    Watch,
    calls,
)
from portakv.core.rows import MOST_CARRIED, MOST_LISTED
from portakv.core.view import handle_at, words_of_dtypes
from portakv.errors import LayoutError, PortaKVError, SlotError
from portakv.interconnect.choose import across
from portakv.interconnect.strategy import PINNED, Strategy, StrategyLaunch, WholeCopies
from portakv.plan.plan import Move
from portakv.registry.prepared import PREPARED, Prepared, bring_table, prepared
from portakv.registry.registry import OVERRIDE, REGISTRY, VARIABLES, Choice, choose
from portakv.runtime.devices import capturing
from portakv.runtime.streams import completion
from portakv.runtime.transfer import (
    Completion,
    Owner,
    StatusWord,
    Transfer,
    acquire_word,
    hold,
    word_batches,
)
from portakv.view.bound import BoundLayout
from portakv.view.form import Form, plain_reader
from portakv.view.index import CONSECUTIVE, ID_DTYPES, PAST_ANY_VIEW, Ids, Index, as_ids, index_of
from portakv.view.view import KVView, check_writable, with_versions

_AWAY = {"peer", "remote"}
_OPENED = "opened"  # of a view, for the core
_OPENED_WITHOUT = "opened without its table"


def opened(view: KVView, tables: bool = True) -> OpenedView | None:
    """Return a view for the core; None: it is made for one call, the host lacks its addresses, its
    memory was replaced, a graph is captured before its table was sent, or the core reads no tensors
    of this torch.

    ``tables``: kernels of the core may read its table of addresses. It then waits for a table that
    is sent to the device.
    """
    key = _OPENED if tables else _OPENED_WITHOUT
    known: OpenedView | None = view.derived.get(key)
    if known is not None or view.temporary or not view.known or view.form.encoding:
        return known
    if handle_at() is None:
        return None
    try:
        view.check_memory()  # what is watched from now on is what was read
        memory = None if view.raw else Watch(view.owners)
        made = open_view(view, memory, tables)
    except PortaKVError:  # the general way says it in its turn
        return None
    return view.derived.setdefault(key, made)  # type: ignore[no-any-return]


def open_view(view: KVView, memory: Watch | None, tables: bool = True) -> OpenedView:
    """Return a view for the core, with its memory as it is watched; None: raw memory.

    ``tables``: as for `opened`.
    """
    form = view.form
    looked_up = form.lists or form.table_on_device or view.entries > MAX_ENTRIES
    looked_up = looked_up and tables
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
        _dlpack_device(view.device),
        writable,
        form.table_on_device,
        memory,
        with_versions(view),
        (view.entries, view.entry_bytes if view.entries > 1 else 0),
        (form, view.addresses, view.table if looked_up else None),
    )


def _dlpack_device(device: torch.device) -> tuple[int, int]:
    """Return DLPack's numbers of a device."""
    try:
        return torch.empty(0, device=device).__dlpack_device__()
    except ValueError:  # torch does not know the name of a vendor's device
        return DLDeviceType.kDLExtDev, device.index or 0


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
        if reader is None:
            return
        self._caches = open_view(cache, memory, tables=kernels is not None)
        by = Executor(None, reader.address, None) if kernels is None else kernels.executor
        self._opened = OpenedChunks(by, self._caches.address, words=word_batches.address)
        self._address = ctypes.addressof(self._opened)
        self._copy: Callable[..., int] = calls().copy_chunk
        self._tabled = [cache] if self._caches.tabled else []

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
        if not self._address:
            return None
        kernels = self._kernels
        chunk = memory_obj
        if type(chunk) is not torch.Tensor:
            chunk = getattr(memory_obj, "tensor", None)
        ids: Any = slot_mapping
        if type(ids) is not torch.Tensor and type(ids) is not list:
            side = _side(ids, 1)
            ids, step, offset, _, number = side
            if step != 1 or number is None or type(start) is not int or start < 0:
                return None
            start += offset
            end = end + offset if type(end) is int else end
            if kernels is not None:
                count = (end if type(end) is int else number) - start
                ids = _placed(side, slot_mapping, self._cache, start, count, not store)[0]
        on_device = type(ids) is torch.Tensor and not ids.is_cpu
        many = False  # more ids of the host than travel with launches
        if kernels is not None and type(start) is int and not on_device:
            past: Any = end
            if type(past) is not int:
                past = ids.numel() if type(ids) is torch.Tensor else len(ids)
            many = past - start > MOST_LISTED
        if kernels is None or many:
            return self._launched(store, chunk, slot_mapping, ids, start, end)

        arguments = self._address, store, chunk, ids, start, end
        issued = kernels.issue(self._copy, arguments, self._tabled)
        if issued is None:
            return None
        at, result = issued
        completions = () if at is None else (at.completion(result, ids, self._owner),)
        transfer = Transfer(completions, (chunk, ids, self._cache), kernels.carried)
        counts = Counted.counts
        if counts is not None:
            counts.add(kernels.carried[0], "device", self._cache.form, result >> TOKENS)
        return transfer

    def _launched(
        self, store: bool, chunk: Any, slot_mapping: Any, ids: Any, start: Any, end: object
    ) -> Transfer | None:
        """Make a copy by the launch of a backend, as `_launched` does.

        Args:
            slot_mapping: as the caller passed it.
            ids: of it, a list or a tensor.
        """
        cache = self._cache
        index = None
        most = 0
        if cache.device.type == "cpu":
            # Copied tokens are no more.
            most = ids.numel() if type(ids) is torch.Tensor else len(ids)
        else:
            index = _index_of(slot_mapping, 1)
            if index is None:
                return None
            ids = index.ids
        numbers = np.empty(2 * most, dtype=np.int64)
        room = torch.from_numpy(numbers).data_ptr() if most else 0
        checked = calls().check_chunk(self._address, store, chunk, ids, start, end, room, most)
        if isinstance(checked, int):
            return None
        tokens, unit, units, described = checked
        rows = ChunkRows(self._layouts[chunk.itemsize], chunk, described)
        sides = _Launch(cache if store else rows, rows if store else cache, tokens, unit, units)
        if index is not None:
            index = index.shifted(start - index.offset)
            both = (index, CONSECUTIVE) if store else (CONSECUTIVE, index)
            transfer = _by_ids(self._choice, sides, both, self._owner)
        else:
            transfer = _by_units(self._choice, sides, numbers, (store, not store), (0, 0))
        if transfer is None:
            return None
        increment_version(chunk if store else self._caches.versions)
        counts = Counted.counts
        if counts is not None:
            forms = (cache.form, rows.form) if store else (rows.form, cache.form)
            counts.add(transfer.carried[0], forms[0].place, forms[1], tokens)
        return transfer


def copied(
    src: KVView,
    dst: KVView,
    src_ids: Ids | None,
    dst_ids: Ids | None,
    by_block: bool,
    count: object,
    options: CopyOptions,
) -> BlockTransfer | None:
    """Copy between two views on the current stream; None: the core does not make such a copy.

    Args:
        src_ids, dst_ids: as `copy_rows` or `copy_blocks` takes them.
        by_block: they are of blocks.
        count: tokens; None: those of the ids.

    Raises:
        TransferError: the driver's error.
    """
    if not isinstance(src, KVView) or not isinstance(dst, KVView):
        return None
    began = perf_counter()
    src_step = src.form.block_size if by_block else 1
    dst_step = dst.form.block_size if by_block else 1
    read = _side(src_ids, src_step)
    written = _side(dst_ids, dst_step)
    _, from_step, from_offset, from_host, _ = read
    _, to_step, to_offset, to_host, _ = written
    tokens = _tokens(read, written, src) if count is None else count
    if type(tokens) is not int or not 0 < tokens < PAST_ANY_VIEW or not (from_step and to_step):
        return None
    if by_block and (from_step != (src_step or 1) or to_step != (dst_step or 1)):
        return None  # an index of something else than blocks
    # More ids than kernels read from pinned memory.
    many = tokens > MOST_LISTED * min(from_step, to_step) and bool(from_host or to_host)
    # The core compares the tokens of both sides.
    listed = TO_THE_END if count is None else tokens
    made: _Made | None = None
    if src.device == dst.device:
        if src.form.place in _AWAY or dst.form.place in _AWAY:
            return None  # no launch of a backend makes it
        # As `choose` begins: a choice that is known, unless the environment overrides it.
        choice = None
        if OVERRIDE not in VARIABLES:
            choice = REGISTRY.choices.get((src.device, options.backend))
        try:
            choice = choice or choose(src.device, options.backend)
        except PortaKVError:  # the general way says it after it has looked at the ids
            return None
        if options.terms is not None and (
            options.max_thread_blocks is not None or isinstance(choice.backend, Strategy)
        ):
            return None  # only strategies keep them
        kernels = choice.backend.row_kernels
        if kernels is not None:
            read = _placed(read, src_ids, src, from_offset, tokens, False)
            written = _placed(written, dst_ids, dst, to_offset, tokens, True)
            many = many and bool(read[3] or written[3])
        if kernels is None or many:  # a launch reads an index on the device
            ids = src_ids, dst_ids
            return _launched(src, dst, *ids, read, written, count, tokens, choice, began)
        made = _copy_inside(src, dst, read, written, listed, kernels)
    elif not many and from_host is not False is not to_host:
        new = type(src_ids) not in _KEPT or type(dst_ids) not in _KEPT
        made = _copy_across(src, dst, read, written, listed, new, options)
    if made is None:
        return None
    completions, retained, carried, result = made
    tokens = result >> TOKENS
    skipped = 0
    if result & SKIPS:
        indices = index_of(src_ids, src_step), index_of(dst_ids, dst_step)
        skipped = skipped_tokens(Move(src, dst, *indices, tokens))
    step = _plan_step(read) or _plan_step(written)
    return BlockTransfer(completions, retained, carried, src, dst, step, tokens, skipped, began)


def copy_checked(
    src: KVView,
    dst: KVView,
    src_index: Index | None,
    dst_index: Index | None,
    count: int,
    options: CopyOptions = USUAL,
) -> BlockTransfer:
    """Copy ``count`` tokens, as `copy_rows` does, without its checks of arguments and lengths.

    The caller has checked that both indices cover the tokens. Ids and memory are checked as there.
    Raises as `copy_rows`, except for lengths.
    """
    if options.whole:
        made = copied(src, dst, src_index, dst_index, False, count, options)
        if made is not None:
            return made
    src_index = src_index or CONSECUTIVE
    dst_index = dst_index or CONSECUTIVE
    return submit(Move(src, dst, src_index, dst_index, count), options)


#: What kept ids have; others are a caller's for one call.
_KEPT = frozenset({Index, NoneType})
#: The ids of a side as the core takes them: a list or a tensor, None: consecutive tokens; the
#: tokens of an id, 0: the core does not read the ids; the tokens that are passed over; whether the
#: ids lie on the host, and how many they are, both None without ids.
_Side: TypeAlias = tuple[object, int, int, bool | None, int | None]
#: A copy that the core made: its completions, what it retains, what executes it and why, and the
#: core's result.
_Made: TypeAlias = tuple[tuple[Completion, ...], object, tuple[str, str], int]


def _plan_step(side: _Side) -> int:
    """Return the step that a plan is made for; 0 without ids."""
    return 0 if side[0] is None else side[1]


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
            return ids, 0, 0, None, None
    if type(ids) is torch.Tensor:
        return ids, step, offset, ids.is_cpu, ids.numel()
    if ids is None:
        return None, step or 1, offset, None, None
    if type(ids) is tuple or type(ids) is range:
        ids = list(ids)
    return (ids, step, offset, True, len(ids)) if type(ids) is list else (ids, 0, 0, None, None)


def _placed(
    side: _Side, ids: object, view: KVView, offset: int, tokens: int, distinct: bool
) -> _Side:
    """Return a side of a copy inside a device with its ids where kernels read them: a copy on the
    device if they are those of an `Index`, which keeps it, and too many to travel with a launch.
    ``offset``: of the first of the tokens.

    Ids of the host stay there if they skip, fail their check, or cannot be copied now.
    """
    _, step, passed, on_host, number = side
    if type(ids) is not Index or not on_host or (number or 0) <= MOST_CARRIED:
        return side
    device = view.device
    if not ids.has_ids_on(device, frozenset(ID_DTYPES)) and capturing(device):
        return side
    there = ids.checked_on(device, offset, tokens, view.slots, distinct)
    return side if there is None else (there, step, passed, False, number)


def _tokens(read: _Side, written: _Side, src: KVView) -> int:
    """Return the tokens of the source's ids, else of the destination's, else of the source."""
    for _, step, offset, _, number in (read, written):
        if number is not None:
            return number * step - offset
    return src.slots - read[2]


def _arguments(
    src: KVView, dst: KVView, read: _Side, written: _Side, tokens: int, device: torch.device
) -> tuple[tuple[Any, ...], list[KVView]] | None:
    """Return the arguments of the core from the source's view to the tokens, and the views whose
    tables of addresses kernels read; None: the core does not read one of the views."""
    from_view = opened(src)
    to_view = opened(dst)
    if from_view is None or to_view is None:
        return None
    tabled = []
    if from_view.tabled or to_view.tabled:
        tabled = [view for view, each in ((src, from_view), (dst, to_view)) if each.tabled]
        if not has_tables(device, tabled):  # the general way sends them there
            return None
    from_ids, from_step, from_offset, _, _ = read
    to_ids, to_step, to_offset, _, _ = written
    # fmt: off
    return (from_view.address, to_view.address, from_ids, to_ids,
            from_step, to_step, from_offset, to_offset, tokens), tabled
    # fmt: on


def _copy_inside(
    src: KVView, dst: KVView, read: _Side, written: _Side, tokens: int, kernels: RowKernels
) -> _Made | None:
    """Make a copy inside a device by the core."""
    both = _arguments(src, dst, read, written, tokens, dst.device)
    if both is None or not kernels.executor.torch:
        return None
    arguments, tabled = both
    arguments = kernels.executor_at, *arguments
    issued = kernels.issue(calls().copy_views, arguments, tabled)
    if issued is None:
        return None
    end, result = issued
    ids = read[0], written[0]
    completions = () if end is None else (end.completion(result, ids),)
    return completions, (src, dst, ids), kernels.carried, result


def _copy_across(
    src: KVView,
    dst: KVView,
    read: _Side,
    written: _Side,
    tokens: int,
    new: bool,
    options: CopyOptions,
) -> _Made | None:
    """Make a copy between a device and pinned memory as `_copy_inside` does; ``new``: ids are a
    caller's for one call."""
    found = _across_link(src, dst, _plan_step(read), _plan_step(written), options)
    if found is None:
        return None
    whole, carried = found
    rows, host = (src, dst) if src.form.place == "device" else (dst, src)
    both = _arguments(src, dst, read, written, tokens, rows.device)
    if both is None:
        return None
    arguments, tabled = both
    sides = *arguments, *whole.launch.terms(host, new)
    try:
        issued = whole.kernels.issue(whole.copy, (rows, host, sides), tabled)
    except BaseException:  # also an interrupt; what was launched may still run
        completion(rows.device, None, *memory_of_host(src, dst))
        raise
    if issued is None:
        return None
    end, result = issued
    ids = read[0], written[0]
    # No allocator orders the host's memory, which the opened view has.
    completions = () if end is None else (end.completion_across((ids, opened(host))),)
    carried = whole.launch.picked(result >> ANSWER & PICKED) or carried
    return completions, (src, dst, ids), carried, result


def has_tables(device: torch.device, views: Sequence[KVView]) -> bool:
    """Return True if the tables of addresses of views lie on a device. That of pinned memory is on
    the host, which kernels do not reach by its address."""
    return all(view.table.device == device for view in views)


def _launched(
    src: KVView,
    dst: KVView,
    src_ids: Ids | None,
    dst_ids: Ids | None,
    read: _Side,
    written: _Side,
    count: object,
    tokens: int,
    choice: Choice,
    began: float,
) -> BlockTransfer | None:
    """Make a copy by the launch of a backend, once the core has checked it; None: the core or the
    backend does not take such a copy."""
    reader = plain_reader()
    from_view = opened(src, tables=False)
    to_view = opened(dst, tables=False)
    if reader is None or from_view is None or to_view is None:
        return None
    from_ids, from_step, from_offset, _, _ = read
    to_ids, to_step, to_offset, _, _ = written
    indices = None
    most = 0
    if src.device.type == "cpu":
        most = tokens
    else:
        src_index = _index_of(src_ids, from_step)
        dst_index = _index_of(dst_ids, to_step)
        if src_index is None or dst_index is None:
            return None
        indices = src_index, dst_index
        from_ids = src_index.ids
        to_ids = dst_index.ids
    numbers = np.empty(2 * most, dtype=np.int64)
    # fmt: off
    checked = calls().check_views(reader.address, from_view.address, to_view.address,
                                  from_ids, to_ids, from_step, to_step, from_offset, to_offset,
                                  TO_THE_END if count is None else tokens,
                                  torch.from_numpy(numbers).data_ptr() if most else 0, most)
    # fmt: on
    if isinstance(checked, int):
        return None
    tokens, unit, units = checked
    sides = _Launch(src, dst, tokens, unit, units)
    if indices is not None:
        transfer = _by_ids(choice, sides, indices)
    else:
        listed = from_ids is not None, to_ids is not None
        transfer = _by_units(choice, sides, numbers, listed, (from_offset, to_offset))
    if transfer is None:
        return None
    torch._C._increment_version(to_view.versions)
    step = _plan_step(read) or _plan_step(written)
    return BlockTransfer.of(transfer, src, dst, step, tokens, tokens - unit * units, began)


class _Launch(NamedTuple):
    """A copy that the core has checked, for the launch of a backend.

    Attributes:
        src, dst: views, or the chunk of one call.
        tokens: with those that ids on the host skip.
        unit: tokens that are moved together.
        units: that are moved.
    """

    src: KVView | ChunkRows
    dst: KVView | ChunkRows
    tokens: int
    unit: int
    units: int

    @property
    def views(self) -> tuple[KVView, KVView]:
        """Return both sides as views."""
        src = self.src
        dst = self.dst
        return (
            src.view if isinstance(src, ChunkRows) else src,
            dst.view if isinstance(dst, ChunkRows) else dst,
        )


def _by_units(
    choice: Choice,
    sides: _Launch,
    numbers: npt.NDArray[np.int64],
    listed: tuple[bool, bool],
    offsets: tuple[int, int],
) -> Transfer | None:
    """Copy on the host by numbers of units; None: no backend takes the plan.

    Args:
        numbers: those of the source, then as much room for those of the destination.
        listed: for each side, whether it has ids.
        offsets: of a side without ids, the tokens before it.
    """
    src, dst, tokens, unit, units = sides
    # With units that are left out, both sides have numbers.
    src_listed, dst_listed = listed if tokens == unit * units else (True, True)
    src_step = unit if src_listed else 0
    dst_step = unit if dst_listed else 0
    ready = _ready(choice, src.form, dst.form, src_step, dst_step, unit)
    if ready is None:
        return None
    source = target = None
    if src_listed:
        source = torch.from_numpy(numbers[:units])
    if dst_listed:
        half = numbers.size // 2
        target = torch.from_numpy(numbers[half : half + units])
    read = Units(src, source, offsets[0])
    written = Units(dst, target, offsets[1])
    if type(ready.launch) is StridedLaunch:
        ready.launch.copy(read, written, units)
        return Transfer((), None, ready.carried)
    src_index, dst_index = (
        Index(offset=x.offset) if x.numbers is None else Index.checked(x.numbers, unit)
        for x in (read, written)
    )
    return _launch(ready, Move(*sides.views, src_index, dst_index, unit * units))


def _by_ids(
    choice: Choice, sides: _Launch, indices: tuple[Index, Index], owner: Owner | None = None
) -> Transfer | None:
    """Copy inside a device by indices, whose ids there the core has not checked.

    None: a graph is captured, no backend takes the plan, or bad ids are to be left out before.

    Args:
        owner: it reports an error if the handle does not.
    """
    move = Move(*sides.views, *indices, sides.tokens)
    if capturing(move.dst.device):
        return None
    ready = _ready(choice, move.src.form, move.dst.form, *move.steps, sides.unit)
    if ready is None:
        return None
    can = ready.can
    skips = sides.tokens > sides.unit * sides.units
    judges = can.guards and can.skips_negative
    if (skips and not can.skips_negative) or not (judges or move.is_clean):
        return None
    guarded = skips or (can.guards and not move.ids_on_host)
    return _launch(ready, move, guarded, owner)


def _ready(
    choice: Choice, src: Form, dst: Form, src_step: int, dst_step: int, unit: int
) -> Prepared | None:
    """Return the prepared copy of two forms in units of ``unit`` tokens; None: there is none, or a
    strategy makes it."""
    ready = PREPARED.get((src.address, dst.address, src_step, dst_step, None, choice))
    if ready is None:
        try:
            ready = prepared(src, dst, src_step, dst_step, None, choice)
        except PortaKVError:  # the general way says it in its turn
            return None
    if ready.picks is not None or ready.unowned or ready.plan.unit != unit:
        return None
    return ready


def _launch(
    ready: Prepared, move: Move, guarded: bool = False, owner: Owner | None = None
) -> Transfer:
    """Launch a checked copy on the current stream, and return its end.

    ``guarded``: the launch gets a status word. ``owner``: as for `_by_ids`.
    """
    device = move.dst.device
    words: tuple[tuple[StatusWord, int], ...] = ()
    status = None
    if guarded:
        word = acquire_word()
        words = ((word, 0),)
        status = word.tensor
    placed = ready.place_both(move)
    tables = _tables_of(move, ready.tables, device) if True in ready.tables else []
    try:
        pending = ready.launch(*placed, None, status)
    except BaseException:  # also an interrupt; what was launched may still run
        if tables:
            completion(device, None, *tables)
        raise
    # The allocator knows the ids' memory by the stream on which they were brought, which may be
    # another one. It reuses the memory of the views after what it knows of the current stream.
    if pending is None and device.type == "cpu":
        return Transfer((), None, ready.carried)
    retained = placed[2:4] if pending is None else placed
    pendings = () if pending is None else (pending,)
    end = Completion.after(device, None, pendings, words, None, (retained, tables))
    hold(end, owner)
    return Transfer((end,), placed, ready.carried)


def _tables_of(move: Move, tables: tuple[bool, bool], device: torch.device) -> list[torch.Tensor]:
    """Have the tables of addresses on a device that a launch reads there; return those that the
    copy retains.

    ``tables``: for each side, whether its table is read.
    """
    retained = []
    for view, read in zip(move[:2], tables, strict=True):
        if not read:
            continue
        table = view.made_table(device)
        if table is None:
            bring_table(view, device)
        else:
            retained.append(table)
    return retained


def _index_of(ids: Ids | None, step: int) -> Index | None:
    """Return the ids of a side as an index, before the core has checked a tensor; None: ids that
    no index takes."""
    if type(ids) is torch.Tensor:
        return Index.checked(ids, step)
    try:
        return index_of(ids, step)
    except SlotError:  # the general way says it in its turn
        return None


def _across_link(
    src: KVView, dst: KVView, src_step: int, dst_step: int, options: CopyOptions
) -> tuple[WholeCopies, tuple[str, str]] | None:
    """Return what copies between a device and pinned memory, and a reason if there is no pick;
    None: the core does not make such copies."""
    places = src.form.place, dst.form.place
    if places not in PINNED or src.temporary or dst.temporary:
        return None
    down = places[0] == "device"
    try:
        choice = choose((src if down else dst).device, options.backend)
        named = choice.forced and isinstance(choice.backend, Strategy)
        if not named and places in choice.can.places:
            return None
        if not named or options.terms is not None:
            choice = across(choice, options.terms)
        ready = prepared(src.form, dst.form, src_step, dst_step, None, choice)
        launch = ready.launch
        if not isinstance(launch, StrategyLaunch):
            return None
        if cast(Strategy, ready.choice.backend).refuses(dst if down else src):
            return None
    except PortaKVError:  # the general way says it in its turn
        return None
    whole = launch.whole
    if whole is None or not whole.kernels.executor.torch:
        return None
    return whole, ready.carried
