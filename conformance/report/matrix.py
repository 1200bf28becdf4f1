# SPDX-License-Identifier: Apache-2.0
"""The matrix of layout x dtype x operation, from the tags of the cases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from portakv_conformance.record import STATUSES, CaseRecord, Status
from portakv_conformance.report.words import plural

ANY = "any"  # where a case has a layout but is about no dtype or operation in particular
# Narrow columns need short names; others stand as they are.
SHORT = {
    "bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64",
    "float8_e4m3fn": "f8e4", "float8_e5m2": "f8e5", "uint8": "u8", "int8": "i8",
    "int16": "i16", "int32": "i32", "int64": "i64", "bool": "b8",
}  # fmt: skip


@dataclass
class Cell:
    """The cases of one layout, operation and dtype: how many have each status."""

    statuses: Counter[Status] = field(default_factory=Counter)

    @property
    def status(self) -> Status:
        """The worst of them."""
        return next(status for status in STATUSES if self.statuses[status])

    def text(self) -> str:
        """``3 passed, 1 failed``."""
        return ", ".join(f"{self.statuses[s]} {s}" for s in reversed(STATUSES) if self.statuses[s])


@dataclass
class Matrix:
    """Layouts are rows; columns are the dtypes of each operation.

    Attributes:
        layouts: in the order of the cases.
        columns: for each operation the dtypes that occur with it.
        cells: by (layout, operation, dtype).
    """

    layouts: list[str] = field(default_factory=list)
    columns: dict[str, list[str]] = field(default_factory=dict)
    cells: dict[tuple[str, str, str], Cell] = field(default_factory=dict)

    def lead(self) -> str:
        """What the matrix shows, a sentence."""
        pairs = sum(len(dtypes) for dtypes in self.columns.values())
        return (
            f"{plural(len(self.layouts), 'layout')}, {plural(pairs, 'pair')} of operation and "
            f"dtype. Each mark is the worst of its cases; an empty place was not judged."
        )

    def seen(self) -> list[Status]:
        """The statuses that occur in it."""
        return sorted({cell.status for cell in self.cells.values()})


def dtype_of(case: CaseRecord) -> str:
    """The dtype that a case is about, without torch's name, or `ANY`."""
    return case.tags.get("dtype", ANY).removeprefix("torch.")


def matrix(cases: Iterable[CaseRecord]) -> Matrix:
    """The matrix of all cases that are about a layout; empty where none is."""
    made = Matrix()
    for case in cases:
        layout = case.tags.get("layout")
        if layout is None:
            continue
        operation, dtype = case.tags.get("operation", ANY), dtype_of(case)
        if layout not in made.layouts:
            made.layouts.append(layout)
        dtypes = made.columns.setdefault(operation, [])
        if dtype not in dtypes:
            dtypes.append(dtype)
        made.cells.setdefault((layout, operation, dtype), Cell()).statuses[case.status] += 1
    order = {name: place for place, name in enumerate(SHORT)}
    for dtypes in made.columns.values():
        dtypes.sort(key=lambda dtype: order.get(dtype, len(order)))
    return made
