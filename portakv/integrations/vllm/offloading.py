# SPDX-License-Identifier: Apache-2.0
"""Replace the copies of vLLM's offloading of KV blocks to host memory.

Two keys of ``kv_connector_extra_config`` choose it: ``"spec_name": "PortaKVOffloadingSpec"`` and
``"spec_module_path": "portakv.integrations.vllm"``. The key ``"portakv"`` may hold terms of
`portakv.copy_rows`, such as ``{"max_thread_blocks": 2}``. vLLM's scheduler side (lookup, eviction,
accounting) is unchanged.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from inspect import signature
from typing import Any, TypeAlias

import torch

from portakv import BlockTransfer, CopyOptions, LayoutError, copy_rows
from portakv.host import pinned
from portakv.integrations import IntegrationError, check_release, log_through
from portakv.integrations.vllm.moves import (
    BlockSpec,
    ChunkSpec,
    Lane,
    Move,
    PageCopy,
    Region,
    Share,
    groups_of,
    moves_of,
    sharing,
    worker_terms,
)
from portakv.tasks import runtime

check_release("vllm")

from vllm.platforms import current_platform  # noqa: E402
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult  # noqa: E402
from vllm.v1.kv_offload.cpu import gpu_worker  # noqa: E402
from vllm.v1.kv_offload.cpu import spec as cpu_spec  # noqa: E402

#: Bytes of the large copy that a worker makes when it is created: more than those for which the
#: strategy of small copies is picked.
WARM_UP = 16 << 20


#: vLLM's `CanonicalKVCaches`: its tensors, and for each group the tensors that it uses.
CanonicalCaches: TypeAlias = Any


class PortaKVOffloadingSpec(cpu_spec.CPUOffloadingSpec):  # type: ignore[misc]
    """vLLM's tier of host memory, with a worker that moves blocks by PortaKV on any device."""

    _worker: OffloadingWorker | None
    _serves_canonical = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        log_through(logging.getLogger("vllm"))
        if getattr(config, "canonical_layout", False) and not self._serves_canonical:
            raise IntegrationError(
                "Expected no canonical_layout for PortaKVOffloadingSpec, got True. "
                "PortaKVTieringSpec serves it. Leave canonical_layout out, or use that."
            )
        self.terms = worker_terms(self.extra_config)

    def create_worker(self, kv_caches: CanonicalCaches) -> OffloadingWorker:
        """Return the worker of one process, with its part of the host memory."""
        # vLLM 0.26 has another name for the number of chunks.
        chunks: int = self.num_chunks if hasattr(self, "num_chunks") else self.num_blocks
        uses_shared_region = getattr(self, "_uses_shared_region", bool)
        region = self._shared_region() if uses_shared_region() and chunks else None
        try:
            return PortaKVOffloadingWorker(
                kv_caches, self.blocks_per_chunk, chunks, region, self.terms, self.share()
            )
        except Exception:  # whatever failed, the region must be released
            if region is not None:
                region.cleanup()
            raise

    def get_worker(self, kv_caches: CanonicalCaches) -> OffloadingWorker:
        """Return the worker, made at the first call.

        vLLM's own method refuses devices other than CUDA's, ROCm's and XPU's.
        """
        if self._worker is None:
            self._worker = self.create_worker(kv_caches)
        return self._worker

    def share(self) -> Share | None:
        """Return the part of this worker in pages of the whole model; None: it has its own."""
        if not getattr(self.config, "canonical_layout", False):
            return None
        parallel = self.config.parallel
        return Share(parallel.rank, parallel.world_size, parallel.is_parallelism_agnostic)

    def _shared_region(self) -> Region:
        """Return the memory that all workers of an engine share, pinned as vLLM pins it."""
        region: Region = cpu_spec.SharedOffloadRegion(**self._region_terms())
        if current_platform.device_type == "cpu":
            return region
        if "worker_slot_only" in signature(gpu_worker.pin_mmap_region).parameters:
            gpu_worker.pin_mmap_region(region, worker_slot_only=True)
        else:
            gpu_worker.pin_mmap_region(region)
        return region

    def _region_terms(self) -> dict[str, Any]:
        """Return the arguments of the memory that all workers of an engine share."""
        rank = self.config.parallel.rank
        workers = self.config.parallel.world_size
        terms = {
            "engine_id": self.config.engine_id,
            "num_chunks": self.num_chunks,
            "rank": 0 if self.replicated_layout else rank,
            "kv_bytes_per_chunk": self.kv_bytes_per_chunk,
            "cpu_page_size": self.cpu_page_size_per_worker,
            "barrier": cpu_spec._all_workers_barrier,
        }
        if hasattr(cpu_spec, "_REGION_SEGMENTS"):  # not in 0.32
            terms["num_segments"] = cpu_spec._REGION_SEGMENTS
            terms["populate_shard"] = (rank, workers) if self.replicated_layout else None
        return terms


