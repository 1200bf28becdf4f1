# SPDX-License-Identifier: Apache-2.0
"""Small copies: integers or bytes from the host to a device, without a copy engine.

A copy engine ends what it has begun, whatever the streams' priorities: 64 integers wait behind a
gigabyte that was asked for earlier. What the driver takes along with a command does not,
and a kernel does not.

- ``inline``: up to 65,536 bytes that the CUDA driver takes along with the command to copy them. It
  needs no extra. Not in a graph, and not on a device that reads pageable memory by the host's page
  tables.
- ``value``: the integers travel in a launch's parameters, up to 32,736 bytes on an NVIDIA device
  (4,080 before CUDA 12.1 or compute capability 7.0). In a graph they are what they were at capture.
- ``mapped``: they are written to pinned memory that the kernel reads by itself; any size. In a
  graph they are read again at each replay, and `SmallCopy.refill` changes them.
- ``copy``: pinned memory and torch's non-blocking copy, which does take the copy engine: what is
  left where the others cannot be had; it captures like ``mapped``.
- ``host``: the target is the CPU; written at once.

The kernels of ``value`` and ``mapped`` need the extra ``cuda``. `choose` tells which way is taken,
and why: of those that can be had the first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from portakv.errors import BackendUnavailable, DeviceMismatch, LayoutError
from portakv.host import _small_inline as inline
from portakv.host import _small_kernel as kernel
from portakv.host._small_ways import (
    ByValue,
    OnHost,
    Ring,
    Way,
    cross_by_copy,
    cross_by_kernel,
    make_slot,
)
from portakv.host._values import Values, check_dtype, count_of, dtype_of, settle, shape_of
from portakv.runtime import _flight, capture
from portakv.runtime import cuda as _cuda_driver

WAYS = ("inline", "value", "mapped", "copy", "host")  # the best first

# What limits a way's bytes.
_HOLDS = {
    "inline": "the driver takes up to {} bytes along with the command",
    "value": "a launch's parameters hold up to {} bytes",
}
# Sends that no capture takes, by the way that was asked for.
_UNCAPTURED = {None: "whose way was left open", "inline": "by way='inline'"}


class Chosen(NamedTuple):
    """A way, and why it was chosen, as a phrase."""

    way: str
    why: str


def choose(nbytes: int, device: torch.device | str, way: str | None = None) -> Chosen:
    """The way that so many bytes take to a device.

    Args:
        nbytes: of the values.
        device: where they go.
        way: one that is asked for; None: the best.

    Raises:
        BackendUnavailable: a way that is unknown, or that this device or size does not allow.
    """
    place = _flight.resolve(device)
    if way is None:
        return _best(place, nbytes)
    if way not in WAYS:
        raise BackendUnavailable(
            f"A small copy by {way!r} was asked; expected one of {', '.join(WAYS)}, or None for "
            f"the best."
        )
    why = _why_not(way, place, nbytes)
    if why is not None:
        raise BackendUnavailable(
            f"A small copy of {nbytes} bytes to {place} by {way!r} was asked, but {why}; ask for "
            f"{_best(place, nbytes).way!r}, or for None."
        )
    return Chosen(way, "it was asked for")


def to_device(
    values: Values,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    out: torch.Tensor | None = None,
    stream: torch.Stream | None = None,
    way: str | None = None,
) -> torch.Tensor:
    """Values of the host as a tensor on a device; the host does not wait.

    Args:
        values: integers, bytes, a numpy array, or a tensor on the host; read before this returns.
        device: where to; None: that of ``out``.
        dtype: an integer dtype or bool; None: that of ``out``, else of the array or tensor, uint8
            for bytes, int64 for other sequences.
        out: contiguous, of as many elements, written and returned; None: a new tensor with the
            shape of ``values``.
        stream: where to order it, behind what the current stream holds by now; whoever reads the
            result on another stream waits for this one. None: the current stream.
        way: see the module; None: the best. A graph capture takes only ``"value"``, by name, since
            the contents are then fixed; `SmallCopy` captures contents that change.

    Raises:
        LayoutError: values that the dtype cannot hold; an ``out`` that does not fit.
        DeviceMismatch: values on a device; an ``out`` or a stream of another device.
        BackendUnavailable: a way that cannot be had, with the reason.
        Unsupported: inside graph capture, anything but ``"value"``.
    """
    settled = settle(values)
    place = _place(device, out)
    dtype = dtype or (dtype_of(settled) if out is None else out.dtype)
    check_dtype(dtype)
    if stream is not None:
        _flight.check_stream(stream, place)
    count = count_of(settled)
    if out is not None:
        _check_out(out, count, dtype, place)
    nbytes = count * dtype.itemsize
    first, most = _first(place)
    chosen = first if way is None and nbytes <= most else choose(nbytes, place, way).way
    captures = _capture_question(place)()
    if captures and way != "value":
        raise _flight.refuse_capture(
            "A small copy by to_device",
            "say way='value' if its contents may be fixed at capture; use SmallCopy with "
            "way='mapped' for contents that are read at each replay",
        )
    target = torch.empty(shape_of(settled), dtype=dtype, device=place) if out is None else out
    if stream is not None:
        _flight.follow_current(stream, *(() if captures else (target,)))
    if chosen == "inline":
        carried = inline.MOST // dtype.itemsize
        _inline(place, dtype, carried).send(settled, target, stream, captures)
    elif chosen == "value":
        carried = kernel.capacity_for(nbytes) // dtype.itemsize
        _by_value(place, dtype, carried).send(settled, target, stream, captures)
    elif chosen == "host":
        OnHost(dtype, count).send(settled, target, stream, captures)
    elif count:
        _send_once(chosen, settled, target, stream)
    return target


class SmallCopy:
    """A small copy that is made again and again, with everything but the values ready.

    Args:
        n: the most values of one send.
        dtype: an integer dtype or bool.
        device: where they go.
        out: contiguous, ``n`` elements, written by every send; None: a tensor of its own.
        way: see the module; None: the best. To capture sends into a graph, name it: the contents
            are fixed at capture by ``"value"``, and read at each replay by ``"mapped"`` (or
            ``"copy"``); ``"inline"`` is not captured.

    Attributes:
        out: the target.
        way, why: the way that was taken, and why.

    One `SmallCopy` may be used from several threads; they share ``out``.

    Raises as `to_device` does.
    """

    def __init__(
        self,
        n: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        *,
        out: torch.Tensor | None = None,
        way: str | None = None,
    ) -> None:
        check_dtype(dtype)
        if n < 0:
            raise LayoutError(f"A SmallCopy of {n} values was asked; expected 0 or more values.")
        place = _place(device, out)
        if out is not None:
            _check_out(out, n, dtype, place)
        self.way, self.why = choose(n * dtype.itemsize, place, way)
        self._n, self._device = n, place
        self._uncaptured = _UNCAPTURED.get(way)
        self._captures = _capture_question(place)
        self._way = _make(self.way, place, dtype, n)
        self.out = torch.empty(n, dtype=dtype, device=place) if out is None else out

    def send(self, values: Values, *, stream: torch.Stream | None = None) -> torch.Tensor:
        """Write values to the beginning of ``out``; the host does not wait, as a rule.

        It waits only for pinned memory: by ``mapped`` and ``copy``, once 16 sends are under way.

        Args:
            values: ``n`` or fewer, as in `to_device`; read before this returns.
            stream: as in `to_device`.

        Returns:
            ``out``, or of its elements in a row as many as there are values.

        Inside a graph capture, see ``way`` above. All captured sends of one `SmallCopy` read the
        same memory, so they carry equally many values.
        """
        captures = self._captures()
        if captures and self._uncaptured is not None:
            raise _flight.refuse_capture(
                f"A send of a SmallCopy {self._uncaptured}",
                "make it with way='value' for contents that are fixed at capture, or with "
                "way='mapped' for contents that are read at each replay",
            )
        out = self.out
        if stream is not None:
            _flight.check_stream(stream, self._device)
            _flight.follow_current(stream, *(() if captures else (out,)))
        count = self._way.send(values, out, stream, captures)
        return out if count == self._n else out.view(-1)[:count]

    def refill(self, values: Values) -> None:
        """Change what the captured send carries from the next replay on.

        The graph reads the memory while it runs: wait for the last replay to end first, and
        refill before the next one starts.

        Raises:
            Unsupported: by ``value``, whose contents are fixed, or ``inline``; or nothing was
                captured.
            LayoutError: another number of values than was captured.
        """
        self._way.refill(values)


def _best(device: torch.device, nbytes: int) -> Chosen:
    """The first way that can be had, and what keeps those before it from being taken."""
    missing: dict[str, None] = {}
    for way in WAYS:
        why = _why_not(way, device, nbytes)
        if why is None:
            return Chosen(way, " and ".join(missing) or _HOLDS[way].format(_most(way, device)))
        missing[why] = None
    raise AssertionError("either 'copy' or 'host' can be had")


def _why_not(way: str, device: torch.device, nbytes: int) -> str | None:
    """What keeps so many bytes from going a way, as a phrase; None: nothing."""
    if device.type == "cpu":
        return None if way == "host" else "the target is on the CPU"
    if way == "host":
        return f"{device} is no CPU"
    if way == "copy":
        return None
    why = inline.why_not(device) if way == "inline" else _no_kernels(device)
    if why is None and nbytes > _most(way, device):
        return _HOLDS[way].format(_most(way, device))
    return why


def _most(way: str, device: torch.device) -> int:
    """The most bytes that go a way, where it can be had."""
    if way == "inline":
        return inline.MOST
    return _most_by_value(device) if way == "value" else sys.maxsize


@cache
def _first(device: torch.device) -> tuple[str, int]:
    """The way of the fewest bytes where nothing else was asked for, and the most it carries."""
    way = _best(device, 0).way
    return way, _most(way, device)


def _no_kernels(device: torch.device) -> str | None:
    return _cuda_driver.why_not(device) or _unknown_to_compiler(device)


@cache
def _most_by_value(device: torch.device) -> int:
    limit = kernel.parameter_limit(_cuda_driver.driver_version(), _cuda_driver.capability(device))
    return kernel.capacities(limit)[-1]


@cache
def _unknown_to_compiler(device: torch.device) -> str | None:
    try:
        _cuda_driver.compiler_target(device)
    except RuntimeError as error:
        return str(error)
    return None


def _make(way: str, device: torch.device, dtype: torch.dtype, most: int) -> Way:
    if way == "inline":
        return inline.Inline(device, dtype, most)
    if way == "value":
        return ByValue(device, dtype, most)
    if way == "host":
        return OnHost(dtype, most)
    return Ring(device, dtype, most, cross_by_kernel(device) if way == "mapped" else cross_by_copy)


@cache
def _capture_question(device: torch.device) -> Callable[[], bool]:
    """`capture.capturing` of one device, with less to look up."""
    if device.type != "cuda":
        return lambda: capture.capturing(device)
    captures = capture.capture_question(device)
    if torch.cuda.device_count() == 1:
        return captures
    index, current = device.index, torch._C._cuda_getDevice
    return lambda: captures() if current() == index else capture.capturing(device)


# What `to_device` keeps ready: one for each dtype and device, and kernel of it.
_inline = cache(inline.Inline)
_by_value = cache(ByValue)
_by_kernel = cache(cross_by_kernel)


def _send_once(
    way: str, settled: Values, target: torch.Tensor, stream: torch.Stream | None
) -> None:
    """Through pinned memory that is let go once it was read."""
    device = target.device
    slot = make_slot(target.dtype, target.numel())
    nbytes = slot.room.fill(settled) * target.element_size()
    cross = _by_kernel(device) if way == "mapped" else cross_by_copy
    cross(target, slot, nbytes, stream)
    _flight.completion(device, stream, slot.memory)


@cache
def _lasting(device: torch.device | str) -> torch.device | None:
    """`_flight.resolve` of what means the same device whichever is current; None for others."""
    try:
        found = torch.device(device)
    except RuntimeError:  # of a vendor's, perhaps, which has to be imported
        return None
    return _flight.resolve(found) if found.type == "cpu" or found.index is not None else None


def _place(device: torch.device | str | None, out: torch.Tensor | None) -> torch.device:
    if device is not None:
        return _lasting(device) or _flight.resolve(device)
    if out is None:
        raise DeviceMismatch(
            "A small copy was asked with neither a device nor an out tensor; expected one of them "
            "to say where the values go."
        )
    return out.device


def _check_out(out: torch.Tensor, count: int, dtype: torch.dtype, device: torch.device) -> None:
    if out.device != device:
        raise DeviceMismatch(
            f"A small copy to {device} was given an out tensor on {out.device}; expected one on "
            f"{device}. Pass another, or leave the device away."
        )
    if out.dtype != dtype or out.numel() != count or not out.is_contiguous():
        raise LayoutError(
            f"A small copy of {count} values of {dtype} was given an out tensor of {out.numel()} "
            f"of {out.dtype}, strides {list(out.stride())}; expected as many of that dtype, "
            f"contiguous. Pass another, or none."
        )
