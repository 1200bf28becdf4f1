# SPDX-License-Identifier: Apache-2.0
"""`AdaptiveConnector`: store chunks of an engine's paged cache, and load them.

It decides on views, direction and stream; `issue` makes the copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any, TypeAlias

import torch
from torch.compiler import is_compiling

from portakv.connector import in_graph
from portakv.connector.caches import Batch, CheckedMove, Registration, check_chunk_layout
from portakv.copy.context import Context
from portakv.copy.options import Check, CopyOptions, options_from, refuse_options
from portakv.copy.request import Ids, MemoryObject, Tensors
from portakv.copy.schedule import check_issue, issue
from portakv.errors import LayoutError, SlotError
from portakv.registry.prepared import prepared
from portakv.registry.registry import choose
from portakv.runtime.transfer import LateErrors, Transfer
from portakv.view.bound import bind_layout
from portakv.view.example import example_chunk

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
        self._usual = self._options.terms is None and not (options.by_layer or options.late)
        check_chunk_layout(chunk_layout)
        self._kv_layout = kv_layout
        self._chunk_layout = chunk_layout
        self._registered: Registration | None = None
        self._late = LateErrors()
        self._number = in_graph.enlist(self)
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
            start, end: the range of the slot mapping; ``end`` None: to its end.
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
        """Store several chunks; one launch for each set of equal shape and strides."""
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
        """Load several chunks; one launch for each set of equal shape and strides."""
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
        if is_compiling():
            batch = Batch([memory_obj], slot_mapping, [start], [end])
            return self._traced(store, kv_caches, batch, stream)
        caches = self._caches(kv_caches)
        stream = self._options.stream if stream is None else stream
        if stream is None and self._usual:
            transfer = caches.repeats.transfer(store, memory_obj, slot_mapping, start, end)
            if transfer is not None:
                return transfer
        caches.check_memory()
        job = caches.job(memory_obj, slot_mapping, start, end)
        context = Context.of(self.device, stream)
        checked = caches.checked(store, job, context, self._options.strict)
        transfer = self._submit(checked, context)
        # A repeat looks at no ids, and no graph records one.
        if self._usual and not (self._options.strict or context.captured):
            caches.repeats.remember(store, job.chunk, slot_mapping)
        return self._keep(transfer)

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
        for each in moves[1:]:  # the first one refuses itself
            check_issue(each.move, self._choice, context, self._options)
        return self._keep(Transfer.join([self._submit(move, context) for move in moves]))

    def _submit(self, checked: CheckedMove, context: Context) -> Transfer:
        """Issue a copy of checked caches."""
        began = perf_counter()
        options = self._options
        transfer = issue(checked.move, self._choice, context, options, began, checked.passed)
        if options.late is not None:
            options.late.keep(transfer)
        return transfer

    def _traced(
        self, store: bool, kv_caches: Caches, batch: Batch, stream: torch.Stream | None
    ) -> Transfer:
        """Replace the call by the opaque op inside torch.compile."""
        memory_objs, slot_mapping, starts, ends = batch
        if stream is not None or not isinstance(slot_mapping, torch.Tensor):
            return in_graph.eagerly(self._move_batch, store, kv_caches, batch, stream)
        if memory_objs:
            caches, levels = self._shown(kv_caches)
            chunks = in_graph.flatten([getattr(one, "tensor", one) for one in memory_objs])
            stops = [slot_mapping.shape[0] if end is None else end for end in ends]
            op = torch.ops.portakv.from_gpu if store else torch.ops.portakv.to_gpu
            op(self._number, *chunks, list(caches), list(levels), slot_mapping, starts, stops)
        return Transfer()

    def _shown(self, kv_caches: Caches) -> tuple[Sequence[torch.Tensor], Sequence[int]]:
        """Return the caches as tensors for a compiler, with the lengths of their containers.

        Registered caches have no such lengths.
        """
        if kv_caches is not None:
            leaves, levels = in_graph.flatten(kv_caches)
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
        """Run the op of `in_graph` in a compiled function; ``ranges``: slots, starts and ends."""
        batch = Batch(memory_objs, *ranges)
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
        kv_caches = in_graph.nested(caches, levels)
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
