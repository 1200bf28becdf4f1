# SPDX-License-Identifier: Apache-2.0
"""The report of a fault table: a JSON document that can be verified, compared and run again."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from portakv_conformance.faults.run import CONTROL, Row, chosen
from portakv_conformance.faults.source import tier_sha256
from portakv_conformance.faults.table import FAULTS
from portakv_conformance.faults.trial import OUTCOMES, Outcome

#: The identity of the report's form, and of one that does not know its source; a reader refuses
#: others.
SCHEMA = "portakv-tier-faults/2"
WITHOUT_SOURCE = "portakv-tier-faults/1"
#: Outcomes that no tier may have.
BAD: tuple[Outcome, ...] = ("wrong bytes", "hang")


@dataclass(frozen=True)
class Request:
    """What was run.

    Attributes:
        tier: ``module:Class``, or the name of a tier of a block store.
        terms: of its constructor; None: the usual ones.
        only: beginnings of names of faults; none: all faults.
        nbytes: of a block.
        deadline: seconds in which each call has to return.
    """

    tier: str
    terms: dict[str, Any] | None = None
    only: tuple[str, ...] = ()
    nbytes: int = 64 << 10
    deadline: float = 75.0

    def command(self, only: Iterable[str] = ()) -> str:
        """Return the command that runs this request again, or some faults of it."""
        words = ["portakv", "conform", "--tier", self.tier]
        if self.terms is not None:
            words += ["--terms", json.dumps(self.terms)]
        default = Request(self.tier)
        if self.nbytes != default.nbytes:
            words += ["--bytes", str(self.nbytes)]
        if self.deadline != default.deadline:
            words += ["--deadline", f"{self.deadline:g}"]
        for text in only or self.only:
            words += ["--only", text]
        return shlex.join(words)


@dataclass
class TierReport:
    """One run of the fault table over a tier.

    ``terms`` are those that held. ``rows`` has the trial without a fault first. Outcomes of a
    complete report are of every fault of the suite that wrote it. ``source_sha256`` is that of the
    tier's source, see `portakv_conformance.faults.source`; empty: it had none that could be read.
    """

    schema: str
    suite: str
    request: Request
    family: str
    versions: dict[str, str]
    terms: dict[str, Any]
    environment: dict[str, str]
    started: str  # ISO 8601, UTC
    seconds: float
    command: str
    rows: list[Row]
    source_sha256: str = ""
    totals: dict[str, int] = field(default_factory=dict)
    sealed_sha256: str = ""

    def seal(self) -> TierReport:
        """Fill in totals and checksum; return the report."""
        self.totals = totals_of(self.rows)
        self.sealed_sha256 = self.checksum()
        return self

    def checksum(self) -> str:
        """Return the sha256 over all fields, as canonical JSON, without itself and the commands of
        rows."""
        values = {**self._values(), "rows": [row._asdict() for row in self.rows]}
        del values["sealed_sha256"]
        if self.schema == WITHOUT_SOURCE:
            del values["source_sha256"]
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def document(self) -> str:
        """Return the JSON document, which ends with a newline; each row has its own line."""
        values = self._values()
        rows = values.pop("rows")
        lines = "".join(f" {json.dumps(k)}: {json.dumps(v)},\n" for k, v in values.items())
        body = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        return f'{{\n{lines} "rows": [\n{body}\n ]\n}}\n'

    def _values(self) -> dict[str, Any]:
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        values["request"] = {**asdict(self.request), "only": [*self.request.only]}
        values["rows"] = [
            {**row._asdict(), "replay": self.request.command(_names(row))} for row in self.rows
        ]
        return values

    @classmethod
    def read(cls, text: str) -> TierReport:
        """Return the report of a document. Raises `ValueError`, a sentence, for another one."""
        import msgspec  # a run does without it

        values = json.loads(text)
        if not isinstance(values, dict) or values.get("schema") not in (SCHEMA, WITHOUT_SOURCE):
            raise ValueError(f"Expected a report of schema {SCHEMA!r}, got another document.")
        try:
            rows = values.pop("rows")
            report = msgspec.convert({**values, "rows": []}, cls)
            for row in rows:
                row.pop("replay", None)
                report.rows.append(Row(**row))
        except (KeyError, TypeError, AttributeError, msgspec.ValidationError) as error:
            raise ValueError(f"Expected the fields of a tier's report, got {error}.") from error
        return report


def _names(row: Row) -> list[str]:
    """Return what chooses a row's fault; the trial without a fault runs before each of them."""
    return [] if row.fault == CONTROL else [row.fault]


def is_report(text: str) -> bool:
    """Return whether a text looks like a tier's report."""
    return any(f'"{each}"' in text for each in (SCHEMA, WITHOUT_SOURCE))


