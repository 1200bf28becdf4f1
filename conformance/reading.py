# SPDX-License-Identifier: Apache-2.0
"""`portakv conform diff`, `verify` and `replay`: what reads files that a run has written."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from portakv.errors import PortaKVError
from portakv_conformance.evidence.verify import check_report
from portakv_conformance.record import RunRecord
from portakv_conformance.report.diff import compare_runs, differences
from portakv_conformance.run.journal import BadRequest, SubjectUnavailable


def compare(words: list[str]) -> int:
    """Print what changed between two reports; 1 where something got worse or is gone.

    Raises:
        BadRequest: one of them cannot be read.
    """
    parser = argparse.ArgumentParser(
        prog="portakv conform diff",
        description="Prints FIX, REGRESSION, NEW and MISSING; exits with 1 on REGRESSION or "
        "MISSING, or where a NEW case is wrong. A claim that was withdrawn is a REGRESSION, and so "
        "is a rung that is lost.",
    )
    parser.add_argument("old", type=Path, metavar="OLD", help="conformance.json of before")
    parser.add_argument("new", type=Path, metavar="NEW", help="conformance.json of now")
    asked = parser.parse_args(words)
    old, new = _record(asked.old), _record(asked.new)
    for sentence in differences(old, new):
        print(sentence, file=sys.stderr)
    changes = compare_runs(old, new)
    for change in changes:
        print(change)
        if change.bad and change.reason:
            print(f"{'':<10} {change.reason.splitlines()[0]}")
    counts = dict.fromkeys(("FIX", "REGRESSION", "NEW", "MISSING"), 0)
    for change in changes:
        counts[change.kind] += 1
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    return 1 if any(change.bad for change in changes) else 0


def verify(words: list[str]) -> int:
    """Print whether a report stands; 1 with every reason where it does not.

    Raises:
        BadRequest: the file cannot be read.
        SuiteBroken: the installed suite cannot be collected.
    """
    parser = argparse.ArgumentParser(
        prog="portakv conform verify",
        description="Checks a report: its schema and seal, its case list against the installed "
        "suite's, that totals, verdict and rung follow from its cases. Needs no device.",
    )
    parser.add_argument("report", type=Path, metavar="REPORT", help="a conformance.json")
    asked = parser.parse_args(words)
    text = _text(asked.report)
    wrong = check_report(text)
    for sentence in wrong:
        print(sentence)
    if wrong:
        print(f"{asked.report} is refused: {len(wrong)} contradictions.")
        return 1
    record = RunRecord.read(text)
    rung = f", {record.rung}" if record.rung else ""
    emulated = " (emulated)" if record.environment["emulated"] else ""
    place = f"{record.environment['device_name']}{emulated}"
    print(
        f"{asked.report} stands: {record.backend['name']} on {place}, "
        f"suite {record.suite}, profile {record.profile}: {record.verdict}{rung}."
    )
    return 0


def replay_example(words: list[str]) -> int:
    """Judge a saved example again; 1, with the first wrong byte, where it still fails.

    Raises:
        BadRequest: the file is no saved example, or no backend is named.
        SubjectUnavailable: the backend cannot run there.
    """
    parser = argparse.ArgumentParser(
        prog="portakv conform replay",
        description="Judges a failing example that a run saved, on the backend and device that it "
        "failed on or on others.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="example-*.json of a run")
    parser.add_argument("backend", nargs="?", metavar="NAME", help="default: the one it failed on")
    parser.add_argument("--device", metavar="D", help="default: the one it failed on")
    parser.add_argument("--emulated", action="store_true", help="D is carried by the simulated one")
    asked = parser.parse_args(words)
    from portakv_conformance.draw.saved import read_about, replay
    from portakv_conformance.judge.subject import subject

    text = _text(asked.file)
    try:
        said = read_about(text)
        name = asked.backend or said.get("backend")
        if not name:
            raise BadRequest(f"{asked.file} does not say which backend failed; name one.")
        device = asked.device or said.get("device", "cpu")
        emulated = asked.emulated or (asked.device is None and said.get("emulated") is True)
        if "" not in sys.path and os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # a class in this folder, as a run finds it
        # The device is made known to torch by this; tensors of the example may lie there.
        judged = subject(name, device, emulated=emulated)
        wrong = judged.flaw or replay(asked.file, judged)
    except PortaKVError as error:
        raise SubjectUnavailable(str(error)) from error
    except ValueError as error:
        raise BadRequest(str(error)) from error
    print(f"{asked.file}: {wrong or f'passes on {judged.name}, {judged.device}.'}")
    return 0 if wrong is None else 1


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"{path} cannot be read: {error}.") from error


def _record(path: Path) -> RunRecord:
    try:
        return RunRecord.read(_text(path))
    except (ValueError, TypeError, KeyError) as error:
        raise BadRequest(f"{path} is no report of this suite: {error}") from error
