# SPDX-License-Identifier: Apache-2.0
"""`Move`: one copy as a value, which its parts are cut from."""

from __future__ import annotations

from typing import NamedTuple

from portakv.view.index import Index
from portakv.view.view import KVView


class Move(NamedTuple):
    """``count`` tokens from the rows of one view to the rows of another.

    The order of the fields is that of a launch: ``launch(*move, stream, status)``. Making one costs
    the host as little as a tuple.

    Attributes:
        src, dst: views.
        src_index, dst_index: for each side, which slot each position uses.
        count: tokens.
    """

    src: KVView
    dst: KVView
    src_index: Index
    dst_index: Index
    count: int  # type: ignore[assignment]  # tuples have a method of that name

    @property
    def steps(self) -> tuple[int, int]:
        """The steps that a plan of this copy is made for."""
        return self.src_index.plan_step, self.dst_index.plan_step

    def part(self, first: int, tokens: int) -> Move:
        """``tokens`` positions from position ``first`` on; shares the ids and their copies."""
        if not first:
            return self if tokens == self.count else Move(*self[:4], tokens)
        mine = self.src_index.shifted(first)
        theirs = self.dst_index.shifted(first)
        return Move(self.src, self.dst, mine, theirs, tokens)

    def layer(self, layer: int) -> Move:
        """One layer of the copy; the views must have equally many."""
        return self.planes((layer, layer + 1), None)

    def planes(self, layers: tuple[int, int] | None, kv: tuple[int, int] | None) -> Move:
        """The rows of some layers and kv, each range [first, past the last); None: all."""
        if layers is None and kv is None:
            return self
        src = self.src.planes(layers, kv)
        dst = self.dst.planes(layers, kv)
        return Move(src, dst, self.src_index, self.dst_index, self.count)
