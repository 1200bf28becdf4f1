# SPDX-License-Identifier: Apache-2.0
"""Publish a model's weights for other processes, and answer their requests."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Annotated, ClassVar, Literal, TypeVar
from weakref import WeakSet

import torch
from msgspec import Meta, msgpack, structs

from portakv.arguments import instance, invalid
from portakv.errors import LayoutError
from portakv.graph.graph import Graph
from portakv.graph.task import Task
from portakv.migrate.channel import Channel, Peer
from portakv.migrate.checksum import Later, box_checksums
from portakv.migrate.ipc import export_all
from portakv.migrate.messages import Count, Handle, Id, Message, Text, sealed
from portakv.migrate.parameters import (
    Box,
    Item,
    Parameter,
    Parameters,
    items_of,
    named,
    part_of,
)
from portakv.runtime.bounded import Bounded
from portakv.runtime.interrupts import uninterrupted

T = TypeVar("T")
_PAGE = 40 << 10  # bytes of items, or of regions, in an answer
MOST_ITEMS = 1 << 18  # of a publisher
MOST_BOXES = 256  # of one request
MOST_SUMS = 1 << 14  # of one answer


class WeightsTicket(Message, frozen=True):
    """The address of published weights, and their id."""

    address: Text
    id: Id


class AskWeights(Message, frozen=True):
    """Request items, regions or checksums of items, each from number ``first`` on.

    With ``boxes``: the checksums of these boxes of numbered items, as they lie at the owner.
    ``begin``: a pull begins, so an update must not be in progress. ``again``: the owner's checksums
    are not the reader's, so the owner must not use them again.
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


class _Update:
    """An update of published weights in progress."""


class _Weights:
    """Published tensors with their descriptions, and the number of their version."""

    def __init__(self, parameters: dict[str, Parameter], items: dict[str, Item]) -> None:
        self.parameters = parameters
        self.items = items
        self.changes = 0
        # `parameters` retains the tensors, which may get other memory.
        self._memory = {name: _memory_of(x.tensor) for name, x in parameters.items()}
        # Updates in progress; weak, because the end of an update may be interrupted.
        self.updates = WeakSet[_Update]()

    def version(self) -> int:
        """Return a number that grows with each change that this process can notice."""
        version = self.changes
        for parameter in [*self.parameters.values()]:
            if not parameter.tensor.is_inference():  # inference tensors have no counter
                version += parameter.tensor._version
        return version

    def replaced(self) -> str | None:
        """Return the name of a tensor that has other memory than when it was published."""
        parameters = {**self.parameters}
        changed = (n for n, x in parameters.items() if _memory_of(x.tensor) != self._memory[n])
        return next(changed, None)

    def boxes(self) -> Iterator[tuple[str, torch.Tensor, Box]]:
        """Yield each box of each item, with its tensor and the first name of its memory."""
        parameters = {**self.parameters}
        for name, item in self.items.items():
            if name in parameters:  # else the publication was closed
                for box in item.boxes:
                    yield item.tie, parameters[name].tensor, box

    def numbered(self, boxes: Sequence[tuple[int, Box]]) -> list[tuple[torch.Tensor, Box]]:
        """Return boxes of numbered items with their tensors; raise `LayoutError` for a wrong
        number."""
        parameters = [*self.parameters.values()]
        if any(number >= len(parameters) for number, _ in boxes):
            raise LayoutError(f"Expected numbers below {len(parameters)}, got others. Pull again.")
        return [(parameters[number].tensor, box) for number, box in boxes]


def _memory_of(tensor: torch.Tensor) -> object:
    """Return which memory a tensor has, and how its elements lie there."""
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()


class _Checksums:
    """The checksums of published weights, computed once for each version by a worker.

    Only the channel's thread calls `all` and `of`.
    """

    def __init__(self, weights: _Weights, graph: Graph) -> None:
        self._weights = weights
        self._queue = graph.queue("weights")
        self._task: Task | None = None
        # A part of each result's key: what a worker began before `forget` is not used after it.
        self._forgotten = 0
        self._done: tuple[tuple[int, int], list[int]] | None = None
        self._later = Later[list[int]]("checksums of weights", self._queue)
        self._parts = Bounded[tuple[int, int, bytes], list[int]](
            "checksums of parts of weights", 256
        )

    def start(self) -> None:
        """Compute the checksums of all boxes, unless a worker does."""
        if self._task is None or self._task.ended:
            self._task = Task(self._compute, 1, queue=self._queue, name="checksums")
            self._queue.graph.submit([self._task])

    def _compute(self, *_: object) -> None:
        """Compute all checksums, each memory's once, and cache them with their version."""
        weights = self._weights
        before = self._forgotten, weights.version()
        places = list[int]()
        numbers = dict[object, int]()
        boxes = list[tuple[torch.Tensor, Box]]()
        for tie, tensor, box in weights.boxes():
            number = numbers.setdefault((tie, box), len(boxes))
            places.append(number)
            if number == len(boxes):
                boxes.append((tensor, box))
        sums = checksums(boxes)
        if not weights.updates and weights.version() == before[1]:
            self._done = before, [sums[number] for number in places]

    def all(self, version: int) -> list[int] | None:
        """Return the checksums of all boxes of all items; None: a worker computes them.

        Raises the worker's error.
        """
        done = self._done
        if done is not None and done[0] == (self._forgotten, version):
            return done[1]
        task = self._task
        if task is not None and task.ended and task.error is not None:
            self._task = None
            raise task.error
        self.start()
        return None

    def refresh(self, version: int) -> None:
        """Start to compute all checksums if they are those of another version."""
        if self._done is None or self._done[0] != (self._forgotten, version):
            self.start()

    def of(self, request: AskWeights, version: int) -> list[int] | None:
        """Return the checksums of the boxes of a request; None: a worker computes them."""
        key = self._forgotten, version, msgpack.encode(request.boxes)
        if key in self._parts:
            return self._parts[key]
        boxes = self._weights.numbered(request.boxes)
        sums = self._later.answer(key, partial(checksums, boxes))
        if sums is not None:
            self._parts[key] = sums
        return sums

    def forget(self) -> None:
        """Compute all checksums anew when they are next requested."""
        self._forgotten += 1
        self._done = None
        self._parts.clear()


