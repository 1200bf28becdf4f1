# SPDX-License-Identifier: Apache-2.0
"""Order and devices that broke released KV movers: see simdev_pitfalls.py, which needs a process
of its own, since torch takes one device of that kind for good."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from portakv_conformance.simdev import build

HERE = Path(__file__).parent
why_not = build.missing()


@pytest.mark.skipif(why_not is not None, reason=why_not or "")
def test_on_the_simulated_device() -> None:
    command = ("-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "simdev_pitfalls.py")
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": path, "SIMDEV_NAME": "simdev"},
        cwd=HERE, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"^\d\d passed", done.stdout, re.MULTILINE), done.stdout
    assert "skipped" not in done.stdout
