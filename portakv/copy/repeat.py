# SPDX-License-Identifier: Apache-2.0
"""Repeat a copy between two views that was made before, with other ids and other contents.

`settle` makes every decision about a copy. The next copy between the same views, with ids of the
same kind, has the same decisions. So a repeat checks only what may differ: the memory, the ids and
the count. A launch that picks a strategy for each copy picks again. A copy that does not fit goes
through `settle`, which also words the error.

`remember` records copies. `repeat_chunks` repeats those between registered caches and chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from time import perf_counter
from typing import Any, NamedTuple, TypeAlias, cast

import torch

from portakv.backends.base import Again, Capabilities, Launch
from portakv.copy.call import follow_current
from portakv.copy.handle import BlockTransfer
from portakv.copy.options import CopyOptions
from portakv.plan.move import Move
from portakv.registry.prepared import place_for
from portakv.registry.registry import Choice, choose
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import Process, capturing
from portakv.runtime.pinned_ids import PinnedIds
from portakv.runtime.transfer import (
    EventPool,
    StatusWord,
    Transfer,
    acquire_after_ends,
    acquire_word,
    completion_of,
    end_of_launch,
)
from portakv.view.index import Index

_current_device = torch.accelerator.current_device_index
_REPEATS = "repeats"  # of a view's `Repeats`
_TOKEN = "repeats: token"  # of what stands for a view without keeping its memory
_KEPT = 512


class SideIds(NamedTuple):
    """The kind of the ids of one side; a side without ids has none.

    Attributes:
        place: ``host``, or the dtype of ids that lie on the device.
        step: tokens for each id.
        trusted: ids on the device are clean by promise.
    """

    place: str | torch.dtype
    step: int
    trusted: bool

    @property
    def checked(self) -> bool:
        """Return True if no bad id reaches a launch: the host checks it, or the caller did."""
        return self.trusted or self.place == "host"


@lru_cache(256)
def _on_host(step: int) -> SideIds:
    """Return the kind of ids on the host."""
    return SideIds("host", step, False)


#: The kinds of ids of the source and of the destination.
Sides: TypeAlias = "tuple[SideIds | None, SideIds | None]"
#: The facts that decide about a copy from a view, besides its number of tokens: the token of the
#: destination, the kinds of both sides' ids, the registry's choice, and the terms.
Alike: TypeAlias = "tuple[object, Sides, Choice, object]"


def sides_of(move: Move, device: torch.device) -> Sides | None:
    """Return the kinds of the ids of a copy; None if it cannot be repeated.

    Both views must be made for more than one call, and ids must lie on the host or where kernels
    read them.
    """
    if move.src.temporary or move.dst.temporary:
        return None
    sides: list[SideIds | None] = []
    for index in (move.src_index, move.dst_index):
        ids = index.ids
        if ids is None:
            sides.append(None)
        elif index.on_host:
            sides.append(_on_host(index.step))
        elif ids.device == device and ids.is_contiguous():
            sides.append(SideIds(ids.dtype, index.step, index.trusted))
        else:
            return None
    return sides[0], sides[1]


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
        events: the free events of the device. None: the host executes it, until the call returns.
        carried: what executes it, and why. None: the launch picks that for each copy.
        process: the process that prepared it.
        capturing: returns whether the current stream records a graph, if the device is current.
    """

    launch: Launch
    packed: Packed | None
    can: Capabilities
    ids_device: torch.device
    unit: int
    reads_pinned_ids: bool
    tabled: tuple[bool, bool]
    skips: bool
    unowned: tuple[bool, bool]
    events: EventPool | None
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
        src, dst, src_index, dst_index, _ = move
        events = self.events
        if events is None:
            pending = self.launch(*self._place(move), None, None)
            if pending is not None:  # the copies before this one had ended with their calls
                pending.wait()
            return Transfer((), None, self.carried or cast(Any, self.launch).carried)
        src_tabled, dst_tabled = self.tabled
        if src_tabled:
            src.follow_table(device, stream)
        if dst_tabled:
            dst.follow_table(device, stream)
        checked = src_index.on_host and dst_index.on_host and not skips
        word = acquire_word() if self.can.guards and not checked else None
        host: tuple[torch.Tensor, ...] = ()
        listed = self._launch_listed(move, word) if stream is None else None
        if listed is None:
            move = self._place(move)
            self._launch(move, stream, word)
        carried = self.carried or cast(Any, self.launch).carried
        src_unowned, dst_unowned = self.unowned
        if src_unowned:
            host = *host, *src.retained
        if dst_unowned:
            host = *host, *dst.retained
        event = events.recorded(stream)
        ids = move.src_index, move.dst_index
        completion = completion_of(event, events, word, (host, ids), listed)
        unordered = bool(host) or listed is not None
        return end_of_launch(completion, (src, dst, ids), carried, unordered)

    def _launch_listed(self, move: Move, word: StatusWord | None) -> PinnedIds | None:
        """Launch a copy with short lists of new ids, and return the memory that it reads them from.
        None: nothing was launched, since the ids must be placed."""
        _, _, src_index, dst_index, count = move
        packed = self.packed
        new = src_index.listed + dst_index.listed
        if packed is None or not (self.reads_pinned_ids and packed.fits_count(move)):
            return None
        if not 0 < new <= PinnedIds.MOST:
            return None
        read_at = self._address(move, 0, packed.dtypes[0])
        written_at = self._address(move, 1, packed.dtypes[1])
        if read_at is None or written_at is None:
            return None
        ids = [index.host_ids() for index in (src_index, dst_index) if index.listed]
        listed = PinnedIds.acquire() or acquire_after_ends()
        if listed is None:
            return None
        listed.write(ids)
        read_at = read_at or listed.address
        written_at = written_at or listed.address + 8 * src_index.listed
        # If it raises, some of its kernels may read the list, which then joins the pool no more.
        packed.again(read_at, written_at, 0, count, word.address if word else 0)
        return listed

    def _address(self, move: Move, side: int, dtype: torch.dtype | None) -> int | None:
        """Return the address of one side's ids of a dtype, or its first origin if it has no ids.

        0: the ids are new. None: they have another dtype.
        """
        index = (move.src_index, move.dst_index)[side]
        if index.ids is None:
            return (move.src, move.dst)[side].origins[0]
        if index.listed:
            return 0 if dtype is torch.int64 else None
        if index.on_host:  # its copy on the device is kept with it
            index = index.placed(self.ids_device, self.can.index_dtypes)
        ids = index.ids
        return ids.data_ptr() if ids is not None and ids.dtype is dtype else None

    def _launch(self, move: Move, stream: torch.Stream | None, word: StatusWord | None) -> None:
        """Launch a copy whose ids are where the launch reads them."""
        packed = self.packed
        if packed is not None and stream is None and packed.fits(move):
            src, dst, src_index, dst_index, count = move
            # A side without ids begins at its one address; see `base.Again`.
            read_at = src.origins[0] if src_index.ids is None else src_index.ids.data_ptr()
            written_at = dst.origins[0] if dst_index.ids is None else dst_index.ids.data_ptr()
            packed.again(read_at, written_at, 0, count, word.address if word else 0)
            return
        if stream is not None:
            follow_current(stream, [move])
        self.launch(*move, stream, word.tensor if word else None)

    def _place(self, move: Move) -> Move:
        """Return the copy with its ids where the launch reads them."""
        src, dst, src_index, dst_index, tokens = move
        can = self.can
        if src_index.temporary or dst_index.temporary:  # ids may have to be sent for this call
            return place_for(can, self.ids_device, move)
        if can.index_on == "any":
            return move
        src_index = src_index.placed(self.ids_device, can.index_dtypes)
        dst_index = dst_index.placed(self.ids_device, can.index_dtypes)
        return Move(src, dst, src_index, dst_index, tokens)


