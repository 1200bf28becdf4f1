# SPDX-License-Identifier: Apache-2.0
"""Take slices from owners through staging buffers, and verify rows by checksums.

The functions run in the workers of a pull.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from math import inf
from queue import Empty
from time import monotonic, sleep

import torch
from msgspec.structs import replace

from portakv.copy.rows import copy_rows
from portakv.errors import PeerError, TransferCancelled, TransferError, TransferTimeout
from portakv.graph.graph import Graph, Queue
from portakv.graph.task import Task
from portakv.migrate.checksum import MODULUS, checksum
from portakv.migrate.messages import Answer, Gather
from portakv.migrate.plan import Slice, Step
from portakv.migrate.pull import CANCELLED, Pull
from portakv.migrate.staging import chunk, chunk_bytes, staging
from portakv.migrate.transports.base import Moving
from portakv.runtime.streams import StreamFence
from portakv.runtime.worker import RateLimit

PACED = 0.1  # seconds of a slice at a limited rate: a larger slice would be a burst
PATIENCE = 30.0  # seconds for which a busy owner gets the request again, and a buffer is waited for


def _take(
    step: Step, part: Slice, pull: Pull, after: StreamFence, pace: RateLimit, *_: object
) -> None:
    """Have an owner send a slice of a step, and scatter it from the staging buffer."""
    owner = step.owner
    stage = owner.staging
    number, buffer, moving = _free_buffer(step, pull)
    try:
        if moving is not None:  # the pull before was cancelled, and its bytes may still arrive
            _await(moving.free.wait, pull)
        with torch.inference_mode(False), after.inside():
            dst = step.cut.dst.as_bytes().slice(layers=slice(part.layers.start, part.layers.stop))
            nbytes = chunk_bytes(dst, part.tokens)
            if nbytes > buffer.nbytes:
                buffer = staging(nbytes, buffer.device, owner.handshake.slot_bytes)
            into = buffer[:nbytes]
            with _turn(step, pull):
                start = pace.start_of(nbytes)
                left = pace.left(start)
                while left and not pull.over:
                    sleep(min(left, 0.05))
                    left = pace.left(start)
                stage.tag += 1
                request = step.gather(*part, stage.transport.name, number, stage.tag)
                ask(step, request, pull)
                moving = stage.transport.lane(owner.address, owner.channel).move(into, stage.tag)
            src = chunk(dst, part.tokens, buffer)[1]
            dst_index = step.dst_index.shifted(part.first)
            _await(moving.wait, pull)
            copy_rows(src, dst, None, dst_index, count=part.tokens).synchronize()
    finally:
        stage.buffers.put((number, buffer, moving))


def _free_buffer(step: Step, pull: Pull) -> tuple[int, torch.Tensor, Moving | None]:
    """Return a free staging buffer of the owner; wait for it as long as the pull waits."""
    until = monotonic() + PATIENCE
    while True:
        with suppress(Empty):  # all buffers are in use
            return step.owner.staging.buffers.get(timeout=0.05)
        _check(pull, until)


@contextmanager
def _turn(step: Step, pull: Pull) -> Iterator[None]:
    """Hold the owner's turn, after other pulls have released it."""
    until = monotonic() + PATIENCE
    turn = step.owner.staging.turn
    while not turn.acquire(timeout=0.05):
        _check(pull, until)
    try:
        yield
    finally:
        turn.release()


def _check(pull: Pull, until: float) -> None:
    """Raise if a pull no longer waits for a staging buffer."""
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
    """Yield the tasks that take the rows of a step from its owner, and the layers of each task."""
    queue = graph.queue(f"take:{step.owner.number}", width=step.owner.handshake.slots)
    if pull.after is None:
        pull.after = StreamFence(step.cut.dst.device)
    pace = RateLimit(max_gbps or inf)
    most_bytes = min(PACED * 1e9 * (max_gbps or inf), 1 << 62)
    for part in step.slices(int(most_bytes)):
        take = partial(_take, step, part, pull, pull.after, pace)
        yield part.layers, Task(take, 1, queue=queue)


def verified(step: Step, pull: Pull, *_: object) -> None:
    """Compare the rows that a step copied with the owner's rows, by checksums."""
    request = step.gather(range(step.cut.dst.layers), 0, step.tokens)
    local = 0
    remote = 0
    for start, end in step.runs():
        part = replace(request, first=request.first + start, count=end - start)
        dst_index = step.dst_index.shifted(start)
        local += checksum(step.cut.dst, dst_index, part.count, step.cut.piece.box, part.first)
        remote += ask(step, part, pull, inf).digest
    if (local - remote) % MODULUS:
        raise TransferError(
            f"Expected the bytes of the rows of {step.owner.address}, got others (checksums "
            f"{local:x} and {remote:x}); no rows were committed. Pull again, or by another "
            f"transport."
        )


def verifications(plan: Sequence[Step], pull: Pull, queue: Queue) -> list[Task]:
    """Return the tasks that verify the rows of all steps."""
    return [Task(partial(verified, step, pull), 1, queue=queue) for step in plan]


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
            raise PeerError(f"{step.owner.address} sent no rows: {answer.why or 'it is busy.'}")
        pause = answer.seconds if answer.seconds > 0 else 1e-3
        sleep(min(pause, 0.05))  # at most this long, because the pull may end meanwhile
    raise TransferCancelled(CANCELLED)
