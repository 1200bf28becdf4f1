# SPDX-License-Identifier: Apache-2.0
"""The link between a device and the host: the pieces that cross it, and who puts them on it.

On NVIDIA devices CUDA's driver copies: plain, rows at a pitch, and many pieces in one call. The
core lists the pieces and calls the driver, by the rules below. Other devices copy by their torch.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import NamedTuple, NoReturn

import numpy as np
import torch

from portakv.core.call import Fault
from portakv.core.link import (
    BATCH,
    COPY,
    EDGES,
    EVENT,
    OUTSIDE,
    REST,
    WORD,
    Link,
    pack_copy,
    pack_crossing,
)
from portakv.core.runs import NeedsEdges, count_groups, list_pieces, pointer_to
from portakv.errors import TransferError
from portakv.host import pinned
from portakv.host.memcpy import MAX_PITCH
from portakv.plan.plan import (
    CopyPlan,
    Int64,
    Move,
    Runs,
    check_count,
    index_words,
    outside,
    side_words,
)
from portakv.runtime import cuda
from portakv.runtime.devices import inside
from portakv.runtime.streams import own_stream
from portakv.view.form import Steps
from portakv.view.index import Index
from portakv.view.view import KVView

# ------------------------------------------------------------------------------------------------
# Pieces: the copies that cross the link; runs at constant pitches become 2-D copies.
#
# The core expands plans and folds their runs. The number of runs and pieces decides the cost of a
# copy by a strategy. It is counted without expanding the plan: from its loops, and from the ids
# whose neighbours follow them.

#: Fewer rows stay separate copies. A 2-D copy is a separate call, and costs the host as much as
#: this many entries of a batched call (H200: 3.3 us, and 0.42 us for an entry).
LEAST_HEIGHT = 8

#: The same for wide rows, which cross faster as entries of a batch. Yet this many rows become one
#: 2-D copy, since the host would be busy for longer than the link. On an H200 64 rows of 32 KiB
#: took the host 4 us and reached 0.78 (D2H) and 0.92 (H2D) of a memcpy. As entries they took it 28
#: us and more, and reached 0.98 where the host kept up, 0.5 - 0.9 where it did not.
TALL = 32

#: Rows of this many bytes stay entries of a batch, if the link has batches: the host describes an
#: entry (0.42 us) in less than the link takes to move it (1.2 us), and looking for constant pitches
#: would take the host longer than it saves.
APART = 64 << 10

#: A width that no row reaches.
ALL = 1 << 62

#: From this many runs on, factors are folded before they are multiplied: 57,088 runs of a
#: layer-first pool take 0.03 ms of one core instead of 2.7. Runs that meet only at the ends of
#: planes are not merged.
LARGE = 4096

_WORDS = 7  # a flag and three lists
_ONES = np.ones(4096, dtype=np.int64)
_ONES.setflags(write=False)  # the heights of most lists of pieces


class Pieces(NamedTuple):
    """2-D copies: int64 arrays of one length, addresses and bytes; height 1 is a plain copy.

    No byte of the destinations occurs twice, so their order does not matter.
    """

    dst: Int64
    src: Int64
    width: Int64
    height: Int64
    dst_pitch: Int64
    src_pitch: Int64

    @property
    def number(self) -> int:
        """Return the number of pieces."""
        return self.dst.size

    @property
    def nbytes(self) -> int:
        """Return all bytes that the pieces move."""
        return int(self.width @ self.height)


def pieces_of(plan: CopyPlan, move: Move, below: int = ALL, merged: bool = False) -> Pieces:
    """Return a plan's runs as few pieces: exactly their bytes, each once, in any order.

    No piece reaches from one allocation of the views into another, nor across a boundary between
    two registrations, which drivers reject. Runs of ``below`` bytes or more become rows only if
    many lie together, those of `APART` bytes never. Raise as `CopyPlan.runs` does.

    ``merged``: runs that happen to meet where planes end are merged, too.
    """
    words = plan.words.buffer_info()[0]
    uncrossed = Uncrossed()
    request = request_of(plan, move, below, merged, uncrossed)
    room = int(move.count) // plan.unit * plan.runs_per_unit
    try:
        columns = list_pieces(words, request, room)
    except NeedsEdges:
        uncrossed = Uncrossed(move.src, move.dst)
        request = request_of(plan, move, below, merged, uncrossed)
        columns = list_pieces(words, request, room)
    if columns is None:
        raise outside(move)
    return _pieces(columns)


def request_of(
    plan: CopyPlan, move: Move, below: int, merged: bool, uncrossed: Uncrossed
) -> tuple[int, ...]:
    """Return the words of a request for pieces, which are read while ``uncrossed`` lives; raise as
    `CopyPlan.runs` does."""
    check_copy(plan, move)
    src, dst, src_index, dst_index, count = move
    sides = *side_words(src, src_index), *side_words(dst, dst_index)
    whole = whole_bytes(src), whole_bytes(dst)
    return (*sides, count, *limits_of(below), *whole, merged, *uncrossed.words)


def check_copy(plan: CopyPlan, move: Move) -> None:
    """Raise as `CopyPlan.runs` does for a copy that a plan does not describe."""
    plan.check_sides(move.src, move.dst, move.src_index, move.dst_index)
    check_count(plan.unit, move.count)


def limits_of(below: int) -> tuple[int, ...]:
    """Return the limits of folding, as the core reads them."""
    return below, LEAST_HEIGHT, TALL, APART, LARGE, MAX_PITCH


class Uncrossed:
    """Addresses that no piece crosses: between two registrations, and the edges of the allocations
    of views.

    Attributes:
        words: 1 if there are views, and the lists, as the core reads them while this object lives.
    """

    __slots__ = ("_arrays", "words")

    def __init__(self, *views: KVView) -> None:
        boundaries = pinned.boundaries()
        self.words = array("q", bytes(8 * _WORDS))
        if not (boundaries or views):
            return
        self._arrays = [np.array(boundaries, dtype=np.int64)]
        self._arrays += [view.edges() for view in views if view.entries > 1]
        self.words[0] = bool(views)
        for number, each in enumerate(self._arrays):
            self.words[1 + 2 * number] = pointer_to(each)
            self.words[2 + 2 * number] = each.size

    @property
    def address(self) -> int:
        """Return the address of the words."""
        return self.words.buffer_info()[0]


def whole_bytes(view: KVView) -> int:
    """Return all bytes at each of a view's several addresses; 0 if unknown, or for one address."""
    return view.entry_bytes if view.entries > 1 else 0


