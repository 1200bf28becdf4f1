# SPDX-License-Identifier: Apache-2.0
"""How the values of a small copy reach a device: in the driver's command, in a launch's parameters,
or through pinned memory that is read later (docs/host.md, "Small copies").
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

WAYS = "inline", "value", "mapped", "copy", "host"  # the best first
#: The most bytes of ways: what the driver takes along, and what is left of the 32,764 bytes of a
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
MOST_BLOCKS = 32  # of a launch: so many vectors in flight keep the link busy
VALUES_HEAD = struct.Struct("=QII")  # to, bytes, width
MAPPED = struct.Struct("=QQQQ")  # to, from, bytes, width
VALUES_NAME = "portakv_small_values"
MAPPED_NAME = "portakv_small_mapped"
_WIDE = 16

#: Sends through pinned memory that may be under way; the next makes the host wait for the oldest.
MOST_SLOTS = 16

Array = npt.NDArray[Any]
_NAMES = "bool uint8 int8 int16 uint16 int32 uint32 int64 uint64"
#: What numpy calls the dtypes that are carried.
NUMPY = {getattr(torch, name): np.dtype(name) for name in _NAMES.split()}

#: Writes an array to the beginning of a contiguous tensor of its dtype, on a stream; last: if the
#: stream is being captured.
Send = Callable[[Array, Tensor, Stream | None, bool], None]
#: Enqueues the copy of the first bytes of memory of the host to a tensor, on a stream.
Issue = Callable[[Tensor, Any, int, Stream | None], None]


class Target:
    """What is known of a device that small copies go to, and what sends to it.

    Attributes:
        device: with its index.
        captures: tells if the device's current stream is being captured.
        first, most: the way of the fewest bytes, and the most that go by it.
        ready: what sends values that are read at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.captures = _capture_question(device)
        self._lacks: dict[str, str | None] = {}
        self.ready: dict[tuple[str, torch.dtype], Send] = {}
        self.first = next(way for way in WAYS if self.why_not(way, 0) is None)
        self.most = MOST.get(self.first, sys.maxsize)

    def why_not(self, way: str, nbytes: int) -> str | None:
        """What keeps so many bytes from going a way, as a phrase; None: nothing."""
        if way not in self._lacks:
            self._lacks[way] = lacks(way, self.device)
        return self._lacks[way] or (HOLDS[way] if nbytes > MOST.get(way, nbytes) else None)

    def prepare(self, way: str, dtype: torch.dtype) -> Send:
        """Add to ``ready`` what sends as many values as go that way."""
        made = self.make(way, dtype, MOST.get(way, 0) // dtype.itemsize)
        return self.ready.setdefault((way, dtype), made)

    def make(self, way: str, dtype: torch.dtype, n: int) -> Send:
        """What sends up to ``n`` values a way that can be had, again and again, from any thread.
        Raises `Unsupported` inside graph capture, if it has to be prepared outside."""
        device = self.device
        own = NUMPY[dtype]
        if way == "host":
            return write_on_host
        if way == "inline":
            return ReadAtOnce(InlineCopy(device).issue, _Pages(device, own, n), n).send
        if way == "value":
            return ReadAtOnce(self.kernels.by_value, _Parameters(device, own, n), n).send
        return ReadLater(by_copy if way == "copy" else self.kernels.mapped, device, own, n)

    @cached_property
    def kernels(self) -> Kernels:
        """Those of the device, loaded once."""
        return Kernels(self.device)


def _capture_question(device: torch.device) -> Callable[[], bool]:
    """`capturing` of one device, with less to look up."""
    if device.type != "cuda":
        return lambda: capturing(device)
    captures = capture_question(device)
    if torch.cuda.device_count() == 1:
        return captures
    index = device.index
    current = torch._C._cuda_getDevice
    return lambda: captures() if current() == index else capturing(device)


def lacks(way: str, device: torch.device) -> str | None:
    """What keeps anything from going a way to a device, as a phrase; None: nothing."""
    if (device.type == "cpu") != (way == "host"):
        return f"{device} is no CPU" if way == "host" else "the target is on the CPU"
    if way in ("copy", "host"):
        return None
    if way == "inline":
        return why_not_inline(device)
    return _cuda_driver.why_not(device) or _cuda_driver.device_too_old(device)


def write_on_host(array: Array, out: Tensor, stream: Stream | None, captures: bool) -> None:
    """Values to the CPU, at once."""
    out.view(-1).numpy()[: array.size] = array.reshape(-1)


class ReadAtOnce:
    """Sends values that are read while the driver is called, out of memory of each thread's."""

    def __init__(self, issue: Issue, mine: Any, n: int) -> None:
        self._issue = issue
        self._mine = mine
        self._n = n

    def send(self, array: Array, out: Tensor, stream: Stream | None, captures: bool) -> None:
        """A `Send`."""
        mine = self._mine
        count = array.size
        if count == self._n and array.ndim == 1:
            mine.room[...] = array  # the same as below, in half the time
        else:
            mine.room[:count] = array.reshape(-1)
        if nbytes := array.nbytes:
            self._issue(out, mine, nbytes, stream)


class _Pages(threading.local):
    """Pageable memory for the values of each thread.

    The caller's may be pinned, and would be read later than the call returns. So would these pages
    if a caller registered them with memory of its own: they are whole ones, off the heap.
    """

    def __init__(self, device: torch.device, own: np.dtype[Any], n: int) -> None:
        _cuda_driver.adopt(device)  # a new thread has no context yet
        nbytes = max(n, 1) * own.itemsize
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.room = np.frombuffer(pages, own)[:n]
        self.address = self.room.ctypes.data


class InlineCopy(_cuda_driver.Caller):
    """In the driver's command: the values have left the host's memory when the call returns."""

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
    """What keeps values from going inline to a device, as a phrase; None if they can. Also that it
    may read pageable memory where it lies, and so perhaps after the call: that was not tried."""
    why = _cuda_driver.no_cuda(device)
    if why is not None:
        return why
    number = ctypes.c_int
    pointer = ctypes.POINTER(ctypes.c_int)
    function = _cuda_driver.function
    found = number()
    reads = number()
    try:
        library = _cuda_driver.library()
        function(library, *_COPY)
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

    def __init__(self, device: torch.device, own: np.dtype[Any], n: int) -> None:
        super().__init__(VALUES_HEAD.size + MOST["value"], device)
        self.room = np.frombuffer(self.buffer, own, n, VALUES_HEAD.size)


class Kernels:
    """The loaded kernels of one device."""

    def __init__(self, device: torch.device) -> None:
        if capturing(device):
            raise refuse_capture(
                "The first small copy of a device",
                "its kernels have to be loaded first; make one before the capture",
            )
        functions = _cuda_driver.load(source(), [VALUES_NAME, MAPPED_NAME], device)
        self._values = functions[VALUES_NAME]
        self._mapped = functions[MAPPED_NAME]
        self._launch = _cuda_driver.Launcher(device, THREADS)
        self._arguments = _cuda_driver.Arguments(MAPPED.size, device)

    def by_value(self, out: Tensor, mine: _Parameters, nbytes: int, stream: Stream | None) -> None:
        """The values have left the host's memory when the launch returns."""
        to = out.data_ptr()
        blocks, vector = _grid(to, nbytes)
        VALUES_HEAD.pack_into(mine.buffer, 0, to, nbytes, vector)
        self._launch(self._values, blocks, mine.address, stream)

    def mapped(self, out: Tensor, slot: Slot, nbytes: int, stream: Stream | None) -> None:
        """The kernel reads the slot by itself: no copy engine takes part."""
        to = out.data_ptr()
        blocks, vector = _grid(to, nbytes)
        MAPPED.pack_into(self._arguments.buffer, 0, to, slot.address, nbytes, vector)
        self._launch(self._mapped, blocks, self._arguments.address, stream)


def source() -> str:
    """The text of both kernels."""
    text = files("portakv_native").joinpath("host").joinpath("small.cuh").read_text()
    return f"#define PORTAKV_SMALL_VECTORS {MOST['value'] // _WIDE}\n{text}"


def _grid(to: int, nbytes: int) -> tuple[int, int]:
    """Thread blocks of a launch, and the widest vector in bytes that the target is aligned to."""
    vector = min(_WIDE, to & -to)
    return max(1, min(MOST_BLOCKS, -(-nbytes // (vector * THREADS)))), vector


class Slot:
    """Pinned memory for ``n`` values of one send, and the end of that send."""

    ended: torch.Event

    def __init__(self, own: np.dtype[Any], n: int) -> None:
        nbytes = max(n, 1) * own.itemsize
        self.memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        self.room = self.memory.numpy().view(own)[:n]
        self.address = self.memory.data_ptr()


def by_copy(out: Tensor, slot: Slot, nbytes: int, stream: Stream | None) -> None:
    """The copy engine reads the slot, behind whatever it has to move before."""
    with inside(stream), torch.inference_mode(out.is_inference()):
        target = out.view(-1).view(torch.uint8)[:nbytes]
        target.copy_(slot.memory[:nbytes], non_blocking=True)


class ReadLater:
    """Sends through pinned memory: slots in turn, and one that all captured sends read."""

    def __init__(self, issue: Issue, device: torch.device, own: np.dtype[Any], n: int) -> None:
        if capturing(device):
            what = "A small copy through pinned memory"
            raise refuse_capture(what, "it has to be made before the capture")
        self._issue = issue
        self._device = device
        self._own = own
        self._n = n
        self._alone = torch.accelerator.device_count() == 1
        self._slots = deque[Slot]()  # the first is next
        self._standing = Slot(own, n)
        self._captured: int | None = None  # values of the captured sends
        self._lock = threading.Lock()

    def __call__(self, array: Array, out: Tensor, stream: Stream | None, captures: bool) -> None:
        with self._lock:
            slot = self._captured_slot(array.size) if captures else self._next()
            slot.room[: array.size] = array.reshape(-1)
            if array.size:
                self._issue(out, slot, array.nbytes, stream)
            if array.size and not captures:
                if stream is None and not self._alone:
                    # Given no stream it would take one of the device that is current.
                    stream = torch.accelerator.current_stream(self._device.index)
                slot.ended.record(stream)
                self._slots.rotate(-1)

    def refill(self, array: Array) -> None:
        """Change what the captured sends carry."""
        with self._lock:
            if self._captured is None:
                raise Unsupported(
                    "Refilling a small copy that was never captured",
                    "call send inside a graph capture first, or send instead of refill",
                )
            self._captured_slot(array.size).room[: array.size] = array.reshape(-1)

    def _captured_slot(self, count: int) -> Slot:
        if self._captured not in (None, count):
            raise LayoutError(
                f"A small copy that was captured with {self._captured} values was given {count}; "
                f"expected as many, since a graph's sizes are fixed. Pad the values, or capture "
                f"another SmallCopy."
            )
        self._captured = count
        return self._standing

    def _next(self) -> Slot:
        """The slot that is next, once its last send has ended."""
        slots = self._slots
        if not slots or not slots[0].ended.query():
            if len(slots) < MOST_SLOTS:
                slots.appendleft(Slot(self._own, self._n))
                slots[0].ended = torch.Event(self._device)
            else:
                slots[0].ended.synchronize()
        return slots[0]

    def __del__(self) -> None:
        """The allocator of pinned memory knows of copies from a slot, but of no kernel that reads
        it, so the slots of sends that are under way are held for longer than this."""
        for slot in getattr(self, "_slots", ()):
            if self._issue is not by_copy:
                hold_memory(Completion(slot.ended, retained=slot.memory), retire=False)
