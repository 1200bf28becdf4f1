# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of block transfers."""

from __future__ import annotations

from typing import Any

import pytest
from support.block_cases import BLOCK_BYTES, METHODS

from portakv.copy import slices
from portakv.runtime.worker import WINDOW


@pytest.fixture(params=METHODS)
def way(request: pytest.FixtureRequest) -> str:
    """The name of one of `METHODS` in which blocks are issued."""
    return str(request.param)


@pytest.fixture
def options(way: str) -> dict[str, Any]:
    """What `copy_blocks` is passed for that way."""
    return METHODS[way]


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice has two blocks, or one where several are under way."""
    monkeypatch.setattr(slices, "SLICE", -(-2 * BLOCK_BYTES // WINDOW))
