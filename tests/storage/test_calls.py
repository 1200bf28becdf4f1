# SPDX-License-Identifier: Apache-2.0
"""What calls of a block store answer and refuse, without a worker."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.core_cases import noise
from support.slot_cases import ended_well, forked
from support.storage_cases import FakeTier, key_of, rows_in_use, small_form
from support.waits import LIMIT

from portakv import InvalidTerms, KVView, LayoutError, StoreError
from portakv.storage import BlockForm, BlockStore
from portakv.storage.work import Graph

KEYS = [key_of(i) for i in range(8)]
LAYOUT = "layer | block kv token head dim"


def cache(heads: int = 2) -> KVView:
    tensors = [noise(12, 2, 4, heads, 32, dtype=torch.float16, seed=i) for i in range(4)]
    return KVView(tensors, LAYOUT)


def opened(form: BlockForm | None = None, host: int = 8, **terms: object) -> BlockStore:
    form = form or small_form()
    size = form.image_bytes
    return BlockStore(form, staging=16 * size, host=host * size, full="wait", **terms)  # type: ignore[arg-type]


def there(store: BlockStore, keys: list[bytes] = KEYS) -> list[bool]:
    return [store.has(key) for key in keys]


def test_in_the_host_tier() -> None:
    with opened(host=4) as store:
        assert not any(there(store))
        store.save(cache(), range(4), KEYS[:4], priority="urgent").synchronize(LIMIT)
        assert there(store) == 4 * [True] + 4 * [False]
        tasks = store.graph.number
        assert there(store) == 4 * [True] + 4 * [False]
        assert store.graph.number == tasks
        # It is no use of the block: the last one of the prompt goes first all the same.
        for _ in range(3):
            assert store.has(KEYS[3])
        store.save(cache(), [6], [KEYS[6]], priority="urgent").synchronize(LIMIT)
        assert there(store) == [True, True, True, False, False, False, True, False]


def test_in_tiers_as_far_as_is_known() -> None:
    near = FakeTier()
    far = FakeTier(tier="remote")
    for tier in (near, far):
        with opened(host=0, tiers=[tier]) as store:
            store.save(cache(), range(8), KEYS, priority="urgent").synchronize(LIMIT)
    with opened(host=0, tiers=[near]) as store:
        assert all(there(store))
    far.requested.clear()
    with opened(host=0, tiers=[far]) as store:
        assert not any(there(store))
        assert far.requested == []
        assert store.lookup(KEYS[:2]) == 2
        assert there(store)[:2] == [True, True]


def test_a_block_of_several_parts() -> None:
    tier = FakeTier()
    for n in range(2):
        half = replace(small_form(), heads=(n, n + 1, 2))
        with opened(half, host=0, tiers=[tier]) as store:
            some = 4 + 2 * n
            store.save(cache(heads=1), range(some), KEYS[:some]).synchronize(LIMIT)
    with opened(host=0, tiers=[tier]) as store:
        assert there(store) == 4 * [True] + 4 * [False]


@pytest.mark.parametrize("host", [0, 4])
def test_leading_blocks_are_those_of_has(host: int) -> None:
    """In the host tier and in another one, with a gap, in one form or in parts."""
    tier = FakeTier()
    many = [key_of(number) for number in range(100, 140)]
    for n in range(2):
        half = replace(small_form(), heads=(n, n + 1, 2))
        with opened(half, host=0, tiers=[tier]) as store:
            store.save(cache(heads=1), [0], many[20:21]).synchronize(LIMIT)
    with opened(host=host, tiers=[tier]) as store:
        for first in range(0, 20, 5):
            store.save(cache(), range(5), many[first : first + 5]).synchronize(LIMIT)
        for listed in (many, many[20:], many[15:], many[21:], []):
            there = next((n for n, key in enumerate(listed) if not store.has(key)), len(listed))
            assert store.leading(listed) == there
        assert store.leading(many) == 21
        tasks = store.graph.number
        assert store.leading(many) == 21
        assert store.graph.number == tasks


def test_what_is_refused() -> None:
    with opened() as store:
        store.save(cache(), [0], [b"k" * 16], priority="urgent").synchronize(LIMIT)
        assert store.has(b"k" * 16)
        for wrong in (b"short", b"k" * 33, "k" * 16, None):
            with pytest.raises(InvalidTerms):
                store.has(wrong)  # type: ignore[arg-type]
        with pytest.raises(InvalidTerms):
            store.leading([KEYS[0], "k" * 32])  # type: ignore[list-item]
    with pytest.raises(StoreError, match="closed"):
        store.has(KEYS[0])
    with pytest.raises(StoreError, match="closed"):
        store.leading(KEYS)


def test_memory_that_was_replaced_is_refused_by_a_later_call() -> None:
    """The call refuses it, and no worker, although the copy was possible before."""
    view = KVView([each.clone() for each in cache().tensors], LAYOUT)
    with opened() as store:
        for _ in range(2):
            store.save(view, range(8), KEYS, priority="urgent").synchronize(LIMIT)
            store.load(view, range(8), [*KEYS[:7], key_of(9)], missing="skip").synchronize(LIMIT)
        view.tensors[1].untyped_storage().resize_(0)
        tasks = store.graph.number
        with pytest.raises(LayoutError, match="replaced"):
            store.save(view, range(8), KEYS)
        with pytest.raises(LayoutError, match="replaced"):
            store.load(view, range(8), [*KEYS[:7], key_of(9)], missing="skip")
        assert store.graph.number == tasks
        assert not rows_in_use(store.rows)


def test_a_list_that_changes_after_the_call_changes_nothing() -> None:
    """Workers read the ids of the call."""
    view = cache()
    target = KVView([torch.zeros_like(each) for each in view.tensors], LAYOUT)
    tier = FakeTier()
    with opened(host=0, tiers=[tier]) as store:
        for _ in range(5):
            tier.blocks.clear()
            ids = np.arange(8)
            saved = store.save(view, ids, KEYS, priority="urgent")
            ids[:] = 11
            saved.synchronize(LIMIT)
            ids = np.arange(8)
            loaded = store.load(target, ids, KEYS)
            ids[:] = 11
            loaded.synchronize(LIMIT)
            for one, other in zip(view.tensors, target.tensors, strict=True):
                assert torch.equal(one[:8].view(torch.int16), other[:8].view(torch.int16))
                assert not other[8:].any()
                other.zero_()


def test_a_closed_store_says_that_it_was_closed() -> None:
    store = opened()
    store.close()
    said = r"^Expected an open store for a lookup, got one that was closed\. Make another\.$"
    with pytest.raises(StoreError, match=said):
        store.lookup(KEYS)
    with pytest.raises(StoreError, match=r"open store for a with block, .* closed\."), store:
        pytest.fail("it was entered")


def test_a_store_whose_graph_was_closed_says_so() -> None:
    graph = Graph()
    with opened(graph=graph, tiers=[FakeTier()]) as store:
        graph.close()
        with pytest.raises(StoreError, match=r"got one whose graph was closed\. Make another"):
            store.lookup(KEYS)


def test_a_store_of_another_process_says_so() -> None:
    """It is not closed: the process that made it uses it."""
    with opened() as store:

        def child() -> None:
            said = r"got one of the process that this one was forked from\. Make another"
            with pytest.raises(StoreError, match=said):
                store.has(KEYS[0])

        assert ended_well(forked(child))
        assert not store.has(KEYS[0])


def test_a_store_of_one_form_has_no_name_for_it() -> None:
    with opened() as store:
        assert store.of("").form == store.form
        said = r"Expected name to be '' for a store of one form without a name, got 'x'\. Save"
        with pytest.raises(InvalidTerms, match=said):
            store.of("x")
