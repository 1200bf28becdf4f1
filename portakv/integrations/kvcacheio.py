# SPDX-License-Identifier: Apache-2.0
"""The names, arguments and defaults of ``sgl_kernel.kvcacheio`` (sglang-kernel 0.4.4 to 0.4.10),
for every device that PortaKV serves, and ``copy_to_gpu_no_ce`` of ``sgl_kernel.elementwise``.

    sys.modules["sgl_kernel.kvcacheio"] = portakv.integrations.kvcacheio  # before SGLang

Sizes named ``item_size`` and ``*_layout_dim`` are bytes, and ids are tokens: int32 or int64, on the
host or on a device. Pools are named by their order:

- ``lf``, layer first: ``[layer][token, head, dim]``
- ``pf``, page first: ``[token, layer, head, dim]``; of the direct functions ``[page, layer, token,
  ...]``
- ``ph``, page head: ``[page, head, token, layer, dim]``

Every copy is ordered on the current stream. ``block_quota`` limits the thread blocks of kernels
that read or write host memory; at its default, 2, PortaKV's own limits hold, which are a few blocks
more. ``num_warps_per_block`` is taken and not used.

Ids on the host are checked before anything is moved. Those on a device are trusted, as they are
upstream: nothing is read back. A table of addresses on a device is read back once, and again if
torch wrote it since; one that is an inference tensor, whose writes torch does not count, for every
copy. Pointers that were freed cannot be told from others, as upstream.

Errors are PortaKV's: `LayoutError` for tensors and sizes that do not fit, `SlotError` for bad ids,
`Unsupported` for a table that is to be read inside graph capture, and `IntegrationError`, a
RuntimeError as upstream's, for arguments of another type and lists of ids of unequal lengths.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from portakv import BlockTransfer, Index, KVView, copy_rows, copy_runs
from portakv.errors import LayoutError, SlotError
from portakv.host import small
from portakv.integrations import IntegrationError
from portakv.integrations import kvcacheio_pools as pools
from portakv.integrations.arguments import check_ids, told, typed

_is_hip = torch.version.hip is not None
_WARPS = 16 if _is_hip else 32
_QUOTA = 2  # upstream's default


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
    """One layer, lf to lf."""
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
    """One layer, pf to lf."""
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
    """One layer, ph to lf."""
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
    """All layers, lf to lf, each side by tables of addresses."""
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
    """All layers, lf by tables of addresses to pf."""
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
    """All layers, lf by tables of addresses to ph."""
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
    """One layer of one pool, lf to lf."""
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
    """One layer of one pool, pf to lf."""
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
    """All layers of one pool, lf to lf, each side by a table of addresses."""
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
    """All layers of one pool, lf by a table of addresses to pf."""
    listed = pools.listed((src_layers,), item_size, num_layers)
    whole = pools.rows((dst,), item_size, dst_layout_dim, layers=num_layers)
    copy_tokens(listed, whole, src_indices, dst_indices, block_quota)


@typed
def transfer_kv_direct(
    src_layers: list[torch.Tensor],
    dst_layers: list[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Pages of tensors ``[token, ...]``, each to the tensor at its place in the other list. Of the
    ids the first of each page counts."""
    pools.same_number(src_layers, dst_layers)
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
    """Pages from pf, from ``layer_id`` on, to tensors ``[token, ...]``: those of keys, then those
    of values, or with one pool its layers."""
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
    """Pages from tensors ``[token, ...]``, those of keys, then those of values, to pf."""
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
    """Ranges of rows from one tensor to another."""
    (size, src_pitch) = pools.row_bytes(src)
    (wanted, dst_pitch) = pools.row_bytes(dst)
    if size != wanted or not len(src_starts) == len(dst_starts) == len(lengths):
        raise LayoutError(
            f"Ranges were asked from {told(src)} to {told(dst)}, with "
            f"{len(src_starts)} and {len(dst_starts)} starts and {len(lengths)} lengths; expected "
            f"rows of equal bytes, and lists of equal lengths."
        )
    for tensor, starts in ((src, src_starts), (dst, dst_starts)):
        for start, length in zip(starts, lengths, strict=True):
            if not 0 <= start <= start + length <= len(tensor):
                raise SlotError(
                    f"{length} rows from {start} on were asked of {told(tensor)}, which has "
                    f"rows 0 to {len(tensor) - 1}; nothing was moved. Correct the ranges."
                )
    ranges = [each for each in zip(src_starts, dst_starts, lengths, strict=True) if each[2]]
    copy_runs(
        [src.data_ptr() + first * src_pitch for first, _, _ in ranges],
        [dst.data_ptr() + first * dst_pitch for _, first, _ in ranges],
        size,
        rows=[length for _, _, length in ranges],
        src_pitch=src_pitch,
        dst_pitch=dst_pitch,
        src_device=src.device,
        dst_device=dst.device,
    )


