# SPDX-License-Identifier: Apache-2.0
"""Copies between raw rows and rows in `fp8`.

No backend carries out `fp8`. A slice of blocks is gathered into dense memory of the device by a
plain copy, converted there by operations of torch, and scattered by a plain copy. So every layout,
backend and transfer strategy works on both sides. Between two sides in `fp8` slots are rows of
bytes, which any copy moves (see `packed_slots`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from portakv.copy.between import common_device
from portakv.copy.context import Context
from portakv.copy.fp8_rows import decode_rows, encode_rows
from portakv.copy.handle import BlockTransfer
from portakv.copy.options import USUAL, CopyOptions
from portakv.copy.pack_launch import check_copy, follow_current
from portakv.copy.pack_stage import stage_of
from portakv.copy.packed_slots import check_whole
from portakv.errors import Unsupported
from portakv.layout.fp8 import FP8
from portakv.plan.move import Move
from portakv.plan.packing import check_sides
from portakv.registry import STRATEGIES
from portakv.runtime.devices import inside
from portakv.runtime.transfer import Completion, Transfer
from portakv.view.form import Form
from portakv.view.index import Index
from portakv.view.view import KVView

#: The values of a slice, unless one block has more. The memory of a slice is at most 28 bytes for
#: each: the rows and slots, and temporary tensors.
SLICE = 8 << 20
#: Issue a plain copy under options.
Submit = Callable[[Move, CopyOptions], BlockTransfer]


def converts_fp8(move: Move) -> bool:
    """Return True if exactly one side of a copy is in `fp8`, and the other side is raw."""
    one, other = move.src.form.encoding, move.dst.form.encoding
    if bool(one) == bool(other):
        return False
    return bool((one or other)[0].encoding == FP8)


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
    encodes = not src.encoding
    raw, encoded = (src, dst) if encodes else (dst, src)
    check_whole(move, encoded.block_size)
    check_sides(raw, encoded, "encode" if encodes else "decode")
    if not options.by_layer:
        return BlockTransfer(_Converted(move, options, submit).issue(), move, began)
    layers = [_Converted(move.layer(at), options, submit).issue() for at in range(move.src.layers)]
    return BlockTransfer(Transfer.join(layers), move, began, tuple(layers))


class _Converted:
    """A copy that encodes or decodes on one device. The arguments are those of `copy_fp8`."""

    def __init__(self, move: Move, options: CopyOptions, submit: Submit) -> None:
        src = move.src
        dst = move.dst
        self._submit = submit
        self._options = options
        self._encodes = not src.form.encoding
        self._unit = (dst if self._encodes else src).form.block_size
        both = src.device.type != "cpu" != dst.device.type
        self._device = dst.device if both else common_device(src, dst)
        self._context = Context.of(self._device, options.stream)
        self._context.check_not_captured(f"{FP8!r} is converted in slices of temporary memory")
        # The ids are used in slices, so that bad ones are left out first.
        self._checked = check_copy(move, self._unit, self._context, options.strict)

    def issue(self) -> Transfer:
        """Issue all slices; return their transfers as one."""
        move = self._checked.move
        stream = self._context.stream
        made: list[Transfer] = []
        stages: tuple[KVView, KVView] | None = None
        if move.count:
            follow_current(stream, [move])
            # Staging memory belongs to the stream that converts.
            with inside(self._device if stream is None else stream):
                blocks = self._blocks_of_a_slice(move)
                forms = move.src.form, move.dst.form
                stages = self._stage(forms[0], blocks), self._stage(forms[1], blocks)
                for first in range(0, move.count, blocks * self._unit):
                    count = min(blocks * self._unit, move.count - first)
                    made += self._convert(move.part(first, count), *stages)
        if self._checked.error is not None:
            made.append(Transfer((Completion(error=self._checked.error),)))
        joined = Transfer.join(made)
        carried = dict.fromkeys(one.carried for one in made[:2] if one.carried[0])
        how = " and ".join(dict.fromkeys(name for name, _ in carried)) or joined.carried[0]
        rows = "; ".join(f"{name}: {reason}" for name, reason in carried)
        why = f"{FP8!r} by operations of torch on {self._device}, as no backend carries it out"
        return Transfer(joined.completions, (joined, stages), (how, f"{rows}; {why}"))

    def _blocks_of_a_slice(self, move: Move) -> int:
        encoded = move.dst.form if self._encodes else move.src.form
        planes = encoded.layers * encoded.heads
        values: int = planes * sum(plane.values for plane in encoded.encoding)
        return max(1, min(SLICE // values, move.count // self._unit))

    def _stage(self, form: Form, blocks: int) -> KVView:
        """Return dense memory for blocks in the encoding of a side."""
        move = self._checked.move
        raw = move.src.form if self._encodes else move.dst.form
        return stage_of(form, raw, self._unit, blocks, self._device)

    def _convert(self, part: Move, near: KVView, far: KVView) -> tuple[Transfer, Transfer]:
        """Issue a slice: from the source to ``near``, to ``far``, and to the destination."""
        count = part.count
        fetched = self._copy(Move(part.src, near, part.src_index, Index(), count))
        encoded = (far if self._encodes else near).form.encoding
        blocks = count // self._unit
        convert = encode_rows if self._encodes else decode_rows
        # Planes of one width are one tensor; else each kv has its tensor.
        pairs = zip(_planes_of(near, blocks), _planes_of(far, blocks), strict=True)
        for plane, (source, target) in zip(encoded, pairs, strict=False):
            convert(source, target, plane)
        return fetched, self._copy(Move(far, part.dst, Index(), part.dst_index, count))

    def _copy(self, move: Move) -> Transfer:
        """Copy rows or slots to or from dense memory, on the current stream."""
        options = self._options
        src = self._checked.move.src.device
        dst = self._checked.move.dst.device
        crosses = move.src.device != move.dst.device
        plain = USUAL
        if crosses:
            terms = {"overlap": options.overlap, "max_thread_blocks": options.max_thread_blocks}
            plain = replace(USUAL, **terms)  # type: ignore[arg-type]
        if options.backend is not None and (
            src == dst or crosses == (options.backend in STRATEGIES)
        ):
            plain = replace(plain, backend=options.backend)
        transfer = self._submit(move, plain)
        if not transfer.ordered:  # no stream orders the use of the dense memory
            transfer.synchronize()
        return transfer


def _planes_of(stage: KVView, blocks: int) -> list[torch.Tensor]:
    """Return the planes of dense memory in one dimension: one tensor, or one for each kv."""
    if isinstance(stage.tensors, torch.Tensor):
        return [stage.tensors[:blocks].flatten(0, 3)]
    return [tensor[:blocks].flatten(0, 2) for tensor in stage.tensors]
