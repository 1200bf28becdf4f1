# SPDX-License-Identifier: Apache-2.0
"""The lines that a worker tells its parent by, and text that every one of them can hold."""

from __future__ import annotations

import json
from typing import Any


def writable(text: str) -> str:
    """The text with lone surrogates, which UTF-8 has no bytes for, written as ``\\udcff``."""
    return text.encode("utf-8", "backslashreplace").decode()


def append(file: str, event: dict[str, Any]) -> None:
    """Append an event to a file, flushed at once: a crashing process takes no buffered line along.

    Every report can hold what was told, whatever bytes a vendor's driver puts into its messages.
    """
    line = json.dumps(_writable(event)) + "\n"
    with open(file, "a", encoding="ascii") as events:
        events.write(line)


def _writable(value: Any) -> Any:
    if isinstance(value, str):
        return writable(value)
    if isinstance(value, dict):
        return {writable(str(key)): _writable(kept) for key, kept in value.items()}
    return [_writable(entry) for entry in value] if isinstance(value, list | tuple) else value
