# SPDX-License-Identifier: Apache-2.0
"""Copies that the Triton kernel must make, on any device: each case raises at the first wrong byte.

Run as a program, with Triton's interpreter asked for, it makes all of them on host tensors and
prints for each its traceback, or nothing, as JSON: the interpreter has to be asked for before the
kernel is imported, so it needs a process of its own.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings

from portakv import CopyPlan, Index, KVView, copy_rows
from portakv.backends import _triton_rows
from portakv.backends.base import Launch
from portakv.backends.triton import Triton
from portakv_conformance.draw.arrangement import Case, Side
from portakv_conformance.draw.strategies import all_cases
from support.core_cases import HANDS, Hand, lazy, noise
from support.each_backend import (
    CHANGES,
    REPEATED,
    SHOWN,
    STATES,
    copied,
    refuses_memory_that_is_elsewhere,
    within,
)

GIB = 1 << 30
EXAMPLES = {"cpu": 150, "cuda": 60}  # on a GPU nearly every example compiles a kernel


def on(device: str, tensors: Any) -> Any:
    """Tensors in their lists, on a device."""
    if isinstance(tensors, torch.Tensor):
        return tensors.to(device)
    return [on(device, item) for item in tensors]


def copy(src: KVView, dst: KVView, mine: Any = None, theirs: Any = None, **more: Any) -> None:
    """Copy through Triton and wait."""
    copy_rows(src, dst, mine, theirs, backend="triton", **more).synchronize()


def prepared(
    src: KVView, dst: KVView, mine: Index, theirs: Index, backend: Triton | None = None
) -> tuple[CopyPlan, Launch]:
    """A plan and a launch of its own, behind the library's checks."""
    plan = CopyPlan(src.form, dst.form, mine.plan_step, theirs.plan_step)
    return plan, (backend or Triton(src.device)).prepare(plan)


def word(device: str) -> torch.Tensor:
    """A status word that a kernel on the device can write."""
    status = torch.zeros(1, dtype=torch.int64)
    return status.pin_memory() if device == "cuda" else status


def kept(tensor: torch.Tensor) -> torch.Tensor:
    """What it holds now, on the host."""
    return tensor.cpu().clone()


def finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def pool(device: str, *, blocks: int = 6, dim: int = 8, layers: int = 3) -> list[torch.Tensor]:
    """Layers ``[kv, block, token (4), head (2), dim]`` of their own allocations."""
    return [noise(2, blocks, 4, 2, dim, seed=n).to(device) for n in range(layers)]


def chunk(device: str, tokens: int, *, dim: int = 8, layers: int = 3) -> torch.Tensor:
    return noise(2, layers, tokens, 2 * dim, seed=99).to(device)


def paged(caches: list[torch.Tensor]) -> KVView:
    return KVView(caches, "layer | kv block token head dim")


def dense(rows: torch.Tensor) -> KVView:
    return KVView(rows, "kv layer token (head dim)", heads=2)


def rows_of(caches: list[torch.Tensor]) -> torch.Tensor:
    """[kv, layer, slot, (head dim)] of a pool, a copy on the host."""
    return torch.stack([c.cpu().flatten(3).flatten(1, 2) for c in caches], dim=1)


# Cases


def drawn_copies(device: str) -> None:
    for ids_on in sorted({"cpu", device}):
        judge = settings(
            max_examples=EXAMPLES[device], derandomize=True, database=None, deadline=None,
            suppress_health_check=[*HealthCheck],
        )  # fmt: skip

        @judge
        @given(all_cases(device=device, ids_on=ids_on))
        def check(case: Case) -> None:
            src, dst = view(case.src), view(case.dst)
            mine, theirs = index(case.src), index(case.dst)
            case.check(lambda: copy(src, dst, mine, theirs, count=case.count))

        check()


def view(side: Side) -> KVView:
    return KVView(side.tensors, side.layout, reinterpret=side.reinterpret, **side.extents)


def index(side: Side) -> Index:
    return Index(side.ids, step=side.step, offset=side.offset)


