# SPDX-License-Identifier: Apache-2.0
"""Test bytes that name their place, canaries around them, poison for what will be written. A byte
is a hash of (seed, storage number, offset), so eight neighbours name the place that they came from,
and every bit pattern occurs, NaNs of every dtype included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

# Eight bytes that the hash yields at one place in 2**64, and that no dtype reads as 0 or 1.
CANARY = np.array([0xCA, 0x9A, 0x12, 0x79, 0xC5, 0x3E, 0xA6, 0x5D], dtype=np.uint8)
POISON_SALT = 0x0DDC0FFEEBADF00D
MARGIN = 64  # bytes of canary on each side, one cache line
_WORD = (1 << 64) - 1


def _mix(words: np.ndarray) -> np.ndarray:
    """Return the output function of splitmix64 (Steele, Lea, Flood, OOPSLA 2014) on uint64."""
    words = words * np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(words ^ (words >> np.uint64(31)))


def pattern_bytes(seed: int, storage: int, nbytes: int, start: int = 0) -> np.ndarray:
    """Return bytes ``start .. start + nbytes`` of the pattern of one storage, as uint8."""
    first = start // 8
    words = np.arange(first, (start + nbytes + 7) // 8 + 1, dtype=np.uint64)
    key = _mix(np.array([(seed * 0x1000193 + storage + 1) & _WORD], dtype=np.uint64))
    return _mix(words + key).view(np.uint8)[start - 8 * first :][:nbytes]


def poison_bytes(seed: int, storage: int, nbytes: int, start: int = 0) -> np.ndarray:
    """Return bytes as ``pattern_bytes`` does, for destinations: unlike the pattern of any
    source."""
    return pattern_bytes(seed ^ POISON_SALT, storage, nbytes, start)


def canary_bytes(nbytes: int, start: int = 0) -> np.ndarray:
    """Return bytes ``start .. start + nbytes`` of an endless run of canaries, as uint8."""
    return np.resize(np.roll(CANARY, -(start % CANARY.size)), nbytes)


@dataclass(frozen=True)
class Guarded:
    """A storage, ``whole`` (uint8), whose payload of ``nbytes`` from ``start`` on lies between
    canaries."""

    whole: torch.Tensor
    start: int
    nbytes: int

    def payload(self) -> torch.Tensor:
        """Return the payload as uint8, on the device of the storage."""
        return self.whole[self.start : self.start + self.nbytes]

    def tensor(
        self, dtype: torch.dtype, size: Sequence[int], stride: Sequence[int], offset: int = 0
    ) -> torch.Tensor:
        """Return a tensor over the payload; stride and offset count elements of ``dtype``.

        `ValueError`: the tensor leaves the payload.
        """
        view = torch.empty(0, dtype=dtype, device=self.whole.device)
        item = view.element_size()
        reach = 1 + offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        if 0 not in size and reach * item > self.nbytes:
            raise ValueError(
                f"Expected a tensor inside {self.nbytes} guarded bytes, "
                f"got {list(size)} of {dtype}."
            )
        return view.set_(
            self.whole.untyped_storage(), self.start // item + offset, list(size), list(stride)
        )

    def broken(self) -> str | None:
        """Return a sentence on the damaged canaries, or None."""
        host = self.whole.cpu().numpy()
        end = self.start + self.nbytes
        wrong = np.nonzero(host != canary_bytes(host.size))[0]
        wrong = wrong[(wrong < self.start) | (wrong >= end)]
        where = f"{wrong.size} bytes next to a payload from {self.start} to {end}"
        return (
            f"A canary was overwritten: {where}, the first at {wrong[0]}." if len(wrong) else None
        )


def guarded(
    nbytes: int,
    *,
    seed: int = 0,
    storage: int = 0,
    poison: bool = False,
    device: torch.device | str = "cpu",
) -> Guarded:
    """Allocate ``nbytes`` between canaries, filled with the pattern, or with poison: by the offset
    from the start of the storage."""
    content = canary_bytes(MARGIN + nbytes + MARGIN)
    fill = poison_bytes if poison else pattern_bytes
    content[MARGIN : MARGIN + nbytes] = fill(seed, storage, nbytes, MARGIN)
    whole = torch.empty(content.size, dtype=torch.uint8, device=device)
    whole.copy_(torch.from_numpy(content))
    return Guarded(whole, MARGIN, nbytes)
