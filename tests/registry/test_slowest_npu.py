# SPDX-License-Identifier: Apache-2.0
"""One warning if a device that a native backend is made for gets `reference`: on the simulated
device that is named npu, without the vendor's package."""

from __future__ import annotations

import logging

import pytest
import torch
from support.own_process import own_process
from support.small_backends import small_backend

from portakv import AdaptiveConnector, KVView, copy_rows
from portakv.backends.base import Backend
from portakv.registry import registry
from portakv.registry.registry import SelfCheck, self_check

pytestmark = own_process("npu", "npu without its package")

DEVICES = [torch.device("privateuseone", n) for n in (0, 1)]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> registry.Registry:
    made = registry.Registry()
    monkeypatch.setattr(registry, "REGISTRY", made)
    caplog.set_level(logging.INFO)
    return made


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [x.getMessage() for x in caplog.records if x.levelno >= logging.WARNING]


def test_it_is_warned_of_once(fresh: registry.Registry, caplog: pytest.LogCaptureFixture) -> None:
    assert registry.choose(DEVICES[0]).name == "reference"
    (line,) = warned(caplog)
    assert line.startswith("npu:0: copies are slow, by backend reference, since no faster one")
    assert "ascend" in line
    assert "torch_npu" in line  # what to install
    assert "cuda" not in line  # it is made for other devices
    assert "portakv backends --device npu:0" in line
    assert "\n" not in line
    registry.choose(DEVICES[0])
    registry.choose(DEVICES[1])
    AdaptiveConnector(DEVICES[1])
    src, dst = (KVView(torch.zeros(4, 8, device=DEVICES[0]), "token dim") for _ in range(2))
    copy_rows(src, dst).synchronize()
    assert warned(caplog) == [line]


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_nothing_is_said_if_it_was_asked_for(
    by: str,
    fresh: registry.Registry,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name: str | None = "reference"
    if by == "environment":
        monkeypatch.setenv("PORTAKV_BACKEND", "reference")
        name = None
    assert registry.choose(DEVICES[0], name).name == "reference"
    assert not warned(caplog)
    if by == "environment":  # the negative control: the same call, which nothing asks for it
        monkeypatch.delenv("PORTAKV_BACKEND")
    registry.choose(DEVICES[0])
    assert len(warned(caplog)) == 1


def test_nothing_is_said_on_a_cpu(
    fresh: registry.Registry, caplog: pytest.LogCaptureFixture
) -> None:
    assert registry.choose("cpu").name == "reference"
    assert not warned(caplog)


def test_nothing_is_said_if_another_backend_serves(
    fresh: registry.Registry, caplog: pytest.LogCaptureFixture
) -> None:
    fresh.register("fast", small_backend("fast"))
    assert registry.choose(DEVICES[0]).name == "fast"
    assert not warned(caplog)


def test_a_backend_that_fails_its_self_check_is_named(
    fresh: registry.Registry, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = self_check

    def failed(backend: Backend) -> tuple[SelfCheck, str]:
        return (SelfCheck.FAILED, "wrong bytes") if backend.name == "fast" else own(backend)

    monkeypatch.setattr(registry, "self_check", failed)
    fresh.register("fast", small_backend("fast"))
    assert registry.choose(DEVICES[0]).name == "reference"
    (line,) = warned(caplog)
    assert "wrong bytes" in line
