# SPDX-License-Identifier: Apache-2.0
"""Keys at other positions, computed without the library: each pair of values is a complex number
that is turned by an angle, in float64. The bits of a key must be those of a number no farther from
it than the rounding of float32 allows, rounded to the type of the key. All other bytes are exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from portakv import Index, KVView, Rope, Transfer, Unsupported, rotate_blocks
from portakv_conformance.draw.arrangement import Side
from portakv_conformance.judge.fp8 import BF16, BITS, nearest, numbers_of
from portakv_conformance.judge.judging import Judge, view_of
from portakv_conformance.judge.memory import Memory
from portakv_conformance.judge.packed import Outcome, PackedCase, Values
from portakv_conformance.judge.rows import Rows
from portakv_conformance.judge.slots import packed_slot, unpacked_values

#: Two products, their sum and a rounded cosine and sine, each within half a unit of float32.
STEPS = 4 * 2.0**-24
#: Of the angle, which float64 holds, and of results that a device may flush to zero.
ANGLE = 2.0**-40
SMALLEST = 2.0**-125


@dataclass(frozen=True)
class Turn:
    """A rotation of keys, as a model's configuration describes it.

    Attributes:
        shift: positions to move by.
        frequencies: radians a position, one for each pair of values of a head.
        neighbours: a pair is values 2i and 2i + 1; otherwise values i and i + half of the rotated
            ones.
        kv: the number of the rows that are keys.
    """

    shift: int
    frequencies: tuple[float, ...]
    neighbours: bool = False
    kv: int = 0

    @classmethod
    def of_base(cls, shift: int, base: float, rotary: int, neighbours: bool = False) -> Turn:
        """Return the rotation of a model without scaling."""
        frequencies = (base ** (-2 * pair / rotary) for pair in range(rotary // 2))
        return cls(shift, tuple(frequencies), neighbours)

    @property
    def rope(self) -> Rope:
        """Return the argument of `rotate_blocks`."""
        style = "gptj" if self.neighbours else "neox"
        return Rope(
            self.shift,
            style=style,
            rotary_dim=2 * len(self.frequencies),
            inv_freq=self.frequencies,
            kv=self.kv,
        )

    def bounds(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the least and the largest number that each value of a head ``[..., dim]`` may
        become before it is rounded, float64; values that are not rotated become themselves."""
        low = values.copy()
        high = values.copy()
        pairs = len(self.frequencies)
        for pair, frequency in enumerate(self.frequencies):
            one, other = (2 * pair, 2 * pair + 1) if self.neighbours else (pair, pair + pairs)
            angle = self.shift * frequency
            turn = complex(np.cos(angle), np.sin(angle))
            first = values[..., one]
            second = values[..., other]
            sizes = np.abs(first) + np.abs(second)
            for place, plus, minus in (
                (one, first * turn.real, second * turn.imag),
                (other, second * turn.real, -first * turn.imag),
            ):
                exact = plus - minus
                wide = STEPS * (np.abs(plus) + np.abs(minus)) + ANGLE * sizes + SMALLEST
                wide = np.where(np.isfinite(exact), wide, 0)
                low[..., place] = exact - wide
                high[..., place] = exact + wide
        return low, high


