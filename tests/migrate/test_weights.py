# SPDX-License-Identifier: Apache-2.0
"""Weights: which piece of a tensor comes from whom for any sharding, judged by numpy's slices of
the whole tensor, and the exchange between owners and a reader."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import pairwise, product
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from support.ambient import STATES
from support.peer_process import Peer
from torch.utils._python_dispatch import TorchDispatchMode

from portakv.errors import (
    InvalidTerms,
    LayoutError,
    OfferGone,
    PeerError,
    TransferError,
    TransferTimeout,
    Unsupported,
)
from portakv.graph.task import Task
from portakv.migrate.channel import Channel
from portakv.migrate.checksum import box_checksums
from portakv.migrate.ipc import shared_empty
from portakv.migrate.messages import unsealed
from portakv.migrate.parameters import Box, Parameter, items_of, part_of, plan
from portakv.migrate.weights import (
    AskWeights,
    Weights,
    WeightsTicket,
    copy_pairs,
    publish,
    pull_weights,
)

Array = npt.NDArray[Any]


def whole_of(shape: Sequence[int]) -> Array:
    """A tensor whose elements are all different."""
    return np.arange(1, np.prod(shape, dtype=int) + 1, dtype=np.int32).reshape(shape)


def rank_of(part: Array, axis: int, rank: int, size: int, unit: int) -> Array:
    """What a rank holds of one part: whole units, shared if there are fewer than ranks."""
    units = part.shape[axis] // unit
    first = units * rank // size
    past = max(first + 1, units * (rank + 1) // size)
    return part.take(range(first * unit, past * unit), axis)


def local_of(
    whole: Array, axis: int, parts: Sequence[int], rank: int, size: int, unit: int
) -> Array:
    """What a rank holds of a fused tensor: its share of each part, one behind the other."""
    cut = np.split(whole, np.cumsum(parts)[:-1], axis)
    return np.concatenate([rank_of(part, axis, rank, size, unit) for part in cut], axis)


def pulled(mine: dict[str, Parameter], owners: Sequence[dict[str, Parameter]]) -> None:
    """Carry a plan out, between tensors of this process."""
    for name, i, box, theirs in plan(items_of(mine), [items_of(x) for x in owners]):
        source = part_of(owners[i][name].tensor, theirs, box.extents)
        part_of(mine[name].tensor, box.start, box.extents).copy_(source)


def checksum_of(tensor: torch.Tensor, box: Box) -> int:
    """The checksum of a box of a tensor."""
    return box_checksums([(part_of(tensor, box.start, box.extents), box.offset)])[0]


def tensor_of(array: Array, strided: bool) -> torch.Tensor:
    """The same elements, with others between them if ``strided``."""
    if not strided or not array.ndim:
        return torch.from_numpy(array.copy())
    room = torch.full((*array.shape[:-1], 2 * array.shape[-1] + 1), -7, dtype=torch.int32)
    held = room[..., 1::2]
    held.copy_(torch.from_numpy(array))
    return held


@given(st.data())
def test_any_tp_pulls_from_any_other(data: st.DataObject) -> None:
    """Column and row parallel, fused with uneven parts, ranks that outnumber the units: each rank
    of the reader finds numpy's slices, and nothing between its elements is touched."""
    draw = data.draw
    axis, dims = draw(st.sampled_from([(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]))
    unit = draw(st.integers(1, 3))
    parts = [unit * x for x in draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))]
    shape = draw(st.lists(st.integers(1, 4), min_size=dims, max_size=dims))
    shape[axis] = sum(parts)
    whole = whole_of(shape)
    (theirs, ours) = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    ranks = draw(st.permutations(range(theirs)))
    owners = list[dict[str, Parameter]]()
    for r in ranks:
        held = tensor_of(local_of(whole, axis, parts, r, theirs, unit), draw(st.booleans()))
        owners.append({"w": Parameter.split(held, axis, parts, (r, theirs), unit)})
    for rank in range(ours):
        expected = local_of(whole, axis, parts, rank, ours, unit)
        tensor = tensor_of(np.zeros_like(expected), draw(st.booleans()))
        pulled({"w": Parameter.split(tensor, axis, parts, (rank, ours), unit)}, owners)
        assert np.array_equal(tensor.numpy(), expected)
        if not tensor.is_contiguous():
            assert torch.as_strided(tensor, tensor.shape, tensor.stride(), 0).eq(-7).all()


@st.composite
def grids(draw: st.DrawFn, shape: Sequence[int]) -> list[tuple[tuple[int, int], ...]]:
    """A tensor cut on all its axes, into cells that are in any order."""
    edges = [sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=2))}) for n in shape]
    return draw(st.permutations([*product(*map(pairwise, edges))]))


def dealt(whole: Array, cells: Sequence[tuple[tuple[int, int], ...]]) -> Parameter:
    """A process that holds some cells of a tensor, flat, one behind the other."""
    rows = sum(past - first for (first, past), *_ in cells)
    room = torch.zeros(rows, *whole.shape[1:], dtype=torch.int32)
    boxes = list[Box]()
    at = 0
    for cell in cells:
        first = tuple(a for a, _ in cell)
        extents = tuple(b - a for a, b in cell)
        start = (at, *[0] * (whole.ndim - 1))
        boxes.append(Box(first, start, extents))
        part_of(room, start, extents).copy_(torch.from_numpy(whole[tuple(slice(*x) for x in cell)]))
        at += extents[0]
    return Parameter(room, whole.shape, boxes)


