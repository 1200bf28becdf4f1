# SPDX-License-Identifier: Apache-2.0
"""Copies that pack or unpack as a user makes them: options, errors, staging and fallbacks. The
conformance suite judges every byte of the format."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support import simdev_cases
from support.ambient import STATES, State
from support.small_backends import small_backend

from portakv import (
    CopyOptions,
    Index,
    InvalidTerms,
    KVView,
    LayoutError,
    Pack,
    PackOverflow,
    SlotError,
    Unsupported,
    copy_blocks,
    copy_rows,
    register_backend,
)
from portakv.copy import encodings
from portakv.registry import registry

NHD = "layer | kv block token head dim"
IMAGE = "block layer kv head page"
LAYERS = 2
HEADS = 2
SIZE = 16
DIM = 32
SLOT = Pack().plane(SIZE * DIM).slot_bytes
CPU = torch.device("cpu")


def numbers(blocks: int, seed: int = 0) -> list[torch.Tensor]:
    """Return layers of bf16 rows with few exponents."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    size = (2, blocks, SIZE, HEADS, DIM)
    made = [
        torch.rand(size, generator=generator, dtype=torch.float32, device="cpu") + 1
        for _ in range(LAYERS)
    ]
    return [layer.to(torch.bfloat16) for layer in made]


def noise(tensor: torch.Tensor) -> None:
    """Fill a tensor of bf16 with every pattern in turn, which no slot holds."""
    count = torch.arange(tensor.numel(), dtype=torch.int64, device="cpu") * 12345
    tensor.copy_(count.to(torch.int16).view(torch.bfloat16).view(tensor.shape))


def raw_view(layers: list[torch.Tensor], device: torch.device = CPU) -> KVView:
    return KVView([layer.to(device) for layer in layers], NHD)


def packed_view(blocks: int, device: torch.device = CPU, **more: Any) -> KVView:
    slots = torch.zeros((blocks, LAYERS, 2, HEADS, SLOT), dtype=torch.uint8, device=device)
    return KVView(slots, IMAGE, block_size=SIZE, dim=DIM, encoding="pack", **more)


def same(view: KVView, layers: list[torch.Tensor], here: list[int], there: list[int]) -> bool:
    """Return True if blocks of a view are blocks of layers, bit by bit."""
    return all(
        torch.equal(own.cpu()[:, here].view(torch.int16), other[:, there].view(torch.int16))
        for own, other in zip(view.tensors, layers, strict=True)
    )


def test_blocks_are_packed_and_unpacked() -> None:
    layers = numbers(6)
    image = packed_view(4)
    moved = copy_blocks(raw_view(layers), image, [5, 0, 3], [2, 0, 1])
    moved.synchronize()
    assert moved.carried[0] == "reference"
    assert moved.statistics.blocks == 3
    target = raw_view([torch.zeros_like(layer) for layer in layers])
    copy_blocks(image, target, [2, 1], [1, 4]).synchronize()
    assert same(target, layers, [1, 4], [5, 3])
    assert same(target, [torch.zeros_like(x) for x in layers], [0, 2, 3, 5], [0, 2, 3, 5])


def test_equal_values_have_equal_bytes() -> None:
    layers = numbers(3)
    one = packed_view(3)
    other = packed_view(3)
    other.tensors.fill_(0xA5)
    copy_blocks(raw_view(layers), one, None, None).synchronize()
    copy_blocks(raw_view(layers), other, [2, 0, 1], [2, 0, 1]).synchronize()
    assert torch.equal(one.tensors, other.tensors)


def test_blocks_that_do_not_fit_are_named() -> None:
    layers = numbers(5)
    noise(layers[1][0, 3, :, 1])
    noise(layers[0][1, 0, :, 0])
    image = packed_view(5)
    moved = copy_blocks(raw_view(layers), image, [3, 1, 0, 2], [4, 0, 1, 2])
    with pytest.raises(
        PackOverflow, match="got 2 that do not, blocks 3, 0 of the source"
    ) as caught:
        moved.synchronize()
    assert caught.value.src_blocks == (3, 0)
    assert caught.value.dst_blocks == (4, 1)

    # All others were packed; rows of a flagged slot stay as they were.
    before = numbers(5, seed=1)
    target = raw_view([layer.clone() for layer in before])
    with pytest.raises(PackOverflow, match="did not fit into slots"):
        copy_blocks(image, target, [0, 4, 2], [0, 1, 2]).synchronize()
    assert same(target, layers, [0, 2], [1, 2])
    kept = target.tensors[1][0, 1, :, 1]
    assert torch.equal(kept.view(torch.int16), before[1][0, 1, :, 1].view(torch.int16))


