# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for vLLM's own tests of its offloading worker: PortaKV's stands in its place.

    SIMDEV_NAME=simdev python -m pytest --noconftest -p vllm_own_tests \
        tests/v1/kv_offload/cpu/test_gpu_worker.py -k "not test_worker"

On a CUDA device without the variable. They look into vLLM's handlers, so the stand-in has them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from portakv_conformance import simdev


class Rows(torch.Tensor):
    """Host memory as the worker lays it out, all tensors of a chunk side by side; some tests read
    it by ``view``, which takes each tensor in separate memory, as vLLM's is."""

    def view(self, *size: int) -> torch.Tensor:  # type: ignore[override]
        return self.reshape(*size)


class Handler(SimpleNamespace):
    """The attributes of one direction that vLLM's tests read."""

    def __init__(self, lane: Any, src: list[Any], dst: list[Any], refs: Any) -> None:
        super().__init__(src_tensors=src[:], dst_tensors=dst[:], lane=lane)
        self.layer_refs_per_group = self.kv_cache_groups_data_refs = refs  # in 0.33, in 0.26

    @property
    def _transfers(self) -> list[Any]:
        return [SimpleNamespace(job_id=job) for job in self.lane.jobs]


def pytest_configure() -> None:
    """Put the worker in its place before a test module takes it."""
    from vllm.platforms import current_platform
    from vllm.v1.kv_offload.cpu import gpu_worker

    from portakv.integrations.vllm import offloading

    if not current_platform.is_cuda_alike():  # the wheel finds no platform without its device
        name = os.environ.get("SIMDEV_NAME", "cpu")
        if name != "cpu":
            simdev.load(name)
        type(current_platform).device_type = name
        type(current_platform).manual_seed_all = staticmethod(torch.manual_seed)

    class CPUOffloadingWorker(offloading.PortaKVOffloadingWorker):
        """With the arguments of vLLM's, and with the tensors of its handlers."""

        def __init__(
            self,
            kv_caches: Any,
            blocks_per_chunk: int,
            num_cpu_chunks: int = 0,
            mmap_region: Any = None,
            canonical_layout: bool = False,
            num_cpu_blocks: int = 0,
        ) -> None:
            if hasattr(mmap_region, "create_next_view"):
                mmap_region.cleanup()
                pytest.skip("The worker for vLLM 0.26 has separate memory.")
            if mmap_region is not None:
                gpu_worker.pin_mmap_region(mmap_region, worker_slot_only=True)
            chunks = num_cpu_chunks or num_cpu_blocks  # 0.26 calls them blocks
            super().__init__(kv_caches, blocks_per_chunk, chunks, mmap_region)
            device = [each.tensor for each in kv_caches.tensors]
            host: list[Any] = [None] * len(device)
            for parts, refs in zip(self._groups, kv_caches.group_data_refs, strict=True):
                tensors = [each for part in parts for each in part.host.tensors]
                for ref, each in zip(refs, tensors, strict=True):
                    host[ref.tensor_idx] = each.flatten(1).as_subclass(Rows)
            refs = kv_caches.group_data_refs
            self._store_handler = Handler(self._store, device, host, refs)
            self._load_handler = Handler(self._load, host, device, refs)

        def shutdown(self) -> None:
            for handler in (self._store_handler, self._load_handler):
                handler.src_tensors.clear()
                handler.dst_tensors.clear()
            super().shutdown()

    gpu_worker.CPUOffloadingWorker = CPUOffloadingWorker


@pytest.fixture
def default_vllm_config() -> Iterator[None]:
    """Repeat the fixture of vLLM's conftest, which imports more than is installed here."""
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture(autouse=True)
def the_same_device_each_time() -> Iterator[None]:
    yield
    torch.set_default_device(None)
