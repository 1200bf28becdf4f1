# SPDX-License-Identifier: Apache-2.0
"""The way of a load and of a save of a block store.

A call locates each part of a block in a tier or in rows. Coroutines then bring the blocks into rows
(`InFlight.read`, `InFlight.save`), from there into a view (`Call.cross`) or into tiers
(`InFlight.store`), and end the call (`Call.finish`). They run tasks of the transfer graph, and join
transfers that other calls have started.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import count, pairwise, repeat
from operator import attrgetter
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, cast, runtime_checkable
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import torch

from portakv.arguments import invalid
from portakv.copy.choose_encoding import (
    SAMPLE_AGAIN,
    EncodingChoice,
    Sample,
    best_of,
    check_terms,
    is_out_of_date,
    judged,
    rated_choice,
    stays_raw,
)
from portakv.errors import InvalidTerms, PackOverflow, PortaKVError, Unsupported
from portakv.graph.trace import Figures
from portakv.layout.encodings import FLAG_AT, PACKED, TOTAL_AT, Pack, PackedPlane
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.runtime.transfer import Finished
from portakv.storage import image
from portakv.storage.eviction import FIRST, Changed, marks_of
from portakv.storage.form import HEADER, BlockForm, Slices
from portakv.storage.memory import Claim, Crossing, Held, RowQueue, Rows, Want
from portakv.storage.reasons import EVICTED, MISSING, OVERFLOWED, Reason
from portakv.storage.tiers.base import Keys, TierStore
from portakv.storage.work import (
    BaseQueue,
    Counts,
    End,
    Ending,
    Graph,
    Handle,
    Mask,
    Missing,
    Queue,
    Task,
)
from portakv.tasks import SLACK, Priority, Wait, Work
from portakv.tasks.runtime import Steps
from portakv.view import KVView

# ------------------------------------------------------------------------------------------------
# What a call of a block store asks for.


@dataclass(frozen=True, eq=False)
class Request:
    """What a call of a user asks for.

    ``after``: for each key of a save the key that it follows; None: it begins a prompt. ``lent``:
    others make its copies.
    """

    kind: str
    keys: list[bytes]
    priority: Priority
    deadline: float | None = None
    after: Sequence[bytes | None] = ()
    lent: bool = False

    @cached_property
    def roots(self) -> list[bytes | None]:
        """Return for each block of a save the key of another call that its chain follows."""
        own = {*self.keys}
        known = dict[bytes | None, bytes | None]()
        for key, before in zip(self.keys, self.after, strict=True):
            known[key] = known.get(before) if before in own else before
        return [*known.values()]

    def before(self, blocks: Sequence[int]) -> list[bytes]:
        """Return the keys of other calls that the chains of some blocks follow."""
        if not self.after:
            return []
        roots = dict.fromkeys(self.roots[i] for i in blocks)
        return [key for key in roots if key is not None]

    @cached_property
    def order(self) -> dict[bytes, int]:
        """Return the position of each key: no block of the call evicts an earlier one."""
        order = dict.fromkeys(self.before(range(len(self.keys))), -1)
        order.update(zip(self.keys, range(len(self.keys)), strict=True))
        return order

    @cached_property
    def follows(self) -> list[int]:
        """Return the marks of the predecessors of a save's blocks."""
        marks = marks_of([key or b"" for key in self.after])
        return [FIRST if key is None else mark for key, mark in zip(self.after, marks, strict=True)]


# ------------------------------------------------------------------------------------------------
# What a store announces: handles that have ended, and blocks that were stored or lost.

#: Seconds between two looks at copies that were issued.
LOOK = 5e-4


class Change(NamedTuple):
    """A block that was stored in a tier, or lost.

    Attributes:
        number: counts all changes; a listener that misses a number has missed changes.
        key: 32 bytes.
        tier: "host", "disk", or that of another package; a second disk is "disk 2".
        stored: False if it was lost.
        why: of a block that was lost: "evicted", "damaged" or "deleted".
        form: the name of its form, of a store with several forms; else empty.
    """

    number: int
    key: bytes
    tier: str
    stored: bool
    why: str = ""
    form: str = ""


class Snapshot(NamedTuple):
    """The keys of each tier after the change of a number.

    The snapshot may have later changes already: apply those after ``number`` once more.
    """

    number: int
    keys: dict[str, list[bytes]]


@runtime_checkable
class Listed(Protocol):
    """A tier store with an index that others may follow.

    A `TierStore` need not be one: that of an object store has no index.
    """

    tier: str

    def keys(self) -> list[bytes]:
        """Return the keys of all blocks."""

    def announce(self, changed: Changed, /) -> None:
        """Report from now on each block that is stored or lost.

        The index changes before the report. Reports come from any thread, under any lock of the
        tier.
        """


def named_indices(tier_stores: Iterable[Listed]) -> dict[str, Listed]:
    """Return tier stores by the names of their tiers: "disk", and "disk 2" for a second one."""
    named = dict[str, Listed]()
    for each in tier_stores:
        same = sum(other.tier == each.tier for other in named.values())
        named[f"{each.tier} {same + 1}" if same else each.tier] = each
    return named


class Announced:
    """Handles and changes that wait for their consumers, once there are consumers.

    Attributes:
        handles: those that have ended.
        changes: blocks that were stored or lost, with numbers in order.
        indices: of each form the tier stores with one, by the names of their tiers.
    """

    def __init__(self, graph: Graph) -> None:
        self.handles = Finished[Handle]()
        self.changes = Finished[Change]()
        self.indices = dict[str, dict[str, Listed]]()
        self._graph = graph
        self._lock = threading.Lock()  # reports come from several tiers
        self._begun = False  # changes are announced
        self._number = 0

    def close(self) -> None:
        """Announce nothing from now on."""
        self.handles.close()
        self.changes.close()

    def follow(self, handle: Handle) -> None:
        """Announce a handle at its end, of which no part was issued."""
        handle.when_ended(partial(self.handles.add, handle))

    def follow_issued(self, handle: Handle) -> None:
        """Announce a handle at its end, of which a part was issued."""
        self._graph.runtime.start(self._look(handle), locked=False)

    async def _look(self, handle: Handle) -> None:
        """Look for the end of issued copies, which nothing reports."""
        while not handle.issued_ended():
            if self._graph.closed:
                return
            await Wait(until=self._graph.clock() + LOOK)
        self.follow(handle)

    @property
    def is_unchanged(self) -> bool:
        """Return whether the consumer of changes has taken them all."""
        return self._begun and self.changes.is_idle

    def listen(self) -> Finished[Change]:
        """Return the changes of all indices, which are kept from the first call on."""
        with self._graph.lock:  # two first calls
            if not self.changes.started:
                self.changes.start()
                for form, named in self.indices.items():
                    for name, each in named.items():
                        each.announce(partial(self._report, form, name))
                self._begun = True
        return self.changes

    def snapshot(self, forms: Iterable[str]) -> Snapshot:
        """Return the keys of the tier stores of forms, and listen to all from the first call on."""
        self.listen()
        with self._lock:
            number = self._number  # before the keys, in which later changes may be
        keys = dict[str, dict[bytes, None]]()
        for form in forms:
            for name, each in self.indices[form].items():
                keys.setdefault(name, {}).update(dict.fromkeys(each.keys()))
        return Snapshot(number, {name: [*some] for name, some in keys.items()})

    def _report(self, form: str, tier: str, key: bytes, stored: bool, why: str) -> None:
        """Number a change, and keep it."""
        with self._lock:
            self._number += 1
            self.changes.add(Change(self._number, key, tier, stored, why, form))


# ------------------------------------------------------------------------------------------------
# The parts of a block that lie in tiers, the stages in which they cross into a view, and the
# sizes of the tasks that move them.

#: Bytes of a task of a save, and of a load, unless a block is larger. A load in 16 MiB pieces left
#: a disk's queue too short on an H200 machine: 1.6 GB/s, by 32 MiB 2.1. An urgent load waits for
#: one piece of a save.
SAVED = 16 << 20
LOADED = 32 << 20
#: Bytes of a long task of a save, which no tier stores. Each task takes the host some 0.1 ms if its
#: copy was issued. One that packs takes 0.85 ms; 16 MiB of raw rows cross at 23 GB/s, 128 at 52.
LONG = 128 << 20
#: Bytes of a task whose copy is issued by itself, before the next task takes rows.
APART = 64 << 20
#: Bytes up to which tasks share no work of a call.
SHARED = 1 << 20
#: Blocks of a task at most: the end of a task takes the graph's lock for 4 us a block, and urgent
#: work waits for it.
BLOCKS = 256
#: Blocks of a call that are planned before others may take the graph's lock.
SLICE = 256
#: Bytes of a block below which a read keeps the interpreter more than the disk.
SMALL = 64 << 10
PARTS = 8  # of the device's stage by layer, if blocks are read as a whole


