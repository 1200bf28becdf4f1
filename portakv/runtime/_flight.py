# SPDX-License-Identifier: Apache-2.0
"""Order and lifetime of copies: streams, graph capture, and memory that must outlive a handle."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import AbstractContextManager, nullcontext

import torch

from portakv.errors import BackendUnavailable, DeviceMismatch, Unsupported
from portakv.runtime import events
from portakv.runtime.devices import DeviceAbsent, indexed
from portakv.runtime.streams import own_stream
from portakv.runtime.transfer import Completion, Transfer

# Host memory is held by what is under way, since no allocator orders it on a stream.
_flying: deque[Completion] = deque()
_beside: dict[tuple[torch.device, int, str, str], torch.Stream] = {}
_lock = threading.Lock()


def resolve(device: torch.device | str | int) -> torch.device:
    """A device with an index, unless it is the CPU.

    Raises:
        BackendUnavailable: this machine has no such device.
    """
    try:
        return indexed(torch.device(device) if isinstance(device, int) else device)
    except (DeviceAbsent, RuntimeError) as error:
        raise BackendUnavailable(
            f"Host memory was to be used with the device {device}, and {str(error).rstrip('.')}. "
            f"Name a device of this machine, or leave it out."
        ) from None


def check_stream(stream: torch.Stream | None, *devices: torch.device) -> None:
    """Raise `DeviceMismatch` unless ``stream`` is None or belongs to one of the devices."""
    if stream is None or stream.device in devices:
        return
    served = " and ".join(dict.fromkeys(map(str, devices)))
    raise DeviceMismatch(
        f"A copy on {served} was asked with a stream of {stream.device}; expected a stream of a "
        f"device that takes part. Pass one, or none for the current stream."
    )


def follow_current(stream: torch.Stream | None, *tensors: torch.Tensor) -> None:
    """Make ``stream`` wait for the current one of its device, and tell the allocator who uses the
    tensors that lie there."""
    if stream is None:
        return
    stream.wait_stream(torch.accelerator.current_stream(stream.device.index))
    for tensor in tensors:
        if tensor.device == stream.device:
            tensor.record_stream(stream)


def beside(stream: torch.Stream, src: str, dst: str) -> torch.Stream:
    """The stream of transfers between two places that begin behind ``stream``, which does not wait
    for them: neither those of another stream are held up nor those the other way round."""
    key = stream.device, stream.stream_id, src, dst
    with _lock:
        if key not in _beside:
            _beside[key] = own_stream(stream.device)
        return _beside[key]


def drain(device: torch.device, stream: torch.Stream | None) -> None:
    """Block the host until everything on ``stream`` has ended; None: the device's current one."""
    (stream or torch.accelerator.current_stream(device.index)).synchronize()


def inside(stream: torch.Stream | None) -> AbstractContextManager[object]:
    """Inside, ``stream`` is the current one; None changes nothing."""
    if stream is None:
        return nullcontext()
    module = torch.get_device_module(stream.device)
    return module.stream(stream)  # type: ignore[no-any-return]


def completion(
    device: torch.device, stream: torch.Stream | None, *host: torch.Tensor
) -> Completion:
    """The end of everything on ``stream`` so far; holds host memory until then, whoever forgets
    the handle."""
    pool = events.pool(device)
    ended = Completion(pool.recorded(stream), kept=host or None, pool=pool)
    if host:
        _flying.append(ended)
        _land()
    return ended


def captured(device: torch.device, stream: torch.Stream | None, *tensors: torch.Tensor) -> Transfer:
    """The handle of a copy that was captured; with ``stream``, `Transfer.wait` joins the fork."""
    event = None
    if stream is not None:
        event = torch.Event(device)
        event.record(stream)
    return Transfer((Completion(event, standing=True),), tensors, captured=True)


def refuse_capture(what: str, why: str) -> Unsupported:
    """The error for what cannot be captured."""
    return Unsupported(f"{what} inside graph capture", why)


def held() -> int:
    """How many copies under way hold host memory; looks first which have ended."""
    _land()
    return len(_flying)


def _land() -> None:
    """Let go of the oldest copies that have ended."""
    while True:
        try:
            oldest = _flying.popleft()  # taken at once: no other thread looks at it meanwhile
        except IndexError:
            return
        if not oldest.ended():
            _flying.appendleft(oldest)
            return
