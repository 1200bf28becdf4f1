# SPDX-License-Identifier: Apache-2.0
"""The owner's side of pulls through staging buffers.

A worker gathers offered rows into staging buffers, which transports send. It also computes
checksums of rows.
"""

from __future__ import annotations

import logging
import threading
from functools import partial
from typing import NamedTuple

import torch

from portakv.copy.rows import copy_rows
from portakv.errors import PeerError, Unsupported
from portakv.graph.graph import Graph
from portakv.graph.task import Task
from portakv.migrate.channel import Channel, Peer
from portakv.migrate.checksum import Later, checksum
from portakv.migrate.messages import Answer, Gather, Hello, Message
from portakv.migrate.staging import chunk, chunk_bytes, staging
from portakv.migrate.transports import check_transport, choose, forced
from portakv.migrate.transports import renamed as renamed
from portakv.migrate.transports.base import Moving, Transport
from portakv.runtime.streams import StreamFence
from portakv.view import Index, KVView

_log = logging.getLogger(__name__)
SLOTS = 4  # for each reader: one is filled, two are on the wire, one is emptied


class Rows(NamedTuple):
    """Offered rows of a view of bytes, the stream that wrote them, and the readers that miss
    some."""

    view: KVView
    ids: Index
    after: StreamFence
    spoilt: set[bytes]


class Slot:
    """The staging buffer of one reader, and the gather that fills it."""

    def __init__(self, buffer: torch.Tensor, dirty: list[torch.Tensor]) -> None:
        self.buffer = buffer
        # Memory that still contains bytes of earlier users; slots of one allocation share the list.
        self.dirty = dirty
        self.filling = False  # a gather was accepted, and no byte is sent yet
        self.sent: Moving | None = None

    @property
    def busy(self) -> bool:
        """Return True until the reader has the bytes of the last gather."""
        if self.filling:
            return True
        return self.sent is not None and not self.sent.free.is_set()

    def clean(self) -> None:
        """Zero the memory before its first use, so that no earlier user's bytes are sent."""
        for memory in self.dirty:
            zero(memory)
        self.dirty.clear()


def zero(memory: torch.Tensor) -> None:
    """Zero memory of a slot, ordered after the current stream's work."""
    memory.zero_()


