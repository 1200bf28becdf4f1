# SPDX-License-Identifier: Apache-2.0
"""A `Pull` is the handle of rows in flight, and commits them.

A pull commits its rows only if every offer still held after all bytes had been read. `Reader.pull`
makes pulls.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic, perf_counter
from typing import TypeAlias, cast

import torch

from portakv.copy.handle import BlockTransfer, Statistics
from portakv.errors import (
    PeerError,
    PortaKVError,
    TransferCancelled,
    TransferError,
    TransferTimeout,
)
from portakv.graph.graph import Graph, Queue
from portakv.graph.task import Task
from portakv.migrate.connections import Source, Sources
from portakv.migrate.messages import About, Answer, Begin, Check, Close, Renew
from portakv.runtime.interrupts import uninterrupted
from portakv.runtime.streams import StreamFence
from portakv.runtime.transfer import Completion, Pending, Transfer

CANCELLED = "The pull was cancelled; no rows were committed."
MAPPED = "mapped", "the owners' memory can be mapped"
MOMENT = 1e-3  # seconds: a shorter copy ends before the 0.1 ms message to its owner pays
LOOK = 0.5  # seconds between two checks of the owners, which also renew the offers
LAST_QUESTION = 0.5  # seconds after a pull's deadline in which owners may still answer
CLOSING = 0.5  # seconds for the message that a pull has ended


Ending: TypeAlias = BlockTransfer | Task


@dataclass
class Ends:
    """The copies and the tasks that bring one layer."""

    copies: list[Transfer] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)


@dataclass
class Requested:
    """The size of a pull, and how its rows cross."""

    nbytes: float = 0.0
    blocks: int = 0
    strategy: tuple[str, str] = MAPPED  # its name, and why


class Part(Transfer):
    """A transfer that also ends with tasks of a graph, and raises the error of the first that
    failed."""

    def __init__(self, transfers: Sequence[Transfer], tasks: Sequence[Task]) -> None:
        ends = [each for transfer in transfers for each in transfer.completions]
        super().__init__([*ends, Completion(pendings=cast("tuple[Pending, ...]", tuple(tasks)))])
        self.tasks = tasks

    def wait(self, stream: torch.Stream | None = None) -> None:
        """Block the host, because no stream orders the tasks. Raises the same errors as `done`."""
        super().wait(stream)
        self._finish()

    def _finish(self) -> None:
        super()._finish()
        for task in self.tasks:
            if not task.ended:
                raise TransferError(
                    "The pull runs in the process that this one was forked from. Wait for it there."
                )
            if isinstance(task.error, PortaKVError):
                raise task.error
            if task.error:
                raise TransferError(f"The pull failed: {task.error!r}.") from task.error
            if not task.landed.all():
                raise TransferError(
                    "Expected all rows of the pull to arrive, got an end before that. Pull again."
                )


class Pull(Part):
    """Rows in flight.

    The rows are valid after `synchronize`, `wait` or `done` returned without an error: `OfferGone`
    if an offer did not hold, another `TransferError` if a peer or a copy failed,
    `TransferCancelled`. After an error the requested rows are undefined; no other row is modified.
    No interrupt may cut `_cancel` in two, so a helper thread runs it for the main thread, which
    calls `cancel`.

    Attributes:
        layers: with ``by_layer``, the end of each layer's bytes. A model may start on a layer
            then, but must not pass on a result before the whole pull has ended.
    """

    def __init__(self, queue: Queue, until: float) -> None:
        super().__init__((), [Task(None, 1, queue=queue, name="pull")])
        self.copies = list[BlockTransfer]()
        self.slices = list[Task]()
        self.layers = list[Part]()
        self.requested = Requested()
        self.stopped = False
        #: Orders copies from staging buffers after the caller's stream; None if there are none.
        self.after: StreamFence | None = None
        #: Sources that receive no `Gather`, so that `begin` reports the pull to them.
        self.quiet: Sources = ()
        self._late = False
        self._ended: float | None = None
        self._deciding = threading.Lock()  # guards the end and the cancellation
        self._until = until
        self._began = perf_counter()

    @property
    def published(self) -> bool:
        """Return True if every offer held, so the rows are valid; never block or raise."""
        return bool(self.tasks[0].landed.all())

    def cancel(self) -> bool:
        """Start no further copy, and commit nothing; return False if the pull has ended."""
        return uninterrupted(self._cancel)

    def _cancel(self) -> bool:
        """Set the state of a cancelled pull, unless the pull has ended, and cancel its copies."""
        with self._deciding:
            if self._ended is not None:
                return False
            self.stopped = True
        for copy in self.copies:
            copy.cancel()
        return not self.tasks[0].ended

    @property
    def over(self) -> bool:
        """Return True if the pull was cancelled or its deadline has passed."""
        if not self._late and monotonic() >= self._until:
            self._late = self.cancel()
        return self.stopped

    def drop(self) -> None:
        """Stop a pull of which a part could not be started, and wait for the copies in flight."""
        self.cancel()
        for copy in self.copies:
            with suppress(PortaKVError):  # the owner may be gone
                copy.synchronize()

    @property
    def statistics(self) -> Statistics:
        """Return the figures of the pull so far; never block or raise.

        Bytes and blocks count after the commit. Blocks are this reader's requested blocks, in all
        of its shards.
        """
        landed = self.published
        over = self.tasks[0].ended
        seconds = None if self._ended is None else self._ended - self._began
        pieces = len(self.copies) + len(self.slices)
        stopped = self.stopped and over and not landed and not self._late
        strategy, why = self.requested.strategy
        return Statistics(
            nbytes=int(self.requested.nbytes) if landed else 0,
            blocks=self.requested.blocks if landed else 0,
            blocks_requested=self.requested.blocks,
            strategy=strategy,
            why=why,
            seconds=seconds,
            slices=pieces,
            cancelled=stopped,
        )

    def begin(self) -> None:
        """Report the pull to the owners once: from now on offers end with this channel."""
        quiet = self.quiet
        self.quiet = ()
        for ticket, owner in quiet:
            with suppress(PortaKVError):  # the owner may be gone
                owner.channel.tell(owner.address, Begin(ticket.epoch, ticket.offer))

    def end(self, graph: Graph, sources: Sources, checks: Sequence[Task]) -> None:
        """Wait for all bytes, verify them, and commit if every owner confirms its offer.

        Renews the offers while it waits.
        """
        errors = list[BaseException]()
        soon = monotonic() + MOMENT
        endings: list[Ending] = [*self.copies, *self.slices]
        for one in endings:
            try:
                if not _over(one, max(0.0, soon - monotonic())):
                    self.begin()
                    self._await(sources, one)
            except BaseException as error:  # also an interrupt: `errors` is raised below
                errors.append(error)
                self.cancel()  # every copy is waited for, so nothing is written after the end
        try:
            for check in () if self.over else checks:
                graph.submit([check], priority="urgent")
                self._await(sources, check)
        except BaseException as error:  # raised below, after all copies have ended
            errors.append(error)
        reached = list[Source]()
        for source, answer in zip(sources, self._answers(sources, Check), strict=True):
            if isinstance(answer, PortaKVError):
                errors.append(answer)
                continue
            reached.append(source)
            if answer.state != "held":
                errors.insert(0, source.ticket.gone(answer.why))
        with self._deciding:
            self._ended = perf_counter()
            self.quiet = ()
        errors = [x for x in errors if not isinstance(x, TransferCancelled)]
        self._late = self._late or (bool(errors) and monotonic() >= self._until)
        self._close(reached, taken=not (self._late or errors or self.stopped))
        if self._late:
            raise TransferTimeout("The pull timed out; no rows were committed. Increase timeout.")
        if errors:
            raise errors[0]
        if self.stopped:
            raise TransferCancelled(CANCELLED)

    def _close(self, sources: Sources, taken: bool) -> None:
        """Report to each owner that this reader has the rows, or that the pull failed.

        An owner that does not receive the message keeps its offer until the lease expires.
        """
        for ticket, owner in sources:
            with suppress(PortaKVError):  # the owner may be gone
                owner.channel.tell(owner.address, Close(ticket.epoch, ticket.offer, taken), CLOSING)

    def _await(self, sources: Sources, one: Ending) -> None:
        """Wait for a copy or a task, and renew the offers; raise its error."""
        third = max(MOMENT, min(ticket.lease for ticket, _ in sources) / 3)
        while True:
            seconds = third if self.over else max(0.0, min(third, LOOK, self._until - monotonic()))
            if _over(one, seconds):
                return
            for answer in self._answers(sources, Renew, 3 * third):
                if isinstance(answer, PeerError) or getattr(answer, "state", "") == "gone":
                    self.cancel()  # no further row of this pull can be committed

    def _answers(
        self, sources: Sources, kind: type[About], *terms: float
    ) -> list[Answer | PortaKVError]:
        """Return each owner's answer about its offer, or the error of the request.

        Waits until half a second after the pull's deadline.
        """
        requests = [(owner.address, kind(one.epoch, one.offer, *terms)) for one, owner in sources]
        channel = sources[0][1].channel
        left = self._until + LAST_QUESTION - monotonic()
        seconds = min(channel.timeout, max(0.0, left))
        return channel.ask_all(requests, Answer, seconds)


def _over(one: Ending, seconds: float) -> bool:
    """Wait for a task or a copy; return True if it ended, and raise its error."""
    if isinstance(one, Task):
        if (over := one.wait(seconds)) and one.error:
            raise one.error
        return over
    with suppress(TransferTimeout):  # it has not ended yet
        one.synchronize(seconds)
        return True
    return False
