# SPDX-License-Identifier: Apache-2.0
"""A PortaKV backend for the Acme card, whose driver copies a list of runs in one call.

There is no Acme card. PortaKV's simulated device stands in for it, and `simdev.copy_runs` for the
driver's batched copy. Everything else is what a real package would contain.
"""

from __future__ import annotations

import torch

from portakv import CopyPlan, Index, KVView
from portakv.backends import Backend, Capabilities, Decision, Launch


class Acme(Backend):
    """Rows as runs of bytes, handed to the driver in one call."""

    name = "acme"

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        # Asked for every device, so it is cheap and has no side effects. A refusal says why.
        if device.type != "simdev":
            return Decision(cls.name, False, f"it serves Acme cards (simdev), not {device.type}")
        return Decision(cls.name, True, "the driver copies runs of bytes")

    def capabilities(self) -> Capabilities:
        # Claim what is true and no more: each claim is tested, and so is what is not claimed.
        return Capabilities(
            places=frozenset({("device", "device"), ("device", "pinned"), ("pinned", "device")}),
            index_on="host",  # runs are worked out by the host, which therefore reads the ids
            skips_negative=True,  # plan.runs leaves padding out
        )

    def prepare(self, plan: CopyPlan) -> Launch:
        from portakv_conformance import simdev  # the vendor's package, imported when it is needed

        def launch(
            src: KVView,
            dst: KVView,
            src_index: Index,
            dst_index: Index,
            count: int,
            stream: torch.Stream | None,
            status: torch.Tensor | None,
        ) -> None:
            runs = plan.runs(src, dst, src_index, dst_index, count)
            sources, targets, nbytes = (torch.from_numpy(column) for column in runs)
            where = stream or torch.accelerator.current_stream(self.device)
            simdev.copy_runs(sources, targets, nbytes, where)
            # Returning None says: ordered on the stream.

        return launch
