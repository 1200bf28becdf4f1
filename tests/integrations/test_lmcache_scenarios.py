# SPDX-License-Identifier: Apache-2.0
"""LMCache's own scenarios of the replaced ops, on the simulated device: its tests know the devices
of three vendors by name, so that the scenarios are called here with another one.

`.ci/plugs` names the folder of LMCache's sources, and starts a process whose device is ``mlu``.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

SOURCES = os.environ.get("LMCACHE_SOURCES", "")
if not SOURCES or os.environ.get("SIMDEV_NAME") != "mlu":
    pytest.skip("LMCACHE_SOURCES names no sources; see .ci/plugs", allow_module_level=True)

from lmcache.v1.platform import resolve_device_ops  # noqa: E402

from portakv.integrations.lmcache.platform import OPS  # noqa: E402
from portakv_conformance import simdev  # noqa: E402

#: Ops for which LMCache's tests have no scenario.
UNTRIED = {
    "DirectCopyGroupSpec",
    "DirectCopyObject",
    "batch_memcpy_supported",
    "direct_copy_format_supported",
    "execute_direct_copy_transfer",
}
NAMES = [*(name for name in OPS if name not in UNTRIED), "lmcache_memcpy_async"]


@pytest.fixture(scope="module")
def scenarios() -> dict[str, Any]:
    path = Path(SOURCES) / "tests/v1/test_torch_ops.py"
    spec = importlib.util.spec_from_file_location("lmcache_test_torch_ops", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    registered: dict[str, Any] = module.SCENARIO_REGISTRY
    return registered


@pytest.mark.parametrize("name", NAMES)
def test_scenario(name: str, scenarios: dict[str, Any]) -> None:
    scenarios[name](resolve_device_ops("mlu"), "mlu:0")
    assert not simdev.take_faults()
