# SPDX-License-Identifier: Apache-2.0
"""Issue pulls whose offers are not complete, in workers, as the marks of the offers rise.

A pull by layer is issued part by part: the layers, or the tokens of all layers, that have become
complete. Every other pull begins when all of its rows are complete.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from portakv.errors import PortaKVError, TransferCancelled
from portakv.graph.graph import Graph
from portakv.graph.task import Task
from portakv.migrate.followed import Followed
from portakv.migrate.housekeeping import Housekeeper
from portakv.migrate.issue import Issuer, Issuing, Request
from portakv.migrate.named import LateLayer, Wanted
from portakv.migrate.plan import Step
from portakv.migrate.pull import CANCELLED, Pull, fail
from portakv.runtime.streams import StreamFence

WIDTH = 4  # pulls of which parts are issued together


class _Reach:
    """How far a step is issued: its layers, or the tokens of all of its layers."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.unit = step.ticket.progress
        if self.unit == "layers":
            owned = step.owner.handshake.described[step.cut.group].group.layers
            self._start = step.cut.piece.box[0][0] - owned[0]
            self.end = step.cut.dst.layers
        else:
            self._start = step.first
            self.end = step.tokens
        self.reached = 0

    def part(self, mark: int) -> Step | None:
        """Return the part of the step that has become complete; None if there is none."""
        past = self.end
        if self.unit:
            past = min(past, mark - self._start)
        if self.unit == "tokens" and past < self.end:
            past -= past % self.step.page  # whole opaque pages, and packed blocks
        begin = self.reached
        if past <= begin:
            return None
        self.reached = past
        if past - begin == self.end:
            return self.step
        if self.unit == "layers":
            return self.step.part(range(begin, past), 0, self.step.tokens)
        return self.step.part(range(self.step.cut.dst.layers), begin, past - begin)

    def has(self, layer: int) -> bool:
        """Return True if a layer of the reader's view needs no further part of the step."""
        if layer not in self.step.cut.layers:
            return True
        reached = self.step.cut.layers.index(layer) if self.unit == "layers" else self.end - 1
        return reached < self.reached


class _Parts:
    """The parts of a pull that are not issued yet."""

    def __init__(self, issuing: Issuing) -> None:
        self.settled = set[LateLayer]()  # layers of which all parts are issued
        self._reaches = [_Reach(step) for step in issuing.plan]

    @property
    def issued(self) -> bool:
        """Return True if no part is left."""
        return all(one.reached == one.end for one in self._reaches)

    def take(self, marks: list[int]) -> Iterator[Step]:
        """Yield the parts that have become complete, by the marks of the sources."""
        for one in self._reaches:
            part = one.part(marks[one.step.cut.piece.owner])
            if part is not None:
                yield part

    def has(self, group: int, layer: int) -> bool:
        """Return True if all parts of a layer of a group are issued."""
        return all(one.has(layer) for one in self._reaches if one.step.cut.group == group)


class Follower:
    """Issues the pulls of one reader whose offers are not complete."""

    def __init__(self, graph: Graph, issuer: Issuer, keeper: Housekeeper) -> None:
        self._graph = graph
        self._issuer = issuer
        self._keeper = keeper
        self._queue = graph.queue("follow", width=WIDTH)

    def begin(self, pull: Pull, request: Request) -> Pull:
        """Return a pull that follows the marks of its offers; raise as `Reader.pull` does."""
        pull.requested.wanted = wanted = Wanted([], {})
        wanted.started.set()
        pull.layers = self.promised(request)
        self.follow(pull, wanted, request, StreamFence(self._issuer.device))
        try:
            self._keeper.add(pull)
            self.wake_for(wanted)
            return pull
        except BaseException:  # an interrupt: the caller gets no handle of rows that come later
            pull.cancel()
            self._keeper.wake()
            raise

    def wake_for(self, wanted: Wanted) -> None:
        """Have the reader's thread look at marks, or a worker end the pull if the reader closes:
        that thread may have ended before."""
        self._keeper.wake()
        if self._keeper.closing and wanted.followed is not None:
            wanted.followed.go_on()

    def promised(self, request: Request) -> list[LateLayer]:
        """Return the ends of the layers of a pull whose copies do not exist yet."""
        layers = sum(shard.view.layers for shard in self._issuer.shards)
        return [LateLayer() for _ in range(layers * request.options.by_layer)]

    def follow(self, pull: Pull, wanted: Wanted, request: Request, after: StreamFence) -> None:
        """Issue a pull as its offers become complete, after a fence; raise as `Reader.pull`."""
        issuing = Issuing(self._issuer, pull, request)
        issuing.count_blocks()
        options = request.options
        whole = not options.by_layer or options.max_gbps is not None
        parts = _Parts(issuing)

        def advance() -> Task | None:
            run = partial(self._advance, pull, followed, issuing, parts, after)
            task = Task(lambda *_: run(), 1, queue=self._queue, name="follow")
            try:
                self._graph.submit([task], priority="urgent")
            except PortaKVError as error:  # of a graph that is closed
                fail(pull, error)
                followed.end()
                return None
            return task

        followed = Followed(pull.sources, whole, advance)
        # The task is never submitted: the pull has not ended as long as it has this one.
        pull.task = Task(None, 1, name="follow")
        pull.requested.quiet = pull.sources
        pull.requested.pieces = 1
        wanted.followed = followed

    def _advance(
        self,
        pull: Pull,
        followed: Followed,
        issuing: Issuing,
        parts: _Parts,
        after: StreamFence,
    ) -> None:
        """Issue the parts that have become complete, in a worker; end the pull if it was stopped,
        or if none is left."""
        try:
            if pull.over or self._keeper.closing:
                raise TransferCancelled(CANCELLED)
            with torch.inference_mode(False), after.inside():
                tasks = issuing.issue([*parts.take(followed.take_marks())])
            if tasks:
                self._graph.submit(tasks, priority="urgent")
            self._settle(pull, issuing, parts)
            # Rows that this reader does not need may still be written: the offer holds until then.
            if not (parts.issued and followed.complete):
                followed.end_turn()
                if self._keeper.closing:
                    followed.go_on()
                return
            final = issuing.end()
            if final:
                self._graph.submit(final, priority="urgent")
            else:
                pull.task = None
            followed.end()
            self._keeper.wake()
        except BaseException as error:
            fail(pull, error)
            followed.end()

    def _settle(self, pull: Pull, issuing: Issuing, parts: _Parts) -> None:
        """Let the layers of which all copies are issued end with these."""
        promises = iter(pull.layers)
        for group, shard in enumerate(self._issuer.shards if pull.layers else ()):
            for layer in range(shard.view.layers):
                promise = next(promises)
                if not isinstance(promise, LateLayer) or promise in parts.settled:
                    continue
                if parts.has(group, layer):
                    promise.settle(issuing.layer(group, layer))
                    parts.settled.add(promise)
