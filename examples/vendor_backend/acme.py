# SPDX-License-Identifier: Apache-2.0
"""A PortaKV backend for the Acme card, whose driver copies a list of runs in one call.

There is no Acme card. PortaKV's simulated device replaces it, and `simdev.copy_runs` replaces the
driver's batched copy. A real package would contain everything else as it is here.
"""

from __future__ import annotations

import torch

from portakv.ext import Backend, Capabilities, CopyPlan, Decision, Index, KVView, Launch


class Acme(Backend):
    """A backend that passes rows as runs of bytes to the driver, in one call."""

    name = "acme"

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        # Called for every device, so it is cheap and has no side effects. A refusal has a reason.
        if device.type != "simdev":
            return Decision(cls.name, False, f"it serves Acme cards (simdev), not {device.type}")
        return Decision(cls.name, True, "the driver copies runs of bytes")

    def capabilities(self) -> Capabilities:
        # Claim only true capabilities: the tests check claimed and unclaimed ones.
        return Capabilities(
            places=frozenset({("device", "device"), ("device", "pinned"), ("pinned", "device")}),
            index_on="host",  # the host computes the runs, so it reads the ids
            skips_negative=True,  # plan.runs leaves padding out
        )

    def prepare(self, plan: CopyPlan) -> Launch:
        from portakv_conformance import simdev  # the vendor's package, imported on first use

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
            # A result of None means: ordered on the stream.

        return launch