def layouts_by_hand(device: str) -> None:
    """Each of the core's layouts to itself and to two others, ids and holes on both sides."""
    for n, mine in enumerate(HANDS):
        for further in (0, 1, 7):
            theirs = HANDS[(n + further) % len(HANDS)]
            _by_hand(mine, theirs, device)


def _by_hand(mine: Hand, theirs: Hand, device: str) -> None:
    source, target = on(device, mine.make(1)), on(device, theirs.make(2))
    wanted = theirs.rows(on("cpu", target)).clone()
    from_slots, to_slots = [7, -1, 0, 11, 4, 5, 2], [1, 3, -5, 8, 0, 2, 11]
    for a, b in zip(from_slots, to_slots, strict=True):
        if a >= 0 and b >= 0:
            wanted[:, :, b] = mine.rows(on("cpu", source))[:, :, a]
    copy(mine.view(source), theirs.view(target), from_slots, to_slots)
    assert torch.equal(theirs.rows(on("cpu", target)), wanted), f"{mine.layout} -> {theirs.layout}"


def every_vector_width(device: str) -> None:
    for width, vector in ((48, 16), (40, 8), (12, 4), (6, 2), (3, 1)):
        caches = [noise(5, 4, width, dtype=torch.uint8, seed=n).to(device) for n in range(2)]
        rows = torch.zeros(2, 7, width, dtype=torch.uint8, device=device)
        src, dst = KVView(caches, "layer | block token dim"), KVView(rows, "layer token dim")
        assert CopyPlan(src.form, dst.form, 1, 0).vector == vector
        slots = [19, 3, 0, 7, 12, 1, 4]
        copy(src, dst, slots)
        wanted = torch.stack([c.cpu().flatten(0, 1)[slots] for c in caches])
        assert torch.equal(rows.cpu(), wanted), f"{width} B"


def two_nests_of_unequal_widths(device: str) -> None:
    caches = [noise(3, 2, 4, 24, seed=n).to(device) for n in range(2)]
    src = KVView(caches, "layer | block head token (kv dim)", dim=(16, 8))
    keys, values = torch.zeros(2, 5, 2, 16), torch.zeros(2, 5, 2, 8)
    parts = [t.to(torch.int16).to(device) for t in (keys, values)]
    dst = KVView(parts, "kv | layer token head dim", dim=(16, 8))
    slots = [11, 0, 6, 5, 3]
    plan = CopyPlan(src.form, dst.form, 1, 0)
    assert len(plan.nests) == 2
    copy(src, dst, slots)
    rows = torch.stack([c.cpu().transpose(1, 2).flatten(0, 1)[slots] for c in caches])
    assert torch.equal(parts[0].cpu(), rows[..., :16])
    assert torch.equal(parts[1].cpu(), rows[..., 16:])


def unequal_widths_through_tables(device: str) -> None:
    """The second nest begins behind the first entry of a table."""
    layers = [(noise(3, 4, 2, 16, seed=n), noise(3, 4, 2, 8, seed=10 + n)) for n in range(3)]
    caches = on(device, layers)
    zeros = [(torch.zeros(5, 2, 16), torch.zeros(5, 2, 8)) for _ in range(3)]
    rows = on(device, [[t.to(torch.int16) for t in layer] for layer in zeros])
    slots = [11, 0, 6, 5, 3]
    copy(
        KVView(caches, "layer kv | block token head dim", dim=(16, 8)),
        KVView(rows, "layer kv | token head dim", dim=(16, 8)),
        slots,
    )
    for mine, theirs in zip(layers, rows, strict=True):
        for cache, landed in zip(mine, theirs, strict=True):
            assert torch.equal(landed.cpu(), cache.flatten(0, 1)[slots])


def lists_of_memory_objects(device: str) -> None:
    """Tables that the number of a unit walks through, on either side."""
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


