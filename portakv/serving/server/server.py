# SPDX-License-Identifier: Apache-2.0
"""`StoreServer`: serves one block store to the processes of a host."""

from __future__ import annotations

import atexit
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from secrets import randbits
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from portakv.arguments import instance, seconds, text
from portakv.errors import (
    HostMemoryError,
    InvalidTerms,
    PeerError,
    PortaKVError,
    StoreBusy,
    StoreError,
)
from portakv.graph.alarms import watch
from portakv.host.shared import Process, process_space, started
from portakv.migrate.channel import Channel, Peer
from portakv.migrate.messages import Message
from portakv.migrate.shared_memory import share
from portakv.runtime.bounded import Bounded, Until
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.serving.bucket import look_up
from portakv.serving.groups import Validity
from portakv.serving.local import SHARE, StoreTerms, alike_in
from portakv.serving.server.link import Place
from portakv.serving.server.messages import (
    MOST_CHANGES,
    MOST_PAGE,
    PROTOCOL,
    Alive,
    AskKeys,
    AskProtocol,
    Changed,
    Changes,
    Delete,
    Done,
    Farewell,
    Follow,
    Followed,
    Join,
    Joined,
    KeysPage,
    Later,
    Leave,
    Load,
    LookedUp,
    LookUp,
    Pin,
    Report,
    Save,
    ServerProtocol,
    Stop,
    tier_of,
)
from portakv.serving.server.state import (
    PATIENCE,
    Client,
    ServerState,
    ended_session,
    whole_form,
)
from portakv.serving.watched import answer
from portakv.storage.calls import Change
from portakv.storage.form import BlockForm
from portakv.storage.store import BlockStore
from portakv.tasks import Wait, Work, runtime

if TYPE_CHECKING:
    from portakv.serving.kv_events import EventPublisher

T = TypeVar("T")


def has_ended(process: Process) -> bool:
    """Return whether a process has ended. False also if the system does not say now: rows that the
    process may write must not be lent to others."""
    (_, pid, began) = process
    try:
        return started(pid) != began
    except HostMemoryError:
        return False


# ------------------------------------------------------------------------------------------------
# The store of a server, with its clients and its followers.


@dataclass(eq=False)
class Follower:
    """A session of a process that follows the index.

    Attributes:
        forms: the names of the forms of each group of its engine.
        pages: the pages of the snapshot that it reads.
    """

    session: int
    address: str
    forms: Sequence[str]
    pages: list[KeysPage] = field(default_factory=list)


