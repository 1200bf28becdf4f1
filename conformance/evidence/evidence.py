# SPDX-License-Identifier: Apache-2.0
"""Read a committed result file: a report of the suite, or a record of another job.

A report of the suite proves R3 or R6, according to its verdict. Every other job writes a JSON
object with at least these keys:

    what           one of `JOBS`: the kind of job, which decides the support level
    name, backend  the backend's own name, and ``module:Class``
    source_sha256  the hash of the backend's source (`source.source_sha256`)
    command, date  the command that repeats it, and the day (ISO)
    right          true if the job succeeded

Each kind of job needs further keys (`record_rules`). These keys are optional: ``vendor`` (sha256 of
each package of the vendor, by name), ``emulation`` (sha256 of each module that emulated),
``assumption`` (a clause), ``versions`` and ``told`` (texts) and ``device``. `recorded` makes a
record of any command.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path

from portakv_conformance.evidence.environment import INTERPRET, assumed, hashed
from portakv_conformance.evidence.record_rules import kernels_in, lacking, signatures_of
from portakv_conformance.evidence.source import SourceError, source_sha256
from portakv_conformance.evidence.support_matrix import (
    EMULATED,
    RESULTS,
    SupportLevel,
    SupportMatrix,
    broken_rules,
)
from portakv_conformance.evidence.verdict import LEFT_OUT, totals_of
from portakv_conformance.record import ASSUMPTION, SCHEMA, STATUSES, JsonObject, RunRecord
from portakv_conformance.report import results
from portakv_conformance.report.words import STATUS_WORDS

#: The support level that each kind of job proves. Only the suite's own report proves R6.
JOBS = {
    "call shapes against a stand-in": "R1",
    "accepted by the vendor's schemas": "R2",
    "semantics emulated": "R3",
    "cross-compiled, not executed": "R4",
    "built by the vendor's toolchain": "R5",
}
_WANTED = {
    "what": str,
    "name": str,
    "backend": str,
    "source_sha256": str,
    "command": str,
    "date": str,
    "right": bool,
}

# Lines of pytest's head that have only a path.
_HEAD = re.compile(r"(?:rootdir|cachedir|configfile): ")
# An absolute path; the group is its last part. No word precedes it, or it would be a web address or
# a relative path; a compiler's option may precede it.
_PATH = re.compile(r"(?:(?<=-[ILB])|(?<![\w./~]))/(?:[\w.+@-]+/)+([\w.+@-]*)")


def read(file: Path) -> SupportLevel:
    """Return what a file proves, as a row that names no file yet.

    The level is empty if the file proves none, the device if the file does not name one.
    `ValueError`, a sentence: the file is neither an unchanged report nor a complete job record.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        wrong = "is not JSON" if isinstance(error, ValueError) else "cannot be read"
        raise ValueError(f"Expected a report or a record, but {file} {wrong}: {error}.") from error
    if not (isinstance(values, dict) and values.get("schema") == SCHEMA):
        return _of_job(file, values)
    record = results.read(file)
    try:
        return of_report(record)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(
            f"Expected a complete report, but {file} is unreadable: {kind}{error}"
        ) from error


def of_report(record: RunRecord) -> SupportLevel:
    """Return what a report of the suite proves; `ValueError` if it does not name the backend."""
    for name in ("name", "target", "source_sha256"):
        text = record.backend.get(name)
        if not isinstance(text, str):
            raise ValueError(f"expected a text as the backend's {name}, got {text!r}.")
    counted = totals_of(record.cases)
    known = record.environment
    shown = [status for status in STATUSES[::-1] if counted[status] or status == "passed"]
    counts = [f"{counted[status]:,} {STATUS_WORDS[status]}" for status in shown]
    return SupportLevel(
        evidence="",
        level=record.rung,
        summary=", ".join([*counts, "on one device"] if LEFT_OUT in known else counts),
        backend=record.backend["name"],
        target=record.backend["target"],
        source_sha256=record.backend["source_sha256"],
        device=results.device(record),
        emulated=known.get("emulated") is not False,
        command=record.command,
        date=record.started[:10],
        versions=results.versions(record),
        vendor={
            f"{name.removeprefix('sha256 of ')}, as installed": str(digest)
            for name, digest in known.items()
            if name.startswith("sha256 of ")
        },
        suite=record.suite,
        emulation=_emulation(record),
        assumption=str(known.get(ASSUMPTION, "")),
    )


