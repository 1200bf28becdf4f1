# SPDX-License-Identifier: Apache-2.0
"""`portakv top`: what it reads, what it computes, and what it shows."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from support.command_line import run
from support.graph_ends import submit
from support.waits import LIMIT, until

from portakv import KVView
from portakv.cli.top import Key, Reading, Row, read, rows_of
from portakv.errors import PeerError, StoreError
from portakv.graph import Collector
from portakv.migrate import Channel
from portakv.serving import StoreClient, StoreServer, StoreTerms
from portakv.serving.watched import MOST, answer, ask
from portakv.storage import BlockForm, prefix_keys
from portakv.storage.work import Graph, Task


def reading(at: float, values: Mapping[tuple[str, ...], float]) -> Reading:
    """Return a reading; each key is a name with its series after a slash, and pairs of labels."""
    made = dict[Key, float]()
    for (name, *labels), value in values.items():
        name, _, series = name.partition("/")
        pairs = frozenset(zip(labels[::2], labels[1::2], strict=True))
        made[name, series, pairs] = value
    return Reading(at, made)


LOAD = "tier", "disk", "op", "load"


def test_rates_are_of_what_has_changed() -> None:
    before = reading(
        10.0,
        {
            ("tier_bytes_total", *LOAD): 100,
            ("tier_blocks_total", *LOAD, "result", "hit"): 10,
            ("tier_blocks_total", *LOAD, "result", "fault"): 0,
            ("tier_seconds/sum", *LOAD): 1.0,
            ("tier_seconds/count", *LOAD): 4,
            ("pull_bytes_total", "strategy", "mapped"): 500,
        },
    )
    now = reading(
        12.0,
        {
            ("tier_bytes_total", *LOAD): 300,
            ("tier_blocks_total", *LOAD, "result", "hit"): 14,
            ("tier_blocks_total", *LOAD, "result", "fault"): 1,
            ("tier_seconds/sum", *LOAD): 1.5,
            ("tier_seconds/count", *LOAD): 6,
            ("pull_bytes_total", "strategy", "mapped"): 40,  # the process was started again
            ("queue_ran_bytes_total", "queue", "disk:/a"): 500,
            ("queue_bytes", "queue", "disk:/a"): 64,
            ("queue_oldest_seconds", "queue", "disk:/a"): 3.0,
            ("queue_slow", "queue", "disk:/a"): 1,
            ("pulls_in_flight",): 2,
            ("pull_oldest_seconds",): 0.5,
            ("disk_slots", "form", "f", "folder", "/a", "state", "broken"): 3,
            ("disk_missing_slots", "form", "f", "folder", "/full"): 7,
            ("disk_missing_slots", "form", "f", "folder", "/well"): 0,
            ("disk_lost", "form", "f", "folder", "/lost"): 1,
            ("disk_lost", "form", "f", "folder", "/well"): 0,
        },
    )
    rows = {(row.kind, row.name): row for row in rows_of(before, now)}
    assert rows["tier", "disk load"] == Row(
        "tier", "disk load", rate=100, each=2.5, seconds=0.25, note="0.5/s fault"
    )
    assert rows["pull", "mapped"].rate == 20
    assert rows["link", "disk:/a"] == Row(
        "link", "disk:/a", rate=250, waiting=64, wait=3.0, note="a task runs too long"
    )
    assert rows["pull", "in flight"] == Row("pull", "in flight", waiting=2, wait=0.5)
    assert rows["disk", "/a"].note == "3 broken slots"
    assert rows["disk", "/full"].note == "full: 7 slots have no space"
    assert rows["disk", "/lost"].note == "its files were removed, moved or hidden"
    assert ("disk", "/well") not in rows
    assert all(row.moves for row in rows.values())


def test_what_stands_still_does_not_move() -> None:
    values = {("tier_bytes_total", *LOAD): 100.0, ("queue_bytes", "queue", "a"): 0.0}
    rows = rows_of(reading(1.0, values), reading(2.0, values))
    assert [row.moves for row in rows] == [False, False]


def test_an_engine_that_computes_everything_moves() -> None:
    """Tokens that were found nowhere stand next to those that were."""
    name = "engine_computed_tokens_total"
    rows = rows_of(reading(0.0, {(name,): 1000}), reading(2.0, {(name,): 3000}))
    assert rows == [Row("engine", "computed tokens", each=1000)]
    assert rows[0].moves


def test_stores_have_names() -> None:
    store = "store", "a"
    rows = rows_of(
        reading(0.0, {}), reading(1.0, {("keeper_leases", *store): 2, ("keeper_sessions",): 1})
    )
    assert {row.name for row in rows} == {"a: leases", "sessions"}


class Page:
    """A metrics page, as an engine serves it."""

    def __init__(self, text: str) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/metrics"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def test_a_metrics_page_has_what_the_process_has() -> None:
    """Those of vLLM's process have its labels, which are left out; buckets are not read."""
    graph = Graph()
    task = Task(lambda *_: None, 1, queue=graph.queue("disk:/a"), name="load")
    submit(graph, [task])
    assert task.wait(LIMIT)
    graph.count("disk", "load", "hit", 2, 20)
    registry = CollectorRegistry()
    registry.register(Collector(a=graph))
    engine = 'vllm:portakv_loads_total{engine="0",model_name="a b"} 3.0\n'
    page = Page(generate_latest(registry).decode() + engine + engine.replace('"0"', '"1"'))
    try:
        values = read(page.url).values
    finally:
        page.close()
    labels = frozenset({"tier": "disk", "op": "load", "store": "a"}.items())
    assert values["tier_bytes_total", "", labels] == 20
    assert values["tier_seconds", "count", labels] == 1
    assert values["engine_loads_total", "", frozenset()] == 6
    assert all(series != "bucket" for _, series, _ in values)
    assert graph.close()


