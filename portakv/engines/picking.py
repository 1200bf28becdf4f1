# SPDX-License-Identifier: Apache-2.0
"""Picking: which engine carries a copy out, by what each would cost and by the caller's terms.

The device's seconds come first, since a model that runs ahead of its device hides the host's. Among
engines that take the device about as long, the one that keeps the host least is picked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from portakv.engines.assumed import Assumed
from portakv.engines.costs import Costs
from portakv.engines.shapes import Shape
from portakv.engines.terms import Terms
from portakv.errors import Unsupported

#: The engines, the gentlest to a running model first: it wins where two cost the same in all.
ORDER = ("staged", "descriptors", "direct", "ring")
#: The most bytes that a kernel may move across the link while the device computes, by direction.
#: Measured on an H200: `direct` beats `staged` up to 2 MiB down and 12 MiB up, where it costs a
#: model no more than a copy engine does.
SMALL = {"d2h": 2 << 20, "h2d": 12 << 20}
#: Runs from which on `ring` may move pinned memory, where it can: the host waits for it, as it need
#: not for the others, but by then these take it as long to issue. A default, not a measurement.
MANY = 1024
#: Engines whose seconds differ by no more than this part of the least count as equal: the same copy
#: of 8 MiB and more timed twice on an H200 differs by up to 2 %, and so may each of two figures.
EQUAL = 0.02

#: Seconds of the device for each row of a 2-D copy beside its bytes, by direction. Measured on an
#: H200: in 64 rows of 4 KiB it reached 0.60 of a memcpy up, in such of 512 B 0.16, which is 49 ns a
#: row; down 0.45 with 4 KiB and 0.78 with 32 KiB, which is 92 and 168 ns.
ROW = {"d2h": 100e-9, "h2d": 50e-9}

_ASSUMED = Assumed("the engine is not in the table")


class Alternative(NamedTuple):
    """What one engine would make of a copy.

    Attributes:
        engine: its name.
        run_bytes, runs: the copy, as its cost was looked up: in pieces, where rows are folded.
        seconds: what it would take the device; None where that is not known.
        host_seconds: what it would keep the host; None likewise.
        measured: that was measured on this device, not assumed.
        refused: why it may not be picked, as a phrase; empty where it may.
    """

    engine: str
    run_bytes: int
    runs: int
    seconds: float | None
    host_seconds: float | None
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
) -> Pick:
    """The engine for a copy.

    Of those that the terms allow and that take the device at most `EQUAL` longer than the quickest,
    it is the one that keeps the host least; of equals the first in `ORDER`.

    Args:
        shapes: what the copy is to each engine that might carry it out.
        direction: ``d2h`` or ``h2d``.
        out: engines that do not, and why, as a phrase.
        terms: what the caller asks.
        costs: what engines cost.

    Raises:
        Unsupported: no engine is left, with each one's reason.
    """
    found = [
        _alternative(name, shapes[name], direction, out, terms, costs)
        for name in ORDER
        if name in shapes
    ]
    able = [one for one in found if one.engine not in out]
    if not able:
        lines = "\n".join(f"  {name}: {why}" for name, why in out.items())
        raise Unsupported("A copy between the device and the host", f"no engine takes it:\n{lines}")
    allowed = [one for one in able if not one.refused]
    equal = _equal(allowed or able)
    best = min(equal, key=lambda one: _known(one.host_seconds))  # the first of equals
    return Pick(best.engine, _why(best, equal, allowed, found, out, terms), tuple(found))


def _equal(able: list[Alternative]) -> list[Alternative]:
    """The quickest engine, and those that are about as quick."""
    # What was measured on this device beats what was assumed.
    rivals = [one for one in able if one.measured] or able
    least = min(_known(one.seconds) for one in rivals)
    return [one for one in rivals if _known(one.seconds) <= least * (1 + EQUAL)]


def _known(seconds: float | None) -> float:
    return float("inf") if seconds is None else seconds


def _alternative(
    name: str,
    shape: Shape,
    direction: str,
    out: Mapping[str, str],
    terms: Terms,
    costs: Costs,
) -> Alternative:
    runs, pieces = max(1, shape.runs), max(1, shape.pieces)
    run_bytes = max(1, shape.nbytes // pieces)
    by = _ASSUMED if costs.seconds(name, direction, run_bytes, pieces) is None else costs
    seconds = by.seconds(name, direction, run_bytes, pieces)
    host_seconds = by.host_seconds(name, direction, run_bytes, pieces)
    if seconds is not None and pieces < runs:
        seconds += runs * ROW[direction]
    if seconds is not None and terms.max_gbps is not None:
        seconds = max(seconds, shape.nbytes / terms.max_gbps / 1e9)
    refused = out.get(name, "") or _kept_out(name, SMALL[direction], shape.nbytes, terms)
    if name == "ring" and not refused and "staged" not in out and shape.runs < MANY:
        refused = f"it keeps the host waiting, which pinned memory is worth from {MANY} runs on"
    return Alternative(name, run_bytes, pieces, seconds, host_seconds, by.measured, refused)


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
    equal: list[Alternative],
    allowed: list[Alternative],
    found: list[Alternative],
    out: Mapping[str, str],
    terms: Terms,
) -> str:
    if not allowed:
        return f"no other engine takes the copy, although {best.refused}"
    known = "measured" if best.measured else "assumed"
    if len(equal) > 1:
        text = (
            f"within {EQUAL * 100:g} % of the least time of those that the terms allow, and keeps "
            f"the host least, as {known}"
        )
    elif len(allowed) > 1:
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