def _emulation(record: RunRecord) -> dict[str, str]:
    """Return what emulated: on a CPU an interpreter or the backend itself, else per the report."""
    known = record.environment
    if known.get("emulated") is False:
        return {}
    if results.device_kind(record) != "cpu":
        return {str(name): str(sha256) for name, sha256 in dict(known.get("emulation", {})).items()}
    if INTERPRET in known:
        return {"triton": str(known.get("triton", ""))}
    return {record.backend["target"].partition(":")[0]: record.backend["source_sha256"]}


def _of_job(file: Path, values: object) -> SupportLevel:
    if not isinstance(values, dict):
        raise ValueError(f"Expected a JSON object in {file}, got {type(values).__name__}.")
    if odd := [name for name, kind in _WANTED.items() if type(values.get(name)) is not kind]:
        raise ValueError(
            f"Expected {file} to be a report of the suite or a record of a job, got a file with "
            f"{', '.join(odd)} missing or of another type. See "
            f"portakv_conformance.evidence.evidence."
        )
    what = values["what"]
    right = values["right"]
    if wrong := lacking(JOBS.get(what, "") if right else "", values):
        raise ValueError(
            f"Expected {file} to prove {what!r}, but it is incomplete. {' '.join(wrong)}"
        )
    if what not in JOBS:
        raise ValueError(f"Expected {file} to name one of {', '.join(JOBS)}, got {what!r}.")
    summary = f"{what}, {_counts(values)}".removesuffix(", ")
    return SupportLevel(
        evidence="",
        level=JOBS[what] if right else "",
        summary=summary if right else f"failed: {summary}",
        backend=values["name"],
        target=values["backend"],
        source_sha256=values["source_sha256"],
        device=str(values.get("device", "")),
        emulated=True,  # no part of such a job runs on the device
        command=values["command"],
        date=values["date"],
        versions=str(values.get("versions", values.get("compiler", ""))),
        vendor=dict(values.get("vendor", {})),
        emulation=dict(values.get("emulation", {})),
        assumption=str(values.get("assumption", "")),
    )


def _counts(values: JsonObject) -> str:
    """Return what a job reported, with counts as in a report: ``1,797 passed, 2 not claimed``."""
    counts = str(values.get("told") or "")
    printed = " ".join(map(str, values.get("printed", ())))
    if counts and (whole := re.search(re.escape(counts) + r", \d+ not-claimed", printed)):
        counts = whole[0]
    return re.sub(r"(\d)(?=\d{3} passed)", r"\1,", counts.replace("-claimed", " claimed"))


def level_of(proved: SupportLevel, file: str, *, device: str = "", note: str = "") -> SupportLevel:
    """Return the row of a result file; ``device`` counts if the file does not name one.

    `ValueError`: the file proves no support level, or nothing names the device.
    """
    if not proved.level:
        raise ValueError(f"Expected {file} to prove a support level, got: {proved.summary}.")
    if not (proved.device or device):
        raise ValueError(f"Expected {file} to name its device, got none. Pass --device.")
    return replace(proved, device=proved.device or device, evidence=file, note=note)


def contradictions(matrix: SupportMatrix, root: Path) -> list[str]:
    """Return each contradiction between the matrix and its files, as a sentence."""
    files = {f"{RESULTS}{file.name}" for file in (root / RESULTS).glob("*")}
    alone = sorted(files - {level.evidence for level in matrix.levels})
    wrong = [
        f"{name} has no row in support_matrix.toml; keep it by .ci/keep_result.py."
        for name in alone
    ]
    for level in matrix.levels:
        wrong += _not_borne_out(level, root / level.evidence)
    return [*broken_rules(matrix), *wrong]


def _not_borne_out(level: SupportLevel, file: Path) -> Iterator[str]:
    place = f"{' '.join(level.place)}, by {level.evidence}"
    try:
        proved = read(file)
        if proved.suite and file.name != results.file_name(results.read(file)):
            yield f"{place}: the file must be named after its contents."
        made = level_of(proved, level.evidence, device=level.device, note=level.note)
    except ValueError as error:
        yield f"{place}: {error}"
        return
    for entry in fields(SupportLevel):
        own = getattr(level, entry.name)
        its = getattr(made, entry.name)
        if own != its:
            yield f"{place}: {entry.name} is {own!r}, but the file says {its!r}."


