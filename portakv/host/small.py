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
  left if the others cannot be had; it captures like ``mapped``.
- ``host``: the target is the CPU; written at once.

The kernels of ``value`` and ``mapped`` need the extra ``cuda``. `choose` tells which way is taken,
and why: of those that can be had the first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch

from portakv.errors import BackendUnavailable, DeviceMismatch, LayoutError
from portakv.host import _small_ways as ways
from portakv.host._small_ways import TORCH_DTYPES, Values, Way, as_array, numpy_dtype
from portakv.runtime import cuda as _cuda_driver
from portakv.runtime import streams
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import capture_question, capturing, refuse_capture, resolve

#: The best first.
WAYS: dict[str, type[Way]] = {
    "inline": ways.Inline, "value": ways.ByValue, "mapped": ways.Mapped, "copy": ways.Copy,
    "host": ways.OnHost,
}  # fmt: skip

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
    place = resolve(device)
    if way is None:
        return _best(place, nbytes)
    if way not in [*WAYS]:
        raise BackendUnavailable(
            f"A small copy by {way!r} was asked; expected one of {', '.join(WAYS)}, or None for "
            f"the best."
        )
    if (why := _why_not(way, place, nbytes)) is not None:
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
        stream: where to order it, behind what the current stream holds by now; a reader of the
            result on another stream has to wait for this one. None: the current stream.
        way: see the module; None: the best. A graph capture takes only ``"value"``, by name, since
            the contents are then fixed; `SmallCopy` captures contents that change.

    Raises:
        LayoutError: values that the dtype cannot hold; an ``out`` that does not fit.
        DeviceMismatch: values on a device; an ``out`` or a stream of another device.
        BackendUnavailable: a way that cannot be had, with the reason.
        Unsupported: inside graph capture, anything but ``"value"``.
    """
    place, first, most, captures = _target(device, out)
    if out is not None:
        dtype = dtype or out.dtype
    array = as_array(values, None if dtype is None else numpy_dtype(dtype))
    dtype = dtype or TORCH_DTYPES[array.dtype]
    if stream is not None:
        streams.check_stream(stream, place)
    if out is not None:
        _check_out(out, array.size, dtype, place)
    chosen = first if way is None and array.nbytes <= most else choose(array.nbytes, place, way)[0]
    captured = captures()
    if captured and way != "value":
        raise refuse_capture(
            "A small copy by to_device",
            "say way='value' if its contents may be fixed at capture; use SmallCopy with "
            "way='mapped' for contents that are read at each replay",
        )
    target = _new(array.shape, dtype, place) if out is None else out
    if stream is not None:
        streams.follow_current(stream, *(() if captured else (target,)))
    if chosen in ("inline", "value", "host"):
        _ready(chosen, place, dtype).send(array, target, stream, captured)
    elif array.size:
        slot = ways.make_slot(dtype, array.size)
        ways.fill(slot.room, array)
        issue = ways.Mapped.issues(place) if chosen == "mapped" else ways.by_copy
        issue(target, slot, array.nbytes, stream)
        streams.completion(place, stream, slot.memory)  # holds the slot until it was read
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
        numpy_dtype(dtype)
        if not isinstance(n, int) or n < 0:
            raise LayoutError(f"A SmallCopy of {n!r} values was asked; expected 0 or more values.")
        place, _, _, self._captures = _target(device, out)
        if out is not None:
            _check_out(out, n, dtype, place)
        self.way, self.why = choose(n * dtype.itemsize, place, way)
        self._n, self._device = n, place
        self._uncaptured = _UNCAPTURED.get(way)
        self._way = WAYS[self.way](place, dtype, n)
        self.out = _new((n,), dtype, place) if out is None else out

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
            raise refuse_capture(
                f"A send of a SmallCopy {self._uncaptured}",
                "make it with way='value' for contents that are fixed at capture, or with "
                "way='mapped' for contents that are read at each replay",
            )
        out = self.out
        if stream is not None:
            streams.check_stream(stream, self._device)
            streams.follow_current(stream, *(() if captures else (out,)))
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
            return Chosen(way, " and ".join(missing) or _holds(way, device))
        missing[why] = None
    raise AssertionError("either 'copy' or 'host' can be had")


def _why_not(way: str, device: torch.device, nbytes: int) -> str | None:
    """What keeps so many bytes from going a way, as a phrase; None: nothing."""
    if (device.type == "cpu") != (way == "host"):
        return f"{device} is no CPU" if way == "host" else "the target is on the CPU"
    if way in ("copy", "host"):
        return None
    if way == "inline":
        why = ways.why_not_inline(device)
    else:
        why = _cuda_driver.why_not(device) or _cuda_driver.device_too_old(device)
    return _holds(way, device) if why is None and nbytes > _most(way, device) else why


def _most(way: str, device: torch.device) -> int:
    """The most bytes that go a way, if it can be had."""
    if way == "inline":
        return ways.INLINE_BYTES
    return ways.value_bytes(device) if way == "value" else sys.maxsize


def _holds(way: str, device: torch.device) -> str:
    return _HOLDS[way].format(_most(way, device))


class _Target(NamedTuple):
    """A device that values go to."""

    device: torch.device  # with its index
    first: str  # the way of the fewest bytes if no other was asked for
    most: int  # bytes that it carries
    captures: Callable[[], bool]  # tells if the device's current stream is being captured


# What calls keep ready: targets by device or its name, one sender for each way, device and dtype.
_targets: Bounded[torch.device | str | int, _Target] = Bounded("small copies' targets", 64)
_senders: Bounded[tuple[str, torch.device, torch.dtype], Way] = Bounded("small copies", 128)


def _target(device: torch.device | str | int | None, out: torch.Tensor | None) -> _Target:
    if out is not None and not isinstance(out, torch.Tensor):
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
    known = _targets.get(device)
    if known is None:
        place = resolve(device)
        way = _best(place, 0).way
        made = _Target(place, way, _most(way, place), _capture_question(place))
        known = _targets.setdefault(place, made)
        # A name without a number means the current device, which another call may have changed.
        if place.type == "cpu" or str(device) == str(place):
            _targets[device] = known
    return known


def _capture_question(device: torch.device) -> Callable[[], bool]:
    """`capturing` of one device, with less to look up."""
    if device.type != "cuda":
        return lambda: capturing(device)
    captures = capture_question(device)
    if torch.cuda.device_count() == 1:
        return captures
    index, current = device.index, torch._C._cuda_getDevice
    return lambda: captures() if current() == index else capturing(device)


def _ready(way: str, device: torch.device, dtype: torch.dtype) -> Way:
    """The sender of `to_device` for all that goes by one launch or command."""
    known = _senders.get((way, device, dtype))
    if known is None:
        made = WAYS[way](device, dtype, _most(way, device) // dtype.itemsize)
        known = _senders.setdefault((way, device, dtype), made)
    return known


def _new(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor that can be written to in and outside of inference mode."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return torch.empty(shape, dtype=dtype, device=device)
    return torch.empty(shape, dtype=dtype, device=device)


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
