# SPDX-License-Identifier: Apache-2.0
"""Check the keys that the record of each kind of job needs beyond its label and its result.

    R1  ``signatures``: ``op``, ``signature`` and the ``source`` that documents it
    R2  ``schemas``: ``op``, ``pinned`` and ``found``; ``vendor``: sha256 of the vendor's wheel, by
        its file name, which has package and version
    R4  ``targets``; ``kernels``: the properties of the machine code of each ``kernel`` and
        ``target``; ``versions`` or ``compiler``
    R5  ``targets``; ``compiler``: the toolchain's own line with its version

R1 to R3 also have ``emulation``: the hash of each module that emulated. Without it they count as
expired.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NamedTuple, TypeAlias

from portakv_conformance.evidence.source import SHA256, SourceError, source_sha256

_WHEEL = re.compile(r"[A-Za-z0-9_.]+-(?P<version>[^-]+)-[^/]+\.whl")
_STANDINS = "portakv_conformance.vendor."
# Parsed JSON: each value is any JSON value.
_Record: TypeAlias = Mapping[str, Any]
_Rows: TypeAlias = Sequence[_Record]
_Check: TypeAlias = Callable[[_Record, _Rows], Iterator[str]]


class _Kind(NamedTuple):
    """Define the keys that the records of one support level need."""

    rows: str = ""  # the key of the list of objects; empty: the record has none
    texts: tuple[str, ...] = ()  # the keys of texts that each of these objects has
    checks: tuple[_Check, ...] = ()


def lacking(level: str, record: _Record) -> list[str]:
    """Return what a record lacks as proof of a support level, as sentences; empty if complete."""
    hashes: dict[str, object] = {"source_sha256": record["source_sha256"]}
    for place in ("vendor", "emulation"):
        values = record.get(place, {})
        hashes |= values if isinstance(values, dict) else {place: values}
    bad = {name: value for name, value in hashes.items() if not re.fullmatch(SHA256, str(value))}
    faults = [f"{name} {value!r} is not a sha256." for name, value in bad.items()]
    summary = str(record.get("told") or "")
    if summary not in " ".join(" ".join(_printed(record)).split()):
        faults.append(f"{summary!r} was not printed.")
    kind = _KINDS.get(level, _Kind())
    rows, wrong = _rows_of(kind, record)
    faults += wrong
    for check in kind.checks:
        faults += check(record, rows)
    return faults


def _rows_of(kind: _Kind, record: _Record) -> tuple[_Rows, list[str]]:
    """Return the list of objects of a record, and sentences on what is wrong with it."""
    if not kind.rows:
        return [], []
    rows = record.get(kind.rows)
    if not (isinstance(rows, list) and rows):
        return [], [f"It holds no {kind.rows}."]
    for row in rows:
        if not isinstance(row, dict) or not all(_text(row.get(key)) for key in kind.texts):
            expected = ", ".join(kind.texts)
            return [], [f"Each of its {kind.rows} needs {expected}; found {str(row)[:80]}."]
    return rows, []


def _signatures(record: _Record, rows: _Rows) -> Iterator[str]:
    for row in rows:
        if not re.fullmatch(r"\(.*\).*", row["signature"], re.DOTALL):
            yield f"The signature of {row['op']} is {row['signature']!r}."
    emulation = record.get("emulation")
    standins = []
    for name, sha256 in emulation.items() if isinstance(emulation, dict) else ():
        with suppress(SourceError):  # of this repository, and here as they were then
            if str(name).startswith(_STANDINS) and source_sha256(name) == sha256:
                standins.append(name)
    if standins and rows and rows != signatures_of(standins):
        yield f"Its signatures are not those of {', '.join(standins)}."


def _schemas(record: _Record, rows: _Rows) -> Iterator[str]:
    for row in rows:
        if row["pinned"] != row["found"] or row.get("same") is not True:
            yield f"{row['op']} is pinned as {row['pinned']}, but was found as {row['found']}."
    wheels = [match for name in record.get("vendor") or () if (match := _WHEEL.fullmatch(name))]
    if not wheels:
        yield "It names no wheel of the vendor's, <package>-<version>-<tags>.whl, with its sha256."
    for wheel in wheels:
        if wheel["version"] not in str(record.get("versions")):
            yield f"Its versions do not name {wheel['version']}, which its wheel has."


def _targets(record: _Record, rows: _Rows) -> Iterator[str]:
    targets = record.get("targets")
    if not isinstance(targets, list) or not targets or not all(map(_text, targets)):
        yield "It does not say for which targets it was built."


def _kernels(record: _Record, rows: _Rows) -> Iterator[str]:
    for row in rows:
        if row.get("wrong"):
            yield f"{row['kernel']} for {row['target']} is wrong: {row['wrong']}."
    printed = "\n".join(_printed(record))
    if printed and (unread := [row["kernel"] for row in rows if row["kernel"] not in printed]):
        yield f"Nothing was printed of {', '.join(unread)}."
    built = set(map(str, record.get("targets") or ()))
    read = {row["target"] for row in rows}
    if rows and read != built:
        yield f"It was built for {sorted(built)}, but code was read of {sorted(read)}."
    if not (_text(record.get("versions")) or _text(record.get("compiler"))):
        yield "It does not say which compiler built it (versions or compiler)."


def _compiler(record: _Record, rows: _Rows) -> Iterator[str]:
    line = record.get("compiler")
    if not (_text(line) and re.search(r"\d", str(line))):
        yield "It does not hold the toolchain's line with its version (compiler)."
    elif str(line) not in "\n".join(_printed(record) or [str(line)]):
        yield f"The line {line!r} of its toolchain is not in what was printed."


def _text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _printed(record: _Record) -> list[str]:
    printed = record.get("printed", [])
    return list(map(str, printed)) if isinstance(printed, list) else []


_KINDS: Mapping[str, _Kind] = {
    "R1": _Kind("signatures", ("op", "signature", "source"), (_signatures,)),
    "R2": _Kind("schemas", ("op", "pinned", "found"), (_schemas,)),
    "R4": _Kind("kernels", ("kernel", "target"), (_targets, _kernels)),
    "R5": _Kind(checks=(_targets, _compiler)),
}


def signatures_of(modules: Iterable[str]) -> list[dict[str, str]]:
    """Return the signatures of stand-ins, each with the source that documents it.

    A stand-in's ``SOURCES`` has the source of each function, ``package.function``.
    """
    signatures = []
    for name in modules:
        module = import_module(name)
        for op, source in getattr(module, "SOURCES", {}).items():
            signature = str(inspect.signature(getattr(module, op.rpartition(".")[2])))
            signatures.append({"op": op, "signature": signature, "source": source})
    return signatures


def kernels_in(printed: str, pattern: str) -> list[dict[str, str]]:
    """Return each kernel that the output names, by the pattern's groups ``kernel``, ``target``."""
    matches = re.finditer(pattern, printed, re.MULTILINE)
    return [{name: each[name] for name in ("kernel", "target")} for each in matches]
