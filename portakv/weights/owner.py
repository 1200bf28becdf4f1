# SPDX-License-Identifier: Apache-2.0
"""Publish a model's weights for other processes, and answer their requests."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal, TypeVar, get_args

from msgspec import msgpack

from portakv.arguments import instance, invalid, nbytes, one_of
from portakv.errors import Unsupported
from portakv.migrate.channel import Channel, Peer
from portakv.migrate.figures import Figures
from portakv.migrate.messages import sealed
from portakv.migrate.shared_memory import Held, where
from portakv.runtime.interrupts import uninterrupted
from portakv.runtime.streams import synchronize_current
from portakv.tasks import TaskGroup, runtime
from portakv.weights.lanes import Lanes
from portakv.weights.messages import (
    BUFFERS,
    END,
    MOST_SUMS,
    AskWeights,
    Connect,
    Leave,
    OfLane,
    SendSlice,
    Weights,
    WeightsTicket,
)
from portakv.weights.parameters import Parameters, export_items, items_of, named
from portakv.weights.versions import Checksums, Update, Versioned

T = TypeVar("T")
OfReader = TypeVar("OfReader", Connect, SendSlice)
_log = logging.getLogger(__name__)
_PUBLICATION = "a publication"  # a channel has one, and its lanes
_PAGE = 40 << 10  # bytes of items and regions in an answer
MOST_ITEMS = 1 << 18  # of a publisher
STAGING = 256 << 20  # bytes of the staging buffers of one reader
Expose = Literal["mapped", "staging"]


class Published:
    """The result of `publish`: ``ticket``, for any process that may pull, `update`, `changed`,
    `close`.

    Attributes:
        why_not_mapped: why readers cannot map the memory, so that it crosses by a transport; empty
            if readers of this host map it.
    """

    def __init__(
        self,
        channel: Channel,
        parameters: Parameters,
        *,
        staging: int = STAGING,
        expose: Expose = "mapped",
        transport: str | None = None,
    ) -> None:
        instance("channel", channel, Channel)
        staging = nbytes("staging", staging, BUFFERS << 12)
        one_of("expose", expose, get_args(Expose))
        channel.check_open()
        tensors = named("parameters", parameters)
        if not tensors:
            raise invalid("parameters", "a mapping of one tensor or more", parameters)
        if len(tensors) > MOST_ITEMS:
            raise invalid("parameters", f"at most {MOST_ITEMS} tensors", len(tensors))
        self._weights = Versioned(tensors, items_of(tensors))
        self._id = secrets.token_bytes(16)
        self._runtime = runtime()
        self._tasks = TaskGroup(self._runtime, _log_failure)
        self._closed = False
        self._channel = channel
        self._lanes = Lanes(channel, self._weights, transport, staging, self._tasks)
        self._synchronize()
        self._regions = list[Held]()
        self.why_not_mapped = ""
        try:
            self._export(expose)
        except Unsupported as error:
            self.why_not_mapped = str(error)
        #: What readers list, before checksums.
        self._listed = [*self._weights.items.items(), *(x.handle for x in self._regions)]
        self._sums = Checksums(self._weights, self._tasks)
        self.ticket = sealed(
            WeightsTicket(
                channel.address,
                self._id,
                self._lanes.transports.forced or "",
                where(self._lanes.device),
                self.why_not_mapped[:1024],
                self._lanes.buffer_bytes,
            )
        )
        uninterrupted(self._serve)

    def _serve(self) -> None:
        """Answer on the channel, and end the lanes of the publication before, which no longer
        answers."""
        self._sums.of(self._weights.version())  # a helper begins
        channel = self._channel
        channel.serve(AskWeights, self._answer)
        channel.serve(Connect, partial(self._answer_reader, self._lanes.connect))
        channel.serve(SendSlice, partial(self._answer_reader, self._lanes.send))
        channel.serve(OfLane, self._lanes.carry)
        channel.serve(Leave, self._lanes.leave)
        before = channel.replace(_PUBLICATION, self)
        if isinstance(before, Published):
            before._lanes.close()

    def _export(self, expose: Expose) -> None:
        """Let readers map the memory; raise `Unsupported` if they cannot."""
        if expose != "mapped":
            raise Unsupported("Mapping weights", "their owner exposes staging buffers alone")
        items = self._weights.items
        tensors = {name: x.tensor for name, x in self._weights.parameters.items()}
        self._regions, placed = export_items(tensors, items, "Publishing parameters")
        items.update(placed)

    @contextmanager
    def update(self) -> Iterator[None]:
        """Let this block change the weights; put each optimizer's step inside one.

        A pull that overlaps the block fails with `TransferError` and must be repeated. A pull that
        starts inside the block waits for its end. On a device the end of the block waits for the
        current stream: write on that stream.
        """
        token = Update()
        updates = self._weights.updates
        try:
            uninterrupted(partial(self._note_change, updates.add, token))
            yield
            self._synchronize()
        except BaseException:  # of the block: its writes may still run
            self._synchronize()
            raise
        finally:
            uninterrupted(partial(self._note_change, updates.discard, token))

    def _note_change(self, note: Callable[[Update], object], token: Update) -> None:
        """Note the begin or the end of an update: pulls wait for it, and those it overlaps fail."""
        with self._runtime.lock:
            note(token)
            self._weights.changes += 1

    def changed(self) -> None:
        """Report that weights have changed; pulls in progress fail with `TransferError`.

        Use `update` for a change of several tensors: a pull that ended before this call, during the
        change, has brought some old and some new values.
        """
        with self.update():
            pass

    def _synchronize(self) -> None:
        """Wait for the current stream of each device, which has written the weights."""
        synchronize_current({x.tensor.device for x in self._weights.parameters.values()})

    def _is_gone(self, id: bytes) -> bool:
        """Return True for the id of another publication, and after `close`."""
        return id != self._id or self._closed

    def _answer(self, _: Peer, request: AskWeights) -> Weights:
        if self._is_gone(request.id):
            return Weights("gone")
        if request.again:
            self._sums.forget()
        version = self._weights.version()
        first = request.first - len(self._listed)
        # Torch counts no replacement. The end of a pull decides; the request for checksums finds
        # most replacements earlier, while the reader's devices copy.
        if request.boxes or first >= 0:
            replaced = self._weights.replaced()
            if replaced is not None:
                return Weights("replaced", version, replaced=replaced)
        if request.begin and self._weights.updates:
            return Weights("busy", version)
        if request.first == END:
            return Weights("held", version)

        # At the begin a helper begins to compute them, unless they are there.
        sums: Sequence[int] | None = ()
        if request.begin or request.boxes or first >= 0:
            sums = self._sums.of(version, request.boxes)
        if sums is None and not request.begin:
            return Weights("busy", version)
        if first < 0 and not request.boxes:
            page = [*_page(self._listed[request.first :])]
            items = tuple(each for each in page if isinstance(each, tuple))
            regions = tuple(each for each in page if isinstance(each, bytes))
            return Weights("held", version, len(self._listed), items, regions)
        # A pull that begins copies before there are checksums, and requests them later.
        some = sums or ()
        if not request.boxes:
            some = some[first : first + MOST_SUMS]
        return Weights("held", version, sums=tuple(some))

    def _answer_reader(
        self, do: Callable[[Peer, OfReader], object], peer: Peer, request: OfReader
    ) -> Weights:
        """Do what a reader requests of its lane."""
        if self._is_gone(request.id):
            return Weights("gone")
        version = self._weights.version()
        do(peer, request)
        return Weights("held", version)

    def statistics(self) -> dict[str, int]:
        """Return the lanes to readers that do not map the memory (``lanes``), and the bytes of all
        their staging buffers here (``staging``)."""
        return self._lanes.statistics()

    def figures(self) -> Figures:
        """Return figures by the names of metrics."""
        counts = self.statistics()
        return {
            "weight_lanes": [{"value": counts["lanes"]}],
            "weight_staging_bytes": [{"value": counts["staging"]}],
        }

    def close(self) -> None:
        """Release the tensors; pulls in progress get `OfferGone`.

        Readers that mapped the memory release it at their next pull, or when the connection ends.
        """
        uninterrupted(self._close)

    def _close(self) -> None:
        self._closed = True
        self._tasks.end()
        self._channel.free(_PUBLICATION, self)
        self._lanes.close()
        for region in self._regions:
            region.close()
        self._weights.parameters.clear()


def _log_failure(error: BaseException) -> None:
    """Log the error of a coroutine of a publication."""
    _log.error("A publication failed at a request, and goes on.", exc_info=error)


def _page(some: Sequence[T]) -> Iterator[T]:
    """Yield the first objects of about `_PAGE` bytes, at least one."""
    left = _PAGE
    for number, each in enumerate(some):
        left -= len(msgpack.encode(each))
        if left < 0 and number:
            return
        yield each


def publish(
    channel: Channel,
    parameters: Parameters,
    *,
    staging: int = STAGING,
    expose: Expose = "mapped",
    transport: str | None = None,
) -> Published:
    """Let other processes pull these tensors, until `Published.close`.

    A channel publishes the parameters of the last call. Change them inside ``with
    published.update():`` only, else a pull may mix old and new values without an error. After a
    tensor gets other memory (``tensor.data = ...``), pulls fail with `PeerError` until the next
    call. Readers of this host map the memory, with the whole allocation around it; other readers
    get the weights by a transport. Readers map host memory only if it was shared before
    (``tensor.share_memory_()``); `Published.why_not_mapped` says why they do not.

    A helper thread computes the checksums of all tensors now, and again when a pull begins after a
    change.

    Args:
        staging: the most bytes of the staging buffers of one reader that does not map, on either
            side. Both sides have them from its first pull until its connection ends.
        expose: "mapped": readers on this host may map the memory, to be read and written;
            "staging": all readers get copies by a transport.
        transport: the name of the transport for readers that do not map; None: the reader's.

    Raises `InvalidTerms` and `LayoutError` for arguments other than a mapping of names to plain
    tensors, and `BackendUnavailable` for a ``transport`` that does not run here.
    """
    return Published(channel, parameters, staging=staging, expose=expose, transport=transport)
