# SPDX-License-Identifier: Apache-2.0
"""One of two processes between which rows cross: it gives, takes, and looks at every byte. As a
program it does what the process that started it asks, a line of JSON for each call."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

import torch

from portakv import Index, copy_rows
from portakv.migrate import Channel, Offer, Owner, Pull, Reader, Ticket, open_shared, share
from portakv.runtime.devices import usable_device
from portakv.weights import Parameter, publish, pull_weights
from portakv.weights.owner import Published
from portakv_benchmarks.host.traffic_sources import Loop
from portakv_benchmarks.migration import engines
from portakv_benchmarks.migration.cases import ALL_CASES, CASES, USUAL, Cache, memory
from portakv_benchmarks.shared import far
from portakv_benchmarks.shared.shapes import POISON, fill

LEASE = 3000.0
READERS = 1 << 20

T = TypeVar("T")


@dataclass
class Resources:
    """Hold everything that the calls of a `Side` make, and that `Side.drop` releases."""

    reader: Reader | None = None
    owner: Owner | None = None
    weights: Published | None = None
    wanted: dict[str, torch.Tensor] | None = None  # the destination of a pull of weights
    group: engines.Group | None = None  # of torch.distributed
    library: engines.Engine | None = None  # NIXL or Mooncake
    source: Cache | None = None  # the rows to offer
    target: Cache | None = None  # the destination of pulls
    mirrors: list[Cache] | None = None  # the rows of each owner that a pull must bring
    dense: torch.Tensor | None = None  # the dense bytes to offer
    raw: list[torch.Tensor] | None = None  # the dense bytes of each owner
    landed: torch.Tensor | None = None  # the destination of dense bytes


def ready(resource: T | None) -> T:
    """Return a resource; raise `RuntimeError` if no call has made it."""
    if resource is None:
        raise RuntimeError(
            "Expected memory and a connection of the side, got none. Call give, take, publish, "
            "join or start first."
        )
    return resource


class Side:
    """Hold the rows and dense bytes that one process offers, and the memory for its pulls."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.channel = Channel(timeout=30.0)
        self.salt = 0
        self.case = CASES[USUAL]
        self.products: Loop | None = None
        self.made = Resources()
        self.pulled: Pull | None = None  # the last pull that was timed

    def give(self, case: str, nbytes: int, number: int = 0, **terms: Any) -> str:
        """Prepare to offer an owner's rows of a case; return as many dense bytes, as shared."""
        self.case = ALL_CASES[case]
        source = Cache(self.case, False, nbytes, self.device, number)
        self.made.source = source
        nbytes_dense = self.case.payload(nbytes) // self.case.owners
        dense = memory((nbytes_dense,), torch.uint8, self.device)
        self.made.dense = dense
        self.made.owner = Owner(self.channel, source.shard, model="bench", **terms)
        return share(dense).hex()

    def take(self, case: str, nbytes: int, *raw: str, transport: str | None = None) -> None:
        """Allocate memory for rows of a case, and a mirror of the rows of each owner.

        ``raw``: the dense bytes of each owner, as shared.
        """
        self.case = ALL_CASES[case]
        target = Cache(self.case, True, nbytes, self.device)
        self.made.target = target
        numbers = range(self.case.owners)
        self.made.mirrors = [Cache(self.case, False, nbytes, self.device, n) for n in numbers]
        self.made.reader = Reader(self.channel, target.shard, model="bench", transport=transport)
        self.made.raw = [open_shared(bytes.fromhex(one), self.device) for one in raw]
        total = sum(one.nbytes for one in self.made.raw)
        self.made.landed = torch.empty(total, dtype=torch.uint8, device=self.device)
        target.poison()

    def drop(self) -> None:
        """Release all memory of the side."""
        made = self.made
        self.made = Resources()
        for resource in (made.reader, made.owner, made.weights):
            if resource is not None:
                resource.close()
        del made, resource  # the last references, so that the collection releases all memory
        gc.collect()

    def change(self, salt: int) -> None:
        """Write other bytes to the offered rows."""
        source = ready(self.made.source)
        source.fill(salt)
        fill(ready(self.made.dense).view(torch.int64), _dense_salt(salt, source.owner))
        self.settle()

    def expect(self, salt: int) -> None:
        """Expect other bytes from now on."""
        for mirror in ready(self.made.mirrors):
            mirror.fill(salt)
        self.salt = salt

    def offer(self, nbytes: int, name: str = "") -> str:
        """Return a ticket that many pulls may use: of the offer, or by a name in hexadecimal."""
        if not name:
            return self.offering(nbytes)().ticket.hex()
        self.offering(nbytes, name=bytes.fromhex(name))()
        epoch = ready(self.made.owner).epoch
        return Ticket.of(self.channel.address, epoch, bytes.fromhex(name)).hex()

    def offering(self, nbytes: int, **terms: Any) -> Callable[[], Offer]:
        """Return the call that makes an offer, as a server makes it, which knows its blocks."""
        terms |= {"tokens": self.case.tokens(nbytes), "lease": LEASE, "readers": READERS}
        blocks = ready(self.made.source).blocks(nbytes)
        return partial(ready(self.made.owner).offer, blocks, **terms)

    def withdraw(self) -> None:
        """End all offers."""
        ready(self.made.owner).revoke_all()

    def pull(self, ticket: str, nbytes: int, **terms: Any) -> Pull:
        """Begin to pull rows."""
        return self.pulling(ticket, nbytes, **terms)()

    def pulling(self, ticket: str | Sequence[str], nbytes: int, **terms: Any) -> Callable[[], Pull]:
        """Return the call that begins to pull rows, as a server makes it, which knows its
        blocks.

        ``ticket``: the only owner's, or a list with each owner's.
        """
        blocks = ready(self.made.target).blocks(nbytes)
        packed: bytes | list[bytes]
        if isinstance(ticket, str):
            packed = bytes.fromhex(ticket)
        else:
            packed = [bytes.fromhex(one) for one in ticket]
        return partial(ready(self.made.reader).pull, packed, blocks, **terms)

    def copy(self, nbytes: int) -> None:
        """Copy as many dense bytes without PortaKV, from each owner as many as its rows have."""
        raw = ready(self.made.raw)
        n = self.case.payload(nbytes) // len(raw)
        landed = ready(self.made.landed)
        for number, source in enumerate(raw):
            target = landed[number * n : (number + 1) * n]
            target.copy_(source[:n], non_blocking=True)

    def rows(self, nbytes: int) -> object:
        """Return the same rows in one process."""
        case = self.case
        (mirror,) = ready(self.made.mirrors)
        target = ready(self.made.target)
        src = mirror.shard.view.slice(heads=slice(*case.heads[:2]))
        ids = (Index(one.blocks(nbytes), step=one.size) for one in (mirror, target))
        return copy_rows(src, target.shard.view, *ids, count=case.tokens(nbytes))

    def right(self, nbytes: int, raw: bool = False) -> bool:
        """Return whether every byte of the last pull, or raw copy, is right; then erase it."""
        if not raw:
            return ready(self.made.target).has(ready(self.made.mirrors), nbytes)
        landed = ready(self.made.landed)
        owners = len(ready(self.made.raw))
        n = self.case.payload(nbytes) // owners
        same = True
        for number in range(owners):
            result = landed[number * n : (number + 1) * n]
            known = torch.empty_like(result).view(torch.int64)
            fill(known, _dense_salt(self.salt, number))
            same = same and torch.equal(result, known.view(torch.uint8))
        landed.fill_(POISON)
        return same

    def settle(self) -> None:
        torch.get_device_module(self.device).synchronize()

    def timed(
        self,
        what: str,
        nbytes: int,
        ticket: str = "",
        times: int = 1,
        at: float = 0,
        encoding: str = "",
    ) -> Any:
        """Do one of `pull`, `weights`, `copy`, `send`, `receive` and `read` so often, not before a
        time; when it began and ended, in seconds of the clock that all processes share.

        ``encoding``: of a pull."""
        n = self.case.payload(nbytes)
        self.settle()  # pulls follow the stream that `expect` fills: else its time would count
        terms = {"overlap": "idle", "encoding": encoding or None}
        calls: dict[str, Callable[[], Any]] = {
            "pull": self.pulling(ticket, nbytes, **terms) if what == "pull" else bool,
            "weights": lambda: pull_weights(
                self.channel, bytes.fromhex(ticket), ready(self.made.wanted)
            ),
            "copy": lambda: self.copy(nbytes),
            "send": lambda: ready(self.made.group).send(ready(self.made.dense)[:n]),
            "receive": lambda: ready(self.made.group).receive(ready(self.made.landed)[:n]),
            "read": lambda: ready(self.made.library).read(),
        }
        call = calls[what]
        began = perf_counter()
        while began < at:
            began = perf_counter()
        ended = [call() for _ in range(times)]
        for one in ended if what == "pull" else ():
            one.synchronize()
            self.pulled = one
        self.settle()
        return began, perf_counter()

    def crossed(self) -> int:
        """Return the bytes that crossed through staging buffers in the last timed pull."""
        return ready(self.pulled).statistics.wire_nbytes

    def payload(self, nbytes: int) -> int:
        """Return the bytes of the rows of a pull."""
        return self.case.payload(nbytes)

    def join(self, address: str = "") -> str:
        """Begin a group of torch.distributed here, or come to another side's; see `Group.meet`."""
        self.made.group = engines.Group(self.channel, self.device, address)
        return self.channel.address

    def meet(self) -> None:
        ready(self.made.group).meet()

    def start(self, name: str) -> None:
        """Start NIXL or Mooncake."""
        self.made.library = engines.Engine(name, self.device, self.channel.address)

    def lies(self, what: str, nbytes: int) -> tuple[str, list[tuple[int, int]]]:
        """Return the place of `source`, `target`, `dense` or `landed`.

        It is the library's words for it, and the address and bytes of each block, or of all.
        """
        library = ready(self.made.library)
        caches = {"source": self.made.source, "target": self.made.target}
        if what not in caches:
            tensors = {"dense": self.made.dense, "landed": self.made.landed}
            tensor = ready(tensors[what])
            return library.enter([tensor]), [(tensor.data_ptr(), self.case.payload(nbytes))]
        cache = ready(caches[what])
        step = cache.memory[0][0].nbytes
        ids = cache.blocks(nbytes).tolist()
        blocks = [(each.data_ptr() + step * block, step) for each in cache.memory for block in ids]
        return library.enter(cache.memory), blocks

    def will_read(self, what: str, nbytes: int, reach: str, remote: list[list[int]]) -> None:
        """Plan the next `read`: its sources and its destinations."""
        ready(self.made.library).plan(reach, remote, self.lies(what, nbytes)[1])

    def publish(self, shapes: list[list[int]], nbytes: int) -> tuple[str, list[str], str]:
        """Publish weights of these shapes.

        Return the ticket, each weight as shared, and `nbytes` dense bytes, as shared.
        """
        made = [memory((*shape,), torch.bfloat16, self.device) for shape in shapes]
        for at, one in enumerate(made):
            fill(one.view(-1).view(torch.int64), at)
        dense = memory((nbytes,), torch.uint8, self.device)
        self.made.dense = dense
        fill(dense.view(torch.int64), len(made))
        self.settle()
        named = {f"w{at}": Parameter(one) for at, one in enumerate(made)}
        weights = publish(self.channel, named)
        self.made.weights = weights
        shared = [share(one).hex() for one in (*made, dense)]
        return weights.ticket.hex(), shared[:-1], shared[-1]

    def publish_staged(self, count: int, nbytes: int, transport: str) -> str:
        """Publish weights of so many bytes in all for a transport alone; return the ticket."""
        made = self._weights(count, nbytes)
        for at, one in enumerate(made.values()):
            fill(one.view(torch.int64), at)
        self.settle()
        weights = publish(self.channel, made, expose="staging", transport=transport)
        self.made.weights = weights
        return weights.ticket.hex()

    def want(self, count: int, nbytes: int) -> None:
        """Allocate memory for such weights."""
        self.made.wanted = self._weights(count, nbytes)

    def _weights(self, count: int, nbytes: int) -> dict[str, torch.Tensor]:
        numbers = nbytes // count // 8 * 4
        return {f"w{n}": memory((numbers,), torch.bfloat16, self.device) for n in range(count)}

    def has_weights(self) -> bool:
        """Return whether every byte of the last pull of weights is right; then erase it."""
        same = True
        for at, one in enumerate(ready(self.made.wanted).values()):
            words = one.view(torch.int64)
            same = same and torch.equal(words, fill(torch.empty_like(words), at))
            words.zero_()
        return same

    def loop(self, matmul: int, seconds: float) -> float:
        """Return the milliseconds of a loop of matrix products."""
        self.products = self.products or engines.products(self.device, matmul, seconds)
        return engines.loop_ms(self.device, self.products)


def _dense_salt(salt: int, owner: int) -> int:
    """Return the salt of an owner's dense bytes."""
    return salt * 1000 + owner


class Far(far.Far):
    """A side in a separate process."""

    def __init__(self, device: torch.device, environment: Mapping[str, str] | None = None) -> None:
        # Without this Mooncake takes sockets between devices of one host, and says nothing.
        more = {"MC_INTRANODE_NVLINK": "1", **(environment or {})}
        super().__init__([__name__, str(device)], more, name=f"on {device}")
        self.device = device


def main() -> None:
    """Serve until the pipe ends."""
    out = far.answers()
    side = Side(usable_device(sys.argv[1]))
    if side.device.type != "cpu":
        torch.get_device_module(side.device).set_device(side.device)
    far.serve(side, out)
    os._exit(0)  # libraries of peers may not come to an end


if __name__ == "__main__":
    main()
