# SPDX-License-Identifier: Apache-2.0
"""One of two processes between which rows cross: it gives, takes, and looks at every byte. As a
program it does what the process that started it asks, a line of JSON for each call."""

from __future__ import annotations

import gc
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from time import perf_counter
from typing import Any

import torch

from portakv import Index, copy_rows
from portakv.migrate import Channel, Owner, Parameter, Pull, Reader, open_shared, publish, share
from portakv.migrate.weights import Published
from portakv.runtime.devices import usable_device
from portakv_benchmarks.migration import engines
from portakv_benchmarks.migration.cases import CASES, USUAL, Cache, memory
from portakv_benchmarks.shared.shapes import POISON, fill

LEASE = 3000.0
READERS = 1 << 20
PATIENCE = 60.0


#: Attributes of a `Side` that its calls set, and that `Side.drop` deletes.
_SET_LATER = (
    *("reader", "owner", "weights", "engine"),
    *("source", "target", "mirror", "dense", "raw", "landed"),
)


class Side:
    """Hold the rows and dense bytes that one process offers, and the memory for its pulls."""

    engine: Any  # an `engines.Group` or an `engines.Engine`

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.channel = Channel(timeout=30.0)
        self.salt = 0
        self.case = CASES[USUAL]
        self.products: Any = None

    def give(self, case: str, nbytes: int, **terms: Any) -> str:
        """Prepare to offer rows of a case; return the dense bytes, as shared."""
        self.case = CASES[case]
        self.source = Cache(self.case, False, nbytes, self.device)
        self.dense = memory((self.case.payload(nbytes),), torch.uint8, self.device)
        self.owner = Owner(self.channel, self.source.shard, model="bench", **terms)
        return share(self.dense).hex()

    def take(self, case: str, nbytes: int, raw: str, transport: str | None = None) -> None:
        """Allocate memory for rows of a case, and a mirror of the expected rows."""
        self.case = CASES[case]
        self.target = Cache(self.case, True, nbytes, self.device)
        self.mirror = Cache(self.case, False, nbytes, self.device)
        self.reader = Reader(self.channel, self.target.shard, model="bench", transport=transport)
        self.raw = open_shared(bytes.fromhex(raw), self.device)
        self.landed = torch.empty_like(self.raw)
        self.target.poison()

    def drop(self) -> None:
        """Release all memory of the side."""
        for name in _SET_LATER:
            one = vars(self).pop(name, None)
            if isinstance(one, Owner | Reader | Published):
                one.close()
        gc.collect()

    def change(self, salt: int) -> None:
        """Write other bytes to the offered rows."""
        self.source.fill(salt)
        fill(self.dense.view(torch.int64), salt)
        self.settle()

    def expect(self, salt: int) -> None:
        """Expect other bytes from now on."""
        self.mirror.fill(salt)
        self.salt = salt

    def offer(self, nbytes: int) -> str:
        """Return a ticket that many pulls may use."""
        terms: Any = {"tokens": self.case.tokens(nbytes), "lease": LEASE, "readers": READERS}
        ticket: bytes = self.owner.offer(self.source.blocks(nbytes), **terms).ticket
        return ticket.hex()

    def pull(self, ticket: str, nbytes: int, **terms: Any) -> Pull:
        """Begin to pull rows."""
        pulled: Pull = self.reader.pull(bytes.fromhex(ticket), self.target.blocks(nbytes), **terms)
        return pulled

    def copy(self, nbytes: int) -> None:
        """Copy as many dense bytes without PortaKV."""
        n = self.case.payload(nbytes)
        self.landed[:n].copy_(self.raw[:n], non_blocking=True)

    def rows(self, nbytes: int) -> object:
        """Return the same rows in one process."""
        case = self.case
        mirror = self.mirror
        target = self.target
        src = mirror.shard.view.slice(heads=slice(*case.heads[:2]))
        ids = (Index(one.blocks(nbytes), step=one.size) for one in (mirror, target))
        return copy_rows(src, target.shard.view, *ids, count=case.tokens(nbytes))

    def right(self, nbytes: int, raw: bool = False) -> bool:
        """Return whether every byte of the last pull, or raw copy, is right; then erase it."""
        if not raw:
            return self.target.has(self.mirror, nbytes)
        n = self.case.payload(nbytes)
        known = fill(torch.empty_like(self.landed).view(torch.int64), self.salt)
        same = torch.equal(self.landed[:n], known.view(torch.uint8)[:n])
        self.landed.fill_(POISON)
        return same

    def settle(self) -> None:
        torch.get_device_module(self.device).synchronize()

    def timed(self, what: str, nbytes: int, ticket: str = "", times: int = 1, at: float = 0) -> Any:
        """Do one of `pull`, `copy`, `send`, `receive` and `read` so often, not before a time; when
        it began and ended, in seconds of the clock that all processes share."""
        n = self.case.payload(nbytes)
        self.settle()  # pulls follow the stream that `expect` fills: else its time would count
        calls: dict[str, Callable[[], Any]] = {
            "pull": lambda: self.pull(ticket, nbytes, overlap="idle"),
            "copy": lambda: self.copy(nbytes),
            "send": lambda: self.engine.send(self.dense[:n]),
            "receive": lambda: self.engine.receive(self.landed[:n]),
            "read": lambda: self.engine.read(),
        }
        call = calls[what]
        began = perf_counter()
        while began < at:
            began = perf_counter()
        ended = [call() for _ in range(times)]
        for one in ended if what == "pull" else ():
            one.synchronize()
        self.settle()
        return began, perf_counter()

    def join(self, address: str = "") -> str:
        """Begin a group of torch.distributed here, or come to another side's; see `Group.meet`."""
        self.engine = engines.Group(self.channel, self.device, address)
        return self.channel.address

    def meet(self) -> None:
        self.engine.meet()

    def start(self, name: str) -> None:
        """Start NIXL or Mooncake."""
        self.engine = engines.Engine(name, self.device, self.channel.address)

    def lies(self, what: str, nbytes: int) -> tuple[str, list[tuple[int, int]]]:
        """Return the place of `source`, `target`, `dense` or `landed`: the engine's words for it,
        and the address and bytes of each block, or of all."""
        one = getattr(self, what)
        if not isinstance(one, Cache):
            return self.engine.enter([one]), [(one.data_ptr(), self.case.payload(nbytes))]
        step = one.memory[0][0].nbytes
        ids = one.blocks(nbytes).tolist()
        results = [(each.data_ptr() + step * block, step) for each in one.memory for block in ids]
        return self.engine.enter(one.memory), results

    def will_read(self, what: str, nbytes: int, reach: str, remote: list[list[int]]) -> None:
        """Plan the next `read`: its sources and its destinations."""
        self.engine.plan(reach, remote, self.lies(what, nbytes)[1])

    def publish(self, shapes: list[list[int]], nbytes: int) -> tuple[str, list[str], str]:
        """Publish weights of these shapes.

        Return the ticket, each weight as shared, and `nbytes` dense bytes, as shared.
        """
        made = [memory((*shape,), torch.bfloat16, self.device) for shape in shapes]
        for at, one in enumerate(made):
            fill(one.view(-1).view(torch.int64), at)
        self.dense = memory((nbytes,), torch.uint8, self.device)
        fill(self.dense.view(torch.int64), len(made))
        self.settle()
        named = {f"w{at}": Parameter(one) for at, one in enumerate(made)}
        self.weights = publish(self.channel, named)
        shared = [share(one).hex() for one in (*made, self.dense)]
        return self.weights.ticket.hex(), shared[:-1], shared[-1]

    def loop(self, matmul: int, seconds: float) -> float:
        """Return the milliseconds of a loop of matrix products."""
        self.products = self.products or engines.products(self.device, matmul, seconds)
        return engines.loop_ms(self.device, self.products)


