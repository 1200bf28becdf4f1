# SPDX-License-Identifier: Apache-2.0
"""ENCODINGS: a backend that claims `pack` packs and unpacks every byte as the format says, in every
raw layout and packed image, and reports the blocks that do not fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from portakv import PortaKVError, Unsupported, copy_blocks
from portakv.layout.presets import PRESETS
from portakv_conformance.cases import PAGED, Bench, Shape, full
from portakv_conformance.cases.test_presets import UNEQUAL, WIDTHS, lies
from portakv_conformance.draw.arrangement import Keywords
from portakv_conformance.draw.by_hand import arranged, on_host
from portakv_conformance.draw.planes import EDGES, at_edge, every_pattern, usual
from portakv_conformance.judge.grammar import read_layout
from portakv_conformance.judge.memory import Memory
from portakv_conformance.judge.packed import PackedCase, judge_packed, start_packed
from portakv_conformance.judge.slots import SlotShape, usual_slot

pytestmark = [pytest.mark.area("encodings"), pytest.mark.claim("encodings")]

#: The usual packed image, and others in which the axes stand elsewhere.
IMAGE = "block layer kv head page"
IMAGES = (
    IMAGE,
    "layer | block kv head page",
    "kv layer block head page",
    "layer kv | block head page",
    "block head layer (kv page)",
    "block layer kv (head page)",
)
SIZE = 16
#: Two heads of 16 values: planes of 256 values.
SMALL = Shape(widths=(32, 32), block_size=SIZE, blocks=4)
PACKS = pytest.mark.parametrize("packs", [True, False], ids=["pack", "unpack"])
BITS = pytest.mark.parametrize("bits", [4, 3], ids=["4 bits", "3 bits"])


def case_of(
    bench: Bench,
    packs: bool,
    shape: Shape,
    *,
    raw_blocks: Any = (2, 0, 3),
    packed_blocks: Any = (1, 3, 0),
    bits: int = 4,
    slot_bytes: int = 0,
    raw: Keywords | None = None,
    image: str = IMAGE,
    packed: Keywords | None = None,
) -> PackedCase:
    """Return a case whose raw side has a shape of bf16 rows, and whose source is not filled."""
    values = [shape.block_size * width // 2 for width in shape.widths]
    slots = tuple(
        replace(usual_slot(n, bits), **({"slot_bytes": slot_bytes} if slot_bytes else {}))
        for n in values
    )
    how: Keywords = {"layout": bench.paged, "dtype": torch.bfloat16, **(raw or {})}
    chunk = not read_layout(how["layout"]).written("block")
    count = len(packed_blocks)
    if chunk:
        side = bench.chunk(shape, count * shape.block_size, source=packs, **how)
        raw_blocks = None
    else:
        side = bench.cache(shape, None, source=packs, **how)
    text = image.replace("page", "token dim")
    image_shape = replace(shape, widths=tuple(x.slot_bytes for x in slots), block_size=1)
    stored = bench.cache(
        image_shape, None, layout=text, dtype=torch.uint8, source=not packs, **(packed or {})
    )
    return PackedCase(
        side,
        stored,
        image,
        slots,
        shape.block_size,
        None if raw_blocks is None else bench.ids(list(raw_blocks)),
        bench.ids(list(packed_blocks)),
        packs,
        count,
    )


def claimed(bench: Bench) -> bool:
    """Return True if `pack` is claimed; otherwise the test ends as not claimed."""
    return bench.judge.claims("encodings", "another backend packs and unpacks in its place.")


def check(bench: Bench, case: PackedCase, values: Any = None) -> bool:
    """Fill the source of a case and judge the copy; return False if the backend declines it."""
    case.fill(values or partial(usual, bench.seed))
    return judge_packed(bench.judge, case)


def must(bench: Bench, case: PackedCase, values: Any = None) -> None:
    """Judge a case in the base layout, which a backend that claims `pack` may not decline."""
    taken = check(bench, case, values)
    assert taken, f"It claims 'pack' and declines it: {bench.judge.declined[-1]}"


@PACKS
def test_what_is_not_claimed_is_refused(bench: Bench, packs: bool) -> None:
    """A backend that does not claim `pack` is refused by name, with every byte unchanged."""
    case = case_of(bench, packs, SMALL)
    case.fill(partial(usual, bench.seed))
    if bench.subject.can.encodings:
        assert judge_packed(bench.judge, case), bench.judge.declined[-1]
        return
    bench.judge.not_claimed("encodings", "another backend packs and unpacks in its place.")
    before = Memory.snapshot(case.raw.tensors, case.packed.tensors)
    with pytest.raises(Unsupported, match="pack"):
        start_packed(bench.judge, case)
    after = Memory.snapshot(case.raw.tensors, case.packed.tensors)
    assert not list(before.changes(after)), "The copy was refused, but bytes changed."


@PACKS
@BITS
@pytest.mark.parametrize("dim", [16, 128])
def test_planes_of_a_block(bench: Bench, packs: bool, bits: int, dim: int) -> None:
    """Small planes count all values for their table, and every slot has the bytes of the format."""
    if claimed(bench):
        shape = replace(SMALL, widths=(2 * dim,) * 2)
        must(bench, case_of(bench, packs, shape, bits=bits, slot_bytes=_roomy(dim, bits)))


def _roomy(dim: int, bits: int) -> int:
    """Return the bytes of a slot with space for the escapes of usual values."""
    bare = usual_slot(SIZE * dim, bits).escapes
    return -(-(bare + SIZE * dim // 8) // 32) * 32


@PACKS
@BITS
def test_large_planes(bench: Bench, packs: bool, bits: int) -> None:
    """Planes from 8,192 values on have a sampled table, the long head and several segments."""
    if claimed(bench):
        shape = Shape(layers=1, heads=1, widths=(1184,), block_size=SIZE, blocks=2)
        raw: Keywords = {"layout": "layer | block token dim"}
        image = "layer | block page"
        for width in (1024, 1184):  # the last segment is whole, or not
            wide = replace(shape, widths=(width,))
            case = case_of(
                bench,
                packs,
                wide,
                raw_blocks=[1],
                packed_blocks=[0],
                bits=bits,
                raw=raw,
                image=image,
            )
            check(bench, case)


@PACKS
def test_every_pattern(bench: Bench, packs: bool) -> None:
    """All 65,536 patterns pass through the packed bytes, NaN payloads and signs of zero too."""
    if claimed(bench):
        # 64 planes of 1,024 values, which have eight exponents each.
        shape = Shape(layers=4, heads=2, widths=(128, 128), block_size=SIZE, blocks=4)
        case = case_of(bench, packs, shape, raw_blocks=[3, 1, 0, 2], packed_blocks=[0, 1, 2, 3])
        must(bench, case, every_pattern)
        assert not case.expected().refused


@PACKS
@pytest.mark.parametrize(
    ("values", "bits"),
    [(256, 4), (256, 3), (8192, 4), pytest.param(8192, 3, marks=full)],
)
def test_planes_at_the_edges(bench: Bench, packs: bool, values: int, bits: int) -> None:
    """One exponent, ties, escapes at the end, exactly as many as fit and one more: each plane has
    the bytes of the format, or its flag, and its block is reported."""
    if not claimed(bench):
        return
    kinds = list(EDGES)
    shape = Shape(1, 1, (2 * values // SIZE,), SIZE, len(kinds))
    raw: Keywords = {"layout": "layer | block token dim"}
    order = bench.shuffled(len(kinds), len(kinds))
    case = case_of(
        bench,
        packs,
        shape,
        raw_blocks=order,
        packed_blocks=range(len(kinds)),
        bits=bits,
        raw=raw,
        image="layer | block page",
    )
    slot = case.slots[0]

    def planes(number: int, _: int) -> np.ndarray:
        return at_edge(kinds[number], slot)

    assert check(bench, case, planes), bench.judge.declined[-1]
    refused = {kinds[order[at] if packs else at] for at in case.expected().refused}
    assert {"one more than fit", "no repeats"} <= refused
    assert not refused & {"as many as fit", "one fewer than fit", "one exponent", "zeros"}


@PACKS
def test_one_block_that_does_not_fit(bench: Bench, packs: bool) -> None:
    """A block with one plane that does not fit is reported, and all others are packed; rows of a
    flagged slot stay as they were."""
    if claimed(bench):
        case = case_of(bench, packs, SMALL)
        noise = np.random.default_rng(bench.seed).integers(0, 1 << 16, 256).astype(np.uint16)

        def planes(number: int, values: int) -> np.ndarray:
            # Block 3 of the raw side, block 1 of the packed side.
            broken = 3 * 8 + 5 if packs else 8 + 5
            return noise if number == broken else every_pattern(0, values)

        must(bench, case, planes)
        assert len(case.expected().refused) == 1


def _layouts() -> Iterator[Any]:
    """Yield every raw layout that an engine is known to use, and that can hold bf16."""
    for name, preset in PRESETS.items():
        if name not in WIDTHS and not read_layout(preset.layout).written("page"):
            yield pytest.param(name, marks=pytest.mark.tags(layout=name, dtype="bfloat16"))


@PACKS
@pytest.mark.parametrize("name", list(_layouts()))
def test_raw_layouts(workshop: Bench, packs: bool, name: str) -> None:
    """Rows of every raw layout are packed into an image and unpacked from it."""
    if not claimed(workshop):
        return
    preset = PRESETS[name]
    axes = read_layout(preset.layout)
    kv = int(preset.extents.get("kv", 2 if axes.written("kv") else 1))  # type: ignore[arg-type]
    split = any(factor.part for group in axes.right for factor in group)
    widths = (128 if split else 32,) * kv
    if name in UNEQUAL:
        widths = (64, *(32,) * (kv - 1))
    heads = 2 if axes.written("head") and name != "chunk-2ltd-mla" else 1
    shape = Shape(2 if axes.written("layer") else 1, heads, widths, SIZE, 4)
    how = {"layout": preset.layout, **lies(name, torch.bfloat16)}
    image = IMAGE if len(set(widths)) == 1 else "block layer head (kv page)"
    names = image.replace("(", "").replace(")", "").split()
    dropped = {
        axis
        for axis, extent in (("layer", shape.layers), ("kv", kv), ("head", heads))
        if extent == 1 and axis in names
    }
    image = " ".join(word for word in image.split() if word not in dropped)
    if "kv" in dropped:
        image = image.replace("(kv page)", "page")
    check(workshop, case_of(workshop, packs, shape, raw=how, image=image))


@PACKS
@pytest.mark.parametrize("image", IMAGES[1:])
def test_packed_images(workshop: Bench, packs: bool, image: str) -> None:
    """Slots lie in any order of the axes, in one tensor or in several, with space between them."""
    if claimed(workshop):
        # Rows of slots: every stride stays a multiple of the widest vector.
        padded: Keywords = {"pads": {1: 64}} if "(" not in image else {}
        check(workshop, case_of(workshop, packs, SMALL, image=image, packed=padded))


@PACKS
@pytest.mark.parametrize("axis", ["layers", "heads"])
def test_slices(bench: Bench, packs: bool, axis: str) -> None:
    """Slices by layer and by head pack and unpack the slots of the slice and no others."""
    if not claimed(bench):
        return
    shape = replace(SMALL, layers=3, heads=3)
    case = case_of(bench, packs, shape)
    case.fill(partial(usual, bench.seed))
    whole = case.expected()
    part: Keywords = {axis: slice(1, 3)}
    rest: Keywords = {axis: 0}
    src, dst = (view.slice(**part) for view in case.views())
    tokens = case.count * SIZE
    how = {"count": tokens, "backend": bench.subject.name}
    if not bench.judge.carried(
        lambda: copy_blocks(src, dst, *case.blocks(), **how).synchronize(),  # type: ignore[arg-type]
        (src, dst),  # type: ignore[arg-type]
    ):
        return
    # A second copy of the rest makes the whole, which is judged.
    partly = Memory.snapshot(case.sides[1].tensors)
    first, last = (view.slice(**rest) for view in case.views())
    copy_blocks(first, last, *case.blocks(), **how).synchronize()  # type: ignore[arg-type]
    bench.facility.synchronize()
    fault = whole.fault(case)
    assert not fault, fault
    changed = sum(len(at) for _, at in partly.changes(Memory.snapshot(case.sides[1].tensors)))
    assert changed, "The slice wrote the rows of other layers or heads too."
    bench.judge.examples += 1


@PACKS
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_blocks_that_are_skipped(bench: Bench, packs: bool, dtype: torch.dtype) -> None:
    """A negative block of either side is skipped, and the others are in their places."""
    if claimed(bench):
        case = case_of(bench, packs, SMALL, raw_blocks=[2, -1, 3, 0], packed_blocks=[1, 3, -7, 0])
        case.raw_blocks = case.raw_blocks.to(dtype) if case.raw_blocks is not None else None
        must(bench, case)


@pytest.mark.needs("accelerator")
@PACKS
def test_blocks_on_the_device(bench: Bench, packs: bool) -> None:
    """Block ids on the device are those of the host."""
    if claimed(bench):
        case = case_of(bench, packs, SMALL)
        assert case.raw_blocks is not None
        assert case.packed_blocks is not None
        case.raw_blocks = case.raw_blocks.to(bench.subject.device)
        case.packed_blocks = case.packed_blocks.to(bench.subject.device)
        must(bench, case)


@pytest.mark.needs("accelerator")
@PACKS
@pytest.mark.parametrize("place", ["pinned", "pageable"])
@pytest.mark.parametrize("far", ["raw", "packed"])
def test_to_the_host_and_back(bench: Bench, packs: bool, place: str, far: str) -> None:
    """Rows are packed and unpacked on the device, whichever side is on the host."""
    if claimed(bench):
        case = case_of(bench, packs, SMALL)
        case.fill(partial(usual, bench.seed))
        setattr(case, far, on_host(getattr(case, far), place == "pinned"))
        judge_packed(bench.judge, case)


def test_packed_blocks_are_copied_as_they_are(bench: Bench) -> None:
    """Between two packed sides slots are rows of bytes, in any order of the axes."""
    if not claimed(bench):
        return
    case = case_of(bench, False, SMALL)
    case.fill(partial(usual, bench.seed))
    other = case_of(bench, True, SMALL, image=IMAGES[2])
    src = case.packed_view(case.packed)
    dst = other.packed_view(other.packed)
    if not bench.judge.carried(
        lambda: copy_blocks(src, dst, [2, 0], [1, 3], backend=bench.subject.name).synchronize(),
        (src, dst),  # type: ignore[arg-type]
    ):
        return
    bench.facility.synchronize()
    again = case_of(bench, False, SMALL, image=IMAGES[2], raw_blocks=[0, 1], packed_blocks=[1, 3])
    again.packed = other.packed
    judge_packed(bench.judge, again)


REFUSED: dict[str, Keywords] = {
    "float16": {"dtype": torch.float16},
    "bytes": {"dtype": torch.uint8},
    "float32": {"dtype": torch.float32},
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_rows_are_refused(bench: Bench, name: str) -> None:
    """Rows of another number type are refused by name, with every byte unchanged."""
    case = case_of(bench, True, SMALL)
    to = arranged(PAGED, SMALL, device=str(bench.subject.device), **REFUSED[name])
    before = Memory.snapshot(case.packed.tensors)
    from portakv_conformance.draw.arrangement import side_of
    from portakv_conformance.judge.judging import view_of

    rows = view_of(side_of(to))
    with pytest.raises(PortaKVError, match=name.replace("bytes", "uint8")):
        copy_blocks(rows, case.views()[1], [0], [1], backend=bench.subject.name)
    assert not list(before.changes(Memory.snapshot(case.packed.tensors)))


@full
@PACKS
@BITS
@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("values", [256, 448, 2048, 4096, 6144, 8192, 8256, 16384, 32768])
def test_sizes(workshop: Bench, packs: bool, bits: int, image: str, values: int) -> None:
    """Planes of every size, in every image, also with a slot that holds half of the values."""
    if claimed(workshop):
        shape = Shape(1, 1, (2 * values // SIZE,) * 2, SIZE, 4)
        bare = SlotShape(values, bits, 0).escapes
        for slot_bytes in (0, -(-(bare + values // 2) // 32) * 32):
            check(
                workshop,
                case_of(workshop, packs, shape, bits=bits, slot_bytes=slot_bytes, image=image),
            )
