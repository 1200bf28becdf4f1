# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several files of this folder use."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from support.command_line import Ran, run, settle

from portakv.registry import registry


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a separate registry: later tests would also choose what a test registers."""
    made = registry.Registry()
    monkeypatch.setattr(registry, "REGISTRY", made)
    monkeypatch.setattr("portakv_conformance.judge.subject.REGISTRY", made)


@pytest.fixture
def conform(own_registry: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """`portakv conform` in this process, with real workers."""
    settle(monkeypatch)
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return partial(run, "conform")
