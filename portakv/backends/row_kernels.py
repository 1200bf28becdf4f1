# SPDX-License-Identifier: Apache-2.0
"""Launch the row kernels of a device for copies that the core makes as a whole."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch

from portakv.core.call import (
    DRIVER,
    GUARDED,
    OTHERWISE,
    CurrentStream,
    calls,
)
from portakv.core.rows import Kernels
from portakv.core.view import address_in_torch
from portakv.runtime.cuda import NO_CONTEXT, KernelDriver
from portakv.runtime.devices import capture_question, this_process
from portakv.runtime.ends import End, ends_of
from portakv.runtime.transfer import Completion, Owner, Transfer, hold, hold_memory
from portakv.view.view import KVView

#: The result of the core for the first work of a thread, of which nothing was launched.
FIRST_WORK = DRIVER - NO_CONTEXT

#: Why a backend executes a plan inside its device.
TAKES = "takes the plan"


class RowKernels:
    """Row kernels of a device, for copies that the core makes as a whole.

    Args:
        driver: launches them.
        device: has a driver of its own, or is the host.
        name: of the backend.

    Attributes:
        table: the core's table of the kernels.
        address: of the table.
        carried: the executor and the reason for it.
        ends: of copies; None: work has ended when a launch returns.
        current: where the core finds what names the current stream; None: torch names it.
        process: that uses the driver, which need not survive a fork.
    """

    def __init__(self, driver: KernelDriver, device: torch.device, name: str) -> None:
        self.table = Kernels(driver.entry)
        self.address = self.table.address
        self.carried = name, TAKES
        self._driver = driver
        self._stream = driver.number
        self._capturing = capture_question(device)
        self.process = this_process()
        self._current = calls().current_stream
        self._names = _current_stream(driver, device)
        self.current = None if self._names is None else ctypes.addressof(self._names)
        self.ends = ends_of(driver, device)

    def issue(
        self,
        function: Callable[..., int],
        arguments: Sequence[object],
        on_host: bool,
        retained: object,
        ids: object,
        owner: Owner | None = None,
        memory: Sequence[torch.Tensor] = (),
        carried: tuple[str, str] | None = None,
    ) -> tuple[Transfer, int] | None:
        """Make a copy by a function of the core on the current stream.

        Args:
            function: takes the arguments, then the address of a `portakv_copy_end` and a stream.
            arguments: of the copy.
            on_host: ids lie on the host.
            retained: what the handle keeps until the end.
            ids: memory that is kept until the end also if the handle is dropped.
            owner: it reports an error if the handle does not.
            memory: the same of memory that no allocator orders on a stream.
            carried: what executes the copy, and why; None: as for all copies inside the device.

        Returns:
            The handle, and the result of the function; None: it launched nothing.

        Raises:
            TransferError: the driver's error.
        """
        current = self.current
        stream: int | None = OTHERWISE
        if current is not None and not self.process.forked:
            stream = self._current(current)
        if stream == OTHERWISE:  # torch is asked, which raises what the core does not
            stream = self._stream(None)
            # None: another device is current, of which the next question would be answered.
            if stream is None or self._capturing():
                return None
        ends = self.ends
        end = None
        at = 0
        if ends is not None:
            free = ends.listed if on_host else ends.plain
            try:
                end = free.pop()
            except IndexError:
                end = ends.acquire_after_ends(free)
                if end is None:
                    return None
            at = end.address

        result = function(*arguments, at, stream)
        if result == FIRST_WORK:
            with self._driver.current():
                result = function(*arguments, at, stream)
        if result < 0:
            self.give_back(end, result)
            return None

        carried = carried or self.carried
        if end is None:
            return Transfer((), None, carried), result
        if not memory:
            return end.transfer(result, ids, retained, carried, owner), result
        words = end.words if result & GUARDED else ()
        completion = Completion(end, (), words, None, (ids, memory), end)
        # Either queue releases the end if the handle is dropped. Only a word can bring an error,
        # which `LateErrors` look for among the copies in flight.
        hold_memory(completion)
        if words:
            hold(completion, owner)
        return Transfer((completion,), retained, carried), result

    def give_back(self, end: End | None, result: int) -> None:
        """Release the end of a copy for which a function of the core returned a code.

        Raises:
            TransferError: the code is the driver's error. What was launched may use the end, which
                is given up.
        """
        if result <= DRIVER:
            self._driver.refuse(DRIVER - result, "The launch")
        if end is not None:
            end.release(end)


def _current_stream(driver: KernelDriver, device: torch.device) -> CurrentStream | None:
    """Return what names the current stream of a device; None: this torch or the driver lacks a
    function."""
    if device.type != "cuda":
        return None
    try:
        current_device, capturing = driver.streams
        current = address_in_torch("aoti_torch_get_current_cuda_stream")
    except AttributeError:
        return None
    if torch.cuda.device_count() == 1:  # it is always the current one
        current_device = 0
    return CurrentStream(device.index, current_device, current, capturing)


def after_tables(
    views: Sequence[KVView], device: torch.device, copy: Callable[..., int], *arguments: object
) -> int:
    """Make a copy by a function of the core after the tables of addresses of views were sent."""
    for view in views:
        view.follow_table(device)
    return copy(*arguments)
