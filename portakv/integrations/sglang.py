# SPDX-License-Identifier: Apache-2.0
"""PortaKV inside SGLang's hierarchical cache: its host pools of MHA, of MHA with keys and values of
unequal widths, and of MLA move tokens by PortaKV, in every memory layout and by every I/O backend.

    PORTAKV_SGLANG=1 python -m sglang.launch_server ... --enable-hierarchical-cache

`register` stands in the entry-point group ``sglang.srt.plugins``, which SGLang runs in every
process: it returns at once unless ``PORTAKV_SGLANG`` is set. Other pools stay SGLang's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from portakv import BlockTransfer, KVView
from portakv.host import pinned
from portakv.integrations import IntegrationError, check_release, kvcacheio, kvcacheio_pools

#: The I/O backends that PortaKV stands for; a call by another stays SGLang's.
WAYS = ("kernel", "direct", "kernel_ascend")
#: How a host pool of keys and values lies in memory, by ``--hicache-mem-layout``.
HOST = {
    "layer_first": "kv | layer (block token) head dim",
    "page_first": "kv | (block token) layer head dim",
    "page_first_direct": "kv | block layer token head dim",
    "page_head": "kv | block head token layer dim",
    "page_unified": "block head/{group} layer kv token head%{group} dim",
}
#: The same of the one pool of MLA.
MLA_HOST = {
    "layer_first": "layer (block token) head dim",
    "page_first": "(block token) layer head dim",
    "page_first_direct": "block layer token head dim",
    "page_unified": "block layer token dim",
}
#: How one layer on the device lies in memory, by SGLang's ``KVBufferLayout``.
DEVICE = {
    "nhd": "kv layer | (block token) head dim",
    "paged_nhd": "kv layer | block token head dim",
}
MLA_DEVICE = "layer | (block token) head dim"

_BASE = "sglang.srt.mem_cache.pool_host"
_POOLS = (
    f"{_BASE}.mha.MHATokenToKVPoolHost",
    f"{_BASE}.mha.AsymmetricMHATokenToKVPoolHost",
    f"{_BASE}.mla.MLATokenToKVPoolHost",
)
_KEPT = "_portakv"  # the attribute of a pool that holds its views
_RANGES = "_sglang_cuda_host_registered_ranges"  # of host memory that SGLang registered in pieces


def register() -> None:
    """Let SGLang's host pools move tokens by PortaKV; nothing if ``PORTAKV_SGLANG`` is not set.

    Raises:
        IntegrationError: a release of SGLang that this plug was not tested with.
    """
    if os.environ.get("PORTAKV_SGLANG", "0") in ("", "0"):
        return
    check_release("sglang")
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if find_spec("sgl_kernel") is None:  # what SGLang imports on devices that have its kernels
        sys.modules.setdefault("sgl_kernel.kvcacheio", kvcacheio)
    for pool in _POOLS:
        HookRegistry.register(f"{pool}.load_to_device_per_layer", load, HookType.AROUND)
        HookRegistry.register(f"{pool}.backup_from_device_all_layer", backup, HookType.AROUND)
    HookRegistry.register(f"{_BASE}.base.HostKVCache.destroy", release, HookType.BEFORE)


def load(
    own: Callable[..., None],
    pool: Any,
    device_pool: Any,
    host_indices: torch.Tensor,
    device_indices: torch.Tensor,
    layer_id: int,
    io_backend: str,
    *,
    is_draft: bool = False,
) -> None:
    """One layer from the host to the device, in the place of a pool's method ``own``."""
    held = _held(pool) if io_backend in WAYS else None
    if held is None:
        arguments = pool, device_pool, host_indices, device_indices, layer_id, io_backend
        own(*arguments, is_draft=is_draft)
        return
    pair = _layer(pool, layer_id, is_draft)
    if pair is not None:
        src, dst = held.layers(*pair)
        held.copy(src, dst, host_indices, device_indices, io_backend)


def backup(
    own: Callable[..., None],
    pool: Any,
    device_pool: Any,
    host_indices: torch.Tensor,
    device_indices: torch.Tensor,
    io_backend: str,
) -> None:
    """All layers from the device to the host, in the place of a pool's method ``own``."""
    held = _held(pool) if io_backend in WAYS else None
    if held is None:
        own(pool, device_pool, host_indices, device_indices, io_backend)
        return
    pairs = [(held.host, held.device)]
    if _is_mla(pool) and held.host.layers != held.device.layers:  # a rank that owns some layers
        pairs = [held.layers(*pair) for pair in _owned(pool)]
    for dst, src in pairs:
        held.copy(src, dst, device_indices, host_indices, io_backend)


def release(pool: Any) -> None:
    """Wait for a pool's last copies and forget its views, before SGLang unregisters its memory."""
    held = pool.__dict__.pop(_KEPT, None)
    if held is not None:
        held.close()


