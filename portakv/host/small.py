# SPDX-License-Identifier: Apache-2.0
"""Small copies: integers or bytes from the host to a device, without a copy engine.

A copy engine ends its current copy, whatever the streams' priorities: 1,000 integers wait for a
gigabyte that was enqueued earlier. Data in the driver's command does not wait, and a kernel does
not. The first available method is taken; `choose` reports which, and why:

- ``inline``: up to 65,536 bytes that the CUDA driver takes along with the command to copy them. Not
  in a graph, and not on a device that reads pageable memory by the host's page tables.
- ``value`` (extra ``cuda``): up to 32,736 bytes in a launch's parameters. In a graph they keep
  their values of the capture.
- ``mapped`` (extra ``cuda``): a kernel reads pinned memory; any size. In a graph it is read again
  at each replay, and `SmallCopy.refill` changes it.
- ``copy``: by the copy engine, from pinned memory; captured like ``mapped``.
- ``host``: to the CPU, immediately.
"""

from __future__ import annotations

import ctypes
import mmap
import operator
import struct
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from importlib.resources import files
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from numpy import ndarray
from torch import Stream, Tensor
from torch.autograd.graph import increment_version

from portakv.arguments import kind_of
from portakv.errors import BackendUnavailable, DeviceMismatch, LayoutError, Unsupported
from portakv.runtime import cuda, streams
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import capture_question, capturing, inside, refuse_capture, resolve
from portakv.runtime.transfer import Completion, hold_memory
from portakv.selection import Decision, Kind, select, unavailable

# ------------------------------------------------------------------------------------------------
# The methods that bring the values of a small copy to a device.

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
    return cuda.why_not(device) or cuda.device_too_old(device)


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
        cuda.adopt(device)  # a new thread has no context yet
        nbytes = max(n, 1) * own.itemsize
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.values = np.frombuffer(pages, own)[:n]
        self.address = self.values.ctypes.data


class InlineCopy(cuda.Caller):
    """Copy in the driver's command: the values have left the host's memory when the call
    returns."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._device = device
        self._copy = cuda.function(cuda.library(), *_COPY)

    def issue(self, out: Tensor, pages: _Pages, nbytes: int, stream: Stream | None) -> None:
        handle = self.handle(stream)
        if handle is None:
            with torch.cuda.device(self._device):
                self.issue(out, pages, nbytes, stream)
            return
        error = self._copy(out.data_ptr(), pages.address, nbytes, handle)
        if error:
            name = cuda.error_name(error, cuda.library())
            raise cuda.refused(name, f"A copy of {nbytes // out.itemsize} values")


def why_not_inline(device: torch.device) -> str | None:
    """Return why values cannot go inline to a device, as a phrase; None: they can.

    A device that reads pageable memory directly counts as unable: it may read after the call, which
    was not tested.
    """
    why = cuda.no_cuda(device)
    if why is not None:
        return why
    number = ctypes.c_int
    pointer = ctypes.POINTER(ctypes.c_int)
    function = cuda.function
    ordinal = number()
    reads = number()
    try:
        library = cuda.library()
        function(library, *_COPY)
        find = function(library, "cuDeviceGet", pointer, number)
        ask = function(library, "cuDeviceGetAttribute", pointer, number, number)
    except (OSError, AttributeError) as error:
        return f"the CUDA driver's library cannot be used ({error})"
    cuda.adopt(device)  # the driver answers once it has been initialised
    code = find(ctypes.byref(ordinal), device.index)
    code = code or ask(ctypes.byref(reads), _HOST_PAGE_TABLES, ordinal)
    if code:
        name = cuda.error_name(code, library)
        return f"the driver does not report how {device} reads pageable memory ({name})"
    if reads.value:
        return f"{device} reads pageable memory by the host's page tables, perhaps after the call"
    return None


class _Parameters(cuda.Arguments):
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
        functions = cuda.load(source(), [VALUES_NAME, MAPPED_NAME], device)
        self._values = functions[VALUES_NAME]
        self._mapped = functions[MAPPED_NAME]
        self._launch = cuda.Launcher(device, THREADS)
        self._arguments = cuda.Arguments(MAPPED.size, device)

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


#: The values that small copies take: integers, bytes, a numpy array, or a tensor on the host.
Values = Sequence[int] | bytes | bytearray | memoryview | Array | Tensor

_TORCH: dict[NumpyDtype, torch.dtype] = {own: dtype for dtype, own in NUMPY.items()}
_KIND = Kind("method of small copies", argument="method")
_NO_REFILL = {  # methods that refill nothing, and why
    "host": "there are no graphs; send the values again",
    "inline": "it cannot be captured; make it with method='mapped', or send instead of refill",
    "value": "its contents were fixed when it was captured; make it with method='mapped'",
}


class Chosen(NamedTuple):
    """A method, and why it was chosen, as a phrase."""

    method: str
    why: str


def choose(nbytes: int, device: torch.device | str, method: str | None = None) -> Chosen:
    """Return the method by which ``nbytes`` of values go to a device; ``method``: a requested one.

    Raises:
        BackendUnavailable: an unknown method, or a method that this device or size does not allow.
    """
    return _choose(_target(resolve(device), None), _count(nbytes, "bytes"), method)


def by_inline(device: torch.device) -> bool:
    """Return True if few values travel to a device in the driver's command, outside of graphs."""
    return _target(device, None).first == "inline"


