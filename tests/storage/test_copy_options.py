# SPDX-License-Identifier: Apache-2.0
"""`CopyOptions` of a store's saves and loads, and tiers that a text names."""

from __future__ import annotations

import pytest
import torch
from support.storage_cases import key_of
from support.waits import LIMIT

from portakv import CopyOptions, InvalidTerms, KVView
from portakv.errors import BackendUnavailable, Unsupported
from portakv.storage import BlockForm, BlockStore
from portakv.storage.tiers.base import TIERS

KEYS = [key_of(i) for i in range(4)]
LAYOUT = "layer block kv token (head dim)"


def cache(fill: bool = False) -> KVView:
    """Return a cache of four blocks, of zeros or of numbers."""
    extents = (2, 4, 2, 4, 16)
    rows = torch.arange(1024.0).reshape(extents) if fill else torch.zeros(extents)
    return KVView(rows, LAYOUT, heads=2)


def store_of(*tiers: str) -> BlockStore:
    return BlockStore(BlockForm.of(cache(), model="m"), staging=1 << 20, host=1 << 20, tiers=tiers)


def test_a_save_and_a_load_take_options() -> None:
    src = cache(fill=True)
    dst = cache()
    options = CopyOptions(backend="reference", overlap="idle")
    with store_of() as store:
        store.save(src, [0, 1, 2, 3], KEYS, options=options).synchronize(LIMIT)
        by_layer = CopyOptions(by_layer=True)
        loaded = store.load(dst, [3, 2, 1, 0], KEYS, options=by_layer)
        loaded.synchronize(LIMIT)
        assert len(loaded.layers) == 2
    assert torch.equal(dst.tensors, src.tensors.flip(1))


def test_the_options_reach_the_copy() -> None:
    """What no copy can keep is refused before anything moves."""
    with store_of() as store:
        with pytest.raises(BackendUnavailable, match="none such"):
            store.save(cache(), [0], KEYS[:1], options=CopyOptions(backend="none such"))
        with pytest.raises(Unsupported, match="max_thread_blocks=4"):
            store.load(cache(), [0], KEYS[:1], options=CopyOptions(max_thread_blocks=4))


@pytest.mark.parametrize(
    "options",
    [{"max_gbps": 1.0}, {"cancellable": True}, {"detached": True}, {"check": "strict"}],
    ids=lambda options: next(iter(options)),
)
def test_options_that_a_store_does_not_keep_are_refused(options: dict[str, object]) -> None:
    with store_of() as store:
        for call in (store.save, store.load):
            with pytest.raises(InvalidTerms, match=f"got {next(iter(options))}"):
                call(cache(), [0], KEYS[:1], options=CopyOptions(**options))  # type: ignore[arg-type]


def test_options_and_by_layer_together_are_refused() -> None:
    with store_of() as store, pytest.raises(InvalidTerms, match="got options and by_layer"):
        store.load(cache(), [0], KEYS[:1], by_layer=True, options=CopyOptions())


def test_a_text_names_a_tier_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TIERS.targets, "acme", "portakv_examples.memory_tier:make")
    src = cache(fill=True)
    dst = cache()
    form = BlockForm.of(src, model="m")
    with BlockStore(form, staging=1 << 20, tiers=["acme:here"]) as store:
        store.save(src, [0, 1], KEYS[:2]).synchronize(LIMIT)
        store.load(dst, [2, 3], KEYS[:2]).synchronize(LIMIT)
    assert torch.equal(dst.tensors[:, 2:], src.tensors[:, :2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("disk", "NAME:PLACE, such as 'remote:s3://bucket/kv', got 'disk'"),
        ("disk:", "NAME:PLACE"),
        ("disk:/tmp/kv", "with its place alone, got 'disk' .missing a required argument: 'capac"),
        ("dsk:/tmp", "Did you mean 'disk'"),
        (":/tmp", "Expected"),
    ],
)
def test_a_text_that_names_no_tier_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidTerms, match=message):
        store_of(text)
