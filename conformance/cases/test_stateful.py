# SPDX-License-Identifier: Apache-2.0
"""A serving engine in small: blocks are written, stored, evicted, loaded and moved in any order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run

from portakv import Transfer, copy_blocks
from portakv_conformance.cases import Bench, Case, Shape, Side, view_of
from portakv_conformance.cases.test_metamorphic import rows_at
from portakv_conformance.draw.by_hand import BASE_LAYOUTS
from portakv_conformance.draw.saved import blaming

pytestmark = pytest.mark.area("stateful")

SHAPE = Shape(widths=(16, 16), block_size=4, blocks=7)
SIZE = SHAPE.block_size


class Engine(RuleBasedStateMachine):
    """Sequences of tokens in blocks of a cache in the backend's base layout.

    ``expected`` holds the bytes that each token of each sequence must have. A copy that the backend
    declines does not happen.
    """

    bench: Bench

    def __init__(self) -> None:
        super().__init__()
        self.cache = self.bench.cache(SHAPE, [], source=False)
        self.connector = self.bench.connector()
        self.connector.register_kv_caches(self.cache.tensors)
        self.free = list(range(SHAPE.blocks))
        self.blocks: dict[int, list[int]] = {}  # sequence -> its blocks
        self.expected: dict[int, list[bytes]] = {}  # sequence -> the bytes of each token
        self.stored: dict[int, tuple[Side, list[bytes]]] = {}  # evicted ones, as chunks
        self.number = 0
        self.done: list[Case] = []  # every copy so far

    def _chunk(self, tokens: int, source: bool) -> Side:
        self.number += 1
        return self.bench.other(self.number).chunk(SHAPE, tokens, source=source)

    def _paged(self, ids: list[int], step: int = 1) -> Side:
        return replace(self.cache, ids=torch.tensor(ids), step=step)

    def _carried(self, case: Case, call: Callable[..., Transfer] | None = None) -> bool:
        judge = self.bench.judge
        self.done.append(case)
        begin = call or partial(judge.start, case)
        carried = judge.carried(lambda: judge.finish(begin()), case)
        judge.examples += carried
        return carried

    def _blaming(self) -> AbstractContextManager[None]:
        return blaming(self.bench.judge, *self.done[:-4:-1])

    @precondition(lambda self: self.free)
    @rule(tokens=st.integers(1, 2 * SIZE), end=st.booleans())
    def append(self, tokens: int, end: bool) -> None:
        """Scatter new tokens of a new or the last sequence into new blocks."""
        sequence = max(self.blocks, default=0) + 1 if end or not self.blocks else max(self.blocks)
        own = self.blocks.setdefault(sequence, [])
        expected = self.expected.setdefault(sequence, [])
        while len(own) * SIZE < len(expected) + tokens and self.free:
            own.append(self.free.pop())
        tokens = min(tokens, len(own) * SIZE - len(expected))
        if not tokens:
            return
        chunk = self._chunk(tokens, True)
        fresh = tokens_at(chunk, range(tokens))
        slots = _slots(own, len(expected), len(expected) + tokens)
        call = partial(self.connector.to_gpu, chunk.tensors, None, [-1, *slots], 1)
        if self._carried(Case(chunk, self._paged(slots), tokens), call):
            expected.extend(fresh)

    @precondition(lambda self: self.blocks)
    @rule(pick=st.integers(0, 5))
    def evict(self, pick: int) -> None:
        """Store a sequence to a chunk and release its blocks."""
        sequence = sorted(self.blocks)[pick % len(self.blocks)]
        expected = self.expected.pop(sequence)
        if expected:
            chunk = self._chunk(len(expected), False)
            slots = _slots(self.blocks[sequence], 0, len(expected))
            ids = torch.tensor(slots, dtype=torch.int32)
            call = partial(self.connector.from_gpu, chunk.tensors, None, ids)
            if self._carried(Case(self._paged(slots), chunk, len(expected)), call):
                self.stored[sequence] = (chunk, expected)
        self.free += self.blocks.pop(sequence)

    @precondition(lambda self: self.stored and self.free)
    @rule(pick=st.integers(0, 5))
    def reload(self, pick: int) -> None:
        """Load a stored sequence into free blocks, if there are enough."""
        sequence = sorted(self.stored)[pick % len(self.stored)]
        chunk, expected = self.stored[sequence]
        own = self.free[: -(-len(expected) // SIZE)]
        if len(own) * SIZE < len(expected):
            return
        slots = _slots(own, 0, len(expected))
        ids = torch.tensor(slots).to(self.bench.device)
        call = partial(self.connector.to_gpu, chunk.tensors, None, ids)
        if self._carried(Case(chunk, self._paged(slots), len(expected)), call):
            del self.stored[sequence], self.free[: len(own)]
            self.blocks[sequence] = own
            self.expected[sequence] = expected

    @precondition(lambda self: self.free and any(self.blocks.values()))
    @rule(pick=st.integers(0, 5), which=st.integers(0, 5))
    def migrate(self, pick: int, which: int) -> None:
        """Move a block to a free block, all layers together."""
        owners = [own for _, own in sorted(self.blocks.items()) if own]
        own = owners[pick % len(owners)]
        place = which % len(own)
        block = [own[place]]
        free = [self.free[0]]
        view = view_of(self.cache)
        name = self.bench.subject.name
        call = partial(copy_blocks, view, view, block, free, backend=name)
        if self._carried(Case(self._paged(block, SIZE), self._paged(free, SIZE), SIZE), call):
            self.free.append(own[place])
            own[place] = self.free.pop(0)

    @precondition(lambda self: any(self.expected.values()))
    @rule(pick=st.integers(0, 5), other=st.sampled_from(BASE_LAYOUTS))
    def convert(self, pick: int, other: str) -> None:
        """Read a sequence through a cache of another layout, and expect its tokens unchanged."""
        owners = [
            (sequence, tokens) for sequence, tokens in sorted(self.expected.items()) if tokens
        ]
        sequence, expected = owners[pick % len(owners)]
        blocks = self.blocks[sequence][: -(-len(expected) // SIZE)]
        order = list(range(len(blocks)))[::-1]
        shape = replace(SHAPE, blocks=len(blocks))
        dst = self.bench.cache(shape, order, layout=other, step=SIZE, source=False)
        if not self._carried(Case(self._paged(blocks, SIZE), dst, len(expected))):
            return
        converted = tokens_at(dst, _slots(order, 0, len(expected)))
        with self._blaming():
            for token, (was, now) in enumerate(zip(expected, converted, strict=True)):
                assert was == now, f"Sequence {sequence}, token {token} was converted wrong."

    @invariant()
    def every_token_holds_its_bytes(self) -> None:
        """Expect that each token of each sequence holds the bytes that were written for it."""
        stored = tokens_at(self.cache, range(SHAPE.slots))
        with self._blaming():
            for sequence, expected in self.expected.items():
                for token, slot in enumerate(_slots(self.blocks[sequence], 0, len(expected))):
                    where = f"Sequence {sequence}, token {token} in slot {slot}"
                    assert stored[slot] == expected[token], f"{where} does not hold its bytes."
            wrong = [guard.broken() for guard in self.cache.guards]
            assert not any(wrong), wrong


def _slots(blocks: list[int], first: int, past: int) -> list[int]:
    return [blocks[t // SIZE] * SIZE + t % SIZE for t in range(first, past)]


def tokens_at(side: Side, slots: Sequence[int]) -> list[bytes]:
    """Return the bytes of the tokens at some slots, in all planes."""
    planes = rows_at(side, np.asarray(slots, dtype=np.int64))
    return [b"".join(plane[at].tobytes() for plane in planes) for at in range(len(slots))]


def test_blocks_of_an_engine(bench: Bench) -> None:
    """No token is lost in any sequence of appends, evictions, reloads and migrations."""
    machine = type("Engine", (Engine,), {"bench": bench})
    hypothesis.seed(bench.judge.seed)(machine)
    examples = max(settings().max_examples // 2, 10)
    run(machine, settings=settings(max_examples=examples, stateful_step_count=15))
