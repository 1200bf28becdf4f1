# SPDX-License-Identifier: Apache-2.0
"""The requests that a channel sends: one connection for each address, and a number each."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from functools import partial
from math import ceil
from time import monotonic
from typing import Any, TypeAlias, TypeVar

import zmq
from msgspec.msgpack import encode

from portakv.errors import PeerError, PortaKVError, TransferTimeout
from portakv.migrate.address import NUMERIC
from portakv.migrate.channel_loop import Loop
from portakv.migrate.channel_sockets import BACK, HEAD, LIMIT, Sockets, event_of
from portakv.migrate.channel_unix import LinkTerms, UnixLink
from portakv.migrate.messages import UNDECODABLE, VERSION, Message, Refused, decoder_of
from portakv.migrate.peer import Peer
from portakv.runtime.interrupts import abandoned
from portakv.runtime.resources import reason

T = TypeVar("T")
#: Milliseconds between a requester's checks of its connection.
LOOK = 20


class TcpLink:
    """The connection to an address of TCP, by ZeroMQ; see `UnixLink` for its attributes."""

    def __init__(self, socket: zmq.Socket[bytes], address: str, number: int) -> None:
        self.address = address
        self.number = number
        self.requests = 0
        self.lock = threading.Lock()
        self.life = Peer()
        self.up = False
        self.why = ""
        self._socket = socket
        self._wait = LOOK
        socket.sndtimeo = socket.rcvtimeo = LOOK
        # Use a separate name: pyzmq's name is its descriptor's, which is reused before it is free.
        self.monitor = socket.get_monitor_socket(addr=f"inproc://{number}")
        socket.connect(address)

    @property
    def closed(self) -> bool:
        """Return True after `close`."""
        return self._socket.closed

    @property
    def wait(self) -> int:
        """Return the milliseconds for which `receive` waits."""
        return self._wait

    @wait.setter
    def wait(self, milliseconds: int) -> None:
        if milliseconds != self._wait:
            self._wait = milliseconds
            self._socket.rcvtimeo = milliseconds

    def send(self, data: bytes) -> None:
        """Send a request. Raises `BlockingIOError` if it could not be sent soon."""
        try:
            self._socket.send(data)
        except zmq.Again:
            raise BlockingIOError from None

    def receive(self) -> bytes:
        """Return an answer. Raises `BlockingIOError` if there is none within ``wait``."""
        try:
            return self._socket.recv()
        except zmq.Again:
            raise BlockingIOError from None

    def close(self) -> None:
        """Close the link, whose lock the caller has."""
        if not self._socket.closed:
            self._socket.close(0)
        self.life.end()


_Link: TypeAlias = TcpLink | UnixLink


class Client:
    """The connections of a channel to others. Any thread may send requests.

    Args:
        sockets: makes the sockets.
        loop: the thread that watches the connections.
        id: the id of the channel.
        counts: the counters of the channel.
        check_open: raises `PeerError` if the channel sends no more requests.
    """

    def __init__(
        self,
        sockets: Sockets,
        loop: Loop,
        id: bytes,
        counts: Counter[str],
        check_open: Callable[[], None],
    ) -> None:
        self._sockets = sockets
        self._loop = loop
        self.id = id
        self._counts = counts
        self._check_open = check_open
        self._lock = threading.Lock()
        self._links = dict[str, _Link]()
        self._made = 0

    def __len__(self) -> int:
        return len(self._links)

    def ask(
        self,
        address: str,
        message: Message,
        kind: type[T],
        until: float,
        stop: Callable[[], bool],
        sent: Callable[[], object] = bool,
    ) -> T:
        """Return the answer to a message; see `Channel.ask`. ``until``: a time of `monotonic`."""
        back = b""
        for received in self._sending(address, message, until, True, stop):
            sent()
            back = received
        return answer_of(back, address, message, kind)

    def ask_all(
        self, requests: Sequence[tuple[str, Message]], kind: type[T], until: float
    ) -> list[T | PortaKVError]:
        """Send the first request to each address, then read the answers and send the others."""
        results = dict[int, Any]()
        sending = [self._sending(*x, until, True) for x in requests]
        first = {requests[n][0]: n for n in reversed(range(len(requests)))}
        order = [first[address] for address in sorted(first)]  # each uses one connection

        def go_on(n: int, last: bool) -> None:
            try:
                if last:
                    results[n] = answer_of([*sending[n]][-1], *requests[n], kind)
                else:
                    next(sending[n])
            except PortaKVError as error:
                results[n] = error

        try:
            for n in order:
                go_on(n, False)
            for n in (*order, *range(len(requests))):
                if n not in results:
                    go_on(n, True)
        finally:
            for one in sending:  # if it ended early, else an error's traceback keeps connections
                one.close()
        return [results[n] for n in range(len(requests))]

    def tell(self, address: str, message: Message, until: float, stop: Callable[[], bool]) -> None:
        """Send a message without an answer; see `Channel.tell`."""
        for _ in self._sending(address, message, until, False, stop):
            pass

    def _sending(
        self,
        address: str,
        message: Message,
        until: float,
        answer: bool,
        stop: Callable[[], bool] = bool,
    ) -> Generator[bytes]:
        """Yield empty bytes each time the message is sent, and at last the answer if one is
        expected.

        The connection belongs to this thread until the generator ends.
        """
        what = f"{message.purpose} {address}"
        body = encode(message)
        by = None
        if len(body) > LIMIT:
            raise PeerError(f"{what} has {len(body)} bytes; a message has at most {LIMIT}.")
        link = self._acquire(address, until, what)
        try:
            link.requests += answer
            number = link.requests * answer
            data = HEAD.pack(VERSION, self.id, link.number, number) + body
            link.wait = min(LOOK, max(1, ceil(1e3 * (until - monotonic()))))
            while True:
                self._check(link, until, what, stop)
                with suppress(BlockingIOError):  # nothing came or went within `wait` milliseconds
                    # Repeat after the next connection stands: before, the old one may take the
                    # message.
                    if by is not (life := link.life) and (link.up or by is None):
                        link.send(data)
                        by = life
                        yield b""
                    if not answer:
                        return
                    back = link.receive().ljust(BACK.size, b"\0")
                    if back[0] != VERSION or BACK.unpack_from(back)[2] == number:
                        yield back
                        return
        finally:
            link.lock.release()

    def _acquire(self, address: str, until: float, what: str) -> _Link:
        """Return the link to an address, with its lock, for one request.

        A link that an earlier request closed, such as one with less time, is replaced.
        """
        while True:
            link = self.link(address)
            if not link.lock.acquire(timeout=max(0.0, until - monotonic())):
                raise TransferTimeout(
                    f"{what} was not sent: an earlier request still waits for its answer."
                )
            if not link.closed:
                return link
            link.lock.release()

    def _check(self, link: _Link, until: float, what: str, stop: Callable[[], bool]) -> None:
        """Raise the error of a link's connection; after its end the next request makes another."""
        if stop():
            raise TransferTimeout(f"{what} was cancelled, because nothing waits for its answer.")
        if abandoned():  # the answer to this request is ignored
            raise KeyboardInterrupt
        late = monotonic() > until
        why = link.why or ("the channel was closed" if self._loop.stopped else "")
        if late and link.up and not why:
            raise TransferTimeout(f"{what} got no answer in time; the connection stands.")
        if late or why:
            self._drop(link)
            raise PeerError(
                f"{what} failed: {why or 'no connection in time'}. Check that the process there "
                f"runs."
            )

    def link(self, address: str) -> _Link:
        """Return the link to an address, made at the first request.

        Raises `PeerError` if no channel can be there.
        """
        try:
            with self._lock:
                self._check_open()
                return self._links.get(address) or self._new_link(address)
        except FileNotFoundError:
            why = "no channel listens there any more, its process has ended"
            raise PeerError(
                f"Expected an address of a channel, got {address!r}: {why}. Get the address anew."
            ) from None
        except (OSError, zmq.ZMQError) as error:
            raise PeerError(
                f"Expected an address of a channel, got {address!r}: {reason(error)}."
            ) from None

    def _new_link(self, address: str) -> _Link:
        local = re.match("ipc://(/.+)", address)
        if "\0" in address or not (local or (self._sockets.keys and NUMERIC.match(address))):
            raise OSError(
                "expected ipc:// of this host or, with a secret, tcp:// with a numeric address "
                "and a port"
            )
        if local and os.stat(local[1]).st_uid != os.getuid():
            raise OSError("another user listens there")
        self._made += 1
        # The link is there before the channel's thread may drop it.
        if local:
            terms = LinkTerms(self._sockets.key, self._loop, self._counts, self._drop)
            link = UnixLink(address, self._made, terms)
            self._links[address] = link
            try:
                link.open()
            except BaseException:
                self._links.pop(address, None)
                raise
            return link
        socket = self._sockets.client(address)
        try:
            made = TcpLink(socket, address, self._made)
        except BaseException:
            socket.close(0)
            raise
        self._links[address] = made
        self._loop.run_soon(lambda: self._loop.watch(made.monitor, partial(self._see, made)))
        return made

    def _see(self, link: TcpLink) -> None:
        """Process an event of a connection, in the channel's thread."""
        event, value = event_of(link.monitor)
        if event == "HANDSHAKE_SUCCEEDED":
            link.up = True
        elif event == "DISCONNECTED" and link.up:
            self._counts["lost"] += 1
            link.up = False
            life = link.life
            link.life = Peer()
            life.end()
        elif event == "CLOSED":
            link.why = link.why or "no channel listens there"
        elif event.startswith("HANDSHAKE_FAILED"):
            secret = "the secret differs, " if self._sockets.keys else ""
            link.why = f"no handshake: {secret}the process has just ended, or it is not a channel"
            if value == errno.EAGAIN:  # nothing came in `HANDSHAKE` milliseconds
                link.why = "no handshake: the process is stopped or busy, or it is not a channel"
        elif event == "MONITOR_STOPPED":
            self._loop.forget(link.monitor)
            link.monitor.close(0)
        if link.why and link.lock.acquire(blocking=False):  # otherwise its requester checks it
            self._drop(link)
            link.lock.release()

    def _drop(self, link: _Link) -> None:
        """Close a link, whose lock the caller has."""
        link.why = link.why or "it is gone"
        if not link.closed:
            self._links.pop(link.address, None)
        link.close()

    def close(self) -> None:
        """Close all links, after the loop was stopped."""
        with self._lock:
            links = tuple(self._links.values())
        for link in links:
            with link.lock:
                self._drop(link)


def answer_of(back: bytes, address: str, message: Message, kind: type[T]) -> T:
    """Return the answer in the bytes that a peer sent back.

    Raises `Refused` if it rejects the message, and `PeerError` if the answer is not valid.
    """
    what = f"{message.purpose} {address}"
    if back[0] != VERSION:
        raise Refused(
            f"{what} was refused: a message of version {VERSION} got an answer of version "
            f"{back[0]}. Use one release of PortaKV on both sides."
        )
    if back[1]:
        raise Refused(f"{what} was rejected: {_printable(back[BACK.size :])}.")
    try:
        answer: T = decoder_of(kind).decode(memoryview(back)[BACK.size :])
        return answer
    except UNDECODABLE:
        raise PeerError(
            f"{what} got an answer that is not valid. Use one release on both sides."
        ) from None


def _printable(text: bytes) -> str:
    """Return the text of a peer, at most 4,096 bytes of it, on one line."""
    message = text[:4096].decode(errors="replace").rstrip(".")
    return "".join(each if each.isprintable() else "?" for each in message)
