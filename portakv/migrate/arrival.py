# SPDX-License-Identifier: Apache-2.0
"""The slices in which the rows of a pull arrive in staging buffers."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from time import monotonic
from typing import NamedTuple

import numpy as np

from portakv import arguments
from portakv.copy.handle import BlockTransfer
from portakv.errors import PackOverflow, TransferCancelled
from portakv.graph import Outcome, Task
from portakv.migrate.buffers import StagingBuffer
from portakv.migrate.checked_copy import copy_checked
from portakv.migrate.crossed import Crossed as Crossed
from portakv.migrate.crossing import Crossing, crossings, flagged, runs, scattered
from portakv.migrate.plan import Slice, Step
from portakv.migrate.pull import CANCELLED
from portakv.migrate.staging import Chunks, Slots, has_ended, part_of, rows_bytes, unfit_blocks
from portakv.migrate.transports.base import Lane, Moving

PACED = 0.1  # seconds of a slice at a limited rate: a larger slice would be a burst
#: The slices of a pull that is large enough: one is filled while another crosses. On devices each
#: slice costs the host 0.5 ms, more than the wire of 128 MiB (benchmarks/notes/migration.md).
SLICES_ON_HOST = 8
SLICES_ON_DEVICE = 4
#: The bytes below which slices are not made smaller: each has its cost on both sides.
LEAST_ON_HOST = 32 << 20
LEAST_ON_DEVICE = 128 << 20


#: What landed of a slice that landed, as tasks have it.
_LANDED = np.ones(1, np.bool_)


class Arrival(Task):
    """The end of a slice of a step, for a pull and its layers. The task ``whole`` takes the slice,
    among others.

    Attributes:
        staged_bytes: of the slice in a staging buffer.
        slots: how the slice is packed there; None: it crosses raw.
        again: the slices that bring its blocks that did not fit, raw.
        whole_slice: the slice of which this one brings such blocks.
        unfit: the positions in the step of its blocks that hold no rows anywhere.
    """

    again: Sequence[Arrival] = ()
    whole_slice: Arrival | None = None
    unfit: Sequence[int] = ()
    _left = 0  # of `again`, the slices that have not ended

    def __init__(
        self,
        step: Step,
        part: Slice,
        whole: Task,
        staged_bytes: int,
        slots: Slots | None = None,
    ) -> None:
        # Not the constructor of a task: no caller passes terms of slices that need its checks.
        self.outcome = Outcome(1)
        self.step = step
        self.part = part
        self.whole = whole
        self.staged_bytes = staged_bytes
        self.slots = slots
        self._over = threading.Event()

    def scattering(self, chunks: Chunks) -> Callable[[], BlockTransfer]:
        """Return a function that copies the rows of the slice from a staging buffer, after the work
        of the stream that is current then."""
        layers, first, tokens = self.part
        dst_index = self.step.dst_index.shifted(first)
        window = slice(layers.start, layers.stop)
        if self.slots is not None:
            dst = part_of(self.step.cut.dst, window)
            packed = chunks.packed(dst, tokens, self.slots)[1]
            return partial(scattered, packed, dst, dst_index, tokens)
        dst = part_of(self.step.cut.dst.as_bytes(), window)
        src = chunks.of(dst, tokens)[1]
        return partial(copy_checked, src, dst, None, dst_index, tokens)

    @property
    def encoding(self) -> str:
        """Return the encoding that the owner's messages name; empty: raw rows."""
        return "" if self.slots is None else self.slots.pack.text

    @property
    def packed_blocks(self) -> int:
        """Return the number of blocks that cross in slots; 0 for a raw slice."""
        return 0 if self.slots is None else self.part.tokens // self.slots.unit

    def cross_in(self, slots: Slots | None) -> None:
        """Have the slice, which was not requested yet, cross in other slots, or raw."""
        view = self.step.cut.dst.as_bytes()
        extents = len(self.part.layers), self.part.tokens, view.heads
        self.slots = slots
        if slots is None:
            self.staged_bytes = rows_bytes(view, *extents)
        else:
            self.staged_bytes = slots.nbytes(view, *extents)

    def end_with(self, copy: BlockTransfer) -> int:
        """End the slice by its copy, which has ended; return the number of blocks that did not fit.

        The slice then ends with the slices that bring them raw, which are in `again`. If no raw
        rows of them exist, `end_unfit` ends the slice.
        """
        unfit = unfit_blocks(copy) if copy.completions else []
        if unfit and self.slots is not None:
            if self.step.cut.packed:
                before = self.part.first // self.slots.unit
                self.unfit = [before + at for at in unfit]
                return 0
            self.again = [*self._raw_slices(unfit, self.slots.unit)]
            self._left = len(self.again)
            return len(unfit)
        self.end()
        whole = self.whole_slice
        if whole is not None:
            whole._left -= 1
            if not whole._left:
                whole.end()
        return 0

    def _raw_slices(self, blocks: Sequence[int], unit: int) -> Iterator[Arrival]:
        """Yield slices that bring blocks of this one raw, by their positions in it."""
        layers, first, _ = self.part
        view = self.step.cut.dst.as_bytes()
        for start, count in runs(blocks):
            part = Slice(layers, first + start * unit, count * unit)
            nbytes = rows_bytes(view, len(layers), part.tokens, view.heads)
            again = Arrival(self.step, part, self.whole, nbytes)
            again.whole_slice = self
            yield again

    def end(self, error: BaseException | None = None) -> None:
        """End the slice, unless it has ended."""
        if not self.ended:
            if error is None:
                self.outcome.end("landed", _LANDED, None)
            else:
                self.outcome.end("failed", None, error)
            self._over.set()

    def wait(self, timeout: float | None = None) -> bool:
        if self.whole.schedule.graph is None:
            return False  # nothing takes the slice: its task was not submitted
        until = monotonic() + arguments.seconds("timeout", timeout, optional=True)
        while not self._over.wait(min(0.05, max(0.0, until - monotonic()))):
            if self.whole.wait(0.0):  # it never ran, or this process was forked
                if self.whole.ended:
                    self.end(self.whole.error or TransferCancelled(CANCELLED))
                return True
            if monotonic() >= until:
                return False
        return True


