# SPDX-License-Identifier: Apache-2.0
"""Picking: which engine carries a copy out, by what each would cost and by the caller's terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ...errors import Unsupported
from .assumed import Assumed
from .shapes import Shape
from .table import Costs
from .terms import Terms

#: The engines, the gentlest to a running model first: it wins where two cost the same.
ORDER = ("staged", "descriptors", "direct", "ring")
#: The most bytes that a kernel may move across the link while the device computes, by direction.
#: Measured on an H200: `direct` beats `staged` up to 2 MiB down and 12 MiB up, where it reads the
#: host as quickly as a copy engine and costs a model no more than that does.
SMALL = {"d2h": 2 << 20, "h2d": 12 << 20}
#: Runs from which on `ring` may move pinned memory, where it can: the host waits for it, as it need
#: not for the others, but by then these take it as long to issue. A default, not a measurement.
MANY = 1024
#: Rows of a 2-D copy from this many bytes on: the piece costs what one run of all its bytes costs.
#: Narrower ones count one by one. To an H200 64 rows of 32 KiB took 1.2 of a memcpy's time, such of
#: 4 KiB twice as long.
WIDE = 32 << 10
#: What `direct` reaches of its speed where it reads host memory whose planes do not lie behind one
#: another: it walks plane by plane, and so from block to block (0.74 - 0.85 of a memcpy, not 0.92).
APART = 0.85

_ASSUMED = Assumed("the engine is not in the table")


class Alternative(NamedTuple):
    """What one engine would make of a copy.

    Attributes:
        engine: its name.
        run_bytes, runs: the copy, as its cost was looked up.
        seconds: what it would take; None where that is not known.
        measured: that was measured on this device, not assumed.
        refused: why it may not be picked, as a phrase; empty where it may.
    """

    engine: str
    run_bytes: int
    runs: int
    seconds: float | None
    measured: bool
    refused: str

    def gbps(self, nbytes: int) -> float | None:
        """10^9 bytes in a second."""
        return nbytes / self.seconds / 1e9 if self.seconds else None


class Pick(NamedTuple):
    """The engine that carries a copy out, why as a sentence, and what each engine would take."""

    engine: str
    why: str
    alternatives: tuple[Alternative, ...]


def pick(
    shapes: Mapping[str, Shape],
    direction: str,
    out: Mapping[str, str],
    terms: Terms,
    costs: Costs,
    apart: bool = False,
) -> Pick:
    """The engine for a copy.

    Args:
        shapes: what the copy is to each engine that might carry it out.
        direction: ``d2h`` or ``h2d``.
        out: engines that do not, and why, as a phrase.
        terms: what the caller asks.
        costs: what engines cost.
        apart: the host is the source, and each of its planes lies scattered over its memory.

    Raises:
        Unsupported: no engine is left, with each one's reason.
    """
    found = [
        _alternative(name, shapes[name], direction, out, terms, costs, apart)
        for name in ORDER
        if name in shapes
    ]
    able = [one for one in found if one.engine not in out]
    if not able:
        lines = "\n".join(f"  {name}: {why}" for name, why in out.items())
        raise Unsupported("A copy between the device and the host", f"no engine takes it:\n{lines}")
    allowed = [one for one in able if not one.refused]
    # What was measured on this device beats what was assumed; `min` takes the first of equals.
    best = min(allowed or able, key=lambda one: (not one.measured, one.seconds or float("inf")))
    return Pick(best.engine, _why(best, allowed, found, out, terms), tuple(found))


def _alternative(
    name: str,
    shape: Shape,
    direction: str,
    out: Mapping[str, str],
    terms: Terms,
    costs: Costs,
    apart: bool,
) -> Alternative:
    runs = shape.pieces if shape.run_bytes >= WIDE else shape.runs
    runs = max(1, runs)
    run_bytes = max(1, shape.nbytes // runs)
    seconds, measured = costs.seconds(name, direction, run_bytes, runs), costs.measured
    if seconds is None:
        seconds, measured = _ASSUMED.seconds(name, direction, run_bytes, runs), False
    if seconds is not None and terms.max_gbps is not None:
        seconds = max(seconds, shape.nbytes / terms.max_gbps / 1e9)
    if name == "direct" and apart and seconds is not None:
        seconds /= APART
    small = min(SMALL.values()) if apart else SMALL[direction]
    refused = out.get(name, "") or _kept_out(name, small, shape.nbytes, terms)
    if name == "ring" and not refused and "staged" not in out and shape.runs < MANY:
        refused = f"it keeps the host waiting, which pinned memory is worth from {MANY} runs on"
    return Alternative(name, run_bytes, runs, seconds, measured, refused)


def _kept_out(name: str, small: int, nbytes: int, terms: Terms) -> str:
    """Why the terms keep an engine out, as a phrase; empty where they do not."""
    if name != "direct" or terms.overlap == "idle" or nbytes <= small:
        return ""
    if terms.max_gbps is not None or terms.max_thread_blocks is not None:
        return ""
    return (
        f"with overlap='compute' it moves at most {small >> 20} MiB, unless max_gbps or "
        f"max_thread_blocks limit it"
    )


def _why(
    best: Alternative,
    allowed: list[Alternative],
    found: list[Alternative],
    out: Mapping[str, str],
    terms: Terms,
) -> str:
    if not allowed:
        return f"no other engine takes the copy, although {best.refused}"
    known = "measured" if best.measured else "assumed"
    if len(allowed) > 1:
        text = f"the least time of those that the terms allow, as {known}"
    else:
        text = "the only engine that is left"
    quicker = [
        one for one in found
        if one.engine not in out and one.refused and one.seconds and best.seconds
        and one.seconds < best.seconds
    ]  # fmt: skip
    for one in quicker:
        text += f"; {one.engine} would take less, but the terms keep it out"
    if terms.max_gbps is not None:
        text += f"; at most {terms.max_gbps:g} GB/s"
    return text
