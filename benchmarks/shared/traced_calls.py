# SPDX-License-Identifier: Apache-2.0
"""The calls that `call_trace` traces, over a few small blocks.

`call_trace` imports this module, and with it the library, after it has replaced the locks. As a
program it is the owner of the rows that a pull brings.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from portakv import AdaptiveConnector, CopyOptions, Index, KVView, copy_blocks
from portakv.migrate import Channel, Owner, Reader, Shard, shared_empty
from portakv.storage import BlockForm, BlockStore, Disk
from portakv_benchmarks.shared import far
from portakv_benchmarks.shared.switches import other_switches

CACHE = "layer | kv block token head dim"
CHUNK = "kv layer token (head dim)"
BLOCK_FIRST = "block layer kv token head dim"
MODEL = "a model"
#: A cache of the store, and of a pull: layers, kv, blocks, tokens of a block, heads, dim.
STORED = (2, 2, 64, 16, 2, 8)  # a block has 2 KiB
PULLED = (2, 2, 8, 16, 4, 16)  # a block has 8 KiB
KEYS = [bytes([number]) * 32 for number in range(8)]
LIMIT = 30.0  # seconds; nothing here takes as long


def _nothing(_: object = None) -> None:
    """Do nothing before or after a call."""


@dataclass(frozen=True)
class Operation:
    """A call to trace.

    ``prepare`` makes the argument of ``call``; ``finish`` takes its result. Neither is traced.
    """

    name: str
    call: Callable[[Any], Any]
    prepare: Callable[[], Any] = _nothing
    finish: Callable[[Any], object] = _nothing


class Served(Protocol):
    """A `Side` that answers calls."""

    def do(self, name: str) -> Any: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Operations:
    """All calls to trace, and the owner of the rows that a pull brings."""

    operations: list[Operation]
    owner: Served

    def owner_of(self, operation: Operation) -> Callable[[], int] | None:
        """Return what counts the switches of the owner; None if an operation has no owner."""
        if operation.name != "mapped pull":
            return None
        return lambda: int(self.owner.do("switches"))


def start_owner(device: torch.device) -> Served:
    """Return the owner in a separate process."""
    return far.Far(["portakv_benchmarks.shared.traced_calls", str(device)], name="owner")


@contextmanager
def operations(
    device: torch.device, start: Callable[[torch.device], Served] = start_owner
) -> Iterator[Operations]:
    """Make all calls to trace, and close what they need at the end.

    ``start`` returns the owner of the rows that a pull brings.

    Raises `RuntimeError` if a load or a pull does not bring what its name says.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        owner = start(device)
        stack.callback(owner.close)
        yield Operations(
            [
                *copies(device),
                *_loads(device, folder, stack),
                *_pulls(device, owner, stack),
            ],
            owner,
        )


def copies(device: torch.device) -> Iterator[Operation]:
    """Yield the calls between a cache and a chunk, and between two caches."""
    caches = [*torch.zeros(4, 2, 16, 16, 8, 128, device=device, dtype=torch.float16)]
    chunk = torch.empty((2, 4, 48, 8 * 128), dtype=torch.float16, device=device)
    src_ids = Index([3, 7, 12], step=16)
    dst_ids = Index([0, 1, 2], step=16)
    slots = Index([block * 16 + token for block in (3, 7, 12) for token in range(16)])
    connector = AdaptiveConnector(device, None, CACHE, CHUNK)
    connector.register_kv_caches(caches)
    yield Operation(
        "from_gpu, registered",
        lambda memory: connector.from_gpu(memory, slot_mapping=slots),
        chunk.detach,  # a tensor that no call has seen before
        lambda transfer: transfer.synchronize(),
    )
    src = KVView(caches, CACHE)
    shape = (16, 4, 2, 16, 8, 128)
    dst = KVView(torch.empty(shape, dtype=torch.float16, device=device), BLOCK_FIRST)
    options = CopyOptions()
    yield Operation(
        "copy_blocks",
        lambda _: copy_blocks(src, dst, src_ids, dst_ids, options=options),
        finish=lambda transfer: transfer.synchronize(),
    )
    yield Operation(
        "copy_blocks, new ids",
        lambda _: copy_blocks(src, dst, [3, 7, 12], [0, 1, 2], options=options),
        finish=lambda transfer: transfer.synchronize(),
    )


