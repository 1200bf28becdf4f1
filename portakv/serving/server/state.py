# SPDX-License-Identifier: Apache-2.0
"""`ServerState`: which rows of a store are lent to which process, and for what.

Ranks of engines copy blocks between their caches and rows of the server's store, which they map.
This is the state machine of the server: it opens no socket, starts no thread and waits for nothing.

The rules, in order of their weight:

- Rows that were lent to a client serve nothing else before the client has reported the end of its
  copy, or its process has ended. The end of a session ends neither: its process may be stopped,
  and write when it goes on.
- A block of a save is sealed only after the parts that ranks have reported cover it.
- Numbers of sessions and of leases are never used again, so a late report names nothing.
- Each request ends, whatever clients do.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import accumulate
from secrets import randbits
from typing import TypeAlias

import numpy as np

from portakv.arguments import shown
from portakv.errors import InvalidTerms, PeerError
from portakv.graph.trace import Figures
from portakv.host.shared import Process
from portakv.serving.server.messages import (
    UNFIT,
    Delete,
    Grant,
    Join,
    Load,
    Pin,
    Progress,
    Save,
)
from portakv.storage.eviction import Pins
from portakv.storage.form import BlockForm
from portakv.storage.lent import Borrowed, LentCopy
from portakv.storage.store import FormStore
from portakv.storage.work import Handle
from portakv.tasks import runtime

# ------------------------------------------------------------------------------------------------
# Parts of blocks: those of ranks, and the whole blocks that a server stores.


def whole_form(part: BlockForm) -> BlockForm:
    """Return the form of whole blocks, with all layers and heads, that a part belongs to."""
    layers = part.layers[2]
    heads = part.heads[2]
    return replace(part, layers=(0, layers, layers), heads=(0, heads, heads))


def cells_of(form: BlockForm) -> int:
    """Return a number with a bit for each head of each layer of a form, of those of the model."""
    across = form.heads[2]
    heads = sum(1 << head for head in range(*form.heads[:2]))
    return sum(heads << across * layer for layer in range(*form.layers[:2]))


def ended_session() -> PeerError:
    """Return the error for a message of a session that has ended."""
    return PeerError("Expected a session of this store server, got one that has ended. Join anew.")


def unlike(form: BlockForm, stored: Sequence[BlockForm]) -> InvalidTerms:
    """Return the error for blocks of another form than the stored ones."""
    got = asdict(form)
    differences = [
        {name: value for name, value in asdict(each).items() if value != got[name]}
        for each in stored
    ]
    nearest = min(differences, key=len, default=dict.fromkeys(got))
    expected = ", ".join(f"{name}={shown(value)}" for name, value in nearest.items())
    values = ", ".join(f"{name}={shown(got[name])}" for name in nearest)
    return InvalidTerms(
        f"Expected blocks with {expected}, as the store server stores them, got {values}. Start "
        f"the engine with the same terms, or give it another folder."
    )


# ------------------------------------------------------------------------------------------------
# What a server's state knows of: processes, sessions, loads and saves, and rows that are lent.

#: A copy that a store has lent.
Copy: TypeAlias = LentCopy | Borrowed
#: What the saves of all ranks of an engine have in common: the engine, the form, the keys, and what
#: these follow.
SaveKey: TypeAlias = tuple[object, ...]


@dataclass(eq=False)
class Client:
    """A session of a rank.

    Attributes:
        parts: its part of the blocks of each group of layers, in their order: a bit for each head
            of each layer, as `cells_of` has it, by the store of the whole blocks.
        address: of its channel.
        requests: the loads and saves that have not ended, and the blocks that it keeps from
            eviction, by the client's numbers.
        gone: the session has ended.
    """

    session: int
    engine: str
    process: Process
    parts: dict[FormStore, int]
    address: str
    requests: dict[int, Work | Pins] = field(default_factory=dict)
    gone: bool = False


@dataclass(eq=False)
class Lease:
    """Rows of a copy that a client makes.

    ``cells``: the part of each block that it writes. ``places``: of the rows in the copy, in
    order.
    ``since``: when it began.
    """

    number: int
    client: Client
    lent: Lent
    cells: int
    places: Sequence[int]
    since: float = 0.0


@dataclass(eq=False)
class Lent:
    """A copy that the store has lent, and the clients that make it.

    Attributes:
        leases: those that have not been reported.
        assigned: the cells that clients write, or have written.
        covered: the cells of each block that clients have written.
        unfit: by place the cells of blocks that do not fit into packed slots.
        raw: the places of blocks that clients write once more, raw; None: not yet.
        ended: the store has its rows back.
    """

    work: Work
    copy: Copy
    leases: set[Lease] = field(default_factory=set)
    assigned: int = 0
    covered: list[int] = field(default_factory=list)
    unfit: dict[int, int] = field(default_factory=dict)
    raw: Sequence[int] | None = None
    ended: bool = False

    def note(self, place: int, cells: int, landed: int) -> None:
        """Note what a client reports of a block: see `Report.landed`."""
        if landed == UNFIT:
            self.unfit[place] = self.unfit.get(place, 0) | cells
        elif landed:
            self.covered[place] |= cells

    def tried(self, place: int) -> int:
        """Return the cells of a block that clients have written, or could not pack."""
        return self.covered[place] | self.unfit.get(place, 0)

    def begin_raw(self, cells: int) -> bool:
        """Begin anew with the blocks that do not fit; return whether there are some.

        They begin once clients have tried all of ``cells``, as packed and raw bytes of a block
        have the same row.
        """
        if self.raw is not None or self.copy.raw is None:
            return False
        self.raw = [place for place in self.unfit if self.tried(place) == cells]
        for place in self.raw:
            self.covered[place] = 0
        self.assigned = 0
        return bool(self.raw)

    def end(self, cells: int) -> None:
        """Give the rows back; blocks that lack a cell of ``cells`` have not landed."""
        self.ended = True
        self.work.lents.pop(self, None)
        landed = np.array([not cells & ~each for each in self.covered], np.bool_)
        if not self.raw:
            self.copy.end(landed)
            return
        raw = np.zeros(len(landed), np.bool_)
        raw[[*self.raw]] = True
        self.copy.end(landed, raw)


@dataclass(eq=False)
class Work:
    """A load of one client, or a save that all ranks of an engine ask for: a `Copier` of the store.

    Attributes:
        lend: takes the copies that the store begins, under the lock of its graph.
        key: of a save; None: a load.
        since: when it began.
        expected: the clients that will ask for it.
        requesters: the clients that have requested it, with their numbers.
        granted: blocks whose rows were lent, as whole blocks.
        abandoned: no client copies any further block.
        complete: no further rows follow.
        stored: of a save, which blocks are stored; None: it has not ended.
    """

    lend: Callable[[Work, Copy], object]
    store: FormStore
    blocks: int
    key: SaveKey | None = None
    since: float = 0.0
    expected: set[Client] = field(default_factory=set)
    handle: Handle | None = None
    lents: dict[Lent, None] = field(default_factory=dict)
    requesters: dict[Client, int] = field(default_factory=dict)
    granted: int = 0
    abandoned: bool = False
    complete: bool = False
    stored: bytes | None = None

    def begin(self, copy: Copy, /) -> None:
        """Take a copy from the store."""
        self.lend(self, copy)

    def awaits(self, client: Client) -> bool:
        """Return whether a client has yet to ask for it."""
        return client not in self.requesters and (self.stored is None or client in self.expected)

    @property
    def has_all_rows(self) -> bool:
        """Return whether all blocks have rows. Packed ones of a save may get rows once more."""
        packs = self.key is not None and bool(self.store.form.encoding)
        return self.granted == self.blocks and not packs

    @property
    def awaited(self) -> bool:
        """Return True if another rank may ask for it."""
        return any(not (each.gone or each in self.requesters) for each in self.expected)


#: Seconds for which a save waits for all ranks of its engine, and the server remembers how it
#: ended for ranks that ask later.
PATIENCE = 10.0
REMEMBERED = 60.0
#: Bytes of a lease, which one worker of a client copies, unless a block is larger.
PIECE = 32 << 20
#: The most bytes of the rows that a message lends, below the channel's limit, and of a lease
#: without its rows.
MESSAGE = 48 << 10
HEAD = 32


#: The names of `ServerState.counts`.
COUNTED = (
    "joined",
    "lent",
    "late_reports",
    "saved_raw",
    "saves_abandoned",
    "saves_without_all_ranks",
)


@dataclass
class _News:
    """What a client learns next about a request."""

    grants: list[Grant] = field(default_factory=list)
    more: bool = True
    stored: bytes | None = None


class ServerState:
    """The clients of a server, and the rows that are lent to them.

    Any thread may call: the lock of the runtime guards all, which the stores' graphs have as well.
    Messages for clients collect until `take`.

    Args:
        wake: is called, in any thread, when `advance` has something to do.
        patience: seconds for which a save waits for all ranks of its engine.
        now: returns the time in seconds.

    Attributes:
        stores: the stores of the forms of whole blocks, by the checksums of the forms.
        leases: all rows that were lent and that processes may still use, by the numbers of leases.
        counts: what has happened.
    """

    def __init__(
        self,
        wake: Callable[[], object],
        patience: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stores = dict[bytes, FormStore]()
        self.leases = dict[int, Lease]()
        self.counts = Counter[str]()
        self._wake = wake
        self._patience = patience
        self._now = now
        self._lock = runtime().lock
        self._clients = dict[int, Client]()  # by session
        self._works = dict[Work, None]()  # that have not ended
        self._saves = dict[Work, None]()  # that an engine may ask for again
        # What clients learn next, by client and number of the request.
        self._news = dict[tuple[Client, int], _News]()

    # --- sessions

    def join(self, join: Join) -> Client:
        """Return a new session.

        Raises `InvalidTerms` for parts of other blocks than stored ones, and for groups of layers
        with equal blocks.
        """
        forms = [BlockForm.from_json(text) for text in join.forms]
        parts = {self._store_of(form): cells_of(form) for form in forms}
        if len(parts) < len(forms):
            raise InvalidTerms(
                "Expected groups of layers whose blocks differ, got groups with equal forms. Tell "
                "them apart by notes= of BlockForm.of."
            )
        with self._lock:
            before = self._clients.get(join.before)
            if before is not None and before.process == join.process:
                self.lost(before)
            self._return_all(join.process, join.before)
            client = Client(randbits(62), join.engine, join.process, parts, join.address)
            self._clients[client.session] = client
            self.counts["joined"] += 1
            return client

    def lose(self, session: int, leaves: bool = False) -> None:
        """End the session of a number, if there is one.

        ``leaves``: its client copies nothing any more, so that its rows are free.
        """
        with self._lock:
            client = self._clients.get(session)
            if client is not None:
                self.lost(client)
                if leaves:
                    self._return_all(client.process, session)

    def lost(self, client: Client) -> None:
        """End a session: the client asks for nothing and copies nothing new.

        Its process may still use its rows; see `process_ended`.
        """
        with self._lock:
            if client.gone:
                return
            client.gone = True
            del self._clients[client.session]
            requests = [*client.requests.values()]
            client.requests.clear()
            for key in [key for key in self._news if key[0] is client]:
                del self._news[key]
            for request in requests:
                if isinstance(request, Pins):
                    request.release()
                elif request.key is None:
                    self._abandon(request)
            for save in [*self._saves]:
                self._settle_all(save)
            self._wake()

    def process_ended(self, process: Process) -> None:
        """End the sessions of a process that has ended; others may have its rows."""
        with self._lock:
            for client in [*self._clients.values()]:
                if client.process == process:
                    self.lost(client)
            self._return_all(process)
            self._wake()

    def close(self) -> None:
        """End all sessions and all copies. The store must lend and seal nothing from here on."""
        with self._lock:
            for client in [*self._clients.values()]:
                self.lost(client)
            lents = {lent for work in self._works for lent in work.lents}
            lents |= {lease.lent for lease in self.leases.values()}
            self.leases.clear()
            for lent in lents:
                lent.leases.clear()
                lent.covered = [0] * len(lent.covered)
                lent.end(-1)
            self._works.clear()
            self._saves.clear()

    def clients(self) -> list[Client]:
        """Return the sessions."""
        with self._lock:
            return [*self._clients.values()]

    def forms_of(self, engine: str) -> list[bytes]:
        """Return the checksums of the forms of an engine's groups; none before a rank has
        joined."""
        with self._lock:
            ranks = [client for client in self._clients.values() if client.engine == engine]
            return [store.form.digest for store in ranks[0].parts] if ranks else []

    def processes(self) -> set[Process]:
        """Return the processes that have a session, or rows."""
        with self._lock:
            with_rows = {lease.client.process for lease in self.leases.values()}
            return with_rows | {client.process for client in self._clients.values()}

    def client(self, session: int) -> Client:
        """Return a session. Raises `PeerError` if it has ended."""
        client = self._clients.get(session)
        if client is None:
            raise ended_session()
        return client

    # --- loads and saves

    def load(self, ask: Load) -> Progress:
        """Begin a load, and return the rows that are there. If those are all, it has ended here.

        Raises `PeerError` for a session that has ended, and the errors of `FormStore.load_lent`.
        """
        with self._lock:
            client = self.client(ask.session)
            keys = [*ask.keys]
            store = self._group(client, ask.group)
            work = Work(self._lend, store, len(keys))
            borrowed = store.borrow(keys, True)
            if borrowed is not None:
                work.begin(borrowed)
            else:
                load = store.load_lent
                begin = partial(load, priority=ask.priority, missing="skip", packs=True)
                self._begin(work, keys, partial(begin, deadline=ask.seconds or None))
            self._add(work, client, ask.number)
            return self._progress(client, ask.number)

    def save(self, ask: Save) -> Progress:
        """Begin a save, or join the one that another rank of the engine has begun.

        Returns the rows that are there. Raises as `load` does.
        """
        with self._lock:
            client = self.client(ask.session)
            store = self._group(client, ask.group)
            key = client.engine, store.form.digest, ask.keys, ask.after
            alike = (each for each in self._saves if each.key == key)
            save = next((each for each in alike if each.awaits(client)), None)
            if save is None:
                save = self._begin_save(client, store, key, ask)
            self._add(save, client, ask.number)
            if save.complete or save.abandoned or save.has_all_rows:
                self._learn(client, ask.number).more = False
            return self._progress(client, ask.number)

    def _begin_save(self, client: Client, store: FormStore, key: SaveKey, ask: Save) -> Work:
        """Begin a save of all ranks of an engine."""
        clients = self._clients.values()
        ranks = [x for x in clients if x.engine == client.engine and store in x.parts]
        keys = [*ask.keys]
        save = Work(self._lend, store, len(keys), key, self._now(), {*ranks})
        together = 0
        for rank in ranks:
            together |= rank.parts[store]
        if together != cells_of(store.form):
            # Ranks have yet to join, without whom no block can be stored.
            save.stored = bytes(len(keys))
            self.counts["saves_without_all_ranks"] += 1
        else:
            begin = partial(store.save_lent, priority=ask.priority, full="drop", packs=True)
            self._begin(save, keys, partial(begin, after=ask.after))
        self._saves[save] = None
        return save

    def _begin(self, work: Work, keys: list[bytes], begin: Callable[..., Handle]) -> None:
        """Have the store begin a load or a save. After an error nothing of it is left."""
        try:
            work.handle = begin(work, keys)
        except BaseException:
            work.abandoned = True
            self._settle_all(work)
            raise
        self._works[work] = None
        work.handle.when_ended(partial(self._end, work))

    def report(self, session: int, number: int, landed: bytes) -> None:
        """Note that a client has ended the copy of a lease. A report of an ended session, or of a
        lease that has ended, is dropped."""
        with self._lock:
            client = self._clients.get(session)
            lease = self.leases.get(number)
            if lease is None or lease.client is not client:
                self.counts["late_reports"] += 1
                return
            self._return(lease, landed)

    def stop(self, session: int, number: int) -> None:
        """Note that nothing waits for a request of a client any longer, or end its pins."""
        with self._lock:
            client = self._clients.get(session)
            request = None if client is None else client.requests.get(number)
            if client is not None and isinstance(request, Pins):
                del client.requests[number]
                request.release()
            elif isinstance(request, Work):
                self._abandon(request)
                self._wake()

    # --- what needs no rows

    def pin(self, ask: Pin) -> bytes:
        """Keep blocks from eviction until `stop`; return a byte for each: 1 if it is kept.

        Raises `PeerError` for a session that has ended.
        """
        with self._lock:
            client = self.client(ask.session)
            pins = self._group(client, ask.group).pin(ask.keys)
            self._note_request(client, ask.number, pins)
            return pins.held.astype(np.uint8).tobytes()

    def delete(self, ask: Delete) -> bytes:
        """Forget blocks, locked or not; return a byte for each: 1 if it was there.

        Raises `PeerError` for a session that has ended.
        """
        with self._lock:
            store = self._group(self.client(ask.session), ask.group)
            return store.delete(ask.keys).astype(np.uint8).tobytes()

    # --- what the store does

    def advance(self) -> None:
        """Go on with what the store has lent, and give up what takes too long."""
        with self._lock:
            now = self._now()
            for save in [*self._saves]:
                late = now > save.since + self._patience
                if late and save.stored is None and not save.complete:
                    self._abandon(save)
                if save.stored is not None and now > save.since + REMEMBERED:
                    save.expected.clear()
                self._forget_save(save)
                self._note_complete(save)
            for work in [*self._works]:
                self._settle_all(work)

    def take(self) -> list[tuple[Client, Progress]]:
        """Return the news of clients, once."""
        with self._lock:
            return [(client, self._progress(client, number)) for client, number in [*self._news]]

    def statistics(self) -> dict[str, int]:
        """Return the sessions, leases and requests now, and the counters."""
        with self._lock:
            now = {"sessions": len(self._clients), "leases": len(self.leases)}
            return {**now, "requests": len(self._works), **self.counts}

    def oldest_lease(self) -> float:
        """Return the seconds since the oldest rows that are lent were lent; 0 if none are."""
        with self._lock:
            now = self._now()
            return now - min((lease.since for lease in self.leases.values()), default=now)

    def figures(self) -> Figures:
        """Return figures by the names of metrics."""
        counts = self.statistics()
        figures: Figures = {"keeper_oldest_lease_seconds": [{"value": self.oldest_lease()}]}
        for name in ("sessions", "leases", "requests"):
            figures[f"keeper_{name}"] = [{"value": counts[name]}]
        for name in COUNTED:
            figures[f"keeper_{name}_total"] = [{"value": counts.get(name, 0)}]
        return figures

    # --- steps, under the lock

    def _store_of(self, form: BlockForm) -> FormStore:
        """Return the store of the blocks of which a form describes a part. Raises
        `InvalidTerms`."""
        whole = whole_form(form)
        store = self.stores.get(whole.digest)
        if store is None:
            raise unlike(whole, [each.form for each in self.stores.values()])
        return store

    def _group(self, client: Client, group: int) -> FormStore:
        """Return the store of a group of a client. Raises `InvalidTerms` for another number."""
        if group >= len(client.parts):
            raise InvalidTerms(
                f"Expected one of {len(client.parts)} groups of layers, got number {group}. Join "
                f"with the forms of all groups."
            )
        return [*client.parts][group]

    def _end(self, work: Work) -> None:
        """Tell the clients of a load or a save of the store that it has ended."""
        if work.handle is None or work not in self._works:  # the state was closed
            return
        del self._works[work]
        work.complete = True
        if work.key is not None:
            work.stored = work.handle.landed.astype(np.uint8).tobytes()
        for client, number in work.requesters.items():
            self._end_request(client, number, work.stored)
        self._forget_save(work)
        self._wake()

    def _note_request(self, client: Client, number: int, request: Work | Pins) -> None:
        """Enter a request of a client. Pins of the same number end."""
        before = client.requests.get(number)
        if isinstance(before, Pins):
            before.release()
        client.requests[number] = request

    def _add(self, work: Work, client: Client, number: int) -> None:
        """Take note of a client's request for a load or a save that has begun, or has ended."""
        self._note_request(client, number, work)
        work.requesters[client] = number
        for lent in [*work.lents]:
            self._grant(lent, client, number)
            self._settle(lent)
        if work not in self._works:
            self._end_request(client, number, work.stored)

    def _lend(self, work: Work, copy: Copy) -> None:
        """Lend the rows of a copy of the store to the clients that make it, once there are some."""
        lent = Lent(work, copy, covered=[0] * len(copy.rows))
        work.lents[lent] = None
        if copy.form == work.store.form:
            work.granted += len(copy.blocks)
        for client, number in work.requesters.items():
            self._grant(lent, client, number)
        if work.requesters:
            self._settle(lent)
            self._wake()

    def _grant(self, lent: Lent, client: Client, number: int) -> None:
        """Lend the rows of a copy to a client, unless others write all of its part."""
        work = lent.work
        if client.gone or lent.ended or work.abandoned:
            return
        if work.has_all_rows:
            self._learn(client, number).more = False
        cells = -1
        form = lent.copy.form
        every: Sequence[int] = range(len(lent.copy.rows))
        if lent.raw is not None and lent.copy.raw is not None:
            form = lent.copy.raw
            every = lent.raw
        if work.key is not None:
            cells = client.parts[work.store]
            if not cells & ~lent.assigned:
                return
            lent.assigned |= cells
        text = "" if form == work.store.form else form.json()
        grants = self._learn(client, number).grants
        step = max(1, PIECE // form.image_bytes)
        for first in range(0, len(every), step):
            self.counts["lent"] += 1  # counts all, so that no number is used again
            some = every[first : first + step]
            lease = Lease(self.counts["lent"], client, lent, cells, some, self._now())
            lent.leases.add(lease)
            self.leases[lease.number] = lease
            places = tuple(lent.copy.blocks[at] for at in some)
            rows = tuple(lent.copy.rows[at] for at in some)
            grants.append(Grant(lease.number, places, rows, text))

    def _return_all(self, process: Process, session: int | None = None) -> None:
        """Take all rows back from a process, or from one of its sessions."""
        for lease in [*self.leases.values()]:
            client = lease.client
            if client.process == process and session in (None, client.session):
                self._return(lease)

    def _return(self, lease: Lease, landed: Iterable[int] = ()) -> None:
        """Take rows back from a client that uses them no longer."""
        self.leases.pop(lease.number, None)
        lent = lease.lent
        lent.leases.discard(lease)
        for place, good in zip(lease.places, landed, strict=False):
            lent.note(place, lease.cells, good)
        self._settle(lent)

    def _settle(self, lent: Lent) -> None:
        """Give rows back to the store if no client uses them, and none will."""
        if lent.ended or lent.leases:
            return
        work = lent.work
        if work.key is None:
            lent.end(-1)
            return
        whole = cells_of(work.store.form)
        over = work.abandoned or lent.copy.cancelled
        complete = all(lent.tried(place) == whole for place in range(len(lent.covered)))
        if not (complete or over or not work.awaited):
            return
        if not over and lent.begin_raw(whole):
            self.counts["saved_raw"] += len(lent.raw or ())
            for client, number in work.requesters.items():
                self._grant(lent, client, number)
        if lent.leases:
            self._wake()  # to tell the clients
            return
        lent.end(whole)
        if work.store.form.encoding:
            self._wake()  # to tell the clients that no rows follow; see `Piece.packs`

    def _settle_all(self, work: Work) -> None:
        for lent in [*work.lents]:
            self._settle(lent)

    def _abandon(self, work: Work) -> None:
        """Have no client copy a further block of a load or save."""
        if work.abandoned or work.handle is None:
            return
        work.abandoned = True
        work.handle.cancel()
        if work.key is not None:
            self.counts["saves_abandoned"] += 1
            self._end_rows(work)
            self._settle_all(work)

    def _note_complete(self, save: Work) -> None:
        """Tell ranks that no rows follow, once nothing reads their blocks any more."""
        released = None if save.handle is None else save.handle.released
        if save.complete or save.stored is not None or released is None or not released.done():
            return
        save.complete = True
        self._end_rows(save)

    def _end_rows(self, save: Work) -> None:
        """Tell the ranks that requested a save that no rows follow."""
        for client, number in save.requesters.items():
            if not client.gone and number in client.requests:
                self._learn(client, number).more = False

    def _forget_save(self, save: Work) -> None:
        """Forget a save that has ended, and that no other rank will ask for."""
        if save.stored is not None and not save.awaited:
            self._saves.pop(save, None)

    def _learn(self, client: Client, number: int) -> _News:
        """Return the news of a client about a request, to be changed."""
        return self._news.setdefault((client, number), _News())

    def _end_request(self, client: Client, number: int, stored: bytes | None) -> None:
        """Tell a client that a request has ended."""
        if client.gone or not isinstance(client.requests.get(number), Work):
            return
        del client.requests[number]
        news = self._learn(client, number)
        news.more = False
        news.stored = stored

    def _progress(self, client: Client, number: int) -> Progress:
        """Return the news of a client about a request, once; what a message cannot hold follows."""
        news = self._news.pop((client, number), _News())
        sizes = accumulate(len(x.places) + len(x.rows) + len(x.form) + HEAD for x in news.grants)
        fit = max(1, sum(size <= MESSAGE for size in sizes))
        grants = (*news.grants[:fit],)
        if len(grants) == len(news.grants):
            return Progress(client.session, number, grants, news.more, news.stored)
        self._news[client, number] = replace(news, grants=news.grants[fit:])
        self._wake()
        return Progress(client.session, number, grants)
