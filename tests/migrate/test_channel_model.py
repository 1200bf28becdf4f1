# SPDX-License-Identifier: Apache-2.0
"""Compare channels with a simple model, by any order of calls that Hypothesis draws.

Requests are answered, refused, too large or never answered; services hang; connections break;
clients and services come and go. Each request ends once, by its own answer or by an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine
from support.channel_model import (
    NEVER_EXECUTED,
    PATIENCE,
    Client,
    Done,
    End,
    Service,
    Watch,
    Work,
    end_of,
    work_of,
)
from support.waits import until

from portakv.migrate import channel as channel_client
from portakv.migrate.channel import Channel, Peer

KEPT = 4000  # bytes of all cached answers of a channel
PEERS = 2  # clients of a channel
SHORT = 0.04  # seconds of a request that gets no answer
AT = st.integers(0, 99)
KINDS = ("answer", "answer", "answer", "refuse", "fail", "large", "oversized")
ANSWERED = st.sampled_from(KINDS)
KIND = st.sampled_from((*KINDS, "silent"))
SIZE = st.sampled_from((0, 10, 1500))


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give channels a few peers, little memory and fast heartbeats."""
    monkeypatch.setattr(channel_client, "KEPT", KEPT)
    monkeypatch.setattr(channel_client, "PEERS", PEERS)
    monkeypatch.setattr(channel_client, "HEARTBEAT", 200)
    monkeypatch.setattr(channel_client, "DEAD", 1000)
    # Failures are planned; without the log they take no time.
    monkeypatch.setattr(logging.getLogger(channel_client.__name__), "disabled", True)


