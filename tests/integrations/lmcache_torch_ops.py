# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for LMCache's own tests: what they call of its torch ops is PortaKV's.

It prints at the end how often each was called, so that a run in which nothing was replaced is seen.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest

from portakv.integrations.lmcache import ops
from portakv.integrations.lmcache.platform import OPS

_calls: Counter[str] = Counter()


def pytest_configure(config: pytest.Config) -> None:
    """Replace the functions before a test module takes them."""
    from lmcache.v1.platform import torch_ops

    for name in OPS:
        if hasattr(torch_ops, name):
            _replace(torch_ops, name, getattr(ops, name))
    staged = functools.partial(ops.lmcache_memcpy_async, device_type="cpu")
    _replace(torch_ops, "lmcache_memcpy_async", functools.wraps(staged.func)(staged))


def _replace(torch_ops: Any, name: str, function: Any) -> None:
    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        _calls[name] += 1
        return function(*args, **kwargs)

    setattr(torch_ops, name, counted)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = ", ".join(f"{name} {times}" for name, times in sorted(_calls.items())) or "none"
    terminalreporter.write_line(f"PortaKV's ops were called: {counts}")
