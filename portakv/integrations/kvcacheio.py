# SPDX-License-Identifier: Apache-2.0
"""Replace ``sgl_kernel.kvcacheio`` of SGLang on every device that PortaKV supports.

The functions have the names, arguments and defaults of sglang-kernel 0.4.4 to 0.4.10. The module
also has ``copy_to_gpu_no_ce`` of ``sgl_kernel.elementwise``.

    sys.modules["sgl_kernel.kvcacheio"] = portakv.integrations.kvcacheio  # before SGLang

Arguments named ``item_size`` and ``*_layout_dim`` are sizes in bytes. Ids name tokens; they are
int32 or int64, on the host or on a device. The names of functions abbreviate the layouts of pools:

- ``lf``, layer first: ``[layer][token, head, dim]``
- ``pf``, page first: ``[token, layer, head, dim]``; in the direct functions ``[page, layer, token,
  ...]``
- ``ph``, page head: ``[page, head, token, layer, dim]``

Every copy is ordered on the current stream. ``block_quota`` limits the thread blocks of kernels
that read or write host memory. At its default, 2, PortaKV's own limits apply, which are a few
blocks more. ``num_warps_per_block`` has no effect.

Ids on the host are checked before anything is moved. Ids on a device are trusted and never read
back, as in SGLang's kernels. A table of addresses on a device is read back once, and again after
torch wrote to it. A table made in inference mode, whose writes torch does not count, is read back
for every copy. The functions cannot detect an address whose memory was freed; SGLang's cannot
either.

Raises:
    LayoutError: tensors and sizes that do not fit.
    SlotError: bad ids.
    Unsupported: a table has to be read while a graph is captured.
    IntegrationError: arguments of another type, or lists of ids of unequal lengths. It is a
        RuntimeError, as in SGLang's kernels.
"""

from __future__ import annotations

import os

import torch

from portakv import BlockTransfer, Index, KVView, copy_rows, copy_runs
from portakv.errors import LayoutError, SlotError
from portakv.host import small
from portakv.integrations import IntegrationError
from portakv.integrations import kvcacheio_pools as pools
from portakv.integrations.arguments import check_ids, described, typed

_is_hip = torch.version.hip is not None
_WARPS = 16 if _is_hip else 32
_QUOTA = 2  # the default of SGLang's functions


@typed
def transfer_kv_per_layer(
    src_k: torch.Tensor,
    dst_k: torch.Tensor,
    src_v: torch.Tensor,
    dst_v: torch.Tensor,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    item_size: int,
    block_quota: int = 2,
    num_warps_per_block: int = _WARPS,
) -> None:
    """Copy one layer, lf to lf."""
    src, dst = (pools.rows(each, item_size, item_size) for each in ((src_k, src_v), (dst_k, dst_v)))
    copy_tokens(src, dst, src_indices, dst_indices, block_quota)


@typed
def transfer_kv_per_layer_pf_lf(
    src_k: torch.Tensor,
    dst_k: torch.Tensor,
    src_v: torch.Tensor,
    dst_v: torch.Tensor,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    layer_id: int,
    item_size: int,
    src_layout_dim: int,
    block_quota: int = 2,
    num_warps_per_block: int = _WARPS,
) -> None:
    """Copy one layer, pf to lf."""
    src = pools.rows((src_k, src_v), item_size, src_layout_dim, layer=layer_id)
    dst = pools.rows((dst_k, dst_v), item_size, item_size)
    copy_tokens(src, dst, src_indices, dst_indices, block_quota)


@typed
def transfer_kv_per_layer_ph_lf(
    src_k: torch.Tensor,
    dst_k: torch.Tensor,
    src_v: torch.Tensor,
    dst_v: torch.Tensor,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    layer_id: int,
    item_size: int,
    src_layout_dim: int,
    page_size: int,
    head_num: int,
    block_quota: int = 2,
    num_warps_per_block: int = _WARPS,
) -> None:
    """Copy one layer, ph to lf."""
    src = pools.page_head(
        (src_k, src_v), item_size, src_layout_dim, page_size, head_num, layer_id, 1
    )
    dst = pools.rows((dst_k, dst_v), item_size, item_size, heads=head_num)
    copy_tokens(src, dst, src_indices, dst_indices, block_quota)


