# SPDX-License-Identifier: Apache-2.0
"""`AdaptiveConnector`: store chunks of an engine's paged cache, and load them.

It decides on views, direction and stream; `issue` makes the copy.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from operator import is_
from time import perf_counter
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakValueDictionary, ref

import torch
from torch.compiler import is_compiling, is_dynamo_compiling

from portakv.arguments import kind_of
from portakv.copy.call import Context, Passed, check_rows
from portakv.copy.inside import ChunkCopies
from portakv.copy.options import (
    Check,
    CopyOptions,
    Ids,
    MemoryObject,
    Tensors,
    options_from,
    refuse_options,
    whole,
)
from portakv.copy.submit import check_issue, issue
from portakv.core.call import Watch
from portakv.errors import DeviceMismatch, LayoutError, PortaKVError, SlotError, TransferError
from portakv.layout.language import parse
from portakv.layout.presets import resolve
from portakv.plan.plan import Move
from portakv.registry.prepared import prepared
from portakv.registry.registry import Choice, choose
from portakv.runtime import transfer as transfers
from portakv.runtime.bounded import making
from portakv.runtime.eager import eagerly
from portakv.runtime.transfer import LateErrors, Transfer
from portakv.view import Index, KVView
from portakv.view.bound import BoundLayout, bind_layout
from portakv.view.example import example_chunk

# ------------------------------------------------------------------------------------------------
# Read and check the arguments of a connector: its caches once, and the chunks of each call.

#: A chunk from its first token on.
WHOLE = Index()


class Batch(NamedTuple):
    """Memory objects and, for each, the range of the slot mapping that belongs to it."""

    memory_objs: list[MemoryObject]
    slot_mapping: Ids | None
    starts: list[int]
    ends: list[int | None]

    @classmethod
    def of(
        cls, memory_objs: object, slot_mapping: Ids | None, starts: object, ends: object
    ) -> Batch:
        """Return the arguments as a batch; raise `SlotError` unless each object has a start and an
        end."""
        objects = _listed(memory_objs)
        firsts = _listed(starts)
        pasts = _listed(ends)
        counts = [None if each is None else len(each) for each in (objects, firsts, pasts)]
        if objects is None or firsts is None or pasts is None or len(set(counts)) > 1:
            raise SlotError(
                f"Expected one start and one end for each memory object, got {counts[0]} memory "
                f"objects, {counts[1]} starts and {counts[2]} ends. Pass lists of equal length."
            )
        return cls(objects, slot_mapping, firsts, pasts)

    def with_ids_on_host(self, context: Context) -> Batch:
        """Return the batch of a transfer in slices, with its slots on the host.

        Each copy in slices reads the slots of a device. The batch reads them once, for all of its
        copies, so that its checks see them before the first copy starts.

        Raises `Unsupported` inside graph capture.
        """
        if self.slot_mapping is None or not self.memory_objs:
            return self
        index = Index.of(self.slot_mapping)
        if index.on_host:
            return self
        context.check_may_slice()
        return self._replace(slot_mapping=index.to_host())


class Registration:
    """The caches that a connector retains, and the views of memory objects that fit them.

    Attributes:
        view: the caches.
        allocations: the tensors that a compiler sees in their place.
        direct: transfers to and from the caches that the core makes as a whole.

    Raises:
        LayoutError: caches that contradict the layout.
        DeviceMismatch: caches of another device.
    """

    def __init__(
        self,
        kv_caches: Tensors,
        bound: BoundLayout,
        chunk_layout: str,
        choice: Choice,
        owner: ref[object],
    ) -> None:
        _check_caches(kv_caches, bound)
        self.view = view = KVView.through(bound, kv_caches, persistent=True)
        if view.device != choice.backend.device:
            raise DeviceMismatch(
                f"Expected kv_caches on {choice.backend.device}, which this connector serves, got "
                f"{view.device}. Make a connector for their device."
            )
        if choice.can.tables:
            view.table  # noqa: B018 - made now, so that no transfer has to
        self.allocations = Allocations(kv_caches)
        self._read = bound.read
        self._layout = chunk_layout
        self._bound = dict[tuple[str, int], BoundLayout]()
        self.direct = ChunkCopies(view, self.allocations.memory, choice, owner)

    def holds(self, kv_caches: Tensors) -> bool:
        """Return True if these are its caches, or tensors at the same addresses with the same
        strides."""
        try:
            (form, origins, _, _), slots, device, _ = self._read(kv_caches)
        except (AttributeError, PortaKVError, RuntimeError):  # the layout says what they lack
            return False
        view = self.view
        return (form, origins, slots, device) == (view.form, view.origins, view.slots, view.device)

    def check_memory(self) -> None:
        """Raise `LayoutError` if the memory of a cache was freed or replaced, or became too
        small."""
        memory = self.allocations.memory
        if memory.unchanged:
            return
        if not memory.in_place:
            raise self.view.replaced()
        # Only the size of a storage differs: it may still contain all rows of the caches.
        self.view.check_memory()
        memory.read_sizes()

    def checked(
        self, store: bool, job: Move, context: Context, strict: bool
    ) -> tuple[Move, Passed]:
        """Return a copy to a chunk, for a load the reverse, and the checks that it passed."""
        cache, chunk, cache_index, chunk_index, count = job
        move = job if store else Move(chunk, cache, chunk_index, cache_index, count)
        return move, check_rows(move, context, strict)

    def job(self, memory_obj: MemoryObject, slots: Ids | None, start: int, end: int | None) -> Move:
        """Return the copy of a range of the slot mapping to one memory object, after checks.

        The object holds rows of these caches, does not overlap them and is large enough. The slot
        mapping contains the range.
        """
        index, count = slot_range(slots, start, end)
        chunk = self.chunk(memory_obj)
        chunk.check_memory()  # a storage can have been resized before
        if chunk.slots < count:
            raise SlotError(
                f"Expected a memory_obj of {count} tokens or more, got one of {chunk.slots}. Pass "
                f"a larger one or a smaller range."
            )
        spare = chunk.slots - count  # the last block of a paged chunk may be filled in part
        if end is None and spare >= (chunk.form.block_size or 1):
            raise SlotError(
                f"Expected a memory_obj of {count} tokens, one for each slot, got one of "
                f"{chunk.slots}. Pass end, the position in the slot_mapping after the last token, "
                f"to use a part of it."
            )
        if chunk.overlaps(self.view):
            raise LayoutError(
                "Expected a memory_obj outside the kv_caches, got one in their memory. Pass a "
                "separate buffer."
            )
        return Move(self.view, chunk, index, WHOLE, count)

    def batch_moves(
        self, store: bool, batch: Batch, context: Context, strict: bool
    ) -> list[tuple[Move, Passed]]:
        """Return the copies of a batch, one for each set of chunks of equal shape and strides.

        All of them are checked first, so that nothing moves if one is bad.
        """
        ranges = zip(batch.memory_objs, batch.starts, batch.ends, strict=True)
        jobs = [self.job(one, batch.slot_mapping, start, end) for one, start, end in ranges]
        jobs = [job for job in jobs if job.count]
        spans = sorted(span for job in jobs for span in job.dst.spans) if store else []
        for (_, past), (first, _) in itertools.pairwise(spans):
            if first < past:
                raise LayoutError(
                    "Expected memory objects of a batch in separate memory, got two that overlap: "
                    "one would overwrite the other. Pass buffers that do not overlap."
                )
        moves = [self.checked(store, job, context, strict) for job in self._sets(jobs)]
        if not store and len(moves) > 1:
            # Sets of one batch share the cache; destinations must be distinct across them as well.
            ids = [(x.dst_index, x.count) for x, _ in moves if x.dst_index.ids is not None]
            if strict:
                ids = [(index.to_host(), count) for index, count in ids]
            if len(ids) == len(moves) and all(index.on_host for index, _ in ids):
                total = sum(count for _, count in ids)
                joined = Index.joined(ids)
                joined.check(total, self.view.slots, "destination", distinct=True)
        return moves

    def chunk(self, memory_obj: MemoryObject) -> KVView:
        """Return the view of one memory object, a tensor or an object with ``.tensor``.

        Raises `LayoutError` if it does not hold rows of these caches.
        """
        tensor: Any = memory_obj
        if not isinstance(memory_obj, torch.Tensor):
            tensor = getattr(memory_obj, "tensor", memory_obj)
        probe = tensor if isinstance(tensor, torch.Tensor) else first_tensor(tensor)
        bound = self._bind(self._layout, probe.itemsize)
        try:
            return KVView.through(bound, tensor)
        except LayoutError as error:
            got = f"a tensor of shape {[*probe.shape]}"
            own = self.view.owners[0]
            if probe.itemsize != own.itemsize:  # then the expected extent is none of the caches
                got += f" and {probe.dtype} (theirs is {own.dtype}; widths are compared in bytes)"
            raise LayoutError(
                f"Expected memory_obj to hold chunks of these caches, got {got}. {error}"
            ) from error

    def _sets(self, jobs: Sequence[Move]) -> list[Move]:
        """Join chunks of equal form into one paged view, each chunk a block of it."""
        groups: dict[tuple[object, ...], list[Move]] = defaultdict(list)
        for job in jobs:
            # Equal in bytes is not enough: one view has tensors of one shape and dtype.
            chunk = job.dst
            first = chunk.owners[0]
            kind = (chunk.device, first.dtype, first.shape, first.stride())
            groups[chunk.form, chunk.slots, kind].append(job)
        sets: list[Move] = []
        for members in groups.values():
            chunk = members[0].dst
            if len(members) == 1 or chunk.layout.containers or chunk.layout.paged:
                sets += members
                continue
            bound = self._bind(f"block | {chunk.layout.text}", chunk.owners[0].itemsize)
            view = KVView.through(bound, [job.dst.tensors for job in members])
            sets.append(_joined(members, view))
        return sets

    def _bind(self, layout: str, itemsize: int) -> BoundLayout:
        bound = self._bound.get((layout, itemsize))
        if bound is not None:
            return bound
        cache = self.view
        parsed = parse(resolve(layout)[0])
        extents = dict[str, Any]()
        for name, axis in (("layers", "layer"), ("kv", "kv"), ("heads", "head")):
            if axis in parsed.axes or getattr(cache, name) != 1:
                extents[name] = getattr(cache, name)
        if any(width % itemsize for width in cache.widths):
            raise LayoutError(
                f"Expected a memory_obj whose elements divide the caches' rows of {cache.widths} "
                f"bytes for each kv and head, got elements of {itemsize} bytes. Use a dtype of "
                f"their width."
            )
        extents["dim"] = [width // itemsize for width in cache.widths]
        # A block of a batch is a chunk.
        needs_size = parsed.opaque or (parsed.paged and parsed.shares("token"))
        if needs_size and layout == self._layout:
            extents["block_size"] = cache.block_size
        bound = self._bound[layout, itemsize] = bind_layout(layout, **extents)
        if layout == self._layout:
            self.direct.add_layout(bound, itemsize)
        return bound


def first_tensor(level: object) -> torch.Tensor:
    """Return the first tensor of a memory object; raise `LayoutError` if it has none."""
    while not isinstance(level, torch.Tensor):
        if not isinstance(level, (list, tuple, Mapping)):
            do = "Make a tensor of a numpy array by torch.from_numpy."
            if isinstance(level, KVView):
                do = "Copy views by copy_rows or copy_blocks, which also pack and unpack."
            raise LayoutError(
                f"Expected the memory_obj to hold a tensor, the containers that chunk_layout "
                f"names, or an object with these as `.tensor`, got {kind_of(level)}. {do}"
            )
        items = list(level.values()) if isinstance(level, Mapping) else list(level)
        if not items:
            raise LayoutError(
                "Expected a memory_obj with tensors, got an empty container. Pass its tensors."
            )
        level = items[0]
    return level


def _listed(passed: object) -> list[Any] | None:
    """Return arguments as a list; None if nothing can iterate over them."""
    if isinstance(passed, Iterable):
        with suppress(TypeError):  # of a tensor without axes
            return [*passed]
    return None


def _joined(members: list[Move], view: KVView) -> Move:
    """Return several jobs as one; in ``view`` each of their chunks is a block."""
    # Ranges of one list that follow each other need no separate list.
    cache, chunk, shared, _, _ = members[0]
    follow = True
    at = shared.offset
    for job in members:
        index = job.src_index
        follow &= index.ids is shared.ids and index.step == shared.step and index.offset == at
        at += job.count
    total = at - shared.offset
    if not follow:
        shared = Index.joined([(job.src_index, job.count) for job in members])

    # The same holds for chunks that are full, except for the last one.
    slots = chunk.slots
    if all(job.count == slots for job in members[:-1]):
        return Move(cache, view, shared, Index(), total)
    filled = [(Index(offset=nth * slots), job.count) for nth, job in enumerate(members)]
    return Move(cache, view, shared, Index.joined(filled), total)


def slot_range(slot_mapping: Ids | None, start: int, end: int | None) -> tuple[Index, int]:
    """Return ``slot_mapping[start:end]`` as an index, and its number of tokens.

    Raises `SlotError` if the slot mapping does not contain the range.
    """
    if slot_mapping is None:
        raise SlotError("Expected a slot_mapping, got None. Pass the slots of the tokens to move.")
    index = Index.of(slot_mapping)
    length = index.length or 0
    if type(start) is not int or (end is not None and type(end) is not int):
        expected = "an integer, a position in the slot_mapping"
        start = whole("start", start, expected)
        end = None if end is None else whole("end", end, expected)
    stop = length if end is None else end
    if not 0 <= start <= stop <= length:
        raise SlotError(
            f"Expected 0 <= start <= end <= {length}, the slots of the slot_mapping, got "
            f"slot_mapping[{start}:{stop}]. Pass a range inside it."
        )
    return (index.shifted(start) if start else index), stop - start


def _check_caches(kv_caches: Tensors, bound: BoundLayout) -> None:
    """Reject a slot mapping that was passed in place of the caches."""
    layout = bound.layout
    if (
        isinstance(kv_caches, torch.Tensor)
        and kv_caches.dim() == 1
        and not kv_caches.is_floating_point()
        and (layout.containers or len(layout.dims) > 1)
    ):
        raise LayoutError(
            f"Expected kv_caches, the second argument, to be caches of {layout.text!r}, got a "
            f"{kv_caches.dtype} tensor of one dimension. If it is the slot mapping, pass "
            f"slot_mapping=..., and no caches if they are registered."
        )


KV_LAYOUT = "layer | kv block token head dim"
CHUNK_LAYOUT = "kv layer token (head dim)"
#: Caches as a caller passes them, or as an earlier step of the call has read them.
Caches: TypeAlias = "Tensors | Registration | None"


class AdaptiveConnector:
    """Move rows between one group of paged caches and chunks.

    Args:
        device: where the caches are.
        backend: the name of a backend to force; by default the registry chooses.
        kv_layout: layout of ``kv_caches``, a string or a preset. Default: vLLM flash attention,
            a list over layers of ``(2, blocks, block_size, heads, head_dim)``.
        chunk_layout: layout of memory objects. Default ``[2, L, T, H*D]``.
        reinterpret: memory objects may be of another number type than the caches: bits are moved.
        check: ``usual`` checks slots on the host; ``strict`` also slots on a device, for which each
            call then waits. Slots past the end, and destinations that occur twice, are rejected
            before anything moves.
        options: how all transfers are made, in place of ``backend``, ``reinterpret`` and ``check``.
            A call's own ``stream`` replaces that of the options.
        extents: declared extents of the caches: ``layers, kv, block_size, heads, dim``.

    Raises:
        LayoutError: a layout that cannot be parsed, or extents that it does not have.
        BackendUnavailable: no backend, or not the forced one, serves the device.
        InvalidTerms: a value that an option cannot have; options and other keywords.
    """

    def __init__(
        self,
        device: torch.device | str,
        backend: str | None = None,
        kv_layout: str = KV_LAYOUT,
        chunk_layout: str = CHUNK_LAYOUT,
        *,
        reinterpret: bool = False,
        check: Check = "usual",
        options: CopyOptions | None = None,
        **extents: int | Sequence[int] | None,
    ) -> None:
        keywords = {"backend": backend, "reinterpret": reinterpret, "check": check}
        options = options_from(options, keywords)
        refuse_options(extents)
        self._choice = choose(device, options.backend)
        self.device = self._choice.backend.device
        self._bound = bind_layout(kv_layout, reinterpret=options.reinterpret, **extents)
        self._options = replace(options, reinterpret=False)  # the views are bytes by their binding
        self._direct = options.whole and options.terms is None
        parse(resolve(chunk_layout)[0])  # raises for a layout that cannot be parsed
        self._kv_layout = kv_layout
        self._chunk_layout = chunk_layout
        self._registered: Registration | None = None
        self._late = LateErrors()
        self._number = enlist(self)
        self._passing: Registration | None = None

    def __repr__(self) -> str:
        registered = self._registered
        caches = "nothing registered" if registered is None else f"{registered.view.slots} slots"
        return (
            f"AdaptiveConnector({str(self.device)!r}, backend={self._choice.name!r}, "
            f"kv_layout={self._kv_layout!r}, chunk_layout={self._chunk_layout!r}, {caches})"
        )

    def register_kv_caches(self, kv_caches: Tensors) -> None:
        """Read the caches once and retain them until they are unregistered or replaced.

        An engine that reallocates its caches registers them again.

        Raises:
            LayoutError: caches that contradict the layout. DeviceMismatch: on another device.
        """
        self._registered = self._read(kv_caches)

    def unregister_kv_caches(self) -> None:
        """Release the caches."""
        self._registered = None

    def from_gpu(
        self,
        memory_obj: MemoryObject,
        kv_caches: Tensors | None = None,
        slot_mapping: Ids | None = None,
        start: int = 0,
        end: int | None = None,
        *,
        stream: torch.Stream | None = None,
    ) -> Transfer:
        """Store rows ``slot_mapping[start:end]`` as tokens 0 .. end - start of the chunk.

        Args:
            memory_obj: the chunk, a tensor or anything with ``.tensor``, on device or host.
            kv_caches: the caches; None: the registered ones. Other caches replace these.
            slot_mapping: int32 or int64 ``[tokens]``, host or device; negative = skipped.
            start, end: the range of the slot mapping. ``end`` None: to its end, and the chunk holds
                these tokens only, in whole blocks if it has some. With an ``end`` it may hold more.
            stream: where to order the work; it first waits for the current stream.

        Raises:
            LayoutError, SlotError, DeviceMismatch, Unsupported: before anything was written.
        """
        return self._move(True, memory_obj, kv_caches, slot_mapping, start, end, stream)

    def to_gpu(
        self,
        memory_obj: MemoryObject,
        kv_caches: Tensors | None = None,
        slot_mapping: Ids | None = None,
        start: int = 0,
        end: int | None = None,
        *,
        stream: torch.Stream | None = None,
    ) -> Transfer:
        """Load tokens 0 .. end - start of the chunk into rows ``slot_mapping[start:end]``.

        Arguments and errors are those of `from_gpu`.
        """
        return self._move(False, memory_obj, kv_caches, slot_mapping, start, end, stream)

    def batched_from_gpu(
        self,
        memory_objs: Sequence[MemoryObject],
        kv_caches: Tensors | None = None,
        slot_mapping: Ids | None = None,
        starts: Sequence[int] = (),
        ends: Sequence[int | None] = (),
        *,
        stream: torch.Stream | None = None,
    ) -> Transfer:
        """Store several chunks, each as `from_gpu` does; one launch for each set of equal shape and
        strides."""
        batch = Batch.of(memory_objs, slot_mapping, starts, ends)
        return self._move_batch(True, kv_caches, batch, stream)

    def batched_to_gpu(
        self,
        memory_objs: Sequence[MemoryObject],
        kv_caches: Tensors | None = None,
        slot_mapping: Ids | None = None,
        starts: Sequence[int] = (),
        ends: Sequence[int | None] = (),
        *,
        stream: torch.Stream | None = None,
    ) -> Transfer:
        """Load several chunks, each as `to_gpu` does; one launch for each set of equal shape and
        strides."""
        batch = Batch.of(memory_objs, slot_mapping, starts, ends)
        return self._move_batch(False, kv_caches, batch, stream)

    def explain(self, tokens: int = 256) -> str:
        """Return the trace of candidates and, if caches are registered, the plan of storing a
        contiguous chunk of ``tokens`` tokens."""
        if type(tokens) is not int or not 0 < tokens < 1 << 31:
            raise SlotError(f"Expected tokens from 1 to 2**31 - 1, got {tokens!r}. Pass one.")
        lines = [f"{self.device}: backend {self._choice.name!r} was chosen"]
        lines += [f"  {decision}" for decision in self._choice.trace]
        registered = self._registered
        if registered is None:
            return "\n".join([*lines, "no kv_caches are registered, so there is no plan yet"])
        cache = registered.view
        chunk = registered.chunk(example_chunk(cache, self._chunk_layout, tokens))
        ready = prepared(cache.form, chunk.form, 1, 0, None, self._choice)
        lines.append(f"from_gpu of {tokens} tokens, carried out by {ready.choice.name!r}:")
        if ready.choice.name != self._choice.name:
            lines += [f"  {decision}" for decision in ready.choice.trace]
        if self.device.type != "cpu" and not (ready.can.guards and ready.can.skips_negative):
            lines.append(
                "  device ids are checked before launch, with one synchronisation; host ids are "
                "not delayed"
            )
        return "\n".join([*lines, str(ready.plan)])

    def _caches(self, kv_caches: Caches) -> Registration:
        """Return the registered caches; caches that differ from them are registered first.

        Raises the error of an earlier transfer that the caller has not seen.
        """
        self._late.check(self.device)
        if self._options.late is not None:
            self._options.late.check(self.device)
        if kv_caches is None:
            return self._require()
        if isinstance(kv_caches, Registration):
            return kv_caches
        registered = self._registered
        if registered is None or not registered.holds(kv_caches):
            # One assignment: another thread sees the old caches or the new ones, never a mixture.
            # Caches that it registers meanwhile are not this call's.
            registered = self._registered = self._read(kv_caches)
        return registered

    def _require(self) -> Registration:
        registered = self._registered
        if registered is None:
            raise LayoutError(
                "Expected kv_caches, got none, and none are registered. Pass them, or call "
                "register_kv_caches first."
            )
        return registered

    def _move(
        self,
        store: bool,
        memory_obj: MemoryObject,
        kv_caches: Caches,
        slot_mapping: Ids | None,
        start: int,
        end: int | None,
        stream: torch.Stream | None,
    ) -> Transfer:
        caches = self._registered
        direct = stream is None and self._direct
        # What Python looks at first. The core looks at the words that report late errors.
        checked = is_dynamo_compiling() or kv_caches is not None or transfers.failed
        if direct and caches is not None and not checked:
            transfer = caches.direct.transfer(store, memory_obj, slot_mapping, start, end)
            if transfer is not None:
                return transfer
        if is_compiling():
            batch = Batch([memory_obj], slot_mapping, [start], [end])
            return self._traced(store, kv_caches, batch, stream)
        caches = self._caches(kv_caches)
        if direct and checked:
            transfer = caches.direct.transfer(store, memory_obj, slot_mapping, start, end)
            if transfer is not None:
                return transfer
        stream = self._options.stream if stream is None else stream
        caches.check_memory()
        job = caches.job(memory_obj, slot_mapping, start, end)
        context = Context.of(self.device, stream)
        move, passed = caches.checked(store, job, context, self._options.strict)
        return self._keep(self._submit(move, passed, context))

    def _move_batch(
        self, store: bool, kv_caches: Caches, batch: Batch, stream: torch.Stream | None
    ) -> Transfer:
        if is_compiling():
            return self._traced(store, kv_caches, batch, stream)
        caches = self._caches(kv_caches)
        caches.check_memory()
        stream = self._options.stream if stream is None else stream
        context = Context.of(self.device, stream)
        if self._options.sliced:
            batch = batch.with_ids_on_host(context)
        moves = caches.batch_moves(store, batch, context, self._options.strict)
        for move, _ in moves[1:]:  # the first one refuses itself
            check_issue(move, self._choice, context, self._options)
        transfers = [self._submit(move, passed, context) for move, passed in moves]
        return self._keep(Transfer.join(transfers))

    def _submit(self, move: Move, passed: Passed, context: Context) -> Transfer:
        """Issue a copy of checked caches."""
        began = perf_counter()
        options = self._options
        transfer = issue(move, self._choice, context, options, began, passed)
        if options.late is not None:
            options.late.keep(transfer)
        return transfer

    def _traced(
        self, store: bool, kv_caches: Caches, batch: Batch, stream: torch.Stream | None
    ) -> Transfer:
        """Replace the call by the opaque op inside torch.compile."""
        memory_objs, slot_mapping, starts, ends = batch
        if stream is not None or not isinstance(slot_mapping, torch.Tensor):
            return eagerly(self._move_batch, store, kv_caches, batch, stream)
        if memory_objs:
            caches, levels = self._shown(kv_caches)
            chunks = flatten([getattr(one, "tensor", one) for one in memory_objs])
            stops = [TO_THE_END if end is None else end for end in ends]
            op = torch.ops.portakv.from_gpu if store else torch.ops.portakv.to_gpu
            op(self._number, *chunks, list(caches), list(levels), slot_mapping, starts, stops)
        return Transfer()

    def _shown(self, kv_caches: Caches) -> tuple[Sequence[torch.Tensor], Sequence[int]]:
        """Return the caches as tensors for a compiler, with the lengths of their containers.

        Registered caches have no such lengths.
        """
        if kv_caches is not None:
            leaves, levels = flatten(kv_caches)
            registered = self._registered
            if registered is None or not registered.allocations.holds(leaves):
                return leaves, levels
        return self._require().allocations.tensors, []

    def _run_op(
        self,
        store: bool,
        caches: Sequence[torch.Tensor],
        cache_levels: Sequence[int],
        memory_objs: Any,
        *ranges: Any,
    ) -> None:
        """Run an op of a compiled function; ``ranges``: slots, starts and ends."""
        slot_mapping, starts, stops = ranges
        ends = [None if end == TO_THE_END else end for end in stops]
        batch = Batch(memory_objs, slot_mapping, starts, ends)
        read = self._handed_over(caches, cache_levels)
        if len(batch.memory_objs) == 1:
            one = batch.memory_objs[0]
            start = batch.starts[0]
            end = batch.ends[0]
            transfer = self._move(store, one, read, batch.slot_mapping, start, end, None)
        else:
            transfer = self._move_batch(store, read, batch, None)
        if any(completion.pendings for completion in transfer.completions):
            transfer.wait()  # later ops of the graph have no handle to wait for

    def _handed_over(self, caches: Sequence[torch.Tensor], levels: Sequence[int]) -> Registration:
        """Return the caches that a compiled function passes: the registered ones, or others.

        Others do not replace the registered ones, as they may be a compiler's copies.
        """
        if not levels:
            registered = self._require()
            own = registered.allocations
            # A compiler's copies are not retained.
            return registered if own.are(caches) else self._read(own.nested_in(caches))
        kv_caches = nested(caches, levels)
        if self._passing is None or not self._passing.holds(kv_caches):
            self._passing = self._read(kv_caches)
        return self._passing

    def _read(self, kv_caches: Tensors) -> Registration:
        return Registration(
            kv_caches, self._bound, self._chunk_layout, self._choice, self._late.owner
        )

    def _keep(self, transfer: Transfer) -> Transfer:
        self._late.keep(transfer)
        return transfer


# ------------------------------------------------------------------------------------------------
# Run transfers inside `torch.compile`: one opaque op for each direction, for every backend.
#
# A compiler sees only the op's schema: which tensors it reads and which it writes. So it orders the
# op among the model's reads and writes of the caches. At run time the op is the connector's eager
# call. Eager calls do not pay for the dispatcher.

NAMESPACE = "portakv"
TO_THE_END = -(1 << 62)  # stands for None among the ends of ranges, which an op takes as integers
# Nested containers travel as flat lists, with the length of each level, outermost first.
_ARGUMENTS = (
    "(int connector, {chunks} memory_objs, int[] chunk_levels, {caches} kv_caches, "
    "int[] cache_levels, Tensor slot_mapping, SymInt[] starts, SymInt[] ends) -> ()"
)
_SCHEMAS = {
    "from_gpu": _ARGUMENTS.format(chunks="Tensor(a!)[]", caches="Tensor[]"),
    "to_gpu": _ARGUMENTS.format(chunks="Tensor[]", caches="Tensor(a!)[]"),
}


class Allocations:
    """The caches in the form for a compiler: one tensor for each allocation.

    A compiler that sees the layers of one allocation separately takes them for tensors that share
    memory, and works on copies of them. If it sees the allocation, it works in place.

    Attributes:
        leaves: the tensors of the caches, flat.
        tensors: the allocations.
        levels: the length of each level of the containers.
        memory: of the tensors, as it was when they were read.
    """

    def __init__(self, nest: object) -> None:
        self.leaves, self.levels = flatten(nest)
        groups: dict[int, list[torch.Tensor]] = {}
        for leaf in self.leaves:
            groups.setdefault(leaf.untyped_storage().data_ptr(), []).append(leaf)
        numbers = {storage: number for number, storage in enumerate(groups)}
        self.tensors = [_allocation(group) for group in groups.values()]
        self._addresses = [one.data_ptr() for one in self.tensors]
        self._places = []
        for leaf in self.leaves:
            number = numbers[leaf.untyped_storage().data_ptr()]
            self._places.append((number, leaf.data_ptr() - self._addresses[number]))
        self.memory = Watch(self.leaves)

    def are(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Return True if these are the allocations themselves, not a compiler's copies."""
        return self._addresses == [one.data_ptr() for one in tensors]

    def holds(self, leaves: Sequence[torch.Tensor]) -> bool:
        """Return True if these are the tensors, the same objects in the same order."""
        return len(leaves) == len(self.leaves) and all(map(is_, leaves, self.leaves))

    def nested_in(self, copies: Sequence[torch.Tensor]) -> Tensors:
        """Return the nested tensors at their places in copies of the allocations."""
        for own, copy in zip(self.tensors, copies, strict=True):
            if (copy.shape, copy.stride()) != (own.shape, own.stride()):
                raise LayoutError(
                    f"Expected the compiler to keep shape {tuple(own.shape)} and strides "
                    f"{own.stride()} of the caches, got a copy of {tuple(copy.shape)} and "
                    f"{copy.stride()}. Keep the caches out of tensors that it may lay out again."
                )
        leaves = []
        for leaf, (number, offset) in zip(self.leaves, self._places, strict=True):
            storage = copies[number].untyped_storage()
            start = copies[number].data_ptr() - storage.data_ptr() + offset
            empty = torch.empty(0, dtype=leaf.dtype, device=leaf.device)
            at = start // leaf.element_size()
            leaves.append(empty.set_(storage, at, leaf.size(), leaf.stride()))
        return nested(leaves, self.levels)


