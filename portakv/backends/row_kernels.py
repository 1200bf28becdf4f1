# SPDX-License-Identifier: Apache-2.0
"""Launch the row kernels of a device for copies that the core makes as a whole."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch

from portakv.core.call import DRIVER, STREAM, CurrentStream, Executor
from portakv.core.rows import Kernels
from portakv.core.view import address_in_torch
from portakv.runtime.cuda import NO_CONTEXT, KernelDriver
from portakv.runtime.devices import capture_question, this_process
from portakv.runtime.ends import End, ends_of
from portakv.view.form import plain_reader
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
        carried: what executes their copies, and why.
        ends: of copies; None: work has ended when a launch returns.
        executor: what the core reads of the kernels; ``executor_at`` is its address.
        process: that uses the driver, which need not survive a fork.
    """

    def __init__(self, driver: KernelDriver, device: torch.device, name: str) -> None:
        self.table = Kernels(driver.entry)
        self.carried = name, TAKES
        self._driver = driver
        self._device = device
        self._stream = driver.number
        self._capturing = capture_question(device)
        self.process = this_process()
        self._names = _current_stream(driver, device)
        current = None if self._names is None else ctypes.addressof(self._names)
        reader = plain_reader()
        self.executor = Executor(self.table.address, reader.address if reader else None, current)
        self.executor_at = ctypes.addressof(self.executor)
        self.ends = ends_of(driver, device)

    def issue(
        self,
        function: Callable[..., int],
        arguments: Sequence[object],
        tabled: Sequence[KVView] = (),
    ) -> tuple[End | None, int] | None:
        """Make a copy by a function of the core on the current stream.

        Args:
            function: takes the arguments, then the address of a `portakv_copy_end` and a stream.
            arguments: of the copy.
            tabled: views whose tables of addresses the kernels read.

        Returns:
            The end of the copy, which has none if the work has ended, and the result of the
            function; None: it launched nothing.

        Raises:
            TransferError: the driver's error. What was launched may use the end, which is given up.
        """
        ends = self.ends
        end = None
        at = 0
        if ends is not None:
            try:
                end = ends.free.pop()
            except IndexError:
                end = ends.acquire_after_ends()
                if end is None:
                    return None
            at = end.address

        stream: int | None = None
        named = tabled or self.process.forked  # after a fork only torch is asked
        result = STREAM if named else function(*arguments, at, stream)
        if result == STREAM:  # torch is asked, which raises what the core does not
            stream = self._stream(None)
            # None: another device is current, of which the next question would be answered.
            if stream is not None and not self._capturing():
                for view in tabled:
                    view.follow_table(self._device)
                result = function(*arguments, at, stream)
        if result == FIRST_WORK:
            with self._driver.current():
                result = function(*arguments, at, stream)
        if result >= 0:
            return end, result
        if result <= DRIVER:
            self._driver.refuse(DRIVER - result, "The launch")
        if end is not None:
            end.release(end)
        return None


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
