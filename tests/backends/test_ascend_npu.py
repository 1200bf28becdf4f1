# SPDX-License-Identifier: Apache-2.0
"""The ascend backend on the simulated device named npu, through the stand-in for torch_npu."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from support.ascend_cases import (
    COPY,
    DEVICE,
    GATHER,
    HEADS,
    IDS,
    LAYERS,
    OTHER,
    SCATTER,
    SELECT,
    SIZE,
    SLOTS,
    UPDATE,
    Recorded,
    both_ways,
    cached,
    chunk_for,
    leaves,
    moved,
    plain,
    there,
)
from support.own_process import in_child, own_process

from portakv import (
    AdaptiveConnector,
    CopyPlan,
    Index,
    KVView,
    SlotError,
    Unsupported,
    copy_blocks,
    copy_rows,
)
from portakv.backends import ascend
from portakv.registry.registry import choose, trace
from portakv_conformance import simdev
from portakv_conformance.vendor import standins

pytestmark = own_process("npu", "ascend")
if in_child():
    standins.install("npu")


if in_child():
    choose(DEVICE, "ascend")  # with its self-check, whose calls must not count


PLANES = 2 * LAYERS


@pytest.mark.parametrize(
    ("name", "gathers", "scatters"),
    [
        ("tuples", {SELECT: PLANES}, {SCATTER: LAYERS}),
        ("merged", {SELECT: PLANES}, {SCATTER: LAYERS}),
        ("offset", {SELECT: PLANES}, {SCATTER: LAYERS}),
        ("unequal", {SELECT: PLANES}, {SCATTER: LAYERS}),
        ("three", {SELECT: 3 * LAYERS}, {SCATTER: LAYERS, UPDATE: LAYERS}),
        ("head-major", {SELECT: PLANES}, {UPDATE: PLANES}),
        ("nz", {SELECT: PLANES}, {UPDATE: PLANES}),
        ("holes", {SELECT: PLANES}, {UPDATE: PLANES}),
        ("odd bytes", {SELECT: PLANES}, {UPDATE: PLANES}),
        ("two bytes", {SELECT: PLANES}, {COPY: PLANES}),
    ],
)
def test_which_op_serves_a_slot_mapping(
    name: str, gathers: dict[str, int], scatters: dict[str, int]
) -> None:
    assert both_ways(name, IDS, len(IDS)) == (gathers, scatters)


@pytest.mark.parametrize(
    ("name", "gathers"),
    [
        ("tuples", {GATHER: LAYERS}),
        ("merged", {GATHER: LAYERS}),
        ("unequal", {GATHER: LAYERS}),
        ("three", {GATHER: LAYERS, SELECT: LAYERS}),
        ("head-major", {SELECT: PLANES}),
        ("nz", {SELECT: PLANES}),
    ],
)
def test_which_op_serves_a_block_table(name: str, gathers: dict[str, int]) -> None:
    table = Index([3, 0, 2], step=SIZE)
    seen, _ = both_ways(name, table, 3 * SIZE)
    assert seen == gathers
    # Head and tail of a range that cuts through blocks go by slots.
    seen, _ = both_ways(name, Index([3, 0, 2], step=SIZE, offset=3), 2 * SIZE)
    assert SELECT in seen


def test_explain_names_the_op() -> None:
    caches, layout, _, rows = cached("tuples")
    view = KVView(moved(caches, there), layout)
    chunk = KVView(moved(chunk_for(view, 4, torch.bfloat16, 1), there), rows)
    backend = ascend.Ascend(DEVICE)
    assert backend.emulated
    for plan, op in [
        (CopyPlan(chunk.form, view.form, 0, 1), SCATTER),
        (CopyPlan(view.form, chunk.form, SIZE, 0), GATHER),
        (CopyPlan(view.form, chunk.form, 1, 0), "rows, through index ops"),
    ]:
        assert str(backend.check(plan)) == f"ascend: accepted, takes the plan by {op}"


@pytest.mark.parametrize("where", ["host", "device"])
def test_negative_slots_never_reach_an_op(where: str) -> None:
    caches, layout, _, rows = cached("tuples")
    view = KVView(moved(caches, there), layout)
    dense = chunk_for(view, 4, torch.bfloat16, 70)
    chunk = KVView(moved(dense, there), rows)
    ids = torch.tensor([9, -1, -(2**31), 5])
    index = ids if where == "host" else ids.to(DEVICE)
    with Recorded() as recorded:
        copy_rows(chunk, view, dst_index=index, backend="ascend").synchronize()
    assert simdev.take_faults() == []  # where an op met a negative slot
    assert recorded.seen == {SELECT: PLANES, UPDATE: PLANES}  # what is left of the chunk has holes
    for mine, old, new in zip(leaves(view.tensors), leaves(caches), leaves(dense), strict=True):
        wanted = old.clone().view(torch.int16)
        wanted.view(SLOTS, HEADS, -1)[[9, 5]] = new.view(torch.int16)[[0, 3]]
        assert mine.cpu().view(torch.int16).equal(wanted)


def test_slots_past_the_end_move_nothing_there() -> None:
    caches, layout, _, rows = cached("unequal")
    view = KVView(moved(caches, there), layout)
    chunk = KVView(moved(chunk_for(view, 3, torch.float16, 70), there), rows)
    with pytest.raises(SlotError, match=rf"slot {SLOTS}, but the view has {SLOTS} slots"):
        copy_rows(chunk, view, dst_index=[1, SLOTS, 2], backend="ascend")
    transfer = copy_rows(
        chunk, view, dst_index=torch.tensor([1, SLOTS, 2]).to(DEVICE), backend="ascend"
    )
    with pytest.raises(SlotError, match=f"slot {SLOTS}"):
        transfer.synchronize()
    assert simdev.take_faults() == []
    outside = [n for n in range(SLOTS) if n not in (1, 2)]
    for mine, old in zip(leaves(view.tensors), leaves(caches), strict=True):
        mine, old = (x.cpu().view(torch.int16).view(SLOTS, HEADS, -1) for x in (mine, old))
        assert mine[outside].equal(old[outside])


def test_a_tensor_in_a_private_format_is_refused_before_anything_moves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The stand-in knows ND alone; the schema job does this with a real FRACTAL_NZ tensor.
    monkeypatch.setattr(ascend, "_STRIDED", (0, 30))
    caches, layout, _, rows = cached("tuples")
    view = KVView(moved(caches, there), layout)
    chunk = KVView(moved(chunk_for(view, 3, torch.bfloat16, 70), there), rows)
    with (
        Recorded() as recorded,
        pytest.raises(Unsupported, match=r"NPU format 2.*nothing was moved"),
    ):
        copy_rows(chunk, view, dst_index=[1, 2, 3], backend="ascend")
    assert not recorded.seen


def test_host_memory_is_refused_by_the_plan() -> None:
    caches, layout, _, rows = cached("tuples")
    view = KVView(moved(caches, there), layout)
    dense = KVView(chunk_for(view, 4, torch.bfloat16, 1), rows)
    decision = ascend.Ascend(DEVICE).check(CopyPlan(view.form, dense.form, 1, 0))
    assert str(decision) == "ascend: rejected, it does not copy from device to pageable memory"


def test_block_migration_within_one_cache() -> None:
    caches, layout, _, _ = cached("three")
    view = KVView(moved(caches, there), layout, kv=3)
    copy_blocks(view, view, [0, 2], [3, 1], backend="ascend").synchronize()
    for mine, old in zip(leaves(view.tensors), leaves(caches), strict=True):
        wanted = old.view(torch.int16)[[0, 2, 2, 0]]
        assert mine.cpu().view(torch.int16).equal(wanted)


def test_the_connector_chooses_it_and_imports_no_other_vendor_s_package() -> None:
    class Asked:
        """An installed torch_mlu; whoever imports it is found out."""

        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            assert name.partition(".")[0] not in ("torch_mlu", "torch_mlu_ops"), name

    finder: Any = Asked()
    sys.meta_path.insert(0, finder)
    try:
        connector = AdaptiveConnector(
            "npu", kv_layout="layer kv | block token head dim",
            chunk_layout="kv layer token (head dim)",
        )  # fmt: skip
        told = connector.explain()
    finally:
        sys.meta_path.remove(finder)
    assert "backend 'ascend' was chosen" in told
    said = f"ascend: accepted, torch_npu {torch.__version__}, emulated; copies go by its ops, since"
    assert said in told
    assert "self-check passed" in told
    assert any(str(d).startswith("reference: accepted") for d in trace("npu"))


@pytest.mark.parametrize("given", [False, True], ids=["no stream", "a stream"])
@pytest.mark.parametrize("ids", [IDS, Index([3, 0, 2], step=SIZE)], ids=["slots", "blocks"])
def test_copies_on_another_device_than_the_current_one(ids: Any, given: bool) -> None:
    """torch_npu launches an op on the current device, wherever its tensors are."""
    caches, layout, extents, rows = cached("three")
    tokens = 3 * SIZE if isinstance(ids, Index) else len(ids)
    host = KVView(moved(caches, torch.clone), layout, **extents)
    far = KVView(moved(caches, lambda x: x.to(OTHER)), layout, **extents)
    dense = chunk_for(host, tokens, torch.bfloat16, 70)
    chunk = KVView(moved(dense, torch.clone), rows, kv=3)
    far_chunk = KVView(moved(dense, lambda x: x.to(OTHER)), rows, kv=3)
    assert torch.accelerator.current_device_index() == 0
    stream = torch.Stream(device=OTHER) if given else None
    for scatter in (True, False):
        at: dict[str, Any] = {"dst_index" if scatter else "src_index": ids, "count": tokens}
        copy_rows(*((chunk, host) if scatter else (host, chunk)), **at, backend="reference")
        sides = (far_chunk, far) if scatter else (far, far_chunk)
        copy_rows(*sides, **at, backend="ascend", stream=stream).synchronize()
    assert torch.accelerator.current_device_index() == 0
    for mine, theirs in ((host, far), (chunk, far_chunk)):
        pairs = zip(leaves(mine.tensors), leaves(theirs.tensors), strict=True)
        assert all(plain(a).equal(plain(b.cpu())) for a, b in pairs)


def test_an_op_on_another_device_than_the_current_one_is_refused() -> None:
    matrix, rows = torch.zeros(4, 2).to(OTHER), torch.ones(1, 2).to(OTHER)
    where = torch.tensor([[1]]).to(OTHER)
    with pytest.raises(RuntimeError, match="tensor on npu:1; the current device is npu:0"):
        torch.ops.npu.npu_scatter_nd_update_(matrix, where, rows)


def test_the_dispatcher_refuses_what_the_vendor_s_would() -> None:
    rows = torch.zeros(2, 1, 32).to(DEVICE)
    with pytest.raises(RuntimeError, match="Unknown keyword argument 'slots'"):
        torch.ops.npu.npu_scatter_pa_kv_cache(rows, rows, rows, rows, rows, slots=rows)


def test_the_stand_in_leaves_another_package_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    vendor = ModuleType("torch_npu")
    monkeypatch.setitem(sys.modules, "torch_npu", vendor)
    standins.install("npu")
    assert sys.modules["torch_npu"] is vendor