def _allocation(group: list[torch.Tensor]) -> torch.Tensor:
    """Return the tensor that contains all tensors of one storage."""
    first = group[0]
    if len(group) == 1:
        return first
    base = first._base
    if base is not None and all(leaf._base is base for leaf in group):
        return base
    storage = first.untyped_storage()
    whole = torch.empty(0, dtype=first.dtype, device=first.device)
    return whole.set_(storage, 0, (storage.nbytes() // first.element_size(),), (1,))


def flatten(nest: object) -> tuple[list[torch.Tensor], list[int]]:
    """Return the tensors of nested containers, and the length of each level."""
    level: list[Any] = [nest]
    levels = []
    while not isinstance(level[0], torch.Tensor):
        rows = []
        for one in level:
            if not isinstance(one, (list, tuple, Mapping)):
                raise LayoutError(
                    f"Expected tensors, lists, tuples or dicts, got {kind_of(one)}. Pass "
                    f"containers of tensors."
                )
            rows.append(list(one.values()) if isinstance(one, Mapping) else list(one))
        lengths = [len(row) for row in rows]
        if not lengths[0] or len(set(lengths)) > 1:
            raise LayoutError(
                f"Expected containers of one length, at least 1, in one level, got lengths "
                f"{lengths}. Pass containers of equal length."
            )
        levels.append(lengths[0])
        level = [item for row in rows for item in row]
    return level, levels


def nested(tensors: Sequence[torch.Tensor], levels: Sequence[int]) -> Tensors:
    """Return lists in lists, the inverse of `flatten`."""
    level: list[Tensors] = list(tensors)
    for length in reversed(levels):
        level = [level[i : i + length] for i in range(0, len(level), length)]
    return level[0]


def enlist(connector: AdaptiveConnector) -> int:
    """Return the number by which compiled functions name a connector while it lives."""
    with making():  # `cache` does not wait
        _define()
    number = next(_numbers)
    _enlisted[number] = connector
    return number


_enlisted: WeakValueDictionary[int, AdaptiveConnector] = WeakValueDictionary()
_numbers = itertools.count(1)


@cache
def _define() -> torch.library.Library:
    """Define the ops of compiled functions, which torch allows once for the process."""
    library = torch.library.Library(NAMESPACE, "DEF")
    for name, arguments in _SCHEMAS.items():
        # A view is read by its strides, so the compiler must not choose others.
        library.define(name + arguments, tags=(torch.Tag.needs_fixed_stride_order,))
        library.impl(name, partial(_run, name == "from_gpu"), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", _fake, lib=library)
    return library


def _run(
    store: bool,
    connector: int,
    memory_objs: Sequence[torch.Tensor],
    chunk_levels: Sequence[int],
    kv_caches: Sequence[torch.Tensor],
    cache_levels: Sequence[int],
    *ranges: Any,
) -> None:
    """Have the connector run an op; ``ranges``: slots, starts and ends."""
    caller = _enlisted.get(connector)
    if caller is None:
        raise TransferError(
            "Expected the connector of a compiled function to exist, got a transfer of one that is "
            "gone. Keep the connector as long as functions that were compiled with it."
        )
    caller._run_op(store, kv_caches, cache_levels, nested(memory_objs, chunk_levels), *ranges)


def _fake(*arguments: object) -> None:
    """Return nothing, as an op does: there is no shape to compute."""
