# SPDX-License-Identifier: Apache-2.0
"""Check the guarantees: bad ids, shared memory and errors leave every other byte alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch

from portakv import LayoutError, SlotError
from portakv_conformance.cases import BOTH, DIRECTIONS, Bench, Case, Judge, Shape, between
from portakv_conformance.draw import by_hand
from portakv_conformance.draw.arrangement import Keywords
from portakv_conformance.judge.judging import without_bad
from portakv_conformance.judge.memory import Memory

pytestmark = pytest.mark.area("safety")

SHAPE = Shape()


#: Slots past the end, and the dtypes that can hold each.
_PAST = {
    **dict.fromkeys((SHAPE.slots, SHAPE.slots + 1, 2**31 - 1), (torch.int64, torch.int32)),
    **dict.fromkeys((2**31, 2**32 + 1, 2**40, 2**62, 2**63 - 1), (torch.int64,)),
}


@pytest.mark.parametrize("slot", _PAST)
def test_host_slots_past_the_end(bench: Bench, direction: str, slot: int) -> None:
    """A slot past the end in a list on the host is a SlotError, and nothing is moved."""
    for dtype in _PAST[slot]:
        ids = torch.tensor([2, slot, 7], dtype=dtype)
        bench.judge.refused(bench.move(direction, SHAPE, ids), SlotError)


@pytest.mark.parametrize("block", [SHAPE.blocks, 2**31 - 1, 2**61, 2**62, 2**63 - 1])
def test_host_blocks_past_the_end(bench: Bench, direction: str, block: int) -> None:
    """A block past the end is a SlotError, also where its slots do not fit 64 bits."""
    bench.judge.refused(bench.move(direction, SHAPE, [2, block, 0], step=4), SlotError)


@pytest.mark.needs("accelerator")
@pytest.mark.parametrize("slot", _PAST)
def test_device_slots_past_the_end(bench: Bench, direction: str, slot: int) -> None:
    """A bad slot on the device moves nothing, all others move, and the end is a SlotError."""
    for dtype in _PAST[slot]:
        ids = torch.tensor([2, slot, 7, -1, 11], dtype=dtype).to(bench.subject.device)
        _judge_bad(bench, bench.move(direction, SHAPE, ids))
        bench.copy(bench.move(direction, SHAPE, [3, 1]))


def _judge_bad(bench: Bench, case: Case) -> None:
    """Expect bytes as if the bad id were padding, and a SlotError at the end."""
    expected = without_bad(case).expected()
    try:
        carried = bench.judge.carried(lambda: bench.judge.start(case).synchronize(), case)
        assert not carried, f"A bad slot raised nothing. The case was {case!r}."
    except SlotError:
        bench.facility.synchronize()
        bench.judge.check(expected, case)


_END = 1 << 20  # stands for the first id past the end, and the distance of an id far past it
#: Ids of the source and of the destination: which of them are bad, and what faces a bad one.
_PAIRS = {
    "source": ([1, _END, 3], [0, 2, 4]), "destination": ([1, 0, 3], [0, _END, 4]),
    "each": ([_END, 2, 3, 0], [5, 1, _END, 4]),
    "one-position": ([1, _END + 7, 3], [0, _END + 9, 4]),
    "beside-padding": ([-1, 2, 3], [_END, -1, 4]), "padding-beside": ([1, _END, 3], [-1, -1, 4]),
    "far-source": ([1, 2**31 - 1, 3], [0, 2, 4]), "far-destination": ([1, 0, 3], [0, 2**31 - 1, 4]),
}  # fmt: skip


def two_lists(
    bench: Bench, pair: str, step: int, device: str | torch.device, dtype: torch.dtype
) -> Case:
    """Return a copy from one cache to another under a list of ids on each side."""
    src, dst = (torch.tensor(_with_end(ids, step), dtype=dtype).to(device) for ids in _PAIRS[pair])
    target = bench.cache(SHAPE, dst, step=step, source=False)
    return Case(bench.cache(SHAPE, src, step=step), target, len(src) * step)


def _with_end(ids: list[int], step: int) -> list[int]:
    return [n - _END + SHAPE.slots // step if _END <= n < 2 * _END else n for n in ids]


@pytest.mark.parametrize("step", [1, 4])
@pytest.mark.parametrize("pair", _PAIRS)
def test_host_ids_past_the_end_of_both_sides(bench: Bench, pair: str, step: int) -> None:
    """An id past the end of either list is a SlotError, also next to padding, and nothing moves."""
    bench.judge.refused(two_lists(bench, pair, step, "cpu", torch.int64), SlotError)


@pytest.mark.needs("accelerator")
@pytest.mark.parametrize("step", [1, 4])
@pytest.mark.parametrize("pair", _PAIRS)
def test_device_ids_past_the_end_of_both_sides(bench: Bench, pair: str, step: int) -> None:
    """A bad id of either list moves nothing, all others move, and the transfer raises SlotError."""
    for dtype in (torch.int64, torch.int32):
        _judge_bad(bench, two_lists(bench, pair, step, bench.subject.device, dtype))


@pytest.mark.claim("guards")
@pytest.mark.parametrize("step", [1, 4])
@pytest.mark.parametrize("pair", _PAIRS)
def test_bad_ids_of_both_sides_are_guarded(bench: Bench, pair: str, step: int) -> None:
    """A launch that guards checks both lists, and reports also an id that faces padding."""
    if not bench.judge.claims("guards", "bad ids are found before the launch."):
        return
    for dtype in bench.subject.can.index_dtypes:
        place = bench.subject.can.home_of_ids(bench.subject.device)
        case = two_lists(bench, pair, step, place, dtype)
        bench.judge.carried(partial(bench.judge.guarded, case), case)


#: Lists with more than one bad id, or with padding before it: whatever is worked out of several
#: positions, such as their sum, is the position of a good one.
_SEVERAL = {
    "two": [_END, 1, 2, _END, 3, 4],
    "two-later": [5, _END, 2, 3, _END, 4, 0],
    "behind-padding": [-1, 2, -1, _END, 3, 4],
    "many": [1, _END, 0, 2, _END, 3, 4, 5, _END, _END + 3],
}


@pytest.mark.claim("guards")
@pytest.mark.parametrize("step", [1, 4])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("ids", _SEVERAL)
def test_the_word_names_a_bad_position(bench: Bench, ids: str, offset: int, step: int) -> None:
    """The status word holds the position + 1 of the first bad id. Positions count from the start of
    the copy in its list, padding included."""
    if not bench.judge.claims("guards", "bad ids are found before the launch."):
        return
    id_list = bench.judge.ids([0] * offset + _with_end(_SEVERAL[ids], step), torch.int64)
    how: Keywords = {"step": step, "offset": offset * step}
    for direction in DIRECTIONS:
        bench.judge.guarded(bench.move(direction, SHAPE, id_list, **how))


@pytest.mark.claim("guards")
def test_the_word_names_the_first_of_many(bench: Bench) -> None:
    """Also if the bad ids are so many that several threads find one each, the status word holds the
    position + 1 of the first."""
    if not bench.judge.claims("guards", "bad ids are found before the launch."):
        return
    shape = Shape(blocks=600, layers=3)
    good = bench.shuffled(shape.slots, 2000, 1)
    bad = range(37, len(good), 5)
    for at in bad:
        good[at] = shape.slots + at
    id_list = bench.judge.ids(good)
    for direction in DIRECTIONS:
        case = bench.move(direction, shape, id_list)
        bench.judge.carried(partial(bench.judge.guarded, case), case)


def test_a_destination_slot_twice(bench: Bench) -> None:
    """A destination that occurs twice in a list on the host is a SlotError, and nothing moves."""
    bench.judge.refused(bench.scatter(SHAPE, [7, 3, 7]), SlotError)
    bench.judge.refused(bench.scatter(SHAPE, [2, 2], step=4), SlotError)


#: Destinations of which one occurs several times.
DUPLICATES = [5, 2, 5, 0, 5, 5]


def check_duplicates(judge: Judge, case: Case, carry: Callable[[], object]) -> None:
    """Judge a scatter to `DUPLICATES`: which of its sources a row holds is not specified."""
    step = case.dst.step
    once = [n for n, slot in enumerate(DUPLICATES) if slot != 5]
    positions = torch.tensor([n * step + at for n in once for at in range(step)])
    dst = replace(case.dst, ids=torch.tensor([DUPLICATES[n] for n in once]))
    expected = Case(replace(case.src, ids=positions), dst, len(once) * step).expected()
    carry()
    landed = Memory.snapshot(case.dst.tensors)
    for layer, kv in product(range(expected.dst.layers), range(expected.dst.kv)):
        rows = expected.dst.row_addresses(kv, layer, list(range(5 * step, 6 * step)))
        expected.after.write(rows, landed.read(rows))
    judge.check(expected, case)


@pytest.mark.needs("accelerator")
@pytest.mark.parametrize("step", [1, 4])
def test_duplicates_on_the_device(bench: Bench, step: int) -> None:
    """Duplicate destinations on the device have no order, and corrupt nothing else."""
    case = bench.scatter(SHAPE, torch.tensor(DUPLICATES).to(bench.subject.device), step=step)
    check_duplicates(bench.judge, case, lambda: bench.judge.finish(bench.judge.start(case)))


def test_rows_that_are_source_and_destination(bench: Bench) -> None:
    """A copy inside one cache whose rows meet is a SlotError, and nothing moves."""
    for ids, others, step in (([1, 2, 3], [3, 4, 5], 1), ([1, 2], [0, 1], 4)):
        bench.judge.refused(bench.within(SHAPE, ids, others, step=step), SlotError)


def test_destinations_that_cannot_be_written(bench: Bench) -> None:
    """A destination with a stride of 0, or with two planes at one address, is a LayoutError."""
    spread = {"layout": "kv layer token head dim", "expand": 2}
    bench.judge.refused(bench.gather(SHAPE, list(range(8)), spread), LayoutError)
    cache = replace(bench, paged=by_hand.PAGED).cache(SHAPE, [0, 1], source=False)
    doubled = replace(cache, tensors=[cache.tensors[0], cache.tensors[0]])
    bench.judge.refused(Case(bench.chunk(SHAPE, 2), doubled, 2), LayoutError)


def test_two_number_types_are_refused(bench: Bench, direction: str) -> None:
    """Rows of one number type do not go to rows of another, unless the caller means their bits."""
    case = bench.move(direction, SHAPE, [2, 0, 5], {"dtype": torch.bfloat16})
    case.src.reinterpret = False
    bench.judge.refused(case, LayoutError)


#: What is misaligned, and the axis of a cache or of a chunk whose stride does it.
_MISALIGNED = {
    "base": "",
    "offset": "",
    "row": "token",
    "head": "head",
    "block": "block",
    "plane": "kv",
    "one-layer": "",
    "chunk-base": "",
    "chunk-offset": "",
    "chunk-row": "token",
    "chunk-plane": "layer",
}


@pytest.mark.parametrize("off", [1, 2, 4, 8])
@BOTH
@pytest.mark.parametrize("what", _MISALIGNED)
def test_misaligned(bench: Bench, what: str, direction: str, off: int) -> None:
    """The widest access is what the storage's address, its offset and every stride allow."""
    shape = Shape(layers=3, heads=2, widths=(64, 64))
    of_chunk = what.startswith("chunk")
    part = what.removeprefix("chunk-")
    how: Keywords = {"shift": off} if part == "offset" else {}
    if axis := _MISALIGNED[what]:
        how = by_hand.widened(by_hand.CHUNK if of_chunk else bench.paged, axis, off)
    of_chunks, of_caches = (how, {}) if of_chunk else ({}, how)
    case = bench.some(direction, shape, 9, 1, of_chunks, dtype=torch.uint8, **of_caches)
    cache, chunk = (case.src, case.dst) if direction == "gather" else (case.dst, case.src)
    if what == "one-layer" and isinstance(cache.tensors, list):  # a tensor for each layer
        how = {"source": direction == "gather", "shift": off, "storage": 77}
        moved = bench.cache(shape, dtype=torch.uint8, **how)
        tensors = [*cache.tensors[:2], moved.tensors[2]]
        guards = [*cache.guards, *moved.guards]
        cache = replace(cache, tensors=tensors, guards=guards, arrangement=None)
    elif part == "base" and of_chunk:
        chunk = by_hand.lifted(chunk, off)
    elif part == "base":
        cache = by_hand.lifted(cache, off)
    bench.copy(between(direction, cache, chunk, 9))
