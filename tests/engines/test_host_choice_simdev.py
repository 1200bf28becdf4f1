# SPDX-License-Identifier: Apache-2.0
"""The choice among engines, and calibration, on the simulated device in a process of its own."""

from __future__ import annotations

from support.simdev_process import needs_simdev, run


@needs_simdev
def test_on_the_simulated_device() -> None:
    files = "simdev_host_choice.py", "simdev_host_calibration.py", "simdev_host_timing.py"
    run(*files, number=r"\d\d")
