# SPDX-License-Identifier: Apache-2.0
"""`portakv conform`: judge a backend, and read the reports of earlier runs.

Exit codes: 0 conformant, 1 not, 2 the command cannot be understood, 3 the backend is not available
here (with the probe's reason; nothing is ever skipped).
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

from portakv.cli.console import Parser, installing
from portakv.cli.sides import read_above_zero
from portakv.errors import PortaKVError, Unsupported
from portakv.registry.registry import ENVIRONMENT, MADE_FOR
from portakv.runtime.resources import require_linux
from portakv_conformance.evidence.verdict import WRONG
from portakv_conformance.evidence.verify import check_report
from portakv_conformance.faults.command import compare as compare_tiers
from portakv_conformance.faults.command import replay as replay_tier
from portakv_conformance.faults.command import verify as verify_tier
from portakv_conformance.faults.report import is_report
from portakv_conformance.faults.subject import BadRequest as BadTierRequest
from portakv_conformance.faults.subject import Unavailable
from portakv_conformance.judge.waivers import WaiverError, problems, read_waivers
from portakv_conformance.record import SCHEMA, RunRecord
from portakv_conformance.report import summary
from portakv_conformance.run.journal import BadRequest, SubjectUnavailable, SuiteBroken
from portakv_conformance.run.options import whole_number
from portakv_conformance.run.progress import shown
from portakv_conformance.run.request import Options
from portakv_conformance.run.runner import cases_of, run

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def compare(words: list[str]) -> int:
    """Print what changed between two reports; return 1 if something got worse or is missing."""
    parser = _parser(
        "diff",
        "Prints FIX, REGRESSION, NEW and MISSING; exits with 1 on REGRESSION "
        "or MISSING, or if a NEW case is wrong. A claim that the backend no longer makes is a "
        "REGRESSION, and so is a lower level.",
    )
    parser.add_argument("old", type=Path, metavar="OLD", help="the earlier conformance.json")
    parser.add_argument("new", type=Path, metavar="NEW", help="the later conformance.json")
    args = parser.parse_args(words)
    texts = [_text(args.old), _text(args.new)]
    if all(map(is_report, texts)):
        return compare_tiers(*texts)
    old = _record(args.old)
    new = _record(args.new)
    for sentence in summary.differences(old, new):
        print(sentence, file=sys.stderr)
    changes = summary.compare_runs(old, new)
    for change in changes:
        print(change)
        if change.bad and change.reason:
            print(f"{'':<10} {change.reason.splitlines()[0]}")
    counts = Counter(change.kind for change in changes)
    print(", ".join(f"{counts[k]} {k}" for k in ("FIX", "REGRESSION", "NEW", "MISSING")))
    return int(any(change.bad for change in changes))


def verify(words: list[str]) -> int:
    """Check a report and print the result; return 1 with every reason if the report is invalid."""
    parser = _parser(
        "verify",
        "Checks that a report is unchanged since its run: its schema and checksum, its list of "
        "cases against the installed suite, and that totals, verdict and level follow from the "
        "cases. Says whether the report is incomplete, or a part of a tier's faults. For the "
        "record of another job it checks the fields that this kind of job requires. Judges "
        "nothing again, and needs no device.",
    )
    parser.add_argument(
        "report",
        type=Path,
        metavar="REPORT",
        help="the conformance.json of a run, or a job's record",
    )
    args = parser.parse_args(words)
    text = _text(args.report)
    if is_report(text):
        return verify_tier(text, str(args.report))
    if f'"{SCHEMA}"' not in text:
        return _verify_job(args.report)
    if wrong := check_report(text):
        print("\n".join([*wrong, f"{args.report} is refused: {len(wrong)} contradictions."]))
        return 1
    print(f"{args.report} stands: {summary.verdict_line(RunRecord.read(text))}")
    return 0


def _verify_job(file: Path) -> int:
    """Print what the record of a job proves; return 1 with the reason if it proves nothing."""
    from portakv_conformance.evidence.evidence import read

    try:
        proved = read(file)
    except ValueError as error:
        print(f"{error} Pass the conformance.json of `portakv conform --report`.")
        return 1
    print(f"{file} is the record of a job, not a report: {proved.backend}, {proved.summary}.")
    level = proved.level or "none"
    print(f"The record is complete. Level: {level}. Again: {proved.command}")
    return 0 if proved.level else 1


def replay_example(words: list[str]) -> int:
    """Judge a saved example again; return 1, with the first wrong byte, if it still fails."""
    parser = _parser(
        "replay",
        "Judges a failing example that a run saved, on the same backend and device or on others. "
        "Of the report of a tier it runs the faults again, and prints what differs.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="example-*.json of a run")
    parser.add_argument(
        "backend",
        nargs="?",
        metavar="NAME",
        help="default: the backend that failed; of a tier: the beginning of a fault's name",
    )
    parser.add_argument("--device", metavar="D", help="default: the device of the failed run")
    parser.add_argument("--emulated", action="store_true", help=_EMULATED)
    args = parser.parse_args(words)
    from portakv_conformance.draw.saved import read_about, replay
    from portakv_conformance.judge.subject import subject

    text = _text(args.file, "an example")
    if is_report(text):
        return replay_tier(text, args.backend)
    try:
        about = read_about(text)
        name = args.backend or about.get("backend")
        if not name:
            raise BadRequest(
                f"Expected {args.file} to name the backend that failed, got none. Pass NAME."
            )
        device = args.device or about.get("device", "cpu")
        emulated = args.emulated or (args.device is None and about.get("emulated") is True)
        if "" not in sys.path and os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # a class in this folder, as a run finds it
        # The device is made known to torch by this; tensors of the example may lie there.
        judged = subject(name, device, emulated=emulated)
        wrong = judged.flaw or replay(args.file, judged)
    except PortaKVError as error:
        raise SubjectUnavailable(str(error)) from error
    except ValueError as error:
        raise BadRequest(str(error)) from error
    print(f"{args.file}: {wrong or f'passes on {judged.name}, {judged.device}.'}")
    return 0 if wrong is None else 1


def _parser(verb: str, description: str) -> argparse.ArgumentParser:
    return Parser(prog=f"portakv conform {verb}", description=description)


def _text(path: Path, what: str = "a report") -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise BadRequest(
            f"Expected {what}, but {path} cannot be read: {why}. Pass {what} that a run wrote."
        ) from error


def _record(path: Path) -> RunRecord:
    try:
        return RunRecord.read(_text(path))
    except (ValueError, TypeError, KeyError) as error:
        why = f"Expected {path} to be a report of this suite, but it is not: {error}"
        raise BadRequest(f"{why} Pass the conformance.json of a run.") from error


_EMULATED = (
    "run on PortaKV's simulated device under the name of D, such as npu, in place of the hardware"
)

CONFORMANT = 0
FAILURES = 1
USAGE = 2
UNAVAILABLE = 3
_INTERRUPTED = 130
_VERBS = {"diff": compare, "verify": verify, "replay": replay_example}
_SEEDS = 1 << 31

_EPILOG = """\
other verbs:
  portakv conform diff OLD NEW        compare two reports
  portakv conform verify REPORT       check that a report is unchanged
  portakv conform replay FILE [NAME]  judge a saved example again
  portakv conform --list              print the ids of the cases
  portakv conform --mutants           score the suite on backends with seeded bugs
  portakv conform --pitfalls          print faults of released code, and the cases for each
  portakv conform --contract tier|transport|io NAME
                                      check a tier, a transport or an I/O engine
  portakv conform --tier MODULE:CLASS put faults into a storage tier

