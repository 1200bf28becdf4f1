# SPDX-License-Identifier: Apache-2.0
"""Lent copies: copies between the rows of a store and views that other processes have.

The store plans the rest of a save or a load as always. It lends the rows to a `Copier`, which has
the copy made by whoever has the view, and ends it. No row that was lent serves another block before
that end, whatever happens to the call or to the store.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, Protocol, TypeAlias

import numpy as np

from portakv.arguments import invalid
from portakv.runtime.transfer import Completion
from portakv.storage.calls import Arrival, Call, FormPart, InFlight, Reasons
from portakv.storage.form import BlockForm
from portakv.storage.memory import Loan
from portakv.storage.reasons import FAILED, Reason
from portakv.storage.work import BaseQueue, Graph, Mask, Queue, Task
from portakv.view import KVView

#: The name of the queue of lent copies in figures, traces and errors; after it that of the form.
LENT = "lent"
#: The direction of a lent copy: into rows, or out of them.
Kind: TypeAlias = Literal["save", "load"]


class Copier(Protocol):
    """Makes the copies of a `FormStore.save_lent` or `FormStore.load_lent`."""

    def begin(self, copy: LentCopy, /) -> None:
        """Take over a copy, to make it now or later, in any thread or process.

        Called once for each part of a call, perhaps before the call returns, under the lock of the
        store's graph: be quick, wait for nothing, and take no lock under which a thread calls the
        store. If it raises, the copy has ended and nothing landed.
        """


class LentCopy:
    """A copy that a copier makes between rows of a store and blocks of a call.

    A save copies blocks into the rows, a load copies the rows into blocks. The copier may use the
    rows until it calls `end`.

    Attributes:
        kind: "save" or "load".
        rows: the numbers of the rows, of ``store.rows.tensor`` and of each mapping of it.
        blocks: the number of each row's block among the keys of the call.
        form: the form of the images in the rows. ``form.view(tensor)`` shows their payloads, for
            any mapping of the tensor.
        inner, outer: arguments of `KVView.slice` that select the copied layers and heads, from the
            view of the rows and from a view of the store's form. They differ, and a block has
            several rows, only in a load of blocks that were saved in other parts.
    """

    def __init__(
        self,
        queue: LentQueue,
        call: Call,
        part: FormPart,
        arrival: Arrival,
        reasons: Reasons,
        task: Task,
        mask: Mask,
    ) -> None:
        """Describe the blocks of a mask, of a task that copies the blocks of an arrival."""
        numbers = np.flatnonzero(mask).tolist()
        items = arrival.held.items
        self.kind: Kind = "save" if call.request.kind == "save" else "load"
        self.rows: Sequence[int] = [items[arrival.rows[i]] for i in numbers]
        self.blocks: Sequence[int] = [arrival.at[i] for i in numbers]
        self.form = part.form
        held = arrival.held
        self._in_flight = held if isinstance(held, InFlight) and held.store else None  # of a save
        self._call = call
        self.inner = part.part_slices
        self.outer = part.own_slices
        self._reasons = reasons
        self._keys = [call.request.keys[i] for i in self.blocks]
        self._numbers = numbers  # of the blocks in the task
        self._queue = queue
        self._task = task  # it retains the rows

    @property
    def raw(self) -> BlockForm | None:
        """Return the form of raw images, for blocks of a save of packed blocks that do not fit.

        The copier copies these blocks once more, by the view of this form, and passes them to
        `end`. None: such blocks cannot be stored.
        """
        return None if self._in_flight is None else self._in_flight.raw_form

    @property
    def cancelled(self) -> bool:
        """Return True if no call waits for the copy any longer: they were cancelled or are late.

        The copier may stop early, and ends the copy as always.
        """
        in_flight = self._in_flight
        wanted = not self._call.end.cut if in_flight is None else in_flight.wanted
        return not (wanted or self._task.ended)

    def end(
        self,
        landed: Mask | Sequence[bool] | None = None,
        raw: Mask | Sequence[bool] | None = None,
    ) -> None:
        """End the copy, in any thread, once: nothing reads or writes the rows from here on.

        Args:
            landed: the blocks whose copy was made, bool ``[len(rows)]``; None: all. A block that
                did not land is not stored, or is a miss.
            raw: the blocks whose rows hold images of the form `raw`, bool ``[len(rows)]``; None:
                none.

        A second call does nothing.

        Raises `InvalidTerms` for a mask of another kind, and for raw images that the store cannot
        keep; the copy has not ended then.
        """
        made = self._mask("landed", landed, True)
        rough = self._mask("raw", raw, False)
        if self.raw is None and rough.any():
            expected = "no raw block in a copy that keeps none"
            raise invalid("raw", expected, raw, "Leave it out.")
        graph = self._queue.graph
        if not graph.process.forked:  # the lock may be held for ever
            graph.runtime.change(partial(self._end, made, rough))

    def _mask(self, name: str, value: Mask | Sequence[bool] | None, default: bool) -> Mask:
        """Return which blocks an argument of `end` names, bool ``[len(rows)]``."""
        many = len(self._numbers)
        if value is None:
            return np.full(many, default)
        try:
            mask = np.asarray(value)
        except (TypeError, ValueError):
            mask = np.zeros(0)
        if mask.shape != (many,) or mask.dtype != np.bool_:
            usual = "all" if default else "none"
            expected = f"{many} bools, one for each row of the copy, or None for {usual}"
            raise invalid(name, expected, value)
        return mask

    def _end(self, made: Mask, rough: Mask) -> None:
        """Record the end, under the graph's lock."""
        task = self._task
        if self._in_flight is not None and not task.ended:
            self._in_flight.raw_rows.update(np.array(self._numbers)[rough].tolist())
        landed = np.zeros(task.blocks, np.bool_)
        landed[self._numbers] = made
        for key, there in zip(self._keys, made.tolist(), strict=True):
            if not (there or task.ended):
                self._reasons.report(key, Reason(FAILED, self._queue.name))
        self._queue.finish(task, landed)


