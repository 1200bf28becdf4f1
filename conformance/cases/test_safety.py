# SPDX-License-Identifier: Apache-2.0
"""What must never happen: bad ids, shared memory and errors leave every other byte alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from portakv_conformance.judging import Judge, changed, index_of, view_of
from portakv_conformance.memory import Memory
from portakv_conformance.shapes import Shape, Workshop, lifted
from portakv_conformance.sides import Case
from portakv_conformance.subject import Subject

from portakv import LayoutError, PortaKVError, SlotError

pytestmark = pytest.mark.area("safety")

DIRECTIONS = ("gather", "scatter")
SHAPE = Shape()


def refused(judge: Judge, case: Case, error: type[PortaKVError]) -> None:
    """The copy must raise ``error``, before it has written one byte."""
    before = Memory.snapshot(case.src.tensors, case.dst.tensors)
    try:
        src, dst = view_of(case.src), view_of(case.dst)
        judge.finish(
            judge.subject.copy(src, dst, index_of(case.src), index_of(case.dst), count=case.count)
        )
    except error:
        wrong = changed(before, [case.src.tensors, case.dst.tensors])
        assert wrong is None, f"{error.__name__} was raised, but {wrong}. The case was {case!r}."
        judge.examples += 1
        return
    except Exception as other:
        raise AssertionError(
            f"Expected {error.__name__}, found {type(other).__name__}: {other} "
            f"The case was {case!r}."
        ) from other
    raise AssertionError(f"Expected {error.__name__}; nothing was raised. The case was {case!r}.")


_PAST = (SHAPE.slots, SHAPE.slots + 1, 2**31 - 1)
_FAR = (2**31, 2**32 + 1, 2**40, 2**62, 2**63 - 1)


@pytest.mark.parametrize("slot", [*_PAST, *_FAR])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_host_slots_past_the_end(judge: Judge, home: Workshop, direction: str, slot: int) -> None:
    """A slot past the end in a list on the host is a SlotError, and nothing is moved."""
    for dtype in (torch.int64, torch.int32) if slot < 2**31 else (torch.int64,):
        refused(
            judge, home.move(direction, SHAPE, torch.tensor([2, slot, 7], dtype=dtype)), SlotError
        )


@pytest.mark.parametrize("block", [SHAPE.blocks, 2**31 - 1, 2**61, 2**62, 2**63 - 1])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_host_blocks_past_the_end(judge: Judge, home: Workshop, direction: str, block: int) -> None:
    """A block past the end is a SlotError, also where its slots do not fit 64 bits."""
    refused(judge, home.move(direction, SHAPE, [2, block, 0], step=4), SlotError)


@pytest.mark.needs("accelerator")
@pytest.mark.parametrize("slot", [*_PAST, *_FAR])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_device_slots_past_the_end(
    subject: Subject, judge: Judge, home: Workshop, direction: str, slot: int
) -> None:
    """A bad slot on the device moves nothing, all others move, the transfer raises SlotError, and
    the device is sound."""
    for dtype in (torch.int64, torch.int32) if slot < 2**31 else (torch.int64,):
        ids = torch.tensor([2, slot, 7, -1, 11], dtype=dtype).to(subject.device)
        case = home.move(direction, SHAPE, ids)
        good = home.move(direction, SHAPE, [2, -1, 7, -1, 11])
        _judge_bad(judge, case, good)
        judge.copy(home.move(direction, SHAPE, [3, 1]))


def _judge_bad(judge: Judge, case: Case, good: Case) -> None:
    """Bytes as if the bad id were padding, and a SlotError at the end."""
    like = Case(
        replace(case.src, ids=good.src.ids), replace(case.dst, ids=good.dst.ids), case.count
    )
    expected = like.expected()
    transfer = None
    try:
        transfer = judge.subject.copy(
            view_of(case.src), view_of(case.dst), index_of(case.src), index_of(case.dst)
        )
        transfer.synchronize()
    except SlotError:
        judge.facility.synchronize()
    else:
        raise AssertionError(f"A bad slot raised nothing. The case was {case!r}.")
    verdict = judge.compare(expected, case.dst.tensors, case.src.tensors)
    assert verdict is None, f"{verdict} The case was {case!r}."
    judge.examples += 1


def test_a_destination_slot_twice(judge: Judge, home: Workshop) -> None:
    """A destination that occurs twice in a list on the host is a SlotError, and nothing moves."""
    refused(judge, home.scatter(SHAPE, [7, 3, 7]), SlotError)
    refused(judge, home.scatter(SHAPE, [2, 2], step=4), SlotError)


@pytest.mark.needs("accelerator")
@pytest.mark.parametrize("step", [1, 4])
def test_duplicates_on_the_device(
    subject: Subject, judge: Judge, home: Workshop, step: int
) -> None:
    """Duplicate destinations on the device have no order, and corrupt nothing else."""
    ids = [5, 2, 5, 0, 5, 5]
    case = home.scatter(SHAPE, torch.tensor(ids).to(subject.device), step=step)
    unlike = [n for n, slot in enumerate(ids) if slot != 5]
    src = replace(case.src, ids=_positions(unlike, step))
    dst = replace(case.dst, ids=torch.tensor([ids[n] for n in unlike]))
    expected = Case(src, dst, len(unlike) * step).expected()
    views = view_of(case.src), view_of(case.dst)
    judge.finish(judge.subject.copy(*views, None, index_of(case.dst)))
    found, torn = Memory.snapshot(case.dst.tensors), list(range(5 * step, 6 * step))
    for layer in range(expected.dst.layers):
        for kv in range(expected.dst.kv):
            rows = expected.dst.row_addresses(kv, layer, torn)
            expected.after.write(rows, found.read(rows))
    verdict = judge.compare(expected, case.dst.tensors, case.src.tensors)
    assert verdict is None, verdict
    judge.examples += 1


def _positions(units: list[int], step: int) -> torch.Tensor:
    return torch.tensor([unit * step + n for unit in units for n in range(step)])


def test_rows_that_are_source_and_destination(judge: Judge, home: Workshop) -> None:
    """A copy inside one cache whose rows meet is a SlotError, and nothing moves."""
    cache = home.cache(SHAPE, [1, 2, 3])
    refused(judge, Case(cache, replace(cache, ids=torch.tensor([3, 4, 5])), 3), SlotError)
    cache = home.cache(SHAPE, [1, 2], step=4)
    refused(judge, Case(cache, replace(cache, ids=torch.tensor([0, 1])), 8), SlotError)


def test_destinations_that_cannot_be_written(judge: Judge, workshop: Workshop) -> None:
    """A destination with a stride of 0, or with two planes at one address, is a LayoutError."""
    shape = Shape()
    spread = workshop.chunk(shape, 8, layout="kv layer token head dim", source=False, expand=2)
    refused(judge, Case(workshop.cache(shape, list(range(8))), spread, 8), LayoutError)
    cache = workshop.cache(shape, [0, 1], source=False)
    doubled = replace(cache, tensors=[cache.tensors[0], cache.tensors[0]])
    refused(judge, Case(workshop.chunk(shape, 2), doubled, 2), LayoutError)


_MISALIGNED = (
    "base", "offset", "row", "head", "block", "plane", "one-layer", "chunk-base", "chunk-offset",
    "chunk-row", "chunk-plane",
)  # fmt: skip


@pytest.mark.parametrize("off", [1, 2, 4, 8])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("what", _MISALIGNED)
def test_misaligned(judge: Judge, workshop: Workshop, what: str, direction: str, off: int) -> None:
    """The widest access is what the storage's own address, every stride and the storage offset
    allow, each by itself."""
    every: dict[str, dict[str, Any]] = {
        "offset": {"shift": off},
        "row": {"pads": {3: off}},
        "head": {"pads": {4: off}},
        "block": {"pads": {2: off}},
        "plane": {"pads": {1: off}},
        "chunk-offset": {"shift": off},
        "chunk-row": {"pads": {3: off}},
        "chunk-plane": {"pads": {2: off}},
    }
    how = every.get(what, {})
    shape = Shape(layers=3, heads=2, widths=(64, 64))
    slots, source = workshop.shuffled(shape.slots, 9, 1), direction == "gather"
    plain: dict[str, Any] = {"dtype": torch.uint8}
    of_chunk = what.startswith("chunk")
    cache = workshop.cache(shape, slots, source=source, **plain, **({} if of_chunk else how))
    chunk = workshop.chunk(shape, 9, source=not source, **plain, **(how if of_chunk else {}))
    if what == "one-layer":  # only a later layer is misaligned
        moved = workshop.cache(shape, slots, source=source, **plain, shift=off, storage=77)
        cache = replace(
            cache, tensors=[*cache.tensors[:2], moved.tensors[2]], arrangement=None,
            guards=[*cache.guards[:2], moved.guards[2]],
        )  # fmt: skip
    if what == "base":
        cache = lifted(cache, off)
    elif what == "chunk-base":
        chunk = lifted(chunk, off)
    judge.copy(Case(cache, chunk, 9) if source else Case(chunk, cache, 9))