class Far:
    """A side in a separate process."""

    def __init__(self, device: torch.device) -> None:
        paths = os.pathsep.join(path for path in sys.path if path)
        words = [sys.executable, "-m", __name__, str(device)]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        # Without the second Mooncake takes sockets between devices of one host, and says nothing.
        more = {"PYTHONPATH": paths, "MC_INTRANODE_NVLINK": "1"}
        self.process: Any = subprocess.Popen(words, env={**os.environ, **more}, **pipes)
        self.device = device
        self._pending = False

    def begin(self, name: str, *arguments: object, **named: object) -> None:
        """Start a call in the process without waiting for its answer."""
        if self._pending:  # a step that failed here did not wait for its answer
            with suppress(RuntimeError):
                self.end()
        self._pending = True
        self.process.stdin.write(json.dumps([name, arguments, named]) + "\n")
        self.process.stdin.flush()

    def ready(self, timeout: float = 0.0) -> bool:
        """Return whether the process answers."""
        return bool(select.select([self.process.stdout], [], [], timeout)[0])

    def end(self, timeout: float = PATIENCE) -> Any:
        """Return the answer; raises `RuntimeError` for what failed there, or if it hangs."""
        self._pending = False
        if not self.ready(timeout):
            self.close()
            raise RuntimeError(f"the process on {self.device} did not answer in {timeout:g} s")
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"the process on {self.device} ended: {self.process.wait(5)}")
        answer, refused = json.loads(line)
        if refused:
            raise RuntimeError(f"the process on {self.device}: {refused}")
        return answer

    def do(self, name: str, *arguments: object, **named: object) -> Any:
        self.begin(name, *arguments, **named)
        return self.end()

    def close(self) -> None:
        with suppress(OSError):
            self.process.kill()
        self.process.communicate()


def main() -> None:
    """Serve until the pipe ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    side = Side(usable_device(sys.argv[1]))
    if side.device.type != "cpu":
        torch.get_device_module(side.device).set_device(side.device)
    for line in sys.stdin:
        name, arguments, named = json.loads(line)
        try:
            answer = [getattr(side, name)(*arguments, **named), ""]
        except Exception as error:
            answer = [None, f"{type(error).__name__}: {error}".partition("\n")[0]]
        out.write(json.dumps(answer) + "\n")
        out.flush()
    os._exit(0)  # libraries of peers may not come to an end


if __name__ == "__main__":
    main()
