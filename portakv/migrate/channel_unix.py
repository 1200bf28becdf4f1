# SPDX-License-Identifier: Apache-2.0
"""The Unix sockets of channels: one packet for each message, between processes of one user.

ZeroMQ serves TCP alone. It ends the process by SIGABRT if its listener of Unix sockets has no
descriptor for a connection (libzmq#1306), and no check before can prevent that: other threads take
descriptors at any time. Here the channel's thread accepts connections, and refuses those for which
there is no descriptor.

A connection begins with three packets, which show both sides that they have the same secret or
none: the server's nonce, the client's nonce and proof, the server's proof. Requests and answers
follow, as in `channel_sockets`. An answer is cut into packets, each after a byte that says whether
more follow.

The kernel reports the end of a process, unless a fork of it has its descriptors. So each side also
looks at the other's process, and ends the connection to one that is stopped or dead.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from hashlib import blake2b
from hmac import compare_digest
from secrets import token_bytes
from struct import Struct
from time import monotonic, sleep
from typing import NamedTuple, Protocol

import zmq

from portakv.errors import HostMemoryError
from portakv.host.shared import process_state
from portakv.migrate import channel_sockets
from portakv.migrate.channel_loop import Loop
from portakv.migrate.channel_sockets import ANSWER, BACK, HEAD, LIMIT
from portakv.migrate.peer import Peer
from portakv.runtime import resources
from portakv.runtime.interrupts import Condition
from portakv.runtime.rate_limited_log import RateLimitedLog

_logger = logging.getLogger(__name__)
_log = RateLimitedLog(_logger)
#: Folders in which a socket may have its name for a moment. A path has at most 107 letters.
FOLDERS = ("/dev/shm", "/tmp", "/var/tmp")
#: Connections that wait to be accepted.
BACKLOG = 1024
#: Bytes of an answer in one packet, and bytes that wait in a connection.
PACKET = 64 << 10
BUFFER = 256 << 10
#: Seconds between two tries to accept connections without a descriptor.
AGAIN = 0.2
#: Bytes of a nonce and of a proof, and the first bytes of the packets of a handshake.
_NONCE = 16
_HELLO = b"H"
_WELCOME = b"W"
_REFUSED = b"R"
#: What the server reports of a process: its number and its start.
_CREDENTIALS = Struct("iII")


class Served(Protocol):
    """What a listener calls; `channel_server.Server` has it."""

    def begin(self, fd: int) -> None:
        """Note a new connection."""

    def fail(self) -> None:
        """Note that the secret of a connection differs, before its end."""

    def end(self, fd: int) -> None:
        """Note the end of a connection."""

    def reply(self, name: bytes, fd: int, data: bytes) -> bytes:
        """Return the answer to a request; no bytes if there is none."""

    def run_later_calls(self) -> None:
        """Make the calls that wait for the answer to be sent."""


class UnixListener:
    """Listens at a Unix socket that only this user reaches, and answers in the channel's thread.

    Args:
        key: from the secret; empty without one.
        server: is called for each event.
        loop: the channel's thread.

    Raises `OSError` if no socket can be made.

    Attributes:
        address: where others reach the socket. It goes through this process's descriptors, so not
            even SIGKILL leaves a file.
    """

    def __init__(self, key: bytes, server: Served, loop: Loop) -> None:
        self._key = key
        self._server = server
        self._loop = loop
        self._connections = dict[int, _Connection]()
        self._made = 0
        self._looks = False  # whether a look at the processes is to come
        self._path = -1
        self._spare = -1  # a descriptor that is closed so that a connection can be refused
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._listening.setblocking(False)
            self._path = _bind(self._listening)
            self._listening.listen(BACKLOG)
            self._spare = os.eventfd(0)
        except BaseException:
            self.close()
            raise
        self.address = f"ipc:///proc/{os.getpid()}/fd/{self._path}"
        loop.watch(self._listening.fileno(), self._accept)

    def close(self) -> None:
        """Close the socket and all connections, after the loop was stopped."""
        for connection in self._connections.values():
            _shut(connection.socket)
        self._connections.clear()
        _shut(self._listening)
        for descriptor in (self._path, self._spare):
            if descriptor >= 0:
                os.close(descriptor)
        self._path = -1
        self._spare = -1

    # --- connections

    def _accept(self) -> None:
        """Accept a connection, or refuse it if there is no descriptor for it."""
        try:
            accepted, _ = self._listening.accept()
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.ECONNABORTED, errno.EINTR):
                return
            if not (error.errno == errno.EMFILE and resources.raise_limit()):
                self._refuse(error)
            return
        accepted.setblocking(False)
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        fd = accepted.fileno()
        self._made += 1
        connection = _Connection(accepted, b"unix %d" % self._made)
        self._connections[fd] = connection
        self._server.begin(fd)
        self._loop.watch(fd, lambda: self._receive(connection))
        self._send(connection, _HELLO + connection.nonce)
        if not self._looks:
            self._looks = True
            self._loop.run_later(_beat(), self._look)

    def _refuse(self, error: OSError) -> None:
        """Tell the next peer that there is no descriptor for it. If there is not even one for that,
        accept nothing for a moment."""
        why = resources.reason(error)
        _log.warning("accept", "A channel refuses a connection: %s.", why)
        why = resources.reason(error, "the process there")
        refused = False
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1
            with suppress(OSError):  # another thread has taken the descriptor
                accepted, _ = self._listening.accept()
                with accepted, suppress(OSError):
                    accepted.setblocking(False)
                    accepted.send(_REFUSED + why.encode())
                refused = True
        if self._spare < 0:
            with suppress(OSError):
                self._spare = os.eventfd(0)
        if not refused:
            self._loop.forget(self._listening.fileno())
            self._loop.run_later(AGAIN, self._listen_again)

    def _listen_again(self) -> None:
        """Accept connections again."""
        if self._spare < 0:
            with suppress(OSError):
                self._spare = os.eventfd(0)
        self._loop.watch(self._listening.fileno(), self._accept)

    def _end(self, connection: _Connection) -> None:
        """End a connection."""
        fd = connection.socket.fileno()
        if self._connections.pop(fd, None) is None:
            return
        self._loop.forget(fd)
        self._server.end(fd)
        _shut(connection.socket)
        if self._spare < 0:
            with suppress(OSError):
                self._spare = os.eventfd(0)

    def _look(self) -> None:
        """End the connections to processes that are stopped or dead, or shake no hands."""
        for connection in [*self._connections.values()]:
            late = not connection.welcome and monotonic() > connection.until
            if late or connection.process.is_gone():
                self._end(connection)
        self._looks = bool(self._connections)
        if self._looks:
            self._loop.run_later(_beat(), self._look)

    # --- packets

    def _receive(self, connection: _Connection) -> None:
        """Take a packet of a connection."""
        try:
            data = connection.socket.recv(HEAD.size + LIMIT + 1)
        except BlockingIOError:
            return
        except OSError:  # the peer is gone
            data = b""
        if not data:
            self._end(connection)
        elif connection.welcome:
            self._answer(connection, data)
        else:
            self._greet(connection, data)

    def _greet(self, connection: _Connection, data: bytes) -> None:
        """Compare the secrets, and show the peer that this side has it."""
        nonce = data[:_NONCE]
        if compare_digest(data[_NONCE:], _proof(self._key, b"client", connection.nonce, nonce)):
            connection.welcome = True
            proof = _proof(self._key, b"server", nonce, connection.nonce)
            self._send(connection, _WELCOME + proof)
            return
        self._server.fail()
        self._send(connection, _REFUSED + b"the secret differs, or the process is not a channel")
        self._end(connection)

    def _answer(self, connection: _Connection, data: bytes) -> None:
        """Answer a request."""
        back = self._server.reply(connection.name, connection.socket.fileno(), data)
        view = memoryview(back)
        for start in range(0, len(back), PACKET):
            more = start + PACKET < len(back)
            self._send(connection, bytes([more]) + view[start : start + PACKET])
        self._server.run_later_calls()

    def _send(self, connection: _Connection, packet: bytes) -> None:
        """Send a packet, or keep it until there is room. Meanwhile nothing is received."""
        fd = connection.socket.fileno()
        if fd < 0:  # it has ended
            return
        if not connection.waiting:
            try:
                connection.socket.send(packet)
                return
            except BlockingIOError:
                self._loop.forget(fd)
                self._loop.watch(fd, lambda: self._go_on(connection), zmq.POLLOUT)
            except ConnectionError:  # the peer is gone; what it has sent before is received first
                return
            except OSError as error:  # the rest of an answer would count as a whole one
                _log.warning("send", "A channel ends a connection: %s.", resources.reason(error))
                self._end(connection)
                return
        connection.waiting.append(packet)

    def _go_on(self, connection: _Connection) -> None:
        """Send the packets that wait, as far as there is room."""
        try:
            while connection.waiting:
                connection.socket.send(connection.waiting[0])
                connection.waiting.popleft()
        except BlockingIOError:
            return
        except OSError:
            self._end(connection)
            return
        fd = connection.socket.fileno()
        self._loop.forget(fd)
        self._loop.watch(fd, lambda: self._receive(connection))


class _Connection:
    """A connection to a listener."""

    def __init__(self, accepted: socket.socket, name: bytes) -> None:
        self.socket = accepted
        self.name = name
        self.nonce = token_bytes(_NONCE)
        self.welcome = False  # the peer has shown its secret
        self.until = monotonic() + channel_sockets.HANDSHAKE / 1e3  # of the time for that
        self.waiting = deque[bytes]()  # packets for which there was no room
        self.process = _Process(accepted)


class LinkTerms(NamedTuple):
    """What a channel gives to each of its links.

    Attributes:
        key: from the secret; empty without one.
        loop: the channel's thread.
        counts: the counters of the channel.
        drop: is called with a link that has failed while no request used it, and with its lock.
    """

    key: bytes
    loop: Loop
    counts: Counter[str]
    drop: Callable[[UnixLink], object]


class _Dialled:
    """A socket of a link, from the connect until its end.

    Attributes:
        greeted: True after the handshake.
        expected: the last packet of the handshake.
        until: the end of the time for the handshake.
        parts: the packets of an answer that have come.
    """

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.process = _Process(connected)
        self.greeted = False
        self.expected = b""
        self.until = monotonic() + channel_sockets.HANDSHAKE / 1e3
        self.parts = list[bytes]()


class UnixLink:
    """The connection of a channel to another one at a Unix socket, made again when it ends.

    One thread at a time sends and receives: the one that has ``lock``. The channel's thread shakes
    hands, and sees the end of the connection.

    Args:
        address: of the other channel.
        number: of the link.

    Attributes:
        requests: the number of the last request.
        lock: of the thread that uses the link.
        life: the present connection.
        up: whether the connection stands.
        why: why the link has failed; empty as long as it has not.
        closed: True after `close`.
        wait: milliseconds for which `send` and `receive` wait.
    """

    def __init__(self, address: str, number: int, terms: LinkTerms) -> None:
        self.address = address
        self.number = number
        self.requests = 0
        self.lock = threading.Lock()
        self.life = Peer()
        self.up = False
        self.why = ""
        self.closed = False
        self.wait = 0
        self._terms = terms
        self._ready = Condition()  # for what both threads set: `up`, `life` and the next line
        self._dialled: _Dialled | None = None

    def open(self) -> None:
        """Connect. From here on the link may be dropped.

        Raises `OSError` if no channel listens there.
        """
        self._connect()
        self._terms.loop.run_soon(self._look_later)

    def send(self, data: bytes) -> None:
        """Send a request. Raises `BlockingIOError` if it could not be sent within ``wait``."""
        standing = self._standing()
        try:
            standing.socket.send(data)
        except BlockingIOError:
            _wait_for(standing.socket, select.POLLOUT, self.wait)
            raise
        except ConnectionError:
            self._lose(standing)
            raise BlockingIOError from None
        except OSError as error:
            if error.errno in (errno.ENOBUFS, errno.ENOMEM):  # the system may soon have memory
                sleep(AGAIN / 10)
            else:
                self.why = self.why or str(error)
            raise BlockingIOError from None

    def receive(self) -> bytes:
        """Return an answer. Raises `BlockingIOError` if there is none within ``wait``."""
        standing = self._standing()
        while True:
            _wait_for(standing.socket, select.POLLIN, self.wait)
            try:
                packet = standing.socket.recv(PACKET + 2)
            except ConnectionError:
                packet = b""
            standing.parts.append(packet[1:])
            # No channel sends more bytes of an answer.
            if not packet or sum(map(len, standing.parts)) > ANSWER + BACK.size:
                self._lose(standing)
                raise BlockingIOError
            if not packet[0]:
                answer = b"".join(standing.parts)
                standing.parts.clear()
                return answer

    def close(self) -> None:
        """Close the link, whose lock the caller has."""
        self.closed = True
        self._discard()
        with self._ready:
            self._ready.notify_all()
        self.life.end()

    # --- the connection; the caller has the lock

    def _standing(self) -> _Dialled:
        """Return the socket of a connection that stands.

        Raises `BlockingIOError` if there is none within ``wait``.
        """
        dialled = self._dialled
        if dialled is not None and dialled.greeted and not self.up:
            self._lose(dialled)  # the channel's thread has found its end
        if self._dialled is None and not self.why:
            self._try_to_connect()
        with self._ready:
            self._ready.wait_for(lambda: self.up or self.why, self.wait / 1e3)
            if self._dialled is None or not self.up:
                raise BlockingIOError
            return self._dialled

    def _connect(self) -> None:
        """Connect, without waiting for the other process.

        Makes no socket if too many others wait. Raises `OSError` if no channel listens there.
        """
        made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            made.setblocking(False)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
            made.connect(self.address.removeprefix("ipc://"))
            dialled = _Dialled(made)
            dialled.process.check_user()
        except BlockingIOError:
            made.close()
            return
        except BaseException:
            made.close()
            raise
        with self._ready:
            self._dialled = dialled
        loop = self._terms.loop
        loop.run_soon(lambda: loop.watch(made.fileno(), lambda: self._see(dialled)))

    def _try_to_connect(self) -> None:
        """Connect; note why that is not possible."""
        try:
            self._connect()
        except (FileNotFoundError, ConnectionRefusedError):
            self.why = self.why or "no channel listens there"
        except OSError as error:
            self.why = self.why or resources.reason(error)

    def _lose(self, lost: _Dialled) -> None:
        """End a connection, and make another one if the other process still listens."""
        if lost is self._dialled:
            self._discard()
            self._end_life()
            if not (self.why or self.closed):
                self._try_to_connect()

    def _discard(self) -> None:
        """Close the socket, in the channel's thread, which watches it."""
        with self._ready:
            dialled = self._dialled
            self._dialled = None
        if dialled is None:
            return
        dead = dialled.socket
        with suppress(OSError):  # the other side has ended it
            dead.shutdown(socket.SHUT_RDWR)

        def close() -> None:
            self._terms.loop.forget(dead.fileno())
            dead.close()

        self._terms.loop.run_soon(close)

    # --- the channel's thread, which has no lock

    def _see(self, seen: _Dialled) -> None:
        """Take a packet of the handshake, or note the end of the connection."""
        if not seen.greeted and seen is self._dialled:
            self._shake_hands(seen)
            return
        self._terms.loop.forget(seen.socket.fileno())
        if seen is self._dialled:
            self._end_life()
            self._settle()

    def _shake_hands(self, seen: _Dialled) -> None:
        """Take a packet of the handshake."""
        try:
            packet = seen.socket.recv(PACKET)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        kind = packet[:1]
        rest = packet[1:]
        key = self._terms.key
        if kind == _HELLO and len(rest) == _NONCE and not seen.expected:
            nonce = token_bytes(_NONCE)
            seen.expected = _WELCOME + _proof(key, b"server", nonce, rest)
            with suppress(OSError):  # the next packet shows the end
                seen.socket.send(nonce + _proof(key, b"client", rest, nonce))
        elif packet and compare_digest(packet, seen.expected):
            self._begin_life(seen)
        else:
            why = "the process has just ended, or it is not a channel"
            if kind == _REFUSED:
                why = rest[:4096].decode(errors="replace")
            self._fail(f"no handshake: {why}", seen)

    def _begin_life(self, seen: _Dialled) -> None:
        """Let requesters use a connection, which receive from here on."""
        loop = self._terms.loop
        fd = seen.socket.fileno()
        loop.forget(fd)
        loop.watch(fd, lambda: self._see(seen), zmq.POLLERR)  # an end needs no interest
        with self._ready:
            if seen is self._dialled:
                seen.greeted = True
                self.up = True
                self._ready.notify_all()

    def _look_later(self) -> None:
        """Look at the other process after a moment, and again until the link is closed."""
        if not self.closed:
            self._terms.loop.run_later(_beat(), self._look)

    def _look(self) -> None:
        """End the connection if the other process is stopped or dead, or shakes no hands."""
        self._look_later()
        seen = self._dialled
        if self.closed or seen is None:
            return
        if not seen.greeted and monotonic() > seen.until:
            busy = "the process is stopped or busy, or it is not a channel"
            self._fail(f"no handshake: {busy}", seen)
        elif seen.greeted and seen.process.is_gone():
            self._end_life()
            self._settle()

    def _fail(self, why: str, seen: _Dialled) -> None:
        """Note why the link has failed."""
        self._terms.loop.forget(seen.socket.fileno())
        with self._ready:
            self.why = self.why or why
            self._ready.notify_all()
        self._settle()

    def _settle(self) -> None:
        """Make another connection, or drop the link, unless a requester has it, which then does."""
        if not self.lock.acquire(blocking=False):
            return
        try:
            if self._dialled is not None and not self.up:
                self._lose(self._dialled)
            if self.why:
                self._terms.drop(self)
        finally:
            self.lock.release()

    def _end_life(self) -> None:
        """Report the end of a connection that stood, once."""
        with self._ready:
            if not self.up:
                return
            self.up = False
            ended = self.life
            self.life = Peer()
        self._terms.counts["lost"] += 1
        ended.end()