class ChannelMachine(RuleBasedStateMachine):
    """Clients and services, whose requests are counted."""

    def __init__(self, made: type[Channel], cuts: list[int], patience: float) -> None:
        super().__init__()
        self.patience = patience  # seconds of a request that is to be answered
        self.made = made
        self.cuts = cuts  # how many cuts of a network are left; each takes a second
        self.pool = ThreadPoolExecutor(4)
        self.by_tcp = False
        self.clients = list[Client]()
        self.services = list[Service]()
        self.closed = list[Service]()
        self.watches = list[Watch]()
        self.numbers = 0
        self.never = set[int]()  # requests that no service may execute

    @initialize(by_tcp=st.booleans())
    def begin(self, by_tcp: bool) -> None:
        """Open a service, and one client more than it serves."""
        self.by_tcp = by_tcp
        self.open_service()
        for _ in range(PEERS + 1):
            self.open_client()

    @precondition(lambda self: len(self.services) < 2)
    @rule()
    def open_service(self) -> None:
        """Open a service, perhaps at the address of an earlier one."""
        self.services.append(Service(self.made, self.by_tcp))
        self.listens_at(self.services[-1].address)

    @precondition(lambda self: len(self.clients) <= PEERS)
    @rule()
    def open_client(self) -> None:
        """Open a client."""
        self.clients.append(Client(self.made, self.by_tcp))
        self.listens_at(self.clients[-1].channel.address)

    def listens_at(self, address: str) -> None:
        """Forget a closed service whose address another channel has got."""
        self.closed = [each for each in self.closed if each.address != address]

    # --- requests

    def new(self, kind: str, size: int = 0) -> Work:
        """Return a request with a new number."""
        self.numbers += 1
        return work_of(self.numbers, kind, size)

    @property
    def held(self) -> bool:
        """Return True while a service hangs: it holds the loop, which is that of all channels."""
        return any(service.hung for service in self.services)

    def is_full(self, client: Client, service: Service) -> bool:
        """Return True if a service has no room for a client."""
        return client not in service.peers and len(service.peers) >= PEERS

    def ends(self, client: Client, service: Service, work: Work, stop: bool) -> tuple[str, ...]:
        """Return the ways in which a request may end."""
        if work.kind == "oversized":
            return ("oversized",)
        if service in self.closed:
            return ("lost", "cancelled") if stop else ("lost",)
        if service in client.waiting:
            return ("waits",)
        if stop:
            return ("cancelled",)
        if self.held:
            return "late", "lost"
        own = ("late", "lost") if work.kind == "silent" else (work.kind,)
        if self.is_full(client, service):
            own = ("full", *(own if service.unsure or work.kind == "silent" else ()))
        # After a break the service may not know yet who is gone, nor the client.
        return (*own, "full", "lost") if service.unsure else own

    def judge(self, client: Client, service: Service, work: Work, end: End, stop: bool) -> None:
        """Compare how a request ended with the model, and remember what follows from it."""
        ends = self.ends(client, service, work, stop)
        assert end.kind in ends, f"{work.kind} ended as {end.kind}; expected {ends}"
        assert end.number in (-1, work.number), "a request got the answer to another"
        if end.kind in NEVER_EXECUTED:
            self.never.add(work.number)
        elif end.kind not in ("late", "lost"):
            assert work.number in service.executed, "a request was answered, and not executed"
        if service in self.closed or end.kind in ("oversized", "waits", "cancelled", "full"):
            return
        if self.held or end.kind == "lost":
            service.unsure = service.unsure or client not in service.peers
        elif not self.is_full(client, service):
            service.peers.add(client)

    def timeout(self, client: Client, service: Service, work: Work) -> float:
        """Return the seconds of a request: few if no answer is expected."""
        quick = work.kind == "silent" or self.held or service in client.waiting
        return SHORT if quick else self.patience

    @precondition(lambda self: self.clients)
    @rule(by=AT, to=AT, kind=KIND, size=SIZE, stop=st.sampled_from((False, False, False, True)))
    def ask(self, by: int, to: int, kind: str, size: int, stop: bool) -> None:
        """Send a request, and wait for its end."""
        client = self.clients[by % len(self.clients)]
        services = self.services + self.closed[-1:]
        if not services:
            return
        service = services[to % len(services)]
        work = self.new(kind, size)
        end = client.ask(service, work, self.timeout(client, service, work), lambda: stop)
        self.judge(client, service, work, end, stop)

    @precondition(lambda self: self.clients and self.services)
    @rule(by=AT, several=st.lists(st.tuples(AT, ANSWERED), min_size=1, max_size=4))
    def ask_all(self, by: int, several: list[tuple[int, str]]) -> None:
        """Send several requests together."""
        client = self.clients[by % len(self.clients)]
        services = self.services + self.closed[-1:]
        if self.held or not services:
            return
        sent = [(services[to % len(services)], self.new(kind)) for to, kind in several]
        requests = [(service.address, work) for service, work in sent]
        results = client.channel.ask_all(requests, Done, self.patience)
        assert len(results) == len(sent)
        for (service, work), result in zip(sent, results, strict=True):
            self.judge(client, service, work, end_of(result), False)

    @precondition(lambda self: self.clients and self.services)
    @rule(by=AT, to=AT)
    def tell(self, by: int, to: int) -> None:
        """Send a message without an answer; the next request of the client follows it."""
        client = self.clients[by % len(self.clients)]
        service = self.services[to % len(self.services)]
        if self.held or service.unsure or client not in service.peers:
            return
        work = self.new("answer")
        client.channel.tell(service.address, work)
        self.judge(
            client,
            service,
            last := self.new("answer"),
            client.ask(service, last, self.patience),
            False,
        )
        assert service.executed[-2:] == [work.number, last.number]

    # --- services that hang

    @precondition(lambda self: self.clients and self.services)
    @rule(by=AT, to=AT, kind=st.sampled_from(("answer", "refuse", "fail")))
    def hang(self, by: int, to: int, kind: str) -> None:
        """Let a service hang in a request; other clients get no answer, from no service."""
        client = self.clients[by % len(self.clients)]
        service = self.services[to % len(self.services)]
        if self.held or service.unsure or self.is_full(client, service):
            return
        service.go.clear()
        work = self.new(kind)
        client.waiting[service] = work, self.pool.submit(client.ask, service, work, self.patience)
        assert until(lambda: work.number in service.executed, PATIENCE), "a request was lost"
        service.peers.add(client)
        for other in service.peers - {client}:
            late = self.new("answer")
            self.judge(other, service, late, other.ask(service, late, SHORT), False)

    def collect(self, service: Service, *also: str) -> None:
        """Take the ends of the requests in which a service hung."""
        for client in self.clients:
            if service in client.waiting:
                work, future = client.waiting.pop(service)
                end = future.result(PATIENCE)
                assert end.kind in (work.kind, *also), f"{work.kind} ended as {end.kind}"
                assert end.number in (-1, work.number), "a request got the answer to another"

    @precondition(lambda self: self.services)
    @rule()
    def go_on(self) -> None:
        """Let services go on that hang; late answers are not those to the next requests."""
        for service in self.services:
            if service.hung:
                service.go.set()
                self.collect(service)
                self.settle(service)
                for client in service.peers.intersection(self.clients):
                    work = self.new("answer")
                    end = client.ask(service, work, self.patience)
                    self.judge(client, service, work, end, False)

    def settle(self, service: Service) -> None:
        """Wait until a service knows which clients are gone."""
        if not service.unsure:
            peers = service.channel.statistics
            assert until(lambda: peers()["peers"] == len(service.peers), PATIENCE), peers()

    # --- ends of connections

    @precondition(lambda self: self.clients and self.services)
    @rule(by=AT, to=AT, withdraw=st.booleans())
    def watch(self, by: int, to: int, withdraw: bool) -> None:
        """Watch a connection, and perhaps no longer."""
        client = self.clients[by % len(self.clients)]
        service = self.services[to % len(self.services)]
        if client in service.peers and service not in client.waiting:
            watch = Watch(client, service)
            if withdraw:
                watch.withdrawn = True
                watch.withdraw()
            self.watches.append(watch)

    def check_watches(self) -> None:
        """Check that each end of a connection was reported once."""
        for watch in self.watches:
            over = watch.client not in self.clients or watch.service not in self.services
            assert until(lambda x=watch, o=over: x.is_right(o), self.patience), (
                f"{watch.calls} calls"
            )

    @precondition(lambda self: self.clients)
    @rule(at=AT)
    def close_client(self, at: int) -> None:
        """Close a client; its requests end, and no further one is sent. A loop that is held goes on
        meanwhile."""
        client = self.clients.pop(at % len(self.clients))
        closing = self.pool.submit(client.channel.close)
        held = [service for service in self.services if service.hung]
        for service in held:
            service.go.set()
        closing.result(PATIENCE)
        assert client.channel.statistics()["links"] == 0
        for work, future in client.waiting.values():
            assert future.result(PATIENCE).kind in ("closed", "lost", work.kind), work.kind
        for service in held:
            self.collect(service)
        for service in self.services:
            assert client.ask(service, self.new("answer")).kind == "closed"
            self.never.add(self.numbers)
            service.peers.discard(client)
            service.unsure = service.unsure or service in held
            self.settle(service)
        self.check_watches()

    @precondition(lambda self: self.services)
    @rule(at=AT)
    def close_service(self, at: int) -> None:
        """Close a service; the requests in which it hangs end."""
        service = self.services[at % len(self.services)]
        if self.held and not service.hung:
            return  # it closes when the loop goes on
        self.services.remove(service)
        closing = self.pool.submit(service.close)
        service.go.set()
        closing.result(PATIENCE)
        self.collect(service, "lost")
        for client in self.clients:
            # The client drops its connection before another service can have this address.
            left = {x for x in self.services if client in x.peers}
            links = client.channel.statistics
            assert until(lambda s=links, n=left: s()["links"] <= len(n) + 1)
            assert client.ask(service, self.new("answer")).kind == "lost"
        self.closed.append(service)
        self.check_watches()
        assert until(lambda: all(n == 1 for n in service.ends.values())), service.ends

    @precondition(lambda self: self.by_tcp and self.services)
    @rule(at=AT, to=AT, cut=st.booleans())
    def lose(self, at: int, to: int, cut: bool) -> None:
        """Break a connection with an answer on its way, or cut the network."""
        service = self.services[to % len(self.services)]
        clients = [x for x in self.clients if x in service.peers]
        if self.held or not clients:
            return
        client = clients[at % len(clients)]
        network = service.network
        assert network is not None
        if cut and self.cuts[0]:
            self.cuts[0] -= 1
            network.cut.set()
            assert client.ask(service, self.new("answer"), SHORT).kind in ("late", "lost")
            self.never.add(self.numbers)
            ended = [x for x in self.watches if x.service is service and x.client in clients]
            assert until(lambda: all(x.is_right(True) for x in ended), PATIENCE), "a silent peer"
            assert until(lambda: service.channel.statistics()["peers"] == 0, PATIENCE)
            network.cut.clear()
            service.peers.clear()
            service.unsure = True
            return
        network.quiet.set()
        network.eat = 1
        work = self.new("answer")
        full = len(service.peers) >= PEERS
        repeated = service.channel.counts["repeated"]
        end = client.ask(service, work, self.patience)
        unsure = ("full", "lost") if service.unsure else ("full",) if full else ()
        assert end.kind in ("answer", *unsure), end.kind
        assert end.number in (-1, work.number), "a request got the answer to another"
        # An unsure service may have answered that it is full, and not have taken the request.
        if end.kind == "answer" and not network.eat and not service.unsure:
            assert service.channel.counts["repeated"] > repeated, "a repeat is not counted"
        network.eat = 0
        network.quiet.clear()
        service.unsure = True  # it may serve the client before it sees the end of the connection

    @invariant()
    def every_request_is_executed_once_at_most(self) -> None:
        """Check what has been executed, and the memory of the services."""
        for service in self.services + self.closed:
            assert len({*service.executed}) == len(service.executed), "a request was repeated"
            assert not self.never & {*service.executed}, "a request without a chance was executed"
        for service in self.services:
            statistics = service.channel.statistics()
            assert statistics["kept_bytes"] <= KEPT
            assert statistics["peers"] <= PEERS

    def teardown(self) -> None:
        """Close everything: all ends are reported once."""
        try:
            self.go_on()
            while self.services:
                self.close_service(0)
            while self.clients:
                self.close_client(0)
        finally:
            for service in self.services:
                service.go.set()
            for channel in [x.channel for x in self.clients] + [x.channel for x in self.services]:
                channel.close()
            self.pool.shutdown()


