# SPDX-License-Identifier: Apache-2.0
"""The moves of a job of vLLM's offloading: pages of each group, checked before any page moves.

The module imports no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from portakv import (
    BlockTransfer,
    CopyOptions,
    Index,
    InvalidTerms,
    KVView,
    LayoutError,
    PortaKVError,
    SlotError,
)
from portakv.host import pinned
from portakv.integrations import IntegrationError
from portakv.integrations.checks import check_ids
from portakv.runtime.streams import on_stream

# ------------------------------------------------------------------------------------------------
# Jobs of vLLM's offloading, which end in order, and the time that their copies took on the
# device.

#: The terms of `copy_rows` that the key ``"portakv"`` of the configuration may hold.
TERMS = ("backend", "max_gbps", "max_thread_blocks", "overlap")


def worker_terms(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return the terms of copies in the ``kv_connector_extra_config`` of the offloading worker.

    Raises `InvalidTerms` for other terms, and for values that a term cannot have.
    """
    terms = extra.get("portakv", {})
    if not isinstance(terms, Mapping) or not set(terms) <= set(TERMS):
        raise InvalidTerms(
            f"kv_connector_extra_config has portakv={terms!r}; expected a mapping with some of "
            f"{', '.join(TERMS)}. Correct it, or leave it out."
        )
    CopyOptions(**terms)
    return dict(terms)


class Job(NamedTuple):
    """A submitted job, with timing events of the device before and after its copies.

    Without timing events the host's clock counts.
    """

    transfer: BlockTransfer
    begin: torch.Event | None
    end: torch.Event | None
    nbytes: int = 0

    def done(self) -> bool:
        """Return whether the copies have ended and their time is known; never blocks.

        The device completes ``end`` after the event of the transfer, so both are checked.
        """
        return self.transfer.done() and (self.end is None or self.end.query())

    def synchronize(self) -> None:
        """Block the host until the copies have ended and their time is known."""
        self.transfer.synchronize()
        if self.end is not None:
            self.end.synchronize()

    def seconds(self) -> float | None:
        """Return the time that the copies of an ended job took.

        On a device it excludes the time for which they waited for the model.
        """
        if self.begin is None or self.end is None:
            return self.transfer.statistics.seconds
        return float(self.begin.elapsed_time(self.end)) / 1000


class Lane:
    """Jobs on a separate stream, which end in the order of their submission.

    Args:
        device: the device of the stream; the host has none.
        terms: of `copy_rows`. With a limited rate a coroutine of the loop issues slices later, by
            helpers, so an event that is recorded now would not come after them.

    Attributes:
        jobs: that were submitted, by number.
        options: of the lane's copies.
        paced: the copies have a limited rate.
    """

    def __init__(self, device: torch.device, terms: Mapping[str, Any] | None = None) -> None:
        self.device = device
        self.stream = None if device.type == "cpu" else torch.Stream(device)
        self.jobs: dict[int, Job] = {}
        self._events = list[torch.Event]()  # of jobs that were taken
        terms = terms or {}
        self.paced = terms.get("max_gbps") is not None
        # Helpers issue the slices of a paced copy, on a stream that the options name.
        self.options = CopyOptions(stream=self.stream if self.paced else None, **terms)

    def submit(self, number: int, copy: Callable[[], BlockTransfer], nbytes: int = 0) -> None:
        """Begin a job of so many bytes, whose copies ``copy`` issues on the current stream.

        That is the lane's then; see `current`.
        """
        with self.current():
            begin = self._event()
            transfer = copy()
            self.jobs[number] = Job(transfer, begin, self._event(), nbytes)

    def current(self) -> AbstractContextManager[object]:
        """Make the lane's stream current, after the work of the one that was current."""
        if self.stream is not None:
            self.stream.wait_stream(torch.accelerator.current_stream(self.device.index))
        return on_stream(self.stream)

    def use(self, view: KVView) -> None:
        """Report to the allocator that copies of the lane use the memory of a view.

        It does not hand out that memory while such a copy is in flight, also without references.
        """
        if self.stream is not None:
            for tensor in view.used_on(self.stream):
                if tensor.device == self.device:
                    tensor.record_stream(self.stream)

    def ended(self) -> Iterator[int]:
        """Yield the numbers of the oldest jobs that have ended.

        Raises the error of a job that failed, and removes that job.
        """
        for number, job in list(self.jobs.items()):
            try:
                if not job.done():
                    return
            except PortaKVError:
                del self.jobs[number]
                raise
            yield number

    def take(self, number: int) -> tuple[int, float | None]:
        """Remove a job that has ended; return its bytes and its seconds, as `Job.seconds`."""
        job = self.jobs.pop(number)
        seconds = job.seconds()
        self._events += [event for event in (job.begin, job.end) if event is not None]
        return job.nbytes, seconds

    def _event(self) -> torch.Event | None:
        """Return a timing event that the stream records now, or None if there can be none."""
        if self.stream is None or self.paced:
            return None
        try:
            try:
                event = self._events.pop()
            except IndexError:
                event = torch.Event(self.device, enable_timing=True)
            event.record(self.stream)
        except RuntimeError:  # the device has no timing events
            return None
        return event


