# SPDX-License-Identifier: Apache-2.0
"""LMCache's L2 adapter without LMCache: a stand-in has the classes that it derives from."""

from __future__ import annotations

import json
import os
import select
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import pytest
from support.command_line import run, run_json
from support.lmcache_stub import BASE, MODULES, imported, write_lmcache
from support.waits import LIMIT, until

from portakv.errors import InvalidTerms, StoreBusy
from portakv.integrations import IntegrationError
from portakv.integrations.lmcache.check import ABSTRACT, findings_of, terms_of
from portakv.serving import pages
from portakv.serving.pages import UNFETCHED
from portakv.serving.server.client import ServerBlocks
from portakv.storage.eviction import Pins

MODULE = "portakv.integrations.lmcache.l2"
SIZE = 4096
#: The bytes of an object.
Bytes: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    folder = tmp_path_factory.mktemp("lmcache")
    write_lmcache(folder)
    with imported(folder, MODULE) as made:
        yield made


class Memory:
    """An object of LMCache's host memory."""

    def __init__(self, data: Bytes) -> None:
        self.data = data

    @property
    def byte_array(self) -> memoryview:
        return memoryview(self.data.data)


class Listener:
    """What LMCache's eviction hears."""

    def __init__(self) -> None:
        self.stored = list[tuple[Any, int]]()
        self.accessed = list[Any]()
        self.deleted = list[Any]()

    def on_l2_keys_stored(self, keys: Sequence[Any], sizes: Sequence[int]) -> None:
        self.stored += zip(keys, sizes, strict=True)

    def on_l2_keys_accessed(self, keys: Sequence[Any]) -> None:
        self.accessed += keys

    def on_l2_keys_deleted(self, keys: Sequence[Any]) -> None:
        self.deleted += keys


def same(one: Bytes | None, two: Bytes) -> bool:
    """Return whether an object was loaded, with the bytes of another."""
    return one is not None and np.array_equal(one, two)


class Driver:
    """LMCache's controllers, as far as an adapter sees them."""

    def __init__(self, module: ModuleType, folder: Path, **terms: Any) -> None:
        params = {"folder": str(folder), "capacity": 16 << 20, "staging": 1 << 20, **terms}
        self.adapter = module.PortaKVL2Adapter(params, l1_memory_desc=object())
        self.listener = Listener()
        self.adapter.register_listener(self.listener)

    def store(self, keys: list[Any], data: Sequence[Bytes]) -> Any:
        """Store objects, and return the result."""
        task = self.adapter.submit_store_task(keys, [Memory(each) for each in data])
        self._wait(self.adapter.get_store_event_fd())
        results = self.adapter.pop_completed_store_tasks()
        assert [*results] == [task]
        assert self.adapter.pop_completed_store_tasks() == {}
        return results[task]

    def lookup(self, keys: list[Any]) -> list[bool]:
        """Look up and lock objects, and return which were found."""
        task = self.adapter.submit_lookup_and_lock_task(keys, {})
        self._wait(self.adapter.get_lookup_and_lock_event_fd())
        found = self.adapter.query_lookup_and_lock_result(task)
        assert self.adapter.query_lookup_and_lock_result(task) is None
        return [found.test(number) for number in range(len(keys))]

    def load(self, keys: list[Any], sizes: Sequence[int]) -> list[Bytes | None]:
        """Load objects, and return their bytes; None for a miss."""
        data = [np.zeros(size, np.uint8) for size in sizes]
        task = self.adapter.submit_load_task(keys, [Memory(each) for each in data])
        self._wait(self.adapter.get_load_event_fd())
        loaded = self.adapter.query_load_result(task)
        assert self.adapter.query_load_result(task) is None
        return [each if loaded.test(number) else None for number, each in enumerate(data)]

    @staticmethod
    def _wait(fd: int) -> None:
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        assert poller.poll(1000 * LIMIT)
        os.eventfd_read(fd)


def bytes_of(seed: int, sizes: Sequence[int]) -> list[Bytes]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, size, np.uint8) for size in sizes]


def key(number: int, salt: str = "") -> Any:
    from lmcache.v1.distributed.api import ObjectKey

    return ObjectKey(number.to_bytes(4, "big"), "model", 0, 0, salt)


@pytest.fixture
def driver(module: ModuleType, tmp_path: Path) -> Iterator[Driver]:
    made = Driver(module, tmp_path / "kv")
    yield made
    made.adapter.close()


