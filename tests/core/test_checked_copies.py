# SPDX-License-Identifier: Apache-2.0
"""Copies on a CPU that the core checks and a backend's launch makes: their bytes are those of
torch's indexing, for launches that take numbers of units and for launches that take indices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.command_line import registered
from support.small_backends import Late, small_backend
from support.whole_copies import needs_whole_copies, watch_copies_of_views, watch_whole_copies

from portakv import (
    AdaptiveConnector,
    Index,
    KVView,
    SlotError,
    TransferError,
    copy_blocks,
    copy_rows,
)
from portakv.copy.inside import open_view
from portakv.core.call import OTHERWISE, TO_THE_END, Watch, calls
from portakv.view.form import plain_reader

LAYERS = 3
SLOTS = 24
ROW = 6
SHAPES = {
    "paged by 4": ("layer | block token dim", (SLOTS // 4, 4, ROW)),
    "paged by 2": ("layer | block token dim", (SLOTS // 2, 2, ROW)),
    "tokens apart": ("layer | token block dim", (4, SLOTS // 4, ROW)),
    "chunk": ("layer | token dim", (SLOTS, ROW)),
}
BY_INDEX = "by_index"


@pytest.fixture(scope="module", autouse=True)
def _backend() -> Iterator[None]:
    with registered(by_index=small_backend(BY_INDEX, by_runs=True)):
        yield


class Side:
    """A view with its rows ``[layers, slots, row]`` in the order of the slots."""

    def __init__(self, name: str, first: int) -> None:
        layout, shape = SHAPES[name]
        numbers = torch.arange(first, first + LAYERS * SLOTS * ROW, dtype=torch.int32)
        self.tensors = [*numbers.view(LAYERS, *shape).clone()]
        self.view = KVView(self.tensors, layout)
        self._token_first = name == "tokens apart"

    def rows(self) -> torch.Tensor:
        stacked = torch.stack(self.tensors)
        if self._token_first:
            stacked = stacked.transpose(1, 2)
        return stacked.reshape(LAYERS, SLOTS, ROW).clone()


def as_passed(kind: str, ids: list[int], step: int, offset: int) -> Any:
    """Ids as a caller may pass them; those of another kind than an index pass over nothing."""
    wide = torch.tensor([[each, -1] for each in ids])
    return {
        "list": ids,
        "int64": torch.tensor(ids),
        "int32": torch.tensor(ids, dtype=torch.int32),
        "apart": wide[:, 0],
        "tuple": tuple(ids),
        "index": Index(ids, step=step, offset=offset),
    }[kind]


@st.composite
def sides(draw: Any) -> tuple[str, list[int], int, str, int]:
    """Draw the name of a shape, distinct ids, their step, how they are passed, and an offset."""
    name = draw(st.sampled_from([*SHAPES]))
    size = 2 if name == "paged by 2" else 4
    step = draw(st.sampled_from([1, size]))
    ids = draw(st.permutations(range(SLOTS // step)))[: draw(st.integers(1, SLOTS // step))]
    skipped = draw(st.sets(st.integers(0, len(ids) - 1), max_size=2))
    listed = [-2 if place in skipped else each for place, each in enumerate(ids)]
    kind = draw(st.sampled_from(["list", "int64", "int32", "apart", "tuple", "index", "none"]))
    if kind == "none":
        return name, [*range(SLOTS)], 1, kind, draw(st.integers(0, SLOTS - 1))
    if kind != "index":
        return name, [*listed], 1 if step == 1 else step, kind, 0
    return name, listed, step, kind, draw(st.integers(0, len(ids) * step - 1))


def slots_of(ids: list[int], step: int, offset: int) -> list[int]:
    each = [-1 if one < 0 else one * step + n for one in ids for n in range(step)]
    return each[offset:]


@given(src=sides(), dst=sides(), cut=st.booleans())
@settings(max_examples=300, deadline=None)
def test_launches_by_units(src: Any, dst: Any, cut: bool) -> None:
    check_copy("reference", src, dst, cut)


@given(src=sides(), dst=sides(), cut=st.booleans())
@settings(max_examples=300, deadline=None)
def test_launches_by_indices(src: Any, dst: Any, cut: bool) -> None:
    check_copy(BY_INDEX, src, dst, cut)


def check_copy(backend: str, src: Any, dst: Any, cut: bool) -> None:
    """Copy between two drawn sides, all of it or all but one token, and compare every row."""
    read = Side(src[0], 0)
    written = Side(dst[0], 10**6)
    passed = []
    named = []
    for _, ids, step, kind, offset in (src, dst):
        named.append(slots_of(ids, step, offset))
        if kind == "none":
            passed.append(Index(offset=offset))
        elif step == 1 or kind == "index":
            passed.append(as_passed(kind, ids, step, offset))
        else:
            passed.append(Index(as_passed(kind, ids, step, offset), step=step))
    count = min(map(len, named)) - cut
    if count < 1:
        return
    from_slots, to_slots = (slots[:count] for slots in named)
    moved = [(a, b) for a, b in zip(from_slots, to_slots, strict=True) if a >= 0 and b >= 0]
    expected = written.rows()
    if moved:
        expected[:, [b for _, b in moved]] = read.rows()[:, [a for a, _ in moved]]
    transfer = copy_rows(read.view, written.view, *passed, count=count, backend=backend)
    transfer.synchronize()
    assert torch.equal(written.rows(), expected)
    moved_bytes = len(moved) * LAYERS * ROW * 4
    assert transfer.statistics.nbytes == moved_bytes
    assert transfer.carried[0] == (backend if moved else "none")


@given(
    order=st.permutations(range(SLOTS)),
    skipped=st.sets(st.integers(0, SLOTS - 1), max_size=3),
    kind=st.sampled_from(["list", "int64", "int32", "apart", "tuple", "index"]),
    ends=st.lists(st.integers(0, SLOTS), min_size=2, max_size=2, unique=True),
    chunk_layout=st.sampled_from(["layer token dim", "token layer dim"]),
    to_the_end=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_chunks_by_units(
    order: list[int],
    skipped: set[int],
    kind: str,
    ends: list[int],
    chunk_layout: str,
    to_the_end: bool,
) -> None:
    check_chunk("reference", order, skipped, kind, ends, chunk_layout, to_the_end)


@pytest.mark.parametrize("skipped", [set(), {2, 5}])
def test_chunks_by_indices(skipped: set[int]) -> None:
    check_chunk(BY_INDEX, [*range(SLOTS)], skipped, "list", [2, 9], "token layer dim", False)


def check_chunk(
    backend: str,
    order: list[int],
    skipped: set[int],
    kind: str,
    ends: list[int],
    chunk_layout: str,
    to_the_end: bool,
) -> None:
    """Store slots into a chunk and load them into other caches, and compare every row."""
    ids = [-3 if place in skipped else slot for place, slot in enumerate(order)]
    start, end = sorted(ends)
    if to_the_end:
        end = SLOTS
    here = ids[start:end]
    shape = {"token": end - start, "layer": LAYERS, "dim": ROW}
    chunk = torch.full([shape[axis] for axis in chunk_layout.split()], -9, dtype=torch.int32)
    rows = chunk if chunk_layout.startswith("layer") else chunk.transpose(0, 1)
    loaded = Side("paged by 4", 10**6)
    stored = Side("paged by 4", 0)
    moved = [(place, slot) for place, slot in enumerate(here) if slot >= 0]
    places = [place for place, _ in moved]
    slots = [slot for _, slot in moved]
    passed = as_passed(kind, ids, 1, 0)
    last = None if to_the_end else end
    with pytest.MonkeyPatch.context() as patched:
        watched = watch_whole_copies(patched)
        for _ in range(2):
            into = connector_of(loaded, backend, chunk_layout)
            outof = connector_of(stored, backend, chunk_layout)
            expected = rows.clone()
            expected[:, places] = stored.rows()[:, slots]
            outof.from_gpu(chunk, None, passed, start, last).synchronize()
            outof.from_gpu(chunk, None, passed, start, last).synchronize()
            assert torch.equal(rows, expected)
            expected = loaded.rows()
            expected[:, slots] = rows[:, places]
            into.to_gpu(chunk, None, passed, start, last).synchronize()
            into.to_gpu(chunk, None, passed, start, last).synchronize()
            assert torch.equal(loaded.rows(), expected)
    # A connector's first call reads the layout of chunks.
    assert watched == [False, bool(moved)] * 4


def connector_of(caches: Side, backend: str, chunk_layout: str) -> AdaptiveConnector:
    layout = SHAPES["paged by 4"][0]
    connector = AdaptiveConnector("cpu", backend, layout, chunk_layout)
    connector.register_kv_caches(caches.tensors)
    return connector


@pytest.mark.parametrize("backend", ["reference", BY_INDEX])
@pytest.mark.parametrize("ids", [[3, 1], [3, -1, 2]], ids=["all", "skipping"])
def test_the_core_checks_copies_on_a_cpu(
    backend: str, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = watch_copies_of_views(monkeypatch)
    src = Side("paged by 4", 0)
    dst = Side("paged by 4", 999)
    there = [*range(len(ids))]
    for _ in range(2):
        copy_blocks(src.view, dst.view, ids, there, backend=backend)
        copy_rows(src.view, dst.view, ids, backend=backend)
    copy_rows(src.view, dst.view, backend=backend)
    assert torch.equal(src.rows(), dst.rows())
    assert made == [True] * 5


def test_a_wrong_id_moves_nothing() -> None:
    src = Side("paged by 4", 0)
    dst = Side("chunk", 999)
    before = dst.rows()
    with pytest.raises(SlotError, match="got slot 24 at position 1"):
        copy_rows(src.view, dst.view, [1, SLOTS])
    with pytest.raises(SlotError, match="occurs 2 times"):
        copy_rows(src.view, dst.view, None, [1, 1], count=2)
    assert torch.equal(dst.rows(), before)


def test_ids_without_a_dimension_are_refused() -> None:
    connector = connector_of(Side("paged by 4", 0), "reference", "layer token dim")
    chunk = torch.zeros(LAYERS, 1, ROW, dtype=torch.int32)
    connector.from_gpu(chunk, None, [3])
    with pytest.raises(SlotError, match="one dimension"):
        connector.from_gpu(chunk, None, torch.tensor(3))


@needs_whole_copies
@pytest.mark.parametrize(
    ("step", "offset"), [(2**62, 0), (2**63 - 1, 0), (0, 0), (-1, 0), (1, -(2**63)), (1, 2**63 - 1)]
)
@pytest.mark.parametrize("count", [1, TO_THE_END])
def test_steps_and_offsets_that_no_index_has_are_refused(
    step: int, offset: int, count: int
) -> None:
    """Products and differences past 64 bits, and quotients by 0."""
    reader = plain_reader()
    assert reader is not None
    view = Side("chunk", 0).view
    opened = open_view(view, Watch(view.owners))
    for sides in (([0] * 5, None, step, 1, offset, 0), (None, [0], 1, step, 0, offset)):
        arguments = reader.address, opened.address, opened.address, *sides, count, 0, 0
        assert calls().check_views(*arguments) == OTHERWISE


def test_a_launch_may_end_later() -> None:
    made = small_backend("late")
    src = Side("paged by 4", 0)
    dst = Side("chunk", 999)
    with registered(late=made):
        copy_rows(src.view, dst.view, [5, 4], backend="late")  # the backend checks itself once
        made.pending = Late()
        transfer = copy_rows(src.view, dst.view, [5, 4], backend="late")
        assert not transfer.done()
        with pytest.raises(TransferError, match="it failed"):
            transfer.synchronize()
