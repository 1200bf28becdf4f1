# SPDX-License-Identifier: Apache-2.0
"""An interrupt at any line of migration leaves no hang, no lock, no claim and no descriptor."""

from __future__ import annotations

import gc
import secrets
import sys
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from support.interrupts import by_width, files_of, in_other_thread, orphans, reach, settles
from support.migrate_channels import SECRET, Ping, Pong, Server
from support.migrate_pulls import MODEL, SMALL, Rows
from support.migrate_pulls import sides as late_sides
from support.waits import LIMIT, until

from portakv.errors import PeerError, PortaKVError
from portakv.migrate import (
    Channel,
    Offer,
    Owner,
    Pull,
    Reader,
    Shard,
    Ticket,
    open_shared,
    rendezvous,
    share,
    shared_empty,
)
from portakv.migrate.reader import LatePull
from portakv.migrate.transports import TRANSPORTS
from portakv.migrate.transports.distributed import ChannelStore
from portakv.weights import (
    Parameter,
    open_model,
    prepare_weights,
    publish,
    pull_weights,
    share_model,
)
from portakv.weights.owner import Published
from portakv_examples.channel_transport import ChannelTransport

FILES = files_of("migrate", "weights", "graph", "tasks", "runtime/interrupts.py")
Steps = Generator[Callable[[], object], None, None]
MINUTE = timedelta(seconds=60)


def channels(folder: Path) -> Steps:
    """A channel sends requests and messages, watches, and closes, while it serves others."""
    server = Server()
    made = list[Channel]()

    def act() -> None:
        channel = Channel(secret=SECRET, timeout=LIMIT)
        made.append(channel)
        channel.serve(Ping, server.answer)
        channel.claim("a reader", act)
        stop = channel.watch(server.address, list)
        channel.ask(server.address, Ping(b"1"), Pong)
        channel.ask_all([(server.address, Ping(b"2")), (channel.address, Ping())], Pong)
        channel.tell(server.address, Ping(b"3"))
        stop()
        channel.free("a reader", act)
        channel.statistics()
        repr(channel)
        channel.close()

    yield act
    asker = Channel(secret=SECRET, timeout=LIMIT)
    assert in_other_thread(lambda: asker.ask(server.address, Ping(b"4"), Pong)).data == b"4"
    for channel in made:
        with suppress(PeerError):  # it is closed
            in_other_thread(partial(channel.ask, server.address, Ping(b"5"), Pong))
        in_other_thread(channel.close)
    in_other_thread(asker.close)
    in_other_thread(server.channel.close)


def judge(there: Channel, here: Channel, owner: Owner, reader: Reader, rows: Rows) -> None:
    """An offer is pulled between the same sides; nothing is held afterwards, and all close."""

    def again() -> bool:
        offer = owner.offer([7, 3], tokens=32)
        reader.pull(offer.ticket, [5], timeout=LIMIT).synchronize(LIMIT)
        return offer.taken(LIMIT)

    assert in_other_thread(again), "an offer is held"
    retained = in_other_thread(owner.statistics)["held"]
    in_other_thread(owner.revoke_all)
    assert retained <= 1, "offers have no handle"
    for one in (reader, owner, here, there):
        in_other_thread(one.close)


def sides(**terms: Any) -> tuple[Channel, Channel, Owner, Reader, Rows]:
    there = Channel(timeout=LIMIT)
    here = Channel(timeout=LIMIT)
    remote = Rows()
    local = Rows(8, 32, fill=-1)
    owner = Owner(there, remote.shard, model=MODEL, **terms)
    return there, here, owner, Reader(here, local.shard, model=MODEL), local


def making(folder: Path) -> Steps:
    """An owner and a reader are made and closed."""
    there = Channel(timeout=LIMIT)
    here = Channel(timeout=LIMIT)
    remote = Rows()
    local = Rows(8, 32, fill=-1)
    made = list[Any]()

    def act() -> None:
        owner = Owner(there, Shard(remote.view), model=MODEL)
        made.append(owner)
        reader = Reader(here, Shard(local.view), model=MODEL)
        made.append(reader)
        owner.reallocate(Shard(remote.view))
        offer = owner.offer([1, 2], tokens=20)
        reader.explain(offer.ticket)
        reader.close()
        owner.close()

    yield act
    for one in reversed(made):
        in_other_thread(one.close)
    assert settles(lambda: free(there, "an owner")), "the channel has an owner"
    assert settles(lambda: free(here, "a reader")), "the channel has a reader"
    in_other_thread(here.close)
    in_other_thread(there.close)


def free(channel: Channel, kind: str) -> bool:
    """Return True if a channel can be claimed."""
    user = object()
    try:
        channel.claim(kind, user)
    except PortaKVError:
        return False
    return channel.free(kind, user)


