# SPDX-License-Identifier: Apache-2.0
"""Print one of README.md's commands, so that CI runs what a reader types.

A command is the fenced block that follows a comment such as `<!-- ci: install -->`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def command(name: str) -> str:
    """Return the text of the block marked `name`; SystemExit unless there is exactly one."""
    marked = re.compile(rf"<!-- ci: {re.escape(name)} -->\s*\n```\w*\n(.+?)\n```", re.DOTALL)
    commands = marked.findall(README.read_text())
    if len(commands) != 1:
        raise SystemExit(
            f"Expected one command marked `<!-- ci: {name} -->` in README.md, got {len(commands)}; "
            "fenced blocks follow such a mark, and there must be exactly one."
        )
    block: str = commands[0]
    return block


if __name__ == "__main__":
    print(command(sys.argv[1]))
