# SPDX-License-Identifier: Apache-2.0
"""How the core cuts a copy into launches of a kernel, without a kernel."""

from __future__ import annotations

import ctypes
from array import array
from typing import Any, NamedTuple

from portakv import CopyPlan
from portakv.backends.pack_kernel import PackKernel
from portakv.backends.rows_kernel import RowsKernel, options_of
from portakv.core.pack import Packs
from portakv.core.rows import Kernels, pack_side
from portakv.plan.packing import PackPlan
from support.cuda_on_cpu import LAUNCH

#: Where the argument has the units of a launch, their first, and the vectors to prefetch ahead.
_UNITS = 96
_START = 100
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


class PackLaunched(NamedTuple):
    """A launch of a kernel that packs or unpacks: its first unit, its units, its thread blocks and
    the threads of each."""

    start: int
    units: int
    blocks: int
    threads: int


def pack_launches(plan: PackPlan, units: int) -> list[PackLaunched]:
    """Return the launches of a copy of so many blocks by a plan of one nest."""
    assert len(plan.nests) == 1
    asked: list[PackLaunched] = []

    def launch(_function: int, x: int, _y: int, _z: int, threads: int, *rest: Any) -> int:
        start = ctypes.c_uint32.from_address(rest[-2][0] + _START).value
        count = ctypes.c_uint32.from_address(rest[-2][0] + _UNITS).value
        asked.append(PackLaunched(start, count, x, threads))
        return 0

    entry = LAUNCH(launch)
    address = ctypes.cast(entry, ctypes.c_void_p).value or 0
    pack = Packs(plan.words, options_of(plan), PackKernel(plan).cut, [1], address)
    addresses = array("q", [0] * 256)
    side = pack_side(addresses.buffer_info()[0], 0, 0, 0, 0, 1 << 30)
    assert pack.run(side, side, units * plan.unit, 0, 0, 0) == 0
    return asked
