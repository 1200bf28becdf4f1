# SPDX-License-Identifier: Apache-2.0
"""Define the records of a run of the suite: one for each case, and one for the run.

The records have plain values only. A run writes them as JSON lines while it goes on, and as one
document at its end.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeAlias, TypeVar

import msgspec

from portakv_conformance import SUITE_VERSION

#: A parsed JSON object: each value is any JSON value.
JsonObject: TypeAlias = dict[str, Any]
Status = Literal["passed", "failed", "waived", "not-claimed", "error"]

#: Every status, worst first.
STATUSES: tuple[Status, ...] = ("error", "failed", "waived", "not-claimed", "passed")
#: The identity of the report's form; a reader refuses another.
SCHEMA = "portakv-conformance/1"
#: The key of ``environment`` with what an emulation assumes without the vendor's confirmation: a
#: clause that follows "it holds".
ASSUMPTION = "assumption"
#: The key of ``environment`` with what executed plans, if a backend has more than one method.
CARRIER = "carried out by"
#: The key of ``environment`` with the sha256 of the library built for it, by file name.
LIBRARY = "library"


@dataclass
class CaseRecord:
    """Record one case and its result.

    ``reason`` is a sentence: the first wrong byte, the reason of a waiver, or the claim that is
    missing. For a case that passed, it says why the backend declined some of its copies.
    """

    id: str  # pytest's, relative to the package: ``cases/test_core.py::test_widths[2]``
    area: str  # one of `cases.AREAS`
    profile: str  # the smallest that runs it, ``core`` or ``full``
    claim: str = ""  # the field of `Capabilities` that it judges; empty: every backend must do it
    status: Status = "passed"  # ``error`` is a fault of the suite or its surroundings
    seconds: float = 0.0
    examples: int = 0  # copies that were judged in it
    declined: int = 0  # copies that the backend declined, and that were not judged for it
    tags: dict[str, str] = field(default_factory=dict)  # ``layout``, ``dtype``, ``operation``
    reason: str = ""
    details: str = ""  # traceback and captured output; empty if it passed
    replay: str = ""  # the command that runs this case again, alone
    example: str = ""  # file name of the shrunken failing example, next to the report

    def line(self) -> str:
        """Return this record as one line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def read(cls, values: JsonObject) -> CaseRecord:
        """Return the record of parsed JSON.

        `ValueError`: a field is missing, unknown or of another type.
        """
        if not isinstance(values, dict):
            raise ValueError(f"Expected an object as case record, got {json.dumps(values)[:60]}.")
        if odd := _odd(cls, values):
            raise ValueError(
                f"Expected the fields of a case record, got fields {odd} missing or unknown."
            )
        return _converted(values, cls, f"case {values['id']!r}")


@dataclass
class RunRecord:
    """Record a whole run: the document ``conformance.json``.

    The environment has ``torch``, ``python``, ``os``, ``device`` (as requested), ``device_name``,
    ``driver``, ``emulated`` (bool), and the versions of the vendor's packages.
    """

    schema: str
    suite: str
    spec: str
    backend: dict[str, str]  # ``name``, ``target`` (module:Class), ``version``, ``source_sha256``
    environment: JsonObject
    capabilities: JsonObject  # every field of `Capabilities`, as plain values
    trace: list[str]  # the registry's answers, a sentence each
    profile: str
    seed: int
    fuzz: int  # as requested; 0: none
    case_list_sha256: str  # of the sorted ids that the profile consists of
    cases: list[CaseRecord]  # one for each id of the case list
    totals: dict[str, int]  # how many cases have each status
    rung: str  # ``R3``, ``R6`` or empty
    verdict: str  # ``conformant``, ``failed`` or ``incomplete``
    missing: list[str]  # sentences: what could not be run here
    started: str  # ISO 8601, UTC
    seconds: float
    command: str  # repeats the run
    waivers: list[dict[str, str]] = field(default_factory=list)

    def document(self) -> str:
        """Return the JSON document, which ends with a newline.

        Each field and each case has its own line, so a diff of two documents is readable.
        """
        values = asdict(self)
        del values["cases"]
        cases = ",\n".join(f"  {case.line()}" for case in self.cases)
        pairs = {json.dumps(k): json.dumps(v, ensure_ascii=False) for k, v in values.items()}
        lines = "".join(f" {key}: {value},\n" for key, value in pairs.items())
        return f'{{\n{lines} "cases": [\n{cases}\n ]\n}}\n'

    @classmethod
    def read(cls, text: str) -> RunRecord:
        """Return the record of a document.

        `ValueError`, a sentence: the document has another schema, or a suite with other report
        fields wrote it.
        """
        values = json.loads(text)
        if not isinstance(values, dict) or values.get("schema") != SCHEMA:
            got = values.get("schema") if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"Expected a report of schema {SCHEMA!r}, got {got!r}.")
        if odd := _odd(cls, values):
            raise ValueError(
                f"Expected the report fields of suite {SUITE_VERSION!r}, got a report of suite "
                f"{values.get('suite')!r} with fields {odd} missing or unknown."
            )
        cases = values["cases"]
        if isinstance(cases, list):
            values["cases"] = []
        record = _converted(values, cls, "the report")
        record.cases = [CaseRecord.read(case) for case in cases]
        return record


_Record = TypeVar("_Record", CaseRecord, RunRecord)


def _odd(cls: type[CaseRecord | RunRecord], values: JsonObject) -> list[str]:
    """Return the names of the fields that are missing or unknown."""
    return sorted(set(values) ^ {entry.name for entry in fields(cls)})


def _converted(values: JsonObject, cls: type[_Record], place: str) -> _Record:
    """Return the record; raise `ValueError` if a value does not have its field's type."""
    try:
        return msgspec.convert(values, cls)
    except msgspec.ValidationError as error:
        raise ValueError(f"In {place}: {error}.") from error