def to_device(
    values: Values,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    out: Tensor | None = None,
    stream: Stream | None = None,
    method: str | None = None,
) -> Tensor:
    """Return values of the host as a tensor on a device; the host does not wait.

    Args:
        values: integers, bytes, a numpy array, or a tensor on the host; read before this returns.
        device: the target device; None: the device of ``out``.
        dtype: an integer dtype or bool. None: the dtype of ``out``, else of the array or tensor,
            uint8 for bytes, int64 for other sequences.
        out: contiguous, of as many elements, written and returned; None: a new tensor with the
            shape of ``values``.
        stream: the stream to order the copy on, after the present work of the current stream. A
            reader on another stream must wait for this stream. None: the current stream.
        method: the method, see the module; None: the best. A graph capture takes only ``"value"``,
            by name.

    Raises:
        LayoutError: values that the dtype cannot hold; an ``out`` that does not fit.
        DeviceMismatch: values on a device; an ``out`` or a stream of another device.
        BackendUnavailable: a method that is not available, with the reason.
        Unsupported: inside graph capture, any method but ``"value"``.
    """
    target = _target(device, out)
    target_device = target.device
    dtype = out.dtype if dtype is None and out is not None else dtype
    array = _as_array(values, None if dtype is None else _numpy_dtype(dtype))
    dtype = _TORCH[array.dtype] if dtype is None else dtype
    if stream is not None:
        streams.check_stream(stream, target_device)
    best = method is None and array.nbytes <= target.most
    chosen = target.first if best else _choose(target, array.nbytes, method).method
    captured = target.captures()
    if captured and method != "value":
        raise refuse_capture(
            "A small copy by to_device",
            "pass method='value' if its contents may be fixed at capture; use SmallCopy with "
            "method='mapped' for contents that are read at each replay",
        )
    into = _checked(out, array.shape, dtype, target_device)
    if stream is not None:
        streams.follow_current(stream, *(() if captured else (into,)))
    if chosen not in ("mapped", "copy"):
        send = target.ready.get((chosen, dtype)) or target.prepare(chosen, dtype)
        send(array, into, stream, captured)
    elif array.size:
        slot = Slot(NUMPY[dtype], array.size)
        slot.values[...] = array.reshape(-1)
        issue = by_copy if chosen == "copy" else target.kernels.mapped
        issue(into, slot, array.nbytes, stream)
        streams.completion(target_device, stream, slot.memory)  # retains the slot until it was read
    return into


class SmallCopy:
    """A small copy for repeated use, with everything but the values prepared.

    Several threads may use it, if they may share ``out``.

    Args:
        n: the most values of one send.
        dtype: an integer dtype or bool.
        device: the target device.
        out: contiguous, ``n`` elements, written by every send; None: a new tensor.
        method: the method, see the module; None: the best. To capture sends into a graph, name a
            method that can be captured.

    Attributes:
        out: the target.
        method, why: the method, and why it was chosen.

    Raises as `to_device` does.
    """

    def __init__(
        self,
        n: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        *,
        out: Tensor | None = None,
        method: str | None = None,
    ) -> None:
        self._own = _numpy_dtype(dtype)
        n = _count(n, "values")
        target = _target(device, out)
        self._n = n
        self._device = target.device
        self._captures = target.captures
        self.method, self.why = _choose(target, n * dtype.itemsize, method)
        uncaptured = {None: "whose method was left open", "inline": "by method='inline'"}
        self._uncaptured = uncaptured.get(method)
        self._send = target.make(self.method, dtype, n)
        self.out = _checked(out, (n,), dtype, target.device)

    def send(self, values: Values, *, stream: Stream | None = None) -> Tensor:
        """Write up to ``n`` values to the beginning of ``out``; ``values`` and ``stream`` as in
        `to_device`.

        Returns ``out``, or a flat view of as many elements as there are values. The host waits only
        by ``mapped`` and ``copy``, while 16 sends are pending. All sends that graphs capture read
        the same memory, and so have the same number of values.
        """
        captures = self._captures()
        if captures and self._uncaptured is not None:
            raise refuse_capture(
                f"A send of a SmallCopy {self._uncaptured}",
                "make it with method='value' for contents that are fixed at capture, or with "
                "method='mapped' for contents that are read at each replay",
            )
        array: object = values
        if type(array) is not ndarray or array.dtype is not self._own:
            array = _as_array(values, self._own)
        out = self.out
        count = array.size
        most = self._n
        if count > most:
            raise LayoutError(
                f"Expected at most {most} values of {out.dtype}, as the small copy was made for, "
                f"got {count}. Make a SmallCopy for more values."
            )
        if stream is not None:
            streams.check_stream(stream, self._device)
            streams.follow_current(stream, *(() if captures else (out,)))
        self._send(array, out, stream, captures)
        increment_version(out)
        return out if count == most else out.view(-1)[:count]

    def refill(self, values: Values) -> None:
        """Change the values of captured sends from the next replay on, as many values as they had.

        The graph reads the memory while it runs: refill between the end of a replay and the next.

        Raises:
            Unsupported: by ``value``, whose contents are fixed, or ``inline``, or if nothing was
                captured.
            LayoutError: another number of values.
        """
        if not isinstance(self._send, ReadLater):
            raise Unsupported(f"Refilling a small copy by {self.method!r}", _NO_REFILL[self.method])
        self._send.refill(_as_array(values, self._own))


