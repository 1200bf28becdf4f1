# SPDX-License-Identifier: Apache-2.0
"""The sources of a save: how the blocks of its caller come into rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

from portakv.graph import Task
from portakv.graph.graph import Queue
from portakv.runtime.transfer import Completion
from portakv.storage.parts import APART
from portakv.storage.plan import Call, InFlight
from portakv.storage.rows import Crossing
from portakv.view import KVView


class Source(Protocol):
    """Brings the blocks of a save into rows.

    ``view``: the caller's, if the store reads it. ``issues``: `issue` makes the copies of chunks
    that have rows. ``long_tasks``: a copy takes the host as long for few bytes as for many.
    ``ends``: of the copies that it issued.
    """

    @property
    def view(self) -> KVView | None: ...

    @property
    def issues(self) -> bool: ...

    @property
    def long_tasks(self) -> bool: ...

    @property
    def ends(self) -> Sequence[Completion]: ...

    def issue(self, call: Call, started: Sequence[InFlight]) -> None:
        """Issue the copies of chunks that a caller's thread can issue."""

    def gather(self, call: Call, in_flight: InFlight) -> Task:
        """Plan the tasks that bring the blocks of a chunk into rows, and seal them; return the
        last."""


class ViewSource:
    """The view of a caller, which workers of a queue read, or copies that `issue` issues."""

    def __init__(
        self, view: KVView, crossing: Crossing, queue: Queue, pinned: bool, packed: bool
    ) -> None:
        self.view = view
        self._crossing = crossing
        self._queue = queue
        fast = pinned and not queue.max_gbps  # otherwise a worker keeps the pace, or waits
        # A worker sees which packed blocks do not fit.
        self.issues = fast and crossing.waits_for_nothing and not packed
        self.long_tasks = self.issues or (fast and crossing.on_device and packed)

    @property
    def ends(self) -> Sequence[Completion]:
        """Return the ends of the copies that were issued."""
        return self._crossing.ends

    def issue(self, call: Call, started: Sequence[InFlight]) -> None:
        """Issue copies for the chunks of a save from a device for which staging has room.

        If all chunks but the last are long, each has a separate copy, so that the link is busy
        while rows for the next one are evicted. Otherwise all have one copy together.
        """
        if not self.issues:
            return
        payload = call.form.own.form.payload_bytes
        if all(in_flight.count * payload >= APART for in_flight in started[:-1]):
            for in_flight in started:
                self._issue(call, [in_flight])
        else:
            self._issue(call, started)

    def _issue(self, call: Call, started: Sequence[InFlight]) -> None:
        """Issue one copy for chunks for which staging has room."""
        crossing = self._crossing
        granted = [in_flight for in_flight in started if call.shared.graph.take(in_flight)]
        if granted:
            items = [item for in_flight in granted for item in in_flight.items]
            blocks = [block for in_flight in granted for block in in_flight.calls[0][1]]
            try:
                crossing.begin(call.form.own.rows, items, blocks)
                call.form.spare.figures.add_raw(call.form.own.form, len(blocks))
            finally:  # a part may write the rows
                for in_flight in granted if crossing.ends else ():
                    in_flight.copied = partial(crossing.wait, crossing.ends[-1])

    def gather(self, call: Call, in_flight: InFlight) -> Task:
        """Plan the task that copies blocks of the view into rows, and seals them."""
        return call.gather(in_flight, self._crossing, self.view, self._queue)
