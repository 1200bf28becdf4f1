# SPDX-License-Identifier: Apache-2.0
"""The matrix of layout x dtype x operation as a table; a cell leads to its cases."""

from __future__ import annotations

from portakv_conformance.report.markup import Html, element, join
from portakv_conformance.report.matrix import ANY, SHORT, Cell, Matrix, matrix
from portakv_conformance.report.parts import glyph, hidden_text, pill, section
from portakv_conformance.report.words import plural
from portakv_conformance.run.record import RunRecord


def coverage(record: RunRecord) -> Html | None:
    """The section with the matrix; None where no case is about a layout."""
    found = matrix(record.cases)
    if not found.cells:
        return None
    pairs = sum(len(dtypes) for dtypes in found.columns.values())
    lead = (
        f"{plural(len(found.layouts), 'layout')}, {plural(pairs, 'pair')} of operation and dtype. "
        "Each mark is the worst of its cases; an empty place was not judged."
    )
    table = element(
        "table",
        element("caption", hidden_text("Result for each layout, operation and dtype")),
        _head(found),
        element("tbody", (_row(found, layout) for layout in found.layouts)),
        class_="matrix",
    )
    box = element("div", table, class_="scroll", tabindex="0", role="region",
                  aria_label="Matrix of layouts, operations and dtypes")  # fmt: skip
    seen = {cell.status for cell in found.cells.values()}
    key = element("p", join((pill(s) for s in sorted(seen)), " "), class_="key")
    return section("coverage", "Layouts, dtypes, operations", lead, box, key)


def _head(found: Matrix) -> Html:
    groups, names = [], []
    for operation, dtypes in found.columns.items():
        words = "any operation" if operation == ANY else operation
        groups.append(
            element("th", words, colspan=len(dtypes), scope="colgroup", class_="first group")
        )
        for number, dtype in enumerate(dtypes):
            short = element("abbr", SHORT[dtype], title=dtype) if dtype in SHORT else dtype
            names.append(element("th", short, scope="col", class_=None if number else "first"))
    corner = element("th", "layout", rowspan=2, scope="col", class_="corner")
    return element("thead", element("tr", corner, groups), element("tr", names))


def _row(found: Matrix, layout: str) -> Html:
    cells = []
    for operation, dtypes in found.columns.items():
        for number, dtype in enumerate(dtypes):
            cell = found.cells.get((layout, operation, dtype))
            content = None if cell is None else _cell(cell, layout, operation, dtype)
            cells.append(element("td", content, class_=None if number else "first"))
    head = element("th", element("code", layout), scope="row")
    return element("tr", head, cells)


def _cell(cell: Cell, layout: str, operation: str, dtype: str) -> Html:
    return element(
        "a", glyph(cell.status), hidden_text(cell.text()), class_=f"cell {cell.status}",
        href="#cases", title=f"{layout}, {operation}, {dtype}: {cell.text()}",
        data_layout=layout, data_operation=operation, data_dtype=dtype,
    )  # fmt: skip
