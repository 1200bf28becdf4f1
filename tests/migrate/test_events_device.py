# SPDX-License-Identifier: Apache-2.0
"""Owners of CUDA devices whose events a reader cannot open: their rows are never read before the
owner's stream has written them."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest
import torch
from support.migrate_pulls import LAYOUT, MODEL
from support.peer_process import Peer
from support.waits import LIMIT

from portakv import KVView
from portakv.errors import PortaKVError, Unsupported
from portakv.migrate import Channel, Reader, shared_memory
from portakv.migrate.shards import Shard

SHAPE = 2, 2, 16, 16, 4, 8
OWNER = """
import torch
from portakv import KVView
from portakv.migrate import Channel, Owner, Shard
device = torch.device("cuda", number)
torch.cuda.set_device(device)
whole = torch.zeros(shape, dtype=torch.int16, device=device)
owner = Owner(Channel(), Shard(KVView([*whole], layout)), model=model)
ticket = owner.offer([0], tokens=16).ticket
answer = ticket
"""
WRITE = """
torch.cuda.synchronize()
slow = torch.ones(8192, 8192, device=device)
for _ in range(40):  # half a second and more
    slow @ slow
whole.fill_(value)
answer = owner.offer([3, 2], tokens=32).ticket
"""


def refuses(*_: Any) -> Any:
    raise Unsupported("Opening another process's event", "this test refuses it")


@pytest.mark.gpu
@pytest.mark.parametrize("number", [0, 1], ids=["same", "other"])
@pytest.mark.parametrize("opens", [True, False], ids=["opened", "refused"])
def test_rows_are_read_behind_the_owners_stream_or_not_at_all(
    number: int, opens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.device_count() <= number:
        pytest.skip("it takes two CUDA devices")
    local = torch.full(SHAPE, -1, dtype=torch.int16, device="cuda:0")
    if not opens:
        monkeypatch.setattr(shared_memory, "open_event", refuses)
    # Not `sides`, which looks for what is left: NCCL keeps descriptors of a process's first group.
    with Peer() as owner, closing(Channel(timeout=20.0)) as channel:
        owner.do(OWNER, number=number, shape=SHAPE, layout=LAYOUT, model=MODEL)
        reader = Reader(channel, Shard(KVView([*local], LAYOUT)), model=MODEL)
        for value in (7, 8, 9):
            ticket = owner.do(WRITE, value=value)
            try:
                pulled = reader.pull(ticket, [1, 5], timeout=60.0)
                pulled.synchronize(LIMIT)
            except PortaKVError:
                assert not opens, "with its events the owner's rows come"
                continue
            assert (local[:, :, [1, 5]] == value).all(), "rows from before the owner's write"
            assert (pulled.statistics.strategy == "mapped") == opens
        reader.close()