class OpenStore:
    """A store whose rows other processes map, and what is known of these processes.

    Args:
        terms: where blocks are stored.
        forms: of whole blocks.
        wake: is called when the state has something to do.
        patience: seconds for which a save waits for all ranks of its engine.
        events: gets the changes of the store, for routers.

    Raises `StoreError`, `StoreBusy`, `HostMemoryError` and `InvalidTerms` as `BlockStore` does.

    Attributes:
        handle: the rows, for `open_shared`.
        bucket: the store has a bucket.
        followers: the sessions of processes that follow the index.
    """

    def __init__(
        self,
        terms: StoreTerms,
        forms: Sequence[BlockForm],
        wake: Callable[[], object],
        patience: float,
        events: EventPublisher | None,
    ) -> None:
        terms.check_room([form.raw.image_bytes for form in forms])
        tiers = terms.tiers()
        named = {form.name: form for form in [*forms, *alike_in(tiers, forms)]}
        # Ranks register their mappings. The server copies to no device, and needs no context.
        self.store = BlockStore(
            named,
            staging=terms.staging,
            host=terms.host,
            tiers=tiers,
            shared=True,
            pin=False,
        )
        self.state = ServerState(wake, patience)
        watch(self.state)
        self.bucket = terms.bucket is not None
        self._events = events
        self.followers = dict[int, Follower]()
        self._numbers = {name: number for number, name in enumerate(named)}
        try:
            self.handle = share(self.store.rows.tensor)
            for name, form in named.items():
                self.state.stores[form.digest] = self.store.of(name)
            self.store.listen()  # from now on changes are kept
            self._fd = self.store.listen_fd()
            self._publish_all()
        except BaseException:
            self.store.close()
            raise
        rows_here[self.handle] = self.store.rows.tensor

    @property
    def closed(self) -> bool:
        """Return whether the store was closed, such as at the end of the interpreter."""
        return self.store.graph.closed

    @property
    def fd(self) -> int | None:
        """Return a descriptor that is readable while there are changes; None after the end."""
        return None if self.closed else self._fd

    def changes(self) -> list[Change]:
        """Return the changes of the store since the last call, and publish them to routers."""
        changes = self.store.listen()
        self._publish(changes)
        return changes

    def _publish(self, changes: Sequence[Change]) -> None:
        """Publish changes to routers, for which packed and raw blocks of a group are the same."""
        if self._events is None:
            return
        groups = dict[BlockForm, str]()
        names = {
            name: groups.setdefault(form if form.lossy else form.raw, name)
            for name, form in self.store.forms.items()
        }
        some = [change._replace(form=names[change.form]) for change in changes]
        self._events.publish(some, [*groups.values()])

    def _publish_all(self) -> None:
        """Publish to routers the blocks that the store has when it opens."""
        if self._events is None:
            return
        self._events.clear()
        for form in self.store.forms:
            for tier, keys in self.store.of(form).keys().keys.items():
                self._publish([Change(0, key, tier, True, "", form) for key in keys])

    # --- followers of the index

    def follow(self, ask: Follow, forms: Sequence[str]) -> Followed:
        """Begin a session of a follower, of groups of these forms.

        Raises `InvalidTerms` for another number of groups.
        """
        if ask.groups != len(forms):
            raise InvalidTerms(
                f"Expected the index of {len(forms)} groups of layers, as the ranks of the engine "
                f"have, got {ask.groups}. Pass as many."
            )
        made = Follower(randbits(62), ask.address, forms)
        self.followers[made.session] = made
        return Followed(
            made.session,
            tuple(tuple(self._numbers[x] for x in self._alike(form)) for form in forms),
            tuple(self.store.forms[form].payload_bytes for form in forms),
            self.bucket,
        )

    def _alike(self, name: str) -> list[str]:
        """Return the name of a form and of the store's other forms of the same blocks, packed or
        raw ones.

        Blocks of a lossy form count for no other form.
        """
        forms = self.store.forms
        raw = forms[name].raw
        alike = [other for other, form in forms.items() if form.raw == raw and not form.lossy]
        return [name, *(other for other in alike if other != name)]

    def page(self, ask: AskKeys) -> KeysPage:
        """Return a page of the keys of a group; the first one takes a snapshot.

        Raises `PeerError` for a session that has ended, or for a page out of order.
        """
        follower = self.followers.get(ask.session)
        if follower is None or ask.group >= len(follower.forms):
            raise ended_session()
        if ask.page == 0:
            follower.pages = self._pages(follower.forms[ask.group])
        if ask.page >= len(follower.pages):
            raise PeerError("Expected pages in order, got one past the last. Begin with page 0.")
        page = follower.pages[ask.page]
        if not page.more:
            follower.pages = []
        return page

    def _pages(self, form: str) -> list[KeysPage]:
        """Return a snapshot of the blocks of a form, and of those that are alike, in pages."""
        names = self._alike(form)
        snapshots = [self.store.of(name).keys() for name in names]
        number = snapshots[0].number  # changes after the first snapshot are applied to all
        pages = list[KeysPage]()
        for name, snapshot in zip(names, snapshots, strict=True):
            for tier, keys in snapshot.keys.items():
                tier = tier_of(self._numbers[name], tier)
                for first in range(0, len(keys), MOST_PAGE):
                    some = tuple(keys[first : first + MOST_PAGE])
                    pages.append(KeysPage(number, tier, some, more=True))
        return [*pages, KeysPage(number)]

    def announce(self, changes: Sequence[Change]) -> Iterator[tuple[Follower, Changes]]:
        """Yield the messages about changes for each follower."""
        followers = [*self.followers.values()]
        if not followers:
            return
        items = [
            Changed(number, self._numbers[form], key, tier, stored, why)
            for number, key, tier, stored, why, form in changes
        ]
        for first in range(0, len(items), MOST_CHANGES):
            some = tuple(items[first : first + MOST_CHANGES])
            for follower in followers:
                yield follower, Changes(follower.session, some)

    # --- all sessions

    def check(self, session: int) -> None:
        """Raise `PeerError` unless a session goes on."""
        if session not in self.followers:
            self.state.client(session)

    def sessions(self) -> list[Client | Follower]:
        """Return the sessions of ranks and of followers."""
        return [*self.state.clients(), *self.followers.values()]

    def lose(self, session: int, leaves: bool = False) -> None:
        """End a session, if there is one; see `ServerState.lose`."""
        self.state.lose(session, leaves)
        self.followers.pop(session, None)

    def has(self, forms: Sequence[BlockForm]) -> bool:
        """Return whether the store has the forms of whole blocks."""
        return all(form.digest in self.state.stores for form in forms)

    def close(self, timeout: float) -> PortaKVError | None:
        """End all sessions and close the store; return the error of a store that hangs."""
        rows_here.pop(self.handle, None)
        self.state.close()
        if self._events is not None:
            self._events.clear()
        try:
            self.store.close(timeout)
        except PortaKVError as error:
            return error
        return None


