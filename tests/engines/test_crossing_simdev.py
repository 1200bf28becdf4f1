# SPDX-License-Identifier: Apache-2.0
"""Crossings and `descriptors` on the simulated device, whose copies are torch's: every byte, order,
and who waits."""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from support.crossing_cases import bytes_of_pieces, drawn_runs, runs_of
from support.engine_cases import Case, cases, index_of, judge, tensors_of, view_of
from support.guarded_memory import check_sentence, refused
from support.simdev_cases import DEVICE, OTHER, current

from portakv import CopyPlan, Index, KVView, SlotError, TransferError
from portakv.engines import descriptors
from portakv.engines.descriptors import LEAST_RUN, Descriptors
from portakv.engines.link import TorchLink, link_of
from portakv.engines.pieces import to_2d_copies
from portakv.plan.runs import Runs
from portakv.runtime.transfer import copies_holding_memory
from portakv_conformance import simdev

pytestmark = pytest.mark.simdev

REPEATS = 5
CASES = cases()


@pytest.fixture(autouse=True)
def _no_faults_left() -> Iterator[None]:
    yield
    torch.accelerator.synchronize(DEVICE)
    assert not simdev.take_faults()


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, pin_memory=True).copy_(tensor)


def pageable(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone()


def noise(nbytes: int, seed: int = 1) -> torch.Tensor:
    random = np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)
    return torch.from_numpy(random)


def bytes_view(memory: torch.Tensor) -> KVView:
    return KVView(memory.view(-1, 1), "token dim")


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("to_device", [True, False])
@pytest.mark.parametrize("on_host", [pinned, pageable])
def test_every_byte_of_any_pieces(
    on_host: Callable[[torch.Tensor], torch.Tensor], to_device: bool, early: bool
) -> None:
    @settings(max_examples=40, deadline=None)
    @given(drawn_runs())
    def check(runs: Runs) -> None:
        pieces = to_2d_copies(runs)
        room = int(max((at + runs.nbytes).max(initial=0) for at in runs[:2])) + 16
        source, target = noise(room), noise(room, seed=2)
        expected = target.numpy().copy()
        for to, start in bytes_of_pieces(pieces):
            expected[to] = source[start]
        there, here = (target, source) if to_device else (source, target)
        device, host = there.to(DEVICE), on_host(here)
        dst, src = (device, host) if to_device else (host, device)
        placed = pieces._replace(dst=pieces.dst + dst.data_ptr(), src=pieces.src + src.data_ptr())
        if early:
            with simdev.early():
                link_of(DEVICE).copy(placed, bytes_view(src), bytes_view(dst))
        else:
            link_of(DEVICE).copy(placed, bytes_view(src), bytes_view(dst))
        torch.accelerator.synchronize(DEVICE)
        assert (dst.cpu().numpy() == expected).all()

    check()


def test_torch_copies_where_no_driver_does() -> None:
    assert isinstance(link_of(DEVICE), TorchLink)
    assert link_of(DEVICE) is link_of(DEVICE)


@pytest.mark.parametrize("to_device", [True, False])
@pytest.mark.parametrize("side", [False, True])
def test_pinned_memory_keeps_no_host_waiting(to_device: bool, side: bool) -> None:
    """Rows on either side, in the order of the stream; the host goes on at once."""
    for _ in range(REPEATS):
        source, fresh = noise(6400), noise(6400, seed=3)
        first, second = (pinned(source), fresh.to(DEVICE)) if to_device else (
            source.to(DEVICE), pinned(torch.zeros(6400, dtype=torch.uint8)))  # fmt: skip
        torch.accelerator.synchronize(DEVICE)
        rows = runs_of(range(0, 6400, 64), range(16, 6400, 64), 32)
        pieces = to_2d_copies(rows._replace(src=rows.src + first.data_ptr(),
                                    dst=rows.dst + second.data_ptr()))  # fmt: skip
        assert pieces.number == 1
        stream = torch.Stream(DEVICE) if side else None
        simdev.delay(stream or current(), 1)
        link_of(DEVICE).copy(pieces, bytes_view(first), bytes_view(second), stream)
        assert not (stream or current()).query()
        (stream or current()).synchronize()
        landed = second.cpu().view(-1, 64)[:, 16:48]
        assert torch.equal(landed, source.view(-1, 64)[:, :32])


