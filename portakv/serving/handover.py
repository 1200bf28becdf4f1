# SPDX-License-Identifier: Apache-2.0
"""How one engine hands the rows of requests over to another.

`Tickets` is the scheduler's side: it knows which rows other engines keep for this one, and plans
what workers pull and offer. `Handover` is the worker's side, which does it.
"""

from __future__ import annotations

import logging
import os
import stat
import sys
import time
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from hashlib import sha256
from itertools import product
from pathlib import Path
from secrets import token_bytes
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np

from portakv.arguments import kind_of, number, one_of, rate, seconds, text, whole
from portakv.copy import copy_rows
from portakv.copy.options import Overlap
from portakv.errors import InvalidTerms, PeerError, PortaKVError, TransferTimeout, Unsupported
from portakv.migrate import Channel, Owner, Pull, Reader, Shard, Ticket
from portakv.migrate.channel import NUMERIC, check_address, too_short
from portakv.migrate.described import can_resize, scratch_like
from portakv.migrate.messages import MOST_NAMES, EndNamed, Message, Named, RenewNamed, no_ticket
from portakv.migrate.reader import LONG
from portakv.runtime.bounded import Until
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.serving.groups import Group
from portakv.serving.local import check_names
from portakv.serving.plan import NO_HANDOVERS, Blocks, Handovers, OfferJob, PullJob, RemoteRows
from portakv.tasks import Handle, Limit, Wait, runtime
from portakv.view import Index, KVView
from portakv.view.index import Ids

_log = RateLimitedLog(logging.getLogger(__name__))

# ------------------------------------------------------------------------------------------------
# How one engine hands the rows of requests over to another: terms, and what a request carries.

#: The name of PortaKV's part of what a request carries from the prefill engine to the decode
#: engine, and the version of that part.
KEY = "portakv"
VERSION = 1
#: The most seconds of a lease, as an offer has them.
MOST_LEASE = 1e6
#: The most tickets of a request: one for each worker of the prefill engine.
MOST_TICKETS = 1024


