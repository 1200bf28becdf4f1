# SPDX-License-Identifier: Apache-2.0
"""Crossings and `descriptors` on the simulated device, in a process of its own."""

from __future__ import annotations

from support.simdev_process import needs_simdev, run


@needs_simdev
def test_on_the_simulated_device() -> None:
    run("simdev_crossings.py")
