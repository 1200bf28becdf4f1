# SPDX-License-Identifier: Apache-2.0
"""Values of small copies, checks that they arrived, and a CUDA device that is the host.

The device's kernels are compiled by g++. Its driver is a stand-in that copies immediately and notes
the requests and their memory. It proves nothing about a real driver.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from portakv.host import small
from portakv.host import small as _small_methods
from portakv.host.small import SmallCopy, to_device
from portakv.runtime import cuda
from portakv.runtime.devices import capture_question
from support.cuda_on_cpu import compiled, why_not
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


#: Parameters of the fixture `place`: the host, also as the device of `installed`, and devices.
HOST_METHODS = [_case("cpu", method) for method in ("host", "inline", "value")]
METHODS = [
    _case("privateuseone:0", "copy", pytest.mark.simdev),
    *(_case("cuda:0", method, pytest.mark.gpu) for method in ("inline", "value", "mapped", "copy")),
]


class Place(NamedTuple):
    """A device, a method of copying to it, the requested method, and a stand-in for its driver."""

    device: torch.device
    method: str
    requested: str | None
    card: Card | None

    @property
    def most(self) -> int:
        """Return the number of bytes that the method takes."""
        return _small_methods.MOST.get(self.method, 1 << 20)


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
    return landed.dtype == values.dtype and torch.equal(
        landed.cpu().view(torch.uint8), values.view(torch.uint8)
    )


def small_copy(call: str, method: str | None) -> Callable[..., torch.Tensor]:
    """Return a small copy to a target by ``call``: ``new``, or one that is ``ready`` for that
    target."""
    senders: dict[int, SmallCopy] = {}  # kept, since a kernel may still read their memory

    def send(values: Any, out: torch.Tensor, **more: Any) -> torch.Tensor:
        if call == "new":
            return to_device(values, out=out, method=method, **more)
        if id(out) not in senders:
            senders[id(out)] = SmallCopy(out.numel(), out.dtype, out=out, method=method)
        return senders[id(out)].send(values, **more)

    return send


def forget() -> None:
    """Forget the facts and the memory that small copies have cached of devices."""
    small.targets.clear()
    capture_question.cache_clear()


@cache
def kernels() -> ctypes.CDLL:
    """Return the small copies' kernels compiled by g++, each called by an entry that runs its
    grid."""
    if why := why_not():
        pytest.skip(why)
    kinds = {_small_methods.MAPPED_NAME: "Mapped", _small_methods.VALUES_NAME: "Values"}
    entries = "".join(
        f'extern "C" void run_{name}(const void* argument, unsigned blocks, unsigned threads) {{\n'
        f"    run_grid<portakv::small::{kind}>({name}, argument, blocks, 1, threads);\n}}\n"
        f'extern "C" unsigned bytes_{name}() {{ return sizeof(portakv::small::{kind}); }}\n'
        for name, kind in kinds.items()
    )
    return compiled(_small_methods.source(), entries)


class Card:
    """A CUDA device whose memory is the host's, and its driver, of which this is the bindings."""

    def __init__(self, library: FakeLibrary) -> None:
        self.library = library
        library.forget()
        library.read_by_page_tables()
        # torch's device, and the devices that became it
        self.current = 1
        self.entered = list[int]()
        self.raw: dict[int | None, int] = {None: STREAM, 0: 70, 1: STREAM}  # its current streams
        self.adopted: list[int] = []  # threads that got a context
        self.launches: list[tuple[int, int, int]] = []  # where to, how many bytes, which stream
        self.answer = 0  # the driver's answer

    @property
    def sends(self) -> list[tuple[int, int, int]]:
        """Return the target, the bytes and the stream of each send."""
        return [(one.dst, one.nbytes, one.stream) for one in self.library.sent] + self.launches

    def forget(self) -> None:
        self.library.forget()
        self.launches.clear()

    def CUstream(self, handle: int) -> int:
        return handle

    def cuLaunchKernel(self, function: Any, blocks: int, *rest: Any) -> tuple[int]:
        stream, parameters = rest[-3:-1]
        argument = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))[0] or 0
        head = ctypes.string_at(argument, _small_methods.VALUES_HEAD.size)
        to, nbytes, _ = _small_methods.VALUES_HEAD.unpack(head)
        assert 1 <= blocks <= _small_methods.MOST_BLOCKS
        if not self.answer:
            function(ctypes.c_void_p(argument), blocks, rest[2])
        self.launches.append((to, nbytes, stream))
        return (self.answer,)

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before = self.current
        self.current = device.index
        self.entered.append(device.index)
        yield
        self.current = before


@contextmanager
def installed(library: FakeLibrary, only: str | None = None) -> Iterator[Card]:
    """Give torch two such devices. With the method ``only``, small copies to the CPU use that
    method if they fit, as on a device with one method."""
    card = Card(library)

    def load(source: str, names: Iterable[str], device: torch.device) -> dict[str, Any]:
        return {name: getattr(kernels(), f"run_{name}") for name in names}

    def lacks(method: str, device: torch.device) -> str | None:
        return None if method in ("host", only) else "it is a test"

    stands: dict[Any, dict[str, Any]] = {
        torch._C: {
            "_cuda_getDevice": lambda: card.current,
            "_cuda_getCurrentRawStream": lambda index: card.raw[index],
            "_cuda_isCurrentStreamCapturing": lambda: False,
        },
        torch.cuda: {
            "device_count": lambda: 1 if only else 2,
            "device": card.device,
            "is_available": lambda: True,
        },
        torch.accelerator: {"current_device_index": lambda: card.current},
        cuda: {
            "library": lambda: library.library,
            "bindings": lambda: card,
            "why_not": lambda device: None,
            "device_too_old": lambda device: None,
            "adopt": lambda device: card.adopted.append(threading.get_ident()),
            "load": load,
        },
        **({_small_methods: {"lacks": lacks}} if only else {small: {"resolve": torch.device}}),
    }
    with pytest.MonkeyPatch.context() as patched:
        for module, functions in stands.items():
            for name, function in functions.items():
                patched.setattr(module, name, function, raising=False)
        forget()
        yield card
    forget()
