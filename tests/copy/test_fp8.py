# SPDX-License-Identifier: Apache-2.0
"""Copies to and from `fp8` as a user makes them: slices, options, errors and the state of torch.
The conformance suite judges every byte of the format."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from support.ambient import STATES, State
from support.cache_cases import normal_layers

from portakv import (
    CopyPlan,
    Fp8,
    Index,
    KVView,
    LayoutError,
    SlotError,
    Unsupported,
    copy_blocks,
    copy_rows,
)
from portakv.copy import encodings
from portakv.migrate import Shard
from portakv.plan.packing import PackPlan

NHD = "layer | kv block token head dim"
IMAGE = "block layer kv head page"
LAYERS = 2
HEADS = 2
SIZE = 16
DIM = 8
SLOT = Fp8().plane(SIZE, DIM).slot_bytes
CPU = torch.device("cpu")


def rows_of(blocks: int, dtype: torch.dtype = torch.bfloat16, dim: int = DIM) -> list[torch.Tensor]:
    return normal_layers((2, blocks, SIZE, HEADS, dim), LAYERS, dtype)


def raw_view(layers: list[torch.Tensor], device: torch.device = CPU) -> KVView:
    return KVView([layer.to(device) for layer in layers], NHD)


def empty_view(layers: list[torch.Tensor], device: torch.device = CPU) -> KVView:
    return raw_view([torch.zeros_like(layer) for layer in layers], device)


def fp8_view(blocks: int, device: torch.device = CPU) -> KVView:
    slots = torch.zeros((blocks, LAYERS, 2, HEADS, SLOT), dtype=torch.uint8, device=device)
    return KVView(slots, IMAGE, block_size=SIZE, dim=DIM, encoding="fp8")


def near(view: KVView, layers: list[torch.Tensor], here: list[int], there: list[int]) -> bool:
    """Return True if blocks of a view are those of layers, up to the error of the encoding, and all
    other blocks are zero."""
    for own, other in zip(view.tensors, layers, strict=True):
        made = own.cpu().float()
        wanted = torch.zeros_like(made)
        wanted[:, here] = other[:, there].float()
        most = wanted.abs().amax(-1, keepdim=True) * 0.04
        if not bool(((made - wanted).abs() <= most).all()):
            return False
        if any(bool((made[:, block] == 0).all()) for block in here):
            return False
    return True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_blocks_are_encoded_and_decoded(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Also in slices of two blocks, of which the last is shorter."""
    monkeypatch.setattr(encodings, "FP8_SLICE", 2 * LAYERS * 2 * HEADS * SIZE * DIM)
    layers = rows_of(6, dtype)
    image = fp8_view(5)
    moved = copy_blocks(raw_view(layers), image, [5, 0, 3, 1, 2], [2, 0, 1, 4, 3])
    moved.synchronize()
    assert moved.carried[0] == "reference"
    assert "'fp8' by operations of torch on cpu" in moved.carried[1]
    assert moved.statistics.blocks == 5
    target = empty_view(layers)
    copy_blocks(image, target, [2, 1, 4], [1, 4, 0]).synchronize()
    assert near(target, layers, [1, 4, 0], [5, 3, 1])


def test_keys_and_values_of_two_types_and_widths() -> None:
    keys = [torch.randn(3, SIZE, 1, 24, device="cpu").bfloat16() for _ in range(LAYERS)]
    values = [torch.randn(3, SIZE, 1, 8, device="cpu").half() for _ in range(LAYERS)]
    slots = [
        torch.zeros(
            3, LAYERS, 1, Fp8().plane(SIZE, dim).slot_bytes, dtype=torch.uint8, device="cpu"
        )
        for dim in (24, 8)
    ]
    how: dict[str, Any] = {"block_size": SIZE, "dim": (24, 8), "encoding": Fp8()}
    image = KVView(slots, "kv | block layer head page", **how)
    cache = "layer kv | block token head dim"
    pairs = list(zip(keys, values, strict=True))
    copy_blocks(KVView(pairs, cache), image, [0, 2], [1, 0]).synchronize()
    empty = [(torch.zeros_like(k), torch.zeros_like(v)) for k, v in pairs]
    copy_blocks(image, KVView(empty, cache), [0, 1], [0, 1]).synchronize()
    for made, wanted in zip(empty, pairs, strict=True):
        for own, other in zip(made, wanted, strict=True):
            error = (own[:2].float() - other[[2, 0]].float()).abs()
            assert bool((error <= other[[2, 0]].float().abs().amax(-1, keepdim=True) * 0.04).all())


