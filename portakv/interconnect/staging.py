# SPDX-License-Identifier: Apache-2.0
"""Memory that transfers pass through: dense rows on the device, and pinned bounce buffers.

Dense rows lie in their order in host memory. So a copy that is scattered across the link becomes a
copy inside the device, and few long runs across the link. `staged` uses dense rows in a `Staging`,
`pageable` uses `BounceBuffers`.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from itertools import pairwise
from math import prod
from typing import Any, Literal, NamedTuple, TypeAlias

import torch

from portakv.core.link import EVENTS, SliceOrder
from portakv.errors import PortaKVError
from portakv.host import pinned
from portakv.layout.encodings import pack_parameters_of
from portakv.runtime import cuda
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import inside
from portakv.runtime.streams import own_stream
from portakv.view.bound import bind_layout
from portakv.view.form import Form, KVRows
from portakv.view.view import KVView

#: The buffers of a staging: one is filled or emptied while the other crosses. Four if the next
#: transfer does not wait for the end of the last: one is half drained by then, and three hold 96
#: MiB. A persistent matmul lets a gather in only between two of its kernels, every 1.6 ms, in which
#: the link of an H200 moves 85 MiB.
RING = 2
DETACHED_RING = 4
#: Bounce buffers of a device: while the host copies one, the others cross. Of 2, 3 and 4 buffers of
#: 4 and 16 MiB, plain copies did best through 3 of 16 on an H200.
BUFFERS = 3

_PAGE = 4096  # bytes, at multiples of which images of stored blocks begin
_APART = 256  # bytes: buffers begin at multiples, so that vectors are as wide as they can be
STREAMS = 8  # the most streams with cached staging
#: The order of dense rows: the form's own, or an order that all backends know.
Order: TypeAlias = Literal["form", "layer"]
_UNBOUNDED = 0
_OUTERMOST = 1 << 62  # the stride of an axis of extent 1, which is never used


class _Factor(NamedTuple):
    """A factor of an axis in memory: the distance of one step, its name, and its extent."""

    table: int
    stride: int
    name: str
    extent: int  # 0: unbounded


class DenseRows:
    """The arrangement of a form's rows while they are dense.

    Attributes:
        block_size: tokens of a block; 1 if the form is not paged.
        any_length: blocks, or tokens, lie outermost, so that buffers of any length have one form.
    """

    def __init__(self, form: Form, order: Order = "form") -> None:
        self.form = form
        self.block_size = form.block_size or 1
        extents: dict[str, Any] = {
            "layers": form.layers,
            "kv": form.kv,
            "dim": tuple(form.widths),
        }
        if form.block_size:
            extents["block_size"] = form.block_size
        if form.encoding:
            widths = [plane.values // form.block_size for plane in form.encoding]
            extents |= {"dim": tuple(widths), "encoding": pack_parameters_of(form.encoding)}
        if form.encoding or not form.opaque:
            extents["heads"] = form.heads
        layout, self._shape = _described(form, extents, order)
        self._bound = bind_layout(layout, **extents)
        self.any_length = self._shape[0] == _UNBOUNDED

    def nbytes(self, slots: int) -> int:
        """Return the bytes of a buffer for ``slots`` slots, a multiple of `block_size`."""
        per = self.block_size if self.form.opaque else 1
        return slots * self.form.token_bytes // per

    def view(self, buffer: torch.Tensor, slots: int) -> KVView:
        """Return the first bytes of a uint8 buffer as rows of ``slots`` slots."""
        capacity = slots // self.block_size
        shape = [extent or capacity for extent in self._shape]
        return KVView.through(
            self._bound, buffer[: self.nbytes(slots)].view(shape), persistent=True
        )


def _described(form: Form, extents: Mapping[str, Any], order: Order) -> tuple[str, list[int]]:
    """Return the layout and shape (0: unbounded) of dense rows."""
    own = None if order == "layer" else _in_order(form)
    if own is not None:
        layout, shape = own
        sizes = [extent or 1 for extent in shape]
        with suppress(PortaKVError):  # the layout language may lack this order
            KVView(torch.empty(sizes, dtype=torch.uint8, device="cpu"), layout, **extents)
            return own
    # Layer by layer: every form has this order.
    each = form.heads * sum(form.widths)
    if form.encoding:
        return "layer block (kv head page)", [form.layers, _UNBOUNDED, each]
    if form.opaque:
        return "layer block (kv page)", [form.layers, _UNBOUNDED, each]
    if form.paged:
        sizes = [form.layers, _UNBOUNDED, form.block_size, each]
        return "layer block token (kv head dim)", sizes
    return "layer token (kv head dim)", [form.layers, _UNBOUNDED, each]


def _in_order(form: Form) -> tuple[str, list[int]] | None:
    """Return the layout and shape of the form's own order in memory, outermost first. None: no
    layout has this order."""
    factors = _outermost_first(form)
    names = [factor.name for factor in factors]
    shape = [factor.extent for factor in factors]
    if len(set(form.widths)) > 1:
        # Unequal parts follow each other, each with everything that lies inside it.
        at = names.index("kv")
        if _UNBOUNDED in shape[at + 1 :]:
            return None  # the language has no parts whose lengths depend on a buffer's
        each = prod(shape[at + 1 : -1])
        shape[at:] = [each * sum(form.widths)]
        names[at:] = [f"({' '.join(names[at:])})"]
    return " ".join(names), shape


def _outermost_first(form: Form) -> list[_Factor]:
    """Return the factors of a form in their order in memory.

    Blocks that begin closer to each other than a block is long, such as images of which one may
    begin at each page, lie outside of all that they hold.
    """
    ordered = sorted(_factors(form), key=lambda f: (f.table, f.stride), reverse=True)
    for block in ordered:
        if block.extent == _UNBOUNDED and not block.table and _reach(form, block) > block.stride:
            return [block, *(x for x in ordered if x is not block)]
    return ordered


def _reach(form: Form, block: _Factor) -> int:
    """Return the bytes that a block would cover if all that lies no further apart than blocks were
    inside."""
    first = min(part.offset for part in form.parts)
    reaches = []
    for part in form.parts:
        apart = part.offset - first
        held = [x for x in _inside(form, part) if not x.table and _lies_in(x.stride, block)]
        covered = sum((x.extent - 1) * x.stride for x in held if x.extent != _UNBOUNDED) + 1
        reaches.append(covered + (apart if _lies_in(apart, block) else 0))
    return max(reaches)


def _lies_in(distance: int, block: _Factor) -> bool:
    """Return whether what is so many bytes apart may lie inside of blocks.

    In a pool of one block, layers are as far apart as blocks, and lie outside. Images begin at
    pages, and it does not matter where blocks of a page lie.
    """
    return distance < block.stride or distance == block.stride <= _PAGE


def _factors(form: Form) -> list[_Factor]:
    """Return every factor of a form's axes, by its first part."""
    steps = {(b.table - a.table, b.offset - a.offset) for a, b in pairwise(form.parts)}
    table, stride = steps.pop() if len(steps) == 1 else (0, _OUTERMOST)
    return [_Factor(table, stride, "kv", form.kv), *_inside(form, form.parts[0])]