class Gathers:
    """The staging buffers and transports of an owner, for all of its readers. No call blocks."""

    def __init__(
        self, channel: Channel, slot_bytes: int, transport: str | None, device: torch.device
    ) -> None:
        check_transport(transport, device)
        self._channel = channel
        self._slot_bytes = slot_bytes
        self.transport = forced(transport)
        self._transports = dict[str, Transport]()  # by name
        self._by = dict[Peer, list[Transport]]()  # of readers; each agreement is a separate list
        self._slots = dict[tuple[Peer, int], Slot]()
        self._lock = threading.Lock()  # a reader that is gone gets no slot
        self._graph = Graph()
        # One worker: readers take in the order of gathers.
        self._queue = self._graph.queue("gather")
        self._sums = Later[int]("checksums of rows", self._queue)

    @property
    def slots(self) -> int:
        """Return the number of slots in use."""
        return len(self._slots)

    def agree(self, peer: Peer, hello: Hello, device: torch.device) -> str:
        """Choose the transport for a reader, and return its name.

        Its slots are on the device of both sides' rows, or on the host. Raises `Unsupported` or
        `BackendUnavailable` if there is no such transport.
        """
        if hello.device.partition(" ")[0] != device.type:
            device = torch.device("cpu")
        name = self.transport or hello.transport
        if name != hello.transport:
            raise Unsupported(f"The transport {name}", f"its reader has {hello.transport}")
        self.forget(peer)  # the reader takes no more of the rows that were sent to it before
        transport = self._transports.get(f"{name} {device}") or choose(device, name)
        self._transports[f"{name} {device}"] = transport
        self._by[peer] = [transport]
        for kind in transport.asks:
            self._channel.serve(kind, self._answer_transport)
        peer.on_gone(partial(self.forget, peer))
        return transport.name

    def _answer_transport(self, peer: Peer, request: object) -> Message | None:
        """Answer a message of a reader's transport by the transport here."""
        transport = self._by.get(peer, [None])[0]
        if transport is None or not isinstance(request, transport.asks):
            raise PeerError("Expected the agreed transport, got another. Connect again.")
        return transport.answer(peer, self._channel, request)

    def forget(self, peer: Peer) -> None:
        """Release the slots of a reader that is gone or needs them no more."""
        with self._lock:
            agreed = self._by.pop(peer, [])
            self._slots = {key: one for key, one in self._slots.items() if key[0] is not peer}
        for transport in agreed:
            transport.forget(peer)

    def begin(self, peer: Peer, gather: Gather, rows: Rows) -> Answer:
        """Have the worker gather rows into a slot and send it, or compute their checksum.

        A reader repeats its request for a checksum until the checksum exists. Only one thread calls
        this method.
        """
        if gather.transport:
            agreed = self._by.get(peer)
            if agreed is None or agreed[0].name != gather.transport:
                return Answer("refused", f"{gather.transport} was not agreed on; connect again.")
            number = gather.slot % SLOTS
            slot = self._slots.get((peer, number))
            if slot is not None and slot.busy:
                return Answer("busy", seconds=2e-4)

            needs = chunk_bytes(rows.view, gather.count)
            if slot is None or slot.buffer.nbytes < min(needs, self._slot_bytes):
                # Allocate in this thread, so that the reader gets the error if there is no memory.
                # Use a private stream: work may still use memory that was freed on a caller's
                # stream. on a caller's stream, where work may still use it.
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
        """Allocate a slot; allocate all slots of a reader if the transport learns them only
        once."""
        if transport.knows_once:
            whole = staging(SLOTS * self._slot_bytes, transport.device)
            dirty = [whole]  # the library can reach all of it after the first slot
            buffers = dict(enumerate(whole.view(SLOTS, -1)))
        else:
            buffer = staging(needs, transport.device, self._slot_bytes)
            dirty = [buffer]
            buffers = {number: buffer}

        with self._lock:
            for each, buffer in buffers.items():
                self._slots[peer, each] = Slot(buffer, dirty)
            return self._slots[peer, number]

    def close(self) -> None:
        """Cancel the gathers in flight and close the transports."""
        self._by = {}
        self._graph.close()
        for transport in self._transports.values():
            transport.close()

    # --- in the worker

    def _sum(self, gather: Gather, rows: Rows) -> int:
        with torch.inference_mode(False), rows.after.inside():
            box = gather.layers, gather.heads
            return checksum(rows.view, rows.ids, gather.count, box, gather.first)

    def _bring(
        self, peer: Peer, gather: Gather, rows: Rows, agreed: list[Transport], slot: Slot
    ) -> None:
        """Fill a slot and send it; after an error send zeros, and mark the offer for the reader."""
        nbytes = chunk_bytes(rows.view, gather.count)
        full = slot.buffer[:nbytes]
        try:
            with torch.inference_mode(False), rows.after.inside():
                self._fill(slot, full, gather.count, rows)
                self._send(peer, gather, agreed, slot, full)
        except Exception:  # whatever failed, the reader must not wait for its bytes
            _log.exception(
                "Rows could not be gathered into a staging buffer; the reader gets an error."
            )
            rows.spoilt.add(peer.id)
            # Use the stream of the failed gather, whose copies may still run.
            with torch.inference_mode(False), StreamFence(slot.buffer.device).inside():
                slot.clean()
                full.zero_()  # as many bytes as the reader waits for
                self._send(peer, gather, agreed, slot, full)
        finally:
            slot.filling = False

    def _fill(self, slot: Slot, full: torch.Tensor, count: int, rows: Rows) -> None:
        """Gather rows into a slot; positions without rows, and padding, become zeros."""
        on_host = slot.buffer.device.type == "cpu"
        if not on_host:
            slot.buffer.record_stream(torch.accelerator.current_stream(slot.buffer.device.index))

        slot.clean()
        planes, into = chunk(rows.view, count, slot.buffer)
        written = sum(plane.nbytes for plane in planes)
        skips = rows.ids.check(count, rows.view.slots, "offered")
        if skips or written < full.nbytes:
            zero(full)

        copy = copy_rows(rows.view, into, rows.ids, count=count)
        if on_host:
            copy.synchronize()
        else:
            # The transport sends after the copy; ids were checked when they were offered.
            copy.wait()

    def _send(
        self, peer: Peer, gather: Gather, agreed: list[Transport], slot: Slot, full: torch.Tensor
    ) -> None:
        """Have the transport send a full slot, unless its reader is gone or connected again."""
        lane = agreed[0].lane(peer, self._channel)
        with self._lock:
            if self._by.get(peer) is agreed:
                slot.sent = lane.move(full, gather.tag)
