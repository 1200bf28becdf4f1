# SPDX-License-Identifier: Apache-2.0
"""What the sources in ``native`` include: each other and vendors' headers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from support.cuda_cases import COPIES
from support.cuda_on_cpu import CudaOnCpu, why_not

from portakv.backends.rows_kernel import kernel_text
from portakv.backends.rows_launch import RowsLaunch

NATIVE = Path(__file__).resolve().parents[2] / "native"
SOURCES = sorted(x for x in NATIVE.rglob("*") if x.suffix in (".h", ".cuh", ".cpp", ".cu"))
#: Of CANN: its runtime, its CPU twin, and what a host asks of a platform.
VENDORS = ("acl/acl.h", "tikicpulib.h", "tiling/platform/platform_ascendc.h")


@pytest.mark.parametrize("source", SOURCES, ids=lambda x: str(x.relative_to(NATIVE)))
def test_a_source_needs_nothing_but_native_and_the_vendor(source: Path) -> None:
    for name in re.findall(r'^#include "(.+)"', source.read_text(encoding="utf-8"), re.MULTILINE):
        # The emulation stands in for the vendor's headers: it is on the compiler's path.
        folders = source.parent, NATIVE / "ascend", NATIVE / "ascend" / "emulation"
        places = [(folder / name).resolve() for folder in folders]
        inside = [x for x in places if x.exists() and x.is_relative_to(NATIVE)]
        assert inside or name in VENDORS, name


def test_a_text_has_what_it_includes_in_its_place_once() -> None:
    rows, direct = kernel_text(), kernel_text("host/direct.cuh")
    assert direct.count(rows) == 1
    assert "#include" not in direct
    assert direct.index("void copy_rows(") < direct.index("void copy_direct(")


@pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
@pytest.mark.parametrize("name", ["gather", "scatter", "gather int32"])
def test_a_repeated_launch_moves_what_the_first_one_does(name: str) -> None:
    """With other addresses, ids and counts, and a bad id told by its position."""
    copied = COPIES[name]()
    src, dst, mine, theirs = (
        copied.src.view(), copied.dst.view(), copied.src.index(), copied.dst.index()
    )  # fmt: skip
    launch = CudaOnCpu(torch.device("cpu")).prepare(copied.plan())
    assert isinstance(launch, RowsLaunch)
    repeat = launch.again(src, dst, mine, theirs)
    assert repeat is not None
    paged, ids = (src, mine) if mine.ids is not None else (dst, theirs)
    dense = dst if paged is src else src
    status = torch.zeros(1, dtype=torch.int64)
    slots = ids.ids
    assert slots is not None
    slots[4] = paged.slots

    def carry() -> None:
        repeat(dense.origins[0], slots.data_ptr(), 0, copied.count, status.data_ptr())

    for end in (copied.src, copied.dst):
        if end.ids is not None:
            end.ids = slots.tolist()
    copied.check(carry)
    assert int(status) == 5
