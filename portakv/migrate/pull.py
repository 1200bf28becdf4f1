# SPDX-License-Identifier: Apache-2.0
"""A `Pull` is the handle of rows in flight, and commits them.

A pull commits its rows only if every offer still held after all bytes had been read. `Reader.pull`
makes pulls. Whoever looks at a pull after its copies have ended commits it: a caller in `Pull.done`
or `Pull.synchronize`, or the reader's `Housekeeper`. Its coroutine commits a pull that has to wait
for work of helpers, or for an owner's answer.
"""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic, perf_counter
from typing import Any, TypeAlias, cast

import torch

from portakv.copy.choose_encoding import EncodingChoice
from portakv.copy.handle import BlockTransfer
from portakv.errors import (
    OfferGone,
    PackOverflow,
    PeerError,
    PortaKVError,
    TransferCancelled,
    TransferError,
    TransferTimeout,
)
from portakv.migrate.connections import Source, Sources
from portakv.migrate.crossed import PullStatistics, joined_error
from portakv.migrate.messages import REASONS, About, Answer, Check, Renew
from portakv.migrate.words import fence
from portakv.runtime.devices import this_process
from portakv.runtime.interrupts import shielded
from portakv.runtime.streams import StreamFence
from portakv.runtime.transfer import Completion, Pending, PendingCalls, Transfer
from portakv.tasks import End, Handle, Signal, runtime
from portakv.tasks.runtime import Steps

CANCELLED = "The pull was cancelled; no rows were committed."
MAPPED = "mapped", "the owners' memory can be mapped"
LOOK = 0.5  # seconds between two looks of a coroutine that waits for no copy
LAST_QUESTION = 0.5  # seconds after a pull's deadline in which owners may still answer


#: The end of a part of a pull that streams do not order.
Ending: TypeAlias = End[Any]
#: The most seconds between two looks at copies, of a coroutine that waits for their ends.
GLANCE = 1e-3


class PartTransfer(Transfer):
    """A transfer that also ends with slices and coroutines, and raises the first of their errors.

    Whoever issues it may still add some, and copies, before all that it has now has ended.
    """

    _what = "The pull"
    _if_cancelled = CANCELLED

    def __init__(self, endings: Sequence[Ending] = ()) -> None:
        self.endings = [*endings]
        self._process = this_process()
        self._ends = [Completion(pendings=cast("list[Pending]", self.endings))]
        super().__init__(self._ends)

    def add(self, copy: Transfer) -> None:
        """End with a copy, too. A thread that waits already waits for it."""
        self._ends += copy.completions

    def done(self) -> bool:
        """Return True once all has ended; raise the errors of the pull."""
        self._refuse_fork()
        return super().done()

    def wait(self, stream: torch.Stream | None = None) -> None:
        """Block the host, because no stream orders these ends. Raises the same errors as `done`."""
        self._refuse_fork()
        super().wait(stream)
        self._finish()

    def synchronize(self, timeout: float | None = None) -> None:
        """Block the host until all has ended; see `Transfer.synchronize`."""
        self._refuse_fork()
        super().synchronize(timeout)

    def _refuse_fork(self) -> None:
        """Raise in a process that was forked from the reader's."""
        if self._process.forked:
            raise forked_error()

    def _finish(self) -> None:
        super()._finish()
        for each in self.endings:
            if each.error is not None:
                raise known(each.error, self._what, self._if_cancelled)


class LayerTransfer(PartTransfer):
    """The end of a layer of a pull. It does not come before all copies of the layer are issued.

    Attributes:
        left: tokens, of all owners together, of which the copies are not issued.
    """

    def __init__(self) -> None:
        self._issued = End[None](runtime())
        self.left = 0
        super().__init__([self._issued])

    def note_issued(self, tokens: int) -> None:
        """Note that the copies of so many tokens were added."""
        self.left -= tokens
        if not self.left:
            self._issued.settle(None, None)

    def fail(self, error: PortaKVError | None) -> None:
        """End by the error of a pull that issues no more copies."""
        if not self._issued.ended:
            self._issued.settle(None, error)


def forked_error() -> TransferError:
    """Return the error of a pull in a process that was forked from the reader's."""
    return TransferError(
        "The pull runs in the process that this one was forked from. Wait for it there."
    )