def units_that_begin_between_units(device: str) -> None:
    """Without ids a flat side may start anywhere, though whole blocks are moved."""
    caches, rows = pool(device), chunk(device, 16)
    wanted = kept(rows)
    wanted[:, :, 3:11] = rows_of(caches)[:, :, [20, 21, 22, 23, 4, 5, 6, 7]]
    mine, theirs = Index([5, 1], step=4), Index(offset=3)
    src, dst = paged(caches), dense(rows)
    assert CopyPlan(src.form, dst.form, 4, 0).unit == 4
    copy(src, dst, mine, theirs, count=8)
    assert torch.equal(rows.cpu(), wanted)


def bad_ids_are_reported_and_move_nothing(device: str) -> None:
    wild = {torch.int32: (24, 2**31 - 1), torch.int64: (24, 2**31, 2**32 + 1, 2**62, 2**63 - 1)}
    for dtype, ids in wild.items():
        for bad in ids:
            for at in (0, 6):
                slots = [3, 1, -1, 7, 0, 23, 5, -(2**31)]
                slots[at] = bad
                for gathers in (True, False):
                    _guarded(device, torch.tensor(slots, dtype=dtype), gathers, at)


def _guarded(device: str, slots: torch.Tensor, gathers: bool, bad: int) -> None:
    for told in (True, False):
        caches, rows = pool(device), chunk(device, len(slots))
        wanted_pool, wanted_rows = rows_of(caches), kept(rows)
        for n, slot in enumerate(slots.tolist()):
            if 0 <= slot < 24 and gathers:
                wanted_rows[:, :, n] = wanted_pool[:, :, slot]
            elif 0 <= slot < 24:
                wanted_pool[:, :, slot] = wanted_rows[:, :, n]
        ids, status = Index(slots.to(device)), word(device)
        ways = [(paged(caches), ids), (dense(rows), Index())]
        (src, mine), (dst, theirs) = ways if gathers else ways[::-1]
        _, launch = prepared(src, dst, mine, theirs)
        launch(src, dst, mine, theirs, len(slots), None, status if told else None)
        finish(device)
        assert int(status) == (bad + 1 if told else 0)
        assert torch.equal(rows.cpu(), wanted_rows)
        assert torch.equal(rows_of(caches), wanted_pool)


def bad_blocks_on_both_sides(device: str) -> None:
    """Several units of one id: a block past the end, and one of which half is past the end."""
    # 20 slots in blocks of 8: block 2 is slots 16 to 23.
    for src_blocks, dst_blocks, moved, bad in (
        ([1, 2**61, 0], [2, 1], {4: 16, 0: 8}, (4,)),
        ([3, 5, -1, 0], [2, 0], {12: 16, 0: 4}, (4,)),
        ([2, 3, 4, 5], [2**62, -7], {}, (0, 4)),  # either may be written last
    ):
        caches, target = pool(device), pool(device, blocks=5)
        wanted = rows_of(target)
        for source, destination in moved.items():
            rows = rows_of(caches)[:, :, source : source + 4]
            wanted[:, :, destination : destination + 4] = rows
        mine = Index(torch.tensor(src_blocks, device=device), step=4)
        theirs = Index(torch.tensor(dst_blocks, device=device), step=8)
        plan, launch = prepared(paged(caches), paged(target), mine, theirs)
        assert plan.unit == 4
        status = word(device)
        count = 4 * len(src_blocks)
        launch(paged(caches), paged(target), mine, theirs, count, None, status)
        finish(device)
        assert int(status) - 1 in bad
        assert torch.equal(rows_of(target), wanted)


