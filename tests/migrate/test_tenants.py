# SPDX-License-Identifier: Apache-2.0
"""Two tenants pull staged rows of one owner: nothing of one tenant reaches the other one's memory,
neither as rows, nor in holes and padding of staging buffers, nor by a library that reaches more."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from migrate.transports.test_onesided import Memory
from support.migrate_pulls import LAYOUT, SMALL, Sides, sides
from support.waits import LIMIT

from portakv import KVView
from portakv.migrate.shards import Shard
from portakv.migrate.transports import TRANSPORTS

SECRET = 0x5A  # each byte of tenant A's rows, and no byte of other rows
BLOCKS = 16
SIZE = 16


class Table(Memory):
    """A library that reads memory of any device, which it finds by its address."""

    name = "table"
    buffers: ClassVar = dict[int, torch.Tensor]()  # staging buffers of the owner, by address

    def read(self, lane: Any, moving: Any, there: Any) -> None:
        for start, buffer in [*self.buffers.items()]:
            at = there.address - start
            if 0 <= at < buffer.nbytes:
                moving.buffer.copy_(buffer[at : at + there.nbytes])
                if buffer.device.type != "cpu":
                    torch.accelerator.synchronize(buffer.device)
                return
        raise RuntimeError("no such memory")


class Tenants:
    """An owner with rows of two tenants, and a reader for each tenant."""

    def __init__(self, made: Sides, device: torch.device, transport: str, seed: int) -> None:
        self.random = random.Random(seed)
        shape = 2, 2, BLOCKS, SIZE, 3, 5  # rows of a size that leaves padding in chunks
        self.whole = torch.full(shape, 0x11, dtype=torch.uint8, device=device)
        self.whole[:, :, : BLOCKS // 2] = SECRET
        self.pages = dict[str, torch.Tensor]()
        self.readers = dict[str, Any]()
        self.owner = made.owner(
            Shard(KVView([*self.whole], LAYOUT)), expose="staging", staging=SMALL
        )
        for name in "AB":
            self.pages[name] = torch.zeros(shape, dtype=torch.uint8, device=device)
            shard = Shard(KVView([*self.pages[name]], LAYOUT))
            self.readers[name] = made.reader(shard, transport=transport)

    def pull(self, name: str) -> None:
        """Pull blocks of a tenant, some of which are left out, in a random length."""
        first = 0 if name == "A" else BLOCKS // 2
        count = self.random.randint(1, BLOCKS // 2)
        blocks = self.random.sample(range(first, first + BLOCKS // 2), count)
        tokens = self.random.randint((count - 1) * SIZE + 1, count * SIZE)
        into = [*range(count)]
        for at in range(count):
            if count > 1 and self.random.random() < 0.3:
                blocks[at] = into[at] = -1
        offer = self.owner.offer(blocks, tokens=tokens)
        self.readers[name].pull(offer.ticket, into).synchronize(LIMIT)


@contextmanager
def recycled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], list[torch.Tensor]]]:
    """Allocate staging buffers of the owner from memory that holds tenant A's rows, and keep the
    buffers of each reader, to look at them. The result begins the turn of a reader."""
    remote: dict[str, list[torch.Tensor]] = {"A": [], "B": []}
    turn = ["A"]

    def allocate(nbytes: int, device: torch.device, most: int = 0, rows: Any = None) -> Any:
        size = min(most, 1 << (nbytes - 1).bit_length()) if most else nbytes
        buffer = torch.full((size,), SECRET, dtype=torch.uint8, device=device)
        Table.buffers[buffer.data_ptr()] = buffer
        return buffer

    def receive(nbytes: int, device: torch.device, most: int = 0, rows: Any = None) -> Any:
        size = min(most, 1 << (nbytes - 1).bit_length()) if most else nbytes
        buffer = torch.zeros(size, dtype=torch.uint8, device=device)
        remote[turn[0]].append(buffer)
        return buffer

    def begin(name: str) -> list[torch.Tensor]:
        turn[0] = name
        return remote[name]

    monkeypatch.setattr("portakv.migrate.staged_lanes.staging", allocate)
    monkeypatch.setattr("portakv.migrate.connections.staging", receive)
    monkeypatch.setitem(TRANSPORTS.targets, Table.name, Table)
    try:
        yield begin
    finally:
        Table.buffers.clear()


def leaks(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, transport: str, pulls: int, seed: int
) -> int:
    """Return how many pulls of tenant B left a byte of tenant A in B's buffers or pages."""
    with recycled(monkeypatch) as begin:
        if device.type != "cpu":
            warm_up(begin, device, transport)
        return count_leaks(begin, device, transport, pulls, seed)


def warm_up(begin: Callable[[str], object], device: torch.device, transport: str) -> None:
    """Pull once, as a driver opens files at a process's first pull that stay open."""
    made = Sides()
    tenants = Tenants(made, device, transport, 0)
    begin("A")
    tenants.pull("A")
    for one in reversed(made.made):
        one.close()


def count_leaks(
    begin: Callable[[str], list[torch.Tensor]],
    device: torch.device,
    transport: str,
    pulls: int,
    seed: int,
) -> int:
    """Return how many pulls of tenant B left a byte of tenant A in B's buffers or pages."""
    leaked = 0
    with sides() as made:
        tenants = Tenants(made, device, transport, seed)
        for _ in range(pulls):
            begin("A")
            tenants.pull("A")
            buffers = begin("B")
            tenants.pull("B")
            memory = [*buffers, tenants.pages["B"]]
            leaked += any(bool((each == SECRET).any()) for each in memory)
        assert buffers
        assert bool((tenants.pages["A"] == SECRET).any())
        del memory, buffers
    return leaked


@pytest.mark.parametrize("guarded", [True, False])
def test_tenants_get_nothing_of_each_other(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, guarded: bool
) -> None:
    """Without the zeros the second tenant gets bytes of the first one."""
    if not guarded:
        for module in ("staged_lanes", "owner"):
            monkeypatch.setattr(f"portakv.migrate.{module}.zero", lambda memory: None)
    leaked = leaks(monkeypatch, device, "table", 12, seed=1)
    assert leaked == 0 if guarded else leaked > 0


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["table", "distributed"])
@pytest.mark.parametrize("guarded", [True, False])
def test_tenants_get_nothing_of_each_other_in_thousands_of_pulls(
    monkeypatch: pytest.MonkeyPatch, transport: str, guarded: bool
) -> None:
    if not guarded:
        for module in ("staged_lanes", "owner"):
            monkeypatch.setattr(f"portakv.migrate.{module}.zero", lambda memory: None)
    pulls = 2000 if guarded else 50
    leaked = leaks(monkeypatch, torch.device("cpu"), transport, pulls, seed=2)
    assert leaked == 0 if guarded else leaked > 0
