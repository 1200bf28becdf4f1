# SPDX-License-Identifier: Apache-2.0
"""Plain copies of tensors between host and device, within a device, and between devices.

Torch's ``copy_`` does most of the work. This module adds four things. A blocking copy waits in
every direction, and another copy reports if it had to wait. Rows at a pitch cross in one 2-D
memcpy. Arguments that do not fit are an error before anything is written. Host memory is retained
until the copy has ended.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Stream, Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.graph import increment_version

from portakv.arguments import flag, kind_of
from portakv.core.view import READ_ONLY, writable
from portakv.errors import BackendUnavailable, DeviceMismatch, LayoutError
from portakv.runtime import cuda, streams
from portakv.runtime.devices import capturing, inside, refuse_capture, resolve, usual_device
from portakv.runtime.transfer import Transfer

#: Torch copies narrower rows, and packs them first. A copy engine takes some 55 ns a row, however
#: few its bytes (rows of 512 bytes reach 0.16 of the link, benchmarks/notes/link.md), so rows of 4
#: bytes would cross at 0.07 GB/s.
_NARROWEST = 256
#: The largest pitch that CUDA takes (``CU_DEVICE_ATTRIBUTE_MAX_PITCH``, 2 GiB - 1 everywhere).
MAX_PITCH = 2**31 - 1

_INSIDE = "torch's copy_ is one pass for any strides inside a device"
_BETWEEN = "torch's copy_ orders both devices' streams and takes the peer link where there is one"


class Pitched(NamedTuple):
    """Rows of ``width`` bytes; the pitches are bytes from the start of a row to the next row's."""

    width: int
    height: int
    src_pitch: int
    dst_pitch: int


@dataclass(frozen=True)
class Copied:
    """The result of a copy.

    Attributes:
        direction: ``h2d``, ``d2h``, ``d2d`` (one device), ``peer`` (two) or ``h2h``.
        method: ``memcpy2d`` (the driver's, of rows), ``torch`` (its ``copy_``), or ``nothing``.
        why: the reason for that method, as a phrase; a fallback names what is missing.
        nbytes: bytes moved.
        waited: all bytes had arrived when the call returned.
        transfer: the handle of `done`, `wait` and `synchronize`.
    """

    direction: str
    method: str
    why: str
    nbytes: int
    waited: bool
    transfer: Transfer = field(repr=False, compare=False)

    def done(self) -> bool:
        """Return what `Transfer.done` of the transfer returns."""
        return self.transfer.done()

    def wait(self, stream: Stream | None = None) -> None:
        """Make a stream wait, as `Transfer.wait` does."""
        self.transfer.wait(stream)

    def synchronize(self) -> None:
        """Wait on the host, as `Transfer.synchronize` does."""
        self.transfer.synchronize()


def is_available(device: torch.device | str | None = None) -> bool:
    """Return True if the CUDA driver's own copies serve a device (None: the current accelerator).

    Everything else works without them.
    """
    try:
        return cuda.why_not(usual_device() if device is None else resolve(device)) is None
    except BackendUnavailable:  # there is no such device
        return False


def copy_(
    dst: Tensor, src: Tensor, non_blocking: bool = False, stream: Stream | None = None
) -> Copied:
    """Copy a tensor into another, wherever they are.

    Args:
        dst: any strides in which each element has a separate address.
        src: the same shape and dtype, any strides, no byte in common with ``dst``.
        non_blocking: False: all bytes have arrived when this returns. True: the host does not wait,
            unless `Copied.waited` reports that it had to.
        stream: a stream of a participating device; the copy follows the present work of the
            device's current stream. None: the current stream; for two devices the source's, for
            which the destination's then waits.

    Raises:
        LayoutError: dtypes or shapes differ; the tensors share bytes; two elements of ``dst`` share
            an address; a tensor that is not strided.
        DeviceMismatch: two kinds of device, or a stream of neither.
        Unsupported: inside graph capture, a copy that blocks, or whose host memory is pageable, or
            neither contiguous nor rows for a 2-D memcpy. The caller retains a graph's memory.
        TransferError: the driver rejects the copy.
    """
    return _copy(dst, src, non_blocking, stream)


