# SPDX-License-Identifier: Apache-2.0
"""The figures of owners, readers, channels and weights for `portakv.graph.meter`.

They are those of ``statistics()`` of each object, by the names of the metrics, and what readers and
pulls of weights count at the end of each pull.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping
from time import perf_counter
from typing import TypeVar

from portakv.graph.meter import by_label
from portakv.graph.trace import Figures as Figures
from portakv.graph.trace import Spent
from portakv.runtime import tracing
from portakv.runtime.tracing import Began
from portakv.tasks import runtime

T = TypeVar("T")

_ENDS = ("taken", "expired", "revoked", "lost")
_NOT_EVENTS = ("peers", "links", "kept_bytes")


def owner_figures(counts: Mapping[str, int]) -> Figures:
    """Return the figures of an owner from its statistics, in the form of `Graph.statistics`."""
    handshakes = {"accepted": counts.get("paired", 0), "refused": counts.get("refused", 0)}
    reports = {
        "taken": counts.get("closed", 0),
        "failed": counts.get("failed", 0),
        "gone": counts.get("gone", 0),
    }
    return {
        "offers_active": [{"value": counts["held"]}],
        "offers_total": [{"value": counts.get("offered", 0)}],
        "offers_ended_total": by_label("state", counts, _ENDS),
        "offer_handshakes_total": by_label("result", handshakes, handshakes),
        "offer_reports_total": by_label("result", reports, reports),
        "offer_staging_buffers": [{"value": counts["slots"]}],
    }


def channel_figures(counts: Mapping[str, int]) -> Figures:
    """Return the figures of a channel from its statistics, in the form of `Graph.statistics`."""
    events = [name for name in counts if name not in _NOT_EVENTS]
    return {
        "channel_peers": [{"value": counts["peers"]}],
        "channel_links": [{"value": counts["links"]}],
        "channel_answers_bytes": [{"value": counts["kept_bytes"]}],
        "channel_events_total": by_label("event", counts, events),
    }


def published_figures(counts: Mapping[str, int]) -> Figures:
    """Return the figures of published weights from their statistics, in the form of
    `Graph.statistics`."""
    return {
        "weight_lanes": [{"value": counts["lanes"]}],
        "weight_staging_bytes": [{"value": counts["staging"]}],
    }


def _histograms(name: str, spent: Mapping[str, Spent]) -> Figures:
    """Return the seconds of work by its result, in the form of `Graph.statistics`."""
    figures: Figures = {}
    for result, seconds in [*spent.items()]:
        for series, samples in seconds.samples(name, {"result": result}).items():
            figures.setdefault(series, []).extend(samples)
    return figures


class PullCounts:
    """What pulls of rows have brought, counted by the one thread that sees their ends."""

    def __init__(self) -> None:
        self.ends = Counter[str]()  # by result
        self._nbytes = Counter[str]()  # by strategy
        self._spent = defaultdict[str, Spent](Spent)  # by result

    def add(self, strategy: str, nbytes: int, committed: bool, seconds: float) -> None:
        """Count a pull that has ended."""
        if committed:
            self._nbytes[strategy] += nbytes
        result = "committed" if committed else "failed"
        self.ends[result] += 1
        self._spent[result].add(seconds)

    def figures(self) -> Figures:
        """Return the bytes and the seconds, in the form of `Graph.statistics`."""
        counts = dict([*self._nbytes.items()])
        return {
            "pull_bytes_total": by_label("strategy", counts, counts),
            **_histograms("pull_seconds", self._spent),
        }


class WeightCounts:
    """What pulls of weights have brought to this process."""

    def __init__(self) -> None:
        self._nbytes = 0
        self._spent = {"done": Spent(), "failed": Spent()}

    async def pull(self, began: Began, work: Callable[[T], Awaitable[int]], request: T) -> int:
        """Return the bytes of a pull, which a coroutine makes, and count it."""
        start = perf_counter()
        nbytes = 0
        result = "failed"
        try:
            nbytes = await work(request)
            result = "done"
        finally:
            self._nbytes += nbytes
            self._spent[result].add(perf_counter() - start)
            error = sys.exc_info()[1]
            with runtime().released():
                tracing.end("portakv weights", began, {"pull.size": nbytes}, error)
        return nbytes

    def figures(self) -> Figures:
        """Return the bytes and the seconds, in the form of `Graph.statistics`."""
        with runtime().lock:
            return {
                "weight_bytes_total": [{"value": self._nbytes}],
                **_histograms("weight_pull_seconds", self._spent),
            }


#: Those of this process.
WEIGHTS = WeightCounts()


def count_weights() -> WeightCounts:
    """Return what the pulls of weights of this process have brought, for `Collector` and
    `observe`."""
    return WEIGHTS
