# SPDX-License-Identifier: Apache-2.0
"""Streams of the library's own, with a stand-in for the CUDA driver: who has one has it alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fake_libcuda import FakeLibrary
from support.guarded_memory import refused

from portakv import TransferError
from portakv.runtime import _libcuda
from portakv.runtime import cuda as _cuda_driver
from portakv.runtime import streams as _streams
from portakv.runtime.streams import own_stream

CARD = torch.device("cuda", 0)


class Stream:
    """Torch's, as far as it can be had without a device."""

    def __init__(self, handle: int, device: torch.device) -> None:
        self.handle, self.device = handle, device

    __del__ = _streams._Own.__del__


@pytest.fixture
def driver(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    folder: Path = tmp_path_factory.getbasetemp()
    library = FakeLibrary(folder, None).library
    monkeypatch.setattr(_libcuda, "library", lambda: library)
    monkeypatch.setattr(_cuda_driver, "no_cuda", lambda device: None)
    monkeypatch.setattr(_cuda_driver, "adopt", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(_streams, "_Own", Stream)
    monkeypatch.setattr(_streams, "_free", defaultdict(list))
    _streams._create_function.cache_clear()
    yield
    _streams._create_function.cache_clear()


@pytest.mark.usefixtures("driver")
def test_those_that_live_are_apart_and_one_that_ends_comes_back() -> None:
    streams: list[Any] = [own_stream(CARD) for _ in range(100)]
    assert len({stream.handle for stream in streams}) == 100
    last, first = streams[50].handle, streams[7].handle
    del streams[50], streams[7]
    assert [own_stream(CARD).handle for _ in range(3)] == [first] * 3  # each is forgotten at once
    again = [own_stream(CARD) for _ in range(2)]
    assert [stream.handle for stream in again] == [first, last]
    assert own_stream(CARD).handle not in {stream.handle for stream in (*streams, *again)}


@pytest.mark.usefixtures("driver")
def test_each_device_and_priority_has_its_own() -> None:
    other = torch.device("cuda", 1)
    handle = own_stream(CARD).handle
    assert own_stream(other).handle != handle
    assert own_stream(CARD, -1).handle != handle
    assert own_stream(CARD).handle == handle


@pytest.mark.usefixtures("driver")
def test_what_the_driver_refuses_is_told() -> None:
    with refused(TransferError, "A stream of cuda:0", "CUDA_ERROR_INVALID_VALUE"):
        own_stream(CARD, -6)


def test_elsewhere_they_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    class Module:
        @staticmethod
        def Stream(device: torch.device, **options: int) -> str:
            asked.append((device, options))
            return "torch's"

    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    npu = torch.device("meta", 0)
    assert (own_stream(npu), own_stream(npu, -1)) == ("torch's", "torch's")
    assert asked == [(npu, {}), (npu, {"priority": -1})]


@pytest.mark.usefixtures("driver")
def test_without_the_drivers_library_they_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> Any:
        raise OSError("libcuda.so.1: cannot open shared object file")

    _streams._create_function.cache_clear()
    monkeypatch.setattr(_libcuda, "library", absent)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "torch's")
    assert own_stream(CARD) == "torch's"