def recorded(job: argparse.Namespace) -> JsonObject:
    """Run a job's command and return its record; ``job`` has the options of `main`.

    The record has the command's output without the folders of files. The job is right if the
    command exits with 0, prints the expected text, does not change the sources, and shows
    everything that its kind requires.
    """
    before = (source_sha256(job.target), hashed(job.emulated_by))
    done = subprocess.run(job.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    sys.stdout.write(done.stdout)
    printed = without_places(done.stdout)
    record = {
        "what": job.what,
        "name": name_of(job.target),
        "backend": job.target,
        "device": job.device,
        "versions": job.versions,
        "source_sha256": before[0],
        "emulation": before[1],
        "assumption": assumed(job.emulated_by),
        "command": shlex.join(job.command),
        "date": datetime.now(timezone.utc).date().isoformat(),
        **_shown(job, printed),
        "printed": printed.splitlines(),
    }
    wrong = lacking(JOBS[job.what], record)
    if JOBS[job.what] in EMULATED and not job.emulated_by:
        wrong.append("It does not say what emulated (--emulated-by).")
    if (source_sha256(job.target), hashed(job.emulated_by)) != before:
        wrong.append("A source was changed meanwhile.")
    if done.returncode or not all(re.search(each, printed) for each in (job.says, job.summary)):
        wrong.append(f"The command ended with {done.returncode}, or did not say what it has to.")
    print("".join(f"{why}\n" for why in wrong), end="", file=sys.stderr)
    return record | {"right": not wrong}


def without_places(printed: str) -> str:
    """Return the text with each absolute path reduced to its last part.

    Lines of pytest that have only a path are removed.
    """
    retained = (line for line in printed.splitlines(keepends=True) if not _HEAD.match(line))
    return _PATH.sub(r"\1", "".join(retained))


def name_of(target: str) -> str:
    """Return a backend's own name; raise `SourceError` if ``module:Class`` is not a backend."""
    module, _, attribute = target.partition(":")
    name = getattr(getattr(import_module(module), attribute, None), "name", "")
    if not (isinstance(name, str) and name):
        raise SourceError(
            f"Expected {target!r} to be a backend class with a name, got the name {name!r}"
        )
    return name


def _shown(job: argparse.Namespace, printed: str) -> JsonObject:
    """Return the keys that the kinds of job require, from the options and the output."""
    keys: JsonObject = {"targets": job.targets}
    if JOBS[job.what] == "R1":
        keys["signatures"] = signatures_of(job.emulated_by)
    if job.kernels:
        keys["kernels"] = kernels_in(printed, job.kernels)
    if job.summary and (match := re.search(job.summary, printed)):
        keys["told"] = " ".join(match[0].split())
    if job.compiler and (line := re.search(job.compiler, printed, re.MULTILINE)):
        keys["compiler"] = line[0].strip()
    return {name: value for name, value in keys.items() if value or name == "kernels"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m portakv_conformance.evidence.evidence",
        description="Run COMMAND and write a record of it for .ci/keep_result.py.",
    )
    add = parser.add_argument
    kinds = [what for what, level in JOBS.items() if level != "R2"]  # its job writes its own record
    add("--what", choices=kinds, required=True, help="the kind of job")
    add("--backend", dest="target", required=True, metavar="MODULE:CLASS", help="the backend")
    add("--device", required=True, help="the device that the job stands for, in words")
    add("--versions", default="", help="the versions that the job stands for, in words")
    add("--says", default="", metavar="REGEX", help="text that a successful command prints")
    add("--tells", dest="summary", default="", metavar="REGEX", help="printed text for the row")
    add(
        "--emulated-by",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module that emulates",
    )
    add("--target", dest="targets", action="append", default=[], help="a target of the build")
    add("--kernels", default="", metavar="REGEX", help="printed text on a kernel and its target")
    add("--compiler", default="", metavar="REGEX", help="printed text on the toolchain's version")
    add("--report", type=Path, required=True, metavar="FILE", help="the JSON file to write")
    add("command", nargs="+", metavar="COMMAND", help="the command to run, after --")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Record a command; return 0 if it succeeded and shows what its kind requires, else 1."""
    job = _parser().parse_args(arguments)
    try:
        record = recorded(job)
    except (SourceError, ImportError, OSError) as error:
        print(f"Nothing was recorded: {error}", file=sys.stderr)
        return 1
    job.report.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if record["right"] else 1


if __name__ == "__main__":
    sys.exit(main())
