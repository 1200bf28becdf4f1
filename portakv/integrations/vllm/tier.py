# SPDX-License-Identifier: Apache-2.0
"""A secondary tier of vLLM's offloading: chunks of host memory, in the stores of PortaKV.

A line of ``secondary_tiers`` in ``kv_connector_extra_config`` chooses it, next to vLLM's
``TieringOffloadingSpec`` or `PortaKVTieringSpec`:
``{"type": "PortaKVTier", "module_path": "portakv.integrations.vllm_tier", "folder": "/nvme/kv"}``.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import fields
from hashlib import blake2b
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from portakv.integrations import check_release, log_through
from portakv.integrations.vllm.check import TierTerms, tier_terms
from portakv.integrations.vllm.offloading import PortaKVOffloadingSpec
from portakv.serving.local import checksum_if_here
from portakv.serving.pages import PACE, PageJob, PageSize, PageTier, page_store

check_release("vllm")

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (  # noqa: E402
    OffloadingConnectorStats,
)
from vllm.platforms import current_platform  # noqa: E402
from vllm.v1.kv_offload.base import (  # noqa: E402
    Locality,
    LookupResult,
    Medium,
    OffloadingCounterMetadata,
    OffloadingEvent,
    OffloadingGaugeMetadata,
    OffloadingMetricMetadata,
    RequestOffloadingContext,
)
from vllm.v1.kv_offload.file_mapper import FileMapper  # noqa: E402
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager  # noqa: E402
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec  # noqa: E402

_FOUND = {True: LookupResult.HIT, False: LookupResult.MISS, None: LookupResult.RETRY}
#: The bytes of a key after the hash of the block: the number of the group of layers.
_GROUP = slice(-4, None)
_STORED = "vllm:portakv_tier_stored_bytes"
_PAGES = "vllm:portakv_tier_chunks"
#: The fields of a result, of which a release may have fewer.
_FIELDS = {field.name for field in fields(JobResult)}


class PortaKVTieringSpec(PortaKVOffloadingSpec, TieringOffloadingSpec):  # type: ignore[misc]
    """vLLM's tiers, with a worker that moves blocks by PortaKV on any device."""

    _serves_canonical = True

    def _region_terms(self) -> dict[str, Any]:
        """Return the arguments of the memory that all workers share with the scheduler.

        The scheduler opens it by its name, so that the workers may not remove it.
        """
        terms = super()._region_terms()
        del terms["barrier"]
        return terms


