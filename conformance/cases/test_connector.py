# SPDX-License-Identifier: Apache-2.0
"""What an engine calls: `AdaptiveConnector`, with this backend forced, over registered caches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from portakv import AdaptiveConnector
from portakv_conformance.cases import Bench, Case, Shape, Side, asked_of, between
from portakv_conformance.judge.judging import changed

pytestmark = pytest.mark.area("corners")

SHAPE = Shape(blocks=8)
MOVES = ("from_gpu", "to_gpu")


@dataclass
class Store:
    """Caches, and a connector that moves their rows to chunks and back."""

    home: Bench
    connector: AdaptiveConnector

    def caches(self, seed: int = 0, **how: Any) -> Side:
        """Caches of a seed of their own."""
        return self.home.other(seed).cache(SHAPE, [], **how)

    def case(self, move: str, caches: Side, slots: Any, tokens: int = 0, seed: int = 0) -> Case:
        """The copy that ``move`` of these slots must be."""
        shop = self.home.other(100 + seed)
        ids = shop.ids(slots)
        assert ids is not None
        chunk = shop.chunk(SHAPE, tokens or max(len(ids), 1), source=move == "to_gpu")
        paged = replace(caches, ids=ids, arrangement=None)
        return between("gather" if move == "from_gpu" else "scatter", paged, chunk, len(ids))

    def check(self, move: str, case: Case, cache: Any = None, *rest: Any, held: Any = None) -> None:
        """Judge a call of the connector, by default under the ids of a case, as that copy."""
        call = partial(getattr(self.connector, move), held or _chunk(case), cache)
        ids = case.src.ids if case.src.ids is not None else case.dst.ids
        self.home.judge.call(case, partial(call, *(rest or (ids,))))


def _chunk(case: Case) -> Any:
    return (case.dst if case.src.block_size else case.src).tensors


@pytest.fixture
def store(home: Bench) -> Store:
    """A connector for this backend, in a layout that it takes."""
    return Store(home, home.connector())


@pytest.mark.parametrize(
    ("start", "end"), [(0, None), (0, 5), (3, 11), (7, None), (4, 4), (11, 12)]
)
@pytest.mark.parametrize("move", MOVES)
def test_a_range_of_the_slot_mapping(store: Store, move: str, start: int, end: int | None) -> None:
    """Rows ``slot_mapping[start:end]`` are tokens 0 to end - start of the chunk, and no others."""
    caches = store.caches(source=move == "from_gpu")
    store.connector.register_kv_caches(caches.tensors)
    for turn, holes in enumerate((0, 2)):
        slots = torch.tensor(store.home.shuffled(SHAPE.slots, 12, holes))
        case = store.case(move, caches, slots[start:end], tokens=12, seed=turn)
        store.check(move, case, None, slots, start, end)


@pytest.mark.parametrize("move", MOVES)
def test_caches_that_were_registered_again(store: Store, move: str) -> None:
    """An engine that reallocates its caches registers them again, and the old are let alone."""
    for seed in range(3):
        caches = store.caches(seed, source=move == "from_gpu")
        slots = torch.tensor(store.home.shuffled(SHAPE.slots, 9, 1))
        store.connector.register_kv_caches(caches.tensors)
        for again in range(2):
            store.check(move, store.case(move, caches, slots.roll(again), seed=seed))


@pytest.mark.parametrize("move", MOVES)
def test_caches_passed_with_the_call(store: Store, move: str) -> None:
    """Caches that differ from those registered take their place; alternating sets do not mix."""
    sets = [store.caches(seed, source=move == "from_gpu") for seed in range(2)]
    for turn in range(4):
        caches = sets[turn % 2]
        case = store.case(move, caches, store.home.shuffled(SHAPE.slots, 7 + turn), seed=turn)
        store.check(move, case, caches.tensors)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("move", MOVES)
def test_batches(store: Store, move: str, ragged: bool) -> None:
    """A batch moves each chunk's range of the slot mapping, as single calls would."""
    lengths = (8, 5, 8, 3) if ragged else (8, 8, 8)
    slots = torch.tensor(store.home.shuffled(SHAPE.slots, sum(lengths), 2))
    ends = [*accumulate(lengths)]
    starts = [0, *ends[:-1]]
    caches = store.caches(source=move == "from_gpu")
    store.connector.register_kv_caches(caches.tensors)
    cases = [
        store.case(move, caches, slots[a:b], tokens=8, seed=n)
        for n, (a, b) in enumerate(zip(starts, ends, strict=True))
    ]
    call = getattr(store.connector, f"batched_{move}")
    batch = partial(call, [_chunk(case) for case in cases], None, slots, starts, ends)
    joined = _joined(caches, cases, slots, lengths)
    if move == "to_gpu":  # all chunks land in one cache: each expectation is made by those before
        store.home.judge.call(joined, batch)
        return
    expected = [case.expected() for case in cases]
    moved = store.home.judge.call(cases[0], batch, asked=asked_of(joined))
    for case, wanted in zip(cases, expected, strict=True):
        verdict = changed(wanted.before, case.dst.tensors)
        if moved:
            verdict = store.home.judge.compare(wanted, case.dst.tensors, case.src.tensors)
        assert verdict is None, verdict


def _joined(caches: Side, cases: list[Case], slots: torch.Tensor, lengths: tuple[int, ...]) -> Case:
    """A batch as one copy, between the caches and the chunks as blocks of 8 tokens."""
    load = cases[0].src.block_size is None
    first, tensors = cases[0].src if load else cases[0].dst, [_chunk(case) for case in cases]
    ids = torch.tensor([8 * n + t for n, c in enumerate(lengths) for t in range(c)])
    chunks = replace(
        first, tensors=tensors, layout=f"block | {first.layout}", ids=ids, block_size=8,
        slots=8 * len(cases), arrangement=None,
    )  # fmt: skip
    paged = replace(caches, ids=slots, arrangement=None)
    return between("scatter" if load else "gather", paged, chunks, len(slots))


@pytest.mark.parametrize("move", MOVES)
def test_objects_that_hold_a_tensor(store: Store, move: str) -> None:
    """A memory object may hold its tensor, and may be longer than what is moved."""
    caches = store.caches(source=move == "from_gpu")
    case = store.case(move, caches, store.home.shuffled(SHAPE.slots, 6), tokens=32)
    store.check(move, case, caches.tensors, held=SimpleNamespace(tensor=_chunk(case)))
