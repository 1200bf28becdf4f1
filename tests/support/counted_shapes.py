# SPDX-License-Identifier: Apache-2.0
"""The runs and pieces that the core counts for a pick, as the core tells them."""

from __future__ import annotations

from ctypes import addressof, c_int64, c_void_p

from portakv.core.library import function
from portakv.interconnect.choose import Shape
from portakv.interconnect.link import ALL, RunCounter
from portakv.plan.plan import CopyPlan


class ShapeCounter(RunCounter):
    """A counter that also tells the shape of copies.

    Its ``runs`` are as many as `CopyPlan.runs` gives, or more if parts of a plan happen to meet.
    Its ``pieces`` are about as many as `pieces_of` makes.
    """

    def __init__(self, plan: CopyPlan, dense: bool = False, fold_below: int = ALL) -> None:
        super().__init__(plan, dense, fold_below)
        self.plan = plan

    def shape(self, groups: int, count: int) -> Shape:
        """Return the shape of ``count`` positions in ``groups`` groups."""
        words = c_void_p, c_int64, c_int64, c_void_p, c_void_p
        counted = (c_int64 * 2)()
        units = count // self.plan.unit
        folding = self.folding.buffer_info()[0]
        failed = function("pieces_count", c_int64, *words)(
            self.plan_at, units, groups, folding, addressof(counted)
        )
        assert not failed
        return Shape(count * self.plan.token_bytes, counted[0], counted[1])