class _Held:
    """The views of a pool, for as long as it has the same buffers."""

    def __init__(self, pool: Any, host: KVView, device: KVView) -> None:
        self.host = host
        self.device = device
        self._rests_on = pool.kv_buffer, _device_buffers(pool)
        self._page_size = pool.page_size
        self._dcp = getattr(pool, "dcp_size", 1), getattr(pool, "dcp_rank", 0)
        self._layers: dict[tuple[int, int], tuple[KVView, KVView]] = {}
        self._last: dict[torch.device, BlockTransfer] = {}  # to each side
        buffers = pool.kv_buffer
        buffers = [buffers] if isinstance(buffers, torch.Tensor) else buffers
        self._adopted = pinned.adopt(
            [each for buffer in buffers for each in getattr(buffer, _RANGES, ())]
        )

    def fits(self, pool: Any) -> bool:
        """True if the pool still has the buffers that were read."""
        host, device = self._rests_on
        return host is pool.kv_buffer and device is _device_buffers(pool)

    def layers(self, host: int, device: int) -> tuple[KVView, KVView]:
        """One layer on both sides; made once."""
        found = self._layers.get((host, device))
        if found is None:
            found = self.host.slice(layers=host), self.device.slice(layers=device)
            self._layers[host, device] = found
        return found

    def copy(
        self, src: KVView, dst: KVView, src_ids: torch.Tensor, dst_ids: torch.Tensor, way: str
    ) -> None:
        """Copy tokens, by ids of tokens; all but ``kernel`` hand over whole pages."""
        size, rank = self._dcp
        if size > 1:  # each rank keeps every ``size``-th token
            src_ids, dst_ids = (ids[rank::size] // size for ids in (src_ids, dst_ids))
        ids: list[Any] = [src_ids, dst_ids]
        if way != "kernel":
            ids = [kvcacheio_pools.pages(each, self._page_size) for each in ids]
        self._last[dst.device] = kvcacheio.copy_tokens(src, dst, *ids)

    def close(self) -> None:
        """Wait for the last copy to each side."""
        for copy in self._last.values():
            copy.synchronize()
        self._adopted.close()


def _held(pool: Any) -> _Held | None:
    """The views of a pool, made again if its buffers are others; None if it stays SGLang's."""
    held: _Held | None = pool.__dict__.get(_KEPT)
    if held is not None and held.fits(pool):
        return held
    if getattr(pool, "_is_dummy", False):
        return None
    if pool.kv_buffer is None:
        raise IntegrationError(
            f"A transfer was asked of a {type(pool).__name__} that was destroyed; expected one "
            f"that is in use. Make the pool anew."
        )
    sides = _mla(pool) if _is_mla(pool) else _mha(pool)
    if sides is None:
        return None
    release(pool)
    pool.__dict__[_KEPT] = made = _Held(pool, *sides)
    return made


def _is_mla(pool: Any) -> bool:
    return hasattr(pool, "kv_lora_rank")


def _mha(pool: Any) -> tuple[KVView, KVView] | None:
    of_device = DEVICE.get(pool._buffer_infos[0].buffers.layout.value)
    text = HOST.get(pool.layout)
    if of_device is None or text is None:
        return None
    if pool.layout == "page_unified":
        text = text.format(group=pool.page_unified_layout.heads_per_group)
        host = KVView(pool.kv_buffer, text, heads=pool.head_num)
    else:
        size = pool.page_size if "(block token)" in text else None
        host = KVView([pool.k_buffer, pool.v_buffer], text, block_size=size)
    rows = [pool.device_k_buffers, pool.device_v_buffers]
    return host, KVView(rows, of_device, block_size=pool.page_size)


def _mla(pool: Any) -> tuple[KVView, KVView] | None:
    text = MLA_HOST.get(pool.layout)
    if text is None or pool._native_buffers is not None:
        return None
    size = pool.page_size if "(block token)" in text else None
    host = KVView(pool.kv_buffer, text, block_size=size)
    return host, KVView(pool.device_kv_buffers, MLA_DEVICE, block_size=pool.page_size)


def _device_buffers(pool: Any) -> Any:
    return pool.device_kv_buffers if _is_mla(pool) else pool.device_k_buffers


def _owned(pool: Any) -> list[tuple[int, int]]:
    """Where each layer of a rank is on the host and on the device."""
    on_device = pool._buffer_index_by_layer
    return [(at, on_device[layer]) for layer, at in pool._host_layer_by_controller.items()]


def _layer(pool: Any, layer_id: int, is_draft: bool) -> tuple[int, int] | None:
    """Where a layer is on the host and on the device; None if the pool has none of that number."""
    if _is_mla(pool):
        if not is_draft and layer_id not in pool._target_layer_indices:
            return None
        return pool._host_layer_by_controller[layer_id], pool._buffer_index_by_layer[layer_id]
    if not is_draft and not 0 <= layer_id < pool.target_layer_num:
        return None
    return layer_id, layer_id
