# SPDX-License-Identifier: Apache-2.0
"""The base of the stream mutants: the same kernel on the simulated device, ordered on its streams.

What the steps of `HostRows` work out is handed to the device's one vendor op, a batch of copies.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch

from portakv.backends.base import Capabilities
from portakv_conformance.mutants.base import Call, HostRows, Runs
from portakv_conformance.mutants.cells import check_inside


class DeviceRows(HostRows):
    """Rows moved by the simulated device, in the order of a stream."""

    device_type: ClassVar[str] = "simdev"

    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), places=frozenset({("device", "device")}))

    def move(self, runs: Runs, call: Call) -> None:
        self.enqueue(runs, call, self.stream(call))

    def stream(self, call: Call) -> torch.Stream:
        """The stream on which to order the work: that of the call, else the current one."""
        return call.stream or torch.accelerator.current_stream(self.device)

    def enqueue(self, runs: Runs, call: Call, stream: torch.Stream) -> None:
        """Order the copies of all runs on a stream."""
        from portakv_conformance import simdev  # built and loaded only where it is used

        check_inside(call.src, runs.src, runs.nbytes)
        check_inside(call.dst, runs.dst, runs.nbytes)
        sources, targets = torch.from_numpy(runs.src), torch.from_numpy(runs.dst)
        simdev.copy_runs(sources, targets, torch.full_like(sources, runs.nbytes), stream)
