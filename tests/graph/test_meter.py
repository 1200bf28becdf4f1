# SPDX-License-Identifier: Apache-2.0
"""Test the meter: each metric is declared once, and what sources report is declared."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from support import ready
from support.migrate_pulls import Rows, sides
from support.storage_cases import key_of
from support.waits import LIMIT, until

from portakv import InvalidTerms, KVView
from portakv.copy import copy_rows, copy_runs, count_copies
from portakv.copy.counting import TOGETHER, CopyCounts, Counted
from portakv.graph import Collector
from portakv.graph.meter import ENGINE, METRICS, NAMESPACE, PREFIX, Meter, figures_of
from portakv.migrate import Channel
from portakv.serving import StoreServer, StoreTerms
from portakv.storage import BlockForm, BlockStore, Disk
from portakv.storage.work import Graph
from portakv.weights import count_weights, publish, pull_weights

LAYOUT = "layer | kv block token head dim"
#: Labels of buckets, which Prometheus adds.
_BUCKETS = {"le"}


@pytest.fixture
def counted() -> Iterator[CopyCounts]:
    """Count the copies of this test alone."""
    counts = count_copies()
    yield counts
    counts.close()


def declared(meter: Meter) -> set[str]:
    """Return the names of the metrics that sources report, whose labels must be declared."""
    names = set[str]()
    for family in meter.families():
        assert family.metric is not None, f"{family.name} is not declared"
        assert family.kind == family.metric.kind
        for sample in family.samples:
            labels = {*sample.labels} - _BUCKETS
            assert labels == {*family.metric.labels}, family.name
        names.add(family.name)
    return names


def of_store(folder: Path) -> set[str]:
    """Return the metrics of a store with two forms and a disk, after a save."""
    caches = [torch.ones(4, 2, 4, 2, 8, dtype=torch.int16, device="cpu") for _ in range(2)]
    view = KVView(caches, "layer | block kv token head dim")
    whole = BlockForm.of(view, "a model")
    half = BlockForm.of(view, "another model")
    disk = Disk(folder, capacity=8 << 20)
    with BlockStore({"a": whole, "b": half}, tiers=[disk], staging=1 << 20, host=1 << 20) as store:
        store.of("a").save(view, [0, 1], [key_of(0), key_of(1)]).synchronize(LIMIT)
        names = declared(Meter(store))
    with BlockStore(whole, staging=1 << 20, host=1 << 20, encoding="auto") as store:
        return names | declared(Meter(store))


def of_pulls() -> set[str]:
    """Return the metrics of an owner, a reader and a channel after a pull, and of weights."""
    rows = Rows()
    target = Rows(fill=0)
    with sides() as made:
        owner = made.owner(rows.shard)
        reader = made.reader(target.shard)
        ticket = owner.offer([1, 2], tokens=20).ticket
        reader.pull(ticket, [1, 2]).synchronize(LIMIT)
        assert until(lambda: "pull_seconds_count" in figures_of(reader), LIMIT)
        weights = {"w": rows.whole}
        published = publish(owner.channel, weights)
        target_weights = {"w": torch.zeros_like(rows.whole)}
        assert pull_weights(reader.channel, published.ticket, target_weights) > 0
        owner.channel.counts["strangers"] += 1
        names = declared(Meter(owner, reader, owner.channel, published, count_weights()))
        published.close()
    return names


def test_each_metric_is_reported_by_a_source_and_declared(
    tmp_path: Path, counted: CopyCounts
) -> None:
    """The table has no metric that nothing reports, but those of faults of object stores."""
    names = of_store(tmp_path / "store") | of_pulls()
    rows = Rows()
    copy_rows(rows.view, Rows(fill=0).view, count=4).synchronize()
    names |= declared(Meter(counted))
    terms = StoreTerms.of(
        {"folder": (str(tmp_path / "keeper"),), "host": 1 << 20, "staging": 1 << 20}
    )
    with StoreServer(terms) as store_server:
        names |= declared(Meter(store_server))
    names |= {metric.name for metric in ENGINE.values()}  # which vLLM reports
    served = {name for name in METRICS if name.startswith("keeper_")}  # once ranks have joined
    assert names | served | {"remote_left_alone"} == {*METRICS}


def test_names_follow_the_conventions_of_both() -> None:
    """Prometheus: base units at the end, and _total of counters alone. OpenTelemetry: neither."""
    for metric in METRICS.values():
        assert (metric.kind == "counter") == metric.name.endswith("_total"), metric.name
        assert re.fullmatch(r"[a-z]+(_[a-z]+)+", metric.name)
        assert ("seconds" in metric.name) == (metric.unit == "s"), metric.name
        assert ("bytes" in metric.name) == (metric.unit == "By"), metric.name
        assert not re.search(r"total|seconds|bytes", metric.otel), metric.otel
        assert re.fullmatch(r"[a-z]+(_[a-z]+)?\.[a-z_]+(\.[a-z_]+)?", metric.otel)
    names = [name for each in METRICS.values() for name in (each.otel, each.otel_count) if name]
    assert len({*names}) == len(names)


def test_copies_are_counted_from_the_first_question_on() -> None:
    """A copy before it counts nothing, and no copy is lost when many are added up."""
    assert Counted.counts is None
    src = Rows()
    dst = Rows(fill=0)
    copy_rows(src.view, dst.view, count=4).synchronize()
    counts = count_copies()
    assert counts is count_copies()
    assert counts.figures() == {"copies_total": [], "copy_bytes_total": []}
    many = 2 * TOGETHER + 3
    for _ in range(many):
        copy_rows(src.view, dst.view, count=4).synchronize()
    figures = counts.figures()
    (copies,) = figures["copies_total"]
    (nbytes,) = figures["copy_bytes_total"]
    assert copies["value"] == many
    assert nbytes["value"] == many * 4 * src.view.form.token_bytes
    assert (copies["src"], copies["dst"]) == (src.view.form.place, dst.view.form.place)
    counts.close()
    copy_rows(src.view, dst.view, count=4).synchronize()
    assert counts.figures() == figures
    assert Counted.counts is None


def test_runs_of_several_sizes_are_as_many_copies(counted: CopyCounts) -> None:
    """All sizes are checked before the first is copied. The checks are no copies."""
    rows = torch.zeros(1024, dtype=torch.uint8)
    first = rows.data_ptr()
    sources = [first, first + 128]
    destinations = [first + 512, first + 768]
    ends: dict[str, Any] = {"src_device": "cpu", "dst_device": "cpu"}
    copy_runs(sources, destinations, [64, 96], **ends).synchronize()
    (copies,) = counted.figures()["copies_total"]
    assert copies["value"] == 2


def test_a_copy_costs_one_call(counted: CopyCounts) -> None:
    """Of the module, for a copy that is counted; none for one that is not."""
    src = Rows()
    dst = Rows(fill=0)

    def calls() -> list[str]:
        made = list[str]()

        def note(frame: Any, event: str, arg: Any) -> None:
            if event == "call" and "counting" in frame.f_code.co_filename:
                made.append(frame.f_code.co_name)

        copy_rows(src.view, dst.view, count=4).synchronize()
        sys.setprofile(note)
        try:
            copy_rows(src.view, dst.view, count=4).synchronize()
        finally:
            sys.setprofile(None)
        return made

    assert calls() == ["add"]
    assert len(counted.new) == 2
    counted.close()
    assert calls() == []
    assert len(counted.new) == 2


def test_a_source_may_have_a_name(counted: CopyCounts) -> None:
    registry = CollectorRegistry()
    registry.register(Collector(Graph(), counted, a=Graph()))
    text = generate_latest(registry).decode()
    assert [*text_string_to_metric_families(text)] == []
    with pytest.raises(InvalidTerms, match="source"):
        Meter(object())  # type: ignore[arg-type]
    with pytest.raises(InvalidTerms, match="named"):
        Meter(named=1)  # type: ignore[arg-type]


def test_what_another_package_reports_is_shown_as_well() -> None:
    """A figure that is not declared has the kind that its name says."""

    class Source:
        def figures(self) -> dict[str, Any]:
            return {"vendor_reads_total": [{"value": 2}], "vendor_depth": [{"value": 3}]}

    families = {each.name: each for each in Meter(Source()).families()}
    assert {name: each.kind for name, each in families.items()} == {
        "vendor_reads_total": "counter",
        "vendor_depth": "gauge",
    }


@pytest.mark.parametrize(
    "module",
    [
        "portakv.migrate",
        *(pytest.param(x, marks=pytest.mark.full) for x in ("portakv.storage", "portakv.graph")),
    ],
)
def test_nothing_is_imported_unless_it_is_asked_for(module: str) -> None:
    code = f"""
