# SPDX-License-Identifier: Apache-2.0
"""What tests of the commands have: 80 columns, no colours, nothing forced, either kind of table."""

from __future__ import annotations

import pytest
from support.command_line import choose_tables, settle


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 columns without colours, on a machine where nothing is forced."""
    settle(monkeypatch)


@pytest.fixture(params=["rich", "plain"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With rich, then as if it were not installed."""
    choose_tables(request.param, monkeypatch)
