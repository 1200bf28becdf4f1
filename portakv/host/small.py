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

import operator
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy import ndarray
from torch import Stream, Tensor
from torch.autograd.graph import increment_version

from portakv.arguments import kind_of
from portakv.errors import BackendUnavailable, DeviceMismatch, LayoutError, Unsupported
from portakv.host._small_methods import (
    HOLDS,
    METHODS,
    NUMPY,
    Array,
    NumpyDtype,
    ReadLater,
    Slot,
    Target,
    by_copy,
)
from portakv.runtime import streams
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import refuse_capture, resolve
from portakv.selection import Decision, Kind, select, unavailable

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
