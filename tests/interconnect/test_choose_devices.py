# SPDX-License-Identifier: Apache-2.0
"""Transfers by the strategy that is picked, on devices: every byte, ids where a kernel reads them,
a device without room; which strategy there is for which terms, and what is logged of it."""

from __future__ import annotations

import gc
import logging
from typing import Any

import pytest
import torch
from support.command_line import registered
from support.device_cases import on
from support.engine_cases import BLOCK, CHUNKS, DOWNWARD, PAGED, POOLS, Case, Transfers, scattered
from support.simdev_cases import DEVICE
from support.small_backends import small_backend

from portakv import CopyPlan, Index, KVView, copy_blocks
from portakv.backends.base import Capabilities
from portakv.core.pick import ORDER
from portakv.host import pinned
from portakv.interconnect import choose as chosen
from portakv.interconnect import staging
from portakv.interconnect.choose import Host, HostLaunch, Pick, across
from portakv.interconnect.strategy import PINNED, Strategy, Terms
from portakv.registry.registry import REGISTRY, choose

pytestmark = pytest.mark.usefixtures("folder")  # no device was measured
#: By blocks on both sides.
BY_BLOCKS = Case(PAGED[0], POOLS[2], scattered(40, BLOCK), scattered(40, BLOCK, seed=8), 40)
BY_TOKENS = Case(PAGED[0], CHUNKS[0], scattered(37, 1), None, 37)


def strategies_used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the strategy of each launch."""
    used = list[str]()
    launch_by = HostLaunch.launch_by

    def noted(self: HostLaunch, strategy: str, *rest: Any) -> Any:
        result = launch_by(self, strategy, *rest)
        used.append(strategy)
        return result

    monkeypatch.setattr(HostLaunch, "launch_by", noted)
    return used


@DOWNWARD
@pytest.mark.parametrize("side", [False, True])
@pytest.mark.parametrize(
    "how", ["compute", "idle", "pageable", "staged", "batched_memcpy", "zero_copy"]
)
@pytest.mark.parametrize("case", [BY_BLOCKS, BY_TOKENS], ids=["blocks", "tokens"])
def test_whatever_carries_it_out_moves_the_right_bytes(
    accelerator: torch.device,
    case: Case,
    how: str,
    side: bool,
    downward: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pick under either policy and for pageable memory, and each strategy by its name."""
    terms = Terms("idle" if how == "idle" else "compute")
    pageable = how == "pageable"
    transfer = Transfers(Host(accelerator, terms=terms), downward, case, pageable=pageable)
    launch: HostLaunch = transfer.prepared()
    assert (launch.pick(transfer.move()).strategy == "pageable") == pageable
    if how in launch.out:
        pytest.skip(launch.out[how])
    if how in ORDER:
        named = Pick(how, "requested")
        always = lambda self, move, quick=False: named  # noqa: E731
        monkeypatch.setattr(HostLaunch, "pick", always)
    used = strategies_used(monkeypatch)
    transfer(stream=torch.Stream(accelerator) if side else None)
    assert used
    assert how not in ORDER or used == [how]


