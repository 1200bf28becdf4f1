# SPDX-License-Identifier: Apache-2.0
"""`Handover`: the worker's side of hand-overs between engines. It offers the rows of prompts, and
pulls those that other engines offer."""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from portakv.copy.options import Overlap
from portakv.errors import PeerError, PortaKVError, TransferTimeout
from portakv.migrate import Channel, Owner, Pull, Reader, Shard, Ticket
from portakv.migrate.messages import (
    MOST_NAMES,
    EndNamed,
    Message,
    Named,
    RenewNamed,
    no_ticket,
)
from portakv.runtime.bounded import Bounded
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.serving.handover_tickets import Endpoint, HandoverTerms
from portakv.serving.plan import Handovers, OfferJob, PullJob
from portakv.tasks import Handle, Limit, Wait, runtime

_log = RateLimitedLog(logging.getLogger(__name__))
#: Workers of an engine that may pull one offer. The engine says when all of them have it.
READERS = 1 << 31
#: The most seconds for which readers keep an offer, unless the lease is longer.
MOST_LEASE = 3600.0
#: Seconds between two looks at the offers.
LOOK = 0.02
#: Seconds for a message to an engine.
SENDING = 1.0
#: Messages to engines that are sent together, and the last ones, for which `Handover.close` waits.
WIDTH = 4
SENDS = 1024
#: Seconds between the first two attempts to connect to an engine that does not listen yet, and the
#: most between later ones.
AGAIN = 1.0
MOST_AGAIN = 30.0
#: Seconds without a message to an engine that did not take one, so that it delays no other.
GONE = 2.0


class _Pulling(NamedTuple):
    """A pull of this worker; None: it could not begin."""

    job: PullJob
    pull: Pull | None


