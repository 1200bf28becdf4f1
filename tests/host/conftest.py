# SPDX-License-Identifier: Apache-2.0
"""Runtimes in which tests of host memory register it."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from support.pinned_runtime import FakeLibrary, absent, claimed, installed


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    """A stand-in in the place of the runtime."""
    return installed(monkeypatch)


@pytest.fixture(params=[installed, absent])
def either(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeLibrary | None]:
    """A test holds with a runtime and without any device; and leaves nothing claimed."""
    before = claimed()
    yield request.param(monkeypatch)
    if claimed() != before:
        gc.collect()  # a caught exception holds the frames that it passed
    assert claimed() == before
