# SPDX-License-Identifier: Apache-2.0
"""Publish a model's weights for other processes, and answer their requests."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Annotated, ClassVar, Literal, TypeVar, get_args

import torch
from msgspec import Meta, msgpack, structs

from portakv.arguments import instance, invalid, nbytes, one_of
from portakv.errors import Unsupported
from portakv.graph.graph import Graph
from portakv.migrate.channel import Channel, Peer
from portakv.migrate.figures import Figures, published_figures
from portakv.migrate.ipc import Held, export_all
from portakv.migrate.messages import Count, Handle, Id, Message, Text, prepare, sealed
from portakv.migrate.parameters import (
    Box,
    Item,
    Parameters,
    items_of,
    named,
)
from portakv.migrate.weight_lanes import Connect, Connected, SendSlice
from portakv.migrate.weight_send import LEAST, Senders
from portakv.migrate.weight_versions import Checksums, Update, Versioned
from portakv.runtime.interrupts import uninterrupted

T = TypeVar("T")
_PAGE = 40 << 10  # bytes of items, or of regions, in an answer
MOST_ITEMS = 1 << 18  # of a publisher
MOST_BOXES = 256  # of one request
MOST_SUMS = 1 << 14  # of one answer
STAGING = 256 << 20  # bytes of the staging buffers of one reader
Expose = Literal["mapped", "staging"]


class WeightsTicket(Message, frozen=True):
    """The address of published weights, and their id."""

    address: Text
    id: Id


class AskWeights(Message, frozen=True):
    """Request items, regions or checksums of items, each from number ``first`` on.

    With ``boxes``: the checksums of these boxes of numbered items, as they lie at the owner.
    ``begin``: a pull begins, so an update must not be in progress; checksums that are not computed
    yet are left out. ``again``: the owner's checksums are not the reader's, so the owner must not
    use them again.
    """

    purpose: ClassVar[str] = "Requesting weights of the process at"

    id: Id
    first: Count = 0
    boxes: Annotated[tuple[tuple[Count, Box], ...], Meta(max_length=MOST_BOXES)] = ()
    what: Literal["items", "regions", "sums"] = "items"
    begin: bool = False
    again: bool = False


class Weights(Message, frozen=True):
    """Some of the ``total`` items, regions or checksums. ``version`` changes with the weights.

    A region is memory that contains items; checksums are of all boxes of all items, in their order.
    ``replaced``: a parameter that no longer has the memory of its region.
    """

    state: Literal["held", "gone", "busy", "replaced"]
    total: Annotated[int, Meta(ge=0, le=1 << 28)] = 0
    items: tuple[tuple[Text, Item], ...] = ()
    sums: Annotated[tuple[int, ...], Meta(max_length=MOST_SUMS)] = ()
    version: Annotated[int, Meta(ge=0)] = 0
    regions: tuple[Handle, ...] = ()
    replaced: Text = ""


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
        staging = nbytes("staging", staging, LEAST)
        one_of("expose", expose, get_args(Expose))
        channel.check_open()
        tensors = named("parameters", parameters)
        if not tensors:
            raise invalid("parameters", "a mapping of one tensor or more", parameters)
        if len(tensors) > MOST_ITEMS:
            raise invalid("parameters", f"at most {MOST_ITEMS} tensors", len(tensors))
        items = items_of(tensors)
        self._weights = Versioned(tensors, items)
        self._id = secrets.token_bytes(16)
        self.graph = Graph()
        self._changing = threading.Lock()
        self._senders = Senders(channel, self.graph, tensors, staging, transport)
        self._synchronize()
        self._regions = list[Held]()
        self.why_not_mapped = ""
        try:
            self._export(expose)
        except Unsupported as error:
            self.why_not_mapped = str(error)
        self._sums = Checksums(self._weights, self.graph)
        self.ticket = sealed(WeightsTicket(channel.address, self._id))
        channel.serve(AskWeights, self._answer)
        channel.serve(Connect, self._connect)
        channel.serve(SendSlice, self._send)
        uninterrupted(self._senders.serve)
        self._sums.start()

    def _export(self, expose: Expose) -> None:
        """Let readers map the memory; raise `Unsupported` if they cannot."""
        if expose != "mapped":
            raise Unsupported("Mapping weights", "their owner exposes staging buffers alone")
        items = self._weights.items
        tensors = self._weights.parameters
        memory = {name: x.tensor for name, x in tensors.items() if items[name].tie == name}
        self._regions, places = export_all(memory, "Publishing parameters")
        for name, item in items.items():
            items[name] = structs.replace(item, place=places[item.tie])

    @contextmanager
    def update(self) -> Iterator[None]:
        """Let this block change the weights; put each optimizer's step inside one.

        A pull that overlaps the block fails with `TransferError` and must be repeated. A pull that
        starts inside the block waits for its end. On a device the end of the block waits for the
        current stream: write on that stream.
        """
        token = Update()
        try:
            uninterrupted(partial(self._begin_update, token))
            yield
            self._synchronize()
        except BaseException:  # of the block: its writes may still run
            self._synchronize()
            raise
        finally:
            uninterrupted(partial(self._end_update, token))

    def _begin_update(self, token: Update) -> None:
        """Have pulls wait for the end of an update."""
        with self._changing:
            self._weights.updates.add(token)
            self._weights.changes += 1

    def _end_update(self, token: Update) -> None:
        """Let pulls begin again; those that overlapped the update fail."""
        with self._changing:
            self._weights.updates.discard(token)
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
        tensors = [x.tensor for x in self._weights.parameters.values()]
        for device in {tensor.device for tensor in tensors if tensor.device.type != "cpu"}:
            torch.accelerator.current_stream(device.index).synchronize()

    def _answer(self, _: Peer, request: AskWeights) -> Weights:
        version = self._weights.version()
        first = request.first
        if request.id != self._id or self.graph.closed.is_set():
            return Weights("gone")
        if request.again:
            self._sums.forget()
        items = self._weights.items
        sums = bool(request.boxes) or request.what == "sums"
        # Torch counts no replacement. The end of a pull decides; the request for checksums finds
        # most replacements earlier, while the reader's devices copy.
        if sums or first >= len(items):
            replaced = self._weights.replaced()
            if replaced is not None:
                return Weights("replaced", version=version, replaced=replaced)
        if request.begin and self._weights.updates:
            return Weights("busy", version=version)
        if request.begin:
            self._sums.refresh(version)
        if sums:
            return self._answer_sums(request, version)
        if request.what == "regions":
            regions = [region.handle for region in self._regions[first:]]
            handles = tuple(_page(regions))
            return Weights("held", len(self._regions), regions=handles, version=version)
        page = tuple(_page([*items.items()][first:]))
        return Weights("held", len(items), page, version=version)

    def _connect(self, peer: Peer, request: Connect) -> Connected:
        if request.id != self._id or self.graph.closed.is_set():
            return Connected(gone=True)
        answer = self._senders.connect(peer, request)
        return structs.replace(answer, why=self.why_not_mapped[:1024])

    def _send(self, peer: Peer, request: SendSlice) -> Weights:
        if request.id != self._id or self.graph.closed.is_set():
            return Weights("gone")
        sends = self._senders.send(peer, request)
        return Weights("held" if sends else "busy", version=self._weights.version())

    def statistics(self) -> dict[str, int]:
        """Return the lanes to readers that do not map the memory (``lanes``), and the bytes of all
        their staging buffers here (``staging``)."""
        return {"lanes": self._senders.count, "staging": self._senders.staged_bytes}

    def figures(self) -> Figures:
        """Return figures by the names of metrics, in the form of `Graph.statistics`."""
        return published_figures(self.statistics())

    def _answer_sums(self, request: AskWeights, version: int) -> Weights:
        whole = not request.boxes
        sums = self._sums.all(version) if whole else self._sums.of(request.boxes, version)
        if sums is None:
            # A pull that begins copies meanwhile, and requests the checksums later.
            return Weights("held" if request.begin else "busy", version=version)
        if not whole:
            return Weights("held", sums=tuple(sums), version=version)
        some = tuple(sums[request.first : request.first + MOST_SUMS])
        return Weights("held", len(sums), sums=some, version=version)

    def close(self) -> None:
        """Release the tensors; pulls in progress get `OfferGone`.

        Readers that mapped the memory release it at their next pull, or when the connection ends.
        """
        self.graph.close()
        self._senders.close()
        for region in self._regions:
            region.close()
        self._weights.parameters.clear()


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

    A worker computes the checksums of all tensors now, and again when a pull begins after a change.

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


prepare(globals())
