# SPDX-License-Identifier: Apache-2.0
"""Devices that a machine does not have, as the host side is asked for them."""

from __future__ import annotations

import pytest
from support.guarded_memory import refused

from portakv import BackendUnavailable
from portakv.host import memcpy, small

ABSENT = "xpu"  # torch knows the type, and this machine has none


@pytest.mark.parametrize("device", [ABSENT, "nonsense"])
def test_small_copies_say_what_the_machine_lacks(device: str) -> None:
    for ask in (lambda: small.choose(64, device), lambda: small.to_device([1, 2], device)):
        with refused(BackendUnavailable, device, "Name a device of this machine"):
            ask()


def test_plain_copies_are_not_available_there() -> None:
    assert not memcpy.is_available(ABSENT)
    assert not memcpy.is_available("nonsense")
    assert not memcpy.is_available("cpu")
