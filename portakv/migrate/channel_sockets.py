# SPDX-License-Identifier: Apache-2.0
"""The TCP sockets of a channel: ZeroMQ with CURVE keys; the limits of what all sockets carry."""

from __future__ import annotations

import errno
import os
import threading
from struct import Struct, unpack_from

import zmq

from portakv.runtime import resources

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
