# SPDX-License-Identifier: Apache-2.0
"""The transfer graph: order, masks, leases, ends."""

from __future__ import annotations

import numpy as np
import pytest

from portakv.errors import TransferError
from portakv.graph.graph import Graph, Node
from portakv.graph.handle import Handle


def test_a_block_that_does_not_land_goes_no_further() -> None:
    graph, seen = Graph(), list[object]()
    link = graph.link("disk", 2)
    read = Node(lambda node, mask: [True, False, True], 3, link=link)
    maps = (read, [0, 1], [2, 1])
    leg = Node(lambda node, mask: seen.append(mask.tolist()), 2, link=link, after=[maps])
    gate = Node(None, 3, after=[(leg, np.array([0, 2]), np.array([0, 1]))])
    graph.submit([read, leg, gate], priority="urgent", deadline=60)
    handle = Handle(graph, gate)
    with pytest.raises(TransferError, match="2 of 3 blocks"):
        handle.synchronize()
    assert seen == [[True, False]]
    assert handle.landed.tolist() == [True, True, False]
    assert graph.close()
