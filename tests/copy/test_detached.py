# SPDX-License-Identifier: Apache-2.0
"""Detached transfers: many under way, and none waits for the end of another."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from support import simdev_cases
from support.block_cases import BLOCKS, SIZE, block_first, layered, pair, wanted
from support.device_cases import current, delay, on, settle
from support.engine_cases import broken_at, full
from support.engine_cases import small_slices as small_mirrors
from support.threads import run_threads

from portakv import Index, copy_blocks
from portakv.interconnect import staging
from portakv.interconnect.link import TorchLink

DOWNWARD = pytest.mark.parametrize("downward", [True, False], ids=["d2h", "h2d"])
IDS = list(range(BLOCKS))
MANY = 12
DETACHED: dict[str, Any] = {"backend": "staged", "detached": True}


@pytest.fixture(autouse=True)
def _staging_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    small_mirrors(monkeypatch)
    staging.cached_staging.clear()


class Pairs:
    """Sources and destinations with nothing under way, and what is to land."""

    def __init__(self, device: torch.device, downward: bool, number: int = MANY) -> None:
        self.each = [pair(device, downward, True, IDS, IDS[::-1]) for _ in range(number)]
        settle(device)

    def started(self, **options: Any) -> list[Any]:
        """All of them, none waited for."""
        return [blocks.start(**{**DETACHED, **options}) for blocks in self.each]

    def landed(self) -> bool:
        return all(blocks.landed() for blocks in self.each)


@DOWNWARD
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"by_layer": True},
        {"cancellable": True},
        {"max_gbps": 1.0},
        *({"backend": name, "overlap": "idle"} for name in ("host", "batched_memcpy", "zero_copy")),
    ],
    ids=str,
)
def test_every_byte_of_many_lands(
    accelerator: torch.device, downward: bool, options: dict[str, Any]
) -> None:
    """No stream orders transfers in slices anyway."""
    name = options.get("backend", "staged")
    if name == "zero_copy" and accelerator.type != "cuda":
        pytest.skip("no kernel of this device reads host memory")
    pairs = Pairs(accelerator, downward)
    for moved in reversed(pairs.started(**options)):
        moved.synchronize()
        assert moved.done()
        assert name in ("host", moved.statistics.strategy)
    assert pairs.landed()


@pytest.mark.simdev
@pytest.mark.parametrize("detached", [True, False])
def test_a_gather_waits_for_the_end_of_the_transfer_before_unless_detached(detached: bool) -> None:
    Pairs(simdev_cases.DEVICE, True, 1).started(detached=detached)[0].synchronize()
    before, after = Pairs(simdev_cases.DEVICE, True, 2).started(detached=detached)
    *_, buffers = staging.cached_staging.values()  # the last used
    buffers.half.synchronize()
    assert before.done() is not detached
    after.synchronize()
    assert before.done()


@pytest.mark.simdev
@DOWNWARD
@pytest.mark.parametrize("side", [False, True])
def test_no_stream_waits_for_it_but_one_that_is_told_to(downward: bool, side: bool) -> None:
    device = simdev_cases.DEVICE
    pairs = Pairs(device, downward, 2)
    stream = torch.Stream(device) if side else None
    (moved, _) = pairs.started(stream=stream)
    for one in (stream or current(device), current(device)):
        one.synchronize()
        assert not moved.done()
    reader = torch.Stream(device)
    moved.wait(reader)
    reader.synchronize()
    assert moved.done()
    settle(device)
    assert pairs.landed()


@DOWNWARD
def test_larger_transfers_behind_smaller_ones_and_staging_given_back(
    accelerator: torch.device, downward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mirrors grow, and go to others, while transfers through them are under way."""
    monkeypatch.setattr(staging.cached_staging, "limit", 1)
    pairs = Pairs(accelerator, downward)
    for nth, blocks in enumerate(pairs.each):
        few = IDS[: 2 + nth % 7]
        blocks.start(few, [IDS[-1] - i for i in few], **DETACHED)
        blocks.start(**DETACHED)
        if nth % 3 == 0:  # another stream takes the only staging that is kept
            pairs.each[nth - 1].start(backend="staged")
        junk = [torch.full((1 << 12,), 7, dtype=torch.int16, device=accelerator) for _ in range(4)]
        del junk
    settle(accelerator)
    assert pairs.landed()


