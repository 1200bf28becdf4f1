# SPDX-License-Identifier: Apache-2.0
"""`Move`: one copy as a value, from which its parts are cut."""

from __future__ import annotations

from typing import NamedTuple

from portakv.view.index import Index
from portakv.view.view import KVView


class Move(NamedTuple):
    """``count`` tokens from the rows of one view to the rows of another.

    The order of the fields is that of a launch: ``launch(*move, stream, status)``. Making a move
    costs the host as little as a tuple.

    Attributes:
        src, dst: views.
        src_index, dst_index: for each side, the slot of each position.
        count: tokens.
    """

    src: KVView
    dst: KVView
    src_index: Index
    dst_index: Index
    count: int  # type: ignore[assignment]  # tuples have a method of that name

    @property
    def steps(self) -> tuple[int, int]:
        """Return the steps that a plan of this copy is made for."""
        return self.src_index.plan_step, self.dst_index.plan_step

    def ends(self, downward: bool) -> tuple[KVView, KVView, Index, Index]:
        """Return the rows of a device, those of the other side, and the index of each.

        ``downward``: the device has the source.
        """
        if downward:
            return self.src, self.dst, self.src_index, self.dst_index
        return self.dst, self.src, self.dst_index, self.src_index

    @property
    def ids_on_host(self) -> bool:
        """Return True if all ids lie on the host, or there are none."""
        return self.src_index.on_host and self.dst_index.on_host

    @property
    def is_clean(self) -> bool:
        """Return True if the ids of both sides need no guard, as `Index.is_clean` says."""
        src_clean = self.src_index.is_clean(self.count, self.src.slots)
        return src_clean and self.dst_index.is_clean(self.count, self.dst.slots)

    def mark_clean(self) -> None:
        """Note that no id of either side is negative or past the end of its view."""
        self.src_index.mark_clean(self.count, self.src.slots)
        self.dst_index.mark_clean(self.count, self.dst.slots)

    def part(self, first: int, tokens: int) -> Move:
        """Return ``tokens`` positions from position ``first`` on; shares ids and their copies."""
        if not first:
            if tokens == self.count:
                return self
            return Move(self.src, self.dst, self.src_index, self.dst_index, tokens)
        src_index = self.src_index.shifted(first)
        dst_index = self.dst_index.shifted(first)
        return Move(self.src, self.dst, src_index, dst_index, tokens)

    def layer(self, layer: int) -> Move:
        """Return one layer of the copy; both views must have the same number of layers."""
        return self.planes((layer, layer + 1), None)

    def planes(self, layers: tuple[int, int] | None, kv: tuple[int, int] | None) -> Move:
        """Return the rows of some layers and kv, each range [first, past the last); None: all."""
        if layers is None and kv is None:
            return self
        src = self.src.planes(layers, kv)
        dst = self.dst.planes(layers, kv)
        return Move(src, dst, self.src_index, self.dst_index, self.count)
