# SPDX-License-Identifier: Apache-2.0
"""Evaluate each query of docs/operations/dashboard.json by Prometheus, and draw the panels.

The series are recorded from a store, pulls and weights of this process while it works; Prometheus
gets them as a block of its database. A query without an answer fails the step. Needs the commands
``prometheus`` and ``promtool``.

    python .ci/dashboard.py PICTURE.png
"""

from __future__ import annotations

import json
import math
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from portakv import KVView
from portakv.copy import count_copies
from portakv.graph.meter import ENGINE, PREFIX, Family, Meter
from portakv.graph.trace import Figures
from portakv.integrations.vllm.metrics import REPORTED, figures_of, series_of
from portakv.migrate import Channel, Owner, Pull, Reader, Shard, Ticket, shared_empty
from portakv.serving import StoreClient, StoreServer, StoreTerms
from portakv.storage import BlockForm, BlockStore, Disk, Remote, prefix_keys
from portakv.storage.work import Task
from portakv.weights import count_weights, publish, pull_weights

DASHBOARD = Path(__file__).resolve().parents[1] / "docs" / "operations" / "dashboard.json"
#: Seconds between two readings, as far as Prometheus knows, and how many there are.
STEP = 15
READINGS = 24
#: What Grafana fills in.
RATE = {"$__rate_interval": f"{4 * STEP}s"}
LAYOUT = "layer | block kv token head dim"
PATIENCE = 60.0


class EngineFigures:
    """What a door counts, as a source for `Collector` and `observe`.

    Args:
        read: returns the counters by their names in `ENGINE`, with the values of their labels after
            slashes, such as ``hook_seconds/scheduler/take_events``.
    """

    def __init__(self, read: Callable[[], Mapping[str, float]]) -> None:
        self._read = read

    def figures(self) -> Figures:
        """Return figures by the names of metrics, in the form of `Graph.statistics`."""
        figures: Figures = {}
        for name, value in self._read().items():
            counter, *texts = name.split("/")
            metric = ENGINE.get(counter)
            if metric is None or len(texts) != len(metric.labels):
                continue
            labels = dict(zip(metric.labels, texts, strict=True))
            figures.setdefault(metric.name, []).append({**labels, "value": value})
        return figures


class Work(NamedTuple):
    """What is measured, and what makes it work a little."""

    meter: Meter
    work: Callable[[int], None]
    #: Returns the counters of tiers and levels of disks that an engine with this store reports.
    tiers: Callable[[], Mapping[str, float]]
    #: Has a link be busy, and some tasks wait for it, until the event is set.
    occupy: Callable[[int, threading.Event], None]


