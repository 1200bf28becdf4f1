# SPDX-License-Identifier: Apache-2.0
"""Repeat a copy that was made before, with other ids, addresses and counts.

`settle` makes every decision about a copy. The next copy between memory of the same kind has the
same decisions, so a repeat checks only what ids, an address or a count can change; a launch that
picks a strategy for each copy picks again. What does not fit goes through `settle` again, which
also words the error.

Two callers repeat copies: `submit`, between two views that are used again, and a connector, between
its registered caches and chunks of one shape, for which it makes no view (`ChunkRepeats`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import torch

from portakv.backends.base import Again, Capabilities, Launch
from portakv.copy.launch import TOGETHER, Counted, follow_current
from portakv.copy.options import CopyOptions
from portakv.copy.settle import Settled
from portakv.plan.plan import Move
from portakv.registry.prepared import Prepared, place_for, prepared
from portakv.registry.registry import Choice, choose
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import Process, capture_question, capturing, this_process
from portakv.runtime.transfer import (
    Completion,
    EventPool,
    Owner,
    StatusWord,
    Transfer,
    acquire_word,
    event_pool,
    hold,
    hold_memory,
)
from portakv.view.index import Ids, Index
from portakv.view.view import KVView

_current_device = torch.accelerator.current_device_index
#: The key of a view's repeats, which are kept with the source, and released with it.
REPEATS = "repeats"
_TOKEN = "repeats: token"  # of what stands for a view without keeping its memory
_KEPT = 512
_PICKED = "picked for each copy"
_NO_IDS = np.empty(0, np.int64)
#: For one side: None without ids; else their place or dtype, their step, and whether they are clean
#: by promise.
_Part: TypeAlias = "tuple[object, int, bool] | None"


class Repeat(NamedTuple):
    """A copy between two views with all decisions about it.

    It keeps no memory of the views.

    Attributes:
        launch: executes it with any ids.
        packed: executes it with everything packed but addresses and counts; None: it cannot.
        can: the capabilities of what executes it.
        ids_device: where the launch reads ids.
        unit: the tokens that the launch moves as one.
        reads_pinned_ids: the launch reads ids in pinned memory as fast as on the device.
        tabled: for each side, whether its table of addresses is read.
        skips: the launch leaves out positions of negative ids.
        unowned: for each side, whether nothing knows that the launch uses its memory.
        carried: what executes it, and why. None: the launch picks that for each copy.
        process: the process that prepared it.
        capturing: returns whether the current stream records a graph, if the device is current.
    """

    launch: Launch
    packed: _Packed | None
    can: Capabilities
    ids_device: torch.device
    unit: int
    reads_pinned_ids: bool
    tabled: tuple[bool, bool]
    skips: bool
    unowned: tuple[bool, bool]
    events: EventPool
    carried: tuple[str, str] | None
    process: Process
    capturing: Callable[[], bool]

    def fits(self, move: Move) -> bool:
        """Return True if a copy consists of whole units, as the one before, in this process."""
        unit = self.unit
        cut = unit > 1 and (move.src_index.offset or move.dst_index.offset or move.count % unit)
        return not cut and not self.process.forked

    def issue(
        self, move: Move, device: torch.device, stream: torch.Stream | None, skips: bool
    ) -> Transfer:
        """Launch a copy that `fits`, after its ids and its memory were checked.

        ``skips``: ids on the host skip positions.
        """
        src, dst, *_ = move
        for view, read in zip((src, dst), self.tabled, strict=True):
            if read:
                view.follow_table(device, stream)
        checked = move.src_index.on_host and move.dst_index.on_host and not skips
        word = acquire_word() if self.can.guards and not checked else None
        move, host = self._place(move)
        self._launch(move, stream, word)
        for view, unowned in zip((src, dst), self.unowned, strict=True):
            if unowned:
                host = *host, *view.retained
        event = self.events.recorded(stream)
        ids = move.src_index, move.dst_index
        carried = self.carried or cast(Any, self.launch).carried
        return end_of(event, self.events, word, (src, dst, ids), carried, ids, host=host)

    def _launch(self, move: Move, stream: torch.Stream | None, word: StatusWord | None) -> None:
        """Launch a copy whose ids are where the launch reads them."""
        packed = self.packed
        if packed is not None and stream is None and packed.fits(move):
            read_at = _address(move.src, move.src_index)
            written_at = _address(move.dst, move.dst_index)
            packed.again(read_at, written_at, 0, move.count, word.address if word else 0)
            return
        if stream is not None:
            follow_current(stream, [move])
        self.launch(*move, stream, word.tensor if word else None)

    def _place(self, move: Move) -> tuple[Move, tuple[torch.Tensor, ...]]:
        """Return the copy with its ids where the launch reads them, and host memory with ids, which
        no allocator knows to be used.

        Ids of the host for one call stay there if the launch reads them as fast in pinned memory.
        """
        src, dst, src_index, dst_index, tokens = move
        if not (src_index.temporary or dst_index.temporary):  # nothing is sent for one call
            if self.can.index_on == "any":
                return move, ()
            src_index = self._on_device(src_index)
            return Move(src, dst, src_index, self._on_device(dst_index), tokens), ()
        if not self.reads_pinned_ids:
            return place_for(self.can, self.ids_device, move), ()
        indices = (src_index, dst_index)
        listed = [x.host_ids() if x.temporary and x.on_host else _NO_IDS for x in indices]
        count = listed[0].size
        past = count + listed[1].size
        if not past:
            return place_for(self.can, self.ids_device, move), ()
        ids = torch.empty(past, dtype=torch.int64, device="cpu", pin_memory=True)
        values = ids.numpy()
        values[:count] = listed[0]
        values[count:] = listed[1]
        src_index, dst_index = (
            index.reading(part) if part.numel() else self._on_device(index)
            for index, part in zip(indices, (ids[:count], ids[count:]), strict=True)
        )
        return Move(src, dst, src_index, dst_index, tokens), (ids,)

    def _on_device(self, index: Index) -> Index:
        return index.placed(self.ids_device, self.can.index_dtypes)


class _Packed(NamedTuple):
    """A launch with everything packed but addresses and a count, for ids of these dtypes."""

    again: Again
    dtypes: tuple[torch.dtype | None, torch.dtype | None]

    def fits(self, move: Move) -> bool:
        """Return True if it executes a copy whose ids are where the launch reads them."""
        src_index = move.src_index
        dst_index = move.dst_index
        if src_index.offset or dst_index.offset or move.count > self.again.most:
            return False
        return _dtypes(move) == self.dtypes


def _dtypes(move: Move) -> tuple[torch.dtype | None, torch.dtype | None]:
    """Return the dtype of each side's ids."""
    src_ids = move.src_index.ids
    dst_ids = move.dst_index.ids
    return (
        src_ids if src_ids is None else src_ids.dtype,
        dst_ids if dst_ids is None else dst_ids.dtype,
    )


