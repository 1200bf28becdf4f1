# SPDX-License-Identifier: Apache-2.0
"""`Issuer`: a thread that issues the loads of a step, whose layers wait by words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

from portakv.copy.layer_words import LayerWords
from portakv.copy.layers import calling_for_layers
from portakv.runtime.streams import StreamFence


class Issuer:
    """Issue the loads of steps in a thread, so that the model's thread goes on meanwhile.

    To issue a load layer by layer takes the host about as long as a part of a step. The word of a
    layer is raised while later layers are issued.

    Args:
        words: of the layers that steps wait for.
        at_first: issue the first load of each size before the call returns. It may build kernels
            and take memory, for which some drivers wait until the device is idle; so the device
            must not wait for it.
    """

    def __init__(self, words: LayerWords, at_first: bool) -> None:
        self._words = words
        self._at_first = at_first
        self._sizes = set[int]()
        self._thread = ThreadPoolExecutor(1, "portakv-loads")
        self._issuing: Future[None] | None = None

    def issue(
        self, loads: Sequence[Callable[[], None]], fence: StreamFence, size: int, alone: bool
    ) -> None:
        """Begin a step with loads.

        Args:
            loads: calls that issue one load each, and have the words follow it.
            fence: their order after the model's work.
            size: of all loads, in any unit; sizes differ by powers of two.
            alone: the last load has one copy by layer. Its layers are those of the words.
        """
        words = self._words
        words.begin()

        def issue() -> None:
            try:
                with fence.inside():
                    for load in loads[:-1]:
                        load()
                    with calling_for_layers(words.issued) if alone else nullcontext():
                        loads[-1]()
            finally:
                words.commit()

        try:
            self._issuing = self._thread.submit(issue)
        except RuntimeError:  # the interpreter ends
            issue()
        kind = size.bit_length()
        if self._at_first and kind not in self._sizes:
            self._sizes.add(kind)
            self.join()

    def join(self) -> None:
        """Wait until the loads of the present step were issued; raise what stopped them."""
        issuing = self._issuing
        if issuing is not None:
            self._issuing = None
            issuing.result()
