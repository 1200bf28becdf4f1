# SPDX-License-Identifier: Apache-2.0
"""Compute which blocks of drawn tasks land, as a model of the task graph."""

from __future__ import annotations

from graphlib import TopologicalSorter
from typing import Any

import numpy as np


def expected_landed(plan: list[Any]) -> dict[int, Any]:
    """Return which blocks of each task land, computed in the order of a topological sort."""
    landed: dict[int, Any] = {}
    for one in TopologicalSorter({n: x[0] for n, x in enumerate(plan)}).static_order():
        befores, maps, rescue, lands, tried, kind = plan[one]
        left = np.ones(3, bool) if tried is None else tried.copy()
        own = np.zeros(3, bool)
        if rescue:
            own = landed[befores[0]]
            left = left & ~landed[befores[0]]
        else:
            for before, pairs in zip(befores, maps, strict=True):
                for own_block, block in [(i, i) for i in range(3)] if pairs is None else pairs:
                    left[own_block] &= landed[before][block]
        landed[one] = own | (left & np.array(_result(kind, lands), bool))
    return landed


def _result(kind: str, lands: Any) -> Any:
    """Return which blocks the work of a task brings, if all are there before it."""
    if kind == "raise":
        return 0
    return 1 if kind == "gate" or lands is None else lands