def rounded(numbers: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Return numbers rounded to the nearest of a type, ties to even, float64."""
    if dtype is torch.bfloat16:
        places = nearest(np.minimum(np.abs(numbers), BF16[-1]), BF16)
        return np.where(np.isfinite(numbers), np.sign(numbers) * BF16[places], numbers)
    kind = np.float16 if dtype is torch.float16 else np.float32
    return numbers.astype(kind).astype(np.float64)


def wrong_keys(bits: np.ndarray, source: np.ndarray, turn: Turn, dtype: torch.dtype) -> np.ndarray:
    """Return True for each value of keys that is not the source's at the other position.

    Both have the bits of the keys, ``[..., dim]``. Where the result is not a number, any NaN is
    right. The values of a head after the rotated ones have their bits unchanged.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        low, high = turn.bounds(numbers_of(source, dtype))
        actual = numbers_of(bits, dtype)
        inside = (rounded(low, dtype) <= actual) & (actual <= rounded(high, dtype))
    either = np.isnan(low) | np.isnan(high)
    right = np.where(either, np.isnan(actual), inside)
    rotated = 2 * len(turn.frequencies)
    right[..., rotated:] = bits[..., rotated:] == source[..., rotated:]
    return ~right


@dataclass
class RopeCase:
    """A copy of blocks whose keys are rotated.

    Attributes:
        src, dst: the sides: rows, or slots of ``pack`` as rows of one token each.
        blocks: the numbers of the blocks of source and destination; negative ones are skipped.
        turn: the rotation.
        tokens: tokens of a block.
        dtype: the number type of the rows.
        encoded: the case that has the packed side, which is one of both; or None.
    """

    src: Side
    dst: Side
    blocks: tuple[torch.Tensor, torch.Tensor]
    turn: Turn
    tokens: int
    dtype: torch.dtype
    encoded: PackedCase | None = None

    def views(self) -> tuple[KVView, KVView]:
        """Return the views of source and destination."""
        if self.encoded is not None:
            return self.encoded.views()
        return view_of(self.src), view_of(self.dst)

    def fill(self, values: Values) -> None:
        """Write values into all planes of the source."""
        if self.encoded is not None:
            self.encoded.fill(values)
            return
        rows = _rows(self.src)
        memory = Memory.snapshot(self.src.tensors)
        for number, (block, kv, *where) in enumerate(self._planes(rows, rows.slots // self.tokens)):
            addresses = self._addresses(rows, block, kv, *where, size=self.tokens)
            dim = addresses.shape[1] // self.dtype.itemsize
            made = values(number, self.tokens * dim)
            memory.write(addresses, made.view(np.uint8).reshape(addresses.shape))
        memory.restore(guard.whole for guard in self.src.guards)
        self.src.arrangement = None  # these bytes come from no seed

    @staticmethod
    def _planes(rows: Rows, blocks: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield block, kv, layer and head of each plane."""
        for block in range(blocks):
            for layer in range(rows.layers):
                for kv in range(rows.kv):
                    for head in range(rows.heads):
                        yield block, kv, layer, head

    @staticmethod
    def _addresses(
        rows: Rows, block: int, kv: int, layer: int, head: int, *, size: int
    ) -> np.ndarray:
        slots = np.arange(block * size, (block + 1) * size)
        return rows.row_addresses(kv, layer, slots)[:, head]

    def _size(self, side: Side) -> int:
        """Return the rows that a side has for a block."""
        encoded = self.encoded
        return 1 if encoded is not None and side is encoded.packed else self.tokens

    def _bits(self, side: Side, raw: np.ndarray, kv: int) -> np.ndarray:
        """Return the bits of a plane ``[tokens, dim]`` from the bytes that a side has for it."""
        if self._size(side) == self.tokens:
            values = np.ascontiguousarray(raw).view(BITS[self.dtype])
        else:
            assert self.encoded is not None
            unpacked = unpacked_values(raw.reshape(-1), self.encoded.slots[kv])
            assert unpacked is not None, "The slot of a plane that fits is flagged."
            values = unpacked
        return values.reshape(self.tokens, -1)

    def check(self, before: tuple[Memory, Memory]) -> None:
        """Raise `AssertionError` on the first wrong byte of either side.

        ``before``: the memory of source and destination before the copy.
        """
        source, target = before
        after = Memory.snapshot(self.dst.tensors)
        wanted = target.copy()
        src = _rows(self.src)
        dst = _rows(self.dst)
        pairs = zip(*(blocks.tolist() for blocks in self.blocks), strict=True)
        for own, other in pairs:
            if min(own, other) < 0:
                continue
            for _, kv, *where in self._planes(dst, 1):
                here = self._addresses(src, own, kv, *where, size=self._size(self.src))
                there = self._addresses(dst, other, kv, *where, size=self._size(self.dst))
                was = self._bits(self.src, source.read(here), kv)
                written = after.read(there)
                now = self._bits(self.dst, written, kv)
                self._compare(was, now, kv, (own, other, *where))
                if self._size(self.dst) == 1:
                    assert self.encoded is not None
                    slot = packed_slot(now.reshape(-1), self.encoded.slots[kv])[0]
                    written = slot.reshape(there.shape)
                wanted.write(there, written)
        outcome = Outcome(source, target, wanted, set())
        fault = _fault(outcome, self.src, self.dst)
        assert not fault, f"{fault} The case was {self!r}."

    def _compare(self, was: np.ndarray, now: np.ndarray, kv: int, where: tuple[int, ...]) -> None:
        wrong = now != was
        if kv == self.turn.kv:
            wrong = wrong_keys(now, was, self.turn, self.dtype)
        if wrong.any():
            token, value = np.argwhere(wrong)[0]
            own, other, layer, head = where
            raise AssertionError(
                f"The destination holds 0x{int(now[token, value]):x} as value {value} of token "
                f"{token} in block {other}, layer {layer}, kv {kv}, head {head}, from "
                f"0x{int(was[token, value]):x} in block {own}. {int(wrong.sum())} values of this "
                f"plane are wrong. The case was {self!r}."
            )


def _rows(side: Side) -> Rows:
    return Rows(side.tensors, side.layout, side.extents)


def _fault(outcome: Outcome, src: Side, dst: Side) -> str:
    """Return a sentence on the first wrong byte of either side; empty if all are right."""
    for name, memory, side in (
        ("destination", outcome.after, dst),
        ("source", outcome.source, src),
    ):
        for number, changed in memory.changes(Memory.snapshot(side.tensors)):
            where = int(changed[0]) - memory.regions[number].base
            return (
                f"The {name} changed at byte {where} of storage {number}, where no row of the copy "
                f"lies or where a slot has other bytes. {changed.size} bytes are wrong."
            )
    return ""


def start_rotated(judge: Judge, case: RopeCase) -> Transfer:
    """Begin a case as a user gets it, by the judged backend."""
    src, dst = case.views()
    return rotate_blocks(src, dst, *case.blocks, case.turn.rope, backend=judge.subject.name)


def judge_rotated(judge: Judge, case: RopeCase) -> bool:
    """Judge every byte of a copy that rotates keys.

    Returns False if the backend declines a copy of the rows, as it may; no byte may have changed
    then.
    """
    before = (Memory.snapshot(case.src.tensors), Memory.snapshot(case.dst.tensors))
    refused: Unsupported | None = None
    try:
        start_rotated(judge, case).synchronize()
    except Unsupported as error:
        refused = error
    judge.facility.synchronize()
    if refused is None:
        case.check(before)
        judge.examples += 1
        return True
    outcome = Outcome(*before, before[1], set())
    fault = _fault(outcome, case.src, case.dst)
    assert not fault, f"The copy was refused as Unsupported, but: {fault} {refused}"
    why = _why_declined(judge, case)
    assert why is not None, (
        f"The backend's check and prepare take the plans of this copy, and the copy raised "
        f"Unsupported: {refused}"
    )
    judge.declined.append(why)
    return False


def _why_declined(judge: Judge, case: RopeCase) -> str | None:
    """Return the reason by which the backend declines the copy of a side to or from dense memory,
    or None."""
    if case.encoded is not None:
        return case.encoded.why_declined(judge)
    for view, blocks in zip(case.views(), case.blocks, strict=True):
        tokens = case.tokens * len(blocks)
        dims = [width // case.dtype.itemsize for width in view.widths]
        rows = [
            torch.zeros(
                (view.layers, view.heads, tokens, dim), dtype=case.dtype, device=view.device
            )
            for dim in dims
        ]
        dense = KVView(rows, "kv | layer head token dim", kv=view.kv, dim=dims)
        index = Index(blocks, step=case.tokens)
        why = judge.why_declined(view, dense, index, Index())
        why = why or judge.why_declined(dense, view, Index(), index)
        if why is not None:
            return why
    return None
