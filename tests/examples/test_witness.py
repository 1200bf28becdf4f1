# SPDX-License-Identifier: Apache-2.0
"""The examples of a witness find the fault that each of them makes."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@DEVICES
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("witness_sglang", "0 of 4 pages are computed again\n4 of 4 pages are computed again"),
        ("witness_cache", "0 of 8 blocks are wrong\n8 of 8 blocks are wrong older version"),
        ("witness_lmcache", "0 of 32 blocks are computed again\n32 of 32 blocks are"),
    ],
)
def test_an_example_finds_its_fault(
    name: str, text: str, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "witness_lmcache":
        pytest.importorskip("lmcache")
    assert import_module(f"portakv_examples.{name}").main([device]) == 0
    assert text in capsys.readouterr().out


def test_without_lmcache_the_example_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lmcache", None)
    assert import_module("portakv_examples.witness_lmcache").main(["cpu"]) == 2
    assert "LMCache cannot be imported" in capsys.readouterr().err
