# SPDX-License-Identifier: Apache-2.0
"""Copy rows by `copy_rows` with the names and arguments of vLLM's ops, to compare both.

The ops order their work on the current stream. They do not convert rows.
"""

from __future__ import annotations

import torch

from portakv import BlockTransfer, Index, KVView, copy_rows, copy_runs


def swap_blocks_batch(
    src_ptrs: torch.Tensor,
    dst_ptrs: torch.Tensor,
    sizes: torch.Tensor,
    src_device: torch.device,
    dst_device: torch.device,
) -> None:
    """Copy runs of bytes, from and to addresses."""
    runs = (src_ptrs, dst_ptrs, sizes)
    _order(copy_runs(*runs, src_device=src_device, dst_device=dst_device))


def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *scales: object,
) -> None:
    """Copy rows ``[tokens, heads, dim]`` to slots of packed caches.

    The cache of keys is ``[blocks, heads, dim / x, block_size, x]``, the cache of values
    ``[blocks, heads, dim, block_size]``.
    """
    x = key_cache.shape[-1]
    keys = KVView(key_cache, f"block head dim/{x} token dim%{x}")
    _write(KVView(key, "token head dim"), keys, slot_mapping)
    values = KVView(value_cache, "block head dim token")
    _write(KVView(value, "token head dim"), values, slot_mapping)


def reshape_and_cache_flash(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *scales: object,
) -> None:
    """Copy rows ``[tokens, heads, dim]`` to slots of caches ``[blocks, size, heads, dim]``."""
    rows = KVView((key, value), "kv | token head dim")
    paged = KVView((key_cache, value_cache), "kv | block token head dim")
    _write(rows, paged, slot_mapping)


def concat_and_cache_mla(
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *scales: object,
) -> None:
    """Copy a latent ``[tokens, a]`` and a rotary key ``[tokens, b]`` to slots of ``[blocks,
    block_size, a + b]``."""
    widths = kv_c.shape[-1], k_pe.shape[-1]
    paged = KVView(kv_cache, "block token (kv dim)", dim=widths)
    _write(KVView((kv_c, k_pe), "kv | token dim", dim=widths), paged, slot_mapping)


def cp_gather_cache(
    src_cache: torch.Tensor,
    dst: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    batch_size: int,
) -> None:
    """Copy the rows of several requests from a cache, request after request.

    ``cu_seq_lens`` has the first row of each request in ``dst``, then the end of the last request.
    """
    size = src_cache.shape[1]
    ends = cu_seq_lens[: batch_size + 1]
    count = dst.shape[0]
    ids = Index.of_requests(block_table, ends.diff(), size, front=ends[:1], count=count)
    _order(copy_rows(KVView(src_cache, "block token dim"), KVView(dst, "token dim"), ids))


def _write(rows: KVView, paged: KVView, slots: torch.Tensor) -> None:
    """Copy as many rows as there are slots."""
    _order(copy_rows(rows, paged, None, slots, count=slots.numel()))


def _order(transfer: BlockTransfer) -> None:
    """Wait for a transfer that no stream orders, because vLLM's ops are ordered on the stream."""
    if not transfer.ordered:
        transfer.synchronize()
