# SPDX-License-Identifier: Apache-2.0
"""Bytes and times as a person reads them, and as one writes them on the command line."""

from __future__ import annotations

import argparse
import re

_BYTES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def in_bytes(number: int) -> str:
    """``64 KiB``, ``1.5 GiB``."""
    size, units = float(number), ["B", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.4g} {units[0]}"


def in_time(seconds: float) -> str:
    """``85.2 us``, ``4.71 ms``, ``1.2 s``."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def read_bytes(text: str) -> int:
    """A number of bytes above 0, as in ``32768``, ``32K``, ``64MiB``; for argparse."""
    found = re.fullmatch(r"(\d+)\s*(?:([kmg])(?:i?b)?|b?)", text.strip(), re.IGNORECASE)
    nbytes = int(found[1]) * _BYTES[(found[2] or "").lower()] if found else 0
    if nbytes < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} was given, expected bytes above 0, such as 32768, 32K or 64M"
        )
    return nbytes


def read_rate(text: str) -> float:
    """10^9 bytes in a second, above 0; for argparse."""
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError(
            f"{text!r} was given, expected 10^9 bytes in a second, above 0"
        )
    return rate
