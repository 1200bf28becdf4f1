# SPDX-License-Identifier: Apache-2.0
"""Block transfers on the simulated device, in a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from portakv_conformance.simdev import build

why_not = build.missing()


@pytest.mark.skipif(why_not is not None, reason=why_not or "")
def test_on_the_simulated_device() -> None:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider",
         "simdev_blocks.py", "simdev_block_ids.py"],
        env={**os.environ, "PYTHONPATH": path}, cwd=here, capture_output=True, text=True,
        check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"^\d\d\d passed", done.stdout, re.MULTILINE), done.stdout
    assert "skipped" not in done.stdout
