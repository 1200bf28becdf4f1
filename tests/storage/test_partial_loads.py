# SPDX-License-Identifier: Apache-2.0
"""Loads that leave some blocks of the view as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.core_cases import noise
from support.storage_cases import key_of
from support.waits import LIMIT

from portakv import KVView
from portakv.errors import InvalidTerms, SlotError
from portakv.storage import BlockForm, BlockStore, Disk

TOKENS = 32
KEYS = [key_of(i) for i in range(2)]  # of 16 tokens each


def cache(size: int, seed: int) -> KVView:
    tensors = [
        noise(TOKENS // size, 2, size, 2, 8, dtype=torch.float16, seed=seed + i) for i in range(3)
    ]
    return KVView(tensors, "layer | block kv token head dim")


def rows_of(view: KVView) -> np.ndarray:
    """Return the bytes of each token, in the order of blocks."""
    each = [x.transpose(1, 2).reshape(TOKENS, -1).view(torch.uint8).numpy() for x in view.tensors]
    return np.concatenate(each, axis=1)


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("where", ["host", "disk", "both"])
@pytest.mark.parametrize(
    ("size", "blocks"),
    [
        (4, [-1, -1, 2, 3, 4, 5, 6, 7]),
        (4, [0, 1, 2, 3, 4, -1, 6, -1]),
        (8, [-1, 1, 2, -1]),
        (32, [0]),
    ],
)
def test_rows_of_a_negative_block_are_not_written(
    tmp_path: Path, size: int, blocks: list[int], where: str, by_layer: bool
) -> None:
    saved = cache(16, 0)
    form = BlockForm.of(saved, "model", block_size=16)
    disk = Disk(tmp_path, capacity=1 << 20, io="threads")
    with BlockStore(form, staging=1 << 20, host=0, tiers=[disk], full="wait") as store:
        store.save(saved, range(2), KEYS).synchronize(LIMIT)
    disk = Disk(tmp_path, capacity=1 << 20, io="threads")
    host = 0 if where == "disk" else 1 << 20
    with BlockStore(form, staging=1 << 20, host=host, tiers=[disk], full="wait") as store:
        if where != "disk":
            store.prefetch(KEYS[: 1 + (where == "host")]).synchronize(LIMIT)
        target = cache(size, 50)
        before = rows_of(target).copy()
        handle = store.load(target, blocks, KEYS, by_layer=by_layer)
        handle.synchronize(LIMIT)
        assert handle.landed.all()
    written = np.repeat(np.array(blocks) >= 0, size)
    assert (rows_of(target)[written] == rows_of(saved)[written]).all()
    assert (rows_of(target)[~written] == before[~written]).all()


@pytest.mark.parametrize("call", ["load", "save"])
def test_the_sentence_names_the_id_its_place_and_the_range(call: str) -> None:
    view = cache(16, 0)
    last = view.slots // 16 - 1
    form = BlockForm.of(view, "model", block_size=16)
    with BlockStore(form, staging=1 << 20, host=1 << 20) as store:
        for wrong, says in ((99, f"ids from 0 to {last}, .* got 99 at"), ("a", "whole .* got 'a'")):
            with pytest.raises(SlotError, match=f"^Expected blocks to be {says}"):
                getattr(store, call)(view, [0, wrong], KEYS)


@pytest.mark.parametrize(
    ("size", "blocks", "key"),
    [(16, [-1, 1], 0), (16, [0, -7], 1), (32, [-1], 0), (8, [-1, -1, 2, 3], 0), (16, [-1, -1], 0)],
)
def test_a_load_of_a_key_without_a_block_is_refused(size: int, blocks: list[int], key: int) -> None:
    """Its block would land nowhere, and count as landed."""
    saved = cache(16, 0)
    form = BlockForm.of(saved, "model", block_size=16)
    with BlockStore(form, staging=1 << 20, host=1 << 20) as store:
        store.save(saved, range(2), KEYS).synchronize(LIMIT)
        target = cache(size, 50)
        before = rows_of(target).copy()
        with pytest.raises(SlotError, match=rf"negative ids alone for keys\[{key}\]"):
            store.load(target, blocks, KEYS)
        assert (rows_of(target) == before).all()


def test_a_save_of_a_negative_block_is_refused() -> None:
    view = cache(16, 0)
    form = BlockForm.of(view, "model", block_size=16)
    said = (
        "Expected blocks to be ids from 0 to 1 in a save, .* got -1 at position 1. Leave it and its"
    )
    with (
        BlockStore(form, staging=1 << 20, host=1 << 20) as store,
        pytest.raises(SlotError, match=said),
    ):
        store.save(view, [0, -1], KEYS)


def test_blocks_are_named() -> None:
    """None is all of a copy's blocks, and none of a store's."""
    view = cache(16, 0)
    form = BlockForm.of(view, "model", block_size=16)
    with BlockStore(form, staging=1 << 20, host=1 << 20) as store:
        nothing: Any = None
        for call in (store.save, store.load):
            with pytest.raises(InvalidTerms, match=r"Expected blocks to be ids .* got None"):
                call(view, nothing, KEYS)
            with pytest.raises(InvalidTerms, match=r"blocks to be 2 ids, .* 2 keys .* got 1\."):
                call(view, [0], KEYS)
