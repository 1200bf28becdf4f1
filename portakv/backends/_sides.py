# SPDX-License-Identifier: Apache-2.0
"""The parts of a nest that every kernel receives.

These are the nest's loops, and for each side the values that the plan fixes and the values that a
request adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

from portakv.plan.plan import CopyPlan, Loop, Nest, Side
from portakv.view.index import Index
from portakv.view.view import KVView

#: The values that a request adds to one side; see `SideArguments.request`.
Request: TypeAlias = tuple[int, int, int, int, int, int]


class SideArguments:
    """The values that a plan fixes for one side of a nest, and its requests, for any kernel.

    Attributes:
        per_id: units that one id covers; 0 without ids.
        walks: for each of ``outer`` its entries of the table and its bytes.
        strides: of the loops ``inner``.
        tabled: addresses come from the view's table; else there is one.
    """

    def __init__(
        self,
        nest: Nest,
        plan: CopyPlan,
        name: str,
        outer: Sequence[Loop],
        inner: Sequence[Loop] = (),
    ) -> None:
        self.side: Side = getattr(nest, name)
        self.unit = plan.unit
        self.per_id = getattr(plan, f"{name}_step") // plan.unit
        self.walks = [(getattr(x, f"{name}_table"), getattr(x, f"{name}_stride")) for x in outer]
        self.strides = [getattr(x, f"{name}_stride") for x in inner]
        self.tabled = self.side.tabled or any(table for table, _ in self.walks)

    def request(self, view: KVView, index: Index) -> Request:
        """Return the values of a request.

        They are the base (an address, or the bytes after a table's address), the address of the
        table or 0, the address of the ids or 0, True if the ids are int64, the unit at position 0,
        and the number of units in the view.
        """
        side = self.side
        unit = self.unit
        limit = view.slots // unit
        table = 0
        base = side.offset
        if self.tabled:
            table = view.table.data_ptr() + 8 * side.table
        else:
            base += view.origins[side.table]
        first, rest = divmod(index.offset, unit)
        ids = index.ids  # contiguous and on the device: the library places them
        if ids is None:
            # A flat side may start anywhere, also between two units.
            return base + rest * (side.units[-1].stride // unit), table, 0, 0, first, limit
        return base, table, ids.data_ptr(), ids.dtype is torch.int64, first, limit
