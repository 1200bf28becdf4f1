# SPDX-License-Identifier: Apache-2.0
"""Warn operators of faults that last: dying, full or lost disks, refused buckets, sick links,
unused leases.

A warning says what to do. It comes when the fault begins or grows, and again each hour while it
lasts. Single faults, such as a block that cannot be read, are logged where they occur.

Owners, block stores and servers call `watch` when they open. One coroutine of the process
looks at all of them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import NamedTuple, TypeAlias
from weakref import WeakKeyDictionary, proxy

from portakv.errors import PortaKVError
from portakv.graph.meter import Meter, Sample, Source
from portakv.runtime.interrupts import uninterrupted
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.tasks import Wait, Work, runtime

_logger = logging.getLogger(__name__)
#: Seconds between two looks.
LOOK = 10.0
#: Seconds after which a fault that lasts is logged again.
AGAIN = 3600.0
#: Seconds from which a wait is a fault.
WAIT = 30.0
LEASE = 60.0
#: The labels of a sample, and its value or how much that has grown.
Labelled: TypeAlias = tuple[Mapping[str, str], float]


class Rule(NamedTuple):
    """A fault, and what to do about it.

    Attributes:
        metric: its name in `portakv.graph.meter`.
        labels: of the samples that count.
        above: the value from which it is a fault.
        grows: the value is a counter: the fault is that it has grown by more than ``above`` since
            the last look, while the counter with the labels ``unless`` has not.
        text: with the labels of the sample and its ``value``.
    """

    name: str
    metric: str
    above: float
    text: str
    labels: Mapping[str, str] = {}
    grows: bool = False
    unless: Mapping[str, str] = {}


RULES = (
    Rule(
        "a dying disk",
        "disk_slots",
        0.0,
        "The device of {folder} could not write {value:.0f} slots, which are not used again. It "
        "may be dying: look at dmesg and smartctl, and serve a folder on another device.",
        {"state": "broken"},
    ),
    Rule(
        "a full disk",
        "disk_missing_slots",
        0.0,
        "The file system of {folder} is full: {value:.0f} slots of the capacity have no space, so "
        "blocks are evicted early or not stored. Free space there, or lower the capacity; "
        "`BlockStore.explain` and the log have the figures.",
    ),
    Rule(
        "a lost folder",
        "disk_lost",
        0.0,
        "The files of {folder} were removed, moved or hidden by a mount while a store has them "
        "open. Nothing is stored there any more, and the stored blocks end with the process. "
        "Restore the folder, or restart what serves it.",
    ),
    Rule(
        "a refused bucket",
        "remote_left_alone",
        0.0,
        "{url} gets no requests for a while, after failures in a row. Check that this host reaches "
        "it, and that its credentials and its region are right; the log has the last error. Blocks "
        "stay in the other tiers meanwhile.",
    ),
    Rule(
        "a sick link",
        "queue_slow",
        0.0,
        "A task of {queue} runs much longer than such tasks should, so no background work begins "
        "there. Check the device or the mount that it uses: dmesg, iostat, and the network of a "
        "remote file system.",
    ),
    Rule(
        "a link that is too slow",
        "queue_oldest_seconds",
        WAIT,
        "A task has waited {value:.0f} s for {queue}. The link has more to do than it can: lower "
        "the load, set a deadline for loads, or use a faster device.",
    ),
    Rule(
        "a lease that does not end",
        "keeper_oldest_lease_seconds",
        LEASE,
        "Rows of the store have been lent to a rank of an engine for {value:.0f} s. The rank may "
        "hang: look at its log and its stack (py-spy), or end its process, which gives the rows "
        "back.",
    ),
    Rule(
        "leases that are never renewed",
        "offers_ended_total",
        0.0,
        "{value:.0f} offers have expired, and no reader has taken one. Check that tickets reach "
        "readers, and that readers reach the address in them; pass a longer lease if they come "
        "later.",
        {"state": "expired"},
        grows=True,
        unless={"state": "taken"},
    ),
)


class Alarms:
    """Looks at the figures of sources now and then, and logs faults that last.

    Call `look` often; it does nothing before its time. One thread at a time uses it. `watch` does
    both for what this library opens; this class is for other sources.

    Args:
        sources, stores: as those of `Meter`.
        clock: returns seconds.
        log: limits the lines; None: a limit for these sources alone.
        new: the sources have just opened, so all that they count is news.
    """

    def __init__(
        self,
        *sources: Source,
        clock: Callable[[], float] = time.monotonic,
        log: RateLimitedLog | None = None,
        new: bool = False,
        **stores: Source,
    ) -> None:
        self._meter = Meter(*sources, **stores)
        self._clock = clock
        self._log = RateLimitedLog(_logger, clock) if log is None else log
        self._new = new
        self._due = clock()
        # By rule and labels: the faults at the last look, with their values and when they were
        # logged, and the counters at the last look.
        self._faults = dict[tuple[str, str], tuple[float, float]]()
        self._counted = dict[tuple[str, str], float]()

    def look(self) -> None:
        """Log what has begun or grown since the last look, `LOOK` seconds after that."""
        now = self._clock()
        if now < self._due:
            return
        self._due = now + LOOK
        samples_of = {family.name: family.samples for family in self._meter.families()}
        faults = dict[tuple[str, str], tuple[float, float]]()
        for rule in RULES:
            samples = samples_of.get(rule.metric, [])
            values = _with_labels(rule.labels, samples)
            if rule.grows:
                values = self._grown(rule, values)
                others = self._grown(rule, _with_labels(rule.unless, samples))
                if any(value for _, value in others):
                    continue
            for labels, value in values:
                if value > rule.above:
                    key = rule.name, _text_of(labels)
                    faults[key] = value, self._warn(rule, key, labels, value, now)
        self._faults = faults

    def _grown(self, rule: Rule, values: Iterable[Labelled]) -> list[Labelled]:
        """Return how much counters have grown since the last look."""
        grown = list[Labelled]()
        for labels, value in values:
            key = rule.name, _text_of(labels)
            before = self._counted.get(key, 0.0 if self._new else value)
            self._counted[key] = value
            grown.append((labels, value - before))
        return grown

    def _warn(
        self, rule: Rule, key: tuple[str, str], labels: Mapping[str, str], value: float, now: float
    ) -> float:
        """Log a fault, unless it was logged and is no worse; return when it was."""
        if key in self._faults:
            before, at = self._faults[key]
            worse = rule.metric == "disk_slots" and value > before
            if not worse and now < at + AGAIN:
                return at
        text = rule.text.format(value=value, **labels)
        self._log.warning(" ".join(key), "%s", text, lines=1)
        return now


class Watch:
    """Looks at the sources of a process that are open, by one coroutine.

    Args:
        clock: returns seconds.

    Attributes:
        runtime: of the process.
        watched: the sources, each with what looks at it.
        running: a look is to come; False while there are no sources.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._log = RateLimitedLog(_logger, clock)
        self.runtime = runtime()
        self.watched = WeakKeyDictionary[Source, Alarms]()
        self.running = False

    def add(self, source: Source) -> None:
        """Look at a source that has just opened, until it is gone."""
        alarms = Alarms(proxy(source), clock=self._clock, log=self._log, new=True)
        with self.runtime.lock:
            self.watched[source] = alarms
            if not self.running:
                # The system may give no more threads or descriptors: the next call tries.
                with suppress(PortaKVError, OSError):
                    self._begin()

    def _begin(self) -> None:
        """Have the next look made, if there are sources. Runs with the runtime's lock."""
        running = bool(self.watched)
        if running:
            self.runtime.start(self._run())
        self.running = running

    async def _run(self) -> None:
        """Make one look, so that the end of the interpreter waits for no later one."""
        await Wait(until=self.runtime.time() + LOOK)
        await Work(self.look)
        self._begin()

    def look(self) -> None:
        """Look at all sources whose time has come."""
        with self.runtime.lock:
            watched = dict(self.watched.items())  # no source ends in this look
        if _logger.isEnabledFor(logging.WARNING):
            for alarms in watched.values():
                try:
                    alarms.look()
                except Exception as error:  # figures of one source must not stop the others'
                    text = "The figures of a store or an owner cannot be read, so no warning of it "
                    text += "comes: %r. Report it with the packages whose tiers it has."
                    self._log.warning("figures", text, error, lines=1)


def watch(source: Source) -> None:
    """Warn of faults of a source that lasts, from a thread of this process.

    The source is not kept alive. In a forked process, sources that were opened before the fork are
    not watched.

    Args:
        source: has just opened; its figures may be read in any thread.

    Raises `InvalidTerms` for an object without figures.
    """
    global here
    if here.runtime.process.forked:
        here = Watch()
    uninterrupted(partial(here.add, source))


#: The watch of this process.
here = Watch()


def _with_labels(labels: Mapping[str, str], samples: Iterable[Sample]) -> list[Labelled]:
    """Return the values of the samples that have labels."""
    return [(x.labels, x.value) for x in samples if labels.items() <= x.labels.items()]


def _text_of(labels: Mapping[str, str]) -> str:
    return " ".join(f"{name}={text}" for name, text in sorted(labels.items()))
