# SPDX-License-Identifier: Apache-2.0
"""A stand-in of SGLang: the classes that a storage backend of HiCache uses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

STORAGE = "sglang/srt/mem_cache/hicache_storage.py"
FACTORY = "sglang/srt/mem_cache/storage/backend_factory.py"
#: The classes of SGLang's module, with what the backend uses of them.
CLASSES = """
import enum
from dataclasses import dataclass


class PoolName(str, enum.Enum):
    KV = "kv"
    MAMBA = "mamba"

    def __str__(self):
        return self.value


class PoolHitPolicy(str, enum.Enum):
    ALL_PAGES = "all_pages"
    TRAILING_PAGES = "trailing_pages"


@dataclass
class PoolTransferResult:
    kv_hit_pages: int
    extra_pool_hit_pages: dict
    restorable_prefix_pages: object = None


class HiCacheStorage:
    def register_mem_pool_host(self, mem_pool_host):
        self.mem_pool_host = mem_pool_host

    def register_mem_host_pool_v2(self, host_pool, host_pool_name):
        pass

    def on_host_pools_registered(self):
        pass

    def batch_exists_v2(self, keys, pool_transfers=None, extra_info=None):
        raise NotImplementedError

    def batch_get_v2(self, transfers, extra_info=None):
        raise NotImplementedError

    def batch_set_v2(self, transfers, extra_info=None):
        raise NotImplementedError

    def batch_get_v1(self, keys, host_indices, extra_info=None):
        raise NotImplementedError

    def batch_set_v1(self, keys, host_indices, extra_info=None):
        raise NotImplementedError
"""
DYNAMIC = """
class StorageBackendFactory:
    @classmethod
    def _create_dynamic_backend(cls, backend_config, storage_config, mem_pool_host, **kwargs):
        raise NotImplementedError
"""


def write_sglang(folder: Path, without: str = "") -> None:
    """Write a module ``sglang`` that has the base classes alone, and the metadata of a release.

    ``without``: a method that the release lacks.
    """
    for name, text in ((STORAGE, CLASSES), (FACTORY, DYNAMIC)):
        at = folder / name
        at.parent.mkdir(parents=True, exist_ok=True)
        for package in (*at.relative_to(folder).parents,):
            if package.name:
                (folder / package / "__init__.py").write_text("")
        at.write_text(
            text.replace(f"def {without}(", f"def former_{without}(") if without else text
        )
    info = folder / "sglang-0.5.23.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.23\n")


def configuration(terms: Any, **more: Any) -> SimpleNamespace:
    """Return what SGLang passes to a storage backend."""
    config: dict[str, Any] = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "dp_rank": 0,
        "dcp_size": 1,
        "dcp_rank": 0,
        "is_mla_model": False,
        "should_split_heads": False,
        "model_name": "org/model",
        "extra_config": {"interface_v1": 1, "portakv": terms},
    }
    return SimpleNamespace(**config | more)
