# SPDX-License-Identifier: Apache-2.0
"""Small copies: integers or bytes from the host to a device, without a copy engine.

A copy engine ends its current copy, whatever the streams' priorities: 1,000 integers wait for a
gigabyte that was enqueued earlier. Values that the CUDA driver takes along with its commands do not
wait. They go to devices that have an `inline_copy`, up to `MOST_INLINE` bytes. Other values go
through pinned memory, by the copy engine.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import operator
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy import ndarray
from torch import Stream, Tensor
from torch.autograd.graph import increment_version

from portakv.arguments import kind_of
from portakv.errors import DeviceMismatch, LayoutError
from portakv.runtime import cuda, streams
from portakv.runtime.devices import capturing, inside, refuse_capture, resolve

#: The bytes that the driver takes along with one command.
COMMAND_BYTES = 65536
#: The most bytes that go along with commands: 16 of them.
MOST_INLINE = 1 << 20

Array = npt.NDArray[Any]
NumpyDtype = np.dtype[Any]
#: The values that small copies take: integers, bytes, a numpy array, or a tensor on the host.
Values = Sequence[int] | bytes | bytearray | memoryview | Array | Tensor

_NAMES = "bool uint8 int8 int16 uint16 int32 uint32 int64 uint64"
#: The numpy dtypes of the supported dtypes, and the reverse.
_NUMPY = {getattr(torch, name): np.dtype(name) for name in _NAMES.split()}
_TORCH = {own: dtype for dtype, own in _NUMPY.items()}


def to_device(
    values: Values,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    out: Tensor | None = None,
    stream: Stream | None = None,
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

    Raises:
        LayoutError: values that the dtype cannot hold; an ``out`` that does not fit.
        DeviceMismatch: values on a device; an ``out`` or a stream of another device.
        BackendUnavailable: there is no such device.
        Unsupported: inside graph capture.
    """
    target = _target(device, out)
    if dtype is None and out is not None:
        dtype = out.dtype
    array = _as_array(values, None if dtype is None else _numpy_dtype(dtype))
    if stream is not None:
        streams.check_stream(stream, target)
    if capturing(target):
        raise refuse_capture(
            "A small copy by to_device",
            "make it before the capture, or capture a copy_ from pinned memory, which each replay "
            "reads",
        )
    into = _checked(out, array.shape, _TORCH[array.dtype], target)
    streams.follow_current(stream, into)

    flat = array.reshape(-1)
    if target.type == "cpu":
        into.view(-1).numpy()[...] = flat
    elif flat.size:
        inline = inline_copy(target) if flat.nbytes <= MOST_INLINE else None
        if inline is not None:
            inline.send(flat, into, stream)
            return into
        # The copy engine comes to it after everything that it has to move before.
        memory = torch.empty(flat.nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        memory.numpy().view(flat.dtype)[...] = flat
        with inside(stream), torch.inference_mode(into.is_inference()):
            into.view(-1).view(torch.uint8).copy_(memory, non_blocking=True)
        streams.completion(target, stream, memory)  # retains the memory until it was read
    return into


# --- the methods ----------------------------------------------------------------------------------

_ADDRESS = ctypes.c_uint64  # a CUdeviceptr, and the host's address of memory or a stream
_HOST_PAGE_TABLES = 100  # CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES


@cache
def inline_copy(device: torch.device) -> InlineCopy | None:
    """Return the copy in the driver's commands to a device; None if the device has none.

    A device that reads pageable memory directly has none: it may read after the call, which was not
    tested.
    """
    if cuda.no_cuda(device) is not None:
        return None
    number = ctypes.c_int
    pointer = ctypes.POINTER(number)
    try:
        library = cuda.library()
        find = cuda.function(library, "cuDeviceGet", pointer, number)
        ask = cuda.function(library, "cuDeviceGetAttribute", pointer, number, number)
        made = InlineCopy(device, library)
    except (OSError, AttributeError):  # there is no driver, or it lacks a function
        return None
    cuda.adopt(device)  # the driver answers once it has been initialised
    ordinal = number()
    reads = number()
    error = find(ctypes.byref(ordinal), device.index)
    error = error or ask(ctypes.byref(reads), _HOST_PAGE_TABLES, ordinal)
    return None if error or reads.value else made


class InlineCopy(cuda.Caller):
    """Copy in the driver's commands: the values have left the host's memory when a call returns."""

    def __init__(self, device: torch.device, library: ctypes.CDLL) -> None:
        super().__init__(device)
        arguments = _ADDRESS, _ADDRESS, ctypes.c_size_t, _ADDRESS
        self._copy = cuda.function(library, "cuMemcpyHtoDAsync_v2", *arguments)
        self._pages = _Pages(device)

    def send(self, array: Array, out: Tensor, stream: Stream | None) -> None:
        """Write an array of one axis to the beginning of a contiguous tensor of its dtype.

        Raises:
            TransferError: the driver rejected a command.
            Unsupported: this process was forked from the one that sent first.
        """
        handle = self.number(stream)
        if handle is None:
            with self.current():
                self.send(array, out, stream)
            return
        pages = self._pages
        room = pages.bytes.view(array.dtype)
        dst = out.data_ptr()
        for first in range(0, array.size, room.size):
            part = array[first : first + room.size]
            room[: part.size] = part
            error = self._copy(dst + first * room.itemsize, pages.address, part.nbytes, handle)
            if error:
                name = cuda.error_name(error, cuda.library())
                raise cuda.refused(name, f"A copy of {array.size} values")


class _Pages(threading.local):
    """Pageable memory for the values of one command, for each thread.

    The caller's memory may be pinned, and would be read after the call returns. So would these
    pages if a caller registered them together with other memory: they are whole pages, off the
    heap.
    """

    def __init__(self, device: torch.device) -> None:
        cuda.adopt(device)  # a new thread has no context yet
        pages = mmap.mmap(-1, COMMAND_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.bytes = np.frombuffer(pages, np.uint8)
        self.address = self.bytes.ctypes.data


# --- the target -----------------------------------------------------------------------------------


def _target(device: torch.device | str | None, out: Tensor | None) -> torch.device:
    """Return the device of a small copy, with its index."""
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
        return out.device
    return resolve(device)


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
    count = math.prod(shape)
    strided = out.layout == torch.strided and not out.is_nested
    if out.dtype != dtype or out.numel() != count or not strided or not out.is_contiguous():
        lies = f"strides {list(out.stride())}" if strided else "not strided"
        raise LayoutError(
            f"Expected a contiguous out tensor of {count} values of {dtype}, got {out.numel()} of "
            f"{out.dtype}, {lies}. Pass another tensor, or None."
        )
    increment_version(out)
    return out


# --- the values -----------------------------------------------------------------------------------


def _numpy_dtype(dtype: torch.dtype) -> NumpyDtype:
    """Return the numpy dtype of a dtype; raise `LayoutError` unless it is an integer dtype or
    bool."""
    if not isinstance(dtype, torch.dtype) or dtype not in _NUMPY:
        raise LayoutError(
            f"Expected integers or bytes for a small copy ({', '.join(map(str, _NUMPY))}), got "
            f"{dtype}. For other elements pass a tensor's bytes: tensor.view(torch.uint8)."
        )
    return _NUMPY[dtype]


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
        wanted = wanted or _NUMPY[torch.int64]
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
