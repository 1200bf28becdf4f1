# SPDX-License-Identifier: Apache-2.0
"""What a committed result file bears out: a report of the suite, or a record of another job.

A report of the suite (`records`) bears out R3 or R6, as its verdict says. Every other job leaves a
JSON object with at least these keys, and further ones as it likes:

    what           one of `JOBS`: what was done, which decides the rung
    backend        ``module:Class``
    source_sha256  the hash of the backend's source (`source.source_sha256`)
    command, date  what repeats it, and the day (ISO)
    right          true where it ended well

and, where they count, ``vendor`` (sha256 of each package of the vendor, by name), ``versions`` (in
words) and ``device``. `recorded` makes one of any command.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .ladder import RESULTS, Ladder, Rung, broken_rules
from .records import SCHEMA, RunRecord
from .report import results, support
from .report.words import plural
from .source import source_sha256
from .verdict import LEFT_OUT

#: The rung that each kind of job bears out; no job but the suite's own ends at R6.
JOBS = {
    "call shapes against a stand-in": "R1",
    "accepted by the vendor's schemas": "R2",
    "semantics emulated": "R3",
    "cross-compiled, not executed": "R4",
    "built by the vendor's toolchain": "R5",
}
_WANTED = {"what": str, "backend": str, "source_sha256": str, "command": str, "date": str,
           "right": bool}  # fmt: skip


@dataclass(frozen=True)
class Evidence:
    """What one result file says.

    Attributes:
        rung: that it bears out; empty where it bears out none.
        told: the outcome for a reader: ``1,740 cases``, ``cross-compiled, not executed``.
        backend: by name; target: ``module:Class``; source_sha256: of its source then.
        device: for a reader, empty where the file does not say; emulated: no real one.
        command, date, versions: what repeats it, the day, what it holds for.
        suite: the version of the suite; empty for other jobs.
        vendor: sha256 of the vendor's packages, by name.
    """

    rung: str
    told: str
    backend: str
    target: str
    source_sha256: str
    device: str
    emulated: bool
    command: str
    date: str
    versions: str
    suite: str = ""
    vendor: Mapping[str, str] = field(default_factory=dict)


def read(file: Path) -> Evidence:
    """What a file says.

    Raises:
        ValueError: it is neither a report that nobody edited nor a record of a job; a sentence.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if isinstance(values, dict) and values.get("schema") == SCHEMA:
        return of_report(results.read(file))
    return _of_job(file, values)


def of_report(record: RunRecord) -> Evidence:
    """What a report of the suite says."""
    lone = LEFT_OUT in record.environment
    return Evidence(
        rung=record.rung,
        told=plural(len(record.cases), "case") + (", on one device" if lone else ""),
        backend=record.backend["name"],
        target=record.backend["target"],
        source_sha256=record.backend["source_sha256"],
        device=support.device(record),
        emulated=record.environment.get("emulated") is not False,
        command=record.command,
        date=record.started[:10],
        versions=support.versions(record),
        vendor={
            f"{name.removeprefix('sha256 of ')}, as installed": str(digest)
            for name, digest in record.environment.items()
            if name.startswith("sha256 of ")
        },
        suite=record.suite,
    )


def _of_job(file: Path, values: Any) -> Evidence:
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds no JSON object.")
    odd = [name for name, kind in _WANTED.items() if type(values.get(name)) is not kind]
    if odd:
        raise ValueError(
            f"{file} is neither a report of the suite nor a record of a job: {', '.join(odd)} "
            f"missing or of another type; see portakv_conformance.evidence."
        )
    if values["what"] not in JOBS:
        raise ValueError(f"{file} says {values['what']!r}; expected one of {', '.join(JOBS)}.")
    module = values["backend"].partition(":")[0]
    return Evidence(
        rung=JOBS[values["what"]] if values["right"] else "",
        told=values["what"] if values["right"] else f"failed: {values['what']}",
        backend=module.rpartition(".")[2],
        target=values["backend"],
        source_sha256=values["source_sha256"],
        device=str(values.get("device", "")),
        emulated=True,  # nothing of this ran on the device that it is about
        command=values["command"],
        date=values["date"],
        versions=str(values.get("versions", values.get("compiler", ""))),
        vendor=dict(values.get("vendor", {})),
    )


