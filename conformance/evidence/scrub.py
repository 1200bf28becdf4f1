# SPDX-License-Identifier: Apache-2.0
"""What a command printed, as it can be committed: without where on which machine it ran."""

from __future__ import annotations

import re

# Lines of pytest's head that say where it ran, and nothing else.
_HEAD = re.compile(r"(?:rootdir|cachedir|configfile): ")
# An absolute path, its last part apart: behind no word, so that neither an address of the web nor a
# relative path is one, or behind an option of a compiler.
_PATH = re.compile(r"(?:(?<=-[ILB])|(?<![\w./~]))/(?:[\w.+@-]+/)+([\w.+@-]*)")


def without_places(printed: str) -> str:
    """The text with the last part in place of each absolute path, and without pytest's lines that
    hold nothing but one."""
    kept = (line for line in printed.splitlines(keepends=True) if not _HEAD.match(line))
    return _PATH.sub(r"\1", "".join(kept))
