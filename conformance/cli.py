# SPDX-License-Identifier: Apache-2.0
"""`portakv conform`: judge a backend, and read what such judgements left behind.

Exit codes: 0 conformant, 1 not, 2 the command cannot be understood, 3 the backend is not available
here (with the probe's reason; nothing is ever skipped).
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from portakv.errors import PortaKVError
from portakv.registry.registry import ENVIRONMENT, MADE_FOR
from portakv_conformance.evidence.verdict import WRONG
from portakv_conformance.evidence.verify import check_report
from portakv_conformance.judge.waivers import WaiverError, problems, read_waivers
from portakv_conformance.record import RunRecord
from portakv_conformance.report.diff import compare_runs, differences
from portakv_conformance.report.summary import print_summary
from portakv_conformance.run.journal import BadRequest, SubjectUnavailable, SuiteBroken
from portakv_conformance.run.listing import cases_of
from portakv_conformance.run.options import whole_number
from portakv_conformance.run.progress import shown
from portakv_conformance.run.request import Options
from portakv_conformance.run.runner import run


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


CONFORMANT, FAILURES, USAGE, UNAVAILABLE = 0, 1, 2, 3
_INTERRUPTED = 130
_VERBS = {"diff": compare, "verify": verify, "replay": replay_example}
_SEEDS = 1 << 31

_EPILOG = """\
other verbs:
  portakv conform diff OLD NEW        what changed from one report to another
  portakv conform verify REPORT       whether a report stands
  portakv conform replay FILE [NAME]  judge a saved example again
  portakv conform --list              the ids of the cases
  portakv conform --mutants           the suite's score on backends with seeded bugs

exit codes: 0 conformant, 1 failures, 2 usage, 3 the backend is not available here

examples:
  portakv conform ascend --report out/
  portakv conform acme_kv.backend:Acme --device simdev
  portakv conform triton --fuzz 2000"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words behind `portakv conform`; by default the process's own.

    Returns:
        The exit code; argparse raises ``SystemExit(2)`` for what it does not understand.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words and words[0] in ("diff", "verify"):
            return _VERBS[words[0]](words[1:])
        if os.environ.get(ENVIRONMENT):
            return _refuse(
                f"{ENVIRONMENT}={os.environ[ENVIRONMENT]} forces every copy through one backend, "
                f"which is not what the suite judges; unset it and name the backend."
            )
        if words and words[0] in _VERBS:
            return _VERBS[words[0]](words[1:])
        return _conform(words)
    except SubjectUnavailable as error:
        print(f"portakv conform: {error}", file=sys.stderr)
        return UNAVAILABLE
    except (BadRequest, WaiverError) as error:
        return _refuse(str(error))
    except (SuiteBroken, PortaKVError) as error:
        print(f"portakv conform: {error}", file=sys.stderr)
        return FAILURES
    except KeyboardInterrupt:
        print("portakv conform: interrupted; nothing was reported.", file=sys.stderr)
        return _INTERRUPTED


def _refuse(sentence: str) -> int:
    print(f"portakv conform: {sentence}", file=sys.stderr)
    return USAGE


def _conform(words: list[str]) -> int:
    if "--mutants" in words:  # the other words are the score's own
        from portakv_conformance.mutants.score import main as score

        return score([word for word in words if word != "--mutants"])
    if "--list" in words:
        return _list([word for word in words if word != "--list"])
    asked = make_parser().parse_args(words)
    folder = _examples_folder(asked.report)
    options = replace(_options(asked), examples=folder)
    try:
        with shown() as progress:
            if options.fuzz:
                progress.say(f"seed {options.seed}")
            record = run(options, progress)
    finally:
        if asked.report is None and not any(folder.iterdir()):
            folder.rmdir()
    if asked.json:
        print(record.document(), end="")
    else:
        print_summary(record, options)
    if asked.report is not None:
        from portakv_conformance.report import write

        for path in write(record, asked.report):
            print(f"wrote {path}", file=sys.stderr)
    return exit_code(record, options)


