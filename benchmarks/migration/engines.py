# SPDX-License-Identifier: Apache-2.0
"""Drive the other libraries of a side: torch.distributed, NIXL and Mooncake without PortaKV, and a
loop of matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from portakv.errors import TransferError
from portakv.migrate import Channel, pair, rendezvous
from portakv.migrate.transports import choose
from portakv_benchmarks.host.suite import HOST_PRESETS
from portakv_benchmarks.host.traffic_sources import Loop, matmul

Pieces = Sequence[Sequence[int]]  # address and bytes of each


class Group:
    """Two sides of torch.distributed; the one without an address keeps the store."""

    def __init__(self, channel: Channel, device: torch.device, address: str) -> None:
        self.rank = int(bool(address))
        self.device = device
        self.store = rendezvous(channel, address or None)

    def meet(self) -> None:
        """Run both at the same time."""
        self.group = pair(self.store, self.rank, 2, self.device, name="bench")

    def send(self, bytes_: torch.Tensor) -> None:
        self.group.send([bytes_], 1 - self.rank, 0).wait()

    def receive(self, into: torch.Tensor) -> None:
        self.group.recv([into], 1 - self.rank, 0).wait()


class Engine:
    """NIXL or Mooncake, started as PortaKV's transport starts it, for reads of any pieces."""

    def __init__(self, name: str, device: torch.device, address: str) -> None:
        transport: Any = choose(device, name)
        self.transport = transport
        transport.start(address)
        self.library = transport.engine
        self.name = name
        self.kind = "DRAM" if device.type == "cpu" else "VRAM"
        self.known = set[int]()
        self.index = 0
        self.planned: Any = None
        self.peers = dict[bytes, str]()

    def enter(self, tensors: Sequence[torch.Tensor]) -> str:
        """Let it reach them; what another one needs for that."""
        for one in tensors:
            if one.data_ptr() not in self.known:
                self.transport.enter(one.data_ptr(), one.nbytes, max(one.get_device(), 0))
                self.known.add(one.data_ptr())
                self.index = max(one.get_device(), 0)
        all_ = self.name == "nixl"  # what it has registered, and not one slot
        reach = self.library.get_agent_metadata() if all_ else self.transport.reach(None)
        return f"{reach.hex()}/{self.index}"

    def plan(self, reach: str, remote: Pieces, local: Pieces) -> None:
        """Make ready to read pieces of another one's."""
        words, _, index = reach.partition("/")
        session = bytes.fromhex(words)
        if self.name == "mooncake":
            addresses = [[at for at, _ in side] for side in (local, remote)]
            self.planned = session.decode(), *addresses, [n for _, n in local]
            return
        sides = (local, self.index), (remote, int(index))
        lists = [[(at, n, number) for at, n in side] for side, number in sides]
        descs = [self.library.get_xfer_descs(one, self.kind) for one in lists]
        if session not in self.peers:
            self.peers[session] = self.library.add_remote_agent(session).decode()
        self.planned = self.library.initialize_xfer("READ", *descs, self.peers[session], b"")

    def read(self) -> None:
        """Read them, to the end."""
        if self.name == "mooncake":
            if self.library.batch_transfer_sync_read(*self.planned):
                raise TransferError("Mooncake failed; none of it counts.")
            return
        state = self.library.transfer(self.planned)
        while state == "PROC":
            state = self.library.check_xfer_state(self.planned)
        if state != "DONE":
            raise TransferError(f"NIXL says {state}; none of it counts.")


def products(device: torch.device, size: int, seconds: float) -> Loop:
    """Return a loop of products of square bf16 matrices, for so long when nothing disturbs it."""
    return matmul(device, replace(HOST_PRESETS["full"], matmul=size, loop_seconds=seconds))


def loop_ms(device: torch.device, loop: Loop) -> float:
    """Return the milliseconds of a loop, on the current stream of an otherwise idle device."""
    module = torch.get_device_module(device)
    first, last = (module.Event(enable_timing=True) for _ in range(2))
    module.synchronize()
    first.record()
    loop.run()
    last.record()
    module.synchronize()
    return float(first.elapsed_time(last))
