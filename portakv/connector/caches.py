# SPDX-License-Identifier: Apache-2.0
"""What a connector reads: its caches once, memory objects beside them; the checks of one call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import ref

import torch

from portakv.connector.in_graph import Allocations, flatten
from portakv.copy.copy import Ids, MemoryObject, Tensors, check_ids, whole
from portakv.copy.shortcut import Shortcuts
from portakv.errors import DeviceMismatch, LayoutError, SlotError
from portakv.layout.language import parse
from portakv.layout.presets import resolve
from portakv.plan.move import Move
from portakv.registry.registry import Choice
from portakv.view import Index, KVView
from portakv.view.bound import BoundLayout, bind_layout

#: A chunk from its first token on.
WHOLE = Index()

Job = tuple[KVView, Index, Index, int]  # a chunk, its index, the cache's index, tokens


class Batch(NamedTuple):
    """Memory objects and, for each, the range of the slot mapping that belongs to it."""

    memory_objs: list[MemoryObject]
    slot_mapping: Ids | None
    starts: list[int]
    ends: list[int | None]

    @classmethod
    def of(cls, memory_objs: Any, slot_mapping: Ids | None, starts: Any, ends: Any) -> Batch:
        """As a caller passed them; `SlotError` unless each object has one start and one end."""
        passed = memory_objs, starts, ends
        lists: list[Any] = [[*each] if isinstance(each, Iterable) else None for each in passed]
        count, *others = (None if each is None else len(each) for each in lists)
        if count is None or others != [count, count]:
            raise SlotError(
                f"{count} memory objects came with {others[0]} starts and {others[1]} ends; pass a "
                f"list of each, one start and one end for each memory object."
            )
        return cls(lists[0], slot_mapping, lists[1], lists[2])


class Registration:
    """Caches that a connector holds. It reads memory objects beside them, with every extent that
    the caches tell. ``view``: the caches; ``allocations``: what a compiler is shown of them;
    ``shortcuts``: to and from them. Raises `LayoutError` for caches that contradict the layout,
    `DeviceMismatch` for caches of another device.
    """

    def __init__(
        self,
        kv_caches: Tensors,
        bound: BoundLayout,
        chunk_layout: str,
        choice: Choice,
        owner: ref[Any],
    ) -> None:
        _check_caches(kv_caches, bound)
        self.view = view = KVView.through(bound, kv_caches, lasting=True)
        if view.device != choice.backend.device:
            raise DeviceMismatch(
                f"The kv_caches are on {view.device}, but this connector serves "
                f"{choice.backend.device}; make a connector for their device."
            )
        if choice.can.tables:
            view.table  # noqa: B018 - made now, so that no transfer has to
        self.allocations = Allocations(kv_caches)
        self._facts = _facts(self.allocations.leaves)
        self.shortcuts = Shortcuts(view, self.allocations.unchanged, choice, owner)
        self._layout = chunk_layout
        self._bound: dict[tuple[str, int], BoundLayout] = {}

    def holds(self, kv_caches: Tensors) -> bool:
        """Whether these are its caches, or tensors that lie there in the same way."""
        try:
            leaves, levels = flatten(kv_caches)
            return levels == self.allocations.levels and _facts(leaves) == self._facts
        except (AttributeError, LayoutError, RuntimeError):  # the layout says what they lack
            return False

    def check_memory(self) -> None:
        """Raise `LayoutError` if the memory of a cache was freed, resized or replaced."""
        if not self.allocations.unchanged():
            raise self.view.replaced()

    def move(self, store: bool, job: Job) -> Move:
        """The copy between the caches and a chunk."""
        chunk, own, index, count = job
        if store:
            return Move(self.view, chunk, index, own, count)
        return Move(chunk, self.view, own, index, count)

    def job(self, memory_obj: MemoryObject, slots: Ids | None, start: int, end: int | None) -> Job:
        """One memory object and its range of the slot mapping, read and checked: it holds rows of
        these caches, does not lie in them and is not too small; the slot mapping has the range."""
        index, count = slot_range(slots, start, end)
        chunk = self.chunk(memory_obj)
        if chunk.slots < count:
            raise SlotError(
                f"{count} tokens were asked for, but the memory_obj holds {chunk.slots}; pass a "
                f"larger one or a smaller range."
            )
        if chunk.overlaps(self.view):
            raise LayoutError(
                "The memory_obj lies in the memory of the kv_caches; pass a buffer of its own."
            )
        return chunk, WHOLE, index, count

    def batch_moves(self, store: bool, batch: Batch, strict: bool) -> list[Move]:
        """The copies of a batch, one for each set of chunks of equal shape and strides; all of
        them are checked, so that nothing is moved if one is bad."""
        ranges = zip(batch.memory_objs, batch.starts, batch.ends, strict=True)
        jobs = [self.job(one, batch.slot_mapping, start, end) for one, start, end in ranges]
        jobs = [job for job in jobs if job[3]]
        if store:
            _check_apart([job[0] for job in jobs])
        moves = [self.move(store, job) for job in self._sets(jobs)]
        _check_batch(moves, strict)
        return moves

    def chunk(self, memory_obj: MemoryObject) -> KVView:
        """The view of one memory object: a tensor, or anything with ``.tensor``; raises
        `LayoutError` if it does not hold rows of these caches."""
        tensor: Any = memory_obj
        probe: Any = memory_obj
        if not isinstance(memory_obj, torch.Tensor):
            tensor = getattr(memory_obj, "tensor", memory_obj)
            probe = _first_tensor(tensor)
        bound = self._bind(self._layout, probe.itemsize)
        try:
            return KVView.through(bound, tensor)
        except LayoutError as error:
            raise LayoutError(
                f"The memory_obj does not hold chunks of these caches. {error} (Its dtype is "
                f"{probe.dtype}, the caches' {self.view.owners[0].dtype}; widths are compared "
                f"in bytes.)"
            ) from error

    def _sets(self, jobs: Sequence[Job]) -> list[Job]:
        """Chunks of equal form as one paged view, each of them a block."""
        groups: dict[tuple[object, ...], list[Job]] = defaultdict(list)
        for job in jobs:
            # Equal in bytes is not enough: one view has tensors of one shape and dtype.
            chunk = job[0]
            first = job[0].owners[0]
            kind = (chunk.device, first.dtype, first.shape, first.stride())
            groups[chunk.form, chunk.slots, kind].append(job)
        found = []
        for members in groups.values():
            chunk = members[0][0]
            if len(members) == 1 or chunk.layout.containers or chunk.layout.paged:
                found += members
                continue
            bound = self._bind(f"block | {chunk.layout.text}", chunk.owners[0].itemsize)
            view = KVView.through(bound, [job[0].tensors for job in members])
            found.append((view, *_joined(members)))
        return found

    def _bind(self, layout: str, itemsize: int) -> BoundLayout:
        bound = self._bound.get((layout, itemsize))
        if bound is None:
            extents = _known_extents(self.view, resolve(layout)[0], itemsize)
            if layout != self._layout:
                extents.pop("block_size", None)  # a block of a batch is a chunk
            bound = self._bound[layout, itemsize] = bind_layout(layout, **extents)
        return bound


def _known_extents(cache: KVView, layout: str, itemsize: int) -> dict[str, Any]:
    parsed = parse(layout)
    extents: dict[str, Any] = {}
    for name, axis in (("layers", "layer"), ("kv", "kv"), ("heads", "head")):
        if axis in parsed.axes or getattr(cache, name) != 1:
            extents[name] = getattr(cache, name)
    if any(width % itemsize for width in cache.widths):
        raise LayoutError(
            f"The memory_obj's elements have {itemsize} bytes, which do not divide the caches' "
            f"rows of {cache.widths} bytes for each kv and head; use a dtype of their width."
        )
    extents["dim"] = [width // itemsize for width in cache.widths]
    if parsed.opaque or (parsed.paged and parsed.shares("token")):
        extents["block_size"] = cache.block_size
    return extents


def _joined(members: list[Job]) -> tuple[Index, Index, int]:
    """(index of the chunks' view, index of the cache, tokens) for several jobs as one."""
    slots = members[0][0].slots
    shared = members[0][2]
    follow = True
    at = shared.offset
    for _, _, index, count in members:
        follow &= index.ids is shared.ids and index.step == shared.step and index.offset == at
        at += count
    total = at - shared.offset
    if not follow:
        shared = Index.joined([(index, count) for _, _, index, count in members])
    if all(count == slots for *_, count in members[:-1]):
        return Index(), shared, total
    chunks = [(Index(offset=nth * slots), count) for nth, (*_, count) in enumerate(members)]
    return Index.joined(chunks), shared, total


def _first_tensor(level: Any) -> torch.Tensor:
    while not isinstance(level, torch.Tensor):
        if not isinstance(level, (list, tuple, Mapping)):
            raise LayoutError(
                f"The memory_obj holds a {type(level).__name__}; expected a tensor, the containers "
                f"that chunk_layout names, or an object with one of these as `.tensor`. Of a numpy "
                f"array make a tensor by torch.from_numpy."
            )
        items = list(level.values()) if isinstance(level, Mapping) else list(level)
        if not items:
            raise LayoutError("The memory_obj is an empty container; pass its tensors.")
        level = items[0]
    return level


def slot_range(slot_mapping: Ids | None, start: int, end: int | None) -> tuple[Index, int]:
    """``slot_mapping[start:end]`` as an index, and its tokens; `SlotError` if it has no such."""
    if slot_mapping is None:
        raise SlotError("No slot_mapping was passed; pass the slots of the tokens to move.")
    index = Index.of(slot_mapping)
    length = index.length or 0
    if type(start) is not int or (end is not None and type(end) is not int):
        expected = "an integer, a position in the slot_mapping"
        start = whole("start", start, expected)
        end = None if end is None else whole("end", end, expected)
    stop = length if end is None else end
    if not 0 <= start <= stop <= length:
        raise SlotError(
            f"slot_mapping[{start}:{stop}] was asked of {length} slots; expected 0 <= start <= end "
            f"<= {length}."
        )
    return (index.shifted(start) if start else index), stop - start


def _check_batch(moves: list[Move], strict: bool) -> None:
    """Refuse the whole batch before its first launch if one of its copies is bad."""
    for move in moves:
        move.dst.check_writable()
        check_ids(move, strict)
    if len(moves) < 2:
        return
    # Sets of one batch share the cache; destinations must be distinct across them as well.
    ids = [(move.dst_index, move.count) for move in moves if move.dst_index.ids is not None]
    if strict:
        ids = [(index.to_host(), count) for index, count in ids]
    if len(ids) == len(moves) and all(index.on_host for index, _ in ids):
        total = sum(count for _, count in ids)
        Index.joined(ids).check(total, moves[0].dst.slots, "destination", distinct=True)


def _check_apart(chunks: list[KVView]) -> None:
    """Refuse memory objects of one batch that overlap and are written."""
    spans = sorted(span for chunk in chunks for span in chunk.spans)
    for (_, past), (first, _) in pairwise(spans):
        if first < past:
            raise LayoutError(
                "Two memory objects of one batch lie in the same memory, so that one would "
                "overwrite the other; pass buffers that do not overlap."
            )


def _check_caches(kv_caches: Tensors, bound: BoundLayout) -> None:
    """Name the slip of a slot mapping that was passed in the place of the caches."""
    layout = bound.layout
    if (
        isinstance(kv_caches, torch.Tensor)
        and kv_caches.dim() == 1
        and not kv_caches.is_floating_point()
        and (layout.containers or len(layout.dims) > 1)
    ):
        raise LayoutError(
            f"A {kv_caches.dtype} tensor of one dimension was passed as kv_caches, the second "
            f"argument; expected caches of {layout.text!r}. If it is the slot mapping, pass "
            f"slot_mapping=..., and no caches if they are registered."
        )


def _facts(leaves: Sequence[torch.Tensor]) -> list[tuple[object, ...]]:
    return [(leaf.data_ptr(), leaf.shape, leaf.stride(), leaf.dtype) for leaf in leaves]
