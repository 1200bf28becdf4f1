# SPDX-License-Identifier: Apache-2.0
"""What engines share: their device, the backend that serves it, and the caller's terms."""

from __future__ import annotations

import torch

from portakv.backends.base import Backend, Decision
from portakv.engines.terms import Terms
from portakv.plan.plan import CopyPlan
from portakv.registry.registry import Choice, choose
from portakv.runtime.transfer import Pending
from portakv.view.index import Index

#: Both directions between a device and pinned memory, and between it and pageable memory.
PINNED = frozenset({("device", "pinned"), ("pinned", "device")})
PAGEABLE = frozenset({("device", "pageable"), ("pageable", "device")})


class Engine(Backend):
    """A backend between a device and host memory.

    Args:
        device: the device.
        half: what carries out the device's half of a copy; None: what the registry chooses.
        terms: what the caller asks of the transfers.
    """

    def __init__(
        self, device: torch.device, half: Choice | None = None, terms: Terms | None = None
    ) -> None:
        super().__init__(device)
        self._half = half
        self.terms = terms or Terms()

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        if device.type == "cpu":
            return Decision(cls.name, False, "it copies between a device and the host")
        return Decision(cls.name, True, "it copies between this device and the host")

    @property
    def half(self) -> Choice:
        """What carries out the device's half; chosen when it is first asked for."""
        if self._half is None:
            self._half = choose(self.device)
        return self._half


def direction_of(plan: CopyPlan) -> str:
    """``d2h`` or ``h2d``."""
    return "d2h" if plan.src.place == "device" else "h2d"


def read_on(stream: torch.Stream | None, index: Index) -> Index:
    """The index, with its ids held until the end of what ``stream`` is made to wait for: they may
    be a copy that somebody else keeps, made on another stream."""
    if stream is not None and index.ids is not None and index.ids.device == stream.device:
        index.ids.record_stream(stream)
    return index


def finish(pending: Pending | None) -> None:
    """Wait for work that is not ordered on its stream."""
    if pending is not None:
        pending.wait()
