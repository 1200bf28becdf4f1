# SPDX-License-Identifier: Apache-2.0
"""The link between a device and the host: puts pieces on it for the strategies.

On NVIDIA devices CUDA's driver copies: plain, rows at a pitch, and many pieces in one call. Its
library is called as it is: its functions take whole arrays, which any wrapper in Python would first
turn into lists of objects, at more than the copies themselves cost the host. Declarations are those
of ``cuda.h`` (CUDA driver API, "Memory Management"). Other devices copy by their torch.
"""

from __future__ import annotations

import ctypes
import threading
from bisect import bisect_right
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from portakv.errors import TransferError
from portakv.interconnect.pieces import ALL, Pieces, portions
from portakv.runtime import cuda as _cuda_driver
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import inside
from portakv.runtime.streams import own_stream
from portakv.view.view import KVView

_Mask = npt.NDArray[np.bool_]

#: Entries of the longest batched call. The driver states no limit; other runtimes fail above 8192,
#: and shorter calls let another thread's small copy in between. The first one of many is shorter,
#: since nothing moves before its call ends (an entry takes the host 0.42 us), and each is by
#: `GROWTH` longer than the one before it, since between two calls the link of an H200 rests 2 us.
MOST_DESCRIPTORS = 4096
FIRST_DESCRIPTORS = 256
GROWTH = 4

#: Fewer plain copies than this are calls of their own. Two of 2 MB in one batch reached 0.97 of a
#: memcpy on an H200, in two calls 0.94; seven 0.99 and 0.94.
LEAST_BATCH = 2

#: Bytes that may cross on one stream until a copy goes by another one, beside it. A copy engine
#: stays with a stream for as long as that has more to copy: while copies of 32 MiB followed each
#: other on one of an H200, plain memcpys too, 64 bytes on another stream waited for all of them,
#: over 0.25 s. With every third one beside they wait for 0.7 - 0.9 ms, 1.4 at most, for half a
#: percent of the link and one of both directions at once; with every second one for half as long,
#: at twice the price. It is less than three of the largest slices of `staged`.
IN_A_ROW = 88 << 20

#: Rows from this many bytes on are entries of a batch rather than of a 2-D copy, if there are
#: batches. On an H200, of a memcpy, rows of 4 KiB: 0.61 by a batch, 0.60 by tall 2-D copies, which
#: cost the host less; 8 KiB 0.89 and 0.76, 32 KiB 0.98 - 1.0 and 0.5 - 0.92, by their height.
FOLD_BELOW = 8 << 10

_NULL_STREAMS = (0, 1)  # the legacy default stream, by both of its handles

# CUmemcpyAttributes: accesses in the order of the stream; two places, which only memory that can
# migrate has; and "prefer to overlap with compute".
_ATTRIBUTES = np.array([1, 0, 0, 0, 0, 1], dtype=np.int32)
_FROM_FIRST = np.zeros(1, dtype=np.uint64)  # they hold from the first copy on


def by_torch(device: torch.device) -> bool:
    """True if runs cross the link of a device by calls of its torch, each at a call's cost."""
    return why_not(device) is not None


@cache
def link_of(device: torch.device) -> CudaLink | TorchLink:
    """What crosses the link of a device: CUDA's driver by itself, else the device's torch."""
    return TorchLink(device) if by_torch(device) else CudaLink(device)


class TorchLink:
    """Puts pieces on the link of any device through its torch; any thread may call it.

    Attributes:
        fold_below: bytes; narrower rows are worth folding into 2-D copies, wider ones only if they
            are many: they cross faster as copies of their own.
    """

    fold_below = ALL  # each copy is a call

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def copy(
        self, pieces: Pieces, src: KVView, dst: KVView, stream: torch.Stream | None = None
    ) -> None:
        """Copy the pieces, ordered on ``stream`` (None: the device's current one).

        The host does not wait, except if memory is pageable or a device's torch knows no other
        way. The caller holds the memory of both views until the copy has ended.

        Raises:
            TransferError: a piece does not lie in one allocation of its view, or the driver refuses
                it; some of the pieces may have been moved.
        """
        late = "pageable" not in (src.form.place, dst.form.place)
        mine = _Storages.of(src)
        theirs = _Storages.of(dst)
        to_device = dst.form.place == "device"
        with inside(stream), torch.no_grad():
            for at, start, width, height, dst_pitch, src_pitch in zip(
                *(column.tolist() for column in pieces), strict=True
            ):
                # Strided host memory torch would pack on the host, which would have to wait.
                whole = (src_pitch if to_device else dst_pitch) == width
                high = height if whole else 1
                for row in range(0, height, high):
                    source = mine.rows(start + row * src_pitch, width, high, src_pitch)
                    target = theirs.rows(at + row * dst_pitch, width, high, dst_pitch)
                    target.copy_(source, non_blocking=late)


