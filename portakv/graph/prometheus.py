# SPDX-License-Identifier: Apache-2.0
"""The figures of a graph or a block store for Prometheus, whose server is the caller's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from portakv.arguments import invalid
from portakv.errors import Unsupported

KINDS = {"total": "counter", "bucket": "histogram", "sum": "histogram", "count": "histogram"}


class Collector:
    """What ``prometheus_client.REGISTRY.register`` takes, once; ``source`` has ``statistics()`` as
    `Graph` has it. Of several, each is named and its figures have the label ``store``:
    ``Collector(a=store, b=another)``. Raises `Unsupported` if the package is not installed."""

    def __init__(self, source: Any = None, /, **stores: Any) -> None:
        sources = stores if source is None else {"source": source, **stores}
        for name, one in sources.items():
            if not callable(getattr(one, "statistics", None)):
                raise invalid(name, "a Graph or a BlockStore", one)
        try:
            from prometheus_client.core import Metric
        except ImportError as error:
            raise Unsupported("Figures for Prometheus", "install portakv[metrics]") from error
        self.metric = Metric
        self.sources = [({"store": x}, y) for x, y in stores.items()]
        if source is not None:
            self.sources.append(({}, source))

    def collect(self) -> Iterator[Any]:
        """Each family of figures, as they are now."""
        families: dict[str, Any] = {}
        told = [(store, *each) for store, x in self.sources for each in x.statistics().items()]
        for store, name, samples in told:
            front, _, end = f"portakv_{name}".rpartition("_")
            family, kind = (front, KINDS[end]) if end in KINDS else (f"portakv_{name}", "gauge")
            for sample in samples:
                if "value" in sample:  # else it is for people
                    labels = store | {x: y for x, y in sample.items() if x != "value"}
                    metric = families.setdefault(family, self.metric(family, family, kind))
                    metric.add_sample(f"portakv_{name}", labels, float(sample["value"]))
        yield from families.values()