@pytest.fixture
def store_server(tmp_path: Path) -> Iterator[StoreServer]:
    terms = {"folder": (str(tmp_path),), "host": 1 << 20, "staging": 1 << 20, "capacity": 8 << 20}
    with StoreServer(StoreTerms.of(terms)) as made:
        yield made


def test_a_store_server_is_read_by_its_folder(store_server: StoreServer, tmp_path: Path) -> None:
    """As JSON: all rows. As text: those that move, here the session of a rank."""
    caches = [torch.ones(8, 2, 4, 4, 8, dtype=torch.int16, device="cpu") for _ in range(2)]
    view = KVView(caches, "layer | block kv token head dim")
    form = BlockForm.of(view, "model")
    with StoreClient(store_server.place, [form], "an engine") as client:
        assert client.wait(LIMIT)
        client.blocks[0].save(view, range(4), prefix_keys(range(16), 4)).synchronize(LIMIT)
        code, text, _ = run("top", str(tmp_path), "--seconds", "0.05", "--json")
        assert code == 0
        rows = json.loads(text)
        assert {"kind": "keeper", "name": "sessions", "waiting": 1.0}.items() <= next(
            row.items() for row in rows if row["name"] == "sessions"
        )
        assert {"link", "tier", "keeper"} <= {row["kind"] for row in rows}
        code, text, _ = run("top", str(tmp_path), "--seconds", "0.05", "--count", "2")
        assert code == 0
        assert text.count("sessions") == 2
        assert "\033" not in text
        code, text, _ = run("top", str(tmp_path), "--seconds", "0.05", "--all")
        assert "disk save" in text


def test_any_channel_may_answer() -> None:
    """With the figures of what its process has; too many are cut, and the page still fits."""

    class Many:
        def figures(self) -> Any:
            names = range(60_000)
            samples = [{"queue": f"{n:x} {hash(str(n)):x}", "value": n} for n in names]
            return {"queue_bytes": samples}

    graph = Graph()
    channel = Channel()
    try:
        with pytest.raises(PeerError):
            ask(channel.address)  # it has no figures
        answer(channel, graph)
        assert ask(channel.address) == ()
        graph.count("disk", "load", "hit", 2, 20)
        assert {(each.name, each.value) for each in ask(channel.address)} == {
            ("tier_blocks_total", 2),
            ("tier_bytes_total", 20),
        }
        answer(channel, Many())
        assert len(ask(channel.address)) == MOST < 60_000
    finally:
        channel.close()


def test_what_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="store serve"):
        read(str(tmp_path))
    with pytest.raises(StoreError, match="store serve"):
        read(str(tmp_path / "nothing"))
    with pytest.raises(PeerError, match="metrics page"):
        read("http://127.0.0.1:1/metrics")
    page = Page("other_total 1\n")
    try:
        with pytest.raises(PeerError, match="begin with portakv_"):
            read(page.url)
    finally:
        page.close()
    code, _, error = run("top", str(tmp_path), "--seconds", "0")
    assert code != 0
    assert "--seconds" in error


def test_a_process_that_ends_is_no_longer_read(store_server: StoreServer, tmp_path: Path) -> None:
    assert until(lambda: store_server.serves, LIMIT)
    assert read(str(tmp_path)).values
    store_server.close()
    with pytest.raises(StoreError):
        read(str(tmp_path))