@dataclass(frozen=True)
class HandoverTerms:
    """How an engine hands the rows of requests over, and takes them.

    Attributes:
        address: at which workers of this engine listen, tcp:// with a numeric address and a port.
            Port 0 takes a free one; worker n listens at the port + n. None: Unix sockets, for
            engines of one user and one host.
        secret_file: a file that only this user may read, with the same 16 bytes or more for all
            engines; ``address`` needs it.
        lease: seconds for which a prefill engine keeps the rows of a request that no decode engine
            asks for.
        timeout: seconds after which a decode engine computes a prompt whose rows have not come.
        max_gbps: the most 10^9 bytes in a second that each request takes; None: no limit.
        expose: "mapped": engines of this host map this engine's caches; "staging": they get copies.
        transport: for rows that are not mapped; None: the first that runs.
        peers: the addresses of workers of prefill engines, to which a decode engine connects when
            it starts, and not in its first hand-over.

    Raises `InvalidTerms` for values that a term cannot have.
    """

    address: str | None = None
    secret_file: str | None = None
    lease: float = 30.0
    timeout: float = 30.0
    max_gbps: float | None = None
    expose: Literal["mapped", "staging"] = "mapped"
    transport: str | None = None
    peers: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_address(self.address, secret=True)
        if self.address is not None and self.secret_file is None:
            raise InvalidTerms(
                f"Expected secret_file with {self.address}, got none. Name a file with a secret, "
                f"as TCP connections are always encrypted."
            )
        if self.secret_file is not None:
            text("secret_file", self.secret_file)
        number("lease", self.lease, 1e-9, MOST_LEASE, "a number of seconds above 0, at most 10^6")
        seconds("timeout", self.timeout, above=True)
        if self.max_gbps is not None:
            rate("max_gbps", self.max_gbps)
        one_of("expose", self.expose, ("mapped", "staging"))
        if self.transport is not None:
            text("transport", self.transport)
        self._check_peers()

    def _check_peers(self) -> None:
        """Raise `InvalidTerms` unless ``peers`` are addresses at which workers may listen."""
        if isinstance(self.peers, str) or not isinstance(self.peers, Sequence):
            raise InvalidTerms(
                f"Expected peers to be a list of addresses, got {self.peers!r}. Pass one such as "
                f"['tcp://10.0.0.1:5600']."
            )
        for peer in self.peers:
            check_address(text("peers", peer), secret=True)
            if peer.endswith(":0") or NUMERIC.fullmatch(peer) is None:
                raise InvalidTerms(
                    f"Expected each of peers to be a numeric address with a port, got {peer!r}. "
                    f"Pass one such as 'tcp://10.0.0.1:5600'."
                )
        if self.peers and self.secret_file is None:
            raise InvalidTerms(
                "Expected secret_file with peers, got none. Name the file with the secret of these "
                "engines, as TCP connections are always encrypted."
            )

    @classmethod
    def of(cls, terms: object) -> HandoverTerms:
        """Return terms as a configuration file has them.

        Raises `InvalidTerms` for a name that is not a term, and for no mapping.
        """
        if not isinstance(terms, Mapping):
            raise InvalidTerms(
                f"Expected hand_over to be an object, got {kind_of(terms)}. Pass {{}} for the "
                f"usual terms."
            )
        check_names(terms, [each.name for each in fields(cls)], " in hand_over")
        return cls(**terms)

    def secret(self) -> bytes | None:
        """Return the secret of the file; None without one.

        Raises `InvalidTerms` for a file that others may read, or that has no secret.
        """
        if self.secret_file is None:
            return None
        try:
            with Path(self.secret_file).open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                secret = file.read(4096).strip()
        except OSError as error:
            raise InvalidTerms(
                f"Expected secret_file to be a file, got {self.secret_file!r}: "
                f"{error.strerror}. Write it: openssl rand -hex 32."
            ) from None
        if not stat.S_ISREG(mode) or mode & 0o077:
            raise InvalidTerms(
                f"Expected secret_file to be a file that only this user may read, got "
                f"{self.secret_file!r}, which others may use. Run chmod 600 on it."
            )
        if short := too_short(secret):
            raise InvalidTerms(f"secret_file: {short}")
        return secret

    def address_of(self, worker: int) -> str | None:
        """Return where the worker of a number listens.

        Raises `InvalidTerms` for a port past the last one.
        """
        if self.address is None or self.address.endswith(":0"):
            return self.address
        host, _, port = self.address.rpartition(":")
        address = f"{host}:{int(port) + worker}"
        check_address(address, secret=True)
        return address


class Identity(NamedTuple):
    """What the rows of a request depend on, as far as both engines know it.

    Attributes:
        model: a checksum of the model's name and weights.
        prompt: a checksum of the tokens, and of what else the rows depend on.
    """

    model: str
    prompt: str

    @classmethod
    def of(
        cls, model: str, tokens: Sequence[int], salt: bytes, extra: Iterable[bytes] = ()
    ) -> Identity:
        """Return the identity of a request.

        Args:
            model: the name of the model.
            tokens: of the prompt.
            salt: of tenants and adapters.
            extra: what else the rows depend on, such as images.
        """
        numbers = array("q", tokens)
        if sys.byteorder == "big":
            numbers.byteswap()
        checksum = sha256(numbers)
        for part in (salt, *extra):
            checksum.update(len(part).to_bytes(8, "little") + part)
        return cls(sha256(model.encode()).hexdigest()[:32], checksum.hexdigest()[:32])


def parameters_of(rows: RemoteRows, identity: Identity) -> dict[str, Any]:
    """Return what a request carries to the engine that takes its rows, as JSON has it."""
    return {
        "version": VERSION,
        "tickets": [ticket.hex() for ticket in rows.tickets],
        "tokens": rows.tokens,
        "lease": rows.lease,
        "model": identity.model,
        "prompt": identity.prompt,
    }


