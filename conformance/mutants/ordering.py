# SPDX-License-Identifier: Apache-2.0
"""Mutants that break the order of streams, on the simulated device; their addresses are right."""

from __future__ import annotations

import ctypes
from dataclasses import replace

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


class PassedStreamIgnored(DeviceRows):
    """The stream that was passed is ignored, the work goes to the current one."""

    def stream(self, call: Call) -> torch.Stream:
        return torch.accelerator.current_stream(self.device)


class StreamZeroIsNone(DeviceRows):
    """A passed default stream has the number 0 and is read as no stream given."""

    def stream(self, call: Call) -> torch.Stream:
        if call.stream is not None and call.stream.stream_id:
            return call.stream
        return torch.accelerator.current_stream(self.device)


class CurrentDeviceOnly(DeviceRows):
    """The index of the device is ignored: work goes to a stream of the thread's current device."""

    def stream(self, call: Call) -> torch.Stream:
        return call.stream or torch.accelerator.current_stream()


class _OnItsOwnStream(DeviceRows):
    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._own = torch.Stream(device)


class NoWaitOnProducer(_OnItsOwnStream):
    """Its own stream does not wait for what the caller's stream is still producing."""

    def move(self, runs: Runs, call: Call) -> None:
        self.enqueue(runs, call, self._own)
        self.stream(call).wait_stream(self._own)


class NobodyWaitsForIt(_OnItsOwnStream):
    """The caller's stream does not wait for its own stream: the transfer ends before the copy."""

    def move(self, runs: Runs, call: Call) -> None:
        self._own.wait_stream(self.stream(call))
        self.enqueue(runs, call, self._own)


class WaitsForTheFirstOnly(NoWaitOnProducer):
    """Its own stream waits for the caller's on the first call, and never again."""

    _waited = False

    def move(self, runs: Runs, call: Call) -> None:
        if not self._waited:
            self._own.wait_stream(self.stream(call))
        self._waited = True
        super().move(runs, call)


class EnqueuedLater(DeviceRows):
    """A thread in the background enqueues the work, behind whatever came in the meantime."""

    def move(self, runs: Runs, call: Call) -> None:
        late(self.enqueue, runs, call, self.stream(call))


class HostIdsReadByAThread(DeviceRows):
    """A thread reads the ids and enqueues the copy; its handle tells the end rightly."""

    def carry(self, call: Call) -> Pending | None:
        return late(self._whole, replace(call, stream=self.stream(call)))

    def _whole(self, call: Call) -> None:
        super().carry(call)
        self.stream(call).synchronize()


class WaitsInTheLaunch(DeviceRows):
    """The launch waits for its stream, and with it the host for everything that stands there."""

    def carry(self, call: Call) -> Pending | None:
        super().carry(call)
        self.stream(call).synchronize()
        return None


class DeviceTempFreedEarly(DeviceRows):
    """Rows pass through a buffer of the allocator that is freed while the copy still uses it."""

    def move(self, runs: Runs, call: Call) -> None:
        rows = torch.empty(len(runs.src) * runs.nbytes, dtype=torch.uint8, device=self.device)
        between = rows.data_ptr() + torch.arange(len(runs.src)) * runs.nbytes
        copy_runs(torch.from_numpy(runs.src), between, runs.nbytes, self.stream(call))
        copy_runs(between, torch.from_numpy(runs.dst), runs.nbytes, self.stream(call))


_REACH = {("device", "device"), ("device", "pageable"), ("device", "pinned")}


class ClaimsHostReach(DeviceRows, places=frozenset(_REACH)):
    """Claims to copy to the host, and lets the host read the device's memory by itself."""

    def move(self, runs: Runs, call: Call) -> None:
        if call.dst.form.place == "device":
            super().move(runs, call)
        else:
            for source, target in zip(runs.src.tolist(), runs.dst.tolist(), strict=True):
                ctypes.memmove(target, source, runs.nbytes)
