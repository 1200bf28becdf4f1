# SPDX-License-Identifier: Apache-2.0
"""`AdaptiveConnector`: what an engine calls to store chunks from its paged cache and load them.

It decides which views, which direction and which stream; the copy itself is `copy.carry`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.compiler import is_compiling

from portakv.connector import in_graph as opaque
from portakv.connector.caches import Registration, facts_of
from portakv.connector.chunks import WHOLE
from portakv.connector.request import (
    check_apart,
    check_batch,
    check_chunk,
    check_paired,
    slot_range,
)
from portakv.connector.roots import flatten, nested
from portakv.copy.copy import carry
from portakv.errors import LayoutError, SlotError
from portakv.layout.language import parse
from portakv.layout.presets import resolve
from portakv.registry.prepared import route
from portakv.registry.registry import choose
from portakv.runtime.capture import capturing
from portakv.runtime.transfer import Completion, Transfer, failed
from portakv.runtime.watch import fail, unasked_error
from portakv.runtime.words import any_set
from portakv.view.bound import read_as
from portakv.view.example import example_chunk

KV_LAYOUT = "layer | kv block token head dim"
CHUNK_LAYOUT = "kv layer token (head dim)"


class AdaptiveConnector:
    """Moves rows between one group of paged caches and chunks.

    Args:
        device: where the caches are.
        backend: a backend's name, which is then forced; by default the registry chooses.
        kv_layout: layout of ``kv_caches``, a string or a preset. Default: vLLM flash attention,
            a list over layers of ``(2, blocks, block_size, heads, head_dim)``.
        chunk_layout: layout of memory objects. Default ``[2, L, T, H*D]``.
        reinterpret: memory objects may be of another number type than the caches: their bits are
            moved.
        extents: declared extents of the caches: ``layers, kv, block_size, heads, dim``.

    Raises:
        LayoutError: a layout that cannot be parsed, or extents that it does not have.
        BackendUnavailable: no backend, or not the forced one, serves the device.
    """

    def __init__(
        self,
        device: torch.device | str,
        backend: str | None = None,
        kv_layout: str = KV_LAYOUT,
        chunk_layout: str = CHUNK_LAYOUT,
        *,
        reinterpret: bool = False,
        **extents: Any,
    ) -> None:
        self._choice = choose(device, backend)
        self.device = self._choice.backend.device
        self._kv_reading = read_as(kv_layout, reinterpret=reinterpret, **extents)
        parse(resolve(chunk_layout)[0])  # a layout that cannot be read is refused now
        self._chunk_layout = chunk_layout
        self._registered: Registration | None = None
        self._captured: list[Completion] = []
        self._owner = weakref.ref(self)
        self._handle = opaque.enlist(self)
        self._passing: Registration | None = None

    def register_kv_caches(self, kv_caches: Any) -> None:
        """Read the caches once and hold them until `unregister_kv_caches` or another registration.

        An engine that reallocates its caches registers again.

        Raises:
            LayoutError: caches that contradict the layout. DeviceMismatch: on another device.
        """
        self._register(kv_caches)

    def unregister_kv_caches(self) -> None:
        """Let go of the caches."""
        self._registered = None

    def from_gpu(
        self,
        memory_obj: Any,
        kv_caches: Any = None,
        slot_mapping: Any = None,
        start: int = 0,
        end: int | None = None,
        *,
        stream: torch.Stream | None = None,
    ) -> Transfer:
        """Store: rows of ``slot_mapping[start:end]`` become tokens 0 .. end - start of the chunk.

        Args:
            memory_obj: the chunk, a tensor or anything with ``.tensor``, on device or host.
            kv_caches: the caches; None: those registered. Others are registered in their place.
            slot_mapping: int32 or int64 ``[tokens]``, host or device; negative = skipped.
            start, end: the range of the slot mapping; ``end`` None: to its end.
            stream: where to order the work; it first waits for the current stream.

        Raises:
            LayoutError, SlotError, DeviceMismatch, Unsupported: before anything was written.
        """
        if is_compiling():
            return self._traced(True, [memory_obj], kv_caches, slot_mapping, [start], [end], stream)
        return self._move(True, memory_obj, kv_caches, slot_mapping, start, end, stream)

    def to_gpu(
        self,
        memory_obj: Any,
        kv_caches: Any = None,
        slot_mapping: Any = None,
        start: int = 0,
        end: int | None = None,
        *,
        stream: torch.Stream | None = None,
    ) -> Transfer:
        """Load: tokens 0 .. end - start of the chunk go to rows ``slot_mapping[start:end]``.

        Arguments and errors are those of `from_gpu`.
        """
        if is_compiling():
            return self._traced(
                False, [memory_obj], kv_caches, slot_mapping, [start], [end], stream
            )
        return self._move(False, memory_obj, kv_caches, slot_mapping, start, end, stream)

    def batched_from_gpu(
        self,
        memory_objs: Sequence[Any],
        kv_caches: Any = None,
        slot_mapping: Any = None,
        starts: Sequence[int] = (),
        ends: Sequence[int] = (),
        *,
        stream: torch.Stream | None = None,
    ) -> Transfer:
        """`from_gpu` of several chunks; one launch for each set of equal shape and strides."""
        args = (memory_objs, kv_caches, slot_mapping, starts, ends, stream)
        return self._traced(True, *args) if is_compiling() else self._move_batch(True, *args)

    def batched_to_gpu(
        self,
        memory_objs: Sequence[Any],
        kv_caches: Any = None,
        slot_mapping: Any = None,
        starts: Sequence[int] = (),
        ends: Sequence[int] = (),
        *,
        stream: torch.Stream | None = None,
    ) -> Transfer:
        """`to_gpu` of several chunks; one launch for each set of equal shape and strides."""
        args = (memory_objs, kv_caches, slot_mapping, starts, ends, stream)
        return self._traced(False, *args) if is_compiling() else self._move_batch(False, *args)

    def explain(self, tokens: int = 256) -> str:
        """The trace of candidates and, where caches are registered, the plan of storing a
        contiguous chunk of ``tokens`` tokens."""
        if type(tokens) is not int or tokens < 1:
            raise SlotError(f"explain(tokens={tokens!r}) was asked; expected a positive integer.")
        lines = [f"{self.device}: backend {self._choice.name!r} was chosen"]
        lines += [f"  {decision}" for decision in self._choice.trace]
        registered = self._registered
        if registered is None:
            return "\n".join([*lines, "no kv_caches are registered, so there is no plan yet"])
        cache = registered.view
        chunk = registered.chunks.read(example_chunk(cache, self._chunk_layout, tokens))
        way = route(cache.form, chunk.form, 1, 0, None, self._choice)
        lines.append(f"from_gpu of {tokens} tokens, carried out by {way.choice.name!r}:")
        if way.choice.name != self._choice.name:
            lines += [f"  {decision}" for decision in way.choice.trace]
        on_device = self.device.type != "cpu"
        if on_device and not (way.can.guards and way.can.skips_negative):
            lines.append(
                "  device ids are checked before launch, with one synchronisation; host ids are "
                "not delayed"
            )
        return "\n".join([*lines, str(way.plan)])

    def _move(
        self,
        store: bool,
        memory_obj: Any,
        kv_caches: Any,
        slot_mapping: Any,
        start: int,
        end: int | None,
        stream: torch.Stream | None,
    ) -> Transfer:
        if failed or any_set():
            self._report()
        caches = self._caches(kv_caches)
        return self._carry(store, caches, memory_obj, slot_mapping, start, end, stream)

    def _carry(
        self,
        store: bool,
        caches: Registration,
        memory_obj: Any,
        slot_mapping: Any,
        start: int,
        end: int | None,
        stream: torch.Stream | None,
    ) -> Transfer:
        cache, chunks = caches.view, caches.chunks
        if stream is None:
            transfer = caches.lanes.transfer(store, memory_obj, slot_mapping, start, end)
            if transfer is not None:
                return transfer
        caches.check_memory()
        index, count = slot_range(slot_mapping, start, end)
        chunk = chunks.read(memory_obj)
        check_chunk(cache, chunk, count)
        sides = (cache, chunk, index, WHOLE) if store else (chunk, cache, WHOLE, index)
        transfer = self._keep(carry(*sides, count, self._choice, stream, disjoint=True))
        caches.lanes.learn(store, chunk, slot_mapping)
        return transfer

    def _move_batch(
        self,
        store: bool,
        memory_objs: Sequence[Any],
        kv_caches: Any,
        slot_mapping: Any,
        starts: Sequence[int],
        ends: Sequence[int],
        stream: torch.Stream | None,
    ) -> Transfer:
        if failed or any_set():
            self._report()
        memory_objs, starts, ends = list(memory_objs), list(starts), list(ends)
        check_paired(memory_objs, starts, ends)
        caches = self._caches(kv_caches)
        return self._carry_batch(store, caches, memory_objs, slot_mapping, starts, ends, stream)

    def _carry_batch(
        self,
        store: bool,
        caches: Registration,
        memory_objs: list[Any],
        slot_mapping: Any,
        starts: Sequence[int],
        ends: Sequence[int],
        stream: torch.Stream | None,
    ) -> Transfer:
        cache, chunks = caches.view, caches.chunks
        caches.check_memory()
        jobs = []
        for memory_obj, start, end in zip(memory_objs, starts, ends, strict=True):
            index, count = slot_range(slot_mapping, start, end)
            chunk = chunks.read(memory_obj)
            check_chunk(cache, chunk, count)
            jobs.append((chunk, index, count))
        if store:
            check_apart([chunk for chunk, _, count in jobs if count])
        copies = []
        for chunk, chunk_index, index, count in chunks.sets(jobs):
            sides = ((cache, index), (chunk, chunk_index))
            (src, src_index), (dst, dst_index) = sides if store else sides[::-1]
            copies.append((src, dst, src_index, dst_index, count))
        check_batch(copies)
        return self._keep(
            Transfer.join([carry(*copy, self._choice, stream, disjoint=True) for copy in copies])
        )

    def _traced(
        self,
        store: bool,
        memory_objs: Sequence[Any],
        kv_caches: Any,
        slot_mapping: Any,
        starts: Sequence[Any],
        ends: Sequence[Any],
        stream: torch.Stream | None,
    ) -> Transfer:
        """Inside torch.compile: the opaque op takes the place of the call."""
        if stream is not None or not isinstance(slot_mapping, torch.Tensor):
            args = (store, memory_objs, kv_caches, slot_mapping, starts, ends, stream)
            return cast(Transfer, opaque.eagerly(self._move_batch, *args))
        if not memory_objs:
            return Transfer()
        check_paired(memory_objs, starts, ends)
        caches, levels = self._shown(kv_caches)
        opaque.transfer(
            store, self._handle, memory_objs, caches, levels, slot_mapping, starts, ends
        )
        return Transfer()

    def _shown(self, kv_caches: Any) -> tuple[Sequence[torch.Tensor], Sequence[int]]:
        """The caches as a compiler is shown them, and the lengths of their containers: none for
        those that are registered."""
        registered = self._registered
        if kv_caches is None:
            if registered is None:
                raise _no_caches()
            return registered.roots.tensors, []
        leaves, levels = flatten(kv_caches)
        if registered is not None and len(leaves) == len(registered.roots.leaves):
            pairs = zip(leaves, registered.roots.leaves, strict=True)
            if all(mine is theirs for mine, theirs in pairs):
                return registered.roots.tensors, []
        return leaves, levels

    def carry_op(
        self,
        store: bool,
        memory_objs: list[Any],
        caches: Sequence[torch.Tensor],
        cache_levels: Sequence[int],
        slot_mapping: torch.Tensor,
        starts: Sequence[int],
        ends: Sequence[int],
    ) -> None:
        """What the op of `opaque` does when a compiled function runs; not for callers."""
        if failed or any_set():
            self._report()
        read = self._handed_over(caches, cache_levels)
        if len(memory_objs) == 1:
            sides = (store, read, memory_objs[0], slot_mapping, starts[0], ends[0], None)
            transfer = self._carry(*sides)
        else:
            transfer = self._carry_batch(store, read, memory_objs, slot_mapping, starts, ends, None)
        if any(completion.pending for completion in transfer.completions):
            transfer.wait()  # what follows in the graph knows of no handle

    def _handed_over(self, caches: Sequence[torch.Tensor], levels: Sequence[int]) -> Registration:
        """What a compiled function hands over: registered caches, or others, which do not take
        their place: they may be a compiler's copies."""
        registered = self._registered
        if not levels:
            if registered is None:
                raise _no_caches()
            if registered.roots.are(caches):
                return registered
            return self._read(registered.roots.nested_in(caches))  # a compiler's copies: not kept
        kv_caches = nested(caches, levels)
        facts = facts_of(kv_caches)
        if self._passing is None or self._passing.facts != facts:
            self._passing = self._read(kv_caches)
        return self._passing

    def _caches(self, kv_caches: Any) -> Registration:
        """What is registered; caches that differ from it register again."""
        registered = self._registered
        if kv_caches is not None and (
            registered is None or facts_of(kv_caches) != registered.facts
        ):
            registered = self._register(kv_caches)
        if registered is None:
            raise _no_caches()
        return registered

    def _register(self, kv_caches: Any) -> Registration:
        # Assigned at once: another thread sees the old caches or the new ones, never a mixture.
        caches = self._registered = self._read(kv_caches)
        return caches  # not what is registered by now: another thread may have been there

    def _read(self, kv_caches: Any) -> Registration:
        return Registration.read(
            kv_caches, self._kv_reading, self._chunk_layout, self._choice, self._owner
        )

    def _keep(self, transfer: Transfer) -> Transfer:
        for completion in transfer.completions:
            completion.owner = self._owner
            if completion.standing:
                self._captured.append(completion)
            elif completion.untold:
                fail(completion, self._owner)
        return transfer

    def _report(self) -> None:
        """Raise the error of an earlier transfer that nobody asked for."""
        if capturing(self.device):
            return
        for completion in self._captured:
            error = completion.take_error()
            if error is not None:
                raise error
        error = unasked_error(self._owner)
        if error is not None:
            raise error


def _no_caches() -> LayoutError:
    return LayoutError(
        "No kv_caches were passed and none are registered; pass them, or call register_kv_caches "
        "first."
    )
