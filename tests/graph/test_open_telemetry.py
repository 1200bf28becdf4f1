# SPDX-License-Identifier: Apache-2.0
"""Figures and spans for OpenTelemetry, read back from its own SDK."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ready
from support.graph_ends import submit
from support.migrate_pulls import Rows, sides
from support.waits import LIMIT, until

from portakv.errors import InvalidTerms, OfferGone, PeerError, Unsupported
from portakv.graph import open_telemetry
from portakv.migrate.messages import Ticket
from portakv.runtime import tracing
from portakv.storage.work import Graph, Task

sdk = pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed")
HEADER = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"


@pytest.fixture
def spans() -> Iterator[Any]:
    """Yield a provider of tracers for this test, and the exporter of its spans."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    open_telemetry.trace(provider)
    yield provider, exporter
    tracing.use(None)
    provider.shutdown()


def finished(exporter: Any, name: str) -> list[Any]:
    return [span for span in exporter.get_finished_spans() if span.name == name]


def read(reader: Any) -> dict[str, Any]:
    """Return the metrics that a reader of OpenTelemetry gets, by name."""
    found = dict[str, Any]()
    data = reader.get_metrics_data()
    for resource in data.resource_metrics if data else ():
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                found[metric.name] = metric
    return found


def test_open_telemetry_reads_the_figures_of_sources() -> None:
    """Values, units and attributes; each export reads the sources once."""
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    graph = Graph()
    looks = list[int]()

    class Source:
        def figures(self) -> Any:
            looks.append(1)
            return graph.statistics()

    task = Task(lambda task, mask: None, 2, queue=graph.queue("disk:/a", 2), name="read")
    submit(graph, [task])
    assert task.wait(LIMIT)
    assert graph.close()
    graph.count("disk", "read", "hit", 2, 20)
    reader = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[reader])
    open_telemetry.observe(Source(), meter_provider=provider)
    found = read(reader)
    (point,) = found["portakv.tier.io"].data.data_points
    assert point.value == 20
    assert dict(point.attributes) == {"portakv.tier": "disk", "portakv.op": "read"}
    assert found["portakv.tier.io"].unit == "By"
    (number,) = found["portakv.tier.tasks"].data.data_points
    assert number.value == 1
    assert found["portakv.tier.time"].unit == "s"
    (seconds,) = found["portakv.tier.time"].data.data_points
    assert 0 < seconds.value < LIMIT
    assert len(looks) == 1
    graph.count("disk", "read", "hit", 2, 20)
    (point,) = read(reader)["portakv.tier.io"].data.data_points
    assert point.value == 40
    assert len(looks) == 2
    provider.shutdown()


def test_a_pull_continues_the_trace_of_its_ticket(spans: Any) -> None:
    """The span in which the offer was made is the parent, and that of the call is linked."""
    provider, exporter = spans
    tracer = provider.get_tracer("test")
    rows = Rows()
    target = Rows(fill=0)
    with sides() as made:
        owner = made.owner(rows.shard)
        reader = made.reader(target.shard)
        with tracer.start_as_current_span("prefill") as prefill:
            ticket = owner.offer([1, 2], tokens=20).ticket
        with tracer.start_as_current_span("decode") as decode:
            pulled = reader.pull(ticket, [1, 2])
        pulled.synchronize(LIMIT)
        assert until(lambda: finished(exporter, "portakv pull"), LIMIT)
        assert until(lambda: finished(exporter, "portakv offer"), LIMIT)
    (pull,) = finished(exporter, "portakv pull")
    (offer,) = finished(exporter, "portakv offer")
    for span in (pull, offer):
        assert span.parent.span_id == prefill.get_span_context().span_id
        assert span.context.trace_id == prefill.get_span_context().trace_id
        assert 0 < span.start_time <= span.end_time
    assert pull.parent.is_remote
    assert [link.context.span_id for link in pull.links] == [decode.get_span_context().span_id]
    assert pull.attributes["portakv.pull.size"] == 20 * rows.view.form.token_bytes
    assert offer.attributes["portakv.offer.state"] == "taken"


