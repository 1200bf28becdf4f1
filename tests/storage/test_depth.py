# SPDX-License-Identifier: Apache-2.0
"""`Disk(depth=)`: its engine is opened with it, and any number of blocks pass through any depth."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from support import slot_cases as cases
from support.slot_cases import FORM, KEYS, Faulty, Tally

from portakv.errors import InvalidTerms
from portakv.storage.tiers.disk import Disk, DiskStore

NO_ROWS = SimpleNamespace(memory=())


class Deep(Faulty):
    """An engine that notes the depth with which it is opened."""

    depths: ClassVar[list[int]] = []

    def __init__(self, memory: Any = (), depth: int = 0) -> None:
        super().__init__()
        self.depths.append(depth)


def opened(folder: Path, **terms: Any) -> DiskStore:
    """Return the store of a disk with eight slots."""
    tier = Disk(folder, capacity=8 * FORM.image_bytes, **terms)
    graph: Any = Tally()
    (store,) = tier.open(graph, NO_ROWS, [FORM])
    return store


def test_an_engine_is_opened_with_the_depth_of_its_disk(tmp_path: Path) -> None:
    for terms in ({}, {"depth": 7}):
        opened(tmp_path, io=f"{__name__}:Deep", **terms).close()
    assert Deep.depths == [512, 7]


@pytest.mark.parametrize("wrong", [0, -1, 1 << 16, 1.5, True, "512", None])
def test_a_wrong_depth_is_named(tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(InvalidTerms, match=r"Expected depth to be a whole number .*\. Pass one"):
        Disk(tmp_path, capacity=1 << 20, depth=wrong)


@pytest.mark.parametrize("io", ["ring", "threads"])
@pytest.mark.parametrize("depth", [1, 3, 1 << 15])
def test_a_call_has_more_requests_than_the_depth(tmp_path: Path, io: str, depth: int) -> None:
    store = opened(tmp_path, io=io, depth=depth)
    rows = cases.images(8, FORM)
    pairs = zip(rows, KEYS, strict=False)
    sums = [cases.fill(row, FORM, key, 1) for row, key in pairs]
    queue = store.queue_for_write(rows.nbytes)
    assert store.write(queue, KEYS[:8], [*rows], [1] * 8, sums) == [True] * 8
    again = cases.images(8, FORM)
    assert store.read(KEYS[:8], [*again]) == [True] * 8
    assert all(cases.holds(row, FORM, key) for row, key in zip(again, KEYS, strict=False))
    store.close()
