# SPDX-License-Identifier: Apache-2.0
"""vLLM's own values for tests of its integration: a configuration, caches as its connector passes
them, and the expected results of a job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from vllm.v1.kv_offload import base, config
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

EXTRA = {
    "spec_name": "PortaKVOffloadingSpec",
    "spec_module_path": "portakv.integrations.vllm",
}


def known(kind: Any, **values: Any) -> Any:
    """Return a dataclass of vLLM's with those of the values that this release has."""
    names = {field.name for field in fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in names})


def offloading_config(
    block_bytes: int, blocks_per_chunk: int, chunks: int, **extra: Any
) -> config.OffloadingConfig:
    """Return the configuration that vLLM passes to a spec, for so many chunks."""
    page = 4096
    chunk_bytes = -(-block_bytes * blocks_per_chunk // page) * page
    return known(
        config.OffloadingConfig,
        groups=(
            known(
                config.OffloadingGroupConfig, tokens_per_block=16, layer_names=("a",), group_id=0
            ),
        ),
        worker_kv_bytes_per_block=block_bytes,
        enable_kv_cache_events=False,
        extra_config=EXTRA | {"cpu_bytes_to_use": chunks * chunk_bytes} | extra,
        engine_id="portakv-test",
        model=config.OffloadingModelConfig(name="tiny", dtype="bfloat16"),
        cache=config.OffloadingCacheConfig(tokens_per_hash=16, blocks_per_chunk=blocks_per_chunk),
        parallel=known(
            config.OffloadingParallelConfig,
            rank=0,
            world_size=1,
            tp_size=1,
            pp_size=1,
            pcp_size=1,
            dcp_size=1,
            data_parallel_index=0,
            data_parallel_size=1,
            data_parallel_rank_local=None,
            is_parallelism_agnostic=False,
        ),
        canonical_layout=extra.get("canonical_layout", False),
    )


class Caches:
    """An engine's caches: tensors ``[blocks, page]`` of bytes, and the groups that use them.

    Args:
        pages: bytes of a page of each tensor.
        groups: for each group the numbers of its tensors, or pairs of a number and of the bytes
            that are not padding.
        gap: bytes between two pages of a tensor.
    """

    def __init__(
        self,
        device: torch.device,
        pages: Sequence[int],
        groups: Sequence[Sequence[Any]],
        blocks: int = 13,
        gap: int = 0,
    ) -> None:
        drawn = torch.Generator("cpu").manual_seed(len(pages))
        self.blocks = blocks
        self.pages = list(pages)
        self.groups = [
            [each if isinstance(each, tuple) else (each, pages[each]) for each in group]
            for group in groups
        ]
        self.tensors = []
        for page in pages:
            made = torch.randint(
                -128, 128, (blocks, page + gap), generator=drawn, dtype=torch.int8, device="cpu"
            )
            self.tensors.append(made.to(device)[:, :page])
        self.before = [each.cpu().clone() for each in self.tensors]

    def canonical(self) -> base.CanonicalKVCaches:
        return base.CanonicalKVCaches(
            [
                base.CanonicalKVCacheTensor(each, page)
                for each, page in zip(self.tensors, self.pages, strict=True)
            ],
            [[base.CanonicalKVCacheRef(*each) for each in group] for group in self.groups],
        )

    def lose(self) -> None:
        """Write other bytes everywhere, as another request would."""
        for each in self.tensors:
            each.fill_(77)

    def expect(self, came: Sequence[Sequence[int]], went: Sequence[Sequence[int]]) -> None:
        """Check after `lose` that blocks of each group came back from those that went; all else is
        lost."""
        wanted = [torch.full_like(each, 77) for each in self.before]
        for group, there, here in zip(self.groups, came, went, strict=True):
            for at, width in group:
                for new, old in zip(there, here, strict=True):
                    wanted[at][new, :width] = self.before[at][old, :width]
        for each, right in zip(self.tensors, wanted, strict=True):
            assert torch.equal(each.cpu(), right)


def device_spec(groups: Sequence[Sequence[int]], firsts: Sequence[int]) -> base.GPULoadStoreSpec:
    """Return the blocks of each group, and the index in its request of the first of each."""
    ids = [block for group in groups for block in group]
    return base.GPULoadStoreSpec(
        ids, group_sizes=[len(group) for group in groups], block_indices=list(firsts)
    )


def host_spec(chunks: Sequence[int]) -> CPULoadStoreSpec:
    return CPULoadStoreSpec(list(chunks))
