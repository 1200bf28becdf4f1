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
from dataclasses import dataclass, field
from time import monotonic, perf_counter
from typing import TypeAlias, cast

import torch

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
from portakv.migrate.buffers import Taker
from portakv.migrate.connections import Source, Sources
from portakv.migrate.crossed import Crossed, PullStatistics, joined_error
from portakv.migrate.messages import REASONS, About, Answer, Check, Renew
from portakv.migrate.named import LateLayer, Wanted, forked_error
from portakv.migrate.words import fence
from portakv.runtime.devices import this_process
from portakv.runtime.interrupts import shielded
from portakv.runtime.streams import StreamFence
from portakv.runtime.transfer import Completion, Pending, Transfer
from portakv.tasks import End, Handle, Signal, runtime
from portakv.tasks.runtime import Steps

CANCELLED = "The pull was cancelled; no rows were committed."
MAPPED = "mapped", "the owners' memory can be mapped"
MOMENT = 1e-3  # seconds: the shortest time between two renewals
LOOK = 0.5  # seconds between two questions to owners that send rows, which also renew the offers
LAST_QUESTION = 0.5  # seconds after a pull's deadline in which owners may still answer


#: The end of a part of a pull that streams do not order.
Ending: TypeAlias = End[None]
#: The most seconds between two looks at copies, of a coroutine that waits for their ends.
GLANCE = 1e-3


@dataclass
class Requested:
    """The size of a pull, and how its rows cross."""

    nbytes: float = 0.0
    blocks: int = 0
    strategy: tuple[str, str] = MAPPED  # its name, and why
    pieces: int = 0  # copies and slices that were started
    #: Sources that receive no request for rows, so that the pull is reported to them.
    quiet: Sources = ()
    #: What the pull waits for, as long as it does: owners, offers by name, or rows.
    wanted: Wanted | None = None
    #: The rows that each owner has sent so far.
    crossed: list[Crossed] = field(default_factory=list)
    #: The caller requested an encoding.
    encoded: bool = False
    #: The errors of blocks that did not fit into packed slots. They do not stop the pull: all other
    #: blocks are moved, and one error then names these.
    unfit: list[PackOverflow] = field(default_factory=list)


class PartTransfer(Transfer):
    """A transfer that also ends with slices and coroutines, and raises the first of their errors.

    Whoever issues it may still add some, and copies.
    """

    def __init__(self, endings: Sequence[Ending] = ()) -> None:
        self.endings = [*endings]
        self._process = this_process()
        super().__init__([Completion(pendings=cast("list[Pending]", self.endings))])

    def add(self, copy: Transfer) -> None:
        """End with a copy, too."""
        self.completions = [*self.completions, *copy.completions]

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
            error = known(each.error)
            if error:
                raise error


class _End:
    """The end of a pull, as a `Pending`."""

    def __init__(self, pull: Pull) -> None:
        self._pull = pull
        #: An entry for each thread that blocks until the end.
        self.waiters = list[None]()

    def done(self) -> bool:
        """Return True once the pull has ended; never block."""
        return self._pull.look()

    def wait(self) -> None:
        """Block the host until the pull has ended."""
        self.waiters.append(None)
        try:
            self._pull.block()
        finally:
            self.waiters.pop()


