# SPDX-License-Identifier: Apache-2.0
"""Kernels that copy rows, as the core describes them: what their argument does not hold."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.cuda_on_cpu import ARGUMENT_BYTES, LAUNCH, CudaOnCpu, HostDriver, why_not
from support.guarded_memory import refused

from portakv import CopyPlan, Index, KVView, Unsupported
from portakv.backends.rows_kernel import RowsKernel
from portakv.core.plan import MALFORMED, Refused
from portakv.core.rows import (
    MOST_CARRIED,
    NO_TABLE,
    NOT_LOADED,
    ON_HOST,
    Kernels,
    RowsShape,
    describe,
    pack_side,
)
from portakv.errors import PortaKVError
from portakv.runtime.cuda import NO_CONTEXT

OPTIONS = array("q", [1, 0, 0, 0, 0])
LAYER = 1
DIM = 5


def words(loops: list[tuple[int, int]], units: int = 1) -> array[int]:
    """The words of a plan of one nest: loops, each an axis and an extent, and steps of a unit."""
    steps = [0, 0, 64, *[2, 0, 32] * (units - 1)]
    side = [0, 0, units, *steps]
    nest = [each for axis, extent in loops for each in (axis, extent, 0, 64, 0, 64)]
    tail = [16, 16, 1, 16, 1, 1]  # of the whole plan: vector, run, runs, bytes, where it may begin
    return array("q", [1, 1, *side, *side, len(loops), *nest, 16, 16, *tail])


def kernel(plan: array[int]) -> RowsKernel:
    form = SimpleNamespace(place="device", table_on_device=False)
    standin: Any = SimpleNamespace(words=plan, src=form, dst=form, src_step=1, dst_step=0)
    return RowsKernel(standin)


@pytest.mark.parametrize(
    ("most", "more", "loops", "planes"),
    [
        (words([(LAYER, 3)] * 4), words([(LAYER, 3)] * 5), 5, 243),
        (words([(DIM, 3)] * 6), words([(DIM, 3)] * 7), 7, 1),
        (words([], units=3), words([], units=4), 0, 1),
        (words([(LAYER, 65535)]), words([(LAYER, 65536)]), 1, 65536),
        (words([(DIM, 2**31 - 1)]), words([(DIM, 2**31)]), 1, 1),
    ],
    ids=["over planes", "inside a unit", "of a unit's number", "planes", "vectors of a row"],
)
def test_what_the_argument_does_not_hold(
    most: array[int], more: array[int], loops: int, planes: int
) -> None:
    assert kernel(most).shape.vector == 16
    with refused(Unsupported, f"A nest of {loops} loops over {planes} planes", "'reference'"):
        kernel(more)


@pytest.mark.parametrize("vector", [1, 2, 4, 8, 16])
def test_a_row_has_a_place_for_each_vector_wherever_it_begins(vector: int) -> None:
    """In a sector of 32 bytes: of the destination's rows at ids, where a quarter more suffices."""
    options = array("q", [0, 1, 0, 0, 0])
    wide = 0
    for row in range(1, 300):
        plan = words([])
        plan[-8:-6] = array("q", [row * vector, vector])
        shape = RowsShape.of(describe(plan, 0, options))
        each = 32 // vector
        if row * vector % 32 == 0:
            assert shape.lanes == row
        if shape.lanes == row:
            continue
        wide += 1
        assert shape.lanes >= row + each - 1
        assert shape.lanes % each == 0
        assert 4 * shape.lanes <= 5 * row
    assert wide > 50


def test_a_plan_has_no_such_nest() -> None:
    with pytest.raises(Refused) as error:
        describe(words([]), 1, OPTIONS)
    assert error.value.code == MALFORMED


@pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
def test_the_first_launch_of_a_thread_makes_its_context() -> None:
    class Fresh(HostDriver):
        """A driver that launches only after a context was made current."""

        ready = False

        @contextmanager
        def current(self) -> Iterator[None]:
            self.ready = True
            yield

        def _launch(self, handle: int, *rest: Any) -> int:
            return super()._launch(handle, *rest) if self.ready else NO_CONTEXT

    class OnFresh(CudaOnCpu):
        driver = Fresh

    rows = torch.arange(64, dtype=torch.uint8).view(4, 16)
    landed = torch.zeros(2, 16, dtype=torch.uint8)
    src = KVView(rows, "token dim")
    dst = KVView(landed, "token dim")
    ids = Index(torch.tensor([3, 1]))
    launch: Any = OnFresh(torch.device("cpu")).prepare(CopyPlan(src.form, dst.form, 1, 0))
    launch._driver.readable = src.spans
    launch(src, dst, ids, Index(), 2, None, None)
    assert torch.equal(landed, rows[[3, 1]])


@pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
def test_a_copy_of_more_units_than_are_counted() -> None:
    """Its positions are beyond what any list here holds: nothing reads them."""
    rows = torch.zeros(2, 16, dtype=torch.uint8)
    src = KVView(rows, "token dim")
    dst = KVView(torch.zeros(2, 16, dtype=torch.uint8), "token dim")
    ids = Index(torch.tensor([1, 0]))
    launch = CudaOnCpu(torch.device("cpu")).prepare(CopyPlan(src.form, dst.form, 1, 1))
    with refused(Unsupported, f"A copy of {2**32 + 1} tokens", "'reference'"):
        launch(src, dst, ids, ids, 2**32 + 1, None, None)


@pytest.mark.parametrize("each", [0, 3, -1])
def test_a_thread_moves_one_or_two_vectors(each: int) -> None:
    cut = [128, 1 << 20, 0, 1, 0, each, 0]
    with pytest.raises(PortaKVError, match="one or two vectors for each thread"):
        Kernels(1).add(words([]), cut, (1, 2))


def test_a_copy_whose_kernel_was_not_added() -> None:
    plan = words([])
    addresses = array("q", [0])
    side = pack_side(addresses.buffer_info()[0], 0, 0, 0, 0, 16)
    assert Kernels(0).run(plan, OPTIONS, side, side, 1, 0, 0) == NOT_LOADED


def test_a_kernel_reads_no_table_that_the_device_has_not() -> None:
    plan = words([])
    side = pack_side(0, 0, 0, 0, 0, 16)
    table = Kernels(0)
    on_device = array("q", [1, 0, 1, 0, 0])
    assert table.run(plan, on_device, side, side, 1, 0, 0) == NO_TABLE


def test_an_id_that_changes_during_a_call_stays_past_the_view() -> None:
    """Ids of 64 bits travel with each launch as 32 bits, of which a kernel compares every one."""
    ids = array("q", [n % 16 for n in range(MOST_CARRIED + 4)])
    tables = 2 * 8
    carried: list[list[int]] = []

    def launch(_function: int, *rest: Any) -> int:
        argument = rest[-2][0] + ARGUMENT_BYTES + tables
        carried.append([*(ctypes.c_int32 * 3).from_address(argument)])
        for place in range(len(ids)):
            ids[place] = (1 << 32) + 1
        return 0

    entry = LAUNCH(launch)
    table = Kernels(ctypes.cast(entry, ctypes.c_void_p).value or 0)
    plan = words([])
    one = kernel(plan)
    table.add(one.words, one.cut, (1, 0))
    addresses = array("q", [0])
    at = addresses.buffer_info()[0]
    src = pack_side(at, 0, ids.buffer_info()[0], 1 + ON_HOST, 0, 16)
    dst = pack_side(at, 0, 0, 0, 0, 1 << 20)
    assert table.run(plan, OPTIONS, src, dst, len(ids), 0, 0) == 0
    assert carried == [[0, 1, 2], [2**31 - 1] * 3]


def test_kernels_are_found_by_all_words_of_their_shapes() -> None:
    """More kernels than the table has buckets, each with its own handle."""
    launched: list[int] = []

    def launch(function: int, *rest: Any) -> int:
        launched.append(function)
        return 0

    entry = LAUNCH(launch)
    table = Kernels(ctypes.cast(entry, ctypes.c_void_p).value or 0)
    plans = [words([(LAYER, layers)]) for layers in range(2, 700)]
    for number, plan in enumerate(plans, 1):
        one = kernel(plan)
        table.add(one.words, one.cut, (number, 0))
        table.add(one.words, one.cut, (-1, 0))  # it has that one
    addresses = array("q", [0])
    side = pack_side(addresses.buffer_info()[0], 0, 0, 0, 0, 16)
    for plan in plans:
        assert table.run(plan, OPTIONS, side, side, 1, 0, 0) == 0
    assert launched == [*range(1, len(plans) + 1)]


@pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
def test_a_view_of_more_units_than_are_counted() -> None:
    """All of its rows are one."""
    dst = KVView(torch.zeros(2, 16, dtype=torch.uint8), "token dim")
    ids = Index(torch.tensor([1, 0]))
    for slots, counted in ((2**32, True), (2**32 + 1, False)):
        rows = torch.full((1, 16), 7, dtype=torch.uint8).expand(slots, 16)
        src = KVView(rows, "token dim")
        launch = CudaOnCpu(torch.device("cpu")).prepare(CopyPlan(src.form, dst.form, 1, 0))
        if counted:
            launch(src, dst, ids, Index(), 2, None, None)
            assert bool((dst.tensors == 7).all())
            continue
        with refused(Unsupported, f"{slots} tokens", "'reference'"):
            launch(src, dst, ids, Index(), 2, None, None)