#: Pages of the device, and of chunks: both as fragments, which the layouts call heads.
_DEVICE = "layer | block head (token dim)"
_HOST = "layer | block token head dim"


#: vLLM's `CanonicalKVCacheRef`: the pages of a group in one tensor.
CacheRef: TypeAlias = Any
#: vLLM's `CPULoadStoreSpec`: the chunks of a job, group after group.
ChunkSpec: TypeAlias = Any
#: vLLM's `GPULoadStoreSpec`: the blocks of a job, group after group; how many each group has, and
#: the number of its first block in its request.
BlockSpec: TypeAlias = Any
#: The ids of a group in a job: the blocks of the caches, and the pages of the chunks.
_Ids: TypeAlias = tuple[Index, Index]
#: vLLM's `SharedOffloadRegion`: host memory that all workers of an engine share.
Region: TypeAlias = Any


class PageCopy(NamedTuple):
    """Pages of one shape in a group, on both sides. One copy moves them all.

    Attributes:
        device: a view whose rows are pages.
        host: a view whose blocks are chunks and whose rows are pages.
        writers: how many workers have the same bytes, and write them to chunks in turns.
        writer: the number of this worker among them.
    """

    device: KVView
    host: KVView
    writers: int = 1
    writer: int = 0


class Move(NamedTuple):
    """The blocks of one group in a job.

    Attributes:
        parts: the memory of the group.
        blocks: the blocks of the caches.
        places: the pages in the chunks.
        pages: the number of pages.
    """

    parts: Sequence[PageCopy]
    blocks: Index
    places: Index
    pages: int

    @property
    def nbytes(self) -> int:
        """Return the bytes that it copies."""
        return self.pages * sum([part.device.form.token_bytes for part in self.parts])


def sharing(groups: Iterable[Iterable[CacheRef]]) -> set[tuple[int, ...]]:
    """Return the sets of groups that use one tensor, by their numbers."""
    tensors_of = [{ref.tensor_idx for ref in refs} for refs in groups]
    shared = set()
    for tensor in set().union(*tensors_of):
        users = tuple(number for number, used in enumerate(tensors_of) if tensor in used)
        if len(users) > 1:
            shared.add(users)
    return shared


def moves_of(
    groups: Sequence[Sequence[PageCopy]],
    together: Iterable[Sequence[int]],
    blocks_per_chunk: int,
    device: BlockSpec,
    host: ChunkSpec,
    store: bool,
) -> list[Move]:
    """Return the moves of a job, group by group.

    Args:
        groups: the parts of each group.
        together: the sets of groups that use one tensor, by their numbers.
        blocks_per_chunk: blocks of the engine in a chunk.
        device: the blocks of the job.
        host: the chunks of the job.
        store: the job writes chunks; else it writes blocks.

    Raises:
        SlotError: the lists do not fit each other, an id is out of range, or a destination is
            written twice.
    """
    ids_of = _ids_of_groups(len(groups), blocks_per_chunk, device, host)
    moves = []
    for parts, (blocks, places) in zip(groups, ids_of, strict=True):
        count = blocks.length
        if not count or not parts:
            continue
        check_ids(blocks, count, parts[0].device, not store)
        check_ids(places, count, parts[0].host, store)
        whole = [part for part in parts if not (store and part.writers > 1)]
        if whole:
            moves.append(Move(whole, blocks, places, count))
        # Of pages that several workers have, this one writes those whose turn is its own.
        for part in parts:
            if not store or part.writers == 1:
                continue
            pages = places.slots(count)
            mine = pages % part.writers == part.writer
            if mine.any():
                own = Index.of(blocks.host_ids()[mine]), Index.of(pages[mine])
                moves.append(Move([part], *own, int(mine.sum())))
    _check_shared(together, ids_of, store)
    return moves


