# SPDX-License-Identifier: Apache-2.0
"""Pick the transfer strategy of one copy by its costs, or by a rule if nothing was measured."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import inf
from typing import NamedTuple

from portakv.errors import PortaKVError, Unsupported
from portakv.interconnect.costs import Table
from portakv.interconnect.pieces import Shape
from portakv.interconnect.strategy import SMALL, Terms
from portakv.selection import Decision, Kind, unavailable

#: The strategies, the gentlest to a running model first: of equal costs the first one wins.
ORDER = ("staged", "batched_memcpy", "zero_copy", "pageable")
#: Bytes of runs in the default rule. Of 234 copies recorded on an H200 the rule loses more than 5 %
#: to the best allowed strategy in 4 while a model runs, and in 17 on an idle device; a measured
#: table in 2 and 1 (benchmarks/notes/link.md).
WIDE = 256 << 10
EVEN = 32 << 10
NARROW = 64 << 10
#: Strategies count as equal if their seconds differ by at most this part of the least. The same
#: copy of 8 MiB and more timed twice on an H200 differs by up to 2 %, and so may each of two
#: figures.
EQUAL = 0.02

#: The part of the host's time that a caller waits for if nothing hides it: the host issues the
#: first slice, then the device works while it issues the others. On an H200 the strategy with the
#: least ``seconds + PART * host_seconds`` is within 5 % of the quickest by the wall in all of 234
#: copies, and its mean loss is 0.1 %; the one with the least seconds loses 3 %, up to 57 %
#: (benchmarks/notes/link.md).
PART = 0.25
#: The same part for lists of ids that no copy has used before. The table of costs has the time of
#: the host for known lists; to describe pieces for new ones takes twice as long: on an H200 128 MiB
#: by `staged` occupy the host for 0.8 and 1.6 ms.
NEW_PART = 2 * PART
#: The same part for copies of up to `SHORT` with overlap='idle'. One call issues such a copy, and
#: nothing of it overlaps. Up to 16 MiB all parts from `PART` to this one choose alike in five
#: recorded grids of known ids; 12 MiB of new ids in pages of 2 MiB were given to a call of 342 us
#: where the kernel's took 146, and ended 42 % later.
SHORT_PART = 1.0
#: Seconds of the host from which a model that runs ahead of its device does not hide a call: a
#: device accepts some thousands of copies beforehand, and then waits for the host. On an H100 runs
#: of 32 KiB by `batched_memcpy`, behind a delay, reached 0.988, 0.943 and 0.80 of a memcpy with
#: 1.1, 2.2 and 8.5 ms of the host, and `staged` 0.98 with 0.4 - 1.1.
LONG = 1e-3

#: The most bytes that a kernel moves across the link in the default rule if nothing hides the
#: host's time. On an H200 it is at most 4 % slower by the wall than the quickest up to there.
UNHIDDEN = {"d2h": 128 << 20, "h2d": 128 << 20}

#: The most bytes that a kernel of few thread blocks moves across the link while the device
#: computes. To describe such a copy to a copy engine takes the host longer than the copy takes: an
#: H200's host is busy for 290 - 690 us with 12 MiB that cross in 240. So the host's time counts for
#: it even while a model runs. A table of costs alone does not say so: it times the call while the
#: device is held up, and on an idle device the same call took two to four times as long.
SHORT = 16 << 20

#: Bytes of the runs of a plan, before neighbours are merged, from which a copy engine moves a short
#: copy while a model runs, unless a caller would wait longer for it than for the kernel.
PAGE = 1 << 20

#: The time of a copy of pages that a caller sees while a model runs: seconds of the call by
#: strategy, and bytes of a second. The seconds are those of 12 MiB in pages of 2 MiB with new ids
#: in each call: by the wall on an idle H200, less the bytes at `ENGINE_RATE` and at `ALONE_RATE`.
#: Five later runs have 143 - 422 us and 65 - 184, and the same choice. The rates are those of an
#: H100, alongside a matmul.
CALL = {"batched_memcpy": 134e-6, "zero_copy": 83e-6}
ENGINE_RATE = 51e9
KERNEL_RATE = {"d2h": 23e9, "h2d": 27e9}
#: The rate of the kernel of few thread blocks on a device that does nothing else (same place).
ALONE_RATE = 50e9

#: Seconds of the device for each row of a 2-D copy, in addition to its bytes, by direction.
#: Measured on an H200: up, 64 rows of 4 KiB reached 0.60 of a memcpy and rows of 512 B 0.16, which
#: is 49 ns a row; down, rows of 4 KiB reached 0.45 and of 32 KiB 0.78, which is 92 and 168 ns.
ROW = {"d2h": 100e-9, "h2d": 50e-9}

KIND = Kind("strategy", error=partial(Unsupported, "A copy between the device and the host"))


class Alternative(NamedTuple):
    """The cost of a copy by one strategy.

    Attributes:
        strategy: its name.
        run_bytes, runs: the copy, as its cost was looked up: in pieces, if rows are folded.
        seconds, host_seconds: the time of the device, and the time that the call occupies the host.
            None: not measured here.
        refused: why it may not be picked, as a phrase. Empty: it may.
    """

    strategy: str
    run_bytes: int
    runs: int
    seconds: float | None
    host_seconds: float | None
    refused: str


class Pick(NamedTuple):
    """The strategy of a copy, the reason as a sentence, and the cost by each strategy."""

    strategy: str
    why: str
    alternatives: tuple[Alternative, ...]


def default_rule(
    shapes: Mapping[str, Shape],
    direction: str,
    kernel: bool,
    idle: bool = False,
    engine: bool = True,
) -> tuple[str, str]:
    """Return the strategy for a copy on a device that was not measured, and the reason as a phrase.

    Args:
        kernel: the terms allow a kernel to move the copy.
        idle: nothing hides the host's time.
        engine: `batched_memcpy` can move the copy without a wait.
    """
    if engine and not idle and _of_pages(shapes) and _engine_first(shapes, direction):
        return (
            "batched_memcpy",
            f"for runs of {PAGE >> 20} MiB or more that arrive no later by a copy engine than by "
            f"a kernel of few thread blocks while a model runs",
        )
    staged = shapes["staged"]
    whole = shapes["batched_memcpy"]
    most = UNHIDDEN[direction] if idle else max(SMALL[direction], SHORT)
    if kernel and whole.nbytes <= most:
        return "zero_copy", f"for copies of up to {most >> 20} MiB"
    if kernel and staged.run_bytes < NARROW:
        return "zero_copy", f"for host memory in runs of less than {NARROW >> 10} KiB"
    if whole.run_bytes >= WIDE:
        return "batched_memcpy", f"for runs of {WIDE >> 10} KiB or more"
    if whole.run_bytes >= EVEN and whole.runs <= staged.runs:
        return (
            "batched_memcpy",
            f"for runs of {EVEN >> 10} KiB or more that gathering would not merge",
        )
    return "staged", "for runs that are gathered into longer ones"


def _of_pages(shapes: Mapping[str, Shape]) -> bool:
    """Return whether every run of a copy that a kernel could move is a large page."""
    return "zero_copy" in shapes and shapes["zero_copy"].run_bytes >= PAGE


def _engine_first(shapes: Mapping[str, Shape], direction: str) -> bool:
    """Return whether a caller waits no longer for a copy engine than for the kernel of few thread
    blocks, while a model runs."""
    nbytes = shapes["zero_copy"].nbytes
    by_engine = CALL["batched_memcpy"] + nbytes / ENGINE_RATE
    by_kernel = CALL["zero_copy"] + nbytes / KERNEL_RATE[direction]
    return by_engine <= by_kernel


def pick(
    shapes: Mapping[str, Shape],
    direction: str,
    out: Mapping[str, str],
    terms: Terms,
    costs: Table,
    waits: frozenset[str] = frozenset(),
    new_ids: bool = False,
) -> Pick:
    """Pick the strategy for a copy.

    Candidates are the strategies that the terms allow and that were measured to take at most
    `EQUAL` longer than the quickest. If nothing hides the host's time, a part of it counts as well
    (`_waiting`). Of these the strategy that occupies the host least wins, then the first in
    `ORDER`. If no strategy was measured, `default_rule` decides, else the first in `ORDER`. A
    strategy that waits for the device is picked only if the terms leave no other. While a model
    runs, a kernel of few thread blocks costs less than a host that waits, but moves pages at a part
    of the measured rate.

    Args:
        shapes: the copy as each possible strategy moves it.
        out: strategies that do not take the copy, and why, as a phrase.
        waits: strategies that would wait for ids or addresses that only the device has.
        new_ids: no copy has used the lists of ids before.

    Raises:
        Unsupported: no strategy is left; the message has the reason of each.
    """
    idle = terms.overlap == "idle"
    excluded = _excluded(direction, shapes["staged"], terms)
    others = shapes.keys() - out.keys() - {"zero_copy"}
    if others and others <= waits and not terms.detached:
        excluded = ""
    alternatives = []
    for name in ORDER:
        if name in shapes:
            refused = out.get(name) or (excluded if name == "zero_copy" else "")
            alternatives.append(_alternative(name, shapes[name], direction, costs, refused))
    able = [one for one in alternatives if one.strategy not in out]
    if not able:
        raise none_left(out)
    allowed = [one for one in able if not one.refused]
    waitless = [one for one in allowed if one.strategy not in waits]
    candidates = waitless or allowed
    if not allowed:
        strategy = able[0].strategy
        why = f"no other strategy takes the copy, although {able[0].refused}"
    elif len(waitless) == 1 < len(allowed):
        strategy = waitless[0].strategy
        why = "the only strategy that does not wait for what only the device knows"
    elif len(allowed) == 1:
        strategy = allowed[0].strategy
        why = "the only strategy that is left"
    elif any(one.seconds is not None for one in allowed):
        strategy, why = _quickest(candidates, able, _waiting(shapes, direction, idle, new_ids))
    else:
        engine = "batched_memcpy" in [one.strategy for one in candidates]
        rule = default_rule(shapes, direction, not excluded, idle, engine)
        strategy, why = _unmeasured(candidates, *rule)
    return Pick(strategy, why, tuple(alternatives))


def _unmeasured(candidates: list[Alternative], wanted: str, rule: str) -> tuple[str, str]:
    """Return the strategy that the default rule wants if it is a candidate, else the first
    candidate, and why."""
    if any(one.strategy == wanted for one in candidates):
        return wanted, f"the default rule {rule}, as nothing was measured here"
    return candidates[
        0
    ].strategy, "the gentlest strategy that is left, as nothing was measured here"


class _Waiting(NamedTuple):
    """The seconds that a caller waits for a copy.

    Attributes:
        exposed: the host's time counts in any case.
        part: the part of the host's time that counts.
        calls: a call takes that many times the measured seconds of the host.
        slowed: the kernel takes that many times the measured seconds.
    """

    exposed: bool
    part: float
    calls: float
    slowed: float

    def seconds(self, one: Alternative) -> float:
        """Return the seconds for a copy by one strategy."""
        if one.seconds is None:
            return inf
        seconds = one.seconds
        if one.strategy == "zero_copy":
            seconds *= self.slowed
        host = one.host_seconds or 0.0
        call = self.calls * host
        counts = self.exposed or host >= LONG or call > seconds
        return seconds + self.part * call if counts else seconds


def _waiting(shapes: Mapping[str, Shape], direction: str, idle: bool, new_ids: bool) -> _Waiting:
    """Return how the seconds that a caller waits follow from the measured ones.

    `PART` of the host's time counts, or `NEW_PART`, where nothing hides it:

    - with overlap='idle';
    - in copies of up to `SHORT`, unless all runs are pages;
    - if the call is longer than the transfer;
    - from `LONG` on.

    All of it counts in copies of up to `SHORT` with overlap='idle'.
    """
    pages = _of_pages(shapes)
    short = shapes["staged"].nbytes <= SHORT
    part = SHORT_PART if idle and short else PART
    slowed = ALONE_RATE / KERNEL_RATE[direction] if pages and not idle else 1.0
    exposed = idle or (short and not pages)
    return _Waiting(exposed, part, NEW_PART / PART if new_ids else 1.0, slowed)


def _quickest(
    allowed: list[Alternative], able: list[Alternative], waiting: _Waiting
) -> tuple[str, str]:
    """Return the strategy that occupies the host least of the quickest and its equals, and why."""
    limit = min(map(waiting.seconds, allowed)) * (1 + EQUAL)
    equal = [one for one in allowed if waiting.seconds(one) <= limit]
    best = min(equal, key=lambda one: one.host_seconds or 0.0)  # the first of equals
    text = "the least time of the strategies that the terms allow"
    if len(equal) > 1:
        text = f"within {EQUAL * 100:g} % of {text}, and keeps the host least"
    text += ", as measured"
    if waiting.exposed:
        text += ", with the host's part"
    if waiting.slowed > 1 and best.strategy != "zero_copy":
        times = f"{waiting.slowed:.1f} times as long alongside a model"
        text += f"; a kernel of few thread blocks takes {times}"
    for one in able:
        if one.refused and waiting.seconds(one) < waiting.seconds(best):
            text += f"; {one.strategy} would take less, but the terms exclude it"
    return best.strategy, text


def _alternative(
    name: str, shape: Shape, direction: str, costs: Table, refused: str
) -> Alternative:
    runs = max(1, shape.runs)
    pieces = max(1, shape.pieces)
    key = name, direction, max(1, shape.nbytes // pieces), pieces
    seconds = costs.seconds(*key)
    host_seconds = costs.host_seconds(*key)
    if seconds is not None and pieces < runs:
        seconds += runs * ROW[direction]
    return Alternative(name, key[2], pieces, seconds, host_seconds, refused)


def _excluded(direction: str, host: Shape, terms: Terms) -> str:
    """Return why the terms exclude `zero_copy` from a copy, as a phrase; empty if they do not.

    ``host`` is the shape of the host memory. Copy engines slow a model and the host down more than
    `zero_copy` does if runs are short (benchmarks/notes/link.md).
    """
    limited = terms.max_gbps is not None or terms.max_thread_blocks is not None
    most = SMALL[direction] if terms.detached else max(SMALL[direction], SHORT)
    short = host.nbytes <= most or (host.run_bytes < EVEN and not terms.detached)
    if terms.overlap == "idle" or short or limited:
        return ""
    return (
        f"with overlap='compute' it moves at most {most >> 20} MiB, or host runs under "
        f"{EVEN >> 10} KiB not detached, unless max_gbps or max_thread_blocks limit it"
    )


def none_left(out: Mapping[str, str]) -> PortaKVError:
    decisions = [Decision(name, False, why) for name, why in out.items()]
    return unavailable(KIND, "the copy", decisions)