# --- the target -----------------------------------------------------------------------------------

targets: Bounded[torch.device | str | int, Target] = Bounded("small copies' targets", 64)


def _target(device: torch.device | str | int | None, out: Tensor | None) -> Target:
    """Return the target of a device, by the device or its name."""
    if out is not None and not isinstance(out, Tensor):
        raise LayoutError(
            f"Expected a tensor as out of a small copy, got {kind_of(out)}. Pass a tensor, or None."
        )
    if device is None:
        if out is None:
            raise DeviceMismatch(
                "Expected a device or an out tensor for a small copy, got neither. Pass one of "
                "them."
            )
        device = out.device
    try:
        known = targets.get(device)
    except (TypeError, ValueError):  # it has no hash; `resolve` raises for what is not a device
        known = None
    if known is None:
        target_device = resolve(device)
        known = targets.get_or_make(target_device, lambda: Target(target_device))
        # A name without a number means the current device, which another call may have changed.
        if target_device.type == "cpu" or str(device) == str(target_device):
            targets[device] = known
    return known


def _choose(target: Target, nbytes: int, method: str | None) -> Chosen:
    if method is not None and str(method) not in METHODS:
        raise BackendUnavailable(
            f"Expected method to be one of {', '.join(METHODS)}, or None for the best, got "
            f"{method!r}. Pass one of these."
        )

    def consider(method: str) -> tuple[str | None, Decision]:
        why_not = target.why_not(method, nbytes)
        if why_not is None:
            return method, Decision(method, True, HOLDS.get(method, "it takes any number of bytes"))
        return None, Decision(method, False, why_not)

    purpose = f"{nbytes} bytes to {target.device}"
    if method is not None:
        made, decision = consider(method)
        if made is None:
            best = select(_KIND, purpose, METHODS, consider).name
            raise unavailable(_KIND, purpose, [decision], method, best)
        return Chosen(method, "it was requested")
    selected = select(_KIND, purpose, METHODS, consider)
    reasons = dict.fromkeys(each.reason for each in selected.trace[:-1])
    return Chosen(selected.value, " and ".join(reasons) or selected.trace[-1].reason)


