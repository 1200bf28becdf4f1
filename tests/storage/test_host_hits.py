# SPDX-License-Identifier: Apache-2.0
"""Loads of blocks that the host tier has: the caller's thread issues the copy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from support.core_cases import noise
from support.device_cases import current, delay
from support.storage_cases import FakeTier, key_of, rows_in_use, small_form
from support.waits import LIMIT

from portakv import BackendUnavailable, CopyOptions, KVView, StoreError, TransferError
from portakv.errors import TransferCancelled, TransferTimeout
from portakv.storage import BlockStore, memory
from portakv.storage import memory as rows_module
from portakv.storage.memory import Loan, Rows
from portakv.storage.work import Graph

FORM = small_form()
SIZE = FORM.image_bytes
KEYS = [key_of(i) for i in range(8)]
LAYOUT = "layer | block kv token head dim"


def cache(seed: int, device: torch.device | str = "cpu") -> KVView:
    shape = (12, 2, 4, 2, 32)
    tensors = [noise(*shape, dtype=torch.float16, seed=seed + i) for i in range(4)]
    return KVView([each.to(device) for each in tensors], LAYOUT)


def bytes_of(view: KVView, blocks: Any) -> list[torch.Tensor]:
    return [each[list(blocks)].cpu().view(torch.uint8) for each in view.tensors]


def same(one: KVView, blocks: Any, other: KVView, other_blocks: Any) -> bool:
    pairs = zip(bytes_of(one, blocks), bytes_of(other, other_blocks), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


SOURCE = cache(0)


def stored(host: int = 8, blocks: int = 8, **terms: Any) -> BlockStore:
    """Return a store whose host tier has the first blocks of `SOURCE`."""
    store = BlockStore(FORM, staging=16 * SIZE, host=host * SIZE, full="wait", **terms)
    store.save(SOURCE, range(blocks), KEYS[:blocks], priority="urgent").synchronize(LIMIT)
    return store


def hits(store: BlockStore) -> int:
    counted = store.statistics()["tier_blocks_total"]
    return sum(x["value"] for x in counted if (x["tier"], x["result"]) == ("host", "hit"))


def test_no_worker_moves_a_block() -> None:
    target = cache(50)
    with stored() as store:
        tasks = store.graph.number
        handle = store.load(target, range(1, 9), KEYS)
        assert store.graph.number == tasks
        assert handle.done()
        handle.wait()
        assert handle.landed.all()
        assert len(handle.landed) == 8
        assert not handle.cancel()
        assert same(SOURCE, range(8), target, range(1, 9))
        assert same(target, [0, 9, 10, 11], cache(50), [0, 9, 10, 11])
        assert hits(store) == 8
        assert not rows_in_use(store.rows)


def test_the_others_come_from_tiers_under_the_same_handle() -> None:
    target = cache(50)
    tier = FakeTier()
    with stored(host=3, tiers=[tier]) as store:
        in_rows = [store.rows.has(FORM.digest + key) for key in KEYS]
        assert sum(in_rows) == 3
        tier.reads.clear()
        handle = store.load(target, range(8), KEYS)
        handle.synchronize(LIMIT)
        assert handle.landed.all()
        assert same(SOURCE, range(8), target, range(8))
        assert len(tier.reads) == 5
        assert hits(store) == 3


def test_a_block_that_is_nowhere_does_not_land() -> None:
    target = cache(50)
    keys = [KEYS[0], key_of(99), KEYS[2]]
    with stored() as store:
        handle = store.load(target, [4, 5, 6], keys, missing="skip")
        handle.synchronize(LIMIT)
        assert handle.landed.tolist() == [True, False, True]
        assert same(SOURCE, [0, 2], target, [4, 6])
        assert same(target, [5], cache(50), [5])
        with pytest.raises(TransferError, match="2 of 3 blocks landed"):
            store.load(target, [4, 5, 6], keys).synchronize(LIMIT)


def test_the_blocks_count_as_used() -> None:
    """The least recently used block loses its row."""
    with stored(host=4, blocks=4) as store:
        store.load(cache(50), [0, 1], [KEYS[0], KEYS[1]]).synchronize(LIMIT)
        store.save(SOURCE, [6], [KEYS[6]], priority="urgent").synchronize(LIMIT)
        assert [store.rows.has(FORM.digest + key) for key in KEYS[:4]] == [True, True, True, False]


@pytest.fixture
def host_and_tier() -> Iterator[Callable[[], Any]]:
    """Return a maker of a store that has three blocks in the host tier and all in another one."""
    stores: list[BlockStore] = []

    def make() -> tuple[BlockStore, FakeTier]:
        tier = FakeTier()
        stores.append(stored(host=3, tiers=[tier]))
        return stores[-1], tier

    yield make
    for store in stores:
        store.close(LIMIT)


def test_a_load_between_the_choice_and_the_eviction_keeps_its_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever evicts a key looks for loans after it took the key from its row."""
    with stored(host=4, blocks=4) as store:
        names = [FORM.digest + key for key in KEYS[:4]]
        choose = Rows.next
        lent: list[Loan] = []
        asked = []

        def chosen(rows: Rows, group: Any = None) -> bytes | None:
            key = choose(rows, group)
            asked.append(key)
            if len(asked) == 2:  # the first question is not for an eviction
                lent.append(store.rows.borrow(names, store))
            return key

        monkeypatch.setattr(Rows, "next", chosen)
        with suppress(TransferError):  # there is no other tier
            store.save(SOURCE, [6], [KEYS[6]], priority="urgent").synchronize(LIMIT)
        assert asked[1] in names
        assert [store.rows.index.get(name) for name in names] == lent[0].rows
        lent[0].cancel()


