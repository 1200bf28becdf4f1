# SPDX-License-Identifier: Apache-2.0
"""Files of tests that run on the simulated device, in a process of their own."""

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

#: Marks a test that needs the simulated device.
needs_simdev = pytest.mark.skipif(why_not is not None, reason=why_not or "")


def run(*files: str, number: str = r"\d\d\d") -> None:
    """Run files of tests; all have to pass, as many as ``number`` says, and none is skipped."""
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *files],
        env={**os.environ, "PYTHONPATH": path}, cwd=HERE, capture_output=True, text=True,
        check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(rf"^{number} passed", done.stdout, re.MULTILINE), done.stdout
    assert "skipped" not in done.stdout
