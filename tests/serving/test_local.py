# SPDX-License-Identifier: Apache-2.0
"""The store of an engine whose scheduler and worker are one process."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from support.waits import LIMIT

from portakv import KVView
from portakv.errors import InvalidTerms, StoreBusy
from portakv.serving.local import GroupView, LocalIndex, StoreTerms, found_in, log_start
from portakv.serving.pages import PageSize, page_store
from portakv.storage import BlockForm, prefix_keys


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        ({"host": 0}, "Expected a host tier, a folder for a disk tier or a bucket"),
        ({"hosts": 1}, r"Expected some of folder, capacity, .* got 'hosts'"),
        ({"folder": 5}, "folder"),
        ({"host": -1}, "host"),
        ({"deadline": 0}, "deadline"),
    ],
)
def test_wrong_terms_are_refused(terms: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidTerms, match=says):
        StoreTerms.of(terms)


def test_terms_that_an_integration_has_no_use_for_are_refused() -> None:
    assert StoreTerms.of({"host": 1 << 20, "by_layer": True}).by_layer
    with pytest.raises(InvalidTerms, match=r"bucket_options, encoding, got 'by_layer'"):
        StoreTerms.of({"host": 1 << 20, "by_layer": True}, without=("by_layer", "block_size"))


def test_a_folder_that_others_may_write_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    StoreTerms.of({"folder": str(folder)})
    folder.mkdir(mode=0o755)
    StoreTerms.of({"folder": str(folder)})
    folder.chmod(0o775)
    with pytest.raises(InvalidTerms, match="which others may write"):
        StoreTerms.of({"folder": str(folder)})
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(InvalidTerms, match="which is a file"):
        StoreTerms.of({"folder": str(file)})


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    """Nothing stays in a folder that can be."""
    for folder in (tmp_path, tmp_path / "a", tmp_path / "a/b"):
        StoreTerms.of({"folder": str(folder)}).check_usable()
    assert [*tmp_path.iterdir()] == []
    for wrong in ("/proc/x", "/sys/x/y"):
        terms = StoreTerms.of({"folder": [str(tmp_path), wrong]})
        with pytest.raises(InvalidTerms, match=f"can make and write, got '{wrong}'"):
            terms.check_usable()
        with pytest.raises(InvalidTerms, match="can make and write"):
            page_store(terms, "model", [PageSize(4096)])
        StoreTerms.of({"folder": wrong, "shared": "attach"}).check_usable()  # a server makes it


@pytest.mark.parametrize("name", ["staging", "capacity", "host"])
def test_terms_without_room_for_the_smallest_block_are_refused(name: str, tmp_path: Path) -> None:
    """It takes a header and a page, 8,192 bytes."""
    folder = {} if name == "host" else {"folder": str(tmp_path)}
    StoreTerms.of({**folder, name: 8192})
    with pytest.raises(InvalidTerms, match=f"{name}.* to have room for a block of 8192 bytes"):
        StoreTerms.of({**folder, name: 8191})
    attached = {"folder": str(tmp_path), "shared": "attach"}
    StoreTerms.of({**attached, name: 8191})  # the sizes of the server count


def test_each_folder_needs_room() -> None:
    StoreTerms.of({"folder": ["a", "b"], "capacity": 16384})
    with pytest.raises(InvalidTerms, match="capacity of each folder"):
        StoreTerms.of({"folder": ["a", "b"], "capacity": 16383})


def test_an_index_knows_what_its_store_has() -> None:
    """And nothing before the store was opened, or after it was closed."""
    index = LocalIndex.of("an engine")
    assert index is LocalIndex.of("an engine")
    keys = prefix_keys(range(24), 8)
    assert index.leading(keys) == 0
    view = KVView([torch.zeros(4, 2, 8)], "layer | block page", block_size=8)
    terms = StoreTerms(host=1 << 20, staging=1 << 20)
    (store,) = index.open([GroupView(view)], terms, "model", 8)
    store.save(view, [0, 1], keys[:2]).synchronize(LIMIT)
    assert index.leading(keys) == 2
    assert index.has(keys[1])
    assert not index.has(keys[2])
    with pytest.raises(InvalidTerms, match="engine_id that no other engine"):
        index.open([GroupView(view)], terms, "model", 8)
    index.close()
    assert not index.has(keys[1])
    assert index.leading(keys) == 0


def test_a_folder_is_waited_for_that_an_engine_leaves(tmp_path: Path) -> None:
    """As after a kill, whose process has not ended yet."""
    view = KVView([torch.zeros(4, 2, 8)], "layer | block page", block_size=8)
    terms = StoreTerms(str(tmp_path / "store"), 1 << 20, 1 << 20, 1 << 20)
    first = LocalIndex()
    second = LocalIndex()
    first.open([GroupView(view)], terms, "model", 8)
    with pytest.raises(StoreBusy):
        second.open([GroupView(view)], terms, "model", 8, patience=0.0)
    leaving = threading.Timer(0.2, first.close)
    leaving.start()
    second.open([GroupView(view)], terms, "model", 8, patience=LIMIT)
    leaving.join()
    second.close()


def test_a_block_of_several_groups_is_there_if_all_have_it() -> None:
    index = LocalIndex()
    keys = prefix_keys(range(24), 8)
    views = [KVView([torch.zeros(4, 2, 8)], "layer | block page", block_size=8) for _ in range(2)]
    terms = StoreTerms(host=1 << 20, staging=1 << 20)
    first, second = index.open([GroupView(view) for view in views], terms, "model", 8)
    first.save(views[0], [0, 1], keys[:2]).synchronize(LIMIT)
    assert index.leading(keys) == 0
    second.save(views[1], [0], keys[:1]).synchronize(LIMIT)
    assert index.leading(keys) == 1
    index.close()


def test_a_number_changes_with_a_loss_alone() -> None:
    """The host tier has room for two blocks."""
    index = LocalIndex()
    assert index.losses == index.losses
    keys = prefix_keys(range(32), 8)
    view = KVView([torch.zeros(4, 2, 8)], "layer | block page", block_size=8)
    size = BlockForm.of(view, "model").image_bytes
    terms = StoreTerms(host=2 * size, staging=4 * size)
    (store,) = index.open([GroupView(view)], terms, "model", None)
    index.record()
    losses = index.losses
    store.save(view, [0, 1], keys[:2]).synchronize(LIMIT)
    assert index.losses == losses
    assert [(each.key, each.stored) for each in index.take_events()] == [
        (key, True) for key in keys[:2]
    ]
    store.save(view, [2], prefix_keys(range(8, 16), 8)).synchronize(LIMIT)
    assert index.losses > losses
    assert {each.stored for each in index.take_events()} == {True, False}
    assert index.take_events() == []
    index.close()
    assert index.losses == index.losses


@pytest.mark.parametrize(
    ("terms", "found", "says"),
    [
        (
            {"host": 3 << 30},
            0,
            "PortaKV stores pages in 3 GiB of host memory, with 1 GiB of staging. 0 are there. X.",
        ),
        (
            {"host": 0, "folder": ["/a", "/b"], "capacity": 32 << 40, "staging": 1 << 20},
            7,
            "PortaKV stores pages in the disk tier in /a, /b of 32 TiB, with 1 MiB of staging. "
            "7 are there. X.",
        ),
        (
            {"bucket": "s3://b/p"},
            None,
            "PortaKV stores pages in the bucket s3://b/p and 4 GiB of host memory, with 1 GiB of "
            "staging. X.",
        ),
    ],
)
def test_the_start_of_an_engine_is_one_line(
    caplog: pytest.LogCaptureFixture, terms: dict[str, Any], found: int | None, says: str
) -> None:
    with caplog.at_level(logging.INFO, "portakv"):
        log_start(StoreTerms.of(terms), "pages", found, "X")
    assert [record.getMessage() for record in caplog.records] == [
        says.replace(" X.", " X serves them.")
    ]


def test_the_blocks_of_a_folder_are_counted(tmp_path: Path) -> None:
    """By what the next process finds in it."""
    view = KVView([torch.zeros(8, 4, 2, 8, device="cpu")], "layer | block token head dim")
    terms = StoreTerms(str(tmp_path / "store"), 1 << 20, host=0, staging=1 << 20)
    keys = prefix_keys(range(12), 4)
    for expected in (0, 3):
        index = LocalIndex()
        (store,) = index.open([GroupView(view)], terms, "model", None)
        assert found_in(index.statistics(), 1) == expected
        store.save(view, [0, 1, 2], keys).synchronize()
        index.close()
    assert found_in({}, 1) == 0


@pytest.mark.parametrize("shared", [False, True])
def test_a_store_of_pages_says_who_serves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, shared: bool
) -> None:
    folder = str(tmp_path / "store")
    terms = StoreTerms(folder, 1 << 20, host=0, staging=1 << 20, shared=shared)
    with ExitStack() as stack, caplog.at_level(logging.INFO, "portakv"):
        for _ in range(1 + shared):
            stack.callback(page_store(terms, "model", [PageSize(4096)]).close)
    lines = [record.getMessage() for record in caplog.records if "stores" in record.getMessage()]
    servers = ["This process", "Another process of this host"][: 1 + shared]
    assert [line.partition("there. ")[2] for line in lines] == [
        f"{server} serves them." for server in servers
    ]


@pytest.mark.parametrize("keeps", [True, False])
def test_kept_blocks_stay_in_host_memory(keeps: bool, tmp_path: Path) -> None:
    """Of four blocks a disk has two alone, which are read. Control: without it, others evict all
    of them from host memory."""
    index = LocalIndex()
    keys = prefix_keys(range(32), 8)
    others = prefix_keys(range(100, 164), 8)
    view = KVView([torch.arange(128.0).reshape(8, 2, 8)], "layer | block page", block_size=8)
    size = BlockForm.of(view, "model").image_bytes
    terms = StoreTerms(
        host=6 * size, staging=8 * size, folder=str(tmp_path / "kv"), capacity=64 * size
    )
    (store,) = index.open([GroupView(view)], terms, "model", None)

    def here() -> int:
        pins = store.pin(keys)
        pins.release()
        return int(pins.here.sum())

    def save(some: Sequence[bytes]) -> None:
        for number, key in enumerate(some):
            store.save(view, [number], [key]).synchronize(LIMIT)

    save(keys)
    save(others[:4])
    assert here() == 2
    assert index.leading(keys) == 4
    kept = index.keep(keys)
    until = time.monotonic() + LIMIT
    while keeps and kept.count() is None and time.monotonic() < until:
        time.sleep(1e-3)
    assert not keeps or kept.count() == 4
    save(others[4:])
    assert here() == (4 if keeps else 0)
    kept.release()
    save(prefix_keys(range(200, 264), 8))
    assert here() == 0
    index.close()
