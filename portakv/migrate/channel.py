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
import socket
import tempfile
import threading
from asyncio import CancelledError
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from hashlib import blake2b
from hmac import compare_digest
from math import inf
from secrets import token_bytes
from struct import Struct, unpack_from
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, Union

import zmq
from msgspec.msgpack import encode
from zmq.utils import z85

from portakv.arguments import invalid, kind_of, seconds
from portakv.errors import HostMemoryError, InvalidTerms, PeerError, PortaKVError, TransferTimeout
from portakv.graph.meter import by_label
from portakv.graph.trace import Figures
from portakv.host.shared import process_state
from portakv.migrate.messages import UNDECODABLE, VERSION, Message, Refused, decoder_of, new_decoder
from portakv.runtime import resources
from portakv.runtime.bounded import Bounded
from portakv.runtime.interrupts import uninterrupted
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.runtime.resources import reason
from portakv.tasks import Handle, Limit, Runtime, TaskGroup, Wait, runtime
from portakv.tasks.runtime import HANGUP, READ, WRITE

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    """A connection to a peer.

    Attributes:
        id: random, of the peer's `Channel`.
        gone: the connection has ended.
        calls: the calls of `on_gone`.
    """

    def __init__(self, id: bytes = b"", used: Runtime | None = None) -> None:
        self.id = id
        self.gone = False
        self._runtime = used or runtime()
        self.calls = dict[object, Callable[[], object]]()
        self.link = b""  # the number by which the requester knows the connection

    def on_gone(self, call: Callable[[], object]) -> Callable[[], object]:
        """Call ``call`` once when the connection ends, immediately if it has ended.

        The call must be quick: it runs in the thread that detects the end. Returns a function that
        withdraws the call.
        """
        key = object()
        self.calls[key] = call
        if self.gone:
            self.end()
        return lambda: self.calls.pop(key, None)

    def end(self) -> None:
        """Mark the connection as ended, and make the calls of `on_gone`."""
        self.gone = True
        with self._runtime.released():
            for key in list(self.calls):
                if call := self.calls.pop(key, None):  # else another thread has made the call
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

    @property
    def context(self) -> zmq.Context[zmq.Socket[bytes]]:
        """Return the context of ZeroMQ, which is made at the first call.

        Raises `OSError` without the resources for it, for which ZeroMQ would end the process.
        """
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


def incoming(source: zmq.Socket[bytes]) -> Callable[[], Wait]:
    """Return a function that makes a wait for the next message of a socket."""
    sockets: list[tuple[Any, int]] = [(source, zmq.POLLIN)]

    def poll(milliseconds: int) -> bool:
        # It also has the socket learn of new room, without which it would drop an answer.
        return bool(zmq.zmq_poll(sockets, milliseconds))

    return partial(Wait, source.FD, READ, None, poll)


def event_of(frames: list[bytes]) -> tuple[str, int]:
    """Return the event in a message of a monitor, and its file descriptor or value."""
    event, value = unpack_from("=Hi", frames[0])
    return str(zmq.Event(event).name), int(value)


# ------------------------------------------------------------------------------------------------
# The Unix sockets of channels: one packet for each message, between processes of one user.

_limited_log = RateLimitedLog(_log)
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
    """Listens at a Unix socket that only this user reaches, and answers requests.

    Args:
        key: from the secret; empty without one.
        server: is called for each event.
        tasks: the coroutines of the channel.

    Raises `OSError` if no socket can be made.

    Attributes:
        address: where others reach the socket. It goes through this process's descriptors, so not
            even SIGKILL leaves a file.
    """

    def __init__(self, key: bytes, server: Server, tasks: TaskGroup) -> None:
        self._key = key
        self._server = server
        self._tasks = tasks
        self._connections = set[_Connection]()
        self._made = 0
        self._path = -1
        self._spare = -1  # a descriptor that is closed so that a connection can be refused
        self._pause = 0.0  # seconds before the next connection is accepted
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

    def close(self) -> None:
        """Close the socket, after its coroutines have ended."""
        with suppress(OSError):  # it does not listen
            self._listening.shutdown(socket.SHUT_RDWR)  # also for a fork that has it
        self._listening.close()
        for descriptor in (self._path, self._spare):
            if descriptor >= 0:
                os.close(descriptor)
        self._path = -1
        self._spare = -1

    # --- connections

    def next_connection(self) -> Wait:
        """Return the wait for a connection to accept."""
        if self._pause:
            return Wait(until=self._tasks.runtime.time() + self._pause)
        return Wait(self._listening.fileno())

    def accept(self) -> None:
        """Accept a connection, or refuse it if there is no descriptor for it."""
        self._pause = 0.0
        try:
            accepted, _ = self._listening.accept()
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.ECONNABORTED):
                return
            if error.errno == errno.EMFILE and resources.raise_limit():
                return
            if not self._refuse(error):
                self._pause = AGAIN
            self._find_spare()
            return
        self._made += 1
        self._tasks.start(self._serve(accepted, b"unix %d" % self._made), locked=False)

    def look(self) -> None:
        """End connections to processes that are stopped or dead, or shake no hands."""
        for connection in [*self._connections]:
            if connection.is_over():
                connection.shut_down()

    def _refuse(self, error: OSError) -> bool:
        """Tell the next peer that there is no descriptor for it; return False if there is not even
        one for that."""
        why = resources.reason(error)
        _limited_log.warning("accept", "A channel refuses a connection: %s.", why)
        why = resources.reason(error, "the process there")
        if self._spare < 0:
            return False
        os.close(self._spare)
        self._spare = -1
        try:
            accepted, _ = self._listening.accept()
        except OSError:  # another thread has taken the descriptor
            return False
        with accepted, suppress(OSError):
            accepted.setblocking(False)
            accepted.send(_REFUSED + why.encode())
        return True

    def _find_spare(self) -> None:
        if self._spare < 0:
            with suppress(OSError):
                self._spare = os.eventfd(0)

    async def _serve(self, accepted: socket.socket, name: bytes) -> None:
        """Shake hands with a peer, and answer its requests until either side ends."""
        connection = _Connection(accepted)
        fd = accepted.fileno()
        self._connections.add(connection)
        self._server.begin(fd)
        try:
            if await self._shake_hands(connection):
                connection.late = inf
                while data := await connection.receive():
                    await connection.send_parts(self._server.reply(name, fd, data))
        except ConnectionError:  # the peer is gone
            return
        finally:
            self._server.end(fd)
            self._connections.discard(connection)
            connection.close(self._tasks.runtime)
            self._find_spare()

    async def _shake_hands(self, connection: _Connection) -> bool:
        """Compare the secrets, and show the peer that this side has it."""
        own = token_bytes(_NONCE)
        await connection.send(_HELLO + own)
        data = await connection.receive()
        if not data:
            return False
        nonce = data[:_NONCE]
        if compare_digest(data[_NONCE:], _proof(self._key, b"client", own, nonce)):
            await connection.send(_WELCOME + _proof(self._key, b"server", nonce, own))
            return True
        self._server.fail()
        await connection.send(_REFUSED + b"the secret differs, or the process is not a channel")
        return False


