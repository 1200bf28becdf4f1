# SPDX-License-Identifier: Apache-2.0
"""The cases of the encoding find nothing in the kernels of `cuda`, run on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from support.cuda_on_cpu import why_not
from support.pack_on_cpu import HostPackDriver

from portakv_conformance.cases import Bench
from portakv_conformance.cases import test_encodings as cases
from portakv_conformance.judge.device_support import Facility
from portakv_conformance.judge.judging import Judge
from portakv_conformance.judge.subject import subject

Case = Callable[[Bench], None]


#: Every raw layout that the case is declared for.
LAYOUTS = [
    str(each.values[0])
    for mark in vars(cases.test_raw_layouts)["pytestmark"]
    if mark.args[0] == "name"
    for each in mark.args[1]
]


def _cases() -> Iterator[tuple[str, Case]]:
    for packs, op in ((True, "pack"), (False, "unpack")):
        for bits in (3, 4):
            yield f"{op}, {bits} bits", _each(cases.test_planes_of_a_block, packs, bits, 16)
            yield f"{op}, large, {bits} bits", _each(cases.test_large_planes, packs, bits)
        yield f"{op}, patterns", _each(cases.test_every_pattern, packs)
        yield f"{op}, one that does not fit", _each(cases.test_one_block_that_does_not_fit, packs)
        for dtype in (torch.int32, torch.int64):
            yield f"{op}, skips, {dtype}", _each(cases.test_blocks_that_are_skipped, packs, dtype)
        for axis in ("layers", "heads"):
            yield f"{op}, {axis}", _each(cases.test_slices, packs, axis)
        for name in LAYOUTS:
            yield f"{op}, {name}", _each(cases.test_raw_layouts, packs, name)
        for image in cases.IMAGES[1:]:
            yield f"{op}, {image}", _each(cases.test_packed_images, packs, image)


def _each(case: Callable[..., None], *arguments: object) -> Case:
    return lambda bench: case(bench, *arguments)


CASES = dict(_cases())


@pytest.mark.full
@pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
@pytest.mark.xdist_group("cuda-on-cpu")
@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize("name", CASES)
def test_nothing_is_found(name: str) -> None:
    judged = subject("support.pack_on_cpu:PackOnCpu", "cpu")
    bench = Bench("cpu", 5, judge=Judge(judged, Facility(torch.device("cpu")), 5))
    before = HostPackDriver.launched
    CASES[name](bench)
    assert HostPackDriver.launched > before
    assert not bench.judge.declined