def run(made: type[Channel], examples: int, cuts: int = 0, patience: float = PATIENCE) -> None:
    """Run the machine with channels of a class."""
    left = [cuts]
    machine: Any = lambda: ChannelMachine(made, left, patience)  # noqa: E731
    # Connections of an example that failed are not those of its repetition: do not shrink.
    terms = settings(max_examples=examples, stateful_step_count=25, phases=[Phase.generate])
    run_machine(machine, settings=terms)


@pytest.mark.parametrize(
    ("examples", "cuts"), [(8, 1), pytest.param(600, 40, marks=pytest.mark.full)]
)
def test_any_order_of_requests(examples: int, cuts: int) -> None:
    run(Channel, examples, cuts)


# --- the machine finds channels with a bug


class Repeating(Channel):
    """A channel that numbers every request of a connection alike."""

    def _link(self, address: str) -> Any:
        link = super()._link(address)
        link.requests = 0
        return link


class Forgetful(Channel):
    """A channel that reports no end of a connection."""

    def watch(self, address: str, gone: Callable[[], object]) -> Callable[[], object]:
        return super().watch(address, int)


class Hoarding(Channel):
    """A channel that caches every answer, and serves every client."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._server.__class__ = _EveryPeer


class _EveryPeer(channel_client.Server):
    def peer(self, name: bytes, fd: int, id: bytes) -> Peer | None:
        peer = super().peer(name, fd, id)
        if peer is None and fd in self._fds:
            peer = self._peers[name] = Peer(id)
            self._fds[fd] = name
        return peer


@pytest.mark.parametrize("made", [Repeating, Forgetful, Hoarding])
def test_the_machine_finds_a_channel_with_a_bug(made: type[Channel]) -> None:
    with pytest.raises((AssertionError, Flaky)):
        run(made, 60, patience=1.0)