def test_loads_that_find_no_row_leave_nothing() -> None:
    with stored() as store:
        for number in range(5):
            keys = [key_of(200 + number), key_of(300 + number)]
            store.load(cache(50), [1, 2], keys, missing="skip").synchronize(LIMIT)
            assert store.rows.loans() <= 1


def test_layers_end_one_by_one() -> None:
    target = cache(50)
    with stored() as store:
        tasks = store.graph.number
        handle = store.load(target, range(8), KEYS, by_layer=True)
        assert store.graph.number == tasks
        assert len(handle.layers) == 4
        for layer in handle.layers:
            layer.wait()
            assert layer.done()
            assert layer.landed.tolist() == 8 * [True]
        handle.synchronize(LIMIT)
        assert same(SOURCE, range(8), target, range(8))


def test_a_cancel_leaves_the_blocks_of_the_host_tier(host_and_tier: Callable[[], Any]) -> None:
    """Workers move no further block; the copy that was issued is there."""
    target = cache(50)
    store, tier = host_and_tier()
    go = threading.Event()
    tier.faults = {key: [partial(go.wait, LIMIT)] for key in KEYS[3:]}
    handle = store.load(target, range(8), KEYS, missing="skip")
    in_rows = [store.rows.has(FORM.digest + key) for key in KEYS]
    assert handle.cancel()
    go.set()
    with pytest.raises(TransferCancelled):
        handle.synchronize(LIMIT)
    assert (handle.landed & in_rows).tolist() == in_rows
    assert not handle.landed.all()


