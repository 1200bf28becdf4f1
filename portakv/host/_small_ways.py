# SPDX-License-Identifier: Apache-2.0
"""How small values cross: in a launch's parameters, or through pinned memory that is read later."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

from .. import capture
from ..errors import LayoutError, Unsupported
from . import _cuda_driver, _flight
from . import _small_kernel as kernel
from ._values import Values, count_of, pack, packed_bytes

#: Sends of one `Ring` that may be under way; the next one makes the host wait for the oldest.
MOST_SLOTS = 16

Cross = Callable[[torch.Tensor, "Slot", int, "torch.Stream | None"], None]


class Kernels:
    """The loaded kernels of one device, and how one is launched."""

    def __init__(self, device: torch.device) -> None:
        limit = kernel.parameter_limit(
            _cuda_driver.driver_version(), _cuda_driver.capability(device)
        )
        self.device = device
        self.capacities = kernel.capacities(limit)
        names = [kernel.MAPPED_NAME, *map(kernel.values_name, self.capacities)]
        self.functions = _cuda_driver.load(kernel.source(limit), names, device)
        self.launch = _cuda_driver.Launcher(device, kernel.THREADS)


@cache
def kernels(device: torch.device) -> Kernels:
    """The kernels of a device, compiled and loaded once.

    Raises:
        Unsupported: inside graph capture, where nothing can be loaded.
    """
    if capture.capturing(device):
        raise _flight.refuse_capture(
            "The first small copy of a device",
            "its kernels have to be loaded first; make one before the capture",
        )
    return Kernels(device)


class Way(ABC):
    """One way of carrying up to so many bytes, again and again, from any thread."""

    @abstractmethod
    def send(
        self, settled: Values, out: torch.Tensor, stream: torch.Stream | None, captures: bool
    ) -> None:
        """Write the values to the beginning of ``out``, which is contiguous, on the stream."""

    @abstractmethod
    def refill(self, settled: Values, dtype: torch.dtype) -> None:
        """Change what the captured send carries."""


class ByValue(Way):
    """In the parameters: the values are gone from the host when the launch returns."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        loaded = kernels(device)
        capacity = kernel.capacity_for(nbytes)
        self._function = loaded.functions[kernel.values_name(capacity)]
        self._launch = loaded.launch
        self._arguments = _cuda_driver.Arguments(kernel.VALUES_HEAD.size + capacity, device)

    def send(
        self, settled: Values, out: torch.Tensor, stream: torch.Stream | None, captures: bool
    ) -> None:
        arguments = self._arguments
        nbytes = pack(arguments.room[kernel.VALUES_HEAD.size :], settled, out.dtype)
        if not nbytes:
            return
        to = out.data_ptr()
        width = kernel.width(to)
        kernel.VALUES_HEAD.pack_into(arguments.buffer, 0, to, nbytes, width)
        self._launch(self._function, kernel.blocks(nbytes, width), arguments.address, stream)

    def refill(self, settled: Values, dtype: torch.dtype) -> None:
        raise Unsupported(
            "Refilling a small copy by value",
            "its contents were fixed when it was captured; make it with way='mapped'",
        )


class Slot(NamedTuple):
    """Pinned memory for one send."""

    memory: torch.Tensor
    room: memoryview
    address: int
    event: torch.Event


def make_slot(device: torch.device, nbytes: int) -> Slot:
    """A slot of its own."""
    memory = torch.empty(max(nbytes, 1), dtype=torch.uint8, device="cpu", pin_memory=True)
    array: Any = memory.numpy()
    return Slot(memory, memoryview(array), memory.data_ptr(), torch.Event(device))