import sys
import {module}
wrong = [x for x in ("opentelemetry", "prometheus_client", "portakv.graph.open_telemetry")
         if x in sys.modules]
assert not wrong, wrong
"""
    ready.run("-c", code, timeout=LIMIT).check_returncode()


def test_a_channel_counts_by_event() -> None:
    channel = Channel()
    try:
        channel.counts["strangers"] += 2
        figures = figures_of(channel)
        assert {"event": "strangers", "value": 2} in figures["channel_events_total"]
        assert figures["channel_peers"] == [{"value": 0}]
    finally:
        channel.close()


def test_the_page_has_the_table_of_all_metrics() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "operations.md").read_text()
    found = re.search(r"<!-- metrics:[^>]*-->\n(.*?)\n<!-- end of metrics -->", page, re.DOTALL)
    assert found
    lines = [
        "| metric | OpenTelemetry | what |",
        "|---|---|---|",
    ]
    for each in METRICS.values():
        labels = f"{{{','.join(each.labels)}}}" if each.labels else ""
        names = [f"`{NAMESPACE}{name}`" for name in (each.otel, each.otel_count) if name]
        lines.append(f"| `{PREFIX}{each.name}{labels}` | {', '.join(names)} | {each.why} |")
    assert found[1].splitlines() == lines
    # The page says these rules in place of a column.
    histograms = [each.name for each in METRICS.values() if each.kind == "histogram"]
    named = [f"`{name}`" for name in histograms]
    assert f"{', '.join(named[:-1])} and {named[-1]} are histograms" in page
    for each in METRICS.values():
        assert (each.kind == "counter") == each.name.endswith("_total")
