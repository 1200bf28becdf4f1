# SPDX-License-Identifier: Apache-2.0
"""Warn operators of faults that last: dying, full or lost disks, refused buckets, sick links,
unused leases.

A warning says what to do. It comes when the fault begins or grows, and again each hour while it
lasts. Single faults, such as a block that cannot be read, are logged where they occur.

Owners, block stores and servers call `watch` when they open. One thread of the process looks at
all of them.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import NamedTuple
from weakref import ref

from portakv.graph.meter import Family, Meter, Sample, Source, figures_of
from portakv.graph.trace import Figures
from portakv.runtime.devices import this_process
from portakv.runtime.interrupts import uninterrupted
from portakv.runtime.rate_limited_log import RateLimitedLog

_logger = logging.getLogger(__name__)
#: Seconds between two looks.
LOOK = 10.0
#: Seconds after which a fault that lasts is logged again.
AGAIN = 3600.0
#: Seconds from which a wait is a fault.
WAIT = 30.0
LEASE = 60.0
#: Seconds for which the end of the interpreter waits for a look.
EXIT = 1.0


class Rule(NamedTuple):
    """A fault, and what to do about it.

    Attributes:
        metric: its name in `portakv.graph.metrics`.
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


class _Seen(NamedTuple):
    """A fault that was logged: its value, and when."""

    value: float
    at: float


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
        self._seen = dict[tuple[str, str], _Seen]()  # by rule and labels
        self._counted = dict[tuple[str, str], float]()  # of counters, at the last look

    def look(self) -> None:
        """Log what has begun or grown since the last look, `LOOK` seconds after that."""
        now = self._clock()
        if now < self._due:
            return
        self._due = now + LOOK
        families = {family.name: family for family in self._meter.families()}
        present = dict[tuple[str, str], _Seen]()
        for rule in RULES:
            family = families.get(rule.metric)
            for sample in _chosen(family, rule.labels):
                value = self._measured(rule, family, sample)
                if value > rule.above:
                    key = rule.name, _text_of(sample)
                    present[key] = self._warn(rule, sample, value, now)
        self._seen = present

    def _measured(self, rule: Rule, family: Family | None, sample: Sample) -> float:
        """Return the value that a rule compares: of a counter, how much it has grown."""
        if not rule.grows:
            return sample.value
        grown = self._grown(rule.name, sample)
        others = [self._grown(rule.name, each) for each in _chosen(family, rule.unless)]
        return 0.0 if any(others) else grown

    def _grown(self, rule: str, sample: Sample) -> float:
        """Return how much a counter has grown since the last look."""
        key = rule, _text_of(sample)
        before = self._counted.get(key, 0.0 if self._new else sample.value)
        self._counted[key] = sample.value
        return sample.value - before

    def _warn(self, rule: Rule, sample: Sample, value: float, now: float) -> _Seen:
        """Log a fault, unless it was logged and is no worse; return when it was."""
        where = _text_of(sample)
        seen = self._seen.get((rule.name, where))
        worse = seen is None or (rule.metric == "disk_slots" and value > seen.value)
        if seen is not None and not worse and now < seen.at + AGAIN:
            return seen
        text = rule.text.format(value=value, **sample.labels)
        self._log.warning(f"{rule.name} {where}", "%s", text, lines=1)
        return _Seen(value, now)


class _Weak:
    """The figures of a source that is not kept alive; none once it is gone."""

    def __init__(self, source: Source) -> None:
        self._source = ref(source)

    @property
    def gone(self) -> bool:
        """Return True once the source is gone."""
        return self._source() is None

    def figures(self) -> Figures:
        """Return the figures of the source."""
        source = self._source()
        return {} if source is None else figures_of(source)


class Watch:
    """The thread that looks at what is open in a process, each `LOOK` seconds while there is any.

    It reads nothing while warnings of this module are not logged. Any thread may call.

    Args:
        clock: returns seconds.

    Attributes:
        watched: the sources, each with what looks at it.
        thread: None while there are no sources.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.process = this_process()
        self._clock = clock
        self._log = RateLimitedLog(_logger, clock)
        self._lock = threading.Lock()
        self.watched = dict[_Weak, Alarms]()
        self._stopping = threading.Event()
        self.thread: threading.Thread | None = None

    def add(self, source: Source) -> None:
        """Look at a source that has just opened, until it is gone."""
        weak = _Weak(source)
        alarms = Alarms(weak, clock=self._clock, log=self._log, new=True)
        with self._lock:
            self.watched[weak] = alarms
            if self.thread is not None or self._stopping.is_set():
                return
            thread = threading.Thread(target=self._run, name="alarms of portakv", daemon=True)
            with suppress(RuntimeError):  # the system gives no more threads: the next call tries
                thread.start()
                self.thread = thread
                atexit.register(self.stop)

    def stop(self) -> None:
        """Stop the thread: the interpreter ends."""
        self._stopping.set()
        thread = self.thread
        if thread is not None:
            thread.join(EXIT)

    def _run(self) -> None:
        while not self._stopping.wait(LOOK):
            if not self.look():
                return

    def look(self) -> bool:
        """Look at all sources whose time has come.

        Returns False if there are no sources, so that the thread ends.
        """
        with self._lock:
            watched = {weak: each for weak, each in self.watched.items() if not weak.gone}
            self.watched = {**watched}
            if not watched:
                self.thread = None
                return False
        if _logger.isEnabledFor(logging.WARNING):
            for alarms in watched.values():
                try:
                    alarms.look()
                except Exception as error:  # figures of one source must not stop the others'
                    text = "The figures of a store or an owner cannot be read, so no warning of it "
                    text += "comes: %r. Report it with the packages whose tiers it has."
                    self._log.warning("figures", text, error, lines=1)
        return True


def watch(source: Source) -> None:
    """Warn of faults of a source that lasts, from the thread of this process.

    The source is not kept alive. In a forked process, sources that were opened before the fork are
    not watched.

    Args:
        source: has just opened; its figures may be read in any thread.

    Raises `InvalidTerms` for an object without figures.
    """
    global here
    if here.process.forked:
        here = Watch()
    uninterrupted(partial(here.add, source))


#: The watch of this process.
here = Watch()


def _chosen(family: Family | None, labels: Mapping[str, str]) -> list[Sample]:
    """Return the samples of a family that have labels."""
    samples = [] if family is None else family.samples
    return [each for each in samples if labels.items() <= each.labels.items()]


def _text_of(sample: Sample) -> str:
    return " ".join(f"{name}={text}" for name, text in sorted(sample.labels.items()))
