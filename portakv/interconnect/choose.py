# SPDX-License-Identifier: Apache-2.0
"""`host`: prepares the transfer strategies and picks one for each transfer, by their cost on this
device.

It executes nothing itself, so its capabilities are those of the strategy that it picks. It cannot
be captured: the host picks the strategy and the pieces from the ids of each transfer, and a graph
would retain those of the capture.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Mapping
from math import inf
from typing import NamedTuple

import torch

from portakv.backends.base import PEERS, Again, Capabilities, Decision, Launch, Pending
from portakv.errors import BackendUnavailable, Unsupported
from portakv.interconnect.costs import Table, costs_of
from portakv.interconnect.link import by_torch, link_of
from portakv.interconnect.pieces import RunCounter, Shape
from portakv.interconnect.strategy import (
    SMALL,
    Strategy,
    StrategyLaunch,
    Terms,
    known_to_host,
    read_on,
)
from portakv.plan.plan import CopyPlan, Move
from portakv.registry.prepared import bring, prepare_by
from portakv.registry.registry import BUILT_IN, REGISTRY, Choice
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import capturing, inside
from portakv.view import Index, KVView

_log = logging.getLogger(__name__)

#: The strategies, the gentlest to a running model first: of equal costs the first one wins.
ORDER = ("staged", "batched_memcpy", "zero_copy", "pageable")
#: Bytes of runs in the default rule. Of 234 copies recorded on an H200 the rule loses more than 5 %
#: to the best allowed strategy in 4 while a model runs, and in 17 on an idle device; a measured
#: table in 2 and 1 (benchmarks/NOTES.md, section 11).
WIDE = 256 << 10
EVEN = 32 << 10
NARROW = 64 << 10
#: Strategies count as equal if their seconds differ by at most this part of the least. The same
#: copy of 8 MiB and more timed twice on an H200 differs by up to 2 %, and so may each of two
#: figures.
EQUAL = 0.02

#: Seconds of the device for each row of a 2-D copy, in addition to its bytes, by direction.
#: Measured on an H200: up, 64 rows of 4 KiB reached 0.60 of a memcpy and rows of 512 B 0.16, which
#: is 49 ns a row; down, rows of 4 KiB reached 0.45 and of 32 KiB 0.78, which is 92 and 168 ns.
ROW = {"d2h": 100e-9, "h2d": 50e-9}

_NO_TERMS = Terms()
_NONE = frozenset[str]()
_PICKS = 1024  # cached by one launch
_UNSTAGED = ("batched_memcpy", "zero_copy")  # these take no memory of the device


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


def default_rule(shapes: Mapping[str, Shape], direction: str, kernel: bool) -> tuple[str, str]:
    """Return the strategy for a copy on a device that was not measured, and the reason as a phrase.

    ``kernel``: the terms allow a kernel to move the copy.
    """
    staged = shapes["staged"]
    whole = shapes["batched_memcpy"]
    if whole.nbytes <= SMALL[direction]:
        return "zero_copy", f"for copies of up to {SMALL[direction] >> 20} MiB"
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


def pick(
    shapes: Mapping[str, Shape],
    direction: str,
    out: Mapping[str, str],
    terms: Terms,
    costs: Table,
    waits: frozenset[str] = frozenset(),
) -> Pick:
    """Pick the strategy for a copy.

    Candidates are the strategies that the terms allow and that were measured to take at most
    `EQUAL` longer than the quickest. Of these the strategy that occupies the host least wins, then
    the first in `ORDER`. If no strategy was measured, `default_rule` decides, else the first in
    `ORDER`. A strategy that waits for the device is picked only if the terms leave no other. While
    a model runs, a kernel of few thread blocks costs less than a host that waits.

    Args:
        shapes: the copy as each possible strategy moves it.
        out: strategies that do not take the copy, and why, as a phrase.
        waits: strategies that would wait for ids or addresses that only the device has.

    Raises:
        Unsupported: no strategy is left; the message has the reason of each.
    """
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
        raise _none_left(out)
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
        strategy, why = _quickest(candidates, able)
    else:
        rule = default_rule(shapes, direction, kernel=not excluded)
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


def _quickest(allowed: list[Alternative], able: list[Alternative]) -> tuple[str, str]:
    """Return the strategy that occupies the host least of the quickest and its equals, and why."""
    limit = min(map(_seconds, allowed)) * (1 + EQUAL)
    equal = [one for one in allowed if _seconds(one) <= limit]
    best = min(equal, key=lambda one: one.host_seconds or 0.0)  # the first of equals
    text = "the least time of the strategies that the terms allow"
    if len(equal) > 1:
        text = f"within {EQUAL * 100:g} % of {text}, and keeps the host least"
    text += ", as measured"
    for one in able:
        if one.refused and _seconds(one) < _seconds(best):
            text += f"; {one.strategy} would take less, but the terms exclude it"
    return best.strategy, text


def _seconds(one: Alternative) -> float:
    return inf if one.seconds is None else one.seconds


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
    `zero_copy` does if runs are short (benchmarks/NOTES.md, section 12).
    """
    limited = terms.max_gbps is not None or terms.max_thread_blocks is not None
    short = host.nbytes <= SMALL[direction] or (host.run_bytes < EVEN and not terms.detached)
    if terms.overlap == "idle" or short or limited:
        return ""
    return (
        f"with overlap='compute' it moves at most {SMALL[direction] >> 20} MiB, or host runs under "
        f"{EVEN >> 10} KiB not detached, unless max_gbps or max_thread_blocks limit it"
    )


