# SPDX-License-Identifier: Apache-2.0
"""Replace the copies of SGLang's hierarchical cache, in every memory layout and I/O backend.

    PORTAKV_SGLANG=1 python -m sglang.launch_server ... --enable-hierarchical-cache

Three host pools copy tokens by PortaKV: MHA, MHA with keys and values of unequal widths, and MLA.
Other pools stay SGLang's.

SGLang calls `register` in every process, by the entry-point group ``sglang.srt.plugins``. The
function returns immediately unless ``PORTAKV_SGLANG`` is set.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeAlias

import torch

from portakv import BlockTransfer, KVView
from portakv.arguments import kind_of
from portakv.host import pinned
from portakv.integrations import IntegrationError, check_release
from portakv.integrations.sglang import kvcacheio

#: The I/O backends that PortaKV replaces. A call with another backend stays SGLang's.
IO_BACKENDS = ("kernel", "direct", "kernel_ascend")
#: The layout of a host pool of keys and values, by ``--hicache-mem-layout``.
HOST = {
    "layer_first": "kv | layer (block token) head dim",
    "page_first": "kv | (block token) layer head dim",
    "page_first_direct": "kv | block layer token head dim",
    "page_head": "kv | block head token layer dim",
    "page_unified": "block head/{group} layer kv token head%{group} dim",
}
#: The layout of MLA's one host pool, by ``--hicache-mem-layout``.
MLA_HOST = {
    "layer_first": "layer (block token) head dim",
    "page_first": "(block token) layer head dim",
    "page_first_direct": "block layer token head dim",
    "page_unified": "block layer token dim",
}
#: The layout of the layers on the device, by SGLang's ``KVBufferLayout``.
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
_ATTRIBUTE = "_portakv"  # of a pool, for its views
_RANGES = "_sglang_cuda_host_registered_ranges"  # of host memory that SGLang registered in pieces

Buffers: TypeAlias = "torch.Tensor | Sequence[torch.Tensor]"


#: A host pool of SGLang.
HostPool: TypeAlias = Any


class _Sides(NamedTuple):
    """The views of a pool, or of one of its layers."""

    host: KVView
    device: KVView


def register() -> None:
    """Replace the copies of SGLang's host pools if ``PORTAKV_SGLANG`` is set.

    Raises:
        IntegrationError: the installed release of SGLang is not supported.
    """
    if os.environ.get("PORTAKV_SGLANG", "0") in ("", "0"):
        return
    check_release("sglang")
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if find_spec("sgl_kernel") is None:  # SGLang imports the module on devices with its kernels
        sys.modules.setdefault("sgl_kernel.kvcacheio", kvcacheio)
    for pool in _POOLS:
        HookRegistry.register(f"{pool}.load_to_device_per_layer", load, HookType.AROUND)
        HookRegistry.register(f"{pool}.backup_from_device_all_layer", backup, HookType.AROUND)
    HookRegistry.register(f"{_BASE}.base.HostKVCache.destroy", release, HookType.BEFORE)


def load(
    own: Callable[..., None],
    pool: HostPool,
    device_pool: object,
    host_indices: torch.Tensor,
    device_indices: torch.Tensor,
    layer_id: int,
    io_backend: str,
    *,
    is_draft: bool = False,
) -> None:
    """Copy one layer from the host to the device, in place of the pool's method ``own``."""
    views = _views_of(pool) if io_backend in IO_BACKENDS else None
    if views is None:
        arguments = pool, device_pool, host_indices, device_indices, layer_id, io_backend
        own(*arguments, is_draft=is_draft)
        return
    is_mla = _is_mla(pool)
    if not is_draft:
        known = pool._target_layer_indices if is_mla else range(pool.target_layer_num)
        if layer_id not in known:  # the pool lacks the layer
            return
    on_host = pool._host_layer_by_controller[layer_id] if is_mla else layer_id
    on_device = pool._buffer_index_by_layer[layer_id] if is_mla else layer_id
    layer = views.layer(on_host, on_device)
    views.copy(layer.host, layer.device, host_indices, device_indices, io_backend)


def backup(
    own: Callable[..., None],
    pool: HostPool,
    device_pool: object,
    host_indices: torch.Tensor,
    device_indices: torch.Tensor,
    io_backend: str,
) -> None:
    """Copy all layers from the device to the host, in place of the pool's method ``own``."""
    views = _views_of(pool) if io_backend in IO_BACKENDS else None
    if views is None:
        own(pool, device_pool, host_indices, device_indices, io_backend)
        return
    pairs = [views.sides]
    if _is_mla(pool) and views.sides.host.layers != views.sides.device.layers:
        # The rank owns some layers only.
        pairs = [
            views.layer(on_host, pool._buffer_index_by_layer[layer])
            for layer, on_host in pool._host_layer_by_controller.items()
        ]
    for pair in pairs:
        views.copy(pair.device, pair.host, device_indices, host_indices, io_backend)