def _ids_of_groups(
    groups: int, blocks_per_chunk: int, device: BlockSpec, host: ChunkSpec
) -> list[_Ids]:
    """Return the ids of each group of a job."""
    ids_of = []
    block = chunk = 0
    for count, first in zip(device.group_sizes, device.block_indices, strict=True):
        skip = first % blocks_per_chunk
        used = -(-(skip + count) // blocks_per_chunk) if count else 0
        # Indices of one call go to a device without a wait.
        places = Index.of(host.block_ids[chunk : chunk + used], blocks_per_chunk).shifted(skip)
        ids_of.append((Index.of(device.block_ids[block : block + count]), places))
        block += count
        chunk += used
    blocks = len(device.block_ids)
    chunks = len(host.block_ids)
    if len(ids_of) != groups or blocks != block or chunks != chunk:
        raise SlotError(
            f"Expected {groups} groups, with {block} blocks in {chunk} chunks of "
            f"{blocks_per_chunk}, got {blocks} blocks, {chunks} chunks and groups of "
            f"{list(device.group_sizes)} blocks with first blocks {list(device.block_indices)}. "
            f"Pass as many."
        )
    return ids_of


def _check_shared(together: Iterable[Sequence[int]], ids_of: Sequence[_Ids], store: bool) -> None:
    """Raise `SlotError` if groups that use one tensor write one place twice."""
    for numbers in together:
        targets = [ids_of[number][store].host_ids() for number in numbers]
        ids, times = np.unique(np.concatenate(targets), return_counts=True)
        twice = ids[times > 1]
        if len(twice):
            raise SlotError(
                f"A job names {twice[0]} in its destination for more than one of the groups "
                f"{numbers}, which use one tensor; expected one group for each "
                f"{'chunk' if store else 'block'}. Nothing was moved. Correct the ids."
            )


# ------------------------------------------------------------------------------------------------
# Pages of a worker in chunks: of its own, or of the whole model, whose bytes name no tensor
# parallelism (vLLM's ``canonical_layout``).


class Run(NamedTuple):
    """Fragments of one size in a page, at a stride on each side, as vLLM's `CopyRun` names them."""

    local_offset: int
    canonical_offset: int
    fragment_size: int
    num_fragments: int = 1
    local_stride: int = 0
    canonical_stride: int = 0


class RankMapping(NamedTuple):
    """Where the bytes of a worker's page lie in the page of a chunk.

    Attributes:
        nbytes: of the page of a chunk.
        runs: of the worker's page.
        writers: how many workers have these bytes.
        writer: the number of this worker among them. They take turns, by the number of the page.
    """

    nbytes: int
    runs: tuple[Run, ...]
    writers: int = 1
    writer: int = 0


class Share(NamedTuple):
    """The part of a worker in chunks of the whole model.

    Attributes:
        rank: of the worker.
        workers: how many there are.
        shared: engines with other numbers of workers find the chunks.
    """

    rank: int
    workers: int
    shared: bool


def groups_of(
    groups: Sequence[Sequence[CacheRef]],
    pages: Sequence[torch.Tensor],
    blocks_per_chunk: int,
    chunks: int,
    region: Region | None,
    share: Share | None,
) -> list[list[PageCopy]]:
    """Return the parts of each group, with chunks in host memory.

    Args:
        groups: the tensors of each group.
        pages: of each tensor, int8 ``[blocks, page]``.
        blocks_per_chunk: blocks of the engine in a chunk.
        chunks: the number of chunks.
        region: memory that all workers share; None: private memory.
        share: of this worker in chunks of the whole model, which a region has; None: chunks have
            the pages of the worker.

    Raises `IntegrationError` and `LayoutError` as `mapping_of` and `parts_of` do.
    """
    if region is None:
        share = None
    mapped = [[(ref, mapping_of(ref, share)) for ref in refs] for refs in groups]
    if share is None:
        # The pages of all tensors lie next to each other in a chunk.
        widths = [page.shape[1] * blocks_per_chunk for page in pages]
    else:
        widths = [width * blocks_per_chunk for width in page_bytes(mapped, len(pages))]
    if region is None:
        rows = pinned.empty((chunks, sum(widths)), torch.int8).split(widths, dim=1)
    elif share is None:
        rows = [region.create_next_worker_view(width) for width in widths]
    else:
        rows = [region.create_next_canonical_view(width) for width in widths]
    host = [each.unflatten(1, (blocks_per_chunk, -1)) for each in rows]
    return [parts_of(refs, pages, host) for refs in mapped]


def mapping_of(ref: CacheRef, share: Share | None) -> RankMapping:
    """Return the mapping of a tensor's pages.

    vLLM has none for packed and cross-layer pages. Such a page is stored whole: it is the page of
    the model if there is one worker. Else the pages of all workers lie side by side, for engines
    with as many workers.

    Args:
        ref: vLLM's, of the tensor.
        share: of this worker in the chunks; None: they hold its pages as they are.

    Raises `IntegrationError` for pages of several workers without a mapping that are shared.
    """
    width = ref.page_size_bytes
    if share is None:
        return RankMapping(width, (Run(0, 0, width),))
    known = getattr(ref, "mapping", None)
    if known is not None:
        runs = tuple(Run(*[getattr(run, name) for name in Run._fields]) for run in known.runs)
        size = known.canonical_page_size_bytes
        return RankMapping(size, runs, known.num_writers, known.writer_index)
    if share.workers > 1 and share.shared:
        raise IntegrationError(
            f"Expected pages for canonical_layout that vLLM can map to the whole model, got packed "
            f"or cross-layer pages of {share.workers} workers. Leave canonical_layout out."
        )
    return RankMapping(share.workers * width, (Run(0, share.rank * width, width),))


def page_bytes(groups: Iterable[Iterable[tuple[CacheRef, RankMapping]]], tensors: int) -> list[int]:
    """Return the bytes of the whole model's page of each tensor.

    Raises `LayoutError` for a tensor that no group uses.
    """
    widest = [0] * tensors
    for refs in groups:
        for ref, mapping in refs:
            widest[ref.tensor_idx] = max(widest[ref.tensor_idx], mapping.nbytes)
    if 0 in widest:
        raise LayoutError(
            f"Expected each of {tensors} tensors in a group, got none for tensor "
            f"{widest.index(0)}. Pass vLLM's canonical caches."
        )
    return widest


def parts_of(
    refs: Iterable[tuple[CacheRef, RankMapping]],
    pages: Sequence[torch.Tensor],
    host: Sequence[torch.Tensor],
) -> list[PageCopy]:
    """Return the fragments of a group's pages; those of one shape in several tensors are one part.

    The parts leave padding out.

    Args:
        refs: of the group, with their mappings.
        pages: of each tensor, int8 ``[blocks, page]``.
        host: of each tensor, int8 ``[chunks, blocks_per_chunk, page of a chunk]``.

    Raises:
        LayoutError: a tensor is missing, or has narrower pages than the group names; fragments
            outside of a page.
    """
    alike: dict[tuple[Run, int, int, Hashable], dict[int, None]] = {}
    for ref, mapping in refs:
        at = ref.tensor_idx
        width = ref.page_size_bytes
        widest = pages[at].shape[1] if 0 <= at < len(pages) else 0
        if not 0 < width <= widest:
            raise LayoutError(
                f"Expected a group in one of {len(pages)} tensors, with pages of up to {widest} "
                f"bytes, got pages of {width} bytes in tensor {at}. Pass vLLM's canonical caches."
            )
        shape = (pages[at].shape, pages[at].stride(), host[at].shape, host[at].stride())
        for run in mapping.runs:
            _check(run, ref, mapping)
            key = (run, mapping.writers, mapping.writer, shape)
            alike.setdefault(key, {})[at] = None
    parts = []
    for (run, writers, writer, _), tensors in alike.items():
        local = [_fragments(pages[at], run, run.local_offset, run.local_stride) for at in tensors]
        whole = [
            _fragments(host[at], run, run.canonical_offset, run.canonical_stride) for at in tensors
        ]
        sides = KVView(local, _DEVICE, block_size=1), KVView(whole, _HOST)
        parts.append(PageCopy(*sides, writers, writer))
    return parts


def _check(run: Run, ref: CacheRef, mapping: RankMapping) -> None:
    """Raise `LayoutError` for fragments outside of a page."""
    last = run.num_fragments - 1
    past = run.local_offset + last * run.local_stride + run.fragment_size
    whole = run.canonical_offset + last * run.canonical_stride + run.fragment_size
    if past > ref.page_size_bytes or whole > mapping.nbytes:
        raise LayoutError(
            f"Expected fragments in pages of {ref.page_size_bytes} and {mapping.nbytes} bytes, got "
            f"{run}. Pass vLLM's canonical caches."
        )


def _fragments(pages: torch.Tensor, run: Run, offset: int, stride: int) -> torch.Tensor:
    """Return the fragments of pages, int8 ``[..., fragments, bytes]``, whose pages are the last
    axis of ``pages``."""
    shape = (*pages.shape[:-1], run.num_fragments, run.fragment_size)
    strides = (*pages.stride()[:-1], stride, 1)
    return torch.as_strided(pages, shape, strides, pages.storage_offset() + offset)
