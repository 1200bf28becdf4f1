# SPDX-License-Identifier: Apache-2.0
"""Odd backends are refused, never chosen unasked, or called as they claim."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from support.connector_cases import make_caches, make_chunk
from support.guarded_memory import refused
from support.small_backends import small_backend
from support.threads import run_threads

from portakv import (
    AdaptiveConnector,
    BackendUnavailable,
    KVView,
    Unsupported,
    copy_rows,
    register_backend,
)
from portakv.registry import registry


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of its own."""
    monkeypatch.setattr(registry, "REGISTRY", registry.Registry())
    monkeypatch.delenv("PORTAKV_BACKEND", raising=False)


def test_a_backend_that_no_pattern_fits_is_never_chosen_unasked() -> None:
    register_backend("picky", small_backend("picky", rejects=lambda plan: plan.src.layers != 3))
    choice = registry.choose("cpu")
    assert choice.name == "reference"
    reason = next(d.reason for d in choice.trace if d.name == "picky")
    assert "could not be self-checked" in reason
    assert registry.choose("cpu", "picky").name == "picky"
    src, dst = (KVView(torch.zeros(3, 5, 4), "layer token dim") for _ in "ab")
    copy_rows(src, dst, [1, 2], [3, 4], backend="picky").synchronize()
    with pytest.raises(Unsupported, match="check dislikes this plan"):
        copy_rows(src.slice(layers=0), dst.slice(layers=0), [1], [2], backend="picky")


def test_launches_that_claim_no_threads_run_one_at_a_time() -> None:
    running: list[int] = []
    most: list[int] = []

    def slow(view: KVView) -> None:
        running.append(1)
        most.append(len(running))
        time.sleep(0.005)
        running.pop()

    register_backend("lonely", small_backend("lonely", threads=False, spoil=slow))
    connector = AdaptiveConnector("cpu", backend="lonely")
    connector.register_kv_caches(make_caches())
    run_threads(lambda _: connector.from_gpu(make_chunk(2), None, [1, 2]), range(8))
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
