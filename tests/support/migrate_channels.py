# SPDX-License-Identifier: Apache-2.0
"""Messages, channels and a cut network for the tests of migration's channel."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from typing import Any

import zmq
from zmq.utils import z85

from portakv.migrate.channel import Channel, Peer
from portakv.migrate.messages import Message

SECRET = b"0123456789abcdef of tests alone"


class Ping(Message, frozen=True):
    """A request."""

    data: bytes = b""


class Pong(Message, frozen=True):
    """Its answer: how many requests were carried out until now."""

    data: bytes = b""
    count: int = 0


class Server:
    """A channel that answers `Ping` and keeps their data."""

    def __init__(self, address: str | None = "tcp://127.0.0.1:0", **options: Any) -> None:
        secret = options.pop("secret", SECRET if address else None)
        self.channel = Channel(address, secret=secret, **options)
        self.peers = dict[Peer, None]()
        self.pings = list[bytes]()
        self.channel.serve(Ping, self.answer)

    def answer(self, peer: Peer, ping: Ping) -> Pong:
        self.peers[peer] = None
        self.pings.append(ping.data)
        return Pong(ping.data, len(self.pings))

    @property
    def address(self) -> str:
        return self.channel.address

    @property
    def counts(self) -> dict[str, int]:
        return self.channel.counts


@contextmanager
def server_and_asker(address: str | None = "tcp://127.0.0.1:0") -> Iterator[tuple[Server, Channel]]:
    """Yield a server, and a channel that can send it requests."""
    server = Server(address)
    asker = Channel(secret=SECRET if address else None, timeout=3.0)
    try:
        yield server, asker
    finally:
        asker.close()
        server.channel.close()


def keys(secret: bytes) -> tuple[bytes, bytes]:
    """Return the public and the private key of a secret, as the reference derives them."""
    private = z85.encode(blake2b(secret, digest_size=32, person=b"portakv-curve").digest())
    return zmq.curve_public(private), private


# The first byte of what a connection receives (ZMTP 3.1, section 2): a message of one frame.
# A greeting starts with 0xff, a command - a heartbeat, or one of the handshake - with 4 or 6.
_MESSAGE = (0, 2)


class Network:
    """Lies between askers and a TCP address. ``cut``: forwards nothing, with all connections open;
    ``eat``: so many times an answer that is to be forwarded ends the connection instead."""

    def __init__(self, address: str) -> None:
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        self._to = (host, int(port))
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listening.getsockname()[1]}"
        self.cut = threading.Event()
        self.eat = 0
        self._open = list[socket.socket]()
        self._lock = threading.Lock()
        self._closed = False
        self.quiet = threading.Event()  # until the handshake is over answers pass
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                here = self._listening.accept()[0]
                there = socket.create_connection(self._to)
                with self._lock:
                    self._open += here, there
                    if self._closed:  # while the connection was made
                        self._end()
                        return
                for pair in ((here, there, False), (there, here, True)):
                    threading.Thread(target=self._forward, args=pair, daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, back: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if back and self.eat and self.quiet.is_set() and data[0] in _MESSAGE:
                    self.eat -= 1
                    break
                if not self.cut.is_set():
                    sink.sendall(data)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._end()

    def _end(self) -> None:
        """Close all sockets. A thread that reads one returns only once it was shut down."""
        for one in (self._listening, *self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
