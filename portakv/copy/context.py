# SPDX-License-Identifier: Apache-2.0
"""`Context`: where and when a copy is issued, determined once at the call and passed on."""

from __future__ import annotations

from typing import NamedTuple

import torch

from portakv.runtime.devices import capturing, inside, refuse_capture
from portakv.runtime.streams import check_stream


class Context(NamedTuple):
    """The surroundings of a copy.

    Attributes:
        device: it executes the copy.
        stream: where the work is ordered; None: the device's current stream.
        captured: the current stream of the device records a graph.
    """

    device: torch.device
    stream: torch.Stream | None
    captured: bool

    @classmethod
    def of(cls, device: torch.device, stream: torch.Stream | None) -> Context:
        """Return the surroundings of a call; raise `DeviceMismatch` for another device's stream."""
        if stream is not None:
            check_stream(stream, device)
        return cls(device, stream, device.type != "cpu" and capturing(device))

    def check_may_slice(self) -> None:
        """Raise `Unsupported` inside graph capture, before ids of a copy in slices are read."""
        if self.captured:
            why = "the host issues them while the copy runs; leave out cancellable and max_gbps"
            raise refuse_capture("A copy in slices", why)

    def check_no_graph(self, why: str) -> None:
        """Raise as `check_not_captured`, also if the given stream records a graph."""
        captured = self.captured
        if self.stream is not None and not captured:
            with inside(self.stream):
                captured = capturing(self.device)
        self._replace(captured=captured).check_not_captured(why)

    def check_not_captured(self, why: str) -> None:
        """Raise `Unsupported` inside graph capture, before anything is enqueued."""
        if self.captured:
            todo = "capture a copy with a capturable backend and contiguous device ids of a dtype"
            raise refuse_capture("A copy", f"{why}; {todo} that it reads")
