# SPDX-License-Identifier: Apache-2.0
"""Small copies: integers or bytes from the host to a device, without a copy engine.

A copy engine ends what it has begun, whatever the streams' priorities: 1,000 integers wait behind
a gigabyte that was asked for earlier. What the driver takes along with a command does not, and a
kernel does not. The first way is taken that can be had; `choose` tells which, and why:

- ``inline``: up to 65,536 bytes that the CUDA driver takes along with the command to copy them. Not
  in a graph, and not on a device that reads pageable memory by the host's page tables.
- ``value`` (extra ``cuda``): up to 32,736 bytes in a launch's parameters. In a graph they are what
  they were at capture.
- ``mapped`` (extra ``cuda``): a kernel reads pinned memory; any size. In a graph it is read again
  at each replay, and `SmallCopy.refill` changes it.
- ``copy``: by the copy engine, from pinned memory; captured like ``mapped``.
- ``host``: to the CPU, at once.
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

from portakv.errors import BackendUnavailable, DeviceMismatch, LayoutError, Unsupported
from portakv.host._small_methods import HOLDS, NUMPY, WAYS, Array, ReadLater, Slot, Target, by_copy
from portakv.runtime import streams
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import refuse_capture, resolve

#: What small copies take: integers, bytes, a numpy array, or a tensor on the host.
Values = Sequence[int] | bytes | bytearray | memoryview | Array | Tensor

_TORCH: dict[np.dtype[Any], torch.dtype] = {own: dtype for dtype, own in NUMPY.items()}
_NO_REFILL = {  # ways by which nothing is refilled, and why
    "host": "there are no graphs; send the values again",
    "inline": "it cannot be captured; make it with way='mapped', or send instead of refill",
    "value": "its contents were fixed when it was captured; make it with way='mapped'",
}


class Chosen(NamedTuple):
    """A way, and why it was chosen, as a phrase."""

    way: str
    why: str


def choose(nbytes: int, device: torch.device | str, way: str | None = None) -> Chosen:
    """The way that so many bytes of values take to a device; ``way``: one that is asked for. Raises
    `BackendUnavailable` for one that is unknown, or that this device or size does not allow."""
    return _choose(_target(resolve(device), None), _count(nbytes, "bytes"), way)


def to_device(
    values: Values,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    out: Tensor | None = None,
    stream: Stream | None = None,
    way: str | None = None,
) -> Tensor:
    """Values of the host as a tensor on a device; the host does not wait.

    Args:
        values: integers, bytes, a numpy array, or a tensor on the host; read before this returns.
        device: where to; None: that of ``out``.
        dtype: an integer dtype or bool; None: that of ``out``, else of the array or tensor, uint8
            for bytes, int64 for other sequences.
        out: contiguous, of as many elements, written and returned; None: a new tensor with the
            shape of ``values``.
        stream: where to order it, behind what the current stream holds by now; a reader of the
            result on another stream has to wait for this one. None: the current stream.
        way: see the module; None: the best. A graph capture takes only ``"value"``, by name.

    Raises:
        LayoutError: values that the dtype cannot hold; an ``out`` that does not fit.
        DeviceMismatch: values on a device; an ``out`` or a stream of another device.
        BackendUnavailable: a way that cannot be had, with the reason.
        Unsupported: inside graph capture, anything but ``"value"``.
    """
    target = _target(device, out)
    place = target.device
    dtype = out.dtype if dtype is None and out is not None else dtype
    array = _as_array(values, None if dtype is None else _numpy_dtype(dtype))
    dtype = _TORCH[array.dtype] if dtype is None else dtype
    if stream is not None:
        streams.check_stream(stream, place)
    best = way is None and array.nbytes <= target.most
    chosen = target.first if best else _choose(target, array.nbytes, way).way
    captured = target.captures()
    if captured and way != "value":
        raise refuse_capture(
            "A small copy by to_device",
            "say way='value' if its contents may be fixed at capture; use SmallCopy with "
            "way='mapped' for contents that are read at each replay",
        )
    into = _checked(out, array.shape, dtype, place)
    if stream is not None:
        streams.follow_current(stream, *(() if captured else (into,)))
    if chosen not in ("mapped", "copy"):
        send = target.ready.get((chosen, dtype)) or target.prepare(chosen, dtype)
        send(array, into, stream, captured)
    elif array.size:
        slot = Slot(NUMPY[dtype], array.size)
        slot.room[...] = array.reshape(-1)
        issue = by_copy if chosen == "copy" else target.kernels.mapped
        issue(into, slot, array.nbytes, stream)
        streams.completion(place, stream, slot.memory)  # holds the slot until it was read
    return into


class SmallCopy:
    """A small copy that is made again and again, with everything but the values ready; from several
    threads, if they may share ``out``.

    Args:
        n: the most values of one send.
        dtype: an integer dtype or bool.
        device: where they go.
        out: contiguous, ``n`` elements, written by every send; None: a tensor of its own.
        way: see the module; None: the best. To capture sends into a graph, name one that can be.

    Attributes:
        out: the target.
        way, why: the way that was taken, and why.

    Raises as `to_device` does.
    """

    def __init__(
        self,
        n: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        *,
        out: Tensor | None = None,
        way: str | None = None,
    ) -> None:
        self._own = _numpy_dtype(dtype)
        n = _count(n, "values")
        target = _target(device, out)
        self._n = n
        self._device = target.device
        self._captures = target.captures
        self.way, self.why = _choose(target, n * dtype.itemsize, way)
        self._uncaptured = {None: "whose way was left open", "inline": "by way='inline'"}.get(way)
        self._send = target.make(self.way, dtype, n)
        self.out = _checked(out, (n,), dtype, target.device)

    def send(self, values: Values, *, stream: Stream | None = None) -> Tensor:
        """Write up to ``n`` values to the beginning of ``out``; ``values`` and ``stream`` are as in
        `to_device`. Returns ``out``, or of its elements in a row as many as there are values.

        The host waits only by ``mapped`` and ``copy``, once 16 sends are under way. All sends that
        graphs capture read the same memory, and so carry equally many values.
        """
        captures = self._captures()
        if captures and self._uncaptured is not None:
            raise refuse_capture(
                f"A send of a SmallCopy {self._uncaptured}",
                "make it with way='value' for contents that are fixed at capture, or with "
                "way='mapped' for contents that are read at each replay",
            )
        array: Any = values
        if type(array) is not ndarray or array.dtype is not self._own:
            array = _as_array(values, self._own)
        out = self.out
        count = array.size
        most = self._n
        if count > most:
            raise LayoutError(
                f"{count} values of {out.dtype} were sent by a small copy made for {most}; "
                f"expected no more. Make one for the most that occur."
            )
        if stream is not None:
            streams.check_stream(stream, self._device)
            streams.follow_current(stream, *(() if captures else (out,)))
        self._send(array, out, stream, captures)
        return out if count == most else out.view(-1)[:count]

    def refill(self, values: Values) -> None:
        """Change what captured sends carry from the next replay on, as many values as they had. The
        graph reads the memory while it runs: refill between the end of a replay and the next.

        Raises `Unsupported` by ``value``, whose contents are fixed, or ``inline``, or if nothing
        was captured; `LayoutError` for another number of values.
        """
        if not isinstance(self._send, ReadLater):
            raise Unsupported(f"Refilling a small copy by {self.way!r}", _NO_REFILL[self.way])
        self._send.refill(_as_array(values, self._own))


# --- the target -----------------------------------------------------------------------------------

targets: Bounded[torch.device | str | int, Target] = Bounded("small copies' targets", 64)


def _target(device: torch.device | str | int | None, out: Tensor | None) -> Target:
    """What is known of a device, by the device or its name."""
    if out is not None and not isinstance(out, Tensor):
        raise LayoutError(
            f"A small copy was given a {type(out).__name__} as out; expected a tensor. Pass one, "
            f"or none."
        )
    if device is None:
        if out is None:
            raise DeviceMismatch(
                "A small copy was asked with neither a device nor an out tensor; expected one of "
                "them to say where the values go."
            )
        device = out.device
    try:
        known = targets.get(device)
    except (TypeError, ValueError):  # it has no hash; `resolve` says that it is no device
        known = None
    if known is None:
        place = resolve(device)
        known = targets.get_or_make(place, lambda: Target(place))
        # A name without a number means the current device, which another call may have changed.
        if place.type == "cpu" or str(device) == str(place):
            targets[device] = known
    return known


def _choose(target: Target, nbytes: int, way: str | None) -> Chosen:
    best = next(each for each in WAYS if target.why_not(each, nbytes) is None)
    if way is None:
        better = WAYS[: WAYS.index(best)]
        lacks = dict.fromkeys(str(target.why_not(each, nbytes)) for each in better)
        return Chosen(best, " and ".join(lacks) or HOLDS[best])
    if str(way) not in WAYS:
        raise BackendUnavailable(
            f"A small copy by {way!r} was asked; expected one of {', '.join(WAYS)}, or None for "
            f"the best."
        )
    why = target.why_not(way, nbytes)
    if why is not None:
        raise BackendUnavailable(
            f"A small copy of {nbytes} bytes to {target.device} by {way!r} was asked, but {why}; "
            f"ask for {best!r}, or for None."
        )
    return Chosen(way, "it was asked for")


def _checked(
    out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The target if it fits; None: a new one, to be written to in and outside of inference mode."""
    if out is None:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return torch.empty(shape, dtype=dtype, device=device)
        return torch.empty(shape, dtype=dtype, device=device)
    if out.device != device:
        raise DeviceMismatch(
            f"A small copy to {device} was given an out tensor on {out.device}; expected one on "
            f"{device}. Pass another, or leave the device away."
        )
    count = prod(shape)
    strided = out.layout == torch.strided and not out.is_nested
    if out.dtype != dtype or out.numel() != count or not strided or not out.is_contiguous():
        lies = f"strides {list(out.stride())}" if strided else "not strided"
        raise LayoutError(
            f"A small copy of {count} values of {dtype} was given an out tensor of {out.numel()} "
            f"of {out.dtype}, {lies}; expected as many, contiguous. Pass another, or none."
        )
    return out


