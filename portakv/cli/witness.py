# SPDX-License-Identifier: Apache-2.0
"""`portakv witness show`: print a file that a witness of a cache has written."""

from __future__ import annotations

import argparse
from pathlib import Path

from portakv.cli.console import print_json
from portakv.errors import InvalidTerms
from portakv.witness.report import as_values, show

HELP = "show a file about a fault that a witness of a cache has found"
DESCRIPTION = """\
show: the fault in a file of a witness: its name, the layers, heads and tokens that
differ, the expected and the actual sums, and versions. The rows in the file are
summed again; exit code 1 if they do not have the actual sums. Of a table of
fingerprints it shows the groups and how many blocks are known."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("action", choices=("show",))
    parser.add_argument("file", metavar="FILE", type=Path, help="a file that a witness wrote")


def run(args: argparse.Namespace) -> int:
    """Print a file."""
    try:
        if args.json:
            (values, right) = as_values(args.file)
            print_json(values)
        else:
            (lines, right) = show(args.file)
            print("\n".join(lines))
    except OSError as error:
        what = f"Expected FILE to be a file that a witness wrote, got {args.file}"
        args.misunderstood(f"{what}: {error.strerror}. Pass one.")
    except InvalidTerms as error:
        args.misunderstood(str(error))
    return 0 if right else 1
