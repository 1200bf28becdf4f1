# SPDX-License-Identifier: Apache-2.0
"""The metrics of this library: each is declared once, for Prometheus and for OpenTelemetry.

A source returns figures by the names of this table (see `Source`); the meter adds what the table
says about them. docs/metrics.md has the table as text.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

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
        "blocks that tasks requested of a tier, by result: hit, miss, fault, late, dropped, error",
    ),
    _counter("tier_bytes_total", "tier.io", "By", "tier op", "bytes that moved to or from a tier"),
    _seconds(
        "tier_seconds", "tier.time", "tier.tasks", "tier op", "seconds that tasks of a tier ran"
    ),
    _counter(
        "tier_wait_seconds_total",
        "tier.wait",
        "s",
        "tier op",
        "seconds that tasks of a tier waited for a worker, before they ran",
    ),
    _gauge("queue_bytes", "queue.size", "By", "queue", "bytes that wait for a link or run on it"),
    _counter(
        "queue_ran_bytes_total", "queue.io", "By", "queue", "bytes of tasks that have run on a link"
    ),
    _gauge(
        "queue_oldest_seconds",
        "queue.oldest",
        "s",
        "queue",
        "seconds that the oldest task has waited for a worker of a link",
    ),
    _gauge(
        "queue_slow",
        "queue.slow",
        "1",
        "queue",
        "1 while a task of a link runs longer than it should; no background work begins then",
    ),
)

#: How full disks are. An engine that has the store itself shows these metrics on its own page.
DISK = {
    "disk_fill": _gauge(
        "disk_fill_ratio",
        "disk.fill",
        "1",
        "folder",
        "the share of a folder's capacity that has blocks",
    ),
    "disk_missing": _gauge(
        "disk_missing_slots",
        "disk.missing",
        "{slot}",
        "form folder",
        "slots of the capacity for which the file system has no space",
    ),
    "disk_free": _gauge(
        "disk_free_bytes",
        "disk.free",
        "By",
        "folder",
        "bytes that are free in the file system of a folder",
    ),
    "disk_lost": _gauge(
        "disk_lost",
        "disk.lost",
        "1",
        "form folder",
        "1 while the files of a folder are removed, moved or hidden, so nothing is stored there",
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
        "the blocks of portakv_tier_blocks_total, of a store with several forms",
    ),
    _counter(
        "form_bytes_total",
        "form.io",
        "By",
        "form tier op",
        "the bytes of portakv_tier_bytes_total, of a store with several forms",
    ),
    _gauge(
        "disk_slots",
        "disk.slots",
        "{slot}",
        "form folder state",
        "slots of a folder: used, free, or broken, which the device could not write",
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
        "bytes of raw rows of blocks that saves brought to the host, of a packed form or a store "
        "that chooses",
    ),
    _counter(
        "encoding_wire_bytes_total",
        "encoding.wire",
        "By",
        "form",
        "bytes that crossed to the host for them, and for blocks that did not land",
    ),
    _counter(
        "encoding_blocks_total",
        "encoding.blocks",
        "{block}",
        "form result",
        "these blocks: packed, raw by choice, or overflow, which did not fit and are raw",
    ),
    _gauge(
        "encoding_ratio", "encoding.ratio", "1", "form", "bytes of payload for each of the wire"
    ),
    _gauge(
        "encoding_escapes",
        "encoding.escapes",
        "1",
        "form",
        "the mean share of escapes among values, of one packed block of each task",
    ),
    _gauge(
        "remote_left_alone",
        "remote.left_alone",
        "1",
        "form url",
        "1 while an object store gets no requests, after failures in a row",
    ),
)

_COPIES = (
    _counter("copies_total", "copy.calls", "{copy}", "strategy src dst", "copies that were issued"),
    _counter(
        "copy_bytes_total",
        "copy.io",
        "By",
        "strategy src dst",
        "bytes that issued copies move, skipped ids included",
    ),
)

_MIGRATION = (
    _gauge("pulls_in_flight", "pull.active", "{pull}", "", "pulls that have not ended"),
    _gauge("pull_oldest_seconds", "pull.oldest", "s", "", "seconds since the oldest of them began"),
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
        "what readers reported: taken, failed; gone: a question about an offer that had ended",
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
        "connections that were lost or gone, and requests that were repeated or rejected",
    ),
    _counter(
        "weight_bytes_total", "weights.io", "By", "", "bytes of weights that pulls have brought"
    ),
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

_KEEPER = (
    _gauge("keeper_sessions", "keeper.sessions", "{session}", "", "ranks of engines that joined"),
    _gauge("keeper_leases", "keeper.leases", "{lease}", "", "rows that are lent to ranks"),
    _gauge(
        "keeper_oldest_lease_seconds",
        "keeper.oldest_lease",
        "s",
        "",
        "seconds since the oldest of these rows were lent",
    ),
    _gauge("keeper_requests", "keeper.requests", "{request}", "", "loads and saves in flight"),
    _counter("keeper_joined_total", "keeper.joins", "{session}", "", "sessions that began"),
    _counter("keeper_lent_total", "keeper.lent", "{lease}", "", "leases of rows that began"),
    _counter(
        "keeper_late_reports_total",
        "keeper.late_reports",
        "{report}",
        "",
        "reports about rows that were not lent any more, which are dropped",
    ),
    _counter(
        "keeper_saved_raw_total",
        "keeper.saved_raw",
        "{block}",
        "",
        "packed blocks that a rank could not pack, which all ranks save raw",
    ),
    _counter(
        "keeper_saves_abandoned_total",
        "keeper.saves_abandoned",
        "{save}",
        "",
        "saves that were given up after the keeper's patience",
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
        "tokens that the scheduler was offered from the store",
    ),
    "computed": _counter(
        "engine_computed_tokens_total",
        "engine.computed",
        "{token}",
        "",
        "tokens that a request had to compute: neither the engine's cache nor the store had them",
    ),
    "loads": _counter("engine_loads_total", "engine.loads", "{load}", "", "loads of requests"),
    "failed_loads": _counter(
        "engine_failed_loads_total",
        "engine.failed_loads",
        "{load}",
        "",
        "loads that did not bring all blocks",
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
        "offers of workers that another engine has taken",
    ),
    "offers_expired": _counter(
        "engine_offers_expired_total",
        "engine.offers_expired",
        "{offer}",
        "",
        "offers of workers that no engine took before the end of their lease",
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
        "pulls that did not bring all rows",
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
        "lookups that another host did not answer in time",
    ),
    "steps": _counter(
        "engine_steps_total",
        "engine.steps",
        "{step}",
        "side",
        "steps of the engine, once for its scheduler and once for each worker",
    ),
    "hook_seconds": _counter(
        "engine_hook_seconds_total",
        "engine.hooks",
        "s",
        "side hook",
        "seconds that each hook of the connector took",
    ),
    "idle_steps": _counter(
        "engine_idle_steps_total",
        "engine.idle_steps",
        "{step}",
        "side",
        "steps without work for the connector",
    ),
    "idle_steps_within": _counter(
        "engine_idle_steps_within_total",
        "engine.idle_steps_within",
        "{step}",
        "side seconds",
        "steps without work whose hooks took at most so many seconds together",
    ),
    "idle_hook_seconds": _counter(
        "engine_idle_hook_seconds_total",
        "engine.idle_hooks",
        "s",
        "side hook",
        "seconds that each hook of the connector took in steps without work",
    ),
}

#: All metrics, by their names.
METRICS: dict[str, Metric] = {
    each.name: each
    for each in (*_GRAPH, *_STORE, *_COPIES, *_MIGRATION, *_KEEPER, *ENGINE.values())
}
