# SPDX-License-Identifier: Apache-2.0
"""Report figures to Prometheus; the caller runs the server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from portakv.errors import Unsupported
from portakv.extras import installing
from portakv.graph.meter import PREFIX, Meter, Source

if TYPE_CHECKING:
    from prometheus_client.core import Metric


class Collector:
    """A collector for ``prometheus_client.REGISTRY.register``.

    A source is a `Graph`, a `BlockStore`, a `Reader`, an `Owner`, a `Channel`, what `publish`
    returns, or what `count_copies` and `count_weights` return. Several sources of a kind are named,
    and their figures have the label ``store``: ``Collector(a=store, b=another)``. Raises
    `Unsupported` if the package is not installed.
    """

    def __init__(self, *sources: Source, **stores: Source) -> None:
        self._meter = Meter(*sources, **stores)
        try:
            from prometheus_client.core import Metric
        except ImportError as error:
            why = f"they need prometheus_client; {installing('metrics')} brings it"
            raise Unsupported("Figures for Prometheus", why) from error
        self._metric = Metric

    def collect(self) -> Iterator[Metric]:
        """Yield each family of figures, as they are now."""
        for family in self._meter.families():
            name = PREFIX + family.name
            # Prometheus's client adds _total to the names of counters.
            shown = name.removesuffix("_total")
            why = shown if family.metric is None else family.metric.why
            metric = self._metric(shown, why, family.kind)
            for sample in family.samples:
                series = f"{name}_{sample.series}" if sample.series else name
                metric.add_sample(series, {**sample.labels}, sample.value)
            yield metric
