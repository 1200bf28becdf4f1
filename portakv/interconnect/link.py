# SPDX-License-Identifier: Apache-2.0
"""The link between a device and the host: puts pieces on it for the transfer strategies.

On NVIDIA devices CUDA's driver copies: plain, rows at a pitch, and many pieces in one call. The
core lists the pieces and calls the driver, by the rules below. Other devices copy by their torch.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import NoReturn

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
from portakv.errors import TransferError
from portakv.interconnect.pieces import (
    ALL,
    Pieces,
    Uncrossed,
    check_copy,
    limits_of,
    pieces_of,
    whole_bytes,
)
from portakv.plan.move import Move
from portakv.plan.plan import CopyPlan
from portakv.plan.runs import outside, side_words
from portakv.runtime import cuda
from portakv.runtime.devices import inside
from portakv.runtime.streams import own_stream
from portakv.view.view import KVView

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
