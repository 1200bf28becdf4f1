# SPDX-License-Identifier: Apache-2.0
"""Kernels that pack and unpack, as the core launches them: drawn forms, whose places the kernels'
argument must name; and what that argument does not hold."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.cuda_on_cpu import LAUNCH, why_not
from support.drawn_forms import Rows, draw_form, draw_rows
from support.guarded_memory import refused
from support.pack_on_cpu import HostPackDriver, PackOnCpu
from support.pack_on_cpu import Rows as Blocks

from portakv import Index, Unsupported
from portakv.backends.pack_kernel import refusal
from portakv.core.pack import Packs, PackShape, shape_of
from portakv.core.plan import MALFORMED, Refused, pack_words
from portakv.core.rows import LOOPS, UNITS, SideShape, pack_side
from portakv.errors import PortaKVError
from portakv.plan.packing import PackPlan
from portakv.runtime.cuda import NO_CONTEXT
from portakv.view.form import Form, Steps

CPU = torch.device("cpu")
OPTIONS = array("q", [1, 0, 0, 0, 0])
DIM = 5
#: Entries of the tables of addresses of drawn views.
ENTRIES = 1 << 18
_SIDE = np.dtype([("units", "<i8", (3, 2)), ("outer", "<i8", (4, 2)), ("inner", "<i8", 6)])
_REQUEST = np.dtype([(name, "<i8") for name in ("base", "table", "ids", "wide", "first", "limit")])
#: `Copy` of native/cuda/rows.cuh.
_COPY = np.dtype(
    [
        ("from", _REQUEST),
        ("to", _REQUEST),
        *((name, "<u4") for name in ("units", "start", "unit", "ahead")),
        ("status", "<i8"),
        ("src", _SIDE),
        ("dst", _SIDE),
    ]
)


def words(loops: int = 0, dims: int = 1, units: int = 1) -> array[int]:
    """The words of a plan of one nest: loops over planes, and steps of a token and of a unit."""
    steps = [0, 0, 64, *[2, 0, 32] * (units - 1)]
    side = [0, 0, units, *steps]
    nest = [each for _ in range(loops) for each in (DIM, 3, 0, 64, 0, 64)]
    dim = [*[3, 0, 64] * (dims - 1), 16, 0, 1]
    return array("q", [16, 1, 1, *side, *side, loops, *nest, 0, dims, *dim, 16, 16])


@pytest.mark.parametrize(
    ("most", "more", "outer", "inner"),
    [
        (words(loops=4), words(loops=5), 5, 0),
        (words(dims=7), words(dims=8), 0, 7),
        (words(units=3), words(units=4), 0, 0),
    ],
    ids=["over planes", "inside a plane", "of a unit's number"],
)
def test_what_the_argument_does_not_hold(
    most: array[int], more: array[int], outer: int, inner: int
) -> None:
    assert shape_of(most, 0, OPTIONS).run == 16
    with pytest.raises(Refused) as error:
        shape_of(more, 0, OPTIONS)
    assert error.value.code == LOOPS
    assert list(error.value.values[:2]) == [outer, inner]
    form = SimpleNamespace(table_on_device=False)
    sides = {"src": form, "dst": form, "src_step": 1, "dst_step": 0}
    nest = SimpleNamespace(raw_vector=16, packed_vector=16, tokens=(), dim=())
    plan: Any = SimpleNamespace(words=more, nests=[nest], **sides)
    why = f"it takes 4 loops over planes and 6 inside, and the plan has {outer} and {inner}"
    assert refusal(plan, 0) == why


def test_a_plan_has_no_such_nest() -> None:
    with pytest.raises(Refused) as error:
        shape_of(words(), 1, OPTIONS)
    assert error.value.code == MALFORMED


@pytest.mark.parametrize("cut", [(128, 0), (0, 1), (3, 4)])
def test_a_thread_block_has_threads_for_its_planes(cut: tuple[int, int]) -> None:
    with pytest.raises(PortaKVError, match="the plan of a copy that packs"):
        Packs(words(), OPTIONS, cut, [1], 1)


def test_a_plan_that_is_cut_off_is_refused() -> None:
    plan = words()
    plan[2] = 1 << 40
    with pytest.raises(PortaKVError, match="a refusal of the core"):
        Packs(plan, OPTIONS, (128, 4), [1], 1)


@pytest.mark.parametrize("wide", ["source", "destination", "copy"])
def test_units_are_counted_in_32_bits(wide: str) -> None:
    entry = LAUNCH(lambda *_: 0)
    pack = Packs(words(), OPTIONS, (128, 4), [1], ctypes.cast(entry, ctypes.c_void_p).value or 0)
    addresses = array("q", [0])

    def run(units: int) -> int:
        src, dst = (
            pack_side(addresses.buffer_info()[0], 0, 0, 0, 0, 16 * (units if wide == name else 1))
            for name in ("source", "destination")
        )
        return pack.run(src, dst, 16 * (units if wide == "copy" else 1), 0, 0, 0)

    assert run(2**32) == 0
    assert run(2**32 + 1) == UNITS


needs_compiler = [
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
    pytest.mark.xdist_group("cuda-on-cpu"),
]


def launch_on(driver: type[HostPackDriver]) -> Any:
    """Return a function that packs so many tokens of two blocks."""
    rows = Blocks(16, 16)
    values = rows.values(most=0)[:2]
    raw = rows.raw_view(rows.tensors(values, CPU))
    slots = torch.zeros(2, rows.planes, rows.shape.slot_bytes, dtype=torch.uint8)
    packed = rows.packed_view(slots)
    backend = type("Backend", (PackOnCpu,), {"driver": driver})(CPU)
    launch: Any = backend.prepare_pack(PackPlan(raw.form, packed.form, 16, 16))
    ids = Index(torch.tensor([1, 0]), step=16)
    overflow = torch.zeros(2, dtype=torch.int32)
    expected = torch.from_numpy(rows.slots(values)[0])

    def run(count: int) -> bool:
        launch(raw, packed, ids, ids, count, None, None, overflow)
        return torch.equal(slots, expected)

    return run


@pytest.mark.parametrize("marks", [pytest.param(None, marks=needs_compiler)])
def test_the_first_launch_of_a_thread_makes_its_context(marks: None) -> None:
    class Fresh(HostPackDriver):
        """A driver that launches only after a context was made current."""

        ready = False

        @contextmanager
        def current(self) -> Iterator[None]:
            self.ready = True
            yield

        def _launch(self, handle: int, *rest: Any) -> int:
            return super()._launch(handle, *rest) if self.ready else NO_CONTEXT

    assert launch_on(Fresh)(32)


@pytest.mark.parametrize("marks", [pytest.param(None, marks=needs_compiler)])
def test_a_copy_of_more_units_than_are_counted(marks: None) -> None:
    run = launch_on(HostPackDriver)
    with refused(Unsupported, f"A copy of {16 * (2**32 + 1)} tokens in units of 16", "'reference'"):
        run(16 * (2**32 + 1))


# --- Drawn forms: the argument names the places of the rows ---------------------------------------


def test_the_argument_names_the_places_of_drawn_forms() -> None:
    assert check_drawn(5, 1000) > 500


def check_drawn(seed: int, examples: int) -> int:
    """Judge the launches of drawn plans; return how many the kernels take."""
    random = Random(seed)
    addresses = array("q", [random.randrange(1 << 40) for _ in range(ENTRIES)])
    return sum(_check_plan(random, addresses) for _ in range(examples))


def _check_plan(random: Random, addresses: array[int]) -> bool:
    """Draw a plan and judge a launch; return False if there is no plan, or no kernel."""
    rows = draw_rows(random)
    rows = Rows(rows.layers, rows.heads, rows.widths, 0)
    packed = draw_form(random, rows)
    raw = draw_form(random, rows)
    while not packed.block_size:
        packed = draw_form(random, rows)
    for _ in range(100):
        if raw.block_size in (0, packed.block_size):
            break
        raw = draw_form(random, rows)
    packs = random.random() < 0.5
    forms = (raw, packed) if packs else (packed, raw)
    unit = packed.block_size
    steps = [random.choice((0, unit)), random.choice((0, unit))]
    on_device = [int(random.random() < 0.1) for _ in range(2)]
    options = array("q", [*steps, *on_device, 0])
    try:
        plan = pack_words(raw.address, packed.address, packs, random.random() < 0.8)
        nests = plan[2]
        shapes = [shape_of(plan, nest, options) for nest in range(nests)]
    except Refused:
        return False

    copies = list[tuple[int, bytes]]()
    sizes = [
        _COPY.itemsize + 8 * (max(1, shape.src.entries) + max(1, shape.dst.entries) + 1)
        for shape in shapes
    ]

    def launch(function: int, *rest: Any) -> int:
        copies.append((function, ctypes.string_at(rest[-2][0], sizes[function - 1])))
        return 0

    entry = LAUNCH(launch)
    address = ctypes.cast(entry, ctypes.c_void_p).value or 0
    pack = Packs(plan, options, [128, 4] * nests, range(1, nests + 1), address)
    table = addresses.buffer_info()[0]
    first = [unit * random.randrange(5), unit * random.randrange(5)]
    src, dst = (
        pack_side(table, table, 7 if step else 0, 1, tokens, unit * 64)
        for step, tokens in zip(steps, first, strict=True)
    )
    assert pack.run(src, dst, unit * random.randrange(1, 9), 11, 13, 0) == 0
    assert len(copies) == nests

    for kv, (function, argument) in enumerate(copies):
        assert function == kv + 1
        copy = np.frombuffer(argument, _COPY, 1)[0]
        assert (copy["status"], copy["unit"], copy["start"], copy["ahead"]) == (11, unit, 0, 0)
        for name, step, tokens in zip(("from", "to"), steps, first, strict=True):
            asked = [int(copy[name][each]) for each in ("ids", "wide", "first", "limit")]
            assert asked == [7 if step else 0, 1 if step else 0, tokens // unit, 64]
        assert argument[-8:] == (13).to_bytes(8, "little")
        kinds = range(raw.kv) if nests == 1 else (kv,)
        judge = _Judge(shapes[kv], copy, argument, addresses)
        for number in (0, 1, random.randrange(2, 9)):
            _judge_planes(judge, forms, kinds, number, addresses)
        _judge_values(random, judge, forms, kinds[0], packs, addresses)
    return True


def _judge_planes(
    judge: _Judge,
    forms: tuple[Form, Form],
    kinds: Sequence[int],
    number: int,
    addresses: array[int],
) -> None:
    """Compare where the planes of a block begin on both sides, in any order."""
    unit = int(judge.copy["unit"])
    planes = sorted(judge.plane(number, at) for at in range(judge.shape.planes))
    expected = sorted(
        tuple(_place(form, kv, layer, head, number * unit, 0, addresses) for form in forms)
        for kv in kinds
        for layer in range(forms[0].layers)
        for head in range(forms[0].heads)
    )
    assert planes == expected


def _judge_values(
    random: Random,
    judge: _Judge,
    forms: tuple[Form, Form],
    kv: int,
    packs: bool,
    addresses: array[int],
) -> None:
    """Compare where runs of the raw values of a plane begin."""
    raw = forms[0] if packs else forms[1]
    width = raw.widths[kv]
    shape = judge.shape
    assert prod(shape.inner) * shape.run == int(judge.copy["unit"]) * width
    if any(step.table for step in raw.parts[kv].token):
        return  # `refusal` has these
    begins = _place(raw, kv, 0, 0, 0, 0, addresses)
    for _ in range(4):
        at = random.randrange(prod(shape.inner))
        token, byte = divmod(at * shape.run, width)
        there = _place(raw, kv, 0, 0, token, byte, addresses)
        assert there - begins == judge.inner(at, packs)


class _Judge:
    """The argument of a launch, read as native/cuda/rows.cuh reads it."""

    def __init__(self, shape: PackShape, copy: Any, argument: bytes, addresses: array[int]) -> None:
        self.shape = shape
        self.copy = copy
        after = np.frombuffer(argument[_COPY.itemsize :], "<i8")
        past = max(1, shape.src.entries)
        self._tables = after[:past], after[past:]
        for side, table in zip((shape.src, shape.dst), self._tables, strict=True):
            assert side.entries or table[0] == 0  # the word of a side without a table
        self._addresses = addresses

    def plane(self, number: int, at: int) -> tuple[int, ...]:
        """Return where plane ``at`` of a unit begins on both sides."""
        return (
            self._side(self.shape.src, "from", "src", self._tables[0], number, at),
            self._side(self.shape.dst, "to", "dst", self._tables[1], number, at),
        )

    def inner(self, at: int, packs: bool) -> int:
        """Return the bytes from the begin of a plane to run ``at`` of its raw values."""
        strides = self.copy["src" if packs else "dst"]["inner"]
        digits = _digits(at, self.shape.inner)
        return sum(digit * int(x) for digit, x in zip(digits, strides, strict=False))

    def _side(
        self, side: SideShape, request: str, name: str, table: Any, number: int, at: int
    ) -> int:
        steps = self.copy[name]
        walked = [
            *zip(_digits(number, (0, *side.bounded)), steps["units"], strict=False),
            *zip(_digits(at, self.shape.outer), steps["outer"], strict=False),
        ]
        entry = sum(digit * int(step[0]) for digit, step in walked)
        place = int(self.copy[request]["base"])
        place += sum(digit * int(step[1]) for digit, step in walked)
        if side.lookup == 1:
            place += int(table[entry])
        elif side.lookup == 2:
            origin = int(self.copy[request]["table"]) - self._addresses.buffer_info()[0]
            place += self._addresses[origin // 8 + entry]
        return place


def _digits(number: int, extents: Sequence[int]) -> list[int]:
    """Return the digits of a number in loops of these extents; 0 is unbounded."""
    digits = []
    for extent in reversed(extents):
        digits.append(number % extent if extent else number)
        number = number // extent if extent else 0
    return digits[::-1]


def _place(
    form: Form,
    kv: int,
    layer: int,
    head: int,
    slot: int,
    byte: int,
    addresses: array[int],
) -> int:
    """Return the address of a byte of the row of a slot."""
    part = form.parts[kv]
    block, token = divmod(slot, form.block_size) if form.block_size else (0, slot)
    axes: list[tuple[Steps, int]] = [
        (part.layer, layer),
        (part.block, block),
        (part.token, token),
        (part.head, head),
        (part.dim, byte),
    ]
    entry = part.table
    place = part.offset
    for steps, number in axes:
        digits = _digits(number, [step.extent for step in steps])
        entry += sum(digit * step.table for digit, step in zip(digits, steps, strict=True))
        place += sum(digit * step.stride for digit, step in zip(digits, steps, strict=True))
    return addresses[entry] + place
