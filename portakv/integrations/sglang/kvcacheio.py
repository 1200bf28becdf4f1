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
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import wraps
from inspect import Parameter, Signature
from math import prod
from typing import Any, Concatenate, NamedTuple, ParamSpec

import torch

from portakv import BlockTransfer, Index, KVView, copy_rows, copy_runs
from portakv.errors import LayoutError, SlotError
from portakv.host import small
from portakv.integrations import IntegrationError
from portakv.integrations.checks import check_ids, described, typed
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import capturing, refuse_capture

# ------------------------------------------------------------------------------------------------
# Views over the pools of SGLang that `kvcacheio` copies: bytes at raw addresses.

Tensors = Sequence[torch.Tensor]
_Terms = ParamSpec("_Terms")
_IDS = torch.int32, torch.int64


class _Table(NamedTuple):
    """The addresses of a table on a device, as the host read them.

    Attributes:
        tensor: the table.
        version: torch's count of writes to the table when it was read.
        addresses: the addresses.
        target: the device of the memory at the addresses.
    """

    tensor: weakref.ref[torch.Tensor]
    version: int
    addresses: tuple[int, ...]
    target: torch.device


class _Rows(NamedTuple):
    """The rows of a tensor ``[row, ...]``: bytes of a row, and bytes from a row to the next."""

    nbytes: int
    pitch: int


_views: Bounded[Hashable, KVView] = Bounded("views of kvcacheio", 1024)
_tables: Bounded[int, _Table] = Bounded("tables of kvcacheio", 64)


# --- Ids ------------------------------------------------------------------------------------------


