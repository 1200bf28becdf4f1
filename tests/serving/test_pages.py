# SPDX-License-Identifier: Apache-2.0
"""Pages of an engine's host memory in the stores of PortaKV."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.faulty_io import VARIABLE, set_fault
from support.waits import LIMIT, until

from portakv.errors import InvalidTerms, StoreBusy, StoreError
from portakv.serving import PageJob, PageSize, PageStore, StoreTerms, page_key
from portakv.tasks import runtime

SIZE = 8192
SLOTS = 16


def terms_of(folder: Path | None, host: int = 0) -> StoreTerms:
    place = None if folder is None else str(folder)
    return StoreTerms(folder=place, host=host, staging=1 << 20, capacity=16 << 20)


def memory(seed: int, slots: int = SLOTS, width: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (slots, width), np.uint8)


def keys_of(count: int, length: int = 36) -> list[bytes]:
    return [bytes([number]) * length for number in range(1, count + 1)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PageStore]:
    with PageStore(terms_of(tmp_path / "kv"), "m", [SIZE]) as made:
        yield made


def saved(store: PageStore, keys: list[bytes], bytes_of: np.ndarray) -> PageJob:
    pages = store.pages(SIZE)
    job = pages.save(keys, pages.over(bytes_of))
    assert job.wait(LIMIT)
    return job


@pytest.mark.parametrize("length", [1, 16, 31, 32, 33, 36, 500])
def test_keys_of_any_length(length: int, store: PageStore) -> None:
    given = memory(1)
    keys = keys_of(SLOTS, length)
    assert saved(store, keys, given).landed.all()
    pages = store.pages(SIZE)
    assert pages.holds(keys).all()
    assert pages.has(keys[0])
    assert not pages.has(keys[0] + b"\0")
    got = np.zeros_like(given)
    job = pages.load(keys, pages.over(got))
    assert job.wait(LIMIT)
    assert job.landed.all()
    assert (got == given).all()


def test_keys_that_differ_by_zeros_name_different_pages() -> None:
    assert len({page_key(b"a" * count) for count in range(40)}) == 40
    assert page_key(b"k" * 16) != page_key(b"k" * 16 + b"\0" * 16)


@pytest.mark.parametrize("kind", ["memoryview", "array", "tensor", "bf16"])
def test_memory_of_any_kind_is_used_in_place(kind: str, store: PageStore) -> None:
    given = memory(2)
    keys = keys_of(3)
    saved(store, keys, given[:3])
    pages = store.pages(SIZE)
    array = np.zeros((SLOTS, SIZE + 64), np.uint8)  # rows with a gap behind them
    view: object = array
    if kind == "memoryview":
        view = array.data
    elif kind == "tensor":
        view = torch.from_numpy(array)
    elif kind == "bf16":
        view = torch.from_numpy(array).view(torch.bfloat16)
    job = pages.load(keys, pages.over(view), [7, 0, 3])
    assert job.wait(LIMIT)
    assert (array[[7, 0, 3], :SIZE] == given[:3]).all()
    assert not array[:, SIZE:].any()
    assert not array[[1, 2, 4, 5, 6]].any()


def test_addresses_of_runs_are_used_in_place(tmp_path: Path) -> None:
    given = memory(3, 2 * SLOTS, SIZE // 2)
    got = np.zeros_like(given)
    keys = keys_of(5)
    # The run r of page p is row r * SLOTS + p, as in memory that lies layer by layer.
    rows = np.arange(5)[:, None] + np.array([0, SLOTS])
    with PageStore(terms_of(tmp_path / "kv"), "m", [PageSize(SIZE, 2)]) as store:
        pages = store.pages(SIZE, 2)
        at = [given.ctypes.data + rows * (SIZE // 2), got.ctypes.data + rows * (SIZE // 2)]
        assert pages.save(keys, pages.at(at[0])).wait(LIMIT)
        assert pages.load(keys, pages.at(at[1])).wait(LIMIT)
        with pytest.raises(InvalidTerms, match="at\\(\\)"):
            pages.over(given)
    assert (got[rows] == given[rows]).all()
    others = np.setdiff1d(np.arange(2 * SLOTS), rows)
    assert not got[others].any()


def test_pages_outlive_the_process_and_other_models_do_not_find_them(tmp_path: Path) -> None:
    given = memory(4)
    keys = keys_of(SLOTS)
    with PageStore(terms_of(tmp_path / "kv"), "m", [SIZE], identity="tp 2") as store:
        saved(store, keys, given)
    for model, identity, there in (("m", "tp 2", True), ("n", "tp 2", False), ("m", "", False)):
        with PageStore(terms_of(tmp_path / "kv"), model, [SIZE], identity=identity) as store:
            assert store.pages(SIZE).holds(keys).all() == there
            assert any(pages.has(keys[0]) for pages in store.every()) == there


def test_a_page_that_is_not_there_is_not_written(store: PageStore) -> None:
    given = memory(5)
    keys = keys_of(4)
    saved(store, keys[:2], given[:2])
    pages = store.pages(SIZE)
    got = np.full((4, SIZE), 7, np.uint8)
    job = pages.load(keys, pages.over(got))
    assert job.wait(LIMIT)
    assert job.landed.tolist() == [True, True, False, False]
    assert (got[:2] == given[:2]).all()
    assert (got[2:] == 7).all()


def test_the_end_of_a_job_wakes_a_thread_and_a_coroutine(store: PageStore) -> None:
    pages = store.pages(SIZE)
    given = memory(6)  # a view retains nothing
    view = pages.over(given)
    save = pages.save(keys_of(SLOTS), view, tag="save")

    async def follow() -> None:
        await save

    runtime().start(follow()).synchronize(LIMIT)
    assert save.done()
    load = pages.load(keys_of(SLOTS), view, tag="load")
    assert load.wait(LIMIT)
    assert load.done()
    assert load.seconds > 0
    assert (save.tag, load.tag) == ("save", "load")


def test_a_new_size_keeps_the_pages_of_the_disk(store: PageStore) -> None:
    given = memory(7)
    keys = keys_of(SLOTS)
    saved(store, keys, given)
    small = store.pages(512)
    assert small.holds(keys).tolist() == [False] * SLOTS
    view = small.over(given)
    assert small.save(keys, view).wait(LIMIT)
    assert store.pages(SIZE).holds(keys).all()
    assert small.holds(keys).all()
    assert {pages.size for pages in store.every()} == {PageSize(SIZE), PageSize(512)}
    assert store.usage().used == SLOTS * (store.pages(SIZE).form.image_bytes + 8192)


def test_a_closed_store_finds_nothing_and_its_jobs_have_ended(tmp_path: Path) -> None:
    store = PageStore(terms_of(tmp_path / "kv"), "m", [SIZE])
    pages = store.pages(SIZE)
    given = memory(8)
    view = pages.over(given)
    keys = keys_of(SLOTS)
    saved(store, keys, memory(8))
    store.close()
    assert not pages.has(keys[0])
    assert not pages.holds(keys).any()
    jobs = [pages.save(keys, view), pages.load(keys, view)]
    assert not any(job.landed.any() for job in jobs)
    assert all(job.done() for job in jobs)
    pages.touch(keys)
    store.close()


def test_what_was_stored_is_reported(store: PageStore) -> None:
    assert store.changes() == []
    keys = keys_of(3)
    saved(store, keys, memory(9, 3))
    changes = store.changes()
    assert {change.key for change in changes if change.stored} == {page_key(key) for key in keys}


def test_the_host_tier_alone(tmp_path: Path) -> None:
    given = memory(10)
    keys = keys_of(SLOTS)
    with PageStore(terms_of(None, 1 << 20), "m", [SIZE]) as store:
        saved(store, keys, given)
        pages = store.pages(SIZE)
        got = np.zeros_like(given)
        assert pages.load(keys, pages.over(got)).wait(LIMIT)
        assert (got == given).all()
        assert store.usage().capacity == 1 << 20
        assert store.usage().used >= SLOTS * SIZE


def test_wrong_arguments_are_named(store: PageStore, tmp_path: Path) -> None:
    pages = store.pages(SIZE)
    given = memory(1)
    view = pages.over(given)
    for wrong in (b"x", np.zeros((2, SIZE - 1), np.uint8), np.zeros(SIZE, np.uint8), None):
        with pytest.raises(InvalidTerms, match="memory"):
            pages.over(wrong)
    fixed = memory(1)
    fixed.flags.writeable = False
    with pytest.raises(InvalidTerms, match="memory"):
        pages.over(fixed)
    with pytest.raises(InvalidTerms, match="keys"):
        pages.save(["text"], view)  # type: ignore[list-item]
    with pytest.raises(InvalidTerms, match="keys"):
        pages.load([b"a", b"a"], view, [0, 1])
    with pytest.raises(InvalidTerms, match="addresses"):
        pages.at("text")  # type: ignore[arg-type]
    with pytest.raises(InvalidTerms, match="nbytes"):
        PageSize(10, 3).form("m")
    with pytest.raises(StoreBusy, match="another"):
        PageStore(terms_of(tmp_path / "kv"), "m", [SIZE], patience=0.0)
    with pytest.raises(InvalidTerms, match="Expected encoding to be None"):
        PageStore(replace(terms_of(tmp_path / "packed"), encoding="pack"), "m")


@pytest.mark.parametrize("host", [0, 1 << 20], ids=["disk", "host"])
def test_pinned_pages_are_not_evicted(host: int, tmp_path: Path) -> None:
    """Without pins the same saves evict them."""
    image = PageSize(SIZE).form("m").image_bytes
    for pins in (True, False):
        folder = None if host else str(tmp_path / f"kv {pins}")
        terms = StoreTerms(folder, 8 * image, 8 * image if host else 0, staging=64 * image)
        with PageStore(terms, "m", [SIZE]) as store:
            pages = store.pages(SIZE)
            keys = keys_of(40)
            given = memory(11, 40)
            view = pages.over(given)
            assert pages.save(keys[:4], view, range(4)).wait(LIMIT)
            pinned = pages.pin([*keys[:4], b"elsewhere"])
            assert pinned.held.tolist() == [True] * 4 + [False]
            if not pins:
                pinned.release()
            for first in range(4, 40, 4):
                assert pages.save(keys[first : first + 4], view, range(first, first + 4)).wait(
                    LIMIT
                )
            assert pages.holds(keys[:4]).all() == pins
            pinned.release()
            pinned.release()
            for first in range(4, 40, 4):
                assert pages.save(keys[first : first + 4], view, range(first, first + 4)).wait(
                    LIMIT
                )
            assert not pages.holds(keys[:4]).any()


@pytest.mark.parametrize("host", [0, 1 << 20], ids=["disk", "host"])
def test_deleted_pages_are_gone_for_good(host: int, tmp_path: Path) -> None:
    keys = keys_of(4)
    with PageStore(terms_of(tmp_path / "kv", host), "m", [SIZE]) as store:
        saved(store, keys, memory(12, 4))
        store.changes()
        pages = store.pages(SIZE)
        gone = pages.delete([keys[0], keys[2], b"elsewhere"])
        assert gone.tolist() == [True, True, False]
        assert pages.holds(keys).tolist() == [False, True, False, True]
        why = {change.why for change in store.changes()}
        assert "deleted" in why
        given = memory(13, 1)
        assert pages.save([keys[0]], pages.over(given)).wait(LIMIT)
        assert pages.has(keys[0])
    with PageStore(terms_of(tmp_path / "kv", host), "m", [SIZE]) as store:
        assert store.pages(SIZE).holds(keys).tolist() == [True, True, False, True]


def test_pages_of_sizes_that_are_not_open_are_removed_too(tmp_path: Path) -> None:
    """Those of another model and of another identity stay."""
    terms = terms_of(tmp_path / "kv")
    keys = keys_of(2)
    for model, identity, size in (("m", "", 4096), ("m", "other", 4096), ("n", "", 4096)):
        with PageStore(terms, model, [size], identity=identity) as other:
            pages = other.pages(size)
            given = memory(14, 2, size)
            assert pages.save(keys, pages.over(given)).wait(LIMIT)
    with PageStore(terms, "m", [SIZE]) as store:
        saved(store, keys, memory(15, 2))
        assert store.clear()
        assert not any(pages.has(keys[0]) for pages in store.every())
        assert not store.pages(4096).holds(keys).any()
    for model, identity in (("m", "other"), ("n", "")):
        with PageStore(terms, model, [4096], identity=identity) as other:
            assert other.pages(4096).holds(keys).all()


def test_a_folder_that_cannot_be_emptied_is_used_again(store: PageStore, tmp_path: Path) -> None:
    pages = store.pages(SIZE)
    saved(store, keys_of(1), memory(1, 1))
    (form,) = (each for each in (tmp_path / "kv").iterdir() if each.is_dir())
    form.rename(tmp_path / "away")
    with pytest.raises(StoreError):
        store.clear()
    given = memory(2, 1)
    job = pages.save(keys_of(1), pages.over(given))
    assert job.wait(LIMIT)
    assert job.landed.all()


def test_a_save_that_a_disk_holds_ends_at_its_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pages may be used again, and those that the disk takes later are whole."""
    fault = tmp_path / "fault"
    set_fault(fault, "")
    monkeypatch.setenv(VARIABLE, str(fault))
    monkeypatch.setenv("PORTAKV_IO", "support.faulty_io:Faulty")
    given = memory(7)
    held = given.copy()
    keys = keys_of(SLOTS)
    with PageStore(terms_of(tmp_path / "kv"), "m", [SIZE]) as store:
        set_fault(fault, "write hang")
        pages = store.pages(SIZE)
        job = pages.save(keys, pages.over(held), deadline=0.2)
        assert until(job.done, LIMIT)
        assert job.given_up
        assert job.wait()
        assert not job.landed.any()
        assert job.seconds > 0
        held[:] = 0
        set_fault(fault, "")
        assert until(lambda: bool(pages.holds(keys).all()), LIMIT)
        assert not job.landed.any()
        got = np.zeros_like(given)
        load = pages.load(keys, pages.over(got))
        assert load.wait(LIMIT)
        assert load.landed.all()
        assert (got == given).all()
