# SPDX-License-Identifier: Apache-2.0
"""What an engine set torch up to before it calls: none of it changes what PortaKV does.

Under each state a backend is chosen and self-checked anew, and connector, rows and blocks move the
right bytes, within the device and between it and the host.
"""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

from portakv import AdaptiveConnector, Index, KVView, copy_blocks, copy_rows
from portakv.registry import registry

LAYERS, BLOCKS, SIZE, HEADS, DIM = 3, 6, 4, 2, 8
SLOTS = BLOCKS * SIZE
LAYOUT = "layer | kv block token head dim"
State = Callable[[torch.device], AbstractContextManager[object]]


@contextmanager
def restored(change: Callable[[], object], restore: Callable[[], object]) -> Iterator[None]:
    change()
    try:
        yield
    finally:
        restore()


def default_device(name: str) -> State:
    def state(device: torch.device) -> AbstractContextManager[object]:
        place = device if name == "own" else torch.device(name)
        return restored(
            lambda: torch.set_default_device(place), lambda: torch.set_default_device(None)
        )

    return state


@contextmanager
def warnings_as_errors(device: torch.device) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextmanager
def another_current_device(device: torch.device) -> Iterator[None]:
    if device.type == "cpu" or torch.accelerator.device_count() < 2:
        pytest.skip("there is one device")
    with torch.get_device_module(device).device(1 - (device.index or 0)):
        yield


def threads(device: torch.device) -> AbstractContextManager[object]:
    before = torch.get_num_threads()
    return restored(
        lambda: torch.set_num_threads(3 if before != 3 else 2),
        lambda: torch.set_num_threads(before),
    )


STATES: dict[str, State] = {
    "default device meta": default_device("meta"),
    "default device own": default_device("own"),
    "with torch.device meta": lambda device: torch.device("meta"),
    "default dtype bfloat16": lambda device: restored(
        lambda: torch.set_default_dtype(torch.bfloat16),
        lambda: torch.set_default_dtype(torch.float32),
    ),
    "inference mode": lambda device: torch.inference_mode(),
    "no grad": lambda device: torch.no_grad(),
    "autocast": lambda device: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic algorithms": lambda device: restored(
        lambda: torch.use_deterministic_algorithms(True),
        lambda: torch.use_deterministic_algorithms(False),
    ),
    "another current device": another_current_device,
    "number of threads": threads,
    "warnings as errors": warnings_as_errors,
}


def values(*shape: int, place: torch.device | str, first: int = 0) -> torch.Tensor:
    """Distinct int16, in memory on ``place``."""
    count = int(torch.Size(shape).numel())
    numbers = torch.arange(first, first + count, dtype=torch.int64, device="cpu")
    return (numbers % 32749).to(torch.int16).view(shape).to(place)


def rows(caches: list[torch.Tensor]) -> torch.Tensor:
    """``[layer, kv, slot, head * dim]`` on the host."""
    return torch.stack([cache.cpu().view(2, SLOTS, HEADS * DIM) for cache in caches])


