# SPDX-License-Identifier: Apache-2.0
"""How small values cross: read during the call, or through pinned memory that is read later."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from numpy import ndarray

from portakv.errors import LayoutError, Unsupported
from portakv.host import _small_kernel as kernel
from portakv.host._values import (
    Room,
    Values,
    check_count,
    count_of,
    numpy_dtype,
    packed_bytes,
    settle,
)
from portakv.runtime import _flight, capture
from portakv.runtime import cuda as _cuda_driver

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
    """One way of carrying so many values of a dtype, again and again, from any thread."""

    @abstractmethod
    def send(
        self, values: Values, out: torch.Tensor, stream: torch.Stream | None, captures: bool
    ) -> int:
        """Write the values to the beginning of ``out``, which is contiguous and of the dtype, on
        the stream; returns how many they are."""

    @abstractmethod
    def refill(self, values: Values) -> None:
        """Change what the captured send carries."""


class _Parameters:
    """What a launch by value carries: its head, kept from launch to launch, and its values.

    Args:
        dtype, most: of the values, and how many.
        device: of the launches.
        capacity: bytes of values that the kernel takes.
    """

    __slots__ = (
        "_arguments", "_buffer", "_itemsize", "address", "blocks", "count", "room", "to", "whole",
    )  # fmt: skip

    def __init__(self, dtype: torch.dtype, most: int, device: torch.device, capacity: int) -> None:
        head = kernel.VALUES_HEAD.size
        self._arguments = _cuda_driver.Arguments(head + capacity, device)
        self._buffer, self._itemsize = self._arguments.buffer, dtype.itemsize
        self.address = self._arguments.address
        self.room = Room(self._arguments.room[head:][: most * dtype.itemsize], dtype)
        self.whole = self.room.whole
        self.to = self.count = self.blocks = 0

    def aim(self, to: int, count: int) -> None:
        """Make the next launch write ``count`` values to an address."""
        nbytes, width = count * self._itemsize, kernel.width(to)
        kernel.VALUES_HEAD.pack_into(self._buffer, 0, to, nbytes, width)
        self.to, self.count, self.blocks = to, count, kernel.blocks(nbytes, width)


class _PerThread(threading.local):
    """A room for each thread, so that several can send at once."""

    def __init__(self, make: Callable[..., Any], *made_of: Any) -> None:
        self.own = make(*made_of)


class AtOnce(Way):
    """The host's values are read while the driver is called, out of a room of each thread's.

    Args:
        dtype: of the values.
        most: how many they may be.
        make: a thread's room, given ``dtype``, ``most`` and ``made_of``; it has a `Room`, ``room``,
            and that one's ``whole``.
    """

    def __init__(
        self, dtype: torch.dtype, most: int, make: Callable[..., Any], *made_of: Any
    ) -> None:
        self._mine = _PerThread(make, dtype, most, *made_of)
        self._most, self._shape, self._own = most, (most,), numpy_dtype(dtype)

    @abstractmethod
    def cross(self, mine: Any, to: int, count: int, stream: torch.Stream | None) -> None:
        """Write the first values of this thread's room to an address, on the stream."""

    def send(
        self, values: Values, out: torch.Tensor, stream: torch.Stream | None, captures: bool
    ) -> int:
        mine = self._mine.own
        if type(values) is ndarray and values.dtype is self._own and values.shape == self._shape:
            mine.whole[...] = values  # what `fill` would come to, some calls later
            count = self._most
        else:
            count = mine.room.fill(values)
        if count:
            self.cross(mine, out.data_ptr(), count, stream)
        return count