def copy_h2d(
    dst: Tensor, src: Tensor, non_blocking: bool = False, stream: Stream | None = None
) -> Copied:
    """Copy as `copy_` from the host to a device; raise `DeviceMismatch` for any other direction."""
    return _copy(dst, src, non_blocking, stream, "h2d")


def copy_d2h(
    dst: Tensor, src: Tensor, non_blocking: bool = False, stream: Stream | None = None
) -> Copied:
    """Copy as `copy_` from a device to the host; raise `DeviceMismatch` for any other direction."""
    return _copy(dst, src, non_blocking, stream, "d2h")


def copy_d2d(
    dst: Tensor, src: Tensor, non_blocking: bool = False, stream: Stream | None = None
) -> Copied:
    """Copy as `copy_` inside a device or between two; raise `DeviceMismatch` for any other
    direction."""
    return _copy(dst, src, non_blocking, stream, "d2d", "peer")


def direction_of(dst: Tensor, src: Tensor) -> str:
    """Return the direction of a copy, as `Copied` names it.

    Raises:
        DeviceMismatch: two kinds of accelerator, or tensors without memory.
    """
    kinds = src.device.type, dst.device.type
    if "meta" in kinds or ("cpu" not in kinds and kinds[0] != kinds[1]):
        raise DeviceMismatch(
            f"Expected a copy with the host, or within one kind of device, got one from "
            f"{src.device} to {dst.device}. Copy through a tensor on the host."
        )
    if "cpu" in kinds:
        return "2".join("h" if kind == "cpu" else "d" for kind in kinds)
    return "d2d" if src.device == dst.device else "peer"


def _copy(
    dst: Tensor, src: Tensor, non_blocking: bool, stream: Stream | None, *wanted: str
) -> Copied:
    """Copy as `copy_`, in one of the wanted directions; without any: in every direction."""
    flag("non_blocking", non_blocking)
    _check_alike(dst, src)
    direction = direction_of(dst, src)
    if wanted and direction not in wanted:
        raise DeviceMismatch(
            f"Expected the direction {' or '.join(wanted)}, got a copy by copy_{wanted[0]} from "
            f"{src.device} to {dst.device}. Call copy_, which takes any direction."
        )
    devices = [each.device for each in (src, dst) if each.device.type != "cpu"]
    streams.check_stream(stream, *(devices or [torch.device("cpu")]))
    nbytes = dst.numel() * dst.element_size()
    if not nbytes:
        return Copied(direction, "nothing", "there are no bytes", 0, True, Transfer())
    check_disjoint(dst, src)
    first = dst.data_ptr()
    if dst.is_cpu and not writable(first, first + _reach(dst)):
        raise LayoutError(f"Expected a writable destination, got a tensor: {READ_ONLY}.")
    if not devices:
        _write(dst, src, False)
        return Copied(direction, "torch", "both tensors are on the host", nbytes, True, Transfer())
    device = stream.device if stream is not None else devices[-1]
    host = {"d2h": dst, "h2d": src}.get(direction)
    rows, why, ready = _rows(dst, src, host, device)
    captures = capturing(device)
    if captures:
        _check_capture(host, non_blocking, rows is not None or ready, why)
    # The caller retains a graph's memory, and no allocator knows of its replays.
    streams.follow_current(stream, *(() if captures else (dst, src)))
    if rows is not None:
        method = "memcpy2d"
        late = non_blocking
        cuda.copy_pitched(first, src.data_ptr(), direction == "h2d", rows, device, stream)
        increment_version(dst)  # as torch's copy_ does
    else:
        method = "torch"
        late = _copy_by_torch(dst, src, host, ready, non_blocking, stream)
    if captures:
        transfer = streams.captured(device, stream, (dst, src))
        return Copied(direction, method, why, nbytes, False, transfer)
    end = streams.completion(device, stream, *(() if host is None else (host,)))
    if late:
        return Copied(direction, method, why, nbytes, False, Transfer((end,), (dst, src)))
    end.synchronize()
    return Copied(direction, method, why, nbytes, True, Transfer())


