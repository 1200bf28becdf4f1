# SPDX-License-Identifier: Apache-2.0
"""Run what waits on the loop, port by port, in a process whose loops are watched.

A port is also run beside a thread that holds the interpreter, once it has imported what it needs.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from secrets import token_bytes
from tempfile import TemporaryDirectory
from typing import Any

import torch

from portakv import KVView, TransferCancelled, copy_blocks
from portakv.migrate import Channel
from portakv.serving import SchedulerSide
from portakv.serving.plan import Handovers
from portakv.storage import BlockForm, BlockStore, Disk, Remote
from portakv.tasks import Wait, runtime
from portakv.weights import publish, pull_weights
from support.handing import Side
from support.migrate_pulls import Couple, sides
from support.seeded_loop import MOST, watch_steps
from support.serving_model import Engine
from support.store_engine import RealStore, StoreWorker
from support.store_server_host import KEYS, caches, hosts, same
from support.waits import LIMIT, until
from support.weight_cases import shared, whole_of

#: How often each port does its work: once as the first time, and once again.
ROUNDS = 2


def pull(**terms: Any) -> None:
    """Pull rows that are mapped."""
    with sides() as made:
        both = Couple(made, **terms)
        for number in range(ROUNDS):
            offer = both.offer()
            both.pull(offer, verify=number == ROUNDS - 1).synchronize(LIMIT)
            assert both.right()
            assert offer.taken(LIMIT)


def staged_pull() -> None:
    """Pull rows through staging buffers, by the transport that runs here."""
    pull(method="staging")


def store_server() -> None:
    """Save and load through the store server of a host."""
    with hosts() as made:
        whole = caches()
        into = caches()
        blocks = made(whole).join(whole).blocks[0]
        for _ in range(ROUNDS):
            blocks.save(whole, range(4), KEYS[:4]).synchronize(LIMIT)
            loaded = blocks.load(into, range(4), KEYS[:4])
            loaded.synchronize(LIMIT)
            assert loaded.landed.all()
            assert same(whole, into, 4)


def store(tier: Callable[[str], Any], rows: int = 0, many: int = 4) -> None:
    """Save and load blocks of a store with a tier.

    Args:
        rows: of the host tier.
        many: blocks of a save.
    """
    whole = caches()
    into = caches()
    form = BlockForm.of(whole, "model")
    size = form.image_bytes
    with TemporaryDirectory() as folder:
        tiers = [tier(folder)]
        terms: dict[str, Any] = {"staging": 16 * size, "host": rows * size, "tiers": tiers}
        with BlockStore(form, **terms) as made:
            for number in range(ROUNDS):
                keys = [bytes([number]) + key[1:] for key in KEYS[:many]]
                made.save(whole, range(many), keys).synchronize(LIMIT)
                for each in (keys, [bytes(1) + key[1:] for key in keys]):  # and of the first round
                    made.load(into, range(many), each).synchronize(LIMIT)
                    assert same(whole, into, many)


def disk() -> None:
    """Save and load blocks of a disk."""
    store(lambda folder: Disk(folder, capacity=1 << 24))


def remote() -> None:
    """Save and load blocks of an object store, which is a folder."""
    store(lambda folder: Remote(f"file://{folder}"))


def eviction() -> None:
    """Save more blocks than the host tier has rows for, and load those that went to a disk."""
    store(lambda folder: Disk(folder, capacity=1 << 24), rows=8, many=8)


def engine() -> None:
    """Run the requests of an engine: both of its sides save and load."""
    made = Engine(SchedulerSide, 4, RealStore, StoreWorker)
    try:
        made.run(24)
        assert made.scheduler_side.counts["landed_blocks"]
    finally:
        made.store.close()


def hand_over() -> None:
    """Hand the rows of requests over from one engine to another."""
    with ExitStack() as stack:
        src = Side(8, 16, pulls=False)
        stack.callback(src.handover.close)
        dst = Side(8, 32, offers=False)
        stack.callback(dst.handover.close)
        src.write(range(5))
        for _ in range(ROUNDS):
            name = token_bytes(32)
            src.offer(name, range(5))
            dst.pull([src.ticket(name)], range(3))
            assert dst.pulled()
            assert dst.right(range(3))
            dst.step(Handovers(released=[src.ticket(name)]))
            assert until(lambda: bool(src.step().freed), LIMIT)
            src.freed.clear()
            dst.loaded.clear()


def slices() -> None:
    """Copy in slices, with a pause of the rate after each, and cancel one copy."""
    src, dst = (torch.zeros(64, 2, 1 << 16, dtype=torch.uint8) for _ in range(2))
    src += torch.arange(64, dtype=torch.uint8)[:, None, None]
    paged, into = (KVView(each, "block token dim") for each in (src, dst))
    ids = range(64)
    for _ in range(ROUNDS):
        dst.zero_()
        copy_blocks(paged, into, ids, ids, max_gbps=1.0).synchronize(LIMIT)
        assert torch.equal(src, dst)
    stopped = copy_blocks(paged, into, ids, ids, max_gbps=1e-6)
    assert stopped.cancel()
    with suppress(TransferCancelled):
        stopped.synchronize(LIMIT)


def weights() -> None:
    """Pull the weights of a model."""
    with ExitStack() as stack:
        owner, reader = (stack.enter_context(closing(Channel(timeout=LIMIT))) for _ in range(2))
        whole = shared(whole_of((64, 32)))
        published = stack.enter_context(closing(publish(owner, {"w": whole})))
        for _ in range(ROUNDS):
            into = torch.zeros(64, 32, dtype=torch.int32, device="cpu")
            pull_weights(reader, published.ticket, {"w": into})
            assert torch.equal(into, whole)


def slow() -> None:
    """Keep the loop busy for a step: the fault that the watchdog has to find."""

    async def steps() -> None:
        await Wait(until=runtime().time())
        end = time.thread_time() + 2 * MOST
        while time.thread_time() < end:
            pass
        await Wait(until=runtime().time())

    runtime().start(steps()).synchronize(LIMIT)


PORTS: dict[str, Callable[[], None]] = {
    each.__name__: each
    for each in (
        *(pull, staged_pull, store_server, disk, remote, eviction, engine, hand_over, slices),
        weights,
    )
}


def hold() -> None:
    """Hold the interpreter for ever."""
    while True:
        pass


def main(busy: bool, ports: Sequence[str]) -> None:
    """Run ports, perhaps once more beside a busy thread; print each with its slow steps."""
    gc.disable()  # it may collect in any step
    seconds = watch_steps()
    runs = [(port, {**PORTS, "slow": slow}[port]) for port in ports]
    if busy:
        for _, run in runs:
            run()
        threading.Thread(target=hold, daemon=True).start()
    for port, run in runs:
        seconds.clear()
        began = time.process_time()
        run()
        print(port, *seconds, flush=True)
        print(port, f"took {time.process_time() - began:.2f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1] == "busy", sys.argv[2:])