def pages(ids: torch.Tensor, page_size: int) -> Index:
    """Return ids of pages for ids of tokens, which list the tokens page after page."""
    if page_size < 1 or ids.numel() % page_size or ids.dim() != 1 or ids.dtype not in _IDS:
        raise SlotError(
            f"Expected int32 or int64 ids in one dimension, a multiple of the page size of "
            f"{page_size} tokens, got {described(ids)}. Pass the ids of whole pages."
        )
    firsts = ids[::page_size]

    # Pages on the host may begin at any token.
    if ids.is_cpu and bool((firsts % page_size).any()):
        return Index.of((firsts[:, None] + torch.arange(page_size, device="cpu")).flatten())
    return index(firsts // page_size, page_size)


def index(ids: torch.Tensor, step: int = 1) -> Index:
    """Return the ids of one call as an index. Ids on a device are trusted."""
    return Index.of(ids, step) if ids.is_cpu else Index(ids, step, trusted=True)


# --- Views ----------------------------------------------------------------------------------------


def _cached(
    make: Callable[Concatenate[Tensors, _Terms], KVView],
) -> Callable[Concatenate[Tensors, _Terms], KVView]:
    """Return a function that keeps the views that ``make`` returns, by the addresses, shapes,
    strides and memory of the pools."""

    @wraps(make)
    def cached(pools: Tensors, /, *args: _Terms.args, **named: _Terms.kwargs) -> KVView:
        memory = [
            (x.data_ptr(), x.shape, x.stride(), x.dtype, x.is_pinned() if x.is_cpu else x.device)
            for x in pools
        ]
        key = (make, args, *named.items(), *memory)
        return _views.get_or_make(key, lambda: make(pools, *args, **named))

    return cached


def _view(
    addresses: Sequence[int] | Sequence[Sequence[int]],
    layout: str,
    shape: Sequence[int],
    strides: Sequence[int] | None,
    device: torch.device,
    pinned: bool | None,
) -> KVView:
    """Return a view of bytes.

    ``addresses`` has one for each pool, or a list with one for each of its layers.
    """
    return KVView.at(
        addresses,
        layout,
        shape=shape,
        strides=strides,
        dtype=torch.uint8,
        device=device,
        pinned=pinned,
        kv=len(addresses),
    )


@_cached
def rows(pools: Tensors, item: int, pitch: int, layer: int, layers: int, heads: int) -> KVView:
    """Return ``layers`` layers, from ``layer``, of contiguous pools of tokens.

    Args:
        pools: the pool of keys and the pool of values, or one pool.
        item: bytes of one token in one layer.
        pitch: bytes from a token to the next.
        layer, layers: the first layer, and the number of layers.
        heads: the number of heads in an item.
    """
    tokens = _count(pools, pitch, item, layer + layers, heads)
    width = item // heads
    shape = (tokens, layers, heads, width)
    strides = (pitch, item, width, 1)
    return _in_pools(pools, "kv | token layer head dim", shape, strides, layer * item)


@_cached
def page_head(
    pools: Tensors, item: int, pitch: int, page_size: int, heads: int, layer: int, layers: int
) -> KVView:
    """Return ``layers`` layers, from ``layer``, of contiguous pools of pages ``[head, token, layer,
    dim]``."""
    pages = _count(pools, pitch * page_size, item, 1, heads)
    width = item // heads
    row = pitch // heads
    if (layer + layers) * width > row or layer < 0 or pitch % heads:
        raise _unfit(pools, f"layers {layer} to {layer + layers - 1}", pitch, item, heads)
    shape = (pages, heads, page_size, layers, width)
    strides = (pitch * page_size, row * page_size, row, width, 1)
    return _in_pools(pools, "kv | block head token layer dim", shape, strides, layer * width)


def listed(tables: Tensors, item: int, layers: int, heads: int = 1) -> KVView:
    """Return tokens at the first ``layers`` addresses of each table.

    The number of tokens is unknown.
    """
    read = [_addresses(table) for table in tables]
    most = min(len(addresses) for addresses, _ in read)
    if item < 1 or heads < 1 or item % heads or not 0 < layers <= most:
        raise _unfit(tables, f"{layers} layers", item, item, heads)
    target = read[0][1]
    if any(other != target for _, other in read):
        raise LayoutError(
            f"Expected the tables of one side of a copy to name memory on one device, got memory "
            f"on {target} and on {read[1][1]}. Copy keys and values in separate calls."
        )
    pinned = True if target.type == "cpu" and not tables[0].is_cpu else None
    shape = (-1, heads, item // heads)
    lists = tuple(addresses[:layers] for addresses, _ in read)
    layout = "kv layer | token head dim"
    view = (lists, layout, shape, None, target, pinned)
    if tables[0].is_cpu:  # host memory may be pinned or unpinned later, at the same address
        return _view(*view)
    return _views.get_or_make(view, lambda: _view(*view))


@_cached
def tokens(layers: Tensors, pools: int) -> KVView:
    """Return tensors ``[token, ...]`` of one shape, the layers of one pool after those of the
    other."""
    first = layers[0]
    per_pool = len(layers) // pools
    row = rows_of(first)
    for each in layers:
        _check_alike(first, each)
    at = [each.data_ptr() for each in layers]
    addresses = [at[pool * per_pool : (pool + 1) * per_pool] for pool in range(pools)]
    shape = (len(first), row.nbytes)
    strides = (row.pitch, 1)
    return _view(addresses, "kv layer | token dim", shape, strides, first.device, _pinned(layers))


@_cached
def page_first(pools: Tensors, layer: int, layers: int, page_size: int) -> KVView:
    """Return ``layers`` layers, from ``layer``, of pools ``[page, layer, token, ...]`` of one
    shape."""
    first = pools[0]
    if (
        first.dim() < 3
        or first.shape[2] != page_size
        or not 0 <= layer <= layer + layers <= first.shape[1]
    ):
        raise LayoutError(
            f"Expected a pool [page, layer, token, ...] that has layers {layer} to "
            f"{layer + layers - 1} in pages of {page_size} tokens, got {described(first)}. Pass a "
            f"pool in that order."
        )
    for each in pools:
        _check_alike(first, each)
    row = rows_of(first[0, 0])
    wide = first.element_size()
    shape = (first.shape[0], layers, page_size, row.nbytes)
    strides = (first.stride(0) * wide, first.stride(1) * wide, row.pitch, 1)
    return _in_pools(pools, "kv | block layer token dim", shape, strides, layer * strides[1])


def _in_pools(
    pools: Tensors, layout: str, shape: Sequence[int], strides: Sequence[int], offset: int = 0
) -> KVView:
    """Return bytes of pools of one shape, each from ``offset`` bytes after its first byte."""
    addresses = [each.data_ptr() + offset for each in pools]
    return _view(addresses, layout, shape, strides, pools[0].device, _pinned(pools))


def _pinned(pools: Tensors) -> bool | None:
    return all(each.is_pinned() for each in pools) if pools[0].is_cpu else None


# --- Tables of addresses --------------------------------------------------------------------------


def _addresses(table: torch.Tensor) -> tuple[tuple[int, ...], torch.device]:
    """Return the addresses in a table, and the device of the memory at these addresses.

    A table on a device is read once, and again after torch wrote to it. A table whose writes torch
    does not count is read at every call.
    """
    # Torch counts no writes by numpy to host memory, and inference tensors have no count.
    if table.is_cpu or table.is_inference():
        return _read_table(table)
    known = _tables.get(id(table))
    if known is None or known.tensor() is not table or known.version != table._version:
        version = table._version
        addresses, target = _read_table(table)
        known = _tables[id(table)] = _Table(weakref.ref(table), version, addresses, target)
    return known.addresses, known.target


def _read_table(table: torch.Tensor) -> tuple[tuple[int, ...], torch.device]:
    """Read a table, and look up the device of the memory at its first address."""
    if table.dtype not in (torch.int64, torch.uint64) or table.dim() != 1:
        raise LayoutError(
            f"Expected addresses of layers in a uint64 or int64 tensor of one dimension, got "
            f"{described(table)}. Pass such a table."
        )
    if not table.is_cpu and capturing(table.device):
        raise refuse_capture(
            "Reading a table of addresses",
            "the host has to read the addresses first; make the same call once before the capture, "
            "with a table that was not made in inference mode",
        )
    addresses = tuple(address % 2**64 for address in table.tolist())
    if not addresses or table.is_cpu:
        return addresses, table.device

    # If the driver reports the memory as pinned, it is host memory that kernels can reach.
    one = KVView.at(
        addresses[:1], "layer | token dim", shape=(1, 1), dtype=torch.uint8, device="cpu"
    )
    is_host = one.form.place == "pinned"
    return addresses, torch.device("cpu") if is_host else table.device


# --- Checks ---------------------------------------------------------------------------------------


def _count(pools: Tensors, unit: int, item: int, layers: int, heads: int) -> int:
    """Return the number of units of ``unit`` bytes in contiguous pools.

    Each unit must have at least ``layers`` items.
    """
    first = pools[0]
    for each in pools[1:]:
        _check_alike(first, each)
    if not first.is_contiguous() or unit < 1 or first.nbytes % unit:
        raise _unfit(pools, "units", unit, item, heads)
    if item < 1 or heads < 1 or item % heads or layers < 1 or layers * item > unit:
        raise _unfit(pools, f"{layers} layers", unit, item, heads)
    return first.nbytes // unit


def rows_of(tensor: torch.Tensor) -> _Rows:
    """Return the size and the pitch, in bytes, of the rows of a tensor ``[row, ...]``."""
    if not (tensor.dim() and tensor[:1].is_contiguous()):
        raise LayoutError(
            f"Expected a tensor whose dimensions after the first are contiguous together, got "
            f"{described(tensor)}. Pass such a tensor."
        )
    wide = tensor.element_size()
    return _Rows(prod(tensor.shape[1:]) * wide, tensor.stride(0) * wide)


def layers_of_each(layers: Tensors, pools: Tensors) -> int:
    """Return the layers of each pool in a list that has those of one after those of the other."""
    per_pool, rest = divmod(len(layers), len(pools) or 1)
    if len(pools) not in (1, 2) or rest or not per_pool:
        raise LayoutError(
            f"Expected one pool or two, and the layers of the first pool before those of the "
            f"second, got {len(layers)} layers for {len(pools)} pools. Pass as many layers for "
            f"each pool."
        )
    return per_pool


def _check_alike(first: torch.Tensor, each: torch.Tensor) -> None:
    facts = [(x.shape, x.stride(), x.element_size(), x.device) for x in (first, each)]
    if facts[0] != facts[1]:
        raise LayoutError(
            f"Expected tensors of one shape with equal strides in one copy, got {described(first)} "
            f"and {described(each)}. Copy them in separate calls."
        )


def _unfit(pools: Tensors, requested: str, unit: int, item: int, heads: int) -> LayoutError:
    return LayoutError(
        f"{requested.capitalize()} of {item} bytes in {heads} heads, {unit} bytes apart, were "
        f"requested; expected contiguous tensors that hold them, got {described(pools[0])}. Pass "
        f"sizes in bytes."
    )


_is_hip = torch.version.hip is not None
_WARPS = 16 if _is_hip else 32
_QUOTA = 2  # the default of SGLang's functions


# --- Functions of kernels -------------------------------------------------------------------------


def _transfer(name: str, pools: str, sizes: str, quota: int | None = _QUOTA) -> Callable[..., None]:
    """Return one of SGLang's functions that copy tokens by kernels.

    Args:
        name: its name.
        pools: the names of its pools: a source, its destination, and so on. A table of addresses,
            whose name ends in ``_layers``, names the layers of a pool.
        sizes: the names of its sizes, which come after the ids of both sides.
        quota: the default of ``block_quota``.
    """
    made = [(pool, "torch.Tensor") for pool in (*pools.split(), "src_indices", "dst_indices")]
    made += [(size, "int") for size in sizes.split()]
    made.append(("block_quota", "int" if quota else "int | None"))
    made.append(("num_warps_per_block", "int"))
    names = [each for each, _ in made]
    defaults = {"block_quota": quota, "num_warps_per_block": _WARPS}
    signature = Signature(
        [
            Parameter(
                each,
                Parameter.POSITIONAL_OR_KEYWORD,
                default=defaults.get(each, Parameter.empty),
                annotation=kind,
            )
            for each, kind in made
        ],
        return_annotation="None",
    )
    sources = pools.split()[::2]
    destinations = pools.split()[1::2]

    def transfer(*args: Any, **named: Any) -> None:
        passed = dict(zip(names, args, strict=False)) | named
        given = defaults | passed
        if len(passed) < len(args) + len(named) or given.keys() != signature.parameters.keys():
            signature.bind(*args, **named)  # raises TypeError as Python does
        src = _side(sources, given, given.get("src_layout_dim"))
        dst = _side(destinations, given, given.get("dst_layout_dim"))
        blocks = _block_quota(given["block_quota"])
        copy_tokens(src, dst, given["src_indices"], given["dst_indices"], blocks)

    transfer.__name__ = transfer.__qualname__ = name
    transfer.__signature__ = signature  # type: ignore[attr-defined]
    return typed(transfer)


def _side(pools: Sequence[str], given: Mapping[str, Any], pitch: int | None) -> KVView:
    """Return the view of one side of a copy.

    Args:
        pools: the names of its pools.
        given: the arguments, by name.
        pitch: bytes from a token to the next, of all layers; None: a pool has one layer.
    """
    tensors = tuple(given[pool] for pool in pools)
    item = given["item_size"]
    heads = given.get("head_num", 1)
    layer = given.get("layer_id", 0)
    layers = given.get("num_layers", 1)
    if pools[0].endswith("_layers"):
        return listed(tensors, item, layers, heads)
    if pitch is None:
        return rows(tensors, item, item, 0, 1, heads)
    if "page_size" in given:
        return page_head(tensors, item, pitch, given["page_size"], heads, layer, layers)
    return rows(tensors, item, pitch, layer, layers, heads)


_PAIR = "src_k dst_k src_v dst_v"
transfer_kv_per_layer = _transfer("transfer_kv_per_layer", _PAIR, "item_size")
"""Copy one layer, lf to lf."""
transfer_kv_per_layer_pf_lf = _transfer(
    "transfer_kv_per_layer_pf_lf", _PAIR, "layer_id item_size src_layout_dim"
)
"""Copy one layer, pf to lf."""
transfer_kv_per_layer_ph_lf = _transfer(
    "transfer_kv_per_layer_ph_lf",
    _PAIR,
    "layer_id item_size src_layout_dim page_size head_num",
)
"""Copy one layer, ph to lf."""
transfer_kv_all_layer = _transfer(
    "transfer_kv_all_layer",
    "src_k_layers dst_k_layers src_v_layers dst_v_layers",
    "item_size num_layers",
)
"""Copy all layers, lf to lf. Tables of addresses name the layers of both sides."""
transfer_kv_all_layer_lf_pf = _transfer(
    "transfer_kv_all_layer_lf_pf",
    "src_k_layers dst_k src_v_layers dst_v",
    "item_size dst_layout_dim num_layers",
)
"""Copy all layers, lf to pf. Tables of addresses name the layers of the source."""
transfer_kv_all_layer_lf_ph = _transfer(
    "transfer_kv_all_layer_lf_ph",
    "src_k_layers dst_k src_v_layers dst_v",
    "item_size dst_layout_dim num_layers page_size head_num",
)
"""Copy all layers, lf to ph. Tables of addresses name the layers of the source."""
transfer_kv_per_layer_mla = _transfer("transfer_kv_per_layer_mla", "src dst", "item_size", None)
"""Copy one layer of one pool, lf to lf."""
transfer_kv_per_layer_mla_pf_lf = _transfer(
    "transfer_kv_per_layer_mla_pf_lf", "src dst", "layer_id item_size src_layout_dim", None
)
"""Copy one layer of one pool, pf to lf."""
transfer_kv_all_layer_mla = _transfer(
    "transfer_kv_all_layer_mla", "src_layers dst_layers", "item_size num_layers"
)
"""Copy all layers of one pool, lf to lf. A table of addresses names the layers of each side."""
transfer_kv_all_layer_mla_lf_pf = _transfer(
    "transfer_kv_all_layer_mla_lf_pf",
    "src_layers dst",
    "item_size dst_layout_dim num_layers",
)
"""Copy all layers of one pool, lf to pf. A table of addresses names the source's layers."""


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
    if len(src_layers) != len(dst_layers) or not len(src_layers):
        raise LayoutError(
            f"Expected a destination for each source, and at least one, got {len(src_layers)} "
            f"tensors to read and {len(dst_layers)} to write. Pass lists of equal lengths."
        )
    src, dst = (tokens(layers, len(layers)) for layers in (src_layers, dst_layers))
    copy_tokens(src, dst, src_indices, dst_indices, page_size=page_size)


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
    layers = layers_of_each(dst_ptrs, src_ptrs)
    src = page_first(src_ptrs, layer_id, layers, page_size)
    dst = tokens(dst_ptrs, len(src_ptrs))
    copy_tokens(src, dst, src_indices, dst_indices, page_size=page_size)


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
    layers = layers_of_each(src_ptrs, dst_ptrs)
    src = tokens(src_ptrs, len(dst_ptrs))
    dst = page_first(dst_ptrs, 0, layers, page_size)
    copy_tokens(src, dst, src_indices, dst_indices, page_size=page_size)


@typed
def transfer_embedding_ranges_direct(
    src: torch.Tensor,
    dst: torch.Tensor,
    src_starts: list[int],
    dst_starts: list[int],
    lengths: list[int],
) -> None:
    """Copy ranges of rows from one tensor to another."""
    src_rows = rows_of(src)
    dst_rows = rows_of(dst)
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
        LayoutError: a pool has no stride, or a stride below 1.
        SlotError: ids of other types or lengths or negative ones, or a row with several sources.
    """
    if data_ptrs.shape != strides.shape or data_ptrs.dim() != 1 or bool((strides < 1).any()):
        raise LayoutError(
            f"Expected an address and the bytes of a row for each pool, got {described(data_ptrs)} "
            f"and {described(strides)}. Pass two tensors of one dimension and one length."
        )
    if tgt_loc.shape != src_loc.shape or any(
        not each.is_cpu or each.dim() != 1 or each.dtype not in _IDS or bool((each < 0).any())
        for each in (tgt_loc, src_loc)
    ):
        raise SlotError(
            f"Expected int32 or int64 ids of rows on the host, 0 or more, in one dimension and of "
            f"one length, got {described(tgt_loc)} and {described(src_loc)}. Nothing was moved. "
            f"Correct the ids."
        )
    pairs = torch.stack((tgt_loc.long(), src_loc.long())).unique(dim=1)
    twice = pairs[0, 1:][pairs[0, 1:] == pairs[0, :-1]]
    if len(twice):
        raise SlotError(
            f"Expected one source for each row, got several sources for row {twice[0]}. Nothing "
            f"was moved. Correct the ids."
        )
    written, read = pairs[:, pairs[0] != pairs[1]]
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
    """Copy a tensor from the host to a device; up to 1 MiB needs no copy engine."""
    small.to_device(input, out=output)


def _block_quota(requested: int | None) -> int:
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
    src_ids: torch.Tensor,
    dst_ids: torch.Tensor,
    limit: int | None = None,
    page_size: int | None = None,
) -> BlockTransfer:
    """Copy tokens.

    Args:
        src: the view to read.
        dst: the view to write.
        src_ids: tokens to read. Ids on a device are trusted.
        dst_ids: tokens to write, as many.
        limit: the most thread blocks; None or `_QUOTA`: PortaKV's own limit.
        page_size: tokens of a page, if the ids list tokens page after page.

    Raises:
        IntegrationError: lists of ids of unequal lengths.
        SlotError: bad ids on the host.
    """
    src_index, dst_index = (
        index(ids) if page_size is None else pages(ids, page_size) for ids in (src_ids, dst_ids)
    )
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