def _rows(
    dst: Tensor, src: Tensor, host: Tensor | None, device: torch.device
) -> tuple[Pitched | None, str, bool]:
    """Return the rows for the driver's 2-D memcpy, or None if torch copies; the reason, as a
    phrase; and whether memcpy then takes the host's tensor in its present form."""
    if host is None:
        return None, _BETWEEN if dst.device != src.device else _INSIDE, True
    rows = None if dst.is_contiguous() and src.is_contiguous() else pitched(dst, src)
    if rows is None or (isinstance(rows, Pitched) and rows.height == 1):
        return None, "torch's copy_ issues the same memcpy", True
    why: str | None
    if isinstance(rows, str):
        why = rows
    elif rows.width < _NARROWEST:
        why = f"its rows of {rows.width} bytes are narrower than {_NARROWEST}; torch packs them"
    elif not is_pinned(host):
        why = "the host memory is pageable; torch packs the rows there"
    elif src.is_conj() != dst.is_conj() or src.is_neg() != dst.is_neg():
        why = "one of the tensors is a lazy conjugate or negative"
    elif (why := cuda.why_not(device)) is None:
        return rows, "rows at a pitch cross as they lie", True
    return None, why, host.is_contiguous()


def is_pinned(tensor: Tensor) -> bool:
    """Return True if the first and the last byte of a host tensor are pinned.

    The tensor may reach past the registered memory. For a view torch reports whether its storage
    begins in pinned memory, so each byte is tested as a separate storage.
    """
    first = tensor.data_ptr()
    ends = [ctypes.c_char.from_address(at) for at in (first, first + _reach(tensor) - 1)]
    return all(torch.frombuffer(end, dtype=torch.uint8).is_pinned() for end in ends)


def _copy_by_torch(
    dst: Tensor,
    src: Tensor,
    host: Tensor | None,
    ready: bool,
    non_blocking: bool,
    stream: Stream | None,
) -> bool:
    """Copy by torch; return False if all bytes have arrived already."""
    late = non_blocking
    if host is src and not ready:
        late = False
        if is_pinned(src):
            # The host packs the source now; earlier work of the stream may still write it.
            (stream or torch.accelerator.current_stream(dst.device.index)).synchronize()
    elif host is dst or (host is src and dst.device.type != "cuda"):
        # To the host: torch brings the bytes to pageable memory first if the host arranges them.
        # From the host: CUDA has read pageable memory when its call returns; other devices may not
        # have.
        late = late and ready and is_pinned(host)
    with inside(stream):
        _write(dst, src, late or host is None)
    return late


def _write(dst: Tensor, src: Tensor, non_blocking: bool) -> None:
    """Copy bits by torch: as bool it would write 0 or 1, whatever the byte is."""
    if dst.dtype == torch.bool:
        dst = dst.view(torch.uint8)
        src = src.view(torch.uint8)
    with torch.inference_mode() if dst.is_inference() else torch.no_grad():
        dst.copy_(src, non_blocking=non_blocking)


def _check_capture(host: Tensor | None, non_blocking: bool, ready: bool, why: str) -> None:
    if not non_blocking:
        todo = "the host cannot wait for it; pass non_blocking=True"
        raise refuse_capture("A blocking copy", todo)
    if host is not None and not is_pinned(host):
        todo = "a graph reads it at replay; pin the memory first"
        raise refuse_capture("A copy of pageable host memory", todo)
    if host is not None and not ready:
        raise refuse_capture(
            f"A copy of host memory with strides {list(host.stride())}",
            f"torch would copy it through memory that the graph does not retain ({why}); use "
            f"contiguous memory, or rows that a 2-D memcpy takes",
        )


def _check_alike(dst: Tensor, src: Tensor) -> None:
    """Raise `LayoutError` unless both are dense strided tensors of one dtype and shape."""
    for name, tensor in (("destination", dst), ("source", src)):
        if not isinstance(tensor, Tensor):
            raise LayoutError(
                f"Expected the {name} of a copy to be a tensor, got {kind_of(tensor)}. "
                f"Convert it first, for example by torch.from_numpy."
            )
        if (
            tensor.layout != torch.strided
            or tensor.is_nested
            or is_functorch_wrapped_tensor(tensor)
        ):
            raise LayoutError(
                f"Expected the {name} of a copy to be a plain torch.strided tensor, got one "
                f"that is {tensor.layout}, nested or inside torch.vmap or its like. Copy its "
                "inner tensors."
            )
        if tensor.is_quantized:
            raise LayoutError(
                f"Expected the {name} of a copy to be a tensor whose bytes are its values, got a "
                f"quantized one. Pass tensor.int_repr()."
            )
    if dst.dtype != src.dtype:
        raise LayoutError(
            f"Expected one dtype, got a copy from {src.dtype} to {dst.dtype}. A copy neither "
            "converts nor reinterprets: convert by .to(), or view both as one dtype."
        )
    if dst.shape != src.shape:
        raise LayoutError(
            f"Expected one shape, got a copy from shape {list(src.shape)} to {list(dst.shape)}. "
            f"Nothing is broadcast: slice, view or expand until they agree."
        )


