# SPDX-License-Identifier: Apache-2.0
"""Saves and loads of pages whose sizes are not known before they come."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pytest
from support.faulty_io import VARIABLE, set_fault
from support.waits import LIMIT, until

from portakv.errors import TransferTimeout
from portakv.serving import PageSize, PageStore, StoreTerms, page_key
from portakv.serving.pages import Buffer, PageTask, PageTasks, sizes_in
from portakv.storage.tiers.base import Tier

SIZES = (4096, 10, 8192, 10, 12288)


class Scene:
    """Tasks over a store, and what they reported."""

    def __init__(self, terms: StoreTerms, sizes: Sequence[PageSize] = ()) -> None:
        self.ended = list[PageTask]()
        self.lost = list[bytes]()
        self.raises = False
        self.tasks = PageTasks(PageStore(terms, "m", sizes), self._end, self.lost.extend)

    def _end(self, task: PageTask) -> None:
        self.ended.append(task)
        if self.raises:
            raise ValueError("a listener's bug")

    def run(self, kind: str, keys: Sequence[bytes], memory: Sequence[np.ndarray]) -> PageTask:
        """Begin a task, and wait for its end."""
        task = self.begin(kind, keys, memory)
        assert until(lambda: task in self.ended, LIMIT)
        return task

    def begin(self, kind: str, keys: Sequence[bytes], memory: Sequence[np.ndarray]) -> PageTask:
        buffers = [Buffer(each.ctypes.data, each.nbytes) for each in memory]
        return self.tasks.begin(kind, keys, buffers)  # type: ignore[arg-type]


def terms_of(folder: Path, images: int = 4096, **other: float) -> StoreTerms:
    """Return terms of a disk with room for so many images of 8 KiB."""
    terms = {"host": 0, "staging": 1 << 20, "capacity": images * 8192, **other}
    return StoreTerms(str(folder), **terms)  # type: ignore[arg-type]


def memory(seed: int, sizes: Sequence[int] = SIZES) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, size, np.uint8) for size in sizes]


def empty(sizes: Sequence[int] = SIZES) -> list[np.ndarray]:
    return [np.zeros(size, np.uint8) for size in sizes]


def keys_of(count: int, first: int = 0) -> list[bytes]:
    return [b"key %d" % number for number in range(first, first + count)]


def same(one: Sequence[np.ndarray], two: Sequence[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(terms_of(tmp_path / "kv"))
    yield made
    made.tasks.close(LIMIT)


def test_pages_of_any_sizes_come_back(scene: Scene) -> None:
    keys = keys_of(5)
    saved = memory(1)
    task = scene.run("save", keys, saved)
    assert task.landed.all()
    assert task.landed_bytes == sum(SIZES)
    loaded = empty()
    task = scene.run("load", keys, loaded)
    assert task.landed.all()
    assert task.landed_bytes == sum(SIZES)
    assert same(loaded, saved)


def test_a_page_of_another_size_is_missing(scene: Scene) -> None:
    scene.run("save", keys_of(2), memory(2, [4096, 8192]))
    loaded = empty([8192, 16384])
    task = scene.run("load", keys_of(2), loaded)
    assert not task.landed.any()
    assert same(loaded, empty([8192, 16384]))


def test_a_key_may_come_twice(scene: Scene) -> None:
    (page,) = memory(3, [4096])
    task = scene.run("save", [b"a", b"b", b"a"], [page, page, page])
    assert task.landed.all()
    loaded = empty([4096] * 3)
    assert scene.run("load", [b"a", b"a", b"a"], loaded).landed.all()
    assert same(loaded, [page] * 3)


def test_pages_that_are_stored_are_not_fresh(scene: Scene) -> None:
    pages = memory(4, [4096, 4096])
    scene.run("save", keys_of(1), pages[:1])
    task = scene.run("save", keys_of(2), pages)
    assert task.landed.all()
    assert task.fresh.tolist() == [False, True]
    assert task.landed_bytes == 4096


def test_a_task_without_pages_ends(scene: Scene) -> None:
    assert len(scene.run("save", [], []).landed) == 0
    assert len(scene.run("load", [], []).landed) == 0


def test_an_error_of_a_listener_ends_no_other_report(scene: Scene) -> None:
    scene.raises = True
    scene.run("save", keys_of(1), memory(5, [4096]))
    scene.run("save", keys_of(1, first=1), memory(6, [4096]))
    assert scene.tasks.alive


def test_a_size_without_room_fails_alone(tmp_path: Path) -> None:
    scene = Scene(terms_of(tmp_path / "kv", staging=32768))
    (page,) = memory(7, [4096])
    scene.run("save", keys_of(1), [page])
    task = scene.run("save", [b"large"], memory(8, [65536]))
    assert not task.landed.any()
    loaded = empty([4096])
    assert scene.run("load", keys_of(1), loaded).landed.all()
    assert same(loaded, [page])
    scene.tasks.close(LIMIT)


def test_the_pages_of_an_earlier_process_are_found(tmp_path: Path) -> None:
    terms = terms_of(tmp_path / "kv")
    assert sizes_in(terms, "m") == []
    scene = Scene(terms)
    saved = memory(9)
    scene.run("save", keys_of(5), saved)
    scene.tasks.close(LIMIT)

    (tmp_path / "kv" / "no form").mkdir()
    (tmp_path / "kv" / "no form" / "form.json").write_text("no JSON")
    sizes = sizes_in(terms, "m")
    assert {size.nbytes for size in sizes} == {*SIZES}
    assert sizes_in(terms, "another model") == []
    assert sizes_in(terms, "m", "another identity") == []
    short = terms_of(tmp_path / "kv", staging=8192)
    assert {size.nbytes for size in sizes_in(short, "m")} == {10, 4096}

    again = Scene(terms, sizes)
    assert again.tasks.lock(keys_of(6)).tolist() == [*SIZES, 0]
    again.tasks.unlock(keys_of(6))
    loaded = empty()
    assert again.run("load", keys_of(5), loaded).landed.all()
    assert same(loaded, saved)
    again.tasks.close(LIMIT)


@pytest.mark.parametrize("locks", [2, 1])
def test_locked_pages_stay(locks: int, tmp_path: Path) -> None:
    """Two locks and one unlock: they stay. One lock and one unlock: they go, as the control."""
    scene = Scene(terms_of(tmp_path / "kv", images=8), [PageSize(4096)])
    keys = keys_of(3)
    scene.run("save", keys, memory(10, [4096] * 3))
    for _ in range(locks):
        assert scene.tasks.lock([*keys, b"missing"]).tolist() == [4096] * 3 + [0]
    assert scene.tasks.locked == 3
    scene.tasks.unlock([*keys, b"missing"])
    for first in range(10, 40, 2):
        scene.run("save", keys_of(2, first), memory(first, [4096] * 2))
    assert scene.tasks.holds(keys).all() == (locks == 2)
    assert scene.tasks.locked == (3 if locks == 2 else 0)
    scene.tasks.unlock(keys)
    assert scene.tasks.locked == 0
    for first in range(40, 70, 2):
        scene.run("save", keys_of(2, first), memory(first, [4096] * 2))
    assert not scene.tasks.holds(keys).any()
    scene.tasks.close(LIMIT)


def test_pages_that_are_lost_are_reported(tmp_path: Path) -> None:
    scene = Scene(terms_of(tmp_path / "kv", images=8), [PageSize(4096)])
    keys = keys_of(40)
    for first in range(0, 40, 4):
        scene.run("save", keys[first : first + 4], memory(first, [4096] * 4))
    scene.run("load", keys[-1:], empty([4096]))
    there = {page_key(key) for key in keys if scene.tasks.holds([key])[0]}
    assert until(lambda: {*scene.lost} | there == {*map(page_key, keys)}, LIMIT)
    assert not {*scene.lost} & there
    deleted = keys[-1:]
    assert scene.tasks.delete([*deleted, b"missing"]).tolist() == [True, False]
    assert until(lambda: page_key(deleted[0]) in scene.lost, LIMIT)
    scene.tasks.close(LIMIT)


@pytest.mark.parametrize("fault", ["flip", "swap", "zeros", "cut"])
def test_no_page_of_a_damaged_folder_is_wrong(fault: str, tmp_path: Path) -> None:
    """50 faults of a kind. The control: who trusts the file gets as many wrong pages."""
    count = 200
    terms = terms_of(tmp_path / "kv")
    scene = Scene(terms, [PageSize(4096)])
    keys = keys_of(count)
    saved = memory(20, [4096] * count)
    scene.run("save", keys, saved)
    scene.tasks.close(LIMIT)

    (slots,) = (tmp_path / "kv").glob("*/slots")
    images = np.fromfile(slots, np.uint8).reshape(-1, 8192)[:count]
    damaged = images.copy()
    random = np.random.default_rng(21)
    hit = random.permutation(count)[:50]
    if fault == "flip":
        damaged[hit, random.integers(4096, 8192, 50)] ^= 1
    elif fault == "swap":
        damaged[hit] = images[np.roll(hit, 1)]
    elif fault == "zeros":
        damaged[hit, 4096:6144] = 0
    else:
        damaged = damaged[: count - 50]
    damaged.tofile(slots)
    whole = damaged[:, 4096:]
    wrong = (whole != images[: len(whole), 4096:]).any(1).sum() + count - len(whole)
    assert wrong == 50

    again = Scene(terms, sizes_in(terms, "m"))
    loaded = empty([4096] * count)
    landed = again.run("load", keys, loaded).landed
    assert landed.sum() == count - 50
    for there, got, expected in zip(landed, loaded, saved, strict=True):
        assert np.array_equal(got, expected if there else np.zeros_like(got))
    assert again.tasks.holds(keys).tolist() == landed.tolist()
    again.tasks.close(LIMIT)


def test_late_tasks_end_while_all_workers_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their pages are not written, also not once the disk answers."""
    fault = tmp_path / "fault"
    set_fault(fault, "")
    monkeypatch.setenv(VARIABLE, str(fault))
    monkeypatch.setenv("PORTAKV_IO", "support.faulty_io:Faulty")
    scene = Scene(terms_of(tmp_path / "kv", deadline=0.2), [PageSize(4096)])
    keys = keys_of(16)
    saved = memory(11, [4096] * 16)
    scene.run("save", keys, saved)
    set_fault(fault, "read hang")
    loaded = empty([4096] * 16)
    tasks = [scene.begin("load", [key], loaded[i : i + 1]) for i, key in enumerate(keys)]
    assert until(lambda: all(task in scene.ended for task in tasks), LIMIT)
    assert not any(task.landed.any() for task in tasks)
    with pytest.raises(TransferTimeout):
        scene.tasks.store.close(0.1)
    set_fault(fault, "")
    scene.tasks.close(LIMIT)
    assert same(loaded, empty([4096] * 16))

    again = Scene(terms_of(tmp_path / "kv"), [PageSize(4096)])
    assert again.run("load", keys, loaded).landed.all()
    assert same(loaded, saved)
    again.tasks.close(LIMIT)


