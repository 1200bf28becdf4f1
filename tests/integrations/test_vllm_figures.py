# SPDX-License-Identifier: Apache-2.0
"""The connector's figures and events, without vLLM: its classes are stand-ins."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from support.graph_ends import submit
from support.vllm_stub import CLASSES_OF_METRICS, METRICS
from support.waits import LIMIT

from portakv.integrations.vllm import metrics
from portakv.integrations.vllm.metrics import (
    SUPPORTED,
    Figures,
    figures_of,
    parent_of,
    stats_of,
)
from portakv.integrations.vllm.ranks import Kinds, are_wanted, events_of
from portakv.runtime import tracing
from portakv.serving import Described, Group, Report, SchedulerSide
from portakv.serving.local import LocalIndex
from portakv.storage import prefix_keys
from portakv.storage.calls import Change
from portakv.storage.work import Graph, Task


def test_counters_are_reported_as_what_they_have_grown_by() -> None:
    """And once in an interval."""
    time = [0.0]
    counts = {"loads": 3, "requests": 7, "steps/worker": 0.0}
    figures = Figures(1.0, lambda: time[0])
    assert figures.take(lambda: counts) == {}
    time[0] = 1.0
    assert figures.take(lambda: counts) == {"loads": 3}
    counts["loads"] = 5
    counts["steps/worker"] = 4
    assert figures.take(lambda: counts) == {}
    time[0] = 2.0
    assert figures.take(lambda: counts) == {"loads": 2, "steps/worker": 4}
    time[0] = 3.0
    assert figures.take(lambda: counts) == {}


def test_counters_of_a_store_that_began_again_do_not_fall() -> None:
    """Prometheus refuses what is below 0."""
    time = [1.0]
    counts = {"tier_blocks/disk/save/hit": 9.0}
    figures = Figures(0.0, lambda: time[0])
    assert figures.take(lambda: counts) == counts
    assert figures.take(dict) == {}
    counts["tier_blocks/disk/save/hit"] = 2.0
    assert figures.take(lambda: counts) == {"tier_blocks/disk/save/hit": 2.0}


def counters_of_a_graph() -> dict[str, float]:
    """Return the counters of a tier in which a load of two blocks has run, and one waited."""
    graph = Graph()
    queue = graph.queue("disk:/nvme", 1)
    tasks = [Task(lambda *_: None, 1, queue=queue, name="load") for _ in range(2)]
    submit(graph, tasks)
    assert all(task.wait(LIMIT) for task in tasks)
    graph.count("disk", "load", "hit", 2, 20)
    graph.count("disk", "load", "miss", 1)
    counters = figures_of(graph.statistics())
    graph.close()
    return counters


def test_the_counters_of_tiers_are_those_of_the_store() -> None:
    counters = counters_of_a_graph()
    seconds = counters.pop("tier_seconds/disk/load")
    waits = counters.pop("tier_wait_seconds/disk/load")
    assert seconds > 0
    assert waits > 0
    assert counters == {
        "tier_blocks/disk/load/hit": 2,
        "tier_blocks/disk/load/miss": 1,
        "tier_bytes/disk/load": 20,
        "tier_tasks/disk/load": 2,
    }
    assert figures_of({}) == {}


class Series:
    """A counter or a gauge of Prometheus' client, with its values by their labels."""

    made: dict[str, Series]

    def __init__(
        self, name: str, documentation: str, labelnames: list[str], multiprocess_mode: str = "sum"
    ) -> None:
        assert multiprocess_mode == "sum"
        assert documentation.endswith(".")
        self.labelnames = labelnames
        self.values = dict[tuple[object, ...], float]()
        Series.made[name] = self

    def labels(self, *values: object) -> SimpleNamespace:
        assert len(values) == len(self.labelnames)
        self.values.setdefault(values, 0.0)

        def inc(grown: float) -> None:
            assert grown >= 0
            self.values[values] += grown

        def set_to(value: float) -> None:
            self.values[values] = value

        return SimpleNamespace(inc=inc, set=set_to)


