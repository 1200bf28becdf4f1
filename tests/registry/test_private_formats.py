# SPDX-License-Identifier: Apache-2.0
"""Tensors in a private format of a vendor's, which no backend moves by their strides."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from portakv.backends.reference import Reference
from portakv_conformance.simdev import build

HERE = Path(__file__).parent
why_not = build.missing()


def test_by_default_a_device_s_tensors_hide_nothing() -> None:
    assert Reference.hides(torch.device("cpu")) is None


@pytest.mark.skipif(why_not is not None, reason=why_not or "")
def test_on_the_simulated_device() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider",
         "private_npu.py"],
        env={**os.environ, "PYTHONPATH": str(HERE.parent)}, cwd=HERE, capture_output=True,
        text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"^\d\d passed", done.stdout, re.MULTILINE), done.stdout
    assert "skipped" not in done.stdout
