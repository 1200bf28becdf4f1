# SPDX-License-Identifier: Apache-2.0
"""Take rows from owners through staging buffers, and verify rows by checksums.

A `Taker` requests all rows of one offer together. The owner sends them in slices. While one slice
crosses, the owner fills the buffer of the next, and the reader empties the buffer of the one
before. The functions run in the workers of a pull.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from math import inf
from queue import Empty
from time import monotonic, sleep
from typing import NamedTuple

import numpy as np
import torch
from msgspec.structs import replace

from portakv import arguments
from portakv.copy.handle import BlockTransfer
from portakv.copy.rows import copy_rows
from portakv.errors import (
    PeerError,
    PortaKVError,
    TransferCancelled,
    TransferError,
    TransferTimeout,
)
from portakv.graph.graph import Graph, Queue
from portakv.graph.task import Task
from portakv.migrate.checksum import MODULUS, checksum
from portakv.migrate.connections import Source, StagingBuffer
from portakv.migrate.messages import MOST_PARTS, Answer, Gather, Stop, Stopped, Sum
from portakv.migrate.plan import Slice, Step
from portakv.migrate.pull import CANCELLED, Pull
from portakv.migrate.staging import chunk, rows_bytes, staging
from portakv.migrate.transports.base import Lane, Moving
from portakv.runtime.streams import StreamFence
from portakv.runtime.worker import RateLimit

PACED = 0.1  # seconds of a slice at a limited rate: a larger slice would be a burst
#: Slices of a request at a limited rate: other pulls of the owner's rows get a turn after them.
MOST_PACED = 8
PATIENCE = 30.0  # seconds for which a busy owner gets the request again, and a buffer is waited for
STOPPING = 0.5  # seconds for the answer of an owner that is to stop
#: The slices of a pull that is large enough: one is filled while another crosses.
SLICES = 8
#: The bytes below which slices are not made smaller: each has its cost on both sides.
LEAST_ON_HOST = 32 << 20
LEAST_ON_DEVICE = 64 << 20


class Landing(Task):
    """The end of a slice of a step, for the layers of a pull. The task ``whole`` takes the slice,
    among others."""

    def __init__(self, step: Step, part: Slice, whole: Task) -> None:
        super().__init__(None, 1)
        self.step = step
        self.part = part
        self.whole = whole
        self._over = threading.Event()

    @property
    def nbytes_staged(self) -> int:
        """Return the bytes of the slice in a staging buffer."""
        view = self.step.cut.dst.as_bytes()
        return rows_bytes(view, len(self.part.layers), self.part.tokens, view.heads)

    def land(self, error: BaseException | None = None) -> None:
        """End the slice, unless it has ended."""
        if not self.ended:
            self.error = error
            self.landed = np.full(1, error is None)
            self.ended = True
            self._over.set()

    def wait(self, timeout: float | None = None) -> bool:
        until = monotonic() + arguments.seconds("timeout", timeout, optional=True)
        while not self._over.wait(min(0.05, max(0.0, until - monotonic()))):
            if self.whole.wait(0.0):  # it never ran, or this process was forked
                if self.whole.ended:
                    self.land(self.whole.error or TransferCancelled(CANCELLED))
                return True
            if monotonic() >= until:
                return False
        return True


class _Flying(NamedTuple):
    """A slice on its way into a staging buffer."""

    landing: Landing
    buffer: StagingBuffer
    moving: Moving


class _Scattered(NamedTuple):
    """A slice whose copy from the staging buffer was issued."""

    landing: Landing
    moving: Moving
    copy: BlockTransfer


class Taker:
    """Takes the rows of one offer for a pull: one request, and its slices in their order.

    No host waits between the slices of a device: streams order all copies.
    """

    def __init__(
        self, graph: Graph, steps: Sequence[Step], pull: Pull, max_gbps: float | None
    ) -> None:
        first = steps[0]
        self._source = Source(first.ticket, first.owner)
        self._stage = first.owner.staging
        self._pull = pull
        self._device = first.cut.dst.device
        if pull.after is None:
            pull.after = StreamFence(self._device)
        self._after = pull.after
        self._rate = RateLimit(max_gbps or inf)
        self._batch = MOST_PACED if max_gbps else MOST_PARTS
        queue = graph.queue(f"take:{first.owner.number}", width=first.owner.handshake.slots)
        self.task = Task(self._run, 1, queue=queue, name="take")
        most = _slice_bytes(sum(step.nbytes for step in steps), self._device, max_gbps)
        self.landings = [
            Landing(step, part, self.task) for step in steps for part in step.slices(most)
        ]
        self._flying = deque[_Flying]()
        self._scattered = deque[_Scattered]()

    def _run(self, *_: object) -> None:
        """Take all slices; return after the last copy, with or without an error."""
        error: BaseException | None = None
        try:
            with torch.inference_mode(False), self._after.inside():
                for start in range(0, len(self.landings), self._batch):
                    self._take(self.landings[start : start + self._batch])
                    while self._flying:
                        self._scatter()
                    self._settle(wait=True)
        except BaseException as caught:
            error = caught
            raise
        finally:
            self._release(error)

    def _take(self, batch: Sequence[Landing]) -> None:
        """Request slices, and post the transport's receives for all of them in their order."""
        stage = self._stage
        address = self._source.owner.address
        with self._turn():
            lane: Lane = stage.transport.lane(address, self._source.owner.channel)
            lane.meet()
            tag = stage.tag + 1
            stage.tag += len(batch)
            posted = 0
            try:
                self._request(batch, tag)
                for number, landing in enumerate(batch):
                    nbytes = landing.nbytes_staged
                    buffer = self._free_buffer(lane, nbytes)
                    self._pace(nbytes)
                    moving = lane.move(buffer.memory[:nbytes], tag + number)
                    buffer.moving = moving
                    buffer.lane = lane
                    self._flying.append(_Flying(landing, buffer, moving))
                    posted += 1
            except BaseException:
                self.stop(lane, batch, tag, posted)
                raise

    def _request(self, batch: Sequence[Landing], tag: int) -> None:
        """Have the owner send slices under the tags from ``tag`` on."""
        ticket = self._source.ticket
        parts = tuple(each.step.part(*each.part) for each in batch)
        name = self._stage.transport.name
        ask(self._source, Gather(ticket.epoch, ticket.offer, parts, name, tag), self._pull)

    def _free_buffer(self, lane: Lane, nbytes: int) -> StagingBuffer:
        """Return a free staging buffer; empty the oldest of this pull if there is none."""
        until = monotonic() + PATIENCE
        pool = self._stage.buffers
        while True:
            with suppress(Empty):
                buffer = pool.get_nowait() if self._flying else pool.get(timeout=0.05)
                break
            if self._flying:
                self._scatter()
            self._check(until)
        try:
            self._make_ready(buffer, lane, nbytes)
        except BaseException:
            pool.put(buffer)
            raise
        return buffer

    def _make_ready(self, buffer: StagingBuffer, lane: Lane, nbytes: int) -> None:
        """Order the current stream after the last use of a buffer, or wait for the end of its use
        if no stream orders it; let the buffer grow."""
        copy = buffer.copy
        grows = nbytes > buffer.memory.nbytes
        # The bytes of a pull that has ended early may still arrive.
        if buffer.moving is not None and (copy is None or grows or buffer.lane is not lane):
            self._await(buffer.moving.free.wait)
        if copy is not None:
            if grows:
                copy.synchronize()
            else:
                copy.wait()
            buffer.copy = None
        if grows:
            most = self._source.owner.handshake.slot_bytes
            buffer.memory = staging(nbytes, buffer.memory.device, most)

    def _scatter(self) -> None:
        """Copy the rows of the oldest slice from its staging buffer, after its bytes."""
        landing, buffer, moving = self._flying[0]
        view = landing.step.cut.dst.as_bytes()
        layers, first, tokens = landing.part
        dst = view.slice(layers=slice(layers.start, layers.stop))
        src = chunk(dst, tokens, buffer.memory)[1]
        self._await(moving.follow)
        copy = copy_rows(src, dst, None, landing.step.dst_index.shifted(first), count=tokens)
        self._scattered.append(_Scattered(landing, moving, copy))
        if buffer.memory.device.type == "cpu":  # no stream orders the next bytes after the copy
            copy.synchronize()
        buffer.copy = copy
        self._flying.popleft()
        self._stage.buffers.put(buffer)
        self._settle(wait=False)

    def _settle(self, wait: bool) -> None:
        """End the slices whose bytes and copies have ended, or wait for all."""
        while self._scattered:
            landing, moving, copy = self._scattered[0]
            if not wait and not (moving.over.is_set() and copy.done()):
                return
            self._await(moving.wait)
            copy.synchronize()
            landing.land()
            self._scattered.popleft()

    def _release(self, error: BaseException | None) -> None:
        """Wait for the copies in flight, return the buffers, and end the slices."""
        for flying in self._flying:
            self._stage.buffers.put(flying.buffer)
        for scattered in self._scattered:
            with suppress(PortaKVError):  # the slice has an error before
                scattered.copy.synchronize()
        self._flying.clear()
        self._scattered.clear()
        for landing in self.landings:
            landing.land(error)

    def stop(self, lane: Lane, batch: Sequence[Landing], tag: int, posted: int) -> None:
        """Stop a request of which ``posted`` slices have a receive.

        Both sides stay in step: the owner sends no more slices than it says, and this side receives
        them. Otherwise the lane is closed.
        """
        owner = self._source.owner
        if owner.gone or lane.gone is not None:
            return
        try:
            stop = Stop(tag, posted)
            sent = owner.channel.ask(owner.address, stop, Stopped, STOPPING).parts
        except PortaKVError:
            lane.close(PeerError("The owner did not stop; its buffers did not cross."))
            return
        for number, landing in enumerate(batch[:sent]):
            if number >= posted:
                memory = staging(landing.nbytes_staged, self._stage.device)
                lane.move(memory, tag + number)

    def _pace(self, nbytes: int) -> None:
        """Wait for the turn of a slice at the pull's rate."""
        start = self._rate.start_of(nbytes)
        left = self._rate.left(start)
        while left and not self._pull.over:
            if self._flying and self._flying[0].moving.over.is_set():
                self._scatter()
            else:
                sleep(min(left, 0.01))
            left = self._rate.left(start)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the owner's turn, after other pulls have released it."""
        until = monotonic() + PATIENCE
        turn = self._stage.turn
        while not turn.acquire(timeout=0.05):
            self._check(until)
        try:
            yield
        finally:
            turn.release()

    def _check(self, until: float) -> None:
        """Raise if the pull no longer waits for a staging buffer."""
        if self._pull.over:
            raise TransferCancelled(CANCELLED)
        if monotonic() > until:
            raise TransferTimeout(
                f"No staging buffer was free for {PATIENCE:g} s. Pull again later."
            )

    def _await(self, ended: Callable[[float], bool]) -> None:
        """Wait for the bytes of a buffer, as long as the pull waits."""
        until = monotonic() + PATIENCE
        while not ended(0.05):
            self._check(until)


