# SPDX-License-Identifier: Apache-2.0
"""The figures of a graph or a block store for Prometheus, whose server is the caller's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from portakv.errors import Unsupported

KINDS = {"total": "counter", "bucket": "histogram", "sum": "histogram", "count": "histogram"}


class Collector:
    """What ``prometheus_client.REGISTRY.register`` takes; ``source`` has ``statistics()`` as
    `Graph` has it. Raises `Unsupported` if the package is not installed."""

    def __init__(self, source: Any) -> None:
        try:
            from prometheus_client.core import Metric
        except ImportError as error:
            raise Unsupported("Figures for Prometheus", "install portakv[metrics]") from error
        self.source, self.metric = source, Metric

    def collect(self) -> Iterator[Any]:
        """Each family of figures, as they are now."""
        families: dict[str, Any] = {}
        for name, samples in self.source.statistics().items():
            front, _, end = f"portakv_{name}".rpartition("_")
            family, kind = (front, KINDS[end]) if end in KINDS else (f"portakv_{name}", "gauge")
            for sample in samples:
                if "value" in sample:  # else it is for people
                    labels = {x: y for x, y in sample.items() if x != "value"}
                    metric = families.setdefault(family, self.metric(family, family, kind))
                    metric.add_sample(f"portakv_{name}", labels, float(sample["value"]))
        yield from families.values()