class Packed(NamedTuple):
    """A launch with everything packed but addresses and a count, for ids of these dtypes."""

    again: Again
    dtypes: tuple[torch.dtype | None, torch.dtype | None]

    def fits(self, move: Move) -> bool:
        """Return True if it executes a copy whose ids are where the launch reads them."""
        return self.fits_count(move) and dtypes_of(move.src_index, move.dst_index) == self.dtypes

    def fits_count(self, move: Move) -> bool:
        """Return True if it executes a copy of so many tokens that begins with its first ids."""
        cut = move.src_index.offset or move.dst_index.offset
        return not cut and move.count <= self.again.most


def dtypes_of(src_index: Index, dst_index: Index) -> tuple[torch.dtype | None, torch.dtype | None]:
    """Return the dtype of each side's ids."""
    src_ids = src_index.ids
    dst_ids = dst_index.ids
    return (
        src_ids if src_ids is None else src_ids.dtype,
        dst_ids if dst_ids is None else dst_ids.dtype,
    )


# --- what a view remembers ------------------------------------------------------------------------


@dataclass(slots=True)
class Seen:
    """The copies of one kind that one executor has made.

    ``repeat``: how to repeat them. None: one was made, and the next one is remembered.
    """

    repeat: Repeat | None = None


class Repeats:
    """The copies from one view that were made before. The view keeps it, and releases it.

    Attributes:
        known: how to repeat a copy, by its kind and its number of tokens.
        seen: the copies of each kind, by the name of what executed them.
    """

    def __init__(self) -> None:
        self.known: Bounded[tuple[Alike, int], Repeat] = Bounded("repeats", _KEPT)
        self.seen: Bounded[tuple[Alike, str], Seen] = Bounded("executors of repeats", _KEPT)

    @staticmethod
    def of(move: Move) -> tuple[Repeats, object]:
        """Return what the source of a copy remembers, and the token of the destination."""
        derived = move.src.derived
        repeats = derived.get(_REPEATS) or derived.setdefault(_REPEATS, Repeats())
        return repeats, move.dst.derived.setdefault(_TOKEN, object())