def test_chunks_are_blocks_one_after_another() -> None:
    layers = numbers(4)
    rows = torch.stack(layers, 1).flatten(2, 3)
    image = packed_view(6)
    chunk = KVView(rows, "kv layer token head dim")
    copy_blocks(chunk, image, None, [5, 1, 0, 2]).synchronize()
    back = KVView(torch.zeros_like(rows), "kv layer token head dim")
    copy_blocks(image, back, [1, 0], None, skip=(0, SIZE)).synchronize()
    first = SIZE
    past = 3 * SIZE
    assert torch.equal(
        back.tensors[:, :, first:past].view(torch.int16),
        rows[:, :, first:past].view(torch.int16),
    )
    assert not back.tensors[:, :, :first].any()


def test_packed_memory_known_by_its_address() -> None:
    layers = numbers(3)
    image = packed_view(3)
    slots = image.tensors
    raw = KVView.at(
        slots.data_ptr(),
        IMAGE,
        shape=(-1, *slots.shape[1:]),
        dtype=torch.uint8,
        device="cpu",
        block_size=SIZE,
        dim=DIM,
        encoding="pack",
    )
    copy_blocks(raw_view(layers), raw, [0, 2], [2, 1]).synchronize()
    target = raw_view([torch.zeros_like(layer) for layer in layers])
    copy_blocks(image, target, [2, 1], [0, 2]).synchronize()
    assert same(target, layers, [0, 2], [0, 2])


def test_packed_blocks_are_copied_as_they_are() -> None:
    layers = numbers(4)
    image = packed_view(4)
    copy_blocks(raw_view(layers), image, None, None).synchronize()
    other = packed_view(6)
    moved = copy_blocks(image, other, [3, -1, 0], [5, 1, 2])
    moved.synchronize()
    assert moved.statistics.blocks == 2
    assert torch.equal(other.tensors[[5, 2]], image.tensors[[3, 0]])
    assert not other.tensors[[0, 1, 3, 4]].any()
    # A slice by head of the same blocks.
    copy_blocks(image.slice(heads=1), other.slice(heads=1), [1], [1]).synchronize()
    assert torch.equal(other.tensors[1, :, :, 1], image.tensors[1, :, :, 1])
    assert not other.tensors[1, :, :, 0].any()


def test_layers_one_after_another() -> None:
    layers = numbers(4)
    noise(layers[1][1, 2, :, 0])
    image = packed_view(4)
    moved = copy_blocks(raw_view(layers), image, [0, 2, 3], [1, 0, 3], by_layer=True)
    assert len(moved.layers) == LAYERS
    moved.layers[0].synchronize()
    with pytest.raises(PackOverflow) as caught:
        moved.layers[1].synchronize()
    assert caught.value.src_blocks == (2,)
    target = raw_view([torch.zeros_like(layer) for layer in layers])
    copy_blocks(image, target, [1, 3], [0, 3], by_layer=True).synchronize()
    assert same(target, layers, [0, 3], [0, 3])


