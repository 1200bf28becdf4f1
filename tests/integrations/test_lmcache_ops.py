# SPDX-License-Identifier: Apache-2.0
"""LMCache's ops over PortaKV: every format, by addresses and by tensors, against numpy. No engine
is imported; `test_lmcache.py` runs the same ops inside the real package."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from support.device_cases import delay
from support.guarded_memory import check_sentence
from support.lmcache_cases import (
    GEOMETRIES,
    Geometry,
    arrays,
    assert_equal,
    bits,
    physical,
    pointers,
    tensors,
)
from support.read_back import ReadBack
from support.simdev_cases import DEVICE

from portakv import (
    InvalidTerms,
    LayoutError,
    SlotError,
    Unsupported,
    copy_runs,
)
from portakv.integrations.lmcache import ops
from portakv.integrations.lmcache.formats import LAYOUTS
from portakv.integrations.lmcache.ops import D2H, H2D
from portakv.interconnect import pageable
from portakv.interconnect.link import CudaLink, link_of
from portakv.interconnect.slices import Sizes
from portakv_conformance import simdev

CPU = torch.device("cpu")
BY_TENSORS_ALONE = (16, 17)
UNILATERAL = (4, 9)


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def built(geometry: Geometry, device: torch.device, seed: int) -> tuple[Any, Any]:
    """Logical rows and caches that hold them."""
    logical = geometry.logical(seed)
    return logical, tensors(physical(geometry, logical), device)


def caches_argument(caches: Any, by: str, device: torch.device) -> Any:
    """Caches as a caller hands them over."""
    if by == "tensors":
        return caches[0] if len(caches) == 1 else caches
    return pointers(caches, device, torch.uint64 if by == "uint64" else torch.int64)


def test_every_format_has_a_geometry() -> None:
    assert GEOMETRIES.keys() == LAYOUTS.keys()


# --- By slots -------------------------------------------------------------------------------------

SLOTS = [5, 20, -1, 3, 27, 0, 11]


def slot_arguments(g: Geometry) -> dict[str, int]:
    head = g.dim // 2 if g.number in (10, 12) else g.dim
    return {"block_size": g.block_size, "head_size": head}


def slot_caches(geometry: Geometry) -> Geometry:
    """The slot op reads format 0 as layers of format 1."""
    return geometry._replace(number=1) if geometry.number == 0 else geometry


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("direction", [D2H, H2D])
@pytest.mark.parametrize("number", [x for x in GEOMETRIES if x not in BY_TENSORS_ALONE])
def test_slots_by_addresses(number: int, direction: int, where: str, device: torch.device) -> None:
    g = GEOMETRIES[number]
    logical, caches = built(slot_caches(g), device, 1)
    target = device if where == "device" else CPU
    objects = g.logical(2).reshape(g.kv, g.layers, g.slots, g.row)[:, :, : len(SLOTS)]
    chunk = bits(objects, target)
    if where == "host" and device.type != "cpu":
        chunk = chunk.pin_memory()
    slots = torch.tensor(SLOTS).to(device)
    table = pointers(caches, device)
    ops.multi_layer_kv_transfer(
        chunk, table, slots, device, g.slots, direction, number, **slot_arguments(g)
    )
    synchronize(device)
    rows = g.rows(logical).copy()
    taken = np.array(SLOTS) >= 0
    at = np.array(SLOTS)[taken]
    if direction == D2H:
        expected = objects.copy()
        expected[:, :, taken] = rows[:, :, at]
        np.testing.assert_array_equal(arrays(chunk), expected)
        assert_equal(caches, physical(slot_caches(g), logical))
    else:
        rows[:, :, at] = objects[:, :, taken]
        assert_equal(caches, physical(slot_caches(g), rows.reshape(logical.shape)))


@pytest.mark.parametrize("number", [1, 2, 3, 12, 16, 17])
def test_slots_by_tensors(number: int, device: torch.device) -> None:
    g = GEOMETRIES[number]
    logical, caches = built(g, device, 1)
    chunk = torch.zeros(g.kv, g.layers, 3, g.row, dtype=torch.bfloat16, device=device)
    slots = torch.tensor([9, 2, 14], device=device, dtype=torch.int32)
    ops.multi_layer_kv_transfer(
        chunk, caches, slots, device, g.slots, D2H, number, **slot_arguments(g)
    )
    synchronize(device)
    np.testing.assert_array_equal(arrays(chunk), g.rows(logical)[:, :, [9, 2, 14]])


def test_a_prefix_is_neither_read_nor_written(device: torch.device) -> None:
    g = GEOMETRIES[1]
    logical, caches = built(g, device, 1)
    chunk = torch.zeros(g.kv, g.layers, len(SLOTS), g.row, dtype=torch.bfloat16, device=device)
    ops.multi_layer_kv_transfer(
        chunk,
        pointers(caches, device),
        torch.tensor(SLOTS).to(device),
        device,
        g.slots,
        D2H,
        1,
        skip_prefix_n_tokens=3,
    )
    synchronize(device)
    expected = np.zeros((g.kv, g.layers, len(SLOTS), g.row), dtype=np.int16)
    expected[:, :, 3:] = g.rows(logical)[:, :, SLOTS[3:]]
    np.testing.assert_array_equal(arrays(chunk), expected)


def test_a_device_without_its_number_is_the_current_one(device: torch.device) -> None:
    g = GEOMETRIES[1]
    logical, caches = built(g, device, 1)
    chunk = torch.zeros(g.kv, g.layers, 2, g.row, dtype=torch.bfloat16, device=device)
    slots = torch.tensor([9, 2]).to(device)
    ops.multi_layer_kv_transfer(
        chunk, pointers(caches, device), slots, device.type, g.slots, D2H, 1
    )
    synchronize(device)
    np.testing.assert_array_equal(arrays(chunk), g.rows(logical)[:, :, [9, 2]])


@pytest.mark.parametrize("number", [3, 5])
def test_a_pool_of_unknown_size(number: int, device: torch.device) -> None:
    g = GEOMETRIES[number]
    logical, caches = built(g, device, 1)
    chunk = torch.zeros(1, g.layers, 2, g.row, dtype=torch.bfloat16, device=device)
    ops.multi_layer_kv_transfer_unilateral(
        chunk, pointers(caches, device), torch.tensor([27, 3]).to(device), device, 0, D2H, number
    )
    synchronize(device)
    np.testing.assert_array_equal(arrays(chunk), g.rows(logical)[:, :, [27, 3]])


def test_a_pool_of_unknown_size_whose_planes_lie_outside_of_blocks() -> None:
    g = GEOMETRIES[1]
    _, caches = built(g, CPU, 1)
    chunk = torch.zeros(2, g.layers, 2, g.row, dtype=torch.bfloat16)
    with pytest.raises(LayoutError, match="page_buffer_size") as caught:
        ops.multi_layer_kv_transfer(
            chunk, pointers(caches, CPU), torch.tensor([27, 3]), CPU, 0, D2H, 1
        )
    check_sentence(str(caught.value))


@pytest.mark.parametrize("direction", [D2H, H2D])
@pytest.mark.parametrize("number", [10, 11, 12, 13])
def test_blocks_of_a_shared_pool_lie_further_apart(
    number: int, direction: int, device: torch.device
) -> None:
    g = GEOMETRIES[number]
    logical = g.logical(1)
    dense = g.block_size * g.row
    pools = [
        torch.zeros(g.blocks, dense + 16, dtype=torch.bfloat16, device=device)
        for _ in range(g.layers)
    ]
    for pool, layer in zip(pools, physical(g, logical), strict=True):
        pool[:, :dense] = bits(layer.reshape(g.blocks, dense), device)
    objects = g.logical(2).reshape(1, g.layers, g.slots, g.row)[:, :, :4]
    chunk = bits(objects, device)
    ops.multi_layer_kv_transfer(
        chunk,
        pointers(pools, device),
        torch.tensor([4, 27, 0, 9]).to(device),
        device,
        g.slots,
        direction,
        number,
        block_stride_elems=dense + 16,
        **slot_arguments(g),
    )
    synchronize(device)
    rows = g.rows(logical).copy()
    if direction == H2D:
        rows[:, :, [4, 27, 0, 9]] = objects
    else:
        np.testing.assert_array_equal(arrays(chunk), rows[:, :, [4, 27, 0, 9]])
    matches = [pool[:, :dense].contiguous() for pool in pools]
    expected = physical(g, rows.reshape(logical.shape))
    assert_equal(matches, [each.reshape(g.blocks, dense) for each in expected])
    assert not any(pool[:, dense:].any().item() for pool in pools)


@pytest.mark.parametrize("direction", [D2H, H2D])
@pytest.mark.parametrize("number", [1, 2, 3, 5, 6])
def test_a_step_of_other_caches_and_an_object_of_more_planes(
    number: int, direction: int, device: torch.device
) -> None:
    """LMCache's connectors hand both over, and its kernel heeds neither by slots."""
    g = GEOMETRIES[number]
    slots = torch.tensor([4, 27, 0, 9])
    logical, caches = built(g, device, 1)
    objects = g.logical(2).reshape(g.kv, g.layers, g.slots, g.row)[:, :, :4]
    chunk = torch.zeros(2, g.layers, 4, g.row, dtype=torch.bfloat16, device=device)
    chunk[: g.kv] = bits(objects, device)
    ops.multi_layer_kv_transfer(
        chunk,
        pointers(caches, device),
        slots.to(device),
        device,
        g.slots,
        direction,
        number,
        block_stride_elems=g.block_size * g.row - 8,
        **slot_arguments(g),
    )
    synchronize(device)
    rows = g.rows(logical).copy()
    if direction == H2D:
        rows[:, :, slots] = objects
        assert_equal(caches, physical(g, rows.reshape(logical.shape)))
    else:
        np.testing.assert_array_equal(arrays(chunk[: g.kv]), rows[:, :, slots])


