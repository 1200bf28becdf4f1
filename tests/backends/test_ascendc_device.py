# SPDX-License-Identifier: Apache-2.0
"""`ascend` with the AscendC kernel on the simulated device named npu: the real loader, arguments
and launches, over the emulation that ``PORTAKV_ASCENDC`` names.
"""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ascend_cases import (
    BLOCKS,
    DEVICE,
    HEADS,
    IDS,
    LAYERS,
    OTHER,
    SIZE,
    SLOTS,
    both_ways,
    cached,
    chunk_for,
    leaves,
    moved,
    plain,
    there,
)
from support.own_process import own_process

from portakv import CopyPlan, Index, KVView, SlotError, TransferError, copy_rows
from portakv.backends import _ascend_kernel, ascend
from portakv.backends import _ascend_kernel as _ascendc
from portakv.plan.move import Move
from portakv.registry.registry import choose, trace
from portakv_conformance import simdev
from portakv_conformance.vendor import standins

pytestmark = own_process("npu", "ascendc")
SCRIPT = Path(__file__).resolve().parents[2] / "native" / "ascend" / "emulation" / "run.sh"


@pytest.fixture(scope="session", autouse=True)
def _library(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The emulated kernel, built and named to `ascend` before it is chosen."""
    path = tmp_path_factory.mktemp("kernel") / "libportakv_ascend.so"
    subprocess.run(["bash", str(SCRIPT), "library", str(path)], check=True, capture_output=True)
    os.environ[_ascendc.VARIABLE] = str(path)
    standins.install("npu")  # which looks where the kernel is
    choose(DEVICE, "ascend")  # with its self-check, whose calls must not count


NAMES = [
    "tuples", "unequal", "three", "odd bytes", "two bytes", "holes", "merged", "offset",
    "head-major", "nz",
]  # fmt: skip
CALLED: Counter[str] = Counter()  # no op of torch_npu, nor an index op of torch


def sides(at: torch.device) -> tuple[KVView, KVView, Any]:
    """A cache and a chunk of four tokens on a device, and what the chunk holds."""
    caches, layout, _, rows = cached("tuples")
    view = KVView(moved(caches, lambda x: x.to(at)), layout)
    dense = chunk_for(view, 4, torch.bfloat16, 70)
    return view, KVView(moved(dense, lambda x: x.to(at)), rows), dense


def in_slots(view: KVView) -> list[torch.Tensor]:
    """The cache's tensors on the host, ``[slots, heads, dim]``, as integers."""
    return [x.cpu().view(torch.int16).view(SLOTS, HEADS, -1) for x in leaves(view.tensors)]


def test_the_registry_tells_that_the_kernel_was_taken() -> None:
    library = Path(os.environ[_ascendc.VARIABLE]).name
    (decision,) = [one for one in trace("npu") if one.name == "ascend"]
    assert str(decision).startswith(
        f"ascend: accepted, torch_npu {torch.__version__}, emulated; copies go by the AscendC "
        f"kernel in {library}, emulated; self-check passed"
    )
    claims = ascend.Ascend(DEVICE).capabilities()
    assert claims.guards
    assert claims.skips_negative


@pytest.mark.parametrize("name", NAMES)
def test_any_layout_goes_by_the_kernel(name: str) -> None:
    assert both_ways(name, IDS, len(IDS)) == (CALLED, CALLED)
    assert both_ways(name, Index(IDS), len(IDS)) == (CALLED, CALLED)
    assert both_ways(name, Index([3, 0, 2], step=SIZE), 3 * SIZE) == (CALLED, CALLED)
    # A range that cuts through blocks.
    assert both_ways(name, Index([3, 0, 2], step=SIZE, offset=3), 2 * SIZE) == (CALLED, CALLED)


def test_bad_ids_on_the_device_are_skipped_and_told_without_a_wait() -> None:
    view, chunk, dense = sides(DEVICE)
    before = in_slots(view)
    ids = torch.tensor([9, -(2**40), SLOTS, 5]).to(DEVICE)
    waited = simdev.synchronised()
    transfer = copy_rows(chunk, view, dst_index=ids, backend="ascend")
    assert simdev.synchronised() == waited
    with pytest.raises(SlotError, match="Position 2 of a device index is past the end"):
        transfer.synchronize()
    for mine, old, new in zip(in_slots(view), before, leaves(dense), strict=True):
        old[[9, 5]] = new.view(torch.int16)[[0, 3]]
        assert mine.equal(old)


@pytest.mark.parametrize("given", [False, True], ids=["no stream", "a stream"])
def test_copies_on_another_device_than_the_current_one(given: bool) -> None:
    view, chunk, dense = sides(OTHER)
    before = in_slots(view)
    stream = torch.Stream(device=OTHER) if given else None
    copy_rows(chunk, view, dst_index=[9, 2, 30, 5], backend="ascend", stream=stream).synchronize()
    for mine, old, new in zip(in_slots(view), before, leaves(dense), strict=True):
        old[[9, 2, 30, 5]] = new.view(torch.int16)
        assert mine.equal(old)


def kernel_rows(plan: CopyPlan, device: torch.device = DEVICE) -> _ascendc.KernelRows:
    kernel, _ = _ascendc.find_kernel(True)
    assert kernel is not None
    return _ascendc.KernelRows(kernel, plan, device)


def test_a_stream_of_another_device_than_the_current_one_is_refused() -> None:
    view, chunk, _ = sides(OTHER)
    rows = kernel_rows(CopyPlan(chunk.form, view.form, 0, 0), OTHER)
    with pytest.raises(TransferError, match=r"returned 107003; the copy was not made"):
        rows(Move(chunk, view, Index(), Index(), 4), None)


def test_a_status_word_on_the_host_is_refused() -> None:
    """A vector core does not reach it, pinned or not."""
    view, chunk, _ = sides(DEVICE)
    word = torch.zeros(1, dtype=torch.int64).pin_memory()
    arguments = _ascend_kernel.Arguments(CopyPlan(chunk.form, view.form, 0, 0))
    nests = [torch.frombuffer(bytearray(nest), dtype=torch.int64).to(DEVICE)
             for nest in arguments.nests]  # fmt: skip
    addresses = [nest.data_ptr() for nest in nests]
    move = Move(chunk, view, Index(), Index(), 4)
    copy = arguments.copies(addresses, move, word.data_ptr())[0]
    kernel, _ = _ascendc.find_kernel(True)
    assert kernel is not None
    stream = torch.get_device_module("npu").current_stream(DEVICE).npu_stream
    with pytest.raises(TransferError, match=r"returned 507053; the copy was not made"):
        kernel.launch(copy, [(word.data_ptr(), 8, True)], stream)


def test_memory_that_no_side_covers_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    view, chunk, _ = sides(DEVICE)
    monkeypatch.setattr(
        _ascend_kernel, "_spans",
        lambda view, writable: [(first, past - first - 1, True) for first, past in view.spans],
    )  # fmt: skip
    transfer = copy_rows(chunk, view, dst_index=[9, 2, SLOTS - 1, 5], backend="ascend")
    with pytest.raises(Exception, match=r"emulated AscendC kernel failed.*lies in no alloc"):
        transfer.synchronize()
    simdev.take_faults()


def test_a_plan_that_the_kernel_does_not_take_goes_by_index_ops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_ascend_kernel, "MAX_LOOPS", 0)
    view, chunk, dense = sides(DEVICE)
    plan = CopyPlan(chunk.form, view.form, 0, 1)
    assert str(ascend.Ascend(DEVICE).check(plan)) == (
        "ascend: accepted, takes the plan by index ops, after a wait, since the AscendC kernel "
        "takes 0 loops beside the rows and 4 steps of a unit, and the plan has 2 and 1"
    )
    before = in_slots(view)
    status = torch.zeros(1, dtype=torch.int64).pin_memory()
    ids = Index(torch.tensor([9, -1, SLOTS, 5]).to(DEVICE))
    ascend.Ascend(DEVICE).prepare(plan)(chunk, view, Index(), ids, 4, None, status)
    torch.accelerator.synchronize(DEVICE)
    assert int(status) == 3
    for mine, old, new in zip(in_slots(view), before, leaves(dense), strict=True):
        old[[9, 5]] = new.view(torch.int16)[[0, 3]]
        assert mine.equal(old)


