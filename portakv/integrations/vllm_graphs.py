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


def words_for(views: Sequence[GroupView], terms: StoreTerms) -> LayerWords:
    """Return the words of a worker's layers, which its graphs wait for.

    Raises:
        IntegrationError: no graph of the device can wait for words.
    """
    view = views[0].view
    try:
        return LayerWords(view.device, view.layers, LONGER * terms.deadline + LATER)
    except Unsupported as error:
        raise IntegrationError(
            f'Expected a device whose graphs can wait for layers, for by_layer "graph": {error} '
            f"Pass true, with which vLLM uses piecewise graphs."
        ) from error
