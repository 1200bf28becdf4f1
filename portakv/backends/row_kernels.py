# SPDX-License-Identifier: Apache-2.0
"""Launch the row kernels of a device for copies that the core makes as a whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from portakv.core.call import DRIVER, GUARDED
from portakv.core.rows import Kernels
from portakv.runtime.cuda import NO_CONTEXT, KernelDriver
from portakv.runtime.devices import capture_question
from portakv.runtime.pinned_ids import PinnedIds
from portakv.runtime.streams import ignoring_captures
from portakv.runtime.transfer import (
    Completion,
    Owner,
    StatusWord,
    Transfer,
    acquire_after_ends,
    acquire_word,
    event_pool,
    free_words,
    hold,
    hold_memory,
)

#: Why a backend executes a plan inside its device.
TAKES = "takes the plan"


class Launched(NamedTuple):
    """What the core launched: its result, and the status word and the ids that the kernels use."""

    result: int
    word: StatusWord | None
    listed: PinnedIds | None

    @property
    def tokens(self) -> int:
        """Return the tokens that are copied, those of skipped positions included."""
        return self.result >> 2


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
    """

    def __init__(self, driver: KernelDriver, device: torch.device, name: str) -> None:
        self.table = Kernels(driver.entry)
        self.address = self.table.address
        self.carried = name, TAKES
        self._driver = driver
        self._capturing = capture_question(device)
        # The free events of the device. None: work of the host has ended when a call returns.
        self._events = None if device.type == "cpu" else event_pool(device)
        if self._events is not None:
            with ignoring_captures(device):  # of other threads
                PinnedIds.reserve()

    def launch(self, call: Callable[[int, int, int, int], int], on_host: bool) -> Launched | None:
        """Make a call of the core on the current stream; None: it launched nothing.

        Args:
            call: takes memory for ids, its room, the address of a status word, and a stream.
            on_host: ids lie on the host.

        Raises:
            TransferError: the driver's error.
        """
        driver = self._driver
        stream = driver.number(None)
        # None: another device is current, of which the next question would be answered.
        if stream is None or self._capturing():
            return None
        word = None
        listed = None
        status = 0
        room = (0, 0)
        if self._events is not None:
            word = acquire_word()
            status = driver.word(word.address)
            listed = (PinnedIds.acquire() or acquire_after_ends()) if on_host else None
            if listed is not None:
                room = listed.address, 2 * PinnedIds.MOST
        result = call(*room, status, stream)
        if result == DRIVER - NO_CONTEXT:  # the first work of a thread
            with driver.current():
                result = call(*room, status, stream)
        if result <= DRIVER:  # what was launched may use the word and the list, which are given up
            driver.refuse(DRIVER - result, "The launch")
        if word is not None and (result < 0 or not result & GUARDED):
            free_words.append(word)
            word = None
        if result < 0 and listed is not None:
            listed.release()
        return None if result < 0 else Launched(result, word, listed)

    def end(
        self,
        launched: Launched,
        retained: object,
        ids: object,
        owner: Owner | None = None,
        memory: Sequence[torch.Tensor] = (),
        carried: tuple[str, str] | None = None,
    ) -> Transfer:
        """Return the end of a launch, after which the device's present work runs.

        Args:
            retained: what the handle keeps until the end.
            ids: memory that is kept until the end also if the handle is dropped.
            owner: it reports an error if the handle does not.
            memory: the same of memory that no allocator orders on a stream.
            carried: what executes the copy, and why; None: as for all copies inside the device.
        """
        carried = carried or self.carried
        events = self._events
        if events is None:
            return Transfer((), None, carried)
        event = events.acquire()
        event.record()
        _, word, listed = launched
        words = () if word is None else ((word, 0),)
        lists = () if listed is None else (listed,)
        completion = Completion(event, (), words, None, (ids, memory), events, lists=lists)
        # Either queue returns the event if the handle is dropped. Only a word can bring an error,
        # which `LateErrors` look for among the copies in flight.
        unordered = listed is not None or bool(memory)
        if unordered:
            hold_memory(completion)
        if word is not None or not unordered:
            hold(completion, owner)
        return Transfer((completion,), retained, carried)
