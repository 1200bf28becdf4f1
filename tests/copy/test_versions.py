# SPDX-License-Identifier: Apache-2.0
"""Copies raise the versions of what they write, so that autograd never takes it for unchanged."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.migrate_pulls import Couple, sides
from support.waits import LIMIT

from portakv import (
    AdaptiveConnector,
    CopyOptions,
    Fp8,
    KVView,
    Pack,
    Rope,
    copy_blocks,
    copy_rows,
    rotate_blocks,
)
from portakv.host import memcpy
from portakv.storage import BlockForm, BlockStore, Disk
from portakv.storage.memory import LONG, copy_long_runs
from portakv.view import Index

NHD = "layer | kv block token head dim"
CHUNK = "kv layer token (head dim)"
SHAPE = (2, 4, 16, 2, 32)
BLOCKS = ([0, 1], [2, 3])


def layers(device: str = "cpu", number: int = 2) -> list[torch.Tensor]:
    return [torch.ones(SHAPE, device=device) for _ in range(number)]


def versions(tensors: list[torch.Tensor]) -> list[int]:
    return [*map(attrgetter("_version"), tensors)]


def higher(tensors: list[torch.Tensor], before: list[int]) -> list[bool]:
    return [now > old for now, old in zip(versions(tensors), before, strict=True)]


def slots() -> torch.Tensor:
    return torch.arange(32, device="cpu")


@pytest.mark.parametrize("times", [1, 5], ids=["first", "repeated"])
@pytest.mark.parametrize(
    "terms",
    [{}, {"by_layer": True}, {"cancellable": True}, {"detached": True}, {"reinterpret": True}],
    ids=["plain", "by layer", "in slices", "detached", "bytes"],
)
def test_copies_of_views_raise_them(device: str, times: int, terms: dict[str, Any]) -> None:
    src = KVView(layers(device), NHD)
    tensors = layers(device)
    dst = KVView(tensors, NHD)
    for _ in range(times):
        before = versions(tensors)
        copy_blocks(src, dst, *BLOCKS, **terms).synchronize()
        assert all(higher(tensors, before))
        before = versions(tensors)
        copy_rows(src, dst, slots(), slots(), **terms).synchronize()
        assert all(higher(tensors, before))
    assert versions(src.tensors) == [0, 0]


@pytest.mark.parametrize("encoding", ["pack", "fp8"])
def test_encoded_and_rotated_copies_raise_them(encoding: str) -> None:
    tensors = [layer.bfloat16() for layer in layers()]
    rows = KVView(tensors, NHD)
    plane = Pack().plane(16 * 32) if encoding == "pack" else Fp8().plane(16, 32)
    packed = torch.zeros(4, 2, 2, 2, plane.slot_bytes, dtype=torch.uint8, device="cpu")
    slot: dict[str, Any] = {"block_size": 16, "dim": 32, "encoding": encoding}
    encoded = KVView(packed, "block layer kv head page", **slot)
    copy_blocks(rows, encoded, *BLOCKS).synchronize()
    assert higher([packed], [0])
    assert not any(versions(tensors))
    copy_blocks(encoded, rows, [2, 3], [1, 0]).synchronize()
    assert all(higher(tensors, [0, 0]))
    before = versions(tensors)
    rotate_blocks(
        KVView([layer.bfloat16() for layer in layers()], NHD), rows, *BLOCKS, Rope(3, 1e4)
    )
    assert all(higher(tensors, before))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("place", ["caches", "host"])
def test_a_connector_raises_them(device: str, batched: bool, place: str) -> None:
    caches = layers(device)
    where = device if place == "caches" else "cpu"
    chunk = torch.zeros(2, 2, 32, 64, device=where)
    connector = AdaptiveConnector(device)
    connector.register_kv_caches(caches)
    ids = slots().to(device)
    for _ in range(4):  # on a device the third is repeated
        for store, written in ((True, [chunk]), (False, caches)):
            before = versions(written)
            if batched:
                call = connector.batched_from_gpu if store else connector.batched_to_gpu
                call([chunk], None, ids, [0], [32]).synchronize()
            else:
                one = connector.from_gpu if store else connector.to_gpu
                one(chunk, None, ids).synchronize()
            assert all(higher(written, before))


def test_loads_of_a_store_raise_them(tmp_path: Path) -> None:
    tensors = layers()
    view = KVView(tensors, NHD)
    form = BlockForm.of(view, model="test")
    keys = [bytes([n]) * 32 for n in range(2)]
    with BlockStore(form, staging=1 << 20, tiers=[Disk(tmp_path, capacity=1 << 22)]) as store:
        store.save(view, [0, 1], keys).synchronize()
        assert versions(tensors) == [0, 0]
        store.load(view, [2, 3], keys).synchronize()
    assert all(higher(tensors, [0, 0]))


def test_long_runs_raise_them() -> None:
    src, dst = ([torch.zeros(6, LONG, dtype=torch.uint8) for _ in range(2)] for _ in range(2))
    src_view, dst_view = (KVView(x, "layer | block page", block_size=1) for x in (src, dst))
    some, places = (Index.of(np.array(ids), 1) for ids in ([4, 0], [1, 5]))
    assert copy_long_runs(src_view, dst_view, some, places, CopyOptions())
    assert all(higher(dst, [0, 0]))
    assert versions(src) == [0, 0]


def test_plain_copies_of_tensors_raise_them() -> None:
    tensor = torch.zeros(4, 8, device="cpu")
    memcpy.copy_(tensor, torch.ones(4, 8, device="cpu"))
    assert higher([tensor], [0])


def test_only_the_layers_of_a_slice_are_raised() -> None:
    tensors = layers(number=3)
    src = KVView(layers(number=3), NHD)
    dst = KVView(tensors, NHD)
    copy_blocks(src.slice(layers=1), dst.slice(layers=1), *BLOCKS).synchronize()
    assert higher(tensors, [0, 0, 0]) == [False, True, False]


def test_tensors_of_one_storage_that_share_no_version_are_raised() -> None:
    """At equal distances only the first of them stands for the view's memory."""
    whole = torch.zeros(3, 2, 4, 16, 2, 32, device="cpu")
    storage = whole.untyped_storage()
    tensors = []
    for n in range(3):
        empty = torch.empty(0, device="cpu")
        tensors.append(empty.set_(storage, n * whole[0].numel(), SHAPE, whole[0].stride()))
    before = versions(tensors)
    dst = KVView(tensors, NHD)
    assert dst.entries == 1
    copy_blocks(KVView(layers(number=3), NHD), dst, *BLOCKS).synchronize()
    assert all(higher(tensors, before))
    assert bool(whole[:, :, 2:].all())


