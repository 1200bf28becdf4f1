# SPDX-License-Identifier: Apache-2.0
"""Run the command line: the verbs of `portakv`.

Most verbs have a separate module in this package. `bench` and `conform` are other packages, which
are imported only when the verb runs.

Exit codes: 0 success; 1 failure, with one sentence on standard error; 2 a wrong command line, or a
wrong file that it names; 130 Ctrl-C. `portakv conform` has more codes. With ``--json`` a verb
writes one JSON value to standard output and nothing else.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import io
import os
import sys
from collections.abc import Sequence

from portakv import __version__
from portakv.cli import (
    backends,
    calibrate,
    demo,
    doctor,
    explain,
    layouts,
    store,
    top,
    warmup,
    witness,
)
from portakv.cli.console import Parser, installing
from portakv.errors import PortaKVError

_EPILOG = """\
examples:
  portakv demo
  portakv explain "layer | kv block token head dim" "kv layer token (head dim)"
  portakv layouts vllm-nhd

PORTAKV_BACKEND=name forces a backend: it serves, or the command ends with an
error that lists the answer of every candidate."""

#: Verbs of other packages: the package, its extra, the extra's modules, the help text, and where
#: the package is if it is missing.
_DELEGATED: dict[str, tuple[str, str, tuple[str, ...], str, str]] = {
    "conform": (
        "portakv_conformance",
        "conformance",
        ("pytest", "hypothesis"),
        "judge a backend by the conformance suite",
        "runs the package portakv_conformance, which is missing; install PortaKV again.",
    ),
    "bench": (
        "portakv_benchmarks",
        "bench",
        (),
        "measure backends on real models' shapes",
        "needs a clone of PortaKV, since releases do not contain the benchmarks; run "
        "`pip install -e '.[bench]'` in a clone.",
    ),
}

_MODULES = (demo, doctor, backends, explain, layouts, store, witness, top, warmup, calibrate)
VERBS = (*(module.__name__.rpartition(".")[2] for module in _MODULES), *_DELEGATED)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after `portakv`; by default those of this process.

    Returns:
        The exit code. A wrong command line raises ``SystemExit(2)``, as argparse does.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal without the characters of a table's lines gets `?`, not a traceback.
        sys.stdout.reconfigure(errors="replace")
    try:
        parser = make_parser()
        code = 0

        if not words:
            parser.print_help()
        elif words[0] in _DELEGATED:  # the other package parses its options
            code = _delegate(words[0], words[1:])
        else:
            # Suggest the verb that a misspelt word resembles, instead of argparse's list of all.
            if words[0] not in VERBS and not words[0].startswith("-"):
                for verb in difflib.get_close_matches(words[0], VERBS, n=1):
                    parser.error(f"Expected a verb, got {words[0]!r}. Did you mean {verb!r}?")
            args, more = parser.parse_known_args(words)
            if more:  # name the verb, not the whole command
                args.misunderstood(f"unrecognized arguments: {' '.join(more)}")
            code = args.run(args)

        sys.stdout.flush()
        return code
    except PortaKVError as error:
        print(f"portakv: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("portakv: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The pipe's reader, for example `head`, has ended. The interpreter flushes again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs; each verb stores its function as ``run``."""
    parser = Parser(
        prog="portakv",
        description="Moves KV-cache rows between any two layouts, on any torch device.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"portakv {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in _MODULES:
        own = verbs.add_parser(
            verb.__name__.rpartition(".")[2],
            help=verb.HELP,
            description=verb.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.add_options(own)
        own.add_argument("--json", action="store_true", help="print one JSON value")
        own.set_defaults(run=verb.run, misunderstood=own.error)

    for name, (*_, does, _) in _DELEGATED.items():
        verbs.add_parser(name, help=f"{does}; see `portakv {name} --help`", add_help=False)
    return parser


def _delegate(verb: str, words: list[str]) -> int:
    """Pass the words after a verb to its package and return the package's exit code.

    Return 1 if the package or a module that it needs is not installed. For `conform` return 2
    then, because its code 1 means that a backend failed.
    """
    package, extra, needed, _, where = _DELEGATED[verb]
    module = f"{package}.cli"
    if verb == "conform" and "--tier" in words:
        # It runs where the tier's engine is installed, and the packages of the suite are not.
        module = f"{package}.faults.command"
        needed = ()
    try:
        for name in needed:
            importlib.import_module(name)
        command = importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or str(error)
        why = f"needs {missing!r}, which is not installed; {installing(extra)} brings it."
        if missing.partition(".")[0] == package:
            why = where
        print(f"portakv: `portakv {verb}` {why}", file=sys.stderr)
        return 2 if verb == "conform" else 1
    return int(command.main(words) or 0)