exit codes: 0 conformant, 1 failures, 2 usage, 3 the backend is not available here

examples:
  portakv conform ascend --report out/
  portakv conform acme_kv.backend:Acme --device simdev
  portakv conform triton --fuzz 2000"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    ``argv`` holds the words after `portakv conform`, by default those of the process. argparse
    raises ``SystemExit(2)`` for words that it does not understand.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    verb = _VERBS.get(words[0]) if words else None
    try:
        if verb not in (compare, verify) and (forced := os.environ.get(ENVIRONMENT)):
            raise BadRequest(
                f"Expected {ENVIRONMENT} to be unset, got {forced!r}, which forces every copy "
                f"through one backend. Unset it, and pass the backend as NAME."
            )
        return verb(words[1:]) if verb else _conform(words)
    except KeyboardInterrupt:
        code = _INTERRUPTED
        message = "interrupted; nothing was reported."
    except (SubjectUnavailable, Unavailable) as error:
        code = UNAVAILABLE
        message = str(error)
    except (BadRequest, BadTierRequest, WaiverError) as error:
        code = USAGE
        message = str(error)
    except (SuiteBroken, PortaKVError) as error:
        code = FAILURES
        message = str(error)
    print(f"portakv conform: {message}", file=sys.stderr)
    return code


def _conform(words: list[str]) -> int:
    # These take the other words: `--mutants --list` prints the mutants.
    flag = next((flag for flag in _OTHER_SUBJECTS if flag in words), None)
    if flag is not None:
        return _OTHER_SUBJECTS[flag]([word for word in words if word != flag])
    if "--tier" in words:  # the fault table of a storage tier
        from portakv_conformance.faults.command import main as run_tier

        return run_tier(words)
    if "--list" in words:
        return _list([word for word in words if word != "--list"])
    args = make_parser().parse_args(words)
    folder = _examples_folder(args.report)
    options = replace(_options(args), examples=folder)
    try:
        with shown() as progress:
            if options.fuzz:
                progress.say(f"seed {options.seed}")
            record = run(options, progress)
    finally:
        if args.report is None and not any(folder.iterdir()):
            folder.rmdir()
    if args.json:
        print(record.document(), end="")
    else:
        summary.print_summary(record, options)
    if args.report is not None:
        from portakv_conformance.report.page import write  # needs jinja2

        for path in write(record, args.report):
            print(f"wrote {path}", file=sys.stderr)
    right = record.verdict == "conformant"
    if options.only:  # whether those are right, and every waiver holds
        broken = problems(record.waivers, record.cases, record.suite, whole=False)
        right = not (broken or any(case.status in WRONG for case in record.cases))
    return CONFORMANT if right else FAILURES


