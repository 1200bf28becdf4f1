# SPDX-License-Identifier: Apache-2.0
"""Pull a model's weights from processes that serve it, whatever TP and PP either side has.

`publish` makes tensors available; `pull_weights` fills the tensors of another process.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, groupby
from math import prod
from typing import Annotated, Any, ClassVar, Literal
from weakref import WeakSet

import torch
from msgspec import Meta, msgpack, structs

from portakv.arguments import flag, instance, invalid, items, seconds
from portakv.errors import (
    LayoutError,
    OfferGone,
    PeerError,
    TransferError,
    TransferTimeout,
    Unsupported,
)
from portakv.graph.graph import Graph
from portakv.interconnect.strategy import Terms
from portakv.migrate.channel import Channel, Peer
from portakv.migrate.checksum import Later, box_checksums
from portakv.migrate.ipc import SharedFiles, open_shared, share
from portakv.migrate.messages import Count, Dims, Id, Message, Text, sealed, unsealed
from portakv.migrate.parameters import (
    Box,
    Cell,
    Item,
    Parameter,
    Parameters,
    check_destinations,
    items_of,
    named,
    part_of,
    plan,
)
from portakv.runtime.devices import capturing, refuse_capture
from portakv.runtime.interrupts import uninterrupted
from portakv.runtime.worker import RateLimit

_PAGE = 40 << 10  # bytes of items in an answer
_SMALL = 16 << 20  # bytes of the largest tensor that counts as small
_LISTED = 32  # small tensors that one call copies
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_BATCH = 1 << 30  # bytes that are copied and compared together
_PACED = 32 << 20  # the same with a rate
_ITEMS = 1 << 18  # the most items of a publisher
_LISTING = 256 << 20  # the most bytes of their list
_SUMS = 256  # cells of one request: on the host each may cost a descriptor


class WeightsTicket(Message, frozen=True):
    """The address of published weights, and their id."""

    address: Text
    id: Id


class AskWeights(Message, frozen=True):
    """Request the items from ``first`` on; or, until the answer is known, the checksums of these
    boxes of numbered items, as they lie at the owner."""

    purpose: ClassVar[str] = "Requesting weights of the process at"

    id: Id
    first: Count = 0
    boxes: Annotated[tuple[tuple[Count, Box], ...], Meta(max_length=_SUMS)] = ()


class Weights(Message, frozen=True):
    """Some of the ``total`` items, by name; or checksums. ``version`` changes with the weights."""

    state: Literal["held", "gone", "busy"]
    total: Annotated[int, Meta(ge=0, le=_ITEMS)] = 0
    items: tuple[tuple[Text, Item], ...] = ()
    sums: Annotated[tuple[int, ...], Meta(max_length=_SUMS)] = ()
    version: Annotated[int, Meta(ge=0)] = 0


def _checksums(boxes: Sequence[tuple[torch.Tensor, Box]]) -> list[int]:
    """Return the checksums of boxes of tensors, by their place in the whole tensor."""
    return box_checksums((part_of(x, box.start, box.extents), box.offset) for x, box in boxes)


class _Update:
    """An update of published weights in progress."""


def _shared(name: str, parameter: Parameter, files: SharedFiles) -> bytes:
    """Return the handle of a parameter's memory. Raises `Unsupported`, which names the parameter,
    for memory that cannot be shared."""
    try:
        return share(parameter.tensor, files)
    except Unsupported as error:
        raise Unsupported(f"Publishing parameters[{name!r}]", error.why) from error


class Published:
    """The result of `publish`: ``ticket``, for any process that may pull, `update`, `changed`,
    `close`."""

    def __init__(self, channel: Channel, parameters: Parameters) -> None:
        instance("channel", channel, Channel)
        channel.check_open()
        self._parameters = named("parameters", parameters)
        if not self._parameters:
            raise invalid("parameters", "a mapping of one tensor or more", parameters)
        self._id = secrets.token_bytes(16)
        self.graph = Graph()
        self._changes = 0
        # Updates in progress; weak, because the end of an update may be interrupted.
        self._updates = WeakSet[_Update]()
        self._changing = threading.Lock()
        self._items = items_of(self._parameters)
        if len(self._items) > _ITEMS:
            raise invalid("parameters", f"at most {_ITEMS} tensors", len(self._items))
        self._synchronize()
        files = SharedFiles()
        for name, x in self._parameters.items():
            if self._items[name].tie == name:
                self._items[name] = structs.replace(self._items[name], data=_shared(name, x, files))
        self._sums = Later[list[int]]("checksums of weights", self.graph.queue("weights"))
        self.ticket = sealed(WeightsTicket(channel.address, self._id))
        channel.serve(AskWeights, self._answer)

    @contextmanager
    def update(self) -> Iterator[None]:
        """Let this block change the weights.

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
            self._updates.add(token)
            self._changes += 1

    def _end_update(self, token: _Update) -> None:
        """Let pulls begin again; those that overlapped the update fail."""
        with self._changing:
            self._updates.discard(token)
            self._changes += 1

    def changed(self) -> None:
        """Report that weights have changed; pulls in progress fail with `TransferError`.

        Prefer `update`, which also delays new pulls until the change is complete.
        """
        with self.update():
            pass

    def _synchronize(self) -> None:
        """Wait for the current stream of each device, which has written the weights."""
        tensors = [x.tensor for x in self._parameters.values()]
        for device in {tensor.device for tensor in tensors if tensor.device.type != "cpu"}:
            torch.accelerator.current_stream(device.index).synchronize()

    def _version(self) -> int:
        """Return a number that grows with each change that this process can notice."""
        version = self._changes
        for parameter in [*self._parameters.values()]:
            if not parameter.tensor.is_inference():  # inference tensors have no counter
                version += parameter.tensor._version
        return version

    def _answer(self, _: Peer, request: AskWeights) -> Weights:
        version = self._version()
        if request.id != self._id or self.graph.closed.is_set():
            return Weights("gone")
        if request.boxes:
            matches = [*self._parameters.values()]
            if any(number >= len(matches) for number, _ in request.boxes):
                raise LayoutError(f"Expected numbers below {len(matches)}, got others. Pull again.")
            boxes = [(matches[number].tensor, box) for number, box in request.boxes]
            sums = self._sums.answer(request, lambda: _checksums(boxes))
            if sums is None:
                return Weights("busy", version=version)
            return Weights("held", sums=tuple(sums), version=version)
        if self._updates and request.first == 0:
            return Weights("busy", version=version)
        page = list[tuple[str, Item]]()
        left = _PAGE
        for pair in [*self._items.items()][request.first :]:
            left -= len(msgpack.encode(pair))
            if left < 0 and page:
                break
            page.append(pair)
        return Weights("held", len(self._items), tuple(page), version=version)

    def close(self) -> None:
        """Release the tensors; pulls in progress get `OfferGone`."""
        self.graph.close()
        self._parameters.clear()