def _inside(form: Form, part: KVRows) -> list[_Factor]:
    """Return every factor of the axes of a part."""
    axes = ["layer", "block"] if form.paged else ["layer"]
    if form.encoding:
        axes.append("head")
    if not form.opaque:
        axes += ["token", "head"]
    factors = [each for axis in axes for each in _split(part, axis, axis)]
    return factors + _split(part, "dim", "page" if form.opaque else "dim")


def _split(part: KVRows, axis: str, name: str) -> list[_Factor]:
    steps = part.axis(axis)
    if not steps:
        return [_Factor(0, 1 if axis == "dim" else _OUTERMOST, name, 1)]
    names = [name]
    if len(steps) > 1:
        below = prod(step.extent for step in steps[1:])
        inner = f"{name}%{below}" if len(steps) == 2 else f"{name}%?"
        names = [f"{name}/{below}", *[inner] * (len(steps) - 1)]
    return [_Factor(x.table, x.stride, y, x.extent) for x, y in zip(steps, names, strict=True)]


class Buffers:
    """Buffers that transfers pass through, one transfer at a time, under ``lock``."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._memory: list[torch.Tensor] = []

    @property
    def nbytes(self) -> int:
        """Return the bytes of the allocated buffers."""
        return sum(memory.numel() for memory in self._memory)

    def view(self, at: int, dense: DenseRows, slots: int) -> KVView:
        """Return one of the buffers, as dense rows of ``slots`` slots."""
        return dense.view(self._memory[at], slots)

    @property
    def addresses(self) -> list[int]:
        """Return the address of each buffer."""
        return [memory.data_ptr() for memory in self._memory]


class Staging(Buffers):
    """The device's buffers of one stream.

    One transfer at a time issues its work, under ``lock``. On the device the stream orders the
    transfers; if they are detached, the buffers order them one by one.

    Attributes:
        half, link: the streams of the device's stage, and of the slices that cross.
        detached: transfers do not wait for the ends of earlier transfers.
        buffers: the number of buffers.
        events: by the numbers of a schedule; None: not recorded yet. The first ones mark the last
            use of each buffer.
    """

    def __init__(self, device: torch.device, detached: bool = False) -> None:
        super().__init__()
        self._device = device
        self.detached = detached
        self.half: torch.Stream = own_stream(device, priority=-1)
        self.link: torch.Stream = own_stream(device)
        self.buffers = DETACHED_RING if detached else RING
        self.events: list[torch.Event | None] = [None] * (self.buffers + EVENTS)
        self._words: array[int] | None = None
        # `BufferTurn` of ``link.h``: the buffer of the next slice of a detached transfer, and a bit
        # for each buffer that one used.
        self._turn = array("q", [0, 0])

    def reserve(self, nbytes: int) -> None:
        """Allocate ``nbytes`` for each buffer on the current stream, or on ``half`` if transfers
        are detached.

        Buffers that are too small are freed. The allocator reuses their memory only on that stream,
        which by then waits for every use; if transfers are detached, also only after the link has
        used it.
        """
        if self._memory and self._memory[0].numel() >= nbytes:
            return
        each = -(-nbytes // _APART) * _APART
        self._memory = []  # nothing is retained if the allocation fails
        self._words = None
        self._turn[1] = 0
        with inside(self.half if self.detached else None):
            memory = torch.empty(self.buffers * each, dtype=torch.uint8, device=self._device)
        # Slices, not `split`: a vendor's torch may lack it.
        self._memory = [memory[at * each : (at + 1) * each] for at in range(self.buffers)]
        if self.detached:
            # The allocator learns that the link uses the memory, and the link waits for what used
            # it before on the stream of the device's stage.
            memory.record_stream(self.link)
            self.link.wait_stream(self.half)

    def order(self, slices: int, downward: bool) -> SliceOrder:
        """Return what the schedule of a transfer depends on, and take buffers for its slices.

        Detached, the first slice takes the buffer after the last slice's.
        """
        alone = slices == 1 and not self.detached
        if not self.detached:
            return SliceOrder(slices, self.buffers, 0, 0, downward, alone, False)
        first, used = self._turn
        order = SliceOrder(slices, self.buffers, first, used, downward, alone, True)
        for nth in range(min(slices, self.buffers)):
            self._turn[1] |= 1 << (first + nth) % self.buffers
        self._turn[0] = (first + slices) % self.buffers
        return order

    def record(self, number: int, stream: torch.Stream) -> None:
        """Have an event mark the present work of a stream."""
        event = self.events[number]
        if event is None:
            self.events[number] = mark(stream)
        else:
            event.record(stream)

    @property
    def words(self) -> array[int]:
        """Return the buffers as `StagingBuffers` of ``link.h``, on a CUDA device."""
        if self._words is None:
            self._handles = self.handles()
            self._addresses = array("q", self.addresses)
            index = self._device.index
            self._words = array(
                "q",
                [
                    cuda.raw(self.half, index),
                    cuda.raw(self.link, index),
                    self._handles.buffer_info()[0],
                    self._addresses.buffer_info()[0],
                    self.buffers,
                    self._memory[0].numel() if self._memory else 0,
                    self.detached,
                    self._turn.buffer_info()[0],
                ],
            )
        return self._words

    def handles(self) -> array[int]:
        """Return the driver's handles of all events, on a CUDA device."""
        for number, event in enumerate(self.events):
            if event is None:
                made: Any = torch.cuda.Event()
                made.record(self.half)  # torch creates it now
                self.events[number] = made
        return array("q", map(_handle, self.events))


