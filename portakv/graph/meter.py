# SPDX-License-Identifier: Apache-2.0
"""`Meter`: the figures of graphs, stores, readers and others, as families of metrics.

Nothing is counted for a meter that its sources do not count anyway: it reads them when it is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol, TypeAlias

from portakv.arguments import invalid
from portakv.graph.metrics import METRICS, Kind, Metric
from portakv.graph.trace import Figures, Samples

#: What ends the names of the series of a histogram.
_SERIES = ("bucket", "sum", "count")
_EXPECTED = "an object with figures, such as a Graph, a BlockStore or a Reader"


class Counted(Protocol):
    """A `Graph`, a `BlockStore`, or an object with figures of the same form."""

    def statistics(self) -> Figures:
        """Return figures by name."""


class Metered(Protocol):
    """An object whose ``statistics`` have another form: a `Reader`, an `Owner`, a `Channel`."""

    def figures(self) -> Figures:
        """Return figures by name."""


#: What has figures.
Source: TypeAlias = Counted | Metered


class Sample(NamedTuple):
    """A value of a series. ``series``: "" or, of a histogram, "bucket", "sum" or "count"."""

    series: str
    labels: Mapping[str, str]
    value: float


class Family(NamedTuple):
    """A metric and its samples now.

    ``metric`` is None for a figure that another package's source has added.
    """

    name: str
    kind: Kind
    metric: Metric | None
    samples: list[Sample]


class Meter:
    """Reads sources. Any thread may call.

    Args:
        sources: their samples have no further label, so at most one of a kind.
        stores: named sources, whose samples have the label ``store``.

    Raises `InvalidTerms` for an object without figures.
    """

    def __init__(self, *sources: Source, **stores: Source) -> None:
        self._sources = list[tuple[dict[str, str], Source]]()
        for name, source in stores.items():
            self._sources.append(({"store": name}, _checked(name, source)))
        for source in sources:
            self._sources.append(({}, _checked("sources", source)))

    def families(self) -> list[Family]:
        """Return the metrics and their samples, as they are now."""
        families = dict[str, Family]()
        for labels, source in self._sources:
            for name, samples in figures_of(source).items():
                family, series = _family_of(name, families)
                for sample in samples:
                    if "value" not in sample:  # it is for people
                        continue
                    own = {key: str(text) for key, text in sample.items() if key != "value"}
                    value = float(sample["value"])
                    family.samples.append(Sample(series, labels | own, value))
        return [family for family in families.values() if family.samples]


def figures_of(source: Source) -> Figures:
    """Return the figures of a source, as they are now."""
    figures = getattr(source, "figures", None)
    if callable(figures):
        result: Figures = figures()
        return result
    return source.statistics()  # type: ignore[union-attr]


def by_label(name: str, counts: Mapping[str, float], keys: Iterable[str]) -> Samples:
    """Return samples of some of a source's counts, with their names as the label ``name``."""
    return [{name: key, "value": counts.get(key, 0)} for key in keys]


def _checked(name: str, source: Source) -> Source:
    if any(callable(getattr(source, each, None)) for each in ("figures", "statistics")):
        return source
    raise invalid(name, _EXPECTED, source)


def _family_of(name: str, families: dict[str, Family]) -> tuple[Family, str]:
    """Return the family of a figure, and which series of it the figure is."""
    key, series = series_of(name)
    known = METRICS.get(key)
    kind: Kind = "gauge"
    if known is not None:
        kind = known.kind
    elif series:
        kind = "histogram"
    elif name.endswith("_total"):
        kind = "counter"
    return families.setdefault(key, Family(key, kind, known, [])), series


def series_of(name: str) -> tuple[str, str]:
    """Return the name of a metric, and which series of it a figure is; see `Sample`."""
    front, _, end = name.rpartition("_")
    if end in _SERIES and name not in METRICS:
        return front, end
    return name, ""