#: The rows of the servers of this process, by their handles: its own clients need not map them.
rows_here: Bounded[bytes, torch.Tensor] = Bounded("rows of store servers", 16)


# ------------------------------------------------------------------------------------------------
# The server: its answers to clients, and its coroutine.

#: Seconds for which the refusal of a rank counts for its engine. The rank tries again before.
REFUSED = 5.0
#: Seconds that a message to a client may take. A client that does not take it has lost its session.
TELLING = 0.2
#: Seconds for which a server that ends waits for its clients to know.
LEAVING = 1.0
#: The most engines whose ranks have been refused.
ENGINES = 256


def check_process(process: Process) -> None:
    """Raise `StoreError` for a process whose end cannot be seen from here."""
    (space, pid, began) = process
    if space != process_space():
        raise StoreError(
            f"Expected a process of the store server's namespace of processes, got one of another "
            f"container. Run both in one namespace (docker: --pid), as user {os.geteuid()}."
        )
    if started(pid) != began:
        raise StoreError(f"Expected a process that runs, got {pid}, which has ended. Join anew.")


_logger = logging.getLogger(__name__)
_log = RateLimitedLog(_logger)
#: Seconds between two tries to serve, and between two looks at what takes too long.
LOOK = 0.25
#: Seconds for which a folder may be busy: a process that was killed may have writes under way.
BUSY = 10.0


