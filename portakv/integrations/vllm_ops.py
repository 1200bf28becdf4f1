# SPDX-License-Identifier: Apache-2.0
"""vLLM's ops that move rows as they are, with vLLM's names and arguments, over `copy_rows`.

For platforms that have no kernels for them: ``from portakv.integrations import vllm_ops as ops``
stands for ``from vllm import _custom_ops as ops``. No engine is imported. Ops order their work on
the current stream; copies from or to pageable memory are waited for. Rows are not converted: of
``kv_cache_dtype`` all is refused but ``"auto"``, and ``"float16"`` or ``"bfloat16"`` for such rows.
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

#: The names by which vLLM asks for caches whose rows are not quantised.
_UNCONVERTED = {"float16": torch.float16, "bfloat16": torch.bfloat16}

# --- Blocks between devices, or a device and the host ---------------------------------------------


def swap_blocks(
    src: torch.Tensor, dst: torch.Tensor, block_size_in_bytes: int, block_mapping: torch.Tensor
) -> None:
    """Copy blocks of so many bytes: ``block_mapping`` int64 ``[blocks, 2]`` on the host names each
    in the source and in the destination, from where the tensors begin.

    Raises:
        SlotError: a block past a tensor's end, or one that is written twice.
        LayoutError: a tensor that is not contiguous, another mapping, or blocks without bytes.
    """
    if block_size_in_bytes < 1 or block_mapping.shape[1:] != (2,):
        raise LayoutError(
            f"swap_blocks was asked for blocks of {block_size_in_bytes} bytes by a mapping of "
            f"shape {tuple(block_mapping.shape)}; expected 1 byte at least, and [blocks, 2]. Pass "
            f"these."
        )
    here, there = (_blocks(each, block_size_in_bytes) for each in (src, dst))
    _behind(copy_rows(here, there, *map(Index, block_mapping.unbind(1))))


def swap_blocks_batch(
    src_ptrs: torch.Tensor,
    dst_ptrs: torch.Tensor,
    sizes: torch.Tensor,
    is_src_access_order_any: bool = False,
    *,
    src_device: torch.device | str | None = None,
    dst_device: torch.device | str | None = None,
) -> None:
    """Copy runs of bytes: three int64 or uint64 tensors ``[runs]`` on the host.

    ``is_src_access_order_any`` is taken and ignored: sources are read in the stream's order.

    Args:
        src_device, dst_device: where the memory is; None: the driver is asked, as by vLLM's op.

    Raises:
        PortaKVError: what `portakv.copy_runs` raises, for devices whose driver cannot be asked too.
    """
    runs = (src_ptrs, dst_ptrs, sizes)
    _behind(copy_runs(*runs, src_device=src_device, dst_device=dst_device))


# --- Rows of a step into the caches ---------------------------------------------------------------


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
    """Rows ``[tokens, heads, dim]`` to slots of caches ``[blocks, heads, dim / x, block_size, x]``
    and ``[blocks, heads, dim, block_size]``; with ``interleaved_v`` the values' are ``[blocks,
    heads, block_size / x, dim, x]``. Negative slots are skipped."""
    _as_they_are("reshape_and_cache", kv_cache_dtype, key)
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
    """Rows ``[tokens, heads, dim]`` to slots of caches ``[blocks, block_size, heads, dim]`` of any
    strides. Negative slots are skipped, and so are rows behind the last slot."""
    _as_they_are("reshape_and_cache_flash", kv_cache_dtype, key)
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
    """A latent and a rotary key of each token, ``[tokens, a]`` and ``[tokens, b]``, side by side to
    slots of ``[blocks, block_size, a + b]``. Negative slots are skipped."""
    _as_they_are("concat_and_cache_mla", kv_cache_dtype, kv_c)
    widths = kv_c.shape[-1], k_pe.shape[-1]
    # Padding that a cache has behind its rows stays as it is.
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
    """`concat_and_cache_mla` for all layers: rows ``[layers, tokens, a]`` and ``[layers, tokens,
    b]``, the caches' addresses int64 ``[layers]``, slots ``[layers, tokens]``; one copy if the
    slots are one list that is expanded, else one for each layer. Strides count elements."""
    _as_they_are("concat_and_cache_mla_grouped", kv_cache_dtype, kv_c)
    layers = kv_c.shape[0]
    widths = (kv_c.shape[-1], k_pe.shape[-1])
    each = max(layers, 1) if slot_mapping.stride(0) == 0 else 1
    for first in range(0, layers, each):
        some = slice(first, first + each)
        rows = KVView((kv_c[some], k_pe[some]), "kv | layer token dim", dim=widths)
        paged = KVView.at(
            kv_cache_ptrs[some],
            "layer | block token (kv dim)",
            dim=widths,
            shape=(-1, block_size, sum(widths)),
            strides=(block_stride, entry_stride, 1),
            dtype=kv_c.dtype,
            device=kv_c.device,
        )
        _write(rows, paged, slot_mapping[first])


# --- Rows of several requests out of a cache ------------------------------------------------------


def cp_gather_cache(
    src_cache: torch.Tensor,
    dst: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    batch_size: int,
    seq_starts: torch.Tensor | None = None,
) -> None:
    """The rows of several requests, one behind the other.

    Args:
        src_cache: ``[blocks, block_size, entry...]``.
        dst: ``[tokens, entry...]``; rows behind the last request stay as they are.
        block_table: int32 ``[batch, blocks]``.
        cu_seq_lens: int32 ``[batch + 1]``: where each request begins in ``dst``; rows in front of
            the first stay as they are, too.
        seq_starts: int32 ``[batch]``: tokens of each request that are passed over.
    """
    tables = block_table[:batch_size]
    ends = cu_seq_lens[: batch_size + 1]
    size = src_cache.shape[1]
    first = None if seq_starts is None else seq_starts[:batch_size]
    # The rest of a shape is a row: its dimensions must lie behind each other.
    rows = dst.flatten(1)
    paged = src_cache.flatten(2)
    within = rows.shape[0]
    ids = Index.of_requests(tables, ends.diff(), size, first=first, front=ends[:1], count=within)
    _behind(copy_rows(KVView(paged, "block token dim"), KVView(rows, "token dim"), ids))


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
    """`cp_gather_cache` of the first ``num_tokens`` rows."""
    _as_they_are("gather_and_maybe_dequant_cache", kv_cache_dtype, dst)
    batch = block_table.shape[0]
    cp_gather_cache(src_cache, dst[:num_tokens], block_table, cu_seq_lens, batch, seq_starts)


gather_cache = cp_gather_cache  # its older name


def _as_they_are(op: str, kv_cache_dtype: str, rows: torch.Tensor) -> None:
    if kv_cache_dtype != "auto" and _UNCONVERTED.get(kv_cache_dtype) != rows.dtype:
        raise Unsupported(
            f"{op} of {rows.dtype} with kv_cache_dtype={kv_cache_dtype!r}",
            "rows are moved as they are; use vLLM's own op, or kv_cache_dtype='auto'",
        )


def _blocks(tensor: torch.Tensor, nbytes: int) -> KVView:
    """A contiguous tensor as blocks of so many bytes; what is left behind the last is not one."""
    if not tensor.is_contiguous():
        raise LayoutError(
            f"swap_blocks was asked of a tensor of shape {tuple(tensor.shape)} and strides "
            f"{tensor.stride()}; expected a contiguous one. Pass a part that is, or use copy_rows."
        )
    number = prod(tensor.shape) * tensor.element_size() // nbytes
    flat = tensor.reshape(-1).view(torch.uint8)[: number * nbytes]
    return KVView(flat.view(number, nbytes), "block (token dim)", block_size=1)


def _write(rows: KVView, paged: KVView, slots: torch.Tensor) -> None:
    """As many rows as there are slots."""
    _behind(copy_rows(rows, paged, None, slots, count=slots.numel()))


def _behind(transfer: BlockTransfer) -> None:
    """vLLM's ops are ordered on the stream: what no stream orders is waited for."""
    if not transfer.ordered:
        transfer.synchronize()
