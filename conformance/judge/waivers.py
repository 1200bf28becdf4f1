# SPDX-License-Identifier: Apache-2.0
"""Waivers: cases that are known to fail, each with a reason and an expiry.

A waiver file is TOML::

    [[waiver]]
    id = "cases/test_claims.py::test_guards[int32]"
    reason = "Ids past the end fault on firmware before 8.1 (ticket 4711)."
    expires = "2027.02"

``expires`` is the first version of the suite in which the waiver holds no longer. Waivers are
strict: one that expired, that names no case, a CORE case, or a case that passes, fails the run.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from packaging.version import Version

from portakv_conformance.record import CaseRecord, JsonObject

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_VERSION = re.compile(r"\d+(\.\d+)*")
_TABLE = "waiver"


class WaiverError(ValueError):
    """A waiver file that cannot be understood; the text says where and what is expected."""


@dataclass(frozen=True)
class Waiver:
    """One case that may fail."""

    id: str  # as the report names it
    reason: str
    expires: str  # the first version of the suite in which it must pass


def read_waivers(path: Path) -> tuple[Waiver, ...]:
    """Return the waivers of a file, in its order.

    `WaiverError`: no such file, not TOML, an unknown key, a missing or empty key, a malformed
    version, or two waivers of one case.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise WaiverError(f"Expected a TOML file, got {path}: {error}. Mend it.") from error
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise WaiverError(
            f"Expected a waiver file, but {path} cannot be read: {why}. "
            f"Pass a waiver file, in TOML."
        ) from error
    if unknown := sorted(set(values) - {_TABLE}):
        raise WaiverError(
            f"Expected only [[{_TABLE}]] tables in {path}, got the unknown key {unknown[0]!r}. "
            f"Remove it."
        )
    entries = values.get(_TABLE, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise WaiverError(
            f"Expected a list of tables for {_TABLE!r} in {path}, got {type(entries).__name__}. "
            f"Write [[{_TABLE}]], with two pairs of brackets."
        )
    waivers = tuple(_waiver(entry, f"{path}, waiver {at}") for at, entry in enumerate(entries, 1))
    for id, times in Counter(waiver.id for waiver in waivers).items():
        if times > 1:
            raise WaiverError(
                f"Expected one waiver for {id!r} in {path}, got {times}. Keep one of them."
            )
    return waivers


def _waiver(entry: JsonObject, place: str) -> Waiver:
    known = [field.name for field in fields(Waiver)]
    names = ", ".join(known)
    for key in (*entry, *known):
        if key not in known:
            raise WaiverError(
                f"Expected the keys {names} in {place}, got the unknown key {key!r}. Remove it."
            )
        value = entry.get(key)
        if not isinstance(value, str) or not value.strip():
            got = repr(value) if key in entry else "nothing"
            raise WaiverError(
                f"Expected {key!r} in {place} to be a text that is not empty, got {got}. "
                f"Give {names}."
            )
    if not _VERSION.fullmatch(entry["expires"]):
        raise WaiverError(
            f"Expected 'expires' in {place} to be a version of the suite, got "
            f'{entry["expires"]!r}. Write a version such as "2027.02".'
        )
    return Waiver(**entry)


def judged(case: CaseRecord, waiver: Waiver | None, suite: str) -> CaseRecord:
    """Change a case as its waiver says, and return it.

    Failed becomes waived, unless the waiver expired or the case is CORE. A waived case that does
    not fail becomes failed. An error of the suite stays an error.
    """
    if waiver is None or case.status not in ("passed", "not-claimed", "failed"):
        return case
    if case.status != "failed":
        ended = "passed" if case.status == "passed" else "is not claimed"
        case.status = "failed"
        case.reason = f"It is waived ({waiver.reason}) but {ended}; remove the waiver."
    elif why_not := _why_not(asdict(waiver), case.area, suite):
        case.reason = f"{case.reason} {why_not}".strip()
    else:
        case.status = "waived"
        case.reason = f"{waiver.reason} (What it showed: {case.reason})"
    return case


def problems(
    waivers: Sequence[dict[str, str]], cases: Iterable[CaseRecord], suite: str, *, whole: bool
) -> list[str]:
    """Return the reasons why recorded waivers fail a run of a version of the suite, a sentence
    each.

    If the ``whole`` profile was run, an id that none of the cases has is unknown.
    """
    areas = {case.id: case.area for case in cases}
    faults = []
    for waiver in waivers:
        if waiver["id"] not in areas and whole:
            faults.append(f"A waiver names {waiver['id']!r}, but no case of this run has that id.")
        if why_not := _why_not(waiver, areas.get(waiver["id"], ""), suite):
            faults.append(f"The waiver of {waiver['id']!r} does not hold: {why_not}")
    return faults


def _why_not(waiver: dict[str, str], area: str, suite: str) -> str:
    if area == "core":
        return "CORE cannot be waived."
    if Version(suite) >= Version(waiver["expires"]):
        return f"It expired in suite {waiver['expires']}, and this is suite {suite}."
    return ""
