# SPDX-License-Identifier: Apache-2.0
"""`Request`: what a call of a block store asks for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from portakv.graph import Priority
from portakv.storage.chains import FIRST, mark_of


@dataclass(frozen=True, eq=False)
class Request:
    """What a call of a user asks for.

    ``after``: the key before the first one, of a save. ``lent``: others make its copies.
    """

    kind: str
    keys: list[bytes]
    priority: Priority
    deadline: float | None = None
    after: bytes | None = None
    lent: bool = False

    @cached_property
    def order(self) -> dict[bytes, int]:
        """Return the position of each key: no block of the call evicts an earlier one."""
        order = {} if self.after is None else {self.after: -1}
        order.update((key, place) for place, key in enumerate(self.keys))
        return order

    @cached_property
    def follows(self) -> list[int]:
        """Return the marks of the predecessors of a save's blocks."""
        first = FIRST if self.after is None else mark_of(self.after)
        return [first, *(mark_of(key) for key in self.keys[:-1])]