class Stage(NamedTuple):
    """The rows that cross together between rows and a view.

    ``layers`` of the view, their segment (None: the image), and both sides of the copy.
    """

    layers: range
    segment: int | None
    inner: KVView
    outer: KVView


@dataclass(eq=False)
class FormPart:
    """Blocks of one form, and the rectangle that they share with the store's form.

    ``cells`` has a bit for each head of each layer of the rectangle. ``part_slices`` and
    ``own_slices`` are the rectangle in a view of this form and in a view of the store's form.
    """

    form: BlockForm
    tier_stores: list[TierStore]
    part_slices: Slices
    own_slices: Slices
    rows: KVView  # that rectangle of all rows of the store
    cells: int

    def name(self, key: bytes) -> bytes:
        """Return the name of this part of a block among the rows."""
        return self.form.digest + key

    def names(self, keys: Sequence[bytes]) -> list[bytes]:
        """Return the name of this part of each block among the rows."""
        digest = self.form.digest
        return [digest + key for key in keys]

    def stages(self, view: KVView, by_layer: bool) -> list[Stage]:
        """Return the stages between rows and a view, in order of their layers."""
        first = self.part_slices["layers"].start
        past = self.part_slices["layers"].stop
        segmented = by_layer and len(self.form.segments) > 1
        outer = view.slice(**self.own_slices)
        if segmented:
            ends = [0, *(segment.past_layer for segment in self.form.segments)]
        else:
            many = min(PARTS, past - first) if by_layer else 1
            ends = np.linspace(first, past, 1 + many, dtype=int).tolist()
        result = list[Stage]()
        to = self.own_slices["layers"].start
        for number, (a, b) in enumerate(pairwise(min(max(x, first), past) - first for x in ends)):
            if a < b:
                sides = self.rows.slice(layers=slice(a, b)), outer.slice(layers=slice(a, b))
                result.append(Stage(range(to + a, to + b), number if segmented else None, *sides))
        return result


class Arrival(NamedTuple):
    """Blocks ``at`` of a call that arrive in ``rows`` of those that are held.

    They are complete for stage n after ``ends[n]``.
    """

    held: Held
    ends: dict[int, list[End]]
    at: Sequence[int]
    rows: Sequence[int]

    def cross(self, crossing: Crossing, stage: Stage, _: Task, mask: Mask) -> None:
        """Copy the blocks of a mask from their rows into the view, as the task of a stage."""
        left = np.flatnonzero(mask)
        items = np.array(self.held.items)[np.array(self.rows)[left]]
        crossing.copy(stage.inner, stage.outer, items, np.array(self.at)[left])


def parts_of(
    form: BlockForm,
    forms: Iterable[BlockForm],
    tier_stores: Sequence[TierStore],
    rows: torch.Tensor,
) -> list[FormPart]:
    """Return the parts of blocks of a form that lie in tiers and in rows of a tensor.

    The form itself comes first, then the others by their first cell, the largest first among
    equals.
    """
    parts = list[FormPart]()
    across = form.heads[1] - form.heads[0]
    for other in forms:
        if slices := form.part_of(other):
            stores = [tier_store for tier_store in tier_stores if tier_store.form == other]
            layers = slices[1]["layers"]
            heads = slices[1]["heads"]
            cells = sum(1 << n for n in range(heads.start, heads.stop))
            cells = sum(cells << across * n for n in range(layers.start, layers.stop))
            parts.append(
                FormPart(other, stores, *slices, other.view(rows).slice(**slices[0]), cells)
            )
    return parts[:1] + sorted(parts[1:], key=lambda x: (x.cells & -x.cells, -x.cells.bit_count()))


