# SPDX-License-Identifier: Apache-2.0
"""Faults of staged pulls: races of the owner's worker, and failures after a request."""

from __future__ import annotations

import secrets
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any, NamedTuple, cast

import pytest
import torch
from migrate.transports.test_onesided import Memory
from support.waits import LIMIT, until

from portakv import KVView
from portakv.errors import OfferGone, PeerError, PortaKVError, Unsupported
from portakv.migrate import Channel, Owner, Reader, Shard, Ticket, shared_empty, staged_lanes
from portakv.migrate.connections import Staging
from portakv.migrate.messages import Gather
from portakv.migrate.transports import TRANSPORTS, distributed
from portakv.migrate.transports.base import MovingStage
from portakv.tasks import Wait, runtime

BLOCKS = 64
LAYOUT = "layer kv block token head dim"


class Sides:
    """An owner that sends its rows by gloo in 1 MiB of buffers, and a reader."""

    def __init__(self) -> None:
        self.src = torch.zeros(8, 2, BLOCKS, 16, 8, 64, dtype=torch.int16)
        self.src.copy_(torch.arange(self.src.numel()).view(self.src.shape) % 30011)
        self.dst = torch.zeros_like(self.src)
        self.owner = Owner(
            Channel(), self._shard(self.src), model="m", expose="staging", staging=1 << 20
        )
        self.reader = Reader(Channel(), self._shard(self.dst), model="m", transport="distributed")

    def _shard(self, tensor: torch.Tensor) -> Shard:
        return Shard(KVView(tensor, LAYOUT, block_size=16))

    def pull(self, **options: Any) -> Any:
        """Return a pull of all rows of a new offer."""
        offer = self.owner.offer(range(BLOCKS), tokens=BLOCKS * 16)
        return self.reader.pull(offer.ticket, range(BLOCKS), **options)

    def right(self) -> bool:
        """Return True if the reader has the owner's rows."""
        return torch.equal(self.src, self.dst)


@pytest.fixture
def sides() -> Iterator[Sides]:
    made = Sides()
    yield made
    made.reader.close()
    made.owner.close()