def _handle(event: Any) -> int:
    handle = getattr(event, "cuda_event", None)
    return int(event.event_id if handle is None else handle)


cached_staging: Bounded[tuple[torch.device, int, bool, bool], Staging] = Bounded(
    "staging of streams", STREAMS
)


#: Without it another thread would find no staging while one is moved to the end, and make its own.
#: Not the runtime's: who packs by copies holds another staging, which a step may wait for.
moving = threading.Lock()


def staging(
    device: torch.device, work: torch.Stream, detached: bool = False, packs: bool = False
) -> Staging:
    """Return the staging of a stream's transfers, or of its ``detached`` transfers, which do not
    wait for each other.

    ``packs``: of transfers that pack or unpack. Their slices may cross by transfers of rows, so
    these have other buffers, and another lock.

    Beyond `STREAMS` the staging that was not used for the longest time is freed.
    """
    key = device, work.stream_id, detached, packs
    with moving:
        current = cached_staging.pop(key, None) or Staging(device, detached)
        cached_staging[key] = current
    return current


class BounceBuffers(Buffers):
    """The pinned buffers of one device. One transfer at a time has them, under ``lock``.

    Each buffer records its crossing copy, not the transfer: a transfer may end before its last
    slices have crossed, or be interrupted, and the next transfer waits for the buffer that it
    takes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._crossing: list[torch.Stream | torch.Event | None] = [None] * BUFFERS

    def reserve(self, nbytes: int) -> None:
        """Allocate buffers of at least ``nbytes`` each."""
        if self._memory and self._memory[0].numel() >= nbytes:
            return
        for at in range(BUFFERS):
            self.wait(at)
        self._memory = []
        self._memory = [pinned.empty(nbytes, torch.uint8) for _ in range(BUFFERS)]

    def begin(self, at: int, stream: torch.Stream) -> None:
        """Record that a copy is about to be enqueued on a stream: until `end`, `wait` waits for the
        whole stream."""
        self._crossing[at] = stream

    def end(self, at: int, stream: torch.Stream) -> None:
        """Record that the copy was enqueued."""
        self._crossing[at] = mark(stream)

    def wait(self, at: int) -> None:
        """Block the host until nothing crosses from or to a buffer."""
        crossing = self._crossing[at]
        if crossing is not None:
            crossing.synchronize()
            self._crossing[at] = None


@cache
def bounce_buffers(device: torch.device) -> BounceBuffers:
    """Return the bounce buffers of a device."""
    return BounceBuffers()


def mark(stream: torch.Stream) -> torch.Event:
    """Return an event after the work on a stream."""
    event = torch.Event(stream.device)
    event.record(stream)
    return event