def test_slots_are_copied_as_they_are() -> None:
    layers = rows_of(4)
    image = fp8_view(4)
    copy_blocks(raw_view(layers), image, None, None).synchronize()
    other = fp8_view(6)
    copy_blocks(image, other, [3, -1, 0], [5, 1, 2]).synchronize()
    assert torch.equal(other.tensors[[5, 2]], image.tensors[[3, 0]])
    assert not other.tensors[[0, 1, 3, 4]].any()
    copy_blocks(image.slice(heads=1), other.slice(heads=1), [1], [1]).synchronize()
    assert torch.equal(other.tensors[1, :, :, 1], image.tensors[1, :, :, 1])
    assert not other.tensors[1, :, :, 0].any()


def test_layers_one_after_another() -> None:
    layers = rows_of(4)
    image = fp8_view(4)
    moved = copy_blocks(raw_view(layers), image, [0, 2, 3], [1, 0, 3], by_layer=True)
    assert len(moved.layers) == LAYERS
    moved.synchronize()
    whole = fp8_view(4)
    copy_blocks(raw_view(layers), whole, [0, 2, 3], [1, 0, 3]).synchronize()
    assert torch.equal(whole.tensors, image.tensors)


def test_chunks_are_blocks_one_after_another() -> None:
    layers = rows_of(3)
    image = fp8_view(4)
    chunk = KVView(torch.stack(layers, 1).flatten(2, 3), "kv layer token head dim")
    copy_blocks(chunk, image, None, [3, 1, 0]).synchronize()
    target = empty_view(layers)
    copy_blocks(image, target, [3, 1, 0], [0, 1, 2]).synchronize()
    assert near(target, layers, [0, 1, 2], [0, 1, 2])


def test_a_garbage_token_changes_no_other_token() -> None:
    """Blocks that are not full hold whatever was there before."""
    layers = rows_of(1)
    clean = fp8_view(1)
    copy_blocks(raw_view(layers), clean, None, None).synchronize()
    layers[1][0, 0, 9, 1] = torch.tensor([1e38, torch.nan, -torch.inf, *range(5)], device="cpu")
    image = fp8_view(1)
    copy_blocks(raw_view(layers), image, None, None).synchronize()
    slot = Fp8().plane(SIZE, DIM)
    changed = (clean.tensors != image.tensors).nonzero()
    assert changed[:, :4].unique(dim=0).tolist() == [[0, 1, 0, 1]]
    scale = slot.values + 2 * 9
    allowed = {*range(9 * DIM, 10 * DIM), scale, scale + 1}
    assert {*changed[:, 4].tolist()} <= allowed
    target = empty_view(layers)
    copy_blocks(image, target, None, None).synchronize()
    made = target.tensors[1][0, 0, 9, 1]
    assert made.isnan().tolist() == [False, True, True, *[False] * 5]
    assert made.view(torch.int16)[[1, 2]].tolist() == [0x7FC0, 0x7FC0]