def test_objects_of_any_sizes_come_back(driver: Driver) -> None:
    keys = [key(number) for number in range(4)]
    sizes = [SIZE, 100, 3 * SIZE, SIZE]
    data = bytes_of(1, sizes)
    result = driver.store(keys, data)
    assert result.is_successful()
    assert result.bytes_transferred() == sum(sizes)
    assert driver.store(keys, data).bytes_transferred() == 0
    assert driver.lookup([*keys, key(9)]) == [True] * 4 + [False]
    for loaded, expected in zip(driver.load(keys, sizes), data, strict=True):
        assert same(loaded, expected)
    assert driver.load([key(9)], [SIZE]) == [None]
    driver.adapter.submit_unlock(keys)
    assert driver.listener.stored == [*zip(keys, sizes, strict=True)]
    assert driver.listener.accessed == keys


def test_descriptors_differ(driver: Driver) -> None:
    adapter = driver.adapter
    fds = {
        adapter.get_store_event_fd(),
        adapter.get_lookup_and_lock_event_fd(),
        adapter.get_load_event_fd(),
    }
    assert len(fds) == 3


def test_objects_that_differ_in_one_field_have_different_names(module: ModuleType) -> None:
    """Also if the bytes of two fields together are the same."""
    one = key(1, "salt")
    others = [
        replace(one, chunk_hash=b"other"),
        replace(one, model_name="other"),
        replace(one, kv_rank=1),
        replace(one, object_group_id=1),
        replace(one, cache_salt=""),
        replace(one, kv_rank=10, object_group_id=0),
        replace(one, kv_rank=1, object_group_id=0),
        replace(one, model_name="model0", kv_rank=0),
        replace(one, chunk_hash=b"\0\0\0\1model", model_name=""),
    ]
    names = {module.key_of(each) for each in (one, *others)}
    assert len(names) == len({one, *others})


def test_the_next_server_finds_objects_and_counts_them_once(
    module: ModuleType, tmp_path: Path
) -> None:
    first = Driver(module, tmp_path / "kv")
    keys = [key(1, "a"), key(2, "b")]
    data = bytes_of(2, [SIZE, 2 * SIZE])
    first.store(keys, data)
    first.adapter.close()

    second = Driver(module, tmp_path / "kv")
    assert second.adapter.get_usage().total_bytes_used == 0
    for _ in range(2):
        assert second.lookup([*keys, key(3)]) == [True, True, False]
    assert second.adapter.get_usage().bytes_by_cache_salt == {"a": SIZE, "b": 2 * SIZE}
    assert same(second.load(keys[:1], [SIZE])[0], data[0])
    second.adapter.delete(keys[:1])
    assert second.listener.deleted == keys[:1]
    assert second.adapter.get_usage().bytes_by_cache_salt == {"b": 2 * SIZE}
    second.adapter.close()


def test_objects_that_are_evicted_are_no_longer_counted(module: ModuleType, tmp_path: Path) -> None:
    driver = Driver(module, tmp_path / "kv", capacity=8 * 2 * SIZE)
    keys = [key(number) for number in range(30)]
    for number, each in enumerate(keys):
        driver.store([each], bytes_of(number, [SIZE]))
    driver.load(keys[-1:], [SIZE])

    def agree() -> bool:
        there = [found for found, _ in zip(driver.lookup(keys), keys, strict=True)]
        driver.adapter.submit_unlock([k for k, found in zip(keys, there, strict=True) if found])
        gone = [k for k, found in zip(keys, there, strict=True) if not found]
        used = driver.adapter.get_usage().total_bytes_used
        return {*driver.listener.deleted} == {*gone} and used == sum(there) * SIZE

    assert until(agree, LIMIT)
    assert driver.listener.deleted
    assert driver.adapter.report_status()["locked_key_count"] == 0
    driver.adapter.close()


def test_locked_objects_stay_until_each_lock_has_ended(module: ModuleType, tmp_path: Path) -> None:
    driver = Driver(module, tmp_path / "kv", capacity=8 * 2 * SIZE)
    driver.store([key(0)], bytes_of(0, [SIZE]))
    for _ in range(2):
        assert driver.lookup([key(0)]) == [True]
    driver.adapter.submit_unlock([key(0), key(99)])
    for number in range(1, 30):
        driver.store([key(number)], bytes_of(number, [SIZE]))
    assert same(driver.load([key(0)], [SIZE])[0], bytes_of(0, [SIZE])[0])
    driver.adapter.submit_unlock([key(0)])
    for number in range(30, 60):
        driver.store([key(number)], bytes_of(number, [SIZE]))
    assert driver.lookup([key(0)]) == [False]
    driver.adapter.close()


