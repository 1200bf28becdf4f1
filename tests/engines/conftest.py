# SPDX-License-Identifier: Apache-2.0
"""What tests of measured costs have: a cache directory of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.command_line import settle

from portakv.engines import costs
from portakv.runtime import kernel_cache
from portakv.runtime.bounded import Bounded


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory that is not there yet, in a process that has read no table; commands write
    80 columns."""
    settle(monkeypatch)
    found = tmp_path / "a" / "cache"
    monkeypatch.setenv(kernel_cache.ENVIRONMENT, str(found))
    monkeypatch.setattr(costs, "tables", Bounded("tables", 4))
    return found
