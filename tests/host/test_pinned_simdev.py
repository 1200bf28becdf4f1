# SPDX-License-Identifier: Apache-2.0
"""Pinned memory of the simulated device, in a process of its own."""

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
pytestmark = pytest.mark.skipif(why_not is not None, reason=why_not or "")


def test_on_the_simulated_device() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider",
         "pinned_simdev.py"],
        env={**os.environ, "PYTHONPATH": str(HERE.parent)}, cwd=HERE, capture_output=True,
        text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"^5 passed", done.stdout, re.MULTILINE), done.stdout
