# SPDX-License-Identifier: Apache-2.0
"""The figures of the connector for vLLM's log and for Prometheus.

A release of vLLM without these hooks has the connector without them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from portakv.graph.meter import DISK, ENGINE, METRICS, Metric
from portakv.runtime import tracing

try:
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
        KVConnectorPromMetrics as KVConnectorPromMetrics,
    )
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
        KVConnectorStats as KVConnectorStats,
    )
except ImportError:  # a release without figures of connectors
    KVConnectorPromMetrics = KVConnectorStats = object
    SUPPORTED = False
else:
    SUPPORTED = True

#: Seconds between two reports of figures.
INTERVAL = 1.0


# A tier's histogram of seconds is two counters here.
_SECONDS = METRICS["tier_seconds"]._replace(name="tier_seconds_total", kind="counter", unit="s")
_TASKS = _SECONDS._replace(name="tier_tasks_total", unit="1", why="tasks of a tier that ran")
#: The figures of a store that processes of an engine report, by the names of their reports: each
#: the name of the figure, and its metric.
TIERS = {
    **{
        name: (f"{name}_total", METRICS[f"{name}_total"])
        for name in ("tier_blocks", "tier_bytes", "tier_wait_seconds")
    },
    "tier_seconds": ("tier_seconds_sum", _SECONDS),
    "tier_tasks": ("tier_seconds_count", _TASKS),
}
#: Levels of disks are reported as what they have changed by. Free bytes are left out: other
#: programs change them all the time, and vLLM logs a line for each change.
DISKS = {name: (metric.name, metric) for name, metric in DISK.items() if name != "disk_free"}
STORE = TIERS | DISKS
#: All counters and levels for Prometheus, by the names under which processes of an engine report
#: them. The values of labels come after the names, after slashes.
REPORTED = ENGINE | {name: metric for name, (_, metric) in STORE.items()}


def _witness(name: str, why: str, unit: str = "{block}", *labels: str) -> Metric:
    total = f"witness_{name}_total"
    return Metric(total, "counter", f"witness.{name}", unit, labels, why)


#: What the witness of another connector's loads counts, likewise.
WITNESS = {
    "witness_fingerprints": _witness("fingerprints", "blocks whose fingerprints were taken"),
    "witness_compared": _witness("compared", "loaded blocks that were compared"),
    "witness_unknown": _witness("unknown", "loaded blocks without a known fingerprint"),
    "witness_older": _witness("older", "loaded blocks that equal an older version of theirs"),
    "witness_dropped": _witness("dropped", "fingerprints that newer ones evicted"),
    "witness_left_out": _witness(
        "left_out",
        "requests whose loads were left out, as vLLM would retain a wrong token",
        "{request}",
    ),
    "witness_faults": _witness("faults", "loaded blocks with wrong rows", "{block}", "kind"),
}


class Figures:
    """Counters of one process of an engine, reported as what they have grown by.

    Args:
        interval: seconds between two reports.
        now: returns the time in seconds.
        metrics: the counters and levels that are reported, by their names.
    """

    def __init__(
        self,
        interval: float = INTERVAL,
        now: Callable[[], float] = time.monotonic,
        metrics: Mapping[str, Metric] = REPORTED,
    ) -> None:
        self._metrics = metrics
        self._interval = interval
        self._now = now
        self._due = now() + interval
        self._reported = dict[str, float]()

    def take(self, read: Callable[[], Mapping[str, float]]) -> dict[str, float]:
        """Return how much each counter has grown, and each level has changed, since the last
        report; empty before its time."""
        now = self._now()
        if now < self._due:
            return {}
        self._due = now + self._interval
        grown = dict[str, float]()
        present = read()
        for name in {**self._reported, **present}:
            metric = self._metrics.get(name.partition("/")[0])
            if metric is None:
                continue
            is_level = metric.kind == "gauge"
            before = self._reported.get(name, 0)
            # A level of a store that closed is 0; a counter that is not read stays.
            value = present.get(name, 0 if is_level else before)
            if value != before:
                # A store that another process had meanwhile begins to count at 0 again.
                begins = value < before and not is_level
                grown[name] = value if begins else value - before
                self._reported[name] = value
        return grown


class PortaKVStats(KVConnectorStats):  # type: ignore[misc]
    """Counters and levels by their names in `REPORTED` and the values of their labels, which
    workers and the scheduler add up."""

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
        """Return the figures of vLLM's log: of a counter with labels, the sum. Those whose sums
        mean nothing are left out: of tiers, which mix hits and misses, of disks, which are changes,
        and of steps by their time.
        """
        sums = dict[str, float]()
        for name, value in self.data.items():
            counter = name.partition("/")[0]
            if counter not in STORE and counter != "idle_steps_within":
                sums[counter] = sums.get(counter, 0) + value
        return {name: round(value, 6) for name, value in sums.items()}

    def is_empty(self) -> bool:
        """Return whether nothing has grown."""
        return not self.data


class PortaKVPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """Counts for Prometheus what engines report: ``metrics``, by their names."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Mapping[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: Mapping[int, list[object]],
        metrics: Mapping[str, Metric] = REPORTED,
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._metrics = metrics
        self._values = per_engine_labelvalues
        self._series = dict[str, Any]()
        self._levels = dict[tuple[int, str], float]()  # by engine, and by name with labels
        for name, metric in metrics.items():
            # vLLM's client adds _total.
            shown = metric.name.removeprefix("engine_").removesuffix("_total")
            terms: dict[str, Any] = {
                "name": f"vllm:portakv_{shown}",
                "documentation": f"{metric.why[0].upper()}{metric.why[1:]}.",
                "labelnames": [*labelnames, *metric.labels],
            }
            if metric.kind == "gauge":
                # Each server of an API hears a part of the changes, so the sum of all is the level.
                self._series[name] = self._gauge_cls(**terms, multiprocess_mode="sum")
                continue
            counter = self._series[name] = self._counter_cls(**terms)
            for values in per_engine_labelvalues.values() if not metric.labels else ():
                counter.labels(*values)  # shown as 0

    def observe(self, transfer_stats_data: Mapping[str, float], engine_idx: int = 0) -> None:
        """Count what an engine reports."""
        values = self._values[engine_idx]
        for name, grown in transfer_stats_data.items():
            counter, more = series_of(name, self._metrics)
            if counter not in self._metrics:
                continue
            series = self._series[counter].labels(*values, *more)
            if self._metrics[counter].kind == "counter":
                series.inc(grown)
            else:
                key = engine_idx, name
                self._levels[key] = self._levels.get(key, 0.0) + grown
                series.set(self._levels[key])


