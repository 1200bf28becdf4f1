# SPDX-License-Identifier: Apache-2.0
"""The link between a device and the host: puts pieces on it for the transfer strategies.

On NVIDIA devices CUDA's driver copies: plain, rows at a pitch, and many pieces in one call. Its
library is called directly. The library's functions take whole arrays; a wrapper in Python would
first turn them into lists of objects, which costs the host more than the copies. Declarations are
those of ``cuda.h`` (CUDA driver API, "Memory Management"). Other devices copy by their torch.
"""

from __future__ import annotations

import ctypes
import threading
from bisect import bisect_right
from collections.abc import Callable
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from portakv.errors import TransferError
from portakv.interconnect.pieces import ALL, Mask, Pieces, none_above, portions
from portakv.runtime import cuda
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import inside
from portakv.runtime.streams import ignoring_captures, own_stream
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

_NULL_STREAMS = (0, 1)  # the legacy default stream, by both of its handles
_WORD = 4  # bytes of the word that a rest waits for
_EVERY_CONTEXT = 1  # CU_MEMHOSTALLOC_PORTABLE
_AT_LEAST = 0  # CU_STREAM_WAIT_VALUE_GEQ
_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
_NOT_SUPPORTED = 801  # CUDA_ERROR_NOT_SUPPORTED

# CUmemcpyAttributes: access in the order of the stream; two locations, which only memory that can
# migrate has; and "prefer to overlap with compute".
_ATTRIBUTES = np.array([1, 0, 0, 0, 0, 1], dtype=np.int32)
_FROM_FIRST = np.zeros(1, dtype=np.uint64)  # the attributes hold from the first copy on


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


class _Lists:
    """Plain copies as the driver's batched call takes them, in three lists of 64 bits.

    Attributes:
        dst, src, width: the address of each list.
    """

    def __init__(self, pieces: Pieces) -> None:
        self._columns = [_writable(column) for column in pieces[:3]]
        # By ctypes, which takes writable memory alone: numpy takes 1 us to report each address.
        self.dst, self.src, self.width = [
            ctypes.addressof(ctypes.c_char.from_buffer(column.data)) for column in self._columns
        ]


