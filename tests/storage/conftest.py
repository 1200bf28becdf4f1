# SPDX-License-Identifier: Apache-2.0
"""Small file systems, for tests of disks that are full."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def small_device(tmp_path: Path) -> Iterator[Path]:
    """Yield a filesystem of one MiB."""
    place = tmp_path / "device"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], check=False)
    if made.returncode:
        pytest.skip("needs to mount a filesystem")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture
def ext2(tmp_path: Path) -> Iterator[Path]:
    """Yield a filesystem of eight MiB without fallocate."""
    image = tmp_path / "image"
    image.write_bytes(bytes(8 << 20))
    place = tmp_path / "device"
    place.mkdir()
    make = ["mkfs.ext2", "-q", "-m", "0", str(image)]
    for words in (make, ["mount", "-o", "loop", str(image), str(place)]):
        try:
            done = subprocess.run(words, check=False, capture_output=True)
        except FileNotFoundError:
            pytest.skip(f"needs {words[0]}")
        if done.returncode:
            pytest.skip(f"needs to mount an ext2: {done.stderr.decode()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)
