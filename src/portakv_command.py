# SPDX-License-Identifier: Apache-2.0
"""The command `portakv`, as its script loads it.

It stands outside of the package, because the package imports torch, which takes seconds: Ctrl-C in
that time ends the command quietly.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line of the process, and return its exit code."""
    try:
        from portakv.cli import main as run
    except KeyboardInterrupt:
        print("portakv: interrupted", file=sys.stderr)
        return 130
    return run()
