# SPDX-License-Identifier: Apache-2.0
"""`publish` and `pull_weights` bring a model's weights from processes that serve it into one that
takes over, whatever TP and PP either side has."""

from __future__ import annotations

import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby
from math import prod
from operator import add, sub
from typing import Annotated, Any, ClassVar, Literal, NamedTuple
from weakref import WeakSet

import torch
from msgspec import Meta, msgpack, structs

from portakv.arguments import flag, instance, invalid, items, seconds, text, whole
from portakv.errors import (
    InvalidTerms,
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
from portakv.migrate.messages import Box as Ends
from portakv.migrate.messages import Count, Dims, Handle, Id, Message, Text, sealed, unsealed
from portakv.migrate.shards import deal
from portakv.runtime.devices import capturing, refuse_capture
from portakv.runtime.interrupts import uninterrupted
from portakv.runtime.worker import RateLimit

# bytes of items in an answer; of tensors that are small
_PAGE = 40 << 10
_SMALL = 16 << 20
_LISTED = 32  # small tensors that one call copies
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
# bytes that are copied and compared at once; with a rate
_BATCH = 1 << 30
_PACED = 32 << 20
# the most items of a publisher, and bytes of their list
_ITEMS = 1 << 18
_LISTING = 256 << 20
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
        """Return what of the box lies between these ends."""
        pairs = isinstance(ends, Sequence) and len(ends) == len(self.offset)
        if not pairs or not all(isinstance(x, Sequence) and len(x) == 2 for x in ends):
            raise invalid("ends", f"{len(self.offset)} pairs (from, to)", ends)
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
        instance("tensor", tensor, torch.Tensor)
        if not tensor.ndim:
            raise invalid("tensor", "a tensor with an axis to split", tensor)
        whole("axis", axis, -tensor.ndim, tensor.ndim - 1)
        parts = [whole("parts", part) for part in items("parts", parts, "extents")]
        if not isinstance(cut, tuple) or len(cut) != 2:
            raise invalid("cut", "a tuple (rank, ranks)", cut)
        whole("cut", cut[1], 1)
        whole("cut", cut[0], 0, cut[1] - 1)
        whole("unit", unit, 1)
        local = tuple(tensor.shape)
        boxes = list[Box]()
        at = 0
        done = 0
        axis += len(local) if axis < 0 else 0
        before = local[:axis]
        after = local[axis + 1 :]
        for part in parts:
            first, past = (part // unit * (cut[0] + x) // cut[1] * unit for x in (0, 1))
            n = max(unit, past - first)
            offset, start = ((*[0] * axis, x, *[0] * len(after)) for x in (done + first, at))
            boxes.append(Box(offset, start, (*before, n, *after)))
            at = at + n
            done = done + part
        if local[axis : axis + 1] != (at,) or any(x % unit or x < unit for x in parts):
            raise LayoutError(
                f"Expected a tensor with {at} elements along axis {axis}, for its cut {cut} of "
                f"parts {parts}, which are multiples of unit {unit}, got {local}. Correct it, "
                f"or give boxes."
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
        of = self.shape
        blocks = self.block or (1,) * len(self.shape)
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


def _named(argument: str, parameters: Parameters) -> dict[str, Parameter]:
    """Return parameters by name, all checked."""
    if not isinstance(parameters, Mapping):
        raise invalid(argument, "a mapping of names to tensors", parameters)
    named = dict[str, Parameter]()
    for name, value in parameters.items():
        text(f"a name in {argument}", name)
        whole = isinstance(value, Parameter)
        parameter = value if isinstance(value, Parameter) else Parameter(value)
        tensor = instance(f"{argument}[{name!r}]", parameter.tensor, torch.Tensor)
        if why := _odd(tensor):
            raise LayoutError(f"Expected {name} to be a plain tensor, got {why}. Pass its parts.")
        if whole:
            text(f"packing of {argument}[{name!r}]", parameter.packing, least=0)
            _check_boxes(name, parameter)
        named[name] = parameter
    return named


def _odd(tensor: torch.Tensor) -> str:
    """Return why no plain bytes of a tensor can be copied; empty if they can."""
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"one of layout {'nested' if tensor.is_nested else tensor.layout}"
    if tensor.is_quantized:
        return "a quantized one"
    if tensor.is_conj() or tensor.is_neg():
        return "a conjugate or negative view"
    if tensor.is_meta:
        return "one without memory (meta)"
    return ""


def _check_boxes(name: str, parameter: Parameter) -> None:
    """Raise `InvalidTerms` for shapes, blocks or boxes that are not whole numbers."""
    boxes = parameter.boxes if parameter.boxes is not None else ()
    try:
        numbers: list[Any] = [*(parameter.shape or ()), *parameter.block]
        for box in boxes:
            offset, start, extents = box
            numbers += [*offset, *start, *extents]
            if not len(offset) == len(start) == len(extents):
                raise TypeError
    except (TypeError, ValueError):
        numbers = [None]
    if not all(type(each) is int and 0 <= each < 1 << 48 for each in numbers):
        expected = "whole numbers in boxes, shape and block, of one length for each box"
        raise InvalidTerms(f"Expected {name} to have {expected}, got others. Pass `Box` of tuples.")


def _check_destinations(parameters: Mapping[str, Parameter]) -> None:
    """Raise `LayoutError` for a destination that has several elements at one address."""
    for name, parameter in parameters.items():
        tensor = parameter.tensor
        axes = zip(tensor.shape, tensor.stride(), strict=True)
        if any(extent > 1 and stride == 0 for extent, stride in axes):
            raise LayoutError(
                f"Expected {name} to have memory for each element, got an expanded tensor. "
                f"Pass a contiguous one."
            )


def items_of(parameters: Mapping[str, Parameter]) -> dict[str, Item]:
    """What is told of parameters; one memory under several names is tied."""
    first = dict[Any, str]()
    items = dict[str, Item]()
    for name, x in parameters.items():
        tensor = x.tensor
        local = tuple(x.tensor.shape)
        shape = local if x.shape is None else tuple(x.shape)
        zeros = (0,) * len(local)
        boxes = tuple(Box(*map(tuple, b)) for b in x.boxes or [Box(zeros, zeros, local)])
        item = Item(str(tensor.dtype)[6:], shape, boxes, x.packing, tuple(x.block), "")
        for box in boxes:
            part_of(tensor, box.start, box.extents)
        memory = tensor.data_ptr() or name, tensor.device, tensor.stride(), item
        items[name] = structs.replace(item, tie=first.setdefault(memory, name))
    return items


def _unlike(mine: Mapping[str, Item], theirs: Mapping[str, Item]) -> Iterator[tuple[str, str]]:
    """What an owner tells otherwise of which parameters."""
    both = [x for x in mine if x in theirs]
    tied = defaultdict[Any, list[str]](list)
    for name in both:
        for side in (mine, theirs):
            tied[id(side), side[name].tie].append(name)
    for name in both:
        for what in ("dtype", "shape", "packing", "block"):
            here = getattr(mine[name], what)
            there = getattr(theirs[name], what)
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
    bad = {name for name, _ in unlike}
    cells = list[Cell]()
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
    """Request the items from ``first`` on; or, until the answer is known, the checksums of these
    boxes of numbered items, as they lie at the owner."""

    purpose: ClassVar[str] = "Asking for weights, of the process at"

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
    """The checksums of boxes of tensors, by their place in the whole."""
    return box_checksums((part_of(x, box.start, box.extents), box.offset) for x, box in boxes)


class _Update:
    """An update of published weights that is under way."""


def _shared(name: str, parameter: Parameter, files: SharedFiles) -> bytes:
    """Return the handle of a parameter's memory. Raises `Unsupported`, which names the parameter,
    for memory that cannot be shared."""
    try:
        return share(parameter.tensor, files)
    except Unsupported as error:
        raise Unsupported(f"Publishing parameters[{name!r}]", error.why) from error


class Published:
    """What `publish` returns: ``ticket``, for whoever may pull, `update`, `changed` and `close`."""

    def __init__(self, channel: Channel, parameters: Parameters) -> None:
        instance("channel", channel, Channel)
        channel.check_open()
        self._held = _named("parameters", parameters)
        if not self._held:
            raise invalid("parameters", "a mapping of one tensor or more", parameters)
        self._id = secrets.token_bytes(16)
        self.graph = Graph()
        self._changes = 0
        self._updates = WeakSet[_Update]()  # that are under way; weak, as an end may be interrupted
        self._changing = threading.Lock()
        self._items = items_of(self._held)
        if len(self._items) > _ITEMS:
            raise invalid("parameters", f"at most {_ITEMS} tensors", len(self._items))
        self._synchronize()
        files = SharedFiles()
        for name, x in self._held.items():
            if self._items[name].tie == name:
                self._items[name] = structs.replace(self._items[name], data=_shared(name, x, files))
        self._sums = Later[list[int]]("checksums of weights", self.graph.queue("weights"))
        self.ticket = sealed(WeightsTicket(channel.address, self._id))
        channel.serve(AskWeights, self._answer)

    @contextmanager
    def update(self) -> Iterator[None]:
        """Let this block change the weights.

        A pull that overlaps the block fails with `TransferError` and is to be made again; a pull
        that begins inside waits for the end. On a device the end of the block waits for the current
        stream, so write on that.
        """
        token = _Update()
        try:
            uninterrupted(partial(self._begin_update, token))
            yield
            self._synchronize()
        except BaseException:
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
        """Say that weights have changed, which no pull under way may have read: such a pull fails
        with `TransferError`. Prefer `update`, which also keeps others from beginning meanwhile."""
        with self.update():
            pass

    def _synchronize(self) -> None:
        """Wait for the current stream of each device, which has written the weights."""
        tensors = [x.tensor for x in self._held.values()]
        for device in {tensor.device for tensor in tensors if tensor.device.type != "cpu"}:
            torch.accelerator.current_stream(device.index).synchronize()

    def _version(self) -> int:
        """Return a number that grows with each change that this process can notice."""
        version = self._changes
        for parameter in [*self._held.values()]:
            if not parameter.tensor.is_inference():  # those have no counter
                version += parameter.tensor._version
        return version

    def _answer(self, _: Peer, asked: AskWeights) -> Weights:
        version = self._version()
        if asked.id != self._id or self.graph.closed.is_set():
            return Weights("gone")
        if asked.boxes:
            held = [*self._held.values()]
            if any(number >= len(held) for number, _ in asked.boxes):
                raise LayoutError(f"Expected numbers below {len(held)}, got others. Pull again.")
            boxes = [(held[number].tensor, box) for number, box in asked.boxes]
            sums = self._sums.answer(asked, lambda: _checksums(boxes))
            if sums is None:
                return Weights("busy", version=version)
            return Weights("held", sums=tuple(sums), version=version)
        if self._updates and asked.first == 0:
            return Weights("busy", version=version)
        page = list[tuple[str, Item]]()
        room = _PAGE
        for pair in [*self._items.items()][asked.first :]:
            room -= len(msgpack.encode(pair))
            if room < 0 and page:
                break
            page.append(pair)
        return Weights("held", len(self._items), tuple(page), version=version)

    def close(self) -> None:
        """Release the tensors; who pulls them now gets `OfferGone`."""
        self.graph.close()
        self._held.clear()


def publish(channel: Channel, parameters: Parameters) -> Published:
    """Let others pull these tensors, until `Published.close`; of a channel, those that were
    published last. Change them inside ``with published.update():`` only. Readers map the memory,
    with all of the allocation round it: on the host it has to be shared already
    (``tensor.share_memory_()``), else this raises `Unsupported`.

    Raises `InvalidTerms` and `LayoutError` for what is not a mapping of names to plain tensors.
    """
    return Published(channel, parameters)


class _Owner:
    """An owner of weights, for one pull, which ends at the time ``until``."""

    def __init__(self, channel: Channel, ticket: bytes, timeout: float, until: float) -> None:
        told = unsealed(ticket, WeightsTicket)
        if told is None:
            raise PeerError(
                "Expected tickets to be the bytes of `Published.ticket`, got others, which is no "
                "ticket of weights of this release. Carry them unchanged."
            )
        self.channel = channel
        self.timeout = timeout
        self.until = until
        self.address = told.address
        self.id = told.id
        self.version: int | None = None
        self.items = dict[str, Item]()
        self.opened = dict[str, torch.Tensor]()
        self._list()

    def _list(self) -> None:
        """Ask for all items; raise `PeerError` if they are not as many as announced."""
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

    def ask(self, asked: AskWeights) -> Weights:
        """Return the owner's answer, once it has one."""
        pause = 5e-4
        while True:
            answer = self.once(asked)
            if answer.state == "held":
                return answer
            time.sleep(min(pause, max(0.0, self.until - time.monotonic())))
            pause = min(2 * pause, 0.05)

    def once(self, asked: AskWeights) -> Weights:
        """Return the owner's answer, which may be that it is busy; raise if its weights changed."""
        left = self.until - time.monotonic()
        if left <= 0:
            raise self.late()
        try:
            answer = self.channel.ask(self.address, asked, Weights, min(left, self.channel.timeout))
        except TransferTimeout:
            if time.monotonic() < self.until:
                raise
            raise self.late() from None
        if answer.state == "gone":
            raise OfferGone(f"Weights at {self.address} are published no more; get a new ticket.")
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
            f"The pull of weights had not ended after {self.timeout:g} s, at {self.address}. Do "
            f"not use the weights; pull again with a longer timeout."
        )

    def confirm(self) -> None:
        """Raise `TransferError` if the weights have changed since they were listed."""
        self.ask(AskWeights(self.id, max(1, len(self.items))))

    def pair(self, cell: Cell, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where a cell goes to, and where it lies in the owner's memory."""
        box = cell.box
        tie = self.items[cell.name].tie
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
        """Names of its cells that have another checksum there."""
        numbers = {name: number for number, name in enumerate(self.items)}
        boxes = tuple((numbers[x.name], x.box._replace(start=x.theirs)) for x in cells)
        asked = AskWeights(self.id, boxes=boxes)
        self.once(asked)  # it begins while this side works
        here = _checksums([(parameters[x.name].tensor, x.box) for x in cells])
        there = self.ask(asked).sums
        if len(there) != len(here):
            raise PeerError(
                f"Expected {len(here)} checksums from {self.address}, got {len(there)}. Do not use "
                f"the weights; pull from another owner."
            )
        sums = zip(cells, here, there, strict=True)
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
    timeout: float | None = 600.0,
) -> int:
    """Fill tensors from owners that publish the same names, preferred ones first, on the current
    stream, few at a time; block until checksums that the owners work out agree. Returns the bytes.
    ``some``: owners hold others as well (the reader is one stage of a pipeline). ``timeout``:
    seconds for the whole call; None for no limit.

    Raises `LayoutError`, which lists all that differs, and `InvalidTerms`, before a byte is
    written. After any other error the tensors hold an unknown part of the weights, and must not be
    used until a pull succeeds: `OfferGone`, `PeerError`, `TransferTimeout`, `Unsupported` if an
    owner's memory cannot be mapped here, `TransferError` if weights changed meanwhile, or with the
    names whose checksums differ.
    """
    limit = seconds("timeout", timeout, above=True, optional=True)
    until = time.monotonic() + limit
    instance("channel", channel, Channel)
    flag("some", some)
    held = _named("parameters", parameters)
    _check_destinations(held)
    rate = Terms(max_gbps=max_gbps).max_gbps
    mine = items_of(held)
    if not isinstance(tickets, bytes) and not items("tickets", tickets, "tickets"):
        raise invalid("tickets", "one ticket or more", tickets, "Pass Published.ticket.")
    if any(capturing(x.tensor.device) for x in held.values()):
        raise refuse_capture("Pulling weights", "processes talk to each other; do it before")
    if not isinstance(tickets, bytes | Sequence) or isinstance(tickets, str):
        raise invalid("tickets", "bytes, or a list of them", tickets, "Pass `Published.ticket`.")
    given = [tickets] if isinstance(tickets, bytes) else tickets
    owners = [_Owner(channel, ticket, limit, until) for ticket in given]
    cells = plan(mine, [x.items for x in owners], some)
    pace = RateLimit(rate) if rate else None
    wrong = list[str]()
    total = 0
    on_host = any(x.tensor.is_cpu for x in held.values())
    for batch in _batches(cells, held, _PACED if rate or on_host else _BATCH):
        once = [x for x in batch if mine[x.name].tie == x.name]
        pairs = [owners[x.owner].pair(x, held[x.name].tensor) for x in once]
        nbytes = sum(into.nbytes for into, _ in pairs)
        _wait_for_turn(pace, nbytes, until)
        if time.monotonic() >= until:
            raise owners[batch[0].owner].late()
        copy_pairs(pairs)
        for i in {x.owner for x in batch}:
            wrong += owners[i].wrong([x for x in batch if x.owner == i], held)
        total += nbytes
    for owner in owners:
        owner.confirm()
    if wrong:
        raise TransferError(
            f"{len(mine)} weights were pulled, and checksums of these differ from their owners': "
            f"{', '.join(dict.fromkeys(wrong))}. Do not use any of them; pull again."
        )
    return total


def _wait_for_turn(pace: RateLimit | None, nbytes: int, until: float) -> None:
    """Wait until so many bytes may cross at the rate, at most until a time."""
    if pace:
        wait = pace.left(pace.start_of(nbytes))
        time.sleep(min(wait, max(0.0, until - time.monotonic())))


def _batches(
    cells: Sequence[Cell], parameters: Mapping[str, Parameter], most: int
) -> Iterator[list[Cell]]:
    """Yield cells of about ``most`` bytes together, and of at most as many as a message holds."""
    itemsizes = {name: x.tensor.itemsize for name, x in parameters.items()}
    pieces = [piece for x in cells for piece in _pieces(x, most // itemsizes[x.name])]
    sizes = (prod(x.box.extents) * itemsizes[x.name] for x in pieces)
    ends = accumulate(max(nbytes, most // _SUMS) for nbytes in sizes)
    for _, batch in groupby(zip(ends, pieces, strict=True), lambda pair: pair[0] // most):
        yield [cell for _, cell in batch]


def _pieces(cell: Cell, most: int) -> Iterator[Cell]:
    """Yield a cell in pieces of about ``most`` elements, so that a pull can end in its time."""
    offset, start, extents = cell.box
    total = prod(extents)
    axis = next((axis for axis, extent in enumerate(extents) if extent > 1), None)
    if total <= most or axis is None:
        yield cell
        return
    step = max(1, most * extents[axis] // total)
    if axis == len(extents) - 1:
        step = max(4, step // 4 * 4)  # so that checksums go by words of four bytes
    for at in range(0, extents[axis], step):
        size = min(step, extents[axis] - at)
        part = (*extents[:axis], size, *extents[axis + 1 :])
        box = Box(_shifted(offset, axis, at), _shifted(start, axis, at), part)
        yield from _pieces(cell._replace(box=box, theirs=_shifted(cell.theirs, axis, at)), most)


def _shifted(start: Dims, axis: int, by: int) -> Dims:
    """Return the start of a box that lies further along an axis."""
    return (*start[:axis], start[axis] + by, *start[axis + 1 :])