# --- By blocks ------------------------------------------------------------------------------------


def object_shape(g: Geometry, blocks: int) -> tuple[int, ...]:
    tokens = blocks * g.block_size
    return (2, g.layers, tokens, g.row) if g.kv == 2 else (g.layers, tokens, g.row)


def object_rows(g: Geometry, logical: Any, blocks: list[int]) -> Any:
    """Return the rows of an object of these blocks."""
    rows = logical[:, :, blocks].reshape(g.kv, g.layers, len(blocks) * g.block_size, g.row)
    return rows if g.kv == 2 else rows[0]


@pytest.mark.parametrize("by", ["tensors", "int64", "uint64"])
@pytest.mark.parametrize("number", GEOMETRIES)
def test_blocks_there_and_back(number: int, by: str, device: torch.device) -> None:
    if by != "tensors" and number in BY_TENSORS_ALONE:
        pytest.skip("LMCache hands these over as tensors alone")
    g = GEOMETRIES[number]
    logical, caches = built(g, device, 1)
    ids = [3, 0, 6, 2, 5]
    at = CPU if by == "tensors" else device
    objects = [torch.zeros(object_shape(g, 2), dtype=torch.bfloat16, device=at) for _ in range(3)]
    args = objects if by == "tensors" else [each.data_ptr() for each in objects]
    block_ids = ids if by == "tensors" else torch.tensor(ids).to(device)

    def transfer(direction: int, into: Any) -> None:
        ops.multi_layer_block_kv_transfer(
            caches_argument(into, by, device),
            args,
            block_ids,
            device,
            direction,
            g.descriptor(),
            2 * g.block_size,
            number,
            0,
        )
        synchronize(device)

    transfer(D2H, caches)
    for place in range(2):
        expected = object_rows(g, logical, ids[2 * place : 2 * place + 2])
        np.testing.assert_array_equal(arrays(objects[place]), expected)
    last = arrays(objects[2])
    np.testing.assert_array_equal(last[..., : g.block_size, :], object_rows(g, logical, [5]))
    assert not last[..., g.block_size :, :].any()

    other = g.logical(9)
    empty = tensors(physical(g, other), device)
    transfer(H2D, empty)
    other[:, :, ids] = logical[:, :, ids]
    assert_equal(empty, physical(g, other))