@pytest.fixture
def with_vllm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return another copy of the module of figures, next to a vLLM that has figures."""
    name = METRICS.removesuffix(".py").replace("/", ".")
    parts = name.split(".")
    for count in range(1, len(parts)):
        package = ModuleType(".".join(parts[:count]))
        package.__path__ = []
        monkeypatch.setitem(sys.modules, package.__name__, package)
    module = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(CLASSES_OF_METRICS, module.__dict__)
    spec = importlib.util.spec_from_file_location("figures_with_vllm", metrics.__file__)
    assert spec is not None
    assert spec.loader is not None
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    Series.made = {}
    return copied


def test_prometheus_has_the_series_of_tiers(with_vllm: ModuleType) -> None:
    counters = {**counters_of_a_graph(), "loads": 1.0}
    stats = with_vllm.stats_of(counters)
    assert stats.reduce() == {"loads": 1.0}  # vLLM's log
    values = {0: ["model", "0"]}
    kinds = {"counter": Series, "gauge": Series}
    shown = with_vllm.PortaKVPromMetrics(None, kinds, ["model_name", "engine"], values)
    shown.observe(stats.data)
    shown.observe(stats.aggregate(stats).data)
    blocks = Series.made["vllm:portakv_tier_blocks"]
    assert blocks.labelnames == ["model_name", "engine", "tier", "op", "result"]
    assert blocks.values["model", "0", "disk", "load", "hit"] == 6
    for name in ("tier_bytes", "tier_seconds", "tier_tasks", "tier_wait_seconds"):
        assert Series.made[f"vllm:portakv_{name}"].values["model", "0", "disk", "load"] > 0
    assert Series.made["vllm:portakv_loads"].values["model", "0"] == 3


def test_prometheus_has_the_levels_of_disks(with_vllm: ModuleType) -> None:
    """They come as changes, which fall as well, and end at 0 when the store closes."""
    time = [0.0]
    figures = Figures(0.0, lambda: time[0])
    shown = with_vllm.PortaKVPromMetrics(
        None, {"counter": Series, "gauge": Series}, ["engine"], {0: ["0"], 1: ["1"]}
    )

    def level(fill: float, missing: int) -> float:
        """Report levels of engine 1, and return what Prometheus shows."""
        levels = figures_of(
            {
                "disk_fill_ratio": [{"folder": "/nvme/kv", "value": fill}],
                "disk_missing_slots": [{"form": "f", "folder": "/nvme/kv", "value": missing}],
                "disk_free_bytes": [{"folder": "/nvme/kv", "value": 1}],
            }
        )
        report(levels)
        slots = Series.made["vllm:portakv_disk_missing_slots"]
        assert slots.values["1", "f", "/nvme/kv"] == missing
        return Series.made["vllm:portakv_disk_fill_ratio"].values["1", "/nvme/kv"]

    def report(levels: dict[str, float]) -> None:
        stats = with_vllm.stats_of(figures.take(lambda: levels))
        assert stats.reduce() == {}  # vLLM's log
        shown.observe(stats.data, 1)

    assert level(0.5, 8) == 0.5
    assert level(0.25, 3) == 0.25
    report({})
    assert Series.made["vllm:portakv_disk_fill_ratio"].values["1", "/nvme/kv"] == 0
    assert "vllm:portakv_disk_free_bytes" not in Series.made


class Spans:
    """A tracer that keeps spans."""

    def __init__(self) -> None:
        self.spans = list[tuple[str, str, dict[str, Any]]]()

    def current(self) -> str:
        return ""

    def span(
        self, name: str, began: Any, end: int, parent: str, attributes: Any, error: Any
    ) -> None:
        self.spans.append((name, parent or began.traceparent, {**attributes}))


PARENT = f"00-{1:032x}-{2:016x}-01"


@pytest.mark.parametrize(
    ("headers", "parent"),
    [({"traceparent": PARENT}, PARENT), ({"traceparent": "other"}, ""), ({}, ""), (None, "")],
)
@pytest.mark.parametrize("on", [True, False], ids=["on", "control"])
def test_a_load_is_a_span_below_that_of_its_request(headers: Any, parent: str, on: bool) -> None:
    index = LocalIndex()
    index.leading = lambda keys, first=0: len(keys)  # type: ignore[method-assign]
    scheduler_side = SchedulerSide(8, [Group(8)], 1, index)
    request = SimpleNamespace(trace_headers=headers)
    tracer = Spans()
    before = tracing.use(tracer if on else None)
    try:
        scheduler_side.add("a", [*range(25)])
        tokens = scheduler_side.leading("a", 0)
        assert tokens == 24
        with parent_of(request):
            scheduler_side.allocated("a", 0, tokens, ((1, 2, 3),))
        (job,) = scheduler_side.plan().loads
        report = Report()
        report.end(job.number, frozenset({2}))
        scheduler_side.take(report)
    finally:
        tracing.use(before)
    counts = {"load.blocks": 3, "load.blocks_missing": 1}
    assert tracer.spans == ([("portakv load", parent, counts)] if on else [])


@pytest.mark.skipif(SUPPORTED, reason="vLLM is installed")
def test_a_release_without_figures_has_none() -> None:
    assert stats_of({"loads": 1}) is None


@dataclass
class Stored:
    """vLLM's event of blocks that were stored."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str
    lora_name: str | None