def _slice_bytes(nbytes: float, device: torch.device, max_gbps: float | None) -> int:
    """Return the most bytes of a slice of a pull."""
    least = LEAST_ON_HOST if device.type == "cpu" else LEAST_ON_DEVICE
    most = max(least, -(-int(nbytes) // SLICES))
    return most if max_gbps is None else min(most, int(PACED * 1e9 * max_gbps))


def verified(step: Step, pull: Pull, *_: object) -> None:
    """Compare the rows that a step copied with the owner's rows, by checksums."""
    whole = step.part(range(step.cut.dst.layers), 0, step.tokens)
    source = Source(step.ticket, step.owner)
    local = 0
    remote = 0
    for start, end in step.runs():
        part = replace(whole, first=whole.first + start, count=end - start)
        dst_index = step.dst_index.shifted(start)
        local += checksum(step.cut.dst, dst_index, part.count, step.cut.piece.box, part.first)
        request = Sum(step.ticket.epoch, step.ticket.offer, part)
        remote += ask(source, request, pull, inf).digest
    if (local - remote) % MODULUS:
        raise TransferError(
            f"Expected the bytes of the rows of {step.owner.address}, got others (checksums "
            f"{local:x} and {remote:x}); no rows were committed. Pull again, or by another "
            f"transport."
        )


def verifications(plan: Sequence[Step], pull: Pull, queue: Queue) -> list[Task]:
    """Return the tasks that verify the rows of all steps."""
    return [Task(partial(verified, step, pull), 1, queue=queue) for step in plan]


def ask(source: Source, request: Gather | Sum, pull: Pull, patience: float = PATIENCE) -> Answer:
    """Return an owner's answer to a request for rows; ask again while the owner is busy."""
    until = monotonic() + patience
    owner = source.owner
    while not pull.over:
        try:
            answer = owner.channel.ask(owner.address, request, Answer, stop=lambda: pull.over)
        except TransferTimeout:
            if pull.over:
                raise TransferCancelled(CANCELLED) from None
            raise
        if answer.state == "done":
            return answer
        if answer.state == "gone":
            raise source.ticket.gone(answer.why)
        if answer.state != "busy" or monotonic() > until:
            raise PeerError(f"{owner.address} sent no rows: {answer.why or 'it is busy.'}")
        pause = answer.seconds if answer.seconds > 0 else 1e-3
        sleep(min(pause, 0.05))  # at most this long, because the pull may end meanwhile
    raise TransferCancelled(CANCELLED)
