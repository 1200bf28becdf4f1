# SPDX-License-Identifier: Apache-2.0
"""Serve requests as a model-based test of channels plans them, and name how each request ended."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

from portakv.errors import PeerError, PortaKVError, SlotError, TransferTimeout
from portakv.migrate.channel import ANSWER, LIMIT, Channel, Peer
from portakv.migrate.messages import Message
from support import waits
from support.migrate_channels import SECRET, Network

PATIENCE = waits.LIMIT  # seconds after which a request counts as hanging
#: Clauses of errors, and the ends of requests that they stand for.
ENDS = {
    "was rejected: as planned": "refuse",
    "it failed there by ZeroDivisionError": "fail",
    "its answer has": "large",
    "connections; try later": "full",
    "the connection stands": "late",
    "an earlier request still waits": "waits",
    "was cancelled": "cancelled",
    "got one that is closed": "closed",
    "the channel was closed": "closed",
    "a message has at most": "oversized",
}
#: Ends of requests that no service executes.
NEVER_EXECUTED = ("full", "waits", "cancelled", "closed", "oversized")


class Work(Message, frozen=True):
    """A request: its number, how it is to end, and the bytes of its answer."""

    number: int
    kind: str = "answer"
    size: int = 0
    padding: bytes = b""


class Done(Message, frozen=True):
    """The answer to the request of this number."""

    number: int
    data: bytes = b""


class End(NamedTuple):
    """How a request ended: by an answer to some number, or by an error."""

    kind: str
    number: int = -1


def end_of(result: Done | PortaKVError) -> End:
    """Return how a request ended; an error without a name in `ENDS` is a lost peer."""
    if isinstance(result, Done):
        return End("answer", result.number)
    assert isinstance(result, PeerError | TransferTimeout), repr(result)
    return End(next((kind for text, kind in ENDS.items() if text in str(result)), "lost"))


def work_of(number: int, kind: str, size: int) -> Work:
    """Return a request that ends in a planned way."""
    padding = bytes(LIMIT) if kind == "oversized" else b""
    return Work(number, kind, size, padding)


class Service:
    """A channel that executes requests as they say, by TCP through a network or by a Unix socket.

    It executes nothing while ``go`` is not set.
    """

    def __init__(self, made: type[Channel], by_tcp: bool) -> None:
        terms = ("tcp://127.0.0.1:0", SECRET) if by_tcp else (None, None)
        self.channel = made(terms[0], secret=terms[1])
        self.network = Network(self.channel.address) if by_tcp else None
        self.address = self.network.address if self.network else self.channel.address
        self.executed = list[int]()
        self.ends = dict[Peer, int]()  # how often the end of each peer was reported
        self.go = threading.Event()
        self.go.set()
        #: Clients that the channel serves, as far as the model knows.
        self.peers = set[Client]()
        #: Connections changed while no request was executed, so the channel may serve others.
        self.unsure = False
        self.channel.serve(Work, self.execute)

    @property
    def hung(self) -> bool:
        """Return True while the service executes nothing."""
        return not self.go.is_set()

    def execute(self, peer: Peer, work: Work) -> Done | None:
        """Answer a request as planned."""
        if peer not in self.ends:
            self.ends[peer] = 0
            peer.on_gone(lambda: self.count_end(peer))
        self.executed.append(work.number)
        assert self.go.wait(PATIENCE), "a service was left hanging"
        if work.kind == "refuse":
            raise SlotError("as planned")
        if work.kind == "fail":
            raise ZeroDivisionError
        if work.kind == "silent":
            return None
        return Done(work.number, bytes(ANSWER if work.kind == "large" else work.size))

    def count_end(self, peer: Peer) -> None:
        """Count the end of a connection."""
        self.ends[peer] += 1

    def close(self) -> None:
        """Close the channel and its network."""
        self.channel.close()
        if self.network:
            self.network.close()


class Client:
    """A channel that sends requests, and those of its requests that are under way."""

    def __init__(self, made: type[Channel], by_tcp: bool) -> None:
        self.channel = made(secret=SECRET if by_tcp else None, timeout=PATIENCE)
        self.waiting = dict[Service, tuple[Work, Future[End]]]()

    def ask(
        self,
        service: Service,
        work: Work,
        timeout: float = PATIENCE,
        stop: Callable[[], bool] = bool,
    ) -> End:
        """Send a request, and return how it ended."""
        try:
            return end_of(self.channel.ask(service.address, work, Done, timeout, stop))
        except PortaKVError as error:
            return end_of(error)


class Watch:
    """A call for the end of a connection."""

    def __init__(self, client: Client, service: Service) -> None:
        self.client = client
        self.service = service
        self.calls = 0
        self.withdrawn = False
        self.withdraw = client.channel.watch(service.address, self.count)

    def count(self) -> None:
        """Count a call."""
        self.calls += 1

    def is_right(self, over: bool) -> bool:
        """Return True if the call was made as often as it should: once after the end."""
        if self.withdrawn:
            return self.calls == 0
        return self.calls == 1 if over else self.calls <= 1
