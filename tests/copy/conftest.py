# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of block transfers."""

from __future__ import annotations

from typing import Any

import pytest
from support.block_cases import BLOCK_BYTES, METHODS

from portakv.copy import submit
from portakv.copy.slices import WINDOW


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    """Return the name of one of `METHODS`, in which a test issues blocks."""
    return str(request.param)


@pytest.fixture
def options(method: str) -> dict[str, Any]:
    """Return the options of `copy_blocks` for that method."""
    return METHODS[method]


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice has two blocks, or one where several are under way."""
    monkeypatch.setattr(submit, "SLICE", -(-2 * BLOCK_BYTES // WINDOW))