@dataclass(frozen=True)
class HeldTerms(StoreTerms):
    """Terms whose store opens no folder while it is held, as if the disk hung.

    Attributes:
        threads: the names of the threads that opened the store.
        goes_on: cleared while it is held.
        entered: set once an opening is held.
    """

    threads: list[str] = field(default_factory=list)
    goes_on: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)

    def tiers(self) -> list[Tier]:
        self.threads.append(threading.current_thread().name)
        if not self.goes_on.is_set():
            self.entered.set()
        assert self.goes_on.wait(LIMIT)
        return super().tiers()


def held_terms(folder: Path, deadline: float = LIMIT) -> HeldTerms:
    """Return terms as `terms_of` does, whose store is not held yet."""
    plain = asdict(terms_of(folder, deadline=deadline))
    made = HeldTerms(**plain)
    made.goes_on.set()
    return made


def test_tasks_end_while_the_folder_does_not_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saves and loads end as misses. The pages can be saved once the folder has opened."""
    monkeypatch.setattr("portakv.serving.pages.SAVE", 0.2)
    held = held_terms(tmp_path / "kv", deadline=0.2)
    scene = Scene(held, [PageSize(4096)])
    saved = memory(13, [4096, 8192])
    scene.run("save", keys_of(1), saved[:1])
    held.goes_on.clear()
    late = scene.begin("save", keys_of(2), saved)
    assert held.entered.wait(LIMIT)
    other = scene.begin("load", keys_of(1), empty([4096]))
    assert until(lambda: late in scene.ended and other in scene.ended, LIMIT)
    assert not late.landed.any()
    assert not other.landed.any()
    assert not scene.tasks.lock(keys_of(2)).any()

    held.goes_on.set()
    assert until(lambda: scene.run("save", keys_of(2), saved).landed.all(), LIMIT)
    loaded = empty([4096, 8192])
    assert scene.run("load", keys_of(2), loaded).landed.all()
    assert same(loaded, saved)
    scene.tasks.close(LIMIT)


def test_neither_the_caller_nor_the_loop_opens_folders(tmp_path: Path) -> None:
    held = held_terms(tmp_path / "kv")
    scene = Scene(held, [PageSize(4096)])
    held.goes_on.clear()
    page = memory(14, [8192])
    scene.begin("save", keys_of(1), page)
    assert held.entered.wait(LIMIT)
    assert held.threads[-1] not in (threading.current_thread().name, "portakv loop")
    held.goes_on.set()
    scene.tasks.close(LIMIT)


def test_a_page_that_is_deleted_while_the_folder_opens_is_gone(tmp_path: Path) -> None:
    """The other page, which is not deleted, is the control. A later save is not lost."""
    held = held_terms(tmp_path / "kv")
    scene = Scene(held, [PageSize(4096)])
    keys = keys_of(3)
    saved = memory(16, [4096] * 3)
    assert scene.run("save", keys, saved).landed.all()
    held.goes_on.clear()
    opens = scene.begin("save", keys_of(1, 9), memory(17, [8192]))
    assert held.entered.wait(LIMIT)
    assert not scene.tasks.delete(keys[:2]).any()
    again = scene.begin("save", keys[:1], saved[:1])
    held.goes_on.set()
    assert until(lambda: again in scene.ended and opens in scene.ended, LIMIT)
    assert scene.tasks.holds(keys).tolist() == [True, False, True]
    assert until(lambda: page_key(keys[1]) in scene.lost, LIMIT)
    scene.tasks.close(LIMIT)


def test_a_close_while_the_folder_does_not_open(tmp_path: Path) -> None:
    """It ends by an error. The store that opens later is closed, so that others have the folder."""
    held = held_terms(tmp_path / "kv")
    scene = Scene(held)
    held.goes_on.clear()
    page = memory(15, [4096])
    scene.begin("save", keys_of(1), page)
    assert held.entered.wait(LIMIT)
    with pytest.raises(TransferTimeout, match="folder of a store of pages"):
        scene.tasks.close(0.05)
    assert not scene.tasks.alive
    held.goes_on.set()
    # The folder has one store at a time, so that this one waits for the end of the other.
    again = Scene(terms_of(tmp_path / "kv"), [PageSize(4096)])
    assert again.run("save", keys_of(1), page).landed.all()
    again.tasks.close(LIMIT)


def test_after_the_end_nothing_is_there(scene: Scene) -> None:
    scene.run("save", keys_of(1), memory(12, [4096]))
    scene.tasks.close(LIMIT)
    assert not scene.tasks.alive
    assert not scene.tasks.holds(keys_of(1)).any()
    assert not scene.tasks.lock(keys_of(1)).any()
    assert not scene.tasks.delete(keys_of(1)).any()
    assert not scene.begin("load", keys_of(1), empty([4096])).landed.any()


def test_calls_of_several_threads(scene: Scene) -> None:
    """Saves, loads and locks of equal and of different keys, with sizes that are new."""
    wrong = list[str]()

    def work(number: int) -> None:
        for turn in range(8):
            size = 1024 * (1 + (number + turn) % 3)
            (page,) = memory(turn, [size])
            key = b"turn %d, %d bytes" % (turn, size)
            scene.run("save", [key], [page])
            (loaded,) = empty([size])
            scene.tasks.lock([key])
            if scene.run("load", [key], [loaded]).landed.all() and not np.array_equal(loaded, page):
                wrong.append(key.decode())
            scene.tasks.unlock([key])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert scene.tasks.locked == 0