def check_disjoint(dst: Tensor, src: Tensor) -> None:
    """Raise `LayoutError` unless addresses and strides show that no byte is written twice, or both
    read and written."""
    steps = [step for step, _ in _dims(dst)]
    if len({*steps}) < len(steps) or any(step < _reach(dst, step) for step in steps):
        raise LayoutError(
            f"Expected each stride of the destination to step over everything inside it, got shape "
            f"{list(dst.shape)} and strides {list(dst.stride())}, of which elements may lie at one "
            f"address. Copy into the tensor that it was expanded from."
        )
    if dst.device == src.device and not _apart(dst, src):
        ends = (f"address {one.data_ptr():#x}, strides {list(one.stride())}" for one in (src, dst))
        raise LayoutError(
            f"Expected disjoint memory, got tensors that share bytes, or whose strides do not show "
            f"that they share none: {' to '.join(ends)}. Copy through a buffer."
        )


def _apart(one: Tensor, other: Tensor) -> bool:
    """Return True if addresses and strides show that two tensors have no byte in common.

    Their ranges do not meet; or all strides from some size on are multiples of a period, in which
    the smaller strides reach different parts.
    """
    shift = other.data_ptr() - one.data_ptr()
    if shift >= _reach(one) or -shift >= _reach(other):
        return True
    steps = sorted({step for step, _ in _dims(one) + _dims(other) if step})
    for at, step in enumerate(steps):
        period = math.gcd(*steps[at:])
        if _reach(one, step) <= shift % period <= period - _reach(other, step):
            return True
    return False


def _dims(tensor: Tensor) -> list[tuple[int, int]]:
    """Return the stride in bytes and the extent of each axis with several elements."""
    size = tensor.element_size()
    axes = zip(tensor.stride(), tensor.shape, strict=True)
    return [(size * stride, extent) for stride, extent in axes if extent > 1]


def _reach(tensor: Tensor, below: float = math.inf) -> int:
    """Return the bytes from the first to the end of the last, by the strides of fewer bytes than
    ``below``."""
    inner = (step * (extent - 1) for step, extent in _dims(tensor) if step < below)
    return tensor.element_size() + sum(inner)


def pitched(dst: Tensor, src: Tensor) -> Pitched | str:
    """Return the rows of a copy (one, if it is contiguous on both sides), or why it has none."""
    size = dst.element_size()
    strides = zip(dst.shape, src.stride(), dst.stride(), strict=True)
    dims = [(extent, size * a, size * b) for extent, a, b in strides if extent > 1]
    # From the inside: a loop over the bytes of a run that is contiguous in both tensors, and the
    # loops around it. Each has its extent, and the bytes from one index to the next in the source
    # and the destination.
    loops = [(size, 1, 1)]
    for extent, a, b in sorted(dims, key=lambda dim: dim[2]):
        inner, *steps = loops[-1]
        if [a, b] == [inner * step for step in steps]:
            loops[-1] = (inner * extent, *loops[-1][1:])
        else:
            loops.append((extent, a, b))
    run = loops[0][0]
    outer = loops[1:] or [(1, loops[0][0], loops[0][0])]
    if len(outer) > 1:
        return f"its strides take {len(outer)} loops around a run of {run} bytes, a 2-D memcpy one"
    ((height, src_pitch, dst_pitch),) = outer
    if height > 1 and (not run <= src_pitch <= MAX_PITCH or dst_pitch > MAX_PITCH):
        return (
            f"its rows of {run} bytes lie {src_pitch} and {dst_pitch} bytes apart, and a 2-D "
            f"memcpy takes {run} to {MAX_PITCH}"
        )
    return Pitched(run, height, src_pitch, dst_pitch)