class Pull(Transfer):
    """Rows in flight.

    The rows are valid after `synchronize`, `wait` or `done` returned without an error: `OfferGone`
    if an offer did not hold, another `TransferError` if a peer or a copy failed,
    `TransferCancelled`. After an error the requested rows are undefined; no other row is modified.

    Attributes:
        layers: with ``by_layer``, the end of each layer's bytes. A model may start on a layer
            then, but must not pass on a result before the whole pull has ended.
    """

    def __init__(self, sources: Sources, until: float, wake: Callable[[], None]) -> None:
        super().__init__([Completion(pendings=(_End(self),))])
        self.sources = sources
        self.wake = wake  # has the reader's coroutine report the end
        self.until = until
        self.copies: Sequence[BlockTransfer] = []
        self.slices: Sequence[Ending] = []
        #: The call that makes the pull has not returned.
        self.in_call = False
        #: The coroutine that makes all copies, and commits a pull that has to wait.
        self.steps: Handle[None] | None = None
        #: The coroutines that take rows from owners.
        self.takers = list[Taker]()
        self.layers: Sequence[Transfer] = ()
        self.requested = Requested()
        #: Orders copies from staging buffers after the caller's stream; None if there are none.
        self.after: StreamFence | None = None
        #: "error": None if the rows are committed. The first verdict counts, without a lock.
        self._verdict = dict[str, PortaKVError | None]()
        #: When the pull began, and when its end was noticed.
        self._times = [perf_counter()]
        self._process = this_process()
        #: What the coroutine waits for; see `go_on`.
        self.changes = Signal(runtime())

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
        over = self.concluded
        requested = self.requested
        strategy, why = requested.strategy
        crossed = [*requested.crossed]
        reasons = [each.why for each in crossed if each.why]
        if requested.encoded and not crossed:
            reasons = [why]
        return PullStatistics(
            nbytes=int(requested.nbytes) if landed else 0,
            blocks=requested.blocks if landed else 0,
            blocks_requested=requested.blocks,
            strategy=strategy,
            why=why,
            seconds=self._times[-1] - self._times[0] if over else None,
            slices=requested.pieces,
            cancelled=over and isinstance(self._verdict["error"], TransferCancelled),
            wire_nbytes=sum([each.nbytes for each in crossed]),
            packed=any(each.packed for each in crossed),
            blocks_raw=sum([each.blocks_raw for each in crossed]),
            raw_because=reasons[0] if reasons else "",
            choices=tuple([choice for each in crossed for choice in [*each.choices]]),
        )

    @property
    def age(self) -> float:
        """Return the seconds from the call until the end was noticed, or until now."""
        now = perf_counter()
        return (self._times[-1] if self.concluded else now) - self._times[0]

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
        return len(self._times) > 1

    @property
    def has_waiter(self) -> bool:
        """Return True if a thread blocks until the end of the pull, and notices the end."""
        ends = self.completions[0].pendings
        return any(isinstance(end, _End) and end.waiters for end in ends)

    def look(self) -> bool:
        """Return True if the pull has ended; commit it if its copies have. Never blocks or raises.

        Any thread may look, and several together.
        """
        if self.concluded or self._process.forked:
            return True
        return self.begun and self._look_at_parts()

    def _look_at_parts(self) -> bool:
        """Return True if the pull has ended by its copies; commit it then."""
        copies = self.copies
        try:
            for copy in copies:
                for end in copy.completions:
                    if not end.ended():
                        return False
        except Exception as error:  # torch raises errors of many kinds; the copies run no more
            self.conclude(known(error))
            return True
        errors = [end.error for copy in copies for end in copy.completions if end.error]
        self.conclude(joined_error(errors) or self._gone())
        return True

    def block(self) -> None:
        """Block the host until the pull has ended."""
        while not self.look():
            if self.steps is not None:
                self.steps.wait()
            for copy in self.copies:
                for end in copy.completions:
                    with suppress(RuntimeError):  # torch's error, which `look` gets again
                        end.synchronize()

    def conclude(self, error: PortaKVError | None) -> None:
        """End the pull after all bytes have been read; None: commit it.

        An earlier verdict counts, such as a cancellation.
        """
        # After the deadline any error is that of the deadline.
        if error is not None and monotonic() >= self.until:
            error = self._timed_out()
        self.completions[0].error = self._verdict.setdefault("error", error)
        self._times.append(perf_counter())
        # Release the memory of the owners, and this object from its own completion.
        self.copies = ()
        self.slices = ()
        self.takers = []
        self.completions[0].pendings = ()
        for layer in self.layers:
            if isinstance(layer, LateLayer):  # it never began
                layer.settle(Transfer(), self._verdict["error"])
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

    def stop_after_failure(self) -> None:
        """Stop the pull if one of its copies has failed; a coroutine stops it itself.

        Blocks that do not fit into packed slots stop nothing: all other blocks are moved.
        """
        for copy in self.copies:
            failure: PortaKVError | None = None
            try:
                for end in copy.completions:
                    if end.ended() and not isinstance(end.error, PackOverflow):
                        failure = failure or end.error
            except Exception as caught:  # torch raises errors of many kinds
                failure = known(caught)
            if failure is not None:
                self.stop(failure)

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
        wanted = self.requested.wanted
        if wanted is not None and (hung := wanted.handshakes):
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

    def drop(self) -> None:
        """Stop a pull whose call has failed, and wait for the copies in flight.

        Its coroutine ends a pull that waits.
        """
        cancelled = TransferCancelled(CANCELLED)
        self.stop(cancelled)
        if not self.begun or self.concluded:
            return
        for copy in self.copies:
            with suppress(PortaKVError):  # the owner may be gone
                copy.synchronize()
        self.conclude(cancelled)

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

        Renews meanwhile the offers of owners that share no memory. Asks owners while the last
        copies run from staging buffers.

        Args:
            checks: make the coroutines that compare checksums.
        """
        answers = None
        if not checks:
            await self._until(self._have_crossed)
            answers = await self.ask()
        await self._until(self.have_ended)
        unfit = self.requested.unfit
        errors: list[BaseException | None] = [each.error for each in self.slices]
        errors += [end.error for copy in self.copies for end in copy.completions]
        for error in errors:
            if isinstance(error, PackOverflow):  # all other blocks are moved
                unfit.append(error)
            elif error is not None:
                self.stop(known(error) or TransferCancelled(CANCELLED))
        await self._verify(checks)
        await self.confirm(answers)

    async def _verify(self, checks: Sequence[Callable[[], Steps[None]]]) -> None:
        """Run checks, all at a time; stop the pull by the error of one."""
        if self.over or self.requested.unfit:
            return
        handles = [runtime().start(check()) for check in checks]
        for handle in handles:
            handle.on_end(self.go_on)
        await self._until(lambda: all(handle.done() for handle in handles))
        for handle in handles:
            if handle.error is not None:
                self.stop(known(handle.error) or TransferCancelled(CANCELLED))

    def have_ended(self) -> bool:
        """Return True if all copies and slices of the pull have ended."""
        taken = all(taker.done() for taker in self.takers)
        return taken and all(each.done() for each in self.slices) and self._copies_have_ended()

    def _have_crossed(self) -> bool:
        """Return True if nothing reads the memory of owners any more."""
        for taker in self.takers:
            if not (taker.has_crossed or taker.done()):
                return False
        calls = [each for each in self.slices if isinstance(each, Handle)]
        return all(call.done() for call in calls) and self._copies_have_ended()

    def _copies_have_ended(self) -> bool:
        """Return True if all copies between views have ended; stop the pull if one fails."""
        ended = True
        for copy in self.copies:
            for end in copy.completions:
                try:
                    ended = end.ended() and ended
                except Exception as error:  # torch raises errors of many kinds; it runs no more
                    self.stop(known(error) or TransferCancelled(CANCELLED))
        return ended

    @property
    def remote(self) -> list[Source]:
        """Return the sources of which only the owner can say whether the offer holds."""
        return [source for source in self.sources if source.word is None]

    async def ask(self) -> list[Answer | PortaKVError] | None:
        """Return the answer of each owner of `remote` whether its offer held, or the error of the
        request. None: nothing will be committed.

        All bytes have left the memory of these owners before.
        """
        if self.stopped or self.requested.unfit:
            return None
        return await self._answers(self.remote, Check)

    async def confirm(self, answers: Sequence[Answer | PortaKVError] | None) -> None:
        """End the pull: commit it if the owners of `remote` answer that their offers held.

        ``answers``: of `ask`; None: ask them now.
        A pull that was stopped, or that has blocks that did not fit, is not committed, whatever
        they answer.
        """
        error = joined_error(self.requested.unfit)
        if not (self.stopped or error):
            remote = self.remote
            if answers is None:
                answers = await self._answers(remote, Check)
            for source, answer in zip(remote, answers, strict=True):
                if isinstance(answer, PortaKVError):
                    error = error or answer
                elif answer.state != "held" and not isinstance(error, OfferGone):
                    error = source.ticket.gone(answer.why)
        self.conclude(error or self._gone())

    async def _until(self, ended: Callable[[], bool]) -> None:
        """Wait until a function returns True, and renew the offers meanwhile.

        Calls of `go_on` report all ends but those of copies.
        """
        remote = self.remote
        third = max(MOMENT, min((source.ticket.lease for source in remote), default=LOOK) / 3)
        renewal = monotonic() + min(third, LOOK)
        glance = GLANCE / 16
        while not ended():
            if not self.over and monotonic() >= renewal:
                await self.renew(remote, 3 * third)
                renewal = monotonic() + min(third, LOOK)
            glance = min(2 * glance, GLANCE)
            seconds = glance if self.copies else min(third, LOOK)
            await self.changes.wait_for(ended, runtime().time() + seconds)

    async def renew(self, remote: Sequence[Source], seconds: float) -> None:
        """Renew the leases of offers; stop the pull if an owner or an offer is gone."""
        answers = await self._answers(remote, Renew, seconds)
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
        reason = known(error) or TransferCancelled(CANCELLED)
        self.stop(reason)
        glance = GLANCE / 16
        while not self.have_ended():
            glance = min(2 * glance, LOOK / 10)
            await self.changes.wait_for(self.have_ended, runtime().time() + glance)
        self.conclude(reason)


def known(error: BaseException | None) -> PortaKVError | None:
    """Return an error of a copy or a task as one of this library's."""
    if error is None or isinstance(error, PortaKVError):
        return error
    if isinstance(error, CancelledError):
        return TransferCancelled(CANCELLED)
    failure = TransferError(f"The pull failed: {error!r}.")
    failure.__cause__ = error
    return failure
