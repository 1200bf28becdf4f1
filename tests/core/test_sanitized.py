# SPDX-License-Identifier: Apache-2.0
"""The run under sanitizers finds a write past the end, which no result shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support import sanitized
from support.core_build import copy_of_the_build

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not sanitized.sanitizers(), reason="g++ has no sanitizers here"),
]
#: The bytes that stand for ids which were seen, one byte for each id.
ALLOCATED = "seen_(new uint8_t[size_]())"


@pytest.mark.parametrize("seeded", [True, False], ids=["seeded", "as it is"])
def test_a_write_past_the_end_is_found(seeded: bool, tmp_path: Path) -> None:
    tree = copy_of_the_build(tmp_path / "tree")
    source = tree / "native/core/ids.cpp"
    text = source.read_text(encoding="utf-8")
    assert ALLOCATED in text
    if seeded:
        source.write_text(text.replace(ALLOCATED, "seen_(new uint8_t[size_ - 1]())"))
    folder = tmp_path / "package"
    folder.mkdir()
    environment = sanitized.build(folder, tree)
    command = [sys.executable, str(Path(sanitized.__file__)), "--rounds", "--seed=1"]
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert ("AddressSanitizer: heap-buffer-overflow" in done.stderr) == seeded, done.stderr
    assert (done.returncode != 0) == seeded