def mapped(folder: Path) -> Steps:
    """Offers are pulled through a mapping, revoked, and waited for."""
    there, here, owner, reader, local = sides()

    def act() -> None:
        assert reader.finished_fd() >= 0
        assert owner.finished_fd() >= 0
        reader.prepare(owner.channel.address).synchronize(LIMIT)
        offer = owner.offer([7, 3, 11], tokens=40)
        pull = reader.pull(offer.ticket, [6, 1], by_layer=True, verify=True)
        pull.layers[0].synchronize(LIMIT)
        while not pull.done():
            time.sleep(0.01)
        offer.taken(LIMIT)
        second = owner.offer([1], tokens=16, lease=LIMIT)
        assert second.state == "held"
        second.revoke()
        owner.statistics()
        third = owner.offer([1], tokens=16, lease=1.0)
        stopped = reader.pull(third.ticket, [2], max_gbps=1e-5)
        stopped.cancel()
        assert not pull.statistics.cancelled
        third.taken(0.0)
        third.revoke()  # else a later interrupt leaves two offers
        short = reader.pull(owner.offer([1], tokens=16).ticket, [3])
        short.synchronize(LIMIT)
        fourth = owner.offer([1], tokens=16)
        fourth.extend(20.0)
        reader.extend(fourth.ticket, 20.0)
        owner.revoke(fourth.ticket)
        name = secrets.token_bytes(16)
        owner.offer([1], tokens=16, name=name)
        by_name = Ticket.of(owner.channel.address, owner.epoch, name)
        reader.pull(by_name, [4], timeout=LIMIT).synchronize(LIMIT)
        owner.revoke(by_name)
        written = owner.offer([1], tokens=16, progress="layers")
        follows = reader.pull(written.ticket, [4], by_layer=True, timeout=LIMIT)
        written.raise_to(1)
        assert written.mark == 1
        written.raise_to(2)
        follows.layers[1].synchronize(LIMIT)
        follows.synchronize(LIMIT)
        owner.finished()
        assert short.ended
        assert short.error is None
        reader.finished()
        reader.statistics()
        owner.revoke_all()

    yield act
    judge(there, here, owner, reader, local)


def staged(folder: Path) -> Steps:
    """An offer is pulled through staging buffers."""
    there, here, owner, reader, local = sides(expose="staging", staging=SMALL)

    def act() -> None:
        offer = owner.offer([7, 3, 11], tokens=40)
        pull = reader.pull(offer.ticket, [6, 1], timeout=LIMIT)
        pull.wait()
        offer.taken(LIMIT)

    yield act
    judge(there, here, owner, reader, local)


def weights(folder: Path) -> Steps:
    """Weights are published and pulled, and memory is shared."""
    there = Channel(timeout=LIMIT)
    here = Channel(timeout=LIMIT)
    retained = shared_empty((4, 8), torch.float32).fill_(3)
    module = torch.nn.Linear(4, 8).share_memory()
    made = list[Published]()

    def act() -> None:
        part = Parameter.split(retained, 0, [4], (0, 1))
        published = publish(there, {"a": retained, "b": part})
        made.append(published)
        into = {"a": torch.zeros(4, 8), "b": torch.zeros(4, 8)}
        into["b"] = into["a"]
        prepare_weights(here, published.ticket, into)
        pull_weights(here, published.ticket, into)
        pull_weights(here, published.ticket, into, wait=False).synchronize(LIMIT)
        model = share_model(module)
        open_model(torch.nn.Linear(4, 8), model.data)
        model.close()
        small = shared_empty(8, torch.int16)
        open_shared(share(small))
        published.changed()
        published.close()

    yield act
    for published in made:
        in_other_thread(published.close)

    def again() -> bool:
        published = publish(there, {"a": retained})
        tensor = torch.zeros(4, 8)
        pull_weights(here, published.ticket, {"a": tensor})
        published.close()
        return torch.equal(tensor, retained)

    assert in_other_thread(again)
    in_other_thread(here.close)
    in_other_thread(there.close)


def sent_weights(folder: Path) -> Steps:
    """Weights are published for a transport, and pulled through staging buffers.

    The transport has no sockets: those of a gloo group that is cut off stay for its timeout.
    """
    TRANSPORTS.targets[ChannelTransport.name] = ChannelTransport
    there = Channel(timeout=LIMIT)
    here = Channel(timeout=LIMIT)
    # One of them has two slices.
    weights = {"a": torch.arange(5000.0), "b": torch.full((3, 5), 2)}
    into = {name: torch.zeros_like(x) for name, x in weights.items()}
    terms: Any = {"expose": "staging", "staging": SMALL, "transport": ChannelTransport.name}
    made = list[Published]()

    def act() -> None:
        published = publish(there, weights, **terms)
        made.append(published)
        prepare_weights(here, published.ticket, into)
        pull_weights(here, published.ticket, into)
        published.statistics()
        published.close()

    yield act
    for published in made:
        in_other_thread(published.close)

    def again() -> bool:
        published = publish(there, weights, **terms)
        for _ in range(2):
            pull_weights(here, published.ticket, into, timeout=LIMIT)
        published.close()
        return all(torch.equal(into[name], x) for name, x in weights.items())

    assert in_other_thread(again)
    in_other_thread(here.close)
    in_other_thread(there.close)
    del TRANSPORTS.targets[ChannelTransport.name]


