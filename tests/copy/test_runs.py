# SPDX-License-Identifier: Apache-2.0
"""`copy_runs`: bytes between addresses, whatever lies there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support import simdev_cases
from support.core_cases import noise
from support.device_cases import current, delay, on, settle
from support.guarded_memory import refused

from portakv import (
    Index,
    KVView,
    LateErrors,
    LayoutError,
    SlotError,
    Transfer,
    copy_rows,
    copy_runs,
)
from portakv.backends.reference import Reference
from portakv.copy.call import Context, launch
from portakv.copy.call import settle as settled
from portakv.errors import InvalidTerms
from portakv.host import pinned, small
from portakv.interconnect.staged import Staged
from portakv.plan.plan import CopyPlan, Move
from portakv.registry import prepared
from portakv.registry.registry import REGISTRY, Choice, choose, register_backend
from portakv.runtime.bounded import caches
from portakv.runtime.transfer import Completion

CPU = torch.device("cpu")
BYTES = 1 << 14
SRC = [64, 4096, 1024, 9000]
DST = [0, 512, 8192, 12288]
FAILED = "An earlier copy failed, of which no caller kept the handle."
EVERY = ("to host", "to device", "inside")


def ends(device: torch.device, direction: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Random bytes on both sides, on the host pinned if there is a device."""
    places = {"to host": (device, CPU), "to device": (CPU, device), "inside": (device, device)}
    made = [
        noise(BYTES, dtype=torch.uint8, seed=seed).to(x) for seed, x in enumerate(places[direction])
    ]
    if device.type != "cpu":
        made = [pinned.empty(BYTES, x.dtype).copy_(x) if x.is_cpu else x for x in made]
    settle(device)
    return made[0], made[1]


def wanted(src: torch.Tensor, dst: torch.Tensor, runs: Sequence[tuple[int, int, int]]) -> Any:
    source = src.cpu().clone()
    result = dst.cpu().clone()
    for a, b, size in runs:
        result[b : b + size] = source[a : a + size]
    return result


def at(tensor: torch.Tensor, offsets: Sequence[int]) -> list[int]:
    return [tensor.data_ptr() + offset for offset in offsets]


@pytest.mark.parametrize("direction", EVERY)
@pytest.mark.parametrize("sizes", [512, [512, 96, 512, 96], [1, 2, 300, 4096 - 8]], ids=str)
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor], ids=["list", "numpy", "tensor"])
def test_every_byte(device: torch.device, direction: str, sizes: Any, kind: Any) -> None:
    src, dst = ends(device, direction)
    each = [sizes] * 4 if isinstance(sizes, int) else sizes
    expected = wanted(src, dst, list(zip(SRC, DST, each, strict=True)))
    transfer = copy_runs(
        kind(at(src, SRC)),
        kind(at(dst, DST)),
        sizes if isinstance(sizes, int) else kind(sizes),
        src_device=src.device,
        dst_device=dst.device,
    )
    transfer.synchronize()
    assert torch.equal(dst.cpu(), expected)
    statistics = transfer.statistics
    assert (statistics.nbytes, statistics.blocks, statistics.blocks_requested) == (sum(each), 4, 4)
    assert statistics.seconds is not None


@pytest.mark.parametrize("direction", EVERY)
@pytest.mark.parametrize("pitches", [(128, 64), (64, 200), ([128, 64, 128, 64], 64)], ids=str)
def test_rows_at_a_pitch(device: torch.device, direction: str, pitches: Any) -> None:
    src, dst = ends(device, direction)
    rows = 5
    size = 64
    steps = [each if isinstance(each, list) else [each] * 4 for each in pitches]
    expected = wanted(
        src,
        dst,
        [
            (a + row * step, b + row * pitch, size)
            for a, b, step, pitch in zip(SRC, DST, *steps, strict=True)
            for row in range(rows)
        ],
    )
    copy_runs(
        at(src, SRC),
        at(dst, DST),
        size,
        src_device=src.device,
        dst_device=dst.device,
        rows=rows,
        src_pitch=pitches[0],
        dst_pitch=pitches[1],
    ).synchronize()
    assert torch.equal(dst.cpu(), expected)


