# SPDX-License-Identifier: Apache-2.0
"""Report the figures of a graph or a block store to Prometheus; the caller runs the server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from portakv.arguments import invalid
from portakv.errors import Unsupported
from portakv.extras import installing
from portakv.graph.trace import Figures

if TYPE_CHECKING:
    from prometheus_client.core import Metric

KINDS = {"total": "counter", "bucket": "histogram", "sum": "histogram", "count": "histogram"}


class Source(Protocol):
    """A `Graph`, a `BlockStore`, or an object with figures of the same form."""

    def statistics(self) -> Figures:
        """Return figures by name."""


class Collector:
    """A collector for ``prometheus_client.REGISTRY.register``.

    ``source`` has ``statistics()`` as `Graph` has it. Several sources are named, and their figures
    have the label ``store``: ``Collector(a=store, b=another)``. Raises `Unsupported` if the package
    is not installed.
    """

    def __init__(self, source: Source | None = None, /, **stores: Source) -> None:
        sources = stores if source is None else {"source": source, **stores}
        for name, one in sources.items():
            if not callable(getattr(one, "statistics", None)):
                raise invalid(name, "a Graph or a BlockStore", one)
        try:
            from prometheus_client.core import Metric
        except ImportError as error:
            why = f"they need prometheus_client; {installing('metrics')} brings it"
            raise Unsupported("Figures for Prometheus", why) from error
        self.metric = Metric
        self.sources: list[tuple[dict[str, str], Source]] = [
            ({"store": name}, store) for name, store in stores.items()
        ]
        if source is not None:
            self.sources.append(({}, source))

    def collect(self) -> Iterator[Metric]:
        """Yield each family of figures, as they are now."""
        families: dict[str, Metric] = {}
        samples_of = [
            (store, *each) for store, x in self.sources for each in x.statistics().items()
        ]
        for store, name, samples in samples_of:
            front, _, end = f"portakv_{name}".rpartition("_")
            family, kind = (front, KINDS[end]) if end in KINDS else (f"portakv_{name}", "gauge")
            for sample in samples:
                if "value" in sample:  # a sample without a value is for people
                    labels = store | {x: str(y) for x, y in sample.items() if x != "value"}
                    metric = families.setdefault(family, self.metric(family, family, kind))
                    metric.add_sample(f"portakv_{name}", labels, float(sample["value"]))
        yield from families.values()
