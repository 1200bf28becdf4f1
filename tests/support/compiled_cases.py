# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of `compiled`: where they run, and copies through it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from portakv import CopyPlan, Index, KVView, copy_rows
from portakv.backends.compiled import Compiled
from portakv.registry import registry
from support.triton_cases import finish

_missing = Compiled.probe(torch.device("cpu"))
needs_compiler = pytest.mark.skipif(not _missing.accepted, reason=_missing.reason)
DEVICES = [
    pytest.param("cpu", marks=needs_compiler),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
on_each_device = pytest.mark.parametrize("device", DEVICES)


def compiled(device: str) -> Compiled:
    """The registry's backend: its programs are shared by all tests."""
    home = torch.device(device, 0) if device == "cuda" else torch.device(device)
    backend = registry.choose(home, "compiled").backend
    assert isinstance(backend, Compiled)
    return backend


@contextmanager
def compiling(device: str, programs: int) -> Iterator[None]:
    """Exactly so many functions are compiled meanwhile."""
    backend = compiled(device)
    before = backend.compilations
    yield
    assert backend.compilations - before == programs


def copy(src: KVView, dst: KVView, mine: Any = None, theirs: Any = None, **more: Any) -> None:
    copy_rows(src, dst, mine, theirs, backend="compiled", **more).synchronize()


def launch(src: KVView, dst: KVView, mine: Index, theirs: Index, status: Any = None) -> None:
    """A launch behind the library's checks, and its end."""
    plan = CopyPlan(src.form, dst.form, mine.plan_step, theirs.plan_step)
    count = mine.length or theirs.length
    assert count is not None
    compiled(src.device.type).prepare(plan)(src, dst, mine, theirs, count, None, status)
    finish(src.device.type)