def _contract(words: list[str]) -> int:
    """Run the contract suite of a tier, a transport or an I/O engine."""
    try:
        require_linux("`portakv conform --contract`")
    except Unsupported as error:  # before an import that would name migration
        raise BadRequest(str(error)) from error
    from portakv_conformance.contract.command import main as run_contract

    return run_contract(words)


def _list(words: list[str]) -> int:
    """Print the ids of a profile's cases; no backend is judged."""
    parser = _parser(
        "--list",
        "Prints the ids of the cases of a profile on a kind of device, which need not be "
        "present. `portakv conform NAME --only` takes these ids, or the beginning of ids.",
    )
    _add_profile(parser, "core", "core")
    parser.add_argument(
        "--device", default="cpu", metavar="D", help="a kind of device, such as cuda (default: cpu)"
    )
    args = parser.parse_args(words)
    print("\n".join(cases_of(args.profile, args.device)))
    return CONFORMANT


def _pitfalls(words: list[str]) -> int:
    """Print the faults of `pitfalls.toml` by area, each with the tests that fail because of it."""
    _parser(
        "--pitfalls",
        "Prints faults of released code that copies KV rows. Below each are the cases that fail "
        "for a backend with the fault (`portakv conform NAME --profile full --only CASE`), and "
        "PortaKV's own tests. A fault without cases can only be the library's.",
    ).parse_args(words)
    table = tomllib.loads(Path(__file__).with_name("pitfalls.toml").read_text(encoding="utf-8"))
    for area, pitfalls in groupby(table["pitfall"], key=lambda pitfall: pitfall["area"]):
        print(f"\n{area}")
        for pitfall in pitfalls:
            print(f"- {pitfall['what']}")
            for test in (*pitfall.get("tests", ()), *filter(None, [pitfall.get("later")])):
                print(f"    {test.removeprefix('cases/')}")
    return CONFORMANT