def pull_of(exporter: Any, **terms: Any) -> tuple[Any, Any]:
    """Return a pull of rows that could be packed, and its span."""
    shape = 2, 2, 4, 16, 4, 16
    src, dst = (torch.ones(shape, dtype=torch.bfloat16, device="cpu") for _ in range(2))
    with sides() as made:
        owner = made.owner(Rows.shard_of(src), expose="staging")
        reader = made.reader(Rows.shard_of(dst))
        pulled = reader.pull(owner.offer([1, 2], tokens=32).ticket, [3, 0], **terms)
        pulled.synchronize(LIMIT)
        assert until(lambda: finished(exporter, "portakv pull"), LIMIT)
    (span,) = finished(exporter, "portakv pull")
    return pulled, span


def test_a_span_says_what_crossed_packed(spans: Any) -> None:
    _, exporter = spans
    pulled, pull = pull_of(exporter, encoding="pack")
    size = pull.attributes["portakv.pull.size"]
    assert pull.attributes["portakv.pull.wire_size"] == pulled.statistics.wire_nbytes < size
    assert pull.attributes["portakv.pull.blocks_raw"] == 0
    assert "portakv.pull.encoding" not in pull.attributes


def test_a_span_says_what_the_owner_chose(spans: Any) -> None:
    """Rows of a CPU stay raw."""
    _, exporter = spans
    _, pull = pull_of(exporter, encoding="auto", max_gbps=0.5)
    assert pull.attributes["portakv.pull.encoding"] == "raw"
    assert pull.attributes["portakv.pull.encoding_why"].startswith("The rows are on the CPU")
    assert "portakv.pull.wire_size" not in pull.attributes


def test_a_pull_that_fails_says_so_in_its_span(spans: Any) -> None:
    _, exporter = spans
    rows = Rows()
    with sides() as made:
        owner = made.owner(rows.shard)
        reader = made.reader(Rows(fill=0).shard)
        offer = owner.offer([1], tokens=16)
        ticket = offer.ticket
        offer.revoke()
        pulled = reader.pull(ticket, [1])
        with pytest.raises(OfferGone):
            pulled.synchronize(LIMIT)
        assert until(lambda: finished(exporter, "portakv pull"), LIMIT)
    (span,) = finished(exporter, "portakv pull")
    assert span.attributes["error.type"] == "OfferGone"
    assert not span.status.is_ok
    assert span.parent is None  # its ticket and its caller have no trace


def test_a_header_reaches_the_pull_without_a_tracer_of_the_owner(spans: Any) -> None:
    """The owner makes no spans here; its ticket carries the header of its request."""
    _, exporter = spans
    tracer = tracing.use(None)
    rows = Rows()
    with sides() as made:
        owner = made.owner(rows.shard)
        reader = made.reader(Rows(fill=0).shard)
        with tracing.under(HEADER):
            ticket = owner.offer([1], tokens=16).ticket
        assert Ticket.read(ticket).traceparent == HEADER
        tracing.use(tracer)
        reader.pull(ticket, [1]).synchronize(LIMIT)
        assert until(lambda: finished(exporter, "portakv pull"), LIMIT)
    (span,) = finished(exporter, "portakv pull")
    assert f"{span.context.trace_id:032x}" == HEADER.split("-")[1]
    assert f"{span.parent.span_id:016x}" == HEADER.split("-")[2]


def test_the_code_of_the_page_runs(tmp_path: Path) -> None:
    """In another process, since it registers a collector and turns spans on."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "operations.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    file = tmp_path / "page.py"
    file.write_text("\n".join(blocks))
    ready.run(file, timeout=LIMIT).check_returncode()


def test_without_the_package_a_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(Unsupported, match=r"portakv\[otel\]"):
        open_telemetry.observe(Graph())
    with pytest.raises(Unsupported, match=r"portakv\[otel\]"):
        open_telemetry.trace()


@pytest.mark.parametrize("wrong", ["", "00-0-0-0", "01" + HEADER[2:], HEADER + "\n", HEADER * 99])
def test_a_wrong_header_is_refused_by_both_sides(wrong: str) -> None:
    """An empty one is none."""
    if wrong:
        with pytest.raises(InvalidTerms, match="traceparent"), tracing.under(wrong):
            pass
    else:
        with tracing.under(wrong):
            assert tracing.begin() is tracing.UNTRACED
    ticket = Ticket(bytes(16), bytes(16), "ipc:///a", 1, (b"",), (1,), 1.0, traceparent=wrong)
    data = ticket.pack(b"key")
    if wrong:
        with pytest.raises(PeerError):
            Ticket.read(data)
    else:
        assert Ticket.read(data) == ticket