class _Connection:
    """A Unix connection between two processes, as either of them has it.

    Attributes:
        late: the time at which the handshake is late.
    """

    def __init__(self, made: socket.socket) -> None:
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        self.socket = made
        data = made.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, self._user, _ = _CREDENTIALS.unpack(data)
        self._pid = int(pid)  # 0: it cannot be seen from here
        self._began: int | None = None
        self._stopped_since = 0.0
        self.late = monotonic() + HANDSHAKE / 1e3
        self._parts = list[bytes]()  # the packets of an answer that have come

    async def receive(self, until: float | None = None) -> bytes | None:
        """Return a packet; no bytes if the peer is gone, None if none comes in time."""
        while await Wait(self.socket, READ, until):
            try:
                return self.socket.recv(HEAD.size + LIMIT + 1)
            except BlockingIOError:
                continue
            except OSError:  # of the peer, or this side has closed the socket
                return b""
        return None

    async def receive_parts(self, until: float) -> bytes | None:
        """Return what `send_parts` has sent; no bytes if the peer is gone, None if it has not come
        in time."""
        while packet := await self.receive(until):
            self._parts.append(packet[1:])
            if sum(map(len, self._parts)) > ANSWER + BACK.size:  # no channel sends as much
                return b""
            if not packet[0]:
                answer = b"".join(self._parts)
                self._parts.clear()
                return answer
        return packet

    async def send_parts(self, back: bytes) -> None:
        """Send an answer in one packet or several; nothing if it is empty."""
        for start in range(0, len(back), PACKET):
            more = start + PACKET < len(back)
            await self.send(bytes([more]) + back[start : start + PACKET])

    async def send(self, packet: bytes) -> None:
        """Send a packet, once there is room. Raises `ConnectionError` if the peer gets no more."""
        while True:
            try:
                self.socket.send(packet)
                return
            except BlockingIOError:
                await Wait(self.socket, WRITE)
            except ConnectionError:  # what the peer has sent before is received first
                return
            except OSError as error:  # the rest of an answer would count as a whole one
                why = resources.reason(error)
                _limited_log.warning("send", "A channel ends a connection: %s.", why)
                raise ConnectionResetError(why) from None

    def is_over(self) -> bool:
        """Return True if the other process is stopped or dead, or has shaken no hands in time."""
        return monotonic() > self.late or self.is_gone()

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

    def shut_down(self) -> None:
        """End the connection, also for its peer if a fork of this process has it as well."""
        with suppress(OSError):  # the other side has ended it
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self, used: Runtime) -> None:
        """End the connection, and close its descriptor."""
        if used.runs_here:
            used.started().descriptors.forget(self.socket.fileno())
        self.shut_down()
        self.socket.close()


