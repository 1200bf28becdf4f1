# SPDX-License-Identifier: Apache-2.0
"""The simulated device is compiled once for a run of tests. If that fails, one test fails with the
compiler's words (in `test_conform_simdev.py`), and those that need the device are skipped with
them."""

from __future__ import annotations

import fcntl
import functools
import os
import tempfile
from pathlib import Path

import pytest

#: The variable that names the file with the reason, for all processes of a run.
VARIABLE = "PORTAKV_TESTS_SIMDEV"


def begin(config: pytest.Config) -> None:
    """Make the file in which a failed build leaves its reason, unless a parent made it."""
    if os.environ.get(VARIABLE):
        return
    handle, name = tempfile.mkstemp(prefix="portakv-tests-simdev-")
    os.close(handle)
    os.environ[VARIABLE] = name

    def end() -> None:
        os.environ.pop(VARIABLE, None)
        Path(name).unlink(missing_ok=True)

    config.add_cleanup(end)


@functools.cache  # every test of the device asks, and the answer costs a call of the compiler
def built() -> str | None:
    """Compile the device unless this run of tests has; return None, or why it could not."""
    from portakv_conformance.simdev import build

    with open(os.environ[VARIABLE], "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the others wait for the first
        file.seek(0)
        reason = file.read()
        if not reason:
            try:
                build.library()
            except build.SimulatedDeviceError as error:
                reason = str(error)
                file.write(reason)
    return reason or None