class Borrowed:
    """Rows of the host tier that a copier copies out of, until it calls `end`.

    It has the attributes of a `LentCopy`, but no call of the store waits for it.

    Attributes:
        loan: retains the rows; whoever makes the object sets it.
    """

    kind: Kind = "load"
    raw: BlockForm | None = None
    cancelled = False

    def __init__(self, part: FormPart, blocks: int) -> None:
        self.rows: Sequence[int] = ()
        self.blocks: Sequence[int] = range(blocks)
        self.form = part.form
        self.inner = part.part_slices
        self.outer = part.own_slices
        self.loan: Loan | None = None

    def end(
        self,
        landed: Mask | Sequence[bool] | None = None,
        raw: Mask | Sequence[bool] | None = None,
    ) -> None:
        """Give the rows back, in any thread. A second call does nothing; the arguments do not
        count."""
        if self.loan is not None:
            self.loan.cancel()


class LentQueue(BaseQueue):
    """The queue of lent copies, whose work begins a copy. A copier ends it.

    A copy is never cancelled, as its copier may use the rows. It holds up no other copy. ``form``:
    the name of the blocks' form, of a store with several forms; else empty.
    """

    def __init__(self, graph: Graph, form: str) -> None:
        super().__init__(graph, f"{LENT}:{form}" if form else LENT, LENT)

    def push(self, task: Task, /) -> None:
        """Begin the copy of a task, under the graph's lock. A copier may end it meanwhile."""
        task.since = self.graph.clock()
        self.begin(task)
        try:
            if task.work is not None:
                task.work(task, task.left.copy())
        except BaseException as error:  # of the copier; the tasks after it must not wait for ever
            self.finish(task, None, error)


class Lending:
    """Plans the lent copies of one call.

    Args:
        copier: makes the copies.
        queue: the queue of lent copies.
        seals: the queue whose workers seal the images of a save.
    """

    issues = False  # the store issues no copy
    long_tasks = False
    ends: Sequence[Completion] = ()
    view: KVView | None = None

    def __init__(self, copier: Copier, queue: LentQueue, seals: Queue) -> None:
        self._copier = copier
        self._queue = queue
        self._seals = seals

    def issue(self, call: Call, started: Sequence[InFlight]) -> None:
        """Do nothing: the copies begin once they have rows."""

    def gather(self, call: Call, in_flight: InFlight) -> list[Task]:
        """Return the copy of blocks of a save into rows, and the task that seals them."""
        at = in_flight.at
        arrival = Arrival(in_flight, {}, at, range(len(at)))
        lent = self._lend(call, in_flight.part, arrival, in_flight.reasons)
        call.gathers.append(lent)
        return [lent, call.task(at, in_flight.seal, self._seals, in_flight)]

    def cross(self, call: Call, part: FormPart, arrival: Arrival) -> None:
        """Plan the copy of blocks of a load out of their rows."""
        reasons = Reasons()
        call.explanation.sources.append(reasons)
        call.plan_crossing(0, self._lend(call, part, arrival, reasons), arrival)

    def _lend(self, call: Call, part: FormPart, arrival: Arrival, reasons: Reasons) -> Task:
        """Return the task that begins the copy of blocks of an arrival."""

        def begin(task: Task, mask: Mask) -> None:
            self._copier.begin(LentCopy(self._queue, call, part, arrival, reasons, task, mask))

        return call.task(arrival.at, begin, self._queue, arrival.held)
