# SPDX-License-Identifier: Apache-2.0
"""The control channel carries messages of owners, readers and transports, and detects dead peers.

It uses Unix sockets on a host and, between hosts, ZeroMQ with CURVE keys that a secret gives.
Messages have schemas and limits; nothing is unpickled.
"""

from __future__ import annotations

import atexit
import errno
import logging
import os
import re
import select
import socket
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from functools import partial
from hashlib import blake2b
from hmac import compare_digest
from math import ceil
from secrets import token_bytes
from struct import Struct, unpack_from
from time import monotonic, sleep
from typing import Any, NamedTuple, TypeAlias, TypeVar, Union

import zmq
from msgspec.msgpack import encode
from zmq.utils import z85

from portakv.arguments import invalid, kind_of, seconds
from portakv.errors import HostMemoryError, InvalidTerms, PeerError, PortaKVError, TransferTimeout
from portakv.host.shared import process_state
from portakv.migrate.figures import Figures, channel_figures
from portakv.migrate.messages import UNDECODABLE, VERSION, Message, Refused, decoder_of, new_decoder
from portakv.runtime import resources
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import this_process
from portakv.runtime.interrupts import Condition, abandoned, alongside, uninterrupted
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.runtime.resources import reason

# ------------------------------------------------------------------------------------------------
# Check the address and the secret of a channel, and make its keys.

#: Addresses of other hosts are numeric: a name would block ZeroMQ's only thread in a resolver.
NUMERIC = re.compile(r"tcp://([0-9.]{7,15}|\[[0-9a-fA-F:.%]+[0-9a-zA-Z]*\]):([0-9]{1,5})")


def too_short(secret: object) -> str:
    """Return the error text for a secret that is too short; empty if it serves."""
    got = f"a secret of {len(secret)}" if isinstance(secret, bytes | str) else kind_of(secret)
    if isinstance(secret, str) and not secret.isascii():
        with suppress(UnicodeEncodeError):  # a lone surrogate has no UTF-8
            secret = secret.encode()
        if isinstance(secret, str):  # the codec's error contains the text
            return "Expected a secret that UTF-8 can hold, got a text that it cannot. Pass bytes."
    if isinstance(secret, bytes | str) and len(secret) >= 16:
        return ""
    return f"Expected a secret of 16 bytes or more, got {got}. Pass secrets.token_bytes(32)."


def check_address(address: str | None, secret: bool) -> None:
    """Raise `InvalidTerms` for an address at which no channel can listen."""
    if address is None:
        return
    example = "Pass None, or one such as 'tcp://10.0.0.1:0'."
    expected = "None, or tcp:// with a numeric address or an interface and a port of 0 to 65535"
    if not isinstance(address, str) or not address.startswith("tcp://"):
        raise invalid("address", expected, address, example)
    numeric = NUMERIC.fullmatch(address)
    port = address.rpartition(":")[2]
    interface = re.fullmatch(r"tcp://[A-Za-z0-9_.*-]{1,255}:[0-9]{1,5}", address)
    if not (numeric or interface) or int(port) > 65535:
        raise invalid("address", expected, address, example)
    if not secret:
        raise InvalidTerms(
            f"Expected a secret with {address}, got none. Pass secret=, as TCP connections are "
            f"always encrypted."
        )


def keys_of(secret: bytes | str) -> tuple[bytes, ...]:
    """Return the public and the private key that a secret gives."""
    secret_bytes = secret.encode() if isinstance(secret, str) else secret
    key = z85.encode(blake2b(secret_bytes, digest_size=32, person=b"portakv-curve").digest())
    return zmq.curve_public(key), key


# ------------------------------------------------------------------------------------------------
# A connection between two channels, as one side of it sees the other.

_log = logging.getLogger(__name__)


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


# ------------------------------------------------------------------------------------------------
# The TCP sockets of a channel: ZeroMQ with CURVE keys; the limits of what all sockets carry.

#: The most bytes of a request and of an answer; messages that wait in one connection; answers and
#: requests that wait for the other end of one connection.
LIMIT = 64 << 10
ANSWER = 1 << 20
QUEUED = 64
WAITING = 4
#: Milliseconds between heartbeats; until a silent connection is dead; for a handshake.
HEARTBEAT = 1000
DEAD = 3000
HANDSHAKE = 5000
#: Descriptors and threads that the start of a context takes, and some that others may take.
_DESCRIPTORS = 16
_THREADS = 2
#: Bytes that CURVE and `HEAD` add to a message.
_ADDED = 256
HEAD = Struct("!B16sIQ")  # version, channel, its connection, number of the request (0: no answer)
BACK = Struct("!B?Q")  # version, True if the text of a rejection follows, number of the request