def end_unfit(taken: Sequence[Arrival], errors: list[PackOverflow]) -> None:
    """End the slices with blocks that hold no rows, after a task has taken all of its slices.

    ``errors`` first gets an error for each step, which names such blocks of all of its slices. The
    error of a slice names those of its layers.
    """
    spoilt = [each for each in taken if each.unfit]
    steps = {id(each.step): each.step for each in spoilt}
    of_step = defaultdict[int, set[int]](set)
    of_layers = defaultdict[tuple[int, range], set[int]](set)
    for each in spoilt:
        of_step[id(each.step)].update(each.unfit)
        of_layers[id(each.step), each.part.layers].update(each.unfit)

    errors += [flagged(step, sorted(of_step[number])) for number, step in steps.items()]
    for each in spoilt:
        each.end(flagged(each.step, sorted(of_layers[id(each.step), each.part.layers])))


class InFlight(NamedTuple):
    """A slice on its way into a staging buffer."""

    arrival: Arrival
    buffer: StagingBuffer
    moving: Moving
    lane: Lane


class Scattered(NamedTuple):
    """A slice whose copy from the staging buffer was issued."""

    arrival: Arrival
    moving: Moving
    lane: Lane
    copy: BlockTransfer

    def has_ended(self, wait: bool) -> bool:
        """Return True if the copy has ended, or wait for it. Blocks that do not fit are no
        error."""
        # Without completions it had ended when it was issued.
        return not self.copy.completions or has_ended(self.copy, wait)


def arrivals(
    steps: Sequence[Step], max_gbps: float | None, whole: Task, crossed: Crossed
) -> list[Arrival]:
    """Return the slices of steps that a task takes, packed slices first.

    They are small enough that several are under way, large enough that their number costs little,
    and not longer than a moment at a limited rate. ``crossed``: names the encoding, and gets the
    reason for rows that cross raw.
    """
    parts = list[Crossing]()
    for step in steps:
        some, why = crossings(step, crossed.pack)
        parts += some
        crossed.why = crossed.why or why
    nbytes = sum(step.nbytes for step in steps)
    on_host = steps[0].cut.dst.device.type == "cpu"
    slices = SLICES_ON_HOST if on_host else SLICES_ON_DEVICE
    most = max(LEAST_ON_HOST if on_host else LEAST_ON_DEVICE, -(-int(nbytes) // slices))
    if max_gbps is not None:
        most = min(most, int(PACED * 1e9 * max_gbps))
    made = [arrival for part in parts for arrival in _arrivals_of(part, most, whole)]
    if any(part.slots for part in parts):
        made.sort(key=lambda each: each.slots is None)  # slices of one encoding are one request
    return made


def _arrivals_of(crossing: Crossing, most: int, whole: Task) -> Iterator[Arrival]:
    """Yield the slices of one step, of at most ``most`` bytes if they can be so small.

    They are cut by their raw bytes, so that a buffer has space for blocks that do not fit.
    """
    step, slots = crossing
    view = step.cut.dst.as_bytes()
    known = dict[tuple[int, int], int]()  # most slices are alike
    for part in step.slices(most, 1 if slots is None else slots.unit):
        key = len(part.layers), part.tokens
        if key not in known:
            if slots is None:
                known[key] = rows_bytes(view, *key, view.heads)
            else:
                known[key] = slots.nbytes(view, *key, view.heads)
        yield Arrival(step, part, whole, known[key], slots)
