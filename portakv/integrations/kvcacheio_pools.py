# SPDX-License-Identifier: Apache-2.0
"""How `kvcacheio` reads the pools of SGLang: views over bytes at addresses.

A view holds no memory, as upstream's kernels hold none, and is kept under all that it rests on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

from portakv import Index, KVView
from portakv.errors import LayoutError, SlotError
from portakv.integrations.arguments import told
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import capturing, refuse_capture

Tensors = Sequence[torch.Tensor]
_IDS = torch.int32, torch.int64
_views: Bounded[tuple[Any, ...], KVView] = Bounded("views of kvcacheio", 1024)
#: Tables of a device that were read: a weak reference, the version, the addresses, and where that
#: memory is.
_tables: Bounded[int, tuple[Any, int, tuple[int, ...], torch.device]]
_tables = Bounded("tables of kvcacheio", 64)


def pages(ids: torch.Tensor, page_size: int) -> Index:
    """Ids of tokens, a page behind the other, as ids of pages."""
    if page_size < 1 or ids.numel() % page_size or ids.dim() != 1 or ids.dtype not in _IDS:
        raise SlotError(
            f"Ids were given by {told(ids)} for pages of {page_size} tokens; expected int32 or "
            f"int64 in one dimension, a multiple of the page size. Pass the ids of whole pages."
        )
    firsts = ids[::page_size]
    if ids.is_cpu and bool((firsts % page_size).any()):  # pages that begin anywhere
        return Index.of((firsts[:, None] + torch.arange(page_size, device="cpu")).flatten())
    return index(firsts // page_size, page_size)


def index(ids: torch.Tensor, step: int = 1) -> Index:
    """Ids of one call; those on a device are trusted."""
    return Index.of(ids, step) if ids.is_cpu else Index(ids, step, trusted=True)


def _kept(make: Callable[..., KVView], pools: Tensors, *asked: Any) -> KVView:
    """The view of pools that ``make`` makes as is ``asked``; found again by where they lie, and
    by what a view rests on."""
    where = [
        (x.data_ptr(), x.shape, x.stride(), x.dtype, x.is_pinned() if x.is_cpu else x.device)
        for x in pools
    ]
    return _views.get_or_make((make, asked, *where), lambda: make(pools, *asked))


def _view(
    addresses: Sequence[Sequence[int]],
    layout: str,
    shape: Sequence[int],
    strides: Sequence[int] | None,
    device: torch.device,
    pinned: bool | None,
) -> KVView:
    """Bytes at addresses, which are one list for each pool: of its layers, or one address."""
    whole = layout.startswith("kv |")
    return KVView.at(
        [each[0] for each in addresses] if whole else addresses,
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
    """Contiguous pools as tokens ``pitch`` bytes apart: ``layers``, or if 0 the one ``layer``."""
    return _kept(_rows, pools, item, pitch, layer, layers, heads)


def _rows(pools: Tensors, item: int, pitch: int, layer: int, layers: int, heads: int) -> KVView:
    tokens = _count(pools, pitch, item, layer + max(layers, 1), heads)
    width = item // heads
    if not layers:
        shape: tuple[int, ...] = tokens, heads, width
        one = pitch, width, 1
        return _in_pools(pools, "kv | token head dim", shape, one, layer * item)
    shape = tokens, layers, heads, width
    return _in_pools(pools, "kv | token layer head dim", shape, (pitch, item, width, 1))


def page_head(
    pools: Tensors, item: int, pitch: int, page_size: int, heads: int, layer: int, layers: int
) -> KVView:
    """Contiguous pools of pages ``[head, token, layer, dim]``, from ``layer`` on ``layers``."""
    return _kept(_page_head, pools, item, pitch, page_size, heads, layer, layers)


def _page_head(
    pools: Tensors, item: int, pitch: int, page_size: int, heads: int, layer: int, layers: int
) -> KVView:
    pages = _count(pools, pitch * page_size, item, 1, heads)
    width = item // heads
    row = pitch // heads
    if (layer + layers) * width > row or layer < 0 or pitch % heads:
        raise _unfit(pools, f"layers {layer} to {layer + layers - 1}", pitch, item, heads)
    shape = pages, heads, page_size, layers, width
    strides = pitch * page_size, row * page_size, row, width, 1
    return _in_pools(pools, "kv | block head token layer dim", shape, strides, layer * width)


def listed(tables: Tensors, item: int, layers: int, heads: int = 1) -> KVView:
    """Tokens behind the first ``layers`` addresses of each table; nobody knows how many."""
    read = [_addresses(table) for table in tables]
    most = min(len(found) for found, _ in read)
    if item < 1 or heads < 1 or item % heads or not 0 < layers <= most:
        raise _unfit(tables, f"{layers} layers", item, item, heads)
    home = read[0][1]
    if any(other != home for _, other in read):
        raise LayoutError(
            f"Tables of memory on {home} and on {read[1][1]} were given for one side of a copy; "
            f"expected both in one place. Copy keys and values by themselves."
        )
    pinned = True if home.type == "cpu" and not tables[0].is_cpu else None
    shape = -1, heads, item // heads
    lists = tuple(found[:layers] for found, _ in read)
    given = lists, "kv layer | token head dim", shape, None, home, pinned
    if tables[0].is_cpu:  # what is pinned there may change without a word
        return _view(*given)
    return _views.get_or_make(given, lambda: _view(*given))


def tokens(pools: Sequence[Tensors]) -> KVView:
    """Tensors ``[token, ...]``, alike, of each pool one for each layer."""
    return _kept(_tokens, [each for layers in pools for each in layers], len(pools))


def _tokens(layers: Tensors, pools: int) -> KVView:
    first = layers[0]
    many = len(layers) // pools
    row, pitch = row_bytes(first)
    for each in layers:
        _alike(first, each)
    at = [each.data_ptr() for each in layers]
    addresses = [at[pool * many : (pool + 1) * many] for pool in range(pools)]
    shape = (len(first), row)
    strides = (pitch, 1)
    return _view(addresses, "kv layer | token dim", shape, strides, first.device, _pinned(layers))


def page_first(pools: Tensors, layer: int, layers: int, page_size: int) -> KVView:
    """Pools ``[page, layer, token, ...]``, alike, from ``layer`` on ``layers``."""
    return _kept(_page_first, pools, layer, layers, page_size)


def _page_first(pools: Tensors, layer: int, layers: int, page_size: int) -> KVView:
    first = pools[0]
    if (
        first.dim() < 3
        or first.shape[2] != page_size
        or not 0 <= layer <= layer + layers <= first.shape[1]
    ):
        raise LayoutError(
            f"Layers {layer} to {layer + layers - 1} in pages of {page_size} tokens were asked of "
            f"{told(first)}; expected [page, layer, token, ...]. Pass a pool in that order."
        )
    for each in pools:
        _alike(first, each)
    row, pitch = row_bytes(first[0, 0])
    wide = first.element_size()
    shape = first.shape[0], layers, page_size, row
    strides = first.stride(0) * wide, first.stride(1) * wide, pitch, 1
    return _in_pools(pools, "kv | block layer token dim", shape, strides, layer * strides[1])


def _in_pools(
    pools: Tensors, layout: str, shape: Sequence[int], strides: Sequence[int], offset: int = 0
) -> KVView:
    """Bytes of pools that are alike, one address for each, ``offset`` bytes behind its begin."""
    addresses = [[each.data_ptr() + offset] for each in pools]
    return _view(addresses, layout, shape, strides, pools[0].device, _pinned(pools))


def _pinned(pools: Tensors) -> bool | None:
    return all(each.is_pinned() for each in pools) if pools[0].is_cpu else None


def _addresses(table: torch.Tensor) -> tuple[tuple[int, ...], torch.device]:
    """The addresses of a table, and where that memory is. One on a device is read once, and again
    if it was written since; one whose writes torch does not count is read each time."""
    # What numpy writes on the host is not counted, and inference tensors have no version.
    version = None if table.is_cpu or table.is_inference() else table._version
    known = None if version is None else _tables.get(id(table))
    if known is None or known[0]() is not table or known[1] != version:
        if table.dtype not in (torch.int64, torch.uint64) or table.dim() != 1:
            raise LayoutError(
                f"Layers were given by {told(table)}; expected addresses in a uint64 or int64 "
                f"tensor of one dimension."
            )
        if not table.is_cpu and capturing(table.device):
            raise refuse_capture(
                "Reading a table of addresses",
                "the host has to read them first; make the same call once before the capture, with "
                "a table that was not made in inference mode",
            )
        found = tuple(address % 2**64 for address in table.tolist())
        home = table.device
        if found and not table.is_cpu:
            # A driver knows host memory that kernels reach as pinned.
            one = KVView.at(
                found[:1], "layer | token dim", shape=(1, 1), dtype=torch.uint8, device="cpu"
            )
            home = torch.device("cpu") if one.form.place == "pinned" else home
        if version is None:
            return found, home
        known = _tables[id(table)] = weakref.ref(table), version, found, home
    return known[2], known[3]


def _count(pools: Tensors, unit: int, item: int, layers: int, heads: int) -> int:
    """How many units of bytes contiguous pools hold, each with ``layers`` items at least."""
    first = pools[0]
    for each in pools[1:]:
        _alike(first, each)
    if not first.is_contiguous() or unit < 1 or first.nbytes % unit:
        raise _unfit(pools, "units", unit, item, heads)
    if item < 1 or heads < 1 or item % heads or layers < 1 or layers * item > unit:
        raise _unfit(pools, f"{layers} layers", unit, item, heads)
    return first.nbytes // unit


def row_bytes(tensor: torch.Tensor) -> tuple[int, int]:
    """Bytes of a row of a tensor ``[row, ...]``, and from each row to the next."""
    if not (tensor.dim() and tensor[:1].is_contiguous()):
        raise LayoutError(
            f"Rows were asked of {told(tensor)}; expected the dimensions behind the first to be "
            f"contiguous together. Pass such a tensor."
        )
    wide = tensor.element_size()
    return prod(tensor.shape[1:]) * wide, tensor.stride(0) * wide


def by_pool(layers: Tensors, pools: Tensors) -> list[Tensors]:
    """The layers of each pool, which lie one behind the other in a list."""
    each, rest = divmod(len(layers), len(pools) or 1)
    if len(pools) not in (1, 2) or rest or not each:
        raise LayoutError(
            f"{len(layers)} layers were given for {len(pools)} pools; expected one pool or two, "
            f"and the layers of the first before those of the second."
        )
    return [layers[at * each : (at + 1) * each] for at in range(len(pools))]


def same_number(src: Tensors, dst: Tensors) -> None:
    if len(src) != len(dst) or not len(src):
        raise LayoutError(
            f"{len(src)} tensors were given to be copied to {len(dst)}; expected one for each, and "
            f"at least one."
        )


def moves(
    addresses: torch.Tensor, strides: torch.Tensor, into: torch.Tensor, out_of: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of rows that are written, and of those they are read from: each pair once, without rows
    that stay. Raises unless every pool has its stride, and ids go by pairs, none below 0."""
    if addresses.shape != strides.shape or addresses.dim() != 1 or bool((strides < 1).any()):
        raise LayoutError(
            f"Pools were given by {told(addresses)} and {told(strides)}; expected one address and "
            f"the bytes of one row for each. Pass two tensors of one dimension and one length."
        )
    if into.shape != out_of.shape or any(
        not each.is_cpu or each.dim() != 1 or each.dtype not in _IDS or bool((each < 0).any())
        for each in (into, out_of)
    ):
        raise SlotError(
            f"Ids of rows were given by {told(into)} and {told(out_of)}; expected int32 or int64 "
            f"on the host, of one dimension and one length, 0 or more each; nothing was moved. "
            f"Correct the ids."
        )
    pairs = torch.stack((into.long(), out_of.long())).unique(dim=1)
    twice = pairs[0, 1:][pairs[0, 1:] == pairs[0, :-1]]
    if len(twice):
        raise SlotError(
            f"Row {twice[0]} was asked to be written from several rows; expected one source for "
            f"each row; nothing was moved. Correct the ids."
        )
    written, read = pairs[:, pairs[0] != pairs[1]]
    return written, read


def _alike(first: torch.Tensor, each: torch.Tensor) -> None:
    facts = [(x.shape, x.stride(), x.element_size(), x.device) for x in (first, each)]
    if facts[0] != facts[1]:
        raise LayoutError(
            f"{told(first)} and {told(each)} were given for one copy; expected tensors of one "
            f"shape, with equal strides. Copy them one by one."
        )


def _unfit(pools: Tensors, asked: str, unit: int, item: int, heads: int) -> LayoutError:
    return LayoutError(
        f"{asked.capitalize()} of {item} bytes in {heads} heads, {unit} bytes apart, were asked of "
        f"{told(pools[0])}; expected contiguous tensors that hold them. Pass sizes in bytes."
    )