class _Storages:
    """The memory of a view as bytes, found by address."""

    def __init__(self, view: KVView) -> None:
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in view.owners}
        self._starts = sorted(storages)
        self._bytes = [
            torch.empty(0, dtype=torch.uint8, device=view.device).set_(storages[start])
            for start in self._starts
        ]

    @classmethod
    def of(cls, view: KVView) -> _Storages:
        """Those of a view, kept with it."""
        known: _Storages | None = view.derived.get("storages")
        if known is None:
            # A tensor made in inference mode could not be written outside of it.
            with torch.inference_mode(False):
                known = view.derived["storages"] = cls(view)
        return known

    def rows(self, address: int, width: int, height: int, pitch: int) -> torch.Tensor:
        """Rows at an address, uint8 ``[height, width]``."""
        number = bisect_right(self._starts, address) - 1
        reach = (height - 1) * pitch + width
        if number >= 0:
            start = self._starts[number]
            memory = self._bytes[number]
            if address + reach <= start + memory.numel():
                return memory.as_strided((height, width), (pitch, 1), address - start)
        raise TransferError(
            f"{reach} bytes at {address:#x} were asked to be copied, which lie in no single "
            f"allocation of the view; expected memory of the view. Check that it still exists."
        )


class Copies:
    """The driver's copies, of a library; knows nothing of devices or torch."""

    def __init__(self, library: Any) -> None:
        word = ctypes.c_uint64
        size = ctypes.c_size_t
        self._library = library
        self._plain = _cuda_driver.function(library, "cuMemcpyAsync", word, word, size, word)
        self._rows = _cuda_driver.Copy2D(library)
        many = (word, word, word, size, word, word, size)
        # CUDA 13 dropped an argument (where it failed) that 12.8 had.
        self._batch: Any = None
        self._fails: tuple[int, ...] = ()
        if hasattr(library, "cuMemcpyBatchAsync_v2"):
            self._batch = _cuda_driver.function(library, "cuMemcpyBatchAsync_v2", *many, word)
        elif hasattr(library, "cuMemcpyBatchAsync"):
            self._batch = _cuda_driver.function(library, "cuMemcpyBatchAsync", *many, word, word)
            self._failed = np.zeros(1, dtype=np.uint64)
            self._fails = (_at(self._failed),)
        self._attributes = _at(_ATTRIBUTES)
        self._from_first = _at(_FROM_FIRST)
        self.fold_below = ALL if self._batch is None else FOLD_BELOW

    def batched(self, pieces: Pieces) -> _Mask | None:
        """Which pieces `copy` hands over in batches; None: none of them."""
        if self._batch is None or pieces.number < LEAST_BATCH:
            return None
        plain = pieces.height == 1
        return plain if np.count_nonzero(plain) >= LEAST_BATCH else None

    def copy(self, pieces: Pieces, to_device: bool, stream: int, begun: bool = False) -> None:
        """Copy pieces, ordered on the stream of that handle; ``begun``: behind others, so that the
        link does not wait for the end of the first batch's call.

        Raises:
            TransferError: the driver refuses a piece; those before it may have been moved.
        """
        batched = self.batched(pieces)
        if batched is None:
            self._copy_each(pieces, to_device, stream)
        elif batched.all():
            self._copy_batch(pieces, stream, begun)
        else:
            self._copy_each(Pieces(*(column[~batched] for column in pieces)), to_device, stream)
            self._copy_batch(Pieces(*(column[batched] for column in pieces)), stream, begun)

    def _copy_batch(self, pieces: Pieces, stream: int, begun: bool) -> None:
        columns = [np.ascontiguousarray(each) for each in (pieces.dst, pieces.src, pieces.width)]
        lists = [_at(column) for column in columns]
        first = 0
        most = MOST_DESCRIPTORS if begun else FIRST_DESCRIPTORS
        while first < pieces.number:
            count = min(most, pieces.number - first)
            error = self._batch(
                *(base + 8 * first for base in lists),
                count,
                self._attributes,
                self._from_first,
                1,
                *self._fails,
                stream,
            )
            if error:
                raise self._refused(error, f"A batch of {count} copies")
            first = first + count
            most = min(GROWTH * most, MOST_DESCRIPTORS)

    def _copy_each(self, pieces: Pieces, to_device: bool, stream: int) -> None:
        columns = [column.tolist() for column in pieces]
        for dst, src, width, height, dst_pitch, src_pitch in zip(*columns, strict=True):
            if height == 1:
                error = self._plain(dst, src, width, stream)
            else:
                error = self._rows(dst, src, to_device, width, height, dst_pitch, src_pitch, stream)
            if error:
                raise self._refused(error, f"A copy of {height} x {width} bytes")

    def _refused(self, error: int, what: str) -> TransferError:
        called = _cuda_driver.error_name(error, self._library)
        return TransferError(
            f"{what} between device and host was asked of the CUDA driver, which answered "
            f"{called}; success was expected, and only what was asked before may have been moved. "
            f"Check that the memory still exists and is pinned, and earlier errors."
        )


