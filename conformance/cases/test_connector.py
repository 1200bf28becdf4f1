# SPDX-License-Identifier: Apache-2.0
"""Check `AdaptiveConnector`, as an engine calls it, with this backend forced, over registered
caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch

from portakv import AdaptiveConnector
from portakv_conformance.cases import Bench, Case, Shape, Side, arguments_of, between
from portakv_conformance.draw.arrangement import Keywords
from portakv_conformance.judge.judging import changed

pytestmark = pytest.mark.area("corners")

SHAPE = Shape(blocks=8)


@dataclass
class Store:
    """Caches, and a connector that moves their rows to chunks or back."""

    bench: Bench
    connector: AdaptiveConnector
    move: str

    def caches(self, seed: int = 0) -> Side:
        """Return caches with a separate seed."""
        return self.bench.other(seed).cache(SHAPE, [], source=self.move == "from_gpu")

    def case(
        self, caches: Side, slots: Sequence[int] | torch.Tensor, tokens: int = 0, seed: int = 0
    ) -> Case:
        """Return the copy that a call for these slots must be."""
        how: Keywords = {"source": self.move == "to_gpu"}
        chunk = self.bench.other(100 + seed).chunk(SHAPE, tokens or max(len(slots), 1), **how)
        return self.between(caches, torch.as_tensor(slots), chunk)

    def between(self, caches: Side, slots: torch.Tensor, chunk: Side) -> Case:
        """Return the copy between these slots of the caches and a chunk."""
        direction = "gather" if self.move == "from_gpu" else "scatter"
        return between(direction, replace(caches, ids=slots, arrangement=None), chunk, len(slots))

    def check(
        self, case: Case, cache: object = None, *rest: object, memory_obj: object = None
    ) -> None:
        """Judge a call of the connector, by default under the ids of a case, as that copy."""
        call = partial(
            getattr(self.connector, self.move), memory_obj or _chunk(case).tensors, cache
        )
        ids = case.src.ids if case.src.ids is not None else case.dst.ids
        self.bench.judge.call(case, partial(call, *(rest or (ids,))))


def _chunk(case: Case) -> Side:
    return case.dst if case.src.block_size else case.src


@pytest.fixture(params=("from_gpu", "to_gpu"))
def store(bench: Bench, request: pytest.FixtureRequest) -> Store:
    """Return a connector for this backend, in a layout that it takes."""
    return Store(bench, bench.connector(), request.param)


@pytest.mark.parametrize(
    ("start", "end"), [(0, None), (0, 5), (3, 11), (7, None), (4, 4), (11, 12)]
)
def test_a_range_of_the_slot_mapping(store: Store, start: int, end: int | None) -> None:
    """Rows ``slot_mapping[start:end]`` are tokens 0 to end - start of the chunk, and no others.

    Without an end the chunk holds no other tokens.
    """
    caches = store.caches()
    store.connector.register_kv_caches(caches.tensors)
    for turn, holes in enumerate((0, 2)):
        slots = torch.tensor(store.bench.shuffled(SHAPE.slots, 12, holes))
        tokens = 12 - start if end is None else 12
        case = store.case(caches, slots[start:end], tokens=tokens, seed=turn)
        store.check(case, None, slots, start, end)


def test_caches_that_were_registered_again(store: Store) -> None:
    """An engine that reallocates its caches registers them again, and the old are let alone."""
    for seed in range(3):
        caches = store.caches(seed)
        slots = torch.tensor(store.bench.shuffled(SHAPE.slots, 9, 1))
        store.connector.register_kv_caches(caches.tensors)
        for again in range(2):
            store.check(store.case(caches, slots.roll(again), seed=seed))


def test_caches_passed_with_the_call(store: Store) -> None:
    """Caches that differ from those registered take their place; alternating sets do not mix."""
    sets = [store.caches(seed) for seed in range(2)]
    for turn, caches in enumerate((*sets, *sets)):
        case = store.case(caches, store.bench.shuffled(SHAPE.slots, 7 + turn), seed=turn)
        store.check(case, caches.tensors)


@pytest.mark.parametrize("ragged", [False, True])
def test_batches(store: Store, ragged: bool) -> None:
    """A batch moves each chunk's range of the slot mapping, as single calls would."""
    lengths = (8, 5, 8, 3) if ragged else (8, 8, 8)
    slots = torch.tensor(store.bench.shuffled(SHAPE.slots, sum(lengths), 2))
    ends = [*accumulate(lengths)]
    caches = store.caches()
    starts = [0, *ends[:-1]]
    store.connector.register_kv_caches(caches.tensors)
    ranges = enumerate(zip(starts, ends, strict=True))
    cases = [store.case(caches, slots[a:b], tokens=8, seed=n) for n, (a, b) in ranges]
    # As one copy, between the caches and the chunks as blocks of 8 tokens.
    first = _chunk(cases[0])
    tensors = [_chunk(case).tensors for case in cases]
    chunks = replace(
        first,
        tensors=tensors,
        layout=f"block | {first.layout}",
        block_size=8,
        ids=torch.tensor([8 * n + at for n, length in enumerate(lengths) for at in range(length)]),
        slots=8 * len(cases),
        arrangement=None,
    )
    joined = store.between(caches, slots, chunks)
    batch = partial(getattr(store.connector, f"batched_{store.move}"), tensors, None, slots)
    if store.move == "to_gpu":  # all land in one cache: each expectation is made by those before
        store.bench.judge.call(joined, partial(batch, starts, ends))
        return
    expected = [case.expected() for case in cases]
    arguments = arguments_of(joined)
    moved = store.bench.judge.call(cases[0], partial(batch, starts, ends), arguments=arguments)
    for case, wanted in zip(cases, expected, strict=True):
        verdict = changed(wanted.before, case.dst.tensors)
        if moved:
            verdict = store.bench.judge.compare(wanted, case.dst.tensors, case.src.tensors)
        assert verdict is None, verdict


def test_objects_that_hold_a_tensor(store: Store) -> None:
    """A memory object may hold its tensor, and may be longer than what is moved."""
    caches = store.caches()
    slots = torch.tensor(store.bench.shuffled(SHAPE.slots, 6))
    case = store.case(caches, slots, tokens=32)
    memory_obj = SimpleNamespace(tensor=_chunk(case).tensors)
    store.check(case, caches.tensors, slots, 0, 6, memory_obj=memory_obj)
