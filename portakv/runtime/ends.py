# SPDX-License-Identifier: Apache-2.0
"""Provide the ends of copies that the core makes: an event of the driver, and the memory that the
kernels of one copy use until they have ended.

The core records the event after it has launched the kernels, so that an end costs no call of torch.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import torch

from portakv.core.call import GUARDED, REPORTS, CopyEnd, WordBatches, calls
from portakv.errors import TransferError
from portakv.runtime.bounded import making
from portakv.runtime.cuda import NO_CONTEXT, KernelDriver, raw_stream
from portakv.runtime.devices import inside
from portakv.runtime.streams import ignoring_captures
from portakv.runtime.transfer import (
    Completion,
    Owner,
    StatusWord,
    hold,
    hold_memory,
    retire,
    word_batches,
)

#: CUDA_ERROR_NOT_READY, and HIP's error of that name.
_NOT_READY = 600
_ANSWERS = (0, _NOT_READY, REPORTS)
_NO_TIMING = 2  # CU_EVENT_DISABLE_TIMING and hipEventDisableTiming

_BATCH = WordBatches.SIZE  # ends of one allocation


_new_completion = Completion.__new__


class End:
    """The end of one copy at a time. `Completion` uses it as an event of torch.

    Attributes:
        device: of the event.
        address: for calls of the core.
        ask: the core's question about the end at the address.
        words: the status word, with the position that it counts from.
        release: lets another copy have the end, which is the argument. Nothing uses it any more.
    """

    __slots__ = ("_ends", "_event", "_struct", "address", "ask", "device", "release", "words")

    def __init__(self, ends: Ends, event: int, word: StatusWord, status: int) -> None:
        functions = ends.functions
        self._struct = CopyEnd(
            status,
            event,
            functions.record_address,
            functions.query_address,
            word.address,
        )
        self._ends = ends
        self._event = event
        self.ask = calls().query_end
        self.address = ctypes.addressof(self._struct)
        self.device = ends.device
        self.words = ((word, 0),)
        self.release = ends.free.append

    def completion(self, result: int, ids: object, owner: Owner | None = None) -> Completion:
        """Return the completion of a copy inside a device, which has this end.

        Args:
            result: the core's, of the copy.
            ids: memory that is kept until the end also if the handle is dropped.
            owner: it reports an error if the handle does not.
        """
        # Without `__init__`: what is not set has the class's value.
        completion = _new_completion(Completion)
        completion.event = completion.pool = self
        completion.retained = ids
        if result & GUARDED:
            completion.words = self.words
        hold(completion, owner)
        return completion

    def completion_across(self, memory: object) -> Completion:
        """Return the completion of a copy across the link, which has this end.

        ``memory``: that no allocator orders on a stream; it is kept until the end.
        """
        completion = Completion(self, (), (), None, memory, self)
        hold_memory(completion)
        return completion

    def query(self) -> bool:
        """Return True once the copy has ended; never block."""
        answer = self.ask(self.address)
        if answer not in _ANSWERS:
            answer = self._ends.call(self.ask, self.address)
        return answer != _NOT_READY

    def wait(self, stream: torch.Stream) -> None:
        """Make a stream wait for the end."""
        with inside(stream.device):
            self._ends.call(self._ends.functions.follow, raw_stream(stream), self._event, 0)

    def synchronize(self) -> None:
        """Block the host until the end."""
        self._ends.call(self._ends.functions.synchronize, self._event)


class Ends:
    """The ends of a device's copies, reused. They live as long as the process.

    Args:
        driver: of the device.
        device: the device.
        batches: the most batches of ends. Copies that find no end go the general way.

    Attributes:
        free: ends that no copy has.
    """

    def __init__(self, driver: KernelDriver, device: torch.device, batches: int = 64) -> None:
        self.device = device
        self.functions = driver.events
        self._driver = driver
        self.free = deque[End]()
        self._batches = batches  # that may still be made
        # Drivers allocate such memory after they have waited for the device.
        with suppress(RuntimeError):
            self._make()

    def call(self, function: Callable[..., int], *arguments: object) -> int:
        """Call a function of the driver on an event, and return 0, or another number if the event
        has not been reached.

        Raises:
            TransferError: the driver's error.
        """
        error = function(*arguments)
        if error == NO_CONTEXT:  # the first call of a thread
            with self._driver.current():
                error = function(*arguments)
        if error not in _ANSWERS:
            raise TransferError(
                f"Expected copies on {self.device} to end, got {self._driver.describe(error)} from "
                f"its driver. Check earlier errors; after a fault the device needs a new process."
            )
        return error

    def acquire_after_ends(self) -> End | None:
        """Return an end if `free` has none. None: all are in use, or none could be made. Copies
        that have ended release theirs."""
        retire()
        if not self.free and self._batches > 0:
            self._make()
        with suppress(IndexError):
            return self.free.pop()
        return None

    def _make(self) -> None:
        """Add free ends. The host may wait for the device."""
        with making(), ignoring_captures(self.device), torch.inference_mode(False):
            words = _pinned(self.device, _BATCH)
            word_batches.append(words.numpy().reshape(-1))
            with self._driver.current():
                for nth in range(_BATCH):
                    word = StatusWord(words[nth])
                    # The tensor of the word retains the memory of all words.
                    status = self._driver.word(word.address)
                    end = End(self, self._event(), word, status)
                    end.release(end)
            self._batches -= 1

    def _event(self) -> int:
        handle = ctypes.c_void_p()
        self.call(self.functions.create, ctypes.byref(handle), _NO_TIMING)
        return handle.value or 0


def _pinned(device: torch.device, words: int) -> torch.Tensor:
    memory = torch.zeros(words, 1, dtype=torch.int64, device="cpu")
    return memory if device.type == "cpu" else memory.pin_memory()


_of_devices = dict[torch.device, Ends]()


def ends_of(driver: KernelDriver, device: torch.device) -> Ends | None:
    """Return the ends of a device's copies; None: work has ended when a launch returns."""
    if device.type == "cpu":
        return None
    with making():
        if device not in _of_devices:
            _of_devices[device] = Ends(driver, device)
        return _of_devices[device]