def test_a_second_encoding_moves_no_value_further_than_one_step() -> None:
    layers = rows_of(4)
    image = fp8_view(4)
    copy_blocks(raw_view(layers), image, None, None).synchronize()
    once = empty_view(layers)
    copy_blocks(image, once, None, None).synchronize()
    again = fp8_view(4)
    copy_blocks(once, again, None, None).synchronize()
    twice = empty_view(layers)
    copy_blocks(again, twice, None, None).synchronize()
    for first, second in zip(once.tensors, twice.tensors, strict=True):
        most = first.float().abs() / 8 + 2.0**-9 * first.float().abs().amax(-1, keepdim=True) / 224
        assert bool(((first.float() - second.float()).abs() <= most).all())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a part of a block": ({"count": 2 * SIZE - 1}, "moves only whole"),
    "from the middle of a block": ({"skip": 3, "count": SIZE}, "moves only whole"),
    "at a rate": ({"max_gbps": 1.0}, "'fp8' with max_gbps"),
    "in slices": ({"cancellable": True}, "'fp8' with cancellable"),
    "detached": ({"detached": True}, "'fp8' with detached"),
    "another backend": ({"backend": "none-such"}, "none-such"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_such_copy_does_is_refused(name: str) -> None:
    how, why = REFUSED[name]
    image = fp8_view(4)
    with pytest.raises(Exception, match=why):
        copy_blocks(raw_view(rows_of(4)), image, [0, 1], [2, 3], **how)
    assert not image.tensors.any()


def test_other_rows_are_refused_by_name() -> None:
    image = fp8_view(4)
    size = (2, 4, SIZE, HEADS, DIM)
    for dtype, name in ((torch.float64, "float64"), (torch.uint8, "uint8"), (torch.int16, "int16")):
        rows = torch.zeros(size, dtype=dtype, device="cpu")
        with pytest.raises(Unsupported, match=f"encode rows of {name}"):
            copy_blocks(KVView([rows] * LAYERS, NHD), image, [0], [0])
        with pytest.raises(Unsupported, match=f"decode rows of {name}"):
            copy_blocks(image, KVView([rows.clone(), rows.clone()], NHD), [0], [0])
    with pytest.raises(Unsupported, match="encode rows of uint8"):
        copy_blocks(raw_view(rows_of(4)), image, [0], [0], reinterpret=True)
    with pytest.raises(LayoutError, match="8 values for each head"):
        copy_blocks(raw_view(rows_of(4, dim=16)), image, [0], [0])
    with pytest.raises(LayoutError, match="'layer' extent 2"):
        copy_blocks(raw_view(rows_of(4)[:1]), image, [0], [0])
    with pytest.raises(Unsupported, match="moves only whole"):
        copy_rows(raw_view(rows_of(4)), image, Index(list(range(16))), Index(list(range(16))))
    for src, dst in (([9], [0]), ([0], [4]), ([0, 1], [2, 2])):
        with pytest.raises(SlotError):
            copy_blocks(raw_view(rows_of(4)), image, src, dst)
    assert not image.tensors.any()


def test_pack_and_fp8_do_not_mix() -> None:
    """What was not taught the encoding names it, and takes no slot for rows or for packed slots."""
    image = fp8_view(2)
    slots = torch.zeros((2, LAYERS, 2, HEADS, 448), dtype=torch.uint8, device="cpu")
    packed = KVView(slots, IMAGE, block_size=SIZE, dim=16, encoding="pack")
    for src, dst in ((image, packed), (packed, image)):
        with pytest.raises(Unsupported, match="packed by 'fp8', 16 x 8 values in 160 B"):
            copy_blocks(src, dst, [0], [0])
    with pytest.raises(Unsupported, match="packed view"):
        CopyPlan(image.form, image.form, SIZE, SIZE)
    with pytest.raises(Unsupported, match="plan of the encoding 'fp8'"):
        PackPlan(raw_view(rows_of(2)).form, image.form, SIZE, SIZE)
    with pytest.raises(LayoutError, match="packed by 'fp8'"):
        image.plane(0, 0)
    with pytest.raises(Unsupported, match=r"packed view|'fp8'"):
        Shard(image)
    assert pickle.loads(pickle.dumps(image.form)) == image.form


@contextmanager
def _flushing(device: torch.device) -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormal numbers")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


AMBIENT: dict[str, State] = {
    "plain": lambda device: nullcontext(),
    "flushing": _flushing,
    **{
        name: STATES[name]
        for name in ("inference mode", "with torch.device meta", "default dtype bfloat16")
    },
}


@pytest.mark.parametrize("name", AMBIENT)
def test_the_state_of_torch_changes_nothing(name: str) -> None:
    layers = rows_of(3)
    layers[0][0, 2, 3] *= 2.0**-120
    layers[0][0, 2, 4] *= 2.0**-128
    wanted = fp8_view(3)
    copy_blocks(raw_view(layers), wanted, [2, 0], [0, 1]).synchronize()
    decoded = empty_view(layers)
    copy_blocks(wanted, decoded, [0, 1], [2, 0]).synchronize()
    image = fp8_view(3)
    target = empty_view(layers)
    with AMBIENT[name](CPU):
        copy_blocks(raw_view(layers), image, [2, 0], [0, 1]).synchronize()
        copy_blocks(image, target, [0, 1], [2, 0]).synchronize()
    assert torch.equal(image.tensors, wanted.tensors)
    for made, other in zip(target.tensors, decoded.tensors, strict=True):
        assert torch.equal(made.view(torch.int16), other.view(torch.int16))


# -- devices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pinned", [True, False])
def test_slices_cross_in_turns(
    accelerator: torch.device, monkeypatch: pytest.MonkeyPatch, pinned: bool
) -> None:
    """Both directions of the link, whichever side is encoded, on a stream of the caller's."""
    monkeypatch.setattr(encodings, "FP8_SLICE", 2 * LAYERS * 2 * HEADS * SIZE * DIM)
    layers = rows_of(7)
    wanted = fp8_view(7)
    copy_blocks(raw_view(layers), wanted, [6, 1, 0, 3, 2], [0, 1, 2, 3, 4]).synchronize()
    far = fp8_view(7)
    if pinned:
        slots = far.tensors.pin_memory()
        far = KVView(slots, IMAGE, block_size=SIZE, dim=DIM, encoding="fp8")
    stream = torch.Stream(device=accelerator)
    rows = raw_view(layers, accelerator)
    copy_blocks(rows, far, [6, 1, 0, 3, 2], [0, 1, 2, 3, 4], stream=stream).synchronize()
    assert torch.equal(far.tensors, wanted.tensors)
    target = empty_view(layers, accelerator)
    copy_blocks(far, target, [0, 4, 3], [2, 1, 5], stream=stream).synchronize()
    assert near(target, layers, [2, 1, 5], [6, 2, 3])
    # Raw on the host, encoded on the device.
    inside = fp8_view(7, accelerator)
    copy_blocks(raw_view(layers), inside, [6, 1, 0, 3, 2], [0, 1, 2, 3, 4]).synchronize()
    assert torch.equal(inside.tensors.cpu(), wanted.tensors)