@pytest.mark.parametrize("skip", range(7))
def test_blocks_skipped_over_all_objects(skip: int, device: torch.device) -> None:
    g = GEOMETRIES[7]
    logical, caches = built(g, device, 1)
    objects = [torch.zeros(object_shape(g, 2), dtype=torch.bfloat16) for _ in range(3)]
    ops.multi_layer_block_kv_transfer(
        caches, objects, [3, 0, 6, 2, 5, 1], device, D2H, g.descriptor(), 2 * g.block_size, 7, skip
    )
    synchronize(device)
    expected = object_rows(g, logical, [3, 0, 6, 2, 5, 1])
    expected[:, :, : skip * g.block_size] = 0
    np.testing.assert_array_equal(np.concatenate(arrays(objects), axis=2), expected)


def test_a_last_object_may_be_shorter(device: torch.device) -> None:
    g = GEOMETRIES[2]
    logical, caches = built(g, device, 1)
    objects = [torch.zeros(object_shape(g, n), dtype=torch.bfloat16) for n in (2, 2, 1)]
    ops.multi_layer_block_kv_transfer(
        caches, objects, [3, 0, 6, 2, 5], device, D2H, g.descriptor(), 2 * g.block_size, 2, 0
    )
    synchronize(device)
    expected = object_rows(g, logical, [3, 0, 6, 2, 5])
    np.testing.assert_array_equal(np.concatenate(arrays(objects), axis=2), expected)