class PortaKVTier(SecondaryTierManager):  # type: ignore[misc]
    """A tier of chunks in host memory, on disks and in a bucket, below vLLM's own host memory.

    Args:
        offloading_spec: vLLM's, with the configuration.
        primary_kv_view: vLLM's tier of host memory, bytes ``[chunks, bytes]``.
        tier_type: the name that vLLM's figures have.
        backpressure_detector: vLLM's, which bounds saves.
        locality: ``LOCAL`` or ``REMOTE``, for vLLM's filters and events.
        enable_kv_events: report chunks that are stored and lost, if the engine publishes events.
        terms: those of `StoreTerms`, and ``identity``.

    Attributes:
        store: has the chunks.
        tier: moves them.

    Raises `InvalidTerms` for wrong terms, and for a shared folder that has chunks of another model
    or size in use; `StoreError` and `StoreBusy` for a folder that cannot be used. Later calls raise
    nothing, and wait for nothing.
    """

    medium: ClassVar[Medium] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        locality: str | None = None,
        enable_kv_events: bool = False,
        **terms: Any,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        log_through(logging.getLogger("vllm"))
        chosen = tier_terms(terms)
        self.locality = None if locality is None else Locality(locality)
        publishes = offloading_spec.kv_events_config.enable_kv_cache_events
        memory = np.asarray(primary_kv_view)
        size = memory.shape[1] * memory.itemsize
        name, identity = _identity(offloading_spec, chosen)
        store = page_store(chosen.store, name, [PageSize(size)], identity)
        self.tier = PageTier(
            store,
            store.pages(size),
            memory,
            chain_of=itemgetter(_GROUP),
            reports=enable_kv_events and publishes,
        )
        self.store = store
        self._counted = Counter[str]()  # of chunks, at the last report
        self._reported = 0.0

    def lookup(self, key: bytes, req_context: Any) -> LookupResult:
        """Return whether a chunk can be loaded, by a look into the index of this process.

        RETRY: a worker looks it up in a bucket; the answer comes within two seconds.
        """
        return _FOUND[self.tier.look(key, req_context.req_id)]

    def submit_store(self, job_metadata: Any) -> None:
        """Begin to save chunks, which keep their bytes until the job is reported."""
        keys = [*job_metadata.keys]
        slots = np.asarray(job_metadata.chunk_ids).tolist()
        self.tier.save(job_metadata.job_id, keys, slots, job_metadata.req_context.req_id)

    def submit_load(self, job_metadata: Any) -> None:
        """Begin to load chunks, which belong to the job until it is reported."""
        slots = np.asarray(job_metadata.chunk_ids).tolist()
        self.tier.load(job_metadata.job_id, [*job_metadata.keys], slots)

    def get_finished_jobs(self) -> list[JobResult]:
        """Return the jobs that have ended since the last call."""
        return [_result_of(job) for job in self.tier.ended()]

    def has_pending_work(self) -> bool:
        """Return whether a job has not been reported."""
        return self.tier.busy

    def drain_jobs(self) -> None:
        """Block until all jobs have ended; `get_finished_jobs` reports them then."""
        self.tier.drain()

    def touch(self, keys: Collection[bytes], req_context: Any) -> None:
        """Note that chunks are used."""
        self.tier.touch(keys)

    def on_new_request(self, req_context: Any) -> RequestOffloadingContext:
        """Return that chunks are saved as they come."""
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: Any) -> None:
        """Forget a request."""
        self.tier.forget(req_context.req_id)

    def on_schedule_end(self, context: Any) -> None:
        """Begin lookups in a bucket, and record the use of chunks once in a while."""
        self.tier.step()

    def take_events(self) -> Iterable[OffloadingEvent]:
        """Return the chunks that were stored and lost since the last call."""
        stored, lost = self.tier.events()
        return [
            OffloadingEvent([*keys], self.medium, removed, self.locality)
            for keys, removed in ((stored, False), (lost, True))
            if keys
        ]

    def shutdown(self) -> None:
        """Close the store. Raises `TransferTimeout` for jobs that hang: their memory must stay."""
        self.tier.close()

    @classmethod
    def build_metric_definitions(
        cls, extra_config: Mapping[str, Any]
    ) -> dict[str, OffloadingMetricMetadata]:
        """Return the figures that `get_stats` reports."""
        return {
            _STORED: OffloadingGaugeMetadata("Bytes of chunks in PortaKV's tier.", ("tier",)),
            _PAGES: OffloadingCounterMetadata(
                "Chunks that PortaKV's tier has loaded and stored, and those that did not land.",
                ("tier", "result"),
            ),
        }

    def get_stats(self) -> OffloadingConnectorStats | None:
        """Return the figures since the last call; None within a second after it."""
        now = time.monotonic()
        if now < self._reported + PACE:
            return None
        self._reported = now
        stats = OffloadingConnectorStats()
        stats.set_gauge(_STORED, self.store.usage().used, (self.tier_type,))
        counts = Counter(self.tier.counts)
        for name, more in (counts - self._counted).items():
            stats.increase_counter(_PAGES, more, (self.tier_type, name))
        self._counted = counts
        return stats


def _result_of(job: PageJob) -> JobResult:
    """Return the result of a job, of which some chunks may have landed."""
    landed = job.landed.tolist()
    there = [key for key, good in zip(job.keys, landed, strict=True) if good]
    values = {
        "job_id": job.tag,
        "success": len(there) == len(job.keys),
        "successful_keys": there,
        "transfer_time": job.seconds,
        "transfer_bytes": len(there) * job.nbytes,
    }
    return JobResult(**{name: value for name, value in values.items() if name in _FIELDS})


def _identity(spec: Any, terms: TierTerms) -> tuple[str, str]:
    """Return the name of the model, and what else fixes the bytes of a chunk.

    It is all that vLLM's own tier of files distinguishes, the number of ranks, the layout of the
    caches, and the weights and the configuration of a model in a folder: vLLM's keys name tokens
    alone. A chunk has the rows of one rank after the other, so that other numbers of ranks have
    other bytes, except in vLLM's canonical layout and where all ranks have the same rows.
    """
    model = spec.config.model.name
    weights = checksum_if_here(model)
    if weights:
        model = os.path.abspath(model)
    # vLLM's own tier of files says True for all layouts (vllm-project/vllm#55191).
    is_agnostic = any(
        getattr(spec.config, name, False) for name in ("canonical_layout", "replicated_layout")
    )
    mapper = FileMapper.from_offloading_spec(
        "", spec, blocks_per_file=spec.blocks_per_chunk, parallel_agnostic=is_agnostic
    )
    facts: dict[str, Any] = {
        **mapper.get_run_config(),
        "model_name": model,
        "rank": mapper.rank,
        "layout": getattr(spec.config, "kv_cache_layout", None),
        "device": current_platform.device_type,
    }
    if current_platform.device_type == "cpu":  # its kernels lay pages out by instruction set
        facts["cpu"] = torch.backends.cpu.get_cpu_capability()
    if weights:
        facts["weights"] = weights
        with suppress(FileNotFoundError, NotADirectoryError):  # a folder without it, or a file
            facts["config"] = Path(model, "config.json").read_text(encoding="utf-8")
    text = json.dumps(facts, sort_keys=True, default=str)
    digest = blake2b(text.encode(), digest_size=16).hexdigest()
    return model, f"vllm {digest} {terms.identity}".rstrip()
