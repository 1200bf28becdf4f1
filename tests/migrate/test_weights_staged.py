# SPDX-License-Identifier: Apache-2.0
"""Weights through staging buffers, where the owner's memory cannot be mapped: what arrives, and
what either side does when the other one changes, fails or dies in the middle."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import closing
from secrets import token_bytes
from typing import Any

import pytest
import torch
from migrate.transports.test_onesided import Memory
from support.ambient import STATES
from support.migrate_pulls import MODEL, Rows
from support.peer_process import Peer
from support.waits import LIMIT, until
from support.weight_cases import AtSlice, Channels, local_of, make_channels, rank_of, whole_of

from portakv.errors import (
    BackendUnavailable,
    InvalidTerms,
    OfferGone,
    PeerError,
    TransferCancelled,
    TransferError,
    TransferTimeout,
    Unsupported,
)
from portakv.migrate.channel import Channel
from portakv.migrate.owner import Owner
from portakv.migrate.reader import Reader
from portakv.migrate.staged_lanes import BUFFERS
from portakv.migrate.transports import TRANSPORTS
from portakv.migrate.transports.base import Transport
from portakv.weights import Parameter, prepare_weights, publish, pull_weights
from portakv.weights import owner as weight_send
from portakv.weights.owner import Published, pack
from portakv.weights.plan import copy_pairs
from portakv_examples.channel_transport import ChannelTransport

channels = pytest.fixture(make_channels)

LITTLE = 1 << 16  # bytes of staging: buffers of 16 KiB, so that a pull has many slices
SLICE = LITTLE // 4


def many(count: int = 12) -> dict[str, torch.Tensor]:
    """Tensors of a slice each."""
    return {f"{n}": torch.full((SLICE // 4,), n + 1, dtype=torch.int32) for n in range(count)}


def zeros_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(x.shape, dtype=x.dtype) for name, x in tensors.items()}


def equal(local: dict[str, torch.Tensor], remote: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(local[name], x) for name, x in remote.items())


_OWNER = """
import torch
from portakv.migrate import Channel, publish

channel = Channel(timeout=20.0)
ints = torch.arange(6 * 10, dtype=torch.int16).view(6, 10)
tied = torch.arange(77, dtype=torch.int64)
weights = {
    "transposed": torch.arange(50000, dtype=torch.float32).view(250, 200).t(),
    "strided": ints[::2, 1::3],
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "flags": torch.arange(1001) % 3 == 0,
    "half": torch.arange(3000).to(torch.bfloat16),
    "pairs": torch.complex(torch.arange(9.0), torch.arange(9.0)),
    "none": torch.empty(0, 4),
    "first": tied,
    "second": tied,
    "expanded": torch.ones(1, dtype=torch.uint8).expand(300),
}
published = publish(channel, weights, staging=1 << 16)
answer = published.ticket, {name: x.contiguous() for name, x in weights.items()}
"""


def test_weights_of_another_process_arrive_without_shared_memory(channels: Channels) -> None:
    """Views, ties, and tensors that are larger than a staging buffer."""
    with Peer() as owner:
        ticket, remote = owner.do(_OWNER)
        local = zeros_of(remote)
        local["second"] = local["first"]
        local["transposed"] = torch.zeros(200, 250)[:, :]
        local["half"] = torch.zeros(3000, 2, dtype=torch.bfloat16)[:, 0]
        channel = channels()
        lines = prepare_weights(channel, ticket, local)
        assert "distributed sends it through staging buffers: Publishing parameters" in lines
        nbytes = sum(x.nbytes for name, x in remote.items() if name != "second")
        for _ in range(2):
            assert pull_weights(channel, ticket, local) == nbytes
            assert equal(local, remote)
            for x in local.values():
                x.zero_()
        assert owner.do("answer = published.statistics()") == {"lanes": 1, "staging": 1 << 16}
        channel.close()
        assert until(lambda: owner.do("answer = published.statistics()['staging']") == 0)


_OTHER_HOST = """
import torch
from portakv.migrate import Channel, shared_memory
from portakv.weights import publish