def test_a_block_that_stands_for_none_may_be_named_again() -> None:
    g = GEOMETRIES[1]
    logical, caches = built(g, CPU, 1)
    objects = [bits(object_rows(g, g.logical(2), [k, k + 1]), CPU) for k in (0, 2)]
    ops.multi_layer_block_kv_transfer(
        caches, objects, [0, 0, 4, 5], CPU, H2D, g.descriptor(), 2 * g.block_size, 1, 0
    )
    logical[:, :, [0, 4, 5]] = g.logical(2)[:, :, [1, 2, 3]]
    assert_equal(caches, physical(g, logical))


def test_an_object_in_pageable_memory_is_waited_for(accelerator: torch.device) -> None:
    """The stream is busy; the bytes are there when the call returns."""
    g = GEOMETRIES[1]
    logical, caches = built(g, accelerator, 1)
    objects = [torch.zeros(object_shape(g, 2), dtype=torch.bfloat16)]
    delay(torch.accelerator.current_stream(accelerator))
    ops.multi_layer_block_kv_transfer(
        caches, objects, [3, 0], accelerator, D2H, g.descriptor(), 2 * g.block_size, 1, 0
    )
    (result,) = arrays(objects)
    np.testing.assert_array_equal(result, object_rows(g, logical, [3, 0]))


