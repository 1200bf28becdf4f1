# SPDX-License-Identifier: Apache-2.0
"""Test launches of kernels with one parameter, by a driver that notes them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import pytest
import torch

from portakv.runtime.cuda import NO_CONTEXT, CudaDriver

FUNCTION = 0x7F55_0000_1230  # a handle of more than 32 bits
STREAM = 0x7F55_0000_4560
ENTRY = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    *[ctypes.c_uint] * 7,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_void_p,
)


class Refused(Exception):
    """An error of the driver."""


class NotedDriver(CudaDriver):
    """A driver that answers its launches with errors in turn, and then with success."""

    def __init__(self, *errors: int, is_current: bool = True) -> None:
        super().__init__(torch.device("cuda", 0))
        self.errors = list(errors)
        self.launches = list[tuple[Any, ...]]()
        self.entered = 0
        self.is_current = is_current
        self._called = ENTRY(self._answer)
        self.entry = ctypes.cast(self._called, ctypes.c_void_p).value or 0

    def _answer(self, function: int, *rest: Any) -> int:
        *shape, stream, parameters, extra = rest
        parameter = ctypes.string_at(parameters[0], 24)
        self.launches.append((function, shape, stream, parameter, extra))
        return self.errors.pop(0) if self.errors else 0

    def number(self, stream: torch.Stream | None) -> int | None:
        return STREAM if self.is_current or self.entered else None

    @contextmanager
    def current(self) -> Iterator[None]:
        self.entered += 1
        yield

    def refuse(self, error: int, what: str) -> NoReturn:
        raise Refused(f"{what}: {error}")


PARAMETER = bytes(range(24))


@pytest.mark.parametrize(
    ("driver", "launches", "entered"),
    [
        (NotedDriver(), 1, 0),
        (NotedDriver(NO_CONTEXT), 2, 1),  # a thread that has no context yet
        (NotedDriver(is_current=False), 1, 1),  # another device is current
    ],
)
def test_a_launch(driver: NotedDriver, launches: int, entered: int) -> None:
    driver.launch(FUNCTION, 5, 128, PARAMETER)
    one = (FUNCTION, [5, 1, 1, 128, 1, 1, 0], STREAM, PARAMETER, None)
    assert driver.launches == [one] * launches
    assert driver.entered == entered


def test_a_launch_that_is_refused() -> None:
    with pytest.raises(Refused, match=r"^The launch: 719$"):
        NotedDriver(719).launch(FUNCTION, 1, 1, PARAMETER)
    with pytest.raises(Refused, match=rf"^A launch: {NO_CONTEXT}$"):
        NotedDriver(NO_CONTEXT, NO_CONTEXT).launch(FUNCTION, 1, 1, PARAMETER, what="A launch")
