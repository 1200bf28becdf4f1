# SPDX-License-Identifier: Apache-2.0
"""Detached transfers on the simulated device: many under way, none behind the end of another."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.block_cases import BLOCKS, SIZE, Cache, block_first, layered, wanted
from support.simdev_cases import DEVICE, current, on
from support.staging_cases import broken_at, full, small_slices

from portakv import Index, Unsupported, copy_blocks
from portakv.engines import staging
from portakv.engines.link import TorchLink
from portakv.engines.staging import DETACHED_RING, Staging
from portakv.runtime.bounded import Bounded
from portakv_conformance import simdev

pytestmark = pytest.mark.simdev

DOWNWARD = pytest.mark.parametrize("downward", [True, False], ids=["d2h", "h2d"])
IDS, MANY = list(range(BLOCKS)), 12
DETACHED: dict[str, Any] = {"backend": "staged", "detached": True}


@pytest.fixture(autouse=True)
def _staging_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    small_slices(monkeypatch)
    monkeypatch.setattr(staging, "_known", Bounded("staging", 8))
    yield
    torch.accelerator.synchronize(DEVICE)
    assert not simdev.take_faults()


def pairs(downward: bool, number: int = MANY) -> list[tuple[Cache, Cache]]:
    """Sources and destinations, with nothing under way."""
    found = [(layered(DEVICE), block_first(pin=True)) for _ in range(number)]
    torch.accelerator.synchronize(DEVICE)
    return found if downward else [(here, there) for there, here in found]


def started(caches: list[tuple[Cache, Cache]], **options: Any) -> list[Any]:
    """All of them, none waited for."""
    asked = {**DETACHED, **options}
    return [copy_blocks(src.view, dst.view, IDS, IDS[::-1], **asked) for src, dst in caches]


def expected(caches: list[tuple[Cache, Cache]]) -> list[torch.Tensor]:
    return [wanted(src, dst, IDS, IDS[::-1]) for src, dst in caches]


def landed(caches: list[tuple[Cache, Cache]], rows: list[torch.Tensor]) -> bool:
    return all(torch.equal(dst.rows(), r) for (_, dst), r in zip(caches, rows, strict=True))


def the_room() -> Staging:
    (room,) = staging._known.values()
    assert room.detached
    return room


@DOWNWARD
@pytest.mark.parametrize("by_layer", [False, True])
def test_every_byte_of_many_lands(downward: bool, by_layer: bool) -> None:
    caches = pairs(downward)
    rows = expected(caches)
    for moved in reversed(started(caches, by_layer=by_layer)):
        moved.synchronize()
        assert moved.done()
        assert moved.statistics.engine == "staged"
    assert landed(caches, rows)


@DOWNWARD
def test_mirrors_that_nobody_waits_for_are_overwritten(downward: bool) -> None:
    """So the test above can fail."""

    class Forgetful(list[Any]):
        def __setitem__(self, at: Any, event: Any) -> None:
            pass

    for moved in started(pairs(downward, 1)):
        moved.synchronize()
    the_room().free = Forgetful([None] * DETACHED_RING)
    caches = pairs(downward)
    rows = expected(caches)
    for moved in started(caches):
        moved.synchronize()
    assert not landed(caches, rows)


@pytest.mark.parametrize("detached", [True, False])
def test_a_gather_waits_for_the_end_of_the_transfer_before_unless_detached(detached: bool) -> None:
    warm, first, second = pairs(True, 3)
    started([warm], detached=detached)[0].synchronize()
    before, after = started([first, second], detached=detached)
    (room,) = staging._known.values()
    room.half.synchronize()
    assert before.done() is not detached
    after.synchronize()
    assert before.done()


@DOWNWARD
@pytest.mark.parametrize("side", [False, True])
def test_no_stream_waits_for_it_but_one_that_is_told_to(downward: bool, side: bool) -> None:
    caches = pairs(downward, 2)
    rows = expected(caches)
    stream = torch.Stream(DEVICE) if side else None
    (moved, _) = started(caches, stream=stream)
    for one in (stream or current(), current()):
        one.synchronize()
        assert not moved.done()
    reader = torch.Stream(DEVICE)
    moved.wait(reader)
    reader.synchronize()
    assert moved.done()
    torch.accelerator.synchronize(DEVICE)
    assert landed(caches, rows)


def test_a_reader_behind_the_handle_sees_the_bytes() -> None:
    for _ in range(10):
        ((src, dst),) = pairs(False, 1)
        (rows,) = expected([(src, dst)])
        (moved,) = started([(src, dst)])
        reader = torch.Stream(DEVICE)
        with on(reader):
            moved.wait()
            found = [cache.clone() for cache in dst.tensors]
        reader.synchronize()
        for copied, row in zip(found, rows, strict=True):
            assert torch.equal(copied.cpu().view(torch.int16).reshape(row.shape), row)


@DOWNWARD
def test_it_comes_behind_what_the_stream_held(downward: bool) -> None:
    for _ in range(10):
        ((src, dst),) = pairs(downward, 1)
        fresh = layered(DEVICE) if downward else block_first(pin=True)
        torch.accelerator.synchronize(DEVICE)
        stream = torch.Stream(DEVICE)
        simdev.delay(stream, 2)
        with on(stream):
            if downward:
                for layer, made in zip(src.tensors, fresh.tensors, strict=True):
                    layer.copy_(made)
            else:
                there = fresh.tensors.to(DEVICE, non_blocking=True)
                src.tensors.copy_(there, non_blocking=True)
        (moved,) = started([(src, dst)], stream=stream)
        moved.synchronize()
        slots = dst.slots(IDS[::-1]), fresh.slots(IDS)
        assert torch.equal(dst.rows()[:, :, slots[0]], fresh.rows()[:, :, slots[1]])


@DOWNWARD
def test_larger_transfers_behind_smaller_ones_and_staging_given_back(
    downward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mirrors grow, and go to others, while transfers through them are under way."""
    monkeypatch.setattr(staging, "_STREAMS", 1)
    caches = pairs(downward)
    rows = expected(caches)
    for nth, (src, dst) in enumerate(caches):
        few = IDS[: 2 + nth % 7]
        for ids in (few, IDS):
            copy_blocks(src.view, dst.view, ids, [IDS[-1] - i for i in ids], **DETACHED)
        if nth % 3 == 0:  # another stream takes the only staging that is kept
            other = pairs(downward, 1)[0] if nth == 0 else caches[nth - 1]
            copy_blocks(other[0].view, other[1].view, IDS, IDS[::-1], backend="staged")
        rubbish = [torch.full((1 << 12,), 7, dtype=torch.int16, device=DEVICE) for _ in range(4)]
        del rubbish
    torch.accelerator.synchronize(DEVICE)
    assert landed(caches, rows)


