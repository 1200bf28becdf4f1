# SPDX-License-Identifier: Apache-2.0
"""`Service`: what a keeper answers to messages of its clients."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from portakv.errors import InvalidTerms, PeerError, PortaKVError, StoreError
from portakv.graph.meter import Metered
from portakv.host.shared import process_space, started
from portakv.migrate.channel import Channel, Peer
from portakv.migrate.messages import Message
from portakv.runtime.bounded import Bounded
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.serving.keeper_messages import (
    PROTOCOL,
    Alive,
    AskKeys,
    AskProtocol,
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
    Lock,
    LookUp,
    Progress,
    Protocol,
    Report,
    Save,
    Stop,
    Unlock,
    keys_in,
)
from portakv.serving.keeper_parts import whole_form
from portakv.serving.keeper_store import OpenStore
from portakv.serving.watched import answer
from portakv.storage.form import BlockForm

_log = RateLimitedLog(logging.getLogger(__name__))
#: Seconds for which the refusal of a rank counts for its engine. The rank tries again before.
REFUSED = 5.0
#: Seconds that a message to a client may take. A client that does not take it has lost its session.
TELLING = 0.2
#: Seconds for which a keeper that ends waits for its clients to know.
LEAVING = 1.0
#: The most engines whose ranks have been refused.
ENGINES = 256


class Service:
    """Answers the messages of clients, in the thread of a channel.

    A store is opened at the first `Join`, which names its forms. That takes seconds, so another
    thread does it, and the client asks again.

    Args:
        channel: of the keeper.
        wake: is called when ``wanted`` has changed.
        figures: of the keeper, for `portakv top`.

    Attributes:
        opened: the store, if it is open.
        wanted: the forms of whole blocks that a client waits for; none if no client does.
        refusal: the forms for which the store could not be opened, and why.
        ends: whether the keeper ends, so that no session begins.
    """

    def __init__(self, channel: Channel, wake: Callable[[], object], figures: Metered) -> None:
        self.opened: OpenStore | None = None
        self.wanted: Sequence[BlockForm] = ()
        self.refusal: tuple[Sequence[BlockForm], PortaKVError] | None = None
        self.ends = False
        # Why the last rank of an engine was refused, and until when that counts.
        self._refused: Bounded[str, tuple[str, float]] = Bounded("refused engines", ENGINES)
        self._wake = wake
        self._channel = channel
        channel.serve(AskProtocol, lambda *_: Protocol(PROTOCOL))
        channel.serve(Join, self._join)
        channel.serve(Follow, self._follow)
        channel.serve(Alive, self._alive)
        channel.serve(Load, self._load)
        channel.serve(Save, self._save)
        channel.serve(Report, self._report)
        channel.serve(Stop, self._stop)
        channel.serve(Lock, self._lock)
        channel.serve(Unlock, self._unlock)
        channel.serve(Delete, self._delete)
        channel.serve(Leave, self._leave)
        channel.serve(AskKeys, self._page)
        channel.serve(LookUp, self._look_up)
        answer(channel, figures)

    def tell(self, address: str, message: Message, lost: Callable[[], object]) -> None:
        """Send a message to a client, whose session ends if it does not take the message."""
        try:
            self._channel.tell(address, message, TELLING)
        except PortaKVError as error:
            _log.warning("client", "A client of a keeper is gone: %s", error)
            lost()

    def take_leave(self) -> None:
        """Tell clients and followers that the keeper ends in order; no session begins any more."""
        self.ends = True
        opened = self.opened
        if opened is None:
            return
        requests = [(each.address, Farewell(each.session)) for each in opened.state.clients()]
        requests += [(each.address, Farewell(each.session)) for each in opened.feed.followers()]
        # The answers come before the connections end. A client without one may have ended, too.
        with suppress(PortaKVError):
            self._channel.ask_all(requests, Farewell, LEAVING)

    def _join(self, peer: Peer, ask: Join) -> Joined | Later:
        """Begin a session of a rank, or have the store opened for it; note a refusal."""
        try:
            answer = self._begin(peer, ask)
        except PortaKVError as error:
            self._refused[ask.engine] = str(error), time.monotonic() + REFUSED
            raise
        if isinstance(answer, Joined):
            self._refused.pop(ask.engine, None)
        return answer

    def _begin(self, peer: Peer, ask: Join) -> Joined | Later:
        forms = [whole_form(BlockForm.from_json(text)) for text in ask.forms]
        opened = self.opened
        if self.ends:
            return Later()
        if opened is None or not (opened.has(forms) or opened.state.clients()):
            refusal = self.refusal
            self.refusal = None
            if refusal is not None and refusal[0] == forms:
                raise refusal[1]
            self.wanted = forms
            self._wake()
            return Later()
        check_process(ask.process)
        client = opened.state.join(ask)
        peer.on_gone(partial(self._gone, client.session))
        self._wake()  # to watch its process
        return Joined(client.session, opened.handle)

    def _follow(self, peer: Peer, ask: Follow) -> Followed | Later:
        """Begin a session of a process that follows the index.

        Raises `InvalidTerms` with the sentence for the ranks of its engine if they were refused.
        """
        opened = self.opened
        forms = opened.forms_of(ask.engine) if opened is not None else []
        if self.ends:
            return Later()
        if opened is None or not forms:
            why, until = self._refused.get(ask.engine, ("", 0.0))
            if time.monotonic() < until:
                raise InvalidTerms(why)
            return Later()
        follower = opened.feed.follow(ask, forms)
        peer.on_gone(partial(self._gone, follower.session))
        return opened.feed.followed(follower, opened.bucket)

    def _alive(self, peer: Peer, ask: Alive) -> Alive:
        opened = self._open()
        if ask.session not in opened.feed:
            opened.state.client(ask.session)
        return Alive(ask.session)

    def _load(self, peer: Peer, ask: Load) -> Progress:
        return self._open().state.load(ask)

    def _save(self, peer: Peer, ask: Save) -> Progress:
        return self._open().state.save(ask)

    def _report(self, peer: Peer, report: Report) -> None:
        if self.opened is not None:
            self.opened.state.report(report.session, report.lease, report.landed)

    def _stop(self, peer: Peer, stop: Stop) -> None:
        if self.opened is not None:
            self.opened.state.stop(stop.session, stop.number)

    def _lock(self, peer: Peer, ask: Lock) -> Done:
        return Done(ask.session, self._open().state.lock(ask))

    def _unlock(self, peer: Peer, message: Unlock) -> None:
        if self.opened is not None:
            self.opened.state.unlock(message.session, message.number)

    def _delete(self, peer: Peer, ask: Delete) -> Done:
        return Done(ask.session, self._open().state.delete(ask))

    def _leave(self, peer: Peer, leave: Leave) -> None:
        if self.opened is not None:
            self.opened.state.leave(leave.session)
            self.opened.feed.leave(leave.session)

    def _gone(self, session: int) -> None:
        """End a session whose connection has ended.

        A connection may outlive a store, so it retains the number alone.
        """
        if self.opened is not None:
            self.opened.state.lose(session)
            self.opened.feed.leave(session)

    def _page(self, peer: Peer, ask: AskKeys) -> KeysPage:
        return self._open().feed.page(ask)

    def _look_up(self, peer: Peer, ask: LookUp) -> None:
        """Begin a lookup in the bucket. One that cannot begin has no answer."""
        opened = self.opened
        follower = None if opened is None else opened.feed.follower(ask.session)
        if opened is not None and follower is not None:
            with suppress(PortaKVError):  # the store closes
                opened.look_up(follower, ask.number, keys_in(ask.keys))

    def _open(self) -> OpenStore:
        if self.opened is None:
            raise PeerError("Expected a session of this keeper, got one that has ended. Join anew.")
        return self.opened


def check_process(process: tuple[int, int, int]) -> None:
    """Raise `StoreError` for a process whose end cannot be seen from here."""
    (space, pid, began) = process
    if space != process_space():
        raise StoreError(
            f"Expected a process of the keeper's namespace of processes, got one of another "
            f"container. Run both in one namespace (docker: --pid), as user {os.geteuid()}."
        )
    if started(pid) != began:
        raise StoreError(f"Expected a process that runs, got {pid}, which has ended. Join anew.")