@DOWNWARD
@pytest.mark.parametrize(
    "layers", [pytest.param(1, id="one", marks=pytest.mark.full), pytest.param(2, id="layers")]
)
@pytest.mark.parametrize("side", [False, True])
def test_pages_cross_by_a_copy_engine_for_any_ids(
    accelerator: torch.device, layers: int, side: bool, downward: bool
) -> None:
    """New ids in each call; -1 skips a page."""
    stream = torch.Stream(accelerator) if side else torch.accelerator.current_stream()
    page = 1 << 20
    blocks = 20
    shape = (layers, blocks, page)
    drawn = torch.Generator().manual_seed(3)
    rows = torch.randint(-128, 128, shape, dtype=torch.int8, generator=drawn)
    device = [torch.zeros(blocks, page, dtype=torch.int8, device=accelerator) for _ in rows]
    host = pinned.empty((blocks, layers, page), torch.int8)
    on_device = KVView(device, "layer | block (token dim)", block_size=1)
    on_host = KVView(host, "block layer (token dim)", block_size=1)
    src, dst = (on_device, on_host) if downward else (on_host, on_device)
    for seed in range(5):
        read, written = (torch.randperm(blocks, generator=drawn)[:10].numpy() for _ in "ab")
        if seed == 3:
            read[4] = -1
        source = rows.roll(seed, 1)
        if downward:
            for layer, each in zip(device, source, strict=True):
                layer.copy_(each)
            host.zero_()
        else:
            host.copy_(source.transpose(0, 1))
            for layer in device:
                layer.zero_()
        torch.accelerator.synchronize(accelerator)
        with stream:
            transfer = copy_blocks(src, dst, read, written)
        transfer.synchronize()
        assert transfer.carried[0] == "batched_memcpy"
        expected = torch.zeros_like(rows)
        named = read >= 0
        expected[:, written[named]] = source[:, read[named]]
        moved = torch.stack([host[:, n] if downward else device[n].cpu() for n in range(layers)])
        assert torch.equal(moved, expected)


