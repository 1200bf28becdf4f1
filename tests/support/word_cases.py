# SPDX-License-Identifier: Apache-2.0
"""Words of layers on the host, of which tests see what they hold back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from portakv.copy.layer_words import LayerWords
from portakv.runtime.streams import HostWords
from support.waits import LIMIT

LAYERS = 3
HOST = torch.device("cpu")


class Words(LayerWords):
    """Words of the host."""

    def __init__(self, limit: float = LIMIT) -> None:
        super().__init__(HOST, LAYERS, limit)

    @property
    def host(self) -> HostWords:
        words = self._words
        assert isinstance(words, HostWords)
        return words

    @property
    def lacking(self) -> list[int]:
        """Return the layers whose waits would block."""
        return [layer for layer in range(LAYERS) if self.host.lacks(layer)]

    @property
    def watched(self) -> int:
        """Return the number of loads of which some ends were not seen."""
        return len(self._watched)

    @property
    def quiet(self) -> bool:
        """Return whether all ends were seen."""
        return self._thread is None

    def step(self, *loads: Sequence[Any]) -> None:
        """Begin a step with loads, each of the ends of its layers."""
        self.begin()
        for layers in loads:
            self.follow(layers)
        self.commit()

    def count_from(self, number: int) -> None:
        """Continue with the numbers after this one."""
        self._number = number
        self.host.raised[:] = number
        self.host.write(0, LAYERS, number, None)


class Lazy(Words):
    """Words that no thread raises, as if the host hung."""

    def _watch(self) -> None:
        pass