class Pull(Transfer):
    """Rows in flight.

    The rows are valid after `synchronize`, `wait` or `done` returned without an error: `OfferGone`
    if an offer did not hold, another `TransferError` if a peer or a copy failed,
    `TransferCancelled`. After an error the requested rows are undefined; no other row is modified.

    Attributes:
        layers: with ``by_layer``, the end of each layer's bytes. A model may start on a layer
            then, but must not pass on a result before the whole pull has ended.
    """

    #: The call that makes the pull has not returned.
    in_call = False
    #: The coroutine that makes all copies, and commits a pull that has to wait.
    steps: Handle[None] | None = None
    layers: Sequence[LayerTransfer] = ()
    #: Orders copies from staging buffers after the caller's stream; None if there are none.
    after: StreamFence | None = None
    _ended: float | None = None  # when the end was noticed

    # Figures, see `PullStatistics`.
    nbytes = 0.0
    blocks = 0
    strategy = MAPPED  # its name, and why
    pieces = 0  # copies and slices that were started
    wire_nbytes = 0
    packed = False
    blocks_raw = 0
    raw_because = ""

    def __init__(self, sources: Sources, until: float, wake: Callable[[], None]) -> None:
        super().__init__([Completion(pendings=(PendingCalls(self.look, self.block),))])
        self.sources = sources
        self.wake = wake  # has the reader's coroutine report the end
        self.until = until
        self.copies = list[BlockTransfer]()
        self.slices = list[Ending]()
        #: Each ends when all bytes of some slices have left the memory of their owner.
        self.crossing = list[Ending]()
        #: The errors of blocks that did not fit into packed slots. They do not stop the pull: all
        #: other blocks are moved, and one error then names these.
        self.unfit = list[PackOverflow]()
        self.choices = list[EncodingChoice]()
        #: "error": None if the rows are committed. The first verdict counts, without a lock.
        self._verdict = dict[str, PortaKVError | None]()
        self._began = perf_counter()
        self._waiters = list[None]()  # an entry for each thread that blocks until the end
        here = runtime()
        self._process = here.process
        #: What the coroutine waits for; see `go_on`.
        self.changes = Signal(here)
        #: Returns the addresses of owners whose handshake the pull waits for.
        self.handshakes: Callable[[], Sequence[str]] = tuple

    # --- for callers

    @property
    def ended(self) -> bool:
        """Return True if the pull has ended, with or without an error; never block or raise."""
        return self.look()

    @property
    def error(self) -> PortaKVError | None:
        """Return the error by which the pull has ended; None if it was committed, or has not ended.

        Never blocks or raises.
        """
        if not self.look():
            return None
        return self._verdict["error"] if self.concluded else forked_error()

    @property
    def published(self) -> bool:
        """Return True if every offer held, so the rows are valid; never block or raise."""
        return self.concluded and self._verdict["error"] is None

    def wait(self, stream: torch.Stream | None = None) -> None:
        """Block the host, because only the end of the pull makes its rows valid. Raises the same
        errors as `done`."""
        super().wait(stream)
        self._finish()

    @shielded
    def cancel(self) -> bool:
        """Start no further copy, and commit nothing; return False if the pull has ended."""
        # A thread that sees the verdict may end the pull before the next line.
        cancelled = self.stop(TransferCancelled(CANCELLED))
        return cancelled or (self.stopped and not self.concluded)

    @property
    def statistics(self) -> PullStatistics:
        """Return the figures of the pull so far; never block or raise.

        Bytes and blocks count after the commit. Blocks are this reader's requested blocks, in all
        of its shards.
        """
        landed = self.published
        strategy, why = self.strategy
        return PullStatistics(
            nbytes=int(self.nbytes) if landed else 0,
            blocks=self.blocks if landed else 0,
            blocks_requested=self.blocks,
            strategy=strategy,
            why=why,
            seconds=self.age if self.concluded else None,
            slices=self.pieces,
            cancelled=self.concluded and isinstance(self._verdict["error"], TransferCancelled),
            wire_nbytes=self.wire_nbytes,
            packed=self.packed,
            blocks_raw=self.blocks_raw,
            raw_because=self.raw_because,
            choices=tuple(self.choices),
        )

    @property
    def age(self) -> float:
        """Return the seconds from the call until the end was noticed, or until now."""
        return (self._ended or perf_counter()) - self._began

    def _finish(self) -> None:
        super()._finish()
        error = self.error
        if error is not None:
            raise error

    # --- the end

    @property
    def begun(self) -> bool:
        """Return True if all copies exist. Another thread may have the pull before."""
        return not self.in_call and (self.steps is None or self.steps.done())

    @property
    def concluded(self) -> bool:
        """Return True if the end of the pull was noticed; never looks at its copies."""
        return self._ended is not None

    @property
    def has_waiter(self) -> bool:
        """Return True if a thread blocks until the end of the pull, and notices the end."""
        return bool(self._waiters)

    def look(self) -> bool:
        """Return True if the pull has ended; commit it if its copies have. Never blocks or raises.

        Any thread may look, and several together.
        """
        if self.concluded or self._process.forked:
            return True
        if not (self.begun and self.look_at_copies()):
            return False
        self.conclude(joined_error(self.unfit) if self.unfit else self._gone())
        return True

    def look_at_copies(self) -> bool:
        """Return True if all copies between views have ended; stop the pull if one has failed.

        Blocks that do not fit into packed slots stop nothing: all other blocks are moved.
        """
        landed = True
        for copy in self.copies:
            for end in copy.completions:
                try:
                    ended = end.ended()
                    error = end.error if ended else None
                except Exception as caught:  # torch raises errors of many kinds; it runs no more
                    ended = True
                    error = known(caught)
                landed = landed and ended
                if error is not None:
                    self._note_error(error)
        return landed

    def _note_error(self, error: BaseException) -> None:
        """Stop the pull by the error of a part that has ended, unless blocks of it did not fit."""
        if not isinstance(error, PackOverflow):
            self.stop(known(error))
        elif error not in self.unfit:
            self.unfit.append(error)

    def block(self) -> None:
        """Block the host until the pull has ended."""
        self._waiters.append(None)
        try:
            while not self.look():
                if self.steps is not None:
                    self.steps.wait()
                for copy in self.copies:
                    for end in copy.completions:
                        with suppress(RuntimeError):  # torch's error, which `look` gets again
                            end.synchronize()
        finally:
            self._waiters.pop()

    def conclude(self, error: PortaKVError | None) -> None:
        """End the pull after all bytes have been read; None: commit it.

        An earlier verdict counts, such as a cancellation.
        """
        # After the deadline any error is that of the deadline.
        if error is not None and monotonic() >= self.until:
            error = self._timed_out()
        verdict = self._verdict.setdefault("error", error)
        self.completions[0].error = verdict
        self._ended = perf_counter()
        # Release the memory of the owners, and this object from its own completion.
        self.copies = []
        self.slices = []
        self.crossing = []
        self.completions[0].pendings = ()
        for layer in self.layers:
            layer.fail(verdict)
        self.wake()

    def stop(self, error: PortaKVError) -> bool:
        """Start no further copy, and commit nothing; return False if the pull has had its verdict.

        The pull ends after the copies in flight, so nothing is written after its end.
        """
        if monotonic() >= self.until:
            error = self._timed_out()
        first = self._verdict.setdefault("error", error) is error
        if first:
            self.stop_copies()
            if not self.begun:
                self.go_on()
        return first

    def stop_copies(self) -> None:
        """Issue no further slice of a copy."""
        for copy in self.copies:
            copy.cancel()

    @property
    def stopped(self) -> bool:
        """Return True if nothing of the pull will be committed."""
        return self._verdict.get("error") is not None

    @property
    def over(self) -> bool:
        """Return True if the pull was stopped or its deadline has passed."""
        if monotonic() >= self.until:
            self.stop(self._timed_out())
        return self.stopped

    def _timed_out(self) -> TransferTimeout:
        if hung := self.handshakes():
            return TransferTimeout(
                f"The handshake of the pull timed out; no rows were committed. Increase timeout, "
                f"or pull from another owner than {hung[0]}."
            )
        return TransferTimeout("The pull timed out; no rows were committed. Increase timeout.")

    def _gone(self) -> OfferGone | None:
        """Return the error of an offer whose word says that it does not hold; None if all hold.

        The rows were read before.
        """
        fence()
        return self.ended_offer()

    def ended_offer(self) -> OfferGone | None:
        """Return the error of the first offer whose word says that it has ended."""
        for source in self.sources:
            word = source.word
            words = source.owner.words
            if word is not None and words is not None:
                state = words.state(word)
                if state != "held":
                    return source.ticket.gone(REASONS[state])
        return None

    def lost(self) -> PortaKVError | None:
        """Return why no row of this pull can be committed any more; None if all may be."""
        error = self.ended_offer()
        if error is not None:
            return error
        for ticket, owner, _ in self.sources:
            if owner.gone:
                return PeerError(
                    f"Expected the owner at {ticket.address} until its rows were here, got the end "
                    f"of its connection; no rows were committed. Check that the process there runs."
                )
        return None

    # --- in coroutines

    def go_on(self) -> None:
        """Wake the coroutine of the pull. Any thread may call it."""
        if not self._process.forked:
            runtime().call_soon(self._go_on)

    def _go_on(self) -> None:
        with runtime().lock:
            self.changes.notify()

    async def finish(self, checks: Sequence[Callable[[], Steps[None]]]) -> None:
        """Wait for all bytes, verify them, and commit if every offer holds.

        Asks owners while the last copies run from staging buffers.

        Args:
            checks: make the coroutines that compare checksums.
        """
        refused = None
        if not checks:
            await self._until(self._have_crossed)
            refused = await self.ask()
        await self._until(self.have_ended)
        for each in self.slices:
            if each.error is not None:
                self._note_error(each.error)
        if checks and not (self.unfit or self.over):
            handles = [runtime().start(check()) for check in checks]
            for handle in handles:
                handle.on_end(self.go_on)
            await self._until(lambda: all(handle.done() for handle in handles))
            for handle in handles:
                if handle.error is not None:
                    self.stop(known(handle.error))
            refused = await self.ask()
        self.conclude(joined_error(self.unfit) or refused or self._gone())

    def have_ended(self) -> bool:
        """Return True if all copies and slices of the pull have ended."""
        return all(each.done() for each in self.slices) and self.look_at_copies()

    def _have_crossed(self) -> bool:
        """Return True if nothing reads the memory of owners any more."""
        return all(each.done() for each in self.crossing) and self.look_at_copies()

    @property
    def remote(self) -> list[Source]:
        """Return the sources of which only the owner can say whether the offer holds."""
        return [source for source in self.sources if source.word is None]

    async def ask(self) -> PortaKVError | None:
        """Return why the offer of an owner of `remote` did not hold, by the owner's answer or the
        error of the request; None if all held, or if nothing will be committed.

        All bytes have left the memory of these owners before.
        """
        if self.stopped or self.unfit:
            return None
        error: PortaKVError | None = None
        remote = self.remote
        answers = await self._answers(remote, Check)
        for source, answer in zip(remote, answers, strict=True):
            if isinstance(answer, PortaKVError):
                error = error or answer
            elif answer.state != "held" and not isinstance(error, OfferGone):
                error = source.ticket.gone(answer.why)
        return error

    async def _until(self, ended: Callable[[], bool]) -> None:
        """Wait until a function returns True. Calls of `go_on` report all ends but those of
        copies."""
        glance = GLANCE / 16
        while not ended():
            glance = min(2 * glance, GLANCE)
            seconds = glance if self.copies else LOOK
            await self.changes.wait_for(ended, runtime().time() + seconds)

    async def renew(self) -> None:
        """Renew the leases of `remote`; stop the pull if an owner or an offer is gone."""
        remote = self.remote
        lease = min([source.ticket.lease for source in remote], default=0.0)
        answers = await self._answers(remote, Renew, lease)
        for source, answer in zip(remote, answers, strict=True):
            if isinstance(answer, PeerError):
                self.stop(answer)
            elif isinstance(answer, Answer) and answer.state == "gone":
                self.stop(source.ticket.gone(answer.why))

    async def _answers(
        self, sources: Sequence[Source], kind: type[About], *terms: float
    ) -> list[Answer | PortaKVError]:
        """Return each owner's answer about its offer, or the error of the request.

        Waits until half a second after the pull's deadline.
        """
        if not sources:
            return []
        requests = [
            (owner.address, kind(one.epoch, one.offer, *terms)) for one, owner, _ in sources
        ]
        channel = sources[0].owner.channel
        left = self.until + LAST_QUESTION - monotonic()
        return await channel.answers(requests, Answer, min(channel.timeout, max(0.0, left)))

    async def fail(self, error: BaseException) -> None:
        """End a pull of which no more can be issued, after the copies and slices in flight."""
        self.stop(known(error))
        await self._until(self.have_ended)
        self.conclude(known(error))


def known(error: BaseException, what: str = "The pull", cancelled: str = CANCELLED) -> PortaKVError:
    """Return an error of a copy or a task as one of this library's.

    ``what`` failed, and ``cancelled``: the sentence of a cancellation.
    """
    if isinstance(error, PortaKVError):
        return error
    if isinstance(error, CancelledError):
        return TransferCancelled(cancelled)
    failure = TransferError(f"{what} failed: {error!r}.")
    failure.__cause__ = error
    return failure
