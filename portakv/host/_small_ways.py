# SPDX-License-Identifier: Apache-2.0
"""How the values of a small copy reach a device: in the driver's command, in a launch's parameters,
or through pinned memory that is read later.

``inline``: CUDA documents that a copy of up to 64 KB from pageable host memory is asynchronous, and
that the memory was read when the call returns. That such a copy waits for no copy engine is
measured alone: on an H200, where 65,536 bytes did not wait, and 80,000 did (docs/host.md, "Small
copies").
"""

from __future__ import annotations

import ctypes
import mmap
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import torch
from numpy import ndarray

from portakv.errors import LayoutError, Unsupported
from portakv.host._packed_ints import (
    Array,
    PackedInts,
    Values,
    as_array,
    check_count,
    numpy_dtype,
)
from portakv.runtime import cuda as _cuda_driver
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import capturing, inside, refuse_capture

#: Bytes that the driver takes along with a command.
INLINE_BYTES = 65536
_HOST_PAGE_TABLES = 100  # CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES

THREADS = 128
#: Blocks of one launch: so many vectors are in flight that the link is busy, and no more.
MOST_BLOCKS = 32
# Parameters of a launch in bytes: 4 KB everywhere; 32,764 from CUDA 12.1 (driver R530) and compute
# capability 7.0 on (CUDA C++ Programming Guide, "__grid_constant__" and "Kernel parameters").
_CLASSIC_PARAMETERS, _LARGE_PARAMETERS = 4096, 32764
_LARGE_DRIVER, _LARGE_CAPABILITY = 12010, 70
VALUES_HEAD = struct.Struct("=QII")  # to, bytes, width
MAPPED = struct.Struct("=QQQQ")  # to, from, bytes, width
VALUES_NAME, MAPPED_NAME = "portakv_small_values", "portakv_small_mapped"
_WIDE = 16

#: Sends through pinned memory that may be under way; the next makes the host wait for the oldest.
MOST_SLOTS = 16


# --- the ways -------------------------------------------------------------------------------------


class Way(ABC):
    """One way of carrying so many values of a dtype, again and again, from any thread."""

    @abstractmethod
    def send(
        self, values: Values, out: torch.Tensor, stream: torch.Stream | None, captures: bool
    ) -> int:
        """Write the values to the beginning of ``out``, which is contiguous and of the dtype, on
        the stream; returns how many they are."""

    @abstractmethod
    def refill(self, values: Values) -> None:
        """Change what the captured send carries."""


class _PerThread(threading.local):
    """Memory for the values of each thread, so that several can send at once."""

    def __init__(self, make: Callable[..., Any], *made_of: Any) -> None:
        self.own = make(*made_of)


class ReadAtOnce(Way):
    """The host's values are read while the driver is called, out of memory of each thread's.

    Args:
        dtype: of the values.
        most: how many they may be.
        make: a thread's memory, given ``dtype``, ``most`` and ``made_of``; it has `PackedInts`,
            ``packed``, and their ``whole``.
    """

    def __init__(
        self, dtype: torch.dtype, most: int, make: Callable[..., Any], *made_of: Any
    ) -> None:
        self._mine = _PerThread(make, dtype, most, *made_of)
        self._most, self._shape, self._own = most, (most,), numpy_dtype(dtype)

    @abstractmethod
    def issue(self, mine: Any, to: int, count: int, stream: torch.Stream | None) -> None:
        """Write the first values of this thread's memory to an address, on the stream."""

    def send(
        self, values: Values, out: torch.Tensor, stream: torch.Stream | None, captures: bool
    ) -> int:
        mine = self._mine.own
        if type(values) is ndarray and values.dtype is self._own and values.shape == self._shape:
            mine.whole[...] = values  # what `fill` would come to, some calls later
            count = self._most
        else:
            count = mine.packed.fill(values)
        if count:
            self.issue(mine, out.data_ptr(), count, stream)
        return count


