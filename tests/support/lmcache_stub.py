# SPDX-License-Identifier: Apache-2.0
"""A stand-in of LMCache: the classes that an L2 adapter derives from, and what it is called with.

Its adapter's base counts bytes and calls listeners as LMCache's does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from support.stand_ins import imported_with

RELEASE = "0.5.6"
BITMAP = """
class Bitmap:
    def __init__(self, size):
        self._bits = [False] * size

    def __len__(self):
        return len(self._bits)

    def set(self, index):
        self._bits[index] = True

    def test(self, index):
        return self._bits[index]

    def popcount(self):
        return sum(self._bits)
"""
API = """
from dataclasses import dataclass

@dataclass(frozen=True)
class ObjectKey:
    chunk_hash: bytes
    model_name: str
    kv_rank: int
    object_group_id: int = 0
    cache_salt: str = ""

@dataclass(frozen=True)
class MemoryLayoutDesc:
    shapes: list
    dtypes: list
"""
RESULT = """
class L2StoreResult(int):
    def __new__(cls, success, bytes_transferred):
        return super().__new__(cls, bytes_transferred if success else -1)

    def is_successful(self):
        return self >= 0

    def bytes_transferred(self):
        return max(0, int(self))
"""
PLUGIN = """
class PluginL2AdapterConfig:
    pass
"""
BASE = """
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

@dataclass(frozen=True)
class AdapterUsage:
    total_bytes_used: int
    total_capacity_bytes: int
    bytes_by_cache_salt: dict = field(default_factory=dict)

class L2AdapterInterface(ABC):
    def __init__(self, max_capacity_bytes=0):
        self._listeners = []
        self._max_capacity_bytes = max_capacity_bytes
        self._by_salt = {}

    @property
    def supports_global_eviction(self):
        return self._max_capacity_bytes > 0

    def register_listener(self, listener):
        self._listeners.append(listener)

    def _notify_keys_stored(self, keys, sizes):
        for key, size in zip(keys, sizes, strict=True):
            self._by_salt[key.cache_salt] = self._by_salt.get(key.cache_salt, 0) + size
        for listener in self._listeners:
            listener.on_l2_keys_stored(keys, sizes)

    def _notify_keys_accessed(self, keys):
        for listener in self._listeners:
            listener.on_l2_keys_accessed(keys)

    def _notify_keys_deleted(self, keys, sizes):
        for key, size in zip(keys, sizes, strict=True):
            self._by_salt[key.cache_salt] -= size
            assert self._by_salt[key.cache_salt] >= 0
        for listener in self._listeners:
            listener.on_l2_keys_deleted(keys)

    def get_usage(self):
        used = {salt: size for salt, size in self._by_salt.items() if size}
        return AdapterUsage(sum(used.values()), self._max_capacity_bytes, used)
""" + "".join(
    f"""
    @abstractmethod
    def {name}:
        ...
"""
    for name in (
        "get_store_event_fd(self)",
        "get_lookup_and_lock_event_fd(self)",
        "get_load_event_fd(self)",
        "submit_store_task(self, keys, objects)",
        "pop_completed_store_tasks(self)",
        "submit_lookup_and_lock_task(self, keys, group_layout_descs)",
        "query_lookup_and_lock_result(self, task_id)",
        "submit_unlock(self, keys)",
        "submit_load_task(self, keys, objects)",
        "query_load_result(self, task_id)",
        "close(self)",
    )
)
LOGGING = """
import logging

init_logger = logging.getLogger
"""
#: The modules that an adapter imports, with what it uses of them.
MODULES = {
    "lmcache.lmcache_native": BITMAP,
    "lmcache.logging": LOGGING,
    "lmcache.v1.distributed.api": API,
    "lmcache.v1.distributed.internal_api": RESULT,
    "lmcache.v1.distributed.l2_adapters.plugin_l2_adapter": PLUGIN,
    "lmcache.v1.distributed.l2_adapters.base": BASE,
}


def write_lmcache(folder: Path, release: str = RELEASE) -> None:
    """Write a package ``lmcache`` with these modules alone, and the metadata of a release."""
    for name, text in MODULES.items():
        at = folder.joinpath(*name.split(".")).with_suffix(".py")
        at.parent.mkdir(parents=True, exist_ok=True)
        at.write_text(text, encoding="utf-8")
        for package in (*at.relative_to(folder).parents,):
            if package.name:
                (folder / package / "__init__.py").touch()
    info = folder / f"lmcache-{release}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: lmcache\nVersion: {release}\n", encoding="utf-8"
    )


@contextmanager
def imported(folder: Path, module: str) -> Iterator[ModuleType]:
    """Import a module of PortaKV with the stand-in of a folder, and forget both at the end."""
    with imported_with(folder, "lmcache", [module]) as (made,):
        yield made