def end_of(
    event: torch.Event,
    events: EventPool,
    word: StatusWord | None,
    retained: object,
    carried: tuple[str, str],
    ids: object,
    owner: Owner | None = None,
    host: tuple[torch.Tensor, ...] = (),
) -> Transfer:
    """Return the end of a repeated launch, which ``event`` marks.

    ``host`` and ``ids``: memory to retain until then, also if the handle is dropped. The allocator
    knows the ids' memory by the stream on which they were brought, which may be another one.
    """
    words = () if word is None else ((word, 0),)
    completion = Completion(event, (), words, None, (host, ids), events)
    # Either returns the event, if the handle is dropped. Only a word can bring an error.
    if host:
        hold_memory(completion)
    if words or not host:
        hold(completion, owner)
    return Transfer((completion,), retained, carried)


# --- two views ------------------------------------------------------------------------------------


def repeated(move: Move, options: CopyOptions) -> Transfer | None:
    """Issue a copy if one like it was remembered; else return None.

    Raises:
        BackendUnavailable: as `choose`.
        LayoutError: memory that was replaced.
        SlotError: a bad index on the host.
    """
    src, dst, src_index, dst_index, count = move
    repeats = src.derived.get(REPEATS)
    token = dst.derived.get(_TOKEN)
    if repeats is None or token is None or not count:
        return None
    device = src.device if src.device.type != "cpu" else dst.device
    kind = _kind(move, device)
    if kind is None:
        return None
    choice = choose(device, options.backend)
    repeat: Repeat | None = repeats.get((token, kind, choice, options.terms, _tokens_of(move)))
    if repeat is None or not repeat.fits(move):
        return None
    stream = options.stream
    if stream is not None and getattr(stream, "device", None) != device:
        return None
    if repeat.capturing() if _current_device() == device.index else capturing(device):
        return None
    src.check_memory()
    dst.check_memory()
    skips = src_index.check(count, src.slots, "source")
    skips |= dst_index.check(count, dst.slots, "destination", distinct=True)
    return None if skips and not repeat.skips else repeat.issue(move, device, stream, skips)