class Sockets:
    """Makes the sockets of one channel, all with its keys and limits.

    Args:
        keys: the public and the secret key of CURVE, or none.
    """

    def __init__(self, keys: tuple[bytes, ...]) -> None:
        self.keys = keys
        self.key = keys[1] if keys else b""
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._lock = threading.Lock()

    @property
    def context(self) -> zmq.Context[zmq.Socket[bytes]]:
        """Return the context of ZeroMQ, which is made at the first call.

        Raises `OSError` without the resources for it, for which ZeroMQ would end the process.
        """
        with self._lock:
            if self._context is None:
                self._context = started_context()
                self._context.rcvhwm = 0  # for monitors: a full one would stop ZeroMQ's own thread
            return self._context

    def server(self, address: str) -> zmq.Socket[bytes]:
        """Return a socket that will listen at an address."""
        made = self._made(zmq.ROUTER, address)
        made.sndhwm = WAITING  # of answers: each requester has one
        made.rcvhwm = QUEUED
        made.maxmsgsize = LIMIT + _ADDED
        if self.keys:
            made.curve_server = True
            made.zap_domain = b"portakv"
        return made

    def client(self, address: str) -> zmq.Socket[bytes]:
        """Return a socket that will connect to an address."""
        made = self._made(zmq.DEALER, address)
        made.sndhwm = QUEUED
        made.rcvhwm = WAITING
        made.maxmsgsize = ANSWER + _ADDED
        made.immediate = True  # no send waits for a connection
        made.reconnect_ivl = 50
        if self.keys:
            made.curve_serverkey = self.keys[0]
        return made

    def _made(self, kind: int, address: str) -> zmq.Socket[bytes]:
        made: zmq.Socket[bytes] = self.context.socket(kind)
        made.linger = 0
        made.ipv6 = "[" in address
        made.heartbeat_ivl = HEARTBEAT
        made.heartbeat_timeout = DEAD
        made.handshake_ivl = HANDSHAKE
        if self.keys:
            made.curve_publickey, made.curve_secretkey = self.keys
        return made

    def close(self) -> None:
        """Close all sockets."""
        with self._lock:
            if self._context is not None:
                self._context.destroy(0)


def started_context() -> zmq.Context[zmq.Socket[bytes]]:
    """Return a context of ZeroMQ whose threads run.

    ZeroMQ ends the process by SIGABRT if it has no descriptor or no thread at the start of a
    context, and at no later time for TCP. Raises `OSError` instead.
    """
    resources.raise_limit_if_few()
    try:
        made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    except zmq.ZMQError as error:
        raise OSError(error.errno, str(error)) from None
    made.max_sockets = 4096  # a channel has three for each link
    threads = [threading.Thread(target=bool, daemon=True) for _ in range(_THREADS)]
    try:
        for thread in threads:
            thread.start()
    except RuntimeError:
        made.term()
        raise OSError(errno.EAGAIN, resources.NO_THREAD) from None
    for thread in threads:
        thread.join()
    # Nothing lies between the check and the start: other threads take descriptors, too.
    if resources.free(_DESCRIPTORS) == _DESCRIPTORS:
        made.socket(zmq.PAIR).close()
        return made
    made.term()
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def event_of(monitor: zmq.Socket[bytes]) -> tuple[str, int]:
    """Return the next event of a monitor, and its file descriptor or value."""
    event, value = unpack_from("=Hi", monitor.recv_multipart()[0])
    return str(zmq.Event(event).name), int(value)


# ------------------------------------------------------------------------------------------------
# The thread of a channel, which waits for its sockets.


