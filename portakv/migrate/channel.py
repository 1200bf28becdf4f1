# SPDX-License-Identifier: Apache-2.0
"""The control channel carries messages of owners, readers and transports, and notices dead peers.
By ZeroMQ, with CURVE from a secret. Messages have schemas and limits; nothing is unpickled."""

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
from hashlib import blake2b
from secrets import token_bytes
from socket import SHUT_RDWR, socket
from struct import Struct, unpack_from
from time import monotonic
from typing import Any, TypeVar, Union

import zmq
from msgspec.msgpack import Decoder, decode, encode
from zmq.utils import z85

from portakv.arguments import invalid, seconds
from portakv.errors import InvalidTerms, PeerError, PortaKVError, TransferTimeout
from portakv.migrate.messages import VERSION, Message
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import this_process
from portakv.runtime.interrupts import abandoned, uninterrupted

_log = logging.getLogger(__name__)
T = TypeVar("T")
#: Bytes of a request and of an answer; connections that are served; messages that wait in one.
LIMIT = 64 << 10
ANSWER = 1 << 20
PEERS = 1024
QUEUED = 64
#: Milliseconds: between signs of life; until a connection without any is dead; for a handshake;
#: between an asker's looks at its connection.
HEARTBEAT = 1000
DEAD = 3000
HANDSHAKE = 5000
LOOK = 20
#: Bytes of all kept answers; answers and requests that wait for one connection's other end.
KEPT = 32 << 20
WAITING = 4
#: Addresses of other hosts: numbers, as a name would have ZeroMQ's one thread wait for a resolver.
_NUMERIC = re.compile(r"tcp://([0-9.]{7,15}|\[[0-9a-fA-F:.%]+[0-9a-zA-Z]*\]):([0-9]{1,5})")
HEAD = Struct("!B16sIQ")  # version, channel, its connection, number of the request (0: no answer)
BACK = Struct("!B?Q")  # version, whether a refusal's sentence follows, number of the request


class Refused(PeerError):
    """A request that its receiver has understood and does not carry out."""


class Peer:
    """A connection, and who is at its other end: ``id`` is random, of the asker's `Channel`."""

    def __init__(self, id: bytes = b"") -> None:
        self.id = id
        self.gone = False
        self._calls = dict[object, Callable[[], object]]()
        self.link = b""  # the number by which the asker knows the connection

    def on_gone(self, call: Callable[[], object]) -> Callable[[], object]:
        """Have ``call`` made once, quickly, when the connection ends (now if it has), in the thread
        that notices; what is returned takes that back."""
        key = object()
        self._calls[key] = call
        if self.gone:
            self.end()
        return lambda: self._calls.pop(key, None)

    def end(self) -> None:
        """The connection has ended."""
        self.gone = True
        for key in list(self._calls):
            if call := self._calls.pop(key, None):  # else another thread was faster
                try:
                    call()
                except Exception:
                    _log.exception("What was to happen at the end of a connection failed.")


class _Answers:
    """The last answer for each link, as a request may be repeated by its next connection.

    Keeps at most `KEPT` bytes: of older answers only the numbers stay, so that their requests are
    carried out once at most.
    """

    def __init__(self) -> None:
        self._last: Bounded[bytes, tuple[int, bytes]] = Bounded("answers of a channel", 2 * PEERS)
        self.nbytes = 0

    def get(self, link: bytes) -> tuple[int, bytes]:
        """Return the last number of a link and its answer, if that is kept."""
        return self._last.get(link, (0, b""))

    def keep(self, link: bytes, number: int, back: bytes) -> None:
        """Keep an answer as the youngest."""
        self._last.pop(link, None)
        self._last[link] = number, back
        self.nbytes = sum(len(each) for _, each in self._last.values())
        for older in [*self._last]:
            if self.nbytes <= KEPT:
                return
            self.drop(older)

    def drop(self, link: bytes) -> None:
        """Keep no more than the number of a link's last answer."""
        if link in self._last:
            number, back = self._last[link]
            self.nbytes -= len(back)
            self._last[link] = number, b""


