# SPDX-License-Identifier: Apache-2.0
"""Engines on the simulated device, where a missing wait becomes wrong bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.engine_cases import Case, cases, index_of, judge, leaves, mapped, tensors_of, view_of
from support.simdev_cases import DEVICE

from portakv import CopyPlan, Index, KVView
from portakv.engines import pageable as ring
from portakv.engines import slices as schedule
from portakv.engines import staging
from portakv.engines.pageable import Ring
from portakv.engines.slices import TwoStages
from portakv.engines.staged import Staged
from portakv_conformance import simdev

pytestmark = pytest.mark.simdev

CASES = cases()
SIZES = {"default": None, "small": (4096, 1024, 2048), "smallest": (512, 128, 256)}


@pytest.fixture(autouse=True)
def _no_faults_left() -> Any:
    yield
    torch.accelerator.synchronize(DEVICE)
    assert not simdev.take_faults()


@pytest.fixture(params=SIZES)
def slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of the default size, and so small that every copy has many."""
    sizes = SIZES[request.param]
    if sizes is not None:
        for name, size in zip(("LARGEST", "SMALLEST"), sizes, strict=False):
            monkeypatch.setattr(schedule, name, size)
        monkeypatch.setattr(schedule, "WHOLE", 0)
        monkeypatch.setattr(ring, "SIZES", schedule.Sizes(0, sizes[2] // 4, sizes[2]))


@pytest.mark.parametrize("downward", [True, False], ids=["d2h", "h2d"])
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
@pytest.mark.usefixtures("slices")
def test_staged_moves_every_byte(case: Case, downward: bool) -> None:
    judge(case, Staged(DEVICE), downward, torch.Tensor.pin_memory)


@pytest.mark.parametrize("downward", [True, False], ids=["d2h", "h2d"])
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
@pytest.mark.usefixtures("slices")
def test_ring_moves_every_byte(case: Case, downward: bool) -> None:
    judge(case, Ring(DEVICE), downward, torch.Tensor.clone)


@pytest.mark.parametrize("downward", [True, False], ids=["d2h", "h2d"])
@pytest.mark.usefixtures("slices")
def test_staged_on_another_stream(downward: bool) -> None:
    stream = torch.Stream(DEVICE)
    for case in CASES[::5]:
        judge(case, Staged(DEVICE), downward, torch.Tensor.pin_memory, stream)


def two_sides(tokens: int, downward: bool) -> tuple[KVView, KVView, KVView, KVView, Any]:
    """Source and destination, the device's and the host's view among them, and the tensors of the
    host."""
    layout, chunk = "layer | kv block token head dim", "kv layer token (head dim)"
    there = mapped(tensors_of(layout, 0, 1), lambda x: x.to(DEVICE))
    here = tensors_of(chunk, tokens, 2).pin_memory()
    rows, host = view_of(there, layout), view_of(here, chunk)
    return (rows, host, rows, host, here) if downward else (host, rows, rows, host, here)


@pytest.mark.parametrize("downward", [True, False], ids=["d2h", "h2d"])
@pytest.mark.usefixtures("slices")
def test_kept_slices_serve_other_memory(downward: bool) -> None:
    """What a view of rows remembers of one chunk is right for every other chunk of its form."""
    src, dst, rows, _, _ = two_sides(40, downward)
    index = index_of((list(range(100, 140)), 1))
    steps = (1, 0) if downward else (0, 1)
    launch = Staged(DEVICE).prepare(CopyPlan(src.form, dst.form, *steps))
    for seed in range(4):
        chunk = tensors_of("kv layer token (head dim)", 40, 10 + seed).pin_memory()
        before = chunk.clone()
        host = view_of(chunk, "kv layer token (head dim)")
        sides = (rows, host) if downward else (host, rows)
        indices = (index, index_of(None)) if downward else (index_of(None), index)
        launch(*sides, *indices, 40, None, None)
        torch.accelerator.synchronize(DEVICE)
        flat = [layer.cpu().flatten(1, 2)[:, 100:140].flatten(2) for layer in leaves(rows.tensors)]
        found = torch.stack(flat, 1)
        assert torch.equal(found, chunk if downward else before)
        assert torch.equal(chunk, before) or downward


@pytest.mark.parametrize("downward", [True, False], ids=["d2h", "h2d"])
@pytest.mark.usefixtures("slices")
def test_streams_have_staging_of_their_own(downward: bool) -> None:
    """The same prepared copy on two streams at once, over and over: each by its own mirrors."""
    src, dst, rows, _host, chunk = two_sides(40, downward)
    steps = (1, 0) if downward else (0, 1)
    launch = Staged(DEVICE).prepare(CopyPlan(src.form, dst.form, *steps))
    index = index_of((list(range(100, 140)), 1))
    indices = (index, index_of(None)) if downward else (index_of(None), index)
    expected = torch.stack(
        [layer.cpu().flatten(1, 2)[:, 100:140].flatten(2) for layer in leaves(rows.tensors)], 1
    )
    others = [torch.zeros_like(chunk).pin_memory() for _ in range(2)]
    streams = [torch.Stream(DEVICE) for _ in others]
    if not downward:
        expected = chunk.clone()
        for other in others:
            other.copy_(chunk)
    for _ in range(3):
        for other, stream in zip(others, streams, strict=True):
            view = view_of(other, "kv layer token (head dim)")
            sides = (rows, view) if downward else (view, rows)
            stream.wait_stream(torch.accelerator.current_stream(DEVICE))
            launch(*sides, *indices, 40, stream, None)
    torch.accelerator.synchronize(DEVICE)
    for other in others:
        assert torch.equal(other, expected)
    flat = [layer.cpu().flatten(1, 2)[:, 100:140].flatten(2) for layer in leaves(rows.tensors)]
    assert torch.equal(torch.stack(flat, 1), expected)


@pytest.mark.parametrize("downward", [True, False], ids=["d2h", "h2d"])
@pytest.mark.usefixtures("slices")
def test_earlier_work_of_the_stream_comes_first(downward: bool) -> None:
    """Rows that are still being written are read after that, or written after that."""
    for _ in range(5):
        src, dst, rows, _host, chunk = two_sides(40, downward)
        steps = (1, 0) if downward else (0, 1)
        launch = Staged(DEVICE).prepare(CopyPlan(src.form, dst.form, *steps))
        launch(src, dst, *_ordered(downward), 40, None, None)  # nothing is made any more
        torch.accelerator.synchronize(DEVICE)
        for layer in leaves(rows.tensors):
            layer.fill_(7)
        launch(src, dst, *_ordered(downward), 40, None, None)
        torch.accelerator.synchronize(DEVICE)
        if downward:
            assert bool((chunk == 7).all())
        else:
            flat = [x.cpu().flatten(1, 2)[:, 100:140].flatten(2) for x in leaves(rows.tensors)]
            assert torch.equal(torch.stack(flat, 1), chunk)


def _ordered(downward: bool) -> tuple[Any, Any]:
    index = index_of((list(range(100, 140)), 1))
    return (index, index_of(None)) if downward else (index_of(None), index)


def test_kept_slices_do_not_hold_the_memory_that_they_were_made_for() -> None:
    src, dst, rows, _, _ = two_sides(40, True)
    launch = Staged(DEVICE).prepare(CopyPlan(src.form, dst.form, 1, 0))
    launch(src, dst, index_of((list(range(40)), 1)), index_of(None), 40, None, None)
    legs = [leg for kept in rows.derived[launch].values() for leg in kept]
    assert legs
    assert all(leg.rows.device == DEVICE for leg in legs)


@pytest.mark.parametrize("downward", [True, False], ids=["d2h", "h2d"])
def test_slices_cross_before_the_pieces_of_later_ones_are_made(
    downward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the link is idle until the host has expanded the whole transfer."""
    for name, size in (("LARGEST", 4096), ("SMALLEST", 1024), ("WHOLE", 0)):
        monkeypatch.setattr(schedule, name, size)
    src, dst, _, _, _ = two_sides(40, downward)
    steps = (1, 0) if downward else (0, 1)
    launch: Any = Staged(DEVICE).prepare(CopyPlan(src.form, dst.form, *steps))
    made, copy, order = TwoStages.pieces, launch.link.copy, list[str]()

    def pieces(*arguments: Any) -> Any:
        order.append("made")
        return made(*arguments)

    def link_of(*arguments: Any) -> None:
        order.append("crossed")
        copy(*arguments)

    monkeypatch.setattr(TwoStages, "pieces", pieces)
    monkeypatch.setattr(launch.link, "copy", link_of)
    indices = _ordered(downward)
    for again in (False, True):  # what is kept is not made again
        order.clear()
        launch(src, dst, *indices, 40, None, None)
        torch.accelerator.synchronize(DEVICE)
        slices = order.count("crossed")
        assert slices > 2
        assert order == (["crossed"] if again else ["made", "crossed"]) * slices


def test_staging_stays_below_its_limit() -> None:
    """Whatever is moved, two mirrors of one slice each."""
    for case in CASES:
        judge(case, Staged(DEVICE), True, torch.Tensor.pin_memory)
    most = staging.RING * schedule.LARGEST
    assert max(each.nbytes for each in staging._known.values()) <= most


@pytest.mark.parametrize("downward", [True, False], ids=["d2h", "h2d"])
def test_an_interrupt_leaves_streams_in_order(
    downward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between two slices: what was enqueued is waited for; the next transfer is right."""
    monkeypatch.setattr(schedule, "LARGEST", 2048)
    monkeypatch.setattr(schedule, "SMALLEST", 512)
    monkeypatch.setattr(schedule, "WHOLE", 0)
    case = CASES[0]
    judge(case, Staged(DEVICE), downward, torch.Tensor.pin_memory)
    src, dst, _, _, _ = two_sides(40, downward)
    steps = (1, 0) if downward else (0, 1)
    launch: Any = Staged(DEVICE).prepare(CopyPlan(src.form, dst.form, *steps))
    index = index_of((list(range(40)), 1))
    indices = (index, index_of(None)) if downward else (index_of(None), index)
    copy, calls = launch.link.copy, []

    def interrupted(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        copy(*arguments)

    monkeypatch.setattr(launch.link, "copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        launch(src, dst, *indices, 40, None, None)
    monkeypatch.undo()
    judge(case, Staged(DEVICE), downward, torch.Tensor.pin_memory)


@pytest.mark.parametrize("downward", [True, False], ids=["d2h", "h2d"])
@pytest.mark.parametrize("engine", [Staged, Ring])
@pytest.mark.parametrize(
    ("layout", "widths"),
    [
        ("layer kv | block token head dim", [[16, 8], [16, 8]]),
        ("kv layer | block token head dim", [[16, 16], [8, 8]]),
    ],
)
def test_parts_of_unequal_widths_outside_the_tokens(
    layout: str, widths: list[list[int]], engine: type[Staged | Ring], downward: bool
) -> None:
    """Each a tensor of its own."""
    made = [[torch.randint(1, 256, (4, 8, 1, w), dtype=torch.uint8) for w in row] for row in widths]
    rows = [[x.to(DEVICE) if downward else torch.zeros_like(x, device=DEVICE) for x in row]
            for row in made]  # fmt: skip
    host = [[torch.zeros_like(x) if downward else x.clone() for x in row] for row in made]
    if engine is Staged:
        host = [[x.pin_memory() for x in row] for row in host]
    sides = [KVView(x, layout, layers=2, kv=2, heads=1, dim=(16, 8)) for x in (rows, host)]
    src, dst = sides if downward else sides[::-1]
    launch: Any = engine(DEVICE).prepare(CopyPlan(src.form, dst.form, 8, 8))
    launch(src, dst, Index([0, 2], 8), Index([1, 3], 8), 16, None, None)
    torch.accelerator.synchronize(DEVICE)
    found = [x.cpu() for row in (host if downward else rows) for x in row]
    for each, source in zip(found, (x for row in made for x in row), strict=True):
        assert torch.equal(each[[1, 3]], source[[0, 2]])
        assert not each[[0, 2]].any()