def test_an_empty_copy_launches_nothing() -> None:
    view, chunk, _ = sides(DEVICE)
    before = in_slots(view)
    copy_rows(chunk, view, dst_index=[], backend="ascend").synchronize()
    assert all(a.equal(b) for a, b in zip(in_slots(view), before, strict=True))


def test_a_prepared_launch_serves_any_request_of_its_plan() -> None:
    """The nests are uploaded once; every address and count is the request's."""
    caches, layout, _, _ = cached("tuples")
    first, second = (KVView(moved(caches, there), layout) for _ in range(2))
    plan = CopyPlan(first.form, second.form, SIZE, SIZE)
    launch = ascend.Ascend(DEVICE).prepare(plan)
    for mine, theirs in ((first, second), (second, first)):
        wanted = [plain(x.cpu()).view(BLOCKS, -1) for x in leaves(theirs.tensors)]
        sources = [plain(x.cpu()).view(BLOCKS, -1) for x in leaves(mine.tensors)]
        from_, to = (
            Index([at], step=SIZE).placed(DEVICE, frozenset({torch.int64})) for at in (1, 3)
        )
        launch(mine, theirs, from_, to, SIZE, None, None)
        for found, old, new in zip(leaves(theirs.tensors), wanted, sources, strict=True):
            old[3] = new[1]
            assert plain(found.cpu()).view(BLOCKS, -1).equal(old)
    assert LAYERS == 2
