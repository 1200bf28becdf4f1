# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of the commands: 80 columns, no colours, nothing forced, both tables."""

from __future__ import annotations

import pytest
from support.command_line import choose_tables, settle


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set 80 columns without colours, on a machine where nothing is forced."""
    settle(monkeypatch)


@pytest.fixture(params=["rich", "plain"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test with rich, then as if rich were not installed."""
    choose_tables(request.param, monkeypatch)
