# SPDX-License-Identifier: Apache-2.0
"""Streams for the library's own use, order between streams, and host memory held by copies on them.

Torch has 32 streams of a priority, and hands them out in turns. The library may be given a caller's
stream, whose copies then wait for every transfer, or one stream twice, so that both directions of
the link wait for each other. On an NVIDIA device the library makes its own by the driver, and uses
one again when its last owner is gone.
"""

from __future__ import annotations

import ctypes
import threading
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from portakv.errors import DeviceMismatch
from portakv.runtime import cuda
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import inside
from portakv.runtime.transfer import Completion, StatusWord, Transfer, event_pool, hold_memory

# Handles without an owner. The one that was given back last goes out first, since staging is kept
# for it. No lock: the garbage collector may give one back at any moment.
free_handles: defaultdict[tuple[torch.device, int], list[int]] = defaultdict(list)


def own_stream(device: torch.device, priority: int = 0) -> Any:
    """A stream of the device's own kind, which has no other owner for as long as this object lives;
    one of torch's if the CUDA driver does not serve the device, or cannot be used. The device has
    its index; a priority is as torch takes it. Raises `TransferError` if the driver makes no more.
    """
    if cuda.no_cuda(device) is not None or cuda.stream_maker() is None:
        make = getattr(torch.get_device_module(device), "Stream", torch.Stream)
        return make(device, priority=priority) if priority else make(device)
    free = free_handles[device, priority]
    try:
        handle = free.pop()
    except IndexError:
        handle = cuda.make_stream(device, priority)
    stream: Any = OwnStream(handle, device=device)  # type: ignore[no-untyped-call]
    stream.lent = free, handle
    return stream


class OwnStream(torch.cuda.ExternalStream):
    """Gives its handle back when it ends. (Not by a weak reference: torch 2.11's streams do not
    clear those when they end, and the interpreter crashes.)"""

    lent: tuple[list[int], int]

    def __del__(self) -> None:
        free, handle = self.lent
        free.append(handle)


# By a caller's stream and two places. One that is dropped may get another owner, whose work then
# follows what it has left to do: more is ordered than is needed, never less.
_beside: Bounded[tuple[torch.device, int, str, str], torch.Stream] = Bounded(
    "streams beside callers' streams", 64
)


def side_stream(stream: torch.Stream, src: str, dst: str) -> torch.Stream:
    """The stream of transfers between two places that begin behind ``stream``, which does not wait
    for them. Each direction, and each caller's stream, has its own, so that none waits for another.
    """
    key = stream.device, stream.stream_id, src, dst
    return _beside.get_or_make(key, lambda: own_stream(stream.device))


def ignore_captures_elsewhere(device: torch.device) -> None:
    """Let this thread work while another one captures a graph; for as long as the thread lives.
    CUDA forbids other threads many calls, such as `torch.cuda.Event.query`, and ends the capture if
    one of them is made. For other devices no such switch is known."""
    if cuda.of_others(device) is not None:
        return
    try:
        exchange = cuda.library().cuThreadExchangeStreamCaptureMode
    except (OSError, AttributeError):
        return
    exchange(ctypes.byref(ctypes.c_int(1)))  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL


def check_stream(stream: torch.Stream | None, *devices: torch.device) -> None:
    """Raise `DeviceMismatch` unless ``stream`` is None or belongs to one of the devices."""
    place: object = getattr(stream, "device", None) if hasattr(stream, "stream_id") else None
    if stream is None or place in devices:
        return
    names = dict.fromkeys(map(str, devices))
    found = f"a stream of {place}"
    wanted = f"one of {' or '.join(names)}"
    how = ""
    if place is None:
        found = f"stream={stream!r}"
        wanted = "a stream of torch"
        how = " (torch.cuda.ExternalStream holds a handle)"
    raise DeviceMismatch(
        f"A copy on {' and '.join(names)} was asked with {found}; expected {wanted}. "
        f"Pass one{how}, or none for the current one."
    )


def follow_current(stream: torch.Stream | None, *tensors: torch.Tensor) -> None:
    """Make ``stream`` wait for the current one of its device, and tell the allocator that it uses
    the tensors that lie there."""
    if stream is None:
        return
    stream.wait_stream(torch.accelerator.current_stream(stream.device.index))
    for tensor in tensors:
        if tensor.device == stream.device:
            tensor.record_stream(stream)


def completion(
    device: torch.device, stream: torch.Stream | None, *host: torch.Tensor
) -> Completion:
    """The end of everything on ``stream`` so far; holds host memory until then, also if the handle
    is dropped."""
    pool = event_pool(device)
    ended = Completion(pool.recorded(stream), retained=host or None, pool=pool)
    if host:
        hold_memory(ended)
    return ended


def captured(
    device: torch.device,
    stream: torch.Stream | None,
    kept: object,
    words: Sequence[tuple[StatusWord, int]] = (),
    *carried: tuple[str, str],
) -> Transfer:
    """The handle of a copy that was captured; with ``stream``, `Transfer.wait` joins the fork."""
    event = None if stream is None else torch.Event(device)
    if event is not None:
        event.record(stream)
    completion = Completion(event, words=words, standing=True)
    return Transfer((completion,), kept, *carried)


_own = threading.local()  # a thread's streams, by device


class StreamFence:
    """What the current stream of a device held when this was made, for workers that go on behind
    it. On the host nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = None if device.type == "cpu" else event_pool(device).recorded(None)

    def inside(self) -> AbstractContextManager[object]:
        """Inside, the current stream is one of this thread's own, behind that work."""
        if self._event is None:
            return nullcontext()
        own = _own.__dict__
        if (stream := own.get(str(self._device))) is None:
            ignore_captures_elsewhere(self._device)
            stream = own[str(self._device)] = own_stream(self._device)
        self._event.wait(stream)
        return inside(stream)