@given(st.data(), st.lists(st.integers(1, 6), min_size=1, max_size=3))
def test_boxes_of_any_grid_are_found(data: st.DataObject, shape: list[int]) -> None:
    """Boxes cut on every axis, dealt out to several owners that may hold one twice."""
    whole = whole_of(shape)
    cells = data.draw(grids(shape))
    mine = data.draw(grids(shape))
    count = data.draw(st.integers(1, 3))
    extra = data.draw(st.lists(st.sampled_from(cells), max_size=2))
    owners = [{"w": dealt(whole, [*cells[i::count], *extra])} for i in range(count)]
    reader = dealt(np.zeros_like(whole), mine)
    expected = dealt(whole, mine)
    pulled({"w": reader}, owners)
    assert torch.equal(reader.tensor, expected.tensor)


@given(st.data(), st.lists(st.integers(1, 6), min_size=1, max_size=3))
def test_a_cell_that_nobody_holds_is_named(data: st.DataObject, shape: list[int]) -> None:
    whole = whole_of(shape)
    cells = data.draw(grids(shape))
    gone, *held = cells
    owners = (
        [{"w": dealt(whole, held)}]
        if held
        else [
            {
                "w": Parameter(
                    torch.zeros(0, *shape[1:], dtype=torch.int32),
                    shape,
                    [Box((0,) * len(shape), (0,) * len(shape), (0,) * len(shape))],
                )
            }
        ]
    )
    reader = Parameter(torch.zeros(shape, dtype=torch.int32))
    with pytest.raises(LayoutError, match="w: no owner has") as caught:
        pulled({"w": reader}, owners)
    assert str(tuple(b - a for a, b in gone)) in str(caught.value)
    assert not reader.tensor.any()


@given(
    st.sampled_from([torch.uint8, torch.float16, torch.float32, torch.float64, torch.complex128]),
    st.lists(st.integers(1, 9), max_size=3),
    st.data(),
)
def test_a_checksum_is_of_values_and_places_only(
    dtype: torch.dtype, shape: list[int], data: st.DataObject
) -> None:
    """The same wherever the elements lie, dense, strided or transposed; another for one that
    changed, or at another place."""
    whole = torch.from_numpy(whole_of([n + 2 for n in shape])).to(dtype)
    offset = tuple(data.draw(st.integers(0, 2)) for _ in shape)
    extents = tuple(shape)
    part = part_of(whole, offset, extents)
    dense = part.clone()
    turned = part.clone().T.contiguous().T if len(shape) == 2 else part
    box = Box(offset, offset, extents)
    zero = (0,) * len(shape)
    found = checksum_of(whole, box)
    for tensor in (dense, turned.clone(memory_format=torch.preserve_format)):
        assert checksum_of(tensor, Box(offset, zero, extents)) == found
    dense[(-1,) * len(shape)] += 1
    assert checksum_of(dense, Box(offset, zero, extents)) != found
    if shape:
        moved = Box((*offset[:-1], (offset[-1] + 1) % 3), offset, extents)
        assert checksum_of(whole, moved) != found


def test_scalars_and_empty_tensors_are_parameters() -> None:
    owner = {"s": Parameter(torch.tensor(3.0)), "e": Parameter(torch.zeros(0, 4))}
    mine = {"s": Parameter(torch.tensor(0.0)), "e": Parameter(torch.zeros(0, 4))}
    pulled(mine, [owner])
    assert mine["s"].tensor == 3.0


def test_padding_is_left_alone() -> None:
    """A vocabulary of 10 rows, padded to 12 by the reader."""
    mine = Parameter(torch.full((12, 2), -1), (10, 2), [Box((0, 0), (0, 0), (10, 2))])
    pulled({"w": mine}, [{"w": Parameter(torch.ones(10, 2, dtype=torch.int64))}])
    assert mine.tensor.tolist() == [[1, 1]] * 10 + [[-1, -1]] * 2


def test_the_owner_that_was_named_first_is_preferred() -> None:
    owners = [{"w": Parameter(torch.full((4,), float(i)))} for i in (1, 2)]
    mine = Parameter(torch.zeros(4))
    pulled({"w": mine}, owners)
    assert mine.tensor.eq(1).all()


def test_experts_that_were_moved_are_boxes_of_one_axis() -> None:
    """Two owners hold experts in an order of their own; the reader has all, in another one."""
    whole = torch.arange(4 * 6).view(4, 3, 2)

    def holds(*experts: int) -> Parameter:
        boxes = [Box((e, 0, 0), (i, 0, 0), (1, 3, 2)) for i, e in enumerate(experts)]
        return Parameter(whole[[*experts]], (4, 3, 2), boxes)

    mine = holds(2, 0, 3, 1)
    mine.tensor.zero_()
    pulled({"w": mine}, [{"w": holds(3, 0)}, {"w": holds(1, 2)}])
    assert torch.equal(mine.tensor, whole[[2, 0, 3, 1]])


