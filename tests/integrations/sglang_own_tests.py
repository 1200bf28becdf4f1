# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for SGLang's own tests of `sgl_kernel.kvcacheio`: PortaKV's module stands there.

    python -m pytest --noconftest -p sglang_own_tests sgl-kernel/tests/test_kvcacheio.py

Only its repository has them. They ask for CUDA by name; on a machine without it they get the
simulated device. With CUDA 13 they skip themselves because of a fault of SGLang's kernels.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from portakv.integrations.sglang import kvcacheio
from portakv_conformance import simdev


class InPlaceOfCuda(TorchFunctionMode):
    """Functions of torch that are given ``"cuda"``, or a device of it, get another one."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        arguments = [self._other(each) for each in args]
        return function(
            *arguments, **{key: self._other(each) for key, each in (kwargs or {}).items()}
        )

    def _other(self, value: Any) -> Any:
        is_cuda = isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
        return str(value).replace("cuda", self._device) if is_cuda else value


def pytest_configure() -> None:
    """Put the module in its place before a test module takes its functions."""
    sys.path.append(str(Path(__file__).parents[1]))
    import_module("support.sglang_on_cpu")  # before SGLang
    with suppress(ImportError):  # of a package that is installed, its small copy too
        small: Any = import_module("sgl_kernel.elementwise")
        small.copy_to_gpu_no_ce = kvcacheio.copy_to_gpu_no_ce
    sys.modules["sgl_kernel.kvcacheio"] = kvcacheio


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run what is skipped for the sake of the kernels that are not run here."""
    for module in {item.getparent(pytest.Module) for item in items}:
        if module is not None:
            markers = [x for x in module.own_markers if "CUDA 13" not in str(x.kwargs)]
            module.own_markers[:] = markers


@pytest.fixture(autouse=True)
def a_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if torch.cuda.is_available():
        yield
        return
    name = os.environ.get("SIMDEV_NAME", "simdev")
    simdev.load(name)
    monkeypatch.setattr(torch.cuda, "synchronize", torch.accelerator.synchronize)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: torch.Stream(name))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    with InPlaceOfCuda(name):
        yield
