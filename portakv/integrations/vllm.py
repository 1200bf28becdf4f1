# SPDX-License-Identifier: Apache-2.0
"""vLLM's offloading of KV blocks to host memory, with PortaKV's copies.

Chosen by two keys of ``kv_connector_extra_config``: ``"spec_name": "PortaKVOffloadingSpec"`` and
``"spec_module_path": "portakv.integrations.vllm"``. The key ``"portakv"`` may hold terms of
`portakv.copy_rows`, such as ``{"max_thread_blocks": 2}``. vLLM's scheduler side (lookup, eviction,
accounting) stays as it is.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from inspect import signature
from typing import Any

import torch

from portakv import BlockTransfer, InvalidTerms, LayoutError, copy_rows
from portakv.host import pinned
from portakv.integrations import IntegrationError, check_release
from portakv.integrations.vllm_lanes import Lane
from portakv.integrations.vllm_moves import Move, moves_of, parts_of, sharing

check_release("vllm")

from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult  # noqa: E402
from vllm.v1.kv_offload.cpu import gpu_worker  # noqa: E402
from vllm.v1.kv_offload.cpu import spec as cpu_spec  # noqa: E402

#: What ``"portakv"`` in the configuration may hold.
TERMS = ("backend", "max_gbps", "max_thread_blocks", "overlap")


class PortaKVOffloadingSpec(cpu_spec.CPUOffloadingSpec):  # type: ignore[misc]
    """vLLM's own tier of host memory, whose worker moves blocks by PortaKV, on any device."""

    _worker: OffloadingWorker | None

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if getattr(config, "canonical_layout", False):
            raise IntegrationError(
                "The offloading spec of PortaKV was asked for with canonical_layout=True, which "
                "rearranges pages; it moves them as they are. Leave canonical_layout out."
            )
        given = self.extra_config.get("portakv", {})
        if not isinstance(given, Mapping) or not set(given) <= set(TERMS):
            raise InvalidTerms(
                f"kv_connector_extra_config has portakv={given!r}; expected a mapping with some of "
                f"{', '.join(TERMS)}. Correct it, or leave it out."
            )
        self.terms = dict(given)

    def create_worker(self, kv_caches: Any) -> OffloadingWorker:
        """The worker of one process, with its part of the host memory."""
        # The number of chunks has another name in 0.26.
        chunks: int = self.num_chunks if hasattr(self, "num_chunks") else self.num_blocks
        uses_shared_region = getattr(self, "_uses_shared_region", bool)
        region = self._shared_region() if uses_shared_region() and chunks else None
        try:
            return PortaKVOffloadingWorker(
                kv_caches, self.blocks_per_chunk, chunks, region, self.terms
            )
        except Exception:
            if region is not None:
                region.cleanup()
            raise

    def get_worker(self, kv_caches: Any) -> OffloadingWorker:
        """As vLLM's own, on other devices than CUDA's, ROCm's and XPU's too."""
        if self._worker is None:
            self._worker = self.create_worker(kv_caches)
        return self._worker

    def _shared_region(self) -> Any:
        """The memory that all workers of an engine share, pinned as vLLM pins it."""
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
        region = cpu_spec.SharedOffloadRegion(**terms)
        slots = "worker_slot_only" in signature(gpu_worker.pin_mmap_region).parameters
        gpu_worker.pin_mmap_region(region, **({"worker_slot_only": True} if slots else {}))
        return region


