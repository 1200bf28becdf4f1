# SPDX-License-Identifier: Apache-2.0
"""The methods that bring the values of a small copy to a device.

Values go in the driver's command, in a launch's parameters, or through pinned memory that is read
later (docs/copies.md).
"""

from __future__ import annotations

import ctypes
import mmap
import struct
import sys
import threading
from collections import deque
from collections.abc import Callable
from functools import cached_property
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Stream, Tensor

from portakv.errors import LayoutError, Unsupported
from portakv.runtime import cuda as _cuda_driver
from portakv.runtime.devices import capture_question, capturing, inside, refuse_capture
from portakv.runtime.transfer import Completion, hold_memory

METHODS = "inline", "value", "mapped", "copy", "host"  # best first
#: The most bytes of a method: for the driver's command; and the rest of the 32,764 bytes of a
#: launch's parameters (from CUDA 12.1 and compute capability 7.0 on), in whole vectors.
MOST = {"inline": 65536, "value": 32736}
HOLDS = {
    "inline": f"the driver takes up to {MOST['inline']} bytes along with the command",
    "value": f"a launch's parameters hold up to {MOST['value']} bytes",
}
_ADDRESS = ctypes.c_uint64  # a CUdeviceptr, and the host's address of memory or a stream
_COPY = "cuMemcpyHtoDAsync_v2", _ADDRESS, _ADDRESS, ctypes.c_size_t, _ADDRESS
_HOST_PAGE_TABLES = 100  # CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES

THREADS = 128
MOST_BLOCKS = 32  # of a launch: this many concurrent vectors keep the link busy
VALUES_HEAD = struct.Struct("=QII")  # to, bytes, width
MAPPED = struct.Struct("=QQQQ")  # to, from, bytes, width
VALUES_NAME = "portakv_small_values"
MAPPED_NAME = "portakv_small_mapped"
_WIDE = 16

#: The most pending sends through pinned memory; the next send makes the host wait for the oldest.
MOST_SLOTS = 16

Array = npt.NDArray[Any]
NumpyDtype = np.dtype[Any]
_NAMES = "bool uint8 int8 int16 uint16 int32 uint32 int64 uint64"
#: The numpy names of the supported dtypes.
NUMPY = {getattr(torch, name): np.dtype(name) for name in _NAMES.split()}

#: Writes an array to the beginning of a contiguous tensor of its dtype, on a stream. The last
#: argument: the stream is being captured.
Send = Callable[[Array, Tensor, Stream | None, bool], None]
#: Enqueues the copy of the first bytes of host memory to a tensor, on a stream.
Issue = Callable[[Tensor, Any, int, Stream | None], None]


class Target:
    """A device that small copies go to, and its senders.

    Attributes:
        device: with its index.
        captures: returns whether the device's current stream is being captured.
        first, most: the method of the fewest bytes, and the most bytes that it takes.
        ready: the senders of values that are read immediately.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.captures = _capture_question(device)
        self._lacks: dict[str, str | None] = {}
        self.ready: dict[tuple[str, torch.dtype], Send] = {}
        self.first = next(method for method in METHODS if self.why_not(method, 0) is None)
        self.most = MOST.get(self.first, sys.maxsize)

    def why_not(self, method: str, nbytes: int) -> str | None:
        """Return why ``nbytes`` cannot go by a method, as a phrase; None: they can."""
        if method not in self._lacks:
            self._lacks[method] = lacks(method, self.device)
        return self._lacks[method] or (HOLDS[method] if nbytes > MOST.get(method, nbytes) else None)

    def prepare(self, method: str, dtype: torch.dtype) -> Send:
        """Add to ``ready`` a sender of as many values as the method takes."""
        sender = self.make(method, dtype, MOST.get(method, 0) // dtype.itemsize)
        return self.ready.setdefault((method, dtype), sender)

    def make(self, method: str, dtype: torch.dtype, n: int) -> Send:
        """Return a sender of up to ``n`` values by an available method, for repeated use from any
        thread.

        Raises:
            Unsupported: inside graph capture, if it must be prepared outside.
        """
        device = self.device
        own = NUMPY[dtype]
        if method == "host":
            return write_on_host
        if method == "inline":
            return ReadAtOnce(InlineCopy(device).issue, _Pages(device, own, n), n).send
        if method == "value":
            return ReadAtOnce(self.kernels.by_value, _Parameters(device, own, n), n).send
        return ReadLater(by_copy if method == "copy" else self.kernels.mapped, device, own, n)

    @cached_property
    def kernels(self) -> Kernels:
        """Return the kernels of the device, loaded once."""
        return Kernels(self.device)


def _capture_question(device: torch.device) -> Callable[[], bool]:
    """Return `capturing` of one device, with fewer look-ups."""
    if device.type != "cuda":
        return lambda: capturing(device)
    captures = capture_question(device)
    if torch.cuda.device_count() == 1:
        return captures
    index = device.index
    current = torch._C._cuda_getDevice
    return lambda: captures() if current() == index else capturing(device)


def lacks(method: str, device: torch.device) -> str | None:
    """Return why nothing can go by a method to a device, as a phrase; None: it can."""
    if (device.type == "cpu") != (method == "host"):
        return f"{device} is not a CPU" if method == "host" else "the target is on the CPU"
    if method in ("copy", "host"):
        return None
    if method == "inline":
        return why_not_inline(device)
    return _cuda_driver.why_not(device) or _cuda_driver.device_too_old(device)


def write_on_host(array: Array, out: Tensor, stream: Stream | None, captures: bool) -> None:
    """Write values to the CPU immediately."""
    out.view(-1).numpy()[: array.size] = array.reshape(-1)


class ReadAtOnce:
    """Send values that are read during the driver's call, from memory of each thread."""

    def __init__(self, issue: Issue, buffer: _Pages | _Parameters, n: int) -> None:
        self._issue = issue
        self._buffer = buffer
        self._n = n

    def send(self, array: Array, out: Tensor, stream: Stream | None, captures: bool) -> None:
        """Send as `Send` describes."""
        buffer = self._buffer
        count = array.size
        if count == self._n and array.ndim == 1:
            buffer.values[...] = array  # faster than the line below, by half
        else:
            buffer.values[:count] = array.reshape(-1)
        nbytes = array.nbytes
        if nbytes:
            self._issue(out, buffer, nbytes, stream)