@typed
def copy_all_layer_kv_cache_cpu(
    data_ptrs: torch.Tensor, strides: torch.Tensor, tgt_loc: torch.Tensor, src_loc: torch.Tensor
) -> None:
    """Rows of pools on the host, ``[layers]`` addresses and bytes of a row, to others of the same
    pools. All are read before any is written, and a pair of ids may stand there again, as SGLang
    pads. How many rows a pool has is not handed over: no id may lie past its end.

    Raises:
        SlotError: a negative id, lists of unequal lengths, a row that two others are written to.
    """
    written, read = pools.moves(data_ptrs, strides, tgt_loc, src_loc)
    rows = strides.long()[:, None]
    src, dst = ((data_ptrs.long()[:, None] + at * rows).flatten() for at in (read, written))
    sizes = rows.expand(-1, len(read)).flatten()
    ends = sizes.cumsum(0)
    # Rows that one copy reads and writes have no order, so that they are held in between.
    between = torch.empty(int(sizes.sum()), dtype=torch.uint8, device="cpu")
    held = ends - sizes + between.data_ptr()
    for these, those in ((src, held), (held, dst)):
        copy_runs(these, those, sizes, src_device="cpu", dst_device="cpu").synchronize()


@typed
def get_device_accessible_ptr(tensor: torch.Tensor, device_index: int) -> int:
    """The address by which kernels reach a tensor's memory."""
    if tensor.is_cpu and _is_hip:
        raise LayoutError(
            f"The address of host memory for kernels of device {device_index} was asked for, which "
            f"differs from the host's under ROCm; expected memory of the device. Pass tensors."
        )
    return tensor.data_ptr()


@typed
def copy_to_gpu_no_ce(input: torch.Tensor, output: torch.Tensor) -> None:
    """A few numbers of the host to a device, without a copy engine; any size."""
    small.to_device(input, out=output)


def _mla_block_quota(asked: int | None) -> int:
    """What upstream takes if nothing is asked."""
    default = 16 if _is_hip else 2
    if asked is not None:
        return asked
    try:
        return int(os.environ.get("SGLANG_HICACHE_BLOCK_QUOTA", default))
    except ValueError:
        return default


def copy_tokens(
    src: KVView, dst: KVView, src_ids: Any, dst_ids: Any, limit: int | None = None
) -> BlockTransfer:
    """Copy tokens; ids on a device are trusted. ``limit``: of thread blocks; `_QUOTA` is none."""
    mine, theirs = (x if type(x) is Index else pools.index(x) for x in (src_ids, dst_ids))
    if mine.length != theirs.length:
        raise IntegrationError(
            f"Ids of {mine.length} tokens to read and of {theirs.length} to write were given; both "
            f"must have the same length. Pass one for each token."
        )
    check_ids(mine, mine.length or 0, src, written=False)
    check_ids(theirs, theirs.length or 0, dst, written=True)
    if src.device == dst.device or limit == _QUOTA:
        limit = None
    return copy_rows(src, dst, mine, theirs, max_thread_blocks=limit)
