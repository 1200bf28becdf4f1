# SPDX-License-Identifier: Apache-2.0
"""Read recorded results: the former names of transfer strategies become the names of today."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from portakv_benchmarks.shared.harness import Row

#: Names of transfer strategies in results that were recorded before these had today's names.
OLD_NAMES = {
    "direct": "zero_copy",
    "descriptors": "batched_memcpy",
    "ring": "pageable",
    "bounced": "bounce",
}
#: The fields of a row that name transfer strategies.
_FIELDS = ("backend", "engine", "chosen", "allowed", "best_engine")


def read(path: Path) -> Row:
    """Return the result in a file, with today's names of transfer strategies.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file does not hold JSON.
    """
    results: Row = json.loads(path.read_text(encoding="utf-8"))
    for row in results["rows"]:
        # Other suites use the same words for other things: a disk's `ring`, SGLang's `direct`.
        if str(row.get("kind", "")).startswith("host_"):
            for name in _FIELDS:
                if name in row:
                    row[name] = _today(row[name])
    return results


def _today(value: object) -> Any:
    """Return a field's value with its names replaced, such as ``direct 8`` or ``direct, staged``;
    or a list of names, sorted as the suite sorts them."""
    if isinstance(value, list):
        return sorted(_today(each) for each in value)
    if not isinstance(value, str):
        return value
    names = [each.partition(" ") for each in value.split(", ")]
    return ", ".join(OLD_NAMES.get(name, name) + space + rest for name, space, rest in names)
