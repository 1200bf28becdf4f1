# SPDX-License-Identifier: Apache-2.0
"""Views over the pools of SGLang that `kvcacheio` copies: bytes at raw addresses.

A view holds no memory, as SGLang's kernels hold none. Each view is cached under everything that it
depends on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from math import prod
from typing import Concatenate, NamedTuple, ParamSpec

import torch

from portakv import Index, KVView
from portakv.errors import LayoutError, SlotError
from portakv.integrations.arguments import described
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import capturing, refuse_capture

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
    pools: Tensors,
    *args: _Terms.args,
    **named: _Terms.kwargs,
) -> KVView:
    """Return ``make(pools, *args)``, cached by the addresses, shapes, strides and memory of the
    pools."""
    memory = [
        (x.data_ptr(), x.shape, x.stride(), x.dtype, x.is_pinned() if x.is_cpu else x.device)
        for x in pools
    ]
    return _views.get_or_make((make, args, *memory), lambda: make(pools, *args, **named))


def _view(
    addresses: Sequence[Sequence[int]],
    layout: str,
    shape: Sequence[int],
    strides: Sequence[int] | None,
    device: torch.device,
    pinned: bool | None,
) -> KVView:
    """Return a view of bytes.

    ``addresses`` has a list for each pool: an address for each layer, or one address.
    """
    has_one_address = layout.startswith("kv |")
    return KVView.at(
        [each[0] for each in addresses] if has_one_address else addresses,
        layout,
        shape=shape,
        strides=strides,
        dtype=torch.uint8,
        device=device,
        pinned=pinned,
        kv=len(addresses),
    )


def rows(
    pools: Tensors, item: int, pitch: int, *, layer: int = 0, layers: int = 0, heads: int = 1
) -> KVView:
    """Return contiguous pools as tokens that lie ``pitch`` bytes apart.

    Args:
        pools: the pool of keys and the pool of values, or one pool.
        item: bytes of one token in one layer.
        pitch: bytes from a token to the next.
        layer: the layer to read, if ``layers`` is 0.
        layers: the number of layers, from layer 0; 0: only ``layer``.
        heads: the number of heads in an item.
    """
    return _cached(_rows, pools, item, pitch, layer, layers, heads)


def _rows(pools: Tensors, item: int, pitch: int, layer: int, layers: int, heads: int) -> KVView:
    tokens = _count(pools, pitch, item, layer + max(layers, 1), heads)
    width = item // heads
    if not layers:
        one_layer = (tokens, heads, width)
        strides = (pitch, width, 1)
        return _in_pools(pools, "kv | token head dim", one_layer, strides, layer * item)
    all_layers = (tokens, layers, heads, width)
    return _in_pools(pools, "kv | token layer head dim", all_layers, (pitch, item, width, 1))


def page_head(
    pools: Tensors, item: int, pitch: int, page_size: int, heads: int, layer: int, layers: int
) -> KVView:
    """Return ``layers`` layers, from ``layer``, of contiguous pools of pages ``[head, token, layer,
    dim]``."""
    return _cached(_page_head, pools, item, pitch, page_size, heads, layer, layers)


def _page_head(
    pools: Tensors, item: int, pitch: int, page_size: int, heads: int, layer: int, layers: int
) -> KVView:
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
    if tables[0].is_cpu:  # host memory may be pinned or unpinned later, at the same address
        return _view(lists, layout, shape, None, target, pinned)
    key = (lists, layout, shape, target, pinned)
    return _views.get_or_make(key, lambda: _view(lists, layout, shape, None, target, pinned))


def tokens(pools: Sequence[Tensors]) -> KVView:
    """Return tensors ``[token, ...]`` of one shape; each pool has a tensor for each layer."""
    return _cached(_tokens, [each for layers in pools for each in layers], len(pools))


def _tokens(layers: Tensors, pools: int) -> KVView:
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


def page_first(pools: Tensors, layer: int, layers: int, page_size: int) -> KVView:
    """Return ``layers`` layers, from ``layer``, of pools ``[page, layer, token, ...]`` of one
    shape."""
    return _cached(_page_first, pools, layer, layers, page_size)


def _page_first(pools: Tensors, layer: int, layers: int, page_size: int) -> KVView:
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
    addresses = [[each.data_ptr() + offset] for each in pools]
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


def by_pool(layers: Tensors, pools: Tensors) -> list[Tensors]:
    """Split a list that has the layers of one pool after those of the other, by pool."""
    per_pool, rest = divmod(len(layers), len(pools) or 1)
    if len(pools) not in (1, 2) or rest or not per_pool:
        raise LayoutError(
            f"Expected one pool or two, and the layers of the first pool before those of the "
            f"second, got {len(layers)} layers for {len(pools)} pools. Pass as many layers for "
            f"each pool."
        )
    return [layers[at * per_pool : (at + 1) * per_pool] for at in range(len(pools))]


def check_same_number(src: Tensors, dst: Tensors) -> None:
    """Raise `LayoutError` unless both lists have the same length, at least 1."""
    if len(src) != len(dst) or not len(src):
        raise LayoutError(
            f"Expected a destination for each source, and at least one, got {len(src)} tensors to "
            f"read and {len(dst)} to write. Pass lists of equal lengths."
        )


def moves(
    addresses: torch.Tensor, strides: torch.Tensor, into: torch.Tensor, out_of: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids of rows to write, and of the rows to read for them.

    Each pair occurs once. A row that would be copied to itself is left out.

    Raises:
        LayoutError: a pool has no stride, or a stride below 1.
        SlotError: ids have other types or lengths or are negative, or a row has several sources.
    """
    if addresses.shape != strides.shape or addresses.dim() != 1 or bool((strides < 1).any()):
        raise LayoutError(
            f"Expected an address and the bytes of a row for each pool, got {described(addresses)} "
            f"and {described(strides)}. Pass two tensors of one dimension and one length."
        )
    if into.shape != out_of.shape or any(
        not each.is_cpu or each.dim() != 1 or each.dtype not in _IDS or bool((each < 0).any())
        for each in (into, out_of)
    ):
        raise SlotError(
            f"Expected int32 or int64 ids of rows on the host, 0 or more, in one dimension and of "
            f"one length, got {described(into)} and {described(out_of)}. Nothing was moved. "
            f"Correct the ids."
        )
    pairs = torch.stack((into.long(), out_of.long())).unique(dim=1)
    twice = pairs[0, 1:][pairs[0, 1:] == pairs[0, :-1]]
    if len(twice):
        raise SlotError(
            f"Expected one source for each row, got several sources for row {twice[0]}. Nothing "
            f"was moved. Correct the ids."
        )
    written, read = pairs[:, pairs[0] != pairs[1]]
    return written, read


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