@contextmanager
def working(folder: Path) -> Iterator[Work]:
    """Yield sources that have something to report."""
    caches = [torch.ones(32, 2, 16, 4, 64, dtype=torch.float16, device="cpu") for _ in range(4)]
    view = KVView(caches, LAYOUT)
    form = BlockForm.of(view, "a model")
    rows = shared_empty((4, 2, 32, 16, 4, 64), torch.float16)
    shard = Shard(KVView([*rows], "layer | kv block token head dim"))
    size = form.image_bytes
    terms = StoreTerms.of(
        {"folder": (str(folder / "keeper"),), "host": 1 << 26, "staging": 1 << 26}
    )
    with ExitStack() as stack:
        enter = stack.enter_context
        tiers: list[Any] = [Disk(folder / "disk", capacity=24 * size), Remote("memory:///")]
        store = enter(BlockStore(form, tiers=tiers, staging=16 * size, host=12 * size))
        store_server = enter(StoreServer(terms))
        client = enter(StoreClient(store_server.place, [form], "an engine"))
        there, here = Channel(), Channel()
        stack.callback(there.close)
        stack.callback(here.close)
        owner = Owner(there, shard, model="a model")
        stack.callback(owner.close)
        reader = Reader(here, shard, model="a model")
        stack.callback(reader.close)
        published = publish(there, {"w": rows})
        stack.callback(published.close)
        copies = count_copies()
        stack.callback(copies.close)
        engine = dict.fromkeys(_engine_counters(), 0.0)
        sources = owner, reader, there, published, copies, count_weights()
        meter = Meter(
            *sources, EngineFigures(lambda: engine), store=store, store_server=store_server
        )
        if not client.wait(PATIENCE):
            raise SystemExit("Expected a store server that serves, got none in its time.")
        weights = {"w": torch.zeros_like(rows)}
        waiting = list[Pull]()

        def work(turn: int) -> None:
            keys = prefix_keys(range(1000 * turn, 1000 * turn + 16 * 6), 16)
            store.save(view, range(6), keys).synchronize(PATIENCE)
            store.load(view, range(6), keys).synchronize(PATIENCE)
            before = 1000 * max(0, turn - 3)
            old = prefix_keys(range(before, before + 16 * 6), 16)
            store.load(view, range(6), old).synchronize(PATIENCE)
            store.graph.count("disk", "load", "fault", turn % 3)
            client.blocks[0].save(view, range(6), keys).synchronize(PATIENCE)
            for _ in range(5):
                offer = owner.offer(range(4), tokens=60)
                reader.pull(offer.ticket, range(8, 12)).synchronize(PATIENCE)
            owner.offer(range(4), tokens=60).revoke()
            there.counts["gone"] += turn % 2
            pull_weights(here, published.ticket, weights)
            for name in engine:
                engine[name] += 0.001 if "seconds" in name else 100

        def occupy(turn: int, until: threading.Event) -> None:
            graph = store.graph
            queue = graph.queue("host-device")
            nbytes = size * (turn % 5)
            held = [
                Task(lambda *_: until.wait(), 1, queue=queue, name="hold", nbytes=nbytes)
                for _ in range(queue.width + 2)
            ]

            async def hold(task: Task) -> None:
                await task.move(np.ones(1, np.bool_))

            def begin() -> None:
                graph.enter(held, "normal")
                for task in held:
                    graph.runtime.start(hold(task))

            graph.runtime.change(begin)
            if turn % 4 == 1:  # a pull of an offer that never comes
                name = turn.to_bytes(16, "big")
                waiting.append(reader.pull(Ticket.of(there.address, owner.epoch, name), [0]))
            elif waiting:
                waiting.pop().cancel()

        def levels_and_tiers() -> dict[str, float]:
            figures = store.statistics()
            return figures_of(figures)

        yield Work(meter, work, levels_and_tiers, occupy)


def _engine_counters() -> list[str]:
    """Return the counters of an engine, which none runs here, with values of their labels."""
    values = {"side": ("scheduler", "worker"), "hook": ("hook",), "seconds": ("0.0001", "inf")}
    names = list[str]()
    for name, metric in ENGINE.items():
        made = [name]
        for label in metric.labels:
            made = [f"{each}/{value}" for each in made for value in values[label]]
        names += made
    return names


def record(folder: Path, end: float) -> Path:
    """Return a file with the figures of `READINGS` times until ``end``, in OpenMetrics' format."""
    lines = dict[str, list[str]]()
    with working(folder) as (meter, work, tiers, occupy):
        for turn in range(READINGS):
            work(turn)
            held = threading.Event()
            occupy(turn, held)
            at = end - STEP * (READINGS - 1 - turn)
            for family in meter.families():
                name = _shown(family)
                own = lines.setdefault(
                    name, [f"# TYPE {name.removesuffix('_total')} {family.kind}"]
                )
                for sample in family.samples:
                    series = f"{name}_{sample.series}" if sample.series else name
                    own.append(_line(series, sample.labels, sample.value, at))
            for counter, value in tiers().items():
                name, kind, labels = _of_tier(counter)
                own = lines.setdefault(name, [f"# TYPE {name.removesuffix('_total')} {kind}"])
                own.append(_line(name, labels, value, at))
            held.set()
    path = folder / "series"
    path.write_text("\n".join([*(x for own in lines.values() for x in own), "# EOF\n"]))
    return path


def _line(series: str, labels: Mapping[str, str], value: float, at: float) -> str:
    """Return a line of OpenMetrics' format."""
    texts = ",".join(f"{name}={json.dumps(text)}" for name, text in labels.items())
    return f"{series}{{{texts}}} {value} {at:.3f}"


