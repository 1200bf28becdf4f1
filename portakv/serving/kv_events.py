# SPDX-License-Identifier: Apache-2.0
"""Tell routers which blocks a server's store has, in the format of vLLM's events.

A router subscribes as it does to an engine. The events of a store name blocks by their keys, which
are the hashes of the events that the connector of an engine publishes; those have the tokens.
docs/operations.md has the fields.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec
import zmq

from portakv.arguments import invalid, text
from portakv.errors import PeerError
from portakv.migrate.channel import started_context
from portakv.migrate.messages import prepare
from portakv.runtime.resources import reason
from portakv.serving.scheduler import Described
from portakv.storage.calls import Change

# ------------------------------------------------------------------------------------------------
# Changes of a store as events of engines name them: runs of blocks, in a medium.

#: The media of vLLM's events, by tier; other tiers are storage.
MEDIA = {"host": "CPU"}


def medium_of(change: Change) -> str:
    """Return the medium of the tier of a change."""
    return MEDIA.get(change.tier, "STORAGE")


def number_of(key: bytes) -> int:
    """Return the number by which events name a block: the last 64 bits of its key.

    vLLM's events have such numbers, and routers read no other hashes.
    """
    return int.from_bytes(key[-8:], "big")


def runs_of(
    changes: Iterable[Change], describe: Callable[[bytes], Described | None] | None = None
) -> Iterator[Sequence[Change]]:
    """Yield changes that one event can name: of a form and a tier, lost, or stored one after the
    other.

    ``describe``: returns what a block was made of. None: nothing is known of blocks, so an event
    names any stored blocks.
    """
    run = list[Change]()
    for change in changes:
        if run and not _continues(run[-1], change, describe):
            yield run
            run = []
        run.append(change)
    if run:
        yield run


def _continues(
    last: Change, change: Change, describe: Callable[[bytes], Described | None] | None
) -> bool:
    """Return whether the event of the last change can name this one as well."""
    if (change.tier, change.stored, change.form) != (last.tier, last.stored, last.form):
        return False
    if not change.stored or describe is None:
        return True
    described = describe(change.key)
    return described is not None and described.after == last.key


#: The most blocks of an event, and the most batches that are kept for `EventPublisher.answer`.
MOST_BLOCKS = 1024
KEPT = 10_000
#: After the last batch of a replay.
_END = (-1).to_bytes(8, "big", signed=True)
#: The most messages that wait for a subscriber, which loses later ones.
_WAITING = 100_000
#: The most bytes of a message of a router, and the most requests of routers in a call: the thread
#: of a server has other work.
_MOST_BYTES = 4096
_REQUESTS = 4


class _Event(msgspec.Struct, frozen=True, omit_defaults=True, tag=True):
    """The base of events: their names are tags."""


class BlockStored(_Event, frozen=True):
    """Blocks that a tier has from now on.

    A store knows no tokens: ``token_ids`` is then empty and ``block_size`` 0, as in the events of
    vLLM's own offloading.
    """

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[Any] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None


class BlockRemoved(_Event, frozen=True):
    """Blocks that a tier has no longer."""

    block_hashes: list[int]
    medium: str | None
    group_idx: int | None = None
    locality: str | None = None


class AllBlocksCleared(_Event, frozen=True):
    """The store is closed, or begins: a router forgets what it had."""


class EventBatch(msgspec.Struct, frozen=True, omit_defaults=True, array_like=True):
    """What one message has. ``ts``: seconds since 1970."""

    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


def events_of(
    changes: Iterable[Change],
    groups: Sequence[str] = ("",),
    describe: Callable[[bytes], Described | None] | None = None,
    block_size: int = 0,
) -> list[BlockStored | BlockRemoved]:
    """Return the events of changes, in order.

    Args:
        groups: the names of the forms of the store, in order; an event of a store of several has
            the number of its form.
        describe: returns what a block was made of, as `SchedulerSide.described`; blocks without a
            description have no tokens. None: no block has.
        block_size: the tokens of a stored block that is described.
    """
    numbers = {name: number for number, name in enumerate(groups)} if len(groups) > 1 else {}
    events = list[BlockStored | BlockRemoved]()
    for run in runs_of(changes, describe):
        for first in range(0, len(run), MOST_BLOCKS):
            some = run[first : first + MOST_BLOCKS]
            hashes = [number_of(change.key) for change in some]
            medium = medium_of(some[0])
            group = numbers.get(some[0].form)
            if not some[0].stored:
                events.append(BlockRemoved(hashes, medium, group, "LOCAL"))
                continue
            made_of = [] if describe is None else [describe(change.key) for change in some]
            described = [each for each in made_of if each is not None]
            if len(described) < len(some):  # a run has descriptions of all blocks, or of none
                described = []
            after = described[0].after if described else None
            events.append(
                BlockStored(
                    block_hashes=hashes,
                    parent_block_hash=None if after is None else number_of(after),
                    token_ids=[token for each in described for token in each.tokens],
                    block_size=block_size if described else 0,
                    lora_id=None,
                    medium=medium,
                    lora_name=None,
                    group_idx=group,
                    locality="LOCAL",
                )
            )
    return events


class EventPublisher:
    """Publishes events to routers: a PUB socket and, for what a router has missed, a ROUTER socket.

    One thread at a time uses it: that of a `StoreServer`. Messages are those of vLLM: topic, a
    number of 8 bytes, a batch. They are not encrypted, and name blocks by their keys alone: bind an
    address that only routers reach.

    Args:
        endpoint: where subscribers connect, such as ``tcp://127.0.0.1:5557``.
        replay: where they ask for earlier batches; empty: nowhere.
        topic: of each message.
        now: returns seconds since 1970.

    Raises `InvalidTerms` for other values, and `PeerError` for an address that cannot be bound.
    """

    def __init__(
        self,
        endpoint: str,
        replay: str = "",
        topic: str = "",
        now: Callable[[], float] = time.time,
    ) -> None:
        self._topic = text("topic", topic, 0).encode()
        self._now = now
        self._pack = msgspec.msgpack.Encoder()
        self._number = 0
        self._sent = deque[tuple[bytes, bytes]](maxlen=KEPT)
        for each in (endpoint, replay):
            if str(each).startswith("ipc:"):
                # ZeroMQ's listener ends the process if it has no descriptor (libzmq#1306).
                raise invalid("endpoint", "tcp:// and an address", each)
        try:
            self._context = started_context()
        except OSError as error:
            raise PeerError(
                f"Expected descriptors and threads for an event publisher, got: {reason(error)}."
            ) from None
        self._sockets = list[zmq.Socket[bytes]]()
        self.endpoint = self._bind(zmq.PUB, text("endpoint", endpoint))
        self.replay = self._bind(zmq.ROUTER, replay) if text("replay", replay, 0) else ""

    def publish(self, changes: Sequence[Change], groups: Sequence[str] = ("",)) -> None:
        """Send the events of changes; see `events_of`. Does nothing without changes."""
        events = events_of(changes, groups)
        if events:
            self.send([*events])

    def clear(self) -> None:
        """Have routers forget all blocks."""
        self.send([AllBlocksCleared()])

    def answer(self) -> None:
        """Send the batches that routers have requested; never block."""
        if not self.replay:
            return
        router = self._sockets[1]
        for _ in range(_REQUESTS):
            if not router.poll(0):
                return
            frames = router.recv_multipart()
            if len(frames) != 3 or len(frames[2]) != len(_END):  # of no router
                continue
            client = frames[0]
            first = int.from_bytes(frames[2], "big")
            for number, batch in self._sent:
                if int.from_bytes(number, "big") >= first:
                    router.send_multipart([client, b"", self._topic, number, batch], zmq.NOBLOCK)
            router.send_multipart([client, b"", b"", _END, b""], zmq.NOBLOCK)

    def close(self) -> None:
        """Close the sockets. A second call does nothing."""
        self._context.destroy(linger=500)

    def send(self, events: list[BlockStored | BlockRemoved | AllBlocksCleared]) -> None:
        """Send events in a batch."""
        batch = self._pack.encode(EventBatch(self._now(), events))
        number = self._number.to_bytes(8, "big")
        self._number += 1
        self._sent.append((number, batch))
        self._sockets[0].send_multipart([self._topic, number, batch], zmq.NOBLOCK)

    def _bind(self, kind: int, endpoint: str) -> str:
        """Bind a socket, and return its address with the port that it has."""
        try:
            socket = self._context.socket(kind)
            self._sockets.append(socket)
            socket.set_hwm(_WAITING)
            socket.setsockopt(zmq.MAXMSGSIZE, _MOST_BYTES)  # of what routers send
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise PeerError(
                f"Expected an address at which events can be published, got {endpoint}: "
                f"{reason(error)}. Pass an address of this host and a free port."
            ) from None
        return socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")


prepare(globals())
