# SPDX-License-Identifier: Apache-2.0
"""LMCache's L2 adapter over a block store: a disk that verifies what it reads, for its MP server.

Chosen by ``--l2-adapter`` with ``"type": "plugin"``, ``"module_path":
"portakv.integrations.lmcache_l2"`` and ``"class_name": "PortaKVL2Adapter"``. This file maps
LMCache's hooks to `PageTasks`, and decides nothing itself.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import blake2b
from itertools import compress
from typing import Any

import numpy as np
import numpy.typing as npt

from portakv.errors import TransferTimeout
from portakv.integrations import IntegrationError, check_release, log_through
from portakv.integrations.lmcache.check import ABSTRACT, MODEL, sizes_of, terms_of
from portakv.serving.pages import (
    Buffer,
    Counted,
    Kind,
    Lookups,
    PageTask,
    PageTasks,
    page_store,
)
from portakv.tasks import runtime

check_release("lmcache")

try:
    from lmcache.lmcache_native import Bitmap
    from lmcache.logging import init_logger
    from lmcache.v1.distributed.internal_api import L2StoreResult
    from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
except ImportError as error:
    raise IntegrationError(
        f"Expected an LMCache with L2 adapters, got one without: {error}. Install another release."
    ) from error
if further := sorted(L2AdapterInterface.__abstractmethods__ - {*ABSTRACT}):
    raise IntegrationError(
        f"Expected an LMCache whose L2 adapters have {', '.join(ABSTRACT)}, got one that has "
        f"{', '.join(further)} as well. Install another release."
    )

logger = init_logger(__name__)


def key_of(key: Any) -> bytes:
    """Return 32 bytes that name an object of LMCache, its ``ObjectKey``."""
    fields = (
        key.chunk_hash,
        key.model_name.encode(),
        b"%d" % key.kv_rank,
        b"%d" % key.object_group_id,
        key.cache_salt.encode(),
    )
    name = blake2b(digest_size=32)
    for field in fields:
        name.update(len(field).to_bytes(8, "little"))
        name.update(field)
    return name.digest()


def buffer_of(memory: Any) -> Buffer:
    """Return where an object of LMCache lies, its ``MemoryObj``."""
    view = memoryview(memory.byte_array)
    return Buffer(ctypes.addressof(ctypes.c_ubyte.from_buffer(view)), view.nbytes)


class PortaKVL2Adapter(L2AdapterInterface):  # type: ignore[misc]
    """The objects of LMCache's MP server in the folders of a block store.

    An object that is damaged, was evicted or comes too late is a miss. An object of an earlier
    server counts as used space once it is found.

    Args:
        config: LMCache's ``adapter_params``: folder, capacity, staging, host, deadline, shared,
            object_bytes.
        l1_memory_desc: the host memory of the server, which need not be registered.

    Raises:
        InvalidTerms: wrong terms; a shared folder whose servers have other ``object_bytes``.
        StoreError, StoreBusy: memory for no object; a folder that another process has.
    """

    def __init__(self, config: Mapping[str, Any], l1_memory_desc: object = None) -> None:
        log_through(logger)
        terms = terms_of(config)
        super().__init__(max_capacity_bytes=terms.capacity)
        store = page_store(terms, MODEL, sizes_of(config, terms))
        self._event_fds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(3)]
        self._lock = runtime().lock
        self._closed = False
        self._next = 0
        self._stores = dict[int, L2StoreResult]()
        self._lookups = Lookups[Bitmap](Bitmap)
        self._loads = dict[int, Bitmap]()
        self._objects = dict[int, tuple[Sequence[Any], Sequence[Any]]]()  # of tasks in flight
        self._counted = Counted[Any]()
        self._tasks = PageTasks(store, self._ended, self._lost)

    def get_store_event_fd(self) -> int:
        return self._event_fds[0]

    def get_lookup_and_lock_event_fd(self) -> int:
        return self._event_fds[1]

    def get_load_event_fd(self) -> int:
        return self._event_fds[2]

    def submit_store_task(self, keys: list[Any], objects: list[Any]) -> int:
        return self._submit("save", keys, objects)

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        with self._lock:
            ended = self._stores
            self._stores = {}
        return ended

    def submit_lookup_and_lock_task(
        self, keys: list[Any], group_layout_descs: Mapping[int, Any]
    ) -> int:
        names = [key_of(key) for key in keys]
        with self._lock:
            task = self._new_id()
        self._tasks.lock_later(names, partial(self._looked_up, task, keys, names))
        return task

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        return self._lookups.fetch(task_id)

    def submit_unlock(self, keys: list[Any]) -> None:
        self._tasks.unlock(map(key_of, keys))

    def submit_load_task(self, keys: list[Any], objects: list[Any]) -> int:
        return self._submit("load", keys, objects)

    def query_load_result(self, task_id: int) -> Bitmap | None:
        with self._lock:
            return self._loads.pop(task_id, None)

    def delete(self, keys: list[Any]) -> None:
        names = [key_of(key) for key in keys]
        gone = self._tasks.delete(names)
        counted = self._counted.remove(compress(names, gone))
        if counted:  # an object that was never found counts as 0 bytes
            sizes = [0 if each is None else each[1] for each in counted]
            self._notify_keys_deleted([*compress(keys, gone)], sizes)

    def report_status(self) -> dict[str, Any]:
        usage = self._tasks.store.usage()
        return {
            "is_healthy": self._tasks.alive,
            "type": type(self).__name__,
            "folders": [*self._tasks.store.terms.folders],
            "stored_object_count": len(self._counted),
            "locked_key_count": self._tasks.locked,
            "in_flight_task_count": len(self._objects),
            "current_size_bytes": usage.used,
            "max_capacity_bytes": usage.capacity,
        }

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        try:
            self._tasks.close()
        except TransferTimeout as error:
            # A medium that hangs reads and writes memory of the store alone.
            logger.warning("PortaKV's store was left open: %s", error)
        with self._lock:
            for fd in self._event_fds:
                os.close(fd)

    # --- tasks

    def _submit(self, kind: Kind, keys: list[Any], objects: list[Any]) -> int:
        """Begin a task, whose objects LMCache keeps until its end."""
        names = [key_of(key) for key in keys]
        buffers = [buffer_of(each) for each in objects]
        with self._lock:
            task = self._new_id()
            self._objects[task] = keys, objects
        self._tasks.begin(kind, names, buffers, task)
        return task

    def _looked_up(
        self, task: int, keys: Sequence[Any], names: Sequence[bytes], sizes: npt.NDArray[np.int64]
    ) -> None:
        """Answer LMCache for a lookup, whose objects are locked."""
        found = Bitmap(len(keys))
        for number in sizes.nonzero()[0].tolist():
            found.set(number)
        try:
            self._count(keys, names, sizes.tolist())
        finally:  # a listener of LMCache may raise
            late = self._lookups.add(task, found, len(keys), [*compress(names, sizes)])
            self._tasks.unlock(late)
            self._signal(1)

    def _ended(self, task: PageTask) -> None:
        """Answer LMCache for a task that has ended."""
        number: Any = task.tag
        with self._lock:
            keys, _ = self._objects.pop(number)
        landed = task.landed.tolist()
        if task.kind == "save":
            there = self._tasks.stored(task).tolist()
            sizes = [b.nbytes * kept for b, kept in zip(task.buffers, there, strict=True)]
            self._count(keys, task.keys, sizes)
            with self._lock:
                self._stores[number] = L2StoreResult(all(landed), task.landed_bytes)
            self._signal(0)
            return
        loaded = Bitmap(len(keys))
        for place in task.landed.nonzero()[0].tolist():
            loaded.set(place)
        if any(landed):
            self._notify_keys_accessed([*compress(keys, landed)])
        with self._lock:
            self._loads[number] = loaded
        self._signal(2)

    def _lost(self, names: Sequence[bytes]) -> None:
        """Tell LMCache of objects that were evicted or damaged."""
        lost = [each for each in self._counted.remove(names) if each is not None]
        if lost:
            self._notify_keys_deleted([key for key, _ in lost], [nbytes for _, nbytes in lost])

    def _count(self, keys: Sequence[Any], names: Sequence[bytes], sizes: Sequence[int]) -> None:
        """Tell LMCache of objects that it does not count yet."""
        new, new_sizes = self._counted.add(keys, names, sizes)
        if new:
            self._notify_keys_stored(new, new_sizes)

    def _new_id(self) -> int:
        """Return the number of a task, under the lock."""
        self._next += 1
        return self._next

    def _signal(self, which: int) -> None:
        """Wake the loop of LMCache that waits for a kind of task."""
        with self._lock:
            if not self._closed:
                os.eventfd_write(self._event_fds[which], 1)