def totals_of(rows: Iterable[Row]) -> dict[str, int]:
    """Return the number of faults with each outcome, without the trial that has no fault."""
    totals: dict[str, int] = dict.fromkeys(OUTCOMES, 0)
    for row in rows:
        if row.fault != CONTROL:
            totals[row.outcome] = totals.get(row.outcome, 0) + 1
    return totals


def part(report: TierReport) -> str:
    """Return how many faults a report has, such as ``part, 4 of 103 faults``; empty if it has each
    fault of the installed suite."""
    names = {fault.name for fault in FAULTS}
    present = names & {row.fault for row in report.rows}
    if present == names:
        return ""
    return f"part, {len(present)} of {len(names)} faults"


def flaws(text: str) -> list[str]:
    """Return why a report cannot be relied on, a sentence each; none if it can."""
    try:
        report = TierReport.read(text)
    except ValueError as error:
        return [str(error)]
    found = []
    if report.sealed_sha256 != report.checksum():
        found.append("The report was changed after its run: its checksum is another one.")
    if report.totals != totals_of(report.rows):
        found.append("The totals are not those of the rows.")
    odd = sorted({row.outcome for row in report.rows if row.outcome not in OUTCOMES})
    if odd:
        found.append(f"Expected the outcomes {', '.join(OUTCOMES)}, got {', '.join(odd)}.")
    try:
        wanted = [CONTROL, *(fault.name for fault in chosen(report.request.only))]
    except KeyError as error:
        return [*found, f"The suite has no fault that begins with {error}."]
    names = [row.fault for row in report.rows]
    if names != wanted:
        missing = len({*wanted} - {*names})
        found.append(
            f"Expected the {len(wanted)} rows of the installed suite, got {len(names)}, of which "
            f"{missing} are missing or in another order."
        )
    return found


def expired(report: TierReport) -> str:
    """Return why a report is of another source than the installed one, as a sentence; empty if it
    is of this one, or of a tier that is not installed here."""
    now = tier_sha256(report.request.tier)
    if not now or now == report.source_sha256:
        return ""
    return (
        f"The report has expired: the source of {report.request.tier} is another one than that of "
        f"its run. Run `{report.command} --report FILE`."
    )


def differences(old: Sequence[Row], new: Sequence[Row]) -> Iterator[str]:
    """Yield a line for each fault whose outcome differs, and for each that one report lacks."""
    before = {row.fault: row.outcome for row in old}
    after = {row.fault: row.outcome for row in new}
    for name, outcome in before.items():
        now = after.get(name, "missing")
        if now != outcome:
            yield f"{name}: {outcome} -> {now}"
    for name in after:
        if name not in before:
            yield f"{name}: new, {after[name]}"


def table(report: TierReport) -> str:
    """Return the report for a reader: versions, a line for each fault, and the totals."""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    where = ", ".join(report.environment.values())
    lines = [f"{report.request.tier}: {report.family}, {versions}", where, ""]
    width = max(len(row.fault) for row in report.rows)
    for row in report.rows:
        notes = "; ".join(row.notes)
        if row.promised:
            notes = f"{notes}; {row.promised} still found by a lookup".lstrip("; ")
        lines.append(f"{row.outcome:<13} {row.fault:<{width}}  {notes[:160]}".rstrip())
    lines += ["", sentence(report)]
    return "\n".join(lines)


def sentence(report: TierReport) -> str:
    """Return the totals in a line, which begins with the number of faults."""
    counts = ", ".join(f"{count} {name}" for name, count in report.totals.items())
    faults = part(report) or f"{sum(report.totals.values())} faults"
    return f"{faults}: {counts}"


def environment(folder: Path) -> dict[str, str]:
    """Return where a run took place."""
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "filesystem": _filesystem(folder),
        "user": "root" if os.geteuid() == 0 else "not root",
    }


def _filesystem(folder: Path) -> str:
    """Return the type of the file system of a folder."""
    found = ("", "unknown")
    path = os.path.realpath(folder)
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, kind, *_ = line.split(" ")
        inside = path == point or path.startswith(f"{point.rstrip('/')}/")
        if inside and len(point) >= len(found[0]):
            found = (point, kind)
    return found[1]


def totals_table(folder: Path, link: str) -> str:
    """Return a Markdown table of the reports in a folder, a row each; a part is named as one.

    Args:
        link: what stands before a file's name in its link.
    """
    head = ["tier", "ran with", "on", "source", *OUTCOMES]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for file in sorted(folder.glob("*.json")):
        report = TierReport.read(file.read_text(encoding="utf-8"))
        versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
        counts = [str(report.totals[outcome]) for outcome in OUTCOMES]
        name = f"[`{report.request.tier}`]({link}{file.name})"
        if part(report):
            name += f" ({part(report)})"
        state = "expired" if expired(report) else "the same"
        facts = versions, report.started[:10], state
        lines.append(f"| {name} | {' | '.join(facts)} | {' | '.join(counts)} |")
    return "\n".join(lines)
