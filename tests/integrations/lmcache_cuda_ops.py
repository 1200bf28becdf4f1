# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for LMCache's own tests on a CUDA device: in ``lmcache.cuda_ops``, ``c_ops``
before 0.5.4, which they call by name, PortaKV's ops stand before LMCache's, or before its torch ops
if those do not load.

    python -m pytest --noconftest -p lmcache_cuda_ops tests/v1/test_mem_kernels.py \
        tests/v1/test_mp_mem_kernels.py tests/v1/multiprocess/test_blocked_scale_format.py \
        tests/v1/multiprocess/test_direct_copy_transfer_gpu.py
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest

from portakv.integrations.lmcache import ops
from portakv.integrations.lmcache.platform import OPS


class _Ops(ModuleType):
    """PortaKV's ops, then those of another module."""

    def __init__(self, name: str, fallback: Any) -> None:
        super().__init__(name)
        self._fallback = fallback
        for name in OPS:
            setattr(self, name, getattr(ops, name))
        self.lmcache_memcpy_async = ops.lmcache_memcpy_async

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fallback, name)


def pytest_configure(config: pytest.Config) -> None:
    """Put the module in its place before a test module takes it."""
    import lmcache

    name = "c_ops" if "lmcache.c_ops" in sys.modules else "cuda_ops"
    try:
        fallback: Any = importlib.import_module(f"lmcache.{name}")
    except ImportError:
        fallback = importlib.import_module("lmcache.v1.platform.torch_ops")
    made = sys.modules[f"lmcache.{name}"] = _Ops(f"lmcache.{name}", fallback)
    setattr(lmcache, name, made)
