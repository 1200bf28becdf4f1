# SPDX-License-Identifier: Apache-2.0
"""Reports of a run: one record, written in the forms that its readers use."""

from __future__ import annotations

from pathlib import Path

from portakv_conformance.record import RunRecord


def write(record: RunRecord, folder: Path) -> list[Path]:
    """Write every form of a report into a folder, which is made where it is missing; the files.

    ``conformance.json`` is the report itself; the others are made from the same record:
    ``report.html``, ``report.md``, ``junit.xml``, ``badge.svg``.
    """
    from portakv_conformance.report import page  # needs jinja2

    folder.mkdir(parents=True, exist_ok=True)
    forms = {
        "conformance.json": record.document(), "report.html": page.page(record),
        "report.md": page.markdown(record), "junit.xml": page.junit(record),
        "badge.svg": page.badge(record),
    }  # fmt: skip
    for name, text in forms.items():
        file = folder / name
        file.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
    return [folder / name for name in forms]
