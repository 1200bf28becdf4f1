# SPDX-License-Identifier: Apache-2.0
"""What a reader's workers do with owners that bring rows for it: take slices through slots, and
compare digests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from math import inf
from queue import Empty
from time import monotonic, sleep

import torch
from msgspec.structs import replace

from portakv.copy.rows import copy_rows
from portakv.errors import PeerError, TransferCancelled, TransferError, TransferTimeout
from portakv.graph.graph import Graph, Task
from portakv.migrate.checksum import MODULUS, checksum
from portakv.migrate.chunks import chunk, chunk_bytes, staging
from portakv.migrate.messages import Answer, Gather
from portakv.migrate.published import CANCELLED, Pull
from portakv.migrate.steps import Slice, Step
from portakv.migrate.transports.base import Moving
from portakv.runtime.streams import StreamFence
from portakv.runtime.worker import RateLimit

PACED = 0.1  # seconds of a slice at a limited rate: larger ones would be bursts
PATIENCE = 30.0  # seconds for which an owner that is busy is asked again, and a slot waited for


def _take(step: Step, part: Slice, pull: Pull, pace: RateLimit, *_: object) -> None:
    """Have an owner bring a slice of a step into a slot, take it, and scatter it."""
    (layers, at, count) = part
    owner = step.owner
    number, room, moving = _free_slot(step, pull)
    try:
        if moving is not None:  # whose pull was stopped; bytes may still come
            _await(moving.free.wait, pull)
        with torch.inference_mode(False), pull.behind.inside():
            dst = step.cut.dst.as_bytes().slice(layers=slice(layers.start, layers.stop))
            if (nbytes := chunk_bytes(dst, count)) > room.nbytes:
                room = staging(nbytes, room.device, owner.welcome.slot_bytes)
            slot = room[:nbytes]
            with _turn(step, pull):
                start = pace.start_of(slot.nbytes)
                while (left := pace.left(start)) and not pull.over:
                    sleep(min(left, 0.05))
                owner.tag += 1
                terms = {"transport": owner.transport.name, "slot": number, "tag": owner.tag}
                ask(step, step.gather(layers, at, count, **terms), pull)
                moving = owner.transport.lane(owner.address, owner.channel).move(slot, owner.tag)
            src = chunk(dst, count, room)[1]
            mine = step.mine.shifted(at)
            _await(moving.wait, pull)
            copy_rows(src, dst, None, mine, count=count).synchronize()
    finally:
        owner.slots.put((number, room, moving))


def _free_slot(step: Step, pull: Pull) -> tuple[int, torch.Tensor, Moving | None]:
    """Return a slot of the owner once one is free, for as long as the pull waits."""
    until = monotonic() + PATIENCE
    while True:
        with suppress(Empty):
            return step.owner.slots.get(timeout=0.05)
        _check(pull, until)


@contextmanager
def _turn(step: Step, pull: Pull) -> Iterator[None]:
    """Hold the owner's turn, once other pulls have given it back."""
    until = monotonic() + PATIENCE
    while not step.owner.turn.acquire(timeout=0.05):
        _check(pull, until)
    try:
        yield
    finally:
        step.owner.turn.release()


def _check(pull: Pull, until: float) -> None:
    """Raise if a pull waits no more for a slot."""
    if pull.over:
        raise TransferCancelled(CANCELLED)
    if monotonic() > until:
        raise TransferTimeout(f"No staging buffer was free for {PATIENCE:g} s. Pull again later.")


def _await(ended: Callable[[float], bool], pull: Pull) -> None:
    until = monotonic() + PATIENCE
    while not ended(0.05):
        _check(pull, until)


def taken(
    graph: Graph, step: Step, pull: Pull, max_gbps: float | None
) -> Iterator[tuple[range, Task]]:
    """The tasks that bring the rows of a step which are moved, and the layers of each."""
    queue = graph.queue(f"take:{step.owner.number}", width=step.owner.welcome.slots)
    pull.behind = pull.behind or StreamFence(step.cut.dst.device)
    pace = RateLimit(max_gbps or inf)
    nbytes = min(PACED * 1e9 * (max_gbps or inf), 1 << 62)
    for part in step.slices(int(nbytes)):
        yield part[0], Task(partial(_take, step, part, pull, pace), 1, queue=queue)


def verified(step: Step, pull: Pull, *_: object) -> None:
    """Compare what a step brought with what its owner has, by digests."""
    asked = step.gather(range(step.cut.dst.layers), 0, step.tokens)
    mine = 0
    theirs = 0
    for start, end in step.runs():
        part = replace(asked, first=asked.first + start, count=end - start)
        here = step.mine.shifted(start)
        mine += checksum(step.cut.dst, here, part.count, step.cut.piece.box, part.first)
        theirs += ask(step, part, pull, inf).digest
    if (mine - theirs) % MODULUS:
        raise TransferError(
            f"Rows of {step.owner.address} were pulled, and are other bytes than it has (digests "
            f"{mine:x} and {theirs:x}); nothing is published. Pull again, or by another way."
        )


def ask(step: Step, gather: Gather, pull: Pull, patience: float = PATIENCE) -> Answer:
    """Return an owner's answer to a gather; ask again while the owner is busy."""
    until = monotonic() + patience
    channel = step.owner.channel
    while not pull.over:
        try:
            answer = channel.ask(step.owner.address, gather, Answer, stop=lambda: pull.over)
        except TransferTimeout:
            if pull.over:
                raise TransferCancelled(CANCELLED) from None
            raise
        if answer.state == "done":
            return answer
        if answer.state == "gone":
            raise step.ticket.gone(answer.why)
        if answer.state != "busy" or monotonic() > until:
            raise PeerError(f"{step.owner.address} brought no rows: {answer.why or 'it is busy.'}")
        pause = answer.seconds if answer.seconds > 0 else 1e-3
        sleep(min(pause, 0.05))  # whatever it says, as a pull may end meanwhile
    raise TransferCancelled(CANCELLED)
