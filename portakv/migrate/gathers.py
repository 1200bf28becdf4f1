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
from portakv.migrate.staging import chunk, chunk_bytes, staged_bytes, staging
from portakv.migrate.transports import check_transport, choose, forced
from portakv.migrate.transports import renamed as renamed
from portakv.migrate.transports.base import Moving, Transport
from portakv.runtime.streams import StreamFence as StreamFence
from portakv.view import Index, KVView

_log = logging.getLogger(__name__)
BUFFERS = 4  # for each reader: one is filled, two are on the wire, one is emptied


class Rows(NamedTuple):
    """Offered rows of a view of bytes, the stream that wrote them, and the readers that miss
    some."""

    view: KVView
    ids: Index
    after: StreamFence
    spoilt: set[bytes]


class StagingBuffer:
    """A staging buffer of one reader, and the gather that fills it."""

    def __init__(self, memory: torch.Tensor, dirty: list[torch.Tensor]) -> None:
        self.memory = memory
        # Memory that contains bytes of earlier users; buffers of one allocation share the list.
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
    """Zero memory of a buffer, ordered after the current stream's work."""
    memory.zero_()


class Gathers:
    """The staging buffers and transports of an owner, for all of its readers. No call blocks."""

    def __init__(
        self,
        channel: Channel,
        staging_bytes: int,
        transport: str | None,
        device: torch.device,
        most_bytes: int | None = None,
    ) -> None:
        check_transport(transport, device)
        self._most_bytes = most_bytes  # of all buffers of all readers
        self._channel = channel
        self.buffer_bytes = staging_bytes // BUFFERS // 4096 * 4096
        self.transport = forced(transport)
        self._transports = dict[str, Transport]()  # by name
        self._by = dict[Peer, list[Transport]]()  # of readers; each agreement is a separate list
        self._buffers = dict[tuple[Peer, int], StagingBuffer]()
        self._lock = threading.Lock()  # a reader that is gone gets no buffer
        self._graph = Graph()
        # One worker: readers take in the order of gathers.
        self._queue = self._graph.queue("gather")
        self._sums = Later[int]("checksums of rows", self._queue)

    @property
    def buffers(self) -> int:
        """Return the number of buffers in use."""
        return len(self._buffers)

    def agree(self, peer: Peer, hello: Hello, device: torch.device) -> str:
        """Choose the transport for a reader, and return its name.

        Its buffers are on the device of both sides' rows, or on the host. Raises `Unsupported` or
        `BackendUnavailable` if there is no such transport.
        """
        if hello.device.partition(" ")[0] != device.type:
            device = torch.device("cpu")
        name = self.transport or hello.transport
        if name != hello.transport:
            why = f"the reader uses {hello.transport!r}; pass both the same transport="
            raise Unsupported(f"The owner's transport {name!r}", why)
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
        """Release the buffers of a reader that is gone or needs them no more."""
        with self._lock:
            agreed = self._by.pop(peer, [])
            self._buffers = {key: one for key, one in self._buffers.items() if key[0] is not peer}
        for transport in agreed:
            transport.forget(peer)

    def begin(self, peer: Peer, gather: Gather, rows: Rows) -> Answer:
        """Have the worker gather rows into a buffer and send it, or compute their checksum.

        A reader repeats its request for a checksum until the checksum exists. Only one thread calls
        this method.
        """
        if gather.transport:
            agreed = self._by.get(peer)
            if agreed is None or agreed[0].name != gather.transport:
                return Answer("refused", f"{gather.transport} was not agreed on; connect again.")
            number = gather.slot % BUFFERS
            buffer = self._buffers.get((peer, number))
            if buffer is not None and buffer.busy:
                return Answer("busy", seconds=2e-4)

            needs = chunk_bytes(rows.view, gather.count)
            if buffer is None or buffer.memory.nbytes < min(needs, self.buffer_bytes):
                if not self._has_space(needs, buffer, agreed[0]):
                    why = f"staging buffers of all readers have {self._most_bytes} bytes in total"
                    return Answer("busy", why, seconds=1e-2)
                # Allocate in this thread, so that the reader gets the error if there is no memory.
                # Use a private stream: work may still use memory that was freed on a caller's
                # stream.
                with StreamFence(agreed[0].device).inside():
                    buffer = self._new_buffer(peer, number, needs, agreed[0])

            buffer.filling = True
            bring = partial(self._bring, peer, gather, rows, agreed, buffer)
            task = Task(lambda *_: bring(), 1, queue=self._queue, name="gather")
            self._graph.submit([task], priority="urgent")
            return Answer("done")
        total = self._sums.answer(gather, partial(self._sum, gather, rows))
        return Answer("busy", seconds=1e-3) if total is None else Answer("done", digest=total)

    def _has_space(self, needs: int, old: StagingBuffer | None, transport: Transport) -> bool:
        """Return True if one more buffer, in place of an old one, stays below the total."""
        if self._most_bytes is None:
            return True
        with self._lock:
            used = sum(buffer.memory.nbytes for buffer in self._buffers.values())
        if transport.knows_once:
            new = BUFFERS * self.buffer_bytes
        else:
            new = staged_bytes(needs, self.buffer_bytes) - (old.memory.nbytes if old else 0)
        return used + new <= self._most_bytes

    def _new_buffer(
        self, peer: Peer, number: int, needs: int, transport: Transport
    ) -> StagingBuffer:
        """Allocate a buffer, or all buffers of a reader if the transport learns them only once."""
        if transport.knows_once:
            whole = staging(BUFFERS * self.buffer_bytes, transport.device)
            dirty = [whole]  # the library can reach all of it after the first buffer
            parts = dict(enumerate(whole.view(BUFFERS, -1)))
        else:
            memory = staging(needs, transport.device, self.buffer_bytes)
            dirty = [memory]
            parts = {number: memory}

        with self._lock:
            for each, part in parts.items():
                self._buffers[peer, each] = StagingBuffer(part, dirty)
            return self._buffers[peer, number]

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
        self, peer: Peer, gather: Gather, rows: Rows, agreed: list[Transport], buffer: StagingBuffer
    ) -> None:
        """Fill a buffer and send it; after an error, send zeros and note the reader."""
        nbytes = chunk_bytes(rows.view, gather.count)
        full = buffer.memory[:nbytes]
        try:
            with torch.inference_mode(False), rows.after.inside():
                self._fill(buffer, full, gather.count, rows)
                self._send(peer, gather, agreed, buffer, full)
        except Exception:  # whatever failed, the reader must not wait for its bytes
            _log.exception(
                "Rows could not be gathered into a staging buffer; the reader gets an error."
            )
            rows.spoilt.add(peer.id)
            # Use the stream of the failed gather, whose copies may still run.
            with torch.inference_mode(False), StreamFence(buffer.memory.device).inside():
                buffer.clean()
                full.zero_()  # as many bytes as the reader waits for
                self._send(peer, gather, agreed, buffer, full)
        finally:
            buffer.filling = False

    def _fill(self, buffer: StagingBuffer, full: torch.Tensor, count: int, rows: Rows) -> None:
        """Gather rows into a buffer; positions without rows, and padding, become zeros."""
        on_host = buffer.memory.device.type == "cpu"
        if not on_host:
            device = buffer.memory.device
            buffer.memory.record_stream(torch.accelerator.current_stream(device.index))

        buffer.clean()
        planes, into = chunk(rows.view, count, buffer.memory)
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
        self,
        peer: Peer,
        gather: Gather,
        agreed: list[Transport],
        buffer: StagingBuffer,
        full: torch.Tensor,
    ) -> None:
        """Have the transport send a full buffer, unless its reader is gone or connected again."""
        lane = agreed[0].lane(peer, self._channel)
        with self._lock:
            if self._by.get(peer) is agreed:
                buffer.sent = lane.move(full, gather.tag)
