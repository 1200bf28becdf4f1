# SPDX-License-Identifier: Apache-2.0
"""`AdaptiveConnector`: what an engine calls to store chunks from its paged cache and load them.

It decides which views, which direction and which stream; the copy itself is `copy.carry`.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from itertools import pairwise
from operator import index as whole_number
from typing import Any, NamedTuple

import torch

from .chunks import WHOLE, ChunkReader
from .copy import carry
from .errors import DeviceMismatch, LayoutError, SlotError
from .example import example_chunk
from .index import Index
from .lanes import Lanes
from .layout import parse
from .ordering import capturing
from .presets import resolve
from .reading import read_as
from .registry import choose
from .routes import route
from .transfer import Completion, Transfer
from .view import KVView
from .watch import fail, troubled, unasked_error

KV_LAYOUT = "layer | kv block token head dim"
CHUNK_LAYOUT = "kv layer token (head dim)"


class _Caches(NamedTuple):
    """Registered caches: their view, the facts that tell others apart, the reader of chunks, and
    what was learnt of transfers to and from them."""

    view: KVView
    facts: Any
    chunks: ChunkReader
    lanes: Lanes


class AdaptiveConnector:
    """Moves rows between one group of paged caches and chunks.

    Args:
        device: where the caches are.
        backend: a backend's name, which is then forced; by default the registry chooses.
        kv_layout: layout of ``kv_caches``, a string or a preset. Default: vLLM flash attention,
            a list over layers of ``(2, blocks, block_size, heads, head_dim)``.
        chunk_layout: layout of memory objects. Default ``[2, L, T, H*D]``.
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
        **extents: Any,
    ) -> None:
        self._choice = choose(device, backend)
        self.device = self._choice.backend.device
        self._kv_reading = read_as(kv_layout, **extents)
        parse(resolve(chunk_layout)[0])  # a layout that cannot be read is refused now
        self._chunk_layout = chunk_layout
        self._registered: _Caches | None = None
        self._captured: list[Completion] = []
        self._owner = weakref.ref(self)

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
        return self._move_batch(True, memory_objs, kv_caches, slot_mapping, starts, ends, stream)

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
        return self._move_batch(False, memory_objs, kv_caches, slot_mapping, starts, ends, stream)

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
        if self._captured or troubled():
            self._report()
        cache, _, chunks, lanes = self._caches(kv_caches)
        if stream is None:
            transfer = lanes.transfer(store, memory_obj, slot_mapping, start, end)
            if transfer is not None:
                return transfer
        index, count = _range(slot_mapping, start, end)
        chunk = chunks.read(memory_obj)
        _check_chunk(cache, chunk, count)
        sides = (cache, chunk, index, WHOLE) if store else (chunk, cache, WHOLE, index)
        transfer = self._keep(carry(*sides, count, self._choice, stream, disjoint=True))
        lanes.learn(store, chunk, slot_mapping)
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
        if self._captured or troubled():
            self._report()
        memory_objs, starts, ends = list(memory_objs), list(starts), list(ends)
        if not len(memory_objs) == len(starts) == len(ends):
            raise SlotError(
                f"{len(memory_objs)} memory objects came with {len(starts)} starts and "
                f"{len(ends)} ends; pass one start and one end for each."
            )
        cache, _, chunks, _ = self._caches(kv_caches)
        jobs = []
        for memory_obj, start, end in zip(memory_objs, starts, ends, strict=True):
            index, count = _range(slot_mapping, start, end)
            chunk = chunks.read(memory_obj)
            _check_chunk(cache, chunk, count)
            jobs.append((chunk, index, count))
        if store:
            _check_apart([chunk for chunk, _, count in jobs if count])
        copies = []
        for chunk, chunk_index, index, count in chunks.sets(jobs):
            sides = ((cache, index), (chunk, chunk_index))
            (src, src_index), (dst, dst_index) = sides if store else sides[::-1]
            copies.append((src, dst, src_index, dst_index, count))
        _check_batch(copies)
        return self._keep(
            Transfer.join([carry(*copy, self._choice, stream, disjoint=True) for copy in copies])
        )

    def _caches(self, kv_caches: Any) -> _Caches:
        """What is registered; caches that differ from it register again."""
        registered = self._registered
        if kv_caches is not None and (registered is None or _facts(kv_caches) != registered.facts):
            registered = self._register(kv_caches)
        if registered is None:
            raise LayoutError(
                "No kv_caches were passed and none are registered; pass them, or call "
                "register_kv_caches first."
            )
        return registered

    def _register(self, kv_caches: Any) -> _Caches:
        view = KVView.through(self._kv_reading, kv_caches, lasting=True)
        if view.device != self.device:
            raise DeviceMismatch(
                f"The kv_caches are on {view.device}, but this connector serves {self.device}; "
                f"make a connector for their device."
            )
        if self._choice.can.tables:
            view.table  # noqa: B018 - made now, so that no transfer has to
        # Assigned at once: another thread sees the old caches or the new ones, never a mixture.
        caches = _Caches(
            view,
            _facts(kv_caches),
            ChunkReader(view, self._chunk_layout),
            Lanes(view, self._choice, self._owner),
        )
        self._registered = caches
        return caches  # not what is registered by now: another thread may have been there

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