def _loads(device: torch.device, folder: Path, stack: ExitStack) -> Iterator[Operation]:
    """Yield a load of blocks that the host tier has, and one of blocks that a disk alone has."""
    whole = torch.zeros(STORED, dtype=torch.int16, device=device)
    view = KVView([*whole], CACHE)
    form = BlockForm.of(view, MODEL)
    saved = list(range(len(KEYS)))
    into = [block + 20 for block in saved]
    for tier, host in (("host", 1 << 20), ("disk", 0)):
        disk = Disk(folder / tier, capacity=1 << 20)
        store = BlockStore(form, staging=4 << 20, host=host, tiers=[disk])
        stack.callback(store.close)
        whole.fill_(1)
        store.save(view, saved, KEYS).synchronize(LIMIT)
        whole[:, :, into] = 0

        def load(_: object, store: BlockStore = store) -> None:
            store.load(view, into, KEYS).synchronize()

        before = _hits(store, tier)
        load(None)
        hits = _hits(store, tier) - before
        if hits != len(KEYS) or not bool((whole[:, :, into] == 1).all()):
            raise RuntimeError(f"Expected {len(KEYS)} right blocks of the {tier} tier, got {hits}.")
        yield Operation(f"{tier} hit", load)


def _hits(store: BlockStore, tier: str) -> int:
    """Return how many blocks a tier has brought."""
    counts = store.statistics()["tier_blocks_total"]
    return sum(x["value"] for x in counts if (x["tier"], x["result"]) == (tier, "hit"))


def _pulls(device: torch.device, owner: Served, stack: ExitStack) -> Iterator[Operation]:
    """Yield an offer with its ticket, and a pull of mapped rows."""
    ticket = bytes.fromhex(owner.do("offer"))
    channel = stack.enter_context(closing(Channel(timeout=LIMIT)))
    target = _shared(device)
    own = stack.enter_context(closing(Owner(channel, Shard(_view(target)), model=MODEL)))
    reader = stack.enter_context(closing(Reader(channel, Shard(_view(target)), model=MODEL)))
    yield Operation(
        "offer and ticket",
        lambda _: own.offer([1, 3, 2, 0], tokens=64),
        finish=lambda offer: offer.revoke(),
    )

    def pull(_: object) -> None:
        reader.pull(ticket, [4, 5, 6, 7], overlap="idle").synchronize()

    pull(None)
    if not bool((target[:, :, 4:] == 1).all()):
        raise RuntimeError("Expected the rows of the owner, got others.")
    yield Operation("mapped pull", pull)


def _shared(device: torch.device) -> torch.Tensor:
    """Return rows that can be shared with another process."""
    if device.type == "cpu":
        return shared_empty(PULLED, torch.int16).zero_()
    return torch.zeros(PULLED, dtype=torch.int16, device=device)


def _view(whole: torch.Tensor) -> KVView:
    return KVView([*whole], CACHE)


class Side:
    """The owner of the rows that a pull brings, in a separate process."""

    def __init__(self, device: torch.device) -> None:
        if device.type != "cpu":
            torch.get_device_module(device).set_device(device)
        self.channel = Channel(timeout=LIMIT)
        self.owner = Owner(self.channel, Shard(_view(_shared(device).fill_(1))), model=MODEL)

    def offer(self) -> str:
        """Return a ticket that any number of pulls may use."""
        terms: dict[str, Any] = {"tokens": 64, "lease": 1000.0, "readers": 1 << 20}
        return self.owner.offer([1, 3, 2, 0], **terms).ticket.hex()

    def switches(self) -> int:
        """Return the voluntary switches of all threads but the one that answers this."""
        return other_switches()


if __name__ == "__main__":
    answers = far.answers()
    far.serve(Side(torch.device(sys.argv[1])), answers)