def _count(number: Any, what: str) -> int:
    """How many values or bytes; raises `LayoutError` for what cannot be a number of these."""
    with suppress(TypeError):
        if 0 <= operator.index(number) < 1 << 48:
            return operator.index(number)
    raise LayoutError(f"A small copy of {number!r} {what} was asked; expected 0 or more of them.")


# --- the values -----------------------------------------------------------------------------------


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """What numpy calls a dtype; raises `LayoutError` for anything but an integer dtype or bool."""
    if not isinstance(dtype, torch.dtype) or dtype not in NUMPY:
        raise LayoutError(
            f"A small copy of {dtype} was asked; it carries integers and bytes: "
            f"{', '.join(map(str, NUMPY))}. For other elements pass a tensor's bytes: "
            f"tensor.view(torch.uint8)."
        )
    return NUMPY[dtype]


def _as_array(values: Values, wanted: np.dtype[Any] | None) -> Array:
    """Values as an array of a dtype, in their own shape; a copy only if they have another dtype.
    None: the array's or tensor's own, uint8 for bytes, int64 for other sequences.

    Raises:
        DeviceMismatch: a tensor that is not on the host.
        LayoutError: something that has no length, elements that are no integers, or a value that
            the dtype cannot hold.
    """
    array: Array
    if isinstance(values, Tensor):
        if values.layout != torch.strided or values.is_nested:
            layout = "nested" if values.is_nested else values.layout
            raise LayoutError(
                f"A small copy was asked of a tensor with the layout {layout}; expected "
                f"torch.strided. Call to_dense() first."
            )
        if not values.is_cpu:
            raise DeviceMismatch(
                f"A small copy was asked of a tensor on {values.device}; expected values on the "
                f"host. Use copy_ for what is on a device."
            )
        _numpy_dtype(values.dtype)
        array = values.numpy()
    elif isinstance(values, ndarray):
        array = values
    elif isinstance(values, (bytes, bytearray, memoryview)):
        array = np.asarray(memoryview(values))
    elif isinstance(values, str) or not hasattr(values, "__len__"):
        raise LayoutError(
            f"A small copy was asked of a {type(values).__name__}; expected a list of integers, "
            f"bytes, an array, or a tensor on the host. Make a list of it first."
        )
    else:
        wanted = wanted or NUMPY[torch.int64]
        array = _of_sequence(values, wanted)
    wanted = wanted or array.dtype.newbyteorder("=")
    if array.dtype == wanted and wanted in _TORCH:
        return array
    if array.dtype.kind not in "iub" or wanted not in _TORCH:
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
        f"A small copy to {_TORCH[wanted]} was asked of values with {found} at position "
        f"{position}; expected integers from {_bounds(wanted)[0]} to {_bounds(wanted)[-1]}. "
        f"Correct the value or take a wider dtype."
    )