class StoreServer:
    """Serves one block store to the processes of a host, or stands by.

    One process for each folder serves: the first one that may. The others stand by, and one of
    them serves when that process has ended, except those whose terms have ``shared="attach"``. A
    store is opened when the first rank joins, whose blocks name its forms; ranks of other blocks
    are refused as long as ranks have joined.

    Args:
        terms: where blocks are stored, and how much memory the store takes.
        engine: the name of the engine, by which its processes find a server without a folder.
        patience: seconds for which a save waits for all ranks of its engine.
        events: an `EventPublisher` for routers, which the caller closes after the server.

    Raises `InvalidTerms` for wrong terms, `StoreError` for a folder that cannot be used, and
    `PeerError` or `StoreError` if the process has no descriptor or thread left.
    """

    def __init__(
        self,
        terms: StoreTerms,
        engine: str = "",
        patience: float = PATIENCE,
        events: EventPublisher | None = None,
    ) -> None:
        self.terms = instance("terms", terms, StoreTerms)
        self.place = place_of(terms, engine)
        self._patience = seconds("patience", patience, above=True)
        self._events = events
        self._busy_since: float | None = None
        self._stopped = False
        self._runtime = runtime()
        self._looked = 0.0  # when processes were looked at
        self._opened: OpenStore | None = None
        self._wanted: Sequence[BlockForm] = ()  # forms of whole blocks that a client waits for
        # The forms for which the store could not be opened, and why.
        self._refusal: tuple[Sequence[BlockForm], PortaKVError] | None = None
        #: Why the last rank of an engine was refused.
        self._refused: Until[str] = Until("refused engines", ENGINES)
        self._ends = False  # no session begins any more
        self._wait = Wait()  # of the coroutine
        self._channel = Channel()
        try:
            self._answer_messages()
            self._serve_if_possible()
            self._running = self._runtime.start(self._run())
        except BaseException:
            self.place.release()
            self._channel.close()
            raise
        atexit.register(self._take_leave)  # before the channel closes at the interpreter's end

    def __enter__(self) -> StoreServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def serves(self) -> bool:
        """Return whether this process serves; others may."""
        return self.place.claimed

    def statistics(self) -> dict[str, int]:
        """Return the sessions, leases and requests now, and the counters."""
        opened = self._opened
        return {} if opened is None else opened.state.statistics()

    def figures(self) -> dict[str, list[dict[str, Any]]]:
        """Return the figures of the store, as `BlockStore.statistics`, those of the server, and
        those of its channel; only the last ones while the store is closed, and none after
        `close`."""
        figures = dict[str, list[dict[str, Any]]]()
        if not self._stopped:
            figures = self._channel.figures()
        opened = self._opened
        if opened is not None:
            figures |= opened.state.figures()
            with suppress(StoreError):  # it was closed meanwhile
                figures |= opened.store.statistics()
        return figures

    def close(self, timeout: float = 10.0) -> None:
        """Serve no longer: close the store within so many seconds. Clients go on with misses."""
        timeout = seconds("timeout", timeout)
        if self._runtime.process.forked or self._stopped:
            return
        atexit.unregister(self._take_leave)
        self._stopped = True
        self._wake()
        self._running.synchronize()
        self._take_leave()
        self._channel.close()
        self._close_store(timeout)
        self.place.release()

    def _take_leave(self) -> None:
        """Tell clients and followers that this server ends in order; no session begins any more."""
        if self._runtime.process.forked:
            return
        self._ends = True
        opened = self._opened
        if opened is None:
            return
        requests = [(each.address, Farewell(each.session)) for each in opened.sessions()]
        # The answers come before the connections end. A client without one may have ended, too.
        with suppress(PortaKVError):
            self._channel.ask_all(requests, Farewell, LEAVING)

    # --- messages

    def _answer_messages(self) -> None:
        """Answer the messages of clients, and `portakv top`.

        A store is opened at the first `Join`, which names its forms. That takes seconds, so a
        helper does it, and the client asks again.
        """
        serve = self._channel.serve
        serve(AskProtocol, lambda *_: ServerProtocol(PROTOCOL))
        serve(Join, self._join)
        serve(Follow, self._follow)
        serve(Alive, self._alive)
        serve(Leave, lambda _, message: self._gone(message.session, leaves=True))
        serve(AskKeys, lambda _, ask: self._open_store().page(ask))
        serve(LookUp, self._look_up)
        self._serve(Load, lambda state, ask: state.load(ask))
        self._serve(Save, lambda state, ask: state.save(ask))
        self._serve(Report, lambda state, it: state.report(it.session, it.lease, it.landed))
        self._serve(Stop, lambda state, it: state.stop(it.session, it.number))
        self._serve(Pin, lambda state, ask: Done(ask.session, state.pin(ask)))
        self._serve(Delete, lambda state, ask: Done(ask.session, state.delete(ask)))
        answer(self._channel, self)

    def _serve(self, kind: type[T], call: Callable[[ServerState, T], Message | None]) -> None:
        """Answer messages of sessions by the state of the open store."""
        self._channel.serve(kind, lambda _, message: call(self._open_store().state, message))

    def _join(self, peer: Peer, ask: Join) -> Joined | Later:
        """Begin a session of a rank, or have the store opened for it; note a refusal."""
        try:
            answer = self._session_of(peer, ask)
        except PortaKVError as error:
            self._refused.hold(ask.engine, REFUSED, str(error))
            raise
        if isinstance(answer, Joined):
            self._refused.pop(ask.engine, None)
        return answer

    def _session_of(self, peer: Peer, ask: Join) -> Joined | Later:
        forms = [whole_form(BlockForm.from_json(text)) for text in ask.forms]
        opened = self._opened
        if self._ends:
            return Later()
        if opened is None or not (opened.has(forms) or opened.state.clients()):
            refusal = self._refusal
            self._refusal = None
            if refusal is not None and refusal[0] == forms:
                raise refusal[1]
            self._wanted = forms
            self._wake()
            return Later()
        check_process(ask.process)
        client = opened.state.join(ask)
        peer.on_gone(partial(self._gone, client.session))
        return Joined(client.session, opened.handle)

    def _follow(self, peer: Peer, ask: Follow) -> Followed | Later:
        """Begin a session of a process that follows the index.

        Raises `InvalidTerms` with the sentence for the ranks of its engine if they were refused.
        """
        opened = self._opened
        digests = [] if opened is None else opened.state.forms_of(ask.engine)
        if self._ends:
            return Later()
        if opened is None or not digests:
            why = self._refused.held(ask.engine)
            if why is not None:
                raise InvalidTerms(why)
            return Later()
        answer = opened.follow(ask, [digest.hex() for digest in digests])
        peer.on_gone(partial(self._gone, answer.session))
        return answer

    def _alive(self, peer: Peer, ask: Alive) -> Alive:
        self._open_store().check(ask.session)
        return Alive(ask.session)

    def _gone(self, session: int, leaves: bool = False) -> None:
        """End a session whose connection has ended, or whose client ``leaves``.

        A connection may outlive a store, so it retains the number alone.
        """
        if self._opened is not None:
            self._opened.lose(session, leaves)

    def _look_up(self, peer: Peer, ask: LookUp) -> None:
        """Begin a lookup in the bucket. One that cannot begin has no answer."""
        opened = self._opened
        follower = None if opened is None else opened.followers.get(ask.session)
        if opened is None or follower is None or not opened.bucket:
            return

        def ended(count: int, answers: bool) -> None:
            message = LookedUp(ask.session, ask.keys, count, answers)
            self._runtime.start(self._tell_follower(opened, follower, message))

        with suppress(PortaKVError):  # the store closes
            groups = [[opened.store.of(form)] for form in follower.forms]
            look_up(groups, ask.keys, ended, Validity.of_rows(len(groups)))

    def _open_store(self) -> OpenStore:
        if self._opened is None:
            raise ended_session()
        return self._opened

    # --- the coroutine

    def _wake(self) -> None:
        with self._runtime.step:
            self._wait.wake()

    async def _run(self) -> None:
        """Go on until the server is closed."""
        while not self._stopped:
            try:
                self._wait.fd = None if self._opened is None else self._opened.fd
                self._wait.until = self._runtime.time() + LOOK
                await self._wait
                self._wait = Wait()  # before the looks, which may miss what comes from here
                self._look_at_processes()
                if not (self.place.claimed or self.terms.attaches):
                    await Work(self._serve_if_possible)
                if self._wanted and self.serves:
                    await Work(self._open, self._wanted)
                await self._advance()
            except Exception as error:  # the other clients must be served
                _log.warning("step", "A store server failed, and goes on: %r. Report it.", error)
                await Wait(until=self._runtime.time() + LOOK)

    def _look_at_processes(self) -> None:
        """Note processes that have ended."""
        opened = self._opened
        now = time.monotonic()
        if opened is None or now <= self._looked + LOOK:
            return
        self._looked = now
        for process in opened.state.processes():
            if has_ended(process):
                opened.state.process_ended(process)

    def _serve_if_possible(self) -> None:
        """Serve, unless another process does, or the terms leave it to a store server."""
        if self.terms.attaches:
            return
        if not self.place.claimed and self.place.claim():
            self.place.publish(self._channel.address)
            _logger.info("This process keeps the blocks in %s.", self.place.name)

    def _open(self, wanted: Sequence[BlockForm]) -> None:
        """Open the store for the forms that a client waits for."""
        self._close_store(BUSY)
        refusal: PortaKVError | None = None
        try:
            opened = OpenStore(self.terms, wanted, self._wake, self._patience, self._events)
            self._opened = opened
        except StoreBusy as error:
            now = time.monotonic()
            self._busy_since = self._busy_since or now
            if now < self._busy_since + BUSY:
                return
            refusal = StoreBusy(f"{error} {SHARE}")
        except PortaKVError as error:
            refusal = error
        self._busy_since = None
        self._wanted = ()
        if refusal is not None:
            self._refusal = wanted, refusal
            _log.warning("open", "The store of a store server cannot be opened: %s", refusal)

    def _close_store(self, timeout: float) -> None:
        """Close the store, if it is open."""
        opened = self._opened
        self._opened = None
        error = None if opened is None else opened.close(timeout)
        if error is not None:
            _log.warning("close", "The store of a store server could not be closed: %s", error)

    async def _tell(self, address: str, message: Message, lost: Callable[[], object]) -> None:
        """Send a message to a client, whose session ends if it does not take the message."""
        try:
            await self._channel.send(address, message, TELLING)
        except PortaKVError as error:
            _log.warning("client", "A client of a store server is gone: %s", error)
            lost()

    async def _advance(self) -> None:
        """Go on with what the store has done, and tell clients and routers."""
        if self._events is not None:
            self._events.answer()
        opened = self._opened
        if opened is None or opened.closed:
            return
        with self._runtime.released():
            opened.state.advance()
            changes = opened.changes()
        for client, progress in opened.state.take():
            await self._tell(client.address, progress, partial(opened.state.lost, client))
        for follower, message in opened.announce(changes):
            await self._tell_follower(opened, follower, message)

    async def _tell_follower(self, opened: OpenStore, follower: Follower, message: Message) -> None:
        """Send a message to a follower."""
        lost = partial(opened.followers.pop, follower.session, None)
        await self._tell(follower.address, message, lost)


def place_of(terms: StoreTerms, engine: str) -> Place:
    """Return where the processes of an engine find their server.

    Raises `InvalidTerms` for an engine without a name, if there is no folder.
    """
    if terms.folders:
        return Place.of_folder(terms.folders[0])
    return Place.of_engine(text("engine", engine))
