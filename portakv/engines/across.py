# SPDX-License-Identifier: Apache-2.0
"""Across the link: the engine for copies that a device's backend does not reach by itself."""

from __future__ import annotations

import threading

from portakv.engines.terms import Terms
from portakv.errors import BackendUnavailable
from portakv.registry.registry import REGISTRY, Choice

_made: dict[tuple[Choice, Terms], Choice] = {}
_lock = threading.Lock()


def across(half: Choice, terms: Terms | None = None) -> Choice:
    """The engine that chooses engines, over a device's backend and under a caller's terms.

    Raises:
        BackendUnavailable: its self-check failed on this device.
    """
    from portakv.engines.choose import Host

    key = half, terms or Terms()
    found = _made.get(key)
    if found is not None:
        return found
    device = half.backend.device
    backend, decision = REGISTRY.ask(Host.name, device, check=True)
    if backend is None:
        raise BackendUnavailable(
            f"A copy between {device} and the host was asked, but no engine can make it: "
            f"{decision.reason}. Copy through a tensor on the device."
        )
    engine = Host(device, *key)
    found = Choice(engine, (*half.trace, decision), False, engine.capabilities())
    with _lock:
        return _made.setdefault(key, found)