def task_blocks(
    blocks: list[int], size: int, nbytes: int, rows: int, least: int, widths: Sequence[int]
) -> list[list[int]]:
    """Return the blocks of each task, at most ``nbytes`` and ``rows`` of them.

    At least ``least`` tasks share the blocks, or all places of a queue of some width. Few bytes
    are one task, unless the helpers share them, as each task costs its steps.
    """
    if len(blocks) * size <= SHARED:
        least = 1
    share = -(-len(blocks) // max([least, *widths]))
    most = max(1, min(rows, nbytes // size, share, BLOCKS))
    return [blocks[first : first + most] for first in range(0, len(blocks), most)]


# ------------------------------------------------------------------------------------------------
# Blocks of a save that do not fit into packed slots: they are stored raw, in the raw form of the
# same store, under the same key.

#: Why a store does not keep a block of a packed view.
FLAGGED = (
    "Expected packed blocks, got one that did not fit into its slots when it was packed. Save this "
    "block from a raw view"
)
#: Why a store does not keep a block that does not fit, although it has the raw form.
NO_ROOM = (
    "Expected host memory for the raw rows of a block that does not fit into packed slots, got "
    "none, as other transfers have it. Give the store more staging"
)


def flagged(part: FormPart, items: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return which rows of a packed form have a slot with the flag of a plane that did not fit.

    Other encodings have no flags: every block fits them.
    """
    planes = [plane for plane in part.form.planes if isinstance(plane, PackedPlane)]
    if not planes:
        return np.zeros(len(items), np.bool_)
    slots = part.rows.tensors
    assert isinstance(slots, torch.Tensor)  # of the rows of a store
    if slots.shape[-1] == planes[0].slot_bytes:  # kv is an axis
        planes = planes[:1]
    chosen = torch.from_numpy(items)
    result = np.zeros(len(items), np.bool_)
    start = 0
    for plane in planes:
        flags = slots[..., start + plane.head_at + FLAG_AT][chosen]
        result |= (flags != PACKED).flatten(1).any(1).numpy()
        start += plane.slot_bytes
    return result


def copy_fitting(
    crossing: Crossing,
    inner: KVView,
    outer: KVView,
    items: npt.NDArray[np.int64],
    at: npt.NDArray[np.int64],
) -> tuple[Mask, str]:
    """Copy blocks of a view into rows, packed if the rows are.

    Args:
        inner, outer: the views of the rows and of the caller's blocks.
        items, at: the number of each row, and the place of its block in the call.

    Returns which blocks do not fit into packed slots, bool ``[items]``, and the sentence that says
    so. The rows of these blocks hold slots that nothing can read.
    """
    try:
        crossing.copy(inner, outer, items, at)
    except PackOverflow as error:
        refused: Mask = np.isin(items, error.dst_blocks)
        if np.count_nonzero(refused) != len({*error.dst_blocks}):
            raise  # not rows of this copy
        return refused, str(error)
    return np.zeros(len(items), np.bool_), ""


# ------------------------------------------------------------------------------------------------
# `encoding="auto"`: a store has the packed and the raw form of its blocks, and chooses one of
# them for each save.

#: The most of a disk or an object store that is believed, unless its rate is declared: a drive with
#: four lanes of PCIe 4.0.
TIER_GBPS = 7.0
#: The names of the two forms of such a store.
PACKED_FORM = "packed"
RAW = "raw"


@dataclass(frozen=True, slots=True)
class AutoEncoding:
    """Terms of a store that packs blocks where it pays; ``encoding="auto"`` has the usual ones.

    Attributes:
        pack: the parameters of packed blocks; `portakv.choose_encoding` chooses them by a sample.
            None: those of the form of the store if that is packed, else the usual ones.
        link_gbps: 10^9 bytes a second of the slowest link that blocks cross. None: that of the link
            between the device and the host, measured, and at most 7 if the store has tiers. Rows
            of a CPU have 7 with tiers, and stay raw without.
        packing_gbps: 10^9 bytes of raw rows a second that packed copies reach at most. None:
            measured, over the link between the device and the host; where `reference` packs, such
            as on a CPU, rows stay raw.

    Raises:
        InvalidTerms: a value that a term cannot have.
    """

    pack: Pack | None = None
    link_gbps: float | None = None
    packing_gbps: float | None = None

    def __post_init__(self) -> None:
        check_terms(self.pack, self.link_gbps, self.packing_gbps)


#: What a store takes as its encoding; None: blocks are stored as their forms say.
Encoding: TypeAlias = Literal["auto"] | AutoEncoding | None


def terms_of(encoding: object) -> AutoEncoding | None:
    """Return the terms of an encoding; None without one. Raises `InvalidTerms` for anything
    else."""
    if encoding is None or isinstance(encoding, AutoEncoding):
        return encoding
    if isinstance(encoding, str) and encoding == "auto":
        return AutoEncoding()
    do = "Pass one of these; a packed form is made by BlockForm.of(encoding=...)."
    raise invalid("encoding", "'auto', an AutoEncoding or None", encoding, do)


def forms_for(form: BlockForm, terms: AutoEncoding) -> tuple[dict[str, BlockForm], str]:
    """Return the forms of a store that chooses, by their names, and why it has only the raw one, as
    a sentence. Raises `InvalidTerms` for a lossy form."""
    if form.lossy:
        got = f"one in {form.encoding!r}"
        raise InvalidTerms(
            f"Expected form to be one of raw or packed blocks with encoding='auto', got {got}, "
            f"which does not keep every bit. Leave encoding out, or pass the raw form."
        )
    pack = terms.pack
    if pack is None:
        pack = Pack.of_text(form.encoding) if form.encoding else Pack()
    raw = form.raw
    try:
        return {PACKED_FORM: raw.packed(pack), RAW: raw}, ""
    except Unsupported as error:
        return {RAW: raw}, str(error)


@dataclass
class Known:
    """The choice for a device.

    Attributes:
        choice: the present choice.
        rated: the choice by the rates; None: no sample changes the choice.
        rates_missing: the rates could not be measured, and are measured again.
        left: raw bytes of saves until the next sample, or the next rates.
        pending: a sample whose result has not been looked at.
        trouble: the reason why the latest sample was not taken, as a sentence; empty if it was.
    """

    choice: EncodingChoice
    rated: EncodingChoice | None = None
    rates_missing: bool = False
    left: int = field(default_factory=lambda: SAMPLE_AGAIN)
    pending: Sample | None = None
    trouble: str = ""


class Chooser:
    """Chooses for the saves of a store, and remembers the choices.

    Threads that save at the same time may take two samples in place of one.

    Args:
        form: the packed form; None: the store has only the raw one.
        why: then, the reason, as a sentence.
        terms: the terms of the store.
        tiers: the store has tiers besides the host's memory.
        figures: counts the blocks of both forms.
        graph: its trace gets each new choice with its figures.

    Attributes:
        known: the choice for each device.
    """

    def __init__(
        self,
        form: BlockForm | None,
        why: str,
        terms: AutoEncoding,
        tiers: bool,
        figures: EncodedFigures,
        graph: Graph,
    ) -> None:
        self._terms = terms
        self._form = form
        self._pack = None if form is None else Pack.of_text(form.encoding)
        self._why = why
        self._most = TIER_GBPS if tiers else float("inf")
        self._figures = figures
        self._graph = graph
        self.known: dict[torch.device, Known] = {}

    def packs(self, view: KVView, ids: npt.NDArray[np.int64]) -> bool:
        """Return True if blocks of a view are to be packed.

        ``ids``: the numbers of the view's blocks, whose rows are ready on the current stream.
        """
        form = self._form
        if form is None:
            if view.device not in self.known:
                raw = Known(EncodingChoice(None, self._why))
                self.known[view.device] = raw
                self._note(raw.choice)
            return False
        if view.form.encoding:
            return True
        if view.block_size != form.block_size or not len(ids):
            return False
        known = self.known.get(view.device)
        if known is None or (known.rates_missing and known.left <= 0):
            known = self.known[view.device] = self._begin(view, ids)
            self._note(known.choice)
        elif known.rated is not None:
            self._again(known, known.rated, view, ids)
        known.left -= len(ids) * form.raw.payload_bytes
        return known.choice.pack is not None

    def _note(self, choice: EncodingChoice) -> None:
        """Note a choice in the trace."""
        self._graph.trace.note("encoding", self._graph.clock(), choice.figures())

    def lines(self) -> list[str]:
        """Return the choice for each device, with the reason, a line each."""
        lines = list[str]()
        for device, known in self.known.copy().items():
            choice = known.choice
            which = "raw" if choice.pack is None else "packed"
            lines.append(f"Saves from {device} are {which}. {choice.why} {known.trouble}".rstrip())
        return lines or ["No save has chosen between packed and raw blocks yet."]

    def _begin(self, view: KVView, ids: npt.NDArray[np.int64]) -> Known:
        """Return the first choice for a device; wait for its sample."""
        terms = self._terms
        pack = self._pack
        assert pack is not None
        why = stays_raw(view, pack, terms.packing_gbps)
        if why:
            return Known(EncodingChoice(None, why))
        rated = rated_choice(view, pack, terms.link_gbps, terms.packing_gbps, self._most)
        if rated.pack is None:
            return Known(rated, rates_missing=rated.packing_gbps is None)
        self._figures.forget_misfits(view.device)
        try:
            best = best_of(view, Sample(view, ids, (pack,)), pack)
        except torch.OutOfMemoryError:
            why = f"No sample was taken, as {view.device} had no memory left for it."
            return Known(EncodingChoice(None, why), rated)
        except (PortaKVError, RuntimeError) as error:  # such as a lack of pinned memory
            return Known(EncodingChoice(None, f"No sample was taken: {error}"), rated)
        return Known(judged(rated, best), rated)

    def _again(
        self, known: Known, rated: EncodingChoice, view: KVView, ids: npt.NDArray[np.int64]
    ) -> None:
        """Look at a sample that is complete, or take the next one if it is time."""
        pack = self._pack
        assert pack is not None
        pending = known.pending
        if pending is not None:
            if not pending.ready:
                return
            choice = judged(rated, best_of(view, pending, pack))
            known.pending = None
            known.trouble = ""
            if (choice.pack is None) != (known.choice.pack is None):
                self._note(choice)
            known.choice = choice
        elif known.left <= 0 or self._figures.sample_is_out_of_date(view.device):
            known.left = SAMPLE_AGAIN
            self._figures.forget_misfits(view.device)
            try:
                known.pending = Sample(view, ids, (pack,))
            except (PortaKVError, RuntimeError) as error:  # the choice stays
                known.trouble = f"The next sample was not taken: {error}"
                self._note(replace(known.choice, why=known.trouble))


CACHED = "kept"  # a location: the host tier
NOT_COMING = (None, 0)


#: Tier stores with the queues that read a block, nearest first.
Queues: TypeAlias = tuple[tuple[TierStore, Queue], ...]
#: The place of a part of a block: `CACHED`, a transfer that brings it, or tier stores.
Location: TypeAlias = "str | InFlight | Queues"


class Planned(NamedTuple):
    """A coroutine that begins with the others of its plan, those of the first ``stage`` first, and
    the tasks that it runs. It is a user of rows."""

    stage: int
    tasks: Sequence[Task]
    held: Held
    steps: Callable[[], Steps[None]]


class SharedState:
    """The state that the calls of a store share, under the graph's lock.

    ``begun``: reads and saves that have not ended. ``in_transit``: the last of them by part and
    key, with the row of the block. ``ends``: of all calls. ``hits``: the keys of
    loads that callers' threads made, whose use is not recorded yet, with their forms.
    ``announced``: what the store announces.
    ``generation``: of the newest block of a save.
    """

    def __init__(self, graph: Graph, rows: Rows) -> None:
        self.graph = graph
        self.rows = rows
        self.tier_stores = list[TierStore]()
        self.in_transit = dict[bytes, tuple[InFlight, int]]()
        self.ends = WeakSet[End]()
        self.row_queue = RowQueue(graph, rows)
        self.begun = set[InFlight]()
        self.hits = deque[tuple[FormBlocks, list[bytes]]]()
        self.announced = Announced(graph)
        self.log = RateLimitedLog(logging.getLogger(__name__))
        self.generation = 0
        self.forms = dict[str, FormBlocks]()  # by their names, once tiers are open
        self.closed = False

    def record_hits(self) -> None:
        """Record the use of blocks that callers' threads loaded, and forget loads that ended."""
        while self.hits:
            form, keys = self.hits.popleft()
            self.rows.use([form.own.name(key) for key in keys])
            form.touch(keys)
        self.rows.forget_loans()

    def drop_uploads(self, count: int) -> int:
        """Drop uploads that wait for a slow tier if a save needs ``count`` rows, the latest first;
        return how many blocks these had.

        Not those of saves that wait for rows. They keep half of the rows that saves may have. So a
        remote tier that is slower than saves costs no block of a nearer tier. The order is that of
        all forms together, since an engine may need a block of all its groups of layers.
        """
        memory = self.rows
        if not memory.lacks(count):
            return 0
        uploads = [(task, x) for x in self.begun for task in x.uploads if not task.ended]
        left = sum(x.count for _, x in uploads) - (memory.most + memory.host) // 2
        waiting = [(task.number, task, x) for task, x in uploads if x.waits_for_uploads]
        dropped = 0
        for _, task, in_flight in sorted(waiting, reverse=True):
            if dropped >= left or not memory.lacks(count):
                break
            task.cancel("dropped")
            self.graph.runtime.step.go_on()  # the rows become free
            dropped += in_flight.count
        return dropped


class FormBlocks:
    """The blocks of one form of a store: where they are, and how often they were read and written.

    A packed form stores blocks that do not fit in the raw form of the same store, if there is one.

    Attributes:
        name: the form's name; empty if the store was made for one form without a name.
        parts: the parts that make up a block, ``own`` first: the part of the form itself.
        raw: of a packed form the part of the raw form; None if the store lacks it.
        twin: the part of the other form whose blocks a save need not bring: ``raw``, or the packed
            form after `pair`.
        apart: the checksums of the store's other forms that have no part of a block.
        tier_stores: the tier stores that learn of a use of the blocks.
        most_bytes: of the largest part of a block.
        counts: of a form with a name, what its calls moved, for figures.
        figures: counts the blocks of a packed form, and those that are raw instead.
    """

    def __init__(
        self, shared: SharedState, name: str, parts: list[FormPart], apart: Iterable[bytes]
    ) -> None:
        self.shared = shared
        self.name = name
        self.parts = parts
        self.own = parts[0]
        self.most_bytes = max(part.form.image_bytes for part in parts)
        self.apart = frozenset(apart)
        self.tier_stores = [x for x in shared.tier_stores if x.form.digest not in self.apart]
        self.counts = Counts(shared.graph.lock)
        form = self.own.form
        twins = [part for part in parts[1:] if form.encoding and part.form == form.raw]
        self.raw = twins[0] if twins else None
        self.figures = EncodedFigures(shared.graph.lock)
        self._take_twin(self.raw)

    def _take_twin(self, twin: FormPart | None) -> None:
        """Take a part as that of the other form. Each tier opens the own forms of a store, all of
        them writable, in one order."""
        self.twin = twin
        self.twin_stores = dict[TierStore, TierStore]()
        if twin is not None:
            both = ([x for x in part.tier_stores if x.writable] for part in (self.own, twin))
            self.twin_stores.update(zip(*both, strict=False))

    def pair(self, packed: FormBlocks) -> None:
        """Take the packed form of a store that chooses between both as the other form of this raw
        one."""
        self.figures = packed.figures
        self._take_twin(packed.own)

    def alone(self) -> FormBlocks:
        """Return this raw form without the packed form of its store, whose figures it counts in."""
        result = copy(self)
        result._take_twin(None)
        return result

    @property
    def whole_parts(self) -> tuple[FormPart, ...]:
        """Return the parts that have whole blocks: that of the form, and that of the other form."""
        return (self.own,) if self.twin is None else (self.own, self.twin)

    def known(self, tier_store: TierStore, keys: Keys) -> list[bool]:
        """Return which blocks a tier has in either form."""
        known = tier_store.known(keys)
        other = self.twin_stores.get(tier_store)
        if other is None:
            return known
        return [a or b for a, b in zip(known, other.known(keys), strict=True)]

    def wants(self, tier_store: TierStore, keys: Keys) -> list[bool]:
        """Return which blocks a save has to bring to a tier, which may have them in the other
        form."""
        wanted = tier_store.wants(keys)
        other = self.twin_stores.get(tier_store)
        if other is None:
            return wanted
        return [a and not b for a, b in zip(wanted, other.known(keys), strict=True)]

    def cached(self, keys: Keys) -> list[bool]:
        """Return which blocks the host tier has in either form."""
        cached = [self.shared.rows.has_each(part.names(keys)) for part in self.whole_parts]
        return [*map(any, zip(*cached, strict=True))]

    def count(self, tier: str, op: str, result: str, blocks: int) -> None:
        """Count blocks of a form with a name, in any thread."""
        if self.name and blocks:
            nbytes = blocks * self.own.form.image_bytes if result == "hit" else 0
            self.counts.add(tier, op, result, blocks, nbytes)

    def touch(self, keys: Sequence[bytes], follows: Sequence[int] = ()) -> None:
        """Record the use of keys, the first key last, so that a prefix outlives its suffix.

        ``follows``: the predecessors of the blocks of the form itself, from a save.
        """
        own = self.own
        for tier_store in self.tier_stores:
            known = [follows] if follows and tier_store.form == own.form else []
            tier_store.touch(keys, *known)
        rows = self.shared.rows
        for part in self.parts if rows.host else ():
            rows.touch(part.names(keys), follows if part is own else ())

    def locations(self, keys: Sequence[bytes]) -> list[list[tuple[FormPart, Location]]]:
        """Return for each block the parts that cover it, with their locations.

        The list of a block that is nowhere is empty. Most blocks are in the form itself.
        """
        own = self.own
        located = self.locate(own, keys)
        same = {location: [(own, location)] for location in {*located} if location}
        return [
            same[location] if location else self._covering(key)
            for key, location in zip(keys, located, strict=True)
        ]

    def _covering(self, key: bytes) -> list[tuple[FormPart, Location]]:
        """Return other parts that cover a block, once if possible, with their locations.

        If a cell is nowhere, the whole block may be in a remote tier; else the list is empty.
        """
        own = self.own
        result = list[tuple[FormPart, Location]]()
        cover = 0
        while cover != own.cells:
            cell = ~cover & (cover + 1)  # the first cell that is not covered
            parts = sorted(self.parts[1:], key=lambda part: bool(part.cells & cover))
            locations = (
                (x, location)
                for x in parts
                if x.cells & cell and (location := self.locate(x, [key])[0])
            )
            if not (one := next(locations, None)):
                (location,) = self.locate(own, [key], far=True)
                return [(own, location)] if location else []
            result.append(one)
            cover |= one[0].cells
        return result

    def locate(self, part: FormPart, keys: Sequence[bytes], far: bool = False) -> list[Location]:
        """Return the location of a part of each block.

        That is `CACHED`, an `InFlight`, or tier stores with their queues, the nearest first; none
        for a block that is nowhere. A remote tier is assumed to have the blocks of a nearer tier,
        besides those that it is known to have; with ``far``, any block.
        """
        result: list[Location] = [CACHED] * len(keys)
        names = part.names(keys)
        cached = self.shared.rows.has_each(names)
        left = [i for i, there in enumerate(cached) if not there]
        some = [keys[i] for i in left]
        known = [tier_store.known(some) for tier_store in part.tier_stores]
        coming = self.shared.in_transit
        for number, i in enumerate(left):
            queues: Queues = ()
            stored = False
            for tier_store, has in zip(part.tier_stores, known, strict=True):
                if has[number] or (tier_store.tier == "remote" and (far or queues)):
                    queues = (*queues, (tier_store, tier_store.queue(keys[i])))
                stored |= has[number]
            in_flight, _ = coming.get(names[i], NOT_COMING)
            joins = in_flight and in_flight.joins(stored)
            result[i] = in_flight if in_flight and joins else queues
        return result

    def stored(self, keys: Sequence[bytes]) -> Mask:
        """Return which blocks of the form itself are where saves put them.

        That is in every writable tier that evicts blocks, or in the host tier if there is no other.
        """
        writable = [tier_store for tier_store in self.own.tier_stores if tier_store.writable]
        there = np.ones(len(keys), np.bool_)
        for tier_store in writable:
            if tier_store.tier != "remote":
                there &= self.known(tier_store, keys)
        if not writable:
            coming = self.shared.in_transit
            pairs = zip(self.cached(keys), self.own.names(keys), strict=True)
            there[:] = [cached or name in coming for cached, name in pairs]
        return there

    def continues(self, before: Sequence[bytes], tier_store: TierStore | None) -> bool:
        """Return True if a tier store (None: the host tier) can provide the blocks of keys.

        Blocks after such keys may evict others. A block is stored, is being saved, or may be in a
        remote tier.
        """
        return all(self._has(key, tier_store) for key in before)

    def _has(self, key: bytes, tier_store: TierStore | None) -> bool:
        parts = self.whole_parts
        coming = [self.shared.in_transit.get(part.name(key), NOT_COMING)[0] for part in parts]
        if any(in_flight and in_flight.store for in_flight in coming):
            return True
        if any(other.tier == "remote" for other in self.own.tier_stores):
            return True
        if tier_store is None:
            return any(self.locate(part, [key])[0] for part in parts)
        return self.known(tier_store, [key])[0]


class Call:
    """One call of a user, and its plan.

    Attributes:
        shared: the state that it shares with the other calls of the store.
        end: its end.
        located: the blocks that have a location, bool ``[blocks]``.
        ends: the tasks with which blocks of the call end.
        copies: its tasks that no other call needs.
        flights: the transfers that bring its blocks, with those of other calls.
        gathers: the tasks of a save that read the caller's blocks.
        in_transit: its transfers that have not ended, and 1 for its plan.
    """

    def __init__(self, form: FormBlocks, request: Request) -> None:
        self.form = form
        self.shared = form.shared
        self._graph = form.shared.graph
        self.request = request
        many = len(request.keys)
        self.end = End(self._graph.runtime, many, request.kind)
        self.end.stop_work = self._stop
        self.located: Mask = np.ones(many, np.bool_)
        self.excused: Mask = np.zeros(many, np.bool_)  # need not land: no tier admits them yet
        self.ends = list[Ending]()
        self.copies = list[Task]()
        self.flights = dict[InFlight, None]()
        self.gathers = list[Task]()
        self.in_transit = 1
        self.since = time.perf_counter()  # when its plan last took the graph's lock
        self.explanation = Explanation(request.keys)
        self._planned = list[Planned]()

    def slices(self, blocks: Sequence[int], whole: bool = False) -> list[Sequence[int]]:
        """Return the blocks that are planned together, before others may take the graph's lock.

        ``whole``: all of them, as tasks of one submission run in the order of their stages.
        """
        most = max(1, len(blocks)) if whole else SLICE
        return [blocks[first : first + most] for first in range(0, len(blocks), most)]

    def groups(self, blocks: Sequence[int]) -> dict[tuple[FormPart, Location], list[int]]:
        """Return blocks by part and location, and mark the located ones."""
        groups = dict[tuple[FormPart, Location], list[int]]()
        located = self.form.locations([self.request.keys[i] for i in blocks])
        self.located[blocks] = [*map(bool, located)]
        last: list[tuple[FormPart, Location]] | None = None
        for i, locations in zip(blocks, located, strict=True):
            if locations is not last:  # most blocks lie where the block before lies
                last = locations
                some = [groups.setdefault(location, []) for location in locations]
            for each in some:
                each.append(i)
        return groups

    def bring(
        self, part: FormPart, location: Location, some: list[int], segments: list[int | None]
    ) -> Iterator[Arrival]:
        """Bring blocks from a location into rows, for stages of these segments."""
        names = {i: part.name(self.request.keys[i]) for i in some}
        if isinstance(location, InFlight):  # another call brings them
            items = [self.shared.in_transit[names[i]][1] for i in some]
            location.join(self, some)
            every = [*location.ends.values()]
            ends = [[location.ends[x]] if x in location.ends else every for x in segments]
            last = (tasks[-1] for tasks in location.tasks.values())
            self.explanation.tasks += [(task, some, items) for task in last]
            yield Arrival(location, dict(enumerate(ends)), some, items)
        elif isinstance(location, str):  # its rows stay until the copies out of them have ended
            least = 1 if self.request.lent else 2  # the copier has no helpers to share them
            for at in self.chunks(part, some, LOADED, len({*segments}), least=least):
                held = Held(self.shared.rows.pin([names[i] for i in at]))
                self._graph.count("host", "load", "hit", len(at), len(at) * part.form.image_bytes)
                self.form.count("host", "load", "hit", len(at))
                yield Arrival(held, {n: [] for n, _ in enumerate(segments)}, at, range(len(at)))
        else:
            yield from self._read(part, location, some, segments)

    def _read(
        self, part: FormPart, tier_stores: Queues, some: list[int], segments: list[int | None]
    ) -> Iterator[Arrival]:
        """Read blocks from the first tier store, and blocks that do not land from the next one.

        If the segments need more than staging holds together, each segment has separate rows, so
        that the first layers do not wait for the last.
        """
        pieces = [*dict.fromkeys(segments)]
        apart = len(pieces) > 1 and len(some) > self.shared.rows.staging
        # A disk reads 8 MiB sooner in two pieces than in four, which leave saves no helper.
        queues = [queue for tier_store, queue in tier_stores[:1] if tier_store.tier != "disk"]
        for at in self.chunks(part, some, LOADED, len(pieces), *queues):
            for group in [[x] for x in pieces] if apart else [pieces]:
                in_flight = InFlight(self, part, at, apart=str(group).encode() if apart else b"")
                for segment in group:
                    order = (pieces.index(segment), len(pieces))
                    tasks = list[Task]()
                    for tier_store, queue in tier_stores:
                        work = partial(in_flight.read_from, tier_store, segment)
                        task = self.task(at, work, queue, in_flight, order[1])
                        task.alone = tier_store.tier == "disk" and task.nbytes < SMALL * len(at)
                        tasks.append(task)
                    in_flight.ends[segment] = End(self._graph.runtime, len(at))
                    in_flight.tasks[segment] = tasks
                    self.plan(order[0], tasks, in_flight, partial(in_flight.read, segment))
                ends = {
                    n: [in_flight.ends[x]] for n, x in enumerate(segments) if x in in_flight.ends
                }
                yield Arrival(in_flight, ends, at, range(len(at)))

    def copy(
        self, arrival: Arrival, stages: Sequence[Stage], crossing: Crossing, queue: Queue
    ) -> None:
        """Plan the copies of blocks from their rows into a view."""
        for number in arrival.ends:
            work = partial(arrival.cross, crossing, stages[number])
            task = self.task(arrival.at, work, queue, arrival.held, len(stages))
            self.plan_crossing(number, task, arrival, stages[number].layers)

    def plan_crossing(
        self, stage: int, task: Task, arrival: Arrival, layers: range = range(0)
    ) -> None:
        """Plan the copy of blocks of a load out of their rows."""
        self.copies.append(task)
        self.ends.append(Ending(task, arrival.at, range(len(arrival.at)), layers))
        self.plan(stage, [task], arrival.held, partial(self.cross, stage, task, arrival))

    def arrives(self, arrival: Arrival) -> None:
        """Let the call end with blocks that arrive in rows."""
        self.ends += [Ending(end, arrival.at, arrival.rows) for end in arrival.ends[0]]

    async def cross(self, stage: int, task: Task, arrival: Arrival) -> None:
        """Copy blocks from their rows into a view, once they have arrived."""
        ends = arrival.ends[stage]
        left: Mask = np.ones(len(arrival.at), np.bool_)
        for end in ends:
            left &= (await end).landed[arrival.rows]
        await task.move(left, *ends)

    def chunks(
        self,
        part: FormPart,
        blocks: list[int],
        nbytes: int,
        pieces: int,
        *queues: Queue,
        least: int = 2,
    ) -> list[list[int]]:
        """Return the blocks of each task: at least ``least`` tasks share them, or all places."""
        most = self.shared.rows.most // (4 if pieces > 1 else 1)
        size = part.form.image_bytes
        return task_blocks(blocks, size, pieces * nbytes, most, least, [x.width for x in queues])

    def task(
        self,
        at: Sequence[int],
        work: Callable[[Task, Mask], Any],
        queue: BaseQueue,
        held: Held,
        stages: int = 1,
    ) -> Task:
        """Return a task for blocks in rows, one of so many stages."""
        nbytes = len(at) * self.form.most_bytes // stages
        task = Task(work, len(at), queue=queue, nbytes=nbytes, name=self.request.kind, uses=held)
        self.explanation.tasks.append((task, at, range(len(at))))
        return task

    def plan(
        self, stage: int, tasks: Sequence[Task], held: Held, steps: Callable[[], Steps[None]]
    ) -> None:
        """Plan a coroutine that runs tasks, and uses rows until its end."""
        held.hold()
        self._planned.append(Planned(stage, tasks, held, steps))

    def submit(self) -> None:
        """Start the planned coroutines, those of the first stages first."""
        planned = sorted(self._planned, key=attrgetter("stage"))
        self._planned.clear()
        for each in planned:
            held = each.held
            if isinstance(held, InFlight) and held.rows.state == "new":
                self._graph.enter([held.rows], self.request.priority)
            self._graph.enter(each.tasks, self.request.priority)
            if isinstance(held, InFlight):
                held.drop_unwritten()
        for each in planned:
            self._graph.runtime.start(self._run(each))

    async def _run(self, planned: Planned) -> None:
        """Run a coroutine, which uses rows until its end."""
        try:
            await planned.steps()
        except Exception as error:  # nobody may wait for ever
            for task in planned.tasks:
                if not task.ended:
                    task.finish(None, "failed", error)
        finally:
            planned.held.release()

    def drop(self) -> None:
        """Drop a plan that failed, and cancel what it has begun."""
        for each in self._planned:
            each.held.release()
        self._planned.clear()
        for in_flight in self.flights:
            if not in_flight.users and in_flight in self.shared.begun:  # it was not planned
                in_flight.over()
        self.end.cancel()

    def _stop(self, state: str, error: Exception) -> bool:
        """Cancel the copies of the call, and the transfers that no other call wants; return True
        if some blocks will not be moved."""
        stopped = [task.stop(state, error) for task in self.copies]
        stopped += [in_flight.stop(state, error) for in_flight in self.flights]
        return any(stopped)

    def transfer_ended(self) -> None:
        """Note the end of a transfer, or of the plan.

        After the last one the call's blocks count as used, the last first, so that a prefix
        outlives its suffix: transfers store them in any order.
        """
        self.in_transit -= 1
        stores = self.request.kind == "save" or self.shared.rows.host
        if not self.in_transit and stores:
            self.form.touch(self.request.keys)

    def handle(
        self,
        view: KVView | None,
        layers: int = 0,
        missing: Missing = "raise",
        eligible: Callable[[], Mask] | None = None,
        follow: bool = True,
    ) -> Handle:
        """Return the handle of the call, which ends with its tasks.

        ``layers``: so many layers end by themselves, too.

        ``follow``: announce the handle at its end.
        """
        self.transfer_ended()
        self.submit()
        many = len(self.request.keys)
        eligible = eligible or (lambda: self.located)
        by_layer = [End(self._graph.runtime, many) for _ in range(layers)]
        for layer, end in enumerate(by_layer):
            parts = [x for x in self.ends if layer in x.layers]
            self._graph.runtime.start(end.come_after(parts, eligible))
        released = None
        if self.request.kind == "save":
            released = End(self._graph.runtime, many)
            parts = [Ending(task) for task in self.gathers]
            self._graph.runtime.start(released.come_after(parts))
        else:
            self.explanation.located = self.located
        self.shared.ends.add(self.end)
        why = self.explanation.sentence
        size = self.form.own.form.raw.payload_bytes
        handle = Handle(self.end, by_layer, missing, view, self.excused, why, size)
        handle.form = self.form.name
        if released:
            handle.add_release(released)
        if follow and self.shared.announced.handles.started:
            self.shared.announced.follow(handle)
        self._be_due()
        self._graph.runtime.start(self.end.come_after(self.ends, eligible))
        return handle

    def _be_due(self) -> None:
        """Let all that the call waits for be due as the call is, and cancel it at its deadline."""
        now = self._graph.clock()
        due = SLACK[self.request.priority]
        deadline = self.request.deadline
        if deadline is not None:
            due = min(due, deadline)
            self.end.cancel_at(now + deadline)
        for task in self.copies:
            task.hasten(now + due)
        for in_flight in self.flights:
            for task in in_flight.every_task():
                task.hasten(now + due)


class InFlight(Held):
    """Rows that a transfer fills.

    Row i has block ``keys[i]`` of the part after all of ``ends`` landed it: one for each segment,
    or that of None. A block of a save that does not fit into packed slots has a raw image in its
    row, which is one of ``raw_rows`` then.

    Later calls use the rows as well, unless their name has a suffix ``apart``. ``calls`` are all
    calls with their blocks, the maker and its blocks ``at`` first. ``tasks`` are those of each
    segment, one after the other, and ``writes`` those of a save that write tiers. A save that
    ``drops`` waits for no rows, and ``uploads`` are its writes to remote tiers. If a save writes a
    tier, it has a generation, and checksums by row. ``copied`` waits for its copy, if that was
    issued.
    """

    def __init__(
        self,
        call: Call,
        part: FormPart,
        at: list[int],
        drops: bool = False,
        apart: bytes = b"",
    ) -> None:
        self._call = call
        self._shared = shared = call.shared
        self._graph = shared.graph
        self._memory = shared.rows
        self.count = len(at)
        self.store = call.request.kind == "save"
        self.drops = drops
        self.rows = shared.row_queue.request(self)
        self.part = part
        self.at = at
        self.calls = [(call, at)]
        self.keys = [call.request.keys[i] for i in at]
        self.ends = dict[int | None, End]()
        self.tasks = dict[int | None, list[Task]]()
        self.writes = list[Task]()
        self.uploads = list[Task]()
        self.generation = 0
        self.sums = dict[int, Sequence[int]]()
        self.copied: Callable[[], object] | None = None
        self.reasons = Reasons()  # reasons of blocks that were not read, or not written
        self.raw_rows = set[int]()
        # Rows that are not cached as they are: of a segment, or of a copier that may pack.
        packs = self.store and self.raw_form is not None
        self._passing = bool(apart) or (call.request.lent and packs)
        call.explanation.sources.append(self.reasons)
        call.flights[self] = None
        self.names = part.names(self.keys)
        if apart:
            self.names = [name + apart for name in self.names]
        shared.begun.add(self)
        shared.in_transit.update(zip(self.names, zip(repeat(self), count()), strict=False))
        call.in_transit += 1

    @property
    def raw_form(self) -> BlockForm | None:
        """Return the form of raw images of blocks that do not fit; None if the store keeps none."""
        raw = self._call.form.raw
        return None if raw is None else raw.form

    def take(self) -> list[int] | None:
        """Return rows, under the graph's lock; a save also takes rows of the host tier."""
        nbytes = self.part.form.image_bytes
        if self._passing and self.raw_form is not None:  # the rows have room for any image
            nbytes = max(nbytes, self.raw_form.image_bytes)
        return self._memory.take(self.count, self._want(nbytes))

    def joins(self, stored: bool) -> bool:
        """Return True if a load may use the rows: not those of a save of packed blocks, whose rows
        may become raw. ``stored``: a tier has the block."""
        return self.wanted and not (self.store and (stored or bool(self.part.form.encoding)))

    @property
    def wanted(self) -> bool:
        """Return True if a call that is neither cancelled nor late waits for the rows."""
        return any(not call.end.cut for call, _ in self.calls)

    @property
    def is_saved(self) -> bool:
        """Return True if a save that is neither cancelled nor late waits for the rows. Else tiers
        get none of them, although a load may want them."""
        return any(call.request.kind == "save" and not call.end.cut for call, _ in self.calls)

    @property
    def waits_for_uploads(self) -> bool:
        """Return True if nothing needs the rows but uploads that no helper has begun."""
        return self.users == sum(task.state == "queued" for task in self.uploads)

    def join(self, call: Call, blocks: list[int]) -> None:
        """Let another call wait for the rows, or for what is stored from them."""
        self.calls.append((call, blocks))
        call.flights[self] = None
        call.explanation.sources.append(self.reasons)

    def every_task(self) -> list[Task]:
        """Return all tasks, and that which waits for rows."""
        moving = [task for tasks in self.tasks.values() for task in tasks]
        return [self.rows, *moving, *self.writes]

    def stop(self, state: str, error: Exception) -> bool:
        """Cancel what no call wants any longer, under the graph's lock; return True if some blocks
        will not be moved."""
        unwanted = list[Task]()
        if not self.wanted:
            unwanted = self.every_task()
        elif not self.is_saved:
            unwanted = self.writes
        stopped = [task.stop(state, error) for task in unwanted]
        return any(stopped)

    def drop_unwritten(self) -> None:
        """Drop a save whose writes were all dropped when they were entered."""
        if self.writes and all(task.state == "dropped" for task in self.writes):
            first = self.writes[0]
            for task in self.every_task():
                task.stop(first.state, cast(Exception, first.error))

    # --- the coroutines, under the graph's lock ---

    async def _wait_for_rows(self, tasks: Sequence[Task]) -> None:
        """Wait for rows. Without them, tasks end as the wait did."""
        rows = self.rows
        if rows.state == "waiting" and self.items is None:
            rows.queue.push(rows)
            if self.drops:
                rows.cancel("dropped")
        if self.items is None:
            await rows
        elif not rows.ended:
            rows.finish(None)
        for task in tasks if self.items is None else ():
            if not task.ended:
                task.finish(None, rows.state, rows.error)

    async def read(self, segment: int | None) -> None:
        """Read blocks, or a segment of them: from the nearest tier, and what did not come from
        there from the next one."""
        tasks = self.tasks[segment]
        end = self.ends[segment]
        await self._wait_for_rows(tasks)
        left: Mask = np.ones(self.count, np.bool_)
        try:
            for task in tasks:
                left = left & ~await task.move(left, end)
                end.add_error(task.error)
                end.trail = task.trail
        finally:
            end.finish(~left)

    async def save(self, writes: Sequence[tuple[Task, Task | None]]) -> None:
        """Copy blocks of the caller into rows, seal them, and store them in tiers.

        ``writes``: the task for each tier, and a task that goes before it.
        """
        tasks = self.tasks[None]
        await self._wait_for_rows(tasks[:1])
        landed: Mask = np.ones(self.count, np.bool_)
        for number, task in enumerate(tasks):
            landed = await task.move(landed, *tasks[:number][-1:])
        for task, before in writes:
            self.hold()
            self._graph.runtime.start(self.store_in(task, before))

    async def store_in(self, task: Task, before: Task | None) -> None:
        """Write blocks from their rows to a tier, after another write if there is one."""
        gathered = self.tasks[None][-1]
        ends = [gathered]
        if before is not None:
            ends.append(await before)
        try:
            await task.move(gathered.landed, *ends)
        finally:
            self.release()

    def over(self) -> None:
        """Return the rows, under the graph's lock, and cache rows whose blocks landed whole.

        The call's blocks count as used before that if it has more blocks than the host tier.
        """
        call = self._call
        # The copy of a save that was cancelled may still write the rows. They are released once
        # more after its end.
        if self.copied is not None and not self._graph.closed:
            self.hold()
            self._graph.runtime.start(self._release_after_copy())
            return
        self._end_copy()
        try:
            self._cache()
            call.transfer_ended()
        finally:
            self._shared.row_queue.give(self)

    async def _release_after_copy(self) -> None:
        await Work(self._end_copy)
        self.release()
        self._graph.idle.notify()

    def _end_copy(self) -> None:
        """Wait for a copy, whose result nobody needs."""
        with suppress(Exception):  # of the device; the rows go back anyway
            self.end_copy()

    def _cache(self) -> None:
        """Cache the rows whose blocks landed whole, and let no other call join."""
        call = self._call
        landed = np.zeros(self.count, np.bool_)
        if self.items and (None in self.ends or len(self.ends) == len(self.part.form.segments)):
            landed = np.logical_and.reduce([end.landed for end in self.ends.values()])
        self._shared.record_hits()
        claim = self._claim()
        if self._memory.crowded(claim):
            call.form.touch(call.request.keys)
        self._shared.begun.discard(self)
        self._warn_dropped()
        for name in self.names:
            if self._shared.in_transit.get(name, (None,))[0] is self:
                del self._shared.in_transit[name]
        whole: list[int] = np.flatnonzero(landed).tolist()
        if whole and self._memory.host:
            items = [self.items[row] for row in whole]
            names = self.names
            if self.raw_rows:
                names = [self._part_in(row).name(key) for row, key in enumerate(self.keys)]
            names = [names[row] for row in whole]
            sizes = [self._part_in(row).form.image_bytes for row in whole]
            prefetched = all(call.request.kind == "prefetch" for call, _ in self.calls)
            want = Want(self.part.form.image_bytes, self.store, claim, prefetched=prefetched)
            self._memory.keep(items, names, self._follows(whole), want, sizes)

    def _claim(self) -> Claim:
        """Return the cached rows that the blocks may evict, under the graph's lock."""
        call = self._call
        evict = call.form.continues(call.request.before(self.at), None)
        return Claim(call.request.order, call.form.apart, evict)

    def _want(self, nbytes: int) -> Want:
        """Return what rows of a size are needed for, in any thread."""
        with self._graph.lock:
            claim = self._claim()
        prefetched = self._call.request.kind == "prefetch"
        return Want(nbytes, self.store, claim, self.at[-1], prefetched, self._passing)

    def _follows(self, rows: Sequence[int]) -> list[int]:
        """Return the marks of the predecessors of blocks in rows."""
        if self.store:
            follows = self._call.request.follows
            return [follows[self.at[row]] for row in rows]
        return [image.predecessor(self._image(row)) for row in rows]

    def _part_in(self, row: int) -> FormPart:
        """Return the part whose image a row holds."""
        raw = self._call.form.raw
        return raw if raw is not None and row in self.raw_rows else self.part

    def _image(self, row: int) -> image.Row:
        """Return the image of a row."""
        return self._memory.image(self.items[row], self._part_in(row).form.image_bytes)

    def _warn_dropped(self) -> None:
        """Log that tasks were dropped, because staging was full or a queue was slow."""
        dropped = [
            task for task in self.every_task() if task.state == "dropped" and task.queue.tier
        ]
        if dropped:
            queues = ", ".join(dict.fromkeys(task.queue.name for task in dropped))
            text = "A %s dropped %d blocks on %s, the first is %s: no free staging, or a slow queue"
            values = self._call.request.kind, self.count, queues, self.keys[0].hex()
            self._shared.log.warning("dropped", text, *values)

    # --- the work of tasks, in helpers, for the blocks of a mask ---

    def read_from(self, tier_store: TierStore, segment: int | None, _: Task, mask: Mask) -> Mask:
        """Read blocks, or a segment of them, into the rows."""
        rows: list[int] = np.flatnonzero(mask).tolist()
        keys = [self.keys[row] for row in rows]
        images = [self._image(row) for row in rows]
        segments = None if segment is None else [segment]
        report = self.reasons.report
        # Needs no lock, as no call is wanted again.
        mask[rows] = tier_store.read(keys, images, segments, lambda: not self.wanted, report)
        self._count(tier_store, mask, len(rows))
        return mask

    def end_copy(self) -> None:
        """Wait for the copy of a save, if it was issued: it writes the rows until then."""
        copied = self.copied
        if copied:
            try:
                copied()
            finally:
                self.copied = None  # it retains the view

    def gather(self, crossing: Crossing, view: KVView, _: Task, mask: Mask) -> Mask:
        """Copy blocks of a view into the rows, and `seal` them."""
        if self.copied is None:
            self._copy(crossing, view, mask)
        else:
            self.end_copy()
        self.seal(_, mask)
        return mask

    def _copy(self, crossing: Crossing, view: KVView, mask: Mask) -> None:
        """Copy the blocks of a mask into the rows, packed if the form is, and raw those that do not
        fit. Take blocks that the store cannot keep from the mask, and report why."""
        own = self.part
        raw = self._call.form.raw
        items = np.array(self.items)
        blocks = np.array(self.at)
        rows = np.flatnonzero(mask)
        unfit, why = copy_fitting(crossing, own.rows, view, items[rows], blocks[rows])
        refused = rows[unfit]
        fits = rows[~unfit]
        misfits = len(refused)
        if not misfits and view.form.encoding:
            # Slots that were copied as they are: a block that does not fit has no rows.
            unfit = flagged(own, items[rows])
            self._refuse(rows[unfit], mask, FLAGGED)
            fits = rows[~unfit]
            misfits = len(rows) - len(fits)
        elif misfits and raw is not None:
            self._refuse(self._make_room(raw.form, refused.tolist()), mask, NO_ROOM)
            refused = refused[mask[refused]]
        elif misfits:
            self._refuse(refused, mask, why)
            refused = refused[:0]
        self._count_copied(view.device, items[fits], misfits, len(refused))
        if raw is not None and len(refused):
            crossing.copy(raw.rows, view, np.array(self.items)[refused], blocks[refused])
            self.raw_rows.update(refused.tolist())

    def _refuse(self, rows: Iterable[int], mask: Mask, why: str) -> None:
        """Take blocks that are not packed from a mask, and report why."""
        for row in rows:
            mask[row] = False
            self.reasons.report(self.keys[row], Reason(OVERFLOWED, why))

    def _make_room(self, raw: BlockForm, refused: list[int]) -> list[int]:
        """Give rows of the raw size to blocks that do not fit; return those that get none."""
        want = self._want(raw.image_bytes)
        return [row for row in refused if not self._memory.replace(self.items, row, want)]

    def _count_copied(self, device: torch.device, items: Any, misfits: int, followed: int) -> None:
        """Count blocks that came from a device into rows ``items``, those that did not fit, and how
        many of these follow raw."""
        figures = self._call.form.figures
        form = self.part.form
        if not form.encoding:
            figures.add_raw(form, len(items))
            return
        one = self._memory.image(items[0], form.image_bytes) if len(items) else None
        figures.add_packed(device, form, len(items), misfits, followed, one)

    def seal(self, _: Task, mask: Mask) -> None:
        """Make images of the payloads in the rows, if a tier stores them: only tiers read
        headers."""
        rows: list[int] = np.flatnonzero(mask).tolist()
        for row in rows if self._passing else ():
            want = self._want(self._part_in(row).form.image_bytes)
            self._memory.settle(self.items, row, want)
        if not self.generation:
            return
        for row, follows in zip(rows, self._follows(rows), strict=True):
            form = self._part_in(row).form
            name = self.keys[row], self.generation, follows
            self.sums[row] = image.seal(self._image(row), form, *name)

    def write(self, tier_store: TierStore, queue: Queue, _: Task, mask: Mask) -> Mask:
        """Write images to a tier, each to the store of its form."""
        rows: list[int] = np.flatnonzero(mask).tolist()
        call = self._call
        with self._graph.lock:
            evict = call.form.continues(call.request.before(self.at), tier_store)
        packed = [row for row in rows if row not in self.raw_rows]
        raw = [row for row in rows if row in self.raw_rows]
        raw_store = call.form.twin_stores.get(tier_store)
        mask[raw] = False
        if packed:
            self._write(tier_store, queue, packed, evict, mask)
        if raw and raw_store is not None:
            with self._graph.lock:
                nbytes = sum(self._image(row).nbytes for row in raw)
                queue = raw_store.queue_for_write(nbytes)
            self._write(raw_store, queue, raw, evict, mask)
        self._count(tier_store, mask, len(rows))
        return mask

    def _write(
        self, tier_store: TierStore, queue: Queue, rows: list[int], evict: bool, mask: Mask
    ) -> None:
        """Write images of rows to a tier store, and set which landed."""
        mask[rows] = tier_store.write(
            queue,
            [self.keys[row] for row in rows],
            [self._image(row) for row in rows],
            [self.generation] * len(rows),
            [self.sums[row] for row in rows],
            self._call.request.order,
            evict,
            report=self.reasons.report,
        )

    def _count(self, tier_store: TierStore, mask: Mask, blocks: int) -> None:
        """Count so many blocks, of which those of the mask landed, for the figures of the form."""
        form = self._call.form
        landed = int(np.count_nonzero(mask))
        op = "save" if self.store else "load"
        form.count(tier_store.tier, op, "hit", landed)
        form.count(tier_store.tier, op, "miss", blocks - landed)


# ------------------------------------------------------------------------------------------------
# Why blocks of a call did not land.


class Reasons:
    """The reasons that tiers reported for blocks of one transfer, by key."""

    def __init__(self) -> None:
        self._by_key: dict[bytes, list[Reason]] = {}

    def report(self, key: bytes, reason: Reason) -> None:
        """Note a reason. One worker at a time reports for a key."""
        known = self._by_key.setdefault(key, [])
        if reason not in known:
            known.append(reason)

    def of(self, key: bytes) -> list[Reason]:
        """Return the reasons for a block; none if no tier reported one."""
        return self._by_key.get(key, [])


class Explanation:
    """The reasons for the blocks of a call that did not land, for the error of its handle.

    Attributes:
        sources: the reasons of each transfer that the call follows.
        tasks: the tasks that move blocks for the call, with the numbers of these among its blocks
            and among those of the task.
        located: the blocks that a tier had when the call was planned, bool ``[blocks]``; None for
            a save.
        kept_in: the tier of a save, which may evict blocks before the save ends.
    """

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys = keys
        self.sources: list[Reasons] = []
        self.tasks: list[tuple[Task, Sequence[int], Sequence[int]]] = []
        self.located: Mask | None = None
        self.saved_in = ""

    def sentence(self, landed: Mask) -> str:
        """Return the reasons with their counts, the most frequent first; empty if none is known
        for the blocks that did not land."""
        unrun, untaken = self._by_tasks(landed)
        counts: Counter[Reason] = Counter()
        for number, key in enumerate(self._keys):
            if landed[number]:
                continue
            why = [*self._reasons(number, key), *unrun.get(number, ())]
            if not why and self.saved_in and number not in untaken:
                why = [Reason(EVICTED, self.saved_in)]
            counts.update(why)
        return ", ".join(
            f"{count} {reason.kind} ({reason.where})" for reason, count in counts.most_common()
        )

    def _by_tasks(self, landed: Mask) -> tuple[dict[int, dict[Reason, None]], set[int]]:
        """Return why tasks did not run for blocks that did not land, and the blocks whose task ran
        without success."""
        unrun: dict[int, dict[Reason, None]] = {}
        untaken = set[int]()
        for task, blocks, rows in self.tasks:
            pairs = zip(blocks, rows, strict=True)
            missing = [(block, row) for block, row in pairs if not landed[block]]
            if task.state != "landed":
                reason = Reason(task.state, task.queue.name)
                for block, _ in missing:
                    unrun.setdefault(block, {})[reason] = None
            else:
                untaken.update(block for block, row in missing if not task.landed[row])
        return unrun, untaken

    def _reasons(self, number: int, key: bytes) -> list[Reason]:
        """Return why a block did not land. That a tier lacks it explains nothing if another tier
        had it and failed."""
        if self.located is not None and not self.located[number]:
            return [Reason(MISSING, "no tier has it")]
        known = list(dict.fromkeys(reason for source in self.sources for reason in source.of(key)))
        failures = [reason for reason in known if reason.kind != MISSING]
        return failures or known[:1]


# ------------------------------------------------------------------------------------------------
# Figures of the blocks that a store packs, or keeps raw.


class EncodedFigures:
    """Counts blocks that saves bring into rows, packed or raw; any thread may call it."""

    def __init__(self, lock: AbstractContextManager[object]) -> None:
        """Count under a lock, that of the store's graph."""
        self._lock = lock
        self._counts = Counter[str]()
        self._of_late: dict[torch.device, tuple[int, int]] = {}  # packed blocks, and misfits

    def add_raw(self, form: BlockForm, blocks: int) -> None:
        """Count blocks that were not to be packed, of a form of either encoding."""
        nbytes = blocks * form.raw.payload_bytes
        with self._lock:
            self._counts.update(payload=nbytes, wire=nbytes, raw=blocks)

    def add_packed(
        self,
        device: torch.device,
        form: BlockForm,
        fits: int,
        misfits: int,
        followed: int,
        image: Any = None,
    ) -> None:
        """Count blocks whose slots crossed.

        Args:
            device: where they came from.
            fits: those that fit.
            misfits: those that did not.
            followed: the ``misfits`` that were brought raw after that; the others did not land.
            image: the row of one that fits, uint8 ``[row_bytes]``, whose escapes count.
        """
        escapes, values = (0, 0) if image is None else _escapes(form, image)
        raw = form.raw.payload_bytes
        wire = (fits + misfits) * form.payload_bytes + followed * raw
        with self._lock:
            self._counts.update(payload=(fits + followed) * raw, wire=wire)
            self._counts.update(packed=fits, overflow=followed, escapes=escapes, values=values)
            packed, unfit = self._of_late.get(device, (0, 0))
            self._of_late[device] = packed + fits + misfits, unfit + misfits

    def sample_is_out_of_date(self, device: torch.device) -> bool:
        """Return whether too many blocks of a device did not fit since `forget_misfits`."""
        with self._lock:
            return bool(is_out_of_date(*self._of_late.get(device, (0, 0))))

    def forget_misfits(self, device: torch.device) -> None:
        """Begin to count a device's blocks anew for `sample_is_out_of_date`."""
        with self._lock:
            self._of_late.pop(device, None)

    def statistics(self, form: str) -> Figures:
        """Return the figures."""
        with self._lock:
            counts = self._counts.copy()
        ratio = counts["payload"] / counts["wire"] if counts["wire"] else 1.0
        escapes = counts["escapes"] / counts["values"] if counts["values"] else 0.0
        return {
            "encoding_payload_bytes_total": [{"form": form, "value": counts["payload"]}],
            "encoding_wire_bytes_total": [{"form": form, "value": counts["wire"]}],
            "encoding_ratio": [{"form": form, "value": ratio}],
            "encoding_escapes": [{"form": form, "value": escapes}],
            "encoding_blocks_total": [
                {"form": form, "result": result, "value": counts[result]}
                for result in ("packed", "raw", "overflow")
            ],
        }


def _escapes(form: BlockForm, image: Any) -> tuple[int, int]:
    """Return the escapes of the planes of a packed image that fit, and their values; none for
    another encoding, which has no escapes."""
    planes = [plane for plane in form.planes if isinstance(plane, PackedPlane)]
    if not planes:
        return 0, 0
    if len({*form.widths}) == 1:  # kv is an axis
        planes = planes[:1]
    payload = image[HEADER : HEADER + form.payload_bytes]
    slots = payload.reshape(-1, sum(plane.slot_bytes for plane in planes))
    escapes = 0
    values = 0
    start = 0
    for plane in planes:
        head = slots[:, start + plane.head_at : start + plane.escapes_at].astype(np.int64)
        fits = head[:, FLAG_AT] == PACKED
        counts = head[:, TOTAL_AT] + 256 * head[:, TOTAL_AT + 1]
        escapes += int(counts[fits].sum())
        values += int(fits.sum()) * plane.values
        start += plane.slot_bytes
    return escapes, values
