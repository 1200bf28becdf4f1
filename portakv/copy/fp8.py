# SPDX-License-Identifier: Apache-2.0
"""Copies between raw rows and rows in `fp8`.

No backend carries out `fp8`: slices of blocks are converted in dense memory (see `dense`). Between
two sides in `fp8` slots are rows of bytes, which any copy moves (see `packed_slots`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from portakv.copy.call import Submit
from portakv.copy.dense import DenseCopy, DenseSlice
from portakv.copy.fp8_rows import decode_rows, encode_rows
from portakv.copy.handle import BlockTransfer
from portakv.copy.options import CopyOptions
from portakv.copy.packed_slots import check_whole
from portakv.errors import Unsupported
from portakv.layout.encodings import FP8
from portakv.plan.packing import Move, check_sides
from portakv.runtime.transfer import Transfer
from portakv.view import Index, KVView
from portakv.view.form import Form

#: The values of a slice, unless one block has more. The memory of a slice is at most 32 bytes for
#: each: the rows and slots, and temporary tensors.
SLICE = 8 << 20


def copy_fp8(move: Move, options: CopyOptions, began: float, submit: Submit) -> BlockTransfer:
    """Issue a copy of which one side is in `fp8` and the other side is raw.

    ``submit`` issues plain copies.

    Raises:
        Unsupported: rows that the encoding does not take, a part of a block, an option that no such
            copy keeps, or inside graph capture.
        PortaKVError: as `copy_rows`.
    """
    for name in ("max_gbps", "cancellable", "detached"):
        if getattr(options, name) not in (None, False):
            raise Unsupported(
                f"A copy to or from {FP8!r} with {name}",
                f"it moves whole blocks in one piece; leave {name} out",
            )
    src = move.src.form
    dst = move.dst.form
    raw, encoded = (dst, src) if src.encoding else (src, dst)
    check_whole(move, encoded.block_size)
    check_sides(raw, encoded, "decode" if src.encoding else "encode")
    # All layers are checked before the first is written.
    dense = DenseCopy(move, options, submit, encoded.block_size, repr(FP8))
    if not options.by_layer:
        return BlockTransfer(_converted(dense, dense.move), move, began)
    layers = [_converted(dense, dense.move.layer(at)) for at in range(move.src.layers)]
    return BlockTransfer(Transfer.join(layers), move, began, tuple(layers))


def _converted(dense: DenseCopy, move: Move) -> Transfer:
    """Issue a checked copy, or a layer of it, that encodes or decodes on one device."""
    encodes = not move.src.form.encoding
    raw = move.src.form if encodes else move.dst.form
    encoded = move.dst.form if encodes else move.src.form
    unit = encoded.block_size
    convert = encode_rows if encodes else decode_rows

    def slices() -> Iterator[DenseSlice]:
        values = sum(plane.values for plane in encoded.encoding)
        most = SLICE // (encoded.layers * encoded.heads * values)
        blocks = max(1, min(most, move.count // unit))
        forms = move.src.form, move.dst.form
        near, far = (_dense_blocks(form, raw, unit, blocks, dense.device) for form in forms)
        for first in range(0, move.count, blocks * unit):
            part = move.part(first, min(blocks * unit, move.count - first))
            fetched = dense.copy(Move(part.src, near, part.src_index, Index(), part.count))
            chosen = slice(0, part.count // unit)
            pairs = zip(encoded.encoding, near.tensors, far.tensors, strict=True)
            for plane, source, target in pairs:
                convert(source[chosen].flatten(0, 2), target[chosen].flatten(0, 2), plane)
            left = dense.copy(Move(far, part.dst, Index(), part.dst_index, part.count))
            yield DenseSlice(first, fetched, [left])

    return dense.issue(slices, move)


def _dense_blocks(form: Form, raw: Form, unit: int, blocks: int, device: torch.device) -> KVView:
    """Return dense memory for blocks of ``unit`` tokens as one side has them, a tensor for each kv.

    ``raw``: the form of the raw side.
    """
    shapes: list[tuple[int, ...]] = [(width,) for width in form.widths]
    dtypes = [torch.uint8] * form.kv
    numbers = [getattr(torch, dtype) for dtype in raw.dtypes]
    dims = [width // dtype.itemsize for width, dtype in zip(raw.widths, numbers, strict=True)]
    if not form.encoding:
        shapes = [(unit, dim) for dim in dims]
        dtypes = numbers
    tensors = [
        torch.empty((blocks, form.layers, form.heads, *shape), dtype=dtype, device=device)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    inner = "page" if form.encoding else "token dim"
    return KVView(
        tensors,
        f"kv | block layer head {inner}",
        kv=form.kv,
        block_size=unit,
        dim=dims,
        encoding=FP8 if form.encoding else None,
    )
