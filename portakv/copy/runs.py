# SPDX-License-Identifier: Apache-2.0
"""`copy_runs`: copy runs of bytes from addresses to addresses, for callers that have no tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from portakv.arguments import kind_of
from portakv.copy.call import Passed
from portakv.copy.handle import BlockTransfer
from portakv.copy.options import CopyOptions, options_from
from portakv.copy.request import whole
from portakv.copy.rows import move_of
from portakv.copy.submit import submit
from portakv.errors import LayoutError, PortaKVError, SlotError
from portakv.plan.plan import Move, check_disjoint
from portakv.view.bound import address_of
from portakv.view.index import Index
from portakv.view.view import KVView

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
