# SPDX-License-Identifier: Apache-2.0
"""The sockets of a channel: ZeroMQ with CURVE keys, and the limits of what they carry."""

from __future__ import annotations

from struct import Struct, unpack_from

import zmq

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
        self.context = zmq.Context()
        self.context.max_sockets = 4096  # three sockets for each link
        self.context.rcvhwm = 0  # for monitors: a full monitor would stop ZeroMQ's own thread

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
        self.context.destroy(0)


def event_of(monitor: zmq.Socket[bytes]) -> tuple[str, int]:
    """Return the next event of a monitor, and its file descriptor or value."""
    event, value = unpack_from("=Hi", monitor.recv_multipart()[0])
    return str(zmq.Event(event).name), int(value)