def _pieces(columns: Sequence[Int64]) -> Pieces:
    if len(columns) == 6:
        return Pieces(*columns)
    dst, src, width = columns
    return _plain(Runs(src, dst, width))


def _plain(runs: Runs) -> Pieces:
    src, dst, width = runs
    number = width.size
    height = _ONES[:number] if number <= _ONES.size else np.ones(number, dtype=np.int64)
    return Pieces(dst, src, width, height, width, width)


#: Units up to which ids are sorted, since runs are merged in the order of their addresses. The runs
#: of more units are counted in the order of the index, and may seem more than they are.
SORTED = 1 << 16


class RunCounter:
    """Count the runs of one plan.

    ``dense``: both sides of the plan have one form, and its runs are counted between that form's
    memory and dense rows in the order of its index. ``fold_below``: the link's limit; 0: nothing
    folds.
    """

    def __init__(self, plan: CopyPlan, dense: bool = False, fold_below: int = ALL) -> None:
        self._unit = plan.unit
        self._nests = plan.nests
        self._dense = dense
        #: The limits of folding, as the core reads them.
        self.folding = array("q", limits_of(fold_below))
        self._words = plan.words

    @classmethod
    def of_host(cls, plan: CopyPlan, fold_below: int = ALL) -> RunCounter:
        """Return a counter of the runs between a plan's host memory and dense rows in its order."""
        device_first = plan.src.place == "device"
        form, step = (plan.dst, plan.dst_step) if device_first else (plan.src, plan.src_step)
        return cls(CopyPlan(form, form, step, step, plan.unit), True, fold_below)

    def groups(self, src_index: Index, dst_index: Index, count: int) -> int:
        """Return the number of groups of ``count`` positions. In a group the units follow each
        other on both sides."""
        units = count // self._unit
        if units < 2:
            return units
        both = (src_index, dst_index)
        lists = [index for index in both if index.ids is not None]
        limits = [_limit(side.units) for side in self._nests[0].sides]
        if not (lists or any(limits)):
            return 1
        unknown = [index for index in lists if index.known_ids() is None]
        if unknown:  # reading ids back would wait for the device: they count as scattered
            return min(units, max(-(-units * self._unit // index.step) for index in unknown))
        sides = (0, 0, *index_words(src_index), 0), (0, 0, *index_words(dst_index), 0)
        copy = (*sides[0], *sides[1], units * self._unit)
        most = 0 if self._dense else SORTED
        groups = count_groups(copy, self._unit, limits[0], limits[1], most)
        # Whoever copies finds the sentence for a range past the end of a list.
        return units if groups is None else groups

    @property
    def plan_at(self) -> int:
        """Return the address of the words of the plan, which stay as long as this object."""
        return self._words.buffer_info()[0]

    @property
    def limits(self) -> tuple[int, int]:
        """Return after how many units the pitch of the source and of the destination changes; 0:
        never."""
        src, dst = (_limit(side.units) for side in self._nests[0].sides)
        return src, dst


def _limit(steps: Steps) -> int:
    """Return after how many units the pitch changes; 0: never."""
    return steps[-1].extent if len(steps) > 1 else 0


# ------------------------------------------------------------------------------------------------
# The link between a device and the host: puts pieces on it for the transfer strategies.

#: Entries of the longest batched call. The driver states no limit; other runtimes fail above 8192,
#: and another thread's small copy gets in between shorter calls. The first of several calls is
#: shorter, since nothing moves before it ends (an entry takes the host 0.42 us). Each call is
#: `GROWTH` times as long as the call before it, since the link of an H200 rests 2 us between two
#: calls.
MOST_DESCRIPTORS = 4096
FIRST_DESCRIPTORS = 256
GROWTH = 4

#: Fewer plain copies than this are separate calls. On an H200 two of 2 MB reached 0.97 of a memcpy
#: in one batch and 0.94 in two calls; seven reached 0.99 and 0.94.
LEAST_BATCH = 2

#: The most bytes that cross on one stream without a rest: a wait of that stream for a word that
#: already has its value. A copy engine stays with a stream until the stream waits for something
#: else. On an H200, 8 bytes of another stream waited for all of 0.3 s of detached copies; with such
#: a wait before every third slice of 32 MiB they came 0.6 ms late, at most 1.3. It costs copies
#: alongside matmuls 0.5 % of the link. A memset of a word cost 9 %, since a model's kernels delay
#: it, and a kernel would wait for room between them (benchmarks/notes/link.md). Three of the
#: largest slices of `staged` exceed the limit, so that every third has a rest before it, as it was
#: measured: another copy waits for 1.2 ms of the link. With 96 MiB it waited for 1.8.
IN_A_ROW = 88 << 20

#: Rows of at least this many bytes are entries of a batch rather than of a 2-D copy, if the driver
#: has batches. Parts of a memcpy on an H200: rows of 4 KiB 0.61 by a batch and 0.60 by tall 2-D
#: copies, which cost the host less; 8 KiB 0.89 and 0.76; 32 KiB 0.98 - 1.0 and 0.5 - 0.92, by their
#: height.
FOLD_BELOW = 8 << 10


def by_torch(device: torch.device) -> bool:
    """Return True if runs cross the link of a device by calls of its torch, each at a call's
    cost."""
    return why_not(device) is not None


@cache
def link_of(device: torch.device) -> CudaLink | TorchLink:
    """Return the link of a device: CUDA's driver itself, else the device's torch."""
    return TorchLink(device) if by_torch(device) else CudaLink(device)


class TorchLink:
    """Put pieces on the link of any device through its torch; any thread may call it.

    Attributes:
        fold_below: bytes. Narrower rows are worth folding into 2-D copies. Wider rows cross faster
            as separate copies, and fold only if they are many.
    """

    fold_below = ALL  # each copy is a call

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def carry(
        self,
        plan: CopyPlan,
        move: Move,
        stream: torch.Stream | None = None,
        merged: bool = False,
    ) -> None:
        """Copy the pieces of a plan as `copy` does; raise also as `pieces_of`, before anything is
        moved."""
        pieces = pieces_of(plan, move, self.fold_below, merged)
        self.copy(pieces, move.src, move.dst, stream)

    def copy(
        self, pieces: Pieces, src: KVView, dst: KVView, stream: torch.Stream | None = None
    ) -> None:
        """Copy the pieces, ordered on ``stream`` (None: the device's current stream).

        The host does not wait, except if memory is pageable or a device's torch cannot copy
        otherwise. The caller retains the memory of both views until the copy has ended.

        Raises:
            TransferError: a piece does not lie in one allocation of its view, or the driver rejects
                it; some of the pieces may have been moved.
        """
        late = "pageable" not in (src.form.place, dst.form.place)
        sources = _Storages.of(src)
        targets = _Storages.of(dst)
        to_device = dst.form.place == "device"
        with inside(stream), torch.no_grad():
            for at, start, width, height, dst_pitch, src_pitch in zip(
                *(column.tolist() for column in pieces), strict=True
            ):
                # Torch would pack strided host memory on the host, which would have to wait.
                whole = (src_pitch if to_device else dst_pitch) == width
                high = height if whole else 1
                for row in range(0, height, high):
                    source = sources.rows(start + row * src_pitch, width, high, src_pitch)
                    target = targets.rows(at + row * dst_pitch, width, high, dst_pitch)
                    target.copy_(source, non_blocking=late)


class _Storages:
    """The memory of a view as bytes, looked up by address."""

    def __init__(self, view: KVView) -> None:
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in view.owners}
        self._starts = sorted(storages)
        self._bytes = [
            torch.empty(0, dtype=torch.uint8, device=view.device).set_(storages[start])
            for start in self._starts
        ]

    @classmethod
    def of(cls, view: KVView) -> _Storages:
        """Return the storages of a view, cached with it."""
        known: _Storages | None = view.derived.get("storages")
        if known is None:
            # A tensor made in inference mode cannot be written outside of it.
            with torch.inference_mode(False):
                known = view.derived["storages"] = cls(view)
        return known

    def rows(self, address: int, width: int, height: int, pitch: int) -> torch.Tensor:
        """Return rows at an address, uint8 ``[height, width]``."""
        number = bisect_right(self._starts, address) - 1
        reach = (height - 1) * pitch + width
        if number >= 0:
            start = self._starts[number]
            memory = self._bytes[number]
            if address + reach <= start + memory.numel():
                return memory.as_strided((height, width), (pitch, 1), address - start)
        raise TransferError(
            f"Expected {reach} bytes at {address:#x} to lie in one allocation of the view, got "
            f"bytes outside. Check that the view's memory still exists."
        )


class CudaLink:
    """Put pieces on the link of an NVIDIA device, as `TorchLink` does, by the driver's copies.

    Attributes:
        core: the driver, as the core calls it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.core = Link(cuda.library())
        self._adopted = threading.local()
        self.fold_below = FOLD_BELOW if self.core.batches else ALL

    def copy(
        self, pieces: Pieces, src: KVView, dst: KVView, stream: torch.Stream | None = None
    ) -> None:
        """Copy as `TorchLink.copy` does."""
        to_device = dst.form.place == "device"

        def submit() -> Fault | None:
            handle = cuda.raw(stream, self.device.index)
            crossing = pack_crossing(to_device, handle, self.aside, *rules())
            return self.core.submit(pieces, crossing)

        self.ordered(submit)

    def carry(
        self,
        plan: CopyPlan,
        move: Move,
        stream: torch.Stream | None = None,
        merged: bool = False,
    ) -> None:
        """Copy as `TorchLink.carry` does."""
        check_copy(plan, move)
        downward = move.src.form.place == "device"
        copy = checked_words(move, downward)
        words = self.words_of(plan, uncut(downward), merged=merged)
        handle = cuda.raw(stream, self.device.index)

        def submit() -> Fault | None:
            fault = self.rows(words, copy, handle, Uncrossed())
            if fault is not None and fault.code == EDGES:
                fault = self.rows(words, copy, handle, Uncrossed(move.src, move.dst))
            if fault is not None and fault.code == OUTSIDE:
                raise outside(move)
            return fault

        self.ordered(submit)

    def words_of(
        self,
        plan: CopyPlan,
        cut: Sequence[int],
        stage: Sequence[int] = (0, 0, 0),
        merged: bool = False,
    ) -> array[int]:
        """Return the words of a `CrossingPlan` of ``link.h``, which are read while the plan lives.

        Args:
            plan: of what crosses.
            cut: the words of `CutRules`.
            stage: of the device, as `RowsLaunch.words`; none: copies cross as their pieces.
            merged: as for `pieces_of`, for copies without a stage.
        """
        words = *cut, *stage, plan.words.buffer_info()[0], merged
        return array("q", [*words, *limits_of(self.fold_below), *rules()])

    def ordered(self, submit: Callable[[], Fault | None]) -> None:
        """Call what submits work to the driver, with the device current in this thread.

        Raises:
            TransferError: the driver refused a call; the copies before it may have been moved.
        """
        if getattr(self._adopted, "known", None) is None:
            cuda.adopt(self.device)  # a new thread has no context yet
            self._adopted.known = True
        if torch._C._cuda_getDevice() != self.device.index:
            with torch.cuda.device(self.device):
                fault = submit()
        else:
            fault = submit()
        if fault is not None:
            self.refuse(fault)

    def rows(
        self,
        plan: array[int],
        copy: array[int],
        stream: int,
        uncrossed: Uncrossed,
        staging: array[int] | None = None,
        before: int | None = None,
    ) -> Fault | None:
        """Submit a copy of rows by one call of the core; return what was refused.

        Args:
            plan: the words of a `CrossingPlan` of ``link.h``.
            copy: those of a `CheckedCopy`.
            stream: the handle of the copy's stream.
            uncrossed: addresses that no piece crosses.
            staging: the words of the buffers; None: pieces cross without.
            before: the handle of the stream whose present work comes before slices; None: of the
                copy's stream.
        """
        return self.core.rows(
            pack_copy(
                plan.buffer_info()[0],
                0 if staging is None else staging.buffer_info()[0],
                copy.buffer_info()[0],
                stream,
                stream if before is None else before,
                self.aside,
                0,
                *uncrossed.words,
            )
        )

    @cached_property
    def aside(self) -> int:
        """The handle of the stream that replaces the legacy default stream, which rejects batches;
        0: there are no batches."""
        if not self.core.batches:
            return 0
        self._other_stream: torch.Stream = own_stream(self.device)
        return cuda.raw(self._other_stream, self.device.index)

    def refuse(self, fault: Fault) -> NoReturn:
        """Raise the error of a call that the driver refused."""
        first, second = fault.values
        what = {
            COPY: f"a copy of {first} x {second} bytes",
            BATCH: f"a batch of {first} copies",
            REST: "a wait for a word",
            WORD: "the allocation of a word",
            EVENT: "an event that orders copies",
        }[fault.what]
        called = cuda.error_name(fault.code, cuda.library())
        raise TransferError(
            f"Expected the CUDA driver to accept {what} between device and host, got {called}. "
            f"Earlier copies may have moved. Check that the memory still exists and is pinned, and "
            f"earlier errors."
        )


def uncut(downward: bool) -> tuple[int, ...]:
    """Return the words of `CutRules` of ``link.h`` for copies that cross without slices."""
    return (downward, *[0] * 9)


def rules() -> tuple[int, ...]:
    """Return how pieces are submitted, as the core reads it."""
    return IN_A_ROW, FIRST_DESCRIPTORS, MOST_DESCRIPTORS, GROWTH, LEAST_BATCH


def checked_words(move: Move, downward: bool, staged: bytes | None = None) -> array[int]:
    """Return the words of a `CheckedCopy` of ``link.h`` of a copy with ids on the host; raise for a
    number that no view has.

    Args:
        downward: from the device to the host.
        staged: the device's rows as `KernelsLaunch.side` describes them to the kernels of a stage,
            with ids on the device; None: pieces cross without a stage.
    """
    src, dst, src_index, dst_index, count = move
    unread = (0,) * 8
    from_words = unread if staged and downward else side_words(src, src_index)
    to_words = unread if staged and not downward else side_words(dst, dst_index)
    try:
        words = array("q", (*from_words, *to_words, count, whole_bytes(src), whole_bytes(dst)))
    except OverflowError:  # a number past 64 bits
        raise outside(move) from None
    words.frombytes(staged or bytes(48))
    return words


@cache
def why_not(device: torch.device) -> str | None:
    """Return why the driver cannot copy for a device, as a phrase; None if it can."""
    why = cuda.not_served(device)
    if why is not None:
        return why
    try:
        Link(cuda.library())
    except (OSError, AttributeError) as error:
        return f"the CUDA driver's library cannot be used ({error})"
    return None