def test_the_link_touches_new_buffers_behind_their_stream(accelerator: torch.device) -> None:
    """An allocator hands out memory that was freed on a stream while that is still at work."""
    buffers = staging.staging(accelerator, current(accelerator), detached=True)
    with on(buffers.half):
        delay(buffers.half)
        buffers.reserve(1 << 12)
    staging.mark(buffers.link).synchronize()
    assert buffers.half.query()


@pytest.mark.simdev
@pytest.mark.parametrize("detached", [True, False])
def test_buffers_are_made_on_the_stream_that_they_are_given_back_on(
    detached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = simdev_cases.DEVICE
    empty = torch.empty
    reserve = staging.Staging.reserve
    of_half = list[tuple[bool, bool]]()  # of the staging, and of its memory

    def noted(self: staging.Staging, nbytes: int) -> None:
        def made(*arguments: Any, **named: Any) -> torch.Tensor:
            of_half.append((self.detached, current(device).stream_id == self.half.stream_id))
            return empty(*arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", made)
            reserve(self, nbytes)

    monkeypatch.setattr(staging.Staging, "reserve", noted)
    Pairs(device, True, 1).started(detached=detached)[0].synchronize()
    assert (detached, detached) in of_half  # the first copy of a process tries others as well
    assert all(staged == made for staged, made in of_half)


@pytest.mark.simdev
@DOWNWARD
@pytest.mark.parametrize("fault", ["full", "broken"])
def test_one_that_failed_leaves_the_next_right(
    downward: bool, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = Pairs(simdev_cases.DEVICE, downward, 4)
    expected = (
        (torch.OutOfMemoryError, "full") if fault == "full" else (RuntimeError, "link is down")
    )
    for moved in Pairs(simdev_cases.DEVICE, downward, 1).started():  # to prepare takes memory too
        moved.synchronize()
    with monkeypatch.context() as patch:
        staging.cached_staging.clear()
        if fault == "full":  # no room on the device, and then some
            patch.setattr(torch, "empty", full)
        else:
            patch.setattr(TorchLink, "copy", broken_at(5, TorchLink.copy))
        with pytest.raises(expected[0], match=expected[1]):
            pairs.started()
    for moved in pairs.started():
        moved.synchronize()
    assert pairs.landed()


@pytest.mark.parametrize("how", ["detached", "on a stream", "ring on a stream"])
def test_ids_that_an_index_keeps_and_everybody_forgets(accelerator: torch.device, how: str) -> None:
    """Their copy on the device was made on another stream than the one that reads it."""
    for _ in range(3):
        there = [layered(accelerator) for _ in range(2)]
        here = block_first(pin="pageable" not in how)
        settle(accelerator)
        src_index, dst_index = (Index(torch.tensor(ids), step=SIZE) for ids in (IDS, IDS[::-1]))
        rows = wanted(there[0], here, IDS, IDS[::-1])
        again = wanted(there[0], there[1], IDS, IDS)
        options: dict[str, Any] = {"backend": "pageable" if "pageable" in how else "staged"}
        stream = torch.Stream(accelerator)
        options |= {"detached": True} if how == "detached" else {"stream": stream}
        copy_blocks(there[0].view, here.view, src_index, dst_index, **options).synchronize()
        assert torch.equal(here.rows(), rows)
        delay(current(accelerator) if how == "detached" else stream)
        moved = copy_blocks(here.view, there[1].view, dst_index, src_index, **options)
        del src_index, dst_index, moved
        gc.collect()
        junk = [torch.full((8,), 99, dtype=torch.int64, device=accelerator) for _ in range(20)]
        settle(accelerator)
        assert torch.equal(there[1].rows(), again)
        del junk


def test_a_quick_stream_does_not_wait_for_a_slow_one(accelerator: torch.device) -> None:
    streams = torch.Stream(accelerator), torch.Stream(accelerator)
    for stream in streams:
        Pairs(accelerator, True, 1).started(stream=stream)[0].synchronize()
    slow = Pairs(accelerator, True, 1)
    quick = Pairs(accelerator, True, 1)
    delay(streams[0])
    (first,) = slow.started(stream=streams[0])
    (second,) = quick.started(stream=streams[1])
    second.synchronize()
    assert not first.done()
    first.synchronize()
    assert slow.landed()
    assert quick.landed()


def test_threads_and_both_directions(accelerator: torch.device) -> None:
    pairs = [Pairs(accelerator, nth % 2 == 0, 4) for nth in range(4)]
    run_threads(lambda each: [moved.synchronize() for moved in each.started()], pairs)
    assert all(each.landed() for each in pairs)
