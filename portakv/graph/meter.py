# SPDX-License-Identifier: Apache-2.0
"""`Meter`: the figures of graphs, stores, readers and others, as families of metrics; each metric
is declared once. `Collector` reports them to Prometheus.

Nothing is counted for a meter that its sources do not count anyway: it reads them when it is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias

from portakv.arguments import invalid
from portakv.errors import Unsupported
from portakv.extras import installing
from portakv.graph.trace import Figures, Samples

if TYPE_CHECKING:
    from prometheus_client.core import Metric as Shown

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


class Collector:
    """A collector for ``prometheus_client.REGISTRY.register``; the caller runs the server.

    A source is a `Graph`, a `BlockStore`, a `Reader`, an `Owner`, a `Channel`, what `publish`
    returns, or what `count_copies` and `count_weights` return. Several sources of a kind are named,
    and their figures have the label ``store``: ``Collector(a=store, b=another)``. Raises
    `Unsupported` if the package is not installed.
    """

    def __init__(self, *sources: Source, **stores: Source) -> None:
        self._meter = Meter(*sources, **stores)
        try:
            from prometheus_client.core import Metric as Shown
        except ImportError as error:
            why = f"they need prometheus_client; {installing('metrics')} brings it"
            raise Unsupported("Figures for Prometheus", why) from error
        self._metric = Shown

    def collect(self) -> Iterator[Shown]:
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


# ------------------------------------------------------------------------------------------------
# The metrics of this library: each is declared once, for Prometheus and for OpenTelemetry.
#
# A source returns figures by the names of this table (see `Source`); the meter adds what the
# table says about them. docs/operations.md has the table as text.

Kind: TypeAlias = Literal["counter", "gauge", "histogram"]

#: Before each name in Prometheus, and in OpenTelemetry.
PREFIX = "portakv_"
NAMESPACE = "portakv."


class Metric(NamedTuple):
    """A metric.

    Attributes:
        name: in Prometheus, without `PREFIX` and, of a histogram, without what ends its series.
        otel: the name in OpenTelemetry, without `NAMESPACE`. OpenTelemetry's API has no histogram
            that is read when it is exported, so a histogram is two counters there: the seconds,
            and with ``otel_count`` their number.
        unit: as OpenTelemetry writes it (UCUM).
        labels: the names of its labels, in order. Sources that are named add ``store``.
        why: what it counts or measures, as a phrase.
    """

    name: str
    kind: Kind
    otel: str
    unit: str
    labels: tuple[str, ...]
    why: str
    otel_count: str = ""


def _counter(name: str, otel: str, unit: str, labels: str, why: str) -> Metric:
    return Metric(name, "counter", otel, unit, (*labels.split(),), why)


def _gauge(name: str, otel: str, unit: str, labels: str, why: str) -> Metric:
    return Metric(name, "gauge", otel, unit, (*labels.split(),), why)


def _seconds(name: str, otel: str, number: str, labels: str, why: str) -> Metric:
    return Metric(name, "histogram", otel, "s", (*labels.split(),), why, number)


_GRAPH = (
    _counter(
        "tier_blocks_total",
        "tier.blocks",
        "{block}",
        "tier op result",
        "requested blocks, by result: hit, miss, fault, late, dropped, error",
    ),
    _counter("tier_bytes_total", "tier.io", "By", "tier op", "bytes moved to or from a tier"),
    _seconds(
        "tier_seconds", "tier.time", "tier.tasks", "tier op", "seconds that tasks of a tier ran"
    ),
    _counter(
        "tier_wait_seconds_total",
        "tier.wait",
        "s",
        "tier op",
        "seconds that tasks waited for a worker",
    ),
    _gauge("queue_bytes", "queue.size", "By", "queue", "bytes that wait or move"),
    _counter(
        "queue_ran_bytes_total", "queue.io", "By", "queue", "bytes of tasks that have run on a link"
    ),
    _gauge(
        "queue_oldest_seconds",
        "queue.oldest",
        "s",
        "queue",
        "seconds that the oldest task has waited",
    ),
    _gauge(
        "queue_slow",
        "queue.slow",
        "1",
        "queue",
        "1 while a task runs too long; no background work begins then",
    ),
)

#: How full disks are. An engine that has the store itself shows these metrics on its own page.
DISK = {
    "disk_fill": _gauge(
        "disk_fill_ratio",
        "disk.fill",
        "1",
        "folder",
        "the share of the capacity that has blocks",
    ),
    "disk_missing": _gauge(
        "disk_missing_slots",
        "disk.missing",
        "{slot}",
        "form folder",
        "slots for which the file system has no space",
    ),
    "disk_free": _gauge(
        "disk_free_bytes",
        "disk.free",
        "By",
        "folder",
        "free bytes of the file system",
    ),
    "disk_lost": _gauge(
        "disk_lost",
        "disk.lost",
        "1",
        "form folder",
        "1 while the folder's files are removed, moved or hidden",
    ),
}

_STORE = (
    _gauge("staging_bytes", "staging.size", "By", "state", "bytes of staging rows, by state"),
    _counter(
        "host_evicted_total", "host.evictions", "{block}", "", "blocks evicted from host memory"
    ),
    _gauge("host_form_bytes", "host.form.size", "By", "form", "bytes of a form in host memory"),
    _counter(
        "form_blocks_total",
        "form.blocks",
        "{block}",
        "form tier op result",
        "blocks of a tier, by form",
    ),
    _counter(
        "form_bytes_total",
        "form.io",
        "By",
        "form tier op",
        "bytes of a tier, by form",
    ),
    _gauge(
        "disk_slots",
        "disk.slots",
        "{slot}",
        "form folder state",
        "slots: used, free, or broken (the device could not write them)",
    ),
    _counter(
        "disk_evicted_total", "disk.evictions", "{block}", "form folder", "blocks evicted from disk"
    ),
    *DISK.values(),
    _counter(
        "encoding_payload_bytes_total",
        "encoding.payload",
        "By",
        "form",
        "bytes of saved blocks before packing",
    ),
    _counter(
        "encoding_wire_bytes_total",
        "encoding.wire",
        "By",
        "form",
        "bytes of saved blocks that crossed to the host",
    ),
    _counter(
        "encoding_blocks_total",
        "encoding.blocks",
        "{block}",
        "form result",
        "saved blocks: packed, raw by choice, or overflow (did not fit)",
    ),
    _gauge("encoding_ratio", "encoding.ratio", "1", "form", "payload bytes per wire byte"),
    _gauge(
        "encoding_escapes",
        "encoding.escapes",
        "1",
        "form",
        "the mean share of escapes in packed blocks",
    ),
    _gauge(
        "remote_left_alone",
        "remote.left_alone",
        "1",
        "form url",
        "1 while an object store gets no requests after failures",
    ),
)

_COPIES = (
    _counter("copies_total", "copy.calls", "{copy}", "strategy src dst", "copies that were issued"),
    _counter(
        "copy_bytes_total",
        "copy.io",
        "By",
        "strategy src dst",
        "bytes of issued copies, skipped ids included",
    ),
)

_MIGRATION = (
    _gauge("pulls_in_flight", "pull.active", "{pull}", "", "pulls that have not ended"),
    _gauge("pull_oldest_seconds", "pull.oldest", "s", "", "seconds since the oldest pull began"),
    _counter("pull_bytes_total", "pull.io", "By", "strategy", "bytes of pulls that were committed"),
    _seconds("pull_seconds", "pull.time", "pull.ends", "result", "seconds from a pull to its end"),
    _gauge("pull_owners", "pull.owners", "{owner}", "", "owners that a reader is connected to"),
    _gauge("offers_active", "offer.active", "{offer}", "", "offers that hold"),
    _counter("offers_total", "offer.made", "{offer}", "", "offers that were made"),
    _counter("offers_ended_total", "offer.ended", "{offer}", "state", "offers that ended, by how"),
    _counter(
        "offer_handshakes_total",
        "offer.handshakes",
        "{handshake}",
        "result",
        "handshakes of readers, accepted or refused",
    ),
    _counter(
        "offer_reports_total",
        "offer.reports",
        "{report}",
        "result",
        "reports of readers: taken, failed, or gone (the offer had ended)",
    ),
    _gauge(
        "offer_staging_buffers",
        "offer.buffers",
        "{buffer}",
        "",
        "staging buffers from which rows are sent",
    ),
    _gauge("channel_peers", "channel.peers", "{connection}", "", "connections from other channels"),
    _gauge("channel_links", "channel.links", "{connection}", "", "connections to other channels"),
    _gauge(
        "channel_answers_bytes", "channel.answers", "By", "", "bytes of answers kept for repeats"
    ),
    _counter(
        "channel_events_total",
        "channel.events",
        "{event}",
        "event",
        "connections lost or gone, requests repeated or rejected",
    ),
    _counter("weight_bytes_total", "weights.io", "By", "", "bytes of pulled weights"),
    _seconds(
        "weight_pull_seconds",
        "weights.time",
        "weights.ends",
        "result",
        "seconds from a pull of weights to its end",
    ),
    _gauge("weight_lanes", "weights.lanes", "{lane}", "", "readers to which weights are sent"),
    _gauge("weight_staging_bytes", "weights.staging", "By", "", "bytes of their staging buffers"),
)

_STORE_SERVER = (
    _gauge("keeper_sessions", "keeper.sessions", "{session}", "", "ranks of engines that joined"),
    _gauge("keeper_leases", "keeper.leases", "{lease}", "", "rows that are lent to ranks"),
    _gauge(
        "keeper_oldest_lease_seconds",
        "keeper.oldest_lease",
        "s",
        "",
        "seconds since the oldest of these leases began",
    ),
    _gauge("keeper_requests", "keeper.requests", "{request}", "", "loads and saves in flight"),
    _counter("keeper_joined_total", "keeper.joins", "{session}", "", "sessions that began"),
    _counter("keeper_lent_total", "keeper.lent", "{lease}", "", "leases of rows that began"),
    _counter(
        "keeper_late_reports_total",
        "keeper.late_reports",
        "{report}",
        "",
        "dropped reports about rows that are not lent any more",
    ),
    _counter(
        "keeper_saved_raw_total",
        "keeper.saved_raw",
        "{block}",
        "",
        "blocks saved raw because a rank could not pack them",
    ),
    _counter(
        "keeper_saves_abandoned_total",
        "keeper.saves_abandoned",
        "{save}",
        "",
        "saves that were given up after a timeout",
    ),
    _counter(
        "keeper_saves_without_all_ranks_total",
        "keeper.saves_without_all_ranks",
        "{save}",
        "",
        "saves for which ranks were missing",
    ),
)

#: What the doors into engines count, by the names of their own statistics.
ENGINE = {
    "promised": _counter(
        "engine_promised_tokens_total",
        "engine.promised",
        "{token}",
        "",
        "tokens offered to the scheduler from the store",
    ),
    "computed": _counter(
        "engine_computed_tokens_total",
        "engine.computed",
        "{token}",
        "",
        "tokens that neither the engine's cache nor the store had",
    ),
    "loads": _counter("engine_loads_total", "engine.loads", "{load}", "", "loads of requests"),
    "failed_loads": _counter(
        "engine_failed_loads_total",
        "engine.failed_loads",
        "{load}",
        "",
        "loads that lack blocks",
    ),
    "landed_blocks": _counter(
        "engine_landed_blocks_total",
        "engine.landed_blocks",
        "{block}",
        "",
        "stored blocks that loads have brought",
    ),
    "landed_bytes": _counter(
        "engine_landed_bytes_total", "engine.landed", "By", "", "bytes that loads have brought"
    ),
    "saves": _counter("engine_saves_total", "engine.saves", "{save}", "", "saves of requests"),
    "stored_blocks": _counter(
        "engine_stored_blocks_total",
        "engine.stored_blocks",
        "{block}",
        "",
        "blocks that saves have stored",
    ),
    "stored_bytes": _counter(
        "engine_stored_bytes_total", "engine.stored", "By", "", "bytes that saves have stored"
    ),
    "offers": _counter(
        "engine_offers_total",
        "engine.offers",
        "{offer}",
        "",
        "prompts whose rows were offered to other engines",
    ),
    "offers_taken": _counter(
        "engine_offers_taken_total",
        "engine.offers_taken",
        "{offer}",
        "",
        "offers that another engine has taken",
    ),
    "offers_expired": _counter(
        "engine_offers_expired_total",
        "engine.offers_expired",
        "{offer}",
        "",
        "offers that expired before an engine took them",
    ),
    "pulls": _counter(
        "engine_pulls_total",
        "engine.pulls",
        "{pull}",
        "",
        "prompts whose rows were pulled from other engines",
    ),
    "failed_pulls": _counter(
        "engine_failed_pulls_total",
        "engine.failed_pulls",
        "{pull}",
        "",
        "pulls that lack rows",
    ),
    "pulled_tokens": _counter(
        "engine_pulled_tokens_total",
        "engine.pulled",
        "{token}",
        "",
        "tokens whose rows pulls have brought",
    ),
    "unanswered": _counter(
        "engine_unanswered_lookups_total",
        "engine.unanswered",
        "{lookup}",
        "",
        "lookups that another host did not answer",
    ),
    "steps": _counter(
        "engine_steps_total",
        "engine.steps",
        "{step}",
        "side",
        "steps of the scheduler and of each worker",
    ),
    "hook_seconds": _counter(
        "engine_hook_seconds_total",
        "engine.hooks",
        "s",
        "side hook",
        "seconds of each hook of the connector",
    ),
    "idle_steps": _counter(
        "engine_idle_steps_total",
        "engine.idle_steps",
        "{step}",
        "side",
        "steps without work for the connector (idle)",
    ),
    "idle_steps_within": _counter(
        "engine_idle_steps_within_total",
        "engine.idle_steps_within",
        "{step}",
        "side seconds",
        "idle steps whose hooks took at most so many seconds",
    ),
    "idle_hook_seconds": _counter(
        "engine_idle_hook_seconds_total",
        "engine.idle_hooks",
        "s",
        "side hook",
        "seconds of each hook in idle steps",
    ),
}

#: All metrics, by their names.
METRICS: dict[str, Metric] = {
    each.name: each
    for each in (*_GRAPH, *_STORE, *_COPIES, *_MIGRATION, *_STORE_SERVER, *ENGINE.values())
}
