# SPDX-License-Identifier: Apache-2.0
"""What a small copy takes as values, and how they reach a device: in the driver's command, in a
launch's parameters, or through pinned memory that is read later.

``inline``: CUDA documents that a copy of up to 64 KB from pageable host memory is asynchronous, and
that the memory was read when the call returns. That such a copy waits for no copy engine is
measured alone: on an H200, where 65,536 bytes did not wait, and 80,000 did (docs/host.md, "Small
copies").
"""

from __future__ import annotations

import ctypes
import mmap
import operator
import struct
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from numpy import ndarray

from portakv.errors import DeviceMismatch, LayoutError, Unsupported
from portakv.runtime import cuda as _cuda_driver
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import capturing, inside, refuse_capture
from portakv.runtime.transfer import Completion, hold_memory

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

Array = npt.NDArray[Any]
#: What small copies take: integers, bytes, a numpy array, or a tensor on the host.
Values = Sequence[int] | bytes | bytearray | memoryview | Array | torch.Tensor

_NAMES = "bool uint8 int8 int16 uint16 int32 uint32 int64 uint64"
_NUMPY = {getattr(torch, name): np.dtype(name) for name in _NAMES.split()}
#: What torch calls the dtype of an array that `as_array` returned.
TORCH_DTYPES: dict[np.dtype[Any], torch.dtype] = {own: dtype for dtype, own in _NUMPY.items()}

_Stream = torch.Stream | None


class Way(ABC):
    """One way of carrying at most so many values of a dtype, again and again, from any thread."""

    #: What cannot be refilled, and why; of ways that carry the same in each replay.
    no_refill = "", ""

    def __init__(self, device: torch.device, dtype: torch.dtype, most: int) -> None:
        self._device, self._dtype, self._most = device, dtype, most
        self._itemsize = dtype.itemsize

    @abstractmethod
    def send(self, values: Values, out: torch.Tensor, stream: _Stream, captures: bool) -> int:
        """Write the values to the beginning of ``out``, which is contiguous and of the dtype, on
        the stream; returns how many they are."""

    def refill(self, values: Values) -> None:
        """Change what the captured send carries."""
        what, why = self.no_refill
        raise Unsupported(f"Refilling a small copy {what}", why)


class OnHost(Way):
    """To the CPU: written at once."""

    no_refill = "to the CPU", "there are no graphs; send the values again"

    def send(self, values: Values, out: torch.Tensor, stream: _Stream, captures: bool) -> int:
        memory = out.view(-1).view(torch.uint8).numpy()
        return fill(room(memory, out.numel(), out.dtype), values)


# --- read during the call -------------------------------------------------------------------------


class _ReadAtOnce(Way):
    """The host's values are read while the driver is called, out of memory of each thread's."""

    #: Makes that memory: a `threading.local` with `room` for the values as ``room``.
    memory: Callable[[torch.dtype, int, torch.device], Any]

    def __init__(self, device: torch.device, dtype: torch.dtype, most: int) -> None:
        super().__init__(device, dtype, most)
        self._mine = type(self).memory(dtype, most, device)
        self._shape, self._own = (most,), numpy_dtype(dtype)

    @abstractmethod
    def issue(self, mine: Any, to: int, nbytes: int, stream: _Stream) -> None:
        """Write the first bytes of this thread's memory to an address, on the stream."""

    def send(self, values: Values, out: torch.Tensor, stream: _Stream, captures: bool) -> int:
        mine = self._mine
        if type(values) is ndarray and values.dtype is self._own and values.shape == self._shape:
            mine.room[...] = values  # what `fill` would come to, some calls later
            count = self._most
        else:
            count = fill(mine.room, values)
        if count:
            self.issue(mine, out.data_ptr(), count * self._itemsize, stream)
        return count


class _Pages(threading.local):
    """Pageable memory for the values of each thread.

    The caller's may be pinned, and would be read later than the call returns. So would these pages
    if a caller registered them with memory of its own: they are whole ones, off the heap.
    """

    def __init__(self, dtype: torch.dtype, most: int, device: torch.device) -> None:
        _cuda_driver.adopt(device)  # a new thread has no context yet
        nbytes = max(most * dtype.itemsize, 1)
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        self.room = room(pages, most, dtype)  # which keeps the pages


class Inline(_ReadAtOnce):
    """In the driver's command: the values have left the host's memory when the call returns."""

    memory = _Pages
    no_refill = (
        "that goes inline",
        "it cannot be captured; make it with way='mapped', or send instead of refill",
    )

    def __init__(self, device: torch.device, dtype: torch.dtype, most: int) -> None:
        super().__init__(device, dtype, most)
        self._caller = _cuda_driver.Caller(device)
        self._copy = _copy_function()

    def issue(self, mine: _Pages, to: int, nbytes: int, stream: _Stream) -> None:
        handle = self._caller.handle(stream)
        if handle is None:
            with torch.cuda.device(self._device):
                self.issue(mine, to, nbytes, stream)
            return
        error = self._copy(to, mine.address, nbytes, handle)
        if error:
            name = _cuda_driver.error_name(error, _cuda_driver.library())
            raise _cuda_driver.refused(name, f"A copy of {nbytes // self._itemsize} values")


