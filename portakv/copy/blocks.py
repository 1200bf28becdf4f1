# SPDX-License-Identifier: Apache-2.0
"""`copy_blocks`: copies of whole blocks by their ids."""

from __future__ import annotations

import torch

from portakv.copy.copy import Check, Ids, source_of, whole
from portakv.copy.handle import BlockTransfer
from portakv.copy.rows import issued
from portakv.errors import LayoutError, SlotError
from portakv.interconnect.strategy import Overlap
from portakv.runtime.transfer import LateErrors
from portakv.view import Index, KVView


def copy_blocks(
    src: KVView,
    dst: KVView,
    src_blocks: Ids | None,
    dst_blocks: Ids | None,
    *,
    count: int | None = None,
    skip: int | tuple[int, int] = 0,
    backend: str | None = None,
    stream: torch.Stream | None = None,
    by_layer: bool = False,
    overlap: Overlap = "compute",
    max_thread_blocks: int | None = None,
    max_gbps: float | None = None,
    cancellable: bool = False,
    detached: bool = False,
    reinterpret: bool = False,
    check: Check = "usual",
    late: LateErrors | None = None,
) -> BlockTransfer:
    """Copy whole blocks by their ids; block sizes may differ, the numbers of tokens may not.

    It is `copy_rows` under ids of blocks; arguments that are not named here are those.

    Args:
        src, dst: paged views, or chunks if that side's blocks are None (consecutive tokens).
        src_blocks, dst_blocks: block ids, int32 or int64, negative = skipped; or an `Index` of
            them with ``step=block_size``, which is validated once however often it is used.
        count: tokens to move, so that the last blocks may be moved in part; by default all that
            are left.
        skip: tokens that are passed over where the lists begin, so that the first blocks may be
            moved in part: as many on both sides, or a pair, of the source and of the destination.

    Raises:
        LayoutError: ids for a view that is not paged.
        SlotError: a ``skip`` that is no whole number, or a pair of them, of at least 0.
        PortaKVError: what `copy_rows` raises.
    """
    source = source_of(src, dst, reinterpret)
    mine = _block_index(src, src_blocks, "src")
    theirs = _block_index(dst, dst_blocks, "dst")
    if skip or type(skip) is not int:
        first, behind = skip if isinstance(skip, tuple) and len(skip) == 2 else (skip, skip)
        mine = mine.shifted(_tokens(first))
        theirs = theirs.shifted(_tokens(behind))
    return issued(
        source,
        dst,
        mine,
        theirs,
        count,
        backend,
        stream,
        by_layer,
        overlap,
        max_thread_blocks,
        max_gbps,
        cancellable,
        detached,
        check,
        late,
    )


def _tokens(skip: object) -> int:
    return whole("skip", skip, "tokens to pass over: a whole number of at least 0, or two", 0)


def _block_index(view: KVView, blocks: Ids | None, side: str) -> Index:
    if blocks is None:
        return Index.of(None)
    size = view.form.block_size
    if not size:
        raise LayoutError(
            f"{side}_blocks was given, but {view.layout.text!r} has no `block` axis; pass None for "
            f"consecutive tokens."
        )
    if isinstance(blocks, Index):
        if blocks.step != size:
            raise SlotError(
                f"{side}_blocks is an Index with step {blocks.step}, but the view's blocks hold "
                f"{size} tokens; pass Index(ids, step={size}), or ids."
            )
        return blocks
    return Index.of(blocks, size)