@pytest.mark.parametrize(
    ("start", "extents"), [((0, 0), (5, 2)), ((3, 0), (2, 2)), ((-1, 0), (1, 2))]
)
def test_a_box_outside_of_its_tensor_is_refused(start: Any, extents: Any) -> None:
    boxes = [Box((0, 0), start, extents)]
    with pytest.raises(LayoutError, match="Expected a box in a tensor"):
        items_of({"w": Parameter(torch.zeros(4, 2), (100, 2), boxes)})


@pytest.mark.parametrize(
    ("offset", "shape"),
    [((8, 0), (10, 2)), ((-1, 0), (10, 2)), ((0, 0), (3, 2)), ((0,), (10, 2)), ((0, 0), (9,))],
)
def test_a_box_outside_of_the_whole_is_refused(offset: Any, shape: Any) -> None:
    with pytest.raises(LayoutError, match="Expected a box in the shape"):
        items_of({"w": Parameter(torch.zeros(4, 2), shape, [Box(offset, (0, 0), (4, 2))])})


def test_blocks_that_share_a_scale_are_not_cut() -> None:
    """Halves of 6 blocks of 4 rows (the last is shorter) may be cut at 12, not at 11."""
    rows = torch.zeros(11, 2)
    items_of({"w": Parameter(rows, (23, 2), [Box((12, 0), (0, 0), (11, 2))], block=(4, 2))})
    for offset, n in ((11, 11), (12, 10)):
        cut = Parameter(rows, (23, 2), [Box((offset, 0), (0, 0), (n, 2))], block=(4, 2))
        with pytest.raises(LayoutError, match=r"cuts no block of \(4, 2\)"):
            items_of({"w": cut})


def test_a_tensor_is_split_along_its_last_axis() -> None:
    cut = Parameter.split(torch.zeros(3, 4), -1, [8], (1, 2))
    assert (cut.shape, cut.boxes) == ((3, 8), [Box((0, 4), (0, 0), (3, 4))])


@pytest.mark.parametrize(
    ("rows", "axis", "parts", "unit"), [(5, 0, (8,), 1), (4, 0, (8,), 3), (4, 2, (8,), 1)]
)
def test_a_split_that_does_not_fit_is_refused(rows: int, axis: int, parts: Any, unit: int) -> None:
    with pytest.raises((LayoutError, InvalidTerms), match=r"or give boxes|Expected axis"):
        Parameter.split(torch.zeros(rows, 2), axis, parts, (0, 2), unit)


def test_mismatches_are_one_error_that_lists_all() -> None:
    """Fault 37. Names that one side lacks, another dtype, shape, packing and block, tensors tied on
    one side only, rows that no owner has: all are told at once, and nothing was written."""
    tied = torch.zeros(4, 2)
    half = Parameter.split(torch.ones(2, 2), 0, [4], (0, 2))
    mine = {
        "missing": Parameter(torch.zeros(3)),
        "dtype": Parameter(torch.zeros(3, dtype=torch.float16)),
        "shape": Parameter(torch.zeros(3)),
        "packing": Parameter(torch.zeros(3), packing="marlin"),
        "block": Parameter(torch.zeros(4, 4), block=(2, 2)),
        "embed": Parameter(tied),
        "head": Parameter(tied),
        "half": Parameter(torch.zeros(4, 2)),
        "right": Parameter(torch.zeros(3)),
    }
    owner = {
        "surplus": Parameter(torch.ones(3)),
        "dtype": Parameter(torch.ones(3, dtype=torch.bfloat16)),
        "shape": Parameter(torch.ones(4)),
        "packing": Parameter(torch.ones(3)),
        "block": Parameter(torch.ones(4, 4), block=(4, 4)),
        "embed": Parameter(torch.ones(4, 2)),
        "head": Parameter(torch.ones(4, 2)),
        "half": half,
        "right": Parameter(torch.ones(3)),
    }
    with pytest.raises(LayoutError) as caught:
        pulled(mine, [owner])
    assert str(caught.value).splitlines()[1:] == [
        "surplus: it was not requested",
        "dtype: its dtype is 'float16' here and 'bfloat16' there",
        "shape: its shape is (3,) here and (4,) there",
        "packing: its packing is 'marlin' here and '' there",
        "block: its block is (2, 2) here and (4, 4) there",
        "embed: ['embed', 'head'] are one tensor here, and ['embed'] there",
        "head: ['embed', 'head'] are one tensor here, and ['head'] there",
        "missing: no owner has it",
        "half: no owner has (2, 2) elements from (2, 0) on",
    ]
    assert not any(x.tensor.any() for x in mine.values())


# ---- the exchange


def shared(array: Array) -> torch.Tensor:
    """The same elements, in memory that others may map."""
    tensor = torch.from_numpy(array.copy())
    tensor.share_memory_()
    return tensor


@pytest.fixture
def channels() -> Iterator[Callable[[], Channel]]:
    """Makes channels of this host, which end with the test."""
    made = list[Channel]()

    def make() -> Channel:
        made.append(Channel())
        return made[-1]

    yield make
    for channel in made:
        channel.close()


