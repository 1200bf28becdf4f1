# SPDX-License-Identifier: Apache-2.0
"""How a small copy is launched: streams, devices and forks, with a driver that only notes it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support.small_cases import forget, sent_by_a_fork

from portakv import TransferError
from portakv.host import _small_ways, small
from portakv.host._small_ways import ByValue
from portakv.runtime import cuda as _cuda_driver
from portakv.runtime.devices import capture_question

CARD = torch.device("cuda", 1)


class Launch(NamedTuple):
    """What the driver was asked: the kernel, its blocks, its parameter's head, and the stream."""

    function: str
    blocks: int
    head: tuple[int, ...]
    stream: int


class Driver:
    """The driver's functions, and what torch tells of two devices."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.made: list[int] = []
        self.current, self.entered = 1, list[int]()
        self.raw = {0: 70, 1: 71}
        self.answer = 0

    def CUstream(self, handle: int) -> int:
        self.made.append(handle)
        return handle

    def cuLaunchKernel(self, function: str, blocks: int, *rest: Any) -> tuple[int]:
        stream, parameters = rest[-3:-1]
        argument = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))[0]
        head = _small_ways.VALUES_HEAD.unpack(
            ctypes.string_at(argument or 0, _small_ways.VALUES_HEAD.size)
        )
        self.launches.append(Launch(function, blocks, head, stream))
        return (self.answer,)

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        self.entered.append(device.index)
        yield
        self.current = before


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    fake = Driver()
    for name, stands in {
        "_cuda_getDevice": lambda: fake.current,
        "_cuda_getCurrentRawStream": lambda index: fake.raw[index],
        "_cuda_isCurrentStreamCapturing": lambda: False,
    }.items():
        monkeypatch.setattr(torch._C, name, stands, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", fake.device)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: fake.current)
    monkeypatch.setattr(_cuda_driver, "bindings", lambda: fake)
    monkeypatch.setattr(_cuda_driver, "adopt", lambda device: None)
    monkeypatch.setattr(_cuda_driver, "driver_version", lambda: 13000)
    monkeypatch.setattr(_cuda_driver, "capability", lambda device: 90)
    monkeypatch.setattr(_cuda_driver, "load", lambda source, names, device: {n: n for n in names})
    forget()
    yield fake
    forget()


def test_each_launch_says_where_to_and_how_much(driver: Driver) -> None:
    way = ByValue(CARD, torch.int64, 64)
    first, other = torch.zeros(64, dtype=torch.int64), torch.zeros(64, dtype=torch.int64)
    sends = [(first, 64), (first, 64), (other, 64), (other, 3), (first, 3), (first, 64)]
    for out, count in sends:
        assert way.send(np.arange(count), out, None, False) == count
    assert [one.head[:2] for one in driver.launches] == [
        (out.data_ptr(), 8 * count) for out, count in sends
    ]
    assert {one.function for one in driver.launches} == {_small_ways.VALUES_NAME}
    first.set_(torch.zeros(64, dtype=torch.int64).untyped_storage())
    way.send(np.arange(3), first, None, False)
    assert driver.launches[-1].head[0] == first.data_ptr()


def test_the_current_stream_of_its_device(driver: Driver) -> None:
    way, out = ByValue(CARD, torch.int32, 4), torch.zeros(4, dtype=torch.int32)
    way.send([1, 2], out, None, False)
    way.send([1, 2], out, None, False)
    driver.raw[1] = 72
    way.send([1, 2], out, None, False)
    driver.current = 0
    way.send([1, 2], out, None, False)
    assert [one.stream for one in driver.launches] == [71, 71, 72, 72]
    assert driver.made == [71, 72]
    assert (driver.entered, driver.current) == ([1], 0)


def test_a_capture_is_asked_of_its_device(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = {0: False, 1: True}
    monkeypatch.setattr(
        torch._C, "_cuda_isCurrentStreamCapturing", lambda: captured[driver.current]
    )
    capture_question.cache_clear()
    monkeypatch.setattr(
        torch, "get_device_module", lambda device: type("Module", (), {"device": driver.device})
    )
    asks: Callable[[], bool] = small._capture_question(CARD)
    assert asks()
    driver.current = 0
    assert asks()
    captured.update({0: True, 1: False})
    assert not asks()
    assert driver.current == 0
    capture_question.cache_clear()


def test_a_driver_that_refuses(driver: Driver) -> None:
    driver.answer = 719
    with pytest.raises(TransferError, match="719"):
        ByValue(CARD, torch.int8, 4).send([1], torch.zeros(4, dtype=torch.int8), None, False)


def test_a_forked_process_cannot_launch(driver: Driver) -> None:
    way, out = ByValue(CARD, torch.int8, 4), torch.zeros(4, dtype=torch.int8)
    way.send([1], out, None, False)
    assert sent_by_a_fork(way, out) == 0
    way.send([3], out, None, False)
    assert len(driver.launches) == 2
