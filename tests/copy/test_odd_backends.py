# SPDX-License-Identifier: Apache-2.0
"""Odd backends are refused, never chosen unasked, or called as they claim."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from support.connector_cases import make_caches, make_chunk
from support.guarded_memory import refused
from support.small_backends import small_backend

from portakv import (
    AdaptiveConnector,
    BackendUnavailable,
    CopyPlan,
    KVView,
    Unsupported,
    copy_rows,
    register_backend,
)
from portakv.backends.base import Decision
from portakv.registry import registry


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of its own."""
    monkeypatch.setattr(registry, "REGISTRY", registry.Registry())
    monkeypatch.delenv("PORTAKV_BACKEND", raising=False)


def test_a_backend_that_no_pattern_fits_is_never_chosen_unasked() -> None:
    class Picky(small_backend("picky")):  # type: ignore[misc]
        def check(self, plan: CopyPlan) -> Decision:
            takes = plan.src.layers == 3
            return Decision(self.name, takes, "it takes three layers and nothing else")

    register_backend("picky", Picky)
    choice = registry.choose("cpu")
    assert choice.name == "reference"
    reason = next(d.reason for d in choice.trace if d.name == "picky")
    assert "could not be self-checked" in reason
    forced = registry.choose("cpu", "picky")
    assert forced.name == "picky"
    views = [KVView(torch.zeros(3, 5, 4), "layer token dim") for _ in "ab"]
    copy_rows(views[0], views[1], [1, 2], [3, 4], backend="picky").synchronize()
    narrow = [view.slice(layers=0) for view in views]
    with pytest.raises(Unsupported, match="three layers"):
        copy_rows(narrow[0], narrow[1], [1], [2], backend="picky")


def test_launches_that_claim_no_threads_run_one_at_a_time() -> None:
    running, most = [], []

    class Lonely(small_backend("lonely", threads=False)):  # type: ignore[misc]
        def prepare(self, plan: CopyPlan) -> Any:
            launch = super().prepare(plan)

            def slow(*arguments: Any) -> None:
                running.append(1)
                most.append(len(running))
                time.sleep(0.005)
                launch(*arguments)
                running.pop()

            return slow

    register_backend("lonely", Lonely)
    caches = make_caches()
    connector = AdaptiveConnector("cpu", backend="lonely")
    connector.register_kv_caches(caches)
    calls = [
        threading.Thread(target=connector.from_gpu, args=(make_chunk(2), None, [1, 2]))
        for _ in range(8)
    ]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert max(most) == 1


def test_a_vendor_that_exits_is_reported_like_any_other(tmp_path: Any, monkeypatch: Any) -> None:
    (tmp_path / "leaver.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    register_backend("leaver", "leaver:Backend")
    found = {d.name: d.reason for d in registry.trace("cpu")}
    assert "SystemExit" in found["leaver"]
    assert registry.choose("cpu").name == "reference"


@pytest.mark.parametrize("name", ["", None, 3])
def test_names_that_are_none(name: Any) -> None:
    with refused(BackendUnavailable, "not empty"):
        register_backend(name, "some.where:Class")