class Between(Channel):
    """A channel that does something before it asks for checksums."""

    def __init__(self, channel: Channel, before: Callable[[], object]) -> None:
        self.channel = channel
        self.before = before
        self.asked = set[AskWeights]()
        self.timeout = channel.timeout

    def ask(self, address: str, asked: Any, kind: Any, *given: Any, **named: Any) -> Any:  # type: ignore[override]
        if asked.boxes and not self.asked:
            self.before()
        self.asked |= {asked} if asked.boxes else set()
        return self.channel.ask(address, asked, kind, *given, **named)


Channels = Callable[[], Channel]


def test_tp_2_becomes_tp_3_between_channels(channels: Channels) -> None:
    """Column, row parallel and fused parameters, a scale by its own name, all replicated norms."""
    qkv = whole_of((24, 8))
    down = whole_of((6, 12))
    scale = whole_of((12, 4))
    norm = whole_of((8,))

    def rank(r: int, size: int, empty: bool) -> dict[str, Parameter]:
        def held(array: Array) -> torch.Tensor:
            return torch.zeros(array.shape, dtype=torch.int32) if empty else shared(array)

        return {
            "qkv": Parameter.split(
                held(local_of(qkv, 0, (12, 6, 6), r, size, 1)), 0, (12, 6, 6), (r, size)
            ),
            "down": Parameter.split(held(rank_of(down, 1, r, size, 1)), 1, (12,), (r, size)),
            "scale": Parameter.split(held(rank_of(scale, 0, r, size, 1)), 0, (12,), (r, size)),
            "norm": Parameter(held(norm)),
        }

    published = [publish(channels(), rank(r, 2, False)) for r in range(2)]
    for r in range(3):
        mine = rank(r, 3, True)
        expected = rank(r, 3, False)
        nbytes = pull_weights(channels(), [x.ticket for x in published], mine)
        assert nbytes == sum(x.tensor.nbytes for x in mine.values())
        for name, x in mine.items():
            assert torch.equal(x.tensor, expected[name].tensor), name
    for owner in published:
        owner.close()


def test_tied_tensors_cross_once(channels: Channels) -> None:
    rows = whole_of((6, 4))
    with_head = shared(rows)
    published = publish(channels(), {x: Parameter(with_head) for x in ("embed", "head")})
    into = torch.zeros(6, 4, dtype=torch.int32)
    mine = {x: Parameter(into) for x in ("head", "embed")}
    assert pull_weights(channels(), published.ticket, mine) == into.nbytes
    assert torch.equal(into, with_head)
    published.close()


def test_all_names_of_a_tied_tensor_are_compared(channels: Channels) -> None:
    """Two stages of a pipeline have a copy of one tensor each, of which one differs."""
    first = shared(whole_of((6, 4)))
    last = shared(whole_of((6, 4)))
    last[5, 3] += 1
    told = {"embed": first, "head": last}
    owners = [publish(channels(), {name: Parameter(x)}) for name, x in told.items()]
    mine = dict.fromkeys(told, Parameter(torch.zeros(6, 4, dtype=torch.int32)))
    with pytest.raises(TransferError, match=r"others of head\. Do not"):
        pull_weights(channels(), [x.ticket for x in owners], mine)
    for owner in owners:
        owner.close()


@pytest.mark.parametrize("total", [1, 2, 1 << 18])
def test_an_owner_that_lists_another_number_than_it_announces_is_refused(
    channels: Channels, total: int
) -> None:
    """It repeats its first item for ever, or makes up new ones past the number."""
    owner = publish(channels(), {"w": Parameter(shared(whole_of((4,))))})
    between: Any = Between(channels(), lambda: None)
    ask = between.ask
    names = iter(range(1 << 30))

    def lie(address: str, asked: AskWeights, kind: type[Weights], timeout: float) -> Any:
        answer = ask(address, replace(asked, first=0), kind, timeout)
        if total > 2:
            return replace(answer, total=total)
        item = answer.items[0][1]
        return replace(answer, total=total, items=tuple((f"{next(names)}", item) for _ in range(3)))

    between.ask = lie
    mine = {"w": Parameter(torch.zeros(4, dtype=torch.int32))}
    with pytest.raises(PeerError, match=r"Expected \d+ weights from"):
        pull_weights(between, owner.ticket, mine)
    assert not mine["w"].tensor.any()
    owner.close()


def test_an_endless_list_ends_with_the_time_of_the_call(channels: Channels) -> None:
    """One item an answer, and always new ones."""
    owner = publish(channels(), {"w": Parameter(shared(whole_of((4,))))})
    between: Any = Between(channels(), lambda: None)
    ask = between.ask

    def lie(address: str, asked: AskWeights, kind: type[Weights], timeout: float) -> Any:
        answer = ask(address, replace(asked, first=0), kind, timeout)
        item = answer.items[0][1]
        return replace(answer, total=1 << 18, items=((f"{asked.first}", item),))

    between.ask = lie
    began = time.monotonic()
    with pytest.raises(TransferTimeout, match=r"timed out after 0\.3 s"):
        pull_weights(between, owner.ticket, {"w": torch.zeros(4, dtype=torch.int32)}, timeout=0.3)
    assert time.monotonic() - began < 10
    owner.close()