def series_of(name: str, metrics: Mapping[str, Metric] = REPORTED) -> tuple[str, list[str]]:
    """Return the name of a counter or a level, and the values of its labels, from the name of its
    report. The last value may be a path, which has slashes as well."""
    counter, _, texts = name.partition("/")
    metric = metrics.get(counter)
    if metric is None or not metric.labels:
        return counter, []
    return counter, texts.split("/", len(metric.labels) - 1)


def stats_of(grown: Mapping[str, float]) -> PortaKVStats | None:
    """Return vLLM's object for counters; None if its release has none, or nothing has grown."""
    return PortaKVStats(data=dict(grown)) if SUPPORTED and grown else None


def figures_of(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the counters of tiers and the levels of disks among the figures of a store, by their
    names in `STORE` with the values of their labels after slashes.

    ``figures``: as those of `BlockStore.statistics`; empty: there is no store in this process.
    """
    values = dict[str, float]()
    for name, (figure, metric) in STORE.items():
        for sample in figures.get(figure, ()):
            labels = [str(sample[label]) for label in metric.labels]
            values["/".join([name, *labels])] = float(sample["value"])
    return values


def parent_of(request: Any) -> AbstractContextManager[None]:
    """Return what spans of a request begin in: the ``traceparent`` that came with it, if any."""
    headers = getattr(request, "trace_headers", None) or {}
    parent = headers.get("traceparent", "")
    return tracing.under(parent if re.match(tracing.PATTERN, parent) else "")
