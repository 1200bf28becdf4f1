# SPDX-License-Identifier: Apache-2.0
"""Two strided tensors of one shape as rows at a pitch: what a 2-D memcpy understands."""

from __future__ import annotations

from typing import NamedTuple

import torch

#: The largest pitch that CUDA takes (``CU_DEVICE_ATTRIBUTE_MAX_PITCH``, 2 GiB - 1 everywhere).
MAX_PITCH = 2**31 - 1


class Pitched(NamedTuple):
    """Rows of ``width`` bytes; the pitches are bytes from the start of a row to the next one's."""

    width: int
    height: int
    src_pitch: int
    dst_pitch: int


class Loop(NamedTuple):
    """A dimension: its extent and bytes from one index to the next, in either tensor."""

    extent: int
    src: int
    dst: int


def loops_of(dst: torch.Tensor, src: torch.Tensor) -> tuple[int, list[Loop]]:
    """The longest run of bytes that is contiguous in both, and the loops round it, innermost first.

    The destination has no element twice, and both have the same shape and element size.
    """
    size = dst.element_size()
    strides = zip(dst.shape, src.stride(), dst.stride(), strict=True)
    dims = [Loop(extent, size * s, size * d) for extent, s, d in strides if extent > 1]
    run, loops = size, list[Loop]()
    for dim in sorted(dims, key=lambda each: each.dst):
        last = loops[-1] if loops else None
        if last is None and dim.src == dim.dst == run:
            run *= dim.extent
        elif last and (dim.src, dim.dst) == (last.extent * last.src, last.extent * last.dst):
            loops[-1] = last._replace(extent=last.extent * dim.extent)
        else:
            loops.append(dim)
    return run, loops


def pitched(dst: torch.Tensor, src: torch.Tensor) -> Pitched | str:
    """The rows of a copy, or why it has none, as a phrase.

    A copy that is one contiguous run on both sides has a single row.
    """
    run, loops = loops_of(dst, src)
    if not loops:
        return Pitched(run, 1, run, run)
    if len(loops) > 1:
        return f"its strides take {len(loops)} loops round a run of {run} bytes, a 2-D memcpy one"
    (loop,) = loops
    if not run <= loop.src <= MAX_PITCH or loop.dst > MAX_PITCH:
        return (
            f"its rows of {run} bytes lie {loop.src} and {loop.dst} bytes apart, and a 2-D memcpy "
            f"takes {run} to {MAX_PITCH}"
        )
    return Pitched(run, loop.extent, loop.src, loop.dst)