def test_another_number_of_checksums_is_the_owners_error(channels: Channels) -> None:
    owner = publish(channels(), {"w": Parameter(shared(whole_of((4,))))})
    between: Any = Between(channels(), lambda: None)
    ask = between.ask
    between.ask = lambda address, asked, kind, timeout: replace(
        ask(address, asked, kind, timeout), sums=(1, 2, 3)
    )
    with pytest.raises(PeerError, match="Expected 1 checksums"):
        pull_weights(between, owner.ticket, {"w": torch.zeros(4, dtype=torch.int32)})
    owner.close()


def while_pulled(channels: Channels, change: Callable[[Any, torch.Tensor], None]) -> Any:
    """Pull two tensors of 32 MiB by the limited rate, and have the first one's owner change them
    once the first is there; return the outcome of the pull."""
    whole = torch.zeros(2, 8 << 20, dtype=torch.int32).share_memory_().fill_(1)
    published = publish(channels(), {"a": whole[0], "b": whole[1]})
    into = torch.zeros(2, 8 << 20, dtype=torch.int32)
    done = threading.Event()

    def follow() -> None:
        while not into[0, -1].item() and not done.wait(1e-3):
            pass
        change(published, whole)

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        return pull_weights(
            channels(), published.ticket, {"a": into[0], "b": into[1]}, max_gbps=0.05
        )
    finally:
        done.set()
        thread.join()
        published.close()


def test_an_update_between_two_batches_publishes_no_mixture(channels: Channels) -> None:
    """The checksums of each batch agree with what the owner has at that moment."""

    def step(published: Any, whole: torch.Tensor) -> None:
        with published.update():
            whole.numpy()[:] = 2  # torch does not count this one

    with pytest.raises(TransferError, match="changed while they were pulled"):
        while_pulled(channels, step)


def test_a_change_that_is_said_afterwards_fails_the_pull(channels: Channels) -> None:
    def step(published: Any, whole: torch.Tensor) -> None:
        whole.numpy()[:] = 2
        published.changed()

    with pytest.raises(TransferError, match=r"changed while they were pulled|checksums"):
        while_pulled(channels, step)


def test_an_optimizer_that_says_nothing_is_noticed_by_torch_s_own_count(
    channels: Channels,
) -> None:
    with pytest.raises(TransferError, match="changed while they were pulled"):
        while_pulled(channels, lambda _, whole: cast(None, whole.add_(1)))


def test_weights_that_do_not_change_are_pulled(channels: Channels) -> None:
    """The negative control of the three before."""
    assert while_pulled(channels, lambda *_: None) == 64 << 20


def test_a_pull_waits_for_the_end_of_an_update_and_again_brings_the_new_weights(
    channels: Channels,
) -> None:
    tensor = torch.ones(4).share_memory_()
    published = publish(channels(), {"w": tensor})
    into = torch.zeros(4)
    with published.update():
        with pytest.raises(TransferTimeout):
            pull_weights(channels(), published.ticket, {"w": into}, timeout=0.2)
        assert not into.any()
        tensor.fill_(3)
    assert pull_weights(channels(), published.ticket, {"w": into}) == 16
    assert into.eq(3).all()
    published.close()


WRONG_TENSORS: dict[str, Callable[[], Any]] = {
    "expanded": lambda: torch.zeros(1, dtype=torch.int32).expand(4),
    "sparse": lambda: torch.zeros(4, dtype=torch.int32).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "numpy": lambda: np.zeros(4, np.int32),
    "conjugate": lambda: torch.zeros(4, dtype=torch.complex64).conj(),
    "negative": lambda: torch.zeros(4, dtype=torch.complex64).conj().imag,
    "float boxes": lambda: Parameter(
        torch.zeros(4, dtype=torch.int32),
        (4,),
        [Box((0.0,), (0,), (4,))],  # type: ignore[arg-type]
    ),
    "number": lambda: 5,
    "none": lambda: None,
}


@pytest.mark.parametrize("kind", WRONG_TENSORS)
def test_a_reader_s_wrong_tensor_is_refused_before_a_byte_is_written(
    channels: Channels, kind: str
) -> None:
    room = shared(whole_of((2, 4)))
    owner = publish(channels(), {"first": room[0], "second": room[1]})
    first = torch.zeros(4, dtype=torch.int32)
    mine = {"first": first, "second": WRONG_TENSORS[kind]()}
    with pytest.raises((InvalidTerms, LayoutError), match="second"):
        pull_weights(channels(), owner.ticket, mine)
    assert not first.any()
    owner.close()


@pytest.mark.parametrize(
    "parameters",
    [{}, None, 5, [torch.zeros(3)], {1: torch.zeros(3)}, {"a": 5}, {"a": None}, {"": 5}],
)
def test_what_cannot_be_published_is_named(channels: Channels, parameters: Any) -> None:
    with pytest.raises(InvalidTerms, match="parameters"):
        publish(channels(), parameters)


