# SPDX-License-Identifier: Apache-2.0
"""`Request`: what a call of a block store asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from portakv.graph import Priority
from portakv.storage.chains import FIRST, mark_of, marks_of


@dataclass(frozen=True, eq=False)
class Request:
    """What a call of a user asks for.

    ``after``: for each key of a save the key that it follows; None: it begins a prompt. ``lent``:
    others make its copies.
    """

    kind: str
    keys: list[bytes]
    priority: Priority
    deadline: float | None = None
    after: Sequence[bytes | None] = ()
    lent: bool = False

    @cached_property
    def roots(self) -> list[bytes | None]:
        """Return for each block of a save the key of another call that its chain follows."""
        own = {*self.keys}
        if self._is_one_chain and self.after[0] not in own:
            return [self.after[0]] * len(self.keys)
        known = dict[bytes | None, bytes | None]()
        for key, before in zip(self.keys, self.after, strict=True):
            known[key] = known.get(before) if before in own else before
        return [*known.values()]

    @cached_property
    def _is_one_chain(self) -> bool:
        """Return True if each block of a save follows the block before it."""
        return bool(self.after) and [*self.after[1:]] == self.keys[:-1]

    def before(self, blocks: Sequence[int]) -> list[bytes]:
        """Return the keys of other calls that the chains of some blocks follow."""
        if not self.after:
            return []
        some = blocks[:1] if self._is_one_chain else blocks
        roots = dict.fromkeys(map(self.roots.__getitem__, some))
        return [key for key in roots if key is not None]

    @cached_property
    def order(self) -> dict[bytes, int]:
        """Return the position of each key: no block of the call evicts an earlier one."""
        order = dict.fromkeys(self.before(range(len(self.keys))), -1)
        order.update(zip(self.keys, range(len(self.keys)), strict=True))
        return order

    @cached_property
    def follows(self) -> list[int]:
        """Return the marks of the predecessors of a save's blocks."""
        if self._is_one_chain:
            return [_mark(self.after[0]), *self.marks[:-1]]
        return [*map(_mark, self.after)]

    @cached_property
    def marks(self) -> list[int]:
        """Return the marks of the keys."""
        return marks_of(self.keys)


def _mark(key: bytes | None) -> int:
    """Return the mark of a predecessor."""
    return FIRST if key is None else mark_of(key)
