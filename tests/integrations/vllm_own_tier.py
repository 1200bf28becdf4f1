# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for vLLM's own tests of its tiers: PortaKV's tier stands in the place of theirs.

    python -m pytest --noconftest -p vllm_own_tier tests/v1/kv_offload/tiering/...

`Files` takes the place of the tier of files, and `Example` that of the tier that ends each job in
the call that begins it. What a test reads of their insides, such as paths of files, is not there.
"""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
from support.waits import LIMIT
from vllm.v1.kv_offload.base import Medium
from vllm.v1.kv_offload.file_mapper import FileMapper
from vllm.v1.kv_offload.tiering.base import JobResult

from portakv.integrations.vllm.tier import PortaKVTier
from portakv.serving.pages import PageStore

TIERING = "vllm.v1.kv_offload.tiering"
TERMS: dict[str, Any] = {"staging": 64 << 20, "capacity": 256 << 20}
#: What the tests of vLLM's manager have as a mock.
SPEC = SimpleNamespace(
    blocks_per_chunk=1,
    kv_events_config=SimpleNamespace(enable_kv_cache_events=False),
    config=SimpleNamespace(
        groups=(),
        model=SimpleNamespace(name="model", dtype="float32"),
        cache=SimpleNamespace(tokens_per_hash=16, blocks_per_chunk=1),
        parallel=SimpleNamespace(
            rank=0, tp_size=1, pp_size=1, pcp_size=1, dcp_size=1, is_parallelism_agnostic=False
        ),
        canonical_layout=False,
        replicated_layout=False,
        kv_cache_layout=None,
    ),
)


class Paths:
    """The file that has a chunk, where vLLM's tier has one for each."""

    def __init__(self, tier: Files, base: str) -> None:
        self.base_path = base
        self._tier = tier

    def get_file_name(self, key: bytes) -> str:
        """Return the file of slots if it has the chunk, else one that is not there."""
        folder = Path(self._tier.root, self._tier.tier.pages.form.name)
        return str(folder / ("slots" if self._tier.tier.has(key) else key.hex()))


class Files(PortaKVTier):
    """PortaKV's tier, with the arguments of vLLM's tier of files."""

    def __init__(
        self,
        offloading_spec: Any,
        *,
        root_dir: str,
        n_read_threads: int = 0,
        n_write_threads: int = 0,
        **terms: Any,
    ) -> None:
        self.root = root_dir
        super().__init__(offloading_spec, folder=root_dir, **TERMS, **terms)
        base = FileMapper.from_offloading_spec(root_dir, offloading_spec, 1, True).base_path
        self.file_mapper = Paths(self, base)
        self.events: list[Any] | None = [] if self.tier.reports else None
        self._store_job_keys = dict[int, Any]()
        # Lookups have no later answers that a test could wait for.
        self._lookup_manager = SimpleNamespace(_pending_results=SimpleNamespace(empty=bool))


class Chunks:
    """The chunks of a tier, of which a test adds some without a job."""

    def __init__(self, tier: Example) -> None:
        self._tier = tier.tier

    def __setitem__(self, key: bytes, there: bool) -> None:
        job = self._tier.pages.save([key], self._tier.view, [0])
        assert job.wait(LIMIT)

    def __contains__(self, key: bytes) -> bool:
        return self._tier.has(key)


class Example(PortaKVTier):
    """PortaKV's tier, of which each call waits for the end of the job that it begins."""

    medium: ClassVar[Medium] = Medium.CPU

    def __init__(
        self, offloading_spec: Any, primary_kv_view: Any, custom_param: int = 0, **terms: Any
    ) -> None:
        self.folder = tempfile.TemporaryDirectory()
        view = primary_kv_view
        if not isinstance(view, memoryview):  # a mock
            view = np.zeros((4, 16), np.uint8).data
        super().__init__(SPEC, view, folder=self.folder.name, **TERMS, **terms)
        self.custom_param = custom_param
        self.completed_jobs = list[JobResult]()
        self.chunks = Chunks(self)

    def submit_store(self, job_metadata: Any) -> None:
        super().submit_store(job_metadata)
        self._complete()

    def submit_load(self, job_metadata: Any) -> None:
        super().submit_load(job_metadata)
        self._complete()

    def _complete(self) -> None:
        self.tier.drain()
        self.completed_jobs += super().get_finished_jobs()

    def get_finished_jobs(self) -> list[JobResult]:
        jobs = self.completed_jobs
        self.completed_jobs = []
        return jobs

    def get_num_chunks(self) -> int:
        """Return how many chunks are stored."""
        assert isinstance(self.store, PageStore)
        tier = self.store.statistics()["tiers"][0]
        return sum(each["used"] for each in tier.values() if isinstance(each, dict))


importlib.import_module(f"{TIERING}.fs.manager").FileSystemTierManager = Files  # type: ignore[attr-defined]
example: Any = importlib.import_module(f"{TIERING}.example.manager")
example.ExampleSecondaryTierManager = Example