@pytest.mark.parametrize("direction", EVERY)
def test_addresses_that_only_a_device_has(accelerator: torch.device, direction: str) -> None:
    src, dst = ends(accelerator, direction)
    offsets = [[each // 16 * 16 for each in side] for side in (SRC, DST)]
    expected = wanted(src, dst, [(a, b, 256) for a, b in zip(*offsets, strict=True)])
    tables = [
        torch.tensor(at(*side)).view(torch.uint64).to(accelerator)
        for side in zip((src, dst), offsets, strict=True)
    ]
    src_table, dst_table = tables
    copy_runs(src_table, dst_table, 256, src_device=src.device, dst_device=dst.device).synchronize()
    assert torch.equal(dst.cpu(), expected)


class Reading(Reference):
    """Claims to read tables of addresses on the device, which ops of torch do not."""

    name = "reading"

    def prepare(self, plan: CopyPlan) -> Any:
        launch: Any = super().prepare(plan)
        launch.tables = True, True
        return launch


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Record what is sent to the simulated device, as to a device that takes small values by a
    kernel, ordered after work that goes on."""
    register_backend(Reading.name, Reading)
    monkeypatch.setattr(prepared, "ASYNCHRONOUS", frozenset({simdev_cases.DEVICE.type}))
    lengths = list[int]()
    send = small.to_device

    def noted(values: Any, *rest: Any, **named: Any) -> torch.Tensor:
        lengths.append(len(values))
        return send(values, *rest, **named)

    monkeypatch.setattr(small, "to_device", noted)
    yield lengths
    REGISTRY.unregister(Reading.name)


@pytest.mark.simdev
@pytest.mark.parametrize("backend", ["reading", "reference"])
@pytest.mark.parametrize("side", [False, True], ids=["current", "another stream"])
def test_addresses_are_sent_without_waiting(side: bool, backend: str, sent: list[int]) -> None:
    """The launch that reads addresses gets them by an asynchronous copy."""
    device = simdev_cases.DEVICE
    src, dst = ends(device, "inside")
    expected = wanted(src, dst, [(a, b, 64) for a, b in zip(SRC, DST, strict=True)])
    stream = torch.Stream(device) if side else None
    copy_runs(
        *(at(src, SRC), at(dst, DST), 64),
        src_device=device,
        dst_device=device,
        stream=stream,
        backend=backend,
    ).synchronize()
    assert sent == [4, 4] * (backend == Reading.name)
    assert torch.equal(dst.cpu(), expected)


@pytest.mark.simdev
def test_addresses_are_sent_to_what_gathers(sent: list[int]) -> None:
    """Rows that are made dense on the device; those of the host are known there."""
    device = simdev_cases.DEVICE
    src, dst = ends(device, "to host")
    expected = wanted(src, dst, [(a, b, 64) for a, b in zip(SRC, DST, strict=True)])
    # A separate one: that of the process may have chosen a backend that gathers before.
    engine = Staged(device, choose(device, Reading.name))
    choice = Choice(engine, (), True, engine.capabilities())
    shaped: Any = {"shape": (1, 64), "dtype": torch.uint8}
    views = [
        KVView.at(at(x, each), "block | token dim", device=x.device, **shaped)
        for x, each in ((src, SRC), (dst, DST))
    ]
    here = Context.of(choice.backend.device, None)
    move = Move(views[0], views[1], Index(), Index(), 4)
    launch(settled(move, choice, here), here).synchronize()
    assert sent.count(4) == 1  # in addition to those of a self-check, and of the rows on the device
    assert torch.equal(dst, expected)


@pytest.mark.simdev
@pytest.mark.parametrize("layout", ["block | token dim", "layer | token dim"])
@pytest.mark.parametrize("foreign", [False, True], ids=["tensors", "addresses"])
def test_addresses_of_a_view_that_is_kept_are_sent_once(
    foreign: bool, layout: str, sent: list[int]
) -> None:
    """Any thread may send them; each stream that reads them waits until they are there."""
    device = simdev_cases.DEVICE
    src, dst = ends(device, "inside")
    expected = wanted(src, dst, [(a, b, 64) for a, b in zip(SRC, DST, strict=True)])
    source, destination = (
        KVView.at(at(end, places), layout, shape=(1, 64), dtype=torch.uint8, device=device)
        if foreign
        else KVView([end[place : place + 64].view(1, 64) for place in places], layout)
        for end, places in ((src, SRC), (dst, DST))
    )
    other = torch.Stream(device)
    delay(current(device))
    copy_rows(source, destination, backend=Reading.name)
    with on(other):
        transfer = copy_rows(
            source, destination, backend=Reading.name
        )  # orders it after the making of the tables
        tables = [view.table.clone() for view in (source, destination)]
    transfer.synchronize()
    settle(device)
    assert sent == [4, 4]
    assert torch.equal(dst.cpu(), expected)
    assert [x.tolist() for x in tables] == [list(x.origins) for x in (source, destination)]


@pytest.mark.parametrize(
    "terms",
    [{"overlap": "idle"}, {"detached": True}, {"max_gbps": 10.0}, {"cancellable": True}],
    ids=str,
)
def test_on_terms(device: torch.device, terms: dict[str, Any]) -> None:
    src, dst = ends(device, "to host")
    expected = wanted(src, dst, list(zip(SRC, DST, [512, 96, 96, 512], strict=True)))
    transfer = copy_runs(
        at(src, SRC), at(dst, DST), [512, 96, 96, 512], src_device=device, dst_device="cpu", **terms
    )
    transfer.synchronize()
    assert torch.equal(dst.cpu(), expected)
    assert not transfer.cancelled


def test_nothing() -> None:
    transfer = copy_runs([], [], [], src_device="cpu", dst_device="cpu")
    transfer.synchronize()
    assert transfer.done()
    assert transfer.statistics.nbytes == 0


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"dst": DST[:3]}, SlotError, ["4 src_addresses", "3 dst_addresses"]),
        ({"sizes": [1, 2]}, SlotError, ["sizes", "4 runs"]),
        ({"sizes": 0}, SlotError, ["Expected sizes", "got 0"]),
        ({"sizes": [1, 2, -3, 4]}, SlotError, ["sizes", "at least 1"]),
        ({"sizes": [1.5] * 4}, SlotError, ["sizes", "float64"]),
        ({"rows": "two"}, SlotError, ["rows"]),
        ({"rows": True}, SlotError, ["rows", "bool"]),
        ({"sizes": torch.tensor(64.0)}, SlotError, ["Expected sizes", "got tensor(64.)"]),
        ({"sizes": [[64], [64, 64]]}, SlotError, ["sizes", "list"]),
        ({"sizes": torch.empty(4, dtype=torch.int64, device="meta")}, SlotError, ["sizes"]),
        ({"rows": 2, "src_pitch": -1}, SlotError, ["Expected src_pitch", "got -1"]),
        ({"dst": [0, 0, 512, 1024]}, LayoutError, ["dst_addresses", "share no byte"]),
        ({"dst": [0, 63, 512, 1024]}, LayoutError, ["dst_addresses", "share no byte"]),
        ({"dst": [0, 63, 512, 1024], "sizes": [64, 8, 8, 8]}, LayoutError, ["dst_addresses"]),
        ({"dst": [0, 100, 512, 1024], "rows": 2, "dst_pitch": 128}, LayoutError, ["share no byte"]),
        ({"dst_pitch": 32, "rows": 2}, LayoutError, ["dst_addresses"]),
        ({"foo": 1}, InvalidTerms, ["got foo", "by_layer", "Leave foo out"]),
        ({"rows": [1, 2, True, None]}, SlotError, ["rows"]),
        ({"count": 2}, InvalidTerms, ["got count", "Leave count out"]),
        ({"src_index": [3, 2, 1, 0]}, InvalidTerms, ["got src_index"]),
    ],
    ids=str,
)  # fmt: skip
def test_what_are_no_runs(change: dict[str, Any], error: Any, words: list[str]) -> None:
    src, dst = ends(CPU, "inside")
    arguments = {"src": SRC, "dst": DST, "sizes": 64, **change}
    lists = [at(side, arguments.pop(name)) for name, side in (("src", src), ("dst", dst))]
    with refused(error, *words, watch=[dst]):
        copy_runs(*lists, **arguments, src_device="cpu", dst_device="cpu")


def test_rows_that_lie_between_those_of_another_run() -> None:
    """Runs may cover each other's bytes with their pitch."""
    src, dst = ends(CPU, "inside")
    expected = wanted(
        src,
        dst,
        [(row * 64 + run * 512, row * 128 + run * 64, 64) for run in range(2) for row in range(4)],
    )
    copy_runs(
        at(src, [0, 512]),
        at(dst, [0, 64]),
        64,
        src_device="cpu",
        dst_device="cpu",
        rows=4,
        dst_pitch=128,
    ).synchronize()
    assert torch.equal(dst, expected)


def test_a_byte_that_is_read_and_written() -> None:
    memory = noise(BYTES, dtype=torch.uint8)
    with refused(SlotError, "both source and destination", watch=[memory]):
        copy_runs(
            at(memory, [0, 512]), at(memory, [100, 4096]), 256, src_device="cpu", dst_device="cpu"
        )


def test_a_refused_size_stops_all_of_them() -> None:
    memory = noise(BYTES, dtype=torch.uint8)
    with refused(SlotError, "both source and destination", watch=[memory]):
        copy_runs(
            at(memory, [0, 512]),
            at(memory, [4096, 600]),
            [64, 128],
            src_device="cpu",
            dst_device="cpu",
        )


def test_late_errors_are_asked_for_before_anything_is_moved() -> None:
    src, dst = ends(CPU, "inside")
    sizes = [64, 128, 256, 512]
    late = LateErrors()
    runs = at(src, SRC), at(dst, DST), sizes

    class Second(LateErrors):
        """Learns of an error after the check for the first size."""

        checks = 0

        def check(self, device: torch.device | None = None) -> None:
            self.checks += 1
            if self.checks == 2:
                self.keep(Transfer((Completion(error=SlotError(FAILED)),)))
            super().check(device)

    with refused(SlotError, FAILED, watch=[dst]):
        copy_runs(*runs, src_device="cpu", dst_device="cpu", late=Second())
    copy_runs(*runs, src_device="cpu", dst_device="cpu", late=late).synchronize()
    late.check()


@pytest.mark.parametrize("one", [np.int64(96), np.array(96), torch.tensor(96)], ids=repr)
def test_one_number_for_all_of_any_kind(one: Any) -> None:
    src, dst = ends(CPU, "inside")
    expected = wanted(src, dst, [(a, b, 96) for a, b in zip(SRC, DST, strict=True)])
    copy_runs(at(src, SRC), at(dst, DST), one, src_device="cpu", dst_device="cpu").synchronize()
    assert torch.equal(dst, expected)


def test_several_hundred_sizes_are_remembered() -> None:
    src, dst = (torch.zeros(1 << 17, dtype=torch.uint8) for _ in "ab")
    sizes = list(range(1, 400))
    places = np.cumsum(sizes).tolist()
    copy_runs(at(src, places), at(dst, places), sizes, src_device="cpu", dst_device="cpu")
    known = {cache.name: len(cache) for cache in caches()}
    assert known["prepared copies"] >= len(sizes)


def test_sizes_that_only_a_device_has(accelerator: torch.device) -> None:
    src, dst = ends(CPU, "inside")
    sizes: Any = torch.tensor([64] * 4).to(accelerator)
    with refused(SlotError, "sizes", "Tensor", watch=[dst]):
        copy_runs(at(src, SRC), at(dst, DST), sizes, src_device="cpu", dst_device="cpu")
