# SPDX-License-Identifier: Apache-2.0
"""`host`: prepares the transfer strategies, and picks one for each transfer by their cost on this
device, or by a rule if nothing was measured.

It executes nothing itself, so its capabilities are those of the strategy that it picks. It cannot
be captured: the host picks the strategy and the pieces from the ids of each transfer, and a graph
would retain those of the capture.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple, cast

import torch

from portakv.backends.base import PEERS, Capabilities, Decision, Pending
from portakv.backends.row_kernels import RowKernels
from portakv.core import pick as core
from portakv.core.call import Crossings
from portakv.core.pick import BITS, ORDER, pack_copies, pick_copy, set_of
from portakv.errors import BackendUnavailable, PortaKVError, Unsupported
from portakv.interconnect.costs import Table, costs_of
from portakv.interconnect.link import RunCounter, by_torch, link_of
from portakv.interconnect.strategy import (
    SMALL,
    Cross,
    Strategy,
    StrategyLaunch,
    Terms,
    known_to_host,
    read_on,
)
from portakv.interconnect.zero_copy import ZeroCopy
from portakv.plan.plan import CopyPlan, Move
from portakv.registry import REGISTRY, Choice, prepare_by
from portakv.registry.prepared import Prepared
from portakv.runtime.bounded import Bounded, making
from portakv.runtime.devices import inside
from portakv.selection import Kind, unavailable
from portakv.view.view import KVView

_log = logging.getLogger(__name__)

_NO_TERMS = Terms()
_UNSTAGED = ("batched_memcpy", "zero_copy")  # these take no memory of the device


def strategy_class(name: str) -> type[Strategy]:
    """Return the class of a strategy, imported if need be."""
    return cast("type[Strategy]", REGISTRY.class_of(name))


class Host(Strategy):
    """Pick among the ``strategies`` that serve a device, by name.

    ``out``: the strategies that do not serve it, and why, as a phrase.
    """

    name = "host"

    def __init__(
        self, device: torch.device, half: Choice | None = None, terms: Terms | None = None
    ) -> None:
        super().__init__(device, half, terms)
        self._logged = REGISTRY.logged_strategies.setdefault(device, set())
        made = {name: self._make(name) for name in ORDER}
        self.strategies = {name: x for name, x in made.items() if not isinstance(x, str)}
        self.out = {name: why for name, why in made.items() if isinstance(why, str)}

    def capabilities(self) -> Capabilities:
        served = [strategy.capabilities().places for strategy in self.strategies.values()]
        return Capabilities(places=frozenset().union(*served) - PEERS, index_on="any")

    def check(self, plan: CopyPlan) -> Decision:
        answers = {name: strategy.check(plan) for name, strategy in self.strategies.items()}
        able = [name for name, answer in answers.items() if answer.accepted]
        if able:
            return Decision(self.name, True, f"takes the plan, by {' or '.join(able)}")
        reasons = [f"{name}: {answer.reason}" for name, answer in answers.items()]
        reasons += [f"{name}: {why}" for name, why in self.out.items()]
        return Decision(self.name, False, f"no strategy takes it ({'; '.join(reasons)})")

    def prepare(self, plan: CopyPlan) -> HostLaunch:
        launch = HostLaunch(plan, self)
        # Prepare one strategy now, so that the plan is known to be executable.
        if not any(launch.prepared(name) for name in self.strategies):
            raise none_left(launch.out)
        costs_of(self.device)  # read the table now, not in a transfer
        return launch

    def log(self, strategy: str, why: str) -> None:
        """Log, once for each strategy of a device, that it executes copies."""
        if strategy not in self._logged:
            self._logged.add(strategy)
            _log.info("%s: strategy %s, %s", self.device, strategy, why)

    def _make(self, name: str) -> Strategy | str:
        """Return a strategy, or why it does not serve this device."""
        try:
            cls = strategy_class(name)
            decision = cls.probe(self.device)
            strategy = cls(self.device, self._half, self.terms) if decision.accepted else None
            return strategy or decision.reason
        except Exception as error:  # a strategy that fails must not disable the others
            return f"it failed to load: {type(error).__name__}: {error}"


class HostLaunch(StrategyLaunch):
    """A plan's launches, one for each strategy that takes the plan, each prepared at its first use.

    ``out``: strategies that do not take the plan, and why, as a phrase.
    """

    def __init__(self, plan: CopyPlan, host: Host) -> None:
        super().__init__(plan, host.device)
        self.plan = plan
        self.direction = "d2h" if self.downward else "h2d"
        self._host = host
        self._terms = host.terms
        answers = {name: strategy.check(plan) for name, strategy in host.strategies.items()}
        self.strategies = {name: host.strategies[name] for name, x in answers.items() if x.accepted}
        refused = {name: x.reason for name, x in answers.items() if not x.accepted}
        self.out = {**host.out, **refused}
        self._unfit = set_of(self.out)
        # For torch each row on the host is a separate call: nothing folds.
        below = 0 if by_torch(host.device) else link_of(host.device).fold_below
        self._prepared: dict[str, Prepared] = {}
        self._both = RunCounter(plan, fold_below=below)
        self._of_host = RunCounter.of_host(plan, below)
        self.counted = plan.unit, *self._both.limits, self._of_host.limits[1]
        self._rules = Rules(self.direction, self._terms)
        self._copies = array(
            "q",
            pack_copies(
                self._both.plan_at,
                self._of_host.plan_at,
                plan.unit,
                plan.token_bytes,
                plan.runs_per_unit,
            )
            + self._both.folding.tobytes()
            + self._rules.words,
        )
        self.picked_at = self._copies.buffer_info()[0]
        self._choose = pick_copy()

    def pick(self, move: Move, quick: bool = False) -> Pick:
        """Return the strategy that a transfer takes; move nothing.

        Args:
            quick: do not count the runs of the ids if the strategy is certain without. The costs of
                the other strategies are then those of the fewest runs that any ids give.

        Raises as the function `pick` does.
        """
        out = self.out
        host = move.ends(self.downward)[1]
        waits, new_ids = self._conditions(move)

        def pick_by(groups: int, host_groups: int) -> Pick:
            costs = costs_of(self.device).addresses[self.direction]
            unfit = set_of(out)
            of_ids = groups, host_groups, move.count
            answer = self._choose(self.picked_at, costs, *of_ids, unfit, waits, new_ids)
            return self._rules.worded(answer, out)

        while True:
            # More runs cost every other strategy more, and the kernel as much as before.
            picked = pick_by(1, 1) if quick else None
            if picked is None or picked.strategy != "zero_copy":
                picked = pick_by(*self._groups(move))
            strategy = self.strategies.get(picked.strategy)  # another thread may have removed it
            why = strategy.refuses(host) if strategy is not None else ""
            if not why:
                return picked
            out = {**out, picked.strategy: why}

    def _conditions(self, move: Move) -> tuple[int, bool]:
        """Return the strategies that would wait for a device, and whether the ids are new."""
        rows, host, device_index, host_index = move.ends(self.downward)
        count = move.count
        # The ids need no guard; a strategy without a guard reads other ids back.
        clean = device_index.is_clean(count, rows.slots) and host_index.is_clean(count, host.slots)
        rows_known = known_to_host(rows, device_index)
        host_known = known_to_host(host, host_index)
        waits = 0
        if not (rows_known and host_known):
            known = {"none": True, "host": host_known, "both": False}
            # Another thread may remove a strategy meanwhile.
            waits = set_of(
                name
                for name, strategy in tuple(self.strategies.items())
                if not known[strategy.reads] or not (clean or strategy.capabilities().guards)
            )
        return waits, move.src_index.temporary or move.dst_index.temporary

    def _groups(self, move: Move) -> tuple[int, int]:
        """Return the groups of neighbours of a transfer on both sides together, and on the host."""
        host_index = move.ends(self.downward)[3]
        groups = self._both.groups(move.src_index, move.dst_index, move.count)
        return groups, self._of_host.groups(host_index, host_index, move.count)

    def row_kernels(self) -> RowKernels | None:
        direct = self.strategies.get(ZeroCopy.name)
        if isinstance(direct, ZeroCopy):
            return direct.kernels[self.plan.src.place]
        return self._host.half.backend.row_kernels

    def described(self, words: Crossings, strategy: str) -> Cross | None:
        ready = self.prepared(strategy)
        launch = None if ready is None else ready.launch
        return launch.described(words, strategy) if isinstance(launch, StrategyLaunch) else None

    def terms(self, host: KVView, new: bool, look: bool = False) -> tuple[int, int, int]:
        out = self._unfit
        unknown = 0
        direct = self.strategies.get(ZeroCopy.name)
        if isinstance(direct, ZeroCopy) and not direct.reaches(host):
            if not look:
                unknown = 2
            elif direct.refuses(host):
                out |= BITS[ZeroCopy.name]
        return costs_of(self.device).addresses[self.direction], out, new | unknown

    def picked(self, answer: int) -> tuple[str, str]:
        picked = self._rules.worded(answer, self.out)
        self._host.log(*picked)
        return picked

    def picked_for(self, move: Move) -> tuple[Prepared, tuple[str, str]]:
        """See `Picks`; raise as the function `pick` does."""
        ready, picked = self._pick_prepared(move)
        self._host.log(*picked)
        return ready, picked

    def instead_of(self, carried: tuple[str, str]) -> tuple[Prepared, tuple[str, str]] | None:
        """Return what needs no memory of the device, if the strategy that was picked needs some.

        Such a strategy may move rows once more. None replaces `zero_copy`, the only strategy that
        skips and guards ids.
        """
        strategy, why = carried
        able = [ready for name in _UNSTAGED if (ready := self.prepared(name))]
        if not able or strategy in _UNSTAGED:
            return None
        name = able[0].choice.name
        why = f"{strategy} was picked ({why}), but the device had no memory left for it"
        self._host.log(name, why)
        return able[0], (name, why)

    def _pick_prepared(self, move: Move) -> tuple[Prepared, Pick]:
        """Pick as `pick` does, and prepare the strategy."""
        while True:
            picked = self.pick(move, quick=True)
            ready = self.prepared(picked.strategy)
            if ready is not None:  # else it was refused just now
                return ready, picked

    def launch_by(self, strategy: str, move: Move, stream: torch.Stream | None) -> Pending | None:
        """Copy by one strategy, even if another one would be picked.

        Raises:
            Unsupported: the strategy does not take the plan.
        """
        ready = self.prepared(strategy)
        if ready is None:
            why = self.out.get(strategy, "no strategy has that name")
            raise Unsupported(f"A copy by the strategy {strategy!r}", why)
        return ready.launch(*self._placed(ready, move, stream), stream, None)

    def enqueue(
        self, move: Move, stream: torch.Stream | None, status: torch.Tensor | None
    ) -> Pending | None:
        carried: tuple[str, str] = self._pick_prepared(move)[1]
        try:
            pending = self.launch_by(carried[0], move, stream)
        except torch.OutOfMemoryError:
            instead = self.instead_of(carried)
            if instead is None:
                raise
            _, carried = instead
            pending = self.launch_by(carried[0], move, stream)
        self._host.log(*carried)
        return pending

    def prepared(self, name: str) -> Prepared | None:
        """Return a strategy, prepared at its first use. None: it cannot be prepared."""
        ready = self._prepared.get(name)
        strategy = self.strategies.get(name)
        if ready is not None or strategy is None:
            return ready
        # Without the lock: it may self-check a backend. The first of several threads wins.
        launch, decision = prepare_by(strategy, self.plan)
        with making():
            if launch is None:
                out = {**self.out, name: decision.reason}
                self._unfit = set_of(out)
                self.out = out
                self.strategies.pop(name, None)
                return None
            choice = Choice(strategy, (), False, strategy.capabilities())
            made = Prepared.of(self.plan, launch, choice, (name, "requested"))
            return self._prepared.setdefault(name, made)

    def _placed(self, ready: Prepared, move: Move, stream: torch.Stream | None) -> Move:
        """Return the copy with the ids of both sides where a strategy reads them."""
        if ready.can.index_on == "any":
            return move
        # The next layer of a detached copy may be read on a stream that waits for no other.
        separate = stream is not None and self._terms.detached
        with inside(None if separate else stream):
            placed = ready.place_both(move)
        if stream is not None and separate:
            stream.wait_stream(torch.accelerator.current_stream(self.device.index))
        src_index = read_on(stream, placed.src_index)
        return placed._replace(src_index=src_index, dst_index=read_on(stream, placed.dst_index))


#: Strategies by the backend that they run over, by terms without a rate, and, for rows of another
#: device, by the reason why the device may not read them.
strategies: Bounded[tuple[Choice, Terms, str | None], Choice]
strategies = Bounded("strategies under terms", 256)


def across(half: Choice, terms: Terms | None = None) -> Choice:
    """Return the strategy ``host`` over a device's backend and under a caller's terms; or the
    strategy that the caller named. All rates share one strategy.

    Raises:
        BackendUnavailable: its self-check failed on this device.
    """
    own = _NO_TERMS if terms is None else terms.without_rate
    key = half, own, None
    known = strategies.get(key)
    if known is not None:
        return known
    device = half.backend.device
    if isinstance(half.backend, Strategy):
        if own == _NO_TERMS:
            return half
        named = type(half.backend)(device, None, own)
        made = Choice(named, half.trace, half.forced, named.capabilities())
        return strategies.setdefault(key, made)
    backend, decision = REGISTRY.ask(Host.name, device, check=True)
    if backend is None:
        raise BackendUnavailable(
            f"Expected a transfer strategy for copies between {device} and the host, got none: "
            f"{decision.reason}. Copy through a tensor on the device."
        )
    strategy = Host(device, half, own)
    made = Choice(strategy, (*half.trace, decision), False, strategy.capabilities())
    return strategies.setdefault(key, made)


# ------------------------------------------------------------------------------------------------
# Pick the transfer strategy of one copy by its costs, or by a rule if nothing was measured.
#
# The core picks (`native/core/pick.cpp`). This module has the figures that it picks by, and words
# its reasons.

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
