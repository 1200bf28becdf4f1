# SPDX-License-Identifier: Apache-2.0
"""Peers across the link: LMCache's operations, which reach pinned memory by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from portakv_benchmarks.device.peers import PEERS, LMCache, PeerMissing
from portakv_benchmarks.host.memory import Sides

__all__ = ["PEERS", "HostPeer", "PeerMissing", "load_host_peer"]


class HostPeer(LMCache):
    """LMCache's slot kernel with a memory object in pinned memory, as its connector has it."""

    def mover(self, sides: Sides, direction: str) -> Callable[[], object]:
        """What moves a case once, on the current stream.

        Raises:
            PeerMissing: the host's side is no chunk, or its kernel does not take the cache.
        """
        if sides.case.scene.order != "dense":
            raise PeerMissing(f"LMCache moves chunks of the host, not {sides.case.scene.name}.")
        addresses = torch.tensor([cache.data_ptr() for cache in sides.caches], dtype=torch.int64)
        pointers, chunk = addresses.to(sides.device), sides.chunk()
        move = self._slot_kernel(cast(Any, sides), "random")  # has what it asks of a `Workload`
        return lambda: move(chunk, pointers, direction == "d2h")


def load_host_peer(name: str) -> HostPeer:
    """The peer of a name; raises `PeerMissing` where it is unknown or does not load."""
    if name not in PEERS:
        raise PeerMissing(f"Peer {name!r} was asked for; known are {', '.join(PEERS)}.")
    return HostPeer()