def release(pool: HostPool) -> None:
    """Wait for a pool's last copies and drop its views, before SGLang unregisters its memory."""
    views = pool.__dict__.pop(_ATTRIBUTE, None)
    if views is not None:
        views.close()


class _PoolViews:
    """The views of a pool, valid while the pool has the same buffers."""

    def __init__(self, pool: HostPool, sides: _Sides) -> None:
        self.sides = sides
        self._host_buffers = pool.kv_buffer
        self._device_buffers = _device_buffers(pool)
        self._page_size = pool.page_size
        # decode context parallelism
        self._ranks: int = getattr(pool, "dcp_size", 1)
        self._rank: int = getattr(pool, "dcp_rank", 0)
        self._layers: dict[tuple[int, int], _Sides] = {}
        self._last: dict[torch.device, BlockTransfer] = {}  # the last copy, by destination
        # SGLang may have registered the host memory in pieces.
        buffers = pool.kv_buffer
        if isinstance(buffers, torch.Tensor):
            buffers = [buffers]
        self._adopted = pinned.adopt(
            [piece for buffer in buffers or () for piece in getattr(buffer, _RANGES, ())]
        )

    def fits(self, pool: HostPool) -> bool:
        """Return True if the pool still has the buffers that the views were made of."""
        same_host = self._host_buffers is pool.kv_buffer
        return same_host and self._device_buffers is _device_buffers(pool)

    def layer(self, on_host: int, on_device: int) -> _Sides:
        """Return the views of one layer, by its numbers in the two views; they are cached."""
        layer = self._layers.get((on_host, on_device))
        if layer is None:
            host = self.sides.host.slice(layers=on_host)
            device = self.sides.device.slice(layers=on_device)
            layer = self._layers[on_host, on_device] = _Sides(host, device)
        return layer

    def copy(
        self,
        src: KVView,
        dst: KVView,
        src_ids: torch.Tensor,
        dst_ids: torch.Tensor,
        io_backend: str,
    ) -> None:
        """Copy tokens by their ids. Every backend except ``kernel`` passes the ids of whole
        pages."""
        if self._ranks > 1:  # each rank has every ``_ranks``-th token
            src_ids = src_ids[self._rank :: self._ranks] // self._ranks
            dst_ids = dst_ids[self._rank :: self._ranks] // self._ranks
        size = None if io_backend == "kernel" else self._page_size
        self._last[dst.device] = kvcacheio.copy_tokens(src, dst, src_ids, dst_ids, page_size=size)

    def close(self) -> None:
        """Wait for the last copy to each side."""
        for copy in self._last.values():
            copy.synchronize()
        self._adopted.close()


def _views_of(pool: HostPool) -> _PoolViews | None:
    """Return the views of a pool, made again if its buffers changed; None if it stays SGLang's.

    Raises:
        IntegrationError: the pool was destroyed.
    """
    views: _PoolViews | None = pool.__dict__.get(_ATTRIBUTE)
    if views is not None and views.fits(pool):
        return views
    if getattr(pool, "_is_dummy", False):
        return None
    buffers = pool.kv_buffer
    if buffers is None:
        raise IntegrationError(
            f"Expected a pool that is in use, got {kind_of(pool)} that was destroyed. Make "
            f"a new pool."
        )
    sides = _mla(pool, buffers) if _is_mla(pool) else _mha(pool, buffers)
    if sides is None:
        return None
    release(pool)
    made = pool.__dict__[_ATTRIBUTE] = _PoolViews(pool, sides)
    return made


def _is_mla(pool: HostPool) -> bool:
    return hasattr(pool, "kv_lora_rank")


def _mha(pool: HostPool, buffers: Buffers) -> _Sides | None:
    """Return the views of a pool of keys and values, or None for a layout of another kind."""
    on_device = DEVICE.get(pool._buffer_infos[0].buffers.layout.value)
    on_host = HOST.get(pool.layout)
    if on_device is None or on_host is None:
        return None
    if pool.layout == "page_unified":
        on_host = on_host.format(group=pool.page_unified_layout.heads_per_group)
        host = KVView(buffers, on_host, heads=pool.head_num)
    else:
        block_size = pool.page_size if "(block token)" in on_host else None
        host = KVView([pool.k_buffer, pool.v_buffer], on_host, block_size=block_size)
    layers = [pool.device_k_buffers, pool.device_v_buffers]
    return _Sides(host, KVView(layers, on_device, block_size=pool.page_size))


def _mla(pool: HostPool, buffers: Buffers) -> _Sides | None:
    """Return the views of an MLA pool, or None for a layout of another kind."""
    on_host = MLA_HOST.get(pool.layout)
    if on_host is None or pool._native_buffers is not None:
        return None
    block_size = pool.page_size if "(block token)" in on_host else None
    host = KVView(buffers, on_host, block_size=block_size)
    return _Sides(host, KVView(pool.device_kv_buffers, MLA_DEVICE, block_size=pool.page_size))


def _device_buffers(pool: HostPool) -> Any:
    return pool.device_kv_buffers if _is_mla(pool) else pool.device_k_buffers
