# SPDX-License-Identifier: Apache-2.0
"""The figures of the connector for vLLM's log and for Prometheus.

A release of vLLM without these hooks has the connector without them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

try:
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
        KVConnectorPromMetrics,
        KVConnectorStats,
    )
except ImportError:  # a release without figures of connectors
    KVConnectorPromMetrics = KVConnectorStats = object
    SUPPORTED = False
else:
    SUPPORTED = True

#: Seconds between two reports of figures.
INTERVAL = 1.0
#: The counters, and what each counts.
COUNTERS = {
    "promised": "Tokens that the scheduler was offered from the store",
    "loads": "Loads of requests",
    "failed_loads": "Loads that did not bring all blocks",
    "landed_blocks": "Stored blocks that loads have brought",
    "landed_bytes": "Bytes that loads have brought",
    "saves": "Saves of requests",
    "stored_blocks": "Blocks that saves have stored",
    "stored_bytes": "Bytes that saves have stored",
    "offers": "Prompts whose rows were offered to other engines",
    "offers_taken": "Offers of workers that another engine has taken",
    "offers_expired": "Offers of workers that no engine took before the end of their lease",
    "pulls": "Prompts whose rows were pulled from other engines",
    "failed_pulls": "Pulls that did not bring all rows",
    "pulled_tokens": "Tokens whose rows pulls have brought",
    "unanswered": "Lookups that another host did not answer in time",
    "steps": "Steps of the engine, once for its scheduler and once for each worker",
    "hook_seconds": "Seconds that each hook of the connector took",
    "idle_steps": "Steps without work for the connector",
    "idle_hook_seconds": "Seconds that each hook of the connector took in steps without work",
}
#: The labels of counters, whose values come after their names, after slashes.
LABELS = {
    "steps": ("side",),
    "hook_seconds": ("side", "hook"),
    "idle_steps": ("side",),
    "idle_hook_seconds": ("side", "hook"),
}


class Figures:
    """Counters of one process of an engine, reported as what they have grown by.

    Args:
        interval: seconds between two reports.
        now: returns the time in seconds.
    """

    def __init__(
        self, interval: float = INTERVAL, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._interval = interval
        self._now = now
        self._due = now() + interval
        self._reported = dict[str, float]()

    def take(self, read: Callable[[], Mapping[str, float]]) -> dict[str, float]:
        """Return how much each counter has grown since the last report; empty before its time."""
        now = self._now()
        if now < self._due:
            return {}
        self._due = now + self._interval
        grown = dict[str, float]()
        for name, value in read().items():
            counted = name.partition("/")[0] in COUNTERS
            if counted and value != self._reported.get(name, 0):
                grown[name] = value - self._reported.get(name, 0)
                self._reported[name] = value
        return grown


class PortaKVStats(KVConnectorStats):  # type: ignore[misc]
    """Counters by their names in `COUNTERS` and the values of their labels, which workers and the
    scheduler add up."""

    data: dict[str, float]

    def reset(self) -> None:
        """Forget all."""
        self.data = {}

    def aggregate(self, other: Any) -> PortaKVStats:
        """Add the counters of another process, or of a later time."""
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, float]:
        """Return the figures of vLLM's log: of a counter with labels, the sum."""
        sums = dict[str, float]()
        for name, value in self.data.items():
            counter = name.partition("/")[0]
            sums[counter] = sums.get(counter, 0) + value
        return {name: round(value, 6) for name, value in sums.items()}

    def is_empty(self) -> bool:
        """Return whether nothing has grown."""
        return not self.data


class PortaKVPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """Counts for Prometheus what engines report."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Mapping[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: Mapping[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._values = per_engine_labelvalues
        self._counters = dict[str, Any]()
        for name, what in COUNTERS.items():
            more = LABELS.get(name, ())
            counter = self._counter_cls(
                name=f"vllm:portakv_{name}",
                documentation=f"{what}.",
                labelnames=[*labelnames, *more],
            )
            self._counters[name] = counter
            for values in per_engine_labelvalues.values() if not more else ():
                counter.labels(*values)  # shown as 0

    def observe(self, transfer_stats_data: Mapping[str, float], engine_idx: int = 0) -> None:
        """Count what an engine reports."""
        for name, grown in transfer_stats_data.items():
            counter, *more = name.split("/")
            if counter in self._counters:
                values = self._values[engine_idx]
                self._counters[counter].labels(*values, *more).inc(grown)


def stats_of(grown: Mapping[str, float]) -> PortaKVStats | None:
    """Return vLLM's object for counters; None if its release has none, or nothing has grown."""
    return PortaKVStats(data=dict(grown)) if SUPPORTED and grown else None
