# SPDX-License-Identifier: Apache-2.0
"""`compiled` makes the right copies: on the host, and with ``-m gpu`` on a CUDA device.

Each shape of a plan is compiled, about a second each on the host, so there are few shapes and many
copies of each.
"""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from support.compiled_cases import (
    DEVICES,
    compiled,
    compiling,
    copy,
    launch,
    needs_compiler,
    on_each_device,
)
from support.core_cases import HANDS, lazy, noise
from support.guarded_memory import filled, same
from support.triton_cases import chunk, dense, index, kept, on, paged, pool, rows_of, view, word

from portakv import CopyPlan, Index, KVView, Unsupported, copy_blocks, copy_rows
from portakv_conformance.draw.arrangement import Case
from portakv_conformance.draw.strategies import all_cases

LENGTHS = (1, 2, 3, 7, 12)
# (source, destination) among the layouts by hand, and which side has ids.
PAIRS = [
    (0, 13, "src"), (13, 0, "dst"), (3, 14, "src"), (15, 7, "dst"), (17, 2, "both"),
    (5, 9, "both"), (11, 12, "both"), (16, 17, "neither"),
]  # fmt: skip
# Each is a program or more of several seconds: all but a few are for .ci/full on a CPU.
WIDER = [pytest.param(pair, marks=pytest.mark.full) for pair in PAIRS[3:]]
WIDTHS = [pytest.param(*x, marks=pytest.mark.full) for x in ((40, 8), (12, 4), (6, 2))]
DRAWN = [pytest.param("cpu", marks=[needs_compiler, pytest.mark.full]), DEVICES[1]]


def _named(pair: tuple[int, int, str]) -> str:
    return f"{pair[0]}-{pair[1]}-{pair[2]}"


# The same bytes as by hand and by the oracle


@on_each_device
@pytest.mark.parametrize("pair", [*PAIRS[:3], *WIDER], ids=_named)
def test_layouts_at_several_lengths(device: str, pair: tuple[int, int, str]) -> None:
    mine, theirs = HANDS[pair[0]], HANDS[pair[1]]
    source = on(device, mine.make(1))
    rows = mine.rows(on("cpu", source))
    for count in LENGTHS:
        target = on(device, theirs.make(2))
        wanted = theirs.rows(on("cpu", target)).clone()
        taken = [7, -1, 0, 11, 4, 5, 2, 3, -9, 1, 10, 8][:count]
        put = [1, 3, -5, 8, 0, 2, 11, 4, 5, 6, 7, -1][:count]
        from_slots = taken if pair[2] in ("src", "both") else list(range(count))
        to_slots = put if pair[2] in ("dst", "both") else list(range(count))
        for a, b in zip(from_slots, to_slots, strict=True):
            if a >= 0 and b >= 0:
                wanted[:, :, b] = rows[:, :, a]
        copy(
            mine.view(source), theirs.view(target),
            torch.tensor(taken) if pair[2] in ("src", "both") else None,
            torch.tensor(put, dtype=torch.int32) if pair[2] in ("dst", "both") else None,
            count=count,
        )  # fmt: skip
        assert torch.equal(theirs.rows(on("cpu", target)), wanted), f"{count} tokens"


