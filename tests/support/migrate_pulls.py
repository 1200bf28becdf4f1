# SPDX-License-Identifier: Apache-2.0
"""Owners and readers of one process for the tests of pulls, and the leaks that they leave."""

from __future__ import annotations

import gc
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from time import monotonic
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import torch

from portakv import CopyPlan, KVView
from portakv.backends.base import Launch
from portakv.migrate.channel import Channel
from portakv.migrate.messages import Answer, Handshake, Hello, Sum
from portakv.migrate.owner import Offer, Owner
from portakv.migrate.reader import Reader
from portakv.migrate.shards import Shard
from portakv.migrate.shared_memory import shared_empty
from portakv.tasks import Runtime, runtime
from support import ready
from support.peer_cases import ReadsPeers
from support.seeded_loop import ThreadLoop
from support.waits import LIMIT, until

LAYOUT = "layer | kv block token head dim"
MODEL = "a model"
SMALL = 1 << 15  # bytes of staging: slots of two pages, so that a pull has many slices


@contextmanager
def elsewhere() -> Iterator[Runtime]:
    """Yield a runtime with a separate loop, as another process has one."""
    loop = ThreadLoop()
    loop.begin()
    try:
        yield Runtime(loop)
    finally:
        loop.end()


def channel_of(used: Runtime, *terms: Any, **named: Any) -> Channel:
    """Return a channel of a runtime. If it answers late, it holds up no other runtime."""
    with patch("portakv.migrate.channel.runtime", lambda: used):
        return Channel(*terms, **named)


class Sides:
    """Owners and readers, each with a separate channel.

    Args:
        used: the runtime that serves the owners.
    """

    def __init__(self, used: Runtime | None = None) -> None:
        self.made = list[Any]()
        self._runtime = used or runtime()

    def owner(self, *shards: Shard, **options: Any) -> Owner:
        """Return an owner of shards."""
        channel = channel_of(self._runtime, timeout=20.0)
        self.made.append(channel)
        self.made.append(owner := Owner(channel, *shards, **{"model": MODEL, **options}))
        return owner

    def reader(self, *shards: Shard, **options: Any) -> Reader:
        """Return a reader of shards; ``timeout``: of its channel."""
        self.made.append(channel := Channel(timeout=options.pop("timeout", 20.0)))
        self.made.append(reader := Reader(channel, *shards, **{"model": MODEL, **options}))
        return reader


@contextmanager
def sides(devices: Sequence[str] = (), nccl: bool = False) -> Iterator[Sides]:
    """Yield sides; close them afterwards, and check that they have left nothing.

    ``devices``: which they use. ``nccl``: their buffers cross by NCCL, whose files and threads do
    not count: it keeps files from its first group on, and no call ends its wait for a peer that is
    killed before both have met.
    """
    ready.begin()
    runtime().started()  # the loop of the process stays
    for device in devices:  # the driver's files are there before
        torch.zeros(1, device=device)
    before = left(nccl)
    files = Counter(_open_files())
    with elsewhere() as used:
        made = Sides(used)
        try:
            yield made
        finally:
            for one in reversed(made.made):
                one.close()
    for one in made.made:
        if isinstance(one, Owner):
            statistics = one.statistics()
            assert statistics["held"] == statistics["slots"] == 0
    made.made.clear()

    def nothing_is_left() -> bool:
        # Each time: what a thread of a transport held in a cycle until now is freed by this alone.
        gc.collect()
        return left(nccl) <= before

    # A pair that is made with one who is killed meanwhile ends with the transport's own timeout.
    ended = until(nothing_is_left, LIMIT)
    assert ended, (left(nccl), before, _named(), Counter(_open_files()) - files)


def left(nccl: bool = False) -> tuple[int, int]:
    """Return threads of the library, and open files except for shared memory, which tests still
    use; a driver keeps its files after the first event of another process.

    ``nccl``: without the threads of transports, and without files.
    """
    if nccl:
        return sum(name != "portakv-transport" for name in _named()), 0
    return len(_named()), sum(not re.search("deleted|/cuda.shm", path) for path in _open_files())


def _named() -> list[str]:
    return [x.name for x in threading.enumerate() if x.name.startswith("portakv")]


def _open_files() -> Iterator[str]:
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            yield os.readlink(f"/proc/self/fd/{number}")


def key_of(owner: Owner) -> bytes:
    """Return the key with which an owner signs its tickets, as each of its readers has it."""
    with closing(Channel()) as channel:
        return channel.ask(owner.channel.address, Hello(owner.model), Handshake).key


def never_end(owner: Any) -> None:
    """Have readers of an owner take its ended offers for offers that hold: no word of its page says
    that one has ended, and no answer."""
    owner.offers = _Unending()
    owner.words.end = lambda *_: None


class _Unending(dict[bytes, Any]):
    """The offers of an owner, of which none is removed or noticed to have ended."""

    def __setitem__(self, number: bytes, offer: Any) -> None:
        offer.holds = lambda: True
        super().__setitem__(number, offer)

    def pop(self, number: bytes, *_: object) -> Any:
        """Return an offer, and go on to have it."""
        return self.get(number)