class Inline(ReadAtOnce):
    """In the driver's command: the values have left the host's memory when the call returns.

    Args:
        device: where the values go.
        dtype: of the values.
        most: how many they may be.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, most: int) -> None:
        super().__init__(dtype, most, _Pages, device)
        self._device, self._itemsize = device, dtype.itemsize
        self._caller = _cuda_driver.Caller(device)
        self._copy = _copy_function()

    def issue(self, mine: _Pages, to: int, count: int, stream: torch.Stream | None) -> None:
        """See `ReadAtOnce.issue`."""
        handle = self._caller.handle(stream)
        if handle is None:
            with torch.cuda.device(self._device):
                self.issue(mine, to, count, stream)
            return
        error = self._copy(to, mine.address, count * self._itemsize, handle)
        if error:
            name = _cuda_driver.error_name(error, _cuda_driver.library())
            raise _cuda_driver.refused(name, f"A copy of {count} values")

    def refill(self, values: Values) -> None:
        raise Unsupported(
            "Refilling a small copy that goes inline",
            "it cannot be captured; make it with way='mapped', or send instead of refill",
        )


class ByValue(ReadAtOnce):
    """In a launch's parameters: the values have left the host's memory when the launch returns.

    Args and attributes as `Inline`.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, most: int) -> None:
        loaded = kernels(device)
        super().__init__(dtype, most, _Parameters, device)
        self._itemsize = dtype.itemsize
        self._function, self._launch = loaded.values, loaded.launch

    def issue(self, mine: _Parameters, to: int, count: int, stream: torch.Stream | None) -> None:
        """See `ReadAtOnce.issue`."""
        nbytes, vector = count * self._itemsize, widest_vector(to)
        VALUES_HEAD.pack_into(mine.buffer, 0, to, nbytes, vector)
        self._launch(self._function, blocks(nbytes, vector), mine.address, stream)

    def refill(self, values: Values) -> None:
        raise Unsupported(
            "Refilling a small copy by value",
            "its contents were fixed when it was captured; make it with way='mapped'",
        )


class Slot(NamedTuple):
    """Pinned memory for one send."""

    memory: torch.Tensor
    packed: PackedInts
    address: int


def make_slot(dtype: torch.dtype, most: int) -> Slot:
    """Pinned memory for so many values."""
    nbytes = max(most * dtype.itemsize, 1)
    memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
    return Slot(memory, PackedInts(memory.numpy(), most, dtype), memory.data_ptr())


#: Enqueues the copy of so many bytes of a slot to a tensor, on a stream.
Issue = Callable[[torch.Tensor, Slot, int, "torch.Stream | None"], None]


class ThroughPinned(Way):
    """Through pinned memory: slots that are used in turn, and one that captured sends read.

    Args:
        device: where the values go.
        dtype: of the values.
        most: how many they may be.
        issue: enqueues the copy from a slot.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, most: int, issue: Issue) -> None:
        if capturing(device):
            raise refuse_capture(
                "A small copy through pinned memory", "it has to be made before the capture"
            )
        self._device, self._index, self._issue = device, device.index, issue
        self._alone = torch.accelerator.device_count() == 1
        self._dtype, self._itemsize, self._most = dtype, dtype.itemsize, most
        self._slots: list[tuple[Slot, torch.Event]] = []  # each with the end of its last send
        self._next = 0
        self._standing = make_slot(dtype, most)
        self._captured: int | None = None  # values of the captured send
        self._lock = threading.Lock()

    def send(
        self, values: Values, out: torch.Tensor, stream: torch.Stream | None, captures: bool
    ) -> int:
        with self._lock:
            if captures:
                self._captured = count = self._stand(values)
                if count:
                    self._issue(out, self._standing, count * self._itemsize, stream)
                return count
            slot, ended = self._take()
            count = slot.packed.fill(values)
            if count:
                self._issue(out, slot, count * self._itemsize, stream)
                if stream is None and not self._alone:
                    # Given no stream it would take one of the device that is current.
                    stream = torch.accelerator.current_stream(self._index)
                ended.record(stream)
                self._next = (self._next + 1) % len(self._slots)
            return count

    def refill(self, values: Values) -> None:
        with self._lock:
            if self._captured is None:
                raise Unsupported(
                    "Refilling a small copy that was never captured",
                    "call send inside a graph capture first, or send instead of refill",
                )
            self._stand(values)

    def _stand(self, values: Values) -> int:
        """Write what every captured send carries; a graph's size is fixed."""
        array = as_array(values, self._dtype)
        if self._captured not in (None, array.size):
            raise LayoutError(
                f"A small copy that was captured with {self._captured} values was given "
                f"{array.size}; expected as many, since a graph's sizes are fixed. Pad the values, "
                f"or capture another SmallCopy."
            )
        return self._standing.packed.fill(array)

    def _take(self) -> tuple[Slot, torch.Event]:
        """The slot that is next, once its last send has ended."""
        if self._slots:
            found = self._slots[self._next]
            if found[1].query():
                return found
        if len(self._slots) < MOST_SLOTS:
            made = make_slot(self._dtype, self._most), torch.Event(self._device)
            self._slots.insert(self._next, made)
        else:
            self._slots[self._next][1].synchronize()
        return self._slots[self._next]