@pytest.mark.parametrize("device", DRAWN)
def test_drawn_copies(device: str) -> None:
    profile = settings.default
    assert profile is not None

    @settings(max_examples=max(6, profile.max_examples // 16))
    @given(all_cases(device=device))
    def check(case: Case) -> None:
        src, dst = view(case.src), view(case.dst)
        mine, theirs = index(case.src), index(case.dst)
        case.check(lambda: copy(src, dst, mine, theirs, count=case.count))

    check()


@on_each_device
@pytest.mark.parametrize(("width", "vector"), [(48, 16), *WIDTHS, (3, 1)])
def test_every_vector_width_from_odd_addresses(device: str, width: int, vector: int) -> None:
    """Rows no wider aligned than the vector: neither whole nor cloned to be aligned."""
    for shift in (0, vector, 3 * vector):
        whole = [filled((shift + 5 * 4 * width,), torch.uint8, device=device) for _ in range(2)]
        caches = [t[shift:].view(5, 4, width) for t in whole]
        rows = filled((2, 7, width), torch.uint8, poison=True, device=device)
        src, dst = KVView(caches, "layer | block token dim"), KVView(rows, "layer token dim")
        if shift == vector:
            assert CopyPlan(src.form, dst.form, 1, 0).vector == vector
        slots = [19, 3, 0, 7, 12, 1, 4]
        copy(src, dst, slots)
        wanted = torch.stack([c.cpu().flatten(0, 1)[slots] for c in caches])
        assert torch.equal(rows.cpu(), wanted), f"{shift} B"


@on_each_device
def test_every_dtype_through_one_program(device: str) -> None:
    dtypes = (
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8,
        torch.int64, torch.int16, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2,
    )  # fmt: skip
    found = []
    for dtype in dtypes:
        caches = [filled((2, 6, 4, 2, 32 // dtype.itemsize), dtype, device=device)]
        rows = filled((2, 1, 5, 64 // dtype.itemsize), dtype, poison=True, device=device)
        before = compiled(device).compilations
        copy(paged(caches), dense(rows), [23, 0, 9, 4, 5])
        found.append(compiled(device).compilations - before)
        wanted = caches[0].flatten(3).flatten(1, 2)[:, [23, 0, 9, 4, 5]].unsqueeze(1)
        assert same(rows, wanted), dtype
    assert sum(found[1:]) == 0


@on_each_device
def test_a_list_of_memory_objects_on_either_side(device: str) -> None:
    """Tables that the number of a unit walks through."""
    caches = pool(device)
    objects = [noise(2, 3, 4, 16, seed=50 + n).to(device) for n in range(3)]
    listed = KVView(objects, "block | kv layer token (head dim)", heads=2)
    slots = [23, 2, 5, 0, 9, 14, -1, 4, 3, 21, 8, 1]
    wanted = torch.cat([o.cpu() for o in objects], dim=2)
    moved = [n for n, slot in enumerate(slots) if slot >= 0]
    wanted[:, :, moved] = rows_of(caches)[:, :, [slots[n] for n in moved]]
    copy(paged(caches), listed, slots)
    assert torch.equal(torch.cat([o.cpu() for o in objects], dim=2), wanted)
    target = pool(device)
    expected = rows_of(target)
    expected[:, :, 8:20] = wanted
    copy(listed, paged(target), None, Index([2, 3, 4], step=4))
    assert torch.equal(rows_of(target), expected)


@on_each_device
def test_rows_migrate_within_one_cache(device: str) -> None:
    caches = pool(device)
    wanted = rows_of(caches)
    wanted[:, :, 4:12] = wanted[:, :, [20, 21, 22, 23, 0, 1, 2, 3]]
    copy_blocks(paged(caches), paged(caches), [5, 0], [1, 2], backend="compiled").synchronize()
    assert torch.equal(rows_of(caches), wanted)


@on_each_device
def test_offsets_past_four_gigabytes(device: str) -> None:
    size = 5 << 30
    far = lazy(size) if device == "cpu" else torch.zeros(size, dtype=torch.uint8, device=device)
    cache = far.as_strided((5, 4, 32), (1 << 30, 64, 1))
    cache.copy_(noise(5, 4, 32, dtype=torch.uint8))
    wanted, slots = kept(cache).flatten(0, 1), [19, 0, 9, 16, 13]
    rows = torch.zeros(5, 32, dtype=torch.uint8, device=device)
    copy(KVView(cache, "block token dim"), KVView(rows, "token dim"), slots)
    assert torch.equal(rows.cpu(), wanted[slots])
    rows = rows.flip(0).contiguous()
    copy(KVView(rows, "token dim"), KVView(cache, "block token dim"), None, slots)
    wanted[slots] = rows.cpu()
    assert torch.equal(cache.cpu().flatten(0, 1), wanted)


# One program serves all lengths


@on_each_device
def test_another_length_stride_pool_or_place_compiles_nothing(device: str) -> None:
    """20 lengths; chunks whose strides, and pools whose sizes and places, differ each time."""
    first = pool(device)
    copy(paged(first), dense(chunk(device, 3)), [1, 2, 3])
    copy(dense(chunk(device, 3)), paged(first), None, [1, 2, 3])
    with compiling(device, 0):
        for n, tokens in enumerate([1, 2, 3, 4, 5, 8, 13, 21, 34, 55, 89, 144, 6, 7, 9, 10, 11, 12,
                                    14, 233]):  # fmt: skip
            caches = pool(device, blocks=60 + n)
            # Of a longer one: neither the tokens nor the distances between planes are the same.
            rows = chunk(device, tokens + n % 3)[:, :, :tokens]
            slots = torch.randperm(240, generator=torch.Generator().manual_seed(n))[:tokens]
            ids = slots.to(device)
            copy(paged(caches), dense(rows), ids)
            assert torch.equal(rows.cpu(), rows_of(caches)[:, :, slots]), tokens
            rows.copy_(chunk(device, tokens))
            wanted = rows_of(caches)
            wanted[:, :, slots] = rows.cpu()
            copy(dense(rows), paged(caches), None, ids)
            assert torch.equal(rows_of(caches), wanted), tokens


@on_each_device
def test_one_allocation_and_many_are_one_kernel_each(device: str) -> None:
    whole = noise(3, 2, 6, 4, 2, 8).to(device)
    apart, together = [t.clone() for t in whole], list(whole)
    for caches in (apart, together):
        rows = torch.zeros(2, 3, 4, 16, dtype=torch.int16, device=device)
        plan = CopyPlan(paged(caches).form, dense(rows).form, 1, 0)
        assert (len(plan.nests), plan.tabled) == (1, caches is apart)
        copy(paged(caches), dense(rows), [5, 23, 0, 11])
        assert torch.equal(rows.cpu(), rows_of(caches)[:, :, [5, 23, 0, 11]])


# Ids are guarded inside the kernel


@on_each_device
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("gathers", [True, False], ids=["gather", "scatter"])
def test_bad_ids_are_reported_and_move_nothing(device: str, gathers: bool, told: bool) -> None:
    for bad in (24, 2**31, 2**32 + 1, 2**62, 2**63 - 1):
        for at in (0, 6):
            slots = [3, 1, -1, 7, 0, 23, 5, -(2**63)]
            slots[at] = bad
            caches, rows = pool(device), chunk(device, len(slots))
            wanted_pool, wanted_rows = rows_of(caches), kept(rows)
            for n, slot in enumerate(slots):
                if 0 <= slot < 24 and gathers:
                    wanted_rows[:, :, n] = wanted_pool[:, :, slot]
                elif 0 <= slot < 24:
                    wanted_pool[:, :, slot] = wanted_rows[:, :, n]
            ids, status = Index(torch.tensor(slots, device=device)), word(device)
            ways = [(paged(caches), ids), (dense(rows), Index())]
            (src, mine), (dst, theirs) = ways if gathers else ways[::-1]
            launch(src, dst, mine, theirs, status if told else None)
            assert int(status) == (at + 1 if told else 0)
            assert torch.equal(rows.cpu(), wanted_rows)
            assert torch.equal(rows_of(caches), wanted_pool)


@on_each_device
def test_bad_blocks_of_several_units(device: str) -> None:
    """A product that overflows, and a block of which half is past the end."""
    # 20 slots in blocks of 8: block 2 is slots 16 to 23.
    for src_blocks, dst_blocks, moved, bad in (
        ([1, 2**61, 0], [2, 1], {4: 16, 0: 8}, (4,)),
        ([3, 5, -(2**63), 0], [2, 0], {12: 16, 0: 4}, (4,)),
        ([2, 3, 4, 5], [2**62, -(2**63)], {}, (0, 4)),  # either may be written last
    ):
        caches, target = pool(device), pool(device, blocks=5)
        wanted = rows_of(target)
        for source, destination in moved.items():
            rows = rows_of(caches)[:, :, source : source + 4]
            wanted[:, :, destination : destination + 4] = rows
        mine = Index(torch.tensor(src_blocks, device=device), step=4)
        theirs = Index(torch.tensor(dst_blocks, device=device), step=8)
        status = word(device)
        launch(paged(caches), paged(target), mine, theirs, status)
        assert int(status) - 1 in bad
        assert torch.equal(rows_of(target), wanted)


@on_each_device
def test_a_status_that_was_set_stays(device: str) -> None:
    """Launches of one transfer share the word."""
    caches, rows, status = pool(device), chunk(device, 2), word(device)
    for slots in ([1, 24], [1, 2]):
        ids = Index(torch.tensor(slots, device=device))
        launch(paged(caches), dense(rows), ids, Index(), status)
    assert int(status) == 2


@on_each_device
def test_a_view_without_slots(device: str) -> None:
    caches = [torch.empty(2, 0, 4, 2, 8, dtype=torch.int16, device=device) for _ in range(3)]
    rows, status = chunk(device, 3), word(device)
    wanted = kept(rows)
    ids = Index(torch.tensor([-1, 0, -1], device=device))
    launch(paged(caches), dense(rows), ids, Index(), status)
    assert int(status) == 2
    assert torch.equal(rows.cpu(), wanted)


# Threads and graphs


@on_each_device
def test_one_launch_from_several_threads(device: str) -> None:
    caches, ids = pool(device), Index(torch.tensor([3, 0, 23, 5], device=device))
    plan = CopyPlan(paged(caches).form, dense(chunk(device, 4)).form, 1, 0)
    shared, wrong = compiled(device).prepare(plan), []
    wanted = rows_of(caches)[:, :, [3, 0, 23, 5]]

    def work() -> None:
        for _ in range(50):
            rows = torch.zeros(2, 3, 4, 16, dtype=torch.int16, device=device)
            shared(paged(caches), dense(rows), ids, Index(), 4, None, None)
            if not torch.equal(rows.cpu(), wanted):
                wrong.append(rows)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.gpu
def test_a_captured_launch_reads_its_ids_anew() -> None:
    caches, rows = pool("cuda"), chunk("cuda", 4)
    slots, src, dst = torch.tensor([3, 0, 23, 5], device="cuda"), paged(caches), dense(rows)
    copy(src, dst, Index(slots))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        copy_rows(src, dst, Index(slots), backend="compiled")
    for now in ([1, 2, 3, 4], [9, -1, 8, 24]):
        slots.copy_(torch.tensor(now))
        before = kept(rows)
        graph.replay()
        torch.cuda.synchronize()
        for n, slot in enumerate(now):
            good = 0 <= slot < 24
            expected = rows_of(caches)[:, :, slot] if good else before[:, :, n]
            assert torch.equal(rows.cpu()[:, :, n], expected)


@pytest.mark.gpu
def test_a_plan_first_met_during_capture_is_refused() -> None:
    caches, rows = pool("cuda", layers=7), chunk("cuda", 4, layers=7)
    plan = CopyPlan(paged(caches).form, dense(rows).form, 1, 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(Unsupported, match="before the capture"):
        compiled("cuda").prepare(plan)