def _writable(column: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return a column as contiguous memory that may be written; a copy if it is not."""
    column = np.ascontiguousarray(column)
    return column if column.flags.writeable else column.copy()


class _Share(NamedTuple):
    """Pieces that go in batches, or, without ``lists``, each by a separate call."""

    pieces: Pieces
    lists: _Lists | None = None

    def in_batches(self, first: int, past: int) -> bool:
        """Return whether a range goes in batches."""
        return self.lists is not None and past - first >= LEAST_BATCH


class Copies:
    """The copies of a driver's library; knows nothing of devices or torch."""

    def __init__(self, library: ctypes.CDLL) -> None:
        word = ctypes.c_uint64
        size = ctypes.c_size_t
        self._library = library
        self._plain = cuda.function(library, "cuMemcpyAsync", word, word, size, word)
        self._rows = cuda.Copy2D(library)
        address = ctypes.POINTER(word)
        number = ctypes.c_uint
        self._allocate = cuda.function(library, "cuMemHostAlloc", address, size, number)
        waits = (word, word, number, number)
        self._wait = cuda.function(library, "cuStreamWaitValue32_v2", *waits)
        many = (word, word, word, size, word, word, size)
        # CUDA 13 dropped an argument of 12.8: the position of the failed copy.
        self._batch: Callable[..., int] | None = None
        self._fails: tuple[int, ...] = ()
        if hasattr(library, "cuMemcpyBatchAsync_v2"):
            self._batch = cuda.function(library, "cuMemcpyBatchAsync_v2", *many, word)
        elif hasattr(library, "cuMemcpyBatchAsync"):
            self._batch = cuda.function(library, "cuMemcpyBatchAsync", *many, word, word)
            self._failed = np.zeros(1, dtype=np.uint64)
            self._fails = (_at(self._failed),)
        self._attributes = _at(_ATTRIBUTES)
        self._from_first = _at(_FROM_FIRST)
        self.fold_below = ALL if self._batch is None else FOLD_BELOW

    def batched(self, pieces: Pieces) -> Mask | None:
        """Return which pieces `copy` hands over in batches; None: none."""
        if self._batch is None or pieces.number < LEAST_BATCH:
            return None
        plain = pieces.height == 1
        return plain if np.count_nonzero(plain) >= LEAST_BATCH else None

    def divided(self, pieces: Pieces) -> list[_Share]:
        """Return the pieces that are separate calls, and those that go in batches."""
        if pieces.plain and self._batch is not None and pieces.number >= LEAST_BATCH:
            return [_Share(pieces, _Lists(pieces))]
        batched = self.batched(pieces)
        if batched is None:
            return [_Share(pieces)]
        if batched.all():
            return [_Share(pieces, _Lists(pieces))]
        plain = pieces.where(batched)
        return [_Share(pieces.where(~batched)), _Share(plain, _Lists(plain))]

    def word(self) -> int | None:
        """Return the address of a word that holds 0, for `rest`; None: no memory can be pinned.

        It is never freed.

        Raises:
            TransferError: the driver returned any other error.
        """
        address = ctypes.c_uint64()
        error = self._allocate(ctypes.byref(address), _WORD, _EVERY_CONTEXT)
        if error == _OUT_OF_MEMORY:
            return None
        if error:
            raise self._refused(error, "the allocation of a word")
        ctypes.c_uint32.from_address(address.value).value = 0
        return address.value

    def rest(self, word: int, stream: int) -> bool:
        """Let copies of other streams in between two copies on the stream of that handle.

        Returns False if the device has no such wait.

        Raises:
            TransferError: the driver rejects the wait for the word.
        """
        error = self._wait(stream, word, 0, _AT_LEAST)
        if error == _NOT_SUPPORTED:
            return False
        if error:
            raise self._refused(error, "a wait for a word")
        return True

    def copy_range(
        self,
        share: _Share,
        first: int,
        past: int,
        to_device: bool,
        stream: int,
        begun: bool = False,
    ) -> None:
        """Copy a range of a share, ordered on the stream of that handle.

        ``begun``: it follows other copies, so the link does not wait for the end of the first
        batch's call.

        Raises:
            TransferError: the driver rejects a piece; the pieces before it may have been moved.
        """
        if share.in_batches(first, past):
            self._copy_batch(share, first, past, stream, begun)
        else:
            self.copy_each(share.pieces.part(first, past), to_device, stream)

    def _copy_batch(self, share: _Share, first: int, past: int, stream: int, begun: bool) -> None:
        assert self._batch is not None  # `batched` looked
        assert share.lists is not None
        lists = share.lists
        most = MOST_DESCRIPTORS if begun else FIRST_DESCRIPTORS
        while first < past:
            count = min(most, past - first)
            passed = 8 * first  # bytes of each list
            error = self._batch(
                lists.dst + passed,
                lists.src + passed,
                lists.width + passed,
                count,
                self._attributes,
                self._from_first,
                1,
                *self._fails,
                stream,
            )
            if error:
                raise self._refused(error, f"a batch of {count} copies")
            first = first + count
            most = min(GROWTH * most, MOST_DESCRIPTORS)

    def copy_each(self, pieces: Pieces, to_device: bool, stream: int) -> None:
        """Copy pieces, each by a call, ordered on the stream of that handle.

        Raises:
            TransferError: the driver rejects a piece; the pieces before it may have been moved.
        """
        columns = [column.tolist() for column in pieces]
        for dst, src, width, height, dst_pitch, src_pitch in zip(*columns, strict=True):
            if height == 1:
                error = self._plain(dst, src, width, stream)
            else:
                error = self._rows(dst, src, to_device, width, height, dst_pitch, src_pitch, stream)
            if error:
                raise self._refused(error, f"a copy of {height} x {width} bytes")

    def _refused(self, error: int, what: str) -> TransferError:
        called = cuda.error_name(error, self._library)
        return TransferError(
            f"Expected the CUDA driver to accept {what} between device and host, got {called}. "
            f"Earlier copies may have moved. Check that the memory still exists and is pinned, and "
            f"earlier errors."
        )


class CudaLink:
    """Put pieces on the link of an NVIDIA device, as `TorchLink` does, by the driver's copies."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies = Copies(cuda.library())
        self._adopted = threading.local()
        self._word: int | None = None  # for rests; allocated before the first one
        self._rests = True  # until the driver reports that the device has no such wait
        # By the handle of a stream: the bytes that crossed since its last rest.
        self._in_a_row: Bounded[int, int] = Bounded("bytes in a row on streams of a link", 256)
        self.fold_below = self._copies.fold_below

    def copy(
        self, pieces: Pieces, src: KVView, dst: KVView, stream: torch.Stream | None = None
    ) -> None:
        """Copy as `TorchLink.copy` does."""
        if getattr(self._adopted, "known", None) is None:
            cuda.adopt(self.device)  # a new thread has no context yet
            self._adopted.known = True
        if torch._C._cuda_getDevice() != self.device.index:
            with torch.cuda.device(self.device):
                self.copy(pieces, src, dst, stream)
            return
        handle = cuda.raw(stream, self.device.index)
        to_device = dst.form.place == "device"
        nbytes = pieces.nbytes
        if nbytes > IN_A_ROW:
            pieces = none_above(pieces, IN_A_ROW)
        elif pieces.number == 1:  # as most slices of `staged`: 12 calls of Python in place of 33
            self._pass(handle, nbytes)
            self._copies.copy_each(pieces, to_device, handle)
            return
        begun = False
        for share in self._copies.divided(pieces):
            if share.lists is not None and handle in _NULL_STREAMS:
                self._copy_on_other_stream(share, to_device, stream, begun)
            else:
                self._copy_share(share, to_device, handle, begun)
            begun = True

    def _copy_share(self, share: _Share, to_device: bool, handle: int, begun: bool) -> None:
        """Copy a share on the stream of ``handle``, with rests."""
        for first, past, nbytes in portions(share.pieces, IN_A_ROW):
            self._pass(handle, nbytes)
            self._copies.copy_range(share, first, past, to_device, handle, begun)
            begun = True

    def _pass(self, handle: int, nbytes: int) -> None:
        """Count bytes that are about to cross on a stream, after a rest if they are too many in a
        row."""
        crossed = self._in_a_row.get(handle, 0)
        if crossed > 0 and crossed + nbytes > IN_A_ROW:
            self._rest(handle)
            crossed = 0
        self._in_a_row[handle] = crossed + nbytes

    def _rest(self, handle: int) -> None:
        """Let copies of other streams in between; do nothing while no memory can be pinned, or if
        the device has no wait for a word."""
        if not self._rests:
            return
        if self._word is None:  # two threads may allocate one each, and use either
            # Of other threads: no copy by a link is issued inside a capture.
            with ignoring_captures(self.device):
                self._word = self._copies.word()
        if self._word is not None:
            self._rests = self._copies.rest(self._word, handle)

    @cached_property
    def _other_stream(self) -> torch.Stream:
        """Return the stream that replaces the legacy default stream, which rejects batches."""
        other: torch.Stream = own_stream(self.device)
        return other

    def _copy_on_other_stream(
        self, share: _Share, to_device: bool, stream: torch.Stream | None, begun: bool
    ) -> None:
        """Copy a share on the other stream, between two events of ``stream``."""
        other = self._other_stream
        stream = stream or torch.cuda.current_stream(self.device)
        other.wait_stream(stream)
        try:
            handle = cuda.raw(other, self.device.index)
            self._copy_share(share, to_device, handle, begun)
        finally:
            stream.wait_stream(other)


@cache
def why_not(device: torch.device) -> str | None:
    """Return why the driver cannot copy for a device, as a phrase; None if it can."""
    why = cuda.not_served(device)
    if why is not None:
        return why
    try:
        Copies(cuda.library())
    except (OSError, AttributeError) as error:
        return f"the CUDA driver's library cannot be used ({error})"
    return None


def _at(array: npt.NDArray[np.generic]) -> int:
    """Return the address of an array's first byte."""
    return int(array.__array_interface__["data"][0])
