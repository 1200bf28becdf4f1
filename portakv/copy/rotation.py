# SPDX-License-Identifier: Apache-2.0
"""`rotate_blocks`: copy blocks, with their keys rotated to other positions in dense memory of the
device.

Either plain copy may unpack or pack, so that rotated rows come from and go to encoded blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd
from time import perf_counter

import torch

from portakv import arguments
from portakv.copy.encodings import DenseCopy, DenseSlice, check_whole, is_packed, unfit_blocks
from portakv.copy.handle import BlockTransfer
from portakv.copy.options import CopyOptions, options_from
from portakv.copy.rows import block_index, move_of
from portakv.copy.submit import submit
from portakv.errors import LayoutError, Unsupported
from portakv.layout.encodings import FP8_DTYPES, Rope
from portakv.plan.plan import Move
from portakv.runtime.transfer import Transfer
from portakv.view.form import Form
from portakv.view.index import Ids, Index
from portakv.view.view import KVView, dense_blocks

#: The options that a copy with a rotation takes.
OPTIONS = ("backend", "stream", "overlap", "max_thread_blocks", "check", "late")
#: Bytes of a slice of keys in all layers and heads, unless one block has more.
SLICE = 16 << 20


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
    made = BlockTransfer.of_move(_copy_rotated(move, rope, options), move, began)
    if late is not None:
        late.keep(made)
    return made


def _copy_rotated(move: Move, rope: Rope, options: CopyOptions) -> Transfer:
    """Issue a copy whose keys are rotated; raise as `rotate_blocks`."""
    raw = _raw_form(move)
    _check_keys(raw, rope)
    sizes = [form.block_size for form in (move.src.form, move.dst.form) if form.encoding]
    unit = sizes[0] if sizes else gcd(move.count, *filter(None, move.steps))
    dense = DenseCopy(move, options, submit, unit, "the rotation of keys")

    unpacks = is_packed(move.src.form)

    def slices() -> Iterator[DenseSlice]:
        move = dense.move
        step = max(1, *sizes, *move.steps)
        most = SLICE // (raw.layers * raw.heads * max(raw.widths) * step)
        tokens = min(move.count, max(1, most) * step)
        tensors = [one[0] for one in dense_blocks(raw, tokens, 1, dense.device).tensors]
        # The cosine and the sine of each pair.
        turns = rope.turns(tensors[rope.kv].shape[3])
        angles = torch.tensor(turns, dtype=torch.float64, device="cpu").to(torch.float32)
        cosines, sines = angles.to(dense.device)
        for first in range(0, move.count, tokens):
            part = move.part(first, min(tokens, move.count - first))
            rows = [tensor[:, :, : part.count] for tensor in tensors]
            dims = [tensor.shape[3] for tensor in rows]
            stage = KVView(rows, "kv | layer head token dim", kv=len(rows), dim=dims)
            fetched = dense.copy(Move(part.src, stage, part.src_index, Index(), part.count))
            # Dense memory holds no rows of a flagged block, so that no part of it may be copied.
            unfit = unfit_blocks(fetched) if unpacks else []
            rotate_keys(rows[rope.kv], cosines, sines, rope.style)
            whole = Move(stage, part.dst, Index(), part.dst_index, part.count)
            left = [dense.copy(some) for some in _without(whole, unfit, unit)]
            yield DenseSlice(first, fetched, left)

    return dense.issue(slices, dense.move)


def rotate_keys(keys: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, style: str) -> None:
    """Rotate keys in place, in float32.

    Args:
        keys: ``[..., dim]`` of a floating type.
        cosines, sines: float32 ``[pairs]``; the first ``2 * pairs`` values are rotated.
        style: one of `ROPE_STYLES` of `portakv.layout.encodings`.
    """
    pairs = len(cosines)
    rotary = keys[..., : 2 * pairs]
    if style == "neox":
        first = rotary[..., :pairs]
        second = rotary[..., pairs:]
    else:
        first = rotary[..., ::2]
        second = rotary[..., 1::2]
    one = first.to(torch.float32)
    other = second.to(torch.float32)
    # Rows of float32 are not copied above, so that both results are made before either is written.
    turned = one * cosines - other * sines
    second.copy_(other * cosines + one * sines)
    first.copy_(turned)


def _without(move: Move, blocks: Sequence[int], unit: int) -> Iterator[Move]:
    """Yield the parts of a copy between some blocks of ``unit`` tokens, by their sorted places."""
    start = 0
    for block in blocks:
        past = block * unit
        if past > start:
            yield move.part(start, past - start)
        start = past + unit
    if move.count > start:
        yield move.part(start, move.count - start)


def _raw_form(move: Move) -> Form:
    """Return the form of a raw side, whose number types the rows have."""
    src = move.src.form
    dst = move.dst.form
    if src.encoding and dst.encoding:
        why = "slots are copied as they are; unpack to a raw view by one of two copies"
        raise Unsupported("A rotation between two encoded sides", why)
    for form in (src, dst):
        if form.opaque and not form.encoding:
            raise Unsupported("A rotation of opaque pages", "they have no rows with a number type")
        if form.encoding:
            check_whole(move, form.block_size)
    return dst if src.encoding else src


def _check_keys(raw: Form, rope: Rope) -> None:
    """Raise unless a form has keys that can be rotated."""
    if rope.kv >= raw.kv:
        raise LayoutError(
            f"Expected kv below {raw.kv}, as many rows as a token has, got {rope.kv}. Pass the "
            f"number of the rows that are keys."
        )
    dtype = raw.dtypes[rope.kv] if raw.dtypes else "uint8"
    if dtype not in FP8_DTYPES:
        why = f"it takes {', '.join(FP8_DTYPES)} only"
        raise Unsupported(f"A rotation of keys of {dtype}", why)
    rope.rotary(raw.widths[rope.kv] // int(getattr(torch, dtype).itemsize))
