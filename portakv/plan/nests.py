# SPDX-License-Identifier: Apache-2.0
"""Nests: the loops of a plan, as a backend reads them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from portakv.plan.loops import Loop
from portakv.view.form import Steps


@dataclass(frozen=True, slots=True)
class Side:
    """Where the units of one side lie.

    Attributes:
        table, offset: origin: entry of the address table, and bytes behind its address.
        units: the steps that the number of a unit walks through, outermost (unbounded) first:
            ``n % extent`` from the innermost on, as in positional notation.
    """

    table: int
    offset: int
    units: Steps


@dataclass(frozen=True, slots=True)
class Nest:
    """One loop nest. ``vector`` is the widest access in bytes that everything in it allows."""

    src: Side
    dst: Side
    loops: tuple[Loop, ...]
    run: int
    vector: int

    @property
    def unit_bytes(self) -> int:
        """Bytes that one unit moves in this nest."""
        return prod(loop.extent for loop in self.loops) * self.run
