# SPDX-License-Identifier: Apache-2.0
"""`descriptors`: ids wherever they are, lists that are remembered, memory that is held."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from support.device_cases import current, delay
from support.engine_cases import DOWNWARD, cases, index_of, tensors_of, view_of
from support.guarded_memory import check_sentence
from support.simdev_cases import DEVICE, OTHER
from support.threads import run_threads

from portakv import CopyPlan, Index, KVView, SlotError
from portakv.engines import descriptors
from portakv.engines.descriptors import LEAST_RUN, Descriptors
from portakv.engines.engine import Engine
from portakv.engines.link import TorchLink
from portakv.engines.staged import Staged
from portakv.host import pinned
from portakv.plan.runs import Runs
from portakv.runtime.transfer import copies_holding_memory

PAGED, CHUNK = cases()[0].device, cases()[0].host


class Scene:
    """A paged cache on a device, a chunk in pinned memory, and a launch between them."""

    def __init__(
        self, device: torch.device, downward: bool = True, engine: type[Engine] = Descriptors
    ) -> None:
        self.device, self.downward, self.tokens = device, downward, 32
        self.cache = [layer.to(device) for layer in tensors_of(PAGED, 0, 1)]
        self.chunk = tensors_of(CHUNK, self.tokens, 2).pin_memory()
        rows, host = view_of(self.cache, PAGED), view_of(self.chunk, CHUNK)
        self.views = (rows, host) if downward else (host, rows)
        steps = (1, 0) if downward else (0, 1)
        self.plan = CopyPlan(self.views[0].form, self.views[1].form, *steps)
        self.launch = engine(device).prepare(self.plan)

    def go(self, ids: Index, host: torch.Tensor | None = None) -> None:
        """Copy rows under these ids; ``host``: another chunk."""
        views = list(self.views)
        if host is not None:
            views[self.downward] = view_of(host, CHUNK)
        indices = (ids, Index()) if self.downward else (Index(), ids)
        self.launch(views[0], views[1], *indices, self.tokens, None, None)

    def stored(self, ids: list[int]) -> torch.Tensor:
        """What the chunk must hold once these slots were stored."""
        torch.accelerator.synchronize(self.device)
        layers = torch.stack([layer.cpu() for layer in self.cache])
        return layers.transpose(0, 1).flatten(2, 3)[:, :, ids].flatten(3)


def test_ids_may_lie_anywhere(accelerator: torch.device) -> None:
    scene = Scene(accelerator)
    for where in (torch.device("cpu"), accelerator):
        for dtype in (torch.int32, torch.int64):
            ids = torch.randperm(190)[:32]
            scene.go(Index(ids.to(where, dtype)))
            torch.accelerator.synchronize(accelerator)
            assert torch.equal(scene.chunk, scene.stored(ids.tolist())), where


@pytest.mark.parametrize("on_host", [True, False])
def test_an_id_past_the_end_moves_nothing(accelerator: torch.device, on_host: bool) -> None:
    scene, ids = Scene(accelerator), torch.arange(32)
    ids[7] = 24 * 8
    before = scene.chunk.clone()
    with pytest.raises(SlotError) as caught:
        scene.go(Index(ids if on_host else ids.to(accelerator)))
    check_sentence(str(caught.value), "192")
    torch.accelerator.synchronize(accelerator)
    assert torch.equal(scene.chunk, before)


def test_negative_ids_are_left_out(accelerator: torch.device) -> None:
    scene, ids = Scene(accelerator), torch.arange(32)
    before = scene.chunk.clone()
    ids[5:9] = -1
    scene.go(Index(ids))
    torch.accelerator.synchronize(accelerator)
    kept = ids >= 0
    assert torch.equal(scene.chunk[:, :, kept], scene.stored(ids[kept].tolist()))
    assert torch.equal(scene.chunk[:, :, ~kept], before[:, :, ~kept])
    scene.tokens = 0  # nothing is no copy
    before = scene.chunk.clone()
    scene.go(Index([1, 2]))
    torch.accelerator.synchronize(accelerator)
    assert torch.equal(scene.chunk, before)


@pytest.mark.simdev
def test_a_list_that_is_used_again_is_expanded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scene, asked, real = Scene(DEVICE), list[int](), CopyPlan.runs

    def runs(self: CopyPlan, *args: object) -> Runs:
        asked.append(1)
        return real(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(CopyPlan, "runs", runs)
    ids = torch.randperm(150)[:40]
    index = Index(ids)
    for again, expected in ((index, 1), (index, 1), (index.shifted(3), 2), (index.shifted(3), 2)):
        scene.go(again)
        assert len(asked) == expected
    # Another index of the same tensor may be made after its ids have changed.
    ids.copy_(ids.flip(0))
    scene.go(Index(ids))
    assert len(asked) == 3
    wanted = scene.stored(ids[:32].tolist())
    assert torch.equal(scene.chunk, wanted)
    other = torch.zeros_like(scene.chunk).pin_memory()
    scene.go(Index(ids), other)  # another memory under a list of the same ids
    torch.accelerator.synchronize(DEVICE)
    assert torch.equal(other, wanted)


@pytest.mark.simdev
def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "MOST_KEPT", 500)
    monkeypatch.setattr(TorchLink, "copy", lambda *args: None)
    scene, kept = Scene(DEVICE), list[Index]()
    for seed in range(30):
        kept.append(index_of((torch.randperm(190)[: 8 + seed].tolist(), 1)))
        scene.tokens = 8 + seed if seed < 24 else 32
        scene.go(kept[-1])
        known = scene.launch._known  # type: ignore[attr-defined]
        number = sum(pieces.number + 1 for pieces in known._pieces.values())
        assert 0 < known._number == number <= 500
        assert kept[-1].ids_token in next(reversed(known._pieces))


@pytest.mark.parametrize("engine", [Descriptors, Staged])
def test_host_memory_outlives_the_copy(accelerator: torch.device, engine: type[Engine]) -> None:
    """Forgotten while the copy flies."""
    torch.accelerator.synchronize(accelerator)
    assert copies_holding_memory() == 0
    scene = Scene(accelerator, False, engine)
    wanted, cache, index = scene.chunk.clone(), scene.cache, Index(list(range(32)))
    scene.go(index)  # what is made once is there
    for layer in cache:
        layer.zero_()
    torch.accelerator.synchronize(accelerator)
    delay(current(accelerator))
    scene.go(index)
    assert copies_holding_memory() == 1
    del scene
    gc.collect()
    rubbish = [torch.full_like(wanted, 7).pin_memory() for _ in range(4)]
    torch.accelerator.synchronize(accelerator)
    layers = torch.stack([layer.cpu() for layer in cache])
    assert torch.equal(layers.transpose(0, 1).flatten(2, 3)[:, :, :32].flatten(3), wanted)
    assert copies_holding_memory() == 0
    del rubbish


@DOWNWARD
def test_scattered_blocks_of_separate_layers(accelerator: torch.device, downward: bool) -> None:
    """Layers in allocations of their own, registered memory of several registrations."""
    layers, blocks, size = 6, 64, 4096
    noise = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (13, blocks, 1, size)))
    rows = list(noise[:12].to(accelerator, torch.uint8).view(layers, 2 * blocks, 1, size))
    order = torch.randperm(2 * blocks)[:blocks]
    with pinned.allocate(layers * blocks * size, largest=5 * 4096) as memory:
        host = memory.tensor.view(layers, blocks, 1, size)
        host.copy_(noise[12])
        views = KVView(rows, "layer | block token dim"), KVView(host, "layer block token dim")
        indices = Index(order), Index(list(range(blocks)))
        if not downward:
            views, indices = views[::-1], indices[::-1]
        plan = CopyPlan(views[0].form, views[1].form, 1, 1)
        Descriptors(accelerator).prepare(plan)(*views, *indices, blocks, None, None)
        torch.accelerator.synchronize(accelerator)
        for at, layer in enumerate(rows):
            assert torch.equal(layer[order].cpu(), host[at])


def test_from_several_threads(accelerator: torch.device) -> None:
    scene = Scene(accelerator)
    chunks = [torch.zeros_like(scene.chunk).pin_memory() for _ in range(3)]
    lists = [torch.randperm(190)[:32].tolist() for _ in chunks]

    def store(number: int) -> None:
        for _ in range(2):
            scene.go(Index(lists[number]), chunks[number])

    run_threads(store, range(3))
    torch.accelerator.synchronize(accelerator)
    for chunk, ids in zip(chunks, lists, strict=True):
        assert torch.equal(chunk, scene.stored(ids))


@pytest.mark.simdev
def test_plans_that_it_refuses() -> None:
    engine, noise = Descriptors(DEVICE), torch.arange(4096).to(torch.uint8)
    device = noise.to(DEVICE)
    for host, place in ((noise, "pageable"), (noise.pin_memory(), "pinned")):
        views = [KVView(each.view(-1, 64), "token dim") for each in (device, host)]
        decision = engine.check(CopyPlan(views[0].form, views[1].form))
        assert decision.accepted is (place == "pinned")
        assert place == "pinned" or "pageable" in decision.reason
    src = KVView(device.view(-1, 4, LEAST_RUN // 2), "token head dim")
    dst = KVView(noise.pin_memory().view(4, -1, LEAST_RUN // 2), "head token dim")
    decision = engine.check(CopyPlan(src.form, dst.form))
    assert not decision.accepted
    assert f"runs of {LEAST_RUN} B" in decision.reason
    assert f"{LEAST_RUN // 2} B" in decision.reason
    assert not Descriptors.probe(torch.device("cpu")).accepted
    assert Descriptors.probe(OTHER).accepted
    assert not engine.capabilities().capturable