def tokens_of(move: Move) -> int:
    """Return the number of tokens by which copies are remembered; 0: they are alike for any.

    Copies that leave a device are executed by the strategy that was picked for their number.
    """
    return 0 if move.src.device == move.dst.device else move.count


def repeated(move: Move, options: CopyOptions) -> BlockTransfer | None:
    """Issue a copy if one like it was remembered; else return None.

    Raises:
        BackendUnavailable: as `choose`.
        LayoutError: memory that was replaced.
        SlotError: a bad index on the host.
    """
    src, dst, src_index, dst_index, count = move
    repeats: Repeats | None = src.derived.get(_REPEATS)
    token = dst.derived.get(_TOKEN)
    if repeats is None or token is None or not (options.plain and count):
        return None
    began = perf_counter()
    device = src.device if src.device.type != "cpu" else dst.device
    sides = sides_of(move, device)
    if sides is None:
        return None
    # The registry is asked each time: the environment may name another backend now.
    alike = token, sides, choose(device, options.backend), options.terms
    repeat = repeats.known.get((alike, tokens_of(move)))
    if repeat is None or not repeat.fits(move):
        return None
    stream = options.stream
    if stream is not None and getattr(stream, "device", None) != device:
        return None
    current = repeat.events is None or _current_device() == device.index
    if repeat.capturing() if current else capturing(device):
        return None
    src.check_memory()
    dst.check_memory()
    skips = src_index.check(count, src.slots, "source")
    skips |= dst_index.check(count, dst.slots, "destination", distinct=True)
    if skips and not repeat.skips:
        return None
    return BlockTransfer(repeat.issue(move, device, stream, skips), move, began, skips=skips)
