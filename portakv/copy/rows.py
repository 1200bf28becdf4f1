# SPDX-License-Identifier: Apache-2.0
"""`copy_rows` and `copy_blocks`: copy rows between two views, by their slots or by whole blocks."""

from __future__ import annotations

from operator import is_

import torch

from portakv.arguments import shown
from portakv.copy.handle import BlockTransfer
from portakv.copy.inside import copied
from portakv.copy.options import NAMES, USUAL, USUAL_VALUES, Check, CopyOptions, options_from
from portakv.copy.request import whole
from portakv.copy.submit import submit
from portakv.errors import LayoutError, SlotError
from portakv.interconnect.strategy import Overlap
from portakv.plan.move import Move
from portakv.runtime.transfer import LateErrors
from portakv.view.index import CONSECUTIVE, Ids, Index, index_of
from portakv.view.view import KVView


def copy_rows(
    src: KVView,
    dst: KVView,
    src_index: Ids | None = None,
    dst_index: Ids | None = None,
    *,
    count: int | None = None,
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
    """Copy rows between views.

    Everything is issued before this returns, ordered on a stream. With ``cancellable`` or
    ``max_gbps`` a thread issues the copy in slices instead, after the present work of the current
    stream. No stream orders slices: `Transfer.wait` blocks the host.

    A ``detached`` copy begins after the same work, and no stream waits for its end unless
    `Transfer.wait` makes one wait. The next transfer then need not wait for the last bytes of this
    one, which keeps the link busy next to a model that leaves few gaps. Two detached copies are not
    ordered either: until the end the caller must not write what is read, nor use what is written.

    Args:
        src, dst: views of equal extents and of equal widths in bytes, of any layouts. Both on one
            device, one on it and one on the host, or on two devices of one type; then the
            destination's device reads the source.
        src_index, dst_index: an `Index`, or ids as a slot mapping (step 1); None: consecutive
            tokens.
        count: tokens to move; None: those that the indices cover.
        options: how to copy, made once for many calls. None: the other keywords; see `CopyOptions`.

    Raises:
        LayoutError: the views cannot hold each other's rows, or the destination cannot be written.
        SlotError: a bad index on the host, or sides that cover different numbers of tokens. The
            transfer raises bad device ids; slices refuse those before they begin.
        DeviceMismatch: a stream of another device, or devices of two types.
        InvalidTerms: an option with a value that it cannot have; options and other keywords.
        BackendUnavailable: no backend executes it; ``trace`` has the decisions.
        Unsupported: terms that cannot be kept; slices, or a detached or strict copy, inside graph
            capture.
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
    if options.whole:
        made = copied(src, dst, src_index, dst_index, False, count, options)
        if made is not None:
            return made
    move = move_of(src, dst, src_index, dst_index, count)
    return submit(move, options)


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
            of them with ``step=block_size``, which is read once for all of its uses.
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
    if options.whole and skip == 0 and type(skip) is int:
        made = copied(src, dst, src_blocks, dst_blocks, True, count, options)
        if made is not None:
            return made
    src_index = block_index(src, src_blocks, "src")
    dst_index = block_index(dst, dst_blocks, "dst")
    if skip or type(skip) is not int:
        first, after = skip if isinstance(skip, tuple) and len(skip) == 2 else (skip, skip)
        src_index = _after(src, src_index, first, "source")
        dst_index = _after(dst, dst_index, after, "destination")
    move = move_of(src, dst, src_index, dst_index, count)
    return submit(move, options)


def options_of(options: CopyOptions | None, *keywords: object) -> CopyOptions:
    """Return the options of a call that takes ``options`` or all keywords, these in the order of
    `CopyOptions`; raise as `options_from`."""
    # Most keywords are the usual objects themselves.
    if all(map(is_, keywords, USUAL_VALUES)):
        if options is None:
            return USUAL
        if type(options) is CopyOptions:
            return options
    each = zip(NAMES, keywords, USUAL_VALUES, strict=True)
    return options_from(options, {name: value for name, value, usual in each if value is not usual})


def _after(view: KVView, index: Index, skip: object, side: str) -> Index:
    """Return the index of one side after the tokens to leave out; raise `SlotError` if the side has
    fewer."""
    tokens = whole("skip", skip, "tokens to pass over: a whole number of at least 0, or two", 0)
    length = max(view.slots - index.offset if index.length is None else index.length, 0)
    if tokens > length:
        raise SlotError(
            f"Expected skip to be at most {length}, the tokens of the {side}, got {tokens}. Pass a "
            f"smaller number."
        )
    return index.shifted(tokens)


def block_index(view: KVView, blocks: Ids | None, side: str) -> Index:
    """Return the index of blocks of a view, or of consecutive tokens if ``blocks`` is None.

    Raises:
        LayoutError: another object than a view, or ids for a view that is not paged.
        SlotError: an index with a step that is not the block size.
    """
    if not isinstance(view, KVView):
        raise not_a_view(side, view)
    if blocks is None:
        return CONSECUTIVE
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


def move_of(
    src: KVView, dst: KVView, src_index: Ids | None, dst_index: Ids | None, count: object
) -> Move:
    """Return the copy that a caller requests. ``count`` None: the tokens that the indices cover.

    Raises:
        LayoutError: one side is not a view.
        SlotError: a bad count, or sides that cover different numbers of tokens.
    """
    if not isinstance(src, KVView):
        raise not_a_view("src", src)
    if not isinstance(dst, KVView):
        raise not_a_view("dst", dst)
    src_of = index_of(src_index)
    dst_of = index_of(dst_index)
    if count is None:
        tokens = _covered(src, dst, src_of, dst_of)
    else:
        tokens = whole("count", count, "a whole number of at least 0", 0)
    src_of.check_length(tokens, src.slots, "source")
    dst_of.check_length(tokens, dst.slots, "destination")
    return Move(src, dst, src_of, dst_of, tokens)


def _covered(src: KVView, dst: KVView, src_index: Index, dst_index: Index) -> int:
    """Return the tokens that both indices cover; raise `SlotError` if they differ."""
    src_tokens = src_index.length
    dst_tokens = dst_index.length
    if src_tokens is None and dst_tokens is None:
        src_tokens = src.slots - src_index.offset
        dst_tokens = dst.slots - dst_index.offset
    tokens = dst_tokens if src_tokens is None else src_tokens
    assert tokens is not None
    if dst_tokens not in (None, tokens):
        raise SlotError(
            f"Expected equally many tokens on both sides, got a source that covers {tokens} and a "
            f"destination of {dst_tokens}. Make them equal, or pass count."
        )
    if tokens < 0:
        raise SlotError(
            f"Expected an index that begins before its end, got one that begins {-tokens} tokens "
            f"after it. Lower its offset."
        )
    return tokens


def not_a_view(name: str, value: object) -> LayoutError:
    """Return the error for an argument of a copy that is not a view."""
    return LayoutError(
        f"Expected {name} to be a view, got {shown(value)}. Read tensors through a layout: "
        f"KVView(tensors, layout)."
    )
