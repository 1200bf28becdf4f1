# SPDX-License-Identifier: Apache-2.0
"""Runtimes in which tests of host memory register it, and the ways that small copies may take."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from support import fake_libcuda
from support.device_cases import settle
from support.pinned_runtime import FakeLibrary, absent, claimed, installed
from support.small_cases import PLACES, Card, Place
from support.small_cases import installed as small_installed

from portakv.host import small
from portakv_conformance import simdev


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    """A stand-in in the place of the runtime."""
    return installed(monkeypatch)


@pytest.fixture(params=[installed, absent])
def either(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeLibrary | None]:
    """A test holds with a runtime and without any device; and leaves nothing claimed."""
    before = claimed()
    yield request.param(monkeypatch)
    if claimed() != before:
        gc.collect()  # a caught exception holds the frames that it passed
    assert claimed() == before


@pytest.fixture(scope="session")
def libcuda(tmp_path_factory: pytest.TempPathFactory) -> fake_libcuda.FakeLibrary:
    """A stand-in for the driver's library, whose device is the host."""
    return fake_libcuda.FakeLibrary(tmp_path_factory.getbasetemp(), None)


@pytest.fixture
def card(libcuda: fake_libcuda.FakeLibrary) -> Iterator[Card]:
    """Two CUDA devices, of which the second is current."""
    with small_installed(libcuda) as installed_card:
        yield installed_card


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Each method of small copies to each device, if the device has it."""
    device = torch.device(request.param[0])
    method = request.param[1]
    if method == "inline" and small.inline_copy(device) is None:
        pytest.skip("this device takes no values along with a command")
    if method == "pinned":
        monkeypatch.setattr(small, "inline_copy", lambda device: None)
    yield Place(device, method)
    if method != "host":
        settle(device)
        assert not simdev.take_faults()
