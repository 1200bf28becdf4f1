# SPDX-License-Identifier: Apache-2.0
"""Saves make headers and checksums for tiers alone, and rows of the host tier do without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.core_cases import noise
from support.lent_copies import Hands
from support.storage_cases import FakeTier, key_of, small_form
from support.waits import LIMIT

from portakv import KVView
from portakv.storage import BlockForm, BlockStore, image
from portakv.storage.eviction import FIRST, mark_of

FORM = small_form()
OTHER = small_form(notes="another group of layers")
SIZE = FORM.image_bytes
KEYS = [key_of(i) for i in range(8)]
#: Bytes of rows before a save: no header, mark or checksum that is right.
GARBAGE = 0xEE


def cache(seed: int = 0) -> KVView:
    tensors = [noise(8, 2, 4, 2, 32, dtype=torch.float16, seed=seed + i) for i in range(4)]
    return KVView(tensors, "layer | block kv token head dim")


def opened(forms: Any = FORM, host: int = 8, **terms: Any) -> BlockStore:
    store = BlockStore(forms, staging=16 * SIZE, host=host * SIZE, **terms)
    store.rows.tensor.fill_(GARBAGE)
    return store


def equal(store: Any, keys: Sequence[bytes], seed: int) -> bool:
    """Return True if the blocks of keys come back with the bytes that were saved."""
    target = cache(500)
    store.load(target, range(len(keys)), keys).synchronize(LIMIT)
    some = slice(0, len(keys))
    pairs = [
        (a[some].view(torch.int16), b[some].view(torch.int16))
        for a, b in zip(target.tensors, cache(seed).tensors, strict=True)
    ]
    return all(torch.equal(a, b) for a, b in pairs)


def save(store: Any, keys: Sequence[bytes], seed: int, how: str = "view") -> None:
    """Save the first blocks of a cache, or lend their copies."""
    if how == "view":
        saved = store.save(cache(seed), range(len(keys)), keys)
    else:
        saved = store.save_lent(Hands(store, cache(seed), range(len(keys))), keys)
    saved.synchronize(LIMIT)


def headers(store: BlockStore) -> list[bytes]:
    """Return the first pages of all rows."""
    return [row[: image.HEADER].tobytes() for row in store.rows.array]


@pytest.mark.parametrize("how", ["view", "lent"])
def test_a_save_that_no_tier_stores_writes_no_header(how: str) -> None:
    with opened() as store:
        save(store, KEYS, 0, how)
        assert {*headers(store)} == {bytes([GARBAGE]) * image.HEADER}
        assert equal(store, KEYS, 0)


@pytest.mark.parametrize("how", ["view", "lent"])
def test_a_save_that_a_tier_stores_makes_images(how: str) -> None:
    """The control of the test above: a reader of the tier verifies them."""
    tier = FakeTier()
    with opened(tiers=[tier]) as store:
        save(store, KEYS, 0, how)
        assert check(tier, FORM) == KEYS
        assert sum(header[0] != GARBAGE for header in headers(store)) == 8


def check(tier: FakeTier, form: BlockForm) -> list[bytes]:
    """Return the keys of a form's images in a tier, all of which are right."""
    keys = list[bytes]()
    marks = dict[bytes, int]()
    for (stored, key), data in tier.blocks.items():
        if stored != form:
            continue
        row = torch.frombuffer(bytearray(data), dtype=torch.uint8).numpy()
        header = image.header(row, form)
        assert isinstance(header, image.Header), header
        assert header.key == key
        assert image.verify(row, form, header.checksums, header.generation)
        marks[key] = image.predecessor(row)
        keys.append(key)
    keys.sort()
    assert [marks[key] for key in keys] == [FIRST, *(mark_of(key) for key in keys[:-1])]
    return keys


@pytest.mark.parametrize("how", ["view", "lent"])
@pytest.mark.parametrize("tiers", [0, 1])
def test_rows_go_in_the_order_of_their_chains(how: str, tiers: int) -> None:
    """The mark of a predecessor does not come from a header that no save wrote."""
    with opened(tiers=[FakeTier() for _ in range(tiers)]) as store:
        save(store, KEYS, 0, how)
        names = [FORM.digest + key for key in KEYS]
        store.rows.touch(names[::-1])  # by use alone, the first block would go first
        for number in range(3):
            save(store, [key_of(50 + number)], 9, how)
            left = 7 - number
            there = [store.rows.has(name) for name in names]
            assert there == [i < left for i in range(8)]


class OneForm(FakeTier):
    """A tier that stores the blocks of the first form alone."""

    def open(self, graph: Any, rows: Any, forms: Any, own: int = 1) -> Any:
        return super().open(graph, rows, forms[:1], 1)


def test_forms_of_which_a_tier_stores_one() -> None:
    """Rows serve both forms in turns: the images of the one are right, and so is every block."""
    tier = OneForm()
    with opened({"stored": FORM, "cached": OTHER}, host=10, tiers=[tier]) as store:
        for turn in range(6):
            for name, seed in (("stored", 0), ("cached", 100)):
                keys = [key_of(100 * turn + i) for i in range(4)]
                save(store.of(name), keys, seed + turn)
                assert equal(store.of(name), keys, seed + turn)
        for turn in range(6):
            part = FakeTier()
            keys = [key_of(100 * turn + i) for i in range(4)]
            part.blocks = {(form, key): x for (form, key), x in tier.blocks.items() if key in keys}
            assert check(part, FORM) == keys
            assert equal(store.of("stored"), keys, turn)
        assert not any(form == OTHER for form, _ in tier.blocks)


def test_a_tier_that_already_has_a_block_and_one_that_lacks_it() -> None:
    """The second save reads the caller's blocks again, and not rows without checksums."""
    first = FakeTier()
    second = FakeTier("other")
    with opened(tiers=[first, second]) as store:
        save(store, KEYS[:4], 0)
        for key in KEYS[:4]:
            del second.blocks[FORM, key]
        save(store, KEYS[:4], 0)
        assert check(second, FORM) == KEYS[:4]
        assert check(first, FORM) == KEYS[:4]
