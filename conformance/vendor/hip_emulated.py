# SPDX-License-Identifier: Apache-2.0
"""`hip` on a CPU: its own code and kernel text, over the fake driver. EMULATED.

``portakv conform portakv_conformance.vendor.hip_emulated:HipEmulated`` judges all of `hip` but the
device: the text that hipRTC is given, how arguments are packed, how launches are cut and errors
are read. Memory is the host's, work is done when a launch returns, and there are no streams.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from portakv.backends.base import Capabilities, Decision, places_on
from portakv.backends.hip import Hip
from portakv.runtime.hip import Card, Driver
from portakv_conformance.vendor.hip_fake import fake_driver

EMULATED = True
ARCHITECTURE = "gfx906"


class HostCard(Card):
    """The CPU where a HIP device would be."""

    def _facts(self) -> tuple[str, str]:
        return "emulated on the CPU", ARCHITECTURE

    def is_current(self) -> bool:
        return True

    def current(self) -> AbstractContextManager[object]:
        return nullcontext()

    def stream(self, stream: torch.Stream | None) -> int:
        assert stream is None, "the host has no streams"
        return 0


class HipEmulated(Hip):
    """`hip` over the fake driver, on host memory."""

    name = "hip-emulated"
    emulated = True  # no report on it is R6

    @staticmethod
    def open_driver() -> Driver:
        return fake_driver()

    @staticmethod
    def find_card(device: torch.device, driver: Driver) -> Card:
        return HostCard(device, driver)

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        if device.type != "cpu":
            return Decision(cls.name, False, f"it emulates hip on the CPU, not on {device.type}")
        return cls._probe_driver(device)

    def capabilities(self) -> Capabilities:
        return Capabilities(places_on(self.device), skips_negative=True, guards=True)
