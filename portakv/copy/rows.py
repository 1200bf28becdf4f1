# SPDX-License-Identifier: Apache-2.0
"""`copy_rows`, `copy_blocks` and `copy_runs`: copy rows between two views by slots or whole blocks,
and runs of bytes between addresses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from operator import is_
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from portakv.arguments import kind_of, shown
from portakv.copy.call import Passed
from portakv.copy.handle import BlockTransfer
from portakv.copy.inside import copied
from portakv.copy.options import NAMES, USUAL, USUAL_VALUES, Check, CopyOptions, options_from, whole
from portakv.copy.submit import submit
from portakv.errors import LayoutError, PortaKVError, SlotError
from portakv.interconnect.strategy import Overlap
from portakv.plan.plan import Move, check_disjoint
from portakv.runtime.transfer import LateErrors
from portakv.view.bound import address_of
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
    ``max_gbps`` a coroutine of the loop issues the copy in slices instead, by helpers, after the
    present work of the current stream. No stream orders slices: `Transfer.wait` blocks the host.

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


# ------------------------------------------------------------------------------------------------
# `copy_runs`: copy runs of bytes from addresses to addresses, for callers that have no tensors.

#: A number for each run, or one for all of them.
Numbers: TypeAlias = "int | Sequence[int] | npt.NDArray[Any] | torch.Tensor"
#: Each run is a separate block: rows of bytes, at a pitch.
_RUNS = "block | token dim"
_Int64 = npt.NDArray[np.int64]


def copy_runs(
    src_addresses: Numbers,
    dst_addresses: Numbers,
    sizes: Numbers,
    *,
    src_device: torch.device | str | None = None,
    dst_device: torch.device | str | None = None,
    rows: Numbers = 1,
    src_pitch: Numbers | None = None,
    dst_pitch: Numbers | None = None,
    pinned: bool | None = None,
    options: CopyOptions | None = None,
    **keywords: Any,
) -> BlockTransfer:
    """Copy runs of bytes, each from one address to another.

    Runs of one size are one copy. Each further size or pitch is a separate copy with its own plan
    and, on a device, its own kernel. On a CPU, 64 runs of 64 sizes, all seen before, took the host
    12 ms, and 64 runs of one size 2 ms. 1,024 sizes are remembered. Each call describes its runs
    anew: to copy the same addresses again, keep two views of `KVView.at` for `copy_rows`.

    If one size is refused, nothing is moved. Sizes have no order: no run may read or write what a
    run of another size writes. The caller promises the memory as `KVView.at` says.

    Args:
        src_addresses, dst_addresses: the first byte of each run: whole numbers, a numpy array, or a
            tensor of one dimension on the host. Also int64 or uint64 tensors on a device, which are
            not read back; these must be multiples of 16, and all runs of one size.
        sizes: bytes of each run, or of each of its rows.
        src_device, dst_device: where the memory is; ``cpu``: on the host. None: query the driver
            about the first run of each size, as `KVView.at` says.
        rows: the number of rows of each run, ``src_pitch`` and ``dst_pitch`` bytes apart (None:
            without gaps).
        pinned: True if host memory is pinned; None: query torch.
        options: how to copy, made once for many calls. None: the keywords, which are the options
            that `CopyOptions` describes.

    Returns:
        One handle for all; it counts runs as blocks.

    Raises:
        SlotError: lists of different lengths, or numbers that no run can have; of runs of one size,
            a byte that is both read and written, if the host can see it.
        LayoutError: values that are not addresses, or runs that write one byte twice, if the host
            can see it.
        InvalidTerms: a keyword that is not an option, such as a count; options and keywords.
        PortaKVError: as `copy_rows`.
    """
    options = options_from(options, keywords)
    ends = _ends(src_addresses), _ends(dst_addresses)
    number = len(ends[0])
    if not len(ends[1]) == number:
        raise SlotError(
            f"Expected equally many addresses on both sides, got {number} src_addresses and "
            f"{len(ends[1])} dst_addresses. Pass an address for each run on both sides."
        )
    shapes = _shapes(number, sizes, rows, src_pitch, dst_pitch)
    if not number:
        return BlockTransfer.together([])
    _check_destinations(ends[1], shapes)
    # Make all views first, so that values that are not addresses are refused before a byte moves.
    sides = [
        [
            KVView.at(
                end if which is None else end[which],
                _RUNS,
                shape=(height, size),
                strides=(pitch, 1),
                dtype=torch.uint8,
                device=device,
                pinned=pinned,
            )
            for end, pitch, device in zip(ends, pitches, (src_device, dst_device), strict=True)
        ]
        for (size, height, *pitches), which in _alike(shapes, ends)
    ]
    for view in chain.from_iterable(sides):
        view.temporary = True
    if len(sides) > 1:
        return _of_sizes(sides, options)
    src, dst = sides[0]
    return submit(move_of(src, dst, None, None, None), options)


def _of_sizes(sides: Sequence[Sequence[KVView]], options: CopyOptions) -> BlockTransfer:
    """Copy runs of several sizes: none of them if one is refused, or if an earlier copy failed."""
    late = options.late
    moved = list[BlockTransfer]()
    for src, dst in sides:
        submit(move_of(src, dst, None, None, 0), options)
        check_disjoint(Move(src, dst, Index(), Index(), src.slots))
    each = options if late is None else replace(options, late=None)
    try:
        for src, dst in sides:
            moved.append(submit(move_of(src, dst, None, None, None), each, Passed(False)))
    except BaseException:  # such as no memory on the device: no caller has a handle of the others
        issued = BlockTransfer.together(moved)
        issued.cancel()
        with suppress(PortaKVError):
            issued.synchronize()
        raise
    job = BlockTransfer.together(moved)
    if late is not None:
        late.keep(job)
    return job


def _ends(addresses: object) -> Any:
    """Return addresses as an array on the host, or as the tensor that a view has to judge."""
    if isinstance(addresses, torch.Tensor) and not (addresses.is_cpu and address_of(addresses)):
        return addresses.reshape(-1)
    return np.asarray(addresses).reshape(-1)


def _shapes(
    number: int, sizes: Numbers, rows: Numbers, src_pitch: Numbers | None, dst_pitch: Numbers | None
) -> _Int64:
    """Return size, rows and both pitches of each run, ``[runs, 4]``; of equal runs once, ``[1,
    4]``."""
    width = _each("sizes", sizes, number, 1)
    height = _each("rows", rows, number, 1)
    pitches = [
        width if pitch is None else _each(name, pitch, number, 0)
        for name, pitch in (("src_pitch", src_pitch), ("dst_pitch", dst_pitch))
    ]
    result = np.stack(np.broadcast_arrays(width, height, *pitches), 1)
    result[result[:, 1] == 1, 2:] = result[result[:, 1] == 1, :1]  # a single row has no pitch
    return result


def _each(name: str, numbers: Numbers, number: int, least: int) -> _Int64:
    """Return a number for each run, or one for all; raise `SlotError` for another count or a number
    that is too small."""
    least_text = f"a whole number of at least {least}"
    try:
        result = np.asarray(numbers)
    except (RuntimeError, TypeError, ValueError):
        raise SlotError(
            f"Expected {name} to be {least_text} for each run, or one for all, got "
            f"{kind_of(numbers)} that is not an array on the host. Pass a list of them."
        ) from None
    if result.ndim == 0 and result.dtype.kind != "b":
        return np.array([whole(name, numbers, least_text, least)])
    if (
        (number and result.dtype.kind not in "iu")
        or result.shape != (number,)
        or (result < least).any()
    ):
        raise SlotError(
            f"Expected {name} to be {least_text} for each of {number} runs, or one for all, got "
            f"{result.dtype} of shape {result.shape}. Pass a list of them."
        )
    return result.astype(np.int64)


def _check_destinations(ends: Any, shapes: _Int64) -> None:
    """Raise `LayoutError` if two rows write one byte, as far as the host knows the addresses."""
    if isinstance(ends, torch.Tensor) or ends.dtype.kind not in "iu":
        return  # only the device has them, or a view refuses them
    begin = ends.astype(np.int64)
    size, height, _, pitch = np.broadcast_to(shapes, (len(begin), 4)).T
    folded = bool((pitch < size)[height > 1].any())
    if not folded and not _overlap(begin, (height - 1) * pitch + size):
        return
    # Rows of one run may lie between those of another one.
    each = np.arange(height.sum()) - np.repeat(np.cumsum(height) - height, height)
    starts = np.repeat(begin, height) + each * np.repeat(pitch, height)
    if _overlap(starts, np.repeat(size, height)):
        raise LayoutError(
            "Expected dst_addresses of runs that share no byte, got runs that overlap. Pass each "
            "destination once."
        )


def _overlap(starts: _Int64, sizes: _Int64) -> bool:
    """Return True if two runs share a byte."""
    order = np.argsort(starts)
    first = starts[order]
    past = first + sizes[order]
    return bool((first[1:] < past[:-1]).any())


def _alike(shapes: _Int64, ends: Sequence[Any]) -> Iterator[tuple[list[int], _Int64 | None]]:
    """Return each shape that occurs, and the runs that have it (None: all of them)."""
    order = np.lexsort(shapes.T[::-1])
    ordered = shapes[order]
    which = np.split(order, np.flatnonzero((ordered[1:] != ordered[:-1]).any(axis=1)) + 1)
    if len(which) == 1:
        yield shapes[0].tolist(), None
        return
    if any(isinstance(end, torch.Tensor) for end in ends):
        raise SlotError(
            f"Got runs of {len(which)} sizes at addresses that only a device has; expected "
            f"one size for all. Pass the addresses on the host, or a call for each size."
        )
    for group in which:
        yield shapes[group[0]].tolist(), group
