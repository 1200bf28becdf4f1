# SPDX-License-Identifier: Apache-2.0
"""`portakv conform --tier MODULE:CLASS`: run the fault table over a tier."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

from portakv.cli.sides import read_above_zero
from portakv.errors import Unsupported
from portakv.runtime.resources import require_linux
from portakv_conformance import SUITE_VERSION
from portakv_conformance.faults import report as reports
from portakv_conformance.faults.report import BAD, Request, TierReport
from portakv_conformance.faults.run import Row, chosen, run_faults
from portakv_conformance.faults.source import tier_sha256
from portakv_conformance.faults.subject import BadRequest, Template, Unavailable
from portakv_conformance.faults.table import FAULTS

_LEAST = 16 << 10
_EPILOG = """\
outcomes, worst first:
  wrong bytes   a load returned bytes that are not those of the key, or memory was written that the
                tier no longer owned
  hang          a call did not return before the deadline
  error         a call raised, or the process of the tier ended
  miss          some blocks were not delivered
  right         all blocks were delivered
  not injected  the fault could not be put in; the row has the reason

exit codes: 0 no wrong bytes and no hang, 1 wrong bytes or a hang, 2 usage, 3 the tier is not
available here

examples:
  portakv conform --tier disk
  portakv conform --tier portakv.integrations.vllm_tier:PortaKVTier --report tier.json
  portakv conform --tier portakv_conformance.faults.wrong:Unchecked --only 'two blocks'
  portakv conform --tier --replay tier.json"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of a run."""
    parser = argparse.ArgumentParser(
        prog="portakv conform --tier",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Puts faults into a storage tier, each in a separate process and folder, and "
        "prints what the tier delivered.",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    default = Request("")
    add("tier", nargs="?", metavar="TIER", help="module:Class, or a tier such as disk or remote")
    add(
        "--terms",
        type=_terms,
        metavar="JSON",
        help="arguments of its constructor; {folder} stands for a new folder",
    )
    add("--only", action="append", default=[], metavar="TEXT", help="faults that begin with TEXT")
    add(
        "--replay",
        type=Path,
        metavar="FILE",
        help="run the faults of a report again, of which TIER may be the beginning of a name",
    )
    add("--faults", action="store_true", help="print the faults and their means, and run none")
    add("--folder", type=Path, metavar="DIR", help="where trials make their folders")
    add(
        "--bytes",
        type=_whole(_LEAST),
        default=default.nbytes,
        metavar="N",
        help="bytes of a block (default: 65536)",
    )
    add(
        "--deadline",
        type=read_above_zero,
        default=default.deadline,
        metavar="SECONDS",
        help="time in which each call has to return (default: 75)",
    )
    add("--jobs", type=_whole(1), default=4, metavar="N", help="trials in parallel (default: 4)")
    add("--json", action="store_true", help="print the report as JSON")
    add("--report", type=Path, metavar="FILE", help="write the report")
    return parser


def _whole(least: int) -> Callable[[str], int]:
    """Return a reader of arguments that are whole numbers of at least ``least``."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected {least} or more, got {text!r}")
        return int(text)

    return read


def _terms(text: str) -> dict[str, object]:
    try:
        terms = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"it is not JSON: {error}") from None
    if not isinstance(terms, dict):
        raise argparse.ArgumentTypeError('expected an object, such as {"folder": "{folder}"}')
    return terms


def main(words: Sequence[str]) -> int:
    """Run one command and return its exit code; 1: wrong bytes or a hang."""
    parser = make_parser()
    args = parser.parse_args([word for word in words if word != "--tier"])
    if args.tier is None and args.replay is None and not args.faults:
        parser.error("the following arguments are required: TIER")
    try:
        require_linux("`portakv conform --tier`")
        return _run(args)
    except KeyboardInterrupt:
        code = 130
        message = "interrupted; nothing was reported."
    except Unavailable as error:
        code = 3
        message = str(error)
    except (BadRequest, Unsupported) as error:
        code = 2
        message = str(error)
    print(f"portakv conform: {message}", file=sys.stderr)
    return code


def _run(args: argparse.Namespace) -> int:
    if args.faults:
        for fault in FAULTS:
            print(f"{fault.name:<55} {fault.means}")
        return 0
    if args.replay is not None:
        return replay(_text(args.replay), args.tier)
    request = Request(args.tier, args.terms, tuple(args.only), args.bytes, args.deadline)
    made = run(request, args.folder, args.jobs, _progress)
    print(made.document() if args.json else reports.table(made), end="" if args.json else "\n")
    if args.report is not None:
        args.report.write_text(made.document(), encoding="utf-8")
        print(f"wrote {args.report}", file=sys.stderr)
    return exit_code(made)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(
            f"Expected a report, but {path} cannot be read: {error}. Pass the file of --report."
        ) from error


def exit_code(report: TierReport) -> int:
    """Return 1 if a tier delivered wrong bytes or hung, else 0."""
    return int(any(row.outcome in BAD for row in report.rows))


def run(
    request: Request,
    folder: Path | None = None,
    jobs: int = 1,
    show: Callable[[Row], None] = lambda row: None,
) -> TierReport:
    """Return the report of a run.

    Args:
        folder: where trials make their folders; None: that of the system.
        jobs: trials that run together.
        show: gets each row as it comes.

    Raises `BadRequest` for a fault that no name begins with and for a missing folder, and
    `Unavailable` for a tier that does not load or does not work without a fault.
    """
    try:
        faults = chosen(request.only)
    except KeyError as error:
        raise BadRequest(
            f"Expected the beginning of a fault's name, got {error}. `portakv conform --tier "
            f"--faults` prints the names."
        ) from None
    if folder is not None and not folder.is_dir():
        raise BadRequest(f"Expected a folder that is there, got {folder}. Make it.")
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    began = time.monotonic()
    with Template(request.tier, request.terms, request.nbytes) as template:
        rows = run_faults(template, faults, request.nbytes, request.deadline, folder, jobs, show)
    return TierReport(
        reports.SCHEMA,
        SUITE_VERSION,
        request,
        template.family,
        template.versions,
        template.terms,
        reports.environment(folder or Path(tempfile.gettempdir())),
        started,
        round(time.monotonic() - began, 1),
        request.command(),
        rows,
        tier_sha256(request.tier),
    ).seal()


def _progress(row: Row) -> None:
    if row.outcome in BAD:
        print(f"{row.outcome}: {row.fault}", file=sys.stderr)


def replay(text: str, only: str | None) -> int:
    """Run a report's faults again and print what differs; return 1 as a run does.

    Args:
        only: the beginning of the names of the faults to run; None: all of the report.

    Raises `BadRequest` for a report that does not stand.
    """
    old = TierReport.read(text) if not (wrong := reports.flaws(text)) else None
    if old is None:
        raise BadRequest(" ".join(wrong))
    asked = old.request
    beginnings = asked.only if only is None else (only,)
    new = run(Request(asked.tier, asked.terms, beginnings, asked.nbytes, asked.deadline), jobs=4)
    names = {row.fault for row in new.rows}
    before = [row for row in old.rows if row.fault in names]
    for line in reports.differences(before, new.rows):
        print(line)
    print(f"replayed {reports.sentence(new)}")
    return exit_code(new)


def verify(text: str, name: str) -> int:
    """Print whether a report stands; return 1 with every reason if it does not.

    A report of some faults stands as a part, as a backend's incomplete report does.
    A report of another source than the installed one has expired, and stands no more.
    """
    wrong = reports.flaws(text)
    if not wrong and (late := reports.expired(TierReport.read(text))):
        print(f"{late}\n{name} is refused: its source has changed.")
        return 1
    if wrong:
        print("\n".join([*wrong, f"{name} is refused: {len(wrong)} contradictions."]))
        return 1
    report = TierReport.read(text)
    print(f"{name} stands: {report.request.tier}, {reports.sentence(report)}")
    return 0


def compare(old: str, new: str) -> int:
    """Print what differs between two reports; return 1 if the newer one has more bad outcomes."""
    before = TierReport.read(old)
    after = TierReport.read(new)
    for line in reports.differences(before.rows, after.rows):
        print(line)
    print(reports.sentence(after))
    was = {row.fault for row in before.rows if row.outcome in BAD}
    return int(any(row.outcome in BAD and row.fault not in was for row in after.rows))
