# SPDX-License-Identifier: Apache-2.0
"""Keep what earlier pulls from an owner have shown: the rate of its transport, and how many blocks
did not fit into slots."""

from __future__ import annotations

from collections import deque
from math import inf
from statistics import median
from time import perf_counter
from typing import NamedTuple

#: Bytes that cross packed until the rate counts as unknown, so that the next pull measures it.
AGAIN = 8 << 30
#: A smaller or a shorter pull measures no rate: requests have a larger share of its time.
LEAST_NBYTES = 16 << 20
LEAST_SECONDS = 5e-3
#: The rate is the median of so many measured pulls.
RATES = 5
#: Of so many blocks that crossed packed, more than one in `MISFITS` did not fit: sample again.
LOOK_AT = 64
MISFITS = 8


class Start(NamedTuple):
    """The beginning of a pull that measures the rate: what had crossed before, and the time."""

    nbytes: int
    packed_nbytes: int
    at: float


class PullHistory:
    """What pulls from one owner, by one agreement on a transport, have shown.

    Several threads may call it without a lock: a count that is lost changes no row.
    """

    def __init__(self) -> None:
        self._nbytes = 0  # of all slices
        self._packed_nbytes = 0  # of packed slices
        self._measured_at = 0  # of `_packed_nbytes`, when a rate was measured last
        self._rates = deque[float](maxlen=RATES)
        self._blocks = 0  # that crossed packed since the last look at misfits
        self._misfits = 0

    @property
    def gbps(self) -> float:
        """Return the rate of raw rows, in 10^9 bytes a second; infinite if it is not known."""
        if self._packed_nbytes - self._measured_at >= AGAIN or not self._rates:
            return inf
        return median([*self._rates])

    def count(self, nbytes: int, blocks: int, misfits: int) -> None:
        """Count a slice that has crossed.

        Args:
            nbytes: its bytes in a staging buffer.
            blocks: the blocks in its slots; 0 for a raw slice.
            misfits: the blocks of these that did not fit.
        """
        self._nbytes += nbytes
        if blocks:
            self._packed_nbytes += nbytes
            self._blocks += blocks
            self._misfits += misfits

    def begin(self) -> Start | None:
        """Return the beginning of a pull; None if nothing has crossed before, since both sides then
        connect first."""
        if not self._nbytes:
            return None
        return Start(self._nbytes, self._packed_nbytes, perf_counter())

    def end(self, start: Start) -> None:
        """Add the rate of a pull whose slices have all crossed.

        Slices of other pulls count, since they share the transport. Nothing is added if some slices
        were packed meanwhile: packing may have been slower than the transport.
        """
        seconds = perf_counter() - start.at
        nbytes = self._nbytes - start.nbytes
        long_enough = seconds >= LEAST_SECONDS and nbytes >= LEAST_NBYTES
        if not long_enough or self._packed_nbytes != start.packed_nbytes:
            return
        self._rates.append(nbytes / seconds / 1e9)
        self._measured_at = self._packed_nbytes

    def needs_sample(self) -> bool:
        """Return True, once, if too many of the latest packed blocks did not fit."""
        if self._blocks < LOOK_AT:
            return False
        needs = self._misfits * MISFITS > self._blocks
        self._blocks = 0
        self._misfits = 0
        return needs
