# SPDX-License-Identifier: Apache-2.0
"""Test the figures of a graph, also for Prometheus, and its trace."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from support.graph_ends import run_in_turn, submit
from support.waits import LIMIT

from portakv.errors import TransferError, Unsupported
from portakv.graph import Collector
from portakv.storage.work import Graph, Task


def ran() -> Graph:
    """Return a graph on which a read of a disk and its follower ran."""
    graph = Graph()
    read = Task(lambda task, mask: None, 2, queue=graph.queue("disk:/a", 2), name="read", nbytes=10)
    copy = Task(lambda task, mask: None, 2, queue=graph.queue("device"), name="copy")
    run_in_turn(graph, [read, copy])
    assert copy.wait(LIMIT)
    assert graph.close()
    graph.count("disk", "read", "hit", 2, 20)
    graph.count("disk", "read", "miss")
    return graph


def test_prometheus_reads_every_figure() -> None:
    class Source:
        def statistics(self) -> dict[str, Any]:
            figures = {"tiers": [{"tier": "disk"}], "rows": {"free": 1}}
            return {**graph.statistics(), **figures, "staging_bytes": staging}

    graph = ran()
    registry = CollectorRegistry()
    staging = [{"state": "free", "value": 4096}]
    registry.register(Collector(Source()))
    text = generate_latest(registry).decode()
    assert generate_latest(registry).decode() == text
    families = {x.name: x for x in text_string_to_metric_families(text)}
    samples = {
        (x.name, *sorted(x.labels.values())): x.value for y in families.values() for x in y.samples
    }
    assert samples["portakv_tier_bytes_total", "disk", "read"] == 20
    assert samples["portakv_tier_blocks_total", "disk", "hit", "read"] == 2
    assert samples["portakv_tier_blocks_total", "disk", "miss", "read"] == 1
    assert samples["portakv_tier_seconds_bucket", "+Inf", "disk", "read"] == 1
    assert samples["portakv_tier_seconds_count", "copy", "device"] == 1
    assert 0 < samples["portakv_tier_seconds_sum", "copy", "device"] < 30
    assert samples["portakv_queue_bytes", "disk:/a"] == 0
    assert samples["portakv_queue_ran_bytes_total", "disk:/a"] == 10
    assert samples["portakv_staging_bytes", "free"] == 4096
    assert {x.name: x.type for x in families.values()} == {
        "portakv_tier_blocks": "counter",
        "portakv_tier_bytes": "counter",
        "portakv_tier_seconds": "histogram",
        "portakv_tier_wait_seconds": "counter",
        "portakv_queue_bytes": "gauge",
        "portakv_queue_ran_bytes": "counter",
        "portakv_queue_oldest_seconds": "gauge",
        "portakv_queue_slow": "gauge",
        "portakv_staging_bytes": "gauge",
    }


def test_several_stores_share_a_registry() -> None:
    """Each family has one TYPE line, and no sample comes twice."""
    registry = CollectorRegistry(auto_describe=True)  # as REGISTRY, which refuses two of a name
    registry.register(Collector(a=ran(), b=ran()))
    lines = generate_latest(registry).decode().splitlines()
    types = [line for line in lines if line.startswith("# TYPE")]
    series = [line.rpartition(" ")[0] for line in lines if line[0] != "#"]
    assert len({*types}) == len(types) == 8
    assert len({*series}) == len(series)
    for store in "ab":
        assert f'portakv_tier_bytes_total{{op="read",store="{store}",tier="disk"}} 20.0' in lines


def test_without_the_package_a_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client.core", None)
    with pytest.raises(Unsupported, match=r"portakv\[metrics\]"):
        Collector(Graph())


def test_figures_can_be_written_as_json() -> None:
    assert json.loads(json.dumps(ran().statistics()))["queue_slow"][0] == {
        "queue": "disk:/a",
        "value": False,
    }


def test_a_trace_has_the_form_that_perfetto_opens(tmp_path: Path) -> None:
    """Each event has what its phase needs, and a flow leads from a task's end to the next one."""
    ran().trace.write(tmp_path / "trace.json", TransferError)
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    needs = {"M": {"args"}, "X": {"ts", "dur"}, "s": {"ts", "id"}, "f": {"ts", "id", "bp"}}
    for event in events:
        assert {"name", "pid", *needs[event["ph"]]} <= event.keys()
    queues = {x["pid"]: x["args"]["name"] for x in events if x["ph"] == "M"}
    read, copy = [x for x in events if x["ph"] == "X"]
    assert [queues[read["pid"]], queues[copy["pid"]]] == ["disk:/a", "device"]
    assert (read["name"], read["args"]) == ("read", {"task": 1, "blocks": 2, "bytes": 10})
    start, end = [x for x in events if x["ph"] in "sf"]
    assert (start["id"], start["name"], start["cat"]) == (end["id"], end["name"], end["cat"])
    assert (start["pid"], end["pid"]) == (read["pid"], copy["pid"])
    assert start["ts"] == pytest.approx(read["ts"] + read["dur"])
    assert end["ts"] == copy["ts"]


def test_arrows_lead_past_tasks_that_never_ran() -> None:
    """A load's device stage follows reads of the next tiers, which have nothing to do if the first
    tier has all."""
    graph = Graph()
    read = Task(lambda task, mask: None, 2, queue=graph.queue("disk"))
    rescue = Task(lambda task, mask: 1 // 0, 2, queue=graph.queue("far"))
    copy = Task(lambda task, mask: None, 2, queue=graph.queue("device"))

    async def load() -> None:
        landed = await read.move(~read.landed)
        await rescue.move(~landed, read)
        await copy.move(landed, rescue)

    def begin() -> None:
        graph.enter([read, rescue, copy], "normal")
        graph.runtime.start(load())

    graph.runtime.change(begin)
    assert copy.wait(LIMIT)
    assert graph.close()
    flows = [(x["ph"], x["id"]) for x in graph.trace.events() if x["ph"] in "sf"]
    assert flows == [("s", "1-3"), ("f", "1-3")]


def test_a_trace_keeps_the_last_tasks_alone() -> None:
    graph = Graph(trace_events=3)
    tasks = [Task(lambda task, mask: None, 1, queue=graph.queue("any")) for _ in range(9)]
    submit(graph, tasks)
    assert all(task.wait(LIMIT) for task in tasks)
    assert [x["args"]["task"] for x in graph.trace.events() if x["ph"] == "X"] == [7, 8, 9]
    assert graph.close()
