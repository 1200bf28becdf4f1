# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of the commands: 80 columns, no colours, nothing forced."""

from __future__ import annotations

import pytest
from support.command_line import settle


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set 80 columns without colours, on a machine where nothing is forced."""
    settle(monkeypatch)
