# SPDX-License-Identifier: Apache-2.0
"""Wait for the layers of loads by words, which a CUDA graph can capture.

A load by layer has an end for each layer. Words carry these ends to a model whose steps are replays
of graphs: each layer of the graph waits for its words, and all replays have the same wait.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol, TypeAlias

import torch

from portakv.errors import PortaKVError, TransferError
from portakv.runtime import late_release
from portakv.runtime.devices import capturing
from portakv.runtime.resources import start_thread
from portakv.runtime.streams import (
    LAST,
    StreamWords,
    ignore_captures_elsewhere,
    own_stream,
    words_of,
)
from portakv.runtime.transfer import Transfer

#: Seconds between two looks at ends that no stream orders: the first after an end, and the most,
#: which is reached after 40 ms without one, so that a long load does not keep a core busy:
#: it takes 0.025 of one.
PAUSE = 2e-4
LONGEST = 2e-3
_LONGER = 1.05


class End(Protocol):
    """The end of a layer of a load."""

    def done(self) -> bool:
        """Return whether the layer has ended; never block."""

    def wait(self, stream: torch.Stream | None = None, /) -> object:
        """Have a stream wait for the layer, or block until it has ended."""


#: The ends of a load that workers move, each with its layer, in the order of layers.
Watched: TypeAlias = "deque[tuple[int, Transfer]]"


class LayerWords:
    """The words of the layers of a model, for loads that its steps wait for.

    A step with loads calls `begin`, then `follow` for each load, then `commit`; the model calls
    `wait` before each layer, or replays a graph that has captured these calls. A step without loads
    calls `rest`, or nothing. All calls are those of the model's thread, except `close`; another
    thread may issue the loads, and call `follow`, `issued` and `commit`, if it has done so before
    the next step.

    From `begin` to `end_waits`, `rest` or `close` this library unregisters no host memory and
    unmaps none of other processes: that would wait for the device. So do ``torch.cuda.empty_cache``
    and the first launch of a kernel, which others must not call meanwhile.

    A layer counts as there when all loads of its step have ended in it, whatever their end: landed,
    failed, late, cancelled, or cut off from an owner that died. Who reads the rows asks the loads
    what landed. A wait also ends after ``limit`` seconds; `expired` says so after `end_waits`, and
    no row of that step counts.

    Args:
        device: where the model computes; the host's threads block in `wait`.
        layers: the number of its layers.
        limit: seconds after which a wait ends, later than each load does.

    Raises:
        Unsupported: no graph of the device can wait for words.
    """

    def __init__(self, device: torch.device, layers: int, limit: float = 60.0) -> None:
        self._words: StreamWords = words_of(device, layers, limit)
        self._device = device
        self._stream = None if device.type == "cpu" else own_stream(device)
        self._number = 0
        self._cut = 0  # the step whose words `close` raised
        self._resting = True
        self._ordered: list[list[End]] = [[] for _ in range(layers)]
        self._open = [False] * layers  # no word of the step was written
        self._changing = threading.Lock()  # protects what follows, and the words of the host
        self._left = [0] * layers  # ends that the word of a layer waits for
        self._watched = list[Watched]()
        self._thread: threading.Thread | None = None

    @property
    def expired(self) -> bool:
        """Return whether a wait of the latest step with loads may have ended before its rows came:
        it reached its limit, or words were closed."""
        number = self._number
        return bool(number) and number in (self._words.expired, self._cut)

    @property
    def is_captured(self) -> bool:
        """Return whether the current stream of the device is captured into a graph."""
        return capturing(self._device)

    def begin(self) -> None:
        """Begin a step with loads: lower the words, ordered after the current stream's work.

        The loads begin after this call, ordered after the current stream, so that no word is
        raised for rows of an earlier step.
        """
        number = self._number % LAST + 1
        self._words.need(number)  # first: after an error of the driver nothing is to be closed
        late_release.hold(self)
        with self._changing:
            self._number = number
            for layer in range(len(self._left)):
                self._left[layer] += 1  # until it is closed
        self._open = [True] * len(self._open)
        self._resting = False

    def follow(self, layers: Sequence[End]) -> None:
        """Have the words of the step wait for the layers of a load, except those that `issued` has
        written."""
        watched: Watched = deque()
        for number, end in enumerate(layers):
            if not self._open[number]:
                continue
            if isinstance(end, Transfer) and not end.ordered:
                watched.append((number, end))
            else:
                self._ordered[number].append(end)
        if watched:
            with self._changing:
                for number, _ in watched:
                    self._left[number] += 1
                self._watched.append(watched)

    def issued(self, number: int, end: Transfer) -> None:
        """Raise the word of a layer after the copies of the last load of a step, and after the
        loads that are followed; later layers may not be issued yet."""
        if self._open[number] and end.ordered:
            self._ordered[number].append(end)
            self._write(number)
            self._close([number])

    def commit(self) -> None:
        """Raise each word as soon as the layer is there of all loads of the step.

        Streams write the words of copies that were issued, and a thread those of what workers move.
        The call blocks for ends of other kinds.
        """
        left = [number for number, is_open in enumerate(self._open) if is_open]
        try:
            if len(left) == len(self._open) and not any(self._ordered):
                self._words.write(0, len(left), self._number, self._stream)
            else:
                for number in left:
                    self._write(number)
        finally:
            self._ordered = [[] for _ in self._open]
            self._close(left)
            self._start()

    def rest(self) -> None:
        """Have later waits end immediately, until `begin`."""
        if not self._resting:
            self._resting = True
            self._words.need(0)
            late_release.free(self)

    def wait(self, layer: int) -> None:
        """Have the current stream wait for a layer; on the host, block.

        While a graph is captured, it gets the wait, for the loads of each step that replays it.
        """
        self._words.wait(layer)

    def end_waits(self) -> None:
        """Block until the waits on the current stream have ended, after which `expired` is final
        for their step."""
        if self._stream is not None:
            torch.accelerator.current_stream(self._device.index).synchronize()
        late_release.free(self)

    def close(self) -> None:
        """Raise all words of the present step, whatever its loads do, also before `commit`."""
        number = self._number
        with self._changing:
            if any(self._left):
                self._cut = number
            self._words.raised[:] = number
        with suppress(PortaKVError):  # of a driver that ends
            self._words.write(0, len(self._left), number, self._stream)
        late_release.free(self)

    def _write(self, layer: int) -> None:
        """Have the private stream write the word of a layer, after copies that streams order."""
        for end in self._ordered[layer]:
            with suppress(PortaKVError):  # it has ended, and its load says how
                end.wait(self._stream)
        self._words.write(layer, 1, self._number, self._stream)

    def _close(self, layers: Sequence[int]) -> None:
        """Note that no further load of the step is followed in layers."""
        with self._changing:
            for layer in layers:
                self._open[layer] = False
                self._ended(layer)

    def _start(self) -> None:
        """Start the thread that raises words, if it has something to look at."""
        with self._changing:
            thread = self._thread
            if self._watched and (thread is None or not thread.is_alive()):
                self._thread = threading.Thread(
                    target=self._watch, name="portakv-layer-words", daemon=True
                )
                start_thread(self._thread, TransferError)

    def _ended(self, layer: int) -> None:
        """Note that a load has ended in a layer, under the lock."""
        self._left[layer] -= 1
        if not self._left[layer]:
            self._words.raised[layer] = self._number

    def _watch(self) -> None:
        """Raise words as the ends come that no stream orders, until all have."""
        ignore_captures_elsewhere(self._device)
        pause = PAUSE
        while True:
            with self._changing:
                watched = [*self._watched]
                if not watched:
                    self._thread = None
                    return
            ended = [layer for each in watched for layer in self._take_ended(each)]
            with self._changing:
                for layer in ended:
                    self._ended(layer)
                self._watched = [each for each in self._watched if each]
            if ended:
                pause = PAUSE
            else:
                time.sleep(pause)
                pause = min(pause * _LONGER, LONGEST)

    def _take_ended(self, watched: Watched) -> list[int]:
        """Remove the first layers of a load that have ended, and return their numbers."""
        ended = list[int]()
        while watched and self._is_done(watched[0][1]):
            ended.append(watched.popleft()[0])
        return ended

    def _is_done(self, end: Transfer) -> bool:
        """Return whether a layer has ended, however it did."""
        try:
            return end.done()
        except Exception:  # also an error of the driver: nothing will land
            return True