def _none_left(out: Mapping[str, str]) -> Unsupported:
    lines = "\n".join(f"  {name}: {why}" for name, why in out.items())
    return Unsupported("A copy between the device and the host", f"no strategy takes it:\n{lines}")


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
            raise _none_left(launch.out)
        costs_of(self.device)  # read the table now, not in a transfer
        return launch

    def log(self, strategy: str, why: str) -> None:
        """Log, once for each strategy of a device, that it executes copies."""
        if strategy not in self._logged:
            self._logged.add(strategy)
            _log.info("%s: strategy %s, %s", self.device, strategy, why)

    def _make(self, name: str) -> Strategy | str:
        """Return a strategy, or why it does not serve this device."""
        module, _, attribute = BUILT_IN[name].partition(":")
        try:
            cls: type[Strategy] = getattr(importlib.import_module(module), attribute)
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
        # For torch each row on the host is a separate call: nothing folds.
        below = 0 if by_torch(host.device) else link_of(host.device).fold_below
        self._lock = threading.RLock()
        self._launches: dict[str, Launch] = {}
        self._whole = RunCounter(plan, fold_below=below)
        self._of_host = RunCounter.of_host(plan, below)
        self._picks: Bounded[tuple[object, ...], Pick] = Bounded("picks of strategies", _PICKS)
        self._last = threading.local()

    def pick(self, move: Move, guarded: bool = False) -> Pick:
        """Return the strategy that a transfer takes; move nothing.

        ``guarded``: pick only a strategy that skips and guards ids. Raises as the function `pick`
        does.
        """
        out = self.out
        host = self.ends(move)[1]
        if guarded:
            # Another thread may remove a strategy meanwhile.
            strategies = tuple(self.strategies.items())
            unfit = [name for name, each in strategies if not each.capabilities().guards]
            out = {**dict.fromkeys(unfit, "it takes no ids that are to be guarded"), **out}
        while True:
            picked = self._pick(move, out)
            strategy = self.strategies.get(picked.strategy)  # another thread may have removed it
            why = strategy.refuses(host) if strategy is not None else ""
            if not why:
                return picked
            out = {**out, picked.strategy: why}

    def _pick(self, move: Move, out: Mapping[str, str]) -> Pick:
        """Pick as `pick` does, without the strategies in ``out``."""
        rows, host, device_index, host_index = self.ends(move)
        count = move.count
        groups = self._whole.groups(move.src_index, move.dst_index, count)
        host_groups = self._of_host.groups(host_index, host_index, count)
        clean = device_index.is_clean(count, rows.slots) and host_index.is_clean(count, host.slots)
        waits = self._waiting(
            known_to_host(rows, device_index), known_to_host(host, host_index), clean
        )
        # After another strategy refuses the plan, earlier picks do not count.
        key = groups, host_groups, count, tuple(out), waits
        picked = self._picks.get(key)
        if picked is None:
            dense = self._of_host.shape(host_groups, count)
            shapes = {
                "staged": dense,
                "batched_memcpy": self._whole.shape(groups, count),
                "zero_copy": self._whole.unmerged(count),
                "pageable": dense,
            }
            picked = pick(shapes, self.direction, out, self._terms, costs_of(self.device), waits)
            self._picks[key] = picked
        return picked

    def _waiting(self, rows: bool, host: bool, clean: bool) -> frozenset[str]:
        """Return the strategies that would wait for a device.

        ``rows`` and ``host``: the host knows the addresses and ids of the device's rows, and of its
        own. ``clean``: the ids need no guard; a strategy without a guard reads other ids back.
        """
        if rows and host:
            return _NONE
        known = {"none": True, "host": host, "both": rows and host}
        # Another thread may remove a strategy meanwhile.
        strategies = tuple(self.strategies.items())
        return frozenset(
            name
            for name, strategy in strategies
            if not known[strategy.reads] or not (clean or strategy.capabilities().guards)
        )

    def again(self, src: KVView, dst: KVView, src_index: Index, dst_index: Index) -> Again | None:
        """See `base.Repeatable`. The strategy of this thread's last transfer repeats it."""
        repeat = getattr(self._launches.get(self._last.carried[0]), "again", None)
        return None if repeat is None else repeat(src, dst, src_index, dst_index)

    def claims(self, move: Move) -> Capabilities:
        """Return the capabilities of the strategy that a transfer takes; raise as the function
        `pick` does."""
        if capturing(self.device):  # nothing can be prepared now, and that must disable no strategy
            return self._host.capabilities()
        return self.strategies[self._pick_prepared(move).strategy].capabilities()

    def _pick_prepared(self, move: Move, guarded: bool = False) -> Pick:
        """Pick as `pick` does, and prepare the strategy."""
        picked = self.pick(move, guarded)
        while self.prepared(picked.strategy) is None:  # refused just now: pick another strategy
            picked = self.pick(move, guarded)
        return picked

    def launch_by(
        self,
        strategy: str,
        move: Move,
        stream: torch.Stream | None,
        status: torch.Tensor | None = None,
    ) -> Pending | None:
        """Copy by one strategy, even if another one would be picked.

        Raises:
            Unsupported: the strategy does not take the plan.
        """
        launch = self.prepared(strategy)
        if launch is None:
            why = self.out.get(strategy, "no strategy has that name")
            raise Unsupported(f"A copy by the strategy {strategy!r}", why)
        return launch(*self._placed(strategy, move, stream), stream, status)

    def enqueue(
        self, move: Move, stream: torch.Stream | None, status: torch.Tensor | None
    ) -> Pending | None:
        picked = self._pick_prepared(move)
        if status is not None and not self.strategies[picked.strategy].capabilities().guards:
            # `claims` reported a strategy that guards; since then another thread read the ids back.
            picked = self._pick_prepared(move, guarded=True)
        strategy = picked.strategy
        why = picked.why
        try:
            pending = self.launch_by(strategy, move, stream, status)
        except torch.OutOfMemoryError:
            # The device has no space for staging. The other strategies need none, and may move rows
            # once more. None replaces `zero_copy`, the only strategy that skips and guards ids.
            able = [name for name in _UNSTAGED if self.prepared(name)]
            if not able or strategy in _UNSTAGED:
                raise
            why = f"{strategy} was picked ({why}), but the device had no memory left for it"
            strategy = able[0]
            pending = self.launch_by(strategy, move, stream, status)
        self._host.log(strategy, why)
        self._last.carried = strategy, why
        return pending

    @property
    def carried(self) -> tuple[str, str] | None:
        """Return the strategy of this thread's last transfer, and why, as a phrase. None before the
        first transfer."""
        return getattr(self._last, "carried", None)

    def prepared(self, name: str) -> Launch | None:
        """Return the launch of a strategy, prepared at its first use. None: it cannot be
        prepared."""
        launch = self._launches.get(name)
        if launch is not None or name not in self.strategies:
            return launch
        with self._lock:
            if name in self.strategies and name not in self._launches:
                launch, decision = prepare_by(self.strategies[name], self.plan)
                if launch is None:
                    self.out = {**self.out, name: decision.reason}
                    del self.strategies[name]
                else:
                    self._launches[name] = launch
            return self._launches.get(name)

    def _placed(self, name: str, move: Move, stream: torch.Stream | None) -> Move:
        """Return the copy with the ids of both sides where a strategy reads them."""
        can = self.strategies[name].capabilities()
        if can.index_on == "any":
            return move
        ids_device = can.home_of_ids(self.device)
        dtypes = can.index_dtypes
        # The next layer of a detached copy may be read on a stream that waits for no other.
        separate = stream is not None and self._terms.detached
        with inside(None if separate else stream):
            bring((move.src_index, move.dst_index), ids_device, dtypes)
            src_index, dst_index = (
                index if index.ids is None else index.placed(ids_device, dtypes)
                for index in move[2:4]
            )
        if stream is not None and separate:
            stream.wait_stream(torch.accelerator.current_stream(self.device.index))
        return move._replace(
            src_index=read_on(stream, src_index), dst_index=read_on(stream, dst_index)
        )


#: Strategies by the backend that they run over, and by terms without a rate.
hosts: Bounded[tuple[Choice, Terms], Choice] = Bounded("strategies across the link", 64)


def across(half: Choice, terms: Terms | None = None) -> Choice:
    """Return the strategy ``host`` over a device's backend and under a caller's terms; or the
    strategy that the caller named. All rates share one strategy.

    Raises:
        BackendUnavailable: its self-check failed on this device.
    """
    key = half, (terms or _NO_TERMS).without_rate
    known = hosts.get(key)
    if known is not None:
        return known
    device = half.backend.device
    if isinstance(half.backend, Strategy):
        if key[1] == _NO_TERMS:
            return half
        named = type(half.backend)(device, None, key[1])
        return hosts.setdefault(key, Choice(named, half.trace, half.forced, named.capabilities()))
    backend, decision = REGISTRY.ask(Host.name, device, check=True)
    if backend is None:
        raise BackendUnavailable(
            f"Expected a transfer strategy for copies between {device} and the host, got none: "
            f"{decision.reason}. Copy through a tensor on the device."
        )
    strategy = Host(device, *key)
    made = Choice(strategy, (*half.trace, decision), False, strategy.capabilities())
    return hosts.setdefault(key, made)
