# SPDX-License-Identifier: Apache-2.0
"""The control channel carries messages of owners, readers and transports, and detects dead peers.

It uses Unix sockets on a host and, between hosts, ZeroMQ with CURVE keys that a secret gives.
Messages have schemas and limits; nothing is unpickled.
"""

from __future__ import annotations

import atexit
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from secrets import token_bytes
from time import monotonic
from typing import TypeVar

from portakv.arguments import seconds
from portakv.errors import InvalidTerms, PeerError, PortaKVError
from portakv.migrate.address import check_address, keys_of, too_short
from portakv.migrate.channel_client import Client
from portakv.migrate.channel_loop import Loop
from portakv.migrate.channel_server import Server
from portakv.migrate.channel_sockets import Sockets
from portakv.migrate.figures import Figures, channel_figures
from portakv.migrate.messages import Message
from portakv.migrate.peer import Peer
from portakv.runtime.devices import this_process
from portakv.runtime.interrupts import alongside, uninterrupted

__all__ = ["Channel", "Peer"]
T = TypeVar("T")
SENDING = 0.02  # seconds for which a caller lets a helper send its message


class Channel:
    """A channel listens for requests and sends requests to other channels. Any thread may call it.

    `close` ends it, or the end of the interpreter. No interrupt may cut a step of a channel in two,
    so a helper thread runs it for the main thread.

    Args:
        address: ``tcp://10.0.0.1:0`` listens there, at a free port; None: at a Unix socket that
            only this user of this host reaches. Tickets carry the attribute of this name: set it
            if other hosts reach the channel by another address (NAT, containers).
        secret: 16 bytes or more, or a str of as many; the same for all channels that communicate.
            TCP needs a secret.
        timeout: seconds for a request and its answer.
    """

    def __init__(
        self, address: str | None = None, *, secret: bytes | str | None = None, timeout: float = 5.0
    ) -> None:
        self.address = "a Unix socket"
        short = "" if secret is None else too_short(secret)
        self._sockets = Sockets(() if secret is None or short else keys_of(secret))
        del secret  # a traceback must not show it
        if short:
            raise InvalidTerms(short)
        check_address(address, bool(self._sockets.keys))
        self.timeout = seconds("timeout", timeout, above=True)
        self.address = address or self.address
        self.id = token_bytes(16)
        self.counts = Counter[str]()
        self._process = this_process()
        self._users = dict[str, object]()  # the owner, the reader and others of this channel
        uninterrupted(partial(self._start, address), undo=lambda _: self.close())

    def _start(self, address: str | None) -> None:
        """Listen, and start the channel's thread."""
        self._server = Server(self._sockets, address, self.counts)
        self._loop = Loop()
        self._client = Client(self._sockets, self._loop, self.id, self.counts, self.check_open)
        try:
            self._server.listen(address, self._loop)
            self._loop.start()
        except PeerError:
            self._end()
            raise
        self.address = self._server.address
        atexit.register(self.close)

    def __repr__(self) -> str:
        return f"Channel({self.address!r})"

    @property
    def forked(self) -> bool:
        """Return True in a process that was forked from the one that made the channel."""
        return self._process.forked

    def serve(self, kind: type[T], answer: Callable[[Peer, T], Message | None]) -> None:
        """Answer messages of ``kind`` by ``answer`` from now on.

        The call runs in the channel's only thread and must be quick. None sends no answer. The peer
        gets the error that ``answer`` raises.
        """
        uninterrupted(partial(self._server.services.add, kind, answer))

    def after_answer(self, call: Callable[[], object]) -> None:
        """Make a call after the answer to the present request was sent, in the channel's thread.

        So what the call begins does not delay the answer. In another thread it is made immediately.
        """
        if self._loop.runs_here:
            self._server.later.append(call)
        else:
            call()

    def claim(self, kind: str, user: object) -> None:
        """Register the only ``kind`` of this channel, because peers know it by the channel alone.

        Raises `InvalidTerms` if the channel has another.
        """
        uninterrupted(partial(self._claim, kind, user), undo=lambda _: self.free(kind, user))

    def _claim(self, kind: str, user: object) -> None:
        """Check that the channel is open and free of the kind, and register the user."""
        self.check_open()
        if self._users.setdefault(kind, user) is not user:
            raise InvalidTerms(
                f"Expected a channel without {kind}, got {self}. Close the first, or make a "
                f"channel."
            )

    def check_open(self) -> None:
        """Raise `PeerError` after `close`, and in a forked process."""
        if self._loop.stopped or self._process.forked:
            gone = "is closed"
            if self._process.forked:
                gone = "belongs to the process that this one was forked from"
            raise PeerError(f"Expected a channel that is open, got one that {gone}. Make another.")

    def replace(self, kind: str, user: object) -> object | None:
        """Register the only ``kind`` of this channel in place of another; return that, or None.

        Raises `PeerError` if the channel is not open.
        """
        return uninterrupted(partial(self._replace, kind, user))

    def _replace(self, kind: str, user: object) -> object | None:
        """Check that the channel is open, and register the user."""
        self.check_open()
        before = self._users.get(kind)
        self._users[kind] = user
        return before

    def free(self, kind: str, user: object) -> bool:
        """Release a `claim`; return False if ``user`` does not have it."""
        return self._users.get(kind) is user and self._users.pop(kind) is user

    def ask(
        self,
        address: str,
        message: Message,
        kind: type[T],
        timeout: float | None = None,
        stop: Callable[[], bool] = bool,
        sent: Callable[[], object] = bool,
    ) -> T:
        """Return the answer of the channel at ``address`` to a message.

        If the connection breaks, the next connection repeats the request, which is executed at most
        once. Ends early if ``stop()`` returns True. Calls ``sent`` each time the message is sent.

        Raises:
            PeerError: the peer cannot be reached, is gone or rejects, or the secret differs.
            TransferTimeout: the peer is there, and did not answer in time.

        If the caller is interrupted, the connection stays usable, and the answer is dropped.
        """
        until = self._until(timeout)
        return uninterrupted(partial(self._client.ask, address, message, kind, until, stop, sent))

    def begin_to_ask(
        self, address: str, message: Message, kind: type[T], timeout: float | None = None
    ) -> Callable[[], T]:
        """Send a message, and return the call that waits for the answer as `ask` does, for one use.

        Until the answer, other requests to the address wait. A caller that needs no answer does not
        make the call.
        """
        sent = threading.Lock()  # locked until the message is sent; an event costs ten calls more
        sent.acquire()

        def note() -> None:
            if sent.locked():
                sent.release()

        def ask() -> T:
            try:
                return self.ask(address, message, kind, timeout, sent=note)
            finally:
                note()

        answer = alongside(ask)
        sent.acquire(timeout=SENDING)  # the helper has the interpreter meanwhile
        return answer

    def ask_all(
        self, requests: Sequence[tuple[str, Message]], kind: type[T], timeout: float | None = None
    ) -> list[T | PortaKVError]:
        """Return the result or the error of `ask` for each of several requests.

        All addresses get their first request together. An address with several requests gets the
        next one after it has answered.
        """
        return uninterrupted(partial(self._client.ask_all, requests, kind, self._until(timeout)))

    def tell(
        self,
        address: str,
        message: Message,
        timeout: float | None = None,
        stop: Callable[[], bool] = bool,
    ) -> None:
        """Send a message without an answer, unless ``stop()`` returns True before it is sent; raise
        as `ask`."""
        uninterrupted(partial(self._client.tell, address, message, self._until(timeout), stop))

    def watch(self, address: str, gone: Callable[[], object]) -> Callable[[], object]:
        """Call ``gone`` when the connection to ``address`` ends; see `Peer.on_gone`."""
        return uninterrupted(
            lambda: self._client.link(address).life.on_gone(gone),
            undo=lambda take_back: take_back(),
        )

    def statistics(self) -> dict[str, int]:
        """Return the connections now, from and to other channels, and the counters."""
        return {**self._server.statistics(), "links": len(self._client), **self.counts}

    def figures(self) -> Figures:
        """Return figures by the names of metrics, in the form of `Graph.statistics`."""
        return channel_figures(self.statistics())

    def close(self) -> None:
        """End all connections; requests in flight raise `PeerError`."""
        if not self._process.forked:
            uninterrupted(self._close)

    def _close(self) -> None:
        """Close the channel, and no longer at the end of the interpreter."""
        atexit.unregister(self.close)
        self._end()

    def _end(self) -> None:
        """Stop the channel's thread, drop all connections, and close the sockets."""
        if self._loop.stop():
            self._client.close()
            self._server.close()
            self._sockets.close()

    def _until(self, timeout: float | None) -> float:
        """Return the time at which a request ends that starts now."""
        if timeout is None:
            return monotonic() + self.timeout
        if type(timeout) is float and timeout <= 0.0:  # the caller's own time is over
            return monotonic()
        return monotonic() + seconds("timeout", timeout)