class _Process:
    """The process at the other end of a Unix socket."""

    def __init__(self, connected: socket.socket) -> None:
        size = _CREDENTIALS.size
        data = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        pid, self._user, _ = _CREDENTIALS.unpack(data)
        self._pid = int(pid)  # 0: it cannot be seen from here
        self._began: int | None = None
        self._stopped_since = 0.0

    def check_user(self) -> None:
        """Raise `PermissionError` for a process of another user, unless either is root's."""
        users = {self._user, os.geteuid()}
        if len(users) > 1 and 0 not in users:
            raise PermissionError(errno.EPERM, f"it is a process of the user {self._user}")

    def is_gone(self) -> bool:
        """Return True if the process has ended, or has been stopped for `DEAD` milliseconds."""
        if self._pid in (0, os.getpid()):
            return False
        try:
            present = process_state(self._pid)
        except HostMemoryError:  # no descriptor is free
            return False
        if present is None:
            return True
        state, began = present
        if began != (self._began or began):
            return True
        self._began = began
        if state not in ("T", "t"):
            self._stopped_since = 0.0
            return False
        now = monotonic()
        self._stopped_since = self._stopped_since or now
        return now >= self._stopped_since + channel_sockets.DEAD / 1e3


def _shut(ended: socket.socket) -> None:
    """Close a socket, also for its peer if a fork of this process has the descriptor as well."""
    with suppress(OSError):  # the other side has ended it
        ended.shutdown(socket.SHUT_RDWR)
    ended.close()