@typed
def transfer_kv_all_layer(
    src_k_layers: torch.Tensor,
    dst_k_layers: torch.Tensor,
    src_v_layers: torch.Tensor,
    dst_v_layers: torch.Tensor,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    item_size: int,
    num_layers: int,
    block_quota: int = 2,
    num_warps_per_block: int = _WARPS,
) -> None:
    """Copy all layers, lf to lf. Tables of addresses name the layers of both sides."""
    src = pools.listed((src_k_layers, src_v_layers), item_size, num_layers)
    dst = pools.listed((dst_k_layers, dst_v_layers), item_size, num_layers)
    copy_tokens(src, dst, src_indices, dst_indices, block_quota)


@typed
def transfer_kv_all_layer_lf_pf(
    src_k_layers: torch.Tensor,
    dst_k: torch.Tensor,
    src_v_layers: torch.Tensor,
    dst_v: torch.Tensor,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    item_size: int,
    dst_layout_dim: int,
    num_layers: int,
    block_quota: int = 2,
    num_warps_per_block: int = _WARPS,
) -> None:
    """Copy all layers, lf to pf. Tables of addresses name the layers of the source."""
    src = pools.listed((src_k_layers, src_v_layers), item_size, num_layers)
    dst = pools.rows((dst_k, dst_v), item_size, dst_layout_dim, layers=num_layers)
    copy_tokens(src, dst, src_indices, dst_indices, block_quota)


@typed
def transfer_kv_all_layer_lf_ph(
    src_k_layers: torch.Tensor,
    dst_k: torch.Tensor,
    src_v_layers: torch.Tensor,
    dst_v: torch.Tensor,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    item_size: int,
    dst_layout_dim: int,
    num_layers: int,
    page_size: int,
    head_num: int,
    block_quota: int = 2,
    num_warps_per_block: int = _WARPS,
) -> None:
    """Copy all layers, lf to ph. Tables of addresses name the layers of the source."""
    src = pools.listed((src_k_layers, src_v_layers), item_size, num_layers, head_num)
    both = dst_k, dst_v
    dst = pools.page_head(both, item_size, dst_layout_dim, page_size, head_num, 0, num_layers)
    copy_tokens(src, dst, src_indices, dst_indices, block_quota)


@typed
def transfer_kv_per_layer_mla(
    src: torch.Tensor,
    dst: torch.Tensor,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    item_size: int,
    block_quota: int | None = None,
    num_warps_per_block: int = _WARPS,
) -> None:
    """Copy one layer of one pool, lf to lf."""
    one, other = (pools.rows((each,), item_size, item_size) for each in (src, dst))
    copy_tokens(one, other, src_indices, dst_indices, _mla_block_quota(block_quota))


@typed
def transfer_kv_per_layer_mla_pf_lf(
    src: torch.Tensor,
    dst: torch.Tensor,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    layer_id: int,
    item_size: int,
    src_layout_dim: int,
    block_quota: int | None = None,
    num_warps_per_block: int = _WARPS,
) -> None:
    """Copy one layer of one pool, pf to lf."""
    whole = pools.rows((src,), item_size, src_layout_dim, layer=layer_id)
    one = pools.rows((dst,), item_size, item_size)
    copy_tokens(whole, one, src_indices, dst_indices, _mla_block_quota(block_quota))


@typed
def transfer_kv_all_layer_mla(
    src_layers: torch.Tensor,
    dst_layers: torch.Tensor,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    item_size: int,
    num_layers: int,
    block_quota: int = 2,
    num_warps_per_block: int = _WARPS,
) -> None:
    """Copy all layers of one pool, lf to lf. A table of addresses names the layers of each side."""
    src, dst = (pools.listed((each,), item_size, num_layers) for each in (src_layers, dst_layers))
    copy_tokens(src, dst, src_indices, dst_indices, block_quota)


