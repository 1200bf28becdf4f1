# SPDX-License-Identifier: Apache-2.0
"""Rows in `fp8`, computed without the library: from the numbers of e4m3 and of bf16 as their
definitions list them, each found by its distance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from portakv import Index, KVView
from portakv_conformance.draw.arrangement import Keywords, Side
from portakv_conformance.judge.judging import Judge, view_of
from portakv_conformance.judge.packed import Outcome, PackedCase

#: The unsigned type of the bits of each number type.
BITS: dict[torch.dtype, type[np.unsignedinteger]] = {
    torch.bfloat16: np.uint16,
    torch.float16: np.uint16,
    torch.float32: np.uint32,
}
_NAN = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00, torch.float32: 0x7FC00000}


def _numbers_of_e4m3() -> np.ndarray:
    """Return the numbers of the codes 0 to 126: sign 0, exponent bias 7, 3 bits of mantissa."""
    numbers = []
    for code in range(127):
        exponent, mantissa = divmod(code, 8)
        power = 2.0 ** (max(exponent, 1) - 7)
        numbers.append(power * ((exponent > 0) + mantissa / 8))
    return np.array(numbers)


E4M3 = _numbers_of_e4m3()
#: All bf16 numbers from 0 to the largest, in order; a number's place is its bits.
BF16 = (np.arange(0x7F80, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)


@dataclass(frozen=True)
class Fp8Shape:
    """The sizes of a slot: tokens of a block, and values of a token."""

    tokens: int
    dim: int

    @property
    def values(self) -> int:
        """Return the values of a plane."""
        return self.tokens * self.dim

    @property
    def slot_bytes(self) -> int:
        """Return the bytes of a slot: a byte a value, two a token, in whole 16 bytes."""
        return int(np.ceil((self.values + 2 * self.tokens) / 16)) * 16


def nearest(numbers: np.ndarray, listed: np.ndarray) -> np.ndarray:
    """Return the places of the listed numbers that are nearest, of two equally near the even
    place."""
    above = np.searchsorted(listed, numbers).clip(1, len(listed) - 1)
    below = above - 1
    up = listed[above] - numbers
    down = numbers - listed[below]
    even = np.where(above % 2 == 0, above, below)
    return np.where(up < down, above, np.where(down < up, below, even))


def numbers_of(bits: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Return the numbers that bits stand for, float64."""
    if dtype is torch.bfloat16:
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    kind = np.float16 if dtype is torch.float16 else np.float32
    return bits.view(kind).astype(np.float64)


def fp8_slot(bits: np.ndarray, shape: Fp8Shape, dtype: torch.dtype) -> np.ndarray:
    """Return the slot of one plane, from the bits of its values in order."""
    slot = np.zeros(shape.slot_bytes, dtype=np.uint8)
    with np.errstate(invalid="ignore"):
        values = numbers_of(bits, dtype).reshape(shape.tokens, shape.dim)
    for token, row in enumerate(values):
        finite = np.isfinite(row)
        size = np.abs(np.where(finite, row, 0.0))
        size[size < 2.0**-126] = 0.0
        least = max(np.float32(size.max()) / np.float32(448), np.float32(2.0**-117))
        scale = int(np.searchsorted(BF16, float(least)))
        quotients = size.astype(np.float32) / np.float32(BF16[scale])
        codes = nearest(np.minimum(quotients.astype(np.float64), 448), E4M3)
        codes = codes + 128 * np.signbit(row)
        codes[~finite] = 127
        slot[token * shape.dim : (token + 1) * shape.dim] = codes
        at = shape.values + 2 * token
        slot[at] = scale % 256
        slot[at + 1] = scale // 256
    return slot


def fp8_values(slot: np.ndarray, shape: Fp8Shape, dtype: torch.dtype) -> np.ndarray:
    """Return the bits of the values of a plane in a slot."""
    codes = slot[: shape.values].astype(np.int64).reshape(shape.tokens, shape.dim)
    low, high = slot[shape.values : shape.values + 2 * shape.tokens].reshape(-1, 2).T
    scales = BF16[low + high.astype(np.int64) * 256]
    sizes = E4M3[np.minimum(codes % 128, 126)] * scales[:, None]
    negative = codes > 127
    nan = codes % 128 == 127
    if dtype is torch.bfloat16:
        bits = nearest(np.minimum(sizes, BF16[-1]), BF16) + 0x8000 * negative
    else:
        kind = np.dtype(np.float16 if dtype is torch.float16 else np.float32)
        made = np.minimum(sizes, float(np.finfo(kind).max)).astype(kind)
        bits = np.where(negative, -made, made).view(BITS[dtype]).astype(np.int64)
    return np.where(nan, _NAN[dtype], bits).astype(BITS[dtype]).reshape(-1)


@dataclass
class Fp8Case(PackedCase):
    """A copy of blocks between a raw side and a side in `fp8`; ``slots`` are `Fp8Shape`."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the number type of the raw side."""
        return next(tensor.dtype for tensor in _flat(self.raw.tensors))

    def packed_view(self, side: Side) -> KVView:
        dims = [shape.values // self.block_size for shape in self.slots]
        extents: Keywords = {"kv": len(dims), "dim": dims, "block_size": self.block_size}
        extents |= {"layers": side.layers, "heads": side.heads}
        return KVView(side.tensors, self.layout, encoding="fp8", **extents)

    def why_declined(self, judge: Judge) -> str | None:
        """Return the reason by which the backend declines the copy of the rows or of the slots, to
        or from dense memory; or None."""
        raw = view_of(self.raw)
        slots = self.packed_view(self.packed).as_slots()
        size = self.block_size
        sides = (
            (raw, self.raw_blocks, size, self.dtype, [x.dim for x in self.slots]),
            (slots, self.packed_blocks, 1, torch.uint8, [x.slot_bytes for x in self.slots]),
        )
        for view, blocks, step, dtype, dims in sides:
            index = Index() if blocks is None else Index(blocks, step=step)
            tensors = [
                torch.zeros(
                    (self.count, view.layers, view.heads, step, dim),
                    dtype=dtype,
                    device=view.device,
                )
                for dim in dims
            ]
            layout = "kv | block layer head token dim"
            dense = KVView(tensors, layout, kv=view.kv, block_size=step, dim=dims)
            why = judge.why_declined(view, dense, index, Index())
            why = why or judge.why_declined(dense, view, Index(), index)
            if why is not None:
                return why
        return None

    def slot_of(self, values: np.ndarray, kv: int) -> np.ndarray:
        return fp8_slot(values, self.slots[kv], self.dtype)

    def moved(self, outcome: Outcome, plane: np.ndarray, slot: np.ndarray, kv: int) -> bool:
        shape = self.slots[kv]
        if self.packs:
            values = outcome.source.read(plane).reshape(-1).view(BITS[self.dtype])
            outcome.after.write(slot, fp8_slot(values, shape, self.dtype).reshape(slot.shape))
        else:
            read = fp8_values(outcome.source.read(slot).reshape(-1), shape, self.dtype)
            outcome.after.write(plane, read.view(np.uint8).reshape(plane.shape))
        return True


def _flat(tensors: object) -> list[torch.Tensor]:
    """Return the tensors in nested containers."""
    if isinstance(tensors, torch.Tensor):
        return [tensors]
    inner = tensors.values() if isinstance(tensors, dict) else tensors
    return [tensor for each in inner for tensor in _flat(each)]  # type: ignore[attr-defined]