class _Link:
    """The connection of a channel to another one, made again when it ends.

    The coroutine `keep` makes and watches it. One request at a time, which has acquired ``queue``,
    sends and receives.

    Args:
        address: of the other channel.
        number: of the link.

    Attributes:
        requests: the number of the last request.
        queue: of the requests.
        life: the present connection.
        up: whether the connection stands.
        why: why the link has failed; empty as long as it has not.
        closed: True after `close`.
    """

    def __init__(self, address: str, number: int, runtime: Runtime, counts: Counter[str]) -> None:
        self.address = address
        self.number = number
        self.requests = 0
        self.queue = Limit(runtime)
        self.life = Peer(used=runtime)
        self.up = False
        self.why = ""
        self.closed = False
        self.keeper: Handle[None] | None = None
        self._counts = counts
        self._runtime = runtime
        self._requester: Wait | None = None  # of a request that waits for a change

    async def changed(self, until: float) -> None:
        """Wait until the connection begins or ends, or the link fails."""
        self._requester = Wait(until=until)
        await self._requester

    def note_change(self) -> None:
        """Wake the request that waits for a change."""
        if self._requester is not None:
            self._requester.wake()

    def begin_life(self) -> None:
        """Let requests use the connection."""
        self.up = True
        self.note_change()

    def end_life(self) -> None:
        """Report the end of a connection that stood."""
        if self.up:
            self.up = False
            ended = self.life
            self.life = Peer(used=self._runtime)
            self.note_change()
            self._counts["lost"] += 1
            ended.end()

    def close(self) -> None:
        """Close the link; `keep` closes its socket."""
        self.why = self.why or "it is gone"
        self.closed = True
        if self.keeper is not None:
            self.keeper.cancel()
        self.note_change()
        self.life.end()


class UnixLink(_Link):
    """The connection to a Unix socket.

    Args:
        key: from the secret; empty without one.

    Raises `OSError` if no channel listens there.
    """

    def __init__(
        self, address: str, number: int, runtime: Runtime, counts: Counter[str], key: bytes
    ) -> None:
        super().__init__(address, number, runtime, counts)
        self._key = key
        self._connection: _Connection | None = self._connected()

    def _connected(self) -> _Connection | None:
        """Return a connection; None if too many others wait for the other process."""
        made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            made.setblocking(False)
            made.connect(self.address.removeprefix("ipc://"))
            connection = _Connection(made)
            connection.check_user()
        except BlockingIOError:
            made.close()
            return None
        except BaseException:
            made.close()
            raise
        return connection

    async def keep(self) -> None:
        """Connect again after each end of the connection, until that fails."""
        while not self.why:
            try:
                await self._live()
                if not self.why:
                    self._connection = self._connected()
            except (FileNotFoundError, ConnectionRefusedError):
                self.why = self.why or "no channel listens there"
            except OSError as error:
                self.why = self.why or resources.reason(error)

    async def _live(self) -> None:
        """Shake hands, and wait for the end of the connection."""
        connection = self._connection
        if connection is None:
            await Wait(until=self._runtime.time() + AGAIN / 10)
            return
        try:
            self.why = await self._shake_hands(connection)
            if not self.why:
                self.begin_life()
                fd = connection.socket.fileno()
                while not await Wait(fd, HANGUP, self._runtime.time() + _beat()):
                    if connection.is_gone():
                        break
        finally:
            # A request may wait for the socket; its wait ends, and it takes another one.
            self._connection = None
            connection.close(self._runtime)
            self.end_life()

    async def _shake_hands(self, connection: _Connection) -> str:
        """Return why the handshake failed; empty if it did not."""
        packet = await connection.receive(connection.late)
        if packet is not None and packet[:1] == _HELLO and len(packet) == 1 + _NONCE:
            nonce = token_bytes(_NONCE)
            expected = _WELCOME + _proof(self._key, b"server", nonce, packet[1:])
            with suppress(OSError):  # the next packet shows the end
                connection.socket.send(nonce + _proof(self._key, b"client", packet[1:], nonce))
            packet = await connection.receive(connection.late)
            if packet is not None and compare_digest(packet, expected):
                return ""
        if packet is None:
            why = "the process is stopped or busy, or it is not a channel"
        elif packet[:1] == _REFUSED:
            why = packet[1:4097].decode(errors="replace")
        else:
            why = "the process has just ended, or it is not a channel"
        return f"no handshake: {why}"

    async def send(self, data: bytes, until: float) -> bool:
        """Send a request; return False if it could not be sent."""
        connection = self._connection
        if connection is None or not self.up:
            await self.changed(until)
            return False
        try:
            connection.socket.send(data)
            return True
        except BlockingIOError:
            await Wait(connection.socket, WRITE, until)
        except ConnectionError:
            await self.changed(until)
        except OSError as error:
            if error.errno in (errno.ENOBUFS, errno.ENOMEM):  # the system may soon have memory
                await Wait(until=self._runtime.time() + AGAIN / 10)
            else:
                self.why = self.why or str(error)
        return False

    async def receive(self, until: float) -> bytes | None:
        """Return an answer; None if there is none yet."""
        connection = self._connection
        if connection is not None and self.up:
            answer = await connection.receive_parts(until)
            if answer or answer is None:
                return answer
            connection.shut_down()
        await self.changed(until)
        return None


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


# ------------------------------------------------------------------------------------------------
# The requests that a channel sends: one connection for each address, and a number each.

T = TypeVar("T")
#: Milliseconds between a requester's checks of its connection.
LOOK = 20


