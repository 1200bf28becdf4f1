# SPDX-License-Identifier: Apache-2.0
"""Settings of torch that an engine makes before it calls do not change what PortaKV does.

Under each state a backend is chosen and self-checked anew, and connector, rows and blocks move the
right bytes, within the device and between it and the host.
"""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
import torch
from support.ambient import STATES, Scene, in_a_child
from support.waits import LIMIT

from portakv.registry import registry


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
            decision = again.ask(backend, device, check=True)[1]
            assert (decision.accepted, decision.reason) == (
                usual[backend].accepted,
                usual[backend].reason,
            )


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_in_a_process_of_its_own(method: str) -> None:
    """The process copies on the CPU: other tests cover a device that was used before a fork."""
    context: Any = multiprocessing.get_context(method)
    process = context.Process(target=in_a_child)
    process.start()
    process.join(LIMIT)
    assert process.exitcode == 0
