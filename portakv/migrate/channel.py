# SPDX-License-Identifier: Apache-2.0
"""The control channel carries messages of owners, readers and transports, and detects dead peers.

It uses ZeroMQ, with CURVE keys that a secret gives. Messages have schemas and limits; nothing is
unpickled.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from functools import partial
from secrets import token_bytes
from socket import SHUT_RDWR, socket
from struct import Struct, unpack_from
from time import monotonic
from typing import Any, TypeVar, Union

import zmq
from msgspec.msgpack import Decoder, decode, encode
from zmq.utils import z85

from portakv.arguments import seconds
from portakv.errors import InvalidTerms, PeerError, PortaKVError, TransferTimeout
from portakv.migrate.address import NUMERIC, check_address, keys_of, too_short
from portakv.migrate.messages import UNDECODABLE, VERSION, Message
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import this_process
from portakv.runtime.interrupts import abandoned, uninterrupted

_log = logging.getLogger(__name__)
T = TypeVar("T")
#: The most bytes of a request and of an answer; connections that a channel serves; messages that
#: wait in one connection.
LIMIT = 64 << 10
ANSWER = 1 << 20
PEERS = 1024
QUEUED = 64
#: Milliseconds between heartbeats; until a silent connection is dead; for a handshake; between a
#: requester's checks of its connection.
#: between an asker's looks at its connection.
HEARTBEAT = 1000
DEAD = 3000
HANDSHAKE = 5000
LOOK = 20
#: The most bytes of all cached answers; answers and requests that wait for the other end of one
#: connection.
KEPT = 32 << 20
WAITING = 4
HEAD = Struct("!B16sIQ")  # version, channel, its connection, number of the request (0: no answer)
BACK = Struct("!B?Q")  # version, True if the text of a rejection follows, number of the request


class Refused(PeerError):
    """A request that its receiver has understood and rejects."""


class Peer:
    """A connection to a peer. ``id`` is random: the id of the peer's `Channel`."""

    def __init__(self, id: bytes = b"") -> None:
        self.id = id
        self.gone = False
        self._calls = dict[object, Callable[[], object]]()
        self.link = b""  # the number by which the requester knows the connection

    def on_gone(self, call: Callable[[], object]) -> Callable[[], object]:
        """Call ``call`` once when the connection ends, immediately if it has ended.

        The call must be quick: it runs in the thread that detects the end. Returns a function that
        withdraws the call.
        """
        key = object()
        self._calls[key] = call
        if self.gone:
            self.end()
        return lambda: self._calls.pop(key, None)

    def end(self) -> None:
        """Mark the connection as ended, and make the calls of `on_gone`."""
        self.gone = True
        for key in list(self._calls):
            if call := self._calls.pop(key, None):  # else another thread has made the call
                try:
                    call()
                except Exception:  # the other calls must be made, too
                    _log.exception("A call for the end of a connection failed.")


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


class _Link:
    """The socket for one address, for one thread at a time, and the state of its connection."""

    def __init__(self, socket: zmq.Socket[bytes], address: str, number: int) -> None:
        self.socket = socket
        self.address = address
        self.number = number
        self.requests = 0
        self.lock = threading.Lock()
        self.life = Peer()
        self.up = False
        self.why = ""
        # no send waits for a connection
        socket.immediate = True
        socket.reconnect_ivl = 50
        socket.sndtimeo = socket.rcvtimeo = LOOK
        # Use a separate name: pyzmq's name is its descriptor's, which is reused before it is free.
        self.monitor = socket.get_monitor_socket(addr=f"inproc://{number}")
        socket.connect(address)