def rows_in(parameters: Mapping[str, Any], identity: Identity, tokens: int) -> RemoteRows | None:
    """Return the rows of which a request carries tickets; None if they are not those of the
    request. The log has a line then, and the engine computes the prompt.

    Args:
        parameters: what the request carries.
        identity: of the request here.
        tokens: of its prompt.
    """
    try:
        return read_rows(parameters.get(KEY), identity, tokens)
    except InvalidTerms as error:
        _log.warning("tickets", "A prompt is computed whose rows another engine has: %s", error)
        return None


def read_rows(carried: object, identity: Identity, tokens: int) -> RemoteRows:
    """Return the rows of what `parameters_of` has made; raise `InvalidTerms` for those of another
    request, and for other values."""
    if not isinstance(carried, Mapping) or carried.get("version") != VERSION:
        raise InvalidTerms(
            f"Expected a ticket of PortaKV, version {VERSION}, got none. Use PortaKVConnector and "
            f"one release in both engines, and have the proxy pass kv_transfer_params on unchanged."
        )
    for what, expected in identity._asdict().items():
        if carried.get(what) != expected:
            raise InvalidTerms(
                f"Expected a ticket for the same {what}, got one for another. Serve the same model "
                f"and weights, and send the same prompt to both engines."
            )
    whole("tokens", carried.get("tokens"), tokens, tokens)
    lease = seconds("lease", carried.get("lease"), above=True)
    packed = carried.get("tickets")
    if not isinstance(packed, list) or not 1 <= len(packed) <= MOST_TICKETS:
        raise InvalidTerms("Expected tickets of an engine's workers, got none. Correct the proxy.")
    try:
        tickets = tuple(bytes.fromhex(ticket) for ticket in packed)
    except (TypeError, ValueError):
        raise InvalidTerms(
            "Expected tickets as hexadecimal digits, got others. Correct the proxy."
        ) from None
    return RemoteRows(tickets, tokens, lease)


#: How often a lease is renewed within its seconds.
RENEWALS = 3
#: The least seconds between two renewals, whatever lease a request carries.
SHORTEST = 0.1
#: Bytes of the name of an offer, which is random: who knows it may pull.
NAME = 32


class Endpoint(NamedTuple):
    """Where a worker offers rows.

    Attributes:
        address: of its channel.
        epoch: of its caches.
    """

    address: str
    epoch: bytes


class Tickets:
    """Plans the hand-overs of one engine.

    Rows of another engine are needed from `expect` until `release`. Meanwhile their leases are
    renewed.

    Args:
        now: returns the time in seconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._endpoints: Sequence[Endpoint] = ()
        self._lease = 0.0
        # By request the rows that it needs, and when their leases are renewed next.
        self._needed = dict[str, tuple[RemoteRows, float]]()
        self._now = now
        self._next = Handovers()

    @property
    def offers(self) -> bool:
        """Return whether this engine's workers can offer rows."""
        return bool(self._endpoints)

    def open(self, endpoints: Sequence[Endpoint], lease: float) -> None:
        """Take note of where workers offer rows, and for how many seconds."""
        self._endpoints = endpoints
        self._lease = lease

    def expect(self, request: str, rows: RemoteRows) -> None:
        """Take note that a request needs the rows of another engine."""
        self._needed[request] = rows, self._now() + _interval(rows)

    def pull(self, job: PullJob) -> None:
        """Plan a pull of rows that a request expects."""
        self._next.pulls.append(job)

    def release(self, request: str) -> None:
        """Let the other engine use the blocks of the rows again that a request has needed."""
        needed = self._needed.pop(request, None)
        if needed is not None:
            self._next.released += needed[0].tickets

    def offer(self, request: str, tokens: int, blocks: Blocks) -> RemoteRows:
        """Plan an offer of the first tokens of a request; return what another engine pulls."""
        name = token_bytes(NAME)
        self._next.offers.append(OfferJob(request, name, tokens, blocks, self._lease))
        tickets = [Ticket.of(each.address, each.epoch, name) for each in self._endpoints]
        return RemoteRows(tuple(tickets), tokens, self._lease)

    def revoke(self) -> None:
        """End all offers that were made, and make none of those that are planned."""
        self._next.withdrawn += [offer.name for offer in self._next.offers]
        self._next.offers = []
        self._next.revoked = True

    def plan(self) -> Handovers:
        """Return what the workers do in this step."""
        made = self._next
        made.renewals = self._renewals()
        if not (made.renewals or made.pulls or made.offers or made.released or made.revoked):
            return NO_HANDOVERS
        self._next = Handovers()
        return made

    def _renewals(self) -> list[RemoteRows]:
        """Return the rows whose leases are to be renewed now."""
        if not self._needed:
            return []
        now = self._now()
        made = {name: rows for name, (rows, due) in self._needed.items() if now >= due}
        for name, rows in made.items():
            self._needed[name] = rows, now + _interval(rows)
        return [*made.values()]


