# SPDX-License-Identifier: Apache-2.0
"""Prefixes of the real transformers in a store whose files, disk or process fail: no wrong block
reaches a cache, and the model answers as without a store."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.page_faults import FAILURES, FaultyDisk
from support.store_damage import any_images_believed, cut_files, flip_bits, swap_images
from support.waits import LIMIT, until

from portakv.serving.prefixes import Prefixes
from portakv_benchmarks.plugs import faults
from portakv_benchmarks.plugs.transformers_store import (
    BLOCKS,
    CHECKED,
    HASTY,
    UNCHECKED,
    FaultyStore,
    as_if_loaded,
)

pytest.importorskip("transformers")

MODULE = "portakv_benchmarks.plugs.transformers_store"
Damage = Callable[[Path], None]
DAMAGE: dict[str, Damage] = {
    "flipped": lambda folder: flip_bits(folder, random.Random(0)),
    "swapped": lambda folder: swap_images(folder, random.Random(0), FaultyStore.image),
    "a cut file": lambda folder: cut_files(folder, 5 * FaultyStore.image // 2),
}


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FaultyDisk:
    return FaultyDisk(monkeypatch)


@pytest.fixture
def store(disk: FaultyDisk, tmp_path: Path) -> Iterator[FaultyStore]:
    """A store that has the blocks of a prompt."""
    made = FaultyStore(CHECKED, tmp_path / "store")
    made.renew(1)
    made.save()
    yield made
    disk.mend()
    made.close()


def loaded(store: FaultyStore) -> Counter[str]:
    """Load the prompt; return how its blocks came, and how the model answered."""
    store.begin_load()
    assert until(store.ended, LIMIT)
    return faults.counted(store)


def test_a_store_without_a_fault(store: FaultyStore) -> None:
    assert loaded(store) == {"right": BLOCKS, "right answers": 1}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_blocks_are_computed(store: FaultyStore, tmp_path: Path, damage: Damage) -> None:
    damage(tmp_path / "store")
    came = loaded(store)
    assert came["wrong"] == came["wrong answers"] == 0
    assert came["missed"] > 0


@pytest.mark.parametrize("kind", ["flipped", "swapped"])
def test_damaged_blocks_come_without_their_checks(
    store: FaultyStore, tmp_path: Path, kind: str
) -> None:
    """The negative control; what a read of a cut file does not return cannot be believed here."""
    DAMAGE[kind](tmp_path / "store")
    with any_images_believed():
        assert loaded(store)["wrong"] > 0


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "control"])
@pytest.mark.parametrize("code", FAILURES.values(), ids=FAILURES)
def test_a_disk_that_fails_in_a_load(
    store: FaultyStore, disk: FaultyDisk, monkeypatch: pytest.MonkeyPatch, code: int, guard: bool
) -> None:
    """The prompt is computed, after the deadline if the disk hangs."""
    if not guard:
        monkeypatch.setattr(Prefixes, "load", as_if_loaded(Prefixes.load))
    with disk.failing(code):
        came = loaded(store)
    if guard:
        assert came == {"missed": BLOCKS, "right answers": 1}
    else:
        assert came == {"wrong": BLOCKS, "wrong answers": 1}


@pytest.mark.parametrize("code", FAILURES.values(), ids=FAILURES)
def test_a_disk_that_fails_in_a_save(store: FaultyStore, disk: FaultyDisk, code: int) -> None:
    """The blocks are missing, and a later save stores some: slots of EIO are not written again."""
    store.renew(2)
    with disk.failing(code):
        store.save(limit=0.2)
        came = loaded(store)
    assert came == {"missed": BLOCKS, "right answers": 1}

    def stored_again() -> bool:
        store.save()
        came = loaded(store)
        assert came["wrong"] == came["wrong answers"] == 0
        return came["right"] > 0

    assert until(stored_again, LIMIT)


def damaged(folder: Path, name: str) -> dict[str, Counter[str]]:
    """Return how blocks and answers came after three faults of each kind, by kind."""
    result = folder / "result.json"
    words = [str(folder / "store"), "--faults", "3", "--stores", name, "--json", str(result)]
    done = subprocess.run(
        [sys.executable, "-m", MODULE, *words], text=True, capture_output=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(result.read_text())["faults"]
    return {kind.removeprefix(f"{name}, "): Counter(row) for kind, row in rows.items()}


@pytest.mark.full
def test_no_fault_of_files_disk_and_process_changes_an_answer(tmp_path: Path) -> None:
    for kind, row in damaged(tmp_path, CHECKED).items():
        assert row["wrong"] == row["wrong answers"] == row["memory written after the end"] == 0, (
            kind
        )
        assert row["right answers"] == row["faults"] == 3, kind


@pytest.mark.full
def test_controls_of_these_faults(tmp_path: Path) -> None:
    """A store that believes its disk; and a cache that takes each block as loaded.

    A save stops at a full disk whatever the store believes, so the cache alone shows that fault.
    """
    rows = damaged(tmp_path, UNCHECKED)
    for kind in (*faults.FILES, "EIO"):
        assert rows[kind]["wrong"] > 0, kind
    full = rows["ENOSPC"]
    assert full["missed"] > full["wrong"] + full["right"]
    assert sum(row["wrong answers"] for row in rows.values()) > 0
    rows = damaged(tmp_path, HASTY)
    for kind in faults.CALLS:
        assert rows[kind]["wrong"] > 0, kind
    assert rows["hang"]["wrong answers"] > 0