_inline: Bounded[torch.device, str | None] = Bounded("devices that take values inline", 32)


def why_not_inline(device: torch.device) -> str | None:
    """What keeps values from going inline to a device, as a phrase; None if they can."""
    return _inline.get_or_make(device, lambda: _ask_for_inline(device))


@cache
def _copy_function() -> Any:
    word = ctypes.c_uint64  # CUdeviceptr, and the addresses of the host and of a stream
    arguments = word, word, ctypes.c_size_t, word
    return _cuda_driver.function(_cuda_driver.library(), "cuMemcpyHtoDAsync_v2", *arguments)


def _ask_for_inline(device: torch.device) -> str | None:
    """Also that a device may read pageable memory where it lies, and so perhaps after the call.
    What such a device does was not looked at."""
    why = _cuda_driver.no_cuda(device)
    if why is not None:
        return why
    number, pointer, function = ctypes.c_int, ctypes.POINTER(ctypes.c_int), _cuda_driver.function
    found, reads = number(), number()
    try:
        _copy_function()
        library = _cuda_driver.library()
        find = function(library, "cuDeviceGet", pointer, number)
        ask = function(library, "cuDeviceGetAttribute", pointer, number, number)
    except (OSError, AttributeError) as error:
        return f"the CUDA driver's library cannot be used ({error})"
    _cuda_driver.adopt(device)  # the driver answers once it has been initialised
    code = find(ctypes.byref(found), device.index)
    code = code or ask(ctypes.byref(reads), _HOST_PAGE_TABLES, found)
    if code:
        name = _cuda_driver.error_name(code, library)
        return f"the driver does not tell how {device} reads pageable memory ({name})"
    if reads.value:
        return f"{device} reads pageable memory by the host's page tables, perhaps after the call"
    return None


class _Parameters(_cuda_driver.Arguments):
    """The parameters of each thread's launches by value: their head, and the values."""

    def __init__(self, dtype: torch.dtype, most: int, device: torch.device) -> None:
        super().__init__(VALUES_HEAD.size + value_bytes(device), device)
        self.room = room(self.buffer, most, dtype, VALUES_HEAD.size)


class ByValue(_ReadAtOnce):
    """In a launch's parameters: the values have left the host's memory when the launch returns."""

    memory = _Parameters
    no_refill = (
        "by value",
        "its contents were fixed when it was captured; make it with way='mapped'",
    )

    def __init__(self, device: torch.device, dtype: torch.dtype, most: int) -> None:
        loaded = kernels(device)
        super().__init__(device, dtype, most)
        self._function, self._launch = loaded.values, loaded.launch

    def issue(self, mine: _Parameters, to: int, nbytes: int, stream: _Stream) -> None:
        blocks, vector = _grid(to, nbytes)
        VALUES_HEAD.pack_into(mine.buffer, 0, to, nbytes, vector)
        self._launch(self._function, blocks, mine.address, stream)


# --- kernels --------------------------------------------------------------------------------------

_kernels: Bounded[torch.device, Kernels] = Bounded("small copies' kernels", 32)


class Kernels:
    """The loaded kernels of one device, and how one is launched."""

    def __init__(self, device: torch.device) -> None:
        text = source(value_bytes(device))
        functions = _cuda_driver.load(text, [VALUES_NAME, MAPPED_NAME], device)
        self.values, self._mapped = functions[VALUES_NAME], functions[MAPPED_NAME]
        self.launch = _cuda_driver.Launcher(device, THREADS)
        self._arguments = _cuda_driver.Arguments(MAPPED.size, device)

    def issue(self, out: torch.Tensor, slot: Slot, nbytes: int, stream: _Stream) -> None:
        """The kernel reads the slot by itself: no copy engine takes part."""
        to = out.data_ptr()
        blocks, vector = _grid(to, nbytes)
        MAPPED.pack_into(self._arguments.buffer, 0, to, slot.address, nbytes, vector)
        self.launch(self._mapped, blocks, self._arguments.address, stream)


def kernels(device: torch.device) -> Kernels:
    """The kernels of a device, compiled and loaded once; raises `Unsupported` inside graph capture,
    where nothing can be loaded."""
    if device not in _kernels and capturing(device):
        raise refuse_capture(
            "The first small copy of a device",
            "its kernels have to be loaded first; make one before the capture",
        )
    return _kernels.get_or_make(device, lambda: Kernels(device))