def rung_of(evidence: Evidence, file: str, *, device: str = "", note: str = "") -> Rung:
    """The row of a result file; ``device`` where the file does not say one.

    Raises:
        ValueError: it bears out no rung, or nobody says on which device.
    """
    if not evidence.rung:
        raise ValueError(f"{file} bears out no rung: {evidence.told}.")
    if not (evidence.device or device):
        raise ValueError(f"{file} does not say which device it is about; name it by --device.")
    same = {f.name: getattr(evidence, f.name) for f in fields(Evidence)}
    return Rung(**{**same, "device": evidence.device or device, "evidence": file, "note": note})


def contradictions(ladder: Ladder, root: Path) -> list[str]:
    """What the ladder says and its files do not, or the other way round; a sentence each."""
    wrong = list(broken_rules(ladder))
    named = {rung.evidence for rung in ladder.rungs}
    for file in sorted((root / RESULTS).glob("*")):
        name = f"{RESULTS}{file.name}"
        if name not in named:
            wrong.append(f"{name} has no row in ladder.toml; keep it by .ci/keep_result.py.")
    for rung in ladder.rungs:
        wrong += _not_borne_out(rung, root / rung.evidence)
    return wrong


def _not_borne_out(rung: Rung, file: Path) -> Iterator[str]:
    place = f"{' '.join(rung.place)}, by {rung.evidence}"
    try:
        said = read(file)
        record = json.loads(file.read_text(encoding="utf-8"))
        if said.suite and file.name != results.file_name(RunRecord.read(json.dumps(record))):
            yield f"{place}: the file must be named after its contents."
        made = rung_of(said, rung.evidence, device=rung.device, note=rung.note)
    except ValueError as error:
        yield f"{place}: {error}"
        return
    for entry in fields(Rung):
        mine, its = getattr(rung, entry.name), getattr(made, entry.name)
        if mine != its:
            yield f"{place}: {entry.name} is {mine!r}, but the file says {its!r}."


def recorded(
    what: str, target: str, device: str, versions: str, command: Sequence[str], says: str = ""
) -> dict[str, Any]:
    """Run a command and make a record of it, with all that it printed.

    It is right where it ends with 0, prints what the regular expression ``says`` finds, and leaves
    the backend's source alone.
    """
    before = source_sha256(target)
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    sys.stdout.write(done.stdout)
    return {
        "what": what,
        "backend": target,
        "device": device,
        "versions": versions,
        "source_sha256": before,
        "command": shlex.join(command),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "right": (
            done.returncode == 0
            and re.search(says, done.stdout) is not None
            and before == source_sha256(target)
        ),
        "printed": done.stdout.splitlines(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Record a command: 0 where it ended well, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m portakv_conformance.evidence",
        description="Runs COMMAND and writes a record of it, to be kept by .ci/keep_result.py.",
    )
    add = parser.add_argument
    add("--what", choices=JOBS, required=True, help="what the command does")
    add("--backend", required=True, metavar="MODULE:CLASS", help="whose source it is about")
    add("--device", required=True, help="what it stands for, for a reader")
    add("--versions", default="", help="what it holds for, in words")
    add("--says", default="", metavar="REGEX", help="what it prints where it did its work")
    add("--report", type=Path, required=True, metavar="FILE", help="the JSON file to write")
    add("command", nargs="+", metavar="COMMAND", help="what to run, behind --")
    asked = parser.parse_args(arguments)
    what, backend, device = asked.what, asked.backend, asked.device
    record = recorded(what, backend, device, asked.versions, asked.command, asked.says)
    asked.report.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if record["right"] else 1


if __name__ == "__main__":
    sys.exit(main())
