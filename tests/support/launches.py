# SPDX-License-Identifier: Apache-2.0
"""How the core cuts a copy into launches of a kernel, without a kernel."""

from __future__ import annotations

import ctypes
from array import array
from typing import Any, NamedTuple

from portakv import CopyPlan
from portakv.backends.rows_kernel import RowsKernel, options_of
from portakv.core.rows import Kernels, pack_side
from support.cuda_on_cpu import LAUNCH

#: Where the argument has the vectors to prefetch ahead.
_AHEAD = 108


class Launched(NamedTuple):
    """A launch that the driver was asked for: vectors of a thread, blocks along x and y, threads of
    a block, vectors to prefetch ahead."""

    each: int
    blocks: int
    planes: int
    threads: int
    ahead: int


def launches(plan: CopyPlan, kernel: RowsKernel, units: int) -> list[Launched]:
    """Return the launches of a copy of so many units by the kernel of a plan of one nest."""
    assert len(plan.nests) == 1
    asked: list[Launched] = []

    def launch(function: int, x: int, y: int, _z: int, threads: int, *rest: Any) -> int:
        ahead = ctypes.c_uint32.from_address(rest[-2][0] + _AHEAD).value
        asked.append(Launched(function, x, y, threads, ahead))
        return 0

    entry = LAUNCH(launch)
    options = options_of(plan, kernel.by_source)
    address = ctypes.cast(entry, ctypes.c_void_p).value or 0
    table = Kernels(address)
    table.add(kernel.words, kernel.cut, (1, 2))
    addresses = array("q", [0] * 256)
    side = pack_side(addresses.buffer_info()[0], 0, 0, 0, 0, 1 << 30)
    assert table.run(plan.words, options, side, side, units * plan.unit, 0, 0) == 0
    return asked
