# SPDX-License-Identifier: Apache-2.0
"""Block stores of forms in `fp8`: what comes back, who reads whose blocks, and damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cache_cases import normal_layers
from support.storage_cases import key_of
from support.waits import LIMIT

from portakv import Fp8, KVView, StoreError, Unsupported, copy_blocks
from portakv.storage import BlockForm, BlockStore, Disk

NHD = "layer | kv block token head dim"
LAYERS = 2
BLOCKS = 8
SIZE = 16
HEADS = 2
DIM = 32
KEYS = [key_of(n) for n in range(3)]
PLACES = [6, 1, 7]  # of the blocks in the cache


def cache(dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    return normal_layers((2, BLOCKS, SIZE, HEADS, DIM), LAYERS, dtype)


def view_of(layers: list[torch.Tensor]) -> KVView:
    return KVView(layers, NHD)


def form_of(encoding: Any = "fp8", dtype: torch.dtype = torch.bfloat16) -> BlockForm:
    return BlockForm.of(view_of(cache(dtype)), "org/model", encoding=encoding)


def opened(folder: Path, forms: Any) -> BlockStore:
    return BlockStore(forms, staging=1 << 20, tiers=[Disk(folder, capacity=16 << 20)])


def save(store: Any, layers: list[torch.Tensor]) -> list[bool]:
    handle = store.save(view_of(layers), PLACES, KEYS, full="wait")
    handle.synchronize(LIMIT)
    landed: list[bool] = handle.landed.tolist()
    return landed


def loaded(store: Any, layers: list[torch.Tensor]) -> tuple[list[bool], float]:
    """Load all keys; return which landed, and the largest error over the largest value of a
    token and head."""
    empty = [torch.zeros_like(layer) for layer in layers]
    handle = store.load(view_of(empty), range(3), KEYS, missing="skip")
    handle.synchronize(LIMIT)
    worst = 0.0
    for own, layer in zip(empty, layers, strict=True):
        wanted = layer[:, PLACES].float()
        error = (own[:, :3].float() - wanted).abs() / wanted.abs().amax(-1, keepdim=True)
        worst = max(worst, float(error.max()))
    return handle.landed.tolist(), worst


ALL = [True] * 3
NONE = [False] * 3


def test_a_form_says_how_blocks_are_encoded() -> None:
    raw = form_of(None)
    form = form_of()
    assert form.raw == raw
    assert form.encoding == Fp8().text == "fp8/1"
    assert form.planes == (Fp8().plane(SIZE, DIM),) * 2
    assert form.payload_bytes == LAYERS * 2 * HEADS * form.planes[0].slot_bytes
    assert len({form.digest, raw.digest, form_of("pack").digest}) == 3
    assert BlockForm.from_json(form.json()) == form
    fields = json.loads(form.json())
    for encoding in ("fp8", "fp8/2", "fp8/1:3"):
        with pytest.raises(StoreError, match="block form of format 1"):
            BlockForm.from_json(json.dumps({**fields, "encoding": encoding}))


def test_who_reads_whose_blocks() -> None:
    """A form that keeps every bit never reads rounded blocks; the others read what they want."""
    raw = form_of(None)
    pack = form_of("pack")
    form = form_of()
    assert raw.part_of(form) is None
    assert pack.part_of(form) is None
    for one, other in ((form, raw), (form, pack), (form, form), (raw, pack), (pack, raw)):
        assert one.part_of(other) is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_come_back_rounded_and_only_to_those_that_ask(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    layers = cache(dtype)
    with opened(tmp_path, form_of(dtype=dtype)) as store:
        assert save(store, layers) == ALL
    with opened(tmp_path, form_of(dtype=dtype)) as store:
        landed, error = loaded(store, layers)
        assert landed == ALL
        assert 0.01 < error < 0.04
    with opened(tmp_path, form_of(None, dtype)) as store:
        assert store.lookup(KEYS) == 0
        assert loaded(store, layers)[0] == NONE
        # The raw form stores its own blocks next to them.
        assert save(store, layers) == ALL
        assert loaded(store, layers) == (ALL, 0.0)


def test_raw_blocks_serve_a_reader_of_fp8_bit_by_bit(tmp_path: Path) -> None:
    layers = cache()
    with opened(tmp_path, form_of(None)) as store:
        assert save(store, layers) == ALL
    with opened(tmp_path, form_of()) as store:
        assert loaded(store, layers) == (ALL, 0.0)


def test_a_store_of_both_forms(tmp_path: Path) -> None:
    layers = cache()
    forms = {"small": form_of(), "raw": form_of(None)}
    with opened(tmp_path, forms) as store:
        assert save(store.of("small"), layers) == ALL
        assert loaded(store.of("raw"), layers)[0] == NONE
        landed, error = loaded(store.of("small"), layers)
        assert landed == ALL
        assert error > 0.01


def test_encoded_views_are_stored_as_they_are(tmp_path: Path) -> None:
    layers = cache()
    slot = Fp8().plane(SIZE, DIM).slot_bytes
    images = [
        torch.zeros((BLOCKS, LAYERS, 2, HEADS, slot), dtype=torch.uint8, device="cpu")
        for _ in range(2)
    ]
    views = [
        KVView(image, "block layer kv head page", block_size=SIZE, dim=DIM, encoding="fp8")
        for image in images
    ]
    copy_blocks(view_of(layers), views[0], PLACES, [4, 0, 2]).synchronize()
    with opened(tmp_path, form_of()) as store:
        handle = store.save(views[0], [4, 0, 2], KEYS, full="wait")
        handle.synchronize(LIMIT)
        assert handle.landed.tolist() == ALL
        store.load(views[1], [1, 3, 5], KEYS).synchronize(LIMIT)
        assert torch.equal(images[1][[1, 3, 5]], images[0][[4, 0, 2]])
        landed, error = loaded(store, layers)
        assert landed == ALL
        assert error > 0.01


def test_other_caches_are_refused_by_name() -> None:
    whole = torch.zeros((2, BLOCKS, SIZE, HEADS, DIM), dtype=torch.uint8, device="cpu")
    with pytest.raises(Unsupported, match="'fp8' for a cache of uint8"):
        BlockForm.of(view_of([whole] * LAYERS), "org/model", encoding="fp8")
    pages = torch.zeros((BLOCKS, 512), dtype=torch.uint8, device="cpu")
    view = KVView([pages] * LAYERS, "layer | block page", block_size=SIZE)
    with pytest.raises(Unsupported, match="'fp8' for a cache of pages"):
        BlockForm.of(view, "org/model", encoding=Fp8())
    image = form_of().view(torch.zeros(2, form_of().image_bytes, dtype=torch.uint8, device="cpu"))
    with pytest.raises(Unsupported, match="form of a view in the encoding 'fp8'"):
        BlockForm.of(image, "org/model")
