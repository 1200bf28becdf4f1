# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of block transfers."""

from __future__ import annotations

from typing import Any

import pytest
from support.block_cases import BLOCK_BYTES, METHODS

from portakv.copy import slices, submit
from portakv.copy.call import settle as really_settle
from portakv.plan.move import Move
from portakv.runtime.worker import WINDOW


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
    monkeypatch.setattr(slices, "SLICE", -(-2 * BLOCK_BYTES // WINDOW))


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the list of the tokens of each copy that is settled."""
    counts: list[int] = []

    def settle(move: Move, *args: Any, **terms: Any) -> Any:
        counts.append(move.count)
        return really_settle(move, *args, **terms)

    monkeypatch.setattr(submit, "settle", settle)
    return counts
