# SPDX-License-Identifier: Apache-2.0
"""The command `portakv`, as its script loads it.

It stands outside of the package, because the package imports torch, which takes seconds: Ctrl-C in
that time ends the command quietly.
"""

from __future__ import annotations

import os
import sys


def open_streams() -> None:
    """Open the null device for each standard stream that the process began without.

    Otherwise files and sockets would get the numbers 0 to 2, to which others write.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            os.set_inheritable(opened, True)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def main() -> int:
    """Run the command line of the process, and return its exit code."""
    open_streams()
    try:
        from portakv.cli import main as run
    except KeyboardInterrupt:
        print("portakv: interrupted", file=sys.stderr)
        return 130
    return run()
