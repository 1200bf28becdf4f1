# SPDX-License-Identifier: Apache-2.0
"""The requests that a channel answers: who may connect, and each request once."""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
import threading
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar, Union

import zmq
from msgspec.msgpack import encode
from zmq.utils import z85

from portakv.errors import PeerError, PortaKVError
from portakv.migrate.channel_loop import Loop
from portakv.migrate.channel_sockets import ANSWER, BACK, HEAD, LIMIT, Sockets, event_of
from portakv.migrate.channel_unix import UnixListener
from portakv.migrate.messages import UNDECODABLE, VERSION, Message, new_decoder
from portakv.migrate.peer import Peer
from portakv.runtime import resources
from portakv.runtime.bounded import Bounded

_log = logging.getLogger(__name__)
T = TypeVar("T")
#: The most connections that a channel serves, and the most bytes of all cached answers.
PEERS = 1024
KEPT = 32 << 20
#: Warnings of connections that ended without a valid message. ZeroMQ reports no reason for peers
#: that gave up and for processes that are not channels, and not always for peers without a secret.
OTHER_SECRET = (
    "Channel(%r) rejected connections with another secret or none, %d until now. Compare `secret` "
    "on both sides, or close the port to other hosts."
)
NO_MESSAGE = (
    "Channel(%r) got no message from unknown connections, %d until now. If this process was "
    "stopped or busy for seconds, peers gave up meanwhile. Otherwise processes connect that have "
    "no `secret` or are no channels."
)
#: The events of connections that the channel's thread processes.
_EVENTS = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


class _Rejection(Exception):
    """A request that fails: a word for the counters, and the text for its sender."""

    def __init__(self, reason: str, why: str) -> None:
        super().__init__(why)
        self.reason = reason


class _Services:
    """The functions that answer requests, by the kind of message."""

    def __init__(self) -> None:
        self._answers = dict[type, Callable[..., Message | None]]()
        self._decoder = new_decoder(None)
        self._lock = threading.Lock()

    def add(self, kind: type[T], answer: Callable[[Peer, T], Message | None]) -> None:
        """Register the function, and make a decoder that knows the new kind of message."""
        with self._lock:
            self._answers[kind] = answer
            self._decoder = new_decoder(Union[tuple(self._answers)])  # noqa: UP007

    def answer(self, peer: Peer, data: memoryview) -> bytes:
        """Return the encoded answer to a message, no bytes if there is none.

        Raises `_Rejection`, which says what the sender may know.
        """
        try:
            message = self._decoder.decode(data)
        except UNDECODABLE:
            raise _Rejection("schema", "the message is not known there") from None
        try:
            answer = self._answers[type(message)](peer, message)
            body = b"" if answer is None else encode(answer)
        except PortaKVError as error:
            raise _Rejection("refused", str(error)[:4096]) from None
        except Exception as error:  # of whoever answers; the peer gets it
            _log.exception("%s could not be answered.", type(message).__name__)
            raise _Rejection("failed", f"it failed there by {type(error).__name__}") from None
        if len(body) > ANSWER:
            raise _Rejection("size", f"its answer has {len(body)} bytes")
        return body


class _Answers:
    """The last answer for each link, because the next connection may repeat a request.

    Caches at most `KEPT` bytes. Of older answers only the numbers stay, so their requests are
    executed at most once.
    """

    def __init__(self) -> None:
        self._last: Bounded[bytes, tuple[int, bytes]] = Bounded("answers of a channel", 2 * PEERS)
        self.nbytes = 0

    def get(self, link: bytes) -> tuple[int, bytes]:
        """Return the last number of a link and its answer, if it is cached."""
        return self._last.get(link, (0, b""))

    def keep(self, link: bytes, number: int, back: bytes) -> None:
        """Cache an answer as the youngest."""
        self._last.pop(link, None)
        self._last[link] = number, back
        self.nbytes = sum(len(each) for _, each in self._last.values())
        for older in [*self._last]:
            if self.nbytes <= KEPT:
                return
            self.drop(older)

    def drop(self, link: bytes) -> None:
        """Keep only the number of a link's last answer."""
        if link in self._last:
            number, back = self._last[link]
            self.nbytes -= len(back)
            self._last[link] = number, b""