class _Link:
    """The socket for one address, for one thread at a time, and what was seen of its connection."""

    def __init__(self, socket: zmq.Socket[bytes], address: str, number: int) -> None:
        self.socket = socket
        self.address = address
        self.number = number
        self.asked = 0
        self.lock = threading.Lock()
        self.life = Peer()
        self.up = False
        self.why = ""
        # nothing waits for a connection to come
        socket.immediate = True
        socket.reconnect_ivl = 50
        socket.sndtimeo = socket.rcvtimeo = LOOK
        # A name of its own: pyzmq's is its descriptor's, which is used again before it is free.
        self.monitor = socket.get_monitor_socket(addr=f"inproc://{number}")
        socket.connect(address)


class Channel:
    """Listens, and asks others; any thread may call it. `close` it, or the interpreter's end does.

    Args:
        address: ``tcp://10.0.0.1:0`` listens there, at a free port; None: at a Unix socket that
            only this user of this host reaches. Tickets say the attribute of that name: set it if
            others reach it by another address (NAT, a container's).
        secret: 16 bytes or more, the same for all that talk to each other; TCP needs one.
        timeout: seconds for a request and its answer.
    """

    def __init__(
        self, address: str | None = None, *, secret: bytes | str | None = None, timeout: float = 5.0
    ) -> None:
        self.address = "a Unix socket"
        short = "" if secret is None else _too_short(secret)
        self._keys = () if secret is None or short else _keys(secret)
        del secret  # no traceback shows it
        if short:
            raise InvalidTerms(short)
        _check_address(address, bool(self._keys))
        timeout = seconds("timeout", timeout, above=True)
        self.address = address or self.address
        self.timeout = timeout
        self.id = token_bytes(16)
        self.counts = Counter[str]()
        self._process = this_process()
        self._lock = threading.Lock()
        self._closed = False
        self._answers = dict[type, Callable[[Peer, Any], Any]]()
        self._users = dict[str, object]()  # the owner and the reader that others know by it
        self._decoder = Decoder[Any](None)
        # of connections to here
        self._peers = dict[bytes, Peer]()
        self._fds = dict[int, bytes]()
        self._last = _Answers()
        self._links = dict[str, _Link]()
        self._fresh = list[_Link]()
        self._made = 0
        self._poller = zmq.Poller()
        self._calls = dict[Any, Callable[[], None]]()
        uninterrupted(partial(self._start, address), undo=lambda _: self.close())

    def _start(self, address: str | None) -> None:
        """Listen, and begin the channel's thread."""
        self._context = zmq.Context()
        self._wake = os.eventfd(0)
        self._path = -1
        self._context.max_sockets = 4096  # three for each link
        self._context.rcvhwm = 0  # of monitors: one that is full would stop ZeroMQ's own thread
        self._zap = self._context.socket(zmq.REP)  # asks the channel's thread who may connect
        self._router = self._socket(zmq.ROUTER, self.address)
        self._seen = self._router.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        try:
            self._zap.bind("inproc://zeromq.zap.01")
            self._listen(address)
        except (OSError, zmq.ZMQError) as error:
            self._end()
            asked = f"A channel was to listen at {self.address}: {error}"
            raise PeerError(f"{asked}. Pass an address of this host and a free port.") from None
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
        # Of this user alone, and of few letters: a socket's path has at most 107.
        with tempfile.TemporaryDirectory(prefix="channel-", dir="/dev/shm") as folder:
            self._router.bind(address or f"ipc://{folder}/socket")
            self.address = self._router.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
            if re.match(r"tcp://(0\.0\.0\.0|\[::(ffff:0\.0\.0\.0)?\])", self.address):
                raise OSError("that is every interface")
            if not address:  # reached through this process: not even SIGKILL leaves a file
                self._path = os.open(f"{folder}/socket", os.O_PATH)
                self.address = f"ipc:///proc/{os.getpid()}/fd/{self._path}"

    def serve(self, kind: type[T], answer: Callable[[Peer, T], Message | None]) -> None:
        """From now on messages of ``kind`` are answered by ``answer``, in the channel's one thread,
        so that it must be quick; None: nothing is sent. What it raises is told as a refusal."""
        uninterrupted(partial(self._serve, kind, answer))

    def _serve(self, kind: type[T], answer: Callable[[Peer, T], Message | None]) -> None:
        """Do what `serve` promises."""
        with self._lock:
            self._answers[kind] = answer
            self._decoder = Decoder(Union[tuple(self._answers)])  # noqa: UP007

    def claim(self, kind: str, user: object) -> None:
        """Be the one ``kind`` on it, since others know it by the channel alone; raises
        `InvalidTerms` if there is one."""
        uninterrupted(partial(self._claim, kind, user), undo=lambda _: self.free(kind, user))

    def _claim(self, kind: str, user: object) -> None:
        """Do what `claim` promises."""
        self.check_open()
        if self._users.setdefault(kind, user) is not user:
            raise InvalidTerms(f"{self} has {kind} already: close it first, or take another.")

    def check_open(self) -> None:
        """Raise `PeerError` after `close`, and in a forked process."""
        if self._closed or self._process.forked:
            gone = "is closed"
            if self._process.forked:
                gone = "belongs to the process that this one was forked from"
            raise PeerError(f"Expected a channel that is open, got one that {gone}. Make another.")

    def free(self, kind: str, user: object) -> bool:
        """Let another one be that; False if ``user`` is not (any more)."""
        return self._users.get(kind) is user and self._users.pop(kind) is user

    def ask(
        self,
        address: str,
        message: Message,
        kind: type[T],
        timeout: float | None = None,
        stop: Callable[[], bool] = bool,
    ) -> T:
        """What the channel at ``address`` answers. If its connection breaks, a request is repeated
        by the next one; it is carried out once or not at all. Ends early if ``stop()``.

        Raises:
            PeerError: nobody is reached there, it is gone, it refuses, the secret differs.
            TransferTimeout: it is there, and did not answer in time.

        If the caller is interrupted, the connection stays usable, and the answer is dropped.
        """

        until = self._until(timeout)

        def go() -> T:
            *_, back = self._sending(address, message, until, True, stop)
            return self._read(back, address, message, kind)

        return uninterrupted(go)

    def ask_all(
        self, asked: Sequence[tuple[str, Message]], kind: type[T], timeout: float | None = None
    ) -> list[T | PortaKVError]:
        """What `ask` returns or raises for each of several. All addresses are asked at once; one
        that is asked for more answers the next question when it has answered the one before."""
        return uninterrupted(partial(self._ask_all, asked, kind, timeout))

    def _ask_all(
        self, asked: Sequence[tuple[str, Message]], kind: type[T], timeout: float | None
    ) -> list[T | PortaKVError]:
        """Do what `ask_all` promises."""
        found = dict[int, Any]()
        until = self._until(timeout)
        sending = [self._sending(*x, until, True) for x in asked]
        first = {asked[n][0]: n for n in reversed(range(len(asked)))}
        order = [first[address] for address in sorted(first)]  # each keeps its connection

        def go_on(n: int, last: bool) -> None:
            try:
                if last:
                    found[n] = self._read([*sending[n]][-1], *asked[n], kind)
                else:
                    next(sending[n])
            except PortaKVError as error:
                found[n] = error

        try:
            for n in order:
                go_on(n, False)
            for n in (*order, *range(len(asked))):
                if n not in found:
                    go_on(n, True)
        finally:
            for one in sending:  # if it ended early, else an error's traceback keeps connections
                one.close()
        return [found[n] for n in range(len(asked))]

    def _read(self, back: bytes, address: str, message: Message, kind: type[T]) -> T:
        what = f"{message.purpose} {address}"
        if back[0] != VERSION:
            raise Refused(
                f"{what} was refused: a message of version {VERSION} got an answer of version "
                f"{back[0]}. Use one release of PortaKV on both sides."
            )
        if back[1]:
            raise Refused(f"{what} was refused: {_printable(back[BACK.size :])}.")
        try:
            return decode(memoryview(back)[BACK.size :], type=kind)
        except Exception:
            raise PeerError(f"{what} was answered, but by nothing that was expected.") from None

    def tell(self, address: str, message: Message, timeout: float | None = None) -> None:
        """Send what has no answer; raises as `ask` does if nobody is reached."""
        uninterrupted(lambda: [*self._sending(address, message, self._until(timeout), False)])

    def watch(self, address: str, gone: Callable[[], object]) -> Callable[[], object]:
        """Have ``gone`` called when the connection to ``address`` ends; see `Peer.on_gone`."""
        return uninterrupted(
            lambda: self._link(address).life.on_gone(gone), undo=lambda take_back: take_back()
        )

    def statistics(self) -> dict[str, int]:
        """Connections now, to here and to others, and what was counted."""
        now = {"peers": len(self._peers), "links": len(self._links)}
        return {**now, "kept_bytes": self._last.nbytes, **self.counts}

    def close(self) -> None:
        """End all connections; requests under way raise `PeerError`."""
        if not self._process.forked:
            uninterrupted(self._close)

    def _close(self) -> None:
        """Do what `close` promises."""
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

    # ---- in an asker's thread

    def _until(self, timeout: float | None) -> float:
        """Return the time at which a question ends that begins now."""
        return monotonic() + (self.timeout if timeout is None else max(0.0, timeout))

    def _sending(
        self,
        address: str,
        message: Message,
        until: float,
        answer: bool,
        stop: Callable[[], bool] = bool,
    ) -> Generator[bytes]:
        """Yields nothing each time the message is sent, at last its answer if there is to be one;
        its connection is this thread's until it ends."""
        what = f"{message.purpose} {address}"
        body = encode(message)
        by = None
        if len(body) > LIMIT:
            raise PeerError(f"{what} has {len(body)} bytes; at most {LIMIT} may go at once.")
        link = self._link(address)
        if not link.lock.acquire(timeout=max(0.0, until - monotonic())):
            raise TransferTimeout(f"{what} waited for another without an answer, and was not sent.")
        try:
            link.asked += answer
            data = HEAD.pack(VERSION, self.id, link.number, number := link.asked * answer) + body
            while True:
                self._look(link, until, what, stop)
                with suppress(zmq.Again):
                    # Or again, once the next connection stands: before, the old one may take it.
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
        """Raise what became of a link's connection; if it is over, the next request makes one."""
        if stop():
            raise TransferTimeout(f"{what} was given up, as nothing waits for its answer.")
        if abandoned():  # an answer to this request is passed over
            raise KeyboardInterrupt
        late = monotonic() > until
        why = link.why or "the channel was closed" * self._closed
        if late and link.up and not why:
            raise TransferTimeout(f"{what} has no answer in time; the connection stands.")
        if late or why:
            self._drop(link)
            raise PeerError(
                f"{what} reached nobody: {why or 'no connection in time'}. Check that the "
                f"process there runs."
            )

    def _link(self, address: str) -> _Link:
        try:
            self.check_open()
            with self._lock:
                if not (link := self._links.get(address)):
                    local = re.match("ipc://(/.+)", address)
                    if "\0" in address or not (local or (self._keys and _NUMERIC.match(address))):
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
            why = "nobody listens there any more, its process has ended"
            raise PeerError(f"{address!r} was to be reached, but {why}.") from None
        except (OSError, zmq.ZMQError) as error:
            raise PeerError(f"{address!r} was to be reached, but: {error}.") from None

    def _drop(self, link: _Link) -> None:
        """Give a link up; its lock is held."""
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
        made.sndhwm = WAITING if server else QUEUED  # of answers, of which each asker has one
        made.rcvhwm = QUEUED if server else WAITING
        made.maxmsgsize = (LIMIT if kind == zmq.ROUTER else ANSWER) + 256  # CURVE and HEAD add some
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
                except Exception:
                    _log.exception("%r failed at what arrived, and goes on.", self)

    def _admit(self) -> None:
        """Say whether a connection has the secret's keys."""
        asked = self._zap.recv_multipart()
        key = z85.decode(self._keys[0])
        well = b"200" if asked[5:] == [b"CURVE", key] else b"400"
        self._zap.send_multipart([b"1.0", asked[1], well, b"", b"", b""])

    def _begin(self) -> None:
        """Watch what happens to the links that were made."""
        os.eventfd_read(self._wake)
        while self._fresh:
            link = self._fresh.pop()
            self._calls[link.monitor] = partial(self._see_link, link)
            self._poller.register(link.monitor, zmq.POLLIN)

    def _see_link(self, link: _Link) -> None:
        """What happened to a connection of an asker."""
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
            link.why = link.why or "nobody listens there"
        elif event.startswith("HANDSHAKE_FAILED"):
            link.why = "no handshake: the secret differs, it is held up, or it is no channel"
        elif event == "MONITOR_STOPPED":
            self._poller.unregister(link.monitor)
            del self._calls[link.monitor]
            link.monitor.close(0)
        if link.why and link.lock.acquire(blocking=False):  # or else its asker looks
            self._drop(link)
            link.lock.release()

    def _see(self) -> None:
        """What happened until now to connections that were made to here."""
        while self._seen.poll(0):
            event, value = _event(self._seen)
            if event == "ACCEPTED":
                self._fds[value] = b""
            elif event == "DISCONNECTED":
                name = self._fds.pop(value, b"")
                if peer := self._peers.pop(name, None):
                    peer.end()
                # Without a name it never said anything well.
                self.counts["gone" if name else "strangers"] += 1
                n = self.counts["strangers"]
                if not name and n & (n - 1) == 0:  # the 1st, 2nd, 4th, 8th, ...
                    _log.warning("%r refused strangers, %d until now.", self, n)

    def _peer(self, name: bytes, fd: int, id: bytes) -> Peer | None:
        """Whose first message this is; None if the connection is over, or one too many."""
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
                if peer.link != link:  # of a connection one answer is kept
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
        with suppress(OSError), socket(fileno=os.dup(fd)) as connection:
            connection.shutdown(SHUT_RDWR)

    def _answer(self, peer: Peer, data: memoryview, number: int) -> bytes:
        try:
            message = self._decoder.decode(data)
        except Exception:
            return self._refused(number, "schema", "it is no message that is known there")
        try:
            answer = self._answers[type(message)](peer, message)
            body = b"" if answer is None else encode(answer)
        except PortaKVError as error:
            return self._refused(number, "refused", str(error)[:4096])
        except Exception as error:
            _log.exception("%s could not be answered.", type(message).__name__)
            return self._refused(number, "failed", f"it failed there by {type(error).__name__}")
        if len(body) > ANSWER:
            return self._refused(number, "size", f"its answer has {len(body)} bytes")
        return BACK.pack(VERSION, False, number) + body if body else b""

    def _refused(self, number: int, reason: str, why: str) -> bytes:
        self.counts[reason] += 1
        return BACK.pack(VERSION, True, number) + why.encode()