def test_the_blocks_of_all_layers_are_named() -> None:
    """A layer names its own blocks; the whole copy names those of every layer, each once."""
    layers = numbers(5)
    noise(layers[0][1, 4, :, 0])
    noise(layers[1][0, 4, :, 0])
    noise(layers[1][1, 2, :, 0])
    moved = copy_blocks(raw_view(layers), packed_view(4), [0, 2, 3, 4], [1, 0, 3, 2], by_layer=True)
    with pytest.raises(PackOverflow, match="got 2 that do not, blocks 2, 4 ") as caught:
        moved.synchronize()
    assert (caught.value.src_blocks, caught.value.dst_blocks) == ((2, 4), (0, 2))
    for layer, own in zip(moved.layers, ((4,), (2, 4)), strict=True):
        with pytest.raises(PackOverflow) as caught:
            layer.synchronize()
        assert caught.value.src_blocks == own


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a part of a block": ({"count": 2 * SIZE - 1}, "moves only whole"),
    "from the middle of a block": ({"skip": 3, "count": SIZE}, "moves only whole"),
    "at a rate": ({"max_gbps": 1.0}, "with max_gbps"),
    "in slices": ({"cancellable": True}, "with cancellable"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_packed_copy_does_is_refused(name: str) -> None:
    how, why = REFUSED[name]
    image = packed_view(4)
    with pytest.raises(Unsupported, match=why):
        copy_blocks(raw_view(numbers(4)), image, [0, 1], [2, 3], **how)
    assert not image.tensors.any()


def test_other_rows_are_refused_by_name() -> None:
    image = packed_view(4)
    size = (2, 4, SIZE, HEADS, DIM)
    for dtype, why in ((torch.float16, "float16"), (torch.uint8, "uint8")):
        width = 2 * DIM if dtype is torch.uint8 else DIM
        rows = torch.zeros((*size[:-1], width), dtype=dtype, device="cpu")
        with pytest.raises(Unsupported, match=f"would pack rows of {why}"):
            copy_blocks(KVView([rows] * LAYERS, NHD), image, [0], [0])
    small = KVView(
        [torch.zeros((2, 8, 8, HEADS, DIM), dtype=torch.bfloat16, device="cpu")] * LAYERS, NHD
    )
    with pytest.raises(Unsupported, match="packed blocks of 16 tokens and blocks of 8"):
        copy_blocks(small, image, [0, 1], [0])
    one = raw_view(numbers(4)[:1])
    with pytest.raises(LayoutError, match="'layer' extent 2"):
        copy_blocks(one, image, [0], [0])
    with pytest.raises(Unsupported, match="moves only whole"):
        copy_rows(raw_view(numbers(4)), image, Index(list(range(16))), Index(list(range(16))))
    wide = Pack(slot_bytes=SLOT + 32)
    slots = torch.zeros((4, LAYERS, 2, HEADS, SLOT + 32), dtype=torch.uint8, device="cpu")
    other = KVView(slots, IMAGE, block_size=SIZE, dim=DIM, encoding=wide)
    with pytest.raises(Unsupported, match="unpack them to a raw view"):
        copy_blocks(image, other, [0], [0])
    assert not image.tensors.any()


def test_bad_blocks_are_refused_before_anything_is_written() -> None:
    image = packed_view(4)
    for src, dst in (([9], [0]), ([0], [4]), ([0, 1], [2, 2])):
        with pytest.raises(SlotError):
            copy_blocks(raw_view(numbers(4)), image, src, dst)
    assert not image.tensors.any()
    whole = torch.zeros(1 << 16, dtype=torch.uint8, device="cpu")
    slots = whole[: 4 * LAYERS * 2 * HEADS * SLOT].view(4, LAYERS, 2, HEADS, SLOT)
    rows = whole[: 2 * SIZE * HEADS * DIM * LAYERS * 2].view(torch.bfloat16)
    inside = KVView(rows.view(LAYERS, 2, 1, SIZE, HEADS, DIM), "layer kv block token head dim")
    shared = KVView(slots, IMAGE, block_size=SIZE, dim=DIM, encoding="pack")
    with pytest.raises(SlotError, match="separate memory"):
        copy_blocks(inside, shared, [0], [0])


def test_wrong_encodings_are_named() -> None:
    with pytest.raises(InvalidTerms, match="encoding"):
        KVView(torch.zeros(8, device="cpu"), "token dim", encoding="gzip")


def test_another_backend_packs_and_the_reason_is_on_record(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "REGISTRY", registry.Registry())
    register_backend("rows-only", small_backend("rows-only", encodings=frozenset()))
    layers = numbers(2)
    moved = copy_blocks(raw_view(layers), packed_view(2), [0, 1], [1, 0])
    moved.synchronize()
    name, why = moved.carried
    assert name == "reference"
    assert "rows-only: it does not carry out the encoding 'pack'" in why
    # A backend that is forced does not fall back.
    with pytest.raises(Unsupported, match="does not carry out the encoding 'pack'"):
        copy_blocks(raw_view(layers), packed_view(2), [0], [0], backend="rows-only")


AMBIENT: dict[str, State] = {
    "plain": lambda device: nullcontext(),
    **{
        name: STATES[name]
        for name in (
            "inference mode",
            "with torch.device meta",
            "default dtype bfloat16",
            "deterministic algorithms",
        )
    },
}


@pytest.mark.parametrize("name", AMBIENT)
def test_the_state_of_torch_changes_nothing(name: str) -> None:
    layers = numbers(3)
    image = packed_view(3)
    target = raw_view([torch.zeros_like(layer) for layer in layers])
    with AMBIENT[name](CPU):
        copy_blocks(raw_view(layers), image, [2, 0], [0, 1]).synchronize()
        copy_blocks(image, target, [0, 1], [2, 0]).synchronize()
    assert same(target, layers, [2, 0], [2, 0])


# -- devices ---------------------------------------------------------------------------------------


BLOCK = SIZE * LAYERS * 2 * HEADS * DIM * 2  # raw bytes
#: Orders of a packed host pool; blocks are one run, or one for each layer or plane.
ORDERS = {
    IMAGE: (0, 1, 2, 3, 4),
    "layer block kv head page": (1, 0, 2, 3, 4),
    "layer kv block head page": (1, 2, 0, 3, 4),
}


def host_pool(blocks: int, order: str = IMAGE, pinned: bool = True) -> KVView:
    """Return a packed pool on the host whose axes lie in an order."""
    slots = packed_view(blocks).tensors.permute(ORDERS[order]).contiguous()
    slots = slots.pin_memory() if pinned else slots
    return KVView(slots, order, block_size=SIZE, dim=DIM, encoding="pack")


def image_of(view: KVView) -> torch.Tensor:
    """Return the slots of a host pool in the order of `IMAGE`."""
    order = ORDERS[view.layout.text]
    slots: torch.Tensor = view.tensors.permute([order.index(axis) for axis in range(len(order))])
    return slots


@pytest.mark.parametrize(
    ("order", "detached"),
    [
        (IMAGE, False),
        (IMAGE, True),
        pytest.param("layer block kv head page", False, marks=pytest.mark.full),
        ("layer kv block head page", True),
        pytest.param("pageable", False, marks=pytest.mark.full),
        ("pageable", True),
        ("by name", False),
    ],
)
def test_slices_cross_in_turns(
    accelerator: torch.device, monkeypatch: pytest.MonkeyPatch, order: str, detached: bool
) -> None:
    """With staging for two blocks a copy has many slices, in both directions of the link, and
    whichever side is packed."""
    monkeypatch.setattr(encodings, "PACK_SLICE", 2 * BLOCK)
    layers = numbers(9)
    here = [8, 1, 6, 0, 3, 7, 2]
    there = list(range(7))
    backend = "batched_memcpy" if order == "by name" else None
    options = CopyOptions(detached=detached, backend=backend)
    pinned = order != "pageable"
    near = raw_view(layers, accelerator)
    far = host_pool(7, order if order in ORDERS else IMAGE, pinned)
    copy_blocks(near, far, here, there, options=options).synchronize()
    wanted = packed_view(7)
    copy_blocks(raw_view(layers), wanted, here, there).synchronize()
    assert torch.equal(image_of(far), wanted.tensors)

    target = raw_view([torch.zeros_like(layer) for layer in layers], accelerator)
    copy_blocks(far, target, there, here, options=options).synchronize()
    assert same(target, layers, here, here)

    inside = packed_view(7, accelerator)
    host = [x.pin_memory() if pinned else x for x in layers]
    copy_blocks(raw_view(host), inside, here, there, options=options).synchronize()
    assert torch.equal(inside.tensors.cpu(), wanted.tensors)
    zeros = [torch.zeros_like(x) for x in layers]
    back = raw_view([x.pin_memory() for x in zeros] if pinned else zeros)
    copy_blocks(inside, back, there, here, options=options).synchronize()
    assert same(back, layers, here, here)


@pytest.mark.parametrize("by_layer", [False, True])
def test_blocks_that_do_not_fit_are_named_across_the_link(
    accelerator: torch.device, monkeypatch: pytest.MonkeyPatch, by_layer: bool
) -> None:
    """All of them, whichever slice or layer they are in."""
    monkeypatch.setattr(encodings, "PACK_SLICE", BLOCK)
    layers = numbers(6)
    noise(layers[1][1, 4, :, 0])
    noise(layers[0][0, 0, :, 1])
    far = host_pool(6)
    near = raw_view(layers, accelerator)
    moved = copy_blocks(near, far, [0, 2, 4, 5], [3, 2, 1, 0], by_layer=by_layer)
    with pytest.raises(PackOverflow) as caught:
        moved.synchronize()
    assert caught.value.src_blocks == (0, 4)
    assert caught.value.dst_blocks == (3, 1)
    target = raw_view([torch.zeros_like(layer) for layer in layers], accelerator)
    moved = copy_blocks(far, target, [3, 2, 1, 0], [0, 2, 4, 5], by_layer=by_layer)
    with pytest.raises(PackOverflow) as caught:
        moved.synchronize()
    assert (caught.value.src_blocks, caught.value.dst_blocks) == ((3, 1), (0, 4))
    assert same(target, layers, [2, 5], [2, 5])


@pytest.mark.simdev
@pytest.mark.parametrize("out", [True, False])
@pytest.mark.parametrize("inside", [False, True])
def test_no_stream_waits_for_a_detached_copy(
    monkeypatch: pytest.MonkeyPatch, out: bool, inside: bool
) -> None:
    """A stream waits for it if the handle makes it wait; without `detached` the current one does.

    Staging serves several copies in a row.
    """
    device = simdev_cases.DEVICE
    monkeypatch.setattr(encodings, "PACK_SLICE", 2 * BLOCK)
    layers = numbers(7)
    ids = list(range(7))
    wanted = packed_view(7)
    copy_blocks(raw_view(layers), wanted, ids, ids).synchronize()
    near = raw_view(layers, device)
    far = packed_view(7, device) if inside else host_pool(7)
    target = raw_view([torch.zeros_like(layer) for layer in layers], device)
    if not out:
        far.tensors.copy_(wanted.tensors)
    src, dst = (near, far) if out else (far, target)
    torch.accelerator.synchronize(device)
    here = torch.accelerator.current_stream(device.index)
    for detached in (True, False):
        moved = [copy_blocks(src, dst, ids, ids, detached=detached) for _ in range(3)][-1]
        here.synchronize()
        assert moved.done() is not detached
        reader = torch.Stream(device)
        moved.wait(reader)
        reader.synchronize()
        assert moved.done()
    if out:
        assert torch.equal(far.tensors.cpu(), wanted.tensors)
    else:
        assert same(target, layers, ids, ids)


def test_keys_and_values_of_unequal_width(accelerator: torch.device) -> None:
    """Staging memory then has a tensor for each kv, and slots of the usual size for each width."""
    blocks = 3
    made = [numbers(blocks)[0][0, ..., :width] for width in (32, 16)]
    layout = "kv | block token head dim"
    near = KVView([x.contiguous().to(accelerator) for x in made], layout, dim=(32, 16))
    sizes = [Pack().plane(SIZE * dim).slot_bytes for dim in (32, 16)]
    slots = torch.zeros((blocks, HEADS, sum(sizes)), dtype=torch.uint8, device="cpu")
    far = KVView(
        slots, "block head (kv page)", kv=2, block_size=SIZE, dim=(32, 16), encoding="pack"
    )
    copy_blocks(near, far, [2, 0], [0, 1]).synchronize()
    target = KVView([torch.zeros_like(x) for x in near.tensors], layout, dim=(32, 16))
    copy_blocks(far, target, [0, 1], [2, 0]).synchronize()
    for own, rows in zip(target.tensors, made, strict=True):
        assert torch.equal(own.cpu()[[2, 0]].view(torch.int16), rows[[2, 0]].view(torch.int16))


def test_order_on_a_stream(accelerator: torch.device) -> None:
    """A copy on another stream follows the current one, and its reader waits for it."""
    layers = numbers(4)
    near = raw_view([torch.zeros_like(layer) for layer in layers], accelerator)
    for own, layer in zip(near.tensors, layers, strict=True):
        own.copy_(layer)
    far = packed_view(4)
    other = torch.Stream(accelerator)
    moved = copy_blocks(near, far, [0, 1, 2, 3], [3, 2, 1, 0], stream=other)
    moved.wait()
    target = raw_view([torch.zeros_like(layer) for layer in layers], accelerator)
    moved.synchronize()
    copy_blocks(far, target, [3, 2, 1, 0], [0, 1, 2, 3], stream=other).synchronize()
    assert same(target, layers, [0, 1, 2, 3], [0, 1, 2, 3])