@pytest.mark.parametrize("timeout", [float("nan"), -1, 0, "5", True])
def test_a_timeout_that_is_none_is_refused(channels: Channels, timeout: Any) -> None:
    with pytest.raises(InvalidTerms, match="Expected timeout"):
        pull_weights(channels(), [], {}, timeout=timeout)


def test_hundreds_of_parameters_are_listed_by_pages(channels: Channels) -> None:
    """More than one answer holds, and more checksums than one question asks for."""
    room = shared(whole_of((600, 16)))
    owner = publish(channels(), {f"layer.{i}.{'x' * 300}": Parameter(room[i]) for i in range(600)})
    into = torch.zeros(600, 16, dtype=torch.int32)
    mine = {f"layer.{i}.{'x' * 300}": Parameter(into[i]) for i in range(600)}
    assert pull_weights(channels(), owner.ticket, mine, max_gbps=1e3) == into.nbytes
    assert torch.equal(into, room)
    owner.close()


def test_a_question_for_checksums_is_no_larger_than_a_batch(channels: Channels) -> None:
    """So that the timeout is one of a batch, and not of a whole model."""
    whole = shared(whole_of((3, 5 << 20)))
    owner = publish(channels(), {str(i): Parameter(whole[i]) for i in range(3)})
    into = torch.zeros_like(whole)
    between: Any = Between(channels(), lambda: None)
    mine = {str(i): Parameter(into[i]) for i in range(3)}
    assert pull_weights(between, owner.ticket, mine, max_gbps=1e3) == whole.nbytes
    assert torch.equal(into, whole)
    assert sorted(len(x.boxes) for x in between.asked) == [1, 2]
    owner.close()


def test_a_stage_of_a_pipeline_asks_for_some(channels: Channels) -> None:
    owner = publish(channels(), {x: Parameter(shared(whole_of((3,)))) for x in "abc"})
    into = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(LayoutError, match="a: it was not requested\nc: it was not"):
        pull_weights(channels(), owner.ticket, {"b": Parameter(into)})
    assert pull_weights(channels(), owner.ticket, {"b": Parameter(into)}, some=True) == 12
    owner.close()


@pytest.mark.parametrize("state", STATES)
def test_parameters_of_a_module_are_filled_in_any_state(channels: Channels, state: str) -> None:
    """Leaves that require a gradient, and tensors of inference mode."""
    weight = shared(np.full((3, 2), 2.5, np.float32))
    owner = publish(channels(), {x: Parameter(weight) for x in "ab"})
    with torch.inference_mode():
        kept = torch.zeros(3, 2, dtype=torch.float32, device="cpu")
    grown = torch.nn.Parameter(torch.zeros(3, 2))
    with STATES[state](torch.device("cpu")):
        for into in (kept, grown):
            pull_weights(channels(), owner.ticket, {x: Parameter(into) for x in "ab"})
    assert kept.eq(2.5).all()
    assert grown.eq(2.5).all()
    owner.close()


def test_another_checksum_is_an_error_that_names_all(channels: Channels) -> None:
    """Fault 37. The owner's tensors change while they are pulled: one error names them, and says
    that none of the reader's may be used, which were written by then."""
    tensors = {x: shared(whole_of((5, 3))) for x in "abc"}
    owner = publish(channels(), {x: Parameter(y) for x, y in tensors.items()})

    def change() -> None:
        tensors["a"].numpy()[4, 2] += 1  # torch does not count these
        tensors["c"].numpy()[0, 0] += 1

    mine = {x: Parameter(torch.zeros(5, 3, dtype=torch.int32)) for x in "abc"}
    between: Any = Between(channels(), change)
    with pytest.raises(TransferError, match=r"others of a, c\. Do not use any"):
        pull_weights(between, owner.ticket, mine)
    assert pull_weights(channels(), owner.ticket, mine) == 180
    assert all(torch.equal(mine[x].tensor, tensors[x]) for x in "abc")
    owner.close()


def test_what_is_published_no_more_is_gone(channels: Channels) -> None:
    """Closed before, closed between the copy and its checksums, and replaced by others."""
    tensor = shared(whole_of((4,)))
    mine = {"w": Parameter(torch.zeros(4, dtype=torch.int32))}
    channel = channels()
    first = publish(channel, {"w": Parameter(tensor)})
    second = publish(channel, {"w": Parameter(tensor)})
    with pytest.raises(OfferGone, match="request a new ticket"):
        pull_weights(channels(), first.ticket, mine)
    between: Any = Between(channels(), second.close)
    with pytest.raises(OfferGone, match="no longer published"):
        pull_weights(between, second.ticket, mine)
    with pytest.raises(OfferGone):
        pull_weights(channels(), second.ticket, mine)
    first.close()


def test_an_owner_that_makes_no_checksums_is_waited_for_until_the_timeout(
    channels: Channels,
) -> None:
    """Its worker has another question that does not end."""
    release = threading.Event()
    channel = channels()
    owner = publish(channel, {"w": Parameter(shared(whole_of((4,))))})
    begun = threading.Event()

    def work(*_: object) -> None:
        begun.set()
        release.wait(10)

    owner.graph.submit([Task(work, 1, queue=owner.graph.queue("weights"))])
    assert begun.wait(10)
    mine = {"w": Parameter(torch.zeros(4, dtype=torch.int32))}
    with pytest.raises(TransferTimeout, match=r"timed out after 0\.05 s"):
        pull_weights(channels(), owner.ticket, mine, timeout=0.05)
    release.set()
    owner.close()


