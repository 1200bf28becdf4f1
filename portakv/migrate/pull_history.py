# SPDX-License-Identifier: Apache-2.0
"""Keep figures of earlier pulls from an owner: the rate of its transport, and how many blocks did
not fit into slots."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import inf
from time import perf_counter
from typing import NamedTuple, TypeAlias

from portakv.copy.choose_encoding import is_out_of_date
from portakv.migrate.messages import Box
from portakv.runtime.bounded import Bounded

#: Bytes that cross packed until the rate counts as unknown, so that the next pull measures it.
AGAIN = 8 << 30
#: A smaller or a shorter pull measures no rate: requests have a larger share of its time.
LEAST_NBYTES = 16 << 20
LEAST_SECONDS = 5e-3
#: The rate is the highest of so many measured pulls: all that disturbs a pull, such as work that
#: was queued before it, makes the transport seem slower. If it seems too fast, rows cross raw.
RATES = 5
#: The most windows whose misfits are counted, as many as owners keep samples of.
MOST_KEPT = 1024

#: The group of rows, and their layers and heads: the rows that one sample of an owner is for.
Window: TypeAlias = tuple[int, Box]


class Start(NamedTuple):
    """The beginning of a pull that measures the rate: what had crossed before, and the time."""

    nbytes: int
    other_nbytes: int
    at: float


@dataclass
class _Packed:
    """The blocks that crossed packed since the last look at misfits, and how many did not fit."""

    blocks: int = 0
    misfits: int = 0


class PullHistory:
    """The figures of pulls from one owner, by one agreement on a transport.

    Several threads may call it without a lock: a count that is lost changes no row.
    """

    def __init__(self) -> None:
        self._nbytes = 0  # of all slices
        self._packed_nbytes = 0  # of packed slices
        self._other_nbytes = 0  # of slices that measure no rate: packed, or of a limited pull
        self._measured_at = 0  # of `_packed_nbytes`, when a rate was measured last
        self._rates = deque[float](maxlen=RATES)
        self._packed: Bounded[Window, _Packed] = Bounded("misfits of pulls", MOST_KEPT)

    @property
    def gbps(self) -> float:
        """Return the rate of raw rows, in 10^9 bytes a second; infinite if it is not known."""
        if self._packed_nbytes - self._measured_at >= AGAIN or not self._rates:
            return inf
        return max([*self._rates])

    def count(self, nbytes: int, limited: bool = False) -> None:
        """Count a raw slice of so many bytes that has crossed; ``limited``: its pull has a limited
        rate."""
        self._nbytes += nbytes
        if limited:
            self._other_nbytes += nbytes

    def count_packed(self, nbytes: int, window: Window, blocks: int, misfits: int) -> None:
        """Count a packed slice of so many bytes that has crossed, its blocks, and how many of these
        did not fit."""
        self._nbytes += nbytes
        self._other_nbytes += nbytes
        self._packed_nbytes += nbytes
        packed = self._packed.get_or_make(window, _Packed)
        packed.blocks += blocks
        packed.misfits += misfits

    def begin(self) -> Start | None:
        """Return the beginning of a pull; None if nothing has crossed before, since both sides then
        connect first."""
        if not self._nbytes:
            return None
        return Start(self._nbytes, self._other_nbytes, perf_counter())

    def end(self, start: Start) -> None:
        """Add the rate of a pull whose slices have all crossed.

        Slices of other pulls count, since they share the transport. Nothing is added if some slices
        were packed meanwhile, or belong to a pull with a limited rate: packing or the limit may
        have been slower than the transport.
        """
        seconds = perf_counter() - start.at
        nbytes = self._nbytes - start.nbytes
        long_enough = seconds >= LEAST_SECONDS and nbytes >= LEAST_NBYTES
        if not long_enough or self._other_nbytes != start.other_nbytes:
            return
        self._rates.append(nbytes / seconds / 1e9)
        self._measured_at = self._packed_nbytes

    def needs_sample(self, window: Window) -> bool:
        """Return True, once, if too many of the latest packed blocks of a window did not fit."""
        packed = self._packed.get(window)
        answer = None if packed is None else is_out_of_date(packed.blocks, packed.misfits)
        if answer is not None:
            self._packed.pop(window, None)
        return bool(answer)