class PortaKVOffloadingWorker(OffloadingWorker):  # type: ignore[misc]
    """Moves blocks between an engine's caches and chunks in host memory.

    Args:
        kv_caches: vLLM's `CanonicalKVCaches`: int8 tensors ``[blocks, page]``, whose pages may lie
            apart, and for each group the tensors that it uses.
        blocks_per_chunk: blocks of the engine in a chunk, 1 at least.
        chunks: how many there are.
        region: vLLM's `SharedOffloadRegion`, which `shutdown` gives back; None: memory of its own.
        terms: of `copy_rows`.

    Raises:
        LayoutError: no tensors, groups or blocks in a chunk, or tensors that are no pages.
        InvalidTerms, BackendUnavailable, Unsupported: terms that no copy can keep.
    """

    def __init__(
        self,
        kv_caches: Any,
        blocks_per_chunk: int,
        chunks: int,
        region: Any = None,
        terms: Mapping[str, Any] | None = None,
    ) -> None:
        numbers = len(kv_caches.tensors), len(kv_caches.group_data_refs), blocks_per_chunk
        if min(numbers) < 1:
            raise LayoutError(
                f"A worker was asked for with {numbers[0]} tensors, {numbers[1]} groups and chunks "
                f"of {numbers[2]} blocks; expected one of each at least. Hand over vLLM's "
                f"canonical caches."
            )
        self.blocks_per_chunk = blocks_per_chunk
        self._region = region
        self._terms = dict(terms or {})
        self._adopted = None
        pages = [each.tensor.view(torch.int8) for each in kv_caches.tensors]
        for page in pages:
            if page.dim() != 2:
                raise LayoutError(
                    f"A tensor of shape {tuple(page.shape)}, strides {page.stride()} in bytes was "
                    f"registered; expected [blocks, page]. Hand over vLLM's canonical caches."
                )
        host = _host_pages(pages, blocks_per_chunk, chunks, region)
        if region is not None and region.is_pinned:
            self._adopted = _adopt(region)
        self._groups = [parts_of(refs, pages, host) for refs in kv_caches.group_data_refs]
        if self._terms:  # copies of nothing judge them
            for part in itertools.chain(*self._groups):
                copy_rows(part.device, part.host, count=0, **self._terms)
                copy_rows(part.host, part.device, count=0, **self._terms)
        self._together = sharing(kv_caches.group_data_refs)
        device = pages[0].device
        self._store, self._load, self._expedited = (
            Lane(device, paced="max_gbps" in self._terms) for _ in range(3)
        )
        self._lanes = self._store, self._load, self._expedited
        self._taking = threading.Lock()

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Begin to copy blocks into chunks, behind the current stream.

        Raises:
            SlotError: an id past the caches or the chunks, one that is written twice, or lists that
                do not fit each other; nothing was moved then.
            IntegrationError: a job that is under way already, or after `shutdown`.
        """
        return self._submit(self._store, job_id, src_spec, dst_spec, store=True)

    def submit_load(
        self, job_id: int, src_spec: Any, dst_spec: Any, expedited: bool = False
    ) -> bool:
        """Begin to copy chunks into blocks, behind the current stream; ``expedited``: past the
        loads that are under way. Raises as `submit_store` does."""
        lane = self._expedited if expedited else self._load
        return self._submit(lane, job_id, dst_spec, src_spec, store=False)

    def get_finished(self) -> list[TransferResult]:
        """The jobs that have ended since the last call; never blocks."""
        with self._taking:
            ended = [each for lane in self._lanes for each in lane.finished()]
        return [
            TransferResult(number, True, job.transfer.statistics.nbytes, job.seconds())
            for number, job in ended
        ]

    def wait(self, job_ids: set[int]) -> None:
        """Block the host until these jobs have ended; unknown ones have."""
        for lane in self._lanes:
            for job in job_ids & lane.jobs.keys():
                with suppress(KeyError):  # another thread took it, so it has ended
                    lane.jobs[job].synchronize()

    def shutdown(self) -> None:
        """Wait for all jobs, and give the host memory back; again: nothing. Raises the first error
        of a job behind both."""
        region = self._region
        self._region = None
        try:
            jobs = [job.transfer for lane in self._lanes for job in list(lane.jobs.values())]
            BlockTransfer.together(jobs).synchronize()
        finally:
            with self._taking:  # another thread may be asking for results
                for lane in self._lanes:
                    lane.jobs.clear()
            self._groups = []  # its views hold the region's memory
            if self._adopted is not None:
                self._adopted.close()
            if region is not None:
                region.cleanup()

    def _submit(self, lane: Lane, job: int, device: Any, host: Any, store: bool) -> bool:
        if not self._groups:
            raise IntegrationError(f"Job {job} was submitted after shutdown; make a new worker.")
        if any(job in each.jobs for each in self._lanes):
            raise IntegrationError(
                f"Job {job} was submitted while it is under way; number it anew."
            )
        # All groups are looked at before any of them moves.
        moves = moves_of(self._groups, self._together, self.blocks_per_chunk, device, host, store)
        lane.submit(job, partial(self._copy, moves, lane.stream, store))
        return True

    def _copy(
        self, moves: Sequence[Move], stream: torch.Stream | None, store: bool
    ) -> BlockTransfer:
        """Issue the copies of a job."""
        moved: list[BlockTransfer] = []
        try:
            for parts, blocks, places, count in moves:
                for part in parts:
                    src, dst = (part.device, part.host) if store else (part.host, part.device)
                    ids = (blocks, places) if store else (places, blocks)
                    terms = {"stream": stream, **self._terms}
                    moved.append(copy_rows(src, dst, *ids, count=count, **terms))
        except BaseException:
            BlockTransfer.together(moved).synchronize()  # a job that is refused leaves none behind
            raise
        return BlockTransfer.together(moved)


def _host_pages(
    pages: Sequence[torch.Tensor], blocks_per_chunk: int, chunks: int, region: Any
) -> list[torch.Tensor]:
    """For each tensor of the engine its pages in host memory ``[chunks, blocks_per_chunk, page]``:
    all tensors of a chunk lie side by side."""
    widths = [each.shape[1] * blocks_per_chunk for each in pages]
    if region is not None:
        rows = [region.create_next_worker_view(width) for width in widths]
    else:
        rows = list(pinned.empty((chunks, sum(widths)), torch.int8).split(widths, dim=1))
    return [each.unflatten(1, (blocks_per_chunk, -1)) for each in rows]


def _adopt(region: Any) -> pinned.Adopted:
    """Tell where the region's registrations meet."""
    begin = region.base_tensor.data_ptr()
    edges = [*sorted(region.pinned_addresses or [begin]), begin + region.total_size_bytes]
    return pinned.adopt([(first, past - first) for first, past in itertools.pairwise(edges)])
