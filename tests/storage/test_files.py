# SPDX-License-Identifier: Apache-2.0
"""The folders of a disk tier: created with their parents, or an error that says why not."""

from __future__ import annotations

from pathlib import Path

import pytest

from portakv.errors import StoreError
from portakv.storage.tiers.folder import make_folder


def test_a_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    for _ in range(2):
        make_folder(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_file_system_without_new_folders() -> None:
    """Missing folders are created, so "it does not exist" would tell the user nothing."""
    with pytest.raises(StoreError, match="Expected to create /proc/portakv, but the file system"):
        make_folder(Path("/proc/portakv/form"))