class Loop:
    """A thread that calls a function when a socket has something to receive.

    Attributes:
        stopped: True from the call of `stop` on.

    Raises `PeerError` if the process has no descriptor left.
    """

    def __init__(self) -> None:
        resources.raise_limit_if_few()
        self.stopped = False
        self._poller = zmq.Poller()
        self._calls = dict[object, Callable[[], object]]()
        self._soon = deque[Callable[[], object]]()
        self._timers = list[tuple[float, Callable[[], object]]]()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="portakv channel", daemon=True)
        try:
            self._wake = os.eventfd(0)
        except OSError as error:
            raise PeerError(
                f"Expected a descriptor for a channel, but {resources.reason(error)}."
            ) from None
        self.watch(self._wake, self._run_soon)

    @property
    def runs_here(self) -> bool:
        """Return True in the thread itself."""
        return self._thread.ident == threading.get_ident()

    def start(self) -> None:
        """Start the thread. Raises `PeerError` if the system gives no more."""
        resources.start_thread(self._thread, PeerError)

    def watch(
        self, socket: zmq.Socket[bytes] | int, call: Callable[[], object], events: int = zmq.POLLIN
    ) -> None:
        """Call ``call`` in the thread each time something can be received, or at other events of
        ZeroMQ's poller.

        Runs in the thread, or before `start`.
        """
        self._calls[socket] = call
        self._poller.register(socket, events)

    def forget(self, socket: zmq.Socket[bytes] | int) -> None:
        """Watch a socket no longer, if it is watched. Runs in the thread."""
        if self._calls.pop(socket, None) is not None:
            self._poller.unregister(socket)

    def run_soon(self, call: Callable[[], object]) -> None:
        """Make a call in the thread. Any thread may ask for it.

        After `stop` the calling thread makes it.
        """
        with self._lock:  # the descriptor is closed under it
            if not self.stopped:
                self._soon.append(call)
                os.eventfd_write(self._wake, 1)
                return
        call()

    def run_later(self, seconds: float, call: Callable[[], object]) -> None:
        """Make a call in the thread after so many seconds. Runs in the thread, or before `start`.

        Does nothing after `stop`.
        """
        self._timers.append((monotonic() + seconds, call))

    def stop(self) -> bool:
        """End the thread, if it runs, and wait for that. Return False if it was stopped before."""
        with self._lock:
            if self.stopped:
                return False
            self.stopped = True
            os.eventfd_write(self._wake, 1)
        if self._thread.ident is not None:
            self._thread.join()
        self._drain()  # what the thread has not run
        os.close(self._wake)
        return True

    def _run(self) -> None:
        while not self.stopped:
            for ready, _ in self._poller.poll(self._pause()):
                if ready in self._calls:  # else an earlier call of this round has ended its watch
                    self._make(self._calls[ready])
            now = monotonic()
            for timer in [each for each in self._timers if each[0] <= now]:
                self._timers.remove(timer)
                self._make(timer[1])

    def _pause(self) -> int | None:
        """Return the milliseconds until the next timer; None without one."""
        if not self._timers:
            return None
        return max(0, int(1e3 * (min(due for due, _ in self._timers) - monotonic())) + 1)

    def _make(self, call: Callable[[], object]) -> None:
        """Make a call, and log its error."""
        try:
            call()
        except Exception:  # one peer's message must not stop the others'
            _log.exception("A channel failed at a message, and goes on.")

    def _run_soon(self) -> None:
        """Make the calls that other threads requested."""
        os.eventfd_read(self._wake)
        self._drain()

    def _drain(self) -> None:
        """Make the calls, in their order."""
        while self._soon:
            self._make(self._soon.popleft())


# ------------------------------------------------------------------------------------------------
# The Unix sockets of channels: one packet for each message, between processes of one user.

_logger = logging.getLogger(__name__)
_limited_log = RateLimitedLog(_logger)
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

    def __init__(self, key: bytes, server: Server, loop: Loop) -> None:
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
        _limited_log.warning("accept", "A channel refuses a connection: %s.", why)
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
                _limited_log.warning(
                    "send", "A channel ends a connection: %s.", resources.reason(error)
                )
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
        self.until = monotonic() + HANDSHAKE / 1e3  # of the time for that
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
        self.until = monotonic() + HANDSHAKE / 1e3
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
        return now >= self._stopped_since + DEAD / 1e3


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
    return HEARTBEAT / 1e3


def _proof(key: bytes, side: bytes, *nonces: bytes) -> bytes:
    """Return what only a process with the secret can make of the nonces."""
    return blake2b(b"".join(nonces), key=key, digest_size=32, person=b"unix " + side).digest()


def _wait_for(waiting: socket.socket, event: int, milliseconds: int) -> None:
    """Wait for an event of a socket. Raises `BlockingIOError` if there is none in time."""
    poll = select.poll()
    poll.register(waiting, event)
    if not poll.poll(milliseconds):
        raise BlockingIOError


# ------------------------------------------------------------------------------------------------
# The requests that a channel sends: one connection for each address, and a number each.

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


# ------------------------------------------------------------------------------------------------
# The requests that a channel answers: who may connect, and each request once.

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


__all__ = ["Channel", "Peer"]
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
