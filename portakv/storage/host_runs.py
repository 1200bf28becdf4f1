# SPDX-License-Identifier: Apache-2.0
"""Copies of long runs on the host, by the C library: one pass, on one core, without the
interpreter."""

from __future__ import annotations

import ctypes
import os

from portakv.copy.options import USUAL, CopyOptions
from portakv.copy.rows import copy_rows as copy_rows
from portakv.plan.plan import CopyPlan
from portakv.view import Index, KVView
from portakv.view.destination import note_written

#: The shortest run that is copied so. A torch copy of runs reads and writes the bytes twice.
LONG = 64 << 10
_PLAN = "a plan of runs on the host"


def copy_long_runs(
    src: KVView, dst: KVView, src_index: Index, dst_index: Index, options: CopyOptions
) -> bool:
    """Copy rows between views of host memory; return False, and copy nothing, if another copy
    serves them better.

    Serves views whose rows are runs of `LONG` bytes, by options that ask for nothing else. The
    indices were checked; rows of negative ids are left out.
    """
    if src.device.type != "cpu" or dst.device.type != "cpu" or options != USUAL:
        return False
    if "PORTAKV_BACKEND" in os.environ or src.form.encoding or dst.form.encoding:
        return False
    plan = _plan_of(src, dst, src_index, dst_index)
    if plan is None:
        return False
    count = src_index.length
    assert count is not None  # it has ids
    runs = plan.runs(src, dst, src_index, dst_index, count)
    for begin, end, nbytes in zip(
        runs.src.tolist(), runs.dst.tolist(), runs.nbytes.tolist(), strict=True
    ):
        ctypes.memmove(end, begin, nbytes)
    note_written(dst)
    return True


def _plan_of(src: KVView, dst: KVView, src_index: Index, dst_index: Index) -> CopyPlan | None:
    """Return the plan of a copy whose runs are long; None for other copies."""
    key = _PLAN, dst.form, src_index.plan_step, dst_index.plan_step
    if key not in src.derived:
        plan: CopyPlan | None = None
        if min(src.form.token_bytes, dst.form.token_bytes) >= LONG:
            plan = CopyPlan(src.form, dst.form, src_index.plan_step, dst_index.plan_step)
            if plan.run < LONG:
                plan = None
        src.derived[key] = plan
    result: CopyPlan | None = src.derived[key]
    return result
