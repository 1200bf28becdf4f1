# SPDX-License-Identifier: Apache-2.0
"""Results of tiers of engines, as `benchmarks.check` reads them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from portakv_benchmarks.cli import describe
from portakv_benchmarks.shared.harness import Row, Rows

KIND = "plug_tier"


def result_of(
    name: str, part: str, rows: Sequence[Row], releases: Mapping[str, str], **asked: Any
) -> dict[str, Any]:
    """Return a result of one part.

    Args:
        name: of the result.
        part: of the suite, which the rows get.
        rows: each verified: a benchmark of tiers ends if bytes are wrong.
        releases: of the engine, by its name.
        asked: what was measured.
    """
    made: Rows = [{"kind": KIND, "part": part, "verified": True, **row} for row in rows]
    return {
        "load": os.getloadavg()[0],
        "format": 2,
        "suite": "plugs",
        "name": name,
        "machine": describe(torch.device("cpu")) | dict(releases),
        "asked": {"parts": [part], **asked},
        "rows": made,
    }
