# SPDX-License-Identifier: Apache-2.0
"""The command line: the verbs of `portakv`, one file for each.

Exit codes: 0 all went well, 1 it did not (one sentence on standard error says why), 2 the command
was not understood; `portakv conform` has more. With ``--json`` a verb writes one JSON value to
standard output, nothing else.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from portakv import __version__
from portakv.cli import backends, calibrate, delegated, explain, layouts, warmup
from portakv.errors import PortaKVError

_EPILOG = """\
examples:
  portakv demo
  portakv explain "layer | kv block token head dim" "kv layer token (head dim)"
  portakv layouts vllm-nhd

PORTAKV_BACKEND=name forces a backend: it serves, or the command ends with an
error that says what every candidate answered."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words behind `portakv`; by default the process's own.

    Returns:
        The exit code. A command that is not understood raises ``SystemExit(2)``, as argparse does.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal without the characters of a table's lines gets `?`, not a traceback.
        sys.stdout.reconfigure(errors="replace")
    try:
        code = _run(words)
        sys.stdout.flush()
    except PortaKVError as error:
        print(f"portakv: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader, `head` say, has gone. The interpreter flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _run(words: list[str]) -> int:
    parser = make_parser()
    if not words:
        parser.print_help()
        return 0
    if words[0] == "bench":  # its words are not argparse's to judge here
        return delegated.bench(words[1:])
    if words[0] == "conform":
        return delegated.conform(words[1:])
    asked = parser.parse_args(words)
    code: int = asked.run(asked)
    return code


def make_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; each leaves what runs it in ``run``."""
    parser = argparse.ArgumentParser(
        prog="portakv",
        description="Moves KV-cache rows between any two layouts, on any torch device.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"portakv {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    delegated.add_demo(verbs)
    backends.add_to(verbs)
    explain.add_to(verbs)
    layouts.add_to(verbs)
    warmup.add_to(verbs)
    calibrate.add_to(verbs)
    delegated.add_conform(verbs)
    delegated.add_bench(verbs)
    return parser