def publish(channel: Channel, parameters: Parameters) -> Published:
    """Let other processes pull these tensors, until `Published.close`.

    A channel publishes the parameters of the last call. Change them inside ``with
    published.update():`` only. Readers map the memory, with the whole allocation around it. Host
    memory must be shared before (``tensor.share_memory_()``), else this raises `Unsupported`.

    Raises `InvalidTerms` and `LayoutError` for arguments other than a mapping of names to plain
    tensors.
    """
    return Published(channel, parameters)


class _Owner:
    """An owner of weights, for one pull that ends at the time ``until``."""

    def __init__(self, channel: Channel, ticket: bytes, timeout: float, until: float) -> None:
        decoded = unsealed(ticket, WeightsTicket)
        if decoded is None:
            raise PeerError(
                "Expected tickets to be the bytes of `Published.ticket`, got bytes that are "
                "not a ticket of weights of this release. Carry them unchanged."
            )
        self.channel = channel
        self.timeout = timeout
        self.until = until
        self.address = decoded.address
        self.id = decoded.id
        self.version: int | None = None
        self.items = dict[str, Item]()
        self.opened = dict[str, torch.Tensor]()
        self._list()

    def _list(self) -> None:
        """Request all items; raise `PeerError` if their number is not the announced one."""
        page = self.ask(AskWeights(self.id))
        total = page.total
        nbytes = 0
        while True:
            before = len(self.items)
            self.items.update(page.items)
            nbytes += len(msgpack.encode(page))
            grown = len(self.items) - before
            right = grown == len(page.items) and page.total == total and nbytes <= _LISTING
            if not right or len(self.items) > total or (not grown and before < total):
                raise PeerError(
                    f"Expected {total} weights from {self.address}, got {len(self.items)}, or some "
                    f"twice. Pull from another owner."
                )
            if len(self.items) == total:
                return
            page = self.ask(AskWeights(self.id, len(self.items)))

    def ask(self, request: AskWeights) -> Weights:
        """Return the owner's answer, after the owner has one."""
        pause = 5e-4
        while True:
            answer = self.once(request)
            if answer.state == "held":
                return answer
            time.sleep(min(pause, max(0.0, self.until - time.monotonic())))
            pause = min(2 * pause, 0.05)

    def once(self, request: AskWeights) -> Weights:
        """Return the owner's answer, which may be busy; raise if its weights changed."""
        left = self.until - time.monotonic()
        if left <= 0:
            raise self.late()
        try:
            answer = self.channel.ask(
                self.address, request, Weights, min(left, self.channel.timeout)
            )
        except TransferTimeout:
            if time.monotonic() < self.until:
                raise
            raise self.late() from None
        if answer.state == "gone":
            raise OfferGone(
                f"The weights at {self.address} are no longer published; request a new ticket."
            )
        if answer.state == "held" and self.version is None:
            self.version = answer.version
        if self.version not in (None, answer.version):
            raise TransferError(
                f"The weights at {self.address} changed while they were pulled. Do not use any of "
                f"them; pull again."
            )
        return answer

    def late(self) -> TransferTimeout:
        """Return the error of a pull whose time is over."""
        return TransferTimeout(
            f"The pull of weights from {self.address} timed out after {self.timeout:g} s. Do not "
            f"use the weights; pull again with a longer timeout."
        )

    def confirm(self) -> None:
        """Raise `TransferError` if the weights have changed since they were listed."""
        self.ask(AskWeights(self.id, max(1, len(self.items))))

    def pair(self, cell: Cell, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the destination of a cell, and its source in the owner's memory."""
        box = cell.box
        tie = self.items[cell.name].tie
        if tie not in self.opened:
            if tensor.is_cpu:
                self.opened.clear()
            data = self.items[tie].data if tie in self.items else b""
            self.opened[tie] = open_shared(data, tensor.device)
        if (src := self.opened[tie]).dtype != tensor.dtype:
            raise PeerError(
                f"Expected {cell.name} as {self.address} described it, got another tensor. Pull "
                f"from another owner."
            )
        into = part_of(tensor, box.start, box.extents)
        return into, part_of(src, cell.src, box.extents)

    def wrong(self, cells: Sequence[Cell], parameters: Mapping[str, Parameter]) -> Iterator[str]:
        """Yield the names of cells whose checksums differ from the owner's."""
        numbers = {name: number for number, name in enumerate(self.items)}
        boxes = tuple((numbers[x.name], x.box._replace(start=x.src)) for x in cells)
        request = AskWeights(self.id, boxes=boxes)
        self.once(request)  # the owner computes while this side does
        here = _checksums([(parameters[x.name].tensor, x.box) for x in cells])
        there = self.ask(request).sums
        if len(there) != len(here):
            raise PeerError(
                f"Expected {len(here)} checksums from {self.address}, got {len(there)}. Do not use "
                f"the weights; pull from another owner."
            )
        sums = zip(cells, here, there, strict=True)
        yield from (x.name for x, one, other in sums if one != other)


def copy_pairs(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy tensors, and wait until all bytes have landed.

    One call copies many small tensors, as integers: on CUDA that call converts bfloat16 and float16
    to float32, which changes NaNs (torch 2.11).
    """
    many = defaultdict[Any, tuple[list[Any], list[Any]]](lambda: ([], []))
    with torch.inference_mode():
        for into, src in pairs:
            small = into.nbytes < _SMALL and into.itemsize in _INTEGERS
            if not (small and into.is_contiguous() and src.is_contiguous()):
                into.copy_(src)
                continue
            lists = many[key := (into.device, _INTEGERS[into.itemsize])]
            for some, one in zip(lists, (into, src), strict=True):
                some.append(one.view(key[1]))
            if len(lists[0]) == _LISTED:  # the device starts while the host goes on
                torch._foreach_copy_(*many.pop(key))
        for lists in many.values():
            torch._foreach_copy_(*lists)
    for device in {into.device for into, _ in pairs if not into.is_cpu}:
        torch.accelerator.current_stream(device.index).synchronize()


def pull_weights(
    channel: Channel,
    tickets: bytes | Sequence[bytes],
    parameters: Parameters,
    *,
    some: bool = False,
    max_gbps: float | None = None,
    timeout: float | None = 600.0,
) -> int:
    """Fill tensors from owners that publish the same names, and return the bytes.

    Copies few tensors at a time on the current stream; blocks until checksums agree.

    Args:
        tickets: preferred owners first.
        some: owners have further parameters (the reader is one stage of a pipeline).
        timeout: seconds for the whole call; None for no limit.

    Raises `LayoutError`, which lists all differences, and `InvalidTerms`, before it writes a byte.
    After any other error the tensors are undefined until a pull succeeds: `OfferGone`, `PeerError`,
    `TransferTimeout`, `Unsupported` if an owner's memory cannot be mapped here, `TransferError` if
    weights changed meanwhile, or with the names whose checksums differ.
    """
    limit = seconds("timeout", timeout, above=True, optional=True)
    until = time.monotonic() + limit
    instance("channel", channel, Channel)
    flag("some", some)
    destinations = named("parameters", parameters)
    check_destinations(destinations)
    rate = Terms(max_gbps=max_gbps).max_gbps
    described = items_of(destinations)
    _refuse_capture(destinations)
    packed = _check_tickets(tickets)

    owners = [_Owner(channel, ticket, limit, until) for ticket in packed]
    cells = plan(described, [x.items for x in owners], some)
    pace = RateLimit(rate) if rate else None
    wrong = list[str]()
    total = 0
    paced = rate or any(x.tensor.is_cpu for x in destinations.values())
    for batch in _batches(cells, destinations, _PACED if paced else _BATCH):
        # A tied parameter has the memory of another name, which is copied once.
        once = [x for x in batch if described[x.name].tie == x.name]
        pairs = [owners[x.owner].pair(x, destinations[x.name].tensor) for x in once]
        nbytes = sum(into.nbytes for into, _ in pairs)
        _wait_for_turn(pace, nbytes, owners[batch[0].owner])
        copy_pairs(pairs)
        for i in {x.owner for x in batch}:
            wrong += owners[i].wrong([x for x in batch if x.owner == i], destinations)
        total += nbytes

    for owner in owners:
        owner.confirm()
    if wrong:
        names = ", ".join(dict.fromkeys(wrong))
        raise TransferError(
            f"Expected the owners' checksums of {len(described)} weights, got others of {names}. "
            f"Do not use any of the weights; pull again."
        )
    return total


def _refuse_capture(parameters: Mapping[str, Parameter]) -> None:
    """Raise `Unsupported` while a graph capture records a device of the parameters."""
    if any(capturing(each.tensor.device) for each in parameters.values()):
        raise refuse_capture("Pulling weights", "processes exchange messages; do it before")


def _check_tickets(tickets: bytes | Sequence[bytes]) -> Sequence[bytes]:
    """Return the tickets as a list; raise `InvalidTerms` for other arguments and for an empty
    list."""
    if isinstance(tickets, bytes):
        return [tickets]
    if not items("tickets", tickets, "tickets"):
        raise invalid("tickets", "one ticket or more", tickets, "Pass Published.ticket.")
    if not isinstance(tickets, Sequence) or isinstance(tickets, str):
        raise invalid("tickets", "bytes, or a list of them", tickets, "Pass `Published.ticket`.")
    return [*tickets]


def _wait_for_turn(pace: RateLimit | None, nbytes: int, owner: _Owner) -> None:
    """Wait until the rate allows so many bytes; raise `TransferTimeout` after the pull's time."""
    if pace:
        wait = pace.left(pace.start_of(nbytes))
        time.sleep(min(wait, max(0.0, owner.until - time.monotonic())))
    if time.monotonic() >= owner.until:
        raise owner.late()


def _batches(
    cells: Sequence[Cell], parameters: Mapping[str, Parameter], most: int
) -> Iterator[list[Cell]]:
    """Yield batches of about ``most`` bytes, each with at most as many cells as a message holds."""
    itemsizes = {name: x.tensor.itemsize for name, x in parameters.items()}
    pieces = [piece for x in cells for piece in _pieces(x, most // itemsizes[x.name])]
    sizes = (prod(x.box.extents) * itemsizes[x.name] for x in pieces)
    ends = accumulate(max(nbytes, most // _SUMS) for nbytes in sizes)
    for _, batch in groupby(zip(ends, pieces, strict=True), lambda pair: pair[0] // most):
        yield [cell for _, cell in batch]


def _pieces(cell: Cell, most: int) -> Iterator[Cell]:
    """Yield a cell in pieces of about ``most`` elements, so that a pull can end in time."""
    offset, start, extents = cell.box
    total = prod(extents)
    axis = next((axis for axis, extent in enumerate(extents) if extent > 1), None)
    if total <= most or axis is None:
        yield cell
        return
    step = max(1, most * extents[axis] // total)
    if axis == len(extents) - 1:
        step = max(4, step // 4 * 4)  # checksums then use words of four bytes
    for at in range(0, extents[axis], step):
        size = min(step, extents[axis] - at)
        part = (*extents[:axis], size, *extents[axis + 1 :])
        box = Box(_shifted(offset, axis, at), _shifted(start, axis, at), part)
        yield from _pieces(cell._replace(box=box, src=_shifted(cell.src, axis, at)), most)


def _shifted(start: Dims, axis: int, by: int) -> Dims:
    """Return the start of a box that is shifted along an axis."""
    return (*start[:axis], start[axis] + by, *start[axis + 1 :])
