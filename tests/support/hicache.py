# SPDX-License-Identifier: Apache-2.0
"""SGLang's own HiCache controller on the CPU, with host pools of its own and a storage backend.

Import `support.sglang_on_cpu` before. A test drives the controller as its radix cache does: tokens
are written to the storage, looked up, and read into other places of the host pool.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from sglang.srt.managers.cache_controller import HiCacheController
from sglang.srt.mem_cache.pool_host import mha, mla
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sglang.srt.runtime_context import get_parallel

from support.sglang_pools import LAYERS, PAGE, device_pool
from support.waits import LIMIT

TOKENS = 128
MODULE = "portakv.integrations.sglang_hicache"
#: The pools and layouts of which SGLang reports addresses.
POOLS = [
    ("mha", "layer_first"),
    ("mha", "page_first"),
    ("mha", "page_first_direct"),
    ("mha", "page_head"),
    ("unequal", "page_first"),
    ("unequal", "page_first_direct"),
    ("mla", "layer_first"),
    ("mla", "page_first"),
    ("mla", "page_first_direct"),
]


class Pools(NamedTuple):
    """A pool of a device and its host pool."""

    on_device: Any
    host: Any


def build(kind: str, layout: str, dtype: torch.dtype = torch.bfloat16) -> Pools:
    """Return pools of a kind; the host pool has random rows."""
    pool, info, _ = device_pool(kind, TOKENS, dtype)
    made: dict[str, Any] = {
        "device_capacity_tokens": TOKENS,
        "start_layer": 0,
        "end_layer": LAYERS,
        "pin_memory": False,
    }
    if kind == "mla":
        host = mla.MLATokenToKVPoolHost(info, 2.0, 0, PAGE, layout, target_layer_num=LAYERS, **made)
    else:
        host = mha.get_mha_host_pool_cls(info)(info, 2.0, 0, PAGE, layout, **made)
    fill(host, 1)
    return Pools(pool, host)


def buffers(host: Any) -> list[torch.Tensor]:
    """Return the memory of a host pool as bytes."""
    made = host.kv_buffer
    tensors = [made] if isinstance(made, torch.Tensor) else [*made]
    return [each.view(torch.uint8) for each in tensors]


def fill(host: Any, seed: int) -> None:
    """Write random bytes to a host pool."""
    generator = torch.Generator().manual_seed(seed)
    for each in buffers(host):
        each.copy_(torch.randint(0, 256, each.shape, dtype=torch.uint8, generator=generator))


def page_bytes(host: Any, indices: torch.Tensor) -> list[bytes]:
    """Return the bytes of pages, as SGLang's own zero-copy backends would address them."""
    import ctypes

    addresses, sizes = host.get_page_buffer_meta(indices)
    pieces = [ctypes.string_at(at, size) for at, size in zip(addresses, sizes, strict=True)]
    count = len(pieces) // (len(indices) // PAGE)
    return [b"".join(pieces[at : at + count]) for at in range(0, len(pieces), count)]


def tokens_of(pages: Sequence[int]) -> torch.Tensor:
    """Return the indices of the tokens of pages."""
    return (torch.tensor([*pages])[:, None] * PAGE + torch.arange(PAGE)).flatten()


def keys_of(tokens: Sequence[int]) -> list[str]:
    """Return SGLang's keys of the pages of tokens."""
    made: list[str] = get_storage_hash_str([*tokens], None, page_size=PAGE)
    return made


def extra_of(terms: dict[str, Any], in_place: bool = True) -> dict[str, Any]:
    """Return the extra configuration of a server."""
    extra = {
        "backend_name": "portakv",
        "module_path": MODULE,
        "class_name": "PortaKVStorage",
        "portakv": terms,
    }
    return extra | {"interface_v1": 1} if in_place else extra


class Engine:
    """SGLang's controller over host pools, with a storage backend.

    Args:
        pools: of `build`.
        extra: the extra configuration; None: SGLang's own ``file`` backend.
        parallel: what differs from one rank.
    """

    def __init__(
        self, pools: Pools, extra: dict[str, Any] | None, model: str = "org/m", **parallel: int
    ) -> None:
        self.host = pools.host
        self._undo = ExitStack()
        if not dist.is_initialized():
            store: Any = vars(dist)["HashStore"]()
            dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        ranks = {
            "attn_dcp_size": 1,
            "attn_dcp_rank": 0,
            "tp_rank": 0,
            "tp_size": 1,
            "pp_rank": 0,
            "pp_size": 1,
        }
        self._undo.enter_context(get_parallel().override(**ranks | parallel))
        allocator: Any = SimpleNamespace(get_kvcache=lambda: pools.on_device)
        try:
            self.controller: Any = HiCacheController(
                allocator,
                pools.host,
                PAGE,
                dist.group.WORLD,
                threading.Event(),
                io_backend="kernel",
                storage_backend="file" if extra is None else "dynamic",
                prefetch_threshold=PAGE,
                model_name=model,
                storage_backend_extra_config=dict(extra or {}),
            )
        except BaseException:
            self._undo.close()
            raise

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def backend(self) -> Any:
        return self.controller.storage_backend

    def close(self) -> None:
        """Stop the threads and close the backend, as a runtime detach does."""
        with self._undo:
            self.controller.detach_storage_backend()

    def back_up(self, tokens: Sequence[int], pages: Sequence[int]) -> int:
        """Write the pages of tokens to the storage; return how many tokens were written."""
        controller = self.controller
        controller.write_storage(tokens_of(pages), [*tokens], keys_of(tokens), prefix_keys=[])
        written: int = controller.ack_backup_queue.get(timeout=LIMIT).completed_tokens
        return written

    def fetch(self, tokens: Sequence[int], pages: Sequence[int]) -> int:
        """Read the leading pages of tokens into pages of the host pool; return how many came."""
        controller = self.controller
        controller.prefetch("request", [*tokens])
        operation = controller.prefetch_hit_queue.get(timeout=LIMIT)
        count = operation.storage_hit_count // PAGE
        if not count:
            return 0
        operation.host_indices = tokens_of(pages[:count])
        controller.prefetch_buffer.put(operation)
        completed = 0
        while True:
            ack = controller.ack_prefetch_queue.get(timeout=LIMIT)
            if ack.completed_tokens is not None:
                completed = ack.completed_tokens
            if ack.completed_req:
                return completed // PAGE


def round_trip(engine: Engine, tokens: Sequence[int], count: int) -> Callable[[], bool]:
    """Back up pages and lose them; return a function that fetches and compares them."""
    host = engine.host
    src = range(2, 2 + count)
    dst = range(count + 3, 2 * count + 3)
    right = page_bytes(host, tokens_of(src))
    assert engine.back_up(tokens, src) == count * PAGE

    def fetched() -> bool:
        fill(host, 9)
        came = engine.fetch(tokens, dst)
        got = page_bytes(host, tokens_of(dst))
        return came == count and got == right

    return fetched