class Handover:
    """Offers rows of one worker's caches to other engines, and pulls those that they offer.

    No call but `begin` waits for another process. A failure is no error of the engine: a pull that
    fails is reported, and rows that cannot be offered are not. The log has a line about it.

    Args:
        shards: the caches of each group of layers, by head and token, and the part of the model
            that they have.
        model: the name of the model; engines of another one take no rows.
        terms: of the hand-over.
        offers: this engine offers rows.
        pulls: it takes rows.
        address: at which this worker listens; None: at a Unix socket.
        leads: this worker sends other engines renewals and releases; one of each engine does.

    Attributes:
        shards, model, terms: as they were passed.
        owner: of the offers; None: this engine offers nothing.
        reader: of the pulls; None: this engine pulls nothing.
        pulling: the pulls that have not ended, or were not reported.

    Raises:
        InvalidTerms: a file without a secret.
        PeerError: an address at which nothing can listen.
        LayoutError: caches that cannot be described.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        model: str,
        terms: HandoverTerms,
        *,
        offers: bool = True,
        pulls: bool = True,
        address: str | None = None,
        leads: bool = True,
    ) -> None:
        self.shards = shards
        self.model = model
        self.terms = terms
        self._leads = leads
        self._channel = Channel(address, secret=terms.secret())
        self._runtime = runtime()
        self._width = Limit(self._runtime, WIDTH)  # of messages
        self._sends = deque[Handle[None]](maxlen=SENDS)
        self._offers = dict[bytes, str]()  # the requests, by the names of offers
        self.pulling = list[_Pulling]()
        self._ends = Counter[str]()
        self._looked = 0.0
        self._meeting: Handle[None] | None = None
        self._gone: Bounded[str, float] = Bounded("engines that take no message", 1024)
        self.owner: Owner | None = None
        self.reader: Reader | None = None
        try:
            transport = terms.transport
            if offers:
                self.owner = Owner(
                    self._channel, *shards, model=model, expose=terms.expose, transport=transport
                )
                self.owner.finished()  # ends are kept from now on
            if pulls:
                self.reader = Reader(self._channel, *shards, model=model, transport=transport)
        except BaseException:
            self.close()
            raise

    @property
    def endpoint(self) -> Endpoint | None:
        """Return where this worker offers rows; None: it offers none."""
        return None if self.owner is None else Endpoint(self._channel.address, self.owner.epoch)

    @property
    def busy(self) -> bool:
        """Return whether a pull or an offer has not ended, or was not reported."""
        return bool(self.pulling or self._offers or self._ends)

    @property
    def lending(self) -> set[str]:
        """Return the requests whose rows other engines may read, as of the last look."""
        return {*self._offers.values()}

    def begin(self, plan: Handovers, idle: bool = False) -> None:
        """Begin what a plan says, ordered after the current stream's work.

        A pull asks the other engine for its rows, and waits at most 1 ms for the answer. ``idle``:
        the engine computes nothing, so a single pull may use the whole device.
        """
        if plan.revoked and self.owner is not None:
            self.owner.revoke_all()
        self._withdraw(plan.withdrawn)
        for offer in plan.offers:
            self._offer(offer)
        alone = idle and len(plan.pulls) == 1 and not self.pulling
        for pull in plan.pulls:
            self.pulling.append(_Pulling(pull, self._pull(pull, "idle" if alone else "compute")))
        if self._leads:
            for renewal in plan.renewals:
                renew = partial(RenewNamed, seconds=renewal.seconds)
                self.tell(renewal.tickets, renew)
            if plan.released:
                self.tell(plan.released, EndNamed)

    def ended_pulls(self) -> list[tuple[PullJob, bool]]:
        """Return the pulls that have ended since the last call, and whether their rows landed."""
        ended = [each for each in self.pulling if each.pull is None or each.pull.ended]
        for each in ended:
            self.pulling.remove(each)
            if each.pull is not None and each.pull.error is not None:
                _log_failed_pull(each.pull.error)
        return [(job, pull is not None and pull.published) for job, pull in ended]

    def ended_offers(self) -> list[str]:
        """Return how offers have ended since the last call. Looks at them now and then."""
        now = time.monotonic()
        if self.owner is not None and self._offers and now >= self._looked + LOOK:
            self._looked = now
            for offer, state, _ in self.owner.finished():
                if self._offers.pop(offer.name, None) is not None:
                    self._ends[state] += 1
        ended = [*self._ends.elements()]
        self._ends.clear()
        return ended

    def meet(self) -> None:
        """Connect to the workers in ``terms.peers`` as soon as each listens, in the loop.

        A first pull of one of them then waits for no handshake, and maps no memory. The log has a
        line about a worker that does not answer, and about one whose rows this engine cannot take.
        """
        if self.reader is None or not self.terms.peers:
            return
        self._meeting = self._runtime.start(self._meet_all(), locked=False)

    async def _meet_all(self) -> None:
        """Connect to all workers; until each has answered, ask again."""
        left: Sequence[str] = self.terms.peers
        pause = AGAIN
        while left := await self._meet(left):
            await Wait(until=self._runtime.time() + pause)
            pause = min(2 * pause, MOST_AGAIN)

    async def _meet(self, peers: Sequence[str]) -> list[str]:
        """Connect to workers, and return those that do not answer."""
        assert self.reader is not None
        absent = list[str]()
        try:
            attempts = [(peer, self.reader.prepare(peer)) for peer in peers]
        except PortaKVError:
            return []  # the reader is closed
        for peer, attempt in attempts:
            try:
                while not attempt.done():
                    await Wait(until=self._runtime.time() + LOOK)
            except (PeerError, TransferTimeout) as error:
                _log.warning(f"peer {peer}", "%s is not connected yet: %s", peer, error)
                absent.append(peer)
            except PortaKVError as error:
                _log.warning("peer", "No rows of %s will be taken: %s", peer, error)
        return absent

    def close(self) -> None:
        """End all offers and pulls."""
        if self._meeting is not None:
            self._meeting.cancel()
        for each in (self.reader, self.owner):
            if each is not None:
                each.close()
        until = time.monotonic() + SENDING
        with suppress(TransferTimeout):
            for send in self._sends:
                send.synchronize(max(0.0, until - time.monotonic()))
        self._channel.close()

    def _offer(self, job: OfferJob) -> None:
        """Offer rows; without an offer, the engine gets its blocks back, and readers an answer."""
        assert self.owner is not None
        try:
            self.owner.offer(
                *job.blocks,
                tokens=job.tokens,
                lease=job.lease,
                max_lease=max(job.lease, MOST_LEASE),
                readers=READERS,
                name=job.name,
            )
        except PortaKVError as error:
            _log.warning("offer", "The rows of a prompt are not handed over: %s", error)
            self._ends["failed"] += 1
            self._withdraw([job.name])
        else:
            self._offers[job.name] = job.request

    def _withdraw(self, names: Iterable[bytes]) -> None:
        """Let engines know that names have no offer, so that they do not wait for one."""
        owner = self.owner
        if owner is None:
            return
        for name in names:
            with suppress(PortaKVError):
                owner.revoke(Ticket.of(self._channel.address, owner.epoch, name))

    def _pull(self, job: PullJob, overlap: Overlap) -> Pull | None:
        """Begin to pull rows; None if that fails."""
        assert self.reader is not None
        try:
            if not all(map(Named.read, job.tickets)):  # others wait for a handshake here
                raise no_ticket()
            return self.reader.pull(
                job.tickets,
                *job.blocks,
                first=job.first,
                overlap=overlap,
                max_gbps=self.terms.max_gbps,
                timeout=self.terms.timeout,
            )
        except PortaKVError as error:
            _log_failed_pull(error)
            return None

    def tell(self, tickets: Iterable[bytes], message: Callable[..., Message]) -> None:
        """Send the owners of tickets a message about the names of their offers."""
        names = defaultdict[tuple[str, bytes], list[bytes]](list)
        for ticket in tickets:
            named = Named.read(ticket)
            if named is not None:
                names[named.address, named.epoch].append(named.name)
        for (address, epoch), known in names.items():
            for first in range(0, len(known), MOST_NAMES):
                some = message(epoch=epoch, names=tuple(known[first : first + MOST_NAMES]))
                self._sends.append(self._runtime.start(self._send(address, some)))

    async def _send(self, address: str, message: Message) -> None:
        """Send a message. An owner that is gone needs none."""
        await self._width.acquire()
        try:
            if time.monotonic() >= self._gone.get(address, 0.0):
                await self._channel.send(address, message, SENDING)
        except PortaKVError:
            self._gone[address] = time.monotonic() + GONE
        finally:
            self._width.release()


def _log_failed_pull(error: PortaKVError) -> None:
    """Log why the engine computes a prompt."""
    topic = f"pull {type(error).__name__}"
    _log.warning(topic, "A prompt is computed whose rows another engine has: %s", error)