class Channel:
    """A channel listens for requests and sends requests to other channels. Any thread may call it.

    `close` ends it, or the end of the interpreter. Methods come in pairs, such as `serve` and
    `_serve`: no interrupt may cut the private half in two, so a helper thread runs it for the main
    thread.

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
        self._keys = () if secret is None or short else keys_of(secret)
        del secret  # a traceback must not show it
        if short:
            raise InvalidTerms(short)
        check_address(address, bool(self._keys))
        timeout = seconds("timeout", timeout, above=True)
        self.address = address or self.address
        self.timeout = timeout
        self.id = token_bytes(16)
        self.counts = Counter[str]()
        self._process = this_process()
        self._lock = threading.Lock()
        self._closed = False
        self._answers = dict[type, Callable[..., Message | None]]()
        self._users = dict[str, object]()  # the owner and the reader of this channel
        self._decoder = Decoder[Any](None)
        # connections to this channel
        self._peers = dict[bytes, Peer]()
        self._fds = dict[int, bytes]()
        self._last = _Answers()
        self._links = dict[str, _Link]()
        self._fresh = list[_Link]()
        self._made = 0
        self._poller = zmq.Poller()
        self._calls = dict[object, Callable[[], None]]()
        uninterrupted(partial(self._start, address), undo=lambda _: self.close())

    def _start(self, address: str | None) -> None:
        """Listen, and start the channel's thread."""
        self._context = zmq.Context()
        self._wake = os.eventfd(0)
        self._path = -1
        self._context.max_sockets = 4096  # three sockets for each link
        self._context.rcvhwm = 0  # for monitors: a full monitor would stop ZeroMQ's own thread
        # ZeroMQ asks the channel's thread for the permission of each connection.
        self._zap = self._context.socket(zmq.REP)
        self._router = self._socket(zmq.ROUTER, self.address)
        self._seen = self._router.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        try:
            self._zap.bind("inproc://zeromq.zap.01")
            self._listen(address)
        except (OSError, zmq.ZMQError) as error:
            self._end()
            raise PeerError(
                f"Expected an address at which a channel can listen, got {self.address}: {error}. "
                f"Pass an address of this host and a free port."
            ) from None
        self._thread = threading.Thread(target=self._run, name="portakv channel", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def __repr__(self) -> str:
        return f"Channel({self.address!r})"

    @property
    def forked(self) -> bool:
        """Return True in a process that was forked from the one that made the channel."""
        return self._process.forked

    def _listen(self, address: str | None) -> None:
        # Only this user may enter, and the path is short: a socket's path has at most 107 letters.
        with tempfile.TemporaryDirectory(prefix="channel-", dir="/dev/shm") as folder:
            self._router.bind(address or f"ipc://{folder}/socket")
            self.address = self._router.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
            if re.match(r"tcp://(0\.0\.0\.0|\[::(ffff:0\.0\.0\.0)?\])", self.address):
                raise OSError("that is every interface")
            # Others reach the socket through this process: not even SIGKILL leaves a file.
            if not address:
                self._path = os.open(f"{folder}/socket", os.O_PATH)
                self.address = f"ipc:///proc/{os.getpid()}/fd/{self._path}"

    def serve(self, kind: type[T], answer: Callable[[Peer, T], Message | None]) -> None:
        """Answer messages of ``kind`` by ``answer`` from now on.

        The call runs in the channel's only thread and must be quick. None sends no answer. The peer
        gets the error that ``answer`` raises.
        """
        uninterrupted(partial(self._serve, kind, answer))

    def _serve(self, kind: type[T], answer: Callable[[Peer, T], Message | None]) -> None:
        """Register the function, and make a decoder that knows the new kind of message."""
        with self._lock:
            self._answers[kind] = answer
            self._decoder = Decoder(Union[tuple(self._answers)])  # noqa: UP007

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
        if self._closed or self._process.forked:
            gone = "is closed"
            if self._process.forked:
                gone = "belongs to the process that this one was forked from"
            raise PeerError(f"Expected a channel that is open, got one that {gone}. Make another.")

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
    ) -> T:
        """Return the answer of the channel at ``address`` to a message.

        If the connection breaks, the next connection repeats the request, which is executed at most
        once. Ends early if ``stop()`` returns True.

        Raises:
            PeerError: the peer cannot be reached, is gone or rejects, or the secret differs.
            TransferTimeout: the peer is there, and did not answer in time.

        If the caller is interrupted, the connection stays usable, and the answer is dropped.
        """

        until = self._until(timeout)

        def go() -> T:
            *_, back = self._sending(address, message, until, True, stop)
            return self._read(back, address, message, kind)

        return uninterrupted(go)

    def ask_all(
        self, requests: Sequence[tuple[str, Message]], kind: type[T], timeout: float | None = None
    ) -> list[T | PortaKVError]:
        """Return the result or the error of `ask` for each of several requests.

        All addresses get their first request together. An address with several requests gets the
        next one after it has answered.
        """
        return uninterrupted(partial(self._ask_all, requests, kind, timeout))

    def _ask_all(
        self, requests: Sequence[tuple[str, Message]], kind: type[T], timeout: float | None
    ) -> list[T | PortaKVError]:
        """Send the first request to each address, then read the answers and send the others."""
        results = dict[int, Any]()
        until = self._until(timeout)
        sending = [self._sending(*x, until, True) for x in requests]
        first = {requests[n][0]: n for n in reversed(range(len(requests)))}
        order = [first[address] for address in sorted(first)]  # each uses one connection

        def go_on(n: int, last: bool) -> None:
            try:
                if last:
                    results[n] = self._read([*sending[n]][-1], *requests[n], kind)
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

    def _read(self, back: bytes, address: str, message: Message, kind: type[T]) -> T:
        what = f"{message.purpose} {address}"
        if back[0] != VERSION:
            raise Refused(
                f"{what} was refused: a message of version {VERSION} got an answer of version "
                f"{back[0]}. Use one release of PortaKV on both sides."
            )
        if back[1]:
            raise Refused(f"{what} was rejected: {_printable(back[BACK.size :])}.")
        try:
            return decode(memoryview(back)[BACK.size :], type=kind)
        except UNDECODABLE:
            raise PeerError(
                f"{what} got an answer that is not valid. Use one release on both sides."
            ) from None

    def tell(self, address: str, message: Message, timeout: float | None = None) -> None:
        """Send a message without an answer; raise as `ask` if the peer cannot be reached."""
        uninterrupted(lambda: [*self._sending(address, message, self._until(timeout), False)])

    def watch(self, address: str, gone: Callable[[], object]) -> Callable[[], object]:
        """Call ``gone`` when the connection to ``address`` ends; see `Peer.on_gone`."""
        return uninterrupted(
            lambda: self._link(address).life.on_gone(gone), undo=lambda take_back: take_back()
        )

    def statistics(self) -> dict[str, int]:
        """Return the connections now, from and to other channels, and the counters."""
        now = {"peers": len(self._peers), "links": len(self._links)}
        return {**now, "kept_bytes": self._last.nbytes, **self.counts}

    def close(self) -> None:
        """End all connections; requests in flight raise `PeerError`."""
        if not self._process.forked:
            uninterrupted(self._close)

    def _close(self) -> None:
        """Stop the channel's thread, drop all connections, and close the sockets."""
        atexit.unregister(self.close)
        with self._lock:
            if self._closed:
                return
            self._closed = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        for link in tuple(self._links.values()):
            with link.lock:
                self._drop(link)
        for peer in tuple(self._peers.values()):
            peer.end()
        self._end()

    def _end(self) -> None:
        self._router.disable_monitor()
        self._context.destroy(0)
        for each in {self._wake, self._path} - {-1}:
            os.close(each)

    # ---- in a requester's thread

    def _until(self, timeout: float | None) -> float:
        """Return the time at which a request ends that starts now."""
        return monotonic() + (self.timeout if timeout is None else max(0.0, timeout))

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
        link = self._link(address)
        if not link.lock.acquire(timeout=max(0.0, until - monotonic())):
            raise TransferTimeout(
                f"{what} was not sent: an earlier request still waits for its answer."
            )
        try:
            link.requests += answer
            data = HEAD.pack(VERSION, self.id, link.number, number := link.requests * answer) + body
            while True:
                self._look(link, until, what, stop)
                with suppress(zmq.Again):  # nothing came or went within `LOOK` seconds
                    # Repeat after the next connection stands: before, the old one may take the
                    # message.
                    if by is not (life := link.life) and (link.up or by is None):
                        link.socket.send(data)
                        by = life
                        yield b""
                    if not answer:
                        return
                    back = link.socket.recv().ljust(BACK.size, b"\0")
                    if back[0] != VERSION or BACK.unpack_from(back)[2] == number:
                        yield back
                        return
        finally:
            link.lock.release()

    def _look(self, link: _Link, until: float, what: str, stop: Callable[[], bool]) -> None:
        """Raise the error of a link's connection; after its end the next request makes another."""
        if stop():
            raise TransferTimeout(f"{what} was cancelled, because nothing waits for its answer.")
        if abandoned():  # the answer to this request is ignored
            raise KeyboardInterrupt
        late = monotonic() > until
        why = link.why or ("the channel was closed" if self._closed else "")
        if late and link.up and not why:
            raise TransferTimeout(f"{what} got no answer in time; the connection stands.")
        if late or why:
            self._drop(link)
            raise PeerError(
                f"{what} failed: {why or 'no connection in time'}. Check that the process there "
                f"runs."
            )

    def _link(self, address: str) -> _Link:
        try:
            self.check_open()
            with self._lock:
                if not (link := self._links.get(address)):
                    local = re.match("ipc://(/.+)", address)
                    if "\0" in address or not (local or (self._keys and NUMERIC.match(address))):
                        expected = "expected ipc:// of this host or, with a secret, tcp:// with a"
                        raise OSError(f"{expected} numeric address and a port")
                    if local and os.stat(local[1]).st_uid != os.getuid():
                        raise OSError("another user listens there")
                    self._made += 1
                    link = _Link(self._socket(zmq.DEALER, address), address, self._made)
                    self._links[address] = link
                    self._fresh.append(link)
                    os.eventfd_write(self._wake, 1)
                return link
        except FileNotFoundError:
            why = "no channel listens there any more, its process has ended"
            raise PeerError(f"Expected an address of a channel, got {address!r}: {why}.") from None
        except (OSError, zmq.ZMQError) as error:
            raise PeerError(
                f"Expected an address of a channel, got {address!r}: {error}."
            ) from None

    def _drop(self, link: _Link) -> None:
        """Close a link, whose lock the caller has."""
        link.why = link.why or "it is gone"
        if not link.socket.closed:
            self._links.pop(link.address, None)
            link.socket.close(0)
        link.life.end()

    def _socket(self, kind: int, address: str) -> zmq.Socket[bytes]:
        made: zmq.Socket[bytes] = self._context.socket(kind)
        server = kind == zmq.ROUTER
        made.linger = 0
        made.ipv6 = "[" in address
        made.sndhwm = WAITING if server else QUEUED  # of answers: each requester has one
        made.rcvhwm = QUEUED if server else WAITING
        # CURVE and HEAD add some bytes.
        made.maxmsgsize = (LIMIT if kind == zmq.ROUTER else ANSWER) + 256
        made.heartbeat_ivl = HEARTBEAT
        made.heartbeat_timeout = DEAD
        made.handshake_ivl = HANDSHAKE
        if self._keys:
            made.curve_publickey, made.curve_secretkey = self._keys
            if kind == zmq.ROUTER:
                made.curve_server = True
                made.zap_domain = b"portakv"
            else:
                made.curve_serverkey = self._keys[0]
        return made

    # ---- in the channel's thread

    def _run(self) -> None:
        calls = ((self._router, self._take), (self._seen, self._see), (self._zap, self._admit))
        for ready, call in (*calls, (self._wake, self._begin)):
            self._poller.register(ready, zmq.POLLIN)
            self._calls[ready] = call
        while not self._closed:
            for ready, _ in self._poller.poll():
                try:
                    self._calls[ready]()
                except Exception:  # one peer's message must not stop the others'
                    _log.exception("%r failed at a message, and goes on.", self)

    def _admit(self) -> None:
        """Accept a connection that has the secret's keys, and reject any other."""
        requests = self._zap.recv_multipart()
        key = z85.decode(self._keys[0])
        well = b"200" if requests[5:] == [b"CURVE", key] else b"400"
        self._zap.send_multipart([b"1.0", requests[1], well, b"", b"", b""])

    def _begin(self) -> None:
        """Watch the events of the links that were made."""
        os.eventfd_read(self._wake)
        while self._fresh:
            link = self._fresh.pop()
            self._calls[link.monitor] = partial(self._see_link, link)
            self._poller.register(link.monitor, zmq.POLLIN)

    def _see_link(self, link: _Link) -> None:
        """Process an event of a requester's connection."""
        event = _event(link.monitor)[0]
        if event == "HANDSHAKE_SUCCEEDED":
            link.up = True
        elif event == "DISCONNECTED" and link.up:
            self.counts["lost"] += 1
            link.up = False
            life = link.life
            link.life = Peer()
            life.end()
        elif event == "CLOSED":
            link.why = link.why or "no channel listens there"
        elif event.startswith("HANDSHAKE_FAILED"):
            link.why = (
                "no handshake: the secret differs, the process is stopped, or it is not a channel"
            )
        elif event == "MONITOR_STOPPED":
            self._poller.unregister(link.monitor)
            del self._calls[link.monitor]
            link.monitor.close(0)
        if link.why and link.lock.acquire(blocking=False):  # otherwise its requester checks it
            self._drop(link)
            link.lock.release()

    def _see(self) -> None:
        """Process all events of connections to this channel."""
        while self._seen.poll(0):
            event, value = _event(self._seen)
            if event == "ACCEPTED":
                self._fds[value] = b""
            elif event == "DISCONNECTED":
                name = self._fds.pop(value, b"")
                if peer := self._peers.pop(name, None):
                    peer.end()
                # A connection without a name never sent a valid message.
                self.counts["gone" if name else "strangers"] += 1
                n = self.counts["strangers"]
                if not name and n & (n - 1) == 0:  # the 1st, 2nd, 4th, 8th, ...
                    _log.warning("%r rejected unknown connections, %d until now.", self, n)

    def _peer(self, name: bytes, fd: int, id: bytes) -> Peer | None:
        """Return the peer of a first message; None if the connection is over, or one too many."""
        self._see()
        if fd not in self._fds or len(self._peers) >= PEERS:
            return None
        if before := self._peers.pop(self._fds[fd], None):
            before.end()
        self._fds[fd] = name
        self._peers[name] = Peer(id)
        return self._peers[name]

    def _take(self) -> None:
        """Answer one request."""
        *names, frame = self._router.recv_multipart(copy=False)
        if len(names) != 1:
            names = names[:1] + names[-1:]
        name = names[0].bytes
        data = frame.bytes
        if len(names) != 1 or not HEAD.size <= len(data) <= HEAD.size + LIMIT:
            self.counts["size"] += 1
            if len(names) != 1:
                self._cut(frame.get(zmq.SRCFD))
            return
        version, id, _, number = HEAD.unpack_from(data)
        peer = self._peers.get(name) or self._peer(name, frame.get(zmq.SRCFD), id)
        link = data[1:21]
        last, back = self._last.get(link)
        if version != VERSION:
            back = self._refused(number, "version", f"release of version {VERSION}, not {version}")
        elif peer is not None and peer.id != id:
            back = self._refused(number, "schema", "the connection is another channel's")
        elif peer is None:
            back = self._refused(number, "full", f"it serves {PEERS} connections; try later")
        elif number and number <= last:
            self.counts["repeated"] += 1
            back = back if number == last else b""
        else:
            back = self._answer(peer, memoryview(data)[HEAD.size :], number)
            if number:
                if peer.link != link:  # one answer of a connection is cached
                    self._last.drop(peer.link)
                    peer.link = link
                self._last.keep(link, number, back)
        if number and back:
            self._router.send_multipart([name, back])

    def _cut(self, fd: int) -> None:
        """End a connection that sends messages of several frames, which no channel does."""
        self._see()
        if fd not in self._fds:
            return
        # OSError: the connection has ended already.
        with suppress(OSError), socket(fileno=os.dup(fd)) as connection:
            connection.shutdown(SHUT_RDWR)

    def _answer(self, peer: Peer, data: memoryview, number: int) -> bytes:
        try:
            message = self._decoder.decode(data)
        except UNDECODABLE:
            return self._refused(number, "schema", "the message is not known there")
        try:
            answer = self._answers[type(message)](peer, message)
            body = b"" if answer is None else encode(answer)
        except PortaKVError as error:
            return self._refused(number, "refused", str(error)[:4096])
        except Exception as error:  # of whoever answers; the peer gets it
            _log.exception("%s could not be answered.", type(message).__name__)
            return self._refused(number, "failed", f"it failed there by {type(error).__name__}")
        if len(body) > ANSWER:
            return self._refused(number, "size", f"its answer has {len(body)} bytes")
        return BACK.pack(VERSION, False, number) + body if body else b""

    def _refused(self, number: int, reason: str, why: str) -> bytes:
        self.counts[reason] += 1
        return BACK.pack(VERSION, True, number) + why.encode()


def _printable(text: bytes) -> str:
    """Return the text of a peer, at most 4,096 bytes of it, on one line."""
    message = text[:4096].decode(errors="replace").rstrip(".")
    return "".join(each if each.isprintable() else "?" for each in message)


def _event(monitor: zmq.Socket[bytes]) -> tuple[str, int]:
    """Return the event of a ZeroMQ connection, and its file descriptor or value."""
    event, value = unpack_from("=Hi", monitor.recv_multipart()[0])
    return str(zmq.Event(event).name), int(value)