class CudaLink:
    """Puts pieces on the link of an NVIDIA device, as `TorchLink` does, by the driver's copies."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies = Copies(_cuda_driver.library())
        self._adopted = threading.local()
        # By the handle of a stream: another one beside it, and the bytes since it was last used.
        self._beside: Bounded[int, torch.Stream] = Bounded("streams beside others of a link", 64)
        self._in_a_row: Bounded[int, int] = Bounded("bytes in a row on streams of a link", 256)
        self.fold_below = self._copies.fold_below

    def copy(
        self, pieces: Pieces, src: KVView, dst: KVView, stream: torch.Stream | None = None
    ) -> None:
        """As `TorchLink.copy`."""
        if getattr(self._adopted, "known", None) is None:
            _cuda_driver.adopt(self.device)  # a new thread has no context yet
            self._adopted.known = True
        if torch._C._cuda_getDevice() != self.device.index:
            with torch.cuda.device(self.device):
                self.copy(pieces, src, dst, stream)
            return
        to_device = dst.form.place == "device"
        handle = _cuda_driver.raw(stream, self.device.index)
        for nth, portion in enumerate(portions(pieces, IN_A_ROW // 3)):
            refused = handle in _NULL_STREAMS and self._copies.batched(portion) is not None
            if self._enough(handle, portion.nbytes) or refused:
                self._copy_beside(portion, to_device, stream, handle, nth > 0)
            else:
                self._copies.copy(portion, to_device, handle, nth > 0)

    def _enough(self, handle: int, nbytes: int) -> bool:
        """Whether so many more would be too much in a row on a stream, and others have a turn."""
        crossed = self._in_a_row.get(handle) or 0
        enough = crossed > 0 and crossed + nbytes > IN_A_ROW
        self._in_a_row[handle] = 0 if enough else crossed + nbytes
        return enough

    def _copy_beside(
        self, pieces: Pieces, to_device: bool, stream: torch.Stream | None, handle: int, begun: bool
    ) -> None:
        """On another stream, between two events: in turn with this one, or in place of the legacy
        default stream, which batches refuse."""
        beside = self._beside.get_or_make(handle, lambda: own_stream(self.device))
        asked = stream or torch.cuda.current_stream(self.device)
        beside.wait_stream(asked)
        try:
            self._copies.copy(pieces, to_device, _cuda_driver.raw(beside, self.device.index), begun)
        finally:
            asked.wait_stream(beside)


@cache
def why_not(device: torch.device) -> str | None:
    """What keeps the driver from copying for a device, as a phrase; None if it can."""
    if (why := _cuda_driver.not_served(device)) is not None:
        return why
    try:
        Copies(_cuda_driver.library())
    except (OSError, AttributeError) as error:
        return f"the CUDA driver's library cannot be used ({error})"
    return None


def _at(array: Any) -> int:
    """The address of an array's first byte."""
    return int(array.__array_interface__["data"][0])
