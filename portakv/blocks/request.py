# SPDX-License-Identifier: Apache-2.0
"""What a block transfer was asked to do: views, indices and terms, whole or cut into parts."""

from __future__ import annotations

from math import lcm
from typing import NamedTuple

import torch

from portakv.blocks.handle import Asked
from portakv.copy.copy import copy_move
from portakv.engines.engine import Terms
from portakv.plan.move import Move
from portakv.plan.plan import check_disjoint
from portakv.registry.registry import Choice
from portakv.runtime.transfer import Transfer
from portakv.view.index import Index
from portakv.view.view import KVView

_LAYERS = "a view for each layer"


class Order(NamedTuple):
    """A copy of ``tokens`` positions, checked but for its ids."""

    src: KVView
    dst: KVView
    src_index: Index
    dst_index: Index
    tokens: int
    choice: Choice
    stream: torch.Stream | None
    terms: Terms

    @property
    def device(self) -> torch.device:
        """The device that carries it out."""
        return self.choice.backend.device

    @property
    def whole(self) -> int:
        """Tokens between two places where both sides may be cut."""
        page = self.src.form.block_size if self.src.opaque else 1
        return lcm(self.src_index.plan_step or 1, self.dst_index.plan_step or 1, page)

    def carried(self, disjoint: bool = False) -> Transfer:
        """Issue all of it; ``disjoint``: its rows are known to be."""
        move = Move(self.src, self.dst, self.src_index, self.dst_index, self.tokens)
        return copy_move(move, self.choice, self.stream, disjoint=disjoint, terms=self.terms)

    def layer(self, layer: int) -> Order:
        """One layer of it; raises as the whole does where the sides have not equally many."""
        if self.src.layers != self.dst.layers:
            self._replace(tokens=0).carried()
        return self._replace(src=layers_of(self.src)[layer], dst=layers_of(self.dst)[layer])

    def part(self, first: int, tokens: int) -> Order:
        """Some of its positions."""
        mine, theirs = self.src_index.part(first, tokens), self.dst_index.part(first, tokens)
        return self._replace(src_index=mine, dst_index=theirs, tokens=tokens)

    def check_apart(self) -> None:
        """Raise `SlotError` where a row is both source and destination, as far as the host knows
        the ids."""
        check_disjoint(Move(self.src, self.dst, self.src_index, self.dst_index, self.tokens))

    def follow_current(self) -> None:
        """Make its stream wait for the current one."""
        if self.stream is not None:
            # Tables are made on the current stream.
            for view in (self.src, self.dst):
                if len(view.origins) > 1 and view.device == self.device:
                    _ = view.table
            self.stream.wait_stream(torch.accelerator.current_stream(self.device.index))

    def asked(self) -> Asked:
        """What a handle says of it, without its views."""
        return Asked(
            self.src.form, self.dst.form, self.src_index, self.dst_index, self.tokens, self.choice,
            self.terms,
        )  # fmt: skip


def layers_of(view: KVView) -> tuple[KVView, ...]:
    """A view for each layer, made once; they all have one form."""
    found: tuple[KVView, ...] | None = view.derived.get(_LAYERS)
    if found is None:
        found = tuple(view.slice(layers=i) for i in range(view.layers))
        view.derived[_LAYERS] = found
    return found