shared_memory.host_id = lambda: "another host"
channel = Channel("tcp://127.0.0.1:0", secret=secret, timeout=20.0)
weights = {f"{n}": torch.full((n + 1, 700), n).share_memory_() for n in range(9)}
published = publish(channel, weights)
answer = published.ticket, published.why_not_mapped
"""


def test_weights_that_another_host_shares_cross_by_tcp() -> None:
    """The owner exports its memory for readers of its host; this reader has another host's id."""
    secret = token_bytes(32)
    with (
        Peer() as owner,
        closing(Channel("tcp://127.0.0.1:0", secret=secret, timeout=20.0)) as channel,
    ):
        ticket, why = owner.do(_OTHER_HOST, secret=secret)
        assert not why
        local = {f"{n}": torch.zeros(n + 1, 700, dtype=torch.int64) for n in range(9)}
        assert "it is another host's" in prepare_weights(channel, ticket, local)
        for _ in range(2):
            pull_weights(channel, ticket, local)
            assert all(bool((local[f"{n}"] == n).all()) for n in range(9))
            for x in local.values():
                x.fill_(-1)
        assert owner.do("answer = published.statistics()['lanes']") == 1


def test_tp_2_becomes_tp_3_through_staging_buffers(channels: Channels) -> None:
    qkv = whole_of((240, 80))
    down = whole_of((60, 120))

    def rank(r: int, size: int, empty: bool) -> dict[str, Parameter]:
        def retained(array: Any) -> torch.Tensor:
            tensor = torch.from_numpy(array.copy())
            return torch.zeros_like(tensor) if empty else tensor

        parts = (120, 60, 60)
        q = retained(local_of(qkv, 0, parts, r, size, 1))
        return {
            "qkv": Parameter.split(q, 0, parts, (r, size)),
            "down": Parameter.split(retained(rank_of(down, 1, r, size, 1)), 1, (120,), (r, size)),
        }

    published = [publish(channels(), rank(r, 2, False), staging=LITTLE) for r in range(2)]
    for r in range(3):
        local = rank(r, 3, True)
        expected = rank(r, 3, False)
        pull_weights(channels(), [x.ticket for x in published], local)
        for name, x in local.items():
            assert torch.equal(x.tensor, expected[name].tensor), name
    for owner in published:
        owner.close()


@pytest.mark.parametrize("kind", [Memory, ChannelTransport])
def test_any_transport_sends_weights(
    channels: Channels, monkeypatch: pytest.MonkeyPatch, kind: type[Transport]
) -> None:
    """The reader's library reads the owner's buffers, two at a time, or the channel has the bytes:
    their messages name the lane."""
    monkeypatch.setitem(TRANSPORTS.targets, kind.name, kind)
    tensors = many(30)
    owner = publish(channels(), tensors, staging=LITTLE)
    channel = channels()
    local = zeros_of(tensors)
    assert kind.name in prepare_weights(channel, owner.ticket, local, transport=kind.name)
    for turn in range(3):
        with owner.update():
            for x in tensors.values():
                x.add_(turn)
        assert not equal(local, tensors)
        pull_weights(channel, owner.ticket, local, transport=kind.name)
        assert equal(local, tensors)
    assert owner.statistics()["lanes"] == 1
    owner.close()