@pytest.mark.simdev
@pytest.mark.parametrize("direction", [D2H, H2D])
def test_without_a_kernel_each_layer_of_a_slice_takes_one_call(
    direction: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slice has positions of all layers, and the backend copies a layer by a call."""
    g = GEOMETRIES[1]._replace(layers=16)
    logical, caches = built(g, DEVICE, 1)
    ids = [3, 0, 6, 2, 5, 1]
    stored = g.logical(2)
    objects = [bits(object_rows(g, stored, [at, at + 1]), CPU) for at in (0, 2, 4)]
    whole = sum(each.nbytes for each in objects)
    monkeypatch.setattr(pageable, "SIZES", Sizes(whole // 16, whole // 16, whole // 8))
    for _ in range(2):  # the second time nothing is prepared
        before = simdev.counted()
        ops.multi_layer_block_kv_transfer(
            caches, objects, ids, DEVICE, direction, g.descriptor(), 2 * g.block_size, 1, 0
        )
        launches = simdev.counted()[0] - before[0]
    slices = 3  # of two blocks, which an object has
    assert launches <= slices * g.layers + 2 * slices
    if direction == D2H:
        matches = np.concatenate(arrays(objects), axis=2)
        np.testing.assert_array_equal(matches, object_rows(g, logical, ids))
    else:
        logical[:, :, ids] = stored[:, :, :6]
        assert_equal(caches, physical(g, logical))


# --- One layer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("token_major", [False, True])
@pytest.mark.parametrize("number", [1, 2, 3, 5, 6, 7, 15])
def test_one_layer(number: int, token_major: bool, device: torch.device) -> None:
    g = GEOMETRIES[number]
    logical, caches = built(g, device, 1)
    slots = torch.tensor([9, -1, 14], device=device)
    shape = (3, g.row) if g.kv == 1 else (3, 2, g.row) if token_major else (2, 3, g.row)
    buffer = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    ops.single_layer_kv_transfer(buffer, caches[1], slots, D2H, number, token_major)
    ops.single_layer_kv_transfer(buffer, caches[0], slots, H2D, number, token_major)
    synchronize(device)
    expected = g.rows(logical)[:, 1, [9, 0, 14]]
    expected[:, 1] = 0
    expected = expected[0] if g.kv == 1 else expected.swapaxes(0, 1) if token_major else expected
    np.testing.assert_array_equal(arrays(buffer), expected)
    rows = g.rows(logical).copy()
    rows[:, 0, [9, 14]] = rows[:, 1, [9, 14]]
    assert_equal(caches, physical(g, rows.reshape(logical.shape)))


@pytest.mark.parametrize("token_major", [False, True])
def test_one_layer_of_keys_and_values(token_major: bool, device: torch.device) -> None:
    g = GEOMETRIES[9]
    logical, (keys, values) = built(g, device, 1)
    slots = torch.tensor([9, 2, 14], device=device)
    shape = (3, 2, g.row) if token_major else (2, 3, g.row)
    buffer = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    ops.single_layer_kv_transfer_sgl(buffer, keys[1], values[1], slots, D2H, token_major)
    ops.single_layer_kv_transfer_sgl(buffer, keys[2], values[2], slots, H2D, token_major)
    synchronize(device)
    rows = g.rows(logical).copy()
    rows[:, 2, [9, 2, 14]] = rows[:, 1, [9, 2, 14]]
    assert_equal([keys, values], physical(g, rows.reshape(logical.shape)))


def test_a_layer_of_an_object_there_and_back(device: torch.device) -> None:
    g = GEOMETRIES[9]
    logical, (keys, values) = built(g, device, 1)
    slots = torch.tensor([9, 2, 14], device=device)
    chunk = torch.zeros(2, g.layers, 3, g.row, dtype=torch.bfloat16, device=device)
    ops.load_and_reshape_flash(chunk, keys[1], values[1], slots, 1)
    ops.reshape_and_cache_back_flash(chunk, keys[0], values[0], slots, 1)
    synchronize(device)
    np.testing.assert_array_equal(arrays(chunk)[:, 1], g.rows(logical)[:, 1, [9, 2, 14]])
    rows = g.rows(logical).copy()
    rows[:, 0, [9, 2, 14]] = rows[:, 1, [9, 2, 14]]
    assert_equal([keys, values], physical(g, rows.reshape(logical.shape)))


# --- Host memory by addresses ---------------------------------------------------------------------


@pytest.mark.parametrize("direction", [D2H, H2D])
@pytest.mark.parametrize("number", [x for x in GEOMETRIES if x not in BY_TENSORS_ALONE])
def test_direct_copies(number: int, direction: int, device: torch.device) -> None:
    g = GEOMETRIES[number]
    logical, caches = built(g, device, 1)
    ids = [3, 0, 6, 2]
    skips = [1, 0]
    before = 64
    nbytes = before + 2 * int(np.prod(object_shape(g, 2)))
    memory = [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(2)]
    if device.type != "cpu":
        memory = [each.pin_memory() for each in memory]
    inside = [each[before:].view(torch.int16).view(object_shape(g, 2)) for each in memory]
    new = g.logical(2)
    if direction == H2D:
        for place, each in enumerate(inside):
            each.copy_(torch.from_numpy(object_rows(g, new, ids[2 * place : 2 * place + 2])))
    group = ops.DirectCopyGroupSpec(
        pointers(caches, CPU).tolist(), g.descriptor(), number, 2 * g.block_size, before, ids
    )
    objects = [
        ops.DirectCopyObject(each.data_ptr(), 0, nbytes, place, [skips[place]])
        for place, each in enumerate(memory)
    ]
    assert ops.batch_memcpy_supported()
    assert ops.direct_copy_format_supported(number)
    ops.execute_direct_copy_transfer(direction, device, 2**26, [group], objects)
    synchronize(device)
    if direction == H2D:
        logical[:, :, ids[1:]] = new[:, :, ids[1:]]
        assert_equal(caches, physical(g, logical))
        return
    first, second = (object_rows(g, logical, ids[at : at + 2]) for at in (0, 2))
    first[..., : g.block_size, :] = 0
    np.testing.assert_array_equal(inside[0].numpy(), first)
    np.testing.assert_array_equal(inside[1].numpy(), second)


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 64), (32, 64), (16, 200), (64, 128)])
def test_bytes_are_cut_at_the_seams(offset: int, nbytes: int, device: torch.device) -> None:
    host = torch.randint(0, 256, (256,), dtype=torch.uint8)
    back = torch.zeros(256, dtype=torch.uint8)
    there = torch.zeros(256, dtype=torch.uint8, device=device)
    for dest, src, direction in ((there, host, H2D), (back, there, D2H)):
        ops.lmcache_memcpy_async(
            dest.data_ptr() + offset,
            src.data_ptr() + offset,
            nbytes,
            direction,
            offset,
            64,
            device_type=device.type,
        )
    synchronize(device)
    assert back[offset : offset + nbytes].equal(host[offset : offset + nbytes])
    assert not back[:offset].any()
    assert not back[offset + nbytes :].any()


@pytest.mark.parametrize("direction", [D2H, H2D])
@pytest.mark.parametrize(("offset", "nbytes"), [(0, 64), (32, 64), (16, 200), (64, 128), (5, 0)])
def test_no_piece_crosses_a_seam(
    offset: int,
    nbytes: int,
    direction: int,
    accelerator: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = torch.zeros(256, dtype=torch.uint8).pin_memory()
    there = torch.zeros(256, dtype=torch.uint8, device=accelerator)
    pieces = list[tuple[int, int]]()
    link = link_of(accelerator)
    copy: Any = link.copy

    def recorded(args: Any, *rest: Any) -> None:
        assert (args.height == 1).all()
        ends = args.src if direction == H2D else args.dst
        pieces.extend(zip((ends - host.data_ptr()).tolist(), args.width.tolist(), strict=True))
        copy(args, *rest)

    # A kernel, which moves so few bytes on a GPU, knows no pieces.
    move = partial(copy_runs, backend="batched_memcpy")
    move(host.data_ptr(), there.data_ptr(), 64, src_device="cpu", dst_device=accelerator)  # judged
    monkeypatch.setattr(ops, "copy_runs", move)
    monkeypatch.setattr(link, "copy", recorded)
    dest, src = (there, host) if direction == H2D else (host, there)
    ops.lmcache_memcpy_async(
        dest.data_ptr() + offset,
        src.data_ptr() + offset,
        nbytes,
        direction,
        offset,
        64,
        device_type=accelerator.type,
    )
    synchronize(accelerator)
    if isinstance(link, CudaLink):
        return  # the core lists the pieces, and the driver rejects wrong ones
    assert sum(size for _, size in pieces) == nbytes
    assert all(at // 64 == (at + size - 1) // 64 for at, size in pieces)


# --- What is refused ------------------------------------------------------------------------------


def block_call(**changed: Any) -> None:
    g = GEOMETRIES[1]
    _, caches = built(g, CPU, 1)
    objects = [torch.zeros(object_shape(g, 2), dtype=torch.bfloat16)]
    args: dict[str, Any] = {
        "paged_buffer_ptrs_tensor": caches,
        "lmcache_objects_ptrs": objects,
        "block_ids": [3, 0],
        "device": CPU,
        "direction": D2H,
        "shape_desc": g.descriptor(),
        "lmcache_chunk_size": 2 * g.block_size,
        "engine_kv_format": 1,
        "skip_prefix_n_blocks": 0,
    }
    ops.multi_layer_block_kv_transfer(**args | changed)


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"lmcache_chunk_size": 0}, ValueError),
        ({"lmcache_chunk_size": 6}, ValueError),
        ({"skip_prefix_n_blocks": -1}, ValueError),
        ({"direction": 2}, ValueError),
        ({"direction": "D2H"}, ValueError),
        ({"lmcache_objects_ptrs": torch.zeros(2)}, TypeError),
        ({"lmcache_objects_ptrs": [torch.zeros(2), 64]}, TypeError),
        ({"lmcache_objects_ptrs": ["object"]}, TypeError),
        ({"block_ids": "3"}, TypeError),
        ({"engine_kv_format": 19}, Unsupported),
        ({"block_ids": [3, 7]}, SlotError),
    ],
)
def test_a_block_transfer_that_cannot_be(changed: Any, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        block_call(**changed)
    check_sentence(str(caught.value))


def test_an_object_of_another_length_than_the_slots() -> None:
    g = GEOMETRIES[1]
    _, caches = built(g, CPU, 1)
    chunk = torch.zeros(2, g.layers, 3, g.row, dtype=torch.bfloat16)
    with pytest.raises(SlotError) as caught:
        ops.multi_layer_kv_transfer(
            chunk, pointers(caches, CPU), torch.arange(4), CPU, g.slots, D2H, 1
        )
    check_sentence(str(caught.value))


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"key_value_ptrs": []}, TypeError),
        ({"key_value_ptrs": None}, TypeError),
        ({"slot_mapping": [9, 2]}, TypeError),
        ({"key_value": [9, 2]}, TypeError),
        ({"key_value": torch.zeros(4)}, LayoutError),
        ({"page_buffer_size": None}, TypeError),
        ({"page_buffer_size": 30}, ValueError),
        ({"block_size": -4}, ValueError),
        ({"head_size": 5}, ValueError),
        ({"head_size": 4096}, ValueError),
    ],
)
def test_a_transfer_by_slots_that_cannot_be(changed: Any, error: type[Exception]) -> None:
    g = GEOMETRIES[6]
    _, caches = built(g, CPU, 1)
    args: dict[str, Any] = {
        "key_value": torch.zeros(2, g.layers, 2, g.row, dtype=torch.bfloat16),
        "key_value_ptrs": pointers(caches, CPU),
        "slot_mapping": torch.tensor([9, 2]),
        "paged_memory_device": CPU,
        "page_buffer_size": g.slots,
        "direction": D2H,
        "engine_kv_format": 6,
        **slot_arguments(g),
    }
    ops.multi_layer_kv_transfer(**args)
    with pytest.raises(error) as caught:
        ops.multi_layer_kv_transfer(**args | changed)
    check_sentence(str(caught.value))


def test_a_slot_past_the_caches_moves_nothing() -> None:
    g = GEOMETRIES[1]
    _, caches = built(g, CPU, 1)
    for direction in (D2H, H2D):
        for by in ("tensors", "int64"):
            chunk = torch.ones(2, g.layers, 2, g.row, dtype=torch.bfloat16)
            built_bits = [each.view(torch.int16) for each in (chunk, *caches)]
            before = [each.clone() for each in built_bits]
            with pytest.raises(SlotError) as caught:
                ops.multi_layer_kv_transfer(
                    chunk,
                    caches_argument(caches, by, CPU),
                    torch.tensor([9, g.slots]),
                    CPU,
                    g.slots,
                    direction,
                    1,
                )
            check_sentence(str(caught.value), f"slot {g.slots}")
            assert all(map(torch.equal, before, built_bits))


@pytest.mark.parametrize("by", ["tensors", "int64"])
def test_caches_in_the_place_of_others_that_were_freed(by: str) -> None:
    """The same addresses or others, nothing holds the memory of the caches before."""
    g = GEOMETRIES[1]
    for seed in range(4):
        logical = g.logical(seed)
        memory = [np.ascontiguousarray(each) for each in physical(g, logical)]
        caches = [bits(each, CPU) for each in memory]
        gone = [weakref.ref(each) for each in memory]
        chunk = torch.zeros(2, g.layers, 2, g.row, dtype=torch.bfloat16)
        ops.multi_layer_kv_transfer(
            chunk, caches_argument(caches, by, CPU), torch.tensor([9, 2]), CPU, g.slots, D2H, 1
        )
        np.testing.assert_array_equal(arrays(chunk), g.rows(logical)[:, :, [9, 2]])
        del caches, memory
        gc.collect()
        assert [each() for each in gone] == [None] * g.layers


def test_a_table_that_is_written_anew_is_read_anew() -> None:
    g = GEOMETRIES[1]
    table = torch.zeros(g.layers, dtype=torch.int64)
    for seed in (1, 2):
        logical, caches = built(g, CPU, seed)
        table.copy_(pointers(caches, CPU))
        chunk = torch.zeros(2, g.layers, 2, g.row, dtype=torch.bfloat16)
        ops.multi_layer_kv_transfer(chunk, table, torch.tensor([9, 2]), CPU, g.slots, D2H, 1)
        np.testing.assert_array_equal(arrays(chunk), g.rows(logical)[:, :, [9, 2]])


def test_a_table_on_a_device_is_read_once_until_it_is_written(accelerator: torch.device) -> None:
    g = GEOMETRIES[1]
    table = torch.zeros(g.layers, dtype=torch.int64, device=accelerator)
    for seed in (1, 2):
        logical, caches = built(g, accelerator, seed)
        table.copy_(pointers(caches, accelerator))
        chunk = torch.zeros(2, g.layers, 2, g.row, dtype=torch.bfloat16, device=accelerator)
        slots = torch.tensor([9, 2])
        for again in range(2):
            with ReadBack() as waited:
                ops.multi_layer_kv_transfer(chunk, table, slots, accelerator, g.slots, D2H, 1)
            assert not (again and waited.seen)
        synchronize(accelerator)
        np.testing.assert_array_equal(arrays(chunk), g.rows(logical)[:, :, [9, 2]])


def test_a_bad_slot_on_a_device_is_raised_by_the_next_call_of_its_thread(
    device: torch.device,
) -> None:
    if device.type == "cpu":
        pytest.skip("ids on the host are refused immediately")
    g = GEOMETRIES[1]
    _, caches = built(g, device, 1)
    chunk = torch.zeros(2, g.layers, 2, g.row, dtype=torch.bfloat16, device=device)
    table = pointers(caches, device)

    def store(slots: list[int]) -> None:
        ops.multi_layer_kv_transfer(
            chunk, table, torch.tensor(slots).to(device), device, g.slots, D2H, 1
        )
        synchronize(device)

    store([9, 99])
    with ThreadPoolExecutor(1) as another:
        another.submit(store, [9, 2]).result()
    with pytest.raises(SlotError, match="past the end"):
        store([9, 2])
    store([9, 2])


def forget_terms() -> None:
    """Let the next op read the user's variables again."""
    ops.terms.cache_clear()
    vars(ops._options).pop("across", None)


def test_terms_are_a_users_variables(
    accelerator: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_terms()
    monkeypatch.setenv("PORTAKV_LMCACHE_OVERLAP", "everything")
    g = GEOMETRIES[1]
    _, caches = built(g, accelerator, 1)
    objects = torch.zeros(2, g.layers, 2, g.row, dtype=torch.bfloat16)
    rest = pointers(caches, accelerator), torch.tensor([9, 2]), accelerator, g.slots, D2H, 1
    try:
        with pytest.raises(InvalidTerms):
            ops.multi_layer_kv_transfer(objects, *rest)
        ops.multi_layer_kv_transfer(objects.to(accelerator), *rest)
        forget_terms()
        monkeypatch.setenv("PORTAKV_LMCACHE_OVERLAP", "idle")
        monkeypatch.setenv("PORTAKV_LMCACHE_MAX_THREAD_BLOCKS", "2")
        assert ops.terms() == {"overlap": "idle", "max_thread_blocks": 2}
        ops.multi_layer_kv_transfer(objects, *rest)
    finally:
        forget_terms()


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("PORTAKV_LMCACHE_OVERLAP", "everything"),
        ("PORTAKV_LMCACHE_OVERLAP", "2"),
        ("PORTAKV_LMCACHE_MAX_THREAD_BLOCKS", "0"),
        ("PORTAKV_LMCACHE_MAX_THREAD_BLOCKS", "-2"),
        ("PORTAKV_LMCACHE_MAX_THREAD_BLOCKS", "many"),
    ],
)
def test_a_variable_that_no_term_can_have(
    variable: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_terms()
    monkeypatch.setenv(variable, text)
    with pytest.raises(InvalidTerms) as caught:
        ops.terms()
    check_sentence(str(caught.value), f"{variable}={text}")


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"nbytes": 100}, "object"),
        ({"chunk_idx": 1}, "object"),
        ({"chunk_idx": -1}, "object"),
        ({"skip_prefix_n_blocks": [3]}, "object"),
        ({"skip_prefix_n_blocks": []}, "object"),
        ({"slots_per_chunk": 0}, "group"),
        ({"slots_per_chunk": 6}, "group"),
        ({"block_ids": [3, 7]}, "group"),
        ({"block_ids": [3, -1]}, "group"),
        ({"byte_offset_in_object": -4}, "group"),
        ({"engine_kv_format": 16}, "group"),
        ({"engine_kv_format": 17}, "group"),
    ],
)
def test_a_direct_copy_that_cannot_be(changed: Any, field: str) -> None:
    g = GEOMETRIES[1]
    _, caches = built(g, CPU, 1)
    memory = torch.zeros(object_shape(g, 2), dtype=torch.bfloat16)
    group = ops.DirectCopyGroupSpec(
        pointers(caches, CPU).tolist(), g.descriptor(), 1, 2 * g.block_size, 0, [3, 0]
    )
    one = ops.DirectCopyObject(memory.data_ptr(), 0, memory.nbytes, 0, [0])
    group = group._replace(**changed) if field == "group" else group
    one = one._replace(**changed) if field == "object" else one
    with pytest.raises((ValueError, RuntimeError)) as caught:
        ops.execute_direct_copy_transfer(D2H, CPU, 2**26, [group], [one])
    check_sentence(str(caught.value))
    assert not memory.any()