class OnHost(Way):
    """To the CPU: written at once.

    Args:
        dtype: of the values.
        most: how many they may be.
    """

    def __init__(self, dtype: torch.dtype, most: int) -> None:
        self._dtype, self._most = dtype, most

    def send(
        self, values: Values, out: torch.Tensor, stream: torch.Stream | None, captures: bool
    ) -> int:
        array = as_array(values, self._dtype)
        check_count(array.size, self._most, self._dtype)
        target: Array = out.view(-1)[: array.size].numpy()
        target.reshape(array.shape)[...] = array
        return array.size

    def refill(self, values: Values) -> None:
        raise Unsupported(
            "Refilling a small copy to the CPU", "there are no graphs; send the values again"
        )


# --- inline ---------------------------------------------------------------------------------------


# What was found out about devices, and loaded for them.
_inline: Bounded[torch.device, tuple[str | None]] = Bounded("devices that take values inline", 32)
_kernels: Bounded[torch.device, Kernels] = Bounded("small copies' kernels", 32)


def why_not_inline(device: torch.device) -> str | None:
    """What keeps values from going inline to a device, as a phrase; None if they can."""
    return _inline.get_or_make(device, lambda: (_ask_for_inline(device),))[0]


def _ask_for_inline(device: torch.device) -> str | None:
    why = _cuda_driver.no_cuda(device)
    if why is not None:
        return why
    try:
        _copy_function()
        return _read_later(device)
    except (OSError, AttributeError) as error:
        return f"the CUDA driver's library cannot be used ({error})"


class _Pages:
    """Pageable memory for the values of one thread.

    The caller's may be pinned, and would be read later than the call returns. So would these pages
    if a caller registered them with memory of its own: they are whole ones, off the heap.
    """

    def __init__(self, dtype: torch.dtype, most: int, device: torch.device) -> None:
        _cuda_driver.adopt(device)  # a new thread has no context yet
        nbytes = max(most * dtype.itemsize, 1)
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        self.packed = PackedInts(pages, most, dtype)  # which keeps the pages
        self.whole = self.packed.whole


@cache
def _copy_function() -> Any:
    word = ctypes.c_uint64  # CUdeviceptr, and the addresses of the host and of a stream
    arguments = word, word, ctypes.c_size_t, word
    return _cuda_driver.function(_cuda_driver.library(), "cuMemcpyHtoDAsync_v2", *arguments)


