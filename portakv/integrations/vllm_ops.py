# SPDX-License-Identifier: Apache-2.0
"""vLLM's ops that copy rows unchanged, with vLLM's names and arguments, over `copy_rows`.

Neither vLLM nor an integration of PortaKV imports this module. Import it yourself, in the code of a
vLLM platform plugin or of a fork whose platform has no kernels for these ops:

    from portakv.integrations import vllm_ops as ops  # replaces vllm._custom_ops

The module imports no engine. The ops order their work on the current stream, and wait for copies
from or to pageable memory. They do not convert rows: ``kv_cache_dtype`` must be ``"auto"``, or
``"float16"`` or ``"bfloat16"`` for rows of that dtype.
"""

from __future__ import annotations

from math import prod

import torch

from portakv import BlockTransfer, Index, KVView, LayoutError, Unsupported, copy_rows, copy_runs

__all__ = [
    "concat_and_cache_mla",
    "concat_and_cache_mla_grouped",
    "cp_gather_cache",
    "gather_and_maybe_dequant_cache",
    "gather_cache",
    "reshape_and_cache",
    "reshape_and_cache_flash",
    "swap_blocks",
    "swap_blocks_batch",
]

#: The values of ``kv_cache_dtype`` for caches whose rows are not quantised.
_UNCONVERTED = {"float16": torch.float16, "bfloat16": torch.bfloat16}

# --- Blocks between devices, or a device and the host ---------------------------------------------


def swap_blocks(
    src: torch.Tensor, dst: torch.Tensor, block_size_in_bytes: int, block_mapping: torch.Tensor
) -> None:
    """Copy blocks of ``block_size_in_bytes`` bytes between two contiguous tensors.

    Args:
        src: the tensor to read.
        dst: the tensor to write.
        block_size_in_bytes: bytes of a block, at least 1.
        block_mapping: int64 ``[blocks, 2]`` on the host: the number of each block in the source and
            in the destination, counted from the beginning of the tensors.

    Raises:
        SlotError: a block past a tensor's end, or a block that is written twice.
        LayoutError: a tensor that is not contiguous, another mapping, or blocks without bytes.
    """
    if block_size_in_bytes < 1 or block_mapping.shape[1:] != (2,):
        raise LayoutError(
            f"swap_blocks expected blocks of at least 1 byte and a mapping [blocks, 2], got "
            f"{block_size_in_bytes} bytes and a mapping of shape {tuple(block_mapping.shape)}. "
            f"Correct the arguments."
        )
    src_blocks = _blocks(src, block_size_in_bytes)
    dst_blocks = _blocks(dst, block_size_in_bytes)
    src_ids, dst_ids = map(Index, block_mapping.unbind(1))
    _order(copy_rows(src_blocks, dst_blocks, src_ids, dst_ids))


def swap_blocks_batch(
    src_ptrs: torch.Tensor,
    dst_ptrs: torch.Tensor,
    sizes: torch.Tensor,
    is_src_access_order_any: bool = False,
    *,
    src_device: torch.device | str | None = None,
    dst_device: torch.device | str | None = None,
) -> None:
    """Copy runs of bytes.

    Args:
        src_ptrs, dst_ptrs, sizes: the addresses and the bytes of each run, int64 or uint64
            ``[runs]`` on the host.
        is_src_access_order_any: no effect; sources are read in the stream's order.
        src_device, dst_device: the device of the memory; None: the driver reports it, as for
            vLLM's op.

    Raises:
        PortaKVError: an error of `portakv.copy_runs`, also if no driver can report the device.
    """
    runs = (src_ptrs, dst_ptrs, sizes)
    _order(copy_runs(*runs, src_device=src_device, dst_device=dst_device))


# --- Rows of a step to the caches -----------------------------------------------------------------