@pytest.mark.parametrize("ticket", [b"", b"ticket", bytes(40), "text"])
def test_what_is_no_ticket_is_refused(channels: Channels, ticket: Any) -> None:
    with pytest.raises(PeerError, match="no ticket of weights"):
        pull_weights(channels(), [ticket], {})


def test_a_tensor_without_memory_is_refused(channels: Channels) -> None:
    nothing = {"w": torch.zeros(3, device="meta")}
    with pytest.raises(LayoutError, match="without memory"):
        publish(channels(), nothing)
    with pytest.raises(LayoutError, match="without memory"):
        pull_weights(channels(), [], nothing)


@pytest.mark.parametrize("rate", [0, -1.0, "fast"])
def test_a_rate_that_is_none_is_refused(channels: Channels, rate: Any) -> None:
    with pytest.raises(InvalidTerms, match="max_gbps"):
        pull_weights(channels(), [], {}, max_gbps=rate)


def test_a_module_is_filled_from_another_one_as_it_is(channels: Channels) -> None:
    """Whole tensors need no Parameter of ours."""
    theirs = torch.nn.Linear(4, 3)
    mine = torch.nn.Linear(4, 3)
    theirs.share_memory()
    owner = publish(channels(), dict(theirs.named_parameters()))
    assert pull_weights(channels(), owner.ticket, dict(mine.named_parameters())) == 60
    assert torch.equal(mine.weight, theirs.weight)
    owner.close()


def test_memory_that_cannot_be_mapped_is_refused(channels: Channels) -> None:
    shared = torch.zeros(3).share_memory_()
    with pytest.raises(Unsupported, match=r"^Publishing parameters\['b'\]: .*shared memory"):
        publish(channels(), {"a": shared, "b": Parameter(torch.zeros(3))})


PUBLISH = """
import torch
from portakv.migrate import Channel, publish

channel = Channel(timeout=20.0)
tensor = torch.ones(1 << 20, dtype=torch.int32, device="cuda:0")
published = publish(channel, {"w": tensor})
answer = published.ticket
"""
UPDATE = """
with published.update():
    torch.cuda._sleep(4_000_000_000)  # more than a second
    tensor.fill_(2)
"""


@pytest.mark.gpu
@pytest.mark.parametrize("guarded", [True, False])
def test_an_update_ends_behind_the_stream_that_writes(guarded: bool) -> None:
    """A pull that begins inside it brings the new weights. Without the wait for the stream, the
    negative control, it begins too early: the checksums that the owner sums up later differ."""
    with Peer() as owner, closing(Channel(timeout=20.0)) as channel:
        ticket = owner.do(PUBLISH)
        into = torch.zeros(1 << 20, dtype=torch.int32, device="cuda:0")
        pull_weights(channel, ticket, {"w": into})
        assert into.eq(1).all()
        if not guarded:
            owner.do("published._synchronize = lambda: None")
        updating = threading.Thread(target=owner.do, args=(UPDATE,))
        updating.start()
        time.sleep(0.3)
        if guarded:
            pull_weights(channel, ticket, {"w": into})
            assert into.eq(2).all()
        else:
            with pytest.raises(TransferError, match="checksums"):
                pull_weights(channel, ticket, {"w": into})
        updating.join()


def ask_until_done(channel: Channel, address: str, asked: AskWeights) -> None:
    while channel.ask(address, asked, Weights).state == "busy":
        pass


def test_boxes_that_an_owner_has_not_are_refused(channels: Channels) -> None:
    """Checksums of what lies outside, or of no parameter of it."""
    owner = publish(channels(), {"w": Parameter(shared(whole_of((4,))))})
    channel = channels()
    ticket = unsealed(owner.ticket, WeightsTicket)
    assert ticket is not None
    for number, start in ((1, (0,)), (0, (2,))):
        asked = AskWeights(ticket.id, 0, ((number, Box((0,), start, (3,))),))
        with pytest.raises(PeerError, match="rejected"):
            ask_until_done(channel, ticket.address, asked)
    owner.close()


_OWNER = """
import torch
from portakv.migrate.channel import Channel
from portakv.migrate import Parameter, publish
channel = Channel()
weights = [torch.arange(n * 7, dtype=torch.int16).view(n, 7).share_memory_() for n in (5, 900)]
owner = publish(channel, {str(i): Parameter(x) for i, x in enumerate(weights)})
answer = owner.ticket
"""


def test_another_process_serves_its_weights_until_it_dies(channels: Channels) -> None:
    """Killed between the copy and the checksums, it is told so at once."""
    mine = {str(i): Parameter(torch.zeros(n, 7, dtype=torch.int16)) for i, n in enumerate((5, 900))}
    with Peer() as owner:
        ticket = owner.do(_OWNER)
        assert pull_weights(channels(), ticket, mine) == 905 * 14
        for x in mine.values():
            assert x.tensor.flatten().equal(torch.arange(x.tensor.numel(), dtype=torch.int16))
        between: Any = Between(channels(), owner.kill)
        with pytest.raises(PeerError):
            pull_weights(between, ticket, mine)


