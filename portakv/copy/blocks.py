# SPDX-License-Identifier: Apache-2.0
"""`copy_blocks`: copy whole blocks by their ids."""

from __future__ import annotations

import torch

from portakv.copy.handle import BlockTransfer
from portakv.copy.options import Check, CopyOptions, options_of
from portakv.copy.request import Ids, move_of, not_views, whole
from portakv.copy.submit import submit
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
    options: CopyOptions | None = None,
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
    """Copy whole blocks by their ids, as `copy_rows` does, whose other arguments it takes.

    Block sizes may differ; the numbers of tokens may not.

    Args:
        src, dst: paged views; or chunks of consecutive tokens, if that side's blocks are None.
        src_blocks, dst_blocks: block ids, int32 or int64; negative ids are skipped. Or an `Index`
            of them with ``step=block_size``, which is checked once for all of its uses.
        count: tokens to move, so that the last blocks may be moved in part. None: all.
        skip: tokens to leave out at the beginning of both lists, or a pair of numbers.

    Raises:
        LayoutError: ids for a view that is not paged.
        SlotError: ``skip`` that is no number of tokens, or two.
        PortaKVError: as `copy_rows`.
    """
    options = options_of(
        options,
        backend,
        stream,
        by_layer,
        overlap,
        max_thread_blocks,
        max_gbps,
        cancellable,
        detached,
        reinterpret,
        check,
        late,
    )
    if not (isinstance(src, KVView) and isinstance(dst, KVView)):
        raise not_views(src, dst)
    src_index = block_index(src, src_blocks, "src")
    dst_index = block_index(dst, dst_blocks, "dst")
    if skip or type(skip) is not int:
        first, after = skip if isinstance(skip, tuple) and len(skip) == 2 else (skip, skip)
        src_index = src_index.shifted(_tokens(first))
        dst_index = dst_index.shifted(_tokens(after))
    return submit(move_of(src, dst, src_index, dst_index, count), options)


def _tokens(skip: object) -> int:
    return whole("skip", skip, "tokens to pass over: a whole number of at least 0, or two", 0)


def block_index(view: KVView, blocks: Ids | None, side: str) -> Index:
    """Return the index of blocks of a view, or of consecutive tokens if ``blocks`` is None.

    Raises:
        LayoutError: ids for a view that is not paged.
        SlotError: an index with a step that is not the block size.
    """
    if blocks is None:
        return Index.of(None)
    size = view.form.block_size
    if not size:
        raise LayoutError(
            f"Expected {side}_blocks=None for {view.layout.text!r}, which has no `block` axis, got "
            f"ids. Pass None for consecutive tokens."
        )
    if isinstance(blocks, Index):
        if blocks.step != size:
            raise SlotError(
                f"Expected {side}_blocks to be an Index with a step of {size} tokens, one block of "
                f"the view, got step {blocks.step}. Pass Index(ids, step={size}), or ids."
            )
        return blocks
    return Index.of(blocks, size)
