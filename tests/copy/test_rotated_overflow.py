# SPDX-License-Identifier: Apache-2.0
"""Rotated copies to and from packed blocks of which some do not fit: names, and rows that stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import simdev_cases

from portakv import (
    CopyOptions,
    KVView,
    LateErrors,
    Pack,
    PackOverflow,
    Rope,
    SlotError,
    copy_blocks,
    rotate_blocks,
)
from portakv.copy import rotation

NHD = "layer | kv block token head dim"
IMAGE = "block layer kv head page"
LAYERS = 2
HEADS = 2
SIZE = 16
DIM = 32
BLOCKS = 7
SLOT = Pack().plane(SIZE * DIM).slot_bytes
#: A slice of keys of one block.
ONE = LAYERS * HEADS * SIZE * DIM * 2
CPU = torch.device("cpu")
ROPE = Rope(shift=5, base=10000.0)
#: The blocks that are copied, and where they go.
ORDER = [5, 0, 3, 1, 2]
INTO = [1, 4, 0, 6, 2]
#: The copied blocks that do not fit, in their order, and where they go.
UNFIT = (0, 1, 2)
UNFIT_INTO = (4, 6, 2)
FIT = [5, 3]
FIT_INTO = [1, 0]

SLICES = pytest.mark.parametrize("blocks", [1, 2, 100], ids=["1", "2", "all"])
#: The devices of the source and of the destination.
PLACES = pytest.mark.parametrize(
    ("near", "far"),
    [
        (CPU, CPU),
        pytest.param(simdev_cases.DEVICE, simdev_cases.DEVICE, marks=pytest.mark.simdev),
        pytest.param(CPU, simdev_cases.DEVICE, marks=pytest.mark.simdev),
        pytest.param(simdev_cases.DEVICE, CPU, marks=pytest.mark.simdev),
    ],
    ids=["cpu", "device", "to the device", "from the device"],
)


def rows(fill: float | None = None) -> list[torch.Tensor]:
    """Return layers of values from 1 to 2, or of one value."""
    size = (2, BLOCKS, SIZE, HEADS, DIM)
    if fill is not None:
        return [torch.full(size, fill, dtype=torch.bfloat16, device="cpu") for _ in range(LAYERS)]
    generator = torch.Generator(device="cpu").manual_seed(0)
    return [
        (torch.rand(size, generator=generator, device="cpu") + 1).bfloat16() for _ in range(LAYERS)
    ]


def spoil(layers: list[torch.Tensor]) -> None:
    """Fill planes of values of some blocks, in several layers, with every exponent in turn."""
    for layer, block in ((0, 0), (1, 1), (0, 2), (1, 2), (1, 6)):
        plane = layers[layer][1, block, :, 1]
        count = torch.arange(plane.numel(), dtype=torch.int64, device="cpu") * 12345
        plane.copy_(count.to(torch.int16).view(torch.bfloat16).view(plane.shape))


def raw_view(layers: list[torch.Tensor], device: torch.device = CPU) -> KVView:
    return KVView([layer.to(device) for layer in layers], NHD)


def packed_view(device: torch.device = CPU) -> KVView:
    slots = torch.full((BLOCKS, LAYERS, 2, HEADS, SLOT), 7, dtype=torch.uint8, device=device)
    return KVView(slots, IMAGE, block_size=SIZE, dim=DIM, encoding="pack")


def rotated(layers: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the rotated blocks, each at its number."""
    made = [torch.zeros_like(layer) for layer in layers]
    every = list(range(BLOCKS))
    rotate_blocks(raw_view(layers), KVView(made, NHD), every, every, ROPE).synchronize()
    return made


def image_of(layers: list[torch.Tensor], device: torch.device = CPU) -> KVView:
    """Return all blocks packed, except for those that do not fit."""
    image = packed_view(device)
    with pytest.raises(PackOverflow):
        copy_blocks(raw_view(layers, device), image, None, None).synchronize()
    return image


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().view(torch.int16)


@PLACES
@SLICES
def test_blocks_that_do_not_fit_are_named_by_the_callers_numbers(
    monkeypatch: pytest.MonkeyPatch, near: torch.device, far: torch.device, blocks: int
) -> None:
    """Of all slices and layers, each once, and all other blocks are packed."""
    monkeypatch.setattr(rotation, "SLICE", blocks * ONE)
    layers = rows()
    spoil(layers)
    image = packed_view(far)
    moved = rotate_blocks(raw_view(layers, near), image, ORDER, INTO, ROPE)
    with pytest.raises(PackOverflow, match="got 3 that do not, blocks 0, 1, 2 of") as caught:
        moved.synchronize()
    assert caught.value.src_blocks == UNFIT
    assert caught.value.dst_blocks == UNFIT_INTO
    wanted = packed_view()
    copy_blocks(raw_view(rotated(layers)), wanted, FIT, FIT_INTO).synchronize()
    assert torch.equal(image.tensors.cpu()[[*FIT_INTO, 3, 5]], wanted.tensors[[*FIT_INTO, 3, 5]])