def far_offsets(device: str) -> None:
    """Rows past 2**31 and 2**32 bytes: by the slot, under both types of ids, and by the layer."""
    far = (
        torch.zeros(5 * GIB, dtype=torch.uint8, device=device) if device != "cpu" else lazy(5 * GIB)
    )
    cache = far.as_strided((5, 4, 32), (GIB, 64, 1))
    cache.copy_(noise(5, 4, 32, dtype=torch.uint8))
    wanted, slots = kept(cache).flatten(0, 1), [19, 0, 9, 16, 13]
    paged_view = KVView(cache, "block token dim")
    for dtype in (torch.int32, torch.int64):
        rows = torch.zeros(5, 32, dtype=torch.uint8, device=device)
        ids = torch.tensor(slots, dtype=dtype, device=device)
        copy(paged_view, KVView(rows, "token dim"), ids)
        assert torch.equal(rows.cpu(), wanted[slots])
        rows = rows.flip(0).contiguous()
        copy(KVView(rows, "token dim"), paged_view, None, ids)
        wanted[slots] = rows.cpu()
        assert torch.equal(cache.cpu().flatten(0, 1), wanted)
    for axes in ("layer token dim", "token head dim"):
        source, target = far.as_strided((5, 4, 32), (GIB, 64, 1)), torch.zeros(5, 4, 32)
        if axes.startswith("token"):
            source, target = source.transpose(0, 1), target.transpose(0, 1).contiguous()
        landed = target.to(device, torch.uint8)
        copy(KVView(source, axes), KVView(landed, axes))
        assert torch.equal(landed.cpu(), source.cpu()), axes


def many_planes_and_heads(device: str) -> None:
    caches = [noise(2, 2, 4, 128, 2, seed=n).to(device) for n in range(40)]
    rows = torch.zeros(2, 40, 3, 256, dtype=torch.int16, device=device)
    dst = KVView(rows, "kv layer token (head dim)", heads=128)
    copy(paged(caches), dst, [7, 0, 2])
    assert torch.equal(rows.cpu(), rows_of(caches)[:, :, [7, 0, 2]])


def sources_of_which_several_rows_are_one(device: str) -> None:
    for make in REPEATED.values():
        copied(make(), "triton", None if device == "cpu" else lambda tensor: tensor.to(device))


def states_of_torch(device: str) -> None:
    """On the host, whatever it is set to."""
    for state in STATES if device == "cpu" else ():
        for make in SHOWN.values():
            within(state, make(), lambda: Triton(torch.device("cpu")))


def memory_that_is_elsewhere(device: str) -> None:
    for change in CHANGES.values():
        place = None if device == "cpu" else lambda tensor: tensor.to(device)
        refuses_memory_that_is_elsewhere("triton", change, place)


def copies_split_into_several_launches(device: str) -> None:
    """More vectors than one launch may count, bad ids named by their place in the whole."""
    whole = _triton_rows.MAX_VECTORS
    _triton_rows.MAX_VECTORS = 7
    try:
        caches, rows = pool(device, blocks=40), chunk(device, 100)
        slots = torch.randperm(160, generator=torch.Generator().manual_seed(1))[:100]
        wanted = rows_of(caches)[:, :, slots]
        wanted[:, :, 90] = rows.cpu()[:, :, 90]
        slots[90] = 160
        ids, status = Index(slots.to(device)), word(device)
        src, dst = paged(caches), dense(rows)
        plan, launch = prepared(src, dst, ids, Index())
        kernel = _triton_rows.NestKernel(plan.nests[0], plan)
        assert len(kernel.launches(src, dst, ids, Index(), 100, 0)) == 34
        launch(src, dst, ids, Index(), 100, None, status)
        finish(device)
        assert int(status) == 91
        assert torch.equal(rows.cpu(), wanted)
    finally:
        _triton_rows.MAX_VECTORS = whole


CASES: dict[str, Callable[[str], None]] = {
    case.__name__: case
    for case in (
        drawn_copies, layouts_by_hand, every_vector_width, two_nests_of_unequal_widths,
        unequal_widths_through_tables, lists_of_memory_objects, units_that_begin_between_units,
        bad_ids_are_reported_and_move_nothing, bad_blocks_on_both_sides, far_offsets,
        many_planes_and_heads, copies_split_into_several_launches,
        sources_of_which_several_rows_are_one, states_of_torch, memory_that_is_elsewhere,
    )
}  # fmt: skip


def main() -> None:
    """Make every case on the host and print what went wrong, as JSON."""
    found = {}
    for name, case in CASES.items():
        try:
            case("cpu")
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