@dataclass
class Removed:
    """vLLM's event of blocks that were lost."""

    block_hashes: list[int]
    medium: str


KINDS = Kinds(Stored, Removed)


def changes(tier: str, stored: bool, keys: list[bytes]) -> list[Change]:
    return [Change(number, key, tier, stored) for number, key in enumerate(keys)]


def test_blocks_that_follow_each_other_are_one_event() -> None:
    """A block that nothing describes is no event; it may have been stored by an earlier engine."""
    tokens = [*range(100, 124)]
    keys = prefix_keys(tokens, 8)
    scheduler_side = SchedulerSide(8, [Group(8)], 1, LocalIndex())
    scheduler_side.describe_blocks()
    adapter = SimpleNamespace(lora_int_id=4, lora_name="adapter")
    about = SimpleNamespace(lora_request=adapter)
    scheduler_side.add("a", tokens, about=about)
    scheduler_side.scheduled("a", 0, 24, ((1, 2, 3),), replaced=True)
    assert scheduler_side.described(keys[1]) == Described(keys[0], tuple(tokens[8:16]), about)
    unknown = prefix_keys(range(8), 8)
    made = events_of(
        [
            *changes("host", True, keys[:2]),
            *changes("disk", True, [keys[0]]),
            *changes("disk", True, [keys[2]]),
            *changes("disk", True, unknown),
            *changes("host", False, keys[:2]),
        ],
        scheduler_side.described,
        8,
        KINDS,
    )
    numbers = [int.from_bytes(key, "big") & ((1 << 64) - 1) for key in keys]  # as vLLM's
    assert made == [
        Stored(numbers[:2], None, tokens[:16], 8, 4, "CPU", "adapter"),
        Stored([numbers[0]], None, tokens[:8], 8, 4, "STORAGE", "adapter"),
        Stored([numbers[2]], numbers[1], tokens[16:], 8, 4, "STORAGE", "adapter"),
        Removed(numbers[:2], "CPU"),
    ]


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (SimpleNamespace(), False),
        (SimpleNamespace(kv_events_config=None), False),
        (SimpleNamespace(kv_events_config=SimpleNamespace(enable_kv_cache_events=True)), True),
    ],
)
def test_events_are_made_if_the_engine_publishes_them(config: Any, wanted: bool) -> None:
    assert are_wanted(config, KINDS) is wanted
    assert not are_wanted(config, None)
    assert events_of(changes("host", False, [b"key"]), lambda _: None, 8, None) == []
