# SPDX-License-Identifier: Apache-2.0
"""`Pull`: the handle of rows on their way, and the rule by which they are published: only if every
offer still held when all bytes had been read."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic, perf_counter
from typing import Any, cast

import torch

from portakv.copy.handle import BlockTransfer, Statistics
from portakv.errors import (
    PeerError,
    PortaKVError,
    TransferCancelled,
    TransferError,
    TransferTimeout,
)
from portakv.graph.graph import Task
from portakv.migrate.messages import About, Answer, Begin, Check, Close, Renew, Ticket
from portakv.migrate.pairing import Paired
from portakv.migrate.steps import Told
from portakv.runtime.interrupts import uninterrupted
from portakv.runtime.transfer import Completion, Transfer

CANCELLED = "A pull was cancelled; nothing of it is published."
MAPPED = "mapped", "the owners' memory can be mapped"
MOMENT = 1e-3  # seconds in which a copy may end before owners are told of it, which takes 0.1 ms
LOOK = 0.5  # seconds between two looks at owners, whose offers are renewed then
LAST_QUESTION = 0.5  # seconds after a pull's time in which owners may still answer
CLOSING = 0.5  # seconds for the message that a pull is over


class Part(Transfer):
    """A transfer that ends with tasks of a graph as well, and fails as the first that did."""

    def __init__(self, transfers: Sequence[Transfer], tasks: Sequence[Task]) -> None:
        ends = [each for one in transfers for each in one.completions]
        super().__init__([*ends, Completion(pendings=cast(Any, tuple(tasks)))])
        self.tasks = tasks

    def wait(self, stream: torch.Stream | None = None) -> None:
        """Block the host, as no stream orders what tasks do; raises as `done`."""
        super().wait(stream)
        self._finish()

    def _finish(self) -> None:
        super()._finish()
        for task in self.tasks:
            if not task.ended:
                raise TransferError("A pull goes on in the process that this was forked from.")
            if isinstance(task.error, PortaKVError):
                raise task.error
            if task.error:
                raise TransferError(f"A pull ended early: {task.error!r}.") from task.error
            if not task.landed.all():
                raise TransferError("A pull ended early, and its rows did not all come.")


class Pull(Part):
    """Rows on their way. They may be used once `synchronize` (`wait`, `done`) returned without an
    error: `OfferGone` if an offer did not hold, another `TransferError` if a peer or a copy failed,
    `TransferCancelled`. Rows that were asked for then hold anything; no others have changed.

    Attributes:
        layers: with ``by_layer``, an end of each layer's bytes. A model may begin on them; nothing
            that it makes of them may leave before the end of the whole.
    """

    nbytes = 0.0
    way = MAPPED
    stopped = False
    behind = cast(Any, None)  # a `StreamFence`, if rows are moved
    blocks = 0  # that were requested
    _late = False
    _ended = cast("float | None", None)
    quiet: Told = ()  # whose owners would not know that it reads: they are asked for no rows

    def __init__(self, task: Task, until: float) -> None:
        super().__init__((), [task])
        self.copies = list[BlockTransfer]()
        self.slices = list[Task]()
        self.layers = list[Part]()
        self._deciding = threading.Lock()  # what became of it
        self._until = until
        self._began = perf_counter()

    @property
    def published(self) -> bool:
        """Whether every offer held, so that the rows are valid; never blocks or raises."""
        return bool(self.tasks[0].landed.all())

    def cancel(self) -> bool:
        """Move no more than what is in flight, and publish nothing; False if it has ended."""
        return uninterrupted(self._cancel)

    def _cancel(self) -> bool:
        """Do what `cancel` promises."""
        with self._deciding:
            if self._ended is not None:
                return False
            self.stopped = True
        for copy in self.copies:
            copy.cancel()
        return not self.tasks[0].ended

    @property
    def over(self) -> bool:
        """Whether it is to bring no more: it was cancelled, or its time is over."""
        if not self._late and monotonic() >= self._until:
            self._late = self.cancel()
        return self.stopped

    def drop(self) -> None:
        """Stop before its end was begun, since a part could not be; wait for what moves."""
        self.cancel()
        for copy in self.copies:
            with suppress(PortaKVError):
                copy.synchronize()

    @property
    def statistics(self) -> Statistics:
        """What became of it so far; never blocks or raises. Bytes and blocks count once they are
        published: blocks of this reader that it requested, in all of its shards."""
        landed = self.published
        over = self.tasks[0].ended
        seconds = None if self._ended is None else self._ended - self._began
        pieces = len(self.copies) + len(self.slices)
        stopped = self.stopped and over and not landed and not self._late
        engine, why = self.way
        return Statistics(
            nbytes=int(self.nbytes) if landed else 0,
            blocks=self.blocks if landed else 0,
            blocks_asked=self.blocks,
            engine=engine,
            why=why,
            seconds=seconds,
            slices=pieces,
            cancelled=stopped,
        )

    def begin(self) -> None:
        """Tell owners once that it reads: offers end with this process's channel from now on."""
        quiet = self.quiet
        self.quiet = ()
        for ticket, owner in quiet:
            with suppress(PortaKVError):
                owner.channel.tell(owner.address, Begin(ticket.epoch, ticket.offer))

    def end(self, told: Told, checks: Sequence[Task]) -> None:
        """Wait for all bytes, look at them, and ask each owner whether its offer held; offers are
        renewed meanwhile."""
        errors = list[BaseException]()
        soon = monotonic() + MOMENT
        for one in (*self.copies, *self.slices):
            try:
                if not _over(one, max(0.0, soon - monotonic())):
                    self.begin()
                    self._await(told, one)
            except BaseException as error:
                errors.append(error)
                self.cancel()  # all is waited for: nothing is written behind the end
        try:
            for check in () if self.over else checks:
                self.tasks[0].graph.submit([check], priority="urgent")
                self._await(told, check)
        except BaseException as error:
            errors.append(error)
        reached = list[tuple[Ticket, Paired]]()
        for one, answer in zip(told, self._asked(told, Check), strict=True):
            if isinstance(answer, PortaKVError):
                errors.append(answer)
                continue
            reached.append(one)
            if answer.state != "held":
                errors.insert(0, one[0].gone(answer.why))
        with self._deciding:
            self._ended = perf_counter()
            self.quiet = ()
        errors = [x for x in errors if not isinstance(x, TransferCancelled)]
        self._late = self._late or (bool(errors) and monotonic() >= self._until)
        self._close(reached, taken=not (self._late or errors or self.stopped))
        if self._late:
            raise TransferTimeout(
                "A pull had not ended in its time; nothing of it is published. Give it more time."
            )
        if errors:
            raise errors[0]
        if self.stopped:
            raise TransferCancelled(CANCELLED)

    def _close(self, told: Told, taken: bool) -> None:
        """Report to each owner whether this reader has the rows, or may pull them again. An owner
        that does not receive it keeps its offer until the lease is over."""
        for ticket, owner in told:
            with suppress(PortaKVError):
                owner.channel.tell(owner.address, Close(ticket.epoch, ticket.offer, taken), CLOSING)

    def _await(self, told: Told, one: Any) -> None:
        """Wait for a copy or a task, and renew the offers; raises what it ended with."""
        third = max(MOMENT, min(ticket.lease for ticket, _ in told) / 3)
        while True:
            seconds = third if self.over else max(0.0, min(third, LOOK, self._until - monotonic()))
            if _over(one, seconds):
                return
            for answer in self._asked(told, Renew, 3 * third):
                if isinstance(answer, PeerError) or getattr(answer, "state", "") == "gone":
                    self.cancel()  # what else it would bring is not published

    def _asked(self, told: Told, kind: type[About], *terms: float) -> list[Answer | PortaKVError]:
        """What owners answer about their offers until half a second after the pull's time; or what
        became of the question."""
        asked = [(owner.address, kind(one.epoch, one.offer, *terms)) for one, owner in told]
        channel = told[0][1].channel
        left = self._until + LAST_QUESTION - monotonic()
        seconds = min(channel.timeout, max(0.0, left))
        return channel.ask_all(asked, Answer, seconds)


def _over(one: Any, seconds: float) -> bool:
    """Wait for a task or a copy; raises its error."""
    if isinstance(one, Task):
        if (over := one.wait(seconds)) and one.error:
            raise one.error
        return over
    with suppress(TransferTimeout):
        one.synchronize(seconds)
        return True
    return False