class _Pages(threading.local):
    """Pageable memory for the values of each thread.

    The caller's memory may be pinned, and would be read after the call returns. So would these
    pages if a caller registered them together with other memory: they are whole pages, off the
    heap.
    """

    def __init__(self, device: torch.device, own: NumpyDtype, n: int) -> None:
        _cuda_driver.adopt(device)  # a new thread has no context yet
        nbytes = max(n, 1) * own.itemsize
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.values = np.frombuffer(pages, own)[:n]
        self.address = self.values.ctypes.data


class InlineCopy(_cuda_driver.Caller):
    """Copy in the driver's command: the values have left the host's memory when the call
    returns."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._device = device
        self._copy = _cuda_driver.function(_cuda_driver.library(), *_COPY)

    def issue(self, out: Tensor, pages: _Pages, nbytes: int, stream: Stream | None) -> None:
        handle = self.handle(stream)
        if handle is None:
            with torch.cuda.device(self._device):
                self.issue(out, pages, nbytes, stream)
            return
        error = self._copy(out.data_ptr(), pages.address, nbytes, handle)
        if error:
            name = _cuda_driver.error_name(error, _cuda_driver.library())
            raise _cuda_driver.refused(name, f"A copy of {nbytes // out.itemsize} values")


def why_not_inline(device: torch.device) -> str | None:
    """Return why values cannot go inline to a device, as a phrase; None: they can.

    A device that reads pageable memory directly counts as unable: it may read after the call, which
    was not tested.
    """
    why = _cuda_driver.no_cuda(device)
    if why is not None:
        return why
    number = ctypes.c_int
    pointer = ctypes.POINTER(ctypes.c_int)
    function = _cuda_driver.function
    ordinal = number()
    reads = number()
    try:
        library = _cuda_driver.library()
        function(library, *_COPY)
        find = function(library, "cuDeviceGet", pointer, number)
        ask = function(library, "cuDeviceGetAttribute", pointer, number, number)
    except (OSError, AttributeError) as error:
        return f"the CUDA driver's library cannot be used ({error})"
    _cuda_driver.adopt(device)  # the driver answers once it has been initialised
    code = find(ctypes.byref(ordinal), device.index)
    code = code or ask(ctypes.byref(reads), _HOST_PAGE_TABLES, ordinal)
    if code:
        name = _cuda_driver.error_name(code, library)
        return f"the driver does not report how {device} reads pageable memory ({name})"
    if reads.value:
        return f"{device} reads pageable memory by the host's page tables, perhaps after the call"
    return None


class _Parameters(_cuda_driver.Arguments):
    """The parameters of each thread's launches by value: their head, and the values."""

    def __init__(self, device: torch.device, own: NumpyDtype, n: int) -> None:
        super().__init__(VALUES_HEAD.size + MOST["value"], device)
        self.values = np.frombuffer(self.buffer, own, n, VALUES_HEAD.size)


