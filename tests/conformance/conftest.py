# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several files of this folder use."""

from __future__ import annotations

import pytest

from portakv.registry import registry


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of the test's own: what is registered would also be chosen by tests behind it."""
    made = registry.Registry()
    monkeypatch.setattr(registry, "REGISTRY", made)
    monkeypatch.setattr("portakv_conformance.judge.subject.REGISTRY", made)
