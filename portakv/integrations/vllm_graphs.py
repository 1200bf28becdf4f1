# SPDX-License-Identifier: Apache-2.0
"""Waits for the layers of loads in vLLM's CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence

from portakv.copy.layer_words import LayerWords
from portakv.errors import Unsupported
from portakv.integrations import IntegrationError
from portakv.serving.local import GroupView, StoreTerms

#: Seconds by which a wait of a graph outlasts the deadline of its load, and how many times as long
#: it is: then the host's threads hang.
LATER = 5.0
LONGER = 2.0


class GraphWaits:
    """The waits of a worker's graphs.

    Attributes:
        words: of the layers that they wait for; None: not open, or they wait for none.
    """

    def __init__(self) -> None:
        self.words: LayerWords | None = None

    def open(self, views: Sequence[GroupView], terms: StoreTerms) -> None:
        """Make the words, if the terms say that graphs wait.

        Raises:
            IntegrationError: no graph of the device can wait for words.
        """
        if not terms.waits_in_graphs:
            return
        view = views[0].view
        try:
            self.words = LayerWords(view.device, view.layers, LONGER * terms.deadline + LATER)
        except Unsupported as error:
            raise IntegrationError(
                f'Expected a device whose graphs can wait for layers, for by_layer "graph": '
                f"{error} Pass true, with which vLLM uses piecewise graphs."
            ) from error

    @property
    def are_captured(self) -> bool:
        """Return whether a graph with waits is captured at the moment."""
        return self.words is not None and self.words.is_captured
