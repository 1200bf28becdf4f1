# SPDX-License-Identifier: Apache-2.0
"""`publish` and `pull_weights` bring a model's weights from processes that serve it into one that
takes over, whatever TP and PP either side has."""

from __future__ import annotations

import secrets
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from math import prod
from operator import add, sub
from typing import Annotated, Any, Literal, NamedTuple

import torch
from msgspec import Meta, msgpack, structs

from portakv.engines.engine import Terms
from portakv.errors import LayoutError, OfferGone, PeerError, TransferError, TransferTimeout
from portakv.graph.graph import Graph
from portakv.migrate.channel import Channel, Peer
from portakv.migrate.digest import Later, box_digests
from portakv.migrate.ipc import open_shared, share
from portakv.migrate.messages import Box as Ends
from portakv.migrate.messages import Count, Dims, Handle, Id, Message, Text, sealed, unsealed
from portakv.migrate.shards import deal
from portakv.runtime.devices import capturing, refuse_capture
from portakv.runtime.worker import RateLimit

_PAGE, _SMALL = 40 << 10, 16 << 20  # bytes of items in an answer; of tensors that are small
_LISTED = 32  # small tensors that one call copies
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_BATCH, _PACED = 1 << 30, 32 << 20  # bytes that are copied and compared at once; with a rate
_SUMS = 256  # cells at once: on the host each may cost a descriptor


class Box(NamedTuple):
    """``extents`` elements of a whole tensor from ``offset`` on, and of the one here from ``start``
    on."""

    offset: Dims
    start: Dims
    extents: Dims

    @property
    def ends(self) -> Ends:
        """From and to on each axis of the whole."""
        return tuple(zip(self.offset, map(add, self.offset, self.extents), strict=True))

    def part(self, ends: Ends) -> Box:
        """What of it lies between these ends."""
        first = tuple(a for a, _ in ends)
        start = map(add, map(sub, first, self.offset), self.start)
        return Box(first, tuple(start), tuple(b - a for a, b in ends))