def _printable(text: bytes) -> str:
    """Return what a peer said, at most 4,096 bytes of it, on one line."""
    said = text[:4096].decode(errors="replace").rstrip(".")
    return "".join(each if each.isprintable() else "?" for each in said)


def _too_short(secret: object) -> str:
    """Return the sentence that refuses a secret, without its text; empty if it serves."""
    got = f"a secret of {len(secret)}" if isinstance(secret, bytes | str) else type(secret).__name__
    if isinstance(secret, str) and not secret.isascii():
        with suppress(UnicodeEncodeError):
            secret = secret.encode()
        if isinstance(secret, str):  # the error of the codec has the text
            return "Expected a secret that UTF-8 can hold, got a text that it cannot. Pass bytes."
    if isinstance(secret, bytes | str) and len(secret) >= 16:
        return ""
    return f"Expected a secret of 16 bytes or more, got {got}. Pass secrets.token_bytes(32)."


def _check_address(address: str | None, secret: bool) -> None:
    """Raise `InvalidTerms` for an address at which no channel can listen."""
    if address is None:
        return
    example = "Pass None, or one such as 'tcp://10.0.0.1:0'."
    expected = "None, or a tcp:// address of numbers with a port of 0 to 65535"
    if not isinstance(address, str) or not address.startswith("tcp://"):
        raise invalid("address", expected, address, example)
    numeric = _NUMERIC.fullmatch(address)
    port = address.rpartition(":")[2]
    interface = re.fullmatch(r"tcp://[A-Za-z0-9_.*-]{1,255}:[0-9]{1,5}", address)
    if not (numeric or interface) or int(port) > 65535:
        raise invalid("address", expected, address, example)
    if not secret:
        raise InvalidTerms(
            f"Expected a secret with {address}, got none. Pass secret=, as TCP connections are "
            f"always encrypted."
        )


def _event(monitor: zmq.Socket[bytes]) -> tuple[str, int]:
    """What ZeroMQ tells of a connection, and its file descriptor or so."""
    event, value = unpack_from("=Hi", monitor.recv_multipart()[0])
    return str(zmq.Event(event).name), int(value)


def _keys(secret: bytes | str) -> tuple[bytes, ...]:
    """The public and the private key that a secret stands for."""
    given = secret.encode() if isinstance(secret, str) else secret
    key = z85.encode(blake2b(given, digest_size=32, person=b"portakv-curve").digest())
    return zmq.curve_public(key), key
