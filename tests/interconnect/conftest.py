# SPDX-License-Identifier: Apache-2.0
"""Give tests of measured costs a separate cache directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command_line import settle

from portakv.interconnect import costs
from portakv.runtime import kernel_cache


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache directory that is not there yet, in a process that has read no table; commands write
    80 columns."""
    settle(monkeypatch)
    path = tmp_path / "a" / "cache"
    monkeypatch.setenv(kernel_cache.ENVIRONMENT, str(path))
    costs.forget()
    yield path
    costs.forget()
