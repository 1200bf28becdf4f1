# SPDX-License-Identifier: Apache-2.0
"""Device facilities beyond tensors that the suite needs: streams, a slow job, a second device.

No other module of the suite knows device types by name.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

_CYCLES = 2_000_000  # of a CUDA device's clock in a millisecond, or a little more
_FILL = 1 << 26  # bytes that a device without a clock to wait on fills again and again
_FILLS = 8  # for each millisecond: no accelerator writes 512 MiB faster


class Facility:
    """Streams, delays and devices of the kind of ``device``, which is judged; ``emulated``: it is
    the simulated one."""

    def __init__(self, device: torch.device, emulated: bool = False) -> None:
        self.device = device
        self.emulated = emulated
        self._junk: torch.Tensor | None = None

    @property
    def streams(self) -> bool:
        """Return True if work on the device is ordered on streams."""
        return self.device.type != "cpu"

    @property
    def graphs(self) -> bool:
        """Return True if torch can capture work of the device into graphs."""
        return self.device.type == "cuda"

    def devices(self) -> int:
        """Return the number of devices of this kind."""
        return torch.accelerator.device_count() if self.streams else 1

    def second(self) -> torch.device:
        """Return another device of this kind."""
        return torch.device(self.device.type, ((self.device.index or 0) + 1) % self.devices())

    def stream(self, device: torch.device | None = None) -> torch.Stream:
        """Return a new stream."""
        return torch.Stream(device or self.device)

    def current(self) -> torch.Stream:
        """Return the current stream of the judged device."""
        return torch.accelerator.current_stream(self.device)

    def on(self, stream: torch.Stream) -> AbstractContextManager[object]:
        """Make ``stream`` the current one in a block."""
        context: AbstractContextManager[object] = torch.get_device_module(stream.device).stream(
            stream
        )
        return context

    def delay(self, milliseconds: int, stream: torch.Stream | None = None) -> None:
        """Keep a stream (None: the current one) busy; later work of that stream is delayed."""
        if not self.streams:
            return
        stream = stream or self.current()
        with self.on(stream):  # also where another device than this one is current
            if self.emulated:
                from portakv_conformance import simdev

                if simdev.loaded() is not None:  # else it has no streams: nothing is late
                    simdev.delay(stream, milliseconds)
            elif self.device.type == "cuda":
                torch.cuda._sleep(milliseconds * _CYCLES)
            else:
                if self._junk is None:
                    self._junk = torch.empty(_FILL, dtype=torch.uint8, device=self.device)
                for _ in range(milliseconds * _FILLS):
                    self._junk.fill_(1)

    def synchronize(self) -> None:
        """Wait for all work of the judged device."""
        if self.streams:
            torch.accelerator.synchronize(self.device)

    def spare(self) -> int:
        """Return the free bytes of memory on the judged device; 0 if they are unknown."""
        if not self.streams or self.emulated:
            return 0
        ask = getattr(torch.get_device_module(self.device), "mem_get_info", None)
        return 0 if ask is None else int(ask(self.device)[0])

    def release(self) -> None:
        """Give memory that the allocator holds back to the device."""
        self.synchronize()
        module = torch.get_device_module(self.device) if self.streams else None
        getattr(module, "empty_cache", lambda: None)()