def _of_tier(counter: str) -> tuple[str, str, dict[str, str]]:
    """Return the name, the kind and the labels under which vLLM shows a counter or a level."""
    name, texts = series_of(counter)
    metric = REPORTED[name]
    labels = dict(zip(metric.labels, texts, strict=True))
    return f"vllm:{PREFIX}{metric.name}", metric.kind, labels


def _shown(family: Family) -> str:
    """Return the name of a metric, which vLLM changes for those of its connectors."""
    if family.metric in ENGINE.values():
        return f"vllm:{PREFIX}{family.name.removeprefix('engine_')}"
    return PREFIX + family.name


@contextmanager
def prometheus(series: Path, folder: Path) -> Iterator[str]:
    """Yield the address of a Prometheus that has these series."""
    data = folder / "data"
    command = ["promtool", "tsdb", "create-blocks-from", "openmetrics", str(series), str(data)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (folder / "prometheus.yml").write_text("{}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--storage.tsdb.retention.time=10y", "--log.level=error"]
    words += [f"--storage.tsdb.path={data}", f"--config.file={folder / 'prometheus.yml'}"]
    server = subprocess.Popen(["prometheus", f"--web.listen-address=127.0.0.1:{port}", *words])
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{url}/-/ready")
        yield url
    finally:
        server.terminate()
        server.wait(PATIENCE)


def _wait_for(url: str) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            urllib.request.urlopen(url, timeout=PATIENCE).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def answers(url: str, query: str, end: float) -> list[Any]:
    """Return the series that answer a query over the recorded time; raise `SystemExit` for none."""
    for variable, value in RATE.items():
        query = query.replace(variable, value)
    start = end - STEP * (READINGS - 1)
    terms = {"query": query, "start": start, "end": end, "step": STEP}
    with urllib.request.urlopen(
        f"{url}/api/v1/query_range?{urllib.parse.urlencode(terms)}", timeout=PATIENCE
    ) as answer:
        found: list[Any] = json.load(answer)["data"]["result"]
    numbers = [float(value) for series in found for _, value in series["values"]]
    if not any(map(math.isfinite, numbers)):
        raise SystemExit(f"Expected an answer to {query}, got none.")
    return found


def draw(panels: list[tuple[Any, list[tuple[str, Any]]]], picture: Path, end: float) -> None:
    """Draw the panels, two in a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = -(-len(panels) // 2)
    figure, axes = pyplot.subplots(rows, 2, figsize=(15, 2.3 * rows), layout="constrained")
    for place, (panel, found) in zip(axes.flat, panels, strict=False):
        for legend, series in found:
            label = legend
            for name, value in series["metric"].items():
                label = label.replace("{{" + name + "}}", value)
            label = re.sub(r"/[^ ]*/(?=\w)", "/", label)  # the folder is a temporary one
            times = [(at - end) / 60 for at, _ in series["values"]]
            place.plot(times, [float(value) for _, value in series["values"]], label=label, lw=1)
        unit = panel["fieldConfig"]["defaults"]["unit"]
        place.set_title(f"{panel['title']} [{unit}]", fontsize=9, loc="left")
        place.tick_params(labelsize=7)
        place.set_ylim(bottom=0)
        place.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False)
        place.set_xlabel("minutes", fontsize=7)
    for place in axes.flat[len(panels) :]:
        place.axis("off")
    figure.savefig(picture, dpi=80)


def main(picture: str) -> None:
    """Record, ask and draw."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    end = float(int(time.time()) // 3600 * 3600)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        series = record(folder, end)
        with prometheus(series, folder) as url:
            panels = list[tuple[Any, list[tuple[str, Any]]]]()
            for panel in [each for each in dashboard["panels"] if each["type"] != "row"]:
                found = [
                    (target["legendFormat"], each)
                    for target in panel["targets"]
                    for each in answers(url, target["expr"], end)
                ]
                panels.append((panel, found))
    queries = sum(len(panel["targets"]) for panel, _ in panels)
    draw(panels, Path(picture), end)
    print(f"Prometheus has answered the {queries} queries of {len(panels)} panels.")


if __name__ == "__main__":
    main(sys.argv[1])