@DOWNWARD
def test_no_room_on_the_device_and_then_some(
    downward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = pairs(downward, 3)
    rows = expected(caches)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full)
        with pytest.raises(torch.OutOfMemoryError):
            started(caches[:1])
    for moved in started(caches):
        moved.synchronize()
    assert landed(caches, rows)


@DOWNWARD
def test_one_that_failed_leaves_the_next_right(
    downward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = pairs(downward, 4)
    rows = expected(caches)
    with monkeypatch.context() as patch:
        patch.setattr(TorchLink, "copy", broken_at(5, TorchLink.copy))
        with pytest.raises(RuntimeError, match="the link is down"):
            started(caches)
    for moved in started(caches):
        moved.synchronize()
    assert landed(caches, rows)


@pytest.mark.parametrize("how", ["detached", "on a stream", "ring on a stream"])
def test_ids_that_an_index_keeps_and_everybody_forgets(how: str) -> None:
    """Their copy on the device was made on another stream than the one that reads it."""
    for _ in range(3):
        there = [layered(DEVICE) for _ in range(2)]
        here = block_first(pin="ring" not in how)
        torch.accelerator.synchronize(DEVICE)
        mine, theirs = (Index(torch.tensor(ids), step=SIZE) for ids in (IDS, IDS[::-1]))
        rows = wanted(there[0], here, IDS, IDS[::-1])
        again = wanted(there[0], there[1], IDS, IDS)
        options: dict[str, Any] = {"backend": "ring" if "ring" in how else "staged"}
        options |= {"detached": True} if how == "detached" else {"stream": torch.Stream(DEVICE)}
        copy_blocks(there[0].view, here.view, mine, theirs, **options).synchronize()
        assert torch.equal(here.rows(), rows)
        moved = copy_blocks(here.view, there[1].view, theirs, mine, **options)
        del mine, theirs, moved
        gc.collect()
        rubbish = [torch.full((8,), 99, dtype=torch.int64, device=DEVICE) for _ in range(20)]
        torch.accelerator.synchronize(DEVICE)
        assert torch.equal(there[1].rows(), again)
        assert rubbish


def test_a_quick_stream_does_not_wait_for_a_slow_one() -> None:
    slow, quick = pairs(True, 2)
    rows = expected([slow, quick])
    streams = torch.Stream(DEVICE), torch.Stream(DEVICE)
    warm = pairs(True, 2)
    for each, stream in zip(warm, streams, strict=True):
        started([each], stream=stream)[0].synchronize()
    simdev.delay(streams[0], 5)
    (first,) = started([slow], stream=streams[0])
    (second,) = started([quick], stream=streams[1])
    second.synchronize()
    assert not first.done()
    first.synchronize()
    assert landed([slow, quick], rows)


@pytest.mark.parametrize("wrong", ["no", 1, [1]], ids=str)
def test_detached_is_true_or_false(wrong: Any) -> None:
    ((src, dst),) = pairs(True, 1)
    with pytest.raises(Unsupported, match="expected True or False"):
        copy_blocks(src.view, dst.view, IDS, IDS, detached=wrong)


@DOWNWARD
@pytest.mark.parametrize("options", [{"cancellable": True}, {"max_gbps": 1.0}], ids=str)
def test_in_slices(downward: bool, options: dict[str, Any]) -> None:
    """No stream orders these anyway."""
    caches = pairs(downward, 3)
    rows = expected(caches)
    for moved in started(caches, **options):
        moved.synchronize()
    assert landed(caches, rows)


@DOWNWARD
def test_memory_and_handles_that_everybody_forgets(downward: bool) -> None:
    for _ in range(3):
        caches = pairs(downward)
        rows = expected(caches)
        kept = [dst for _, dst in caches]
        started(caches)
        del caches
        gc.collect()
        rubbish: list[Any] = [block_first(pin=True) for _ in range(4)]
        rubbish += [layered(DEVICE) for _ in range(4)]
        torch.accelerator.synchronize(DEVICE)
        assert all(torch.equal(dst.rows(), row) for dst, row in zip(kept, rows, strict=True))
        assert rubbish


def test_threads_and_both_directions() -> None:
    caches = [pairs(nth % 2 == 0, 4) for nth in range(4)]
    rows = [expected(each) for each in caches]
    threads = [
        threading.Thread(target=lambda each=each: [m.synchronize() for m in started(each)])
        for each in caches
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(landed(each, row) for each, row in zip(caches, rows, strict=True))