@pytest.mark.parametrize("to_device", [True, False])
@pytest.mark.parametrize("on_host", [pinned, pageable])
def test_torch_is_never_given_strided_host_memory(
    on_host: Callable[[torch.Tensor], torch.Tensor],
    to_device: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Vendors' torch packs it on the host: at once, whatever the stream still holds, or waiting.
    And pageable memory must have been read when the call returns."""
    device, host = noise(6400).to(DEVICE), on_host(noise(6400))
    runs = runs_of(range(0, 6400, 64), range(16, 6400, 64), 32)
    src, dst = (host, device) if to_device else (device, host)
    placed = runs._replace(src=runs.src + src.data_ptr(), dst=runs.dst + dst.data_ptr())
    real, seen = torch.Tensor.copy_, []

    def copy_(target: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> torch.Tensor:
        on_the_host = source if to_device else target
        assert on_the_host.device.type == "cpu"
        seen.append((on_the_host.is_contiguous(), non_blocking))
        return real(target, source, non_blocking)

    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    link_of(DEVICE).copy(to_2d_copies(placed), bytes_view(src), bytes_view(dst))
    torch.accelerator.synchronize(DEVICE)
    assert set(seen) == {(True, on_host is pinned)}


def test_memory_that_is_in_no_view() -> None:
    device, host = noise(64).to(DEVICE), pinned(noise(64))
    runs = runs_of([device.data_ptr()], [host.data_ptr()], 65)
    with refused(TransferError, "65 bytes", "no single allocation", watch=host):
        link_of(DEVICE).copy(to_2d_copies(runs), bytes_view(device), bytes_view(host))


@pytest.mark.parametrize("downward", [True, False], ids=["d2h", "h2d"])
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_descriptors_move_every_byte(case: Case, downward: bool) -> None:
    judge(case, Descriptors(DEVICE), downward, pinned)


@pytest.mark.parametrize("downward", [True, False], ids=["d2h", "h2d"])
def test_descriptors_on_another_stream_and_device(downward: bool) -> None:
    for device in (DEVICE, OTHER):
        stream = torch.Stream(device)
        for case in CASES[:4]:
            stream.wait_stream(current(device))
            judge(case, Descriptors(device), downward, pinned, stream)


PAGED, CHUNK = CASES[0].device, CASES[0].host


class Scene:
    """A paged cache on the device, a chunk in pinned memory, and a launch between them."""

    def __init__(self, tokens: int = 32, downward: bool = True) -> None:
        self.cache = [layer.to(DEVICE) for layer in tensors_of(PAGED, 0, 1)]
        self.chunk = pinned(tensors_of(CHUNK, tokens, 2))
        self.tokens = tokens
        src, dst = view_of(self.cache, PAGED), view_of(self.chunk, CHUNK)
        self.views = (src, dst) if downward else (dst, src)
        steps = (1, 0) if downward else (0, 1)
        self.plan = CopyPlan(self.views[0].form, self.views[1].form, *steps)
        self.downward = downward
        self.launch = Descriptors(DEVICE).prepare(self.plan)

    def go(self, ids: Index, stream: torch.Stream | None = None) -> None:
        indices = (ids, Index()) if self.downward else (Index(), ids)
        self.launch(*self.views, *indices, self.tokens, stream, None)

    def stored(self, ids: list[int]) -> torch.Tensor:
        """What the chunk must hold once these slots were stored."""
        layers = torch.stack([layer.cpu() for layer in self.cache])
        rows = layers.transpose(0, 1).flatten(2, 3)[:, :, ids]
        return rows.flatten(3)


def test_ids_may_lie_anywhere() -> None:
    scene = Scene()
    for where in (torch.device("cpu"), DEVICE):
        for dtype in (torch.int32, torch.int64):
            ids = torch.randperm(190)[:32]
            scene.go(Index(ids.to(where, dtype)))
            torch.accelerator.synchronize(DEVICE)
            assert torch.equal(scene.chunk, scene.stored(ids.tolist())), where


@pytest.mark.parametrize("where", ["cpu", DEVICE])
def test_an_id_past_the_end_moves_nothing(where: torch.device) -> None:
    scene = Scene()
    ids = torch.arange(32)
    ids[7] = 24 * 8
    before = scene.chunk.clone()
    with pytest.raises(SlotError) as caught:
        scene.go(Index(ids.to(where)))
    check_sentence(str(caught.value), "192")
    torch.accelerator.synchronize(DEVICE)
    assert torch.equal(scene.chunk, before)


def test_negative_ids_are_left_out() -> None:
    scene = Scene()
    before = scene.chunk.clone()
    ids = torch.arange(32)
    ids[5:9] = -1
    scene.go(Index(ids))
    torch.accelerator.synchronize(DEVICE)
    kept = ids >= 0
    assert torch.equal(scene.chunk[:, :, kept], scene.stored(ids[kept].tolist()))
    assert torch.equal(scene.chunk[:, :, ~kept], before[:, :, ~kept])


def test_a_list_that_is_used_again_is_expanded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()
    asked: list[int] = []
    real = CopyPlan.runs

    def runs(self: CopyPlan, *args: object) -> Runs:
        asked.append(1)
        return real(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(CopyPlan, "runs", runs)
    ids = torch.randperm(150)[:40]
    index = Index(ids)
    for expected in (1, 1):
        scene.go(index)
        assert len(asked) == expected
    scene.go(index.shifted(3))
    assert len(asked) == 2
    scene.go(index.shifted(3))
    assert len(asked) == 2
    # Another index of the same tensor may be made after its ids have changed.
    ids.copy_(ids.flip(0))
    scene.go(Index(ids))
    assert len(asked) == 3
    torch.accelerator.synchronize(DEVICE)
    assert torch.equal(scene.chunk, scene.stored(ids[:32].tolist()))


def test_another_memory_under_the_same_list() -> None:
    scene, index = Scene(), Index(list(range(40, 72)))
    scene.go(index)
    other = pinned(torch.zeros_like(scene.chunk))
    torch.accelerator.synchronize(DEVICE)
    before = scene.chunk.clone()
    scene.launch(scene.views[0], view_of(other, CHUNK), index, Index(), 32, None, None)
    torch.accelerator.synchronize(DEVICE)
    assert torch.equal(other, before)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "MOST_KEPT", 500)
    monkeypatch.setattr(TorchLink, "copy", lambda *args: None)
    scene = Scene()
    kept: list[Index] = []
    for seed in range(30):
        kept.append(index_of((torch.randperm(190)[: 8 + seed].tolist(), 1)))
        scene.tokens = 8 + seed if seed < 24 else 32
        scene.go(kept[-1])
        known = scene.launch._known  # type: ignore[attr-defined]
        number = sum(pieces.number + 1 for pieces in known._pieces.values())
        assert 0 < known._number == number <= 500
        assert kept[-1].ids_token in next(reversed(known._pieces))


def test_host_memory_outlives_the_copy() -> None:
    """Memory that torch's allocator knows nothing of, forgotten while the copy flies."""
    for _ in range(REPEATS):
        torch.accelerator.synchronize(DEVICE)
        assert copies_holding_memory() == 0
        scene = Scene(downward=False)
        wanted, index = scene.chunk.clone(), Index(list(range(32)))
        simdev.delay(current(), 1)
        scene.go(index)
        forgotten = weakref.ref(scene.chunk.untyped_storage())
        cache, held = scene.cache, copies_holding_memory()
        assert held == 1
        del scene
        gc.collect()
        rubbish = [torch.full_like(wanted, 7, pin_memory=True) for _ in range(4)]
        torch.accelerator.synchronize(DEVICE)
        layers = torch.stack([layer.cpu() for layer in cache])
        assert torch.equal(layers.transpose(0, 1).flatten(2, 3)[:, :, :32].flatten(3), wanted)
        assert copies_holding_memory() == 0
        del rubbish, forgotten


def test_nothing_is_no_copy() -> None:
    scene = Scene()
    before = scene.chunk.clone()
    scene.tokens = 0
    scene.go(Index([1, 2]))
    torch.accelerator.synchronize(DEVICE)
    assert torch.equal(scene.chunk, before)


def test_from_several_threads() -> None:
    scene = Scene()
    chunks = [pinned(torch.zeros_like(scene.chunk)) for _ in range(3)]
    lists = [torch.randperm(190)[:32].tolist() for _ in chunks]

    def store(number: int) -> None:
        for _ in range(2):
            scene.launch(
                scene.views[0], view_of(chunks[number], CHUNK), Index(lists[number]), Index(), 32,
                None, None,
            )  # fmt: skip

    threads = [threading.Thread(target=store, args=(at,)) for at in range(len(chunks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.accelerator.synchronize(DEVICE)
    for chunk, ids in zip(chunks, lists, strict=True):
        assert torch.equal(chunk, scene.stored(ids))


def test_plans_that_it_refuses() -> None:
    engine = Descriptors(DEVICE)
    device = noise(4096).to(DEVICE)
    for host, place in ((pageable(noise(4096)), "pageable"), (pinned(noise(4096)), "pinned")):
        views = [KVView(each.view(-1, 64), "token dim") for each in (device, host)]
        decision = engine.check(CopyPlan(views[0].form, views[1].form))
        assert decision.accepted is (place == "pinned")
        assert place == "pinned" or "pageable" in decision.reason
    src = KVView(device.view(-1, 4, LEAST_RUN // 2), "token head dim")
    dst = KVView(pinned(noise(4096)).view(4, -1, LEAST_RUN // 2), "head token dim")
    decision = engine.check(CopyPlan(src.form, dst.form))
    assert not decision.accepted
    assert f"runs of {LEAST_RUN} B" in decision.reason
    assert f"{LEAST_RUN // 2} B" in decision.reason
    assert not Descriptors.probe(torch.device("cpu")).accepted
    assert Descriptors.probe(DEVICE).accepted
    assert not engine.capabilities().capturable


def test_foreign_memory_is_read_where_it_lies() -> None:
    """Bytes at odd addresses, over memory that torch did not allocate, as a view of its inside."""
    room = (ctypes.c_ubyte * 4099)()
    memory = torch.frombuffer(room, dtype=torch.uint8)
    memory.copy_(noise(4099))
    device = torch.zeros(4099, dtype=torch.uint8).to(DEVICE)
    src = KVView(memory[3:4099].view(64, 64), "token dim")
    dst = KVView(device[1:4097].view(64, 64), "token dim")
    plan = CopyPlan(src.form, dst.form, 1, 1)
    order = torch.randperm(64)
    pieces = to_2d_copies(plan.runs(src, dst, Index(order), Index(list(range(64))), 64), src, dst)
    link_of(DEVICE).copy(pieces, src, dst)
    torch.accelerator.synchronize(DEVICE)
    assert torch.equal(device[1:4097].cpu().view(64, 64), memory[3:].view(64, 64)[order])