def remember(
    move: Move,
    choice: Choice,
    options: CopyOptions,
    device: torch.device,
    settled: Settled,
    made: Transfer,
) -> None:
    """Remember a copy that this thread just made, if it can be repeated.

    ``choice``: the choice for the options' backend, before their terms count. ``device`` executes
    the copy, outside of graph capture.

    A copy is remembered when its like was made twice, which never happens to views made for one
    call.
    """
    kind = _kind(move, device)
    if kind is None or not made.ordered:
        return
    launch = _launch_of(move, settled, kind)
    if launch is None or not made.completions:
        return
    src = move.src
    dst = move.dst
    token = dst.derived.setdefault(_TOKEN, object())
    ready = settled.pieces[0][0]
    picks = _picks(launch)
    name = _PICKED if picks else made.carried[0]
    repeats = src.derived.setdefault(REPEATS, Bounded(REPEATS, _KEPT))
    key = token, kind, choice, options.terms, name
    if key not in repeats:
        repeats[key] = None
        return
    if repeats[key] is None:
        can = ready.can if picks else ready.claims(move)
        unowned = launch is not ready.launch
        repeats[key] = Repeat(
            launch,
            None if picks else _packed(move, ready, can),
            can,
            can.home_of_ids(device),
            ready.plan.unit,
            getattr(launch, "reads_pinned_ids", False),
            (src.table_on(device) is not None, dst.table_on(device) is not None),
            can.guards and can.skips_negative,
            (unowned and src.form.place != "device", unowned and dst.form.place != "device"),
            event_pool(device),
            None if picks else made.carried,
            this_process(),
            capture_question(device),
        )
    repeats[token, kind, choice, options.terms, _tokens_of(move)] = repeats[key]


def _launch_of(move: Move, settled: Settled, kind: tuple[_Part, _Part]) -> Launch | None:
    """Return what executes copies of this kind; None if they cannot be repeated."""
    if len(settled.pieces) != 1 or settled.error is not None:
        return None
    src = move.src
    dst = move.dst
    if src.memory_device == dst.memory_device and src.overlaps(dst):
        return None  # the ids decide which rows both sides share
    ready = settled.pieces[0][0]
    if ready is not settled.whole:
        return None
    launch = ready.repeatable(move)
    if all(part is None or part[2] or part[0] == "host" for part in kind):
        return launch  # what is wrong with ids on the host is seen before they are used
    can = ready.claims(move)
    return launch if can.guards and can.skips_negative and not _picks(launch) else None


def _picks(launch: Launch | None) -> bool:
    """Return whether a launch picks a strategy for each copy."""
    return getattr(launch, "carried", None) is not None


def _packed(move: Move, ready: Prepared, can: Capabilities) -> _Packed | None:
    """Return the launch with everything packed but addresses and counts, if there is one."""
    again = getattr(ready.launch, "again", None)
    src, dst, src_index, dst_index, _ = move
    if again is None or src_index.offset or dst_index.offset:
        return None
    if any(x.ids is None and len(y.origins) > 1 for x, y in ((src_index, src), (dst_index, dst))):
        return None  # a packed launch takes one address for a side without ids
    placed = place_for(can, can.home_of_ids(ready.choice.backend.device), move)
    packed: Again | None = again(placed.src, placed.dst, placed.src_index, placed.dst_index)
    return None if packed is None else _Packed(packed, _dtypes(placed))


