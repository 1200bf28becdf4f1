# SPDX-License-Identifier: Apache-2.0
"""What an owner does for readers that cannot map its memory: a worker brings rows into staging
slots, which transports carry, and adds checksums up."""

from __future__ import annotations

import logging
import threading
from functools import partial
from typing import Any, NamedTuple

import torch

from portakv.copy.rows import copy_rows
from portakv.errors import PeerError, Unsupported
from portakv.graph.graph import Graph, Task
from portakv.migrate.channel import Channel, Peer
from portakv.migrate.checksum import Later, checksum
from portakv.migrate.chunks import chunk, chunk_bytes, staging
from portakv.migrate.messages import Answer, Gather, Hello, Message
from portakv.migrate.transports import check_transport, choose, forced
from portakv.migrate.transports import renamed as renamed
from portakv.migrate.transports.base import Moving, Transport
from portakv.runtime.streams import StreamFence
from portakv.view import Index, KVView

_log = logging.getLogger(__name__)
SLOTS = 4  # of each reader: one is filled, two are on the wire, one is emptied


class Rows(NamedTuple):
    """Offered rows of a view of bytes, what they follow, and who did not get all of them."""

    view: KVView
    ids: Index
    behind: StreamFence
    spoilt: set[bytes]


class Slot:
    """Staging memory of one reader, and the gather that fills it."""

    def __init__(self, room: torch.Tensor, dirty: list[torch.Tensor]) -> None:
        self.room = room
        self.dirty = dirty  # memory that still holds bytes of earlier users; shared by its slots
        self.filling = False  # a gather was accepted, and nothing is sent yet
        self.sent: Moving | None = None

    @property
    def busy(self) -> bool:
        """Return True until the reader has the bytes of the last gather."""
        if self.filling:
            return True
        return self.sent is not None and not self.sent.free.is_set()

    def clean(self) -> None:
        """Zero the memory before its first use, so that nothing of earlier users is sent."""
        for memory in self.dirty:
            zero(memory)
        self.dirty.clear()


def zero(memory: torch.Tensor) -> None:
    """Zero memory of a slot, ordered after what the current stream holds."""
    memory.zero_()


