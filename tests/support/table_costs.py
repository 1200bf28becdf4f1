# SPDX-License-Identifier: Apache-2.0
"""Look up the costs of one strategy in a table, by the core."""

from __future__ import annotations

from portakv.interconnect.costs import Table, cost


def looked_up(table: Table, strategy: str, direction: str, run_bytes: int, runs: int) -> float:
    """Return the seconds of the device; 0 if the strategy was not measured."""
    columns = table.points.get((strategy, direction))
    return cost(columns, run_bytes, runs)[0] if columns else 0


def host_looked_up(
    table: Table, strategy: str, direction: str, run_bytes: int, runs: int
) -> float | None:
    """Return the seconds of the host; None if the strategy was not measured."""
    columns = table.points.get((strategy, direction))
    return cost(columns, run_bytes, runs)[1] if columns else None