class Rows:
    """A cache of ``blocks`` blocks that can be shared, of 2 layers and 4 heads, and its shard."""

    def __init__(
        self, blocks: int = 16, size: int = 16, fill: int | None = None, device: str = "cpu"
    ) -> None:
        shape = 2, 2, blocks, size, 4, 8
        if device == "cpu":
            self.whole = shared_empty(shape, torch.int16)
        else:
            self.whole = torch.empty(shape, dtype=torch.int16, device=device)
        self.size = size
        if fill is None:
            counted = torch.arange(self.whole.numel(), device="cpu").view(shape)
            self.whole.copy_(counted * 40503 >> 3 & 0x7FFF)
        else:
            self.whole.fill_(fill)
        self.view = KVView([*self.whole], LAYOUT)
        self.shard = Shard(self.view)

    def half(self, layer: int) -> Shard:
        """Return the shard of one of the layers."""
        view = KVView([self.whole[layer]], LAYOUT)
        return Shard(view, layers=(layer, layer + 1, 2))

    @staticmethod
    def shard_of(whole: torch.Tensor) -> Shard:
        """Return the shard of a cache ``[layer, kv, block, token, head, dim]``."""
        return Shard(KVView([*whole], LAYOUT))

    def rows(self, blocks: Any, tokens: int) -> torch.Tensor:
        """Return the first tokens of blocks, ``[layer, kv, token, head, dim]``."""
        return self.whole[:, :, torch.as_tensor(blocks)].flatten(2, 3)[:, :, :tokens]


class Copies(ReadsPeers):
    """The host's backend; it calls ``observe`` at each copy, which returns what to wait for."""

    name = "copies"

    def observe(self, plan: CopyPlan) -> Any:
        raise NotImplementedError

    def prepare(self, plan: CopyPlan) -> Launch:
        launch: Any = super().prepare(plan)
        return cast(Launch, lambda *options: (self.observe(plan), launch(*options))[0])


class Couple:
    """An owner of 16 blocks of 16 tokens and a reader of 8 of 32, and one pull between them.

    ``device``: of the owner.
    """

    def __init__(
        self, made: Sides, method: str = "mapped", device: str = "cpu", **options: Any
    ) -> None:
        self.src = Rows(device=device)
        self.dst = Rows(8, 32, fill=-1)
        terms: dict[str, Any] = {"expose": method, "staging": SMALL} if method == "staging" else {}
        self.owner = made.owner(self.src.shard, **{**terms, **options})
        self.reader = made.reader(self.dst.shard, timeout=5.0)
        self.blocks = [7, 3, 11, 0, 5]
        self.into = [6, 1, 4]
        self.tokens = 75

    def offer(self, **options: Any) -> Offer:
        """Return an offer of 75 tokens."""
        return self.owner.offer(self.blocks, tokens=self.tokens, **options)

    def pull(self, offer: Offer, **options: Any) -> Any:
        """Begin to pull it, into the blocks that its tokens fill."""
        into = self.into[: -(-self.tokens // self.dst.size)]
        return self.reader.pull(offer.ticket, into, **options)

    def right(self) -> bool:
        """Return True if the reader has the owner's rows."""
        expected = self.src.rows(self.blocks, self.tokens)
        return torch.equal(expected, self.dst.rows(self.into, self.tokens))

    def spared(self) -> bool:
        """Return True if all other rows of the reader are unchanged."""
        others = [x for x in range(8) if x not in self.into]
        rest = self.dst.rows(self.into[-1:], 32)[:, :, self.tokens - 64 :]
        return bool((self.dst.whole[:, :, others] == -1).all()) and bool((rest == -1).all())


def waiting_copies(
    both: Couple, copied: threading.Event, begin: Callable[[], None] = lambda: None
) -> type[Copies]:
    """Return a backend that calls ``begin`` at each copy to the reader, which ends when ``copied``
    is set."""

    class Waits(Copies):
        def observe(self, plan: CopyPlan) -> Any:
            if plan.dst != both.dst.view.form:
                return None
            begin()
            return SimpleNamespace(done=copied.is_set, wait=copied.wait)

    return Waits


class Clock:
    """The clock of an owner, which stands still until leases are to pass. Make offers afterwards.

    A machine that stops for seconds ends no lease.
    """

    def __init__(self, owner: Owner) -> None:
        self.now = monotonic()
        owner.now = lambda: self.now

    def outlast(self, offer: Offer, lease: float) -> None:
        """Let more than two leases pass, and wait for a renewal after most of each."""
        for _ in range(3):
            self.now += 0.9 * lease
            renewed = self.now + 0.99 * lease
            assert until(lambda renewed=renewed: offer.lease.until >= renewed, LIMIT)


class Compares:
    """Answers to requests of checksums, which an owner gives only when it ``may``; ``asked``: a
    reader has the rows, and wants to compare them."""

    def __init__(self, owner: Owner) -> None:
        self.asked = threading.Event()
        self.may = threading.Event()
        self._sum = owner._gather
        owner.channel.serve(Sum, self._answer)

    def _answer(self, peer: Any, request: Sum) -> Answer:
        self.asked.set()
        return self._sum(peer, request) if self.may.is_set() else Answer("busy", seconds=1e-3)
