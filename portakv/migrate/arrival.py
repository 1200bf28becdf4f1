# SPDX-License-Identifier: Apache-2.0
"""The slices in which the rows of a pull arrive in staging buffers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from time import monotonic
from typing import NamedTuple

import numpy as np

from portakv import arguments
from portakv.copy.handle import BlockTransfer
from portakv.errors import TransferCancelled
from portakv.graph import Task
from portakv.migrate.buffers import StagingBuffer
from portakv.migrate.checked_copy import copy_checked
from portakv.migrate.plan import Slice, Step
from portakv.migrate.pull import CANCELLED
from portakv.migrate.staging import Chunks, part_of, rows_bytes
from portakv.migrate.transports.base import Lane, Moving

PACED = 0.1  # seconds of a slice at a limited rate: a larger slice would be a burst
#: The slices of a pull that is large enough: one is filled while another crosses.
SLICES = 8
#: The bytes below which slices are not made smaller: each has its cost on both sides.
LEAST_ON_HOST = 32 << 20
LEAST_ON_DEVICE = 128 << 20


#: What landed of a slice, as tasks have it.
_LANDED = np.ones(1, np.bool_)
_NOT_LANDED = np.zeros(1, np.bool_)


class Arrival(Task):
    """The end of a slice of a step, for a pull and its layers. The task ``whole`` takes the slice,
    among others."""

    def __init__(self, step: Step, part: Slice, whole: Task, staged_bytes: int) -> None:
        # Not the constructor of a task: no caller passes terms of slices that need its checks.
        self.error = None
        self.landed = _NOT_LANDED
        self.step = step
        self.part = part
        self.whole = whole
        self.staged_bytes = staged_bytes  # of the slice in a staging buffer
        self._over = threading.Event()

    def scattering(self, chunks: Chunks) -> Callable[[], BlockTransfer]:
        """Return a function that copies the rows of the slice from a staging buffer, after the work
        of the stream that is current then."""
        layers, first, tokens = self.part
        dst = part_of(self.step.cut.dst.as_bytes(), slice(layers.start, layers.stop))
        src = chunks.of(dst, tokens)[1]
        dst_index = self.step.dst_index.shifted(first)
        return partial(copy_checked, src, dst, None, dst_index, tokens)

    def end(self, error: BaseException | None = None) -> None:
        """End the slice, unless it has ended."""
        if not self.ended:
            self.error = error
            self.landed = _LANDED if error is None else _NOT_LANDED
            self.ended = True
            self._over.set()

    def wait(self, timeout: float | None = None) -> bool:
        if self.whole.graph is None:
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


def arrivals(steps: Sequence[Step], max_gbps: float | None, whole: Task) -> list[Arrival]:
    """Return the slices of steps that a task takes.

    They are small enough that several are under way, large enough that their number costs little,
    and not longer than a moment at a limited rate.
    """
    nbytes = sum(step.nbytes for step in steps)
    on_host = steps[0].cut.dst.device.type == "cpu"
    most = max(LEAST_ON_HOST if on_host else LEAST_ON_DEVICE, -(-int(nbytes) // SLICES))
    if max_gbps is not None:
        most = min(most, int(PACED * 1e9 * max_gbps))
    return [arrival for step in steps for arrival in _arrivals_of(step, most, whole)]


def _arrivals_of(step: Step, most: int, whole: Task) -> Iterator[Arrival]:
    """Yield the slices of one step, of at most ``most`` bytes if they can be so small."""
    view = step.cut.dst.as_bytes()
    known = dict[tuple[int, int], int]()  # most slices are alike
    for part in step.slices(most):
        key = len(part.layers), part.tokens
        if key not in known:
            known[key] = rows_bytes(view, *key, view.heads)
        yield Arrival(step, part, whole, known[key])
