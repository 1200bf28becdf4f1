# SPDX-License-Identifier: Apache-2.0
"""PortaKV's block stores as the storage backend of SGLang's hierarchical cache.

    --enable-hierarchical-cache --hicache-storage-backend dynamic
    --hicache-storage-backend-extra-config '{"backend_name": "portakv",
        "module_path": "portakv.integrations.sglang_hicache", "class_name": "PortaKVStorage",
        "interface_v1": 1, "hicache_storage_pass_prefix_keys": true,
        "portakv": {"folder": "/nvme0/kv"}}'

SGLang imports this module by the configuration above, in each process that has a cache.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any, TypeVar

import numpy as np
import torch

from portakv.errors import PortaKVError, StoreError
from portakv.integrations import check_release
from portakv.integrations.sglang.pools import (
    KV,
    HostPool,
    PoolPages,
    Settings,
    check_hooks,
    settings_of,
)
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.serving.pages import PagePool, PageStore, page_store

check_release("sglang")
check_hooks()

from sglang.srt.mem_cache.hicache_storage import (  # noqa: E402
    HiCacheStorage,
    PoolHitPolicy,
    PoolName,
    PoolTransferResult,
)

__all__ = ["PortaKVStorage"]

T = TypeVar("T")
_log = RateLimitedLog(logging.getLogger(__name__))


class PortaKVStorage(HiCacheStorage):  # type: ignore[misc]
    """Pages of SGLang's host pools in a store of PortaKV: on a disk, in a bucket, in host memory.

    SGLang makes it by its configuration, and calls it from its threads for storage, which wait. A
    page that does not come, or is damaged, is a miss. A store that fails costs misses and lines of
    the log; no call of a thread raises.

    Args:
        storage_config: SGLang's ``HiCacheStorageConfig``. ``extra_config["portakv"]`` has the terms
            of `portakv.serving.StoreTerms`.
        kwargs: ignored.

    Raises:
        IntegrationError: a release without the interface; a configuration that is not served; a
            host pool without pages.
        InvalidTerms: wrong terms.
        StoreError, StoreBusy: when the pools are registered: memory for no page; a folder that
            another process has.
    """

    def __init__(self, storage_config: Any, kwargs: object = None) -> None:
        self._settings: Settings = settings_of(storage_config)
        self._pools = dict[str, PoolPages]()
        self._store: PageStore | None = None

    # --- host pools

    def register_mem_pool_host(self, mem_pool_host: HostPool) -> None:
        """Take the pool of keys and values."""
        super().register_mem_pool_host(mem_pool_host)
        self._add(KV, mem_pool_host)

    def register_mem_host_pool_v2(self, host_pool: HostPool, host_pool_name: object) -> None:
        """Take one of several pools. A store that is open is opened again with its pages."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        self._add(str(host_pool_name), host_pool)

    def on_host_pools_registered(self) -> None:
        """Open the store."""
        self._open()

    def _add(self, name: str, pool: HostPool) -> None:
        known = self._pools.get(name)
        if known is not None and known.pool is pool:
            return
        copied = name == KV and not self._settings.in_place
        self._pools[name] = PoolPages(pool, name, self._settings.ranks_of(name), copied)
        if self._store is not None:
            self.close()
            self._open()

    def _open(self) -> None:
        """Open the store if there are pools, and it is not open."""
        if self._store is not None or not self._pools:
            return
        pools = [each.pages for each in self._pools.values()]
        sizes = [*dict.fromkeys(pool.size for pool in pools)]
        store = page_store(self._settings.store, self._settings.model, sizes)
        for pool in pools:
            pool.open(store)
        self._store = store

    # --- pages in place: interface v1

    def batch_get_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None
    ) -> list[bool]:
        """Load pages of KV into the host pool; return which have come."""
        return self._loaded(KV, keys, host_indices)

    def batch_set_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None
    ) -> list[bool]:
        """Store pages of KV of the host pool; return which are stored."""
        return self._saved(KV, keys, host_indices, extra_info)

    # --- pages of several pools: interface v2

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: Sequence[Any] | None = None,
        extra_info: Any = None,
    ) -> Any:
        """Return how many leading pages all pools have, by the policy of each pool."""
        empty = PoolTransferResult(0, {}, [])
        return self._tried(lambda: self._restorable(keys, pool_transfers or []), empty)

    def batch_get_v2(
        self, transfers: Sequence[Any], extra_info: Any = None
    ) -> dict[str, list[bool]]:
        """Load pages of several pools; return which have come."""
        return {
            each.name: self._loaded(each.name, each.keys or [], each.host_indices)
            for each in transfers
        }

    def batch_set_v2(
        self, transfers: Sequence[Any], extra_info: Any = None
    ) -> dict[str, list[bool]]:
        """Store pages of several pools; return which are stored."""
        return {
            each.name: self._saved(each.name, each.keys or [], each.host_indices, extra_info)
            for each in transfers
        }

    # --- pages that SGLang has copied

    def get(
        self,
        key: str,
        target_location: torch.Tensor | None = None,
        target_sizes: Any = None,
    ) -> torch.Tensor | None:
        """Load a page into memory of its size; return the memory, or None if it did not come."""
        if target_location is None:
            return None
        return self.batch_get([key], [target_location])[0]

    def batch_get(
        self,
        keys: list[str],
        target_locations: Sequence[torch.Tensor] | None = None,
        target_sizes: Any = None,
    ) -> list[torch.Tensor | None]:
        """Load pages into memory, one for each key; return the memory of those that have come."""
        targets = target_locations or []
        none: list[torch.Tensor | None] = [None] * len(keys)
        if len(targets) != len(keys):
            return none
        landed = self._tried(lambda: self._copied(keys, targets, False), [False] * len(keys))
        return [memory if there else None for memory, there in zip(targets, landed, strict=True)]

    def set(
        self,
        key: str,
        value: torch.Tensor | None = None,
        target_location: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """Store a page; return whether it is stored."""
        return self.batch_set([key], None if value is None else [value])

    def batch_set(
        self,
        keys: list[str],
        values: Sequence[torch.Tensor] | None = None,
        target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """Store pages; return whether all of them are stored."""
        made = [each.contiguous() for each in values or []]
        if len(made) != len(keys):
            return False
        return all(self._tried(lambda: self._copied(keys, made, True), [False] * len(keys)))

    # --- both

    def exists(self, key: str) -> bool:
        """Return whether a page of KV can be loaded."""
        return self.batch_exists([key]) == 1

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """Return how many leading pages of KV can be loaded."""
        return self._tried(lambda: self._leading(keys), 0)

    def clear(self) -> bool:
        """Remove all pages from the disk; return whether that was possible."""
        store = self._store
        return store is not None and self._tried(store.clear, False)

    def close(self) -> None:
        """End the calls in progress, and close the store."""
        store = self._store
        self._store = None
        if store is None:
            return
        try:
            store.close()
        except PortaKVError as error:
            _log.warning("close", "A store was left open: %s", error)

    # --- work

    def _tried(self, work: Callable[[], T], otherwise: T) -> T:
        """Return what work returns, or another value if a store has failed."""
        try:
            return work()
        except PortaKVError as error:
            _log.warning("failed", "Pages are not stored or loaded: %s", error)
            return otherwise

    def _pool(self, name: object) -> PoolPages:
        """Return a host pool. Raises `StoreError` for one that was not registered."""
        pool = self._pools.get(str(name))
        if pool is None:
            raise StoreError(
                f"Expected one of the pools {[*self._pools]}, got {str(name)!r}. Register it."
            )
        return pool

    def _loaded(self, name: object, keys: list[str], indices: torch.Tensor) -> list[bool]:
        none = [False] * len(keys)
        return self._tried(lambda: self._pool(name).load(_names(keys), indices).tolist(), none)

    def _saved(
        self, name: object, keys: list[str], indices: torch.Tensor, extra_info: Any
    ) -> list[bool]:
        before = getattr(extra_info, "prefix_keys", None)
        after = _name(before[-1]) if before else None
        return self._tried(
            lambda: self._pool(name).save(_names(keys), indices, after).tolist(),
            [False] * len(keys),
        )

    def _copied(self, keys: list[str], pages: Sequence[torch.Tensor], saves: bool) -> list[bool]:
        """Store pages from memory, or load them into it; memory of another size is left out."""
        if KV not in self._pools or self._settings.in_place:
            return [False] * len(keys)
        kv: PagePool = self._pools[KV].pages
        fit = [_fits(page, kv.size.nbytes) for page in pages]
        names = [name for name, fits in zip(_names(keys), fit, strict=True) if fits]
        places = [[page.data_ptr()] for page, fits in zip(pages, fit, strict=True) if fits]
        act = kv.save if saves else kv.load
        done = iter(act(names, np.array(places, np.int64).reshape(-1, 1)).tolist())
        return [fits and next(done) for fits in fit]

    def _leading(self, keys: list[str]) -> int:
        return self._pools[KV].pages.lookup(_names(keys)) if KV in self._pools else 0

    def _restorable(self, keys: list[str], transfers: Sequence[Any]) -> Any:
        """Return how many leading pages can be restored, and each number that can be."""
        names = _names(keys)
        count = self._leading(keys)
        hits = {PoolName.KV: count} if count else {}
        able = np.ones(count, np.bool_)  # by the number of pages, less one
        for each in transfers:
            # For each number of leading pages, less one, whether a pool can restore it.
            pages = self._pool(each.name).pages
            there = np.zeros(count, np.bool_)
            if each.hit_policy == PoolHitPolicy.ALL_PAGES:
                there = pages.restorable(names[:count])
            elif each.hit_policy == PoolHitPolicy.TRAILING_PAGES:
                there = pages.restorable(names[:count], max(1, len(each.keys or ())))
            boundary = int(np.flatnonzero(there)[-1]) + 1 if there.any() else 0
            if boundary:
                hits[each.name] = boundary
            able &= there
        numbers = (np.flatnonzero(able) + 1).tolist()
        return PoolTransferResult(numbers[-1] if numbers else 0, hits, numbers)


def _name(key: str) -> bytes:
    """Return a key of SGLang as bytes: its checksum, or of other texts a checksum."""
    try:
        name = bytes.fromhex(key)
    except ValueError:
        name = b""
    return name if len(name) == 32 else sha256(key.encode()).digest()


def _names(keys: Sequence[str]) -> list[bytes]:
    return [*map(_name, keys)]


def _fits(page: Any, nbytes: int) -> bool:
    """Return whether memory has the bytes of a page, one after the other, on the host."""
    if not isinstance(page, torch.Tensor) or page.device.type != "cpu":
        return False
    return page.is_contiguous() and page.numel() * page.element_size() == nbytes