def _mutants(words: list[str]) -> int:
    """Run or list the backends with seeded bugs."""
    from portakv_conformance.mutants.score import main as score

    return score(words)


#: What `portakv conform` does in place of judging a backend, by the option that asks for it.
_OTHER_SUBJECTS = {"--mutants": _mutants, "--pitfalls": _pitfalls, "--contract": _contract}


def _options(args: argparse.Namespace) -> Options:
    drawn = random.SystemRandom().randrange(_SEEDS) if args.fuzz else 0
    return Options(
        args.backend,
        args.device or _usual_device(args.backend),
        args.profile or ("core" if args.report is None else "full"),
        drawn if args.seed is None else args.seed,
        args.fuzz,
        read_waivers(args.waivers) if args.waivers else (),
        str(args.waivers or ""),
        args.limit,
        args.exit_first,
        tuple(args.only),
        args.emulated,
        jobs=args.jobs,
    )


def _usual_device(backend: str) -> str:
    """Return the device type that a backend of PortaKV is made for, without touching a device.

    For any other backend: the accelerator if there is one, else the CPU.
    """
    if backend in MADE_FOR:
        return MADE_FOR[backend]
    from torch import accelerator

    kind = accelerator.current_accelerator() if accelerator.is_available() else None
    return "cpu" if kind is None else kind.type


def _examples_folder(report: Path | None) -> Path:
    """Return the folder of failing examples: next to the report, or a separate one."""
    if report is None:
        return Path(tempfile.mkdtemp(prefix="portakv-examples-"))
    if find_spec("jinja2") is None:  # raised before the run, not after it
        raise BadRequest(
            f"Expected jinja2 for --report, but it is not installed. "
            f"Install it with {installing('conformance')}."
        )
    try:
        report.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequest(
            f"Expected a folder for --report, but {report} cannot be made: {error}. "
            f"Pass a folder that you may write to."
        ) from error
    return report


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of a run."""
    parser = Parser(
        prog="portakv conform",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Judges one backend on one device by the conformance suite.",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("backend", metavar="NAME", help="registered name of a backend, or pkg.mod:Class")
    add(
        "--device",
        metavar="D",
        help="device to judge on: a torch device such as cpu or cuda:1; simdev, PortaKV's "
        "simulated device; or simdev:mlu, the simulated device under the name mlu (default: the "
        "device type of NAME, such as npu for ascend; if NAME serves several, the accelerator, "
        "else cpu)",
    )
    _add_profile(parser, None, "full with --report, which a level needs; else core")
    count = whole_number(1)
    seed = whole_number(0)
    add(
        "--fuzz",
        type=count,
        default=0,
        metavar="N",
        help="draw N random examples in each drawn case",
    )
    add(
        "--seed",
        type=seed,
        metavar="S",
        help="seed of the drawn cases (default: 0; with --fuzz: random)",
    )
    add(
        "--waivers",
        type=Path,
        metavar="FILE",
        help="TOML file of cases that may fail, with reasons",
    )
    add("--report", type=Path, metavar="DIR", help="write conformance.json, report.html and more")
    add(
        "--limit",
        type=read_above_zero,
        metavar="SECONDS",
        help="time limit of a case (default: 120)",
    )
    add("--jobs", type=count, default=1, metavar="N", help="run N cases in parallel (default: 1)")
    add("-x", dest="exit_first", action="store_true", help="stop at the first failure")
    add("--json", action="store_true", help="print the report as one JSON value")
    add(
        "--only",
        nargs="+",
        default=[],
        metavar="ID",
        help="run only these cases of the profile: ids that --list prints, a file such as "
        "test_core, or the beginning of ids",
    )
    add("--emulated", action="store_true", help=_EMULATED)
    return parser


def _add_profile(parser: argparse.ArgumentParser, default: str | None, described: str) -> None:
    text = f"set of cases to run (default: {described})"
    parser.add_argument("--profile", choices=("core", "full"), default=default, help=text)
