# SPDX-License-Identifier: Apache-2.0
"""Copies inside one allocation: source and destination rows must be disjoint."""

from __future__ import annotations

import numpy as np

from portakv.errors import SlotError
from portakv.plan.plan import CopyPlan
from portakv.view.index import Index
from portakv.view.view import KVView


def check_disjoint(
    src: KVView, dst: KVView, src_index: Index, dst_index: Index, count: int, unit: int
) -> None:
    """Host ids: raise `SlotError` where a byte is both read and written.

    Ids on a device are not read back: contents of rows that overlap are then unspecified.
    """
    if not (src_index.on_host and dst_index.on_host):
        return
    if src.form == dst.form and src.origins == dst.origins:
        mine, theirs = src_index.slots(count), dst_index.slots(count)
        both = np.intersect1d(mine[mine >= 0], theirs[theirs >= 0])
        if both.size:
            raise SlotError(
                f"Slot {int(both[0])} is both source and destination of a copy inside one cache; "
                f"exchange rows through a buffer."
            )
        return
    plan = CopyPlan(src.form, dst.form, src_index.plan_step, dst_index.plan_step, unit)
    runs = plan.runs(src, dst, src_index, dst_index, count)
    order = np.argsort(runs.dst)
    first, past = runs.dst[order], (runs.dst + runs.nbytes)[order]
    at = np.searchsorted(first, runs.src + runs.nbytes) - 1
    if ((at >= 0) & (past[np.maximum(at, 0)] > runs.src)).any():
        raise SlotError(
            "A row is both source and destination of a copy inside one allocation; exchange rows "
            "through a buffer."
        )
