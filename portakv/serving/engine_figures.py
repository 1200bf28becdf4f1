# SPDX-License-Identifier: Apache-2.0
"""The figures of a door into an engine, for the metrics of `portakv.graph.metrics`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from portakv.graph.metrics import ENGINE
from portakv.graph.trace import Figures


class EngineFigures:
    """What a door counts, as a source for `Collector` and `observe`.

    Args:
        read: returns the counters by their names in `ENGINE`, with the values of their labels after
            slashes, such as ``hook_seconds/scheduler/take_events``.
    """

    def __init__(self, read: Callable[[], Mapping[str, float]]) -> None:
        self._read = read

    def figures(self) -> Figures:
        """Return figures by the names of metrics, in the form of `Graph.statistics`."""
        figures: Figures = {}
        for name, value in self._read().items():
            counter, *texts = name.split("/")
            metric = ENGINE.get(counter)
            if metric is None or len(texts) != len(metric.labels):
                continue
            labels = dict(zip(metric.labels, texts, strict=True))
            figures.setdefault(metric.name, []).append({**labels, "value": value})
        return figures