class Scene:
    """Caches, a chunk and ids on a device and on the host, made before the state begins."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        shape = (2, BLOCKS, SIZE, HEADS, DIM)
        self.caches = [values(*shape, place=device, first=997 * i) for i in range(LAYERS)]
        self.empty = [torch.zeros(shape, dtype=torch.int16, device=device) for _ in range(LAYERS)]
        host = [torch.zeros(shape, dtype=torch.int16, device="cpu") for _ in range(LAYERS)]
        self.host = [one.pin_memory() for one in host] if device.type != "cpu" else host
        self.slots = torch.tensor([9, 2, 17, 6, 0, 23], dtype=torch.int64, device="cpu")
        self.on_device = self.slots.to(device)
        chunk = (2, LAYERS, len(self.slots), HEADS * DIM)
        self.chunk = torch.zeros(chunk, dtype=torch.int16, device=device)
        self.wanted = rows(self.caches)
        # numpy compares: torch's own functions are under the state as well.
        self.gathered = self.wanted[:, :, self.slots].transpose(0, 1).numpy()

    def check(self) -> None:
        """Move everything, by everything that moves, and compare each byte."""
        connector = AdaptiveConnector(self.device)
        connector.register_kv_caches(self.caches)
        for slots in (self.slots, self.on_device, Index(self.slots), self.slots.tolist()):
            self.chunk.zero_()
            connector.from_gpu(self.chunk, None, slots).synchronize()
            assert (self.chunk.cpu().numpy() == self.gathered).all()
        halves = [self.chunk[:, :, :3].contiguous().zero_() for _ in range(2)]
        connector.batched_from_gpu(halves, None, self.on_device, [0, 3], [3, 6]).synchronize()
        for half, first in zip(halves, (0, 3), strict=True):
            assert (half.cpu().numpy() == self.gathered[:, :, first : first + 3]).all()
        other = AdaptiveConnector(self.device)
        other.to_gpu(self.chunk, self.empty, self.on_device).synchronize()
        src, dst = KVView(self.caches, LAYOUT), KVView(self.empty, LAYOUT)
        copy_rows(src, dst, self.slots, self.on_device).synchronize()
        for slot in self.slots.tolist():
            landed = [one.cpu().numpy().reshape(2, SLOTS, -1)[:, slot] for one in self.empty]
            assert (self.wanted[:, :, slot].numpy() == landed).all()
        copy_blocks(src, dst, [0, 5, 3], [5, 1, 0]).synchronize()
        copy_blocks(src, dst, [2, 1, 4], [2, 3, 4], by_layer=True).synchronize()
        self.check_blocks(self.empty, {5: 0, 1: 5, 0: 3, 2: 2, 3: 1, 4: 4})
        host = KVView(self.host, LAYOUT)
        copy_blocks(src, host, [0, 1], [4, 5]).synchronize()
        copy_blocks(src, host, [2, 3], [1, 0], cancellable=True).synchronize()
        self.check_blocks(self.host, {4: 0, 5: 1, 1: 2, 0: 3})
        copy_blocks(host, dst, [4, 5], [0, 1]).synchronize()
        self.check_blocks(self.empty, {0: 0, 1: 1, 5: 0})

    def check_blocks(self, found: list[torch.Tensor], wanted: dict[int, int]) -> None:
        for mine, theirs in zip(found, self.caches, strict=True):
            for to, origin in wanted.items():
                assert (mine.cpu().numpy()[:, to] == theirs.cpu().numpy()[:, origin]).all()


@pytest.fixture
def fresh_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends are probed and self-checked anew."""
    monkeypatch.setattr(registry, "REGISTRY", registry.Registry())


@pytest.mark.usefixtures("fresh_registry")
@pytest.mark.parametrize("name", STATES)
def test_no_ambient_state_changes_what_is_moved(name: str, device: torch.device) -> None:
    scene = Scene(device)
    with STATES[name](device):
        scene.check()


@pytest.mark.usefixtures("fresh_registry")
@pytest.mark.parametrize("name", STATES)
def test_every_backend_passes_its_self_check(name: str, device: torch.device) -> None:
    order = registry.REGISTRY.automatic(device)
    usual = {backend: registry.REGISTRY.ask(backend, device, check=True)[1] for backend in order}
    again = registry.Registry()
    with STATES[name](device):
        for backend in order:
            said = again.ask(backend, device, check=True)[1]
            assert (said.accepted, said.reason) == (usual[backend].accepted, usual[backend].reason)


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_in_a_process_of_its_own(method: str) -> None:
    """On the CPU: a device that was used before a fork is refused, which other tests judge."""
    environment = dict(os.environ)
    context: Any = multiprocessing.get_context(method)
    process = context.Process(target=_in_a_child)
    process.start()
    process.join(120)
    assert process.exitcode == 0, environment.get("OMP_NUM_THREADS")


def _in_a_child() -> None:
    torch.set_num_threads(1)  # a forked pool of threads never answers
    Scene(torch.device("cpu")).check()