def meeting(folder: Path) -> Steps:
    """Keys are set and read by a rendezvous."""
    there = Channel(timeout=LIMIT)
    here = Channel(timeout=LIMIT)
    stores = list[ChannelStore]()

    def act() -> None:
        store = rendezvous(there)
        stores.append(store)
        far = rendezvous(here, there.address)
        for one in (store, far):
            one.set("a", b"1")
            one.get("a")
            one.add("n", 1)
            one.wait(["a"], MINUTE)
            one.check(["a"])
            one.delete_key("b")
            one.num_keys()

    yield act
    if not stores:
        assert settles(lambda: free(there, "a rendezvous")), "the channel has a rendezvous"
        stores.append(rendezvous(there))
    far = rendezvous(here, there.address)
    in_other_thread(partial(far.set, "c", b"2"))
    assert in_other_thread(partial(far.get, "c")) == b"2"
    in_other_thread(here.close)
    in_other_thread(there.close)


#: Public names that no scenario calls in the caller's thread, and why.
NOT_CALLED = {
    "Channel.answer": "runs in the loop",
    "Channel.answers": "runs in the loop",
    "Channel.figures": "reads `Channel.statistics`",
    "Channel.send": "runs in the loop",
    "Offer.holds": "runs in the owner's thread",
    "Owner.figures": "reads `Owner.statistics`",
    "Published.figures": "reads `Published.statistics`",
    "Reader.figures": "reads counters",
    "Reader.trace": "reads the trace",
    "Pull.ask": "runs in the loop",
    "Pull.fail": "runs in the loop",
    "Pull.finish": "runs in the loop",
    "Pull.go_on": "runs in the thread of what has ended",
    "Pull.has_waiter": "runs in the loop",
    "Pull.have_ended": "runs in the loop",
    "Pull.lost": "runs in the loop",
    "Pull.over": "runs in the loop",
    "Pull.renew": "runs in the loop",
    "Pull.stop": "`Pull.cancel` has a helper run it",
    "Pull.stop_copies": "`Pull.cancel` has a helper run it",
    "Pull.stopped": "`Pull.cancel` has a helper run it",
}
SCENARIOS = [channels, making, mapped, staged, weights, sent_weights, meeting]


@pytest.mark.parametrize(
    "scenario", by_width(SCENARIOS, [making, weights, sent_weights, staged, mapped])
)
def test_an_interrupt_at_any_line_leaves_nothing(scenario: Any, tmp_path: Path) -> None:
    problems, count = orphans(scenario, tmp_path, FILES)
    print(f"{scenario.__name__}: {count} lines")
    assert problems == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda x: x.__name__)
def test_an_interrupt_each_time_that_a_line_runs_leaves_nothing(
    scenario: Any, tmp_path: Path
) -> None:
    problems, _ = orphans(scenario, tmp_path, FILES, every=True)
    assert problems == []


@pytest.mark.parametrize("scenario", by_width([making, meeting], [making, meeting]))
def test_interrupts_without_helpers_leave_something(
    scenario: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: the main thread makes all changes itself."""
    monkeypatch.setattr("portakv.runtime.interrupts.interruptible", bool)
    monkeypatch.setattr("support.interrupts.LIMIT", 1.0)
    problems, _ = orphans(scenario, tmp_path, FILES, most=1)
    assert problems


def test_interrupts_meet_what_callers_run(tmp_path: Path) -> None:
    """Scenarios call every public function, and of the functions that they call in the caller's
    thread they run all lines but a few, which refuse arguments."""
    kinds = Channel, ChannelStore, Offer, Owner, Parameter, Published, Pull, Reader
    public, called, left, of_called = reach(SCENARIOS, tmp_path, FILES, kinds)
    assert public - called == {*NOT_CALLED}
    print(f"{of_called - len(left)} of {of_called} lines; not run: {left}")
    assert len(left) <= 0.25 * of_called


@pytest.mark.parametrize("line", range(1, 30))
def test_an_interrupt_of_a_pull_that_waits_leaves_no_pull(line: int) -> None:
    """At the line of that number, which the caller's thread runs of its first step."""
    with late_sides() as made:
        owner = made.owner(Rows().shard)
        reader = made.reader(Rows(fill=-1).shard)
        nobody = Ticket.of(owner.channel.address, owner.epoch, b"x" * 16)
        left = line

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal left
            if frame.f_code is not LatePull.run.__code__:
                return None
            left -= event == "line"
            if not left:
                sys.settrace(None)
                raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            with suppress(KeyboardInterrupt):
                reader.pull([nobody], range(4)).cancel()
        finally:
            sys.settrace(None)
        assert until(lambda: not late_pulls(), LIMIT)


def late_pulls() -> list[LatePull]:
    gc.collect()
    return [one for one in gc.get_objects() if isinstance(one, LatePull)]