@dataclass(frozen=True, eq=False)
class Parameter:
    """A tensor and which boxes of one of ``shape`` it holds, by default all. ``packing`` names how
    values were repacked after loading (Marlin, ...); ``block``, how many elements on each axis
    share a scale, at whose multiples boxes begin and end. Scales are parameters of their own. What
    is in no box, such as padding, is left alone."""

    tensor: torch.Tensor
    shape: Sequence[int] | None = None
    boxes: Sequence[Box] | None = None
    packing: str = ""
    block: Sequence[int] = ()

    @classmethod
    def split(
        cls,
        tensor: torch.Tensor,
        axis: int,
        parts: Sequence[int],
        cut: tuple[int, int],
        unit: int = 1,
    ) -> Parameter:
        """What rank ``cut[0]`` of ``cut[1]`` holds of a tensor that is cut along ``axis``.
        ``parts``: whole extents there of what is fused in it (query, key, value), or one; each is
        cut at multiples of ``unit`` (a head's rows), and ranks that outnumber these share."""
        local, boxes, at, done = tuple(tensor.shape), list[Box](), 0, 0
        axis += len(local) if axis < 0 else 0
        before, after = local[:axis], local[axis + 1 :]
        for part in parts:
            first, past = (part // unit * (cut[0] + x) // cut[1] * unit for x in (0, 1))
            n = max(unit, past - first)
            offset, start = ((*[0] * axis, x, *[0] * len(after)) for x in (done + first, at))
            boxes.append(Box(offset, start, (*before, n, *after)))
            at, done = at + n, done + part
        if local[axis : axis + 1] != (at,) or any(x % unit or x < unit for x in parts):
            raise LayoutError(
                f"A tensor of {local} was said to be part {cut} of {parts} along axis {axis}: "
                f"expected {at} elements there, and multiples of {unit}; correct it, or give boxes."
            )
        return cls(tensor, (*before, done, *after), boxes)


Parameters = Mapping[str, Parameter | torch.Tensor]  # by name; a tensor is whole


class Item(Message, frozen=True):
    """What is told of a parameter; ``tie`` is the first name of its memory, which has ``data``."""

    dtype: Annotated[str, Meta(max_length=32)]
    shape: Dims
    boxes: Annotated[tuple[Box, ...], Meta(max_length=1024)]
    packing: Text
    block: Dims
    tie: Text
    data: Handle = b""

    def __post_init__(self) -> None:
        of, blocks = self.shape, self.block or (1,) * len(self.shape)
        for offset, _, extents in self.boxes:
            axes = zip(offset, map(add, offset, extents), of, blocks, strict=False)
            if len({*map(len, (offset, extents, of, blocks))}) > 1 or any(
                a < 0 or b > n or a % k or (b % k and b < n) for a, b, n, k in axes
            ):
                raise LayoutError(
                    f"A parameter was said to hold {extents} elements from {offset} on of {of}: "
                    f"that is outside, or cuts blocks of {blocks}, which share a scale; correct it."
                )


class Cell(NamedTuple):
    """A box of the reader's parameter, which an owner's tensor has from ``theirs`` on."""

    name: str
    owner: int
    box: Box
    theirs: Dims


def part_of(tensor: torch.Tensor, start: Dims, extents: Dims) -> torch.Tensor:
    """A part of a tensor; raises `LayoutError` if it is not there."""
    axes = zip(start, extents, tensor.shape, strict=False)
    part = tensor.detach()[tuple(slice(a, a + n) for a, n, _ in axes)]
    if part.shape != tuple(extents) or part.is_meta:
        raise LayoutError(
            f"{tuple(extents)} elements from {tuple(start)} on were asked of {tuple(tensor.shape)} "
            f"on {tensor.device}: expected that they lie in it, and memory; correct the box."
        )
    return part


def _named(parameters: Parameters) -> dict[str, Parameter]:
    return {k: x if isinstance(x, Parameter) else Parameter(x) for k, x in parameters.items()}


def items_of(parameters: Mapping[str, Parameter]) -> dict[str, Item]:
    """What is told of parameters; one memory under several names is tied."""
    first, items = dict[Any, str](), dict[str, Item]()
    for name, x in parameters.items():
        tensor, local = x.tensor, tuple(x.tensor.shape)
        shape, zeros = local if x.shape is None else tuple(x.shape), (0,) * len(local)
        boxes = tuple(Box(*map(tuple, b)) for b in x.boxes or [Box(zeros, zeros, local)])
        item = Item(str(tensor.dtype)[6:], shape, boxes, x.packing, tuple(x.block), "")
        for box in boxes:
            part_of(tensor, box.start, box.extents)
        memory = tensor.data_ptr() or name, tensor.device, tensor.stride(), item
        items[name] = structs.replace(item, tie=first.setdefault(memory, name))
    return items


def _unlike(mine: Mapping[str, Item], theirs: Mapping[str, Item]) -> Iterator[tuple[str, str]]:
    """What an owner tells otherwise of which parameters."""
    both, tied = [x for x in mine if x in theirs], defaultdict[Any, list[str]](list)
    for name in both:
        for side in (mine, theirs):
            tied[id(side), side[name].tie].append(name)
    for name in both:
        for what in ("dtype", "shape", "packing", "block"):
            here, there = getattr(mine[name], what), getattr(theirs[name], what)
            if here != there:
                yield name, f"its {what} is {here!r} here and {there!r} there"
        here, there = (tied[id(side), side[name].tie] for side in (mine, theirs))
        if here != there:
            yield name, f"{here} are one tensor here, and {there} there"


def plan(
    mine: Mapping[str, Item], owners: Sequence[Mapping[str, Item]], some: bool = False
) -> list[Cell]:
    """Which cell of each parameter comes from which owner, the first that has it. One `LayoutError`
    lists all that does not fit; ``some``: what nobody asked for does."""
    surplus = [] if some else [x for theirs in owners for x in theirs if x not in mine]
    unlike = [x for theirs in owners for x in _unlike(mine, theirs)]
    wrong = [f"{name}: it was not asked for" for name in surplus]
    wrong += [f"{name}: {why}" for name, why in unlike]
    bad, cells = {name for name, _ in unlike}, list[Cell]()
    for name, item in mine.items():
        held = [(i, box) for i, x in enumerate(owners) if name in x for box in x[name].boxes]
        wrong += [] if held else [f"{name}: nobody holds it"]
        boxes = item.boxes if held and name not in bad else ()
        for box in (x for x in boxes if prod(x.extents)):
            given, holes = deal(box.ends, {n: (x.ends, None) for n, (_, x) in enumerate(held)})
            for n, ends, _ in given:
                owner, theirs = held[n]
                cells.append(Cell(name, owner, box.part(ends), theirs.part(ends).start))
            for hole in (box.part(ends) for ends, _ in holes):
                wrong.append(f"{name}: nobody holds {hole.extents} elements from {hole.offset} on")
    if wrong:
        raise LayoutError(
            f"{len(mine)} weights were to be pulled from {len(owners)} owners, and nothing was, "
            f"since these differ; correct them on either side:\n" + "\n".join(dict.fromkeys(wrong))
        )
    return cells


class WeightsTicket(Message, frozen=True):
    """Where weights are published, and which."""

    address: Text
    id: Id


class AskWeights(Message, frozen=True):
    """What is published, from item ``first`` on? Or, asked until it is known: which digests have
    these boxes of numbered items, as they lie at the owner?"""

    id: Id
    first: Count = 0
    boxes: Annotated[tuple[tuple[Count, Box], ...], Meta(max_length=_SUMS)] = ()


class Weights(Message, frozen=True):
    """Some of the ``total`` items, by name; or digests."""

    state: Literal["held", "gone", "busy"]
    total: int = 0
    items: tuple[tuple[Text, Item], ...] = ()
    sums: tuple[int, ...] = ()


def _digests(boxes: Sequence[tuple[torch.Tensor, Box]]) -> list[int]:
    """The digests of boxes of tensors, by their place in the whole."""
    return box_digests((part_of(x, box.start, box.extents), box.offset) for x, box in boxes)


class Published:
    """What `publish` returns: ``ticket``, for whoever may pull, and `close`."""

    def __init__(self, channel: Channel, parameters: Parameters) -> None:
        self._held, self._id, self.graph = _named(parameters), secrets.token_bytes(16), Graph()
        self._items = items_of(self._held)
        for name, x in self._held.items():
            if (device := x.tensor.device).type != "cpu":  # what writes them ends first
                torch.accelerator.current_stream(device.index).synchronize()
            if self._items[name].tie == name:
                self._items[name] = structs.replace(self._items[name], data=share(x.tensor))
        self._sums = Later[list[int]]("digests of weights", self.graph.link("weights"))
        self.ticket = sealed(WeightsTicket(channel.address, self._id))
        channel.serve(AskWeights, self._answer)

    def _answer(self, _: Peer, asked: AskWeights) -> Weights:
        if asked.id != self._id or self.graph.closed.is_set():
            return Weights("gone")
        if asked.boxes:
            held = [*self._held.values()]
            boxes = [(held[number].tensor, box) for number, box in asked.boxes]
            sums = self._sums.answer(asked, lambda: _digests(boxes))
            return Weights("busy") if sums is None else Weights("held", sums=tuple(sums))
        page, room = list[tuple[str, Item]](), _PAGE
        for pair in [*self._items.items()][asked.first :]:
            if (room := room - len(msgpack.encode(pair))) < 0 and page:
                break
            page.append(pair)
        return Weights("held", len(self._items), tuple(page))

    def close(self) -> None:
        """Let go of the tensors; who pulls them now is told that they are gone."""
        self.graph.close()
        self._held.clear()


def publish(channel: Channel, parameters: Parameters) -> Published:
    """Let others pull these tensors, which must not change until `Published.close`; of a channel,
    those that were published last. They map the memory, with all of the allocation round it: on the
    host it has to be shared already (``tensor.share_memory_()``), else this raises `Unsupported`.
    """
    return Published(channel, parameters)


class _Owner:
    """An owner of weights, for one pull."""

    def __init__(self, channel: Channel, ticket: bytes, timeout: float) -> None:
        self.channel, self.timeout = channel, timeout
        if (told := unsealed(ticket, WeightsTicket)) is None:
            raise PeerError(
                "What was handed over is no ticket of weights of this release: expected the bytes "
                "of `Published.ticket`, unchanged; carry them as they are."
            )
        self.address, self.id = told.address, told.id
        self.items, self.opened = dict[str, Item](), dict[str, torch.Tensor]()
        total, had = 1, -1
        while had < len(self.items) < total:
            had = len(self.items)
            page = self.ask(AskWeights(self.id, had))
            self.items.update(page.items)
            total = page.total

    def ask(self, asked: AskWeights) -> Weights:
        """Its answer, once it has one."""
        until, pause = time.monotonic() + self.timeout, 5e-4
        while (answer := self.channel.ask(self.address, asked, Weights)).state == "busy":
            if time.monotonic() > until:
                raise TransferTimeout(
                    f"Digests of weights were asked of {self.address}, which made none in "
                    f"{self.timeout} seconds; pull again, with a longer timeout if it is busy."
                )
            time.sleep(pause := min(2 * pause, 0.05))
        if answer.state == "gone":
            raise OfferGone(f"Weights at {self.address} are published no more; get a new ticket.")
        return answer

    def pair(self, cell: Cell, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where a cell goes to, and where it lies in the owner's memory."""
        box, tie = cell.box, self.items[cell.name].tie
        if tie not in self.opened:
            if tensor.is_cpu:
                self.opened.clear()
            data = self.items[tie].data if tie in self.items else b""
            self.opened[tie] = open_shared(data, tensor.device)
        if (theirs := self.opened[tie]).dtype != tensor.dtype:
            raise PeerError(f"{cell.name} is not what {self.address} told of it; pull elsewhere.")
        into = part_of(tensor, box.start, box.extents)
        return into, part_of(theirs, cell.theirs, box.extents)

    def wrong(self, cells: Sequence[Cell], parameters: Mapping[str, Parameter]) -> Iterator[str]:
        """Names of its cells that have another digest there."""
        numbers = {name: number for number, name in enumerate(self.items)}
        boxes = tuple((numbers[x.name], x.box._replace(start=x.theirs)) for x in cells)
        asked = AskWeights(self.id, boxes=boxes)
        self.channel.ask(self.address, asked, Weights)  # it begins while this side works
        mine = _digests([(parameters[x.name].tensor, x.box) for x in cells])
        sums = zip(cells, mine, self.ask(asked).sums, strict=True)
        yield from (x.name for x, one, other in sums if one != other)


def copy_pairs(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy to the end; small ones many at a time, as integers: on CUDA that call takes bfloat16 and
    float16 through float32, which changes NaNs (torch 2.11)."""
    many = defaultdict[Any, tuple[list[Any], list[Any]]](lambda: ([], []))
    with torch.inference_mode():
        for into, theirs in pairs:
            small = into.nbytes < _SMALL and into.itemsize in _INTEGERS
            if not (small and into.is_contiguous() and theirs.is_contiguous()):
                into.copy_(theirs)
                continue
            lists = many[key := (into.device, _INTEGERS[into.itemsize])]
            for some, one in zip(lists, (into, theirs), strict=True):
                some.append(one.view(key[1]))
            if len(lists[0]) == _LISTED:  # the device begins while the host goes on
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
    timeout: float = 60.0,
) -> int:
    """Fill tensors from owners that publish the same names, preferred ones first, on the current
    stream, few at a time; block until digests that the owners work out agree. Returns the bytes.
    ``some``: owners hold others as well (the reader is one stage of a pipeline). ``timeout``:
    seconds for the digests of a batch, of about 1 GiB or one larger tensor.

    Raises `LayoutError`, which lists all that differs, before a byte is written. After any other
    error the tensors hold an unknown part of the weights, and must not be used until a pull
    succeeds: `OfferGone`, `PeerError`, `TransferTimeout`, `Unsupported` if an owner's memory cannot
    be mapped here, `TransferError` with the names whose digests differ.
    """
    held, rate = _named(parameters), Terms(max_gbps=max_gbps).max_gbps
    mine = items_of(held)
    if any(capturing(x.tensor.device) for x in held.values()):
        raise refuse_capture("Pulling weights", "processes talk to each other; do it before")
    tickets = [tickets] if isinstance(tickets, bytes) else tickets
    owners = [_Owner(channel, x, timeout) for x in tickets]
    cells = plan(mine, [x.items for x in owners], some)
    limit, most = (RateLimit(rate), _PACED) if rate else (None, _BATCH)
    sizes = (prod(x.box.extents) * held[x.name].tensor.itemsize for x in cells)
    ends = accumulate(max(n, most // _SUMS) for n in sizes)  # no more cells than that at once
    wrong, total = list[str](), 0
    for _, batch in groupby(zip(ends, cells, strict=True), lambda x: x[0] // most):
        now = [x for _, x in batch]
        once = [x for x in now if mine[x.name].tie == x.name]
        pairs = [owners[x.owner].pair(x, held[x.name].tensor) for x in once]
        nbytes = sum(x.nbytes for x, _ in pairs)
        if limit:
            time.sleep(limit.left(limit.start_of(nbytes)))
        copy_pairs(pairs)
        for i in {x.owner for x in now}:
            wrong += owners[i].wrong([x for x in now if x.owner == i], held)
        total += nbytes
    if wrong:
        raise TransferError(
            f"{len(mine)} weights were pulled, and digests of these differ from their owners': "
            f"{', '.join(dict.fromkeys(wrong))}. Do not use any of them; pull again."
        )
    return total