def _kind(move: Move, device: torch.device) -> tuple[_Part, _Part] | None:
    """Return the key under which copies have all decisions in common; None if there is none.

    Both views must be made for more than one call, and ids must lie on the host or where kernels
    read them.
    """
    if move.src.temporary or move.dst.temporary:
        return None
    parts: list[_Part] = []
    for index in (move.src_index, move.dst_index):
        ids = index.ids
        if ids is None:
            parts.append(None)
        elif index.on_host:
            parts.append(("host", index.step, False))
        elif ids.device == device and ids.is_contiguous():
            parts.append((ids.dtype, index.step, index.trusted))
        else:
            return None
    return parts[0], parts[1]


def _tokens_of(move: Move) -> int:
    """Return the number of tokens by which copies are remembered; 0: they are alike for any.

    Copies that leave a device are executed by the strategy that was picked for their number.
    """
    return 0 if move.src.device == move.dst.device else move.count


def _address(view: KVView, index: Index) -> int:
    """Return the address of a side as `base.Again` takes it."""
    return view.origins[0] if index.ids is None else index.ids.data_ptr()


# --- registered caches ----------------------------------------------------------------------------

_MOST = 256  # a chunk length that occurs once must not stay for ever


class ChunkRepeats:
    """The repeats of one registration: copies between its caches and chunks of one kind.

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
            repeat = self._known.get(_kind_of_chunk(store, chunk, address, ids))
        except RuntimeError:  # a tensor without strides or without memory
            return None
        if repeat is None or not (address and first_id) or not repeat.fits(chunk, ids):
            return None
        if type(start) is not int:
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
        retained = chunk, ids, self._cache
        _count(repeat, self._cache, count)
        return end_of(event, self._events, word, retained, repeat.carried, ids, self._owner)

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
        """Remember a copy that was just made, if it can be repeated."""
        if not self._repeatable or capturing(self._choice.backend.device):
            return
        tensor = chunk.tensors
        index = self._index_on_device(slot_mapping)
        ids = index.ids
        if type(tensor) is not torch.Tensor or ids is None or len(chunk.spans) != 1:
            return
        if not (chunk.device == ids.device == self._choice.backend.device):
            return
        key = _kind_of_chunk(store, tensor, tensor.data_ptr(), ids)
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
        index = Index.of(slot_mapping)
        if index.plan_step != 1:
            return Index()
        if type(slot_mapping) is Index and index.on_host:
            return index.placed(self._choice.backend.device, self._choice.can.index_dtypes)
        return index


def _count(repeat: _ChunkRepeat, cache: KVView, tokens: int) -> None:
    """Count a copy of a chunk on its device, if copies are counted."""
    counts = Counted.counts
    if counts is not None:
        counts.new.append((repeat.carried[0], "device", cache.form, tokens))
        if len(counts.new) >= TOGETHER:
            counts.sum_up()


def _word_for(slot_mapping: object) -> StatusWord | None:
    """Return a status word for ids that a device judges; None for ids that the host has checked."""
    return None if type(slot_mapping) is Index and slot_mapping.on_host else acquire_word()


def _kind_of_chunk(
    store: bool, chunk: torch.Tensor, address: int, ids: torch.Tensor
) -> tuple[object, ...]:
    """Return the key under which copies of chunks have all decisions in common.

    The last bits of the address are its alignment, which the vectors of a plan rely on.
    """
    return store, chunk.shape, chunk.stride(), chunk.dtype, address & 15, ids.dtype


class _ChunkRepeat:
    """One kind of copy: a chunk of one form, ids of one dtype, one direction."""

    __slots__ = ("_firsts", "_index", "_pasts", "_reach", "_slots", "again", "carried")

    def __init__(
        self, cache: KVView, chunk: KVView, again: Again, carried: tuple[str, str]
    ) -> None:
        self.again = again
        self.carried = carried
        self._slots = min(chunk.slots, again.most)
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

    def tokens(self, start: int, end: object, length: int) -> int:
        """Return the tokens of a range of the ids; 0 if a chunk does not hold them, or if the range
        is wrong."""
        if end is None:
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
