# SPDX-License-Identifier: Apache-2.0
"""Values of small copies, checks that they arrived, and a CUDA device that is the host.

The device's driver is a stand-in that copies immediately and notes the requests and their memory.
It proves nothing about a real driver.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from portakv.host import small
from portakv.runtime import cuda
from support.fake_libcuda import FakeLibrary

INTEGERS = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
)
STREAM = 0x7F55_0000_1230  # a handle of more than 32 bits


def _case(device: str, method: str, *marks: pytest.MarkDecorator) -> Any:
    return pytest.param((device, method), id=f"{device.partition(':')[0]}-{method}", marks=marks)


#: Parameters of the fixture `place`: devices, and the method by which small copies go to them.
DEVICES = [
    _case("privateuseone:0", "pinned", pytest.mark.simdev),
    _case("cuda:0", "inline", pytest.mark.gpu),
    _case("cuda:0", "pinned", pytest.mark.gpu),
]
PLACES = [_case("cpu", "host"), *DEVICES]


class Place(NamedTuple):
    """A device, and a method of copying to it."""

    device: torch.device
    method: str


def drawn(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return elements with any bits, on the host."""
    if dtype == torch.bool:
        return torch.arange(count) % 3 == 0
    if not count:
        return torch.empty(0, dtype=dtype)  # numpy's empty array has stride 0, of which no view is
    wide = np.random.default_rng(count).integers(0, 256, count * dtype.itemsize, np.uint8)
    return torch.from_numpy(wide).view(dtype)


def same_bits(landed: torch.Tensor, values: torch.Tensor) -> bool:
    """Return True if a tensor holds the dtype and the bits of values on the host."""
    bits = [each.cpu().reshape(-1).view(torch.uint8) for each in (landed, values)]
    return (landed.dtype, landed.shape) == (values.dtype, values.shape) and torch.equal(*bits)


class Card:
    """A CUDA device whose memory is the host's, with a stand-in for its driver's library."""

    def __init__(self, library: FakeLibrary) -> None:
        self.library = library
        library.forget()
        library.read_by_page_tables()
        # torch's device, and the devices that became it
        self.current = 1
        self.entered = list[int]()
        self.raw: dict[int | None, int] = {None: STREAM, 0: 70, 1: STREAM}  # its current streams
        self.adopted: list[int] = []  # threads that got a context

    @property
    def sends(self) -> list[tuple[int, int, int]]:
        """Return the target, the bytes and the stream of each command."""
        return [(one.dst, one.nbytes, one.stream) for one in self.library.sent]

    @contextmanager
    def entering(self, device: torch.device) -> Iterator[None]:
        before = self.current
        self.current = device.index
        self.entered.append(device.index)
        yield
        self.current = before


@contextmanager
def installed(library: FakeLibrary) -> Iterator[Card]:
    """Give torch two such devices."""
    card = Card(library)
    stands: dict[Any, dict[str, Any]] = {
        torch._C: {
            "_cuda_getDevice": lambda: card.current,
            "_cuda_getCurrentRawStream": lambda index: card.raw[index],
        },
        torch.cuda: {
            "device_count": lambda: 2,
            "is_available": lambda: True,
        },
        cuda.Caller: {"current": lambda self: card.entering(self.device)},
        cuda: {
            "library": lambda: library.library,
            "adopt": lambda device: card.adopted.append(threading.get_ident()),
        },
    }
    with pytest.MonkeyPatch.context() as patched:
        for module, functions in stands.items():
            for name, function in functions.items():
                patched.setattr(module, name, function, raising=False)
        small.inline_copy.cache_clear()
        yield card
    small.inline_copy.cache_clear()
