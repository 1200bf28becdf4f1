# SPDX-License-Identifier: Apache-2.0
"""The engine `direct` on a CUDA device: real pinned memory, both ways, streams and graphs.

Every byte of every copy of the table is judged in `test_staged.py`, memory that the library pins in
`tests/blocks/test_blocks_gpu.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.cuda_cases import COPIES, Copy, by, chunk, objects, pool
from support.device_cases import DEVICE, LONG
from support.each_backend import Elsewhere
from support.engine_cases import DOWNWARD
from support.guarded_memory import tensors_in

from portakv import Index, KVView
from portakv.engines import direct
from portakv.engines.direct import Direct
from portakv.engines.engine import Terms
from portakv.plan.plan import CopyPlan
from portakv.runtime import cuda as _cuda_driver

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def engine() -> Direct:
    decision = Direct.probe(DEVICE)
    if not decision.accepted:
        pytest.skip(decision.reason)
    return Direct(DEVICE)


def judged(copied: Copy, engine: Direct, downward: bool) -> int:
    """Launch on the device and judge every byte; returns the status word."""
    status = torch.zeros(1, dtype=torch.int64).pin_memory()

    def run() -> None:
        sides = [Elsewhere(DEVICE), Elsewhere("pinned")][:: 1 if downward else -1]
        src, dst = (x.views(end)[0] for x, end in zip(sides, (copied.src, copied.dst), strict=True))
        indices = copied.src.index(), copied.dst.index()
        assert {src.form.place, dst.form.place} == {"device", "pinned"}
        launch = engine.prepare(CopyPlan(src.form, dst.form, *(x.plan_step for x in indices)))
        torch.cuda.synchronize()
        dtypes = engine.capabilities().index_dtypes
        mine, theirs = (x.placed(DEVICE, dtypes) for x in indices)
        launch(src, dst, mine, theirs, copied.count, None, status)
        torch.cuda.synchronize()
        for side in sides:
            side.bring_back()

    copied.check(run)
    return int(status)


@DOWNWARD
def test_large_copies_in_many_turns(engine: Direct, downward: bool) -> None:
    """15 MB in rows of 256 B; one block takes 225 turns."""
    slots = torch.randperm(256 * 4).tolist()[:960]
    for terms in (None, Terms(max_thread_blocks=1), Terms(max_thread_blocks=40)):
        chosen = engine if terms is None else Direct(DEVICE, terms=terms)
        paged, dense = pool(layers=30, blocks=256, dim=64), chunk(960, layers=30, dim=64)
        assert judged(Copy(by(paged, slots), dense, 960), chosen, downward) == 0
        assert judged(Copy(dense, by(paged, slots), 960), chosen, downward) == 0


@DOWNWARD
@pytest.mark.parametrize(("bad", "most"), [(12, 2**30), (2**31 - 1, 50), (2**63 - 1, 2**30)])
def test_bad_ids_move_nothing_and_are_told(
    engine: Direct, bad: int, most: int, downward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by several launches."""
    monkeypatch.setattr(direct, "MAX_VECTORS", most)
    slots = [3, 1, -1, 7, bad, 11, 5, -(2**31)]
    assert judged(Copy(by(pool(), slots), chunk(8), 8), engine, downward) == 5
    assert judged(Copy(chunk(8), by(pool(), slots), 8), engine, downward) == 5


# Order


class Moved:
    """A copy of memory objects, both ways, with everything at hand."""

    def __init__(self, engine: Direct, downward: bool, listed: bool) -> None:
        cache = torch.randint(-30000, 30000, (3, 2, 3, 4, 16), dtype=torch.int16)
        self.cache = cache.to(DEVICE)
        host = objects() if listed else chunk(12)
        self.host = [x.clone().zero_().pin_memory() for x in tensors_in(host.tensors)]
        tensors = self.host if listed else self.host[0]
        paged = KVView(self.cache, "layer kv block token (head dim)", heads=2)
        dense = KVView(tensors, host.layout, **host.extents)
        step = Index(torch.tensor([1, 0, 2], device=DEVICE), step=4)
        self.views = (paged, dense) if downward else (dense, paged)
        self.indices = (step, Index()) if downward else (Index(), step)
        steps = [x.plan_step for x in self.indices]
        plan = CopyPlan(self.views[0].form, self.views[1].form, *steps, reinterpret=True)
        self.downward, self._launch = downward, engine.prepare(plan)

    def launch(self, stream: Any = None) -> None:
        self._launch(*self.views, *self.indices, 12, stream, None)

    def rows(self) -> torch.Tensor:
        """What the host should hold: ``[kv, layer, token, head dim]``."""
        held = self.cache.cpu()[:, :, [1, 0, 2]].transpose(0, 1)
        return held.reshape(2, 3, 12, 16)

    def landed(self) -> torch.Tensor:
        parts = [x.view(torch.int16).view(2, 3, -1, 16) for x in self.host]
        return torch.cat(parts, dim=2)


@pytest.fixture(params=[False, True], ids=["chunk", "objects"])
def listed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize("on_side", [False, True])
def test_a_store_comes_behind_what_its_stream_holds_and_the_host_does_not_wait(
    engine: Direct, listed: bool, on_side: bool
) -> None:
    """Nor at the first launch, which sends the table of addresses."""
    warm, moved = Moved(engine, True, listed), Moved(engine, True, listed)
    warm.launch()
    fresh = moved.cache.flip(0)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream(DEVICE) if on_side else None
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        moved.cache.copy_(fresh)
        moved.launch(stream)
        assert not torch.cuda.current_stream().query(), "the launch blocked the host"
    torch.cuda.synchronize()
    assert torch.equal(moved.cache, fresh)
    assert torch.equal(moved.landed(), moved.rows())


# Graphs


@DOWNWARD
def test_a_captured_copy_moves_what_is_there_at_each_replay(
    engine: Direct, listed: bool, downward: bool
) -> None:
    moved = Moved(engine, downward, listed)
    moved.launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moved.launch()
    for _ in range(3):
        for source in [moved.cache] if downward else moved.host:
            source.view(torch.int16).random_(-30000, 30000)
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(moved.landed(), moved.rows())


# Memory


def test_an_address_that_no_kernel_reaches() -> None:
    pageable, pinned = torch.zeros(4096), torch.zeros(4096).pin_memory()
    assert direct.device_address(pinned.data_ptr() + 64, DEVICE) == pinned.data_ptr() + 64
    reached = direct.device_address(pageable.data_ptr(), DEVICE)
    assert reached in (0, pageable.data_ptr()), "a device that reaches all memory may say so"
    torch.cuda.synchronize()


def test_the_kernel_starts_with_as_many_threads_as_it_is_cut_for(engine: Direct) -> None:
    """Registers of all instances of the table allow a block, without local memory."""
    driver = _cuda_driver.bindings()
    attribute = driver.CUfunction_attribute
    for name in sorted(COPIES)[:12]:
        copied = COPIES[name]()
        (src,), (dst,) = Elsewhere(DEVICE).views(copied.src), Elsewhere("pinned").views(copied.dst)
        steps = (copied.src.index().plan_step, copied.dst.index().plan_step)
        engine.prepare(CopyPlan(src.form, dst.form, *steps))
    for loaded in engine._kernels._loaded.values():
        for function in loaded.values():
            _, threads = driver.cuFuncGetAttribute(
                attribute.CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, function
            )
            _, local = driver.cuFuncGetAttribute(
                attribute.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, function
            )
            assert int(threads) >= direct.CUT.threads
            assert int(local) < 128, "what a thread has under way lies in registers"