class Kernels:
    """The loaded kernels of one device."""

    def __init__(self, device: torch.device) -> None:
        if capturing(device):
            raise refuse_capture(
                "The first small copy of a device",
                "its kernels must be loaded first; make one copy before the capture",
            )
        functions = _cuda_driver.load(source(), [VALUES_NAME, MAPPED_NAME], device)
        self._values = functions[VALUES_NAME]
        self._mapped = functions[MAPPED_NAME]
        self._launch = _cuda_driver.Launcher(device, THREADS)
        self._arguments = _cuda_driver.Arguments(MAPPED.size, device)

    def by_value(
        self, out: Tensor, buffer: _Parameters, nbytes: int, stream: Stream | None
    ) -> None:
        """Launch with the values as parameters: they have left the host's memory when the launch
        returns."""
        to = out.data_ptr()
        blocks, vector = _grid(to, nbytes)
        VALUES_HEAD.pack_into(buffer.buffer, 0, to, nbytes, vector)
        self._launch(self._values, blocks, buffer.address, stream)

    def mapped(self, out: Tensor, slot: Slot, nbytes: int, stream: Stream | None) -> None:
        """Launch a kernel that reads the slot itself: no copy engine takes part."""
        to = out.data_ptr()
        blocks, vector = _grid(to, nbytes)
        MAPPED.pack_into(self._arguments.buffer, 0, to, slot.address, nbytes, vector)
        self._launch(self._mapped, blocks, self._arguments.address, stream)


def source() -> str:
    """Return the text of both kernels."""
    text = files("portakv_native").joinpath("host").joinpath("small.cuh").read_text()
    return f"#define PORTAKV_SMALL_VECTORS {MOST['value'] // _WIDE}\n{text}"


def _grid(to: int, nbytes: int) -> tuple[int, int]:
    """Return the thread blocks of a launch, and the widest vector in bytes that the target is
    aligned to."""
    vector = min(_WIDE, to & -to)
    return max(1, min(MOST_BLOCKS, -(-nbytes // (vector * THREADS)))), vector


class Slot:
    """Pinned memory for ``n`` values of one send, and the event of its end."""

    ended: torch.Event

    def __init__(self, own: NumpyDtype, n: int) -> None:
        nbytes = max(n, 1) * own.itemsize
        self.memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        self.values = self.memory.numpy().view(own)[:n]
        self.address = self.memory.data_ptr()


def by_copy(out: Tensor, slot: Slot, nbytes: int, stream: Stream | None) -> None:
    """Copy a slot by the copy engine, after everything that the engine has to move before."""
    with inside(stream), torch.inference_mode(out.is_inference()):
        target = out.view(-1).view(torch.uint8)[:nbytes]
        target.copy_(slot.memory[:nbytes], non_blocking=True)


class ReadLater:
    """Send through pinned memory: by slots in turn, and by one slot that all captured sends
    read."""

    def __init__(self, issue: Issue, device: torch.device, own: NumpyDtype, n: int) -> None:
        if capturing(device):
            what = "A small copy through pinned memory"
            raise refuse_capture(what, "create it before the capture")
        self._issue = issue
        self._device = device
        self._own = own
        self._n = n
        self._alone = torch.accelerator.device_count() == 1
        self._slots = deque[Slot]()  # the first slot is next
        self._standing = Slot(own, n)
        self._captured: int | None = None  # values of the captured sends
        self._lock = threading.Lock()

    def __call__(self, array: Array, out: Tensor, stream: Stream | None, captures: bool) -> None:
        with self._lock:
            slot = self._captured_slot(array.size) if captures else self._next()
            slot.values[: array.size] = array.reshape(-1)
            if array.size:
                self._issue(out, slot, array.nbytes, stream)
            if array.size and not captures:
                if stream is None and not self._alone:
                    # Without a stream the event would take a stream of the current device.
                    stream = torch.accelerator.current_stream(self._device.index)
                slot.ended.record(stream)
                self._slots.rotate(-1)

    def refill(self, array: Array) -> None:
        """Change the values of the captured sends."""
        with self._lock:
            if self._captured is None:
                raise Unsupported(
                    "Refilling a small copy that was never captured",
                    "call send inside a graph capture first, or send instead of refill",
                )
            self._captured_slot(array.size).values[: array.size] = array.reshape(-1)

    def _captured_slot(self, count: int) -> Slot:
        if self._captured not in (None, count):
            raise LayoutError(
                f"Expected {self._captured} values, as many as were captured, got {count}. "
                f"A graph's sizes are fixed: pad the values, or capture another SmallCopy."
            )
        self._captured = count
        return self._standing

    def _next(self) -> Slot:
        """Return the next slot, after its last send has ended."""
        slots = self._slots
        if not slots or not slots[0].ended.query():
            if len(slots) < MOST_SLOTS:
                slots.appendleft(Slot(self._own, self._n))
                slots[0].ended = torch.Event(self._device)
            else:
                slots[0].ended.synchronize()
        return slots[0]

    def __del__(self) -> None:
        """Retain the slots of pending sends for longer than this object.

        The allocator of pinned memory knows of copies from a slot, but of no kernel that reads it.
        """
        for slot in getattr(self, "_slots", ()):
            if self._issue is not by_copy:
                hold_memory(Completion(slot.ended, retained=slot.memory), retire=False)
