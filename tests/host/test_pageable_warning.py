# SPDX-License-Identifier: Apache-2.0
"""The warning of pageable memory names the line that asked for pinned memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

#: A machine with a device pins, and warns of nothing.
_BLIND = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}

ASKS = """
import torch
from portakv.host import pinned

def mine():
    {call}

mine()
"""


@pytest.mark.parametrize(
    "call",
    ["pinned.allocate(4096)", "pinned.empty((4, 4))", "pinned.register(torch.zeros(9))"],
)
def test_it_points_to_the_caller(call: str, tmp_path: Path) -> None:
    script = tmp_path / "asks.py"
    script.write_text(ASKS.format(call=call))
    words = [sys.executable, "-W", "always", str(script)]
    ran = subprocess.run(words, capture_output=True, text=True, env=_BLIND, check=True)
    told = [line for line in ran.stderr.splitlines() if "RuntimeWarning" in line]
    assert len(told) == 1
    assert told[0].startswith(f"{script}:6: ")
