# SPDX-License-Identifier: Apache-2.0
"""Warn operators of faults that last: dying disks, refused buckets, sick links, unused leases.

A warning says what to do. It comes when the fault begins or grows, and again each hour while it
lasts. Single faults, such as a block that cannot be read, are logged where they occur.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from portakv.graph.meter import Family, Meter, Metered, Sample, Source
from portakv.runtime.rate_limited_log import RateLimitedLog

_logger = logging.getLogger(__name__)
#: Seconds between two looks.
LOOK = 10.0
#: Seconds after which a fault that lasts is logged again.
AGAIN = 3600.0
#: Seconds from which a wait is a fault.
WAIT = 30.0
LEASE = 60.0


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

    Call `look` often; it does nothing before its time. One thread at a time uses it. A keeper has
    one.

    Args:
        sources, stores: as those of `Meter`.
        clock: returns seconds.
    """

    def __init__(
        self,
        *sources: Source | Metered,
        clock: Callable[[], float] = time.monotonic,
        **stores: Source | Metered,
    ) -> None:
        self._meter = Meter(*sources, **stores)
        self._clock = clock
        self._log = RateLimitedLog(_logger, clock)
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
        before = self._counted.get(key, sample.value)
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


def _chosen(family: Family | None, labels: Mapping[str, str]) -> list[Sample]:
    """Return the samples of a family that have labels."""
    samples = [] if family is None else family.samples
    return [each for each in samples if labels.items() <= each.labels.items()]


def _text_of(sample: Sample) -> str:
    return " ".join(f"{name}={text}" for name, text in sorted(sample.labels.items()))