class TcpLink(_Link):
    """The connection to an address of TCP, by ZeroMQ, which connects again by itself."""

    def __init__(
        self,
        address: str,
        number: int,
        runtime: Runtime,
        counts: Counter[str],
        used: zmq.Socket[bytes],
    ) -> None:
        super().__init__(address, number, runtime, counts)
        self._socket = used
        # Use a separate name: pyzmq's name is its descriptor's, which is reused before it is free.
        self._monitor = used.get_monitor_socket(addr=f"inproc://{number}")
        self._answer = b""
        self._patience = 0  # milliseconds for which the socket waits for an answer
        self._fd: int = used.FD
        self._monitor_fd: int = self._monitor.FD
        used.connect(address)

    async def keep(self) -> None:
        """Follow the events of the connection, until it fails."""
        try:
            while not self.why:
                self._look()
                await Wait(self._monitor_fd)
        finally:
            self.end_life()
            await self._close_socket()

    async def _close_socket(self) -> None:
        """Close the socket after the present request, which may wait in ZeroMQ, in its thread."""
        unused = False
        while not unused:
            with suppress(CancelledError):  # the channel is closed meanwhile
                unused = await self.queue.acquire(priority="urgent")
        for fd in (self._fd, self._monitor_fd):
            self._runtime.started().descriptors.forget(fd)
        self._socket.disable_monitor()
        self._socket.close(0)
        self.queue.release()

    def _look(self) -> None:
        """Process the events that have come. Also a request does, if the loop is busy."""
        while self._monitor.poll(0):
            self._see(*event_of(self._monitor.recv_multipart()))

    def _see(self, event: str, value: int) -> None:
        if event == "HANDSHAKE_SUCCEEDED":
            self.begin_life()
        elif event == "DISCONNECTED":
            self.end_life()
        elif event == "CLOSED":
            self.why = "no channel listens there"
        elif event.startswith("HANDSHAKE_FAILED"):
            why = "the secret differs, the process has just ended, or it is not a channel"
            if value == errno.EAGAIN:  # nothing came in `HANDSHAKE` milliseconds
                why = "the process is stopped or busy, or it is not a channel"
            self.why = f"no handshake: {why}"

    async def send(self, data: bytes, until: float) -> bool:
        """Send a request; return False if it could not be sent."""
        if self.closed:
            return False
        try:
            self._socket.send(data, zmq.NOBLOCK)
            return True
        except zmq.Again:
            await Wait(self._fd, READ, until)
            return False

    async def receive(self, until: float) -> bytes | None:
        """Return an answer; None if there is none yet."""
        if not self.closed and await Wait(self._fd, READ, until, self._take):
            return self._answer
        if not self.up and not self.closed:
            self._look()
        return None

    def _take(self, milliseconds: int) -> bool:
        """Take an answer; return False if none comes in so many milliseconds."""
        if milliseconds and milliseconds != self._patience:
            self._patience = milliseconds
            self._socket.rcvtimeo = milliseconds
        try:
            self._answer = self._socket.recv(0 if milliseconds else zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True


Link: TypeAlias = TcpLink | UnixLink


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
        why = f"{_printable(back[BACK.size :])}."
        raise Refused(f"{what} was rejected: {why}", why)
    try:
        answer: T = decoder_of(kind).decode(memoryview(back)[BACK.size :])
        return answer
    except UNDECODABLE:
        raise PeerError(
            f"{what} got an answer that is not valid. Use one release on both sides."
        ) from None


def _log_failure(error: BaseException) -> None:
    """Log the error that ended a coroutine of a channel."""
    _log.error("A channel failed at a message, and goes on.", exc_info=error)


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


class Server:
    """The connections of others to a channel, whose thread answers them after `listen`.

    Attributes:
        address: where others reach the channel.

    Args:
        sockets: makes the sockets.
        tasks: the coroutines of the channel.
        address: where to listen, as in `Channel`.
        counts: the counters of the channel.
    """

    def __init__(
        self, sockets: Sockets, tasks: TaskGroup, address: str | None, counts: Counter[str]
    ) -> None:
        self.address = address or "a Unix socket"
        self._sockets = sockets
        self._tasks = tasks
        self._counts = counts
        self._unix: UnixListener | None = None
        self._router: zmq.Socket[bytes] | None = None
        self._seen: zmq.Socket[bytes] | None = None
        self._peers = dict[bytes, Peer]()
        self._fds = dict[int, bytes]()  # the names of connections, by their descriptors
        # Connections that ended without a valid message.
        self._other_secrets = 0  # failed handshakes whose connections have not ended yet
        self._strangers = Counter[str]()  # by their warning
        # The functions that answer requests, by the kind of message.
        self._services = dict[type, Callable[..., Message | None]]()
        self._decoder = new_decoder(None)
        # The number and the answer of each link's last request, because the next connection may
        # repeat it. Of older answers only the numbers stay, so their requests are executed at most
        # once.
        self._last: Bounded[bytes, tuple[int, bytes]] = Bounded("answers of a channel", 2 * PEERS)
        self._cached = 0  # bytes of answers

    def serve(self, kind: type[T], answer: Callable[[Peer, T], Message | None]) -> None:
        """Answer a kind of message by a function, with a decoder that knows the kind."""
        with self._tasks.runtime.lock:
            self._services[kind] = answer
            self._decoder = new_decoder(Union[tuple(self._services)])  # noqa: UP007

    def listen(self, address: str | None) -> None:
        """Listen, and start to answer what comes. Runs in a step.

        Raises `PeerError` if nothing can listen there, or if descriptors, a thread or a folder are
        missing.
        """
        try:
            if address:
                self._listen_by_tcp(address)
            else:
                self._unix = UnixListener(self._sockets.key, self, self._tasks)
                self.address = self._unix.address
                self._repeat(self._unix.next_connection, self._unix.accept)
                self._repeat(self._next_beat, self._unix.look)
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

    def _listen_by_tcp(self, address: str) -> None:
        router = self._router = self._sockets.server(address)
        self._seen = router.get_monitor_socket(_EVENTS)
        # ZeroMQ asks the channel for the permission of each connection.
        zap: zmq.Socket[bytes] = self._sockets.context.socket(zmq.REP)
        zap.bind("inproc://zeromq.zap.01")
        router.bind(address)
        self.address = router.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        if re.match(r"tcp://(0\.0\.0\.0|\[::(ffff:0\.0\.0\.0)?\])", self.address):
            raise OSError("that is every interface")
        self._repeat(incoming(router), partial(self._take, router))
        self._repeat(incoming(self._seen), self._see)
        self._repeat(incoming(zap), partial(self._admit, zap))

    def _repeat(self, wait: Callable[[], Wait], process: Callable[[], object]) -> None:
        """Start a coroutine that waits and processes again and again. One peer's message must not
        stop the others'."""

        async def repeat() -> None:
            while True:
                await wait()
                try:
                    process()
                except Exception as error:
                    _log_failure(error)

        self._tasks.start(repeat(), locked=False)

    def _next_beat(self) -> Wait:
        return Wait(until=self._tasks.runtime.time() + _beat())

    def statistics(self) -> dict[str, int]:
        """Return the connections now, and the bytes of cached answers."""
        return {"peers": len(self._peers), "kept_bytes": self._cached}

    def close(self) -> None:
        """End all connections, after the loop was stopped."""
        for peer in tuple(self._peers.values()):
            peer.end()
        if self._router is not None:
            self._router.disable_monitor()
        if self._unix is not None:
            self._unix.close()

    # --- connections

    def _admit(self, zap: zmq.Socket[bytes]) -> None:
        """Accept a connection that has the secret's keys, and reject any other."""
        requests = zap.recv_multipart()
        key = z85.decode(self._sockets.keys[0])
        well = b"200" if requests[5:] == [b"CURVE", key] else b"400"
        zap.send_multipart([b"1.0", requests[1], well, b"", b"", b""])

    def _see(self) -> None:
        """Process all events of TCP connections that have come."""
        while self._seen is not None and self._seen.poll(0):
            event, value = event_of(self._seen.recv_multipart())
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
        self._other_secrets += 1

    def end(self, fd: int) -> None:
        """Note the end of a connection, and warn of connections that never sent a valid message."""
        name = self._fds.pop(fd, b"")
        if peer := self._peers.pop(name, None):
            peer.end()
        if name:
            self._counts["gone"] += 1
            return
        self._counts["strangers"] += 1
        warning = NO_MESSAGE
        if self._other_secrets:
            self._other_secrets -= 1
            warning = OTHER_SECRET
        self._strangers[warning] += 1
        n = self._strangers[warning]
        if n & (n - 1) == 0:  # the 1st, 2nd, 4th, 8th, ...
            _log.warning(warning, self.address, n)

    def peer(self, name: bytes, fd: int, id: bytes) -> Peer | None:
        """Return the peer of a first message; None if the connection is over, or one too many."""
        self._see()
        if fd not in self._fds or len(self._peers) >= PEERS:
            return None
        self._fds[fd] = name
        self._peers[name] = Peer(id, self._tasks.runtime)
        return self._peers[name]

    # --- requests

    def _take(self, router: zmq.Socket[bytes]) -> None:
        """Answer one request by TCP."""
        # Frame by frame: the calls for messages of several frames ask the socket about each.
        name = router.recv()
        frame = router.recv(copy=False)
        if frame.more:  # no channel sends messages of several frames
            while frame.more:
                frame = router.recv(copy=False)
            self._counts["size"] += 1
            self._cut(frame.get(zmq.SRCFD))
            return
        fd = -1 if name in self._peers else frame.get(zmq.SRCFD)
        back = self.reply(name, fd, frame.bytes)
        if back:
            router.send(name, zmq.SNDMORE)
            router.send(back)

    def _cut(self, fd: int) -> None:
        """End a connection that no channel made."""
        self._see()
        if fd not in self._fds:
            return
        # OSError: the connection has ended already.
        with suppress(OSError), socket.socket(fileno=os.dup(fd)) as connection:
            connection.shutdown(socket.SHUT_RDWR)

    def reply(self, name: bytes, fd: int, data: bytes) -> bytes:
        """Return the answer to a request of a connection; no bytes if there is none."""
        if not HEAD.size <= len(data) <= HEAD.size + LIMIT:
            self._counts["size"] += 1
            return b""
        version, id, _, number = HEAD.unpack_from(data)
        peer = self._peers.get(name) or self.peer(name, fd, id)
        if version != VERSION:
            why = f"release of version {VERSION}, not {version}"
            back = self._refused(number, "version", why)
        elif peer is None:
            why = f"it serves {PEERS} connections; try later"
            back = self._refused(number, "full", why)
        elif peer.id != id:
            back = self._refused(number, "schema", "the connection is another channel's")
        elif number:
            back = self._execute_once(peer, data, number)
        else:
            back = self._execute(peer, data, number)
        return back if number else b""

    def _execute_once(self, peer: Peer, data: bytes, number: int) -> bytes:
        """Execute a request unless it is a repeat, and return what is sent back."""
        link = data[1:21]
        last, back = self._last.get(link, (0, b""))
        if number <= last:
            self._counts["repeated"] += 1
            return back if number == last else b""
        back = self._execute(peer, data, number)
        if peer.link != link:  # one answer of a connection is cached
            self._drop_answer(peer.link)
            peer.link = link
        self._cache(link, number, back)
        return back

    def _cache(self, link: bytes, number: int, back: bytes) -> None:
        """Cache an answer as the youngest, and at most `KEPT` bytes of all answers."""
        self._drop_answer(link)
        self._last.pop(link, None)
        if len(self._last) == self._last.limit:  # the oldest is evicted
            self._drop_answer(next(iter(self._last)))
        self._last[link] = number, back
        self._cached += len(back)
        for older in [*self._last] if self._cached > KEPT else ():
            self._drop_answer(older)
            if self._cached <= KEPT:
                return

    def _drop_answer(self, link: bytes) -> None:
        """Keep only the number of a link's last answer."""
        number, back = self._last.get(link, (0, b""))
        if back:
            self._cached -= len(back)
            self._last[link] = number, b""

    def _execute(self, peer: Peer, data: bytes, number: int) -> bytes:
        """Execute a request, and return what is sent back, which says what the sender may know."""
        try:
            message = self._decoder.decode(memoryview(data)[HEAD.size :])
        except UNDECODABLE:
            return self._refused(number, "schema", "the message is not known there")
        try:
            answer = self._services[type(message)](peer, message)
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
        """Count a rejection, and return it for the sender."""
        self._counts[reason] += 1
        return BACK.pack(VERSION, True, number) + why.encode()


__all__ = ["Channel", "Peer"]


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
        self.closed = False
        self._runtime = runtime()
        self._tasks = TaskGroup(self._runtime, _log_failure)
        self._users = dict[str, object]()  # the owner, the reader and others of this channel
        self._server = Server(self._sockets, self._tasks, address, self.counts)
        self._links = dict[str, Link]()  # by the addresses of the other channels
        self._made = 0  # links
        uninterrupted(partial(self._start, address), undo=lambda _: self.close())

    def _start(self, address: str | None) -> None:
        """Listen, and start the loop."""
        try:
            resources.raise_limit_if_few()
            try:
                self._runtime.started(PeerError)
            except OSError as error:
                raise PeerError(
                    f"Expected a descriptor for a channel, but {resources.reason(error)}."
                ) from None
            with self._runtime.lock:
                self._server.listen(address)
        except PeerError:
            self._end_here()
            raise
        self.address = self._server.address
        atexit.register(self.close)

    def __repr__(self) -> str:
        return f"Channel({self.address!r})"

    @property
    def forked(self) -> bool:
        """Return True in a process that was forked from the one that made the channel."""
        return self._runtime.process.forked

    def serve(self, kind: type[T], answer: Callable[[Peer, T], Message | None]) -> None:
        """Answer messages of ``kind`` by ``answer`` from now on.

        The call runs in the loop of this process and must be quick, since no channel answers
        meanwhile. None sends no answer. The peer gets the error that ``answer`` raises. What the
        call passes to `Runtime.call_soon` follows the answer, and does not delay it.
        """
        uninterrupted(partial(self._server.serve, kind, answer))

    def claim(self, kind: str, user: object, replaces: bool = False) -> object | None:
        """Register the only ``kind`` of this channel, because peers know it by the channel alone.

        ``replaces``: in place of another, which the call returns. Raises `InvalidTerms` if the
        channel has another, and `PeerError` if the channel is not open.
        """
        register = partial(self._register, kind, user, replaces)
        return uninterrupted(register, undo=lambda _: self.free(kind, user))

    def check_open(self) -> None:
        """Raise `PeerError` after `close`, and in a forked process."""
        if self.closed or self._runtime.process.forked:
            gone = "is closed"
            if self._runtime.process.forked:
                gone = "belongs to the process that this one was forked from"
            raise PeerError(f"Expected a channel that is open, got one that {gone}. Make another.")

    def _register(self, kind: str, user: object, replaces: bool) -> object | None:
        """Check that the channel is open, register a user, and return the one before."""
        self.check_open()
        before = self._users.get(kind)
        if before is not None and before is not user and not replaces:
            raise InvalidTerms(
                f"Expected a channel without {kind}, got {self}. Close the first, or make a "
                f"channel."
            )
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
        stop: Callable[[], bool] | None = None,
    ) -> T:
        """Return the answer of the channel at ``address`` to a message.

        If the connection breaks, the next connection repeats the request, which is executed at most
        once. Ends early if ``stop()`` returns True.

        Raises:
            PeerError: the peer cannot be reached, is gone or rejects, or the secret differs.
            TransferTimeout: the peer is there, and did not answer in time.

        If the caller is interrupted, the connection stays usable, and the answer is dropped.
        """
        answer: T = self._runtime.run(self.answer, address, message, kind, timeout, stop)
        return answer

    async def answer(
        self,
        address: str,
        message: Message,
        kind: type[T],
        timeout: float | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> T:
        """Return what `ask` returns, in a coroutine of the runtime."""
        back = await self._exchange(address, message, self._until(timeout), stop, answer=True)
        return answer_of(back, address, message, kind)

    def ask_all(
        self, requests: Sequence[tuple[str, Message]], kind: type[T], timeout: float | None = None
    ) -> list[T | PortaKVError]:
        """Return the result or the error of `ask` for each of several requests.

        All addresses get their first request together. An address with several requests gets the
        next one after it has answered.
        """
        return self._runtime.run(self.answers, requests, kind, timeout)

    async def answers(
        self, requests: Sequence[tuple[str, Message]], kind: type[T], timeout: float | None = None
    ) -> list[T | PortaKVError]:
        """Return what `ask_all` returns, in a coroutine of the runtime."""
        until = self._until(timeout)

        async def result_of(address: str, message: Message) -> T | PortaKVError:
            try:
                back = await self._exchange(address, message, until, answer=True)
                return answer_of(back, address, message, kind)
            except PortaKVError as error:
                return error

        return await self._runtime.together([result_of(*request) for request in requests])

    def tell(
        self,
        address: str,
        message: Message,
        timeout: float | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> None:
        """Send a message without an answer, unless ``stop()`` returns True before it is sent; raise
        as `ask`."""
        self._runtime.run(self.send, address, message, timeout, stop)

    async def send(
        self,
        address: str,
        message: Message,
        timeout: float | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> None:
        """Send a message as `tell` does, in a coroutine of the runtime."""
        await self._exchange(address, message, self._until(timeout), stop, answer=False)

    def watch(self, address: str, gone: Callable[[], object]) -> Callable[[], object]:
        """Call ``gone`` when the connection to ``address`` ends; see `Peer.on_gone`."""

        def watch() -> Callable[[], object]:
            with self._runtime.lock:
                life = self._link(address).life
            return life.on_gone(gone)

        return uninterrupted(watch, undo=lambda take_back: take_back())

    def statistics(self) -> dict[str, int]:
        """Return the connections now, from and to other channels, and the counters."""
        return {**self._server.statistics(), "links": len(self._links), **self.counts}

    def figures(self) -> Figures:
        """Return figures by the names of metrics."""
        counts = self.statistics()
        events = counts.keys() - {"peers", "links", "kept_bytes"}
        return {
            "channel_peers": [{"value": counts["peers"]}],
            "channel_links": [{"value": counts["links"]}],
            "channel_answers_bytes": [{"value": counts["kept_bytes"]}],
            "channel_events_total": by_label("event", counts, sorted(events)),
        }

    def close(self) -> None:
        """End all connections; requests in flight raise `PeerError`."""
        if not self._runtime.process.forked:
            uninterrupted(self._end_here)

    def _end_here(self) -> None:
        """End all connections, and wait for that, except in the loop itself; no longer end them at
        the end of the interpreter."""
        atexit.unregister(self.close)
        if self._runtime.runs_here:
            self._runtime.start(self._end())
        else:
            self._runtime.run(self._end)

    async def _end(self) -> None:
        """Drop all connections, and close the sockets after the coroutines have ended."""
        if self.closed:
            return
        self.closed = True
        for link in tuple(self._links.values()):
            link.why = link.why or "the channel was closed"
            self._drop(link)
        await self._tasks.close()
        self._server.close()
        with self._runtime.released():
            self._sockets.close()

    def _until(self, timeout: float | None) -> float:
        """Return the time at which a request ends that starts now."""
        if timeout is None:
            return monotonic() + self.timeout
        if type(timeout) is float and timeout <= 0.0:  # the caller's own time is over
            return monotonic()
        return monotonic() + seconds("timeout", timeout)

    # --- requests

    async def _exchange(
        self,
        address: str,
        message: Message,
        until: float,
        stop: Callable[[], bool] | None = None,
        *,
        answer: bool,
    ) -> bytes:
        """Send a message, and return the bytes of the answer, if one is expected."""
        what = f"{message.purpose} {address}"
        body = encode(message)
        by = None
        if len(body) > LIMIT:
            raise PeerError(f"{what} has {len(body)} bytes; a message has at most {LIMIT}.")
        link = await self._acquire(address, until, what)
        try:
            link.requests += answer
            number = link.requests * answer
            data = HEAD.pack(VERSION, self.id, link.number, number) + body
            while True:
                self._check(link, until, what, stop)
                pause = min(until, self._runtime.time() + LOOK / 1e3)
                # Repeat after the next connection stands: before, the old one may take the message.
                if by is not (life := link.life) and (link.up or by is None):
                    if not await link.send(data, pause):
                        continue
                    by = life
                if not answer:
                    return b""
                back = await link.receive(pause)
                if back is not None:
                    back = back.ljust(BACK.size, b"\0")
                    if back[0] != VERSION or BACK.unpack_from(back)[2] == number:
                        return back
        finally:
            link.queue.release()

    async def _acquire(self, address: str, until: float, what: str) -> Link:
        """Return the link to an address for one request, which releases its queue.

        A link that an earlier request closed, such as one with less time, is replaced.
        """
        while True:
            link = self._link(address)
            if not await link.queue.acquire(until=until):
                raise TransferTimeout(
                    f"{what} was not sent: an earlier request still waits for its answer."
                )
            if not link.closed:
                return link
            link.queue.release()

    def _check(self, link: Link, until: float, what: str, stop: Callable[[], bool] | None) -> None:
        """Raise the error of a link's connection; after its end the next request makes another."""
        stopped = False
        if stop is not None:
            with self._runtime.released():
                stopped = stop()
        if stopped:
            raise TransferTimeout(f"{what} was cancelled, because nothing waits for its answer.")
        late = self._runtime.time() > until
        if late and link.up and not link.why:
            raise TransferTimeout(f"{what} got no answer in time; the connection stands.")
        if late or link.why:
            why = link.why or "no connection in time"
            self._drop(link)
            raise PeerError(f"{what} failed: {why}. Check that the process there runs.")

    def _link(self, address: str) -> Link:
        """Return the link to an address, made at the first request. Runs in a step.

        Raises `PeerError` if no channel can be there.
        """
        try:
            self.check_open()
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

    def _new_link(self, address: str) -> Link:
        local = re.match("ipc://(/.+)", address)
        if "\0" in address or not (local or (self._sockets.keys and NUMERIC.match(address))):
            raise OSError(
                "expected ipc:// of this host or, with a secret, tcp:// with a numeric address "
                "and a port"
            )
        if local and os.stat(local[1]).st_uid != os.getuid():
            raise OSError("another user listens there")
        self._made += 1
        terms = (address, self._made, self._runtime, self.counts)
        link: Link
        if local:
            link = UnixLink(*terms, self._sockets.key)
        else:
            used = self._sockets.client(address)
            try:
                link = TcpLink(*terms, used)
            except BaseException:
                used.close(0)
                raise
        self._links[address] = link
        link.keeper = self._tasks.start(self._keep(link))
        return link

    async def _keep(self, link: Link) -> None:
        """Keep a link until it fails."""
        try:
            await link.keep()
        finally:
            self._drop(link)

    def _drop(self, link: Link) -> None:
        """Close a link."""
        if not link.closed:
            self._links.pop(link.address, None)
            link.close()


# ------------------------------------------------------------------------------------------------
# The part of a channel that a transport's lane uses, for one agreement between two sides.


class TransportChannel:
    """A channel that sends the messages of one agreement with an owner, and none after its end.

    A reader that connects again counts its slices from 1 again. A message that a thread of the
    agreement before wanted to send would then name a slice of this one. The channel looks at
    ``ended`` while it has the connection, immediately before it sends. An agreement that is marked
    as ended before the next handshake is sent therefore sends nothing after that handshake.

    Args:
        channel: the channel of the reader.
        ended: returns the error of a message once the agreement has ended; None before.
        enclosed: returns the message that carries a message; None: each carries itself.
    """

    def __init__(
        self,
        channel: Channel,
        ended: Callable[[], PeerError | None],
        enclosed: Callable[[Message], Message] | None = None,
    ) -> None:
        self.channel = channel
        self.id = channel.id
        self.address = channel.address
        self.timeout = channel.timeout
        self.watch = channel.watch
        self._ended = ended
        self._enclosed = enclosed or (lambda message: message)

    def ask(
        self,
        address: str,
        message: Message,
        kind: type[T],
        timeout: float | None = None,
        stop: Callable[[], bool] = bool,
    ) -> T:
        """Return the owner's answer; see `Channel.ask`. Raises `PeerError` after the end."""
        answer: T = runtime().run(self.answer, address, message, kind, timeout, stop)
        return answer

    async def answer(
        self,
        address: str,
        message: Message,
        kind: type[T],
        timeout: float | None = None,
        stop: Callable[[], bool] = bool,
    ) -> T:
        """Return what `ask` returns, in a coroutine of the runtime."""

        def stops() -> bool:
            return self._ended() is not None or stop()

        with self._end_as_error():
            return await self.channel.answer(address, self._enclosed(message), kind, timeout, stops)

    def tell(self, address: str, message: Message, timeout: float | None = None) -> None:
        """Send a message without an answer; see `Channel.tell`. Raises `PeerError` after the
        end."""
        with self._end_as_error():
            self.channel.tell(
                address, self._enclosed(message), timeout, lambda: self._ended() is not None
            )

    @contextmanager
    def _end_as_error(self) -> Iterator[None]:
        """Raise the error of the agreement's end in place of that of a message that it stopped."""
        try:
            yield
        except TransferTimeout:
            error = self._ended()
            if error is not None:
                raise error from None
            raise
