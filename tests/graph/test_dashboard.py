# SPDX-License-Identifier: Apache-2.0
"""The dashboard's queries name metrics and labels that exist; Prometheus evaluates them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.waits import LIMIT

from portakv.graph.meter import METRICS, Metric
from portakv.integrations.vllm.metrics import REPORTED, STORE

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "docs" / "operations" / "dashboard.json"
PANELS = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
QUERIES = [target["expr"] for panel in PANELS for target in panel.get("targets", ())]
#: Names of metrics, with the labels that select series.
NAMED = re.compile(r"(vllm:)?portakv_([a-z_]+)(?:\{([^}]*)\})?")


def metric_of(engine: str | None, name: str) -> Metric:
    """Return the metric of a name in a query."""
    if engine:
        shown = REPORTED.values()
        return next(x for x in shown if x.name.removeprefix("engine_") == name)
    return METRICS[name if name in METRICS else re.sub("_(bucket|sum|count)$", "", name)]


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_names_metrics_and_their_labels(query: str) -> None:
    found = NAMED.findall(query)
    assert found
    groups = [each.replace(" ", "").split(",") for each in re.findall(r"by \(([^)]*)\)", query)]
    for engine, name, selected in found:
        metric = metric_of(engine, name)
        labels = {*metric.labels, "le", "store"}
        assert {*re.findall(r"(\w+)[=!]~?", selected)} <= labels
        assert {label for group in groups for label in group} <= labels
        assert (metric.kind == "gauge") == ("rate(" not in query)


def test_every_series_of_an_engines_tiers_and_disks_has_a_panel() -> None:
    found = {name for query in QUERIES for engine, name, _ in NAMED.findall(query) if engine}
    assert {metric.name for _, metric in STORE.values()} <= found


def test_panels_have_places_of_their_own_and_say_what_they_show() -> None:
    ids = [panel["id"] for panel in PANELS]
    assert len({*ids}) == len(ids)
    squares = list[tuple[int, int]]()
    for panel in PANELS:
        at = panel["gridPos"]
        rows = range(at["y"], at["y"] + at["h"])
        squares += [(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in rows]
        if panel["type"] != "row":
            assert panel["description"].endswith(".")
    assert len({*squares}) == len(squares)


@pytest.mark.full
def test_prometheus_answers_every_query(tmp_path: Path) -> None:
    if shutil.which("promtool") is None or shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed")
    picture = tmp_path / "dashboard.png"
    command = [sys.executable, str(ROOT / ".ci" / "dashboard.py"), str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    assert f"answered the {len(QUERIES)} queries" in done.stdout
    assert picture.stat().st_size > 10_000