def _interval(rows: RemoteRows) -> float:
    """Return the seconds between two renewals of rows."""
    return max(rows.lease / RENEWALS, SHORTEST)


# ------------------------------------------------------------------------------------------------
# The worker's side: it offers the rows of prompts, and pulls those that other engines offer.

#: Workers of an engine that may pull one offer. The engine says when all of them have it.
READERS = 1 << 31
#: The most seconds for which readers keep an offer, unless the lease is longer.
LONGEST = 3600.0
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


class Handover:
    """Offers rows of one worker's caches to other engines, and pulls those that they offer.

    No call but `begin` waits for another process. A failure is no error of the engine: a pull that
    fails is reported, and rows that cannot be offered are not. The log has a line about it.

    Args:
        shards: the caches of each group of layers, by head and token, and the part of the model
            that they have. A group may have several.
        model: the name of the model; engines of another one take no rows.
        terms: of the hand-over.
        offers: this engine offers rows.
        pulls: it takes rows.
        address: at which this worker listens; None: at a Unix socket.
        leads: this worker sends other engines renewals and releases; one of each engine does.
        parts: of each shard the number of its group, and the group. None: each is a group of layers
            that keep all tokens.

    Attributes:
        shards, model, terms, parts: as they were passed.
        owner: of the offers; None: this engine offers nothing.
        reader: of the pulls; None: this engine pulls nothing.
        pulling: the pulls that have not ended, or were not reported; None: it could not begin.

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
        parts: Sequence[tuple[int, Group]] | None = None,
    ) -> None:
        self.shards = shards
        self.parts = [*enumerate([Group(1)] * len(shards))] if parts is None else parts
        self.model = model
        self.terms = terms
        self._leads = leads
        self._channel = Channel(address, secret=terms.secret())
        self._runtime = runtime()
        self._width = Limit(self._runtime, WIDTH)  # of messages
        self._sends = deque[Handle[None]](maxlen=SENDS)
        self._offers = dict[bytes, str]()  # the requests, by the names of offers
        self.pulling = list[tuple[PullJob, Pull | None]]()
        self._ends = Counter[str]()
        self._looked = 0.0
        self._meetings = list[Handle[None]]()
        self._gone: Until[str] = Until("engines that take no message", 1024)
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
            self.pulling.append((pull, self._pull(pull, "idle" if alone else "compute")))
        if self._leads:
            for rows in plan.renewals:
                self.tell(rows.tickets, partial(RenewNamed, seconds=rows.lease))
            if plan.released:
                self.tell(plan.released, EndNamed)

    def ended_pulls(self) -> list[tuple[PullJob, bool]]:
        """Return the pulls that have ended since the last call, and whether their rows landed."""
        ended = [(job, pull) for job, pull in self.pulling if pull is None or pull.ended]
        for job, pull in ended:
            self.pulling.remove((job, pull))
            if pull is not None and pull.error is not None:
                _log_failed_pull(pull.error)
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
        if self.reader is None:
            return
        for peer in self.terms.peers:
            meeting = self._meet(self.reader, peer)
            self._meetings.append(self._runtime.start(meeting, locked=False))

    async def _meet(self, reader: Reader, peer: str) -> None:
        """Connect to a worker; until it answers, try again."""
        pause = AGAIN
        while True:
            try:
                attempt = reader.prepare(peer)
                while not attempt.done():
                    await Wait(until=self._runtime.time() + LOOK)
                return
            except (PeerError, TransferTimeout) as error:
                _log.warning(f"peer {peer}", "%s is not connected yet: %s", peer, error)
            except PortaKVError as error:
                _log.warning("peer", "No rows of %s will be taken: %s", peer, error)
                return
            await Wait(until=self._runtime.time() + pause)
            pause = min(2 * pause, MOST_AGAIN)

    def close(self) -> None:
        """End all offers and pulls."""
        for meeting in self._meetings:
            meeting.cancel()
            meeting.wait(SENDING)
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
                *self.ids_of(job, False),
                tokens=job.tokens,
                lease=job.lease,
                max_lease=max(job.lease, LONGEST),
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
                *self.ids_of(job, True),
                first=self._first_of(job),
                overlap=overlap,
                max_gbps=self.terms.max_gbps,
                timeout=self.terms.timeout,
            )
        except PortaKVError as error:
            _log_failed_pull(error)
            return None

    def _first_of(self, job: PullJob) -> int:
        """Return the first token of a pull: also before rows that are here already, if the
        positions of a state begin there."""
        shards = zip(self.shards, self.parts, strict=True)
        wide = max((x.view.block_size or 1 for x, (_, group) in shards if group.states), default=0)
        return max(0, min(job.first, job.tokens - wide))

    def ids_of(self, job: OfferJob | PullJob, pulls: bool) -> list[Ids]:
        """Return the ids of each shard; of states at the last positions, of which a block may
        have several. ``pulls``: without rows that are here, or that nothing needs and the other
        engine may have given up."""
        lists = list[Ids]()
        here = job.first if isinstance(job, PullJob) and self._first_of(job) < job.first else 0
        for shard, (at, group) in zip(self.shards, self.parts, strict=True):
            ids: Ids = job.blocks[at]
            size = shard.view.block_size or 1
            if group.states:
                slots = np.full(job.tokens, -1)
                slots[-size:] = Index.of(ids, size).slots(size)
                ids = Index(slots)
            elif pulls and (needed := max(here, group.first_needed(job.tokens))):
                slots = Index.of(ids, size).slots(job.tokens)
                slots[:needed] = -1
                ids = Index(slots)
            lists.append(ids)
        return lists

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
            if not self._gone.holds(address):
                await self._channel.send(address, message, SENDING)
        except PortaKVError:
            self._gone.hold(address, GONE)
        finally:
            self._width.release()


def _log_failed_pull(error: PortaKVError) -> None:
    """Log why the engine computes a prompt."""
    topic = f"pull {type(error).__name__}"
    _log.warning(topic, "A prompt is computed whose rows another engine has: %s", error)


# ------------------------------------------------------------------------------------------------
# A hand-over before an engine's first step, so that its first real one stalls no request.
#
# The other side of a rehearsal is a second `Handover` of this process, over a few blocks of
# scratch memory. So the rehearsal needs no other engine, and passes through the same channels,
# threads, modules and kernels as a real hand-over. What only the real peer has is left: its
# handshake, and the mapping of its memory.

Result = TypeVar("Result")

Expose: TypeAlias = Literal["mapped", "staging"]
#: Tokens of a block that another engine may have: those that vLLM chooses by itself.
SIZES = (16, 32, 64, 128)
#: The most bytes of scratch memory for one size; a device has little left beside its caches.
LARGEST = 256 << 20
#: How a pull shares the device: with a model, and alone.
OVERLAPS: tuple[Overlap, ...] = ("compute", "idle")
#: Seconds for a rehearsal, and between two looks at it.
PATIENCE = 30.0
PAUSE = 5e-4


def rehearse(handover: Handover) -> None:
    """Hand rows of a worker's caches over to scratch memory, and pull them back.

    The caches keep their bytes. A failure is no error of the engine: the log has a line, and the
    first hand-over takes longer.

    Args:
        handover: of a worker whose caches nothing uses yet.
    """
    try:
        _read_all_forms(handover)
        for expose in _exposures(handover.terms):
            _hand_over_and_back(handover, expose)
    except Exception as error:  # compilers and drivers raise errors of their own types
        _log.warning("rehearse", "The first hand-over of an engine will be slow: %s", error)


def _exposures(terms: HandoverTerms) -> list[Expose]:
    """Return how the rows of other engines may come: engines of other hosts map no memory."""
    if terms.address is None or terms.expose == "staging":
        return [terms.expose]
    return [terms.expose, "staging"]


def _blocks(handover: Handover, tokens: int) -> tuple[tuple[int, ...], ...]:
    """Return the first blocks of each group of one side of a rehearsal, for so many tokens."""
    blocks = dict[int, tuple[int, ...]]()
    for shard, (at, group) in zip(handover.shards, handover.parts, strict=True):
        many = 1 if group.states else -(-tokens // (shard.view.block_size or 1))
        blocks[at] = tuple(range(many))
    return tuple(blocks[at] for at in sorted(blocks))


def _hand_over_and_back(handover: Handover, expose: Expose) -> None:
    """Hand the rows of the first blocks over to scratch memory, and pull them from there."""
    own = handover.shards
    states = [bool(group.states) for _, group in handover.parts]
    counts = [*_counts([shard for shard, one in zip(own, states, strict=True) if not one])]
    most = max(counts)
    scratch = [
        scratch_like(
            shard, shard.view.block_size or 1, 1 if one else most, listed=_listed(shard.view)
        )
        for shard, one in zip(own, states, strict=True)
    ]
    terms = handover.terms
    address = None
    if terms.address is not None:
        address = f"{terms.address.rpartition(':')[0]}:0"
    peer = Handover(
        scratch,
        handover.model,
        replace(terms, expose=expose),
        offers=handover.reader is not None,
        pulls=handover.owner is not None,
        address=address,
        parts=handover.parts,
    )
    try:
        for tokens in counts:
            for src, dst, one in zip(own, scratch, states, strict=True):
                _copy([src], [dst], 1 if one else tokens)
            for idle in (False, True):
                if handover.owner is not None:
                    _hand_over(handover, peer, tokens, idle)
                if handover.reader is not None:
                    _hand_over(peer, handover, tokens, idle)
    finally:
        peer.close()
        _end_all(handover)


def _counts(shards: Sequence[Shard]) -> Iterator[int]:
    """Yield how many tokens are handed over: more than one block, and more bytes than the caller of
    a pull copies itself on the host. The last block of each is not full."""
    slots = min(shard.view.slots for shard in shards)
    size = max(shard.view.block_size or 1 for shard in shards)
    yield min(slots, size + 1)
    of_token = min(_token_bytes(shard.view) for shard in shards)
    long = LONG // of_token + 2
    if size + 1 < long <= slots:
        yield long


def _token_bytes(view: KVView) -> int:
    return max(1, view.layers * view.heads * sum(view.widths))


def _hand_over(src: Handover, dst: Handover, tokens: int, idle: bool) -> None:
    """Offer rows of the first blocks of one side, pull them into those of the other side, and end
    the offer, by the calls that a worker makes in its steps.

    ``idle``: of an engine that does nothing else.
    """
    endpoint = src.endpoint
    assert endpoint is not None
    name = token_bytes(32)
    ticket = Ticket.of(endpoint.address, endpoint.epoch, name)
    offer = OfferJob("rehearsal", name, tokens, _blocks(src, tokens), PATIENCE)
    src.begin(Handovers(offers=[offer]))
    pull = PullJob(0, "rehearsal", (ticket,), 0, tokens, _blocks(dst, tokens))
    dst.begin(Handovers(pulls=[pull]), idle)
    landed = _await(dst.ended_pulls, "the end of a pull")
    dst.tell((ticket,), EndNamed)
    _await(src.ended_offers, "the end of an offer")
    if not all(ended for _, ended in landed):
        raise TransferTimeout("Expected the rows of a rehearsal, got none. See the lines above.")


def _end_all(handover: Handover) -> None:
    """End what a rehearsal that has failed has left, so that the engine sees nothing of it."""
    if handover.owner is not None and handover.lending:
        handover.owner.revoke_all()

    def ended() -> bool:
        handover.ended_pulls()
        handover.ended_offers()
        return not handover.busy

    _await(ended, "the ends of offers and pulls")


def _await(happened: Callable[[], Result], what: str) -> Result:
    """Return the first result that is not empty; raise `TransferTimeout` after `PATIENCE`."""
    until = time.monotonic() + PATIENCE
    while not (result := happened()):
        if time.monotonic() > until:
            raise TransferTimeout(f"Expected {what} within {PATIENCE:g} s, got none.")
        time.sleep(PAUSE)
    return result


def _listed(view: KVView) -> bool:
    """Return whether the addresses of layers are a table, as those of separate allocations are."""
    return any(step.table for part in view.form.parts for step in part.layer)


def _read_all_forms(handover: Handover) -> None:
    """Copy rows as pulls of mapped memory do: a kernel is built for each size of the other engine's
    blocks, and another one reads memory of another device while a model runs.

    Layers of the other engine may be separate allocations, or lie at the distances of these ones.
    """
    shards = () if handover.reader is None else handover.reader.shards
    for shard, (_, group) in zip(shards, handover.parts, strict=False):
        own = shard.view.block_size
        if own is not None and not (shard.view.layout.opaque or group.states):
            _read_forms_of(shard, own)


def _read_forms_of(shard: Shard, own: int) -> None:
    """Do so for the caches of a shard, whose blocks have ``own`` tokens."""
    others = SIZES if can_resize(shard) else ()
    for size in dict.fromkeys([own, *others]):
        tokens = max(own, size) + 1  # a block of either size is whole, and another one is not
        nbytes = tokens * _token_bytes(shard.view)
        if tokens <= shard.view.slots and nbytes <= LARGEST:
            for listed in {True, _listed(shard.view)}:
                _read_from(shard, own, size, tokens, listed)


def _read_from(shard: Shard, own: int, size: int, tokens: int, listed: bool) -> None:
    """Copy rows to scratch memory, and back as a pull from blocks of ``size`` tokens does."""
    view = shard.view
    scratch_shard = scratch_like(shard, size, tokens, listed=listed)
    (scratch,) = _copy([shard], [scratch_shard], tokens)
    src_index = Index.of([*range(-(-tokens // size))], size)
    dst_index = Index.of([*range(-(-tokens // own))], own)
    sources = [scratch.view]
    if view.device.type != "cpu":
        sources.append(scratch.view.as_peer(view.device))
    for src, overlap in product(sources, OVERLAPS):
        with suppress(Unsupported):  # nothing here reads memory of another device
            copied = copy_rows(src, view, src_index, dst_index, count=tokens, overlap=overlap)
            copied.synchronize()


def _copy(src: Sequence[Shard], dst: Sequence[Shard], tokens: int) -> Sequence[Shard]:
    """Copy the rows of the first tokens, and return the destination.

    No pull copies so, thus by no kernel that would have to be built.
    """
    for one, other in zip(src, dst, strict=True):
        copied = copy_rows(one.view, other.view, count=tokens, backend="reference")
        copied.synchronize()
    return dst