@pytest.mark.parametrize("times", [1, 3])
def test_autograd_notices_a_write_into_what_it_saved(times: int) -> None:
    weight = torch.ones(4, 8, requires_grad=True, device="cpu")
    rows = torch.ones(4, 8, device="cpu")
    view = KVView(rows, "token dim")
    src = KVView(torch.zeros(4, 8, device="cpu"), "token dim")
    for _ in range(times):
        product = (weight * rows).sum()  # its gradient is the rows
        copy_rows(src, view).synchronize()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def test_tensors_of_inference_mode_have_no_version() -> None:
    src = KVView(layers(), NHD)
    normal = layers()
    with torch.inference_mode():
        tensors = layers()
        dst = KVView(tensors, NHD)
        for _ in range(3):
            copy_blocks(src, dst, *BLOCKS).synchronize()
        copy_blocks(src, KVView(normal, NHD), *BLOCKS).synchronize()
    copy_blocks(src, dst, *BLOCKS).synchronize()
    assert all(bool(layer[:, 2:].all()) for layer in tensors)
    assert all(higher(normal, [0, 0]))


def test_a_compiled_function_raises_them() -> None:
    caches = layers()
    chunk = torch.zeros(2, 2, 32, 64, device="cpu")
    connector = AdaptiveConnector("cpu")
    connector.register_kv_caches(caches)

    @torch.compile(backend="eager", fullgraph=True)
    def moved(ids: torch.Tensor) -> None:
        connector.from_gpu(chunk, slot_mapping=ids)
        connector.to_gpu(chunk, slot_mapping=ids)

    moved(slots())
    assert higher([chunk], [0])
    assert all(higher(caches, [0, 0]))


@pytest.mark.parametrize("method", ["mapped", "staging"])
def test_a_pull_raises_them(method: str) -> None:
    with sides() as made:
        couple = Couple(made, method)
        before = versions([couple.dst.whole])
        couple.pull(couple.offer()).synchronize(LIMIT)
        assert couple.right()
        assert higher([couple.dst.whole], before)
