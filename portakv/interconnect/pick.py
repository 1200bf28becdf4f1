# SPDX-License-Identifier: Apache-2.0
"""Pick the transfer strategy of one copy by its costs, or by a rule if nothing was measured.

The core picks (`native/core/pick.cpp`). This module has the figures that it picks by, and words its
reasons.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

from portakv.core import pick as core
from portakv.core.pick import ORDER, set_of
from portakv.errors import PortaKVError, Unsupported
from portakv.interconnect.costs import Table
from portakv.interconnect.strategy import SMALL, Terms
from portakv.selection import Decision, Kind, unavailable

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


class Shape(NamedTuple):
    """Bytes of a copy and the pieces that they lie in.

    ``runs`` are contiguous, with neighbours merged. The host pays for each of ``pieces``, while the
    device pays for each row of a 2-D copy about as for a separate copy.
    """

    nbytes: int
    runs: int
    pieces: int


class Pick(NamedTuple):
    """The strategy of a copy, and the reason as a sentence."""

    strategy: str
    why: str


class Rules:
    """The rules of picks in one direction under a caller's terms.

    Candidates are the strategies that the terms allow and that were measured to take at most
    `EQUAL` longer than the quickest. If nothing hides the host's time, a part of it counts as well.
    Of these the strategy that occupies the host least wins, then the first in `ORDER`. If no
    strategy was measured, a default rule decides, else the first in `ORDER`. A strategy that waits
    for the device is picked only if the terms leave no other. While a model runs, a kernel of few
    thread blocks costs less than a host that waits, but moves pages at a part of the measured rate.

    `PART` of the host's time counts, or `NEW_PART`, where nothing hides it:

    - with overlap='idle';
    - in copies of up to `SHORT`, unless all runs are pages;
    - if the call is longer than the transfer;
    - from `LONG` on.

    All of it counts in copies of up to `SHORT` with overlap='idle'.

    Attributes:
        words: the rules as the core reads them.
        excluded: why the terms exclude `zero_copy` from a copy, as a phrase.
    """

    def __init__(self, direction: str, terms: Terms) -> None:
        idle = terms.overlap == "idle"
        limited = terms.max_gbps is not None or terms.max_thread_blocks is not None
        small = SMALL[direction]
        kernel_most = small if terms.detached else max(small, SHORT)
        rule_most = UNHIDDEN[direction] if idle else max(small, SHORT)
        self.words = core.pack_rules(
            idle,
            terms.detached,
            limited,
            kernel_most,
            rule_most,
            SHORT,
            PAGE,
            WIDE,
            EVEN,
            NARROW,
            EQUAL,
            PART,
            SHORT_PART,
            NEW_PART / PART,
            LONG,
            CALL["batched_memcpy"],
            CALL["zero_copy"],
            ENGINE_RATE,
            KERNEL_RATE[direction],
            ALONE_RATE,
            ROW[direction],
        )

        self.excluded = (
            f"with overlap='compute' it moves at most {kernel_most >> 20} MiB, or host runs under "
            f"{EVEN >> 10} KiB not detached, unless max_gbps or max_thread_blocks limit it"
        )
        self._reasons = {
            core.EXCLUDED_ALONE: f"no other strategy takes the copy, although {self.excluded}",
            core.WAITLESS: "the only strategy that does not wait for what only the device knows",
            core.LEFT: "the only strategy that is left",
            core.GENTLEST: "the gentlest strategy that is left, as nothing was measured here",
        }
        default_rule = {
            core.RULE_PAGES: f"runs of {PAGE >> 20} MiB or more that arrive no later by a copy "
            f"engine than by a kernel of few thread blocks while a model runs",
            core.RULE_SMALL: f"copies of up to {rule_most >> 20} MiB",
            core.RULE_NARROW: f"host memory in runs of less than {NARROW >> 10} KiB",
            core.RULE_WIDE: f"runs of {WIDE >> 10} KiB or more",
            core.RULE_EVEN: f"runs of {EVEN >> 10} KiB or more that gathering would not merge",
            core.RULE_GATHERED: "runs that are gathered into longer ones",
        }
        for reason, copies in default_rule.items():
            self._reasons[reason] = f"the default rule for {copies}, as nothing was measured here"
        slowed = ALONE_RATE / KERNEL_RATE[direction]
        self._measured = [_measured(flags << 8, slowed) for flags in range(16)]

    def worded(self, answer: int, out: Mapping[str, str]) -> Pick:
        """Return the pick of an answer of the core. ``out``: as for `pick`.

        Raises:
            Unsupported: no strategy is left.
            PortaKVError: the core did not take the plan.
        """
        if answer == core.NONE:
            raise none_left(out)
        if answer < 0:
            raise PortaKVError(
                "Expected a plan and groups that fit each other. Report this as a bug."
            )
        reason = answer >> 4 & 15
        if reason == core.MEASURED:
            return Pick(ORDER[answer & 15], self._measured[answer >> 8 & 15])
        return Pick(ORDER[answer & 15], self._reasons[reason])


def _measured(flags: int, slowed: float) -> str:
    """Return why measured costs decide for a strategy.

    ``slowed``: a model makes the kernel of few thread blocks take that many times as long.
    """
    text = "the least time of the strategies that the terms allow"
    if flags & core.SEVERAL:
        text = f"within {EQUAL * 100:g} % of {text}, and keeps the host least"
    text += ", as measured"
    if flags & core.EXPOSED:
        text += ", with the host's part"
    if flags & core.SLOWED:
        times = f"{slowed:.1f} times as long alongside a model"
        text += f"; a kernel of few thread blocks takes {times}"
    if flags & core.QUICKER:
        text += "; zero_copy would take less, but the terms exclude it"
    return text


def pick(
    shapes: Mapping[str, Shape],
    direction: str,
    out: Mapping[str, str],
    terms: Terms,
    costs: Table,
    waits: frozenset[str] = frozenset(),
    new_ids: bool = False,
) -> tuple[Pick, Mapping[str, str]]:
    """Pick the strategy for a copy by `Rules`; return also why others may not be picked, as
    phrases.

    Args:
        shapes: the copy as each possible strategy moves it.
        out: strategies that do not take the copy, and why, as a phrase.
        waits: strategies that would wait for ids or addresses that only the device has.
        new_ids: no copy has used the lists of ids before.

    Raises:
        Unsupported: no strategy is left; the message has the reason of each.
    """
    rules = Rules(direction, terms)
    answer = core.pick_by_shapes(
        rules.words,
        costs.words[direction],
        [shapes.get(name, core.NO_SHAPE) for name in ORDER],
        set_of(out),
        set_of(waits),
        new_ids,
    )
    picked = rules.worded(answer, out)
    if answer & core.EXCLUDED:
        out = {"zero_copy": rules.excluded, **out}
    return picked, out


def none_left(out: Mapping[str, str]) -> PortaKVError:
    """Return the error of a copy that no strategy takes."""
    decisions = [Decision(name, False, why) for name, why in out.items()]
    return unavailable(KIND, "the copy", decisions)