@pytest.mark.parametrize("later", [UNFETCHED, UNFETCHED - 1], ids=["too many", "control"])
def test_a_lookup_that_too_many_others_follow_finds_nothing(later: int, driver: Driver) -> None:
    """It has an end, and locks nothing any more; others keep their answers."""
    driver.store([key(1)], bytes_of(1, [SIZE]))
    adapter = driver.adapter
    first = adapter.submit_lookup_and_lock_task([key(1), key(2)], {})
    tasks = [adapter.submit_lookup_and_lock_task([key(2)], {}) for _ in range(later)]
    is_late = later == UNFETCHED
    assert adapter.report_status()["locked_key_count"] == (0 if is_late else 1)
    found = adapter.query_lookup_and_lock_result(first)
    assert len(found) == 2
    assert [found.test(number) for number in range(2)] == [not is_late, False]
    assert adapter.query_lookup_and_lock_result(first) is None
    assert all(adapter.query_lookup_and_lock_result(task) is not None for task in tasks)


def test_a_store_that_fails_is_reported(module: ModuleType, tmp_path: Path) -> None:
    driver = Driver(module, tmp_path / "kv", staging=4 * SIZE)
    result = driver.store([key(1)], bytes_of(1, [16 * SIZE]))
    assert not result.is_successful()
    assert driver.lookup([key(1)]) == [False]
    assert driver.listener.stored == []
    assert driver.store([key(2)], bytes_of(2, [SIZE])).is_successful()
    driver.adapter.close()


def test_after_close_calls_do_nothing(driver: Driver) -> None:
    driver.store([key(1)], bytes_of(1, [SIZE]))
    assert driver.adapter.report_status()["is_healthy"]
    driver.adapter.close()
    driver.adapter.close()
    assert not driver.adapter.report_status()["is_healthy"]
    driver.adapter.delete([key(1)])
    driver.adapter.submit_unlock([key(1)])
    driver.adapter.submit_lookup_and_lock_task([key(1)], {})
    driver.adapter.submit_load_task([key(1)], [Memory(np.zeros(SIZE, np.uint8))])
    driver.adapter.submit_store_task([key(1)], [Memory(np.zeros(SIZE, np.uint8))])
    assert driver.listener.deleted == []


def test_a_folder_of_another_server_is_refused_at_the_start(
    module: ModuleType, driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.store([key(1)], bytes_of(1, [SIZE]))
    defaults = pages.PageStore.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "patience", 0.0)
    with pytest.raises(StoreBusy, match="another"):
        Driver(module, tmp_path / "kv")


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        ({}, "Expected a folder, got none"),
        ({"foler": "kv"}, "got 'foler'. Did you mean folder?"),
        ({"folder": "kv", "bucket": "s3://b/p"}, "Expected some of folder, capacity"),
        ({"folder": "kv", "shared": True}, "Expected shared and object_bytes together"),
        ({"folder": "kv", "object_bytes": 4096}, "Expected shared and object_bytes together"),
        ({"folder": "kv", "shared": True, "object_bytes": 0}, "object_bytes"),
        ({"folder": "kv", "shared": True, "object_bytes": []}, "object_bytes"),
        ({"folder": "kv", "shared": True, "object_bytes": "1M"}, "object_bytes"),
        ({"folder": "kv", "capacity": "64G"}, "Expected capacity"),
        ({"folder": 5}, "Expected folder"),
    ],
)
def test_wrong_terms_are_named(terms: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidTerms, match=says):
        terms_of(terms)


# --- a folder that several servers have