def untagged(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have gloo take buffers in their order, whatever their tags, as NCCL does; return the list of
    the tags that are sent from now on."""
    sent = list[int]()

    class Untagged:
        def __init__(self, group: Any) -> None:
            self._group = group

        def send(self, buffers: Any, other: int, tag: int) -> Any:
            sent.append(tag)
            return self._group.send(buffers, other, 7)

        def recv(self, buffers: Any, other: int, _: int) -> Any:
            return self._group.recv(buffers, other, 7)

    join = distributed.Pair.join
    monkeypatch.setattr(distributed.Pair, "join", lambda pair, m: Untagged(join(pair, m)))
    return sent


def test_a_buffer_that_becomes_free_meanwhile_is_not_sent_twice(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step loses the processor after it has seen that a buffer is not free. With a second
    look it sent the same part again, and a transport that takes buffers in their order delivered
    wrong rows."""
    sent = untagged(monkeypatch)
    seen = list[bool]()

    def free(buffer: staged_lanes.StagingBuffer) -> bool:
        was = buffer.sent is None or buffer.sent.has(MovingStage.FREE)
        if not was and threading.current_thread().name != "portakv loop":
            seen.append(was)
            assert buffer.sent is not None
            with runtime().released():
                buffer.sent.wait_for(MovingStage.FREE, LIMIT)
        return was

    monkeypatch.setattr(staged_lanes.StagingBuffer, "free", property(free))
    sides.pull(timeout=20.0).synchronize(LIMIT)
    assert seen
    assert len(set(Counter(sent).values())) == 1  # each slice as often as all others
    assert sides.right()


def test_no_memory_for_slices_that_no_pull_wants_ends_the_lane(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pull is cancelled after its request, and slices that still come find no memory. The next
    pull must not take them for its own."""
    untagged(monkeypatch)
    sides.pull().synchronize(LIMIT)
    pulls = list[Any]()
    requested = threading.Event()
    ask = Channel.answer

    async def asked(channel: Channel, address: str, message: Any, *more: Any, **terms: Any) -> Any:
        answer = await ask(channel, address, message, *more, **terms)
        if isinstance(message, Gather) and not requested.is_set():
            requested.set()
            while not pulls:
                await Wait(until=runtime().time() + 0.01)
            await Wait(until=runtime().time() + 0.2)  # the owner sends meanwhile
            pulls[0].cancel()
        return answer

    monkeypatch.setattr(Channel, "answer", asked)
    spares = list[int]()

    def spare(_: Staging, nbytes: int) -> torch.Tensor:
        spares.append(nbytes)
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(Staging, "spare", spare)
        pulls.append(sides.pull())
        with pytest.raises(PortaKVError):
            pulls[0].synchronize(LIMIT)
    assert spares
    sides.src.add_(1)
    sides.dst.zero_()
    with suppress(PortaKVError):  # its lane may have ended with that of the first
        sides.pull(timeout=20.0).synchronize(LIMIT)
        assert sides.right()
    sides.pull(timeout=20.0).synchronize(LIMIT)
    assert sides.right()


def two_owners(least: int, **options: Any) -> tuple[list[Owner], Reader]:
    """Return owners of four heads each that send rows, the second with so little staging, and the
    reader of all heads."""
    owners = []
    for heads, nbytes in (((0, 4, 8), 64 << 20), ((4, 8, 8), least)):
        caches = [torch.full((2, 64, 16, 4, 512), float(heads[1])) for _ in range(4)]
        shard = Shard(KVView(caches, "vllm-nhd"), heads=heads)
        owners.append(
            Owner(Channel(), shard, model="m", expose="staging", staging=nbytes, **options)
        )
    pages = torch.zeros(4, 2, 64, 16, 8, 512)
    return owners, Reader(Channel(), Shard(KVView([*pages], "vllm-nhd")), model="m")


@pytest.mark.parametrize("kind", ["marks", "names"])
def test_a_pull_ends_if_its_second_owner_has_too_little_staging(kind: str) -> None:
    """The slices of the first owner were made by then, but no task takes them. A wait for them
    lasted for ever."""
    owners, reader = two_owners(16 << 10)
    with closing(reader), closing(owners[0]), closing(owners[1]):
        if kind == "names":
            names = [secrets.token_bytes(16) for _ in owners]
            tickets: Any = [
                Ticket.of(owner.channel.address, owner.epoch, name)
                for owner, name in zip(owners, names, strict=True)
            ]
            pulled = reader.pull(tickets, [3, 4], by_layer=True, timeout=20.0)
            for owner, name in zip(owners, names, strict=True):
                owner.offer([1, 2], tokens=32, name=name)
        else:
            offers = [owner.offer([1, 2], tokens=32, progress="layers") for owner in owners]
            tickets = [offer.ticket for offer in offers]
            pulled = reader.pull(tickets, [3, 4], by_layer=True, timeout=20.0)
            for offer in offers:
                offer.raise_to(4)
        with pytest.raises(Unsupported):
            pulled.synchronize(LIMIT)
        assert pulled.ended


@pytest.mark.parametrize("expose", ["mapped", "staging"])
def test_an_offer_holds_until_its_last_mark_for_a_reader_of_some_layers(expose: Any) -> None:
    """The reader has the first two of four layers. Without the rule its pull was committed at mark
    2, and the owner's next `raise_to` found that the offer had ended."""
    owner, reader, cache = first_stage(expose)
    with closing(reader), closing(owner):
        offer = owner.offer([1, 2], tokens=32, progress="layers")
        pulled = reader.pull(offer.ticket, [3, 4], by_layer=True, timeout=20.0)
        for layer in range(4):
            cache[layer, :, [1, 2]] = layer
            offer.raise_to(layer + 1)
            if layer == 1:
                pulled.layers[1].synchronize(LIMIT)
                assert not pulled.ended
        pulled.synchronize(LIMIT)
        assert offer.taken(LIMIT)


def first_stage(expose: Any, transport: str | None = None) -> tuple[Owner, Reader, torch.Tensor]:
    """Return an owner of four layers, a reader of the first two of them, and the owner's cache."""
    cache = shared_empty((4, 2, 32, 16, 4, 16), torch.float32).fill_(-1)
    terms: Any = {"expose": expose, "transport": transport, "staging": 1 << 16}
    owner = Owner(Channel(), Shard(KVView([*cache], "vllm-nhd")), model="m", **terms)
    pages = torch.zeros(2, 2, 32, 16, 4, 16)
    shard = Shard(KVView([*pages], "vllm-nhd"), layers=(0, 2, 4))
    return owner, Reader(Channel(), shard, model="m", transport=transport), cache


@pytest.mark.parametrize("progress", [None, "layers"])
def test_the_end_of_a_complete_offer_ends_a_pull_that_waits_for_another(progress: Any) -> None:
    """The first offer is complete, and revoked while the second one is waited for. Without a
    question about complete offers the pull went on to its timeout."""
    owners, reader = two_owners(64 << 20)
    with closing(reader), closing(owners[0]), closing(owners[1]):
        first = owners[0].offer([1, 2], tokens=32, progress=progress)
        second = owners[1].offer([1, 2], tokens=32, progress="layers")
        if progress is not None:
            first.raise_to(4)
        pulled = reader.pull([first.ticket, second.ticket], [3, 4], timeout=60.0)
        threading.Event().wait(0.2)
        first.revoke()
        with pytest.raises(OfferGone):
            pulled.synchronize(LIMIT)


def test_a_raise_after_the_owner_was_closed_says_that_the_offer_is_gone() -> None:
    owner, reader, _ = first_stage("mapped")
    with closing(reader):
        offer = owner.offer([1, 2], tokens=32, progress="layers")
        owner.close()
        with pytest.raises(OfferGone):
            offer.raise_to(1)


class Broken(Memory):
    """A library that reads nothing and says so."""

    name = "broken"
    fails = 0


class Fails(NamedTuple):
    """Work before an offer's rows that fails before one of the parts, counted from 0."""

    parts: list[int]
    at: int

    @contextmanager
    def inside(self, _: object = None) -> Iterator[None]:
        self.parts.append(len(self.parts))
        if self.parts[-1] == self.at:
            raise torch.OutOfMemoryError("no room")
        yield


@pytest.mark.parametrize("side", ["reader", "owner"])
def test_a_part_that_fails_ends_a_pull_that_follows_marks(
    monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    """The offer is not complete, and its mark is not raised again. Without the rule the pull held
    its lease until the last mark."""
    monkeypatch.setitem(TRANSPORTS.targets, Broken.name, Broken)
    owner, reader, _ = first_stage("staging", Broken.name if side == "reader" else None)
    with closing(reader), closing(owner):
        offer = owner.offer([1, 2], tokens=32, progress="layers")
        if side == "owner":
            offer.after = cast(Any, Fails([], 0))
        pulled = reader.pull(offer.ticket, [3, 4], by_layer=True)
        offer.raise_to(1)
        with pytest.raises(PeerError if side == "reader" else OfferGone):
            pulled.synchronize(LIMIT)
        assert offer.state == "held"
        assert until(lambda: not offer.begun)  # its lease is not renewed any more


class Forgetful(set[bytes]):
    """A note of readers that keeps none."""

    def add(self, _: bytes) -> None:
        pass


@pytest.mark.parametrize("noted", [True, False])
def test_a_slice_that_the_owner_cannot_fill_is_noted_and_never_committed(noted: bool) -> None:
    """Zeros cross in place of its rows. Without the note the reader commits them. Other readers of
    the offer get all rows."""
    owner, reader, cache = first_stage("staging")
    cache.fill_(5)
    pages = torch.zeros(2, 2, 32, 16, 4, 16)
    shard = Shard(KVView([*pages], "vllm-nhd"), layers=(0, 2, 4))
    second = Reader(Channel(), shard, model="m")
    with closing(reader), closing(second), closing(owner):
        offer = owner.offer([1, 2], tokens=32, readers=2)
        fails = Fails([], 1)
        offer.after = cast(Any, fails)
        if not noted:
            offer.spoilt = Forgetful()
        pulled = reader.pull(offer.ticket, [3, 4])
        if not noted:
            pulled.synchronize(LIMIT)
            assert fails.parts == [0, 1]
            return
        with pytest.raises(OfferGone, match="log has the reason"):
            pulled.synchronize(LIMIT)
        assert not pulled.published
        with pytest.raises(OfferGone, match="log has the reason"):  # the same rows once more
            reader.pull(offer.ticket, [3, 4]).synchronize(LIMIT)
        second.pull(offer.ticket, [3, 4]).synchronize(LIMIT)
        assert bool((pages[:, :, [3, 4]] == 5).all())