def test_memory_is_registered_once_for_all_pulls(
    channels: Channels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also inside of inference mode, in which views of buffers have no common base."""
    engines = list[Memory]()

    class Noted(Memory):
        name = "noted"

        def begin(self, address: str) -> Any:
            engines.append(self)
            return super().begin(address)

    monkeypatch.setitem(TRANSPORTS.targets, Noted.name, Noted)
    tensors = many(30)
    owner = publish(channels(), tensors, staging=LITTLE)
    channel = channels()
    for _ in range(3):
        with torch.inference_mode():
            pull_weights(channel, owner.ticket, zeros_of(tensors), transport="noted")
    assert sorted(len(engine.log) for engine in engines) == [1, BUFFERS]  # the owner's is one
    owner.close()
    channel.close()
    assert until(lambda: not any(engine.entered for engine in engines))


def test_one_owner_is_mapped_and_another_sends(channels: Channels) -> None:
    tensors = many()
    for name in ("0", "1", "2"):
        tensors[name].share_memory_()
    mapped = publish(channels(), {name: tensors[name] for name in ("0", "1", "2")})
    sends = publish(
        channels(), {name: x for name, x in tensors.items() if name > "2"}, staging=LITTLE
    )
    rest = publish(channels(), {name: tensors[name] for name in ("10", "11")}, expose="staging")
    local = zeros_of(tensors)
    tickets = [mapped.ticket, sends.ticket, rest.ticket]
    channel = channels()
    how = prepare_weights(channel, tickets, local).split("\n")
    assert ["mapped." in line for line in how] == [True, False, False]
    assert "exposes staging buffers alone" in how[2]
    pull_weights(channel, tickets, local)
    assert equal(local, tensors)
    for owner in (mapped, sends, rest):
        owner.close()


@pytest.mark.parametrize("state", STATES)
def test_torch_settings_do_not_matter(state: str, channels: Channels) -> None:
    tensors = many()
    local = zeros_of(tensors)
    with STATES[state](torch.device("cpu")):
        owner = publish(channels(), tensors, staging=LITTLE)
        pull_weights(channels(), owner.ticket, local)
    assert equal(local, tensors)
    owner.close()


def test_small_tensors_share_a_slice(channels: Channels) -> None:
    """A message has room for some of them."""
    tensors = {f"{n}": torch.full((3, 5), n, dtype=torch.float32) for n in range(2500)}
    owner = publish(channels(), tensors)
    between = AtSlice(channels(), 0, lambda: None)
    local = zeros_of(tensors)
    pull_weights(between, owner.ticket, local)
    assert equal(local, tensors)
    assert len(between.slices) < 6
    owner.close()


def test_an_update_between_two_slices_is_noticed_and_the_lane_stays(channels: Channels) -> None:
    tensors = many()
    owner = publish(channels(), tensors, staging=LITTLE)

    def change() -> None:
        with owner.update():
            for x in tensors.values():
                x.numpy()[:] += 100

    between = AtSlice(channels(), 6, change)
    local = zeros_of(tensors)
    with pytest.raises(TransferError, match="changed while they were pulled"):
        pull_weights(between, owner.ticket, local)
    lanes = {each.lane for each in between.slices}
    pull_weights(between, owner.ticket, local)
    assert equal(local, tensors)
    assert {each.lane for each in between.slices} == lanes
    owner.close()


def test_an_update_that_nobody_reports_is_noticed_by_checksums(channels: Channels) -> None:
    """The negative control of the test above: the version is the same."""
    tensors = many()
    owner = publish(channels(), tensors, staging=LITTLE)
    pull_weights(channels(), owner.ticket, zeros_of(tensors))  # the owner has checksums

    def change() -> None:
        tensors["9"].numpy()[7] += 1

    between = AtSlice(channels(), 6, change)
    with pytest.raises(TransferError, match=r"others of 9\. Do not"):
        pull_weights(between, owner.ticket, zeros_of(tensors))
    owner.close()


@pytest.mark.parametrize("fault", ["lost", "twice", "swapped", "none"])
def test_a_slice_that_is_lost_or_sent_twice_is_noticed(
    channels: Channels, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """The buffer has the bytes of an earlier slice, or of other boxes; without a fault none is."""
    tensors = many()
    packed = list[Sequence[torch.Tensor]]()

    def wrong(full: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
        packed.append(parts)
        if fault == "twice" and len(packed) == 5:
            pack(full, packed[-2])
        elif fault == "swapped":
            pack(full, [part.flip(0) + n for n, part in enumerate(parts)])
        elif fault != "lost" or len(packed) != 5:
            pack(full, parts)

    monkeypatch.setattr(weight_send, "pack", wrong)
    owner = publish(channels(), tensors | {"ramp": torch.arange(100)}, staging=LITTLE)
    local = zeros_of(tensors) | {"ramp": torch.zeros(100, dtype=torch.int64)}
    if fault == "none":
        pull_weights(channels(), owner.ticket, local)
    else:
        name = "ramp" if fault == "swapped" else "4"
        with pytest.raises(TransferError, match=rf"others of {name}\. Do not"):
            pull_weights(channels(), owner.ticket, local)
    owner.close()


def test_a_slice_that_cannot_be_packed_is_an_error_and_the_next_pull_connects_anew(
    channels: Channels, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = many()
    broken = [True]

    def fail(full: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
        if broken and parts[0][0] == 3:
            broken.clear()
            raise RuntimeError("out of memory")
        pack(full, parts)

    monkeypatch.setattr(weight_send, "pack", fail)
    owner = publish(channels(), tensors, staging=LITTLE)
    channel = channels()
    local = zeros_of(tensors)
    with pytest.raises(PeerError, match="could not pack a slice: out of memory"):
        pull_weights(channel, owner.ticket, local)
    assert until(lambda: owner.statistics()["lanes"] == 0)
    pull_weights(channel, owner.ticket, local)
    assert equal(local, tensors)
    assert owner.statistics()["lanes"] == 1
    owner.close()


@pytest.mark.parametrize("cleans", [True, False])
def test_no_bytes_of_other_users_of_the_memory_are_sent(
    channels: Channels, monkeypatch: pytest.MonkeyPatch, cleans: bool
) -> None:
    """Boxes have gaps, and a library reaches all buffers. Without the zeros, the negative control,
    the reader's buffers have them."""
    taken = list[torch.Tensor]()

    def used(nbytes: int, device: torch.device, *_: object, **__: object) -> torch.Tensor:
        memory = torch.full((nbytes,), 0x5A, dtype=torch.uint8, device=device)
        if nbytes:
            taken.append(memory)
        return memory

    for side in ("staged_lanes", "connections"):
        monkeypatch.setattr(f"portakv.migrate.{side}.staging", used)
    if not cleans:
        monkeypatch.setattr("portakv.migrate.staged_lanes.StagingBuffer.clean", lambda _: None)
    owner = publish(channels(), {"a": torch.ones(3, dtype=torch.uint8), "b": torch.zeros(8)})
    local = {"a": torch.zeros(3, dtype=torch.uint8), "b": torch.ones(8)}
    pull_weights(channels(), owner.ticket, local)
    assert local["a"].all()
    sent, *received = taken
    gap = received[-1][3:16]  # the last one is taken first
    assert bool((gap == 0x5A).all()) is not cleans
    assert bool((sent == 0x5A).any()) is not cleans
    owner.close()


@pytest.mark.parametrize("again", [False, True])
def test_the_end_of_a_publication_in_the_middle_is_the_reason(
    channels: Channels, again: bool
) -> None:
    """It is closed, or its process publishes again on the same channel."""
    tensors = many()
    serving = channels()
    owner = publish(serving, tensors, staging=LITTLE)
    others = list[Published]()

    def end() -> None:
        if again:
            others.append(publish(serving, tensors, staging=LITTLE))
        else:
            owner.close()

    between = AtSlice(channels(), 6, end)
    local = zeros_of(tensors)
    with pytest.raises(OfferGone, match="no longer published"):
        pull_weights(between, owner.ticket, local)
    for other in others:
        assert owner.statistics() == {"lanes": 0, "staging": 0}
        pull_weights(between, other.ticket, local)
        assert equal(local, tensors)
        assert other.statistics()["lanes"] == 1
        owner.close()  # of a publication that was replaced: the lanes of the next one stay
        assert other.statistics()["lanes"] == 1
        other.close()
    owner.close()
    assert owner.statistics() == {"lanes": 0, "staging": 0}


def hold_packing(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Have owners pack tensors after an event."""
    go_on = threading.Event()

    def hang(full: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
        go_on.wait(LIMIT)
        pack(full, parts)

    monkeypatch.setattr(weight_send, "pack", hang)
    return go_on


def test_a_reader_waits_for_no_bytes_of_a_publication_that_ended(
    channels: Channels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner's worker hangs, so the reader learns the end by a question."""
    tensors = many()
    go_on = hold_packing(monkeypatch)
    owner = publish(channels(), tensors, staging=LITTLE)
    pull = pull_weights(channels(), owner.ticket, zeros_of(tensors), wait=False)
    assert until(lambda: owner.statistics()["lanes"])
    time.sleep(0.2)
    with owner.update():
        pass
    with pytest.raises(TransferError, match="changed while they were pulled"):
        pull.synchronize(LIMIT)
    go_on.set()
    owner.close()


def test_a_failed_pull_that_is_cancelled_while_it_ends_leaves_its_lane(
    channels: Channels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slices arrive later, and are not taken for those of the next pull."""
    tensors = many()
    go_on = hold_packing(monkeypatch)
    owner = publish(channels(), tensors, staging=LITTLE)
    channel = channels()
    local = zeros_of(tensors)
    pull = pull_weights(channel, owner.ticket, local, wait=False)
    assert until(lambda: owner.statistics()["lanes"])
    with owner.update():
        pass
    time.sleep(1.0)  # it notices the update after a second
    pull.cancel()
    with pytest.raises(TransferError):  # or its kind, a cancellation
        pull.synchronize(LIMIT)
    go_on.set()
    pull_weights(channel, owner.ticket, local, timeout=LIMIT)
    assert equal(local, tensors)
    assert owner.statistics()["lanes"] == 1
    owner.close()


def test_a_cancelled_pull_gives_the_staging_back(channels: Channels) -> None:
    tensors = many()
    owner = publish(channels(), tensors, staging=LITTLE)
    waits = threading.Event()
    go_on = threading.Event()

    def pause() -> None:
        waits.set()
        go_on.wait(LIMIT)

    between = AtSlice(channels(), 6, pause)
    local = zeros_of(tensors)
    pull = pull_weights(between, owner.ticket, local, wait=False)
    assert waits.wait(LIMIT)
    assert pull.cancel()
    go_on.set()
    with pytest.raises(TransferCancelled):
        pull.synchronize(LIMIT)
    lanes = {each.lane for each in between.slices}
    pull_weights(between, owner.ticket, local)
    assert equal(local, tensors)
    assert {each.lane for each in between.slices} == lanes
    assert owner.statistics() == {"lanes": 1, "staging": LITTLE}
    owner.close()


def test_the_time_of_a_pull_ends_while_bytes_are_awaited(
    channels: Channels, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def hang(full: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
        go_on.wait(LIMIT)
        pack(full, parts)

    monkeypatch.setattr(weight_send, "pack", hang)
    tensors = many()
    owner = publish(channels(), tensors, staging=LITTLE)
    channel = channels()
    local = zeros_of(tensors)
    with pytest.raises(TransferTimeout, match=r"timed out after 0\.5 s"):
        pull_weights(channel, owner.ticket, local, timeout=0.5)
    go_on.set()
    pull_weights(channel, owner.ticket, local)
    assert equal(local, tensors)
    assert until(lambda: owner.statistics()["lanes"] == 1)
    owner.close()


_LITTLE_OWNER = """
import torch
from portakv.migrate import Channel, publish

channel = Channel(timeout=20.0)
weights = {f"{n}": torch.full((4096,), n + 1, dtype=torch.int32) for n in range(12)}
published = publish(channel, weights, staging=1 << 16)
answer = published.ticket
"""


def test_an_owner_that_dies_between_two_slices_is_noticed(channels: Channels) -> None:
    with Peer() as owner:
        ticket = owner.do(_LITTLE_OWNER)
        between = AtSlice(channels(), 6, owner.kill)
        with pytest.raises(PeerError):
            pull_weights(between, ticket, zeros_of(many()))


_READER = """
import threading
import torch
from portakv.migrate import Channel, pull_weights

channel = Channel(timeout=20.0)
local = {f"{n}": torch.zeros(4096, dtype=torch.int32) for n in range(12)}
pull_weights(channel, ticket, local)
pull = pull_weights(channel, ticket, local, wait=False, max_gbps=1e-5)
"""


def test_a_reader_that_dies_releases_the_owners_staging(channels: Channels) -> None:
    tensors = many()
    owner = publish(channels(), tensors, staging=LITTLE)
    with Peer() as reader:
        reader.do(_READER, ticket=owner.ticket)
        assert owner.statistics() == {"lanes": 1, "staging": LITTLE}
        reader.kill()
        assert until(lambda: owner.statistics() == {"lanes": 0, "staging": 0})
    local = zeros_of(tensors)
    pull_weights(channels(), owner.ticket, local)
    assert equal(local, tensors)
    owner.close()


def test_pulls_of_one_publication_take_turns(channels: Channels) -> None:
    """Several pulls of two owners, named in both orders, at the same time."""
    tensors = many()
    names = ([f"{n}" for n in range(6)], [f"{n}" for n in range(6, 12)])
    owners = [
        publish(channels(), {name: tensors[name] for name in some}, staging=LITTLE)
        for some in names
    ]
    channel = channels()
    tickets = [owner.ticket for owner in owners]
    local = [zeros_of(tensors) for _ in range(4)]
    pulls = [
        pull_weights(channel, tickets[:: 1 - 2 * (n % 2)], some, wait=False)
        for n, some in enumerate(local)
    ]
    for pull, some in zip(pulls, local, strict=True):
        pull.synchronize(LIMIT)
        assert equal(some, tensors)
    for owner in owners:
        assert owner.statistics()["lanes"] == 1
        owner.close()


def test_a_pull_that_is_held_up_leaves_buffers_to_others(
    channels: Channels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has two of the four buffers of the lane until its copies go on."""
    tensors = many()
    owner = publish(channels(), tensors, staging=LITTLE)
    held = zeros_of({name: tensors[name] for name in ("0", "1")})
    places = {x.data_ptr() for x in held.values()}
    waits = threading.Event()
    go_on = threading.Event()

    def copy(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        if any(into.data_ptr() in places for into, _ in pairs):
            waits.set()
            go_on.wait(LIMIT)
        copy_pairs(pairs)

    monkeypatch.setattr("portakv.weights.pull.copy_pairs", copy)
    channel = channels()
    first = pull_weights(channel, owner.ticket, held, some=True, wait=False)
    assert waits.wait(LIMIT)
    local = zeros_of(tensors)
    pull_weights(channel, owner.ticket, local, timeout=LIMIT)
    assert equal(local, tensors)
    assert not first.ended
    go_on.set()
    first.synchronize(LIMIT)
    assert equal(held, {name: tensors[name] for name in held})
    assert owner.statistics()["lanes"] == 1
    owner.close()


def test_lanes_of_weights_do_not_touch_those_of_rows(channels: Channels) -> None:
    """One pair of channels has an owner and a reader of rows, and weights, all by one transport."""
    serving = channels()
    taking = channels()
    tensors = many()
    remote = Rows()
    into = Rows(fill=0)
    with (
        closing(Owner(serving, remote.shard, model=MODEL, expose="staging")) as rows,
        closing(Reader(taking, into.shard, model=MODEL)) as reader,
        closing(publish(serving, tensors, staging=LITTLE)) as owner,
    ):
        for _ in range(3):
            into.whole.zero_()
            offer = rows.offer([*range(16)], tokens=256)
            pull = reader.pull(offer.ticket, [*range(16)])
            local = zeros_of(tensors)
            pull_weights(taking, owner.ticket, local)
            assert equal(local, tensors)
            pull.synchronize(LIMIT)
            assert torch.equal(into.whole, remote.whole)


def test_both_sides_need_one_transport(channels: Channels) -> None:
    tensors = many(2)
    owner = publish(channels(), tensors, transport="distributed")
    local = zeros_of(tensors)
    with pytest.raises(InvalidTerms, match="transport"):
        pull_weights(channels(), owner.ticket, local, transport="no")
    with pytest.raises(InvalidTerms, match="transport"):
        publish(channels(), tensors, transport="no")
    with pytest.raises((Unsupported, BackendUnavailable)):
        pull_weights(channels(), owner.ticket, local, transport="nixl")
    assert not any(x.any() for x in local.values())
    pull_weights(channels(), owner.ticket, local, transport="distributed")
    assert equal(local, tensors)
    owner.close()


def test_wrong_terms_are_refused(channels: Channels) -> None:
    wrong: list[Any] = [{"staging": 5}, {"staging": "1"}, {"expose": "no"}, {"transport": 3}]
    for terms in wrong:
        with pytest.raises(InvalidTerms):
            publish(channels(), {"w": torch.zeros(3)}, **terms)


def test_a_lane_that_was_released_keeps_no_transport(
    channels: Channels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its threads end after `Transport.close`, which waits for none of them."""
    transports = weakref.WeakSet[Memory]()

    class Counted(Memory):
        name = "counted"

        def __init__(self, *terms: Any) -> None:
            super().__init__(*terms)
            transports.add(self)

    monkeypatch.setitem(TRANSPORTS.targets, Counted.name, Counted)
    tensors = many()
    serving = channels()
    channel = channels()
    for _ in range(3):
        owner = publish(serving, tensors, staging=LITTLE)
        pull_weights(channel, owner.ticket, local := zeros_of(tensors), transport="counted")
        assert equal(local, tensors)
    assert until(lambda: gc.collect() >= 0 and len(transports) == 2)
    owner.close()
