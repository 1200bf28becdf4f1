# SPDX-License-Identifier: Apache-2.0
"""The figures of a graph or a block store for Prometheus, whose server is the caller's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from portakv.errors import Unsupported

KINDS = {"total": "counter", "bucket": "histogram", "sum": "histogram", "count": "histogram"}


class Collector:
    """What ``prometheus_client.REGISTRY.register`` takes; ``source`` is a graph, a block store, or
    what else has ``statistics()`` as `Graph` has it. Raises `Unsupported` without the package."""

    def __init__(self, source: Any) -> None:
        try:
            from prometheus_client.core import Metric
        except ImportError:
            why = "prometheus_client is not installed; install portakv[metrics]"
            raise Unsupported("Figures for Prometheus", why) from None
        self._source, self._metric = source, Metric

    def collect(self) -> Iterator[Any]:
        """Each family of figures, as they are now."""
        families: dict[str, Any] = {}
        for name, samples in self._source.statistics().items():
            front, _, end = name.rpartition("_")
            name, family = f"portakv_{name}", f"portakv_{front if end in KINDS else name}"
            if family not in families:
                told = family.replace("_", " ")
                families[family] = self._metric(family, told, KINDS.get(end, "gauge"))
            for labels in samples:
                value = labels.pop("value")
                families[family].add_sample(name, labels, float(value))
        yield from families.values()
