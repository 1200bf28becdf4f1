# SPDX-License-Identifier: Apache-2.0
"""Uploads that wait for a slow bucket, and which of them give up their rows to other saves."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from support.held_bucket import HeldBucket
from support.waits import LIMIT, until

from portakv import KVView
from portakv.errors import TransferError
from portakv.storage import BlockForm, BlockStore, Disk, prefix_keys
from portakv.storage.tiers.disk import DiskStore
from portakv.storage.work import Handle

VIEW = KVView([torch.arange(16.0 * 2 * 8).reshape(16, 2, 8)], "layer | block token dim")
FORM = BlockForm.of(VIEW, "model")
KEYS = prefix_keys(range(64), 2)


class HeldDisk(Disk):
    """A disk whose writes wait for an event."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, capacity=32 << 20, io="threads")
        self.free = threading.Event()
        self.free.set()

    def open(self, *arguments: Any) -> list[DiskStore]:
        tier_stores = super().open(*arguments)
        for each in tier_stores:
            vars(each)["write"] = partial(self._write, each.write)
        return tier_stores

    def _write(self, write: Any, *terms: Any, **options: Any) -> Any:
        assert self.free.wait(LIMIT), "a write was held for too long"
        return write(*terms, **options)


class Case:
    """A store of groups of layers with a disk, and with buckets that take one request at a time."""

    def __init__(self, folder: Path, groups: int = 1, buckets: int = 1) -> None:
        self.disk = HeldDisk(folder)
        self.buckets = [HeldBucket(workers=1) for _ in range(buckets)]
        forms = {str(number): BlockForm.of(VIEW, f"model {number}") for number in range(groups)}
        # As many rows as 16 blocks: saves have 8 of them.
        self.store = BlockStore(
            forms, staging=16 * FORM.image_bytes, tiers=[self.disk, *self.buckets]
        )
        self.most = self.store.rows.most

    def save(self, number: int, group: int = 0, full: Literal["drop", "wait"] = "drop") -> Handle:
        """Save a block that follows the block before it."""
        before = KEYS[number - 1] if number else None
        form = self.store.of(str(group))
        return form.save(VIEW, [number], [KEYS[number]], after=before, full=full)

    def disk_has_all(self) -> bool:
        """Return whether all writes to the disk have ended, so that no row waits for one."""
        return not self._queued_bytes("disk")

    def _queued_bytes(self, tier: str) -> float:
        queues = self.store.graph.statistics()["queue_bytes"]
        return sum(float(x["value"]) for x in queues if str(x["queue"]).startswith(tier))

    def fill(self, full: Literal["drop", "wait"] = "drop") -> list[Handle]:
        """Return saves whose uploads have all rows. All are on the disk."""
        for bucket in self.buckets:
            bucket.hold()
        saves = [self.save(number, full=full) for number in range(self.most)]
        assert until(self.disk_has_all, LIMIT)
        assert until(lambda: any(x.waiting for x in self.buckets), LIMIT)
        assert self.store.rows.lacks(1)
        return saves

    def release(self) -> None:
        """Let the disk and the buckets go on."""
        self.disk.free.set()
        for bucket in self.buckets:
            bucket.release()


@pytest.fixture
def cases(tmp_path: Path) -> Iterator[Any]:
    """Return a function that makes a `Case`, which is closed at the end."""
    made = list[Case]()

    def make(**terms: int) -> Case:
        made.append(Case(tmp_path, **terms))
        return made[-1]

    yield make
    for case in made:
        case.release()
        case.store.close()


def landed(saves: Sequence[Handle]) -> list[bool]:
    """Return which saves landed whole."""
    result = list[bool]()
    for save in saves:
        try:
            save.synchronize(LIMIT)
            result.append(True)
        except TransferError:
            result.append(False)
    return result


def has_ended(save: Handle) -> bool:
    """Return whether a save has ended, however it did."""
    try:
        return save.done()
    except TransferError:
        return True


def test_the_latest_uploads_of_all_groups_of_layers_are_dropped_first(cases: Any) -> None:
    """So a bucket gets the beginning of a prompt in all groups: a hit needs all of them."""
    case = cases(groups=2)
    (bucket,) = case.buckets
    bucket.hold()
    saves = list[Handle]()
    for number in range(16):
        for group in range(2):
            saves.append(case.save(number, group))
            assert until(case.disk_has_all, LIMIT)
            assert until(lambda: bucket.waiting == 1, LIMIT)
    case.release()
    kept = case.most - 1
    assert landed(saves) == [n < kept or n == len(saves) - 1 for n in range(len(saves))]


@pytest.mark.parametrize("full", ["drop", "wait"])
def test_a_save_that_waits_for_rows_drops_no_upload(
    full: Literal["drop", "wait"], cases: Any
) -> None:
    """Neither of other saves nor of those that wait, as it does."""
    case = cases()
    saves = case.fill(full)
    saves.append(case.save(case.most, full="wait"))
    assert not any(map(has_ended, saves))
    case.release()
    assert all(landed(saves))


def test_uploads_of_saves_that_wait_for_rows_are_not_dropped(cases: Any) -> None:
    case = cases()
    saves = case.fill("wait")
    assert landed([case.save(case.most)]) == [False]
    assert not any(map(has_ended, saves))
    case.release()
    assert all(landed(saves))


def test_no_upload_is_dropped_whose_row_the_disk_still_needs(cases: Any) -> None:
    """That would free no row, and the block would be missing in the bucket for nothing."""
    case = cases()
    case.disk.free.clear()
    (bucket,) = case.buckets
    bucket.hold()
    saves = [case.save(number) for number in range(case.most)]
    assert until(lambda: all(save.released.done() for save in saves), LIMIT)
    assert until(lambda: bucket.waiting == 1, LIMIT)
    assert landed([case.save(case.most)]) == [False]
    assert not any(map(has_ended, saves))
    case.release()
    assert all(landed(saves))


def test_a_row_that_waits_for_two_buckets_is_given_up_by_both(cases: Any) -> None:
    case = cases(buckets=2)
    saves = case.fill()
    last = case.save(case.most)
    assert until(lambda: any(map(has_ended, saves)), LIMIT)
    assert until(case.disk_has_all, LIMIT)
    case.release()
    assert landed([*saves, last]) == [True] * (case.most - 1) + [False, True]