class ByValue(AtOnce):
    """In the parameters: the values are gone from the host when the launch returns.

    Args:
        device: where the values go.
        dtype: of the values.
        most: how many they may be.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, most: int) -> None:
        loaded = kernels(device)
        capacity = kernel.capacity_for(most * dtype.itemsize)
        super().__init__(dtype, most, _Parameters, device, capacity)
        self._function = loaded.functions[kernel.values_name(capacity)]
        self._launch = loaded.launch

    def cross(self, mine: Any, to: int, count: int, stream: torch.Stream | None) -> None:
        """See `AtOnce.cross`."""
        if to != mine.to or count != mine.count:
            mine.aim(to, count)
        self._launch(self._function, mine.blocks, mine.address, stream)

    def refill(self, values: Values) -> None:
        raise Unsupported(
            "Refilling a small copy by value",
            "its contents were fixed when it was captured; make it with way='mapped'",
        )


class Slot(NamedTuple):
    """Pinned memory for one send."""

    memory: torch.Tensor
    room: Room
    address: int


def make_slot(dtype: torch.dtype, most: int) -> Slot:
    """A slot of its own, for so many values."""
    memory = torch.empty(
        max(most * dtype.itemsize, 1), dtype=torch.uint8, device="cpu", pin_memory=True
    )
    array: Any = memory.numpy()
    room = Room(memoryview(array)[: most * dtype.itemsize], dtype)
    return Slot(memory, room, memory.data_ptr())


class Ring(Way):
    """Through pinned memory: slots that are used in turn, and one that captured sends read.

    Args:
        device: where the values go.
        dtype: of the values.
        most: how many they may be.
        cross: enqueues the copy from a slot on a stream.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, most: int, cross: Cross) -> None:
        if capture.capturing(device):
            raise _flight.refuse_capture(
                "A small copy through pinned memory", "it has to be made before the capture"
            )
        self._device, self._index, self._cross = device, device.index, cross
        self._alone = torch.accelerator.device_count() == 1
        self._dtype, self._itemsize, self._most = dtype, dtype.itemsize, most
        self._slots: list[tuple[Slot, torch.Event]] = []  # each with the end of its last send
        self._next = 0
        self._standing = make_slot(dtype, most)
        self._captured: int | None = None  # values of the captured send
        self._lock = threading.Lock()

    def send(
        self, values: Values, out: torch.Tensor, stream: torch.Stream | None, captures: bool
    ) -> int:
        with self._lock:
            if captures:
                self._captured = count = self._stand(values)
                if count:
                    self._cross(out, self._standing, count * self._itemsize, stream)
                return count
            slot, ended = self._take()
            count = slot.room.fill(values)
            if count:
                self._cross(out, slot, count * self._itemsize, stream)
                if stream is None and not self._alone:
                    # Given no stream it would take one of the device that is current.
                    stream = torch.accelerator.current_stream(self._index)
                ended.record(stream)
                self._next = (self._next + 1) % len(self._slots)
            return count

    def refill(self, values: Values) -> None:
        with self._lock:
            if self._captured is None:
                raise Unsupported(
                    "Refilling a small copy that was never captured",
                    "call send inside a graph capture first, or send instead of refill",
                )
            self._stand(values)

    def _stand(self, values: Values) -> int:
        """Write what every captured send carries; a graph's size is fixed."""
        settled = settle(values)
        count = count_of(settled)
        if self._captured not in (None, count):
            raise LayoutError(
                f"A small copy that was captured with {self._captured} values was given {count}; "
                f"expected as many, since a graph's sizes are fixed. Pad the values, or capture "
                f"another SmallCopy."
            )
        check_count(count, self._most, self._dtype)
        packed = packed_bytes(settled, self._dtype)  # a wrong value leaves the slot as it was
        self._standing.room.memory[: len(packed)] = packed
        return count

    def _take(self) -> tuple[Slot, torch.Event]:
        """The slot that is next, once its last send has ended."""
        if self._slots:
            found = self._slots[self._next]
            if found[1].query():
                return found
        if len(self._slots) < MOST_SLOTS:
            made = make_slot(self._dtype, self._most), torch.Event(self._device)
            self._slots.insert(self._next, made)
        else:
            self._slots[self._next][1].synchronize()
        return self._slots[self._next]


class OnHost(Way):
    """To the CPU: written at once.

    Args:
        dtype: of the values.
        most: how many they may be.
    """

    def __init__(self, dtype: torch.dtype, most: int) -> None:
        self._dtype, self._most = dtype, most

    def send(
        self, values: Values, out: torch.Tensor, stream: torch.Stream | None, captures: bool
    ) -> int:
        settled = settle(values)
        count = count_of(settled)
        check_count(count, self._most, self._dtype)
        packed = packed_bytes(settled, self._dtype)  # a wrong value leaves the target as it was
        array: Any = out.view(-1).view(torch.uint8).numpy()
        memoryview(array)[: len(packed)] = packed
        return count

    def refill(self, values: Values) -> None:
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
