# SPDX-License-Identifier: Apache-2.0
"""What `copy_blocks` was asked: a move of whole blocks on a caller's terms, whole or in parts."""

from __future__ import annotations

from math import lcm
from typing import NamedTuple

import torch

from portakv.blocks.handle import Extent
from portakv.copy.copy import copy_move
from portakv.engines.engine import Engine, Terms
from portakv.errors import Unsupported
from portakv.plan import Move
from portakv.registry.registry import Choice
from portakv.runtime.bounded import Bounded
from portakv.runtime.transfer import Transfer

_NO_TERMS = Terms()
_engines: Bounded[tuple[Choice, Terms], Choice] = Bounded("engines on a caller's terms", 64)


class BlockMove(NamedTuple):
    """A copy of whole blocks, checked but for its ids.

    Attributes:
        move: the copy.
        choice: what carries it out.
        stream: where to order it.
        terms: what it may take across the link.
        strict: ids on a device are looked at before anything is moved.
    """

    move: Move
    choice: Choice
    stream: torch.Stream | None
    terms: Terms
    strict: bool

    @property
    def device(self) -> torch.device:
        """The device that carries it out."""
        return self.choice.backend.device

    @property
    def whole(self) -> int:
        """Tokens between two places where both sides may be cut."""
        page = self.move.src.form.block_size if self.move.src.opaque else 1
        mine, theirs = self.move.steps
        return lcm(mine or 1, theirs or 1, page)

    @property
    def extent(self) -> Extent:
        """What a handle says of it, without its views."""
        src, _, mine, theirs, count = self.move
        share = src.form.block_size if src.opaque else 1
        block = mine.plan_step or theirs.plan_step or 1
        return Extent((mine, theirs), count, block, src.form.token_bytes / share)

    def issue(self, disjoint: bool = False) -> Transfer:
        """Issue all of it; ``disjoint``: its rows are known to be."""
        return copy_move(
            self.move, self.choice, self.stream,
            disjoint=disjoint, terms=self.terms, strict=self.strict,
        )  # fmt: skip

    def check(self) -> None:
        """Raise what issuing it raises for its forms; moves nothing."""
        self._replace(move=self.move._replace(count=0)).issue()

    def layer(self, layer: int) -> BlockMove:
        """One layer of it; raises as the whole does if the sides have not equally many."""
        if self.move.src.layers != self.move.dst.layers:
            self.check()
        return self._replace(move=self.move.layer(layer))

    def part(self, first: int, tokens: int) -> BlockMove:
        """Some of its positions, with no ids but theirs."""
        src, dst, mine, theirs, _ = self.move
        move = Move(src, dst, mine.part(first, tokens), theirs.part(first, tokens), tokens)
        return self._replace(move=move)

    def follow_current(self) -> None:
        """Make its stream wait for the current one."""
        if self.stream is not None:
            # Tables are made on the current stream.
            for view in self.move[:2]:
                if len(view.origins) > 1 and view.device == self.device:
                    _ = view.table
            self.stream.wait_stream(torch.accelerator.current_stream(self.device.index))


def on_terms(move: Move, choice: Choice, terms: Terms) -> Choice:
    """A choice that keeps a caller's terms; the rate is kept by the worker.

    Raises:
        Unsupported: no engine carries the copy out, which would keep the limit.
    """
    src, dst = move.src, move.dst
    if isinstance(choice.backend, Engine):
        if terms == _NO_TERMS:
            return choice
        return _engine_on(choice, terms.of_engine)
    reached = (src.form.place, dst.form.place) in choice.can.places
    if terms.max_thread_blocks is not None and (src.device == dst.device or reached):
        raise Unsupported(
            f"A copy from {src.device} to {dst.device} by {choice.name!r} with "
            f"max_thread_blocks={terms.max_thread_blocks}",
            "the limit is kept by engines whose kernels read or write host memory; leave it out",
        )
    return choice


def _engine_on(engine: Choice, terms: Terms) -> Choice:
    """An engine that was asked for by its name, on a caller's terms: one for all rates."""
    found = _engines.get((engine, terms))
    if found is None:
        made = type(engine.backend)(engine.backend.device, None, terms)  # type: ignore[call-arg]
        on = Choice(made, engine.trace, engine.forced, made.capabilities())
        found = _engines.setdefault((engine, terms), on)
    return found