class _Strangers:
    """Count the connections that end without a valid message, and warn of them by their cause."""

    def __init__(self, counts: Counter[str]) -> None:
        self._counts = counts
        self._other_secrets = 0  # failed handshakes whose connections have not ended yet
        self._ended = Counter[str]()  # connections by their warning

    def fail(self) -> None:
        """Note that the secret of a connection differs; ZeroMQ ends the connection afterwards."""
        self._other_secrets += 1

    def end(self, address: str) -> None:
        """Count the end of a connection."""
        self._counts["strangers"] += 1
        warning = NO_MESSAGE
        if self._other_secrets:
            self._other_secrets -= 1
            warning = OTHER_SECRET
        self._ended[warning] += 1
        n = self._ended[warning]
        if n & (n - 1) == 0:  # the 1st, 2nd, 4th, 8th, ...
            _log.warning(warning, address, n)


class Server:
    """The connections of others to a channel, whose thread answers them after `listen`.

    Attributes:
        address: where others reach the channel.
        services: the functions that answer requests; any thread may add one.
        later: calls to be made when the answer to the present request was sent.

    Args:
        sockets: makes the sockets.
        address: where to listen, as in `Channel`.
        counts: the counters of the channel.
    """

    def __init__(self, sockets: Sockets, address: str | None, counts: Counter[str]) -> None:
        self.address = address or "a Unix socket"
        self.services = _Services()
        self._sockets = sockets
        self._unix: UnixListener | None = None
        self._counts = counts
        self._peers = dict[bytes, Peer]()
        self._fds = dict[int, bytes]()  # the names of connections, by their descriptors
        self._last = _Answers()
        self.later = deque[Callable[[], object]]()
        self._strangers = _Strangers(counts)
        self._router: zmq.Socket[bytes] | None = None
        self._seen: zmq.Socket[bytes] | None = None

    def listen(self, address: str | None, loop: Loop) -> None:
        """Listen, and have the loop answer what comes.

        Raises `PeerError` if nothing can listen there, or if descriptors, a thread or a folder are
        missing.
        """
        try:
            self._listen(address, loop)
        except (OSError, zmq.ZMQError) as error:
            why = resources.reason(error)
            if not address or error.errno in (*resources.NONE_FREE, errno.EAGAIN):
                raise PeerError(
                    f"Expected the descriptors, threads and folder of a channel, but {why}."
                ) from None
            raise PeerError(
                f"Expected an address at which a channel can listen, got {self.address}: {why}. "
                f"Pass an address of this host and a free port."
            ) from None

    def _listen(self, address: str | None, loop: Loop) -> None:
        if not address:
            self._unix = UnixListener(self._sockets.key, self, loop)
            self.address = self._unix.address
            return
        router = self._sockets.server(address)
        self._router = router
        self._seen = router.get_monitor_socket(_EVENTS)
        # ZeroMQ asks the channel's thread for the permission of each connection.
        zap: zmq.Socket[bytes] = self._sockets.context.socket(zmq.REP)
        zap.bind("inproc://zeromq.zap.01")
        router.bind(address)
        self.address = router.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        if re.match(r"tcp://(0\.0\.0\.0|\[::(ffff:0\.0\.0\.0)?\])", self.address):
            raise OSError("that is every interface")
        loop.watch(router, partial(self._take, router))
        loop.watch(self._seen, self._see)
        loop.watch(zap, partial(self._admit, zap))

    def statistics(self) -> dict[str, int]:
        """Return the connections now, and the bytes of cached answers."""
        return {"peers": len(self._peers), "kept_bytes": self._last.nbytes}

    def close(self) -> None:
        """End all connections, after the loop was stopped."""
        for peer in tuple(self._peers.values()):
            peer.end()
        if self._router is not None:
            self._router.disable_monitor()
        if self._unix is not None:
            self._unix.close()

    def _admit(self, zap: zmq.Socket[bytes]) -> None:
        """Accept a connection that has the secret's keys, and reject any other."""
        requests = zap.recv_multipart()
        key = z85.decode(self._sockets.keys[0])
        well = b"200" if requests[5:] == [b"CURVE", key] else b"400"
        zap.send_multipart([b"1.0", requests[1], well, b"", b"", b""])

    def _see(self) -> None:
        """Process all events of TCP connections to this channel."""
        while self._seen is not None and self._seen.poll(0):
            event, value = event_of(self._seen)
            if event == "ACCEPTED":
                self.begin(value)
            elif event == "DISCONNECTED":
                self.end(value)
            else:  # a failed handshake
                self.fail()

    def begin(self, fd: int) -> None:
        """Note a new connection."""
        self._fds[fd] = b""

    def fail(self) -> None:
        """Note that the secret of a connection differs, before its end."""
        self._strangers.fail()

    def end(self, fd: int) -> None:
        """Note the end of a connection."""
        name = self._fds.pop(fd, b"")
        if peer := self._peers.pop(name, None):
            peer.end()
        if name:
            self._counts["gone"] += 1
        else:  # it never sent a valid message
            self._strangers.end(self.address)

    def peer(self, name: bytes, fd: int, id: bytes) -> Peer | None:
        """Return the peer of a first message; None if the connection is over, or one too many."""
        self._see()
        if fd not in self._fds or len(self._peers) >= PEERS:
            return None
        return self._new_peer(name, fd, id)

    def _new_peer(self, name: bytes, fd: int, id: bytes) -> Peer:
        if before := self._peers.pop(self._fds[fd], None):
            before.end()
        self._fds[fd] = name
        self._peers[name] = Peer(id)
        return self._peers[name]

    def _take(self, router: zmq.Socket[bytes]) -> None:
        """Answer one request by TCP."""
        # Frame by frame: the calls for messages of several frames ask the socket about each.
        frames = [router.recv(copy=False)]
        while frames[-1].more:
            frames.append(router.recv(copy=False))
        name, *others, frame = frames
        if others:  # no channel sends messages of several frames
            self._counts["size"] += 1
            self._cut(frame.get(zmq.SRCFD))
            return
        back = self.reply(name.bytes, frame.get(zmq.SRCFD), frame.bytes)
        if back:
            router.send(name.bytes, zmq.SNDMORE)
            router.send(back)
        self.run_later_calls()

    def reply(self, name: bytes, fd: int, data: bytes) -> bytes:
        """Return the answer to a request of a connection; no bytes if there is none."""
        if not HEAD.size <= len(data) <= HEAD.size + LIMIT:
            self._counts["size"] += 1
            return b""
        _, id, _, number = HEAD.unpack_from(data)
        peer = self._peers.get(name) or self.peer(name, fd, id)
        back = self._answer(peer, data)
        return back if number else b""

    def run_later_calls(self) -> None:
        """Make the calls that wait for the answer to be sent."""
        while self.later:
            self.later.popleft()()

    def _answer(self, peer: Peer | None, data: bytes) -> bytes:
        """Return what is sent back for a request, which is executed unless it is a repeat."""
        version, id, _, number = HEAD.unpack_from(data)
        if version != VERSION:
            return self._refused(number, "version", f"release of version {VERSION}, not {version}")
        if peer is None:
            return self._refused(number, "full", f"it serves {PEERS} connections; try later")
        if peer.id != id:
            return self._refused(number, "schema", "the connection is another channel's")

        link = data[1:21]
        last, back = self._last.get(link)
        if number and number <= last:
            self._counts["repeated"] += 1
            return back if number == last else b""
        back = self._execute(peer, memoryview(data)[HEAD.size :], number)
        if number:
            if peer.link != link:  # one answer of a connection is cached
                self._last.drop(peer.link)
                peer.link = link
            self._last.keep(link, number, back)
        return back

    def _execute(self, peer: Peer, data: memoryview, number: int) -> bytes:
        """Execute a request, and return what is sent back."""
        try:
            body = self.services.answer(peer, data)
        except _Rejection as rejection:
            return self._refused(number, rejection.reason, str(rejection))
        return BACK.pack(VERSION, False, number) + body if body else b""

    def _refused(self, number: int, reason: str, why: str) -> bytes:
        """Count a rejection, and return it for the sender."""
        self._counts[reason] += 1
        return BACK.pack(VERSION, True, number) + why.encode()

    def _cut(self, fd: int) -> None:
        """End a connection that no channel made."""
        self._see()
        if fd not in self._fds:
            return
        # OSError: the connection has ended already.
        with suppress(OSError), socket.socket(fileno=os.dup(fd)) as connection:
            connection.shutdown(socket.SHUT_RDWR)
