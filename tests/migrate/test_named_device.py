# SPDX-License-Identifier: Apache-2.0
"""Pulls by name of rows that an owner's device still writes, mapped from another process: the
caller's stream waits for none of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, nullcontext
from secrets import token_bytes
from time import sleep
from typing import Any

import pytest
import torch
from support.device_cases import on
from support.migrate_pulls import LAYOUT, MODEL
from support.peer_process import Peer
from support.waits import LIMIT

from portakv import KVView
from portakv.migrate import Channel, Reader, Ticket
from portakv.migrate.shards import Shard

pytestmark = pytest.mark.gpu

SHAPE = 2, 2, 16, 16, 4, 8
BLOCKS = [4, 9]
INTO = [6, 1]
OWNER = """
import torch
from portakv import KVView
from portakv.migrate import Channel, Owner, Shard
device = torch.device("cuda", number)
torch.cuda.set_device(device)
whole = torch.zeros(shape, dtype=torch.int16, device=device)
slow = torch.randn(4096, 4096, device=device)
owner = Owner(Channel(), Shard(KVView([*whole], layout)), model=model)
answer = owner.channel.address, owner.epoch
"""
WRITE = """
torch.cuda.synchronize()
for _ in range(times):
    slow @ slow
whole.fill_(value)
written = torch.cuda.Event()
written.record()
owner.offer(blocks, tokens=32, name=name)
answer = written.query()
"""


@pytest.fixture(params=[0, 1], ids=["same", "other"], scope="module")
def owner(request: pytest.FixtureRequest) -> Iterator[tuple[Peer, str, bytes]]:
    """An owner of a device, in another process: its address and epoch."""
    if torch.cuda.device_count() <= request.param:
        pytest.skip("it takes two CUDA devices")
    with Peer() as peer:
        address, epoch = peer.do(
            OWNER, number=request.param, shape=SHAPE, layout=LAYOUT, model=MODEL
        )
        yield peer, address, epoch


def reached_first(owner: tuple[Peer, str, bytes], times: int, value: int) -> bool:
    """Pull rows that the owner writes after ``times`` slow steps; return whether the caller's
    stream is done before the owner's."""
    peer, address, epoch = owner
    local = torch.full(SHAPE, -1, dtype=torch.int16, device="cuda:0")
    torch.cuda.synchronize()
    # Not `sides`, which looks for what is left: a driver keeps files of another process's memory.
    with closing(Channel(timeout=20.0)) as channel:
        reader = Reader(channel, Shard(KVView([*local], LAYOUT)), model=MODEL)
        reader.prepare(address).synchronize(LIMIT)
        warm = token_bytes(16)
        peer.do(WRITE, times=0, value=0, blocks=BLOCKS, name=warm)
        reader.pull(Ticket.of(address, epoch, warm), INTO, timeout=LIMIT).synchronize(LIMIT)

        name = token_bytes(16)
        peer.do(WRITE, times=times, value=value, blocks=BLOCKS, name=name)
        with on(torch.Stream("cuda:0")):
            pulled = reader.pull(Ticket.of(address, epoch, name), INTO, timeout=LIMIT)
            mine = torch.Event("cuda:0")
            mine.record()
        while not mine.query():
            sleep(1e-4)
        first = not peer.do("answer = written.query()")
        pulled.synchronize(LIMIT)
        assert pulled.statistics.strategy == "mapped"
        assert peer.do("answer = written.query()")
        assert bool((local[:, :, INTO] == value).all())
        assert bool((local[:, :, [0, 2, 3, 4, 5, *range(7, 16)]] == -1).all())
        reader.close()
    return first


def test_the_callers_stream_waits_for_no_owner_whose_rows_are_mapped(
    owner: tuple[Peer, str, bytes],
) -> None:
    """A step may be over too early, so that longer ones follow."""
    assert any(reached_first(owner, times, 7 + times) for times in (100, 400, 1600))


def test_a_stream_without_a_private_one_waits_for_the_owner(
    owner: tuple[Peer, str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: the copies are issued on the caller's stream."""

    def none(*_: Any) -> Any:
        return nullcontext()

    monkeypatch.setattr("portakv.migrate.reader.apart", none)
    assert not any(reached_first(owner, times, 7 + times) for times in (100, 400))