@pytest.mark.parametrize("skips", [[], [2]], ids=["no objects", "all blocks are skipped"])
def test_a_direct_copy_of_nothing(skips: list[int]) -> None:
    g = GEOMETRIES[1]
    _, caches = built(g, CPU, 1)
    memory = torch.zeros(object_shape(g, 2), dtype=torch.bfloat16)
    group = ops.DirectCopyGroupSpec(
        pointers(caches, CPU).tolist(), g.descriptor(), 1, 2 * g.block_size, 0, [3, 0]
    )
    objects = [ops.DirectCopyObject(memory.data_ptr(), 0, memory.nbytes, 0, [x]) for x in skips]
    ops.execute_direct_copy_transfer(D2H, CPU, 2**26, [group], objects)
    assert not memory.any()


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"host_buffer_alignments": 48}, ValueError),
        ({"direction": 2}, ValueError),
        ({"dest": 1}, TypeError),
        ({"nbytes": 3}, ValueError),
        ({"nbytes": -64, "dest": 64, "src": 128}, ValueError),
    ],
)
def test_a_copy_of_bytes_that_cannot_be(changed: Any, error: type[Exception]) -> None:
    args: dict[str, Any] = {
        "dest": torch.zeros(8),
        "src": torch.zeros(8),
        "nbytes": 8,
        "direction": D2H,
        "host_buffer_offset": 0,
        "host_buffer_alignments": 64,
    }
    with pytest.raises(error) as caught:
        ops.lmcache_memcpy_async(**args | changed)
    check_sentence(str(caught.value))