@PLACES
@SLICES
def test_rows_of_flagged_blocks_stay(
    monkeypatch: pytest.MonkeyPatch, near: torch.device, far: torch.device, blocks: int
) -> None:
    """Dense memory holds other rows, or none yet, which no destination may get."""
    monkeypatch.setattr(rotation, "SLICE", blocks * ONE)
    layers = rows()
    spoil(layers)
    image = image_of(layers, near)
    target = raw_view(rows(fill=9.0), far)
    moved = rotate_blocks(image, target, ORDER, INTO, ROPE)
    with pytest.raises(
        PackOverflow, match=r"got 3 that did not fit .* blocks 0, 1, 2 of"
    ) as caught:
        moved.synchronize()
    assert caught.value.src_blocks == UNFIT
    assert caught.value.dst_blocks == UNFIT_INTO
    for own, wanted, before in zip(target.tensors, rotated(layers), rows(fill=9.0), strict=True):
        assert torch.equal(bits(own)[:, FIT_INTO], bits(wanted)[:, FIT])
        stays = [*UNFIT_INTO, 3, 5]
        assert torch.equal(bits(own)[:, stays], bits(before)[:, stays])


@SLICES
def test_nothing_is_written_if_no_block_fits(monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
    monkeypatch.setattr(rotation, "SLICE", blocks * ONE)
    layers = rows()
    spoil(layers)
    target = raw_view(rows(fill=9.0))
    moved = rotate_blocks(image_of(layers), target, [2, 0, 6], [0, 1, 2], ROPE)
    with pytest.raises(PackOverflow) as caught:
        moved.synchronize()
    assert (caught.value.src_blocks, caught.value.dst_blocks) == ((2, 0, 6), (0, 1, 2))
    assert all(bool((layer == 9.0).all()) for layer in target.tensors)


@PLACES
@pytest.mark.parametrize("packs", [True, False])
def test_other_rows_have_their_own_numbers(
    monkeypatch: pytest.MonkeyPatch, near: torch.device, far: torch.device, packs: bool
) -> None:
    """Ids on a device, padding, ids past the end, and a view without blocks on the other side."""
    monkeypatch.setattr(rotation, "SLICE", ONE)
    layers = rows()
    spoil(layers)
    flat = "layer | kv token head dim"
    place = near if packs else far
    past = BLOCKS if place.type != "cpu" else -1  # the host's ids are checked before the copy
    ids = torch.tensor([5, -1, 0, 1, past, 3], device=place)
    wanted: tuple[Any, Any]
    wanted_of_whole: tuple[Any, Any]
    if packs:
        src = KVView([layer.flatten(1, 2).to(near) for layer in layers], flat)
        moved = rotate_blocks(raw_view(layers, near), packed_view(far), ids, range(6), ROPE)
        wanted = ((0, 1), (2, 3))
        whole = rotate_blocks(src, packed_view(far), None, [6, 5, 4], ROPE, count=3 * SIZE)
        wanted_of_whole = ((0, 1, 2), (6, 5, 4))
    else:
        dst = KVView([layer.flatten(1, 2).to(far) for layer in rows(fill=9.0)], flat)
        image = image_of(layers, near)
        moved = rotate_blocks(image, raw_view(rows(9.0), far), range(6), ids, ROPE)
        wanted = ((0, 2), (5, 0))
        whole = rotate_blocks(image, dst, [3, 2, 1], None, ROPE, count=3 * SIZE)
        wanted_of_whole = ((2, 1), (1, 2))
    for one, named in ((moved, wanted), (whole, wanted_of_whole)):
        with pytest.raises(PackOverflow) as caught:
            one.synchronize()
        assert (caught.value.src_blocks, caught.value.dst_blocks) == named
    # The handle also has the error of an id past the end.
    errors = [type(end.error) for end in moved.completions]
    assert (SlotError in errors) is (past == BLOCKS)


@pytest.mark.simdev
@pytest.mark.parametrize("packs", [True, False])
def test_errors_of_handles_that_nobody_keeps(monkeypatch: pytest.MonkeyPatch, packs: bool) -> None:
    """One error with the caller's numbers, and no other one with numbers of dense memory."""
    monkeypatch.setattr(rotation, "SLICE", ONE)
    device = simdev_cases.DEVICE
    layers = rows()
    spoil(layers)
    src: Any = raw_view(layers, device)
    dst: Any = packed_view(device)
    if not packs:
        src = image_of(layers, device)
        dst = raw_view(rows(fill=9.0), device)
    late = LateErrors()
    moved = rotate_blocks(src, dst, ORDER, INTO, ROPE, options=CopyOptions(late=late))
    simdev_cases.current().synchronize()
    assert all(end.ended() for end in moved.completions)
    with pytest.raises(PackOverflow) as caught:
        late.check()
    assert (caught.value.src_blocks, caught.value.dst_blocks) == (UNFIT, UNFIT_INTO)
    late.check()