@DOWNWARD
def test_a_device_without_room_for_staging_copies_all_the_same(
    accelerator: torch.device,
    downward: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Another strategy copies; the log names it once."""
    caplog.set_level(logging.INFO, "portakv.interconnect")
    REGISTRY.logged_strategies.clear()
    transfer = Transfers(Host(accelerator), downward, BY_BLOCKS)
    launch = transfer.prepared()
    move = transfer.move()
    used = strategies_used(monkeypatch)
    transfer()
    picked = launch.pick(move)
    assert used == [picked.strategy]

    def full(self: staging.Staging, nbytes: int) -> None:
        raise torch.OutOfMemoryError("no room")

    torch.accelerator.synchronize(accelerator)
    staging.cached_staging.clear()  # other tests have reserved buffers
    monkeypatch.setattr(staging.Staging, "reserve", full)
    with pytest.raises(torch.OutOfMemoryError):  # by name, the error is raised
        launch.launch_by("staged", move, None)
    only = Pick("staged", "requested")
    monkeypatch.setattr(launch, "pick", lambda move, quick=False: only)
    for seed in range(2):
        transfer(transfer.chunk(seed))
        assert used[-1] == "batched_memcpy"
    assert any("no memory left" in record.getMessage() for record in caplog.records)
    Host(accelerator, terms=Terms(max_thread_blocks=2)).log("batched_memcpy", "again")
    messages = [record.getMessage().partition(", ")[0] for record in caplog.records]
    assert messages == list(
        dict.fromkeys(
            f"{accelerator}: strategy {name}" for name in (picked.strategy, "batched_memcpy")
        )
    )


class ReadsIds(Strategy):
    """Reads its ids on the device, late."""

    name = "zero_copy"
    seen: list[tuple[torch.device, torch.Tensor]] = []  # noqa: RUF012

    def capabilities(self) -> Capabilities:
        return Capabilities(places=PINNED, index_dtypes=frozenset({torch.int32}))

    def prepare(self, plan: CopyPlan) -> Any:
        def launched(src: KVView, dst: KVView, src_index: Index, *rest: Any) -> None:
            assert src_index.ids is not None
            assert src_index.ids.dtype == torch.int32
            with on(rest[2] or torch.accelerator.current_stream(src_index.ids.device.index)):
                ReadsIds.seen.append((src_index.ids.device, src_index.ids + 1000))

        return launched


class Kernel:
    def __init__(self, device: torch.device) -> None:
        transfer = Transfers(Host(device, terms=Terms("idle")), True, BY_BLOCKS)
        self.device = device
        self._move = transfer.move(tokens=2 * BLOCK)
        self._launch: HostLaunch = transfer.prepared()
        ReadsIds.seen.clear()

    def run(self, src_index: Index, dst_index: Index, stream: torch.Stream | None) -> None:
        move = self._move._replace(src_index=src_index, dst_index=dst_index)
        self._launch.launch_by("zero_copy", move, stream)
        torch.zeros(2, dtype=torch.int32, device=self.device)  # in memory that was freed too early

    def read(self) -> list[list[int]]:
        torch.accelerator.synchronize(self.device)
        assert {device for device, _ in ReadsIds.seen} == {self.device}
        return [ids.tolist() for _, ids in ReadsIds.seen]


@pytest.fixture
def kernel(accelerator: torch.device, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    usual = chosen.strategy_class
    classes = {"zero_copy": ReadsIds}
    monkeypatch.setattr(chosen, "strategy_class", lambda name: classes.get(name) or usual(name))
    return Kernel(accelerator)


@pytest.mark.parametrize("side", [False, True])
def test_a_kernels_ids_live_as_long_as_it_reads_them(kernel: Kernel, side: bool) -> None:
    stream = torch.Stream(kernel.device) if side else None
    for first in range(5):
        kernel.run(Index([first, first + 7], BLOCK), Index([8, 2], BLOCK), stream)
    assert kernel.read() == [[1000 + first, 1007 + first] for first in range(5)]


def test_ids_that_are_kept_serve_every_stream(kernel: Kernel) -> None:
    src_index = Index([5, 6], BLOCK)
    dst_index = Index([8, 2], BLOCK)
    for stream in (None, torch.Stream(kernel.device), torch.Stream(kernel.device)):
        kernel.run(src_index, dst_index, stream)
    del src_index, dst_index
    assert kernel.read() == [[1005, 1006]] * 3


def test_ids_on_the_device_are_brought_into_their_dtype_in_time(kernel: Kernel) -> None:
    ids = torch.tensor([5, 6], device=kernel.device)
    stream = torch.Stream(kernel.device)
    stream.wait_stream(torch.accelerator.current_stream(kernel.device.index))
    kernel.run(Index(ids, BLOCK), Index(ids, BLOCK), stream)
    assert kernel.read() == [[1005, 1006]]


@pytest.mark.simdev
@DOWNWARD
def test_memory_that_a_named_backend_does_not_reach_is_left_to_a_strategy(downward: bool) -> None:
    """It copies to pinned memory itself; to pageable memory the strategies over it do."""
    near = small_backend("near", places=frozenset({("device", "device"), *PINNED}))
    transfer = Transfers(Host(DEVICE), downward, BY_BLOCKS, pageable=True)
    expected = transfer.expected()
    with registered(near=near):
        copy_blocks(*transfer.move()[:4], backend="near").synchronize()
        transfer.check(expected)
        assert "pageable" not in {launch.src.form.place for launch in near.launches}


# Strategies for terms


def strategies() -> int:
    gc.collect()
    return sum(issubclass(type(each), Strategy) for each in gc.get_objects())


@pytest.mark.simdev
def test_thirty_rates_leave_no_thirty_strategies() -> None:
    src, dst = Transfers(Host(DEVICE), True, BY_BLOCKS).move()[:2]
    blocks = [3, 1, 2]

    def transfers(rates: list[float]) -> tuple[int, int]:
        for rate in rates:
            copy_blocks(src, dst, blocks, blocks, max_gbps=rate).synchronize()
            copy_blocks(src, dst, blocks, blocks, max_gbps=rate, backend="staged").synchronize()
        return strategies(), len(chosen.strategies)

    assert transfers([9.0]) == transfers([10 + nth / 7 for nth in range(30)])


@pytest.mark.simdev
def test_a_strategy_is_another_one_by_what_makes_it_different() -> None:
    half = choose(DEVICE)
    plain = across(half)
    assert across(half, Terms()) is plain
    limited = across(half, Terms(max_gbps=3.0))
    assert across(half, Terms(max_gbps=4.0)) is limited
    kinds = [plain, limited]
    kinds += [
        across(half, Terms(**terms))
        for terms in (
            dict[str, Any](overlap="idle"),
            {"detached": True},
            {"max_thread_blocks": 2},
            {"max_thread_blocks": 3},
        )
    ]
    assert len({id(kind) for kind in kinds}) == len(kinds)