def _checked(
    out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the target if it fits, with its version raised; None: a new tensor, writable in and
    outside of inference mode."""
    if out is None:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return torch.empty(shape, dtype=dtype, device=device)
        return torch.empty(shape, dtype=dtype, device=device)
    if out.device != device:
        raise DeviceMismatch(
            f"Expected an out tensor on {device}, got one on {out.device}. Pass another tensor, or "
            f"leave the device out."
        )
    count = prod(shape)
    strided = out.layout == torch.strided and not out.is_nested
    if out.dtype != dtype or out.numel() != count or not strided or not out.is_contiguous():
        lies = f"strides {list(out.stride())}" if strided else "not strided"
        raise LayoutError(
            f"Expected a contiguous out tensor of {count} values of {dtype}, got {out.numel()} of "
            f"{out.dtype}, {lies}. Pass another tensor, or None."
        )
    increment_version(out)
    return out


def _count(number: Any, what: str) -> int:
    """Return the number of values or bytes; raise `LayoutError` if it is not one."""
    with suppress(TypeError):  # of a value that is not a whole number
        if 0 <= operator.index(number) < 1 << 48:
            return operator.index(number)
    raise LayoutError(f"Expected a small copy of 0 or more {what}, got {number!r}. Pass a count.")


# --- the values -----------------------------------------------------------------------------------


def _numpy_dtype(dtype: torch.dtype) -> NumpyDtype:
    """Return the numpy dtype of a dtype; raise `LayoutError` unless it is an integer dtype or
    bool."""
    if not isinstance(dtype, torch.dtype) or dtype not in NUMPY:
        raise LayoutError(
            f"Expected integers or bytes for a small copy ({', '.join(map(str, NUMPY))}), got "
            f"{dtype}. For other elements pass a tensor's bytes: tensor.view(torch.uint8)."
        )
    return NUMPY[dtype]


def _as_array(values: Values, wanted: NumpyDtype | None) -> Array:
    """Return values as an array of a dtype, in their own shape; a copy only if they have another
    dtype.

    ``wanted`` None: the array's or tensor's dtype, uint8 for bytes, int64 for other sequences.

    Raises:
        DeviceMismatch: a tensor that is not on the host.
        LayoutError: values without a length, elements that are not integers, or a value that the
            dtype cannot hold.
    """
    array: Array
    if isinstance(values, Tensor):
        array = _of_tensor(values)
    elif isinstance(values, ndarray):
        array = values
    elif isinstance(values, (bytes, bytearray, memoryview)):
        array = np.asarray(memoryview(values))
    elif isinstance(values, str) or not hasattr(values, "__len__"):
        raise LayoutError(
            f"Expected a list of integers, bytes, an array, or a tensor on the host for a small "
            f"copy, got {kind_of(values)}. Convert it to a list first."
        )
    else:
        wanted = wanted or NUMPY[torch.int64]
        array = _of_sequence(values, wanted)
    wanted = wanted or array.dtype.newbyteorder("=")
    if array.dtype == wanted and wanted in _TORCH:
        return array
    return _converted(array, wanted)


def _of_tensor(values: Tensor) -> Array:
    """Return a tensor on the host as an array; raise as `_as_array` does."""
    if values.layout != torch.strided or values.is_nested:
        layout = "nested" if values.is_nested else values.layout
        raise LayoutError(
            f"Expected a tensor with the layout torch.strided for a small copy, got {layout}. Call "
            f"to_dense() first."
        )
    if not values.is_cpu:
        raise DeviceMismatch(
            f"Expected values on the host for a small copy, got a tensor on {values.device}. Use "
            f"copy_ for tensors on a device."
        )
    _numpy_dtype(values.dtype)
    array: Array = values.numpy()
    return array


def _converted(array: Array, wanted: NumpyDtype) -> Array:
    """Return an array in another dtype; raise `LayoutError` for a value that it cannot hold."""
    if array.dtype.kind not in "iub" or wanted not in _TORCH:
        raise LayoutError(
            f"Expected an array of integers or bool for a small copy, got {array.dtype}. For other "
            f"elements pass the array's bytes: array.view('uint8')."
        )
    cast: Array = array.astype(wanted)
    same = cast == array  # a wrapped value differs by 256 or more, also as a float
    if not same.all():
        position = int(same.ravel().argmin())
        raise _wrong_value(array.ravel()[position], position, wanted)
    return cast


def _of_sequence(values: Sequence[int], wanted: NumpyDtype) -> Array:
    try:
        array: Array = np.asarray(values)
        if array.ndim == 1 and array.dtype.kind in "iub":
            return array
    except Exception:  # ragged, or elements that numpy cannot read: each is checked below
        pass
    # Numpy would make floats of integers with 2**63 among them, so they are converted one by one.
    numbers = []
    for position, value in enumerate(values):
        try:
            numbers.append(operator.index(value))
        except Exception:  # an element's own `__index__` may raise anything
            raise _wrong_value(kind_of(value), position, wanted) from None
        if numbers[-1] not in _bounds(wanted):
            raise _wrong_value(numbers[-1], position, wanted)
    return np.array(numbers, wanted)


def _bounds(wanted: NumpyDtype) -> range:
    """Return the integers that a dtype holds."""
    if wanted.kind == "b":
        return range(2)
    return range(int(np.iinfo(wanted).min), int(np.iinfo(wanted).max) + 1)


def _wrong_value(value: object, position: int, wanted: NumpyDtype) -> LayoutError:
    bounds = _bounds(wanted)
    return LayoutError(
        f"Expected integers from {bounds[0]} to {bounds[-1]} for a small copy to {_TORCH[wanted]}, "
        f"got {value} at position {position}. Correct the value or take a wider dtype."
    )