@pytest.fixture
def pair(
    module: ModuleType, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[tuple[Driver, Driver]]:
    """Return two servers over one folder."""
    terms = {"shared": True, "object_bytes": [SIZE, 2 * SIZE], **getattr(request, "param", {})}
    one = Driver(module, tmp_path / "kv", **terms)
    other = Driver(module, tmp_path / "kv", **terms)
    yield one, other
    other.adapter.close()
    one.adapter.close()


def test_servers_share_a_folder(module: ModuleType, pair: tuple[Driver, Driver]) -> None:
    """The other one has the objects also after the one that serves has ended."""
    one, other = pair
    keys = [key(1), key(2), key(3)]
    sizes = [SIZE, 2 * SIZE, SIZE]
    data = bytes_of(1, sizes)
    assert one.store(keys, data).bytes_transferred() == sum(sizes)
    assert one.listener.stored == [*zip(keys, sizes, strict=True)]
    assert until(lambda: other.lookup([*keys, key(9)]) == [True] * 3 + [False], LIMIT)
    for loaded, expected in zip(other.load(keys, sizes), data, strict=True):
        assert same(loaded, expected)
    assert other.load([key(9)], [SIZE]) == [None]
    assert other.adapter.get_usage().total_bytes_used == sum(sizes)
    assert other.adapter.report_status()["current_size_bytes"] >= sum(sizes)
    assert not one.store([key(4)], bytes_of(4, [SIZE // 2])).is_successful()
    one.adapter.close()

    def loads() -> bool:
        landed = other.load(keys, sizes)
        pairs = zip(landed, data, strict=True)
        return all(made is not None and same(made, expected) for made, expected in pairs)

    assert until(loads, LIMIT)


@pytest.mark.parametrize(
    "pair", [{"object_bytes": SIZE, "capacity": 16 * 2 * SIZE}], indirect=True, ids=["small"]
)
@pytest.mark.parametrize("ends", ["unlock", "close"])
def test_no_server_evicts_what_another_one_has_locked(
    ends: str, pair: tuple[Driver, Driver]
) -> None:
    """Until its lock ends, or the server does."""
    one, other = pair
    one.store([key(0)], bytes_of(0, [SIZE]))
    assert until(lambda: other.lookup([key(0)]) == [True], LIMIT)
    locked = other.adapter.report_status()["locked_key_count"]
    for number in range(1, 40):
        one.store([key(number)], bytes_of(number, [SIZE]))
    assert locked == 1
    assert same(one.load([key(0)], [SIZE])[0], bytes_of(0, [SIZE])[0])
    if ends == "unlock":
        other.adapter.submit_unlock([key(0)])
    else:
        other.adapter.close()

    def evicted() -> bool:
        for number in range(40, 80):
            one.store([key(number)], bytes_of(number, [SIZE]))
        return one.load([key(0)], [SIZE]) == [None]

    assert until(evicted, LIMIT)
    assert until(lambda: key(0) in one.listener.deleted, LIMIT)


def test_what_one_server_deletes_no_server_has(pair: tuple[Driver, Driver]) -> None:
    one, other = pair
    one.store([key(1), key(2)], bytes_of(1, [SIZE, SIZE]))
    assert until(lambda: other.lookup([key(1), key(2)]) == [True, True], LIMIT)
    other.adapter.submit_unlock([key(1), key(2)])
    one.adapter.delete([key(1)])
    assert one.listener.deleted == [key(1)]
    assert until(lambda: key(1) in other.listener.deleted, LIMIT)
    assert other.lookup([key(1), key(2)]) == [False, True]
    assert other.load([key(1)], [SIZE]) == [None]


def test_a_server_of_other_objects_is_refused(
    module: ModuleType, pair: tuple[Driver, Driver], tmp_path: Path
) -> None:
    pair[0].store([key(1)], bytes_of(1, [SIZE]))
    with pytest.raises(InvalidTerms):
        Driver(module, tmp_path / "kv", shared=True, object_bytes=[3 * SIZE])


@pytest.mark.parametrize("hangs", [True, False], ids=["hangs", "control"])
def test_no_call_waits_for_the_lookup_of_a_server_that_hangs(
    hangs: bool, pair: tuple[Driver, Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is slow and answers is waited for by the lookup alone."""
    one, other = pair
    one.store([key(1)], bytes_of(1, [SIZE]))
    assert until(lambda: other.lookup([key(1)]) == [True], LIMIT)
    adapter = other.adapter
    goes_on = threading.Event()
    pin = ServerBlocks.pin

    def slow(blocks: ServerBlocks, keys: Sequence[bytes]) -> Pins:
        assert goes_on.wait(LIMIT)
        return pin(blocks, keys)

    monkeypatch.setattr(ServerBlocks, "pin", slow)
    if not hangs:
        goes_on.set()
    tasks = [adapter.submit_lookup_and_lock_task([key(1), key(2)], {}) for _ in range(2)]
    if hangs:
        assert [adapter.query_lookup_and_lock_result(task) for task in tasks] == [None, None]
        assert same(other.load([key(1)], [SIZE])[0], bytes_of(1, [SIZE])[0])
        goes_on.set()
    for task in tasks:
        found = list[Any]()

        def answered(task: int = task, found: list[Any] = found) -> bool:
            found.append(adapter.query_lookup_and_lock_result(task))
            return found[-1] is not None

        assert until(answered, LIMIT)
        assert [found[-1].test(number) for number in range(2)] == [True, False]


def test_a_close_ends_lookups_that_wait(pair: tuple[Driver, Driver]) -> None:
    one, other = pair
    one.store([key(1)], bytes_of(1, [SIZE]))
    assert until(lambda: other.lookup([key(1)]) == [True], LIMIT)
    adapter = other.adapter
    tasks = [adapter.submit_lookup_and_lock_task([key(1)], {}) for _ in range(64)]
    adapter.close()
    tasks.append(adapter.submit_lookup_and_lock_task([key(1)], {}))
    assert all(adapter.query_lookup_and_lock_result(task) is not None for task in tasks)


# --- releases


def test_a_release_that_is_too_old_is_refused(tmp_path: Path) -> None:
    write_lmcache(tmp_path, "0.5.3")
    with pytest.raises(IntegrationError, match=r"lmcache 0\.5\.3"), imported(tmp_path, MODULE):
        pass


def test_a_release_without_adapters_is_refused(tmp_path: Path) -> None:
    write_lmcache(tmp_path)
    (tmp_path / "lmcache/v1/distributed/l2_adapters/base.py").unlink()
    with (
        pytest.raises(IntegrationError, match="Expected an LMCache with L2 adapters"),
        imported(tmp_path, MODULE),
    ):
        pass


def test_a_release_with_further_methods_is_refused(tmp_path: Path) -> None:
    write_lmcache(tmp_path)
    more = "\n    @abstractmethod\n    def submit_teleport(self):\n        ...\n"
    (tmp_path / "lmcache/v1/distributed/l2_adapters/base.py").write_text(BASE + more)
    with pytest.raises(IntegrationError, match="submit_teleport"), imported(tmp_path, MODULE):
        pass


def test_the_methods_are_those_of_the_stand_in(module: ModuleType) -> None:
    from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface

    assert {*ABSTRACT} == L2AdapterInterface.__abstractmethods__
    assert MODULES["lmcache.v1.distributed.l2_adapters.base"] is BASE


# --- the check of a configuration


def configuration(folder: Path, **other: Any) -> dict[str, Any]:
    return {
        "type": "plugin",
        "module_path": "portakv.integrations.lmcache_l2",
        "class_name": "PortaKVL2Adapter",
        "adapter_params": {"folder": str(folder), "capacity": 1 << 20},
        **other,
    }


def test_a_right_configuration_has_no_errors(tmp_path: Path) -> None:
    found = findings_of(configuration(tmp_path / "kv"))
    assert found.errors == []
    assert [each for each in found.warnings if "lmcache is not installed" not in each] == []


def test_a_right_shared_configuration_has_a_note(tmp_path: Path) -> None:
    params = {"folder": str(tmp_path / "kv"), "shared": True, "object_bytes": SIZE}
    found = findings_of(
        configuration(tmp_path, adapter_params={**params, "capacity": 1 << 20}, shared=True)
    )
    assert found.errors == []
    assert any("share it" in each for each in found.notes)
    assert not any("shared is true" in each for each in found.warnings)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"typ": "plugin"}, "got 'typ'. Did you mean type?"),
        ({"type": "fs"}, "Expected type to be 'plugin', got 'fs'"),
        ({"class_name": None}, "Expected class_name to be 'PortaKVL2Adapter'"),
        ({"adapter_params": 5}, "Expected adapter_params to be an object"),
        ({"adapter_params": {}}, "Expected a folder, got none"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    found = findings_of({**configuration(tmp_path / "kv"), **change})
    assert any(says in each for each in found.errors)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"persist_enabled": False}, "persist_enabled is false"),
        ({"shared": True}, "shared is true"),
        ({"eviction": {"eviction_policy": "LRU"}}, "eviction is set"),
        ({"adapter_params": {"folder": "/kv", "capacity": 1 << 60}}, "Give less"),
    ],
)
def test_what_has_no_use_is_a_warning(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    found = findings_of({**configuration(tmp_path / "kv"), **change})
    assert found.errors == []
    assert any(says in each for each in found.warnings)


def test_doctor_checks_it(tmp_path: Path) -> None:
    text = json.dumps(configuration(tmp_path / "kv"))
    ran = run("doctor", "--l2-adapter", text)
    assert ran.code == 0
    started = "LMCache's server starts" in ran.out
    assert started == ("warning:" not in ran.out)
    file = tmp_path / "adapter.json"
    file.write_text(text)
    assert run_json("doctor", "--l2-adapter", str(file))["errors"] == []
    wrong = run("doctor", "--l2-adapter", json.dumps(configuration(tmp_path / "kv", type="fs")))
    assert wrong.code == 1
    assert "Expected type to be 'plugin'" in wrong.out
    assert "to be JSON" in run("doctor", "--l2-adapter", "{").err