class Ring(Way):
    """Through pinned memory: slots that are used in turn, and one that captured sends read.

    Args:
        device: where the values go.
        nbytes: of the largest send.
        cross: enqueues the copy from a slot on a stream.
    """

    def __init__(self, device: torch.device, nbytes: int, cross: Cross) -> None:
        if capture.capturing(device):
            raise _flight.refuse_capture(
                "A small copy through pinned memory", "it has to be made before the capture"
            )
        self._device, self._nbytes, self._cross = device, nbytes, cross
        self._slots: list[Slot] = []
        self._next = 0
        self._standing = make_slot(device, nbytes)
        self._captured: int | None = None  # values of the captured send
        self._lock = threading.Lock()

    def send(
        self, settled: Values, out: torch.Tensor, stream: torch.Stream | None, captures: bool
    ) -> None:
        with self._lock:
            if captures:
                self._stand(settled, out.dtype)
                self._captured = count_of(settled)
                slot, nbytes = self._standing, self._captured * out.dtype.itemsize
            else:
                slot = self._take()
                nbytes = pack(slot.room, settled, out.dtype)
            if nbytes:
                self._cross(out, slot, nbytes, stream)
            if not captures:
                slot.event.record(stream or torch.accelerator.current_stream(self._device.index))
                self._next = (self._next + 1) % len(self._slots)

    def refill(self, settled: Values, dtype: torch.dtype) -> None:
        with self._lock:
            if self._captured is None:
                raise Unsupported(
                    "Refilling a small copy that was never captured",
                    "call send inside a graph capture first, or send instead of refill",
                )
            self._stand(settled, dtype)

    def _stand(self, settled: Values, dtype: torch.dtype) -> None:
        """Write what every captured send carries; a graph's size is fixed."""
        if self._captured not in (None, count_of(settled)):
            raise LayoutError(
                f"A small copy that was captured with {self._captured} values was given "
                f"{count_of(settled)}; expected as many, since a graph's sizes are fixed. Pad the "
                f"values, or capture another SmallCopy."
            )
        packed = packed_bytes(settled, dtype)  # a wrong value leaves the slot as it was
        self._standing.room[: len(packed)] = packed

    def _take(self) -> Slot:
        """The slot that is next, once its last send has ended."""
        if self._slots and self._slots[self._next].event.query():
            return self._slots[self._next]
        if len(self._slots) < MOST_SLOTS:
            self._slots.insert(self._next, make_slot(self._device, self._nbytes))
        else:
            self._slots[self._next].event.synchronize()
        return self._slots[self._next]


class OnHost(Way):
    """To the CPU: written at once."""

    def send(
        self, settled: Values, out: torch.Tensor, stream: torch.Stream | None, captures: bool
    ) -> None:
        packed = packed_bytes(settled, out.dtype)
        array: Any = out.view(-1).view(torch.uint8).numpy()
        memoryview(array)[: len(packed)] = packed

    def refill(self, settled: Values, dtype: torch.dtype) -> None:
        raise Unsupported(
            "Refilling a small copy to the CPU", "there are no graphs; send the values again"
        )


def cross_by_kernel(device: torch.device) -> Cross:
    """The kernel reads the slot by itself: no copy engine takes part."""
    loaded = kernels(device)
    function, launch = loaded.functions[kernel.MAPPED_NAME], loaded.launch
    arguments = _cuda_driver.Arguments(kernel.MAPPED.size, device)

    def cross(out: torch.Tensor, slot: Slot, nbytes: int, stream: torch.Stream | None) -> None:
        to = out.data_ptr()
        width = kernel.width(to)
        kernel.MAPPED.pack_into(arguments.buffer, 0, to, slot.address, nbytes, width)
        launch(function, kernel.blocks(nbytes, width), arguments.address, stream)

    return cross


def cross_by_copy(out: torch.Tensor, slot: Slot, nbytes: int, stream: torch.Stream | None) -> None:
    """The copy engine reads the slot, behind whatever it has to move before."""
    target = out.view(-1).view(torch.uint8)[:nbytes]
    with _flight.inside(stream):
        target.copy_(slot.memory[:nbytes], non_blocking=True)
