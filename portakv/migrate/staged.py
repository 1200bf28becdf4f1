# SPDX-License-Identifier: Apache-2.0
"""Take rows from owners through staging buffers.

A `Taker` requests all rows of one offer together. The owner sends them in slices. While one slice
crosses, the owner fills the buffer of the next, and the reader empties the buffer of the one
before. The functions run in the workers of a pull.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from math import inf
from time import monotonic, sleep

import torch

from portakv.errors import (
    PeerError,
    PortaKVError,
    TransferCancelled,
    TransferTimeout,
)
from portakv.graph import Graph, Task
from portakv.migrate.arrival import Arrival, Crossed, InFlight, Scattered, arrivals, end_unfit
from portakv.migrate.asking import PATIENCE, ask, leave_to_owner
from portakv.migrate.asking import verified as verified
from portakv.migrate.buffers import StagingBuffer
from portakv.migrate.connections import Source
from portakv.migrate.messages import Answer, Gather, Stop, Stopped
from portakv.migrate.plan import Step
from portakv.migrate.pull import CANCELLED, Pull, known
from portakv.migrate.transports.base import Lane
from portakv.runtime.streams import StreamFence
from portakv.runtime.worker import RateLimit

#: Slices of a request, after which another pull of the owner's rows gets a turn; fewer at a limited
#: rate.
BATCH = 16
MOST_PACED = 8
LOOK = 0.05  # seconds between two looks at the pulls that need a lane
STOPPING = 0.5  # seconds for the answer of an owner that is to stop, and for its last slices


class Taker:
    """Takes the rows of one offer for a pull: one request, and its slices in their order.

    No host waits between the slices of a device: streams order all copies.

    Attributes:
        commits: the pull has no other part, so the worker that took the rows also ends the pull.
            It asks whether the offer held while the last copies of a device run; copies on the
            host have ended before.
    """

    commits = False

    def __init__(
        self,
        graph: Graph,
        steps: Sequence[Step],
        pull: Pull,
        max_gbps: float | None,
        crossed: Crossed,
    ) -> None:
        first = steps[0]
        self._graph = graph
        self._crossed = crossed
        self._source = Source(first.ticket, first.owner)
        self._stage = first.owner.staging
        self._pull = pull
        if pull.after is None:
            pull.after = StreamFence(first.cut.dst.device)
        self._after = pull.after
        self._rate = RateLimit(max_gbps or inf)
        queue = graph.queue(f"take:{first.owner.number}", width=first.owner.handshake.slots)
        self.task = Task(self._run, 1, queue=queue, name="take")
        self.arrivals = arrivals(steps, max_gbps, self.task, crossed)
        self._in_flight = deque[InFlight]()
        self._scattered = deque[Scattered]()
        self._answers: list[Answer | PortaKVError] | None = None  # whether the offer held

    def _run(self, *_: object) -> None:
        """Take all slices, and end the pull if no other worker does."""
        try:
            self._take_all()
        finally:
            if self.commits:
                self._pull.confirm([self._source], self._answers)

    def _take_all(self) -> None:
        """Take all slices; return after the last copy, with or without an error."""
        error: BaseException | None = None
        self._stage.takers.add(self)
        try:
            with torch.inference_mode(False), self._after.inside():
                if self._crossed.auto:
                    leave_to_owner(self.arrivals, self._pull, self._crossed)
                    self._note_choices()
                start = self._stage.history.begin()
                self._take_each(self.arrivals)
                if self._crossed.packed:
                    self._settle(wait=True)  # only then it is known which blocks did not fit
                    end_unfit(self.arrivals, self._pull.requested.unfit)
                    self._take_each([x for each in self.arrivals for x in each.again])
                if self.commits:
                    for placing in self._scattered:
                        self._await(placing.moving.wait)
                    # The answer is read here: other requests to the owner wait for it.
                    self._answers = self._pull.ask(self._source)
                self._settle(wait=True)
                takers = [*self._stage.takers]  # of all pulls, since they share the transport
                if start is not None and all(taker.measures for taker in takers):
                    self._stage.history.end(start)
        except BaseException as caught:
            error = caught
            # The others of the pull need not go on, and no mark is waited for.
            self._pull.stop(known(caught) or TransferCancelled(CANCELLED))
            raise
        finally:
            self._stage.takers.discard(self)
            self._release(error)

    def _note_choices(self) -> None:
        """Note the owner's choices of an encoding in the trace of the reader."""
        graph = self._graph
        for choice in self._crossed.choices:
            graph.trace.note("encoding", graph.clock(), choice.figures())

    def _take_each(self, some: Sequence[Arrival]) -> None:
        """Take slices by requests for some of them, and issue their copies."""
        for encoding, alike in groupby(some, lambda each: each.encoding):
            listed = [*alike]
            self._crossed.packed |= bool(encoding)
            batch = BATCH if self._crossed.most_gbps == inf else MOST_PACED
            for start in range(0, len(listed), batch):
                self._take(listed[start : start + batch])
        while self._in_flight:
            self._scatter()

    @property
    def measures(self) -> bool:
        """Return True if the slices cross raw, and as fast as the transport takes them."""
        return self._crossed.most_gbps == inf and not self._crossed.packed

    @property
    def over(self) -> bool:
        """Return True if the pull waits for no slice any more."""
        return self._pull.over

    def _take(self, batch: Sequence[Arrival]) -> None:
        """Request slices, and post the transport's receives for all of them in their order."""
        stage = self._stage
        with self._turn():
            lane = stage.lane()
            lane.meet(stop=lambda: self._pull.over)
            tag = stage.tag + 1
            stage.tag += len(batch)
            posted = 0
            try:
                self._request(batch, tag)
                for number, arrival in enumerate(batch):
                    nbytes = arrival.staged_bytes
                    self._pace(nbytes)
                    self._check(inf)
                    buffer = self._free_buffer(lane, nbytes)
                    try:
                        moving = lane.move(buffer.memory[:nbytes], tag + number)
                    except BaseException:
                        stage.buffers.put(buffer)
                        raise
                    buffer.moving = moving
                    buffer.lane = lane
                    self._in_flight.append(InFlight(arrival, buffer, moving, lane))
                    posted += 1
            except BaseException:
                self.stop(lane, batch, tag, posted)
                raise

    def _request(self, batch: Sequence[Arrival], tag: int) -> None:
        """Have the owner send slices under the tags from ``tag`` on."""
        ticket = self._source.ticket
        parts = tuple(each.step.owner_part(*each.part) for each in batch)
        name = self._stage.transport.name
        encoding = batch[0].encoding
        gather = Gather(ticket.epoch, ticket.offer, parts, name, tag, encoding)
        ask(self._source, gather, self._pull, by=self._stage.channel.ask)

    def _free_buffer(self, lane: Lane, nbytes: int) -> StagingBuffer:
        """Return a free staging buffer; empty the oldest of this pull if there is none."""
        pool = self._stage.buffers
        buffer = pool.take(0.0)
        until = monotonic() + PATIENCE
        while buffer is None:
            if self._in_flight:
                self._scatter()
            self._check(until)
            buffer = pool.take(0.0 if self._in_flight else 0.05)
        most = self._source.owner.handshake.slot_bytes
        try:
            buffer.prepare(lane, nbytes, most, self._await)
        except BaseException:
            pool.put(buffer)
            raise
        return buffer

    def _scatter(self) -> None:
        """Copy the rows of the oldest slice from its staging buffer, after its bytes."""
        arrival, buffer, moving, lane = self._in_flight[0]
        scatter = arrival.scattering(buffer.chunks)  # the host's part, while the bytes arrive
        self._await(moving.follow)
        copy = scatter()
        placing = Scattered(arrival, moving, lane, copy)
        self._scattered.append(placing)
        if buffer.memory.device.type == "cpu":  # no stream orders the next bytes after the copy
            placing.has_ended(wait=True)
        buffer.copy = copy
        self._in_flight.popleft()
        self._stage.buffers.put(buffer)
        self._settle(wait=False)

    def _settle(self, wait: bool) -> None:
        """End the slices whose bytes and copies have ended, or wait for all."""
        while self._scattered:
            placing = self._scattered[0]
            arrival, moving, _, copy = placing
            if not wait and not moving.over.is_set():
                return
            self._await(moving.wait)
            if not placing.has_ended(wait):
                return
            unfit = arrival.end_with(copy)
            self._count(arrival, unfit)
            self._scattered.popleft()

    def _count(self, arrival: Arrival, unfit: int) -> None:
        """Count a slice that has ended, and its blocks that did not fit."""
        nbytes = arrival.staged_bytes
        history = self._stage.history
        self._crossed.nbytes += nbytes
        self._crossed.blocks_raw += unfit
        if arrival.slots is None:
            history.count(nbytes, limited=self._crossed.most_gbps < inf)
        else:
            history.count_packed(nbytes, arrival.step.window, arrival.packed_blocks, unfit)

    def _release(self, error: BaseException | None) -> None:
        """Wait for the copies in flight, return the buffers, and end the slices."""
        for each in self._in_flight:
            self._stage.buffers.put(each.buffer)
        until = monotonic() + STOPPING
        for placing in self._scattered:
            self._end(placing, until)
        self._in_flight.clear()
        self._scattered.clear()
        for arrival in self.arrivals:
            arrival.end(error)

    def _end(self, placing: Scattered, until: float) -> None:
        """Wait for a copy that follows bytes on their way, so that nothing is written afterwards.

        Bytes that do not come in time end with their lane, unless another pull needs the lane.
        """
        with suppress(PortaKVError):  # the pull has an error before
            while True:
                try:
                    placing.copy.synchronize(max(0.0, until - monotonic()))
                    return
                except TransferTimeout:
                    if not all(taker.over for taker in [*self._stage.takers]):
                        until = monotonic() + LOOK
                        continue
                ended = PeerError("Its pull ended before the buffers had crossed.")
                placing.lane.close(ended)
                placing.copy.synchronize()
                return

    def stop(self, lane: Lane, batch: Sequence[Arrival], tag: int, posted: int) -> None:
        """Stop a request of which ``posted`` slices have a receive.

        Both sides stay in step: the owner sends no more slices than it says, and this side receives
        them. Otherwise the lane is closed.
        """
        owner = self._source.owner
        if owner.gone or lane.gone is not None:
            return
        try:
            stop = Stop(tag, posted)
            answer = self._stage.channel.ask(owner.address, stop, Stopped, STOPPING)
        except PortaKVError:
            lane.close(PeerError("The owner did not stop; its buffers did not cross."))
            lane.skip(range(tag + posted, tag + len(batch)))
            return
        rest = batch[posted : answer.parts]
        if len(rest) > owner.handshake.slots:  # it has no buffers for so many
            lane.close(PeerError("The owner sent too many slices; its buffers did not cross."))
            lane.skip(range(tag + posted, tag + len(batch)))
            return
        try:
            for number, arrival in enumerate(rest, posted):
                lane.move(self._stage.spare(arrival.staged_bytes), tag + number)
        except Exception:  # such as no memory: the next pull would take these slices for its own
            lane.close(PeerError("A pull did not receive all slices that its owner sent."))

    def _pace(self, nbytes: int) -> None:
        """Wait for the turn of a slice at the pull's rate."""
        start = self._rate.start_of(nbytes)
        left = self._rate.left(start)
        while left and not self._pull.over:
            if self._in_flight and self._in_flight[0].moving.over.is_set():
                self._scatter()
            else:
                sleep(min(left, 0.01))
            left = self._rate.left(start)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the owner's turn, after a pull that has waited for it longer."""
        stage = self._stage
        self._acquire(stage.next)
        try:
            self._acquire(stage.turn)
        finally:
            stage.next.release()
        try:
            yield
        finally:
            stage.turn.release()

    def _acquire(self, lock: threading.Lock) -> None:
        """Take a lock that other pulls hold; meanwhile empty the buffers, which they may need."""
        until = monotonic() + PATIENCE
        while not lock.acquire(timeout=0.0 if self._in_flight else 0.05):
            if self._in_flight:
                self._scatter()
            self._check(until)

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