def _read_later(device: torch.device) -> str | None:
    """That a device may read pageable memory where it lies, and so perhaps after the call, as a
    phrase; None: it does not. What such a device does was not looked at."""
    library, number = _cuda_driver.library(), ctypes.POINTER(ctypes.c_int)
    find = _cuda_driver.function(library, "cuDeviceGet", number, ctypes.c_int)
    ask = _cuda_driver.function(library, "cuDeviceGetAttribute", number, ctypes.c_int, ctypes.c_int)
    _cuda_driver.adopt(device)  # the driver answers once it has been initialised
    found, reads = ctypes.c_int(), ctypes.c_int()
    error = find(ctypes.byref(found), device.index) or ask(
        ctypes.byref(reads), _HOST_PAGE_TABLES, found
    )
    if error:
        name = _cuda_driver.error_name(error, library)
        return f"the driver does not tell how {device} reads pageable memory ({name})"
    if reads.value:
        return f"{device} reads pageable memory by the host's page tables, perhaps after the call"
    return None


# --- kernels --------------------------------------------------------------------------------------


class Kernels:
    """The loaded kernels of one device, and how one is launched."""

    def __init__(self, device: torch.device) -> None:
        text = source(value_bytes(device))
        functions = _cuda_driver.load(text, [VALUES_NAME, MAPPED_NAME], device)
        self.values, self.mapped = functions[VALUES_NAME], functions[MAPPED_NAME]
        self.launch = _cuda_driver.Launcher(device, THREADS)


def kernels(device: torch.device) -> Kernels:
    """The kernels of a device, compiled and loaded once.

    Raises:
        Unsupported: inside graph capture, where nothing can be loaded.
    """
    known = _kernels.get(device)
    if known is not None:
        return known
    if capturing(device):
        raise refuse_capture(
            "The first small copy of a device",
            "its kernels have to be loaded first; make one before the capture",
        )
    return _kernels.setdefault(device, Kernels(device))


def value_bytes(device: torch.device) -> int:
    """Bytes of values that a launch on a device carries in its parameters: whole vectors."""
    large = (
        _cuda_driver.driver_version() >= _LARGE_DRIVER
        and _cuda_driver.capability(device) >= _LARGE_CAPABILITY
    )
    limit = _LARGE_PARAMETERS if large else _CLASSIC_PARAMETERS
    return (limit - VALUES_HEAD.size) // _WIDE * _WIDE


def source(nbytes: int) -> str:
    """The text of both kernels, of which one carries so many bytes by value."""
    text = files("portakv_native.cuda").joinpath("small.cuh").read_text()
    return f"#define PORTAKV_SMALL_VECTORS {nbytes // _WIDE}\n{text}"


def widest_vector(address: int) -> int:
    """The widest vector in bytes that an address is aligned to."""
    return min(_WIDE, address & -address)


def blocks(nbytes: int, vector: int) -> int:
    """Thread blocks of a launch."""
    return max(1, min(MOST_BLOCKS, -(-nbytes // (vector * THREADS))))


class _Parameters:
    """The parameters of one thread's launches by value: their head, and the values."""

    def __init__(self, dtype: torch.dtype, most: int, device: torch.device) -> None:
        head = VALUES_HEAD.size
        self._arguments = _cuda_driver.Arguments(head + value_bytes(device), device)
        self.buffer, self.address = self._arguments.buffer, self._arguments.address
        self.packed = PackedInts(self.buffer, most, dtype, head)
        self.whole = self.packed.whole


def issue_by_kernel(device: torch.device) -> Issue:
    """The kernel reads the slot by itself: no copy engine takes part."""
    loaded = kernels(device)
    function, launch = loaded.mapped, loaded.launch
    arguments = _cuda_driver.Arguments(MAPPED.size, device)

    def issue(out: torch.Tensor, slot: Slot, nbytes: int, stream: torch.Stream | None) -> None:
        to = out.data_ptr()
        vector = widest_vector(to)
        MAPPED.pack_into(arguments.buffer, 0, to, slot.address, nbytes, vector)
        launch(function, blocks(nbytes, vector), arguments.address, stream)

    return issue


def issue_by_copy(out: torch.Tensor, slot: Slot, nbytes: int, stream: torch.Stream | None) -> None:
    """The copy engine reads the slot, behind whatever it has to move before."""
    with inside(stream), torch.inference_mode(out.is_inference()):
        target = out.view(-1).view(torch.uint8)[:nbytes]
        target.copy_(slot.memory[:nbytes], non_blocking=True)
