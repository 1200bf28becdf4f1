# SPDX-License-Identifier: Apache-2.0
"""Figures that compare rows of one result: with `cuda`, and with the better kernel of a peer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

#: What two copies must share to be compared.
_SAME = ("shape", "layers", "op", "index")
_FASTEST = "cuda"


def relate(rows: Sequence[Row]) -> None:
    """Write figures into the rows of copies: ``to_cuda``, a backend's time / that of `cuda`;
    ``to_peer``, its time / that of the peer's fastest kernel whose bytes were right, and which
    one that is, ``best_peer``."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row["kind"] == "copy" and row["backend"] != "copy_":
            groups[tuple(row[name] for name in _SAME)].append(row)
    for group in groups.values():
        own = [row for row in group if not row.get("peer")]
        peers = [row for row in group if row.get("peer") and row["verified"]]
        fastest = next((row for row in own if row["backend"] == _FASTEST), None)
        best = min(peers, key=lambda row: float(row["p50_us"]), default=None)
        for row in own:
            if fastest is not None and row is not fastest:
                row["to_cuda"] = _times(row, fastest)
            if best is not None:
                row["to_peer"], row["best_peer"] = _times(row, best), best["backend"]
    ladder = [row for row in rows if row["kind"] == "ladder"]
    for row in ladder:
        same = [r for r in ladder if r["op"] == row["op"] and r["way"] == _FASTEST]
        if same and row["op"] != "copy_":
            row["to_cuda"] = _times(row, same[0])


def peer_failures(rows: Sequence[Row]) -> list[str]:
    """What a peer carried out wrongly, a line each."""
    return [
        f"{row['shape']}, layers {row['layers']}, {row['backend']} {row['op']} {row['index']}: "
        f"some bytes were wrong"
        for row in rows
        if row.get("peer") and not row["verified"]
    ]


def _times(row: Row, other: Row) -> float:
    return float(f"{row['p50_us'] / other['p50_us']:.4g}")
