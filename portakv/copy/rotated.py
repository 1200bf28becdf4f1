# SPDX-License-Identifier: Apache-2.0
"""`rotate_blocks`: copy blocks, with their keys rotated to other positions."""

from __future__ import annotations

from time import perf_counter

import torch

from portakv import arguments
from portakv.copy.handle import BlockTransfer
from portakv.copy.options import CopyOptions, options_from
from portakv.copy.rotation import copy_rotated
from portakv.copy.rows import block_index, move_of
from portakv.copy.submit import submit
from portakv.layout.encodings import Rope
from portakv.view.index import Ids
from portakv.view.view import KVView

#: The options that a copy with a rotation takes.
OPTIONS = ("backend", "stream", "overlap", "max_thread_blocks", "check", "late")


def rotate_blocks(
    src: KVView,
    dst: KVView,
    src_blocks: Ids | None,
    dst_blocks: Ids | None,
    rope: Rope,
    *,
    count: int | None = None,
    options: CopyOptions | None = None,
    backend: str | None = None,
    stream: torch.Stream | None = None,
) -> BlockTransfer:
    """Copy whole blocks by their ids, as `copy_blocks` does, with keys moved by a position shift.

    Keys are rotated in float32, and rounded to their number type. All other rows, and values of a
    head from ``rope.rotary_dim`` on, are copied bit by bit unless a side has a lossy encoding.

    The transfer raises `PackOverflow` as that of `copy_blocks`. The call waits until a packed
    source is unpacked, and writes no row of a block with a flagged slot.

    Args:
        src, dst, src_blocks, dst_blocks, count: as for `copy_blocks`. One side may be encoded.
        rope: the shift, and the rotary positions of the model.
        options: how to copy, with ``backend``, ``stream``, ``overlap``, ``max_thread_blocks``,
            ``check`` and ``late`` only; or the next two keywords.

    Raises:
        InvalidTerms: not a `Rope`, or another option.
        LayoutError: heads that ``rope`` does not describe, or no rows of number ``rope.kv``.
        Unsupported: two encoded sides, opaque pages, keys of another type than bfloat16, float16
            and float32, or inside graph capture.
        PortaKVError: as `copy_blocks`.
    """
    began = perf_counter()
    arguments.instance("rope", rope, Rope, "Pass Rope(shift=..., base=...).")
    options = options_from(options, {"backend": backend, "stream": stream})
    options.check_only("rotate_blocks", OPTIONS)
    src_index = block_index(src, src_blocks, "src")
    dst_index = block_index(dst, dst_blocks, "dst")
    move = move_of(src, dst, src_index, dst_index, count)
    late = options.late
    if late is not None:
        late.check(src.device if src.device.type != "cpu" else dst.device)
    made = BlockTransfer(copy_rotated(move, rope, options, submit), move, began)
    if late is not None:
        late.keep(made)
    return made
