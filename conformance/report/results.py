# SPDX-License-Identifier: Apache-2.0
"""Results that are committed: a whole report, sealed as made, for each backend-device pair."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from portakv_conformance.evidence.verdict import SEAL, digest_of
from portakv_conformance.evidence.verify import check_report
from portakv_conformance.record import RunRecord
from portakv_conformance.report.words import built

Check = Callable[[str], list[str]]


def device_kind(record: RunRecord) -> str:
    """The device's type as it was asked for, without an index: ``cuda:1`` is ``cuda``, and
    ``simdev:mlu`` is ``simdev:mlu``."""
    return re.sub(r":\d+$", "", str(record.environment.get("device", "")))


def file_name(record: RunRecord) -> str:
    """``<backend>-<device>-<suite>.json``; the device by its own name where it is a real one, with
    what carried plans out where a library was built for that."""
    kind = device_kind(record)
    named = record.environment.get("device_name") or kind
    on_host = kind == "cpu" or record.environment.get("emulated") is not False
    place = f"{kind if on_host else named} {built(record)}"
    parts = (part.lower() for part in (record.backend["name"], place, record.suite))
    return "-".join(re.sub(r"[^a-z0-9.]+", "-", part).strip("-.") for part in parts) + ".json"


def read(file: Path) -> RunRecord:
    """A report as its run left it; `ValueError`, a sentence that names the file, if it is none, or
    its seal is broken."""
    try:
        record = RunRecord.read(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if record.environment.get(SEAL) != digest_of(record):
        raise ValueError(
            f"{file} is not as its run left it: its seal does not fit its contents. "
            "Make the report again with `portakv conform ... --report`."
        )
    return record


def keep(report: Path, folder: Path, check: Check = check_report) -> Path:
    """Put a report among the results in a folder, in place of an older one of the pair and suite.
    `ValueError` if it was edited, if a check finds something wrong with it, or if its run was not
    the one that certification fixes."""
    record = read(report)
    wrong = check(report.read_text(encoding="utf-8"))
    if wrong:
        raise ValueError(f"{report} is refused by `portakv conform verify`: {' '.join(wrong[:3])}")
    if record.fuzz or record.seed:
        raise ValueError(
            f"{report} is of a run with seed {record.seed} and fuzz {record.fuzz}; a result is of "
            "a certification run: no --seed, no --fuzz."
        )
    file = folder / file_name(record)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(record.document(), encoding="utf-8", newline="\n")
    return file