@pytest.mark.parametrize("how", ["long", "limited", "layers of some"])
def test_workers_move_the_blocks(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long copy on the host, one at a limited rate, and one by layer of blocks that lie in
    several places."""
    terms: dict[str, Any] = {}
    if how == "long":
        monkeypatch.setattr(rows_module, "SHORT_COPY", 8 * FORM.payload_bytes - 1)
    if how == "limited":
        graph = Graph()
        graph.queue("host-device", width=2, max_gbps=10.0)
        terms = {"graph": graph}
    if how == "layers of some":
        terms = {"host": 5, "tiers": [FakeTier()]}
    target = cache(50)
    with stored(**terms) as store:
        tasks = store.graph.number
        handle = store.load(target, range(8), KEYS, by_layer=how == "layers of some")
        assert store.graph.number > tasks
        handle.synchronize(LIMIT)
        assert same(SOURCE, range(8), target, range(8))
        assert hits(store) == terms.get("host", 8)


def test_a_load_that_is_refused_keeps_no_row() -> None:
    target = cache(50)
    with stored() as store:
        with pytest.raises(BackendUnavailable) as refused:  # kept, and its frames with it
            store.load(target, range(8), KEYS, options=CopyOptions(backend="triton"))
        assert not rows_in_use(store.rows)
        del refused
        assert not hits(store)
        assert same(target, range(12), cache(50), range(12))
    with pytest.raises(StoreError, match="closed"):
        store.load(target, range(8), KEYS)


def warmed(device: torch.device) -> BlockStore:
    """Return `stored()` after loads that build what the loads of a test need, on an idle device."""
    store = stored()
    for by_layer in (False, True):
        store.load(cache(60, device), range(8), KEYS, by_layer=by_layer).synchronize(LIMIT)
    torch.accelerator.synchronize(device)
    return store


class TestsOnADevice:
    def test_the_stream_waits_and_the_host_does_not(self, accelerator: torch.device) -> None:
        target = cache(50, accelerator)
        torch.accelerator.synchronize(accelerator)
        with warmed(accelerator) as store:
            delay(current(accelerator))
            handle = store.load(target, range(8), KEYS)
            assert not handle.done()
            assert not handle.landed.any()
            handle.wait()
            copies = [each.clone() for each in target.tensors]  # ordered after the load
            assert handle.landed.tolist() == 8 * [True]  # for work on this stream
            assert not handle.done()
            assert rows_in_use(store.rows) == 8
            handle.synchronize(LIMIT)
            assert handle.landed.all()
            assert same(SOURCE, range(8), KVView(copies, LAYOUT), range(8))
            assert not rows_in_use(store.rows)

    @pytest.mark.parametrize("kind", [list, tuple, range, torch.tensor, np.array])
    def test_blocks_are_ids_of_one_call(
        self, accelerator: torch.device, monkeypatch: pytest.MonkeyPatch, kind: Any
    ) -> None:
        """Ids of an index that is kept are sent by a plain copy, which may wait for the stream."""
        target = cache(50, accelerator)
        blocks = range(8) if kind is range else kind([*range(8)])
        kept = list[bool]()
        copy = rows_module.copy_checked

        def noted(src: KVView, dst: KVView, rows: Any, ids: Any, *terms: Any) -> Any:
            kept.extend(not each.temporary for each in (rows, ids))
            return copy(src, dst, rows, ids, *terms)

        with warmed(accelerator) as store:
            monkeypatch.setattr(rows_module, "copy_checked", noted)
            store.load(target, blocks, KEYS).synchronize(LIMIT)
            others = [key_of(50 + i) for i in range(8)]
            with suppress(TransferError):  # there is no other tier
                store.save(target, blocks, others).synchronize(LIMIT)
        assert len(kept) >= 4
        assert not any(kept)

    def test_layers_on_a_stream(self, accelerator: torch.device) -> None:
        target = cache(50, accelerator)
        torch.accelerator.synchronize(accelerator)
        with warmed(accelerator) as store:
            delay(current(accelerator))
            handle = store.load(target, range(8), KEYS, by_layer=True)
            assert not handle.layers[0].done()
            copies = []
            for layer, tensor in zip(handle.layers, target.tensors, strict=True):
                layer.wait()
                copies.append(tensor.clone())
            handle.synchronize(LIMIT)
            assert same(SOURCE, range(8), KVView(copies, LAYOUT), range(8))
            assert not rows_in_use(store.rows)

    def test_close_waits_for_the_copy(self, accelerator: torch.device) -> None:
        target = cache(50, accelerator)
        torch.accelerator.synchronize(accelerator)
        store = warmed(accelerator)
        delay(current(accelerator))
        handle = store.load(target, range(8), KEYS)
        with pytest.raises(TransferTimeout, match="1 transfers had not ended"):
            store.close(0.0)
        assert not handle.done()
        store.close(LIMIT)
        assert handle.done()

    @pytest.mark.parametrize("begun", [True, False])
    def test_an_interrupt_inside_the_copy_keeps_the_rows(
        self, accelerator: torch.device, begun: bool
    ) -> None:
        """An interrupt may come before the end of a copy is recorded."""

        class Caller:
            """Stands for a call."""

        with warmed(accelerator) as store:
            caller = Caller()
            loan = store.rows.borrow([FORM.digest + key for key in KEYS], caller)
            assert rows_in_use(store.rows) == 8
            loan.stream = current(accelerator) if begun else None
            delay(current(accelerator))
            del caller
            assert rows_in_use(store.rows) == 8 * begun
            torch.accelerator.synchronize(accelerator)
            assert rows_in_use(store.rows) == 0

    @pytest.mark.parametrize("keep", [True, False])
    def test_rows_stay_until_the_end_of_the_copy(
        self, accelerator: torch.device, keep: bool
    ) -> None:
        self._others_are_saved_meanwhile(accelerator, keep)

    def test_without_loans_wrong_bytes_land(
        self, accelerator: torch.device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Loan, "ended", lambda loan: True)
        with pytest.raises(AssertionError, match="wrong bytes"):
            self._others_are_saved_meanwhile(accelerator, True)

    def _others_are_saved_meanwhile(self, device: torch.device, keep: bool) -> None:
        """Save other blocks while a load is under way, and judge the load's bytes."""
        target = cache(50, device)
        torch.accelerator.synchronize(device)
        with warmed(device) as store:
            delay(current(device))
            handle: Any = store.load(target, range(8), KEYS)
            handle = handle if keep else None
            for first in range(20, 60, 8):  # more than there are rows
                others = [key_of(first + i) for i in range(8)]
                saved = store.save(cache(90), range(8), others, priority="urgent")
                with suppress(TransferError):  # there is no other tier
                    saved.synchronize(LIMIT)
            torch.accelerator.synchronize(device)
            assert same(SOURCE, range(8), target, range(8)), "wrong bytes"
            del handle
            assert not rows_in_use(store.rows)


@pytest.mark.gpu
def test_a_question_about_a_loan_ends_no_capture() -> None:
    assert _captured_beside_a_question() == 1


@pytest.mark.gpu
def test_an_unguarded_question_ends_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "ignoring_captures", nullcontext)
    with pytest.raises(RuntimeError, match="captur"):
        _captured_beside_a_question()


def _captured_beside_a_question() -> int:
    """Capture an addition while another thread asks whether a load has ended; replay it."""
    device = torch.device("cuda", 0)
    target = cache(50, device)
    marker = torch.zeros(1, device=device)
    with warmed(device) as store:
        delay(current(device))
        handle = store.load(target, range(8), KEYS)
        graph = torch.cuda.CUDAGraph()
        errors: list[BaseException] = []

        def ask() -> None:
            try:
                rows_in_use(store.rows)
            except BaseException as error:
                errors.append(error)

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            graph.capture_begin()
            marker.add_(1)
            thread = threading.Thread(target=ask)
            thread.start()
            thread.join()
            graph.capture_end()
        assert not errors
        handle.synchronize(LIMIT)
        graph.replay()
        torch.cuda.synchronize()
        return int(marker.item())
