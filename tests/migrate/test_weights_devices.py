# SPDX-License-Identifier: Apache-2.0
"""Weights through staging buffers of devices: streams order the packing, the transport's work and
the copies; and through those of the host, if the devices are of two kinds or one device."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from typing import Any

import pytest
import torch
from migrate.transports.test_distributed import WIRES, Simulated
from support.peer_process import Peer
from support.simdev_cases import DEVICE, OTHER, current
from support.waits import LIMIT
from support.weight_cases import AtSlice, Channels, make_channels
from torch.cuda import _sleep

from portakv.errors import PeerError, TransferCancelled, TransferError
from portakv.migrate import connections, staged_lanes
from portakv.migrate.channel import Channel
from portakv.migrate.staging import staging
from portakv.migrate.transports import TRANSPORTS
from portakv.runtime.devices import inside
from portakv.weights import owner as owners
from portakv.weights import prepare_weights, publish, pull_weights
from portakv.weights.owner import pack
from portakv_conformance import simdev

channels = pytest.fixture(make_channels)

LITTLE = 1 << 16  # bytes of staging: buffers of 16 KiB
Tensors = dict[str, torch.Tensor]
TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="it takes two CUDA devices")


def weights(device: torch.device, salt: int = 0) -> Tensors:
    """A tensor of many slices, one of some small ones, views, and a 16-bit one with NaNs."""
    big = torch.arange(64 * 400, dtype=torch.int32).view(64, 400) + salt
    return {
        "big": big.to(device),
        "view": big.add(1).to(device)[:, ::2],
        "turned": big[:20, :30].contiguous().to(device).t(),
        "nans": torch.arange(1 << 15).to(torch.int16).view(torch.bfloat16).to(device),
        **{f"{n}": torch.full((5, 3), n + salt, dtype=torch.float32).to(device) for n in range(40)},
    }


def zeros(device: torch.device) -> Tensors:
    made = weights(torch.device("cpu")).items()
    return {name: torch.zeros(x.shape, dtype=x.dtype).to(device) for name, x in made}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().view(-1).view(torch.uint8)


def equal(local: Tensors, remote: Tensors) -> bool:
    return all(torch.equal(bits(local[name]), bits(x)) for name, x in remote.items())


def change(remote: Tensors, salt: int) -> None:
    for name, x in weights(torch.device("cpu"), salt).items():
        remote[name].copy_(x)


@pytest.mark.parametrize("kinds", ["device to host", "host to device", "device to device"])
def test_host_staging_serves_two_kinds_of_device_and_one_device(
    accelerator: torch.device,
    channels: Channels,
    monkeypatch: pytest.MonkeyPatch,
    kinds: str,
) -> None:
    """Buffers on the host are pinned for tensors of a device."""
    pinned = list[bool]()

    def made(*args: Any, **terms: Any) -> torch.Tensor:
        memory = staging(*args, **terms)
        if memory.nbytes:
            pinned.append(memory.is_pinned())
        return memory

    for side in (staged_lanes, connections):
        monkeypatch.setattr(side, "staging", made)
    cpu = torch.device("cpu")
    there = cpu if kinds.startswith("host") else accelerator
    here = cpu if kinds.endswith("host") else accelerator
    remote = weights(there)
    owner = publish(channels(), remote, staging=LITTLE, expose="staging")
    channel = channels()
    local = zeros(here)
    assert "distributed sends" in prepare_weights(channel, owner.ticket, local)
    for turn in range(3):
        with owner.update():
            change(remote, turn)
        pull_weights(channel, owner.ticket, local)
        assert equal(local, remote)
    assert pinned == [there != cpu, *[here != cpu] * staged_lanes.BUFFERS]
    owner.close()


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setitem(TRANSPORTS.targets, Simulated.name, Simulated)
    with inside(torch.Stream(DEVICE)), inside(torch.Stream(OTHER)):
        yield Simulated.name


@pytest.mark.simdev
def test_streams_order_all_slices_between_devices(channels: Channels, simulated: str) -> None:
    """The reader's stream still reads its tensors when the pull begins; the owner's stream still
    writes when the update ends."""
    remote = weights(DEVICE)
    local = zeros(OTHER)
    owner = publish(channels(), remote, staging=LITTLE, expose="staging")
    channel = channels()
    how = prepare_weights(channel, owner.ticket, local, transport=simulated)
    assert "simulated sends" in how
    for turn in range(1, 5):
        with owner.update():
            simdev.delay(current(DEVICE), 50)
            change(remote, turn)
        before = {name: x.cpu() for name, x in local.items()}
        simdev.delay(current(OTHER), 50)
        read = {name: x.clone() for name, x in local.items()}
        pull_weights(channel, owner.ticket, local, transport=simulated)
        assert equal(local, remote)
        assert equal(read, before)
    owner.close()


def delay_of(device: torch.device) -> Callable[[], None]:
    """Return a function that holds the current stream of a device up for some milliseconds."""
    if device.type == "cuda":
        return lambda: _sleep(20_000_000)
    return lambda: simdev.delay(current(device), 20)


def changes_are_noticed(
    there: torch.device,
    here: torch.device,
    transport: str,
    channels: Channels,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Update between two slices, lose a slice, and cancel pulls: the lane stays in step."""
    delay = delay_of(there)
    lose = list[int]()

    def slow(full: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
        if lose and lose.pop() == 1:
            return
        with inside(current(there)):
            delay()
        pack(full, parts)

    monkeypatch.setattr(owners, "pack", slow)
    remote = weights(there)
    local = zeros(here)
    owner = publish(channels(), remote, staging=LITTLE, expose="staging")

    def update() -> None:
        with owner.update():
            change(remote, 7)

    between = AtSlice(channels(), 8, update)
    pull: Any = {"tickets": owner.ticket, "parameters": local, "transport": transport}
    with pytest.raises(TransferError, match="changed while they were pulled"):
        pull_weights(between, **pull)
    lose += [0, 0, 0, 1, 0, 0]
    with pytest.raises(TransferError, match="others of"):
        pull_weights(between, **pull)
    seed = random.Random(3)
    cancelled = 0
    for _ in range(6):
        pulled: Any = pull_weights(between, wait=False, **pull)
        time.sleep(seed.random() * 0.2)
        cancelled += pulled.cancel()
        with suppress(TransferCancelled):
            pulled.synchronize(LIMIT)
        pull_weights(between, **pull)
        assert equal(local, remote)
    assert cancelled
    assert owner.statistics()["lanes"] == 1
    owner.close()


@pytest.mark.simdev
def test_changes_and_cancellations_leave_the_lane_in_step(
    channels: Channels, simulated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(WIRES)
    monkeypatch.setattr("portakv.migrate.staged_reader.STOPPING", 60.0)  # also on a busy machine
    changes_are_noticed(DEVICE, OTHER, simulated, channels, monkeypatch)
    assert len(WIRES) == before + 1


@pytest.mark.simdev
def test_a_lane_that_does_not_end_in_time_is_released_on_both_sides(
    channels: Channels, simulated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancelled pull waits for its slices on the device only for a moment."""
    monkeypatch.setattr("portakv.migrate.staged_reader.STOPPING", 0.0)
    changes_are_noticed(DEVICE, OTHER, simulated, channels, monkeypatch)


@pytest.mark.gpu
@TWO
def test_weights_cross_by_nccl(channels: Channels, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = torch.device("cuda:0"), torch.device("cuda:1")
    changes_are_noticed(*pair, "distributed", channels, monkeypatch)


_OWNER = """
import torch
from portakv.migrate import Channel, publish

channel = Channel(timeout=20.0)
weights = {
    f"{n}": torch.full((4 << 20,), n + 1.0, dtype=torch.float32, device=device) for n in range(24)
}
published = publish(channel, weights, expose="staging", staging=64 << 20)
answer = published.ticket
"""


@pytest.mark.gpu
@TWO
def test_an_owner_of_another_device_dies_in_the_middle() -> None:
    """NCCL has no word for it: the channel notices, and the reader aborts its group."""
    with Peer() as owner, closing(Channel(timeout=20.0)) as channel:
        ticket = owner.do(_OWNER, device="cuda:1")
        local = {
            f"{n}": torch.zeros(4 << 20, dtype=torch.float32, device="cuda:0") for n in range(24)
        }
        lines = prepare_weights(channel, ticket, local)
        assert "by nccl" in lines
        pull_weights(channel, ticket, local)
        for n in range(24):
            assert bool((local[f"{n}"] == n + 1).all())
        with pytest.raises(PeerError):
            pull_weights(AtSlice(channel, 4, owner.kill), ticket, local, timeout=LIMIT)


@pytest.mark.gpu
def test_two_processes_on_one_device_use_the_host() -> None:
    with Peer() as owner, closing(Channel(timeout=20.0)) as channel:
        ticket = owner.do(_OWNER, device="cuda:0")
        local = {
            f"{n}": torch.zeros(4 << 20, dtype=torch.float32, device="cuda:0") for n in range(24)
        }
        assert "by gloo" in prepare_weights(channel, ticket, local)
        pull_weights(channel, ticket, local)
        for n in range(24):
            assert bool((local[f"{n}"] == n + 1).all())
