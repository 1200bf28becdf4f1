# SPDX-License-Identifier: Apache-2.0
"""Mutants that break the order of streams, on the simulated device; their addresses are right."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import torch

from portakv.backends.base import Pending
from portakv_conformance.mutants.base import Call, DeviceRows, Runs, copy_runs
from portakv_conformance.mutants.state import late


class WrongStream(DeviceRows):
    """All work goes to the stream that was current when the backend was made."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = torch.accelerator.current_stream(device)

    def stream(self, call: Call) -> torch.Stream:
        return self._stream


@DeviceRows.mutate("stream")
def PassedStreamIgnored(right: DeviceRows, call: Call) -> torch.Stream:
    """The stream that was passed is ignored, the work goes to the current one."""
    return right.stream(replace(call, stream=None))


@DeviceRows.mutate("stream")
def StreamZeroIsNone(right: DeviceRows, call: Call) -> torch.Stream:
    """A passed default stream has the number 0 and is read as no stream given."""
    zero = call.stream is not None and call.stream.stream_id == 0
    return right.stream(replace(call, stream=None) if zero else call)


@DeviceRows.mutate("stream")
def CurrentDeviceOnly(right: DeviceRows, call: Call) -> torch.Stream:
    """The index of the device is ignored: work goes to a stream of the thread's current device."""
    return call.stream or torch.accelerator.current_stream()


def _own(right: DeviceRows, call: Call) -> torch.Stream:
    retained: dict[str, torch.Stream] = right.state
    return retained.get("own") or retained.setdefault(
        "own", torch.Stream(right.stream(call).device)
    )


@DeviceRows.mutate("move")
def NoWaitOnProducer(right: DeviceRows, runs: Runs, call: Call) -> None:
    """Its own stream does not wait for what the caller's stream is still producing."""
    right.enqueue(runs, call, _own(right, call))
    right.stream(call).wait_stream(_own(right, call))


@DeviceRows.mutate("move")
def NobodyWaitsForIt(right: DeviceRows, runs: Runs, call: Call) -> None:
    """The caller's stream does not wait for its own stream: the transfer ends before the copy."""
    _own(right, call).wait_stream(right.stream(call))
    right.enqueue(runs, call, _own(right, call))


@DeviceRows.mutate("move")
def WaitsForTheCurrentDevice(right: DeviceRows, runs: Runs, call: Call) -> None:
    """A private stream waits for the stream of the thread's current device, not of the copy's
    device."""
    _own(right, call).wait_stream(call.stream or torch.accelerator.current_stream())
    right.enqueue(runs, call, _own(right, call))
    right.stream(call).wait_stream(_own(right, call))


@DeviceRows.mutate("carry")
def LeavesItsStreamCurrent(right: DeviceRows, call: Call) -> None:
    """It makes the stream of its work the thread's current one, and does not restore the other."""
    stream = _own(right, call)
    stream.wait_stream(right.stream(call))
    torch.accelerator.set_stream(stream)
    right.carry(replace(call, stream=stream))
    right.stream(call).wait_stream(stream)


@NoWaitOnProducer.mutate("move")
def WaitsForTheFirstOnly(right: DeviceRows, runs: Runs, call: Call) -> None:
    """Its own stream waits for the caller's on the first call, and never again."""
    if not right.state:
        _own(right, call).wait_stream(right.stream(call))
    right.move(runs, call)


@DeviceRows.mutate("move")
def EnqueuedLater(right: DeviceRows, runs: Runs, call: Call) -> None:
    """A background thread enqueues the work, after work that came in the meantime."""
    late(right.enqueue, runs, call, right.stream(call))


def _to_the_end(right: DeviceRows, call: Call) -> None:
    right.carry(call)
    right.stream(call).synchronize()


@DeviceRows.mutate("carry")
def HostIdsReadByAThread(right: DeviceRows, call: Call) -> Pending:
    """A thread reads the ids and enqueues the copy; its handle reports the end correctly."""
    return late(_to_the_end, right, replace(call, stream=right.stream(call)))


@DeviceRows.mutate("carry")
def WaitsInTheLaunch(right: DeviceRows, call: Call) -> None:
    """The launch waits for its stream, and with it the host for everything that stands there."""
    _to_the_end(right, call)


@DeviceRows.mutate("move")
def DeviceTempFreedEarly(right: DeviceRows, runs: Runs, call: Call) -> None:
    """Rows pass through a buffer of the allocator that is freed while the copy still uses it."""
    stream = right.stream(call)
    nbytes = len(runs.src) * runs.nbytes
    rows = torch.empty(nbytes, dtype=torch.uint8, device=stream.device)
    between = rows.data_ptr() + np.arange(len(runs.src)) * runs.nbytes
    copy_runs(runs.src, between, runs.nbytes, stream)
    copy_runs(between, runs.dst, runs.nbytes, stream)


_REACH = {("device", "device"), ("device", "pageable"), ("device", "pinned")}


@DeviceRows.mutate("move", places=frozenset(_REACH))
def ClaimsHostReach(right: DeviceRows, runs: Runs, call: Call) -> None:
    """Claims to copy to the host, and lets the host read the device's memory by itself."""
    if call.dst.form.place == "device":
        right.move(runs, call)
    else:
        for source, target in zip(runs.src.tolist(), runs.dst.tolist(), strict=True):
            ctypes.memmove(target, source, runs.nbytes)