_DTYPES = """uint8 int8 uint16 int16 int32 int64 float16 bfloat16 float32 float64 float8_e4m3fn
float8_e5m2 float8_e8m0fnu complex64 complex128"""


def test_small_tensors_of_any_dtype_are_copied_bit_by_bit(device: torch.device) -> None:
    """CUDA copies 16-bit floats of a list through float32, which changes NaNs (torch 2.11): lists
    are of integers."""

    class Lists(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kw: Any = None) -> Any:
            if op is torch.ops.aten._foreach_copy_.default:
                seen.extend(x.dtype.is_floating_point or x.dtype.is_complex for x in args[0])
            return op(*args, **(kw or {}))

    random = torch.Generator().manual_seed(1)
    seen = list[bool]()
    pairs = list[Any]()
    for name in _DTYPES.split():
        made = (torch.randint(0, 256, (1 << 18,), dtype=torch.uint8, generator=random),)
        bits, into = (x.to(device) for x in (*made, torch.zeros_like(*made)))
        both = [x.view(getattr(torch, name)) for x in (into, bits)]
        pairs += [[x[:8192] for x in both], [x[8192] for x in both], [x[8193::2] for x in both]]
        pairs.append([x[8194::2].clone() for x in both])
    with Lists():  # type: ignore[no-untyped-call]
        copy_pairs(pairs)
    assert len(seen) > len(_DTYPES.split())
    assert not any(seen)
    for into, bits in pairs:
        assert torch.equal(*(x.contiguous().view(-1).view(torch.uint8) for x in (into, bits)))


_ON_A_DEVICE = """
import torch
from portakv.migrate.channel import Channel
from portakv.migrate import Parameter, publish
channel, room = Channel(), torch.arange(1 << 23, dtype=torch.int32, device="cuda:0")
weights = {f"small.{i}": room[i * 16384 :][:16384].clone() for i in range(300)}
weights |= {"large": room, "wide": (room[:384000] * 3).view(1000, 384)}
owner = publish(channel, {name: Parameter(x) for name, x in weights.items()})
answer = owner.ticket
"""


@pytest.mark.gpu
@pytest.mark.parametrize(
    "number",
    [0, pytest.param(1, marks=pytest.mark.skipif("torch.cuda.device_count() < 2", reason="one"))],
)
def test_weights_cross_from_a_device_of_another_process(channels: Channels, number: int) -> None:
    """Many small ones, a large one, and the second third of rows."""
    device = torch.device("cuda", number)
    room = torch.arange(1 << 23, dtype=torch.int32)
    expected = {f"small.{i}": room[i * 16384 :][:16384] for i in range(300)}
    expected |= {"large": room, "wide": (room[:384000] * 3).view(1000, 384)[:, 128:256]}
    into = {
        name: torch.zeros(x.shape, dtype=x.dtype, device=device) for name, x in expected.items()
    }
    mine = {name: Parameter(x) for name, x in into.items()}
    mine["wide"] = Parameter.split(into["wide"], 1, (384,), (1, 3))
    with Peer() as owner:
        ticket = owner.do(_ON_A_DEVICE)
        for limit in (None, 50.0):
            for x in into.values():
                x.zero_()
            nbytes = pull_weights(channels(), ticket, mine, max_gbps=limit)
            assert nbytes == sum(x.nbytes for x in expected.values())
            assert all(torch.equal(into[name].cpu(), x) for name, x in expected.items())


def test_a_packing_that_cannot_be_told_is_refused_by_its_owner() -> None:
    for packing in (3, "\ud800", "x" * 2000):
        with closing(Channel()) as channel, pytest.raises(InvalidTerms, match="packing of"):
            publish(channel, {"a": Parameter(torch.zeros(3), packing=packing)})  # type: ignore[arg-type]


def test_large_tensors_cross_in_pieces() -> None:
    """So a pull ends in its time, and every byte lands whatever the ends of the pieces."""
    shapes = {"line": (9_000_001,), "wide": (3, 1, 12_000_003), "number": ()}
    source = {name: shared_empty(shape, torch.float32) for name, shape in shapes.items()}
    for tensor in source.values():
        tensor.view(torch.int32).random_()
    target = {name: torch.zeros(shape) for name, shape in shapes.items()}
    with closing(Channel()) as here, closing(Channel()) as there:
        published = publish(here, source)
        with pytest.raises(TransferTimeout):
            pull_weights(there, published.ticket, target, max_gbps=1e-4, timeout=0.5)
        untouched = sum(int((tensor == 0).sum()) for tensor in target.values())
        assert untouched > 20_000_000, "a pull whose time is over copies no more"
        pull_weights(there, published.ticket, target)
        for name, tensor in target.items():
            assert torch.equal(tensor.view(torch.int32), source[name].view(torch.int32)), name
        published.close()


def test_a_tensor_without_an_axis_cannot_be_split() -> None:
    with pytest.raises(InvalidTerms, match=r"^Expected tensor to be a tensor with an axis"):
        Parameter.split(torch.tensor(3), 0, [1], cut=(0, 1))