class PortaKVOffloadingWorker(OffloadingWorker):  # type: ignore[misc]
    """A worker that moves blocks between an engine's caches and chunks in host memory.

    Args:
        kv_caches: vLLM's `CanonicalKVCaches`: int8 tensors ``[blocks, page]``, whose pages need not
            be adjacent, and for each group the tensors that it uses.
        blocks_per_chunk: blocks of the engine in a chunk, at least 1.
        chunks: the number of chunks.
        region: vLLM's `SharedOffloadRegion`, which `shutdown` releases; None: private memory.
        terms: terms of `copy_rows`.
        share: of a worker in chunks of the whole model; None: chunks have the pages of the worker.

    Raises:
        LayoutError: no tensors, groups or blocks in a chunk, or tensors that are not pages.
        InvalidTerms, BackendUnavailable, Unsupported: terms that no copy can keep.
    """

    def __init__(
        self,
        kv_caches: CanonicalCaches,
        blocks_per_chunk: int,
        chunks: int,
        region: Region | None = None,
        terms: Mapping[str, Any] | None = None,
        share: Share | None = None,
    ) -> None:
        tensors = len(kv_caches.tensors)
        groups = len(kv_caches.group_data_refs)
        if min(tensors, groups, blocks_per_chunk) < 1:
            raise LayoutError(
                f"Expected at least one tensor, one group and one block in a chunk, got {tensors} "
                f"tensors, {groups} groups and chunks of {blocks_per_chunk} blocks. Pass vLLM's "
                f"canonical caches."
            )
        self.blocks_per_chunk = blocks_per_chunk
        self._region = region
        self._adopted: pinned.Adopted | None = None
        pages = [each.tensor.view(torch.int8) for each in kv_caches.tensors]
        for page in pages:
            if page.dim() != 2:
                raise LayoutError(
                    f"Expected tensors [blocks, page], got shape {tuple(page.shape)}, strides "
                    f"{page.stride()} in bytes. Pass vLLM's canonical caches."
                )
        refs = kv_caches.group_data_refs
        self._groups = groups_of(refs, pages, blocks_per_chunk, chunks, region, share)
        if region is not None and region.is_pinned:
            self._adopted = _adopt(region)
        self._together = sharing(refs)
        device = pages[0].device
        self._store, self._load, self._expedited = (Lane(device, terms) for _ in range(3))
        self._lanes = self._store, self._load, self._expedited
        self._taking = runtime().lock
        for part in itertools.chain(*self._groups):
            self._warm_up(part)

    def submit_store(self, job_id: int, src_spec: BlockSpec, dst_spec: ChunkSpec) -> bool:
        """Begin to copy blocks into chunks, ordered after the current stream's work.

        Raises:
            SlotError: an id past the caches or the chunks, an id that is written twice, or lists
                that do not fit each other. Nothing was moved then.
            IntegrationError: a job that is already in flight, or a call after `shutdown`.
        """
        return self._submit(self._store, job_id, src_spec, dst_spec, store=True)

    def submit_load(
        self, job_id: int, src_spec: ChunkSpec, dst_spec: BlockSpec, expedited: bool = False
    ) -> bool:
        """Begin to copy chunks into blocks, ordered after the current stream's work.

        ``expedited``: the copy does not wait for the loads that are in flight. The errors are those
        of `submit_store`.
        """
        lane = self._expedited if expedited else self._load
        return self._submit(lane, job_id, dst_spec, src_spec, store=False)

    def get_finished(self) -> list[TransferResult]:
        """Return the jobs that have ended since the last call; never blocks.

        Raises the error of a copy that failed on the device, once. The next call returns the others
        that have ended.
        """
        with self._taking:
            ended = [(lane, number) for lane in self._lanes for number in lane.ended()]
            return [TransferResult(number, True, *lane.take(number)) for lane, number in ended]

    def wait(self, job_ids: set[int]) -> None:
        """Block the host until these jobs have ended. Unknown jobs count as ended."""
        for lane in self._lanes:
            for job in job_ids & lane.jobs.keys():
                with suppress(KeyError):  # another thread removed it, so it has ended
                    lane.jobs[job].synchronize()

    def shutdown(self) -> None:
        """Wait for all jobs, then release the host memory, then raise the first error of a job.

        A second call does nothing.
        """
        region = self._region
        self._region = None
        try:
            jobs = [job.transfer for lane in self._lanes for job in list(lane.jobs.values())]
            BlockTransfer.together(jobs).synchronize()
        finally:
            with self._taking:  # another thread may be collecting results
                for lane in self._lanes:
                    lane.jobs.clear()
            self._groups = []  # its views hold the region's memory
            if self._adopted is not None:
                self._adopted.close()
            if region is not None:
                region.cleanup()

    def _submit(
        self, lane: Lane, job: int, device: BlockSpec, host: ChunkSpec, store: bool
    ) -> bool:
        if not self._groups:
            raise IntegrationError(f"Job {job} was submitted after shutdown. Make a new worker.")
        if any(job in each.jobs for each in self._lanes):
            raise IntegrationError(
                f"Job {job} was submitted while it is in flight. Use another number."
            )
        # All groups are checked before any of them moves.
        moves = moves_of(self._groups, self._together, self.blocks_per_chunk, device, host, store)
        nbytes = sum(move.nbytes for move in moves)
        lane.submit(job, partial(self._copy, moves, lane.options, store), nbytes)
        return True

    def _warm_up(self, part: PageCopy) -> None:
        """Copy a few pages to the host and back to where they were, on the lanes' streams.

        So no job, which holds up a step of the engine, builds kernels or reserves memory for
        staging, and terms that no copy can keep are refused now. The chunks hold nothing yet.
        """
        page = sum(part.device.widths) * part.device.layers
        most = min(part.device.slots, part.host.slots)
        # Many bytes would take a copy of limited rate long.
        many = 1 if self._store.paced else 1 + WARM_UP // page
        for lane in self._lanes:
            lane.use(part.device)
        for count in sorted({min(most, 1), min(most, many)}):
            pages = range(count)
            for lane in self._lanes:
                sides = (part.device, part.host)
                if lane is not self._store:
                    sides = (part.host, part.device)
                with lane.current():
                    copied = copy_rows(*sides, pages, pages, count=count, options=lane.options)
                    copied.synchronize()

    def _copy(self, moves: Sequence[Move], options: CopyOptions, store: bool) -> BlockTransfer:
        """Issue the copies of a job on the current stream."""
        moved: list[BlockTransfer] = []
        try:
            for move in moves:
                for part in move.parts:
                    views = (part.device, part.host)
                    ids = (move.blocks, move.places)
                    if not store:
                        views = views[::-1]
                        ids = ids[::-1]
                    moved.append(copy_rows(*views, *ids, count=move.pages, options=options))
        except BaseException:  # also an interrupt: a refused job leaves no copy in flight
            BlockTransfer.together(moved).synchronize()
            raise
        return BlockTransfer.together(moved)


def _adopt(region: Region) -> pinned.Adopted:
    """Report to PortaKV where the region's registrations meet."""
    begin = region.base_tensor.data_ptr()
    edges = [*sorted(region.pinned_addresses or [begin]), begin + region.total_size_bytes]
    return pinned.adopt([(first, past - first) for first, past in itertools.pairwise(edges)])