def _bind(made: socket.socket) -> int:
    """Bind a socket, and return a descriptor of its name, which is removed.

    Raises `OSError` if no folder can have it.
    """
    failed = list[str]()
    for folder in FOLDERS:
        try:
            private = tempfile.mkdtemp(prefix="channel-", dir=folder)  # only this user may enter
        except OSError as error:
            failed.append(_refusal_of(folder, error))
            continue
        try:
            made.bind(f"{private}/socket")
            return os.open(f"{private}/socket", os.O_PATH)
        except OSError as error:
            if error.errno in resources.NONE_FREE:
                raise
            failed.append(_refusal_of(folder, error))
        finally:
            with suppress(OSError):
                os.unlink(f"{private}/socket")
            with suppress(OSError):
                os.rmdir(private)
    raise OSError(f"no folder can have its Unix socket: {', '.join(failed)}. Make one writable")


def _refusal_of(folder: str, error: OSError) -> str:
    """Return why a folder cannot have a socket, with its free bytes and files."""
    try:
        there = os.statvfs(folder)
    except OSError:
        return f"{folder} ({error.strerror})"
    free = there.f_bavail * there.f_frsize
    return f"{folder} ({error.strerror}; {free} bytes and {there.f_favail} files are free)"


def _beat() -> float:
    """Return the seconds between two looks at the process at the other end."""
    return channel_sockets.HEARTBEAT / 1e3


def _proof(key: bytes, side: bytes, *nonces: bytes) -> bytes:
    """Return what only a process with the secret can make of the nonces."""
    return blake2b(b"".join(nonces), key=key, digest_size=32, person=b"unix " + side).digest()


def _wait_for(waiting: socket.socket, event: int, milliseconds: int) -> None:
    """Wait for an event of a socket. Raises `BlockingIOError` if there is none in time."""
    poll = select.poll()
    poll.register(waiting, event)
    if not poll.poll(milliseconds):
        raise BlockingIOError