def _list(words: list[str]) -> int:
    """Print the ids of a profile's cases; no backend is judged."""
    parser = argparse.ArgumentParser(
        prog="portakv conform --list",
        description="Prints the ids of the cases of a profile on a kind of device, which need not "
        "be here. Any beginning of an id, up to `::` or `[`, names its cases behind --only.",
    )
    _add_profile(parser, "core", "core")
    parser.add_argument("--device", default="cpu", metavar="D", help="a kind (default: cpu)")
    asked, _ = parser.parse_known_args(words)  # the words of a run may stand beside
    for id in cases_of(asked.profile, asked.device):
        print(id)
    return CONFORMANT


def exit_code(record: RunRecord, options: Options) -> int:
    """Conformant or not. Where only some cases were asked for, whether those are right, and every
    waiver holds."""
    if options.only:
        wrong = any(case.status in WRONG for case in record.cases)
        broken = problems(record.waivers, record.cases, record.suite, whole=False)
        return FAILURES if wrong or broken else CONFORMANT
    return CONFORMANT if record.verdict == "conformant" else FAILURES


def _options(asked: argparse.Namespace) -> Options:
    seed = asked.seed
    if seed is None:
        seed = random.SystemRandom().randrange(_SEEDS) if asked.fuzz else 0
    return Options(
        asked.backend,
        asked.device or _usual_device(asked.backend),
        asked.profile or ("core" if asked.report is None else "full"),
        seed,
        asked.fuzz or 0,
        () if asked.waivers is None else read_waivers(asked.waivers),
        "" if asked.waivers is None else str(asked.waivers),
        asked.limit,
        asked.exit_first,
        tuple(asked.only),
        asked.emulated,
        jobs=asked.jobs,
    )


def _usual_device(backend: str) -> str:
    """The type that a backend of PortaKV is made for; of others the accelerator where there is
    one, else the CPU. No device is touched to find out."""
    made_for = MADE_FOR.get(backend)
    if made_for is not None:
        return made_for
    import torch

    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        if kind is not None:
            return kind.type
    return "cpu"


def _examples_folder(report: Path | None) -> Path:
    """Where failing examples go: beside the report, or to a place of their own."""
    if report is None:
        return Path(tempfile.mkdtemp(prefix="portakv-examples-"))
    if find_spec("jinja2") is None:  # said before the run, not behind it
        raise BadRequest("--report needs jinja2; `pip install 'portakv[conformance]'` brings it.")
    try:
        report.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequest(f"The folder {report} of --report cannot be made: {error}.") from error
    return report


def make_parser() -> argparse.ArgumentParser:
    """The parser of a run."""
    parser = argparse.ArgumentParser(
        prog="portakv conform",
        description="Judges one backend on one device by the conformance suite.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("backend", metavar="NAME", help="a registered backend, or pkg.mod:Class")
    add(
        "--device",
        metavar="D",
        help="cpu, cuda:1, simdev, simdev:mlu, ... (default: the kind that NAME is made for, such "
        "as npu for ascend; where it is for several, the accelerator or cpu)",
    )
    _add_profile(parser, None, "full with --report, which a rung needs; else core")
    count, seed = whole_number(1), whole_number(0)
    add("--fuzz", type=count, metavar="N", help="draw N fresh examples in each drawn case")
    add("--seed", type=seed, metavar="S", help="of all that is drawn (default: 0; --fuzz: any)")
    add("--waivers", type=Path, metavar="FILE", help="TOML: cases that may fail, until when, why")
    add("--report", type=Path, metavar="DIR", help="write conformance.json, report.html and more")
    add("--limit", type=_seconds, metavar="SECONDS", help="that one case may take (default: 120)")
    add("--jobs", type=count, default=1, metavar="N", help="cases at a time (default: 1)")
    add("-x", dest="exit_first", action="store_true", help="stop at the first failure")
    add("--json", action="store_true", help="print the report itself, one JSON value")
    add("--only", nargs="+", default=[], metavar="ID", help="only these: ids or their beginnings")
    add("--emulated", action="store_true", help="the simulated device carries the name of D")
    return parser


def _add_profile(parser: argparse.ArgumentParser, default: str | None, told: str) -> None:
    parser.add_argument(
        "--profile",
        choices=("core", "full"),
        default=default,
        help=f"which cases (default: {told})",
    )


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} was given, expected seconds above 0")
    return value