def checksums(boxes: Sequence[tuple[torch.Tensor, Box]]) -> list[int]:
    """Return the checksums of boxes of tensors, by their place in the whole tensor."""
    return box_checksums((part_of(x, box.start, box.extents), box.offset) for x, box in boxes)


class Published:
    """The result of `publish`: ``ticket``, for any process that may pull, `update`, `changed`,
    `close`."""

    def __init__(self, channel: Channel, parameters: Parameters) -> None:
        instance("channel", channel, Channel)
        channel.check_open()
        tensors = named("parameters", parameters)
        if not tensors:
            raise invalid("parameters", "a mapping of one tensor or more", parameters)
        if len(tensors) > MOST_ITEMS:
            raise invalid("parameters", f"at most {MOST_ITEMS} tensors", len(tensors))
        items = items_of(tensors)
        self._weights = _Weights(tensors, items)
        self._id = secrets.token_bytes(16)
        self.graph = Graph()
        self._changing = threading.Lock()
        self._synchronize()
        memory = {name: x.tensor for name, x in tensors.items() if items[name].tie == name}
        self._regions, places = export_all(memory, "Publishing parameters")
        for name, item in items.items():
            items[name] = structs.replace(item, place=places[item.tie])
        self._sums = _Checksums(self._weights, self.graph)
        self.ticket = sealed(WeightsTicket(channel.address, self._id))
        channel.serve(AskWeights, self._answer)
        self._sums.start()

    @contextmanager
    def update(self) -> Iterator[None]:
        """Let this block change the weights; put each optimizer's step inside one.

        A pull that overlaps the block fails with `TransferError` and must be repeated. A pull that
        starts inside the block waits for its end. On a device the end of the block waits for the
        current stream: write on that stream.
        """
        token = _Update()
        try:
            uninterrupted(partial(self._begin_update, token))
            yield
            self._synchronize()
        except BaseException:  # of the block: its writes may still run
            self._synchronize()
            raise
        finally:
            uninterrupted(partial(self._end_update, token))

    def _begin_update(self, token: _Update) -> None:
        """Have pulls wait for the end of an update."""
        with self._changing:
            self._weights.updates.add(token)
            self._weights.changes += 1

    def _end_update(self, token: _Update) -> None:
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
        if request.boxes or request.what == "sums":
            return self._answer_sums(request, version)
        if request.begin and self._weights.updates:
            return Weights("busy", version=version)
        items = self._weights.items
        # When a pull begins and when it ends, because torch counts no replacement.
        ends = first >= len(items)
        replaced = self._weights.replaced() if request.begin or ends else None
        if replaced is not None:
            return Weights("replaced", version=version, replaced=replaced)
        if request.begin:
            self._sums.refresh(version)
        if request.what == "regions":
            regions = [region.handle for region in self._regions[first:]]
            handles = tuple(_page(regions))
            return Weights("held", len(self._regions), regions=handles, version=version)
        page = tuple(_page([*items.items()][first:]))
        return Weights("held", len(items), page, version=version)

    def _answer_sums(self, request: AskWeights, version: int) -> Weights:
        whole = not request.boxes
        sums = self._sums.all(version) if whole else self._sums.of(request, version)
        if sums is None:
            return Weights("busy", version=version)
        if not whole:
            return Weights("held", sums=tuple(sums), version=version)
        some = tuple(sums[request.first : request.first + MOST_SUMS])
        return Weights("held", len(sums), sums=some, version=version)

    def close(self) -> None:
        """Release the tensors; pulls in progress get `OfferGone`.

        Readers that mapped the memory release it at their next pull, or when the connection ends.
        """
        self.graph.close()
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


def publish(channel: Channel, parameters: Parameters) -> Published:
    """Let other processes pull these tensors, until `Published.close`.

    A channel publishes the parameters of the last call. Change them inside ``with
    published.update():`` only, else a pull may mix old and new values without an error. After a
    tensor gets other memory (``tensor.data = ...``), pulls fail with `PeerError` until the next
    call. Readers map the memory, with the whole allocation around it. Host memory must be shared
    before (``tensor.share_memory_()``), else this raises `Unsupported`.

    A worker computes the checksums of all tensors now, and again when a pull begins after a change.

    Raises `InvalidTerms` and `LayoutError` for arguments other than a mapping of names to plain
    tensors.
    """
    return Published(channel, parameters)
