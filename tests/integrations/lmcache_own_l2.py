# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for LMCache's own tests: PortaKV's L2 adapter stands in the place of theirs.

    python -m pytest --noconftest -p lmcache_own_l2 tests/v1/distributed/test_mock_l2_adapter.py ...

Each adapter that a test makes, for a bandwidth or for a folder, is PortaKV's with a folder of its
own. LMCache's controllers then drive it. What a test changes inside of an adapter of LMCache, such
as a method, stays LMCache's.
"""

from __future__ import annotations

import importlib
import tempfile
import threading
from typing import Any

import lmcache
import pytest

from portakv.integrations.lmcache.l2 import PortaKVL2Adapter, key_of
from portakv.serving.pages import PageTask

ADAPTERS = "lmcache.v1.distributed.l2_adapters"
#: LMCache's adapters whose places are taken.
REPLACED = {"mock": "MockL2Adapter", "fs": "FSL2Adapter"}
_made = 0


class Own(PortaKVL2Adapter):
    """PortaKV's adapter, which takes the configurations of LMCache's, and answers its tests.

    It is as slow as a test wants.
    """

    def __init__(self, config: Any) -> None:
        global _made
        _made += 1
        self._own_folder = None
        folder = getattr(config, "base_path", None)
        if folder is None:
            self._own_folder = tempfile.TemporaryDirectory()
            folder = self._own_folder.name
        self._closing = threading.Event()
        self._bandwidth = getattr(config, "mock_bandwidth_gb", 1024.0) * 2**30
        super().__init__({"folder": folder, "capacity": 64 << 20, "staging": 16 << 20})
        self._max_capacity_bytes = int(getattr(config, "max_size_gb", 0.0) * 2**30)

    def _ended(self, task: PageTask) -> None:
        self._closing.wait(task.landed_bytes / self._bandwidth)
        super()._ended(task)

    def close(self) -> None:
        self._closing.set()
        super().close()
        if self._own_folder is not None:
            self._own_folder.cleanup()

    def report_status(self) -> dict[str, Any]:
        return {**super().report_status(), "type": "MockL2Adapter"}

    def debug_get_stored_object_count(self) -> int:
        return len(self._counted)

    def debug_get_locked_key_count(self) -> int:
        return self._tasks.locked

    def debug_has_key(self, key: Any) -> bool:
        return bool(self._tasks.holds([key_of(key)])[0])


def pytest_configure() -> None:
    """Put the adapter in its place before a test module takes another one."""
    type(lmcache.torch_dev).is_available = lambda _: True  # the controllers need no device
    for name, adapter in REPLACED.items():
        module = importlib.import_module(f"{ADAPTERS}.{name}_l2_adapter")
        setattr(module, adapter, Own)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"Adapters of PortaKV that tests made: {_made}")