def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str = "auto",
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    interleaved_v: bool = False,
) -> None:
    """Copy rows ``[tokens, heads, dim]`` to slots of packed caches.

    The cache of keys is ``[blocks, heads, dim / x, block_size, x]``. The cache of values is
    ``[blocks, heads, dim, block_size]``, or with ``interleaved_v`` ``[blocks, heads, block_size /
    x, dim, x]``. Negative slots are skipped.
    """
    _check_unconverted("reshape_and_cache", kv_cache_dtype, key)
    x = key_cache.shape[-1]
    values = "block head dim token"
    if interleaved_v:
        values = f"block head token/{x} dim token%{x}"
        size = (*value_cache.shape[:2], key_cache.shape[3] // x, key.shape[2], x)
        value_cache = value_cache.view(size)
    for rows, cache, layout in (
        (key, key_cache, f"block head dim/{x} token dim%{x}"),
        (value, value_cache, values),
    ):
        _write(KVView(rows, "token head dim"), KVView(cache, layout), slot_mapping)


def reshape_and_cache_flash(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str = "auto",
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Copy rows ``[tokens, heads, dim]`` to slots of caches ``[blocks, block_size, heads, dim]``.

    The caches may have any strides. Negative slots are skipped, and so are rows after the last
    slot.
    """
    _check_unconverted("reshape_and_cache_flash", kv_cache_dtype, key)
    rows = KVView((key, value), "kv | token head dim")
    paged = KVView((key_cache, value_cache), "kv | block token head dim")
    _write(rows, paged, slot_mapping)


def concat_and_cache_mla(
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str = "auto",
    scale: torch.Tensor | None = None,
    skip_scale: bool = False,
) -> None:
    """Copy a latent ``[tokens, a]`` and a rotary key ``[tokens, b]`` to slots of ``[blocks,
    block_size, a + b]``.

    A slot holds the latent, then the rotary key. Negative slots are skipped.
    """
    _check_unconverted("concat_and_cache_mla", kv_cache_dtype, kv_c)
    widths = kv_c.shape[-1], k_pe.shape[-1]
    # Padding after the rows of a cache is not modified.
    paged = KVView(kv_cache[..., : sum(widths)], "block token (kv dim)", dim=widths)
    _write(KVView((kv_c, k_pe), "kv | token dim", dim=widths), paged, slot_mapping)


def concat_and_cache_mla_grouped(
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache_ptrs: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_size: int,
    block_stride: int,
    entry_stride: int,
    kv_scales: torch.Tensor | None = None,
    kv_cache_dtype: str = "auto",
) -> None:
    """Copy rows of all layers as `concat_and_cache_mla` does.

    It is one copy if ``slot_mapping`` is one list that is expanded to all layers, else a copy for
    each layer.

    Args:
        kv_c: latents ``[layers, tokens, a]``.
        k_pe: rotary keys ``[layers, tokens, b]``.
        kv_cache_ptrs: addresses of the caches, int64 ``[layers]``.
        slot_mapping: slots ``[layers, tokens]``.
        block_size: tokens of a block.
        block_stride, entry_stride: elements from a block, and from a token, to the next.
        kv_scales: no effect.
        kv_cache_dtype: see the module.
    """
    _check_unconverted("concat_and_cache_mla_grouped", kv_cache_dtype, kv_c)
    layers = kv_c.shape[0]
    widths = (kv_c.shape[-1], k_pe.shape[-1])
    has_one_list = slot_mapping.stride(0) == 0
    per_copy = max(layers, 1) if has_one_list else 1
    for first in range(0, layers, per_copy):
        part = slice(first, first + per_copy)
        rows = KVView((kv_c[part], k_pe[part]), "kv | layer token dim", dim=widths)
        paged = KVView.at(
            kv_cache_ptrs[part],
            "layer | block token (kv dim)",
            dim=widths,
            shape=(-1, block_size, sum(widths)),
            strides=(block_stride, entry_stride, 1),
            dtype=kv_c.dtype,
            device=kv_c.device,
        )
        _write(rows, paged, slot_mapping[first])


# --- Rows of several requests from a cache --------------------------------------------------------


def cp_gather_cache(
    src_cache: torch.Tensor,
    dst: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    batch_size: int,
    seq_starts: torch.Tensor | None = None,
) -> None:
    """Copy the rows of several requests from a cache, request after request.

    Args:
        src_cache: ``[blocks, block_size, entry...]``.
        dst: ``[tokens, entry...]``; rows before the first and after the last request are not
            modified.
        block_table: int32 ``[batch, blocks]``.
        cu_seq_lens: int32 ``[batch + 1]``: the first row of each request in ``dst``, then the end
            of the last request.
        batch_size: the number of requests.
        seq_starts: int32 ``[batch]``: tokens at the beginning of each request that are skipped.
    """
    tables = block_table[:batch_size]
    ends = cu_seq_lens[: batch_size + 1]
    size = src_cache.shape[1]
    first = None if seq_starts is None else seq_starts[:batch_size]

    # The further dimensions of both tensors are one row.
    rows = dst.flatten(1)
    paged = src_cache.flatten(2)
    count = rows.shape[0]
    ids = Index.of_requests(tables, ends.diff(), size, first=first, front=ends[:1], count=count)
    _order(copy_rows(KVView(paged, "block token dim"), KVView(rows, "token dim"), ids))


def gather_and_maybe_dequant_cache(
    src_cache: torch.Tensor,
    dst: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    token_to_seq: torch.Tensor | None,
    num_tokens: int,
    kv_cache_dtype: str = "auto",
    scale: torch.Tensor | None = None,
    seq_starts: torch.Tensor | None = None,
) -> None:
    """Copy the first ``num_tokens`` rows as `cp_gather_cache` does, without dequantisation."""
    _check_unconverted("gather_and_maybe_dequant_cache", kv_cache_dtype, dst)
    batch = block_table.shape[0]
    cp_gather_cache(src_cache, dst[:num_tokens], block_table, cu_seq_lens, batch, seq_starts)


gather_cache = cp_gather_cache  # the older name


def _check_unconverted(op: str, kv_cache_dtype: str, rows: torch.Tensor) -> None:
    if kv_cache_dtype != "auto" and _UNCONVERTED.get(kv_cache_dtype) != rows.dtype:
        raise Unsupported(
            f"{op} of {rows.dtype} with kv_cache_dtype={kv_cache_dtype!r}",
            "rows are copied unchanged; use vLLM's own op, or kv_cache_dtype='auto'",
        )


def _blocks(tensor: torch.Tensor, nbytes: int) -> KVView:
    """Return a contiguous tensor as blocks of ``nbytes`` bytes, without a rest after the last."""
    if not tensor.is_contiguous():
        raise LayoutError(
            f"swap_blocks expected a contiguous tensor, got shape {tuple(tensor.shape)} and "
            f"strides {tensor.stride()}. Pass a contiguous part, or use copy_rows."
        )
    number = prod(tensor.shape) * tensor.element_size() // nbytes
    flat = tensor.reshape(-1).view(torch.uint8)[: number * nbytes]
    return KVView(flat.view(number, nbytes), "block (token dim)", block_size=1)


def _write(rows: KVView, paged: KVView, slots: torch.Tensor) -> None:
    """Copy as many rows as there are slots."""
    _order(copy_rows(rows, paged, None, slots, count=slots.numel()))


def _order(transfer: BlockTransfer) -> None:
    """Wait for a transfer that no stream orders, because vLLM's ops are ordered on the stream."""
    if not transfer.ordered:
        transfer.synchronize()