@typed
def transfer_kv_all_layer_mla_lf_pf(
    src_layers: torch.Tensor,
    dst: torch.Tensor,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    item_size: int,
    dst_layout_dim: int,
    num_layers: int,
    block_quota: int = 2,
    num_warps_per_block: int = _WARPS,
) -> None:
    """Copy all layers of one pool, lf to pf. A table of addresses names the source's layers."""
    lists = pools.listed((src_layers,), item_size, num_layers)
    whole = pools.rows((dst,), item_size, dst_layout_dim, layers=num_layers)
    copy_tokens(lists, whole, src_indices, dst_indices, block_quota)


@typed
def transfer_kv_direct(
    src_layers: list[torch.Tensor],
    dst_layers: list[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Copy pages of tensors ``[token, ...]`` to the tensors at the same places of another list.

    Only the first id of each page is read.
    """
    pools.check_same_number(src_layers, dst_layers)
    src, dst = (pools.tokens([[each] for each in layers]) for layers in (src_layers, dst_layers))
    copy_tokens(src, dst, pools.pages(src_indices, page_size), pools.pages(dst_indices, page_size))


@typed
def transfer_kv_per_layer_direct_pf_lf(
    src_ptrs: list[torch.Tensor],
    dst_ptrs: list[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    layer_id: int,
    page_size: int,
) -> None:
    """Copy pages of pf pools, from ``layer_id``, to tensors ``[token, ...]``.

    ``dst_ptrs`` has the layers of keys, then those of values; with one pool, its layers.
    """
    layers = pools.by_pool(dst_ptrs, src_ptrs)
    src = pools.page_first(src_ptrs, layer_id, len(layers[0]), page_size)
    dst = pools.tokens(layers)
    copy_tokens(src, dst, pools.pages(src_indices, page_size), pools.pages(dst_indices, page_size))


@typed
def transfer_kv_all_layer_direct_lf_pf(
    src_ptrs: list[torch.Tensor],
    dst_ptrs: list[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Copy pages of tensors ``[token, ...]`` to pf pools.

    ``src_ptrs`` has the layers of keys, then those of values; with one pool, its layers.
    """
    layers = pools.by_pool(src_ptrs, dst_ptrs)
    src = pools.tokens(layers)
    dst = pools.page_first(dst_ptrs, 0, len(layers[0]), page_size)
    copy_tokens(src, dst, pools.pages(src_indices, page_size), pools.pages(dst_indices, page_size))


@typed
def transfer_embedding_ranges_direct(
    src: torch.Tensor,
    dst: torch.Tensor,
    src_starts: list[int],
    dst_starts: list[int],
    lengths: list[int],
) -> None:
    """Copy ranges of rows from one tensor to another."""
    src_rows = pools.rows_of(src)
    dst_rows = pools.rows_of(dst)
    same_lengths = len(src_starts) == len(dst_starts) == len(lengths)
    if src_rows.nbytes != dst_rows.nbytes or not same_lengths:
        raise LayoutError(
            f"Expected rows of equal bytes and lists of equal lengths, got {described(src)} to "
            f"copy to {described(dst)}, with {len(src_starts)} and {len(dst_starts)} starts and "
            f"{len(lengths)} lengths. Correct the arguments."
        )
    for tensor, starts in ((src, src_starts), (dst, dst_starts)):
        for start, length in zip(starts, lengths, strict=True):
            if not 0 <= start <= start + length <= len(tensor):
                raise SlotError(
                    f"Expected ranges within rows 0 to {len(tensor) - 1} of {described(tensor)}, "
                    f"got {length} rows from row {start}. Nothing was moved. Correct the ranges."
                )

    ranges = zip(src_starts, dst_starts, lengths, strict=True)
    not_empty = [(begin, target, length) for begin, target, length in ranges if length]
    copy_runs(
        [src.data_ptr() + begin * src_rows.pitch for begin, _, _ in not_empty],
        [dst.data_ptr() + target * dst_rows.pitch for _, target, _ in not_empty],
        src_rows.nbytes,
        rows=[length for _, _, length in not_empty],
        src_pitch=src_rows.pitch,
        dst_pitch=dst_rows.pitch,
        src_device=src.device,
        dst_device=dst.device,
    )


@typed
def copy_all_layer_kv_cache_cpu(
    data_ptrs: torch.Tensor, strides: torch.Tensor, tgt_loc: torch.Tensor, src_loc: torch.Tensor
) -> None:
    """Copy rows of pools on the host to other rows of the same pools.

    All rows are read before any row is written. A pair of ids may be repeated, since SGLang pads
    its lists so. The number of rows of a pool is unknown here: no id may be past its end.

    Args:
        data_ptrs: addresses of the pools, ``[layers]``.
        strides: bytes of a row of each pool, ``[layers]``.
        tgt_loc: ids of the rows to write.
        src_loc: ids of the rows to read.

    Raises:
        SlotError: a negative id, lists of unequal lengths, or a row with several sources.
    """
    written, read = pools.moves(data_ptrs, strides, tgt_loc, src_loc)
    row_bytes = strides.long()[:, None]
    bases = data_ptrs.long()[:, None]
    src = (bases + read * row_bytes).flatten()
    dst = (bases + written * row_bytes).flatten()
    sizes = row_bytes.expand(-1, len(read)).flatten()

    # A copy reads and writes rows in no order. A row may be both, so a buffer lies between.
    buffer = torch.empty(int(sizes.sum()), dtype=torch.uint8, device="cpu")
    between = sizes.cumsum(0) - sizes + buffer.data_ptr()
    copy_runs(src, between, sizes, src_device="cpu", dst_device="cpu").synchronize()
    copy_runs(between, dst, sizes, src_device="cpu", dst_device="cpu").synchronize()


@typed
def get_device_accessible_ptr(tensor: torch.Tensor, device_index: int) -> int:
    """Return the address at which kernels reach a tensor's memory."""
    if tensor.is_cpu and _is_hip:
        raise LayoutError(
            f"Expected a tensor on a device, got host memory, whose address for kernels of device "
            f"{device_index} differs from the host's under ROCm. Pass a tensor on the device."
        )
    return tensor.data_ptr()


@typed
def copy_to_gpu_no_ce(input: torch.Tensor, output: torch.Tensor) -> None:
    """Copy a small tensor of any size from the host to a device, without a copy engine."""
    small.to_device(input, out=output)


def _mla_block_quota(requested: int | None) -> int:
    """Return ``requested``, or SGLang's default if it is None."""
    default = 16 if _is_hip else _QUOTA
    if requested is not None:
        return requested
    try:
        return int(os.environ.get("SGLANG_HICACHE_BLOCK_QUOTA", default))
    except ValueError:
        return default


def copy_tokens(
    src: KVView,
    dst: KVView,
    src_ids: Index | torch.Tensor,
    dst_ids: Index | torch.Tensor,
    limit: int | None = None,
) -> BlockTransfer:
    """Copy tokens.

    Args:
        src: the view to read.
        dst: the view to write.
        src_ids: tokens to read. Ids on a device are trusted.
        dst_ids: tokens to write, as many.
        limit: the most thread blocks; None or `_QUOTA`: PortaKV's own limit.

    Raises:
        IntegrationError: lists of ids of unequal lengths.
        SlotError: bad ids on the host.
    """
    src_index = src_ids if isinstance(src_ids, Index) else pools.index(src_ids)
    dst_index = dst_ids if isinstance(dst_ids, Index) else pools.index(dst_ids)
    if src_index.length != dst_index.length:
        raise IntegrationError(
            f"Ids of both sides must have the same length, got {src_index.length} tokens to read "
            f"and {dst_index.length} to write. Pass one id for each token."
        )
    check_ids(src_index, src_index.length or 0, src, written=False)
    check_ids(dst_index, dst_index.length or 0, dst, written=True)
    if src.device == dst.device or limit == _QUOTA:
        limit = None
    return copy_rows(src, dst, src_index, dst_index, max_thread_blocks=limit)
