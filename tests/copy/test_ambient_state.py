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
from support.ambient_scene import (
    Scene,
    in_a_child,
)

from portakv.registry import registry

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
    process = context.Process(target=in_a_child)
    process.start()
    process.join(120)
    assert process.exitcode == 0, environment.get("OMP_NUM_THREADS")