def _range(slot_mapping: Any, start: int, end: int | None) -> tuple[Index, int]:
    if slot_mapping is None:
        raise SlotError("No slot_mapping was passed; pass the slots of the tokens to move.")
    index = Index.of(slot_mapping)
    length = index.length or 0
    if type(start) is not int or (end is not None and type(end) is not int):
        start, end = _whole("start", start), None if end is None else _whole("end", end)
    stop = length if end is None else end
    if not 0 <= start <= stop <= length:
        raise SlotError(
            f"slot_mapping[{start}:{stop}] was asked of {length} slots; expected 0 <= start <= end "
            f"<= {length}."
        )
    return (index.shifted(start) if start else index), stop - start


def _whole(name: str, value: Any) -> int:
    try:
        return whole_number(value)
    except TypeError:
        raise SlotError(
            f"{name}={value!r} was asked; expected an integer, a position in the slot_mapping."
        ) from None


def _check_batch(copies: list[tuple[KVView, KVView, Index, Index, int]]) -> None:
    """Refuse the whole batch before its first launch where one of its copies is bad."""
    for src, dst, src_index, dst_index, count in copies:
        dst.check_writable()
        src_index.judge(count, src.slots, False, "source")
        dst_index.judge(count, dst.slots, True, "destination")
    if len(copies) < 2:
        return
    # Sets of one batch share the cache; destinations must be distinct across them as well.
    ids = [(dst_index, count) for _, _, _, dst_index, count in copies if dst_index.ids is not None]
    if len(ids) == len(copies) and all(index.on_host for index, _ in ids):
        total = sum(count for _, count in ids)
        Index.joined(ids).judge(total, copies[0][1].slots, True, "destination")


def _check_apart(chunks: list[KVView]) -> None:
    """Refuse memory objects of one batch that overlap where they are written."""
    spans = sorted(span for chunk in chunks for span in chunk.spans)
    for (_, past), (first, _) in pairwise(spans):
        if first < past:
            raise LayoutError(
                "Two memory objects of one batch lie in the same memory, so that one would "
                "overwrite the other; pass buffers that do not overlap."
            )


def _check_chunk(cache: KVView, chunk: KVView, count: int) -> None:
    if chunk.slots < count:
        raise SlotError(
            f"{count} tokens were asked, but the memory_obj holds {chunk.slots}; pass a larger "
            f"one or a smaller range."
        )
    if chunk.overlaps(cache):
        raise LayoutError(
            "The memory_obj lies in the memory of the kv_caches; pass a buffer of its own."
        )


def _facts(kv_caches: Any) -> Any:
    """Address, shape, strides and dtype of each tensor, nested as they are."""
    if isinstance(kv_caches, torch.Tensor):
        return kv_caches.data_ptr(), kv_caches.shape, kv_caches.stride(), kv_caches.dtype
    if isinstance(kv_caches, Mapping):
        kv_caches = kv_caches.values()
    elif not isinstance(kv_caches, (list, tuple)):
        raise LayoutError(
            f"kv_caches is a {type(kv_caches).__name__}; expected a tensor, list, tuple or dict."
        )
    return [_facts(item) for item in kv_caches]
