# SPDX-License-Identifier: Apache-2.0
"""What cases are parametrized by, wherever they ask for it by name."""

from __future__ import annotations

import pytest

from portakv_conformance.draw.by_hand import DIRECTIONS


@pytest.fixture(params=DIRECTIONS)
def direction(request: pytest.FixtureRequest) -> str:
    """Rows go out of a cache, and into it."""
    return str(request.param)