def value_bytes(device: torch.device) -> int:
    """Bytes of values that a launch on a device carries in its parameters: whole vectors."""
    large = _cuda_driver.driver_version() >= _LARGE_DRIVER
    large = large and _cuda_driver.capability(device) >= _LARGE_CAPABILITY
    limit = _LARGE_PARAMETERS if large else _CLASSIC_PARAMETERS
    return (limit - VALUES_HEAD.size) // _WIDE * _WIDE


def source(nbytes: int) -> str:
    """The text of both kernels, of which one carries so many bytes by value."""
    text = files("portakv_native.cuda").joinpath("small.cuh").read_text()
    return f"#define PORTAKV_SMALL_VECTORS {nbytes // _WIDE}\n{text}"


def _grid(to: int, nbytes: int) -> tuple[int, int]:
    """Thread blocks of a launch, and the widest vector in bytes that the target is aligned to."""
    vector = min(_WIDE, to & -to)
    return max(1, min(MOST_BLOCKS, -(-nbytes // (vector * THREADS)))), vector


# --- through pinned memory ------------------------------------------------------------------------


class Slot(NamedTuple):
    """Pinned memory for one send."""

    memory: torch.Tensor
    room: Array
    address: int


def make_slot(dtype: torch.dtype, most: int) -> Slot:
    """Pinned memory for so many values."""
    nbytes = max(most * dtype.itemsize, 1)
    memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
    return Slot(memory, room(memory.numpy(), most, dtype), memory.data_ptr())


#: Enqueues the copy of so many bytes of a slot to a tensor, on a stream.
Issue = Callable[[torch.Tensor, Slot, int, _Stream], None]


def by_copy(out: torch.Tensor, slot: Slot, nbytes: int, stream: _Stream) -> None:
    """The copy engine reads the slot, behind whatever it has to move before."""
    with inside(stream), torch.inference_mode(out.is_inference()):
        target = out.view(-1).view(torch.uint8)[:nbytes]
        target.copy_(slot.memory[:nbytes], non_blocking=True)


class Copy(Way):
    """Through pinned memory: slots that are used in turn, and one that captured sends read."""

    def __init__(self, device: torch.device, dtype: torch.dtype, most: int) -> None:
        super().__init__(device, dtype, most)
        if capturing(device):
            raise refuse_capture(
                "A small copy through pinned memory", "it has to be made before the capture"
            )
        self._issue = self.issues(device)
        self._alone = torch.accelerator.device_count() == 1
        # Each with the end of its last send; the first is next.
        self._slots: deque[tuple[Slot, torch.Event]] = deque()
        self._standing = make_slot(dtype, most)
        self._captured: int | None = None  # values of the captured send
        self._lock = threading.Lock()

    @staticmethod
    def issues(device: torch.device) -> Issue:
        """What enqueues the copy of a slot."""
        return by_copy

    def send(self, values: Values, out: torch.Tensor, stream: _Stream, captures: bool) -> int:
        with self._lock:
            if captures:
                self._captured = count = self._stand(values)
                slot, ended = self._standing, None
            else:
                slot, ended = self._take()
                count = fill(slot.room, values)
            if count:
                self._issue(out, slot, count * self._itemsize, stream)
            if count and ended is not None:
                if stream is None and not self._alone:
                    # Given no stream it would take one of the device that is current.
                    stream = torch.accelerator.current_stream(self._device.index)
                ended.record(stream)
                self._slots.rotate(-1)
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
        array = as_array(values, self._standing.room.dtype)
        if self._captured not in (None, array.size):
            raise LayoutError(
                f"A small copy that was captured with {self._captured} values was given "
                f"{array.size}; expected as many, since a graph's sizes are fixed. Pad the values, "
                f"or capture another SmallCopy."
            )
        return fill(self._standing.room, array)

    def _take(self) -> tuple[Slot, torch.Event]:
        """The slot that is next, once its last send has ended."""
        slots = self._slots
        if not slots or not slots[0][1].query():
            if len(slots) < MOST_SLOTS:
                made = make_slot(self._dtype, self._most), torch.Event(self._device)
                slots.appendleft(made)
            else:
                slots[0][1].synchronize()
        return slots[0]


class Mapped(Copy):
    """The same, read by a kernel."""

    @staticmethod
    def issues(device: torch.device) -> Issue:
        return kernels(device).issue

    def __del__(self) -> None:
        """The allocator of pinned memory knows of no kernel that reads a slot, so the slots of
        sends that are under way are held for longer than this."""
        for slot, ended in getattr(self, "_slots", ()):
            hold_memory(Completion(ended, kept=slot.memory), retire=False)


# --- values --------------------------------------------------------------------------------------


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """What numpy calls a dtype; raises `LayoutError` for anything but an integer dtype or bool."""
    if not isinstance(dtype, torch.dtype) or dtype not in _NUMPY:
        raise LayoutError(
            f"A small copy of {dtype} was asked; it carries integers and bytes: "
            f"{', '.join(map(str, TORCH_DTYPES))}. For other elements pass a tensor's bytes: "
            f"tensor.view(torch.uint8)."
        )
    return _NUMPY[dtype]


def as_array(values: Values, wanted: np.dtype[Any] | None) -> Array:
    """Values as an array of a dtype, in their own shape; a copy only if they have another dtype.
    None: the array's or tensor's own, uint8 for bytes, int64 for other sequences.

    Raises:
        DeviceMismatch: a tensor that is not on the host.
        LayoutError: something that has no length, elements that are no integers, or a value that
            the dtype cannot hold.
    """
    array: Array
    if isinstance(values, torch.Tensor):
        if values.layout != torch.strided:
            raise LayoutError(
                f"A small copy was asked of a tensor with the layout {values.layout}; expected "
                f"torch.strided. Call to_dense() first."
            )
        if not values.is_cpu:
            raise DeviceMismatch(
                f"A small copy was asked of a tensor on {values.device}; expected values on the "
                f"host. Use copy_ for what is on a device."
            )
        numpy_dtype(values.dtype)
        array = values.numpy()
    elif isinstance(values, np.ndarray):
        array = values
    elif isinstance(values, (bytes, bytearray, memoryview)):
        array = np.asarray(memoryview(values))
    elif isinstance(values, str) or not hasattr(values, "__len__"):
        raise LayoutError(
            f"A small copy was asked of a {type(values).__name__}; expected a list of integers, "
            f"bytes, an array, or a tensor on the host. Make a list of it first."
        )
    else:
        wanted = wanted or _NUMPY[torch.int64]
        array = _of_sequence(values, wanted)
    wanted = wanted or array.dtype.newbyteorder("=")
    if array.dtype == wanted and wanted in TORCH_DTYPES:
        return array
    if array.dtype.kind not in "iub" or wanted not in TORCH_DTYPES:
        raise LayoutError(
            f"A small copy was asked of an array of {array.dtype}; expected integers or bool. For "
            f"other elements pass the array's bytes: array.view('uint8')."
        )
    cast: Array = array.astype(wanted)
    same = cast == array  # a value that wrapped round differs by 256 or more, also as a float
    if not same.all():
        position = int(same.ravel().argmin())
        raise _wrong_value(array.ravel()[position], position, wanted)
    return cast


def room(
    memory: bytearray | mmap.mmap | Array, most: int, dtype: torch.dtype, offset: int = 0
) -> Array:
    """Memory behind ``offset`` bytes as so many elements, which values are written to by `fill`."""
    found: Array = np.ndarray((most,), numpy_dtype(dtype), memory, offset)
    return found


def fill(room: Array, values: Values) -> int:
    """Write values to the beginning of an array; returns how many they are. Raises as `as_array`
    does, and for more values than there is room for, before anything is written."""
    array = as_array(values, room.dtype)
    if array.size > room.size:
        raise LayoutError(
            f"{array.size} values of {TORCH_DTYPES[room.dtype]} were sent by a small copy made for "
            f"{room.size}; expected no more. Make one for the most that occur."
        )
    room[: array.size].reshape(array.shape)[...] = array
    return array.size


def _of_sequence(values: Sequence[int], wanted: np.dtype[Any]) -> Array:
    try:
        array: Array = np.asarray(values)
        if array.ndim == 1 and array.dtype.kind in "iub":
            return array
    except Exception:  # ragged, or elements that numpy cannot read: told one by one below
        pass
    # Also 2**63 among smaller ones, of which numpy would make floats.
    numbers = []
    for position, value in enumerate(values):
        try:
            numbers.append(operator.index(value))
        except Exception:
            raise _wrong_value(f"a {type(value).__name__}", position, wanted) from None
        if numbers[-1] not in _bounds(wanted):
            raise _wrong_value(numbers[-1], position, wanted)
    return np.array(numbers, wanted)


def _bounds(wanted: np.dtype[Any]) -> range:
    """The integers that a dtype holds."""
    if wanted.kind == "b":
        return range(2)
    return range(int(np.iinfo(wanted).min), int(np.iinfo(wanted).max) + 1)


def _wrong_value(found: object, position: int, wanted: np.dtype[Any]) -> LayoutError:
    return LayoutError(
        f"A small copy to {TORCH_DTYPES[wanted]} was asked of values with {found} at position "
        f"{position}; expected integers from {_bounds(wanted)[0]} to {_bounds(wanted)[-1]}. "
        f"Correct the value or take a wider dtype."
    )
