# SPDX-License-Identifier: Apache-2.0
"""Order and devices that broke released KV movers, on the simulated device.

Where waiting is what a test is about, the same test shows that without it the bytes are wrong.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.device_cases import check_caches, check_chunk, gathered, scattered
from support.simdev_cases import (
    DEVICE,
    IDS,
    NAME,
    OTHER,
    current,
    differ,
    make_caches,
    make_chunk,
    on,
)

from portakv import AdaptiveConnector, Index, KVView, copy_rows
from portakv.runtime import transfer
from portakv_benchmarks.shared.timers import DeviceTimer
from portakv_conformance import simdev

pytestmark = pytest.mark.simdev

LATE = 5  # milliseconds


@pytest.fixture(params=[DEVICE, OTHER], ids=["first device", "second device"])
def device(request: pytest.FixtureRequest) -> torch.device:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def elsewhere(device: torch.device) -> torch.device:
    return OTHER if device == DEVICE else DEVICE


@pytest.fixture(autouse=True)
def _no_faults_left() -> Any:
    yield
    for each in (DEVICE, OTHER):
        torch.accelerator.synchronize(each)
    assert not simdev.take_faults()


# Ids of another device than the caches'


@pytest.mark.parametrize("spread", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("store", [True, False], ids=["store", "load"])
def test_ids_of_another_device(
    device: torch.device, elsewhere: torch.device, store: bool, dtype: torch.dtype, spread: bool
) -> None:
    caches, chunk = make_caches(device), make_chunk(len(IDS), device)
    wanted, back = gathered(caches, chunk, IDS), scattered(caches, chunk, IDS)
    ids = torch.tensor(IDS, dtype=dtype, device=elsewhere)
    if spread:
        ids = torch.stack([ids, torch.zeros_like(ids)], dim=1)[:, 0]
    connector = AdaptiveConnector(device)
    if store:
        connector.from_gpu(chunk, caches, ids).synchronize()
        check_chunk(chunk, wanted)
    else:
        connector.to_gpu(chunk, caches, ids).synchronize()
        check_caches(caches, back)


@pytest.mark.parametrize("side", [True, False])
def test_ids_that_another_device_produces_late(
    device: torch.device, elsewhere: torch.device, side: bool
) -> None:
    caches, chunk = make_caches(device), make_chunk(len(IDS), device)
    wanted = gathered(caches, chunk, IDS)
    fresh = torch.tensor(IDS, device=elsewhere)
    ids = torch.zeros(len(IDS), dtype=torch.int64, device=elsewhere)
    torch.accelerator.synchronize(elsewhere)
    simdev.delay(current(elsewhere), LATE)
    ids.copy_(fresh)
    stream = torch.Stream(device) if side else None
    AdaptiveConnector(device).from_gpu(chunk, caches, ids, stream=stream).synchronize()
    check_chunk(chunk, wanted)


# What a stream, and the end of a transfer, mean


@pytest.mark.parametrize("given", [True, False], ids=["given", "current"])
def test_the_default_stream_passed_to_the_connector(device: torch.device, given: bool) -> None:
    """Its number is 0, which does not say that no stream was given: only then does waiting for it
    bring the bytes."""
    caches, chunk = make_caches(device), make_chunk(len(IDS), device)
    wanted = gathered(caches, chunk, IDS)
    connector = AdaptiveConnector(device)
    connector.register_kv_caches(caches)
    default = current(device)
    assert default.stream_id == 0
    torch.accelerator.synchronize(device)
    with on(torch.Stream(device)):
        moving = connector.from_gpu(chunk, None, IDS, stream=default if given else None)
    default.synchronize()
    assert differ(chunk, wanted) is not given  # read behind the default stream alone
    moving.synchronize()
    check_chunk(chunk, wanted)


@pytest.mark.parametrize("waits", [True, False])
def test_synchronize_waits_for_a_copy_within_the_device(
    device: torch.device, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host reads the bytes without another wait for the stream that carried them."""
    src, dst = make_chunk(12, device), make_chunk(12, device)
    wanted = gathered_rows(src, dst)
    layout = "kv layer token (head dim)"
    first, second = (KVView(tensor, layout, heads=2) for tensor in (src, dst))
    side = torch.Stream(device)
    simdev.delay(side, LATE)
    moving = copy_rows(first, second, Index([3, 0, 7]), Index([1, 2, 11]), stream=side)
    if not waits:
        monkeypatch.setattr(transfer.Completion, "synchronize", lambda completion: None)
    moving.synchronize()
    assert differ(dst, wanted) is not waits
    monkeypatch.undo()
    moving.synchronize()


def gathered_rows(src: torch.Tensor, dst: torch.Tensor) -> torch.Tensor:
    """The bytes of ``dst`` once tokens 3, 0 and 7 of ``src`` are its tokens 1, 2 and 11."""
    rows, found = (tensor.cpu().view(torch.uint8).clone() for tensor in (src, dst))
    found[:, :, [1, 2, 11]] = rows[:, :, [3, 0, 7]]
    return found


# What a benchmark measures


def test_a_call_that_only_enqueues_is_timed_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's clock around such a call would make any copy fast."""
    small = SimpleNamespace(L2_cache_size=4096)
    module = torch.get_device_module(NAME)
    monkeypatch.setattr(module, "get_device_properties", lambda device: small, raising=False)
    timer = DeviceTimer(DEVICE)
    taken = timer.sample(lambda i: simdev.delay(current(), 30), 0, 0.0)
    assert taken.elapsed >= 25_000 > taken.host
    assert not taken.hidden  # no delay kernel on this device: it does not claim to hide the host