class Gathers:
    """The slots and transports of an owner, for all of its readers; its calls are quick."""

    def __init__(
        self, channel: Channel, slot_bytes: int, transport: str | None, device: torch.device
    ) -> None:
        check_transport(transport, device)
        self._channel = channel
        self._slot_bytes = slot_bytes
        self.transport = forced(transport)
        self._transports = dict[str, Transport]()  # by name
        self._by = dict[Peer, list[Transport]]()  # of readers; each agreement is a list of its own
        self._slots = dict[tuple[Peer, int], Slot]()
        self._lock = threading.Lock()  # a reader that is gone gets no slot
        self._graph = Graph()
        # One worker: readers take in the order of gathers.
        self._queue = self._graph.queue("gather")
        self._sums = Later[int]("checksums of rows", self._queue)

    @property
    def slots(self) -> int:
        """How many are in use."""
        return len(self._slots)

    def agree(self, peer: Peer, hello: Hello, device: torch.device) -> str:
        """The transport for a reader, whose slots are where both sides' rows are, or on the host;
        raises `Unsupported` or `BackendUnavailable` if there is none."""
        if hello.device.partition(" ")[0] != device.type:
            device = torch.device("cpu")
        name = self.transport or hello.transport
        if name != hello.transport:
            raise Unsupported(f"The transport {name}", f"its reader has {hello.transport}")
        self.forget(peer)  # it takes no more of what it was brought before
        transport = self._transports.get(f"{name} {device}") or choose(device, name)
        self._transports[f"{name} {device}"] = transport
        self._by[peer] = [transport]
        for kind in transport.asks:
            self._channel.serve(kind, self._asked)
        peer.on_gone(partial(self.forget, peer))
        return transport.name

    def _asked(self, peer: Peer, asked: Any) -> Message | None:
        """What a reader's transport asks its own one here."""
        transport = self._by.get(peer, [None])[0]
        if transport is None or not isinstance(asked, transport.asks):
            raise PeerError("the reader has not agreed upon this transport; pair anew.")
        return transport.answer(peer, self._channel, asked)

    def forget(self, peer: Peer) -> None:
        """A reader is gone, or needs its slots no more."""
        with self._lock:
            agreed = self._by.pop(peer, [])
            self._slots = {key: one for key, one in self._slots.items() if key[0] is not peer}
        for transport in agreed:
            transport.forget(peer)

    def begin(self, peer: Peer, gather: Gather, rows: Rows) -> Answer:
        """Have the worker bring rows into a slot; or sum them up, for a reader that asks until it
        has. Only one thread calls it."""
        if gather.transport:
            agreed = self._by.get(peer)
            if agreed is None or agreed[0].name != gather.transport:
                return Answer("refused", f"{gather.transport} was not agreed upon; pair anew.")
            number = gather.slot % SLOTS
            slot = self._slots.get((peer, number))
            if slot is not None and slot.busy:
                return Answer("busy", seconds=2e-4)

            needs = chunk_bytes(rows.view, gather.count)
            if slot is None or slot.room.nbytes < min(needs, self._slot_bytes):
                # In this thread: if there is no memory, the reader is told so. Not what was freed
                # on a caller's stream, where work may still use it.
                with StreamFence(agreed[0].device).inside():
                    slot = self._new_slot(peer, number, needs, agreed[0])

            slot.filling = True
            bring = partial(self._bring, peer, gather, rows, agreed, slot)
            task = Task(lambda *_: bring(), 1, queue=self._queue, name="gather")
            self._graph.submit([task], priority="urgent")
            return Answer("done")
        total = self._sums.answer(gather, partial(self._sum, gather, rows))
        return Answer("busy", seconds=1e-3) if total is None else Answer("done", digest=total)

    def _new_slot(self, peer: Peer, number: int, needs: int, transport: Transport) -> Slot:
        """Allocate a slot; all slots of a reader if the transport has to know them at once."""
        if transport.knows_once:
            whole = staging(SLOTS * self._slot_bytes, transport.device)
            dirty = [whole]  # the library reaches all of it after the first slot
            rooms = dict(enumerate(whole.view(SLOTS, -1)))
        else:
            room = staging(needs, transport.device, self._slot_bytes)
            dirty = [room]
            rooms = {number: room}

        with self._lock:
            for each, room in rooms.items():
                self._slots[peer, each] = Slot(room, dirty)
            return self._slots[peer, number]

    def close(self) -> None:
        """End what is under way."""
        self._by = {}
        self._graph.close()
        for transport in self._transports.values():
            transport.close()

    # --- in the worker

    def _sum(self, gather: Gather, rows: Rows) -> int:
        with torch.inference_mode(False), rows.behind.inside():
            box = gather.layers, gather.heads
            return checksum(rows.view, rows.ids, gather.count, box, gather.first)

    def _bring(
        self, peer: Peer, gather: Gather, rows: Rows, agreed: list[Transport], slot: Slot
    ) -> None:
        """Fill a slot and send it; or send zeros, after which the reader asks for nothing more."""
        nbytes = chunk_bytes(rows.view, gather.count)
        full = slot.room[:nbytes]
        try:
            with torch.inference_mode(False), rows.behind.inside():
                self._fill(slot, full, gather.count, rows)
                self._send(peer, gather, agreed, slot, full)
        except Exception:
            _log.exception("Rows could not be brought into a slot; their reader is told.")
            rows.spoilt.add(peer.id)
            # On the stream of the failed gather, whose copies may still run.
            with torch.inference_mode(False), StreamFence(slot.room.device).inside():
                slot.clean()
                full.zero_()  # as many bytes as its reader waits for
                self._send(peer, gather, agreed, slot, full)
        finally:
            slot.filling = False

    def _fill(self, slot: Slot, full: torch.Tensor, count: int, rows: Rows) -> None:
        """Gather rows into a slot; positions without rows, and padding, become zeros."""
        on_host = slot.room.device.type == "cpu"
        if not on_host:
            slot.room.record_stream(torch.accelerator.current_stream(slot.room.device.index))

        slot.clean()
        planes, into = chunk(rows.view, count, slot.room)
        written = sum(plane.nbytes for plane in planes)
        skips = rows.ids.check(count, rows.view.slots, "offered")
        if skips or written < full.nbytes:
            zero(full)

        copy = copy_rows(rows.view, into, rows.ids, count=count)
        if on_host:
            copy.synchronize()
        else:
            copy.wait()  # what is sent follows it; ids were looked at when they were offered

    def _send(
        self, peer: Peer, gather: Gather, agreed: list[Transport], slot: Slot, full: torch.Tensor
    ) -> None:
        """Have the transport carry a full slot, unless its reader has paired anew or is gone."""
        lane = agreed[0].lane(peer, self._channel)
        with self._lock:
            if self._by.get(peer) is agreed:
                slot.sent = lane.move(full, gather.tag)
